"""The engine: one loop over schedule, run, commit. Tokens in, tokens out; no text, no sockets, no threads."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from fewbit.checkpoint import Checkpoint, open_checkpoint
from fewbit.checkpoint.sources import text_folder
from fewbit.engine.attend import token_bytes
from fewbit.engine.batch import Batch
from fewbit.engine.config import EngineConfig, EngineOptions, limits, resolve
from fewbit.engine.eos import eos_token_ids
from fewbit.engine.fit import Need, check_fit, need
from fewbit.engine.grammars import Grammars
from fewbit.engine.request import Matcher
from fewbit.engine.runner import DecoderLike, free_bytes, runner_for
from fewbit.engine.scheduler import Scheduler
from fewbit.engine.types import Ending, EngineInfo, Event, GenerateRequest, Stats, TokenLogprobs
from fewbit.errors import RequestError
from fewbit.model.load import load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.device import current, device_named

if TYPE_CHECKING:
    from fewbit.text import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Runs requests on one decoder. Everything is called from one thread."""

    def __init__(
        self, decoder: DecoderLike, config: EngineConfig, tokenizer: Callable[[], Tokenizer] | None = None
    ) -> None:
        """`tokenizer` opens the model's, which nothing but grammars needs."""
        self.config = config
        self.grammars = Grammars(tokenizer, config.vocab, config.eos_token_ids)
        self.scheduler = Scheduler(config)
        with current(decoder.device):
            self.runner = runner_for(decoder, config)
        self._under_way: tuple[Batch, Any] | None = None  # launched, not collected
        self.unsent: list[Event] = []  # of a step that has not returned

    @property
    def info(self) -> EngineInfo:
        """What a client may want to know."""
        c = self.config
        return EngineInfo(
            vocab=c.vocab,
            max_model_len=c.max_model_len,
            max_batch=c.max_batch,
            max_queued=c.max_queued,
            block_size=c.block_size,
            eos_token_ids=c.eos_token_ids,
            device=c.device,
        )

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._under_way)

    def submit(self, request: GenerateRequest, matcher: Matcher | None = None) -> None:
        """Queue a request; its events come out of `step` or `abort`.

        Args:
            request: what is asked.
            matcher: made by `grammars` for this request alone; None: a grammar is compiled here.

        Raises:
            OverloadedError: the queue is full.
            RequestError: it cannot be honoured; nothing was queued and no event will come.
        """
        if matcher is None and request.params.grammar is not None:
            matcher = self.grammars.matcher(request.params.grammar)
        self.scheduler.submit(request, matcher)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now; its blocks are free in the next step. No event if it has ended already."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Event]:
        """One step: at most `max_batch_tokens` tokens through the model, and what came of it.

        Where the runner can overlap, this launches the next step first and gives the events of the one before. If it
        raises, the engine cannot go on; what came before that is in `unsent`.
        """
        with current(self.runner.device):
            self._step()
        events, self.unsent = self.unsent, []
        return events

    def _step(self) -> None:
        if self._under_way and self.scheduler.looks_back:
            self._finish()
        batch = self.scheduler.schedule()
        if not batch.pieces:
            self._finish()
            return
        try:
            launched = self.runner.launch(batch)
        except Exception as fault:  # house: one bad step must not end every request
            self._finish()
            self._failed(batch, fault)
            return
        if not self.runner.overlaps:
            self._under_way = batch, launched
            self._finish()
            return
        self.scheduler.advance(batch)
        before, self._under_way = self._under_way, (batch, launched)
        self._collect(before)

    def _finish(self) -> None:
        """Wait for the step under way, if there is one."""
        before, self._under_way = self._under_way, None
        self._collect(before)

    def _collect(self, launched: tuple[Batch, Any] | None) -> None:
        if launched is None:
            return
        try:
            drawn = self.runner.collect(launched[1])
        except Exception as fault:  # house: one bad step must not end every request
            self._failed(launched[0], fault)
        else:
            self.unsent += self.scheduler.commit(launched[0], drawn)

    def _failed(self, batch: Batch, fault: Exception) -> None:
        """A step came to nothing: out of memory, a kernel that failed.

        That is the end of the requests of this step and of nobody else. They are told, the others go on; what the step
        wrote into blocks was never published. A device that cannot go on raises here and ends the engine.
        """
        log.error("a step of %d tokens failed", batch.tokens, exc_info=fault)
        self.runner.recover()
        reason = str(fault).partition("\n")[0]
        self.unsent += self.scheduler.fail(batch, f"a step of the engine failed: {reason}")

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
    options = dataclasses.replace(options, device=str(device_named(options.device)))
    tell(f"opening {path}")
    checkpoint = open_checkpoint(path)
    step_bytes = _step_bytes(checkpoint, options)
    tell(f"loading weights onto {options.device}")
    decoder = load(checkpoint, device=options.device, backend=options.backend)
    config = resolve(
        options,
        spec=decoder.spec,
        token_bytes=token_bytes(decoder.spec, decoder.codecs),
        free_bytes=free_bytes(decoder.device),
        step_bytes=step_bytes,
        eos_token_ids=eos_token_ids(checkpoint.config, checkpoint.files.get("generation_config.json")),
    )
    if config.max_model_len < decoder.spec.context and options.max_model_len is None:
        log.warning(
            "sequences are limited to %d of the model's %d positions: the K/V cache holds %d tokens",
            config.max_model_len, decoder.spec.context, config.capacity,
        )  # fmt: skip
    tell(f"K/V cache: {config.num_blocks} blocks of {config.block_size} tokens")
    return Engine(decoder, config, lambda: _open_tokenizer(Path(path)))


def _open_tokenizer(path: Path) -> Tokenizer:
    from fewbit.text import Tokenizer

    return Tokenizer.load(text_folder(path))


def _step_bytes(checkpoint: Checkpoint, options: EngineOptions) -> int:
    """What the largest step takes on a GPU besides weights and cache.

    Raises:
        UnsupportedError: the model cannot run there with these settings; known before its weights are read.
    """
    device = torch.device(options.device)
    if device.type != "cuda":
        return 0
    batch, budget = limits(options)
    tokens = options.max_model_len or 64  # without a wish the cache takes what is left
    asked = min(budget, batch * (options.max_model_len or checkpoint.spec.context))

    def of(quant: Mapping[str, QuantSpec], length: int = tokens, step: int = asked, rows: int = batch) -> Need:
        """With one sequence in the cache."""
        c = checkpoint
        return need(c.spec, quant, c.kv, c.dtype, device, rows, length, step, options.backend)

    def others() -> Iterator[tuple[str, Need]]:
        yield "--max-batch-tokens 1024 and --max-batch 32", of(checkpoint.quant, step=min(1024, asked), rows=32)
        yield f"--max-model-len {max(tokens // 2, 2)}", of(checkpoint.quant, length=tokens // 2)
        if options.backend in ("auto", "exact"):
            linears = [linear.name for linear in checkpoint.spec.linears() if linear.name != "lm_head"]
            for name, fmt in (("fp8", "fp8_row"), ("int4", "int4_g128")):
                made = dict.fromkeys(linears, QuantSpec(FORMATS[fmt]))
                yield f"the model compressed with --recipe {name}", of(made)

    takes = of(checkpoint.quant)
    check_fit(takes, free_bytes(device), str(checkpoint.path), others())
    return takes.workspace + takes.graphs


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """All of one request's answer."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one a token, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...]  # of all prompt tokens but the first, if asked for
    ending: Ending


def generate(engine: Engine, requests: Iterable[GenerateRequest]) -> list[Output]:
    """Run requests to their ends and return their outputs in the same order. Nothing else may use the engine.

    Raises:
        RequestError: one of them cannot be honoured; none is left running.
    """
    todo = list(requests)
    tokens: dict[str, list[int]] = {r.id: [] for r in todo}
    logprobs: dict[str, list[TokenLogprobs]] = {r.id: [] for r in todo}
    prompts: dict[str, list[TokenLogprobs]] = {r.id: [] for r in todo}
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
                prompts[event.id] += event.prompt_logprobs
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
        Output(
            id=r.id, tokens=tuple(tokens[r.id]), logprobs=tuple(logprobs[r.id]),
            prompt_logprobs=tuple(prompts[r.id]), ending=endings[r.id],
        )
        for r in todo
    ]  # fmt: skip
