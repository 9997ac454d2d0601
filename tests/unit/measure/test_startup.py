"""Starting a server, with one that is ready after a known time."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from fewbit.errors import RequestError
from fewbit.measure.startup import cached, start_once, words_of

SERVER = textwrap.dedent("""
    import http.server, json, sys, time
    begin, asked = time.monotonic(), 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def say(self, status, body):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            global asked
            asked += 1
            ready = asked > 1 and time.monotonic() - begin > 0.5
            self.say(200 if ready else 503, json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self):
            time.sleep(0.3)
            event = {"choices": [{"text": "x", "finish_reason": "length"}]}
            self.say(200, b"data: " + json.dumps(event).encode() + b"\\n\\ndata: [DONE]\\n\\n")

        def log_message(self, *_):
            pass

    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
""")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(os.urandom(1 << 20))
    return tmp_path


def test_a_start_has_its_stages(model):
    found = start_once(model, [sys.executable, "-c", SERVER, "{port}"], cold=False)
    assert 0 < found.listening_s < found.ready_s < found.first_token_s
    assert found.ready_s > 0.5
    assert found.first_token_s - found.ready_s >= 0.3
    assert (found.cached, found.file_bytes) == (1.0, 1 << 20)


def test_files_leave_the_page_cache(model):
    file = model / "model.safetensors"
    assert cached([file]) == 1.0
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached([file]) == 1.0:
        pytest.skip("THIS FILE SYSTEM KEEPS ITS FILES IN MEMORY, so no start was cold")
    assert cached([file]) == 0.0


def test_what_is_no_server(model):
    dead = [sys.executable, "-c", "import sys; sys.exit('no GPU here')", "{port}"]
    with pytest.raises(RequestError, match="the server ended with status 1: no GPU here"):
        start_once(model, dead, cold=True)
    with pytest.raises(RequestError, match=r"not ready within 0.4 s: it said nothing"):
        start_once(model, [sys.executable, "-c", "import time; time.sleep(60)"], cold=True, timeout_s=0.4)
    with pytest.raises(RequestError, match="/missing/server: cannot be started"):
        start_once(model, ["/missing/server"], cold=True)
    with pytest.raises(RequestError, match=r"expected \{port\} where"):
        words_of("vllm serve DIR --port 8000")
    assert words_of("vllm serve 'a b' --port={port}") == ["vllm", "serve", "a b", "--port={port}"]
