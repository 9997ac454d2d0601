"""A real server on a real socket, asked by curl and by OpenAI's own client; clients that leave; signals."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from serve_names import CHAT, COMPLETION, GENERATE, SAYS, write_model

from fewbit.errors import RecipeError
from fewbit.serve import bind
from fewbit.serve import run as serving

PUBLISHED = (
    '{"text_input":"How do I count to nine in French?",'
    '"parameters":{"max_tokens":100,"bad_words":[""],"stop_words":[""]}}'
)
TALK = {"messages": [{"role": "user", "content": "Count!"}]}


def until(true, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_small_packets_wait_for_nobody():
    """Else a stream's second piece is held back for the client's acknowledgement: 40 ms."""
    with bind(port=0) as listener, socket.create_connection(listener.getsockname()):
        taken, _ = listener.accept()
        with taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_curl_with_the_published_line(live):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    done = subprocess.run(
        ["curl", "-sS", "-X", "POST", live + GENERATE, "-d", PUBLISHED], capture_output=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == {
        "model_name": "ensemble",
        "model_version": "1",
        "sequence_end": False,
        "sequence_id": 0,
        "sequence_start": False,
        "text_output": "How do I count to nine in French?" + SAYS,
    }


def test_curl_with_a_body_that_is_too_large(live, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    (tmp_path / "body").write_bytes(b" " * (40 << 20))
    line = ["curl", "-sS", "-w", "%{http_code}", live + COMPLETION, "--data-binary", f"@{tmp_path / 'body'}"]
    for more in ([], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]):
        done = subprocess.run([*line, *more], capture_output=True, timeout=60, check=True, text=True)
        assert done.stdout.endswith("413"), more
        assert len(done.stdout) < 300


def test_the_openai_client(live):
    client = openai.OpenAI(base_url=live + "/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["storyteller"]
    asked = {"model": "storyteller", **TALK}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (SAYS, "stop")
    assert whole.choices[0].logprobs.content[0].logprob == -0.5
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    *chunks, usage = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == SAYS
    assert chunks[0].choices[0].delta.role == "assistant"
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    back = [*TALK["messages"], whole.choices[0].message, {"role": "user", "content": "More."}]
    assert client.chat.completions.create(model="storyteller", messages=back).choices[0].message.content == SAYS
    text = client.completions.create(model="storyteller", prompt=["a", "b"], n=2, max_tokens=50, logprobs=1)
    assert [c.text for c in text.choices] == [SAYS] * 4
    pieces = client.completions.create(model="storyteller", prompt="a", max_tokens=50, stream=True, stop=["trois"])
    assert "".join(c.choices[0].text for c in pieces) == "un, deux, "
    with pytest.raises(openai.BadRequestError, match="did you mean 'top_p'") as e:
        client.chat.completions.create(**asked, extra_body={"topp": 1})
    assert e.value.body["param"] == "topp"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "gpt"})


def test_the_openai_client_sees_a_failure_on_the_way(live, engine):
    engine.fail_after = 2
    client = openai.OpenAI(base_url=live + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(client.chat.completions.create(model="storyteller", stream=True, **TALK))


@pytest.mark.parametrize("where", ["before the first token", "on the way", "whole", "many", "generate"])
def test_a_client_that_leaves_frees_its_blocks(live, engine, where):
    engine.hold_after = 60 if where == "on the way" else 0  # no text ends of itself
    engine.says = engine.says * 10
    path, body = CHAT, TALK | {"stream": where not in ("whole", "generate")}
    if where == "many":
        path, body = COMPLETION, {"prompt": ["a", "b"], "n": 2, "stream": True, "max_tokens": 99}
    if where == "generate":
        path, body = GENERATE, {"text_input": "x", "max_tokens": 99}
    content = json.dumps(body).encode()
    host, port = live.removeprefix("http://").split(":")
    wanted = 4 if where == "many" else 1
    with socket.create_connection((host, int(port))) as s:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        s.sendall(head.encode() + content)
        until(lambda: len(engine.running) == wanted)
        if where == "on the way":
            while b"deux" not in s.recv(65536):
                pass
    until(lambda: not engine.running)
    assert len(engine.aborted) == wanted
    until(lambda: f'fewbit:requests_cancelled_total{{model_name="storyteller"}} {wanted}.0' in metrics(live))


def metrics(url):
    return httpx.get(url + "/metrics", timeout=30).text


def test_a_neighbour_is_not_disturbed(live, engine):
    engine.hold_after = 2
    client = httpx.Client(base_url=live, timeout=60)
    with client, client.stream("POST", CHAT, json=TALK | {"stream": True}) as r:
        lines = r.iter_lines()
        next(lines)
        with socket.create_connection(live.removeprefix("http://").split(":")) as s:
            content = json.dumps(TALK).encode()
            s.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            until(lambda: len(engine.running) == 2)
        until(lambda: len(engine.aborted) == 1)
        assert [request.id for request in engine.seen][1:] == engine.aborted
        engine.hold_after = None
        assert sum(line.startswith("data: {") for line in lines) >= 10
    assert len(engine.aborted) == 1


def test_a_reader_that_takes_nothing_is_dropped(live, engine, monkeypatch):
    monkeypatch.setattr("fewbit.serve.connection.EventStream.__init__.__defaults__", (0.2, None))
    engine.says = engine.says * 15
    engine.hold_after = 190  # far more than all buffers hold, and it does not end of itself
    host, port = live.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 200, "n": 64, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect((host, int(port)))
        s.sendall(f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(engine.seen) == 64)
        until(lambda: not engine.running, 60)
    assert len(engine.aborted) == 64
    assert httpx.get(live + "/health", timeout=30).status_code == 200


def test_health_and_metrics(live, engine):
    assert httpx.get(live + "/health", timeout=30).status_code == 200
    httpx.post(live + CHAT, json=TALK, timeout=30)
    httpx.post(live + CHAT, json=TALK | {"stop": ["deux"]}, timeout=30)
    httpx.post(live + CHAT, json={}, timeout=30)
    text = metrics(live)
    one = '{model_name="storyteller"}'
    for line in (
        f"fewbit:num_requests_running{one} 0.0",
        f"fewbit:num_requests_waiting{one} 0.0",
        f"fewbit:kv_cache_usage_perc{one} 0.0",
        f"fewbit:kv_cache_blocks{one} 64.0",
        f"fewbit:engine_up{one} 1.0",
        'fewbit:request_success_total{finished_reason="stop",model_name="storyteller"} 2.0',
        'fewbit:http_responses_total{path="/v1/chat/completions",status="200"} 2.0',
        'fewbit:http_responses_total{path="/v1/chat/completions",status="400"} 1.0',
        f"fewbit:time_to_first_token_seconds_count{one} 2.0",
        f"fewbit:e2e_request_latency_seconds_count{one} 2.0",
        f"fewbit:request_prompt_tokens_count{one} 2.0",
    ):
        assert line in text.splitlines(), line
    for name in ("generation_tokens_total", "prefix_cache_hits_total", "num_preemptions_total", "inter_token_latency_"):
        assert f"fewbit:{name}" in text
    assert httpx.head(live + "/metrics", timeout=30).status_code == 200
    engine.down = True
    assert httpx.get(live + "/health", timeout=30).status_code == 503
    assert f"fewbit:engine_up{one} 0.0" in metrics(live)


def test_a_taken_port_is_one_clear_error(live):
    port = int(live.rsplit(":", 1)[1])
    with pytest.raises(RecipeError, match=rf"cannot listen on 127\.0\.0\.1 port {port} .*--port"):
        bind(port=port)
    with pytest.raises(RecipeError, match="cannot listen"):
        bind("no.such.host.invalid")
    with pytest.raises(RecipeError, match="cannot listen"):
        bind(port=70000)


@pytest.fixture
def child(tmp_path):
    """`child(hold_after, drain_s)` starts a server in a process (see `serve_child`) and gives it with its URL."""
    started = []

    def start(hold_after, drain_s):
        here = Path(__file__).parent
        command = [sys.executable, "serve_child.py", str(write_model(tmp_path)), str(hold_after), str(drain_s)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=here, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        return process, url

    yield start
    for process in started:
        process.kill()
        process.communicate()


def drains(url) -> bool:
    return httpx.get(url + "/health", timeout=30).status_code == 503


def test_sigterm_drains(child):
    process, url = child(1, 600)
    got = []
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json=TALK | {"stream": True}) as r,
    ):
        lines = r.iter_lines()
        got.append(next(lines))
        process.send_signal(signal.SIGTERM)
        until(lambda: drains(url))
        refused = httpx.post(url + CHAT, json=TALK, timeout=30)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "shutting down" in refused.json()["error"]["message"]
        process.stdin.write("go on\n")
        process.stdin.flush()
        got += list(lines)
    assert got[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"stop"' in got[-4]
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()


def test_sigterm_when_idle_and_ctrl_c(child):
    process, _ = child(-1, 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process, _ = child(-1, 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_drain_that_was_asked_for_is_no_signal(app):
    server = serving._Server(uvicorn.Config(app), app.state.models, 20, None, "")
    app.state.models.draining = True
    server.handle_exit(signal.SIGTERM, None)
    assert not server.force_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit


@pytest.mark.parametrize("second", [True, False])
def test_a_request_that_never_ends_does_not_hold_the_server(child, second):
    process, url = child(0, 600 if second else 0.3)
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json=TALK | {"stream": True}) as r,
    ):
        lines = r.iter_lines()  # kept: closing it would close the connection
        next(lines)
        process.send_signal(signal.SIGTERM)
        if second:
            until(lambda: drains(url))  # two signals at once would be one
            process.send_signal(signal.SIGTERM)
        if not second:
            assert "shutting down" in "".join(lines)  # told, not cut off
        assert process.wait(60) == 0
