"""What `fewbit serve` says, and what those who started it make of that."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fewbit
from fewbit.errors import RequestError

pytestmark = pytest.mark.slow

STORYTELLER = Path(__file__).parents[2] / "models" / "storyteller"


@pytest.mark.parametrize("options", [{"quiet": True}, {"log_format": "json"}, {"log_format": "json", "quiet": True}])
def test_a_server_is_found_whatever_it_writes(caplog: pytest.LogCaptureFixture, options: dict):
    caplog.set_level(logging.DEBUG, "fewbit.serve.handle")
    with fewbit.serve(STORYTELLER, port=0, **options) as server:
        assert fewbit.Client(server.url).query(["Once upon a time"], max_tokens=3)
    lines = [r for r in caplog.records if "serving" in r.getMessage()]
    assert lines
    assert {r.levelno for r in lines} == {logging.DEBUG if options.get("quiet") else logging.INFO}
    assert all(r.getMessage().startswith("{") == ("log_format" in options) for r in lines)


def answered(url: str) -> list[str]:
    try:
        return fewbit.Client(url).query(["Once upon a time"], max_tokens=3)
    except RequestError:
        return []


def test_a_folder_without_models(tmp_path: Path):
    """A warning; what comes into it is served."""
    line = [sys.executable, "-m", "fewbit.cli", "serve", "--model-dir", str(tmp_path), "--port", "0"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for text in process.stderr:
                said.append(text)
                if "serving" in text:
                    break
            assert any(f"there is no model in {tmp_path} yet; what comes there is served" in t for t in said), said
            assert f"serving 0 models of {tmp_path} on http://" in said[-1]
            url = said[-1].split(" on ")[1].split()[0]
            with pytest.raises(RequestError, match="no model is served here yet"):
                fewbit.Client(url).query(["Once upon a time"], max_tokens=3)
            shutil.copytree(STORYTELLER, tmp_path / "new")
            ends = time.monotonic() + 300
            while not (found := answered(url)):  # the folder is looked at once a second
                assert time.monotonic() < ends
                time.sleep(0.1)
            assert found
        finally:
            process.terminate()
            process.communicate(timeout=300)


def test_a_cache_that_is_too_large_is_named_as_the_command_names_it():
    line = [sys.executable, "-m", "fewbit.cli", "serve", str(STORYTELLER), "--port", "0", "--kv-blocks", "100000000"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "; lower num_blocks (--kv-blocks on the command line)" in done.stderr.splitlines()[-1]
