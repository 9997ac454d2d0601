"""Offline speed: a static batch through the real engine, against the device's peaks and ceilings of the same run.

Protocol: `batch` prompts of `prompt` random tokens at once, greedy, `output` tokens each, no prefix cache;
tok/s = batch * output / wall time with the prompts in it; the median of several runs after one that is not counted.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from fewbit.checkpoint import Checkpoint
from fewbit.compress import layer_bits
from fewbit.compress.recipe import Recipe, read_recipe
from fewbit.engine import config as engine_config
from fewbit.engine.attend import token_bytes
from fewbit.engine.config import resolve
from fewbit.engine.engine import Engine
from fewbit.engine.fit import Need, check_fit, need
from fewbit.engine.gpu import SIZES, GpuRunner
from fewbit.engine.runner import free_bytes
from fewbit.errors import UnsupportedError
from fewbit.measure.ceilings import Ceilings, ceilings, seconds
from fewbit.measure.dummy import (
    decode_bytes,
    decode_flops,
    dummy_checkpoint,
    eight_bit_share,
    prefill_flops,
    stored_bits,
)
from fewbit.measure.peaks import Peak, peak_of
from fewbit.measure.slice import compare_slice
from fewbit.measure.speed import BLOCK, batch_options, fill, random_prompts, run_batch, step_seconds
from fewbit.model.load import Loader
from fewbit.ops.device import device_info, peak_bytes

Tell = Callable[[str], None]
STEP_TOKENS = {"cpu": engine_config.STEP_TOKENS["cpu"], "cuda": 16384}
"""Most tokens of prompts in one step."""
TIMED_STEPS = {"cpu": 16, "cuda": 64}
"""Steps of the full batch that are timed alone."""


@dataclass(frozen=True)
class Cell:
    """Sequences at a time, tokens of each prompt, tokens of each answer."""

    batch: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt} + {self.output} tokens"


@dataclass
class Offline:
    """What a `Bench` found; times in seconds, rates per second.

    Attributes:
        tokens_per_s: median over runs; slowest, fastest: of them.
        first_token_s: mean time to the first token, of the median run (TTFT).
        per_token_s: mean time between tokens of a sequence after its first, of the median run (TPOT).
        step_s: one step of the engine at the full batch: schedule, launch, collect, commit.
        graph_s: one replay of the same step's graph, nothing else; None: no graph runs it.
        step_bytes: what a step must read: weights as stored, scales included, and K and V in the middle of the answers.
        step_flops: operations of that step.
        mbu: step_bytes / TPOT over the peak of the device's memory.
        mfu: operations of the prompts over the time to the last first token, over the peak of its arithmetic.
        peak: whose peaks these are: `vendor: h100`, or `measured` in this run where the vendor's are not known.
        peak_bytes_per_s, peak_flops_per_s: the peaks; for the share of linears with 8-bit inputs, of 8-bit products.
        bytes_per_s: step_bytes over step_s; of the copy measured in this run: `bandwidth`.
        flops_per_s: of the prompts, over the time to the last first token; of the ceiling: `compute`.
        limit_tokens_per_s: of the protocol at the ceilings; `of_limit`: what was reached of it.
        bits_per_weight: of all linears of the layers as stored, those that are not quantized included.
        weight_bytes: weights as the kernels hold them.
        kv_bytes: K and V.
        peak_bytes: most memory of the GPU; on a CPU of the process so far.
        difference: of the logits of a two-layer slice from the reference, see `compare_slice`; None: not compared.
        agreement: fraction of these steps in which both choose the same token.
    """

    tokens_per_s: float
    slowest: float
    fastest: float
    first_token_s: float
    per_token_s: float
    step_s: float
    graph_s: float | None
    step_bytes: float
    step_flops: float
    mbu: float
    mfu: float
    peak: str
    peak_bytes_per_s: float
    peak_flops_per_s: float
    bytes_per_s: float
    bandwidth: float
    flops_per_s: float
    compute: float
    limit_tokens_per_s: float
    of_limit: float
    bits_per_weight: float
    weight_bytes: int
    kv_bytes: int
    peak_bytes: int
    difference: float | None
    agreement: float | None
    ceilings: Ceilings
    runs: list[float] = field(default_factory=list)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)  # with `profile`: seconds of a step by kernel


class Bench:
    """A model on a device, ready to be measured in one cell after another.

    Args:
        checkpoint: the model.
        device: where it runs.
        cells: all that will be asked for.
        shape: config.json and recipe of a model of random weights; None: the weights are a model's own.
        tell: told in words what is going on.

    Raises:
        UnsupportedError: no cell fits: of the smallest the sum, and settings that would.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, cells: Sequence[Cell], *,
        shape: tuple[Mapping[str, Any], Recipe] | None = None, tell: Tell = lambda text: None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.device, self.shape, self.tell = checkpoint, device, shape, tell
        self.weight_bytes = 0
        self._check(min(cells, key=lambda cell: cell.batch * (cell.prompt + cell.output)))
        tell("measuring the ceilings")
        self.top = ceilings(device)
        self._release()
        tell("loading the weights" if shape is None else "making the weights")
        before = _allocated(device)
        self.loader = Loader(checkpoint, device, "auto")
        reason = self.loader.fused_why_not()
        if reason and device.type == "cuda" and shape:
            raise UnsupportedError(f"this model does not run on the fused path: {reason}")
        self.decoder = self.loader.decoder() if reason else self.loader.fused()
        self._release()
        self.weight_bytes = _allocated(device) - before or _need(checkpoint, device, Cell(1, 1, 1)).weights
        self.known = peak_of(device_info(device).name) if device.type == "cuda" else None

    @classmethod
    def of_shape(
        cls, config: Mapping[str, Any], recipe: Recipe, device: torch.device, cells: Sequence[Cell],
        tell: Tell = lambda text: None,
    ) -> Self:  # fmt: skip
        """Of a model of random weights: a config.json, and numerics of its weights, K and V (`AS_IT_WAS`: its own)."""
        return cls(dummy_checkpoint(config, recipe, device), device, cells, shape=(config, recipe), tell=tell)

    def run(self, cell: Cell, runs: int = 3, seed: int = 0, profile: bool = False) -> Offline:
        """Measure one cell: the median of `runs`.

        Args:
            cell: what.
            runs: that are counted.
            seed: of the prompts.
            profile: on a GPU also the time of each kernel in a step.

        Raises:
            UnsupportedError: it does not fit.
            torch.OutOfMemoryError: it did not fit all the same.
        """
        device, checkpoint, top, batch = self.device, self.checkpoint, self.top, cell.batch
        self._release()
        self._check(cell)
        difference = agreement = None
        if self.shape and device.type == "cuda":
            self.tell(f"{cell}: comparing a slice of two layers with the reference")
            difference, agreement = compare_slice(self.loader, self.decoder, *self.shape, batch)  # type: ignore[arg-type]
        self._release()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        engine = self._engine(cell)
        if graphs := isinstance(engine.runner, GpuRunner):
            self.tell("recording graphs")
            engine.runner.graph(batch)
        prompts = random_prompts(self.decoder.spec.vocab, batch, cell.prompt, seed)
        found = []
        for index in range(runs + 1):
            self.tell(f"{cell}: " + ("warming up" if index == 0 else f"run {index} of {runs}"))
            found.append(run_batch(engine, prompts, cell.output if index else min(cell.output, 8), f"r{index}"))
        middle_run = sorted(found[1:], key=lambda run: run.total)[runs // 2]
        first, between, last_first = middle_run.first, middle_run.between, middle_run.last_first
        step, graph = _step_times(engine, prompts, cell.prompt + cell.output // 2)
        step = between if step is None else step
        middle = cell.prompt + cell.output / 2  # of the answers: tokens of a sequence
        read = sum(decode_bytes(checkpoint, batch, middle))
        linear, scores = (batch * f for f in prefill_flops(checkpoint, cell.prompt))
        eight = eight_bit_share(checkpoint)
        here = Peak(top.copy, top.bf16, top.eight)
        ceiling = here.mixed(eight)
        limit = batch * cell.output / (linear / ceiling + scores / top.bf16 + (cell.output - 1) * read / top.copy)
        speeds = [batch * cell.output / run.total for run in found[1:]]
        reached = statistics.median(speeds)
        whose, peak = self.known or ("", here)
        peak_flops = peak.mixed(eight)
        return Offline(
            tokens_per_s=reached, slowest=min(speeds), fastest=max(speeds), first_token_s=first, per_token_s=between,
            step_s=step, graph_s=graph, step_bytes=read, step_flops=decode_flops(checkpoint, batch, middle),
            mbu=read / between / peak.bytes_per_s,
            mfu=(linear + scores) / last_first / peak_flops, peak=f"vendor: {whose}" if self.known else "measured",
            peak_bytes_per_s=peak.bytes_per_s, peak_flops_per_s=peak_flops, bytes_per_s=read / step,
            bandwidth=read / step / top.copy, flops_per_s=(linear + scores) / last_first,
            compute=(linear + scores) / last_first / ceiling, limit_tokens_per_s=limit, of_limit=reached / limit,
            bits_per_weight=stored_bits(checkpoint) if self.shape else layer_bits(checkpoint),
            weight_bytes=self.weight_bytes, kv_bytes=engine.runner.kv_bytes,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
            difference=difference, agreement=agreement, ceilings=top, runs=speeds,
            kernels=_profile(engine, prompts) if profile and graphs else {},
        )  # fmt: skip

    def _engine(self, cell: Cell) -> Engine:
        """With as many tokens to a step as memory was counted for, and room to time single steps."""
        middle, batch, step_tokens = cell.prompt + cell.output // 2, cell.batch, STEP_TOKENS[self.device.type]
        timed = middle + -(-batch * middle // step_tokens) + TIMED_STEPS[self.device.type] + 8
        longest = min(max(cell.prompt + cell.output, timed), self.decoder.spec.context)
        options = batch_options(self.device, batch, longest, max_batch_tokens=step_tokens + batch)
        spec, stored = self.decoder.spec, token_bytes(self.decoder.spec, self.decoder.codecs)
        resolved = resolve(options, spec=spec, token_bytes=stored, free_bytes=free_bytes(self.device))
        return Engine(self.decoder, resolved)

    def _release(self) -> None:
        """Give back what nobody uses: the engine of the cell before lies in a cycle with its graphs."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, cell: Cell) -> None:
        """Raise if a cell cannot be measured; weights that are loaded already are counted as free."""
        context = self.checkpoint.spec.context
        if self.device.type == "cuda" and cell.batch > SIZES[-1]:
            raise UnsupportedError(f"batch {cell.batch}: the largest recorded step holds {SIZES[-1]} sequences")
        if cell.prompt + cell.output > context:
            raise UnsupportedError(
                f"prompts of {cell.prompt} and answers of {cell.output} tokens exceed the {context} "
                "positions the model was made for; ask for fewer"
            )
        takes = _need(self.checkpoint, self.device, cell)
        free = free_bytes(self.device) + self.weight_bytes
        check_fit(takes, free, str(cell), self._smaller(cell, takes, free))

    def _smaller(self, cell: Cell, takes: Need, free: int) -> Iterator[tuple[str, Need]]:
        """What might fit instead."""
        checkpoint, device, batch = self.checkpoint, self.device, cell.batch
        if 0 < (fits := (free - takes.total + takes.kv) // (takes.kv // batch)) < batch:
            yield f"--batch {fits}", _need(checkpoint, device, Cell(fits, cell.prompt, cell.output))

        def made(recipe: Recipe, sequences: int = batch) -> Need:
            assert self.shape is not None
            one = Cell(sequences, cell.prompt, cell.output)
            return _need(dummy_checkpoint(self.shape[0], recipe, device), device, one)

        if self.shape:
            if not checkpoint.kv:
                yield "--kv fp8", made(self.shape[1].with_kv("fp8"))
            for name in ("fp8", "int4"):
                yield f"--recipe {name}", made(read_recipe(name).with_kv("fp8" if checkpoint.kv else None))
        half = Cell(batch, cell.prompt // 2, cell.output // 2)
        yield f"--input and --output of {half.prompt + half.output} tokens together", _need(checkpoint, device, half)
        if self.shape:
            yield "--batch 1 --recipe int4 --kv fp8", made(read_recipe("int4").with_kv("fp8"), 1)


def _need(checkpoint: Checkpoint, device: torch.device, cell: Cell) -> Need:
    """What a cell takes, the weights with it."""
    c, cached = checkpoint, cell.batch * -(-(cell.prompt + cell.output) // BLOCK) * BLOCK
    step = min(STEP_TOKENS[device.type], cached) + cell.batch
    return need(c.spec, c.quant, c.kv, c.dtype, device, cell.batch, cached, step)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _step_times(engine: Engine, prompts: list[list[int]], length: int) -> tuple[float | None, float | None]:
    """Seconds of one engine step at the full batch in the middle of the answers, and of one bare graph replay.

    None: the model's context has no room for so many more tokens; there is no graph.
    """
    longer = [(tokens * (length // len(tokens) + 1))[:length] for tokens in prompts]
    fill(engine, longer, engine.config.max_model_len - length, "step")
    times = step_seconds(engine, len(prompts), TIMED_STEPS[engine.runner.device.type])
    runner = engine.runner
    graph = seconds(runner.graph(len(prompts)).replay, times=20) if isinstance(runner, GpuRunner) else None
    for index in range(len(prompts)):
        engine.abort(f"step-{index}")
    while engine.has_work:
        engine.step()
    return statistics.mean(times) if times else None, graph


def _profile(engine: Engine, prompts: list[list[int]]) -> dict[str, dict[str, float]]:
    """Seconds and count of each kernel in one replay of the step's graph."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        engine.runner.graph(len(prompts)).replay()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in seen.events():
        if event.device_time:
            entry = found.setdefault(event.name, {"seconds": 0.0, "count": 0})
            entry["seconds"] += event.device_time * 1e-6
            entry["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))
