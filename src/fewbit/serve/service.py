"""One model, ready to answer: its engine, its tokenizer, and how what a client says becomes jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import msgspec

from fewbit.engine.check import check_params
from fewbit.engine.types import EngineDownError, GenerateRequest, SamplingParams, Stats
from fewbit.errors import FewbitError, RequestError
from fewbit.serve.exchange import current
from fewbit.serve.generation import Job, Running, start
from fewbit.serve.metrics import ModelMetrics
from fewbit.serve.schema import MAX_CUT_CHARS, MAX_REPORTED
from fewbit.text import Tokenizer

if TYPE_CHECKING:
    from fewbit.engine.client import EngineClient

_GENERATE_S = 10.0
_FIRST = -1000  # before requests of any sensible priority
_PROBE_S = 4.0  # an engine that does not answer within this is down
_LONG_CHARS = 20_000  # texts from here on are tokenized beside the event loop


class Service:
    """One model, served.

    Args:
        client: The engine; it belongs to the caller, who closes it.
        tokenizer: The model's.
        name: What requests call the model.
        metrics: Where its requests are counted.
        max_model_len: Prompt and output together; None: what the engine allows.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        name: str,
        metrics: ModelMetrics,
        max_model_len: int | None = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.name = name
        self.max_model_len = min(max_model_len or client.info.max_model_len, client.info.max_model_len)
        self.metrics = metrics
        self._running: WeakSet[Running] = WeakSet()

    # ---- is it well? ----

    async def probe(self) -> Stats:
        """The engine's figures, as a proof that it answers.

        Raises:
            EngineDownError: It does not.
        """
        self.client.health()
        try:
            return await asyncio.wait_for(self.client.stats(), _PROBE_S)
        except TimeoutError as e:
            raise EngineDownError(f"the engine did not answer within {_PROBE_S:g} s") from e

    async def generate_one(self) -> None:
        """Return if the engine makes a token, before whatever waits.

        Raises:
            EngineDownError: It does not, or not in time.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(id=f"health-{uuid.uuid4().hex}", prompt=(0,), params=params, priority=_FIRST)
        try:
            async with asyncio.timeout(_GENERATE_S), aclosing(await self.client.submit(request)) as stream:
                async for event in stream:
                    if event.ending is not None and event.ending.reason == "error":
                        raise EngineDownError(f"the engine failed to make a token: {event.ending.detail}")
        except TimeoutError as e:
            raise EngineDownError(f"the engine did not make a token within {_GENERATE_S:g} s") from e

    # ---- from what a client says to jobs ----

    def check_params(self, params: SamplingParams) -> None:
        """Raise a RequestError for a value that the engine would refuse."""
        check_params(params, self.client.info.vocab)

    async def encode(self, text: str, add_special_tokens: bool = True, last: int | None = None) -> list[int]:
        """Tokens of a prompt; hopelessly long ones are refused before any work is done on them.

        Args:
            text: The prompt.
            add_special_tokens: As `Tokenizer.encode` has it.
            last: Only the last so many; None: all.

        Raises:
            RequestError: It is too long, or no text.
        """
        self.check_length(text, last)
        if last is not None:
            return (await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens))[-last:]
        if len(text) < _LONG_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def check_length(self, text: str, last: int | None = None) -> None:
        """Raise a RequestError for a text that is too long to be looked at; see `encode`."""
        if last is not None:
            if len(text) > MAX_CUT_CHARS:
                raise RequestError(f"the prompt has {len(text)} characters, more than {MAX_CUT_CHARS} to cut", "prompt")
            return
        least = -(-len(text) // self.tokenizer.longest_token)
        if least > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(text)} characters, {least} tokens at the very least, and the model length is "
                f"{self.max_model_len}, prompt and output together: shorten it",
                "prompt",
            )

    def job(self, prompt: Sequence[int], params: SamplingParams, limited: bool, **cut: Any) -> Job:
        """A job that the engine has room for.

        Args:
            prompt: Token ids.
            params: As the client gave them.
            limited: Whether the client gave `max_tokens`; the default gives way to a long prompt.
            **cut: More fields of `Job`.

        Raises:
            RequestError: No room, or an id outside the vocabulary.
        """
        room, vocab = self.max_model_len - len(prompt), self.client.info.vocab
        if not prompt:
            raise RequestError("the prompt is empty: at least one token is needed", "prompt")
        if not (min(prompt) >= 0 and max(prompt) < vocab):
            wrong = next(t for t in prompt if not 0 <= t < vocab)
            raise RequestError(f"the prompt holds token id {wrong}, outside the vocabulary of {vocab}", "prompt")
        least = 1 if params.max_tokens else 0
        if room < least:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the model length is {self.max_model_len}, prompt and output "
                f"together: shorten it to at most {self.max_model_len - least}",
                "prompt",
            )
        wanted = params.max_tokens if limited else min(params.max_tokens, room)
        if wanted > room:
            raise RequestError(
                f"prompt {len(prompt)} + max_tokens {wanted} = {len(prompt) + wanted} tokens exceed the model length "
                f"of {self.max_model_len}: ask for at most {room} or shorten the prompt",
                "max_tokens",
            )
        if params.min_tokens > wanted:
            raise RequestError(f"min_tokens {params.min_tokens} exceeds the room of {wanted} tokens", "min_tokens")
        return Job(tuple(prompt), msgspec.structs.replace(params, max_tokens=wanted), **cut)

    async def start(self, jobs: Sequence[Job]) -> list[Running]:
        """Submit jobs, or raise before anything runs."""
        _check_reported(jobs)
        exchange = current()
        exchange.model, exchange.submitted = self.name, time.perf_counter()
        running = await start(self.client, self.tokenizer, self.metrics, jobs)
        self._running.update(running)
        return running

    def end_all(self) -> None:
        """End what runs; clients are told."""
        for running in list(self._running):
            running.abort()


def renamed(error: FewbitError, names: dict[str, str]) -> FewbitError:
    """The same error, about the field as the client calls it."""
    if isinstance(error, RequestError) and type(error) is RequestError and error.param in names:
        name = names[error.param]
        text = str(error) if error.param == "prompt" else str(error).replace(error.param, name)
        return RequestError(text, name)
    return error


def _check_reported(jobs: Sequence[Job]) -> None:
    """What is told about prompts must be possible to tell."""
    about = [job for job in jobs if job.params.prompt_logprobs is not None]
    reported = sum(len(job.prompt) * ((job.params.prompt_logprobs or 0) + 1) for job in about)
    if reported > MAX_REPORTED:
        raise RequestError(
            f"the prompts have {sum(len(job.prompt) for job in about)} tokens, which with their alternatives are "
            f"{reported} log-probabilities, more than {MAX_REPORTED}: send fewer prompts or ask for fewer alternatives",
            "prompt",
        )


def with_seed(job: Job, seed: int | None) -> Job:
    """The same job with another seed."""
    return dataclasses.replace(job, params=msgspec.structs.replace(job.params, seed=seed))
