"""`fewbit serve --log-format json`: whoever reads standard error reads JSON, from the first line to the last."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError


def started(*words: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "fewbit.cli", "serve", *map(str, words), "--port", "0", "--log-format", "json"]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def test_every_line_is_an_object():
    try:
        model = demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no server was started: {error}")
    server = started(model)
    try:
        lines: list[str] = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r'"serving storyteller on (http://\S+)', line):
                break
        urllib.request.urlopen(f"{found[1]}/v1/models").close()
    finally:
        server.send_signal(signal.SIGINT)
        try:
            lines += server.communicate(timeout=300)[1].splitlines()
        finally:
            server.kill()
    said = [json.loads(line) for line in lines]
    assert len(said) > 3
    assert {"fewbit.progress", "fewbit.requests"} <= {entry["logger"] for entry in said}
    assert said[-1]["message"] == "interrupted"


def test_so_is_the_error_that_ends_it():
    server = started("/nope")
    (line,) = server.communicate(timeout=300)[1].splitlines()
    assert server.returncode == 2
    found = json.loads(line)
    assert found["level"] == "error"
    assert found["message"] == "/nope is not a directory; expected a Hugging Face model directory"
