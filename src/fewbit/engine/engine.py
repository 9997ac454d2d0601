"""The engine: one loop over schedule, run, commit. Tokens in, tokens out; no text, no sockets, no threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from fewbit.checkpoint import Checkpoint, open_checkpoint
from fewbit.engine.attend import token_bytes
from fewbit.engine.batch import Batch
from fewbit.engine.config import STEP_TOKENS, EngineConfig, EngineOptions, resolve
from fewbit.engine.eos import eos_token_ids
from fewbit.engine.fit import Need, check_fit, need
from fewbit.engine.runner import DecoderLike, free_bytes, runner_for
from fewbit.engine.scheduler import Scheduler
from fewbit.engine.types import Ending, EngineInfo, Event, GenerateRequest, Stats, TokenLogprobs
from fewbit.errors import RequestError
from fewbit.model.load import load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec

log = logging.getLogger(__name__)


class Engine:
    """Runs requests on one decoder. Everything is called from one thread."""

    def __init__(self, decoder: DecoderLike, config: EngineConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.runner = runner_for(decoder, config)
        self._under_way: tuple[Batch, Any] | None = None  # launched, not collected

    @property
    def info(self) -> EngineInfo:
        """What a client may want to know."""
        c = self.config
        return EngineInfo(
            vocab=c.vocab,
            max_model_len=c.max_model_len,
            max_batch=c.max_batch,
            block_size=c.block_size,
            eos_token_ids=c.eos_token_ids,
            device=c.device,
        )

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._under_way)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request; its events come out of `step` or `abort`.

        Raises:
            OverloadedError: the queue is full.
            RequestError: it cannot be honoured; nothing was queued and no event will come.
        """
        self.scheduler.submit(request)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now; its blocks are free in the next step. No event if it has ended already."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Event]:
        """One step: at most `max_batch_tokens` tokens through the model, and what came of it.

        Where the runner can overlap, this launches the next step first and gives the events of the one before.
        """
        events: list[Event] = []
        if self._under_way and self.scheduler.looks_back:
            events += self._finish()
        batch = self.scheduler.schedule()
        if not batch.pieces:
            return events + self._finish()
        try:
            launched = self.runner.launch(batch)
        except Exception as fault:  # house: one bad step must not end every request
            return events + self._finish() + self._failed(batch, fault)
        if not self.runner.overlaps:
            self._under_way = batch, launched
            return self._finish()
        self.scheduler.advance(batch)
        before, self._under_way = self._under_way, (batch, launched)
        return events + self._collect(before)

    def _finish(self) -> list[Event]:
        """Wait for the step under way, if there is one."""
        before, self._under_way = self._under_way, None
        return self._collect(before)

    def _collect(self, launched: tuple[Batch, Any] | None) -> list[Event]:
        if launched is None:
            return []
        try:
            drawn = self.runner.collect(launched[1])
        except Exception as fault:  # house: one bad step must not end every request
            return self._failed(launched[0], fault)
        return self.scheduler.commit(launched[0], drawn)

    def _failed(self, batch: Batch, fault: Exception) -> list[Event]:
        """A step came to nothing: out of memory, a kernel that failed.

        That is the end of the requests of this step and of nobody else. They are told, the others go on; what the step
        wrote into blocks was never published. A device that cannot go on raises here and ends the engine.
        """
        log.error("a step of %d tokens failed", batch.tokens, exc_info=fault)
        self.runner.recover()
        reason = str(fault).partition("\n")[0]
        return self.scheduler.fail([p.id for p in batch.pieces], f"a step of the engine failed: {reason}")

    def stats(self) -> Stats:
        """What the engine is doing and has done."""
        return msgspec.structs.replace(self.scheduler.stats(), kv_bytes=self.runner.kv_bytes)


def open_engine(
    path: str | Path, options: EngineOptions | None = None, progress: Callable[[str], None] | None = None
) -> Engine:
    """An engine for the model in a directory.

    Args:
        path: the model directory.
        options: see `EngineOptions`.
        progress: told in words what is going on.

    Raises:
        FewbitError: the model cannot be opened or does not fit.
    """
    options, tell = options or EngineOptions(), progress or (lambda text: None)
    tell(f"opening {path}")
    checkpoint = open_checkpoint(path)
    _check_fit(checkpoint, options)
    tell(f"loading weights onto {options.device}")
    decoder = load(checkpoint, device=options.device, backend=options.backend)
    config = resolve(
        options,
        spec=decoder.spec,
        token_bytes=token_bytes(decoder.spec, decoder.codecs),
        free_bytes=free_bytes(decoder.device),
        eos_token_ids=eos_token_ids(checkpoint.config, checkpoint.files.get("generation_config.json")),
    )
    if config.max_model_len < decoder.spec.context and options.max_model_len is None:
        log.warning(
            "sequences are limited to %d of the model's %d positions: the K/V cache holds %d tokens",
            config.max_model_len, decoder.spec.context, config.capacity,
        )  # fmt: skip
    tell(f"K/V cache: {config.num_blocks} blocks of {config.block_size} tokens")
    return Engine(decoder, config)


def _check_fit(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Raise if a model cannot run on a GPU with these settings, before its weights are read."""
    device = torch.device(options.device)
    if device.type != "cuda":
        return
    tokens = options.max_model_len or 64  # without a wish the cache takes what is left
    batch_tokens = options.max_batch_tokens or STEP_TOKENS["cuda"]

    def of(quant: Mapping[str, QuantSpec], length: int = tokens, step: int = batch_tokens) -> Need:
        return need(checkpoint.spec, quant, checkpoint.kv, checkpoint.dtype, device, 1, length, step)

    linears = [linear.name for linear in checkpoint.spec.linears() if linear.name != "lm_head"]
    others = [
        ("--max-batch-tokens 1024", of(checkpoint.quant, step=1024)),
        (f"--max-model-len {tokens // 2}", of(checkpoint.quant, length=tokens // 2)),
        ("--max-batch-tokens 1024 and --max-model-len 512", of(checkpoint.quant, 512, 1024)),
        ("the model compressed with --recipe fp8", of(dict.fromkeys(linears, QuantSpec(FORMATS["fp8_row"])))),
        ("the model compressed with --recipe int4", of(dict.fromkeys(linears, QuantSpec(FORMATS["int4_g128"])))),
    ]
    check_fit(of(checkpoint.quant), free_bytes(device), str(checkpoint.path), others)


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """All of one request's answer."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one a token, if asked for
    ending: Ending


def generate(engine: Engine, requests: Iterable[GenerateRequest]) -> list[Output]:
    """Run requests to their ends and return their outputs in the same order. Nothing else may use the engine.

    Raises:
        RequestError: one of them cannot be honoured; none is left running.
    """
    todo = list(requests)
    tokens: dict[str, list[int]] = {r.id: [] for r in todo}
    logprobs: dict[str, list[TokenLogprobs]] = {r.id: [] for r in todo}
    endings: dict[str, Ending] = {}
    if len(tokens) < len(todo):
        raise RequestError("two requests have the same id; give each its own", "id")
    queue = iter(todo)
    following = next(queue, None)
    try:
        while following is not None or engine.has_work:
            while following is not None and len(engine.scheduler.waiting) < engine.config.max_queued:
                engine.submit(following)
                following = next(queue, None)
            for event in engine.step():
                if event.token is not None:
                    tokens[event.id].append(event.token)
                if event.logprobs is not None:
                    logprobs[event.id].append(event.logprobs)
                if event.ending is not None:
                    endings[event.id] = event.ending
    finally:
        for request in todo:
            engine.abort(request.id)
    return [
        Output(id=r.id, tokens=tuple(tokens[r.id]), logprobs=tuple(logprobs[r.id]), ending=endings[r.id]) for r in todo
    ]
