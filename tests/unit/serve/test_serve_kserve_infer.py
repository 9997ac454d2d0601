"""POST /v2/models/M/infer and generate_stream: samples of the wire, every input, several prompts, and what is wrong."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from itertools import pairwise

import pytest
from serve_names import SAYS, client_of, models_of

from fewbit.serve import create_app
from fewbit.serve.kserve import Options

INFER = "/v2/models/ensemble/infer"
STREAM = "/v2/models/ensemble/generate_stream"
LENGTH = "Inference-Header-Content-Length"


def tensor(name, datatype, data, shape=None):
    return {"name": name, "datatype": datatype, "shape": shape or [1, len(data)], "data": data}


def asked(*more, text="x", **rest):
    return {"inputs": [tensor("text_input", "BYTES", [text]), tensor("max_tokens", "INT32", [50]), *more], **rest}


def outputs(response) -> dict:
    assert response.status_code == 200, response.text
    return {o["name"]: o["data"] for o in response.json()["outputs"]}


def events(text: str) -> list:
    """The objects of a v2 stream, which ends without a word."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_the_sample_in_json(ask):
    body = (
        b'{"id":"7","inputs":[{"name":"text_input","shape":[1,1],"datatype":"BYTES","data":["Hi"]},'
        b'{"name":"max_tokens","shape":[1,1],"datatype":"INT32","data":[8]}],"outputs":[{"name":"text_output"}]}'
    )
    r = ask(INFER, body)
    assert r.status_code == 200
    text = r.json()["outputs"][0]["data"][0]
    assert r.json() == {
        "id": "7",
        "model_name": "ensemble",
        "model_version": "1",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1], "data": [text]}],
    }
    assert text.startswith("Hiun, ")
    assert LENGTH not in r.headers


def test_the_sample_in_binary(ask):
    head = (
        b'{"inputs":[{"name":"text_input","shape":[1,1],"datatype":"BYTES","parameters":{"binary_data_size":6}},'
        b'{"name":"max_tokens","shape":[1,1],"datatype":"INT32","parameters":{"binary_data_size":4}}],'
        b'"parameters":{"binary_data_output":true}}'
    )
    body = head + b"\x02\x00\x00\x00Hi" + b"\x08\x00\x00\x00"
    r = ask(INFER, body, headers={LENGTH: str(len(head)), "Content-Type": "application/octet-stream"})
    assert r.status_code == 200
    end = int(r.headers[LENGTH])
    (output,) = json.loads(r.content[:end])["outputs"]
    size = output["parameters"]["binary_data_size"]
    assert output == {
        "name": "text_output", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}
    }  # fmt: skip
    raw = r.content[end:]
    assert (len(raw), struct.unpack_from("<I", raw)[0]) == (size, size - 4)
    assert raw[4:].decode().startswith("Hiun, ")


def test_the_sample_of_a_stream(ask):
    r = ask(STREAM, {"text_input": "Hi", "parameters": {"max_tokens": 50, "stream": True}})
    assert (r.status_code, r.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    found = events(r.text)
    assert len(found) > 5
    assert "".join(e["text_output"] for e in found) == SAYS
    for e in found:
        assert e == {
            "model_name": "ensemble",
            "model_version": "1",
            "sequence_end": False,
            "sequence_id": 0,
            "sequence_start": False,
            "text_output": e["text_output"],
        }


def test_other_streams(ask):
    whole = events(ask(STREAM, {"text_input": "Hi", "max_tokens": 50, "stream": False, "id": "a"}).text)
    assert [(e["id"], e["text_output"]) for e in whole] == [("a", "Hi" + SAYS)]
    said = events(ask(STREAM, {"text_input": "Hi", "max_tokens": 50, "exclude_input_in_output": False}).text)
    assert "".join(e["text_output"] for e in said) == "Hi" + SAYS
    bls = "/v2/models/tensorrt_llm_bls/generate_stream"
    grown = events(ask(bls, {"text_input": "Hi", "max_tokens": 50, "accumulate_tokens": True}).text)
    assert grown[-1]["text_output"] == SAYS
    assert all(b["text_output"].startswith(a["text_output"]) for a, b in pairwise(grown))
    more = {"return_log_probs": True, "return_num_output_tokens": True, "details": True}
    told = events(ask(STREAM, {"text_input": "Hi", "max_tokens": 50} | more).text)
    assert [e["details"]["finish_reason"] for e in told] == [None] * (len(told) - 1) + ["eos_token"]
    assert told[-2]["cum_log_probs"] == -0.5 * (len(told) - 1)


def test_streams_that_fail(ask, engine):
    assert ask(STREAM, {"text_input": "Hi", "top_p": 7}).status_code == 400
    assert ask("/v2/models/gone/generate_stream", {"text_input": "Hi"}).status_code == 404
    engine.fail_after = 3
    *parts, last = events(ask(STREAM, {"text_input": "Hi", "max_tokens": 50}).text)
    assert parts
    assert last == {"error": "a step of the engine failed: out of memory"}


def test_several_prompts(ask, engine, tokenizer):
    body = {
        "inputs": [
            tensor("text_input", "BYTES", ["un", "deux trois"], [2, 1]),
            tensor("max_tokens", "INT32", [3, 50], [2, 1]),
            tensor("stop_words", "BYTES", ["", "", "quatre", ""], [2, 2]),
            tensor("exclude_input_in_output", "BOOL", [True, False], [2, 1]),
            tensor("return_num_output_tokens", "BOOL", [True, True], [2, 1]),
        ]
    }
    r = ask(INFER, body).json()
    first, second = engine.seen
    assert [first.prompt, second.prompt] == [tuple(tokenizer.encode(t)) for t in ("un", "deux trois")]
    told = {o["name"]: o for o in r["outputs"]}
    assert told["text_output"]["shape"] == [2]
    said = SAYS[: SAYS.index("quatre")]
    assert told["text_output"]["data"][1] == "deux trois" + said
    assert SAYS.startswith(told["text_output"]["data"][0])
    assert (told["batch_index"]["data"], told["sequence_index"]["data"]) == ([0, 1], [0, 0])
    assert told["num_output_tokens"]["data"][0] == 3


def test_several_texts_of_a_prompt(ask, engine):
    body = asked(
        tensor("num_return_sequences", "INT32", [3]),
        tensor("temperature", "FP32", [0.7]),
        tensor("seed", "UINT64", [2**64 - 1]),
    )
    told = outputs(ask(INFER, body))
    assert told["text_output"] == ["x" + SAYS] * 3
    assert (told["batch_index"], told["sequence_index"]) == ([0, 0, 0], [0, 1, 2])
    seeds = [request.params.seed for request in engine.seen]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 3
    assert {request.params.temperature for request in engine.seen} == {0.7}  # and not what FP32 makes of it
    r = ask(INFER, asked(tensor("num_return_sequences", "INT32", [3])))
    assert (r.status_code, "all would be equal" in r.text) == (400, True)


def test_what_is_reported(ask):
    flags = (
        "return_log_probs",
        "return_perf_metrics",
        "return_num_input_tokens",
        "return_num_output_tokens",
        "details",
    )
    r = ask(INFER, asked(*(tensor(flag, "BOOL", [True]) for flag in flags)))
    told = outputs(r)
    count = told["num_output_tokens"][0]
    assert told["num_input_tokens"] == [2]  # the text, and what opens it
    assert told["output_log_probs"] == [-0.5] * count
    assert told["cum_log_probs"] == [-0.5 * count]
    assert (told["kv_cache_alloc_new_blocks"], told["kv_cache_reused_blocks"]) == ([-(-(count + 1) // 16)], [0])
    assert 0 < told["arrival_time_ns"][0] <= told["first_token_time_ns"][0] <= told["last_token_time_ns"][0]
    details = json.loads(told["details"][0])
    assert details["finish_reason"] == "eos_token"
    assert [d["logprob"] for d in details["logprobs"]] == [-0.5] * count
    shapes = {o["name"]: o["shape"] for o in r.json()["outputs"]}
    assert (shapes["output_log_probs"], shapes["cum_log_probs"]) == ([1, 1, count], [1, 1])
    for words, reason in ((["trois"], "stop_sequence"), ([""], "eos_token")):
        body = {"text_input": "x", "max_tokens": 50, "details": True, "stop_words": words}
        assert ask("/v2/models/ensemble/generate", body).json()["details"]["finish_reason"] == reason
    body = {"text_input": "x", "max_tokens": 3, "details": True}
    assert ask("/v2/models/ensemble/generate", body).json()["details"]["finish_reason"] == "length"


def test_an_output_that_is_listed_is_asked_for(ask):
    wanted = [{"name": "num_input_tokens"}, {"name": "cum_log_probs"}]
    r = ask(INFER, asked(outputs=wanted))
    assert [o["name"] for o in r.json()["outputs"]] == ["num_input_tokens", "cum_log_probs"]
    assert r.json()["outputs"][1]["data"][0] < 0


def test_words_and_biases_become_tokens(ask, engine, tokenizer):
    ids = {s: tokenizer.encode(s, add_special_tokens=False) for s in (" deux", "a", "sept", " sept")}
    body = asked(
        tensor("embedding_bias_words", "BYTES", ["deux", "a", "a"]),
        tensor("embedding_bias_weights", "FP32", [1.5, -2.0, 0.25]),
        tensor("bad_words", "BYTES", ["sept", ""]),
        tensor("end_id", "INT32", [9]),
        tensor("seed", "UINT64", [3]),
        parameters={"priority": 4},
    )
    outputs(ask(INFER, body))
    (request,) = engine.seen
    bias = dict(request.params.logit_bias)
    assert bias[ids["a"][0]] == -1.75
    assert bias[ids[" deux"][0]] == 1.5
    assert set(request.params.bad_words) == {tuple(ids["sept"]), tuple(ids[" sept"])}
    assert (request.params.stop_token_ids, request.params.ignore_eos, request.priority) == ((9,), True, 4)
    wrong = asked(tensor("embedding_bias_words", "BYTES", ["a"]), tensor("embedding_bias_weights", "FP32", [1.0, 2.0]))
    assert "1 embedding_bias_words and 2 embedding_bias_weights" in ask(INFER, wrong).json()["error"]
    long = asked(tensor("embedding_bias_words", "BYTES", ["xyzzy"]), tensor("embedding_bias_weights", "FP32", [1.0]))
    assert "'xyzzy' is no single token" in ask(INFER, long).json()["error"]


@pytest.mark.parametrize(
    ("kind", "guide", "why"),
    [
        ("json", "", None),
        ("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}', None),
        ("regex", "(yes|no)", None),
        ("ebnf_grammar", 'root ::= "yes" | "no"', None),
        ("", "", None),
        ("regex", "(", "guided_decoding_guide"),
        ("regex", "", "guided_decoding_guide_type regex wants a guide"),
        ("json", "{}", "guided_decoding_guide_type json wants no guide"),
        ("json_schema", "{", "guided_decoding_guide is not JSON"),
        ("json_schema", '{"$ref": "http://x/y"}', "guided_decoding_guide: $ref"),
    ],
)
def test_guides_become_grammars(ask, engine, kind, guide, why):
    body = {"text_input": "x", "guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
    r = ask("/v2/models/ensemble/generate", body)
    if why is not None:
        assert (r.status_code, why in r.json()["error"]) == (400, True), r.text
        assert not engine.seen
        return
    assert r.status_code == 200, r.text
    assert bool(engine.seen[0].params.grammar) == bool(kind)


def test_the_three_models_in_a_row_are_the_ensemble(ask, engine, tokenizer):
    """preprocessing, tensorrt_llm and postprocessing, each given what the one before it answered."""
    whole = outputs(ask(INFER, asked(tensor("stop_words", "BYTES", ["quatre"]), text="un deux")))["text_output"]
    body = {
        "inputs": [
            tensor("QUERY", "BYTES", ["un deux", "a"], [2, 1]),
            tensor("REQUEST_OUTPUT_LEN", "INT32", [50, 50], [2, 1]),
            tensor("STOP_WORDS_DICT", "BYTES", ["quatre"] * 2, [2, 1]),
            tensor("BAD_WORDS_DICT", "BYTES", ["sept", ""], [2, 1]),
        ]
    }
    made = {o["name"]: o for o in ask("/v2/models/preprocessing/infer", body).json()["outputs"]}
    assert made["REQUEST_INPUT_LEN"]["data"] == [len(tokenizer.encode(t)) for t in ("un deux", "a")]
    assert made["OUT_END_ID"]["data"] == [2, 2]
    names = {
        "INPUT_ID": "input_ids",
        "REQUEST_INPUT_LEN": "input_lengths",
        "REQUEST_OUTPUT_LEN": "request_output_len",
        "STOP_WORDS_IDS": "stop_words_list",
        "BAD_WORDS_IDS": "bad_words_list",
        "OUT_END_ID": "end_id",
        "OUT_PAD_ID": "pad_id",
    }
    engine.seen.clear()
    said = ask(
        "/v2/models/tensorrt_llm/infer", {"inputs": [made[old] | {"name": new} for old, new in names.items()]}
    ).json()
    assert [r.prompt for r in engine.seen] == [tuple(tokenizer.encode(t)) for t in ("un deux", "a")]
    assert [bool(r.params.bad_words) for r in engine.seen] == [True, False]
    ids, lengths = (next(o for o in said["outputs"] if o["name"] == n) for n in ("output_ids", "sequence_length"))
    assert ids["shape"][:2] == [2, 1]
    body = {"inputs": [ids | {"name": "TOKENS_BATCH"}, lengths | {"name": "SEQUENCE_LENGTH"}]}
    texts = outputs(ask("/v2/models/postprocessing/infer", body))["OUTPUT"]
    assert texts[0].startswith(whole[0])  # the ids go on to the end of the stop word
    assert texts[0].removeprefix(whole[0]) in ("", "quatre", "q", "qu", "quat", "quatr")


def test_ids_stream(ask, tokenizer):
    body = {"input_ids": tokenizer.encode("un"), "request_output_len": 50, "exclude_input_in_output": True}
    found = events(ask("/v2/models/tensorrt_llm/generate_stream", body).text)
    ids = [e["output_ids"] for e in found if e["output_ids"] != []]
    assert tokenizer.decode(ids) == SAYS


def test_packed_bodies_both_ways(ask):
    body = json.dumps(asked()).encode()
    for name, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        r = ask(INFER, pack(body), headers={"Content-Encoding": name, "Accept-Encoding": name})
        assert (r.status_code, r.headers["content-encoding"]) == (200, name)
        assert outputs(r)["text_output"] == ["x" + SAYS]  # the client has unpacked it
    assert ask(INFER, body, headers={"Accept-Encoding": "identity"}).headers.get("content-encoding") is None
    bomb = gzip.compress(b" " * (40 << 20))
    assert ask(INFER, bomb, headers={"Content-Encoding": "gzip"}).status_code == 413
    assert ask(INFER, b"no gzip", headers={"Content-Encoding": "gzip"}).status_code == 400


def test_a_timeout_is_kept(ask, engine):
    engine.delay_s = 0.05
    r = ask(INFER, asked(parameters={"timeout": 60_000}))
    assert (r.status_code, r.json()["error"].endswith("its time limit is 0.06 s")) == (504, True)
    assert not engine.running
    assert ask(INFER, asked(parameters={"timeout": 60_000_000})).status_code == 200


WRONG_TENSORS = (
    ({"shape": [1, -1]}, "has a negative dimension"),
    ({"shape": [2**40, 2**40]}, "more than 2097152 elements"),
    ({"shape": [0, 2**62]}, "more than 2097152 elements"),
    ({"shape": [1] * 9}, "9 dimensions, more than 8"),
    ({"shape": [1, 2]}, "wants 2 elements, data has 1"),
    ({"shape": [1]}, "the shape of 'max_tokens' must be [-1, 1], got [1]"),
    ({"shape": [2, 1], "data": [1, 2]}, "'max_tokens' has 2 rows, the request has 1"),
    ({"shape": "1,1"}, "must be an array of integers"),
    ({"shape": [1, True]}, "must be an array of integers"),
    ({"data": [1, 2]}, "data has more than 1"),
    ({"data": [[1]]}, None),
    ({"data": 1}, "the data of 'max_tokens' must be an array"),
    ({"data": [1.0]}, "max_tokens[0] must be an integer in [-2147483648, 2147483647]"),
    ({"data": [True]}, "max_tokens[0] must be an integer"),
    ({"data": [2**31]}, "max_tokens[0] must be an integer in"),
    ({"data": ["1"]}, "max_tokens[0] must be an integer"),
    ({"datatype": "INT64"}, "'max_tokens' must be INT32, got INT64"),
    ({"datatype": "INT33"}, "did you mean 'INT"),
    ({"datatype": 3}, "must be one of the protocol's, got 3"),
    ({"name": "max_tokns"}, "unknown input 'max_tokns': did you mean 'max_tokens'?"),
    ({"name": "text_input"}, "the input 'text_input' is given twice"),
    ({"name": 3}, "each input must have a name"),
    ({"extra": 1}, "unknown field of 'max_tokens' 'extra'"),
    ({"parameters": {"binary_data_size": 4}}, "either data or the parameter binary_data_size"),
    ({"parameters": {"shared_memory_region": "x"}}, "shared memory is not supported"),
    ({"parameters": {"sise": 4}}, "unknown parameter of 'max_tokens' 'sise'"),
)


def test_wrong_tensors(ask, engine):
    for change, why in WRONG_TENSORS:
        body = asked()
        body["inputs"][1] |= change
        r = ask(INFER, body)
        if why is None:
            assert r.status_code == 200
            engine.seen.clear()
            continue
        assert (r.status_code, list(r.json())) == (400, ["error"]), change
        assert why in r.json()["error"]
        assert not engine.seen, change


WRONG_REQUESTS = (
    ({}, "inputs is missing"),
    ({"inputs": []}, "inputs is missing"),
    ({"inputs": [3]}, "inputs must be an array of objects"),
    ({"inputs": [tensor("max_tokens", "INT32", [3])]}, "text_input is required"),
    (asked(outputs=[{"name": "text_outputs"}]), "unknown output 'text_outputs': did you mean 'text_output'?"),
    (asked(outputs=[{"name": "text_output"}] * 2), "the output 'text_output' is given twice"),
    (asked(outputs=[{"name": "text_output", "parameters": {"classification": 2}}]), "classification is not"),
    (asked(outputs=[{"name": "text_output", "parameters": {"binary_data": 1}}]), "binary_data must be true"),
    (asked(inputs=[tensor(str(i), "BYTES", ["x"]) for i in range(300)]), "300 inputs are more than 256"),
    (asked(id=3), "id must be a string"),
    (asked(parameters={"timeout": -1}), "out of range"),
    (asked(parameters={"priority": "high"}), "the parameter 'priority' must be int"),
    (asked(parameters={"sequence_id": 4}), "requests that share state"),
    (asked(parameters={"prioritty": 4}), "did you mean 'priority'?"),
    (asked(modle=1), "unknown field 'modle'"),
    (asked(tensor("stream", "BOOL", [True])), "use generate_stream"),
    (asked(tensor("beam_width", "INT32", [2])), "'beam_width': 2 is not supported"),
    (asked(tensor("lora_task_id", "UINT64", [7])), "'lora_task_id': 7 is not supported"),
    (asked(tensor("prompt_embedding_table", "FP16", [1.0], [1, 1, 1])), "is not supported"),
    (asked(tensor("return_context_logits", "BOOL", [True])), "is not supported"),
    (asked(tensor("num_return_sequences", "INT32", [0])), "num_return_sequences must be between 1 and 1024"),
    (asked(tensor("seed", "UINT64", [1]), tensor("random_seed", "UINT64", [1])), "two names of one thing"),
    (asked(tensor("top_p", "FP32", [2.0])), "top_p must be in (0, 1], got 2.0"),
    (asked(tensor("stop_words", "BYTES", ["x"] * 40)), "stop_words holds 40 strings"),
    (asked(tensor("guided_decoding_guide_type", "BYTES", ["yaml"])), "guided_decoding_guide_type must be one of"),
    (asked(tensor("guided_decoding_guide", "BYTES", ["{}"])), "wants a type"),
)


def test_wrong_requests(ask, engine):
    for body, why in WRONG_REQUESTS:
        r = ask(INFER, body)
        assert (r.status_code, list(r.json())) == (400, ["error"]), body
        assert why in r.json()["error"]
        assert not engine.seen, body


def binary(sizes, blobs, length=None, shape=(1, 1)):
    """A body with the two inputs in binary, and its header."""
    kinds = (("text_input", "BYTES"), ("max_tokens", "INT32"))
    inputs = [
        {"name": n, "datatype": d, "shape": list(shape), "parameters": {"binary_data_size": s}}
        for (n, d), s in zip(kinds, sizes, strict=True)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    return head + b"".join(blobs), {LENGTH: str(len(head) if length is None else length)}


WRONG_BINARY = (
    ((6, 4), (b"\2\0\0\0Hi", b"\5\0\0"), "binary_data_size of 'max_tokens' is 4, 3 bytes are left"),
    ((6, 4), (b"\2\0\0\0Hi", b"\5\0\0\0\0"), "1 bytes after the JSON belong to no input"),
    ((6, 3), (b"\2\0\0\0Hi", b"\5\0\0"), "wants 4 bytes of INT32, got 3"),
    ((-1, 4), (b"\5\0\0\0",), "binary_data_size of 'text_input' is -1"),
    ((2**62, 4), (b"\5\0\0\0",), "4 bytes are left"),
    (("6", 4), (b"\2\0\0\0Hi", b"\5\0\0\0"), "binary_data_size of 'text_input' is 6"),
    ((6, 4), (b"\xff\xff\xff\xffHi", b"\5\0\0\0"), "element 0 of 'text_input' claims 4294967295 bytes, 2 are left"),
    ((3, 4), (b"\2\0\0", b"\5\0\0\0"), "ends within the length of element 0"),
    ((7, 4), (b"\2\0\0\0Hi\0", b"\5\0\0\0"), "has more bytes than its 1 elements"),
    ((0, 4), (b"\5\0\0\0",), "wants 1 elements, data has 0"),
    ((6, 4), (b"\2\0\0\0\xff\xfe", b"\5\0\0\0"), "'text_input' is not UTF-8"),
)


def test_wrong_binary_tensors(ask, engine):
    for sizes, blobs, why in WRONG_BINARY:
        body, headers = binary(sizes, blobs)
        r = ask(INFER, body, headers=headers)
        assert (r.status_code, list(r.json())) == (400, ["error"]), (sizes, blobs)
        assert why in r.json()["error"]
        assert not engine.seen, (sizes, blobs)


def test_wrong_header_lengths(ask):
    for length in ["-1", "x", "99999", "1e3", "0", "9" * 40, "3"]:
        body, headers = binary((6, 4), (b"\2\0\0\0Hi", b"\5\0\0\0"), length)
        r = ask(INFER, body, headers=headers)
        assert (r.status_code, list(r.json())) == (400, ["error"]), length


def test_unknown_models_and_versions(ask):
    r = ask("/v2/models/gone/infer", asked())
    assert (r.status_code, r.json()) == (404, {"error": "the model 'gone' is not served here, 'storyteller' is"})
    assert ask("/v2/models/ensemble/versions/2/infer", asked()).status_code == 404
    assert ask("/v2/models/storyteller/versions/1/infer", asked()).status_code == 200
    assert ask(INFER).status_code == 405


def test_half_a_character_is_a_replacement(ask, engine, tokenizer):
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    engine.says = ids[:2]
    assert outputs(ask(INFER, asked()))["text_output"] == ["x\ufffd"]


def test_clients_may_not_load_models_unless_told_so(ask):
    for what in ("load", "unload"):
        r = ask(f"/v2/repository/models/storyteller/{what}", b"")
        assert (r.status_code, "--repository-control" in r.json()["error"]) == (403, True)


@pytest.fixture
def controlled(engine, tokenizer):
    return create_app(models_of(tokenizer, storyteller=engine), triton=Options(repository_control=True))


def test_the_repository_takes_names_and_nothing_else(controlled, run):
    def ask(path, body):
        async def call():
            async with client_of(controlled) as client:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.post(path, content=content)

        return run(call())

    load, unload = ("/v2/repository/models/{}/" + what for what in ("load", "unload"))
    assert ask(load.format("storyteller"), b"").status_code == 200
    for parameters, why in (
        ({"config": "{}"}, "'config' is not supported"),
        ({"file:1/model.bin": "eA=="}, "'file:1/model.bin' is not supported"),
        ({"fast": True}, "unknown parameter 'fast'"),
    ):
        r = ask(load.format("storyteller"), {"parameters": parameters})
        assert (r.status_code, why in r.json()["error"]) == (400, True)
    r = ask(unload.format("storyteller"), {"parameters": {"unload_dependants": True}})
    assert (r.status_code, "did you mean 'unload_dependents'" in r.text) == (400, True)
    for name in ("..%2F..%2Fetc", "%2Fetc", "gone", "..", "a%00b", "~"):
        assert ask(load.format(name), b"").status_code == 404
    index = "/v2/repository/index"
    for body in (b"", b"{}", b'{"ready": true}'):
        assert {m["name"] for m in ask(index, body).json()} >= {"storyteller", "ensemble"}
    assert ask(index, {"redy": True}).status_code == 400
    assert ask("/v2/systemsharedmemory/region/x/register", {}).status_code == 501
    assert ask("/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}).status_code == 501


def test_health_without_an_engine(ask, engine):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/ensemble/ready"):
        assert ask(path).status_code == 200
    engine.down = True
    assert ask("/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/ensemble/ready"):
        assert (ask(path).status_code, list(ask(path).json())) == (503, ["error"])


def test_rows_that_would_be_filled_up_too_far(ask, engine, monkeypatch):
    monkeypatch.setattr("fewbit.serve.kserve.tensors.MAX_ELEMENTS", 100)
    r = ask("/v2/models/preprocessing/infer", {
        "inputs": [
            tensor("QUERY", "BYTES", ["a " * 60, "a"], [2, 1]), tensor("REQUEST_OUTPUT_LEN", "INT32", [5, 5], [2, 1])
        ]
    })  # fmt: skip
    assert r.status_code == 400
    assert "elements, more than 100: send fewer rows" in r.json()["error"]
    r = ask("/v2/models/tensorrt_llm/infer", {
        "inputs": [
            tensor("input_ids", "INT32", [5, 6] * 2, [2, 2]),
            tensor("input_lengths", "INT32", [2, 2], [2, 1]),
            tensor("request_output_len", "INT32", [49, 3], [2, 1]),
        ]
    })  # fmt: skip
    assert (r.status_code, engine.seen) == (400, [])
    assert "2 rows of up to 51 tokens are 102 elements, more than 100" in r.json()["error"]
