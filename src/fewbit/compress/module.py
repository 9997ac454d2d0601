"""The door for any module: fake quantizers on the `Linear` and `Conv2d` layers of whatever a user trained.

The same recipes and techniques as for checkpoints; what differs is how layers are found (by the module's own names),
how their inputs are seen (`inputs.py`), and what absorbs a scale: where the module is a decoder that `known.py` can
read, the norms and linears before, else a prescale. The quantizers themselves are in `fake.py`, keeping them in a
folder is `state.py`'s business.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fewbit.compress.fake import FakeQuant, install, layers, matrix, pattern_of
from fewbit.compress.fold import Loose, shared_outers
from fewbit.compress.inputs import ForwardLoop, Inputs, set_reach
from fewbit.compress.known import known
from fewbit.compress.recipe import Recipe, built_in, read_recipe
from fewbit.compress.stats import Block
from fewbit.compress.techniques import BlockTechnique, LayerTechnique, round_to_nearest
from fewbit.errors import CheckpointError, FewbitError, RecipeError, UnsupportedError, nearest_name
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import check_fits, input_scale, round_to

log = logging.getLogger(__name__)

HEADS = ("lm_head", "head", "classifier", "score", "embed_out", "output_layer")
"""Last names of layers that make a model's output: built-in recipes leave them as they are."""


@torch.no_grad()
def quantize(module: nn.Module, recipe: str | Path | Recipe, forward_loop: ForwardLoop | None = None) -> nn.Module:
    """Give `Linear` and `Conv2d` layers of any module fake quantizers, in place.

    Rules match the module's own dotted names. The rule ``layers.*`` of a built-in recipe means every Linear and Conv2d
    whose last name is not in `HEADS`. Names and shapes of parameters stay; weights stay too, but for techniques that
    change them (gptq, awq, smoothquant). Subclasses of the two are left alone.

    Args:
        module: any module, its weights in memory.
        recipe: name of a built-in recipe, path of a file, or a `Recipe`.
        forward_loop: runs calibration data through the module, which is in eval mode and without gradients meanwhile.

    Returns:
        `module`, whose layers are now `FakeQuant`; parameters that need a gradient get one.

    Raises:
        RecipeError: a rule matches nothing, K and V are asked for, data are needed and there is no `forward_loop`, or
            it never runs a layer whose input needs a scale.
        UnsupportedError: a layer does not divide into the blocks of its format, or is quantized already.
        CheckpointError: a weight or an input holds NaN or infinity.
    """
    plan = recipe if isinstance(recipe, Recipe) else read_recipe(str(recipe))
    if whole := [t for t in plan.techniques if not hasattr(t, "layer") and not hasattr(t, "block")]:
        name = type(whole[0]).__module__.rpartition(".")[2]
        raise UnsupportedError(
            f"recipe {plan.name}: {name} works on a model's folder, not on a module; use fewbit compress"
        )
    quant = _resolve(module, plan)
    layered = [cast("LayerTechnique", t) for t in plan.techniques if hasattr(t, "layer")]
    if len(layered) > 1:
        raise RecipeError("a recipe can hold one technique that rounds weights, not several")
    rounding = layered[0] if layered else round_to_nearest.Settings()
    needs = {t.needs for t in plan.techniques} - {"none"}
    if forward_loop is None and (needs or any(q.calibrated for q in quant.values())):
        raise RecipeError(
            f"recipe {plan.name} needs data; pass forward_loop, a function that runs some through the module"
        )
    seen = Inputs(module, list(quant), needs)
    if forward_loop is not None:
        seen.run(forward_loop)
    missing = sorted(quant.keys() - seen.stats.keys())
    if lost := [name for name in missing if quant[name].calibrated]:
        raise RecipeError(
            f"{lost[0] or 'the module'}: forward_loop never ran it, so its input has no scale; run it, or give it a "
            "rule whose input is dynamic or none"
        )
    if needs and missing:
        log.warning("forward_loop never ran %s: rounded to nearest", ", ".join(missing))
    change = _Change(module, plan, quant, seen, rounding)
    change.before_rounding()
    change.round()
    static = [name for name, q in quant.items() if q.input_scale == "static"]
    if plan.calibration.method != "max" and static:
        assert forward_loop is not None
        set_reach(module, static, forward_loop, plan.calibration)
    return module


class _Change:
    """One module being quantized."""

    def __init__(
        self, module: nn.Module, plan: Recipe, quant: dict[str, QuantSpec], seen: Inputs, rounding: LayerTechnique
    ) -> None:
        self.module, self.plan, self.quant, self.rounding = module, plan, quant, rounding
        self.stats, self.together = seen.stats, seen.together()
        self.blocks = [cast("BlockTechnique", t) for t in plan.techniques if hasattr(t, "block")]
        self.prescales: dict[str, Tensor] = {}
        self.known = known(module)
        if self.known is not None:
            self.together = self.known.together()

    def before_rounding(self) -> None:
        """What techniques do to the float weights."""
        for block in self._blocks():
            for technique in self.blocks:
                technique.block(block)
            if isinstance(block, Loose):
                self.prescales |= block.prescales
                for name, weight in block.weights.items():
                    self._store(name, weight)
            else:
                assert self.known is not None
                self.known.store(block)

    def round(self) -> None:
        """Choose the weights' scales, and put the quantizers in."""
        outers = self._outers()
        for name, quant in self.quant.items():
            self._install(name, quant, outers.get(name))

    def _blocks(self) -> Iterator[Block]:
        """What block techniques work on, one at a time; without techniques or statistics nothing."""
        if not self.blocks:
            return
        if self.known is not None:
            yield from self.known.blocks(self.quant, self.stats)
            return
        for name, quant in self.quant.items():
            if (stats := self.stats.get(name)) is not None:
                weight = matrix(self._layer(name))
                yield Loose.linear(name, weight.float().clone(), quant, stats, weight.dtype)

    def _outers(self) -> dict[str, Tensor]:
        """The outer scale of every weight whose format has one; those of linears that read one input are equal."""
        outers: dict[str, Tensor] = {}
        wanted = {name for name, quant in self.quant.items() if quant.weight is not None and quant.weight.outer}
        for names in [*self.together, *([name] for name in wanted)]:
            weights = {n: matrix(self._layer(n)).float() for n in names if n in wanted and n not in outers}
            outers |= shared_outers(weights, self.quant)
        return outers

    def _install(self, name: str, quant: QuantSpec, outer: Tensor | None) -> None:
        layer, stats = self._layer(name), self.stats.get(name)
        weight = matrix(layer).float()
        rounding = self.rounding if stats is not None or self.rounding.needs == "none" else round_to_nearest.Settings()
        with _named(name):
            q = rounding.layer(weight, quant, stats, outer)
        if not torch.equal(round_to(weight, q).codes, q.codes):  # the technique did more than to round
            self._store(name, q.dequantize())
            if not torch.equal(round_to(matrix(layer).float(), q).codes, q.codes):
                raise UnsupportedError(
                    f"{name}: {matrix(layer).dtype} cannot hold what was made of its weight; convert the module to "
                    "float32 first"
                )
        buffers: dict[str, Tensor | None] = {
            "weight_scale": q.scale,
            "weight_outer": q.outer,
            "weight_zero": q.zero,
            "prescale": self.prescales.get(name),
        }
        if quant.calibrated:
            assert quant.input is not None
            assert stats is not None
            buffers["input_scale"] = input_scale(stats.amax.max(), quant.input)
        install(layer, quant, (self.plan.name, self.plan.text), buffers)

    def _store(self, name: str, weight: Tensor) -> None:
        """Put a new weight [out, in] into a layer."""
        target = self._layer(name).weight
        assert isinstance(target, Tensor)
        if torch.equal(weight, target.flatten(1).float()):
            return
        owner = [n for n, p in self.module.named_parameters(remove_duplicate=False) if p is target]
        if len(owner) > 1:
            raise UnsupportedError(
                f"{name}: its weight is that of {' and '.join(owner)}, and the recipe's techniques would change all; "
                f"leave it out with a rule {{match: {name}, weight: none}}"
            )
        target.copy_(weight.view_as(target))

    def _layer(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)


def _resolve(module: nn.Module, recipe: Recipe) -> dict[str, QuantSpec]:
    """QuantSpec by layer, of those that will be quantized, once it is known that all of them can be."""
    if recipe.kv is not None:
        raise RecipeError(
            f"recipe {recipe.name} stores K and V in {recipe.kv}, and a module does not say which they are"
        )
    found, used = layers(module), set()
    names = [name for name, layer in found.items() if not isinstance(layer, FakeQuant)]
    if not found:
        raise UnsupportedError(
            f"{type(module).__name__} holds no Linear and no Conv2d, so there is nothing to quantize"
        )
    if len(names) < len(found):
        done = next(name for name in found if name not in names)
        raise UnsupportedError(f"{done or 'the module'} is quantized already; begin with the module as it was")
    everything = recipe.name in built_in() and recipe.text == read_recipe(recipe.name).text
    decided: dict[str, QuantSpec] = {}
    for name in names:
        for number, rule in enumerate(recipe.rules):
            if everything and rule.match == "layers.*":
                matches = name.rpartition(".")[2] not in HEADS
            else:
                matches = fnmatch.fnmatchcase(name, rule.match)
            if matches:
                used.add(number)
                if rule.quant.weight is not None:
                    _check(name, found[name], rule.quant)
                    decided[name] = rule.quant
                break
    for number, rule in enumerate(recipe.rules):
        if number not in used:
            _refuse_idle(rule.match, number, names)
    if not decided:
        raise RecipeError(f"recipe {recipe.name} quantizes no layer of {type(module).__name__}")
    return decided


def _refuse_idle(pattern: str, number: int, names: list[str]) -> None:
    if any(fnmatch.fnmatchcase(name, pattern) for name in names):
        raise RecipeError(f"rules[{number}] '{pattern}' decides nothing: earlier rules match all of its layers")
    hint = nearest_name(pattern, {pattern_of(name) for name in names})
    raise RecipeError(f"rules[{number}] '{pattern}' matches no Linear or Conv2d of the module; {hint}")


def _check(name: str, layer: nn.Module, quant: QuantSpec) -> None:
    """Raise unless a layer can be quantized so."""
    weight = matrix(layer)
    with _named(name):
        if weight.is_meta:
            raise UnsupportedError("is on the meta device; load the module's weights first")
        for fmt in (quant.weight, quant.input):
            if fmt is not None:
                check_fits(fmt, weight.shape)
        if not torch.isfinite(weight).all():
            raise CheckpointError("its weight holds NaN or infinity; repair the weights first")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of what is done inside begin with the layer's name."""
    try:
        yield
    except FewbitError as error:
        raise type(error)(f"{name or 'the module'}: {error}") from None
