"""Techniques: what is done to a block's weights before and while they become codes. One file each, found by its name.

A technique's file holds a frozen dataclass ``Settings``: its fields are what a recipe may set, its docstring names the
paper, its class attribute ``needs`` says what it wants to know about the inputs of a linear, and it has exactly one of
``layer``, ``block`` and ``model`` (see `LayerTechnique`, `BlockTechnique`, `ModelTechnique`). Two are of kinds of their
own: ``auto`` makes the rules, ``svdquant`` splits a weight in two. ``correct`` (see `Correction`) comes after rounding.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.compress.stats import Block, Stats
from fewbit.errors import RecipeError, nearest_name
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec

Needs = Literal["none", "inputs", "hessian", "sample"]
"""``inputs``: the largest magnitude and the mean of each channel; ``hessian``: the sum of x xᵀ over tokens as well;
``sample``: some of the inputs themselves."""


class Technique(Protocol):
    """Any technique."""

    @property
    def needs(self) -> Needs:
        """What calibration has to remember for it."""
        ...


class LayerTechnique(Technique, Protocol):
    """Turns one weight into codes."""

    def layer(self, weight: Tensor, quant: QuantSpec, stats: Stats | None, outer: Tensor | None) -> QTensor:
        """A weight to its quantized form.

        Args:
            weight: float32 [out, in].
            quant: the numerics wanted.
            stats: what is known of the input; None where nothing was needed.
            outer: the outer scale to use, shared with the linears that read the same input; None: the format has none.
        """
        ...


class ModelTechnique(Technique, Protocol):
    """Changes a whole model before anything else."""

    def model(self, checkpoint: Checkpoint) -> Checkpoint:
        """Another view of the model: tensors are changed when they are read, nothing is read now."""
        ...


class Correction(Technique, Protocol):
    """Makes up in a bias for what rounding did to the weight."""

    def correct(self, bias: Tensor, off: Tensor, stats: Stats) -> Tensor:
        """The new bias float32 [out]; off [out, in]: what was served minus what was meant."""
        ...


class BlockTechnique(Technique, Protocol):
    """Changes a block's float weights before they are rounded: folds scales, rotates, clips."""

    def block(self, block: Block) -> None:
        """Change weights and norms of `block`, and the statistics that this makes untrue, in place."""
        ...


def technique_named(name: str, settings: Mapping[str, Any]) -> Technique:
    """A technique with its settings.

    Raises:
        RecipeError: no such technique or setting; names the nearest one.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise RecipeError(f"unknown technique '{name}'; {nearest_name(name, known)}")
    kind = importlib.import_module(f"{__name__}.{name}").Settings
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{name}: expected settings as keys, got {settings!r}")
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in fields:
            hint = nearest_name(str(key), fields) if fields else "it has none"
            raise RecipeError(f"{name}: unknown setting {key!r}; {hint}")
    return cast("Technique", kind(**settings))
