"""A server for clients, and commands in their environments."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """The URL of `fewbit serve MODEL OPTIONS` while the block runs; it must end well."""
    command = [sys.executable, "-m", "fewbit.cli", "serve", str(model), "--port", "0", "--grpc-port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in server.stderr:
            said += line
            if found := re.search(r"^serving .* on (http://\S+)", line):
                break
        else:
            pytest.fail(f"no server: {said}")
        threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # a full pipe would stop it
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0
    finally:
        server.kill()
        server.wait()


def run(words: Sequence[str], folder: Path, limit_s: float = 1200, **environment: str | None) -> str:
    """What a command printed; it must succeed. `environment`: changes to this process's, None removes one."""
    # its own packages and not ours, which this environment may name
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = {key: value for key, value in (env | environment).items() if value is not None}
    done = subprocess.run(
        words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
