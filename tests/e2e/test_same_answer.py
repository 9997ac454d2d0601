"""One request, one answer: alone, in a full batch, in small chunks, after a prefix hit, after a preemption, under both
policies. Tokens and log-probabilities are equal to the last bit, for every way of storing weights and K and V."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.engine.attend import token_bytes
from fewbit.engine.config import EngineOptions, resolve
from fewbit.engine.engine import Engine, Output, generate
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.model import Decoder, load
from fewbit.ops.cpu import build as cpu_build
from helpers import ids, make_model

SLOW = pytest.mark.slow
BUILT = cpu_build.library()
needs_compiler = pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
SHARED = ids(40, seed=9)
PROMPTS = [ids(n, seed=n) for n in (1, 5, 17, 33, 64, 100)] + [SHARED + ids(n, seed=n) for n in (3, 20)]
MODELS = [(recipe, kv) for recipe in (None, "int8", "int4", "fp8", "nvfp4", "mxfp4") for kv in (None, "fp8", "int8")]
QUICK = {(None, None), ("int8", "int8"), ("int4", None), ("nvfp4", "fp8")}
WAYS = {
    "full batch": {},
    "small chunks": {"max_batch_tokens": 7, "max_batch": 5},
    "one token a step": {"max_batch_tokens": 1, "max_batch": 1},
    "small blocks": {"block_size": 3, "num_blocks": 400},
    "no prefix cache": {"prefix_cache": False},
    "preempted": {"num_blocks": 11},
    "preempted, small chunks": {"num_blocks": 11, "max_batch_tokens": 11, "max_batch": 8},
    "never evicted": {"num_blocks": 11, "policy": "guaranteed_no_evict"},
}

LONG = ("one token a step", "small blocks", "no prefix cache")
"""Left out of the fast run for all but the plainest model: a slow cell has them for each kind of weights."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[..., Path]:
    """The directory of a model of `family`, compressed by `recipe` with K and V in `kv`, each made once."""

    @functools.cache
    def make(recipe: str | None, kv: str | None, family: str = "llama", **sizes: object) -> Path:
        folder = tmp_path_factory.mktemp("model")
        source = make_model(folder / "source", family, **{**SIZES, **sizes})
        if recipe is kv is None:
            return source
        chosen = read_recipe(recipe) if recipe else parse_recipe("kv", f"rules: []\nkv: {{format: {kv}}}")
        chosen = replace(chosen.with_kv(kv), calibration=replace(chosen.calibration, samples=3, length=64))
        checkpoint = open_checkpoint(source)
        compress(checkpoint, plan(checkpoint, chosen), folder / "small")
        return folder / "small"

    return make


@functools.cache
def decoder(path: Path, backend: str) -> Decoder:
    return load(open_checkpoint(path), backend=backend)


def engine(path: Path, backend: str = "exact", **options: object) -> Engine:
    """A fresh engine around the model, which is loaded once."""
    made = decoder(path, backend)
    given = {"block_size": 16, "num_blocks": 120, "max_batch": 16, "max_batch_tokens": 512, **options}
    config = resolve(
        EngineOptions(**given),
        spec=made.spec,
        token_bytes=token_bytes(made.spec, made.codecs),
        free_bytes=1 << 30,
    )
    return Engine(made, config)


def requests(prompts: list[list[int]], count: int = 24, **params: object) -> list[GenerateRequest]:
    given = SamplingParams(**{"max_tokens": count, "temperature": 0.0, "logprobs": 4, "ignore_eos": True, **params})
    return [GenerateRequest(id=f"r{i}", prompt=tuple(p), params=given) for i, p in enumerate(prompts)]


def alone(path: Path, prompts: list[list[int]], count: int = 24, **options: object) -> list[Output]:
    """Each in an engine of its own."""
    return [generate(engine(path, **options), [r])[0] for r in requests(prompts, count)]


def same(found: list[Output], expected: list[Output]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens == theirs.tokens, mine.id
        assert mine.logprobs == theirs.logprobs, mine.id  # floats, not nearly: equal


def varied(outputs: list[Output]) -> None:
    """The answers say something: not one token again and again."""
    assert len({t for o in outputs for t in o.tokens}) > 3 * len(outputs)
    assert all(len(o.logprobs) == len(o.tokens) for o in outputs)


CELLS = [pytest.param(*m, id=" ".join(map(str, m)), marks=[] if m in QUICK else [pytest.mark.slow]) for m in MODELS]


@pytest.mark.parametrize(("recipe", "kv"), CELLS)
def test_however_it_is_scheduled(models, recipe, kv):
    path = models(recipe, kv)
    expected = alone(path, PROMPTS)
    varied(expected)
    for way, options in WAYS.items():
        if way in LONG and (recipe, kv) in QUICK - {(None, None)}:
            continue
        machine = engine(path, **options)
        same(generate(machine, requests(PROMPTS)), expected)
        stats = machine.stats()
        assert stats.blocks_free == stats.blocks
        if way.startswith("preempted"):
            assert stats.preemptions_total > 0
        elif way == "never evicted":
            assert stats.preemptions_total == 0
        elif way == "full batch":
            # again: every whole block of every prompt is known now
            before = machine.runner.computed_tokens
            again = generate(machine, requests(PROMPTS))
            same(again, expected)
            assert sum(o.ending.cached_tokens for o in again) == sum((len(p) - 1) // 16 * 16 for p in PROMPTS)
            assert machine.runner.computed_tokens - before < sum(map(len, PROMPTS))


@needs_compiler
@pytest.mark.parametrize(("recipe", "kv"), [(None, None), ("int4", "fp8"), pytest.param("int8", "int8", marks=SLOW)])
def test_by_the_kernels_for_cpus(models, recipe, kv):
    """What a server runs: products and attention in C, and none of it in an exact model."""
    path = models(recipe, kv)
    assert None not in engine(path, "auto").runner.cache.paged
    assert set(engine(path).runner.cache.paged) == {None}
    expected = alone(path, PROMPTS, backend="auto")
    varied(expected)
    for options in WAYS.values():
        same(generate(engine(path, "auto", **options), requests(PROMPTS)), expected)


@pytest.mark.parametrize(("recipe", "kv"), [(None, None), pytest.param("int8", "int8", marks=pytest.mark.slow)])
def test_a_text_echoed_has_the_floats_it_was_generated_with(models, recipe, kv):
    path = models(recipe, kv)
    answers = alone(path, PROMPTS)
    texts = [[*prompt, *o.tokens] for prompt, o in zip(PROMPTS, answers, strict=True)]
    expected = [generate(engine(path), [r])[0] for r in requests(texts, 16, prompt_logprobs=4)]
    for prompt, answer, echo in zip(PROMPTS, answers, expected, strict=True):
        assert len(echo.prompt_logprobs) == len(prompt) + len(answer.tokens) - 1
        assert echo.prompt_logprobs[len(prompt) - 1 :] == answer.logprobs
    for way, options in WAYS.items():
        if way in LONG:
            continue
        machine = engine(path, **options)
        found = generate(machine, requests(texts, 16, prompt_logprobs=4))
        same(found, expected)
        assert [o.prompt_logprobs for o in found] == [o.prompt_logprobs for o in expected], way
        assert machine.stats().preemptions_total > 0 or way != "preempted"
        only = generate(machine, requests(texts, 0, prompt_logprobs=4))
        assert [o.prompt_logprobs for o in only] == [o.prompt_logprobs for o in expected], way


def test_a_prefix_that_another_request_computed(models):
    """Blocks of a neighbour that is still running count too."""
    path = models("int8", "int8")
    machine = engine(path)
    first, second = requests(PROMPTS[-2:])
    machine.submit(first)
    for _ in range(3):
        machine.step()
    machine.submit(second)
    events = [e for _ in range(40) for e in machine.step() if e.id == second.id]
    (expected,) = alone(path, PROMPTS[-1:])
    assert events[-1].ending.cached_tokens == 32
    assert tuple(e.token for e in events) == expected.tokens
    assert tuple(e.logprobs for e in events) == expected.logprobs


@pytest.mark.parametrize("window", [7, 600])
@pytest.mark.parametrize("kv", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_with_a_window(models, window, kv):
    """Wide enough a window, and the keys before it are let go in pieces: the sums stay the same."""
    path = models(None, kv, "mistral", sliding_window=window, max_position_embeddings=2048)
    prompts = [ids(n, seed=n) for n in ((4, 30, 80) if window == 7 else (20, 590, 1105, 1640))]
    whole = {"num_blocks": 260, "max_batch_tokens": 2048}
    expected = alone(path, prompts, 16, **whole)
    varied(expected)
    least = max(len(p) for p in prompts) // 16 + 8
    for options in (
        whole,
        {"num_blocks": 260, "max_batch_tokens": 37},
        {"num_blocks": least, "max_batch_tokens": 256},
        {"num_blocks": least, "max_batch_tokens": 500, "policy": "guaranteed_no_evict"},
        {"num_blocks": 1400, "max_batch_tokens": 300, "block_size": 3},
    ):
        machine = engine(path, **options)
        same(generate(machine, requests(prompts, 16)), expected)
        same(generate(machine, requests(prompts[::-1], 16)), expected[::-1])


@pytest.mark.parametrize("recipe", [None, pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_drawn_answers_too(models, recipe):
    """With a seed a request draws the same wherever it runs, and whoever runs beside it."""
    path = models(recipe, None)
    drawn = {"temperature": 1.2, "top_p": 0.95, "seed": 3, "repetition_penalty": 1.1}
    expected = [generate(engine(path), [r])[0] for r in requests(PROMPTS, **drawn)]
    varied(expected)
    for way, options in WAYS.items():
        if way not in LONG:
            same(generate(engine(path, **options), requests(PROMPTS, **drawn)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4, 8])
@pytest.mark.parametrize("recipe", [None, "int8"])
def test_on_several_threads(models, recipe, threads):
    path = models(recipe, None)
    torch.set_num_threads(threads)
    try:
        expected = alone(path, PROMPTS)
        for options in WAYS.values():
            same(generate(engine(path, **options), requests(PROMPTS)), expected)
    finally:
        torch.set_num_threads(1)


def test_other_families_in_a_batch(models):
    """Biases, normalized heads and a tied head change nothing about it."""
    for family, more in (("qwen2", {"max_window_layers": 1, "sliding_window": 9}), ("qwen3", {})):
        path = models("int8", None, family, **more)
        expected = alone(path, PROMPTS[:5], 10)
        for options in ({}, {"max_batch_tokens": 7, "max_batch": 5}):
            same(generate(engine(path, **options), requests(PROMPTS[:5], 10)), expected)
