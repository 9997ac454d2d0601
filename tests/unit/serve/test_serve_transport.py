"""Limits of time and number of connections, with limits small enough to wait for."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time

import httpx
import pytest
from serve_names import COMPLETION, SAYS

from fewbit.serve import run, transport

TEXT = {"prompt": "Count:", "max_tokens": 99}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(transport, "ARRIVE_S", 1.0)
    monkeypatch.setattr(transport, "SLOW_S", 1.0)


def connected(url: str, **options: int) -> socket.socket:
    s = socket.socket()
    for name, value in options.items():
        s.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    s.settimeout(60)
    host, port = url.removeprefix("http://").split(":")
    s.connect((host, int(port)))
    return s


def everything(s: socket.socket) -> bytes:
    return b"".join(iter(lambda: s.recv(65536), b""))


def test_who_says_nothing_is_let_go(live, short):
    began = time.monotonic()
    with connected(live) as s:
        assert s.recv(1) == b""
    assert time.monotonic() - began > 1


@pytest.mark.parametrize("path", [COMPLETION, "/v2/models/storyteller/generate"])
def test_a_body_that_never_comes_is_told_so(live, engine, monkeypatch, path):
    with connected(live) as s:
        s.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99\r\n\r\n".encode())
        assert s.recv(65536).startswith(b"HTTP/1.1 100 ")  # it has read the head
        s.sendall(b"{")
        monkeypatch.setattr(transport, "ARRIVE_S", 0.0)
        head, _, body = everything(s).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout")
    error = json.loads(body)["error"]
    text = error if path.startswith("/v2") else error["message"]
    assert "the request did not arrive in time" in text
    assert not engine.seen


def test_methods_are_short(live):
    with connected(live) as s:
        s.sendall(b"G" * 17 + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = everything(s)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the method has 17 bytes, 16 are the most" in answer


def test_what_is_wrong_after_the_answer_ends_the_connection(live, caplog):
    with connected(live) as s:
        s.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += (more := s.recv(65536))
            assert more
        s.sendall(b"this is no chunk\r\n")
        with contextlib.suppress(ConnectionError):
            assert s.recv(1) == b""
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert not [r for r in caplog.records if r.exc_info]


@pytest.mark.slow
def test_a_body_that_keeps_coming_is_waited_for(live, short, monkeypatch):
    monkeypatch.setattr(transport, "SLOWEST_BYTES_PER_S", 1)
    body = json.dumps(TEXT).encode()
    with connected(live) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % COMPLETION.encode())
        s.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
        for i in range(0, len(body), 10):
            s.sendall(body[i : i + 10])
            time.sleep(0.6)
        answer = everything(s)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == SAYS


@pytest.mark.slow
def test_an_answer_that_nobody_takes_is_thrown_away(live, short):
    """Whatever it is: here so many pages of metrics that they fill every buffer."""
    with connected(live, SO_RCVBUF=2048) as s:
        s.setblocking(False)
        try:
            while True:
                s.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        except BlockingIOError:
            pass
        hung_up = select.poll()
        hung_up.register(s, select.POLLHUP)
        assert hung_up.poll(60_000), "the connection is still held"
    assert httpx.get(live + "/health", timeout=30).status_code == 200


@pytest.fixture
def few(monkeypatch):
    """Eight connections at a time; none of them ends of itself."""
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(transport, "ARRIVE_S", 600.0)


def test_idle_connections_make_room(few, live):
    """Those that have been idle for longest go first, and whoever comes is served."""
    idle = []
    for _ in range(30):
        idle.append(connected(live))
        assert httpx.get(live + "/health", timeout=30).status_code == 200
    assert is_gone(idle[0], 60)
    assert not is_gone(idle[-1], 0.2)
    for s in idle:
        s.close()


def is_gone(s: socket.socket, limit_s: float) -> bool:
    s.settimeout(limit_s)
    try:
        return s.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True
