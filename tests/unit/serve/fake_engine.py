"""An engine without a model: it says a given text, slowly or not, fails where told to, and counts who is there."""

from __future__ import annotations

import asyncio
import math

from fewbit.engine.check import check_request
from fewbit.engine.client import Stream
from fewbit.engine.config import EngineConfig
from fewbit.engine.types import (
    Ending,
    EngineDownError,
    EngineInfo,
    Event,
    GenerateRequest,
    QueueFullError,
    Stats,
    TokenLogprobs,
)

EOS = 2


class FakeEngine:
    """A client to nothing. Change its attributes to make it misbehave."""

    def __init__(self, vocab: int, max_model_len: int = 256) -> None:
        self.says: list[int] = []  # the tokens that follow any prompt; then the end of the text
        self.delay_s = 0.0
        self.admit_s = 0.0  # how long it takes to accept a request
        self.hold_after: int | None = None  # so many tokens, and none more until this is changed
        self.fail_after: int | None = None  # so many tokens, then an error
        self.abort_after: int | None = None
        self.die_after: int | None = None
        self.room = math.inf  # for so many requests
        self.down = self.full = self.hung = False
        self.running: dict[str, Stream] = {}
        self.seen: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.output_tokens = 0
        self._tasks: set[asyncio.Task] = set()
        self._config = EngineConfig(
            device="cpu",
            block_size=16,
            num_blocks=64,
            token_bytes=1,
            max_batch=64,
            max_batch_tokens=64,
            max_model_len=max_model_len,
            prefix_cache=True,
            policy="max_utilization",
            max_queued=64,
            seed=None,
            vocab=vocab,
            eos_token_ids=(EOS,),
        )

    @property
    def info(self) -> EngineInfo:
        c = self._config
        return EngineInfo(
            vocab=c.vocab,
            max_model_len=c.max_model_len,
            max_batch=c.max_batch,
            max_queued=c.max_queued,
            block_size=c.block_size,
            eos_token_ids=c.eos_token_ids,
        )

    async def submit(self, request: GenerateRequest) -> Stream:
        if self.admit_s:
            await asyncio.sleep(self.admit_s)
        if self.full or len(self.running) >= self.room:
            raise QueueFullError("64 requests are waiting; retry later")
        check_request(request, self._config)
        assert request.id not in self.running
        self.seen.append(request)
        stream = self.running[request.id] = Stream(request.id, self.abort)
        task = asyncio.create_task(self._say(request, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def abort(self, request_id: str) -> None:
        if (stream := self.running.pop(request_id, None)) is not None:
            self.aborted.append(request_id)
            stream.push(Event(request_id, ending=Ending("abort", prompt_tokens=1, cached_tokens=16)))

    async def stats(self) -> Stats:
        if self.hung:
            await asyncio.sleep(60)
        held = len(self.running)
        return Stats(
            running=held, blocks=64, blocks_used=held, blocks_free=64 - held, output_tokens_total=self.output_tokens
        )

    def health(self) -> None:
        if self.down:
            raise EngineDownError("the engine process is gone")

    async def close(self) -> None:
        for i in list(self.running):
            self.abort(i)

    async def _say(self, request: GenerateRequest, stream: Stream) -> None:
        p = request.params
        said = 0
        if p.prompt_logprobs is not None:
            self._echo(request, stream, p.prompt_logprobs)
        if p.max_tokens == 0:
            await asyncio.sleep(self.delay_s)
            if request.id in self.running:
                self._end(stream, request, 0, "length")
            return None
        for token in [*self.says, EOS]:
            await asyncio.sleep(self.delay_s)
            while said == self.hold_after and request.id in self.running:
                await asyncio.sleep(0.005)
            if request.id not in self.running:
                return
            if said == self.fail_after:
                return self._end(stream, request, said, "error", detail="a step of the engine failed: out of memory")
            if said == self.abort_after:
                return self._end(stream, request, said, "abort")
            if token == EOS and not p.ignore_eos:
                return self._end(stream, request, said, "stop", stop_token=EOS)
            if token in p.stop_token_ids and said >= p.min_tokens:
                return self._end(stream, request, said, "stop", stop_token=token)
            said += 1
            self.output_tokens += 1
            logprobs = None if p.logprobs is None else self._logprobs(token, p.logprobs)
            if said == p.max_tokens:
                return self._end(stream, request, said, "length", token=token, logprobs=logprobs)
            stream.push(Event(request.id, token, logprobs))
        return self._end(stream, request, said, "length")

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        values = (-0.5, -1.5, -math.inf, -3.0, -4.0)
        vocab = self._config.vocab
        return TokenLogprobs(-0.5, tuple(((token + i) % vocab, values[i % 5]) for i in range(count)))

    def _echo(self, request: GenerateRequest, stream: Stream, count: int) -> None:
        """Log probabilities of all prompt tokens but the first, over several events as a long prompt has them."""
        known = [self._logprobs(token, count) for token in request.prompt[1:]]
        for at in range(0, len(known), 4):
            stream.push(Event(request.id, prompt_logprobs=tuple(known[at : at + 4])))

    def _end(self, stream, request, said, reason, token=None, logprobs=None, **more) -> None:
        self.running.pop(request.id, None)
        ending = Ending(reason, prompt_tokens=len(request.prompt), output_tokens=said, cached_tokens=3, **more)
        stream.push(Event(request.id, token, logprobs, ending))
