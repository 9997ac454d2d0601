"""Requests with a grammar, on the bundled model: outputs keep to it under every schedule, and endings make sense."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import replace

import psutil
import pytest
from tiny_engine import Overlapping, engine, request, run

from fewbit.demo import demo_model
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import Engine, generate, open_engine
from fewbit.engine.spawn import spawn
from fewbit.errors import RequestError
from fewbit.text import Tokenizer, grammar

PERSON = grammar.from_json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
CHOICE = grammar.from_choices(["the fox", "the bear", "nobody"])
WORDS = grammar.from_regex(r"([a-z]{2,7} ){2,3}end\.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model())


@pytest.fixture(scope="module")
def opened() -> Engine:
    return open_engine(demo_model(), EngineOptions(num_blocks=64))


@pytest.fixture
def machine(opened):
    """`machine(**options)`: a fresh engine around the model, which is opened once."""

    def make(overlapping: bool = False, **options) -> Engine:
        config = replace(opened.config, **options)
        made = Engine(opened.runner.decoder, config, lambda: Tokenizer.load(demo_model()))
        if overlapping:
            made.runner = Overlapping(opened.runner.decoder, config)
        return made

    return make


def asked(tokenizer, text="Once upon a time", **params):
    return request(tokenizer.encode(text), **({"max_tokens": 60, "ignore_eos": False} | params))


WISHES = [
    {"grammar": PERSON},
    {"grammar": PERSON, "temperature": 1.5, "seed": 6, "repetition_penalty": 1.2},
    {"grammar": CHOICE, "prompt_logprobs": 1, "logprobs": 2},
    {"grammar": WORDS, "temperature": 1.0, "seed": 5},
    {"max_tokens": 20},
]


@pytest.fixture(scope="module")
def expected(opened, tokenizer):
    """Each alone, one token a step."""
    made = Engine(opened.runner.decoder, opened.config, lambda: tokenizer)
    return [generate(made, [asked(tokenizer, **w)])[0] for w in WISHES]


def test_outputs_keep_to_it(expected, tokenizer):
    for wish, output in zip(WISHES, expected, strict=True):
        text = tokenizer.decode(output.tokens)
        if "grammar" in wish:
            assert output.ending.reason == "stop", text
        if wish.get("grammar") == PERSON:
            assert json.loads(text).keys() == {"name", "age"}
        elif wish.get("grammar") == CHOICE:
            assert text in {"the fox", "the bear", "nobody"}
        elif "grammar" in wish:
            assert re.fullmatch(r"([a-z]{2,7} ){2,3}end\.", text)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlapping": True, "block_size": 2, "num_blocks": 34},
        pytest.param({"max_batch_tokens": 8, "max_batch": 4}, marks=pytest.mark.slow),
        pytest.param({"block_size": 2, "num_blocks": 34}, marks=pytest.mark.slow),
        pytest.param({"overlapping": True, "prefix_cache": False}, marks=pytest.mark.slow),
    ],
)
def test_under_every_schedule(machine, tokenizer, expected, options):
    made = machine(**options)
    found = generate(made, [asked(tokenizer, **w) for w in WISHES])
    assert [o.tokens for o in found] == [o.tokens for o in expected], options
    assert [o.ending.reason for o in found] == [o.ending.reason for o in expected]
    assert (made.stats().preemptions_total > 0) == ("num_blocks" in options)
    assert made.stats().blocks_free == made.stats().blocks


def one(made, tokenizer, **params):
    (output,) = generate(made, [asked(tokenizer, **params)])
    return output.ending, tokenizer.decode(output.tokens)


def test_where_it_ends(machine, tokenizer):
    made = machine()
    some = grammar.from_regex("(ab)+")
    (eos,) = made.config.eos_token_ids
    ending, text = one(made, tokenizer, grammar=some, max_tokens=9, logit_bias=((eos, 100.0),))
    assert (ending.reason, ending.stop_token, text) == ("stop", eos, "ab")
    ending, text = one(made, tokenizer, grammar=some, max_tokens=9, logit_bias=((eos, 100.0),), min_tokens=7)
    assert (ending.reason, ending.stop_token) == ("stop", eos)
    assert ending.output_tokens >= 7
    ending, text = one(made, tokenizer, grammar=some, max_tokens=9, logit_bias=((eos, 100.0),), ignore_eos=True)
    assert (ending.reason, ending.output_tokens) == ("length", 9), "it goes on as long as the grammar lets it"
    ending, text = one(made, tokenizer, grammar=CHOICE, ignore_eos=True)
    assert (ending.reason, ending.stop_token) == ("stop", None), "there is nothing to go on with"
    ending, text = one(made, tokenizer, grammar=some, max_tokens=3)
    assert ending.reason in ("stop", "length")
    ending, text = one(made, tokenizer, grammar=CHOICE, max_tokens=0)
    assert (ending.reason, text) == ("length", "")


def test_wishes_that_contradict_it_end_in_a_clear_error(machine, tokenizer):
    made = machine()
    ending, _ = one(made, tokenizer, grammar=CHOICE, min_tokens=60)
    assert ending.reason == "error"
    assert re.fullmatch(r"the grammar is complete after \d+ tokens, fewer than min_tokens \(60\)", ending.detail)
    starts = {t[:n][0] for t in (tokenizer.encode(c, add_special_tokens=False) for c in ("a", "b")) for n in (1,)}
    banned = tuple((t,) for t in sorted(starts))
    ending, _ = one(made, tokenizer, grammar=grammar.from_regex("[ab]"), bad_words=banned)
    assert ending.reason == "error"
    assert "bad_words, allowed_token_ids, the grammar" in ending.detail
    assert ending.impossible
    allowed = tuple(tokenizer.encode("xyz", add_special_tokens=False))
    ending, _ = one(made, tokenizer, grammar=CHOICE, allowed_token_ids=allowed)
    assert (ending.reason, ending.output_tokens) == ("error", 0)
    assert made.stats().blocks_free == made.stats().blocks


def test_what_cannot_be_used_is_refused_before_it_is_queued(machine, tokenizer):
    made = machine()
    with pytest.raises(RequestError, match="unclosed group") as caught:
        made.submit(asked(tokenizer, grammar=grammar.from_regex("(")))
    assert caught.value.param == "grammar"
    assert not made.has_work
    with pytest.raises(RequestError, match="without a tokenizer"):
        engine().submit(request([1, 2], grammar=CHOICE))


class Slow:
    """Grammars that are compiled when they are told to."""

    def __init__(self, grammars) -> None:
        self.go, self.asked, self.grammars = threading.Event(), threading.Event(), grammars

    def matcher(self, text):
        self.asked.set()
        assert self.go.wait(60)
        return self.grammars.matcher(text)


def test_nobody_waits_for_a_grammar_that_is_compiled(machine, tokenizer):
    made = machine()
    made.grammars = slow = Slow(made.grammars)

    async def main():
        client = InProcessClient(made)
        try:
            waiting = asyncio.create_task(client.submit(asked(tokenizer, grammar=CHOICE)))
            stream = await client.submit(asked(tokenizer, max_tokens=20))
            events = [event async for event in stream]
            assert len(events) == 20
            assert not waiting.done()
            slow.go.set()
            events = [event async for event in await waiting]
            assert events[-1].ending.reason == "stop"
        finally:
            slow.go.set()
            await client.close()

    asyncio.run(main())


def test_an_abort_while_it_is_compiled(machine, tokenizer):
    made = machine()
    made.grammars = slow = Slow(made.grammars)

    async def main():
        client = InProcessClient(made)
        try:
            one = asked(tokenizer, grammar=CHOICE)
            waiting = asyncio.create_task(client.submit(one))
            await asyncio.to_thread(slow.asked.wait, 30)
            client.abort(one.id)
            slow.go.set()
            events = [event async for event in await waiting]
            assert [e.ending.reason for e in events if e.ending] == ["abort"]
            async with asyncio.timeout(30):
                while (await client.stats()).running:
                    await asyncio.sleep(0.01)
            assert (await client.stats()).blocks_used == 0
        finally:
            slow.go.set()
            await client.close()

    asyncio.run(main())


def test_a_stop_while_it_is_compiled_is_an_answer(machine, tokenizer):
    made = machine()
    made.grammars = slow = Slow(made.grammars)

    async def main():
        client = InProcessClient(made)
        waiting = asyncio.create_task(client.submit(asked(tokenizer, grammar=CHOICE)))
        await asyncio.to_thread(slow.asked.wait, 30)
        await client.close()
        slow.go.set()
        with pytest.raises(RequestError, match="shutting down"):
            await waiting

    asyncio.run(main())


class Broken:
    """A matcher that gives up after some tokens, as one does whose states grow too many."""

    done = False

    def __init__(self, after: int) -> None:
        self.left = after

    def mask(self) -> bytes:
        return b"\xff" * 8

    def accept(self, token: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise RequestError("the grammar cannot go on: it is too complex", "grammar")


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_grammar_that_grows_too_complex_ends_that_request_only(overlapping):
    made = engine(overlapping=overlapping)
    made.submit(request([1, 2], "bad", grammar="x"), Broken(3))
    made.submit(request([1, 2], "good"))
    events = run(made)
    endings = {e.id: e.ending for e in events if e.ending}
    assert (endings["bad"].reason, endings["bad"].detail) == ("error", "the grammar cannot go on: it is too complex")
    assert endings["bad"].output_tokens == sum(e.id == "bad" and e.token is not None for e in events) == 3
    assert endings["good"].reason == "length"
    assert made.stats().blocks_free == made.stats().blocks


@pytest.mark.slow
def test_in_a_process_of_its_own_that_leaves_nobody_behind(tokenizer):
    async def ask(child):
        client = await child.connect()
        try:
            stream = await client.submit(asked(tokenizer, grammar=CHOICE))
            events = [event async for event in stream]
            with pytest.raises(RequestError, match="leads out of the schema") as caught:
                await client.submit(asked(tokenizer, grammar=grammar.from_json_schema({"$ref": "http://x.y/z"})))
            assert caught.value.param == "grammar"
            return tokenizer.decode([e.token for e in events if e.token is not None])
        finally:
            await client.close()

    with spawn(demo_model(), EngineOptions(num_blocks=64)) as child:
        assert asyncio.run(ask(child)) in {"the fox", "the bear", "nobody"}
        (helper,) = psutil.Process(child.pid).children(recursive=True)
        child.process.kill()
        psutil.wait_procs([helper], timeout=30)
        assert not helper.is_running()
