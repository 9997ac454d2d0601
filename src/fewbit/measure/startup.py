"""How long a server takes from the start of its process to its first answer, as somebody outside sees it.

Any server will do that is started by a command: it is asked for ``/health`` until that answers 200, then for one token.
What is in memory of the model's files decides much of it, so the page cache is emptied of them or filled with them
first, and what then lies in it is measured.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import Sample
from fewbit.measure.load.endpoint import Asking, Endpoint, client_of, served_models
from fewbit.measure.load.http import Client, ExchangeError

POLL_S = 0.01
_STOP_S = 30.0
_TAIL = 400  # characters of a dead server's last words
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Startup:
    """One start; seconds from the start of the process.

    Attributes:
        listening_s: until it took a connection.
        ready_s: until ``/health`` answered 200.
        first_token_s: until the first token of the first answer.
        cached: share of the model's files in the page cache before.
        file_bytes: of the model's files.
    """

    listening_s: float
    ready_s: float
    first_token_s: float
    cached: float
    file_bytes: int


def command_of(model: Path) -> list[str]:
    """What serves a model with fewbit; ``{port}`` stands for the port."""
    return [sys.executable, "-m", "fewbit.cli", "serve", str(model), "--port", "{port}"]


def words_of(command: str) -> list[str]:
    """A command that a user gives.

    Raises:
        RequestError: it does not say ``{port}``.
    """
    words = shlex.split(command)
    if not any("{port}" in word for word in words):
        raise RequestError(f"--command {command}: expected {{port}} where the server's port goes")
    return words


def start_once(model: Path, command: Sequence[str], *, cold: bool, timeout_s: float = 600.0) -> Startup:
    """Start a server, ask it for a token, stop it.

    Args:
        model: directory whose files the page cache is emptied of, or filled with.
        command: what to start; ``{port}`` is replaced.
        cold: whether the files are out of the page cache.
        timeout_s: until it is given up.

    Raises:
        RequestError: it ended, or was not ready in time: its last words.
    """
    files = [file for file in sorted(model.iterdir()) if file.is_file() and file.stat().st_size]
    _settle_cache(files, cold)
    share = cached(files)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        try:
            process = subprocess.Popen(
                [word.replace("{port}", str(port)) for word in command],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RequestError(f"{command[0]}: cannot be started ({error.strerror})") from None
        try:
            listening, ready, first = asyncio.run(_reach(process, said, port, timeout_s))
        finally:
            _stop(process)
    size = sum(file.stat().st_size for file in files)
    return Startup(listening - begin, ready - begin, first - begin, share, size)


async def _reach(
    process: subprocess.Popen[bytes], said: IO[bytes], port: int, timeout_s: float
) -> tuple[float, float, float]:
    """When it listened, was ready, and gave its first token; on the clock of `time.monotonic`, which is the loop's."""
    client = client_of(f"127.0.0.1:{port}", None)
    listening = 0.0
    begin = time.monotonic()
    while True:
        if process.poll() is not None:
            raise RequestError(f"the server ended with status {process.returncode}: {_last_words(said)}")
        if time.monotonic() - begin > timeout_s:
            raise RequestError(f"the server was not ready within {timeout_s:g} s: {_last_words(said)}")
        status = await _health(client)
        listening = listening or (time.monotonic() if status else 0.0)
        if status == 200:
            break
        await asyncio.sleep(POLL_S)
    ready = time.monotonic()
    endpoint = Endpoint(client, Asking((await served_models(client))[0], timeout_s=timeout_s))
    record = await endpoint.send(endpoint.prepare(Sample("Once upon a time", 1)))
    await client.close()
    if record.error is not None:
        raise RequestError(f"the server was ready, but gave no answer: {record.error}")
    return listening, ready, record.arrivals[0]


async def _health(client: Client) -> int:
    """The status of ``/health``; 0: nobody listens."""
    try:
        async with asyncio.timeout(5):
            return (await client.exchange(client.request("GET", "/health"), lambda stamp, body: None)).status
    except (ExchangeError, TimeoutError):
        return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: whatever it has started goes with it
        process.wait()


def _last_words(said: IO[bytes]) -> str:
    said.seek(0)
    return " ".join(said.read().decode("utf8", "replace")[-_TAIL:].split()) or "it said nothing"


def _settle_cache(files: Sequence[Path], cold: bool) -> None:
    for file in files:
        with file.open("rb") as opened:
            if cold:
                os.fsync(opened.fileno())  # only pages that are on disk can be let go
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass


def cached(files: Sequence[Path]) -> float:
    """Share of the files' pages that lie in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = pages = 0
    for file in files:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            told = (ctypes.c_ubyte * count)()
            start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(mapped))
            failed = libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), told)
            del anchor  # the map cannot be closed while something points into it
            if failed:
                raise OSError(ctypes.get_errno(), "mincore failed", str(file))
            here, pages = here + sum(byte & 1 for byte in told), pages + count
    return here / pages if pages else 0.0
