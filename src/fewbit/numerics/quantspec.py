"""What is quantized where: the numerics of one linear layer, and of one layer's K and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewbit.numerics.format import Format

InputScale = Literal["dynamic", "static", "outer"]


@dataclass(frozen=True)
class QuantSpec:
    """What one linear layer does (``lm_head`` and ``embed`` too). Absent fields mean "as it was".

    Attributes:
        weight: format of the weight.
        input: format its input is rounded to before the product. A block of (1, ALL) is one scale a token.
        input_scale: ``dynamic``: every scale is made from the call's own input; ``static``: one calibrated scale;
            ``outer``: block scales per call under one calibrated scale for the tensor (NVFP4).
        prescale: the input is multiplied by a stored vector [in] before it is rounded.
        lowrank: the rank r of a branch beside the quantized product, in the model's dtype: ``y += B (A x)``, x as it
            comes, A [r, in], B [out, r]; 0: none.
    """

    weight: Format | None = None
    input: Format | None = None
    input_scale: InputScale = "dynamic"
    prescale: bool = False
    lowrank: int = 0

    @property
    def calibrated(self) -> bool:
        """Whether the input needs a scale that only data can give."""
        return self.input is not None and self.input_scale != "dynamic"

    def lowrank_shapes(self, out: int, in_: int) -> dict[str, tuple[int, int]]:
        """The tensors of the low-rank branch by their last names; empty where there is none."""
        return {"lowrank_a": (self.lowrank, in_), "lowrank_b": (out, self.lowrank)} if self.lowrank else {}

    def __str__(self) -> str:
        if self.weight is None:
            return "as it was"
        inputs = "" if self.input is None else f", {self.input} inputs ({self.input_scale})"
        return f"{self.weight} weights{inputs}" + (f", rank {self.lowrank} beside" if self.lowrank else "")


@dataclass(frozen=True)
class KVSpec:
    """How K and V of one layer are stored: formats over (kv_heads, head_dim) of a token.

    A block of (ALL, ALL) is one scale for the tensor, (1, ALL) one a head. Scales are calibrated constants.
    """

    k: Format
    v: Format

    def __str__(self) -> str:
        return str(self.k) if self.k == self.v else f"k {self.k}, v {self.v}"
