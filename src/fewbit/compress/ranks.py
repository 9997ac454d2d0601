"""Several processes that calibrate together: each sees its share of the data, all hold the same statistics.

Started as `torchrun` does it. Every process carries out the whole compression on what all of them saw; the first one
alone writes. Sums of floats are added in another order than by one process: largest magnitudes, counts and what only
follows from them are the same to the last bit, second moments to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewbit.compress.calibrators import Histogram
from fewbit.compress.stats import Stats
from fewbit.errors import FewbitError, RecipeError
from fewbit.numerics.qtensor import QTensor
from fewbit.ops.device import gpu_count

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher such as `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def own_gpu() -> str | None:
    """The GPU of this process where a launcher started several and there are GPUs: each has its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if launched() and gpu_count() else None


class Ranks:
    """The processes that work together.

    Attributes:
        rank: of this one, the first is 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the processes that `torchrun` started; alone where it did not."""
        if not launched():
            return cls()
        if not dist.is_initialized():
            # the first one checks and writes alone for as long as a model takes
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, windows: Sequence[T]) -> list[T]:
        """What this process looks at.

        Raises:
            RecipeError: there are more processes than windows.
        """
        if windows and len(windows) < self.world:
            raise RecipeError(f"{len(windows)} windows for {self.world} processes: each needs one; raise --samples")
        return list(windows[self.rank :: self.world])

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; or the error that it met."""
        if self.world == 1:
            return make()
        held: list[Any] = [None, None]
        if self.rank == 0:
            try:
                held[0] = make()
            except FewbitError as error:
                held[1] = error
        dist.broadcast_object_list(held, src=0)
        if held[1] is not None:
            raise held[1]
        made: T = held[0]
        return made

    def add(self, stats: Stats) -> None:
        """Make statistics those of all processes. A sample is that of the first."""
        if self.world == 1:
            return
        tokens = torch.tensor(stats.tokens, device=stats.amax.device)
        for total in (tokens, stats.total, stats.hessian):
            if total is not None:
                dist.all_reduce(total)
        stats.tokens = int(tokens)
        self.largest(stats.amax)
        if stats.sample is not None:
            held = stats.sample.cpu()
            stats.sample = self.first(lambda: held).to(stats.sample.device)

    def count(self, histogram: Histogram) -> None:
        """Make counts those of all processes."""
        if self.world > 1:
            dist.all_reduce(histogram.counts)

    def largest(self, x: Tensor) -> None:
        """Make x the largest of all processes."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)

    def leave(self) -> None:
        """Wait for the others, then part."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


class Follower:
    """What a process that is not the first has for a writer: it keeps nothing.

    Attributes:
        folder, recorded: the first process's, see `fewbit.checkpoint.CheckpointWriter`.
    """

    def __init__(self, folder: Path, recorded: Mapping[str, Any] | None) -> None:
        self.folder, self.recorded = folder, recorded

    def add(self, name: str, tensor: Tensor | QTensor) -> None:
        """Let go of a tensor."""

    def record(self, progress: Mapping[str, Any]) -> None:
        """The first process does."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
