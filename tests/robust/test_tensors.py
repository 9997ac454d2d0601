"""Tensors that are not what they say they are, in JSON and in bytes: refused before anything is made of them."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from real_server import GENERATE, Server, sampled

INFER = "/v2/models/ensemble/infer"


def tensor(name: str = "text_input", datatype: Any = "BYTES", shape: Any = (1, 1), **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape} | ({"data": ["The fox"]} | more)


LIMIT = tensor("max_tokens", "INT32", data=[4])


def asked(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": [*inputs, LIMIT]} | more


def binary(size: Any, blob: bytes, header_bytes: Any = None, **more: Any) -> tuple[bytes, dict[str, str]]:
    """A request with one binary tensor, whose parts may lie about each other."""
    given = {
        "name": "text_input",
        "datatype": "BYTES",
        "shape": [1, 1],
        "parameters": {"binary_data_size": size},
    } | more
    head = json.dumps({"inputs": [given, LIMIT]}).encode()
    length = len(head) if header_bytes is None else header_bytes
    return head + blob, {"Inference-Header-Content-Length": str(length)}


WORD = struct.pack("<I", 7) + b"The fox"

JSON: dict[str, Any] = {
    "no inputs": {},
    "inputs that are an object": {"inputs": {}},
    "inputs that are texts": {"inputs": ["text_input"]},
    "none of them": {"inputs": []},
    "no text": {"inputs": [LIMIT]},
    "the same twice": asked(tensor(), tensor()),
    "an unknown one": asked(tensor(), tensor("colour")),
    "100000 of them": {"inputs": [tensor(f"input {i}") for i in range(100_000)]},
    "another type": asked(tensor(datatype="FP32", data=[1.0])),
    "an unknown type": asked(tensor(datatype="STRING")),
    "a type that is a list": asked(tensor(datatype=["BYTES"])),
    "no shape": {"inputs": [{"name": "text_input", "datatype": "BYTES", "data": ["x"]}]},
    "a shape whose product is more than 64 bits": asked(tensor(shape=[2**32, 2**32])),
    "a shape of 2 to the 62": asked(tensor(shape=[2**62, 4])),
    "a shape beside a zero": asked(tensor(shape=[0, 2**63])),
    "a negative shape": asked(tensor(shape=[-1, -1])),
    "a shape of texts": asked(tensor(shape=["1", "1"])),
    "a shape of truths": asked(tensor(shape=[True, True])),
    "a shape of a thousand dimensions": asked(tensor(shape=[1] * 1000)),
    "more data than the shape": asked(tensor(data=["a", "b"])),
    "less data than the shape": asked(tensor(data=[])),
    "data that is a text": asked(tensor(data="The fox")),
    "data of numbers": asked(tensor(data=[3])),
    "a lone surrogate": asked(tensor(data=["\ud800"])),
    "data nested for ever": asked(tensor(data=json.loads("[" * 500 + '"x"' + "]" * 500), shape=[2])),
    "a number for an integer": asked(tensor(), tensor("top_k", "INT32", data=[1.5])),
    "an integer too large for its type": asked(tensor(), tensor("top_k", "INT32", data=[2**31])),
    "a negative unsigned": asked(tensor(), tensor("random_seed", "UINT64", data=[-1])),
    "shared memory": asked(tensor(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 8}, data=[])),
    "an output in shared memory": asked(
        tensor(), outputs=[{"name": "text_output", "parameters": {"shared_memory_region": "x"}}]
    ),
    "an unknown output": asked(tensor(), outputs=[{"name": "colour"}]),
    "the same output twice": asked(tensor(), outputs=[{"name": "text_output"}] * 2),
    "outputs that are texts": asked(tensor(), outputs=["text_output"]),
    "a size without bytes": asked(tensor(parameters={"binary_data_size": 4})),
    "an unknown field": asked(tensor(), colour="red"),
    "an id that is a number": asked(tensor(), id=3),
    "parameters that are a list": asked(tensor(), parameters=[1]),
}

BINARY: dict[str, tuple[bytes, dict[str, str]]] = {
    "fewer bytes than it says": binary(20, WORD),
    "more bytes than it says": binary(len(WORD), WORD + b"more"),
    "a negative size": binary(-1, WORD),
    "a huge size": binary(2**62, WORD),
    "a size that is a text": binary("11", WORD),
    "an element longer than all": binary(11, struct.pack("<I", 0xFFFFFFFF) + b"The fox"),
    "half a length": binary(2, b"\x01\x00"),
    "two elements for one": binary(22, WORD * 2),
    "an element that is no text": binary(6, struct.pack("<I", 2) + b"\xff\xfe"),
    "a header longer than the body": binary(len(WORD), WORD, header_bytes=10**9),
    "a header of half of itself": binary(len(WORD), WORD, header_bytes=20),
    "a negative header": binary(len(WORD), WORD, header_bytes=-5),
    "a header that is no number": binary(len(WORD), WORD, header_bytes="many"),
    "a header of more than 64 bits": binary(len(WORD), WORD, header_bytes=2**70),
    "data and bytes": binary(len(WORD), WORD, data=["The fox"]),
}

OTHERS: dict[str, tuple[str, Any]] = {
    "the index of a number": ("/v2/repository/index", 3),
    "a load with a file": (
        "/v2/repository/models/storyteller/load",
        {"parameters": {"config": "{}", "file:1/model.bin": "AAAA"}},
    ),
    "a load from elsewhere": ("/v2/repository/models/..%2f..%2fetc/load", {}),
    "a load of what is not there": ("/v2/repository/models/gone/load", {}),
    "an unload of what is not there": ("/v2/repository/models/gone/unload", {}),
    "another version": ("/v2/models/storyteller/versions/2/infer", asked(tensor())),
    "a version that is none": ("/v2/models/storyteller/versions/..%2f/infer", asked(tensor())),
    "generate with an array": (GENERATE, {"text_input": "x", "max_tokens": [1, 2, 3]}),
    "a stream of nothing": (f"{GENERATE}_stream", {}),
}


@pytest.fixture(scope="module", autouse=True)
def _speaks_it(server: Server):
    assert server.ask(INFER, asked(tensor())).status == 200
    yield
    server.quiet()


def refused(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
    """A short error in the protocol's own shape, within a second."""
    answer = server.refused(path, body, headers)
    assert list(answer.json) == ["error"]
    assert 0 < len(answer.message) < 1000
    server.unharmed()


@pytest.mark.parametrize("name", sampled(JSON, every=20))
def test_tensors_in_json(server: Server, name: str):
    refused(server, INFER, JSON[name])


@pytest.mark.parametrize("name", sampled(BINARY, every=8))
def test_tensors_in_bytes(server: Server, name: str):
    refused(server, INFER, *BINARY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_routes(server: Server, name: str):
    refused(server, *OTHERS[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["systemsharedmemory", "cudasharedmemory"])
def test_nothing_is_shared_with_anybody(server: Server, kind: str):
    for method, path in (("GET", "status"), ("POST", "region/x/register"), ("POST", "region/x/unregister")):
        answer = server.ask(f"/v2/{kind}/{path}", {} if method == "POST" else None, method=method)
        assert answer.status == 501, (path, answer)
        assert "shared memory" in answer.message
