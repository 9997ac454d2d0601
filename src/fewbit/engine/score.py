"""Log probabilities of tokens that are known already, those of prompts: the same numbers as `sampler` reports.

A prompt has thousands of positions and a vocabulary a hundred thousand tokens, so the output head takes the positions
in slices; what a slice leaves behind is a few numbers a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from fewbit.engine.batch import Drawn, Echo, Piece
from fewbit.engine.sampler import NOT_FINITE, report
from fewbit.engine.types import TokenLogprobs
from fewbit.ops.device import to_device, to_host

SLICE_BYTES = 16 << 20
"""Of a slice's logits; working on them takes some nine times as much."""


@dataclass(frozen=True)
class Scores:
    """What `score` found, still on the device; `read` waits for it."""

    wanted: Sequence[tuple[str, Echo]]  # by request
    best: Tensor  # float32 [rows], the largest logit: not finite if something is wrong
    logprobs: Tensor  # float64 [rows, 1 + most alternatives], the known token's first
    alternatives: Tensor  # int64, the ids of the others

    def to_host(self) -> Scores:
        """The same on its way to pinned memory; who waits for the stream may `read` it without waiting again."""
        return Scores(self.wanted, *(to_host(x) for x in (self.best, self.logprobs, self.alternatives)))

    def read(self, drawn: dict[str, Drawn]) -> dict[str, Drawn]:
        """Add to what was drawn in the same step."""
        for (name, echo), (best, *rows) in zip(self.wanted, self._cut(), strict=True):
            if not all(abs(value) < float("inf") for value in best.tolist()):
                drawn[name] = Drawn(fault=NOT_FINITE)
                continue
            pairs = zip(*(x.tolist() for x in rows), strict=True)
            found = tuple(
                TokenLogprobs(values[0], tuple(zip(ids[: echo.top], values[1 : 1 + echo.top], strict=True)))
                for values, ids in pairs
            )
            drawn[name] = msgspec.structs.replace(drawn.get(name, Drawn()), prompt_logprobs=found)
        return drawn

    def _cut(self) -> Iterator[tuple[Tensor, ...]]:
        """The rows of each request."""
        counts = [len(echo.tokens) for _, echo in self.wanted]
        return zip(*(x.split(counts) for x in (self.best, self.logprobs, self.alternatives)), strict=True)


def score(pieces: Sequence[Piece], hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Scores | None:
    """Look up the prompt tokens that are wanted of a step.

    Args:
        pieces: the step.
        hidden: the states of all its tokens, [T, hidden].
        head: states [n, hidden] to float32 logits [n, vocab].
        vocab: the size of the vocabulary.

    Returns:
        None if none are wanted.
    """
    wanted: list[tuple[str, Echo]] = []
    rows: list[int] = []
    before = 0  # tokens of the pieces before
    for piece in pieces:
        if (echo := piece.echo) is not None:
            wanted.append((piece.id, echo))
            first = before + echo.first - piece.first
            rows += range(first, first + len(echo.tokens))
        before += len(piece.tokens)
    if not rows:
        return None
    tokens = to_device([t for _, echo in wanted for t in echo.tokens], torch.int64, hidden.device)
    index = to_device(rows, torch.int64, hidden.device)
    most = max(echo.top for _, echo in wanted)
    size = max(SLICE_BYTES // (vocab * 4), 1)
    slices = []
    for some, known in zip(index.split(size), tokens.split(size), strict=True):
        logits = head(hidden[some])
        slices.append((logits.amax(-1), *report(logits, known, most)))
    return Scores(wanted, *(torch.cat(parts) for parts in zip(*slices, strict=True)))
