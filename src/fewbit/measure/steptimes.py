"""How long a decode step takes with each group of linears in each format: measured in place, in a model of few layers.

One group at a time changes its format in a model of random weights; what the step takes more or less then is that
group's. So kernels are timed as they run beside each other, in a recorded graph on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fewbit.compress.decide import UNCHANGED, plain_recipe
from fewbit.compress.recipe import AS_IT_WAS, Recipe, Rule
from fewbit.compress.steptimes import StepTimes, groups_of, shape_of
from fewbit.engine.attend import token_bytes
from fewbit.engine.config import STEP_TOKENS, resolve
from fewbit.engine.engine import Engine
from fewbit.engine.gpu import SIZES
from fewbit.engine.runner import free_bytes
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure.dummy import dummy_checkpoint
from fewbit.measure.speed import WARM_STEPS, batch_options, fill, random_prompts, step_seconds
from fewbit.model.load import Loader
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.device import device_info

Tell = Callable[[str], None]
_TIMED = 32  # steps


def measure(
    config: Mapping[str, Any],
    candidates: Sequence[str],
    device: torch.device,
    *,
    kv: str | None = None,
    batch: int = 1,
    context: int = 2048,
    layers: int = 4,
    rounds: int = 3,
    tell: Tell = lambda text: None,
) -> StepTimes:
    """Measure the step of a shape.

    Args:
        config: a config.json.
        candidates: built-in recipes of one rule, or ``none``; the first is that of all other linears meanwhile.
        device: where.
        kv: format of K and V, as ``--kv`` takes it.
        batch: sequences.
        context: tokens of each that are in the cache.
        layers: of the models that are timed, and twice as many; at most half of the shape's.
        rounds: how often everything is timed; the best counts.
        tell: called with what is being done.

    Raises:
        RecipeError: a candidate is no recipe of one rule.
        UnsupportedError: a candidate runs another way than the first, so that times do not add up.
    """
    spec = dummy_checkpoint(config, AS_IT_WAS, device).spec
    if context + WARM_STEPS + _TIMED + _prefill_steps(device, batch, context) > spec.context:
        raise UnsupportedError(
            f"{batch} sequences of {context} tokens and the steps to be timed exceed the model's {spec.context}"
        )
    if device.type == "cuda" and batch > SIZES[-1]:
        raise UnsupportedError(f"batch {batch}: the largest recorded step holds {SIZES[-1]} sequences")
    if device.type == "cuda" and spec.routers():
        raise UnsupportedError("a mixture of experts runs kernel by kernel on a GPU: no group has a time of its own")
    if len(set(candidates)) < len(candidates):
        raise RecipeError(f"candidates {', '.join(candidates)}: each is named once")
    if len(spec.layers) < 2:
        raise UnsupportedError("a model of one layer has no time of a layer; give a shape of two or more")
    layers = min(layers, len(spec.layers) // 2)
    base, groups, quants = candidates[0], groups_of(spec), {name: _quant(name) for name in candidates}

    def seconds(count: int, changed: Sequence[str] = (), candidate: str = base) -> float:
        rules = [Rule(f"layers.*.{role}", quants[candidate]) for role in changed]
        recipe = replace(AS_IT_WAS, rules=(*rules, Rule("layers.*", quants[base]))).with_kv(kv)
        return _step(config, recipe, device, count, batch, context)

    asked: dict[tuple[str, str], tuple[Any, ...]] = {("few", base): (layers,), ("many", base): (2 * layers,)}
    asked |= {(group[0], name): (layers, group, name) for group in groups for name in candidates[1:]}
    rows: dict[tuple[str, str], list[float]] = {key: [] for key in asked}
    tell("warming up")
    seconds(layers)
    for number in range(rounds):  # the best of rounds that are apart: what else runs on a machine only adds
        for (what, name), arguments in asked.items():
            tell(f"round {number + 1} of {rounds}: {what} as {name}")
            rows[what, name].append(seconds(*arguments))
    took = {key: min(found) for key, found in rows.items()}
    few, many = took["few", base], took["many", base]
    layer = (many - few) / layers
    if layer <= 0 or few - layers * layer < -0.1 * few:
        raise UnsupportedError(
            f"a step of {layers} layers takes {few * 1e3:.2f} ms and one of {2 * layers} layers {many * 1e3:.2f}, "
            "which does not add up: something else keeps this machine busy; try again, or give more --layers"
        )
    more = {
        group[0]: {base: 0.0} | {name: (took[group[0], name] - few) / layers for name in candidates[1:]}
        for group in groups
    }
    stored = AS_IT_WAS.with_kv(kv).kv
    word = None if stored is None else str(stored)
    return StepTimes(
        str(device_info(device)), shape_of(spec), word, batch, context, base,
        few - layers * layer, layer, more, max(max(found) / min(found) - 1 for found in rows.values()),
    )  # fmt: skip


def _quant(candidate: str) -> QuantSpec:
    """The numerics of a candidate."""
    return QuantSpec() if candidate == UNCHANGED else plain_recipe(candidate).rules[0].quant


def _prefill_steps(device: torch.device, batch: int, context: int) -> int:
    """Steps until all sequences have begun, and a few more."""
    return -(-batch * context // STEP_TOKENS[device.type]) + batch + 8


def _step(
    config: Mapping[str, Any], recipe: Recipe, device: torch.device, layers: int, batch: int, context: int
) -> float:
    """Seconds of a step of `batch` sequences with `context` tokens each in the cache."""
    checkpoint = dummy_checkpoint(config, recipe, device, layers)
    loader = Loader(checkpoint, device, "auto")
    if device.type == "cuda" and (reason := loader.fused_why_not()):
        raise UnsupportedError(f"a candidate keeps the model from the fused step ({reason}); leave it out")
    decoder = loader.decoder() if device.type != "cuda" else loader.fused()
    longest = context + WARM_STEPS + _TIMED + _prefill_steps(device, batch, context)
    options, stored = batch_options(device, batch, longest), token_bytes(decoder.spec, decoder.codecs)
    engine = Engine(decoder, resolve(options, spec=decoder.spec, token_bytes=stored, free_bytes=free_bytes(device)))
    fill(engine, random_prompts(decoder.spec.vocab, batch, context), longest - context, "step")
    if len(engine.scheduler.running) < batch:
        raise UnsupportedError(f"{batch} sequences of {context} tokens do not run at the same time here; ask for fewer")
    if device.type == "cuda":
        from fewbit.measure.ceilings import seconds

        return seconds(engine.runner.graph(batch).replay, times=20)
    return min(step_seconds(engine, batch, _TIMED))  # whatever else runs on this machine only adds
