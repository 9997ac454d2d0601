"""Who may ask, how long it may take, what is written down about it: keys, hosts, limits, logs, traces, other names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_names import CHAT, COMPLETION, GENERATE, SAYS, client_of, models_of, sse

from fewbit.errors import RecipeError, RequestError
from fewbit.serve import control, create_app, logs, tracing
from fewbit.serve.app import Manner
from fewbit.serve.auth import Gate, Keys, is_loopback, read_keys
from fewbit.serve.exchange import seconds_of
from fewbit.serve.metrics import Metrics
from fewbit.serve.models import Models
from fewbit.serve.service import Service
from virtual_time import run_virtually

KEY, OTHER = "first-key-0123", "second-key-456"
TEXT = {"prompt": "Count:", "max_tokens": 50}
TALK = {"messages": [{"role": "user", "content": "Count!"}]}


@pytest.fixture
def asked(engine, tokenizer):
    """`asked(manner, method, path, ...)`: one answer of an application that treats requests in this manner.

    Nobody waits, and nobody is late, however busy the machine: time is virtual.
    """

    def once(manner: Manner, method: str, path: str, body=None, **kwargs) -> httpx.Response:
        async def call() -> httpx.Response:
            async with client_of(create_app(models_of(tokenizer, storyteller=engine), manner=manner)) as client:
                content = None if body is None else json.dumps(body).encode()
                return await client.request(method, path, content=content, **kwargs)

        return run_virtually(call())

    return once


# --- keys -------------------------------------------------------------------------------------------------------------

GUARDED = Manner(Gate(Keys([KEY, OTHER])))


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_every_key_opens(asked, key, scheme):
    headers = {"authorization": f"{scheme} {key}"}
    assert asked(GUARDED, "POST", COMPLETION, TEXT, headers=headers).json()["choices"][0]["text"] == SAYS


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([], "an API key is needed"),
        ([("authorization", f"Bearer {KEY}x")], "the API key is wrong"),
        ([("authorization", f"Bearer {KEY[:-1]}")], "the API key is wrong"),
        ([("authorization", f"Bearer  {KEY}")], "the API key is wrong"),
        ([("authorization", f"Bearer {KEY} ")], "the API key is wrong"),
        ([("authorization", "Bearer ")], "the API key is wrong"),
        ([("authorization", "Bearer")], "the API key is wrong"),
        ([("authorization", "")], "must be 'Bearer KEY'"),
        ([("authorization", KEY)], "must be 'Bearer KEY'"),
        ([("authorization", f"Basic {KEY}")], "must be 'Bearer KEY'"),
        ([("authorization", "Bearer schlüssel-übel".encode())], "the API key is wrong"),
        ([("authorization", b"Bearer \xff\xfe\xfd")], "the API key is wrong"),
        ([("authorization", f"Bearer {KEY}")] * 2, "given more than once"),
        ([("authorization", f"Bearer {KEY}"), ("Authorization", "Bearer nonsense")], "given more than once"),
        ([("x-api-key", KEY)], "an API key is needed"),
    ],
)
def test_nothing_else_does(asked, engine, headers, why):
    r = asked(GUARDED, "POST", COMPLETION, TEXT, headers=headers)
    assert (r.status_code, r.headers["www-authenticate"]) == (401, 'Bearer realm="fewbit"')
    error = r.json()["error"]
    assert (error["type"], error["code"]) == ("AuthenticationError", 401)
    assert why in error["message"]
    assert KEY not in r.text
    r = asked(GUARDED, "POST", GENERATE, {"text_input": "x"}, headers=headers)
    assert r.status_code == 401
    assert why in r.json()["error"]
    assert not engine.seen


def routes(app) -> set[tuple[str, str]]:
    """Method and path of everything that an application answers."""
    found = set()
    for route in app.routes:
        included = getattr(route, "original_router", None)
        for one in [route] if included is None else included.routes:
            path = re.sub(r"\{\w+(:\w+)?\}", "storyteller", one.path)
            found |= {(method, path) for method in one.methods}
    return found


def test_every_route_but_live_and_ready_is_guarded(asked, engine, tokenizer):
    app = create_app(models_of(tokenizer, storyteller=engine), manner=GUARDED)
    found = routes(app) | {("GET", "/v2/health/live"), ("GET", "/nowhere"), ("GET", "/v2/health/livex")}
    assert {("POST", CHAT), ("GET", "/metrics"), ("GET", "/health"), ("GET", "/v1/models")} <= found
    open_now = {(method, path) for method, path in found if asked(GUARDED, method, path).status_code != 401}
    assert {path for _, path in open_now} - {"/v2/health/ready"} == {"/", "/page/storyteller", "/v2/health/live"}
    for trick in ("//v1/models", "/v2/health/live/../../v1/models", "/page/../v1/models", "/%2e%2e/v1/models"):
        assert asked(GUARDED, "GET", trick).status_code in (401, 404), trick


def test_keys_of_a_file_and_of_the_environment(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(f"# who asks\n{KEY}\n\n  {OTHER}  \n")
    file.chmod(0o600)
    keys = read_keys(file, {"FEWBIT_API_KEY": "from-elsewhere"})
    assert keys.allows(f"Bearer {KEY}")
    assert keys.allows(f"bearer {OTHER}")
    for wrong in (None, "", "Bearer from-elsewhere", "Bearer # who asks", "Bearer ü", f"Bearer {KEY}\n"):
        assert not keys.allows(wrong)
    assert not caplog.records
    file.chmod(0o644)
    read_keys(file, {})
    assert "everybody on this machine can read the API keys" in caplog.text
    assert read_keys(None, {}) is None
    assert read_keys(None, {"FEWBIT_API_KEY": KEY}).allows(f"Bearer {KEY}")
    for text, why in (
        ("", "there is no API key"),
        ("short", "at least 8"),
        ("schlüssel-lang", "ASCII"),
        ("a b c d e", "sp"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=why) as error:
            read_keys(file, {})
        assert not text or text not in str(error.value)
    with pytest.raises(RecipeError, match="at least 8"):
        read_keys(None, {"FEWBIT_API_KEY": ""})
    with pytest.raises(RecipeError, match="cannot be read"):
        read_keys(tmp_path / "gone", {})


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("models.example", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("localhost:80:80", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("", 403),
        ("localhost evil", 403),
    ],
)
def test_a_server_on_this_machine_answers_to_its_names_only(asked, host, status):
    manner = Manner(Gate(hosts=["Models.example"]))
    r = asked(manner, "GET", "/v1/models", headers={"host": host})
    assert r.status_code == status, r.text
    if status == 403:
        assert "--allowed-host" in r.json()["error"]["message"]


def test_what_a_loopback_is():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example", ""))


# --- request ids, limits of time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False), ("a\x7f", False)],
)
def test_request_ids(asked, given, taken):
    for path, body in ((COMPLETION, TEXT), (COMPLETION, {}), ("/v1/nothing", TEXT)):
        got = asked(Manner(), "POST", path, body, headers={"x-request-id": given}).headers["x-request-id"]
        assert (got == given) is taken
        assert re.fullmatch(r"[0-9a-f]{32}", got) or taken


@pytest.mark.parametrize("how", ["server", "client", "both"])
def test_a_request_that_takes_too_long_is_ended(asked, engine, how):
    engine.delay_s = 9.0
    manner = Manner(timeout_s={"server": 30.0, "client": None, "both": 600.0}[how])
    headers = {} if how == "server" else {"x-request-timeout": "30"}
    r = asked(manner, "POST", COMPLETION, TEXT, headers=headers)
    assert (r.status_code, r.json()["error"]["type"]) == (504, "TimeoutError")
    assert "ended before its text was complete: its time limit is 30 s" in r.json()["error"]["message"]
    assert "choices" not in r.json()
    assert len(engine.aborted) == 1
    assert not engine.running
    r = asked(manner, "POST", CHAT, TALK | {"stream": True}, headers=headers)
    *chunks, error, done = sse(r.text)
    assert (error["error"]["code"], done) == (504, "[DONE]")
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
    assert len(engine.aborted) == 2
    engine.delay_s = 0
    assert asked(manner, "POST", COMPLETION, TEXT, headers=headers).status_code == 200


def test_a_request_that_waits_for_its_first_token(asked, engine):
    engine.delay_s = 600
    r = asked(Manner(timeout_s=30), "POST", GENERATE, {"text_input": "x"})
    assert (r.status_code, r.json()["error"]) == (
        504, "the request was ended before its first token: its time limit is 30 s",
    )  # fmt: skip


def test_a_request_that_waits_to_be_queued(asked, engine):
    engine.admit_s = 600
    r = asked(Manner(timeout_s=30), "POST", COMPLETION, TEXT | {"n": 2})
    assert (r.status_code, "ended before its first token" in r.text) == (504, True)
    engine.admit_s = 20  # for each of them, but at the same time
    r = asked(Manner(timeout_s=120), "POST", COMPLETION, TEXT | {"n": 8})
    assert (r.status_code, len(r.json()["choices"])) == (200, 8)


def test_all_texts_of_a_request_are_queued_or_none(asked, engine):
    engine.delay_s, engine.room = 60, 5
    r = asked(Manner(), "POST", COMPLETION, TEXT | {"n": 8})
    assert (r.status_code, len(engine.aborted), engine.running) == (429, 5, {})
    r = asked(Manner(), "POST", COMPLETION, TEXT | {"prompt": ["x"] * 65})
    assert r.status_code == 400  # it would never be accepted, so this is no 429
    assert "65 texts are asked for, and at most 64 may wait (max_queued)" in r.text


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "soon", "", "1s"])
def test_limits_of_time_that_are_none(asked, engine, text):
    r = asked(Manner(), "POST", COMPLETION, TEXT, headers={"x-request-timeout": text})
    assert r.status_code == 400
    assert "X-Request-Timeout must be a number of seconds" in r.json()["error"]["message"]
    assert not engine.seen
    with pytest.raises(RequestError):
        seconds_of(text)


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(capsys):
    """`written(format, level)` sets the log up; calling what it gives reads the lines so far."""

    def begin(form: str, level: str | None = None):
        logs.set_up(form, level)
        return lambda: capsys.readouterr().err.splitlines()

    before, told = logging.getLogger().handlers[:], os.environ.get("FEWBIT_LOG_FORMAT")
    yield begin
    logging.getLogger().handlers[:] = before
    os.environ.pop("FEWBIT_LOG_FORMAT")
    os.environ |= {} if told is None else {"FEWBIT_LOG_FORMAT": told}
    logging.getLogger("fewbit").setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)


SECRET = "what nobody else may read"


def test_a_line_of_json_a_request(asked, written):
    lines = written("json")
    headers = {"x-request-id": "r-1", "authorization": f"Bearer {KEY}"}
    asked(GUARDED, "POST", COMPLETION, {"prompt": SECRET, "max_tokens": 50}, headers=headers)
    asked(GUARDED, "POST", COMPLETION, {"prompt": SECRET, "temperature": -1}, headers=headers)
    asked(GUARDED, "POST", COMPLETION, {"prompt": SECRET}, headers={"authorization": "Bearer wrong-secret"})
    asked(GUARDED, "GET", f"/{SECRET}", headers=headers)
    got = lines()
    assert SECRET not in str(got)
    assert KEY not in str(got)
    assert "wrong-secret" not in str(got)
    good, bad, refused, nowhere = (json.loads(line) for line in got)
    times = good.pop("time"), good.pop("seconds"), good.pop("first_token_seconds")
    assert 0 < times[2] <= times[1]
    assert good == {
        "level": "info", "logger": "fewbit.requests", "request_id": "r-1", "method": "POST", "path": COMPLETION,
        "status": 200, "model": "storyteller", "prompt_tokens": good["prompt_tokens"],
        "output_tokens": good["output_tokens"], "cached_tokens": 3,
    }  # fmt: skip
    assert good["output_tokens"] > 5
    assert (bad["status"], bad["path"], "model" in bad) == (400, COMPLETION, False)
    assert (refused["status"], refused["path"]) == (401, COMPLETION)
    assert (nowhere["status"], nowhere["path"]) == (404, "other")


def test_a_failure_is_json_too(asked, written, engine, monkeypatch):
    lines = written("json", "error")

    async def fails(request):
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "submit", fails)
    assert asked(Manner(), "POST", COMPLETION, TEXT).status_code == 500
    (line,) = lines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"]) == ("error", "unforeseen failure")
    assert "ZeroDivisionError" in entry["exception"]


def test_an_engine_process_writes_as_its_server_does(written):
    for form in ("json", "text"):
        written(form)
        line = [sys.executable, "-m", "fewbit.engine.process", "--socket", "x", "--model", "x", "--options", "no"]
        parent = os.pipe()  # which has to stay open: when it ends, so does the engine, before it has said anything
        done = subprocess.run(line, stdin=parent[0], capture_output=True, text=True, timeout=80, check=False)
        for end in parent:
            os.close(end)
        assert done.returncode == 1
        if form == "json":
            entry = json.loads(done.stderr)
            assert (entry["level"], entry["message"]) == ("error", "the engine could not be started")
        else:
            assert done.stderr.startswith("ERROR ")


def test_a_line_of_text_a_request_where_asked_for(asked, written):
    lines = written("text")
    asked(Manner(), "POST", COMPLETION, TEXT)
    assert lines() == []
    lines = written("text", "info")
    asked(Manner(), "GET", "/health")
    asked(Manner(), "POST", COMPLETION, TEXT, headers={"x-request-id": "r-2"})
    (line,) = lines()
    assert line.startswith("INFO fewbit.requests: request_id=r-2 method=POST path=/v1/completions status=200 seconds=")


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans():
    """What a collector would get."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Manner(traces=tracing.OpenTelemetry(provider)), exporter.get_finished_spans


def test_a_request_is_a_span_with_its_steps(asked, spans, engine):
    manner, finished = spans
    engine.delay_s = 0.002
    caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    asked(manner, "POST", COMPLETION, TEXT, headers={"traceparent": caller, "x-request-id": "r-3"})
    prefill, decode, request = finished()
    assert [s.name for s in (prefill, decode, request)] == ["prefill", "decode", f"POST {COMPLETION}"]
    assert f"{request.context.trace_id:032x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"{request.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert prefill.parent.span_id == decode.parent.span_id == request.context.span_id
    assert request.start_time <= prefill.start_time < prefill.end_time == decode.start_time < decode.end_time
    assert abs(request.end_time - decode.end_time) < 60e9
    attributes = dict(request.attributes)
    assert attributes.pop("gen_ai.usage.output_tokens") > 5
    assert attributes.pop("gen_ai.usage.input_tokens") > 0
    assert attributes == {
        "http.route": COMPLETION,
        "http.response.status_code": 200,
        "fewbit.request_id": "r-3",
        "gen_ai.request.model": "storyteller",
    }
    assert request.status.is_ok or request.status.is_unset


def test_traces_of_what_goes_wrong(asked, spans, engine):
    manner, finished = spans
    asked(manner, "POST", COMPLETION, {"prompt": 1}, headers={"traceparent": "nonsense"})
    engine.fail_after = 2
    asked(manner, "POST", COMPLETION, TEXT)
    refused, *_, failed = finished()
    assert (refused.attributes["http.response.status_code"], refused.parent) == (400, None)
    assert refused.status.is_unset
    assert failed.attributes["http.response.status_code"] == 500
    assert not failed.status.is_ok
    assert not failed.status.is_unset


def test_an_endpoint_that_is_none_and_packages_that_are_missing(monkeypatch):
    with pytest.raises(RecipeError, match=r"'localhost:4318' is no URL; expected such as http://127\.0\.0\.1:4318"):
        tracing.open_traces("localhost:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RecipeError, match=r"needs the extra 'otel': pip install 'fewbit\[otel\]'"):
        tracing.open_traces("http://127.0.0.1:4318/v1/traces")


# --- metrics under other names ----------------------------------------------------------------------------------------


def families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_same_numbers_under_other_names(engine, tokenizer, run):
    async def main() -> str:
        metrics = Metrics(["vllm", "triton"])
        models = Models([Service(engine, tokenizer, "storyteller", metrics.of("storyteller"))], metrics)
        async with client_of(create_app(models)) as client:
            for body in (TEXT, TEXT, TEXT | {"max_tokens": 3}, {"prompt": 1}):
                await client.post(COMPLETION, content=json.dumps(body))
            engine.fail_after = 1
            await client.post(COMPLETION, content=json.dumps(TEXT))
            return (await client.get("/metrics")).text

    found = families(run(main()))

    def value(name: str, suffix: str = "", **labels: str) -> float:
        (sample,) = (s for s in found[name].samples if s.name == name + suffix and labels.items() <= s.labels.items())
        return sample.value

    ours, theirs = {"model_name": "storyteller"}, {"model": "storyteller", "version": "1"}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(f"vllm:{name}", engine="0", **ours) == value(f"fewbit:{name}", **ours)
    assert value("vllm:generation_tokens", "_total", **ours) == engine.output_tokens > 0
    assert value("vllm:request_success", "_total", finished_reason="stop", **ours) == 2
    assert value("vllm:request_success", "_total", finished_reason="length", **ours) == 1
    assert value("vllm:admission_rejections", "_total", reason="BadRequestError") == 1
    assert value("vllm:time_to_first_token_seconds", "_count", **ours) == 4
    assert value("vllm:time_to_first_token_seconds", "_bucket", le="+Inf", **ours) == 4
    assert value("nv_inference_request_success", **theirs) == 3
    assert value("nv_inference_request_failure", reason="BACKEND", **theirs) == 1
    took = value("fewbit:e2e_request_latency_seconds", "_sum", **ours)
    assert math.isclose(value("nv_inference_request_duration_us", **theirs), took * 1e6)
    assert value("nv_inference_first_response_histogram_ms", "_bucket", le="20.0", **theirs) == value(
        "fewbit:time_to_first_token_seconds", "_bucket", le="0.02", **ours
    )
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max", **theirs) == 64
    assert value("fewbit:models_loaded") == 1
    assert value("fewbit:requests_rejected", "_total", reason="BadRequestError") == 1


def test_other_names_only_where_asked_for(asked):
    text = asked(Manner(), "GET", "/metrics").text
    assert "fewbit:" in text
    assert "vllm:" not in text
    assert "nv_" not in text


# --- health -----------------------------------------------------------------------------------------------------------


def test_health_that_generates(asked, engine):
    assert asked(Manner(), "GET", "/health_generate").status_code == 200
    (request,) = engine.seen
    assert (request.params.max_tokens, request.priority < 0) == (1, True)
    engine.fail_after = 0
    r = asked(Manner(), "GET", "/health_generate")
    assert r.status_code == 503
    assert "the engine failed to make a token: a step of the engine failed" in r.json()["error"]["message"]
    assert asked(Manner(), "GET", "/health").status_code == 200  # it answers, it just cannot
    assert asked(Manner(), "GET", "/ping").status_code == 200


def test_health_that_does_not_come_to_an_end(asked, engine):
    engine.delay_s = 600
    r = asked(Manner(), "GET", "/health_generate")
    assert (r.status_code, "did not make a token within 10 s" in r.text) == (503, True)
    assert not engine.running


# --- control ----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def controlled(models, where: str, manner: Manner):
    listener = control.bind_control(where)
    async with control.answering(models, listener, manner):
        if isinstance(listener.getsockname(), str):
            transport = httpx.AsyncHTTPTransport(uds=where)
            client = httpx.AsyncClient(transport=transport, base_url="http://control", timeout=60)
        else:
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60)
        async with client:
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    await client.get("/control/status")
                    break
                await asyncio.sleep(0.01)
            yield client


def test_control_over_a_socket_of_this_user(engine, tokenizer, run, tmp_path, written):
    written("text")

    async def main() -> None:
        models, path = models_of(tokenizer, storyteller=engine), tmp_path / "control"
        async with controlled(models, str(path), Manner()) as client:
            assert path.stat().st_mode & 0o777 == 0o600
            status = (await client.get("/control/status")).json()
            assert status == {
                "draining": False,
                "in_flight": 0,
                "log_level": "warning",
                "models": [{"name": "storyteller", "state": "READY", "reason": ""}],
            }
            after = (await client.post("/control/models/storyteller/unload")).json()
            assert after["models"][0]["state"] == "UNAVAILABLE"
            after = (await client.post("/control/models/storyteller/load")).json()
            assert after["models"][0]["state"] == "READY"
            assert (await client.post("/control/models/x/load")).status_code == 404
            assert (await client.post("/control/log", json={"level": "info"})).json()["log_level"] == "info"
            r = await client.post("/control/log", json={"level": "warn"})
            assert (r.status_code, "did you mean 'warning'" in r.text) == (400, True)
            engine.delay_s = 60
            async with client_of(create_app(models)) as clients:
                for path_ in ("/control/status", "/control/drain"):  # not where clients are
                    assert (await clients.post(path_)).status_code == 404
                task = asyncio.create_task(clients.post(COMPLETION, content=json.dumps(TEXT)))
                while not engine.running:
                    await asyncio.sleep(0.01)
                assert (await client.post("/control/abort")).json()["ended"] == 1
                assert (await task).status_code == 503
            assert (await client.post("/control/drain")).json()["draining"]
            with pytest.raises(RecipeError, match=r"cannot listen on .* --control"):
                control.bind_control(str(path))
        control.bind_control(str(path)).close()  # what a dead server left is no obstacle
        (tmp_path / "file").write_text("x")
        with pytest.raises(RecipeError, match="cannot listen"):
            control.bind_control(str(tmp_path / "file"))

    run(main())


def test_control_over_a_port_wants_the_key(engine, tokenizer, run):
    async def main() -> None:
        models = models_of(tokenizer, storyteller=engine)
        async with controlled(models, "0", Manner(Gate(Keys([KEY]), ()))) as client:
            assert (await client.get("/control/status")).status_code == 401
            right = {"authorization": f"Bearer {KEY}"}
            assert (await client.get("/control/status", headers=right)).status_code == 200
            assert (await client.get("/control/status", headers=right | {"host": "evil"})).status_code == 403
            for path in ("/v2/health/live", "/"):
                assert (await client.get(path)).status_code == 404

    run(main())
