"""The folder of an engine's socket: nobody's who lives is taken away, and nobody's stays who was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fewbit.engine.spawn import PrivateFolder
from fewbit.engine.types import EngineDownError

CODE = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from fewbit.engine.spawn import PrivateFolder
folder = PrivateFolder()
(folder.path / "engine.sock").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_what_the_killed_left_is_gone_at_the_next_start(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # a short path
        monkeypatch.setattr(tempfile, "tempdir", place)
        alive = PrivateFolder()
        line = [sys.executable, "-c", CODE, place]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            left = Path(other.stdout.readline().strip())
            assert left.parent == Path(place)
            another = PrivateFolder()
            assert (left / "engine.sock").exists()  # its process lives
            other.kill()
        assert (left / "engine.sock").exists()  # the fault is there
        foreign = Path(place) / "fewbit-engine-link"
        foreign.symlink_to("/usr")
        last = PrivateFolder()
        assert not left.exists()
        assert foreign.is_symlink()
        for folder in (alive, another, last):
            assert folder.path.stat().st_mode & 0o077 == 0
            folder.remove()
            assert not folder.path.exists()


def test_no_place_for_it_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no/such/place")
    with pytest.raises(EngineDownError, match=r"no folder for the engine's socket can be made: .*TMPDIR$"):
        PrivateFolder()
