"""The tensors that NeMo's query classes send, to a server that was started for them."""

from __future__ import annotations

import json
import threading

import pytest
from serve_names import SAYS, client_of, models_of

from fewbit.serve import create_app
from fewbit.serve.kserve import Options, asks, calls
from fewbit.serve.kserve.answers import outputs as made

MODEL = "/v2/models/storyteller"


@pytest.fixture
def app(engine, tokenizer):
    return create_app(models_of(tokenizer, storyteller=engine), triton=Options("nemo"))


def column(name, datatype, *values):
    return {"name": name, "datatype": datatype, "shape": [len(values), 1], "data": list(values)}


def asked(*more, prompts=("un", "deux"), **rest):
    return {"inputs": [column("prompts", "BYTES", *prompts), *more], **rest}


def outputs(r) -> dict:
    assert r.status_code == 200, r.text
    return {o["name"]: o for o in r.json()["outputs"]}


def test_query_llm(ask, engine, tokenizer):
    """What NemoQueryLLM sends, and lists: every output of the config."""
    names = [o["name"] for o in ask(MODEL + "/config").json()["output"]]
    body = asked(
        column("max_output_len", "INT64", 50, 50),
        column("min_output_len", "INT64", 0, 0),
        column("top_k", "INT64", 1, 1),
        column("top_p", "FP32", 0.0, 0.0),
        column("temperature", "FP32", 0.5, 0.5),
        column("random_seed", "INT64", 5, 5),
        column("repetition_penalty", "FP32", 1.5, 1.5),
        column("stop_words_list", "BYTES", "quatre", "sept", ""),  # three words for two prompts
        column("bad_words_list", "BYTES", "sept"),
        column("output_context_logits", "BOOL", False, False),
        column("output_generation_logits", "BOOL", False, False),
        outputs=[{"name": name} for name in names],
    )
    told = outputs(ask(MODEL + "/infer", body))
    said = SAYS[: SAYS.index("quatre")]
    assert list(told) == ["outputs", "sentences"]  # the others were listed and not asked for
    assert all((o["shape"], o["data"]) == ([2, 1], [said, said]) for o in told.values())
    for request, prompt in zip(engine.seen, ("un", "deux"), strict=True):
        p = request.params
        assert request.prompt == tuple(tokenizer.encode(prompt))
        assert (p.max_tokens, p.top_k, p.top_p, p.temperature, p.seed) == (50, 1, 1.0, 0.5, 5)
        assert (p.repetition_penalty, len(p.bad_words)) == (1.5, 2)


def test_query_llm_pytorch(ask, engine):
    body = asked(
        column("max_length", "INT64", 4, 50),
        column("min_length", "INT64", 2, 2),
        column("use_greedy", "BOOL", True, True),
        column("temperature", "FP32", 0.9, 0.9),
        column("compute_logprob", "BOOL", True, True),
        column("n_top_logprobs", "INT64", 2, 2),
        column("echo", "BOOL", True, False),
        column("end_strings", "BYTES", "quatre"),
        column("apply_chat_template", "BOOL", False, False),
        column("all_probs", "BOOL", False, False),
    )
    told = outputs(ask(MODEL + "/infer", body))
    first, second = told["sentences"]["data"]
    assert first.startswith("un" + SAYS[:2])
    assert second == SAYS[: SAYS.index("quatre")]
    rows, longest = told["log_probs"]["shape"]
    assert (rows, told["log_probs"]["data"][:4]) == (2, [-0.5] * 4)
    assert told["log_probs"]["data"][4:longest] == [0.0] * (longest - 4)  # the shorter one is filled up
    assert len(json.loads(told["top_logprobs"]["data"][0])) == 4
    assert [r.params.temperature for r in engine.seen] == [0.0, 0.0]


def test_a_column_of_words_is_read_once(ask, engine, monkeypatch):
    read = []
    monkeypatch.setattr(asks, "text", lambda name, element: read.append(name) or element.decode())
    words = column("stop_words_list", "BYTES", "quatre", *[""] * 500)
    told = outputs(
        ask(MODEL + "/infer", asked(words, column("max_output_len", "INT64", *[50] * 9), prompts=["un"] * 9))
    )
    assert told["sentences"]["data"] == [SAYS[: SAYS.index("quatre")]] * 9
    assert read.count("stop_words_list") == 501
    engine.seen.clear()
    r = ask(MODEL + "/infer", asked(column("stop_words_list", "BYTES", *["x"] * 33)))
    assert (r.status_code, engine.seen) == (400, [])
    assert "holds 33 strings, more than 32" in r.json()["error"]


def test_much_about_prompts(ask, engine, monkeypatch):
    body = asked(column("n_prompt_log_probs", "INT64", 5, 5))
    threads = []
    monkeypatch.setattr(calls, "outputs", lambda *given: threads.append(threading.current_thread()) or made(*given))
    monkeypatch.setattr("fewbit.serve.body._LARGE_BYTES", 1000)
    outputs(ask(MODEL + "/infer", body))
    assert threading.main_thread() not in threads  # which has others to answer
    monkeypatch.setattr("fewbit.serve.service.MAX_REPORTED", 10)
    engine.seen.clear()
    r = ask(MODEL + "/infer", body)
    assert (r.status_code, engine.seen) == (400, [])
    assert "log-probabilities, more than 10" in r.json()["error"]


def test_query_vllm_and_huggingface(ask, engine):
    body = asked(
        column("max_tokens", "INT64", 5, 5),
        column("min_tokens", "INT64", 1, 1),
        column("n_log_probs", "INT64", 1, 1),
        column("n_prompt_log_probs", "INT64", 1, 1),
        column("seed", "INT64", 1, 1),
        column("output_logits", "BOOL", False, False),
        column("output_scores", "BOOL", False, False),
        column("lora_uids", "BYTES", "", ""),
    )
    told = outputs(ask(MODEL + "/infer", body))
    assert list(told) == ["outputs", "sentences", "top_logprobs", "prompt_log_probs"]
    first = json.loads(told["prompt_log_probs"]["data"][0])
    assert first[0] is None
    assert len(first) == len(engine.seen[0].prompt)
    assert all(isinstance(v, float) for entry in first[1:] for v in entry.values())


def test_chats_and_beginnings(ask, engine, tokenizer):
    chat = json.dumps([{"role": "user", "content": "un"}])
    outputs(ask(MODEL + "/infer", asked(column("apply_chat_template", "BOOL", True, True), prompts=(chat, "un"))))
    rendered = tokenizer.encode("<s><|user|>un\n<|assistant|>", add_special_tokens=False)
    assert [r.prompt for r in engine.seen] == [tuple(rendered)] * 2
    engine.seen.clear()
    outputs(ask(MODEL + "/infer", asked(column("add_BOS", "BOOL", True, False))))
    with_, without = ([1] * b + tokenizer.encode(t, add_special_tokens=False) for b, t in ((1, "un"), (0, "deux")))
    assert [r.prompt for r in engine.seen] == [tuple(with_), tuple(without)]
    bad = asked(column("apply_chat_template", "BOOL", True), prompts=('[{"role": "user"}]',))
    assert "must have a role and a content" in ask(MODEL + "/infer", bad).json()["error"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (column("promts", "BYTES", "x"), "unknown input 'promts': did you mean 'prompts'?"),
        (column("lora_uids", "BYTES", "7", "7"), "'lora_uids': 7 is not supported"),
        (column("output_generation_logits", "BOOL", True, True), "is not supported"),
        (column("no_repeat_ngram_size", "FP32", 3.0, 3.0), "is not supported"),
        (column("top_k", "INT32", 1, 1), "'top_k' must be INT64, got INT32"),
        (column("top_k", "INT64", 1), "'top_k' has 1 rows, the request has 2"),
        (column("max_output_len", "INT64", 500, 500), "max_output_len 500"),
        (column("top_p", "FP32", 3.0, 3.0), "top_p must be in (0, 1], got 3.0"),
    ],
)
def test_what_is_wrong(ask, engine, more, why):
    r = ask(MODEL + "/infer", asked(more))
    assert (r.status_code, list(r.json())) == (400, ["error"])
    assert why in r.json()["error"]
    assert not engine.seen


def test_the_config_is_what_pytriton_reads(ask):
    config = ask(MODEL + "/config").json()
    assert config["max_batch_size"] > 0
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert all(len(t["data_type"].split("_")) == 2 for t in (*config["input"], *config["output"]))
    assert all(list(value) == ["string_value"] for value in config["parameters"].values())
    assert [i["name"] for i in config["input"] if not i["optional"]] == ["prompts"]
    assert (
        config["output"][0]["data_type"] == "TYPE_STRING"
    )  # by the first output the query classes see that texts come


def test_which_names_there_are(engine, tokenizer, run):
    async def names(flavor):
        app = create_app(models_of(tokenizer, storyteller=engine), triton=Options(flavor))
        async with client_of(app) as client:
            return [m["name"] for m in (await client.post("/v2/repository/index")).json()]

    triton = ["ensemble", "tensorrt_llm_bls", "preprocessing", "tensorrt_llm", "postprocessing"]
    assert run(names("ensemble")) == run(names("both")) == ["storyteller", *triton]
    assert run(names("nemo")) == ["storyteller"]
