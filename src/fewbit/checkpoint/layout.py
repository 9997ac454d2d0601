"""How a quantized weight lies in a file: the types between `Checkpoint` and the formats.

Each numeric format a file format can say has one `Packing`: the tensors it makes of a weight, with dtypes and shapes
known before any weight is read (so a writer can plan a file and a reader can check one), and the way there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.numerics.format import ALL, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: dtype and shape."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Packing:
    """One way to lay a weight [out, in] into tensors named by suffixes (``weight``, ``weight_scale``, ...).

    Attributes:
        stored: format and shape of the weight to the tensors.
        pack: a QTensor to the tensors.
        unpack: the tensors, the format and the shape of the weight to the QTensor.
        wide: the one of these tensors, if any, that holds no part of the weight: the float32 scale [] under which
            kernels round it to FP8, the largest of the linears that read one input. Canonical name: ``P.wide_scale``.
    """

    stored: Callable[[Format, Shape], dict[str, Stored]]
    pack: Callable[[QTensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Format, Shape], QTensor]
    wide: str | None = None


@dataclass(frozen=True)
class InputScale:
    """How the calibrated scale of an input is stored.

    Attributes:
        suffix: its name beside the weight.
        shape: its shape.
        reciprocal: whether the file divides by it.
        any_float: whether it may be stored in any float dtype; else it is float32.
    """

    suffix: str
    shape: Shape
    reciprocal: bool = False
    any_float: bool = False

    def pack(self, scale: Tensor) -> Tensor:
        """Ours ([]) to the file's, float32."""
        scale = scale.double().reciprocal() if self.reciprocal else scale
        return scale.float().reshape(self.shape)

    def unpack(self, stored: Tensor) -> Tensor:
        """The file's to ours."""
        scale = stored.float().reshape(())
        return inverse(scale) if self.reciprocal else scale


def inverse(stored: Tensor) -> Tensor:
    """One over a float32 scale that a file stores as a divisor, so that the way back gives the same bits.

    Float32 where that can say it, else float64: not every float32 is the reciprocal of one.
    """
    near = stored.reciprocal()
    return near if torch.equal(near.double().reciprocal().float(), stored) else stored.double().reciprocal()


@dataclass(frozen=True)
class Quantization:
    """What a file format's config says about a model, in our words.

    Attributes:
        quant: QuantSpec by canonical linear; a linear not named is dense.
        kv: KVSpec by layer.
        packings: how the weight of a linear lies, where the numerics alone do not tell; else the format's `packing`.
        kv_cast: whether no scales of K and V are stored, and all are one.
        remarks: what a user should know of how the files are read, in words.
    """

    quant: Mapping[str, QuantSpec]
    kv: Mapping[int, KVSpec]
    packings: Mapping[str, Packing] = field(default_factory=dict)
    kv_cast: bool = False
    remarks: tuple[str, ...] = ()


def scale_grid(fmt: Format, shape: Shape) -> Shape:
    """Rows and columns of blocks of a weight of `shape`."""
    rows, cols = (1 if block == ALL else -(-size // block) for block, size in zip(fmt.block, shape, strict=True))
    return rows, cols
