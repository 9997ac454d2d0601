"""What the layers of a module are given while the user's data run through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.compress.calibrators import Histogram
from fewbit.compress.fake import FakeQuant, rows_of
from fewbit.compress.recipe import Calibration
from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs
from fewbit.errors import CheckpointError, RecipeError
from fewbit.numerics.reference import input_scale

ForwardLoop = Callable[[nn.Module], Any]
"""Runs the user's data through the module it is given; what it returns is not looked at."""


class Inputs:
    """Statistics of the inputs of some layers.

    Args:
        module: the module.
        names: of the layers.
        needs: what is wanted, see `fewbit.compress.techniques.Needs`.

    Attributes:
        stats: by layer, of those that were run.
    """

    def __init__(self, module: nn.Module, names: list[str], needs: Collection[Needs]) -> None:
        self.module, self.names, self.needs = module, names, needs
        self.stats: dict[str, Stats] = {}
        self._calls: dict[str, list[int]] = {}  # by layer, which inputs it was given, as numbers
        self._last: Tensor | None = None  # held, so that no other tensor can be taken for it
        self._number = 0

    def run(self, loop: ForwardLoop) -> None:
        """Run the loop and remember.

        Raises:
            CheckpointError: an input holds NaN or infinity.
        """
        watch(self.module, self.names, loop, self._see)
        self._last = None
        for name, stats in self.stats.items():
            if not torch.isfinite(stats.amax).all():
                raise CheckpointError(f"the input of {name} holds NaN or infinity on the data of forward_loop")

    def together(self) -> list[list[str]]:
        """Layers that were given the very same tensors, call by call."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, calls in self._calls.items():
            groups.setdefault(tuple(calls), []).append(name)
        return list(groups.values())

    def _see(self, name: str, layer: nn.Module, x: Tensor) -> None:
        if x is not self._last:
            self._last, self._number = x, self._number + 1
        rows = rows_of(layer, x.detach())
        if not rows.numel():
            return
        self._calls.setdefault(name, []).append(self._number)
        if name not in self.stats:
            self.stats[name] = Stats.empty(rows.shape[-1], rows.device, self.needs)
        self.stats[name].see(rows)


def set_reach(module: nn.Module, names: list[str], loop: ForwardLoop, calibration: Calibration) -> None:
    """Choose the scales of static inputs anew, as the calibration's method says, by one more pass over the data.

    Args:
        module: a module with fake quantizers, whose static scales reach to the largest magnitude.
        names: of the layers.
        loop: runs the data.
        calibration: for its method.
    """
    counts: dict[str, Histogram] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        assert isinstance(layer, FakeQuant)
        rows = rows_of(layer, x.detach())
        counts.setdefault(name, Histogram(1, rows.device)).see(
            rows if layer.prescale is None else rows * layer.prescale
        )

    watch(module, names, loop, see)
    if missing := sorted(set(names) - counts.keys()):
        raise RecipeError(
            f"forward_loop runs twice for method {calibration.method}, and the second time it never ran {missing[0]}; "
            "give it data that can be read again"
        )
    for name, seen in counts.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, FakeQuant)
        assert layer.quant.input is not None
        (reach,) = seen.reach(layer.quant.input, calibration.method, calibration.percentile)
        layer.input_scale = input_scale(reach, layer.quant.input)


@torch.no_grad()
def watch(
    module: nn.Module, names: Iterable[str], loop: ForwardLoop, see: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Run `loop` on the module in eval mode; `see` gets name, layer and input of every call of the layers named."""

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, layer, args[0] if args else kwargs["input"])

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name in names
    ]
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        loop(module)
    finally:
        for handle in hooks:
            handle.remove()
        for m, mode in modes.items():
            m.training = mode
