"""A real server: `fewbit serve` in a process of its own with its engine in another, asked over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

STORYTELLER = Path(__file__).parents[2] / "models" / "storyteller"
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
GENERATE = "/v2/models/ensemble/generate"
GOLDEN = {"prompt": "The old fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
FLAT = GOLDEN | {"max_tokens": 1900}
"""A request that goes on while a test does something: nearly as long as the model allows."""
WAIT_S = 120.0
"""How long anything that has to happen may take: a machine that has others to serve is given time, a hang is found."""
START_S = 300.0
"""As long may two processes take to import what they need and to load a model."""
REFUSAL_S = 1.0
"""So soon is a bad request refused, on a machine that does `_work` in WORK_S of processor time."""
WORK_S = 0.05
TRIES = 3


@dataclass(frozen=True)
class Answer:
    """What came back: status 0 for a connection that was closed without a word."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The words of an error, in either protocol's shape."""
        error = self.json["error"]
        return error if isinstance(error, str) else error["message"]


class Server:
    """`fewbit serve` with `arguments`, until `close`."""

    def __init__(
        self,
        *arguments: str,
        model: Path | None = STORYTELLER,
        golden: dict[str, Any] = GOLDEN,
        key: str = "",
        wrap: tuple[str, ...] = (),
        **popen: Any,
    ) -> None:
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        line = [*wrap, sys.executable, "-m", "fewbit.cli", "serve", *([str(model)] if model else []), "--port", "0"]
        self.log: list[str] = []
        self.process = subprocess.Popen([*line, *arguments], stderr=subprocess.PIPE, text=True, **popen)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.port = 0
        self._reader.start()
        if not self._ready.wait(START_S) or self.port == 0:
            self.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.log))
        self._asked = golden
        self.golden = self.ask(COMPLETION, golden).json["choices"]

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.log.append(line)
            if found := re.search(r"serving .* on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                self._ready.set()
        self._ready.set()

    # ---- asking ----

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = WAIT_S) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, *parts: bytes, timeout: float = 2 * WAIT_S, method: str = "POST") -> Answer:
        """Send bytes as they are and read one answer."""
        with self.connect(timeout) as s:
            try:
                for part in parts:
                    s.sendall(part)
            except OSError:  # refused before everything was sent; the answer is what counts
                pass
            return read_answer(s, method)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST") -> Answer:
        """One request on a connection of its own; `body`: bytes as they are, else what becomes JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None and method == "POST" else method
        length = {} if body is None else {"Content-Length": str(len(content))}
        given = length | self._key | (headers or {})
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in given.items())
        return self.raw(
            head.encode("utf-8", "surrogateescape") + b"\r\n" + (content if body is not None else b""), method=method
        )

    def refused(
        self, path: str, body: Any, headers: dict[str, str] | None = None, limit_s: float = REFUSAL_S, also: int = 0
    ) -> Answer:
        """The answer to a bad request: an error (or the status `also`) in good time.

        In good time is by the clock or by the processor time of the server, whichever is less, since the machine may
        have others to serve; the best of some tries, since that is noisy; and more on a machine that is itself slow.
        """
        times = []
        for _ in range(TRIES):
            worked, began = self.cpu_s(), time.monotonic()
            answer = self.ask(path, body, headers)
            times.append(min(time.monotonic() - began, self.cpu_s() - worked))
            assert 400 <= answer.status < 500 or answer.status == also, answer
            if times[-1] < limit_s:
                return answer
        allowed = limit_s * max(1.0, _work() / WORK_S)
        assert min(times) < allowed, f"it took {times} s, and {allowed:.2f} are allowed"
        return answer

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics, by name and labels."""
        answer = self.ask("/metrics")
        assert answer.status == 200, answer
        lines = (line for line in answer.body.decode().splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(v for n, v in self.metrics().items() if n.partition("{")[0] == f"fewbit:{name}")

    # ---- how it is ----

    def unharmed(self) -> None:
        """It runs, and says to the golden prompt what it said at first, byte for byte."""
        assert self.process.poll() is None, "".join(self.log)
        answer = self.ask(COMPLETION, self._asked)
        assert answer.status == 200, answer
        assert answer.json["choices"] == self.golden

    def quiet(self, limit_s: float = WAIT_S) -> None:
        """Nothing runs, nothing waits, and no block is held."""
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used"):
            until(lambda name=name: self.metric(name) == 0, limit_s, f"{name} 0")

    def quiet_but(self, running: int, limit_s: float = WAIT_S) -> None:
        """So many requests run, and no more."""
        self.reaches("num_requests_running", running, limit_s)

    def reaches(self, metric: str, value: float, limit_s: float = WAIT_S) -> None:
        """A metric has, or soon gets, this value."""
        until(lambda: self.metric(metric) == value, limit_s, f"{metric} {value:g}")

    @property
    def engine(self) -> psutil.Process:
        (child,) = engines(self.process.pid)
        return child

    def rss(self) -> tuple[int, int]:
        """Bytes that the server and its engine hold."""
        return psutil.Process(self.process.pid).memory_info().rss, self.engine.memory_info().rss

    def cpu_s(self) -> float:
        """Seconds of processor time that the server, without its engine, has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def files(self) -> int:
        """Open files and sockets of the server."""
        return psutil.Process(self.process.pid).num_fds()

    def files_at_most(self, most: int) -> None:
        """No more files are open, once it has seen that the clients are gone."""
        until(lambda: self.files() <= most, what=f"at most {most} open files")

    # ---- the end ----

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def close(self) -> None:
        """End it as it should be ended, and see that it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        self._reader.join(WAIT_S)


def read_answer(s: socket.socket, method: str = "POST") -> Answer:
    """One answer from a socket; a connection that is closed or reset without one is status 0."""
    response = http.client.HTTPResponse(s, method=method)
    try:
        response.begin()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (http.client.HTTPException, ConnectionError):
        return Answer(0)


def head(path: str, *fields: str, method: str = "POST") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *fields, "", ""]).encode("latin-1")


def post(path: str, body: Any, *fields: str) -> bytes:
    """A whole request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, f"Content-Length: {len(content)}", *fields) + content


def engines(pid: int) -> list[psutil.Process]:
    """The engine processes of a server."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile; a zombie is one too
            if "fewbit.engine.process" in child.cmdline():
                found.append(child)
    return found


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked for its status yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_ended(processes: Sequence[psutil.Process]) -> None:
    """Wait until there is none of them any more."""
    until(lambda: all(map(ended, processes)), what=f"the end of {processes}")


def _work() -> float:
    """Seconds of processor time that this machine needs now for a piece of work like that of refusing a request."""
    began = time.thread_time()
    for _ in range(4):
        json.loads(json.dumps({str(i): [i, "x"] for i in range(10_000)}))
    return time.thread_time() - began


def until(true: Any, limit_s: float = WAIT_S, what: str = "it") -> float:
    """Wait until `true()`; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit_s, f"{what} never came in {limit_s:g} s"
        time.sleep(0.005)
    return time.monotonic() - began


def sampled(names: Any, every: int = 6) -> list[Any]:
    """All names for a parametrized test; only some of them, by chance but always the same, are run by `make test`."""
    order = random.Random(0).sample(list(names), len(names))
    quick = set(order[::every])
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names]
