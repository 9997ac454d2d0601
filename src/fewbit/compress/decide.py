"""A recipe that says what is wanted becomes one that says what to do: `auto` measures, and writes down the rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fewbit.checkpoint import Checkpoint
from fewbit.compress.data import windows_of
from fewbit.compress.plan import prepared
from fewbit.compress.recipe import Recipe, parse_recipe, read_recipe
from fewbit.compress.sensitivity import Progress, Unit, sensitivities
from fewbit.compress.steptimes import StepTimes
from fewbit.compress.techniques.auto import Settings, cheapest
from fewbit.errors import CheckpointError, RecipeError, UnsupportedError
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, role_of

UNCHANGED = "none"
"""The candidate that leaves a linear as it was."""


@dataclass(frozen=True)
class Decision:
    """What was found.

    Attributes:
        recipe: an ordinary recipe that does it; its `text` does it again under the same options.
        candidate: by linear.
        bits: true bits a weight over these linears.
        loss: the sum of the measured losses, in nats.
        tokens_per_s: to be expected, by the table of step times; None: speed was not asked for.
        units: what was measured.
    """

    recipe: Recipe
    candidate: Mapping[str, str]
    bits: float
    loss: float
    tokens_per_s: float | None
    units: tuple[Unit, ...]


def decide(
    checkpoint: Checkpoint, recipe: Recipe, device: torch.device, progress: Progress = lambda stage, done, total: None
) -> Decision:
    """Measure every candidate of a recipe's `auto` and choose the best within its budget.

    Raises:
        RecipeError: a candidate is no recipe of one rule.
        CheckpointError: the model does not give numbers.
        UnsupportedError: no choice fits the budget, a candidate fits no linear of the model, or the step times are
            those of another.
    """
    auto = recipe.auto
    assert auto is not None
    if checkpoint.quant:
        raise UnsupportedError(f"{checkpoint.path} is already quantized; start from the original weights")
    checkpoint = prepared(checkpoint, recipe)
    times = StepTimes.read(Path(auto.times)) if auto.times else None
    if times is not None:
        times.check(checkpoint.spec, recipe.kv, auto.candidates)
    candidates = {name: _numerics(name, checkpoint.spec) for name in auto.candidates}
    calibration = replace(recipe.calibration, samples=auto.windows)
    windows, _ = windows_of(checkpoint, calibration)
    units = sensitivities(checkpoint, candidates, windows, device, auto.score, progress)
    for unit in units:
        for option in unit.options:
            if not math.isfinite(option.loss):
                raise CheckpointError(f"with {unit.names[0]} in {option.candidate} the model's logits are no numbers")
    weights = _weights(checkpoint.spec, units)
    if times is None:
        assert auto.bits is not None
        budget, least = int(auto.bits * weights), sum(min(o.bits for o in unit.options) for unit in units)
        if least > budget:
            smallest = f"{least / weights:.2f}"
            raise UnsupportedError(f"auto: even the smallest candidates take {smallest} bits a weight, not {auto.bits}")
    else:
        assert auto.tokens_per_s is not None
        units, fastest = _timed(units, times, len(checkpoint.spec.layers))
        budget = int((times.batch / auto.tokens_per_s - fastest) * 1e9)
        if budget < 0:
            most = f"{math.floor(times.batch / fastest * 10) / 10:.1f}"  # so much can be asked for
            raise UnsupportedError(
                f"auto: even the fastest candidates make {most} tokens/s of {times.batch} sequences, not "
                f"{auto.tokens_per_s:g}"
            )
    options = [u.options[i] for u, i in zip(units, cheapest([u.options for u in units], budget), strict=True)]
    candidate = {name: o.candidate for unit, o in zip(units, options, strict=True) for name in unit.names}
    bits, loss = sum(o.bits for o in options) / weights, sum(o.loss for o in options)
    rules = [_rule(match, name, candidates) for match, name in patterns(candidate)]
    speed = None if times is None else times.batch / (fastest + sum(o.cost for o in options) * 1e-9)
    wanted = f"{auto.bits} bits a weight" if speed is None else f"{auto.tokens_per_s:g} tokens/s"
    foreseen = f"{bits:.3f} bits, {loss:.5f} nats" + ("" if speed is None else f" and {speed:.1f} tokens/s")
    text = _text(recipe, auto, rules, wanted, foreseen)
    made = parse_recipe(f"{recipe.name} at {wanted.removesuffix(' a weight')}", text)
    # what the command line changed (K and V, the head, the data) stays changed
    made = replace(made, rules=(*recipe.rules, *made.rules), kv=recipe.kv, calibration=recipe.calibration)
    return Decision(made, candidate, bits, loss, speed, tuple(units))


def _timed(units: Sequence[Unit], times: StepTimes, layers: int) -> tuple[list[Unit], float]:
    """The units with the time of each option beyond the fastest, and a step's seconds with the fastest of all."""
    seconds, found = times.seconds(layers), []
    for unit in units:
        more = [times.of(role_of(unit.names[0]), o.candidate) for o in unit.options]
        options = (replace(o, time=round((m - min(more)) * 1e9)) for o, m in zip(unit.options, more, strict=True))
        found.append(replace(unit, options=tuple(options)))
        seconds += min(more)
    return found, seconds


def _numerics(name: str, spec: DecoderSpec) -> dict[str, QuantSpec]:
    """What a candidate means for each linear."""
    if name == UNCHANGED:
        return {}
    return {linear: quant for linear, quant in plain_recipe(name).resolve(spec).items() if linear != "lm_head"}


def plain_recipe(name: str) -> Recipe:
    """The recipe of a candidate.

    Raises:
        RecipeError: it says more than one rule.
    """
    chosen = read_recipe(name)
    if len(chosen.rules) != 1 or chosen.techniques:
        raise RecipeError(f"auto: candidate {name} is not one rule without techniques; name the plain recipe")
    return chosen


def _weights(spec: DecoderSpec, units: Sequence[Unit]) -> int:
    wanted = {name for unit in units for name in unit.names}
    return sum(x.in_features * x.out_features for x in spec.linears() if x.name in wanted)


def patterns(candidate: Mapping[str, str]) -> list[tuple[str, str]]:
    """The shortest plain rules that say the same, first match first: exceptions by name, then a role's usual choice."""
    roles: dict[str, dict[str, str]] = {}
    for linear, name in candidate.items():
        role = role_of(linear)
        roles.setdefault(role, {})[f"layers.{linear.split('.')[1]}.{role}"] = name
    exceptions, usual = [], []
    for role, chosen in roles.items():
        common = Counter(chosen.values()).most_common(1)[0][0]
        exceptions += [(linear, name) for linear, name in chosen.items() if name != common]
        usual.append((f"layers.*.{role}", common))
    return exceptions + usual


def _rule(match: str, name: str, candidates: Mapping[str, Mapping[str, QuantSpec]]) -> dict[str, Any]:
    if not (numerics := candidates[name]):
        return {"match": match, "weight": "none"}
    quant = next(iter(numerics.values()))
    rule = {"match": match, "weight": str(quant.weight)}
    return rule if quant.input is None else rule | {"input": str(quant.input), "input_scale": quant.input_scale}


def _text(recipe: Recipe, auto: Settings, rules: list[dict[str, Any]], wanted: str, foreseen: str) -> str:
    """The recipe file."""
    what = f"{', '.join(auto.candidates)} at {wanted}, by {auto.score}"
    lines = [f"# Made by auto: {what}: {foreseen} to be expected.", "rules:"]
    lines += [
        f"  - {yaml.safe_dump(rule, default_flow_style=True, sort_keys=False, width=1000).strip()}" for rule in rules
    ]
    raw = yaml.safe_load(recipe.text) or {}
    others = [t for t in raw.get("techniques") or [] if "auto" not in t]
    rest = {"techniques": others} if others else {}
    rest |= {key: raw[key] for key in ("kv", "calib") if key in raw}
    return "\n".join(lines) + "\n" + (yaml.safe_dump(rest, sort_keys=False) if rest else "")
