"""What is no request, or takes for ever to become one: a refusal or a closed connection, and nobody else notices."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import select
import socket
import time
import zlib

import pytest
from real_server import CHAT, COMPLETION, GENERATE, GOLDEN, WAIT_S, Answer, Server, head, post, read_answer, sampled

GOOD = json.dumps(GOLDEN).encode()
LENGTH = f"Content-Length: {len(GOOD)}"
CHUNKED = "Transfer-Encoding: chunked"
CLOSE = "Connection: close"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (*parts, b""))


NO_REQUESTS: dict[str, tuple[bytes, int, str]] = {
    "a head of 10 MB": (head(COMPLETION, f"X-Long: {'x' * 10_000_000}"), 431, "BadRequestError"),
    "a head of 100 kB at once": (
        head(COMPLETION, f"X-Long: {'x' * 100_000}", LENGTH) + GOOD,
        431,
        "65536 are the most",
    ),
    "200 fields": (head(COMPLETION, *["A: b"] * 200, LENGTH) + GOOD, 431, "128 and"),
    "a path of 100 kB": (head("/" + "x" * 100_000, method="GET"), 431, "65536 are the most"),
    "a length and chunks": (head(COMPLETION, LENGTH, CHUNKED) + chunks(GOOD), 400, "both Transfer-Encoding and"),
    "chunks and a length": (head(COMPLETION, CHUNKED, "Content-Length: 4") + chunks(GOOD), 400, "both Transfer-"),
    "two lengths": (head(COMPLETION, LENGTH, "Content-Length: 4") + GOOD, 400, "conflicting Content-Length"),
    "a negative length": (head(COMPLETION, "Content-Length: -1") + GOOD, 400, "bad Content-Length"),
    "a length of 30 digits": (head(COMPLETION, "Content-Length: " + "9" * 30) + GOOD, 400, "bad Content-Length"),
    "a length with a plus": (head(COMPLETION, f"Content-Length: +{len(GOOD)}") + GOOD, 400, "bad Content-Length"),
    "an unknown transfer coding": (head(COMPLETION, "Transfer-Encoding: gzip, chunked") + GOOD, 501, "Only Transfer"),
    "a chunk of no size": (head(COMPLETION, CHUNKED) + b"zz\r\nhello\r\n", 400, "chunk"),
    "a chunk longer than it says": (head(COMPLETION, CHUNKED) + b"2\r\nhello\r\n0\r\n\r\n", 400, "is not HTTP"),
    "a field without a name": (head(COMPLETION, ": x", LENGTH) + GOOD, 400, "is not HTTP"),
    "a space before the colon": (head(COMPLETION, f"Content-Length : {len(GOOD)}") + GOOD, 400, "is not HTTP"),
    "a field with NUL": (head(COMPLETION, "A: b\0c", LENGTH) + GOOD, 400, "is not HTTP"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host"),
    "two hosts": (head("/health", "Host: other", method="GET"), 400, "multiple Host"),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, 400, "is not HTTP"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "neither 1.0 nor 1.1"),
    "HTTP/9": (b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 505, "neither 1.0"),
    "a path with a space": (b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n", 400, "is not HTTP"),
    "a path with a byte above ASCII": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, "is not HTTP"),
    "only line ends": (b"\r\n" * 40_000, 400, "is not HTTP"),
}


@pytest.mark.parametrize("name", sampled(NO_REQUESTS, every=8))
def test_what_is_no_request(server: Server, name: str):
    data, status, why = NO_REQUESTS[name]
    answer = server.raw(data)
    assert answer.status == status
    assert why in answer.body.decode()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert len(answer.body) < 500
    server.unharmed()


PACKED = {
    "gzip": gzip.compress(GOOD),
    "deflate": zlib.compress(GOOD),
    "GZIP": gzip.compress(GOOD),
    "identity": GOOD,
}


@pytest.mark.parametrize("name", sampled(PACKED))
def test_a_packed_body_is_unpacked(server: Server, name: str):
    answer = server.ask(COMPLETION, PACKED[name], {"Content-Encoding": name})
    assert answer.json["choices"] == server.golden


BAD_PACKED = {
    "a bomb": ("gzip", gzip.compress(b" " * (200 << 20)), 413, "the unpacked body is larger than the limit"),
    "a bomb in a bomb": ("gzip, gzip", gzip.compress(PACKED["gzip"]), 415, "packed once with gzip or deflate"),
    "not gzip": ("gzip", GOOD, 400, "the body is not gzip, as Content-Encoding says"),
    "not deflate": ("deflate", GOOD, 400, "the body is not deflate"),
    "half of it": ("gzip", PACKED["gzip"][:40], 400, "ends in the middle of its gzip data"),
    "a wrong checksum": ("gzip", PACKED["gzip"][:-8] + b"\0" * 8, 400, "the body is not gzip"),
    "more behind it": ("gzip", PACKED["gzip"] + b"x" * 9, 400, "9 bytes follow the end"),
    "nothing": ("gzip", b"", 400, "ends in the middle"),
    "an unknown one": ("br", GOOD, 415, "Content-Encoding 'br' is not supported"),
    "nonsense": ("x" * 5000, GOOD, 415, "is not supported"),
}


@pytest.mark.parametrize("name", sampled(BAD_PACKED, every=10))
def test_a_packed_body_that_is_wrong(server: Server, name: str):
    encoding, body, status, why = BAD_PACKED[name]
    for path in (COMPLETION, CHAT, GENERATE):
        answer = server.ask(path, body, {"Content-Encoding": encoding})
        assert (answer.status, why in answer.message) == (status, True), answer
        assert len(answer.body) < 300
        if status == 415:
            assert answer.headers["accept-encoding"] == "gzip, deflate"
    server.unharmed()


@pytest.mark.slow
def test_a_body_in_many_chunks(server: Server):
    body = GOOD + b" " * (100_000 - len(GOOD))
    assert server.raw(head(COMPLETION, CHUNKED) + chunks(*(body[i : i + 1] for i in range(len(body))))).status == 200
    server.unharmed()


def test_a_length_that_is_too_short_leaves_no_request_behind(server: Server):
    """What follows a body is the next request on the connection, and is none."""
    first, second = all_answers(server, head(COMPLETION, LENGTH) + GOOD + b"and more\r\n\r\n")
    assert first.json["choices"] == server.golden
    assert second.status == 400
    server.unharmed()


def all_answers(server: Server, data: bytes) -> list[Answer]:
    """Every answer on one connection until the server closes it."""
    with server.connect() as s:
        s.sendall(data)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    answers = []
    for text in received.split(b"HTTP/1.1 ")[1:]:
        top, _, body = text.partition(b"\r\n\r\n")
        answers.append(Answer(int(top[:3]), body=body))
    return answers


@pytest.mark.slow
def test_a_length_that_is_too_long_ends_with_the_client(server: Server):
    with server.connect() as s:
        s.sendall(head(COMPLETION, f"Content-Length: {len(GOOD) + 9}") + GOOD)
        s.shutdown(socket.SHUT_WR)
        assert read_answer(s).status == 0
    server.unharmed()
    server.quiet()


@pytest.mark.slow
@pytest.mark.parametrize("path", [COMPLETION, "/nowhere"])
def test_a_body_over_the_limit(server: Server, path: str):
    wanted = 413 if path == COMPLETION else 404
    for fields, parts in (
        (["Content-Length: 1000000000000"], []),
        (["Content-Length: 1000000000000", "Expect: 100-continue"], []),
        ([CHUNKED], [b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"] * 40),
    ):
        answer = server.raw(head(path, *fields), *parts)
        assert (answer.status, len(answer.body) < 200) == (wanted, True), fields
    server.unharmed()


@pytest.mark.slow
def test_nobody_may_send_on_for_ever_after_the_answer(server: Server):
    with server.connect() as s:
        s.sendall(head("/nowhere", "Content-Length: 1000000000000"))
        assert read_answer(s).status == 404
        with pytest.raises(ConnectionError):
            s.sendall(b"x" * (100 << 20))
    server.unharmed()


@pytest.mark.slow
def test_a_client_that_sends_a_byte_a_second(server: Server):
    """Three at once: a head, a body, and a body whose answer is given already. And one that says nothing at all."""
    began, answers = time.monotonic(), {}
    slow = [server.connect() for _ in range(4)]
    slow[0].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    slow[1].sendall(head(COMPLETION, "Content-Length: 1000"))
    slow[2].sendall(head("/nowhere", "Content-Length: 1000"))
    assert read_answer(slow[2]).status == 404
    while len(answers) < 4:
        assert time.monotonic() - began < WAIT_S
        server.unharmed()
        for i, s in enumerate(slow):
            if i in answers:
                continue
            if select.select([s], [], [], 0.2)[0]:  # before anything is sent, which would fail where it is closed
                answers[i] = read_answer(s)
            elif i < 3:
                with contextlib.suppress(ConnectionError):  # what it said before it closed can still be read
                    s.sendall(b" ")
    assert time.monotonic() - began > 8
    assert [answers[i].status for i in range(4)] == [408, 408, 0, 0]
    assert "did not arrive in time" in answers[0].message
    for s in slow:
        s.close()
    server.quiet()


@pytest.mark.slow
def test_five_thousand_idle_connections(server: Server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip(f"FEW FILES: this user may open {hard}, so 5000 connections were not tried")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    before, files = server.rss()[0], server.files()
    idle = [server.connect() for _ in range(5000)]
    server.unharmed()
    held = server.rss()[0] - before
    assert held < 5000 * 40_000, f"{held / 5000:.0f} bytes a connection"
    for s in idle[:2500]:
        s.close()
    assert idle[-1].recv(1) == b"", "an idle connection is closed in the end"
    for s in idle[2500:]:
        s.close()
    server.unharmed()
    server.files_at_most(files + 5)


PATHS = [
    *("/v1/completions/", "//v1/completions", "/v1//completions", "/V1/completions", "/%2fv1/completions", "*"),
    *("/v1/%2e%2e/v1/completions", "/v1/../v1/completions", "/v1/completions;x=1", "/v1/completions%00"),
    *("/v1/completions%0d%0aX: y", "/v1/%ff%fe", "/..%5c..%5cetc", "/v2/models/../../etc/passwd"),
    "/v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
]


@pytest.mark.slow
def test_methods_and_paths(server: Server):
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "BREW"):
        answer = server.ask(COMPLETION, method=method, body=b"")
        assert answer.status == 405, method
        assert answer.headers["allow"] == "POST"
    for path in PATHS:
        answer = server.raw(head(path.replace(" ", "%20"), LENGTH) + GOOD)
        assert 400 <= answer.status < 500, (path, answer)
        assert b"root:" not in answer.body
    for path in ("/health", "/metrics", "/v1/models"):
        assert server.ask(path, GOLDEN).status == 405, path
    server.unharmed()


def test_requests_one_behind_the_other(server: Server):
    """Pipelined: good, bad, good, on one connection."""
    good, bad = post(COMPLETION, GOLDEN), post(COMPLETION, {"prompt": 3})
    answers = all_answers(server, good + bad + post(COMPLETION, GOLDEN, CLOSE))
    assert [a.status for a in answers] == [200, 400, 200]
    assert answers[0].json["choices"] == answers[2].json["choices"] == server.golden
