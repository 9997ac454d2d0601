"""What docs/migrate.md says does the job of a published command, run: all its marked blocks, from top to bottom."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest

from fewbit.cli import app
from fewbit.demo import demo_model
from fewbit.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migrate.md").read_text("utf8")
BLOCKS = re.findall(r"<!-- runs here -->\n\n```(sh|python)\n(.*?)```", PAGE, re.DOTALL)
PUBLISHED = (
    *("hf_ptq.py", "build.py", "trtllm-build", "run.py", "fill_template.py", "launch_triton_server.py"),
    *("v2/models/ensemble/generate", "megatron_gpt_ptq.py", "DeployPyTriton", "NemoQueryLLM", "trtllm-serve"),
    *("vllm serve", "trtllm-bench", "prepare_dataset.py"),
)
PRINTED = {
    "curl -X POST localhost:8000/v2": '"text_output":"How do I count to nine in French?',
    "curl localhost:8000/v1": '"finish_reason":"',
    "fewbit inspect small-nim": "trtllm",
    "import fewbit\n\nnm": "['",
}
"""By how a block begins, or what stands in it: a piece of what it has to print."""


def test_every_published_command_is_there_and_every_block_is_run():
    assert [name for name in PUBLISHED if name not in PAGE] == []
    assert PAGE.count("<!-- runs here -->") == len(BLOCKS) >= 12


def test_every_option_of_a_table_exists():
    """An option in the column of fewbit is one of the command that stands in its row or in the table's head."""
    import typer

    commands = typer.main.get_command(app).commands
    options = {o for c in commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE):
        for option in re.findall(r"`(?:fewbit \w+ )?(--[\w-]+)", row.rsplit(" | ", 1)[1]):
            assert option in options, row


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the blocks run: with the bundled model, and a small .nemo archive."""
    from helpers import make_model

    sys.path.insert(0, str(ROOT / "tests" / "unit" / "checkpoint"))
    from test_nemo import packed

    made = tmp_path_factory.mktemp("migrate")
    (made / "models").mkdir()
    try:
        (made / "models" / "storyteller").symlink_to(demo_model())
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no command was run: {error}")
    packed(make_model(made / "source", rope_scaling=None), made / "llama.nemo")
    return made


@pytest.fixture(scope="module")
def environment(folder) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"FEWBIT_DEMO_MODEL": str(folder / "models" / "storyteller"), "PATH": path}


class Servers:
    """The server of the last `fewbit serve`, on ports of its own."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.port = ""

    def start(self, line: str, folder: Path, environment: dict[str, str]) -> None:
        self.stop()
        words = [*shlex.split(self.moved(line)), "--device", "cpu", "--grpc-port", "0"]
        self.process = subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        said = []
        for text in self.process.stderr:
            said.append(text)
            if text.startswith("serving"):
                threading.Thread(target=deque, args=(self.process.stderr, 0), daemon=True).start()  # never full
                return
        pytest.fail("".join(said))

    def moved(self, text: str) -> str:
        """The same with a free port in the place of 8000, until the next server."""
        if self.process is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = str(probe.getsockname()[1])
        return text.replace("8000", self.port)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(300) == 0
            finally:
                self.process.kill()
                self.process.wait()
                self.process = None


@pytest.mark.slow
def test_the_blocks_run_from_top_to_bottom(folder, environment):
    servers = Servers()
    try:
        for language, block in BLOCKS:
            if block.startswith("fewbit serve"):
                servers.start(block, folder, environment)
                continue
            if language == "python":  # it starts its own
                servers.stop()
            code = servers.moved(block)
            words = ["bash", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            done = subprocess.run(words, cwd=folder, env=environment, timeout=600, check=False, **both)
            assert done.returncode == 0, f"{block}\n{done.stdout}"
            for key, wanted in PRINTED.items():
                if key in block:
                    assert wanted in done.stdout, f"{block}\n{done.stdout}"
    finally:
        servers.stop()
