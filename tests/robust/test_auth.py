"""A server with keys: who has none of them gets nowhere, and nobody sees one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import CHAT, COMPLETION, GENERATE, GOLDEN, Server, post

pytestmark = pytest.mark.slow

KEY, OTHER = "correct-horse-battery", "staple-for-the-second"
ROUTES = [
    *(("POST", path) for path in (COMPLETION, CHAT, GENERATE, "/tokenize", "/detokenize", "/v2/repository/index")),
    *(("POST", f"/v2/repository/models/storyteller/{what}") for what in ("load", "unload")),
    *(("GET", path) for path in ("/v1/models", "/metrics", "/health", "/v2", "/v2/models/storyteller", "/version")),
    *(("GET", path) for path in ("/openapi.json", "/tokenizer_info", "/nowhere", "/v2/models/stats", "/docs")),
]
WRONG = {
    "none": [],
    "an empty one": ["Authorization: Bearer "],
    "only the scheme": ["Authorization: Bearer"],
    "another": ["Authorization: Bearer wrong-horse-battery"],
    "its beginning": [f"Authorization: Bearer {KEY[:-1]}"],
    "more than it": [f"Authorization: Bearer {KEY}x"],
    "it in capitals": [f"Authorization: Bearer {KEY.upper()}"],
    "both keys": [f"Authorization: Bearer {KEY} {OTHER}"],
    "two headers": [f"Authorization: Bearer {KEY}", "Authorization: Bearer wrong-horse-battery"],
    "the right one twice": [f"Authorization: Bearer {KEY}"] * 2,
    "above ASCII": ["Authorization: Bearer \xe9\xe8\xff"],
    "another scheme": [f"Authorization: Basic {KEY}"],
    "no scheme": [f"Authorization: {KEY}"],
    "another header": [f"X-API-Key: {KEY}"],
    "a megabyte": ["Authorization: Bearer " + "x" * 60_000],
}
TRICKS = (
    "//v1/models",
    "/v2/health/live/../../../v1/models",
    "/v2/health/live/",
    "/v2/health/live%2f..%2f..%2fv1%2fmodels",
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may ask\n{KEY}\n{OTHER}\n")
    file.chmod(0o600)
    running = Server("--api-key-file", str(file), "--drain", "2", key=KEY)
    yield running
    running.close()


@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_answered_without_a_key(guarded: Server, name: str):
    for method, path in ROUTES:
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *WRONG[name], "Content-Length: 0", "", ""])
        answer = guarded.raw(head.encode("latin-1"))
        assert answer.status == 401, (path, answer)
        assert KEY.encode() not in answer.body
    guarded.unharmed()


def test_paths_that_look_open(guarded: Server):
    for path in TRICKS:
        answer = guarded.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert answer.status in (401, 404), (path, answer)
        assert b"storyteller" not in answer.body, path
    for fields in (["X-Original-URL: /v2/health/live"], ["X-Forwarded-Prefix: /v2/health/live"]):
        assert guarded.raw(post(COMPLETION, GOLDEN, *fields)).status == 401


def test_either_key_and_any_case_of_the_scheme(guarded: Server):
    for value in (f"Bearer {KEY}", f"Bearer {OTHER}", f"bearer {KEY}", f"BEARER {KEY}"):
        assert guarded.raw(post(COMPLETION, GOLDEN, f"Authorization: {value}")).status == 200, value


def test_a_key_is_nowhere_to_be_seen(guarded: Server):
    for path in ("/metrics", "/version", "/v1/models", "/openapi.json", "/nowhere", f"/{KEY}x"[:5], "/v2"):
        assert KEY.encode() not in guarded.ask(path).body
    bad = guarded.ask(COMPLETION, {"prompt": 3})
    assert KEY.encode() not in bad.body
    assert KEY not in "".join(guarded.log)
    command = Path(f"/proc/{guarded.process.pid}/cmdline").read_bytes()
    assert KEY.encode() not in command


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "127.0.0.1@evil", "[::1"]
)
def test_other_names_than_this_machines(server: Server, host: str):
    """A page in a browser here may have a name that leads to 127.0.0.1; the header tells."""
    answer = server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert 400 <= answer.status < 500
    assert b"storyteller" not in answer.body


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1.evil.example", "null", "file://", "x"])
def test_pages_of_other_sites(server: Server, origin: str):
    """A browser sends a form of any page anywhere, and says where the page is from."""
    answer = server.raw(post(COMPLETION, GOLDEN, f"Origin: {origin}", "Content-Type: text/plain"))
    assert answer.status == 403, answer
    for own in (server.url, "http://localhost:3000"):
        assert server.raw(post(COMPLETION, GOLDEN, f"Origin: {own}")).status == 200
