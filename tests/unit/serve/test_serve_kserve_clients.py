"""Triton's own clients, over HTTP and gRPC, against a server on real sockets."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
import tritonclient.http.aio
from serve_names import SAYS, models_of
from tritonclient.utils import InferenceServerException

from fewbit.errors import RecipeError
from fewbit.serve import bind, create_app, serve_app
from fewbit.serve.kserve import Options, protocol
from fewbit.serve.kserve.rpc import serve_grpc


class Served(NamedTuple):
    http: str
    grpc: str


class OneKey:
    def allows(self, header):
        return header == "Bearer good"


@pytest.fixture
def served(engine, tokenizer):
    """`served(keys)` starts a server in a thread of this process: its addresses over HTTP and over gRPC."""
    listener, ready, box = bind(port=0), threading.Event(), {}

    async def main(keys):
        app = create_app(models_of(tokenizer, storyteller=engine), triton=Options(repository_control=True))
        rpc = await serve_grpc(app.state.front, "127.0.0.1", 0, keys)
        box.update(models=app.state.models, port=rpc.port)
        await serve_app(app, listener, drain_s=2, on_ready=lambda url: ready.set())
        await rpc.stop()

    def start(keys=None):
        box["thread"] = threading.Thread(target=lambda: asyncio.run(main(keys)))
        box["thread"].start()
        assert ready.wait(30)
        return Served("{}:{}".format(*listener.getsockname()), f"127.0.0.1:{box['port']}")

    yield start
    box["models"].draining = True
    box["thread"].join(60)
    assert not box["thread"].is_alive()


@pytest.fixture
def http(served):
    with over_http.InferenceServerClient(served().http, concurrency=4) as client:
        yield client


@pytest.fixture
def rpc(served):
    with over_grpc.InferenceServerClient(served().grpc) as client:
        yield client


def inputs(kind, text="un", tokens=50, **more):
    values = {"text_input": np.array([[text.encode()]], object), "max_tokens": np.array([[tokens]], np.int32)} | more
    found = []
    for name, value in values.items():
        datatype = {"O": "BYTES", "b": "BOOL"}.get(value.dtype.kind, value.dtype.name.upper().replace("FLOAT", "FP"))
        found.append(kind.InferInput(name, list(value.shape), datatype))
        found[-1].set_data_from_numpy(value)
    return found


# ---- over HTTP ----


def test_http_what_there_is(http):
    assert http.is_server_live()
    assert http.is_server_ready()
    assert http.is_model_ready("ensemble")
    assert http.is_model_ready("storyteller", "1")
    assert not http.is_model_ready("gone")
    assert not http.is_model_ready("ensemble", "2")
    server = http.get_server_metadata()
    assert (server["name"], "binary_tensor_data" in server["extensions"]) == ("fewbit", True)
    model = http.get_model_metadata("ensemble")
    assert model["versions"] == ["1"]
    assert {"name": "text_input", "datatype": "BYTES", "shape": [-1, 1]} in model["inputs"]
    assert {"name": "text_output", "datatype": "BYTES", "shape": [-1, -1]} in model["outputs"]
    config = http.get_model_config("tensorrt_llm")
    assert {"name": "request_output_len", "data_type": "TYPE_INT32", "dims": [1], "optional": True} in config["input"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert http.get_model_config("preprocessing")["model_transaction_policy"] == {"decoupled": False}
    assert http.get_log_settings()["log_verbose_level"] == 0
    assert http.get_trace_settings()["trace_level"] == ["OFF"]
    for call in (http.get_system_shared_memory_status, http.get_cuda_shared_memory_status):
        with pytest.raises(InferenceServerException, match=r"501.*shared memory is not supported"):
            call()
    with pytest.raises(InferenceServerException, match=r"501.*fixed when the server starts"):
        http.update_log_settings({"log_verbose_level": 1})
    with pytest.raises(InferenceServerException, match=r"404.*'gone' is not served here"):
        http.get_model_metadata("gone")


@pytest.mark.parametrize("binary", [True, False])
def test_http_infer(http, binary, engine):
    asked = inputs(over_http)
    for one, value in zip(asked, ([["un"]], [[50]]), strict=True):
        one.set_data_from_numpy(np.array(value, object if one.datatype() == "BYTES" else np.int32), binary_data=binary)
    wanted = [over_http.InferRequestedOutput(n, binary_data=binary) for n in ("text_output", "cum_log_probs")]
    for packed in (None, "gzip", "deflate"):
        found = http.infer(
            "ensemble", asked, outputs=wanted, request_id="7", priority=2, timeout=60_000_000,
            request_compression_algorithm=packed, response_compression_algorithm=packed,
        )  # fmt: skip
        assert found.get_response()["id"] == "7"
        text = found.as_numpy("text_output")
        assert text.tolist() == [("un" + SAYS).encode() if binary else "un" + SAYS]
        assert found.as_numpy("cum_log_probs").shape == (1, 1)
    assert engine.seen[-1].priority == 2
    assert http.infer("ensemble", asked).as_numpy("text_output")[0] == ("un" + SAYS).encode()
    waiting = [http.async_infer("storyteller", asked) for _ in range(4)]
    assert {w.get_result().as_numpy("text_output")[0] for w in waiting} == {("un" + SAYS).encode()}
    with pytest.raises(InferenceServerException, match="top_k must be at least 1"):
        http.infer("ensemble", inputs(over_http, top_k=np.array([[-7]], np.int32)))


def test_http_in_asyncio(served):
    async def main():
        async with tritonclient.http.aio.InferenceServerClient(served().http) as client:
            found = await asyncio.gather(*(client.infer("ensemble", inputs(over_http)) for _ in range(8)))
            return {f.as_numpy("text_output")[0] for f in found}

    assert asyncio.run(main()) == {("un" + SAYS).encode()}


def test_http_repository_and_statistics(http):
    index = http.get_model_repository_index()
    assert {m["name"] for m in index} >= {"storyteller", "ensemble", "preprocessing", "tensorrt_llm", "postprocessing"}
    assert {(m["version"], m["state"]) for m in index} == {("1", "READY")}
    http.load_model("storyteller")  # it is loaded: nothing happens
    with pytest.raises(InferenceServerException, match="'config' is not supported"):
        http.load_model("storyteller", config="{}")
    with pytest.raises(InferenceServerException, match=r"404"):
        http.load_model("../../etc")
    http.infer("ensemble", inputs(over_http))
    with pytest.raises(InferenceServerException):
        http.infer("ensemble", inputs(over_http, top_p=np.array([[9]], np.float32)))
    (one,) = http.get_inference_statistics("ensemble")["model_stats"]
    assert (one["inference_count"], one["execution_count"]) == (1, 1)
    told = one["inference_stats"]
    assert (told["success"]["count"], told["fail"]["count"]) == (1, 1)
    spent = sum(told[k]["ns"] for k in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert 0 < spent <= told["success"]["ns"]
    assert abs(one["last_inference"] / 1000 - time.time()) < 60
    everything = http.get_inference_statistics()["model_stats"]
    assert {m["name"] for m in everything} == {m["name"] for m in index}


# ---- over gRPC ----


def test_grpc_what_there_is(rpc):
    assert rpc.is_server_live()
    assert rpc.is_server_ready()
    assert rpc.is_model_ready("ensemble")
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        rpc.is_model_ready("gone")
    assert rpc.get_server_metadata().name == "fewbit"
    model = rpc.get_model_metadata("ensemble", as_json=True)
    assert {"name": "text_input", "datatype": "BYTES", "shape": ["-1", "1"]} in model["inputs"]
    config = rpc.get_model_config("ensemble").config
    assert config.model_transaction_policy.decoupled
    assert config.input[0].name == "text_input"
    assert config.parameters["model"].string_value == "storyteller"
    assert config.max_batch_size == 1024
    assert rpc.get_log_settings().settings["log_error"].bool_param
    assert rpc.get_trace_settings().settings["trace_level"].value == ["OFF"]
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        rpc.get_system_shared_memory_status()
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        rpc.register_cuda_shared_memory("x", b"aGFuZGxl", 0, 8)


def test_grpc_infer_and_the_rest(rpc):
    found = rpc.infer("ensemble", inputs(over_grpc), request_id="7", priority=1, timeout=60_000_000)
    assert found.as_numpy("text_output").tolist() == [("un" + SAYS).encode()]
    assert found.get_response().id == "7"
    wanted = [over_grpc.InferRequestedOutput("num_output_tokens")]
    assert rpc.infer("ensemble", inputs(over_grpc), outputs=wanted).as_numpy("num_output_tokens").shape == (1, 1)
    packed = rpc.infer("ensemble", inputs(over_grpc), compression_algorithm="gzip")
    assert packed.as_numpy("text_output")[0] == ("un" + SAYS).encode()
    for wrong, status in (
        ({"top_p": np.array([[9]], np.float32)}, "INVALID_ARGUMENT"),
        ({"max_tokens": np.array([[9]], np.int64)}, "INVALID_ARGUMENT"),
        ({"stream": np.array([[True]])}, "INVALID_ARGUMENT"),
    ):
        with pytest.raises(InferenceServerException, match=status):
            rpc.infer("ensemble", inputs(over_grpc, **wrong))
    with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*'gone' is not served here"):
        rpc.infer("gone", inputs(over_grpc))
    rpc.load_model("storyteller")
    assert {m.state for m in rpc.get_model_repository_index().models} == {"READY"}
    (one,) = rpc.get_inference_statistics("ensemble").model_stats
    assert (one.inference_stats.success.count, one.inference_stats.fail.count) == (3, 3)


def test_grpc_without_an_engine(rpc, engine):
    engine.down = True
    assert not rpc.is_server_ready()
    assert not rpc.is_model_ready("ensemble")
    with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*the engine process is gone"):
        rpc.infer("ensemble", inputs(over_grpc))


def streamed(rpc, *calls, limit_s=30):
    """The answers, or errors, to calls of one stream, until all of them have ended."""
    got = queue.Queue()
    rpc.start_stream(callback=lambda result, error: got.put((result, error)))
    for call in calls:
        rpc.async_stream_infer(enable_empty_final_response=True, **call)
    found, left = [], len(calls)
    while left:
        result, error = got.get(timeout=limit_s)
        found.append(error or result)
        left -= error is not None or result.get_response().parameters["triton_final_response"].bool_param
    rpc.stop_stream()
    return found


def test_grpc_streams(rpc):
    told = streamed(rpc, {"model_name": "ensemble", "inputs": inputs(over_grpc), "request_id": "9"})
    *parts, last = told
    assert len(parts) > 5
    assert b"".join(p.as_numpy("text_output")[0] for p in parts).decode() == SAYS
    assert not last.get_response().outputs
    assert {p.get_response().id for p in told} == {"9"}
    whole = inputs(over_grpc, stream=np.array([[False]]))
    only, _ = streamed(rpc, {"model_name": "ensemble", "inputs": whole})
    assert only.as_numpy("text_output")[0].decode() == "un" + SAYS


@pytest.mark.parametrize("listed", [False, True])
def test_grpc_streams_of_several_prompts(rpc, listed):
    rows = {"text_input": np.array([[b"un"], [b"deux"]], object), "max_tokens": np.array([[50], [50]], np.int32)}
    call = {"model_name": "ensemble", "inputs": inputs(over_grpc, **rows)}
    if listed:
        call["outputs"] = [over_grpc.InferRequestedOutput("text_output")]
    texts = ["", ""]
    for part in streamed(rpc, call)[:-1]:
        texts[part.as_numpy("batch_index")[0, 0]] += part.as_numpy("text_output")[0].decode()
    assert texts == [SAYS, SAYS]


def test_grpc_several_requests_of_a_stream(rpc):
    wrong = inputs(over_grpc, top_p=np.array([[9]], np.float32))
    told = streamed(
        rpc,
        *({"model_name": "ensemble", "inputs": inputs(over_grpc), "request_id": str(i)} for i in range(5)),
        {"model_name": "ensemble", "inputs": wrong},
        {"model_name": "gone", "inputs": inputs(over_grpc)},
        {"model_name": "ensemble", "inputs": inputs(over_grpc), "request_id": "3"},  # an id is the client's affair
    )
    errors = [str(t) for t in told if isinstance(t, InferenceServerException)]
    assert len(errors) == 2
    assert any("top_p must be in (0, 1]" in e for e in errors)
    assert any("'gone' is not served here" in e for e in errors)
    parts = [t for t in told if not isinstance(t, InferenceServerException) and t.get_response().outputs]
    for i in range(5):
        text = b"".join(p.as_numpy("text_output")[0] for p in parts if p.get_response().id == str(i)).decode()
        assert text == SAYS * (1 + (i == 3)) or (i == 3 and len(text) == 2 * len(SAYS))


@pytest.mark.parametrize("way", ["unary", "stream"])
def test_grpc_leaving_frees_the_engine(rpc, engine, way):
    engine.hold_after = 3
    if way == "unary":
        rpc.async_infer("ensemble", inputs(over_grpc), callback=lambda result, error: None).cancel()
        call = rpc.async_infer("ensemble", inputs(over_grpc), callback=lambda result, error: None)
        until(lambda: engine.running)
        call.cancel()
    else:
        rpc.start_stream(callback=lambda result, error: None)
        rpc.async_stream_infer("ensemble", inputs(over_grpc))
        until(lambda: engine.running)
        rpc.stop_stream(cancel_requests=True)
    until(lambda: not engine.running)
    assert engine.aborted


def until(true, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def raw(address, method, request, metadata=()):
    """An answer to a call that no client of Triton's would make."""
    types = protocol.messages()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            f"/{protocol.INFERENCE}/{method}",
            types[f"{method}Request"].SerializeToString,
            types[f"{method}Response"].FromString,
        )
        return call(types[f"{method}Request"](**request), timeout=60, metadata=metadata)


def typed(**change):
    contents = protocol.messages()["InferTensorContents"]
    text = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "contents": contents(bytes_contents=[b"un"])}
    count = {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "contents": contents(int_contents=[50])}
    return {"model_name": "ensemble", "inputs": [text, count | change]}


def test_grpc_typed_contents(served):
    address, contents = served().grpc, protocol.messages()["InferTensorContents"]
    found = raw(address, "ModelInfer", typed())
    assert found.raw_output_contents[0][4:].decode() == "un" + SAYS
    for wrong, why in (
        (typed(shape=[1, -1]), "negative dimension"),
        (typed(shape=[2, 1]), "wants 2 elements, data has 1"),
        (typed(shape=[2**40, 2**40]), "more than 2097152 elements"),
        (typed(contents=contents(int64_contents=[5])), "belong into int_contents"),
        (typed(name="text_input"), "given twice"),
        (typed() | {"raw_input_contents": [b"x"]}, "raw_input_contents has 1 entries for 2 inputs"),
        (typed() | {"raw_input_contents": [b"x", b"y"]}, "has contents, and raw_input_contents are given too"),
        (typed() | {"inputs": []}, "text_input is required"),
        (typed(datatype="INT16"), "must be INT32, got INT16"),
    ):
        with pytest.raises(grpc.RpcError, match=why) as e:
            raw(address, "ModelInfer", wrong)
        assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as e:
        raw(address, "ModelInfer", typed() | {"id": "x" * (40 << 20)})
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raw(address, "ModelInfer", typed()).model_name == "ensemble"


def test_grpc_wants_a_key(served):
    address = served(OneKey()).grpc
    assert raw(address, "ServerLive", {}).live
    for metadata in ((), (("authorization", "Bearer bad"),)):
        with pytest.raises(grpc.RpcError) as e:
            raw(address, "ModelInfer", typed(), metadata)
        assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
    good = (("authorization", "Bearer good"),)
    assert raw(address, "ModelInfer", typed(), good).model_name == "ensemble"


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_grpc_refuses_who_has_no_key_and_says_nothing(served, method):
    end = threading.Event()
    silent = (b"" for _ in [0] if not end.wait(120))  # says not even that there is nothing to come
    with grpc.insecure_channel(served(OneKey()).grpc) as channel:
        call = channel.stream_stream(f"/{protocol.INFERENCE}/{method}")(silent, timeout=60)
        with pytest.raises(grpc.RpcError) as e:
            next(call)
        end.set()
    assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_taken_port_is_said(engine, tokenizer):
    front = create_app(models_of(tokenizer, storyteller=engine)).state.front

    async def twice():
        first = await serve_grpc(front, "127.0.0.1", 0)
        try:
            await serve_grpc(front, "127.0.0.1", first.port)
        finally:
            await first.stop()

    with pytest.raises(RecipeError, match=r"cannot listen on 127\.0\.0\.1 port .* \(it is in use\).* --grpc-port"):
        asyncio.run(twice())


def test_the_health_service(served, engine):
    types = protocol.messages(protocol.HEALTH)
    with grpc.insecure_channel(served().grpc) as channel:
        check = channel.unary_unary(
            f"/{protocol.HEALTH}/Check",
            types["HealthCheckRequest"].SerializeToString,
            types["HealthCheckResponse"].FromString,
        )
        assert check(types["HealthCheckRequest"](), timeout=60).status == 1
        assert check(types["HealthCheckRequest"](service="other"), timeout=60).status == 3
        engine.down = True
        assert check(types["HealthCheckRequest"](service=protocol.INFERENCE), timeout=60).status == 2
