"""What calibration remembers about the inputs of a linear, and about K and V."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.compress.calibrators import Histogram
from fewbit.model import DenseAttend, KVCodec
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import MLP, Attention, Layer

SAMPLE = 512
"""Most inputs that are kept of a linear."""
_FROM_EACH = 32  # of those seen at once
_ROWS = 4096  # of second moments that are added to at a time


@dataclass
class Stats:
    """Statistics of one linear's input.

    Attributes:
        tokens: how many were seen.
        amax: float32 [in], the largest magnitude of each channel.
        total: float32 [in], the sum of each channel.
        hessian: float32 [in, in], the sum of x xᵀ over tokens, where a technique needs it.
        sample: [tokens, in], up to `SAMPLE` of the inputs themselves, where a technique needs some.
    """

    tokens: int
    amax: Tensor
    total: Tensor
    hessian: Tensor | None = None
    sample: Tensor | None = None

    @classmethod
    def empty(cls, width: int, device: torch.device, needs: Collection[str] = ()) -> Stats:
        """Nothing seen yet; `needs`: see `fewbit.compress.techniques.Needs`."""
        square = torch.zeros(width, width, device=device) if "hessian" in needs else None
        sample = torch.zeros(0, width, device=device) if "sample" in needs else None
        return cls(0, torch.zeros(width, device=device), torch.zeros(width, device=device), square, sample)

    def see(self, x: Tensor) -> None:
        """Count the tokens of x [..., in]."""
        x = x.reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        amax = torch.maximum(x.amax(0), -x.amin(0))  # no copy of x, as abs would be
        self.amax = torch.maximum(self.amax, amax.float())
        self.total += x.sum(0, dtype=torch.float32)
        if self.hessian is not None:
            _add_products(self.hessian, x)
        if self.sample is not None and len(self.sample) < SAMPLE:
            some = x[:: max(1, len(x) // _FROM_EACH)][: min(_FROM_EACH, SAMPLE - len(self.sample))].float()
            self.sample = torch.cat([self.sample, some])

    @classmethod
    def sum(cls, parts: Sequence[Stats]) -> Stats:
        """Of all tokens that several counted."""
        hessians = [s.hessian for s in parts if s.hessian is not None]
        samples = [s.sample for s in parts if s.sample is not None]
        return cls(
            sum(s.tokens for s in parts),
            torch.stack([s.amax for s in parts]).amax(0),
            torch.stack([s.total for s in parts]).sum(0),
            functools.reduce(torch.add, hessians) if hessians else None,
            torch.cat([s[: -(-SAMPLE // len(samples))] for s in samples])[:SAMPLE] if samples else None,
        )

    def copy(self) -> Stats:
        """One that can be changed."""
        parts = (None if t is None else t.clone() for t in (self.amax, self.total, self.hessian, self.sample))
        return Stats(self.tokens, *parts)  # type: ignore[arg-type]

    def blank(self, reach: float) -> Stats:
        """As if nothing were known but how far the inputs reach: every channel counts the same."""
        amax = torch.full_like(self.amax, reach)
        hessian = None if self.hessian is None else torch.eye(len(amax), device=amax.device)
        return Stats(1, amax, torch.zeros_like(self.total), hessian, None if self.sample is None else self.sample[:0])

    def scaled(self, scale: Tensor) -> None:
        """Follow an input whose channels are divided by `scale` [in]."""
        self.amax /= scale
        self.total /= scale
        if self.hessian is not None:
            self.hessian /= scale[:, None]
            self.hessian /= scale
        if self.sample is not None:
            self.sample = self.sample / scale

    def importance(self) -> Tensor:
        """How much an error in each column of the weight counts, [in]: the mean square of its input, 1 on average.

        A little is left for columns that saw nothing. Needs `hessian`.
        """
        assert self.hessian is not None
        square = self.hessian.diagonal().clamp_min(0)
        mean = square.mean()
        return square / mean + 0.01 if mean > 0 else torch.ones_like(square)


def _add_products(total: Tensor, x: Tensor) -> None:
    """``total += x.T @ x`` in float32, x [tokens, in]."""
    if not x.is_cuda or x.dtype == torch.float32:
        total.addmm_(x.T.float(), x.float())
        return
    for start in range(0, len(total), _ROWS):  # products of 16-bit numbers are exact; not all at once, for memory
        rows = slice(start, start + _ROWS)
        total[rows] += torch.mm(x[:, rows].T, x, out_dtype=torch.float32)


@dataclass
class Block:
    """One decoder layer in float, as block techniques see and change it.

    Attributes:
        index: its place in the model.
        layer: its shape.
        quant: QuantSpec by canonical linear, of those that will be quantized.
        weights: float weights [out, in] by canonical linear.
        norms: what it has beside linears, by `fewbit.spec.decoder.key_of`: norms, the ``router`` of a mixture.
        dtype: what norms, biases and unquantized weights are stored in.
        biases: biases [out] by canonical linear, of those that have one.
        stats: statistics by canonical linear; empty where no technique needs any. Linears that read one input share
            one object.
        k_amax, v_amax: float32 [kv_heads * head_dim], the largest magnitudes of K and V; None: not calibrated.
        tokens: how many each expert saw, by its canonical name.
        scarce: linears of experts that saw too few, whose statistics are not their own.
        reach: how far scales reach, by canonical linear and by ``k`` and ``v`` (a number a head); what is not in it
            reaches to the largest magnitude.
    """

    index: int
    layer: Layer
    quant: Mapping[str, QuantSpec]
    weights: dict[str, Tensor]
    norms: dict[str, Tensor]
    dtype: torch.dtype = torch.float32
    biases: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)
    k_amax: Tensor | None = None
    v_amax: Tensor | None = None
    reach: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    scarce: set[str] = field(default_factory=set)

    @property
    def mlps(self) -> dict[str, MLP]:
        """The layer's MLPs by canonical name: one, or one for each expert and the shared one."""
        return self.layer.mlps(self.index)


class Recorder:
    """Stands in for a linear: notes its input, then does what the linear does."""

    def __init__(self, linear: Callable[[Tensor], Tensor], stats: Stats | Histogram) -> None:
        self.linear, self.stats = linear, stats

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        self.stats.see(x)
        return self.linear(x)


class RecordingAttend(DenseAttend):
    """Attention that looks at K and V before they are stored.

    Attributes:
        k_amax, v_amax: the largest magnitude of each channel, by layer.
        histograms: of K and V, by ``k`` and ``v``, where they are wanted.
    """

    def __init__(self, codecs: Sequence[KVCodec], length: int) -> None:
        super().__init__(codecs, length)
        self.k_amax: dict[int, Tensor] = {}
        self.v_amax: dict[int, Tensor] = {}
        self.histograms: dict[str, Histogram] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, sinks: Tensor | None = None
    ) -> Tensor:
        """See `Attend`."""
        for seen, x in ((self.k_amax, k), (self.v_amax, v)):
            amax = x.abs().amax(0).flatten().float()
            seen[layer] = torch.maximum(seen[layer], amax) if layer in seen else amax
        for name, histogram in self.histograms.items():
            histogram.see(k if name == "k" else v)
        return super().__call__(layer, q, k, v, a, sinks)
