"""Triton's client, over HTTP and gRPC, asks the bundled model as its command line serves it."""

from __future__ import annotations

import queue
import socket

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from client_server import serving

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def addresses(storyteller):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--name", "storyteller", "--device", "cpu", "--grpc-port", str(port), "--repository-control")
    with serving(storyteller, *options) as url:
        yield url.removeprefix("http://"), f"127.0.0.1:{port}"


def inputs(kind):
    text, count = kind.InferInput("text_input", [2, 1], "BYTES"), kind.InferInput("max_tokens", [2, 1], "INT32")
    text.set_data_from_numpy(np.array([[PROMPT.encode()], [b"Lily had"]], object))
    count.set_data_from_numpy(np.array([[24], [8]], np.int32))
    return [text, count]


def test_one_answer_through_both_and_as_a_stream(addresses):
    http, grpc = addresses
    with over_http.InferenceServerClient(http) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("ensemble")
        told = client.infer("ensemble", inputs(over_http)).as_numpy("text_output")
        assert told.shape == (2,)
        assert told[0].decode().startswith(PROMPT)
        client.load_model("storyteller")
        assert {m["state"] for m in client.get_model_repository_index()} == {"READY"}
        (counted,) = client.get_inference_statistics("ensemble")["model_stats"]
        assert (counted["inference_count"], counted["execution_count"]) == (2, 1)
    with over_grpc.InferenceServerClient(grpc) as client:
        assert client.infer("storyteller", inputs(over_grpc)).as_numpy("text_output").tolist() == told.tolist()
        got: queue.Queue = queue.Queue()
        client.start_stream(callback=lambda result, error: got.put(error or result))
        client.async_stream_infer("ensemble", inputs(over_grpc), enable_empty_final_response=True)
        texts = [PROMPT, "Lily had"]
        while not (part := got.get(timeout=300)).get_response().parameters["triton_final_response"].bool_param:
            texts[part.as_numpy("batch_index")[0, 0]] += part.as_numpy("text_output")[0].decode()
        client.stop_stream()
    assert [t.encode() for t in texts] == told.tolist()


def test_the_three_models_make_the_ensemble(addresses):
    with over_http.InferenceServerClient(addresses[0]) as client:

        def call(model, **tensors):
            asked = []
            for name, (value, datatype) in tensors.items():
                asked.append(over_http.InferInput(name, list(value.shape), datatype))
                asked[-1].set_data_from_numpy(value)
            found = client.infer(model, asked)
            return {o["name"]: found.as_numpy(o["name"]) for o in found.get_response()["outputs"]}

        count = np.array([[24]], np.int32), "INT32"
        query = call("preprocessing", QUERY=(np.array([[PROMPT.encode()]], object), "BYTES"))
        ids = call(
            "tensorrt_llm",
            input_ids=(query["INPUT_ID"], "INT32"),
            input_lengths=(query["REQUEST_INPUT_LEN"], "INT32"),
            request_output_len=count,
        )
        lengths = ids["sequence_length"], "INT32"
        said = call("postprocessing", TOKENS_BATCH=(ids["output_ids"], "INT32"), SEQUENCE_LENGTH=lengths)
        whole = call("ensemble", text_input=(np.array([[PROMPT.encode()]], object), "BYTES"), max_tokens=count)
    assert said["OUTPUT"].tolist() == whole["text_output"].tolist()
