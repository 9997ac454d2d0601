"""Hidden states of many windows, carried from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from fewbit.compress.calibrators import Histogram
from fewbit.compress.ranks import Ranks
from fewbit.compress.stats import RecordingAttend
from fewbit.model import DecoderLayer, DenseAttend, KVCodec
from fewbit.model.decoder import Embedding
from fewbit.model.rope import Rotary
from fewbit.ops.device import to_host

SPILL_BYTES = 1 << 30
"""States of so much and more stay in the host's memory and visit the GPU piece by piece."""
_TOKENS = {"cpu": 256, "cuda": 8192}  # run through a layer at a time: what its MLP makes of them is held besides


class Stream:
    """The states of windows of token ids, [T, hidden] for runs of windows of equal length.

    Args:
        windows: token ids.
        embed: the embedding.
        dtype: dtype of the states.
        ranks: processes that have other windows.
    """

    def __init__(
        self, windows: Sequence[Sequence[int]], embed: Embedding, dtype: torch.dtype, ranks: Ranks | None = None
    ) -> None:
        self.device, self.ranks = embed.weight.device, ranks or Ranks()
        self._pieces: list[tuple[int, Tensor]] = []  # (length of a window, states of some windows of that length)
        count = sum(map(len, windows))
        self._spills = embed.weight.is_cuda and count * embed.weight.shape[1] * dtype.itemsize >= SPILL_BYTES
        for length, same in groupby(windows, len):
            run, step = list(same), max(1, _TOKENS[self.device.type] // length)
            for i in range(0, len(run), step):
                ids = torch.tensor([t for window in run[i : i + step] for t in window], device=self.device)
                positions = torch.arange(length, device=self.device).repeat(len(ids) // length)
                self._pieces.append((length, self._kept(embed(ids, positions, dtype))))

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def copy(self) -> Stream:
        """Another stream that goes its own way from here."""
        other = copy.copy(self)
        other._pieces = list(self._pieces)
        return other

    def pieces(self) -> Iterator[Tensor]:
        """The states, some windows at a time."""
        return (states.to(self.device) for _, states in self._pieces)

    def states(self) -> Tensor:
        """All states, [T, hidden]."""
        return torch.cat(list(self.pieces()))

    def through(self, layer: DecoderLayer, codecs: Sequence[KVCodec]) -> None:
        """Replace the states by what the layer makes of them."""
        for i, (length, held) in enumerate(self._pieces):
            states, attend = held.to(self.device, non_blocking=True), DenseAttend(codecs, length)
            self._pieces[i] = length, self._kept(layer(states, _rotary(states, length), attend))

    def watch(
        self, layer: DecoderLayer, codecs: Sequence[KVCodec], histograms: Mapping[str, Histogram] | None = None
    ) -> RecordingAttend:
        """Run the layer for what its recorders (and histograms of K and V) see, and keep the states."""
        attend = RecordingAttend(codecs, 1)
        attend.histograms = dict(histograms or {})
        for length, held in self._pieces:
            states, attend.length = held.to(self.device, non_blocking=True), length
            layer(states, _rotary(states, length), attend)
        return attend

    def _kept(self, states: Tensor) -> Tensor:
        return to_host(states) if self._spills else states

    def error(self, exact: Stream) -> float:
        """Relative distance to another stream of the same windows."""
        mine, theirs = self.states(), exact.states()
        return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _rotary(states: Tensor, length: int) -> Rotary:
    positions = torch.arange(length, device=states.device).repeat(len(states) // length)
    return Rotary(positions, states.dtype)
