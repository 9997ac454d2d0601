"""Offline speed: a static batch through the real engine, against ceilings measured in the same run.

Protocol: `batch` prompts of `prompt` random tokens at once, greedy, `output` tokens each, no prefix cache;
tok/s = batch * output / wall time with the prompts in it; the median of several runs after one that is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbit.checkpoint import Checkpoint
from fewbit.compress.recipe import Recipe, read_recipe
from fewbit.engine.attend import token_bytes
from fewbit.engine.config import EngineOptions, resolve
from fewbit.engine.engine import Engine
from fewbit.engine.fit import Need, check_fit, need
from fewbit.engine.gpu import SIZES
from fewbit.engine.runner import free_bytes
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import UnsupportedError
from fewbit.measure.dummy import decode_bytes, dummy_checkpoint, prefill_flops
from fewbit.measure.slice import compare_slice
from fewbit.model.load import Loader

Tell = Callable[[str], None]
STEP_TOKENS = 16384
"""Most tokens of prompts in one step."""
TIMED_STEPS = 64
"""Steps of the full batch that are timed alone."""


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches in this run: a large copy (read and written bytes a second), large products (FLOP/s)."""

    copy: float
    bf16: float
    eight: float  # FP8, or INT8 where there is none


@dataclass
class Offline:
    """What a `Bench` found; times in seconds, rates per second.

    Attributes:
        tokens_per_s: median over runs; slowest, fastest: of them.
        first_token_s: mean time to the first token, of the median run.
        per_token_s: mean time between tokens of a sequence after its first, of the median run.
        step_s: one step of the engine at the full batch: schedule, launch, collect, commit.
        graph_s: one replay of the same step's graph, nothing else.
        bytes_per_s: what a step must read over its time; of the copy: `bandwidth`.
        flops_per_s: of the prompts, over the time to the last first token; of the ceiling: `compute`.
        limit_tokens_per_s: of the protocol at the ceilings; `of_limit`: what was reached of it.
        difference: of the logits of a two-layer slice from the reference, see `compare_slice`.
        agreement: fraction of these steps in which both choose the same token.
    """

    tokens_per_s: float
    slowest: float
    fastest: float
    first_token_s: float
    per_token_s: float
    step_s: float
    graph_s: float
    bytes_per_s: float
    bandwidth: float
    flops_per_s: float
    compute: float
    limit_tokens_per_s: float
    of_limit: float
    weight_bytes: int
    kv_bytes: int
    peak_bytes: int
    difference: float
    agreement: float
    ceilings: Ceilings
    runs: list[float] = field(default_factory=list)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)  # with `profile`: seconds of a step by kernel


def ceilings(device: torch.device) -> Ceilings:
    """Measure them; about half a second."""
    ends = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
    copy = ends.numel() / seconds(lambda: ends[0].copy_(ends[1]))
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2.0 * size**3
    bf16 = flops / seconds(lambda: a @ b.t())
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        eight = flops / seconds(
            lambda: torch._scaled_mm(
                a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
    else:
        a8, b8 = a.to(torch.int8), b.to(torch.int8)
        eight = flops / seconds(lambda: torch._int_mm(a8, b8.t()))
    return Ceilings(copy, bf16, eight)


def seconds(call: Callable[[], Any], times: int = 10, repeats: int = 5) -> float:
    """Median time of one call on the GPU."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e-3 / times)
    return statistics.median(found)


class Bench:
    """A model of random weights on a GPU, ready to be measured at one batch size after another.

    Args:
        config: a config.json.
        recipe: numerics of the weights and of K and V; `AS_IT_WAS`: as they are.
        device: a GPU.
        prompt: tokens of each prompt.
        output: tokens of each answer.
        largest: the largest batch that will be asked for.
        tell: told in words what is going on.

    Raises:
        UnsupportedError: no GPU, or the model does not fit: the sum, and settings that would.
    """

    def __init__(
        self, config: Mapping[str, Any], recipe: Recipe, device: torch.device, *, prompt: int, output: int,
        largest: int, tell: Tell = lambda text: None,
    ) -> None:  # fmt: skip
        if device.type != "cuda":
            raise UnsupportedError("bench offline with random weights needs an NVIDIA GPU; give --device cuda:0")
        self.config, self.recipe, self.device, self.tell = config, recipe, device, tell
        self.prompt, self.output = prompt, output
        if largest > SIZES[-1]:
            raise UnsupportedError(f"batch {largest}: the largest recorded step holds {SIZES[-1]} sequences")
        self.checkpoint = dummy_checkpoint(config, recipe, device)
        if prompt + output > self.checkpoint.spec.context:
            raise UnsupportedError(
                f"prompts of {prompt} and answers of {output} tokens exceed the {self.checkpoint.spec.context} "
                "positions the model was made for; ask for fewer"
            )
        _check_fit(self.checkpoint, config, recipe, device, largest, prompt + output)
        tell("measuring the ceilings")
        self.top = ceilings(device)
        torch.cuda.empty_cache()
        tell("making the weights")
        before = torch.cuda.memory_allocated(device)
        self.loader = Loader(self.checkpoint, device)
        if reason := self.loader.fused_why_not():
            raise UnsupportedError(f"this model does not run on the fused path: {reason}")
        self.decoder = self.loader.fused()
        torch.cuda.empty_cache()
        self.weight_bytes = torch.cuda.memory_allocated(device) - before

    def run(self, batch: int, runs: int = 3, profile: bool = False) -> Offline:
        """Measure one batch size: the median of `runs`; `profile`: also the time of each kernel in a step."""
        device, prompt, output, checkpoint, top = self.device, self.prompt, self.output, self.checkpoint, self.top
        self.tell(f"batch {batch}: comparing a slice of two layers with the reference")
        difference, agreement = compare_slice(self.loader, self.decoder, self.config, self.recipe, batch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        engine = self._engine(batch)
        self.tell("recording graphs")
        engine.runner.graph(batch)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, self.decoder.spec.vocab, (batch, prompt), generator=generator).tolist()
        found = []
        for index in range(runs + 1):
            self.tell("warming up" if index == 0 else f"run {index} of {runs}")
            found.append(_run(engine, prompts, output if index else min(output, 8), f"r{index}"))
        counted = sorted(found[1:], key=lambda run: run[0])
        _, first, between, last_first = counted[len(counted) // 2]
        step, graph = _step_times(engine, prompts, prompt + output // 2)
        step = between if step is None else step
        read = sum(decode_bytes(checkpoint, batch, prompt + output / 2))
        linear, scores = (batch * f for f in prefill_flops(checkpoint, prompt))
        ceiling = top.eight if _eight_bit_prompts(checkpoint) else top.bf16
        limit = batch * output / (linear / ceiling + scores / top.bf16 + (output - 1) * read / top.copy)
        speeds = [batch * output / run[0] for run in found[1:]]
        reached = statistics.median(speeds)
        return Offline(
            tokens_per_s=reached, slowest=min(speeds), fastest=max(speeds), first_token_s=first, per_token_s=between,
            step_s=step, graph_s=graph, bytes_per_s=read / step, bandwidth=read / step / top.copy,
            flops_per_s=(linear + scores) / last_first, compute=(linear + scores) / last_first / ceiling,
            limit_tokens_per_s=limit, of_limit=reached / limit, weight_bytes=self.weight_bytes,
            kv_bytes=engine.runner.kv_bytes, peak_bytes=torch.cuda.max_memory_allocated(device), difference=difference,
            agreement=agreement, ceilings=top, runs=speeds, kernels=_profile(engine, prompts) if profile else {},
        )  # fmt: skip

    def _engine(self, batch: int) -> Engine:
        """With as many tokens to a step as memory was counted for, and room to time single steps."""
        middle = self.prompt + self.output // 2
        timed = middle + -(-batch * middle // STEP_TOKENS) + TIMED_STEPS + 8
        longest = min(max(self.prompt + self.output, timed), self.decoder.spec.context)
        options = EngineOptions(
            device=str(self.device), max_batch=batch, max_model_len=longest, prefix_cache=False,
            num_blocks=batch * (-(-longest // 64) + 1) + 1, max_batch_tokens=STEP_TOKENS + batch,
        )  # fmt: skip
        spec, stored = self.decoder.spec, token_bytes(self.decoder.spec, self.decoder.codecs)
        resolved = resolve(options, spec=spec, token_bytes=stored, free_bytes=free_bytes(self.device))
        return Engine(self.decoder, resolved)


def _eight_bit_prompts(checkpoint: Checkpoint) -> bool:
    quant = next(iter(checkpoint.quant.values()), None)
    return quant is not None and quant.input is not None


def _check_fit(
    checkpoint: Checkpoint, config: Mapping[str, Any], recipe: Recipe, device: torch.device, batch: int,
    longest: int,
) -> None:  # fmt: skip
    """Raise if the model with its cache cannot fit."""
    longest = -(-longest // 64) * 64

    def of(c: Checkpoint, sequences: int = batch, tokens: int = longest) -> Need:
        cached = sequences * tokens
        return need(c.spec, c.quant, c.kv, c.dtype, device, sequences, cached, min(STEP_TOKENS, cached) + sequences)

    def made(small: Recipe, sequences: int = batch) -> Need:
        return of(dummy_checkpoint(config, small, device), sequences)

    free, takes = free_bytes(device), of(checkpoint)

    def others() -> Iterator[tuple[str, Need]]:
        if 0 < (fits := (free - takes.total + takes.kv) // (takes.kv // batch)) < batch:
            yield f"--batch {fits}", of(checkpoint, fits)
        if not checkpoint.kv:
            yield "--kv fp8", made(recipe.with_kv("fp8"))
        for name in ("fp8", "int4"):
            yield f"--recipe {name}", made(read_recipe(name).with_kv("fp8" if checkpoint.kv else None))
        yield f"--input and --output of {longest // 2} tokens together", of(checkpoint, batch, longest // 2)
        yield "--batch 1 --recipe int4 --kv fp8", made(read_recipe("int4").with_kv("fp8"), 1)

    check_fit(takes, free, f"batch {batch} x {longest} tokens", others())


def _run(engine: Engine, prompts: list[list[int]], output: int, name: str) -> tuple[float, float, float, float]:
    """Seconds in all, mean to the first token, mean between tokens, to the last first token."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    made = 0
    for index, tokens in enumerate(prompts):
        engine.submit(GenerateRequest(id=f"{name}-{index}", prompt=tuple(tokens), params=params))
    while engine.has_work:
        for event in engine.step():
            now = time.perf_counter() - start
            if event.token is None:
                raise UnsupportedError(f"a request ended early: {event.ending.detail if event.ending else ''}")
            made += 1
            first.setdefault(event.id, now)
            last[event.id] = now
    total = time.perf_counter() - start
    assert made == len(prompts) * output
    between = statistics.mean(last[i] - first[i] for i in first) / max(output - 1, 1)
    return total, statistics.mean(first.values()), between, max(first.values())


def _step_times(engine: Engine, prompts: list[list[int]], length: int) -> tuple[float | None, float]:
    """Seconds of one engine step at the full batch in the middle of the answers, and of one bare graph replay.

    None: the model's context has no room for so many more tokens.
    """
    params = SamplingParams(max_tokens=engine.config.max_model_len - length, temperature=0.0, ignore_eos=True)
    for index, tokens in enumerate(prompts):
        longer = (tokens * (length // len(tokens) + 1))[:length]
        engine.submit(GenerateRequest(id=f"step-{index}", prompt=tuple(longer), params=params))
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {event.id for event in engine.step()}
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    count = 0
    while engine.has_work and count < TIMED_STEPS and len(engine.scheduler.running) == len(prompts):
        engine.step()
        count += 1
    torch.cuda.synchronize()
    step = (time.perf_counter() - begin) / count if count else None
    graph = seconds(engine.runner.graph(len(prompts)).replay, times=20)
    for index in range(len(prompts)):
        engine.abort(f"step-{index}")
    while engine.has_work:
        engine.step()
    return step, graph


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
