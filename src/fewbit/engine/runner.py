"""Device memory, and how a batch of integers becomes tensors and tokens.

`launch` starts a step and returns at once; `collect` waits for its tokens. On a GPU the host is free in between.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.engine.attend import KVCache, PagedAttend
from fewbit.engine.batch import Batch, Drawn
from fewbit.engine.config import EngineConfig
from fewbit.engine.sampler import Choice, choose
from fewbit.engine.score import Scores, score
from fewbit.model.attend import Attend, KVCodec
from fewbit.ops.device import to_device
from fewbit.spec.decoder import DecoderSpec


class DecoderLike(Protocol):
    """What the engine asks of a model; `fewbit.model.decoder.Decoder` is one."""

    spec: DecoderSpec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def codecs(self) -> tuple[KVCodec, ...]:
        """How each layer's K and V are stored."""
        ...

    @property
    def exact(self) -> bool:
        """Whether its numbers must not depend on a compiler's being there."""
        ...

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Int64 [T], int64 [T] to [T, hidden], after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] to float32 [n, vocab]."""
        ...


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    ids: list[str]  # of the pieces with a draw
    choice: Choice | None  # None: only prefill chunks, nothing was chosen
    scores: Scores | None  # of tokens of prompts, where somebody asked


class Runner:
    """Runs batches on one device.

    Attributes:
        computed_tokens: how many tokens went through the model since the start.
    """

    overlaps = False  # whether a step may be launched before the one before it has been collected

    def __init__(self, decoder: DecoderLike, config: EngineConfig) -> None:
        self.decoder, self.block_size, self.device = decoder, config.block_size, decoder.device
        self.cache = KVCache(
            decoder.spec, decoder.codecs, config.num_blocks, config.block_size, decoder.device, decoder.exact
        )
        self.computed_tokens = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that are really allocated."""
        return self.cache.bytes

    def recover(self) -> None:
        """Make sure the device can go on after a step that failed; a device that cannot raises here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a step."""
        pieces, size = batch.pieces, self.block_size
        tokens = [token for p in pieces for token in p.tokens]
        positions = [position for p in pieces for position in range(p.first, p.end)]
        slots = [p.blocks[i // size] * size + i % size for p in pieces for i in range(p.first, p.end)]
        tables = [block for p in pieces for block in p.blocks]
        last, row = [], -1  # rows whose logits are wanted
        for piece in pieces:
            row += len(piece.tokens)
            if piece.draw is not None:
                last.append(row)
        lists = tokens, positions, slots, tables, last  # one transfer instead of five
        all_of = to_device([number for numbers in lists for number in numbers], torch.int64, self.device)
        ids, at, where, blocks, wanted = all_of.split([len(numbers) for numbers in lists])
        hidden = self.decoder.hidden(ids, at, PagedAttend(self.cache, batch, where, blocks))
        self.computed_tokens += len(tokens)
        draws = [p.draw for p in pieces if p.draw is not None]
        choice = choose(self.decoder.logits(hidden[wanted]), draws) if draws else None
        scores = score(pieces, hidden, self.decoder.logits, self.decoder.spec.vocab)
        return Launched([p.id for p in pieces if p.draw is not None], choice, scores)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> dict[str, Drawn]:
        """Wait for a step: what came of it for each request that was due a token or asked about its prompt."""
        found = [] if launched.choice is None else launched.choice.read()
        drawn = dict(zip(launched.ids, found, strict=True))
        return drawn if launched.scores is None else launched.scores.read(drawn)


def runner_for(decoder: DecoderLike, config: EngineConfig) -> Any:
    """The runner for a decoder: a `Runner`, or on a GPU a `GpuRunner` where the model is fused."""
    if decoder.device.type == "cuda":
        from fewbit.engine.gpu import GpuRunner
        from fewbit.model.fused import FusedDecoder

        if isinstance(decoder, FusedDecoder):
            return GpuRunner(decoder, config)
    return Runner(decoder, config)


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that could be had now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: count on half of what the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
