"""Whoever writes a special token's text in a chat, by either protocol, writes text."""

from __future__ import annotations

import asyncio
import json
import re
import string

import pytest
from serve_names import CHAT, client_of, models_of

from fewbit.engine.types import EngineDownError, OverloadedError
from fewbit.errors import CheckpointError, RequestError
from fewbit.serve import Models, body, create_app, loading, turns
from fewbit.serve.kserve import Options, arrival, protocol
from fewbit.serve.loading import Given
from fewbit.serve.metrics import Metrics
from fewbit.serve.service import Service

SPELLED = "un</s><s>deux<unk>"


@pytest.mark.parametrize("role", ["user", "system", "user</s>"])
def test_both_protocols_make_the_same_tokens_of_a_chat(engine, tokenizer, run, role):
    """The one special token is the template's; the words are all there."""
    messages = [{"role": role, "content": SPELLED}, {"role": "assistant", "content": "trois</s><s>"}]
    messages += [{"role": "user", "content": "</s>"}]
    nemo = {
        "inputs": [
            {"name": "prompts", "datatype": "BYTES", "shape": [1, 1], "data": [json.dumps(messages)]},
            {"name": "apply_chat_template", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
        ]
    }

    async def ask():
        app = create_app(models_of(tokenizer, storyteller=engine), triton=Options("nemo"))
        async with client_of(app) as client:
            first = await client.post("/v2/models/storyteller/infer", json=nemo)
            if role == "user</s>":  # OpenAI's protocol knows its roles
                return [first]
            return [first, await client.post(CHAT, json={"messages": messages})]

    answers = run(ask())
    assert [r.status_code for r in answers] == [200] * len(answers), [r.text for r in answers]
    prompts = {request.prompt for request in engine.seen}
    assert len(engine.seen) == len(answers)
    assert len(prompts) == 1
    (ids,) = prompts
    assert [i for i in ids if i in tokenizer.special_ids] == [tokenizer.bos_id]
    rendered = f"<s><|{role}|>{SPELLED}\n<|assistant|>trois</s><s>\n<|user|></s>\n<|assistant|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_a_question_that_is_no_chat(engine, tokenizer, run):
    async def ask():
        app = create_app(models_of(tokenizer, storyteller=engine), triton=Options("nemo"))
        async with client_of(app) as client:
            inputs = [
                {"name": "prompts", "datatype": "BYTES", "shape": [1, 1], "data": [SPELLED]},
                {"name": "apply_chat_template", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
            ]
            return await client.post("/v2/models/storyteller/infer", json={"inputs": inputs})

    assert run(ask()).status_code == 200
    assert [i for i in engine.seen[0].prompt if i in tokenizer.special_ids] == [tokenizer.bos_id]


def test_tokens_that_lie_in_one_another():
    special = re.compile("abc|bc|cd|x y")
    value = {"content": "abcd", "parts": [{"text": "x y", "n": 3}], "none": None}
    found = turns._plain(value, special, "#", room())
    assert (found["parts"][0]["n"], found["none"]) == (3, None)
    for text in (found["content"], found["parts"][0]["text"]):
        assert not special.search(text)
        assert not any(special.search(piece) for piece in text.split("#"))
    assert found["content"].replace("#", "") == "abcd"
    with pytest.raises(RequestError, match="'§' is a special token of this model and cannot be text"):
        turns._plain("a § b", re.compile("§"), "#", room())


def room(chars: int = 1000) -> turns._Room:
    return turns._Room(chars, 10)


def test_keys_are_text_too():
    """The schema of a tool may name a property as it likes."""
    special = re.compile("<end>")
    found = turns._plain({"tools": [{"properties": {"a<end>b": {"type": "<end>"}}}]}, special, "#", room())
    assert found == {"tools": [{"properties": {"a<#end>b": {"type": "<#end>"}}}]}


@pytest.mark.parametrize("tokens", ["ab", "0123456789abcdef", string.hexdigits + "|<end>"])
def test_a_cut_makes_no_special_token(tokens):
    """Not even where one may lie in any hex number."""
    special = re.compile(f"{tokens}|a0|0a|f1")
    for _ in range(20):
        cut = turns._cut_of(special)
        assert len(set(cut)) > 3
        found = turns._plain(tokens + "a0" * 5, special, cut, room())
        assert not special.search(found)
        assert found.replace(cut, "") == tokens + "a0" * 5


def test_a_chat_that_grows_is_refused_before_it_has():
    special, cut = re.compile("<e>"), "#" * 32
    assert turns._plain(["<e>"] * 7, special, cut, room(100)) == [f"<{cut}e>"] * 7  # 7 * (3 + 10) characters
    for chat in (["<e>"] * 8, "<e>" * 8, "x" * 101, {"<e>" * 8: 1}):
        with pytest.raises(RequestError, match="more than 100 characters"):
            turns._plain(chat, special, cut, room(100))


def test_the_tokens_that_bound_turns(tokenizer):
    """Those that begin or end texts always; others where the template writes them."""
    for source, more in (("", ""), ("{{ '<unk>' }}", "<unk>")):
        bounds = tokenizer.turn_texts(source)
        assert bounds.findall("<unk></s>x<s>") == [*([more] if more else []), "</s>", "<s>"]
    assert tokenizer.turn_texts("<unk>", ["<unk>", "</s>"]).findall("<unk></s>") == ["</s>"]


def test_grpc_messages_share_the_limit_of_all_bodies():
    kind = protocol.messages()["ModelInferRequest"]
    raw = kind(model_name="x" * (1 << 20)).SerializeToString()
    before = body._Share.in_use

    async def read():
        with body.held(body.MAX_HELD_BYTES - before - len(raw) + 1):
            with pytest.raises(OverloadedError, match="retry later"):
                await arrival.message(kind, raw)
            assert (await arrival.message(kind, raw[:0])).model_name == ""  # small ones need none
        return (await arrival.message(kind, raw)).model_name

    assert len(asyncio.run(read())) == 1 << 20
    assert body._Share.in_use == before


class Shelf(Given):
    """Models of which some are damaged."""

    def __init__(self, services):
        super().__init__(services)
        self.damaged = {"b"}

    async def open(self, name, metrics, tell, lost):
        if name in self.damaged:
            raise CheckpointError("its folder is damaged")
        return await super().open(name, metrics, tell, lost)


def test_a_model_that_could_not_be_loaded_is_not_held_against_the_others(engine, tokenizer, run, monkeypatch):
    """The server is ready, and so is that model after a while: a request would try again."""
    metrics = Metrics()
    shelf = Shelf([Service(engine, tokenizer, name, metrics.of(name)) for name in ("a", "b")])

    async def ready(client, path):
        return (await client.get(f"/v2/{path}/ready")).status_code

    async def main():
        models = Models((), metrics, shelf)
        async with client_of(create_app(models)) as client:
            assert await ready(client, "models/b") == 200
            with pytest.raises(EngineDownError, match="its folder is damaged"):
                await models.load("b")
            assert [await ready(client, p) for p in ("health", "models/a", "models/b")] == [200, 200, 503]
            async with models.lease("a") as service:
                assert service.name == "a"
            monkeypatch.setattr(loading, "AGAIN_S", 0.0)
            assert [await ready(client, p) for p in ("health", "models/a", "models/b")] == [200, 200, 200]
            shelf.damaged.clear()
            async with models.lease("b") as service:
                assert service.name == "b"
            assert models.state("b").state == "READY"

    run(main())
