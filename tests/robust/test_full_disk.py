"""Disks that are full: what a command says, what it leaves, and that a server goes on without its log."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
from full_disk import Disk
from real_server import COMPLETION, GOLDEN, START_S, STORYTELLER, Server, until

from fewbit.checkpoint import open_checkpoint
from helpers import make_model

FEWBIT = (sys.executable, "-m", "fewbit.cli")
# As if the disk filled up after it was looked at.
BLIND = "import shutil; from types import SimpleNamespace as N; "
BLIND += "shutil.disk_usage = lambda path: N(total=1 << 60, free=1 << 60); "
BLIND += "from fewbit.cli import main; main()"
WRITING = {"compress": ("--recipe", "int8_wo", "--sample-tokens", "0"), "export": ("--to", "trtllm")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def said(line: Sequence[object], status: int = 2) -> str:
    """Run a command that must end with `status`, without a traceback; the last line of what it said."""
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=START_S)
    assert done.returncode == status, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return (done.stderr.splitlines() or [""])[-1]


# ---- what commands write ----


@pytest.mark.parametrize("command", ["export", pytest.param("compress", marks=pytest.mark.slow)])
def test_a_disk_that_is_too_small_is_known_before_the_work(tmp_path: Path, tiny: Path, command: str):
    """One line with both numbers, and nothing is left."""
    with Disk(tmp_path / "disk", "16k") as disk:
        line = said([*disk.run, *FEWBIT, command, tiny, *WRITING[command], "-o", disk.folder / "out"])
        assert line.startswith(f"fewbit: the disk of {disk.folder} is too full: the tensors take "), line
        assert line.endswith(" are free; make room there, or choose another folder"), line
        assert not list(disk.seen.iterdir())


@pytest.mark.parametrize("command", ["export", pytest.param("compress", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, tiny: Path, command: str):
    """One line that says where; nothing there opens as a model; with room the same command does all of it."""
    with Disk(tmp_path / "disk", "64k") as disk:
        out = disk.folder / "out"
        options = (command, tiny, *WRITING[command], "-o", out)
        line = said([*disk.run, sys.executable, "-c", BLIND, *options])
        assert line == f"fewbit: No space left on device: {out}; make room there, or choose another place"
        assert {path.name for path in disk.seen.iterdir()} <= {".out.unfinished"}  # to go on with, or nothing
        disk.grow("64m")
        said([*disk.run, *FEWBIT, *options], status=0)
        assert [path.name for path in disk.seen.iterdir()] == ["out"]
        whole = tmp_path / "whole"
        said([*FEWBIT, command, tiny, *WRITING[command], "-o", whole], status=0)
        open_checkpoint(whole)
        for file in (path for path in whole.rglob("*") if path.is_file()):
            assert (disk.seen / "out" / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "status"), [("stdout", 2), ("stderr", 0)])
def test_output_that_goes_to_a_full_disk(tiny: Path, stream: str, status: int):
    """A result that is lost is a failure; words on the way are not."""
    with Path("/dev/full").open("wb", 0) as full:
        with pytest.raises(OSError, match="No space left"):
            full.write(b"x")
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: full}
        line = [*FEWBIT, "compress", str(tiny), *WRITING["compress"], "-o", str(tiny.with_name(f"to_{stream}"))]
        done = subprocess.run(line, text=True, timeout=START_S, **streams)
    assert done.returncode == status, done
    if stream == "stdout":
        assert done.stderr.splitlines()[-1] == (
            "fewbit: No space left on device; make room there, or choose another place"
        )
    else:
        assert "written" in done.stdout


# ---- what a server writes ----


class Silent(Server):
    """A server whose standard error is `file`; `begin` begins its command line."""

    def __init__(self, file: BinaryIO, *arguments: str, begin: Sequence[str] = ()) -> None:
        self._key: dict[str, str] = {}
        self.log: list[str] = []
        self._reader = threading.Thread(target=bool)
        self._reader.start()
        line = [*begin, *FEWBIT, "serve", str(STORYTELLER), "--port", "0", *arguments]
        self.process = subprocess.Popen(line, stderr=file)
        until(lambda: self._listens() or self.process.poll() is not None, START_S, "a server that listens")
        assert self.process.poll() is None
        until(lambda: self.ask("/health").status == 200, START_S, "a server that is ready")
        self._asked = GOLDEN
        self.golden = self.ask(COMPLETION, GOLDEN).json["choices"]

    def _listens(self) -> bool:
        ports = [c.laddr.port for c in psutil.Process(self.process.pid).net_connections("tcp") if c.status == "LISTEN"]
        self.port = ports[0] if ports else 0
        return bool(ports)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_log_whose_disk_is_full(tmp_path: Path, form: str):
    """Requests are answered as ever and not a line is added; with room there is a log again, and the end is well."""
    with Disk(tmp_path / "disk", "128k") as disk:
        log = disk.seen / "log"
        with log.open("ab", 0) as file:
            server = Silent(file, "--log-format", form, "--log-level", "info", begin=disk.run)
        until(lambda: log.read_bytes().count(COMPLETION.encode()) == 1, what="a line for the request")
        disk.fill()
        for _ in range(60):  # the log's last page has room for some more lines
            server.ask("/v1/models")
        full = log.stat().st_size
        assert full % 4096 == 0
        for _ in range(3):
            server.unharmed()
        assert log.stat().st_size == full
        assert log.read_bytes().count(COMPLETION.encode()) == 1
        disk.empty()
        server.unharmed()
        until(lambda: COMPLETION.encode() in log.read_bytes()[full:], what="a log again")
        if form == "json":
            text = log.read_bytes()
            whole = text[:full].rpartition(b"\n")[0] + b"\n" + text[full:]  # without the line that the disk cut
            *_, last = [json.loads(line) for line in whole.splitlines() if line]
            assert (last["path"], last["status"]) == (COMPLETION, 200)
        disk.fill()
        server.close()
        assert server.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_server_that_can_write_no_word(form: str):
    """It starts, answers and ends all the same."""
    with Path("/dev/full").open("wb", 0) as full:
        with pytest.raises(OSError, match="No space left"):
            full.write(b"x")
        server = Silent(full, "--log-format", form, "--log-level", "info")
    server.unharmed()
    server.close()
    assert server.process.returncode == 0
