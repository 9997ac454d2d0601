"""Generating in this process: the same answers as the engine's own loop and as over HTTP, from everywhere."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest

import fewbit
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import RecipeError, RequestError
from helpers import make_model

PROMPTS = ["Once upon a time", "The rain came down", "un, deux, trois"]
FEW = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("local") / "model")


@pytest.fixture(scope="module")
def engine(model):
    with fewbit.Engine(model, device="cpu", max_batch=2, max_model_len=64, max_queued=8) as made:
        yield made


def test_many_prompts_are_answered_in_order_as_the_engine_alone_answers_them(engine, model):
    answers = engine.generate(PROMPTS * 5, logprobs=1, **FEW)  # more than may wait in the engine's queue
    low = open_engine(model)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
    ids = [tuple(engine.tokenizer.encode(p)) for p in PROMPTS]
    alone = generate(low, [GenerateRequest(id=str(i), prompt=p, params=params) for i, p in enumerate(ids)])
    for k, answer in enumerate(answers):
        wanted = alone[k % 3]
        assert (answer.token_ids, answer.logprobs) == (wanted.tokens, wanted.logprobs)
        assert answer.text == engine.tokenizer.decode([*ids[k % 3], *wanted.tokens])[len(PROMPTS[k % 3]) :]
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids[k % 3]), 6)


def test_prompts_have_log_probabilities_too(engine):
    ids = engine.tokenizer.encode(PROMPTS[0])
    (whole,) = engine.generate(ids, max_tokens=4, temperature=0, ignore_eos=True, logprobs=1)
    (again,) = engine.generate([[*ids, *whole.token_ids]], max_tokens=1, prompt_logprobs=1)
    assert len(again.prompt_logprobs) == len(ids) + 4 - 1
    assert [p.chosen for p in again.prompt_logprobs[-4:]] == [p.chosen for p in whole.logprobs]


def machine(engine):
    """What steps, on its own thread."""
    return engine._service.client._loop._engine


def test_many_prompts_are_computed_together(engine, monkeypatch):
    before, both = engine.stats(), threading.Event()
    inner, client = machine(engine), engine._service.client
    submit, launch = client.submit, inner.runner.launch
    asked = itertools.count(1)

    async def told(request):
        stream = await submit(request)
        if next(asked) == 2:
            both.set()
        return stream

    def held(batch):  # the first goes on slowly until the second has come, however long that takes
        both.wait(1.0)
        return launch(batch)

    monkeypatch.setattr(client, "submit", told)
    monkeypatch.setattr(inner.runner, "launch", held)
    engine.generate(["a", "b"], max_tokens=20, temperature=0, ignore_eos=True)
    assert engine.stats().steps_total - before.steps_total < 2 * 20


def test_one_text_ids_and_a_chat_are_one_prompt(engine):
    ids = engine.tokenizer.encode(PROMPTS[0])
    (text,), (same,) = engine.generate(PROMPTS[0], **FEW), engine.generate(ids, **FEW)
    assert text.token_ids == same.token_ids
    talk = [{"role": "user", "content": "Count!"}]
    (chat,), rendered = engine.generate(talk, **FEW), engine.tokenizer.chat_template.render(talk)
    (wanted,) = engine.generate(engine.tokenizer.encode(rendered, add_special_tokens=False), **FEW)
    assert chat.token_ids == wanted.token_ids
    mixed = engine.generate([PROMPTS[0], ids, talk], **FEW)
    assert [a.token_ids for a in mixed] == [text.token_ids, text.token_ids, chat.token_ids]
    assert engine.generate([]) == []


def test_fields_are_those_of_http(engine):
    several = engine.generate(PROMPTS[:2], n=2, seed=5, max_tokens=8)
    assert [a.text for a in several] == [a.text for a in engine.generate(PROMPTS[:2], n=2, seed=5, max_tokens=8)]
    assert several[0].text != several[1].text
    (whole,) = engine.generate(PROMPTS[0], **FEW)
    stop = whole.text[2]
    (cut,) = engine.generate(PROMPTS[0], stop=stop, **FEW)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)


@pytest.mark.parametrize(
    ("prompts", "fields", "says"),
    [
        ("x", {"maxtokens": 3}, "unknown field 'maxtokens': did you mean 'max_tokens'"),
        ("x", {"max_tokens": 1000}, "exceed the model length of 64"),
        ([[]], {}, "prompt"),
        (["fine", [99999]], {}, "token id 99999"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"stream": True}, "'stream' shapes an HTTP answer"),
        ([{"role": "nobody", "content": ""}], {}, "role"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(engine, prompts, fields, says):
    before = engine.stats()
    with pytest.raises(RequestError, match=says):
        engine.generate(prompts, **fields)
    assert engine.stats().steps_total == before.steps_total


def test_pieces_for_scripts_and_for_coroutines(engine):
    (whole,) = engine.generate(PROMPTS[0], **FEW)
    *_, last = pieces = list(engine.stream(PROMPTS[0], **FEW))
    assert "".join(p.text for p in pieces) == whole.text
    assert tuple(p.token for p in pieces if p.token is not None) == whole.token_ids
    assert last.finish.output_tokens == 6

    async def main():
        texts = [piece.text async for piece in engine.stream(PROMPTS[0], **FEW)]
        (inside,) = engine.generate(PROMPTS[0], **FEW)  # where a loop runs, as in a notebook
        return "".join(texts), inside.text

    assert asyncio.run(main()) == (whole.text, whole.text)
    with pytest.raises(RequestError, match="n must be 1, got 2"):
        list(engine.stream(PROMPTS[0], n=2))


def test_leaving_a_stream_ends_the_request(engine, monkeypatch):
    left, launch = threading.Event(), machine(engine).runner.launch

    def held(batch):  # so that no text comes to its end before it is left
        if any(piece.first > 30 for piece in batch.pieces):
            left.wait(60)
        return launch(batch)

    monkeypatch.setattr(machine(engine).runner, "launch", held)

    def aborts() -> int:
        return engine.stats().endings_total.get("abort", 0)

    def ended(count: int) -> None:
        left.set()
        limit = time.monotonic() + 60
        while aborts() < count or engine.stats().blocks_used:
            assert time.monotonic() < limit
            time.sleep(0.01)
        left.clear()

    before = aborts()
    for _ in engine.stream(PROMPTS[0], max_tokens=50, ignore_eos=True):
        break
    ended(before + 1)

    async def main():
        async for _ in engine.stream(PROMPTS[0], max_tokens=50, ignore_eos=True):
            break

    asyncio.run(main())
    ended(before + 2)
    assert aborts() == before + 2


def test_several_threads_at_once(engine):
    (wanted,) = engine.generate(PROMPTS[0], **FEW)
    got = []
    threads = [threading.Thread(target=lambda: got.extend(engine.generate(PROMPTS, **FEW))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert len(got) == 12
    assert sum(a.token_ids == wanted.token_ids for a in got) >= 4


def test_opening_and_closing(model, tmp_path):
    with pytest.raises(RecipeError, match="unknown option 'max_bach': did you mean 'max_batch'"):
        fewbit.Engine(model, max_bach=3)
    with pytest.raises(fewbit.FewbitError, match="nowhere"):
        fewbit.Engine(tmp_path / "nowhere")
    engine = fewbit.Engine(model, device="cpu")
    assert engine.generate("a", max_tokens=1)
    engine.close()
    engine.close()
    with pytest.raises(fewbit.FewbitError, match="closed"):
        engine.generate("a")
