"""What the routes share: the engine, the tokenizer, the model's name, and whether the server is shutting down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import msgspec

from fewbit.engine.check import check_params
from fewbit.engine.types import EngineDownError, OverloadedError, SamplingParams, Stats
from fewbit.errors import FewbitError, RequestError
from fewbit.serve.body import shown
from fewbit.serve.generation import Job, Running, start
from fewbit.serve.metrics import Metrics
from fewbit.serve.problems import UnknownModelError
from fewbit.text import Tokenizer

if TYPE_CHECKING:
    from fewbit.engine.client import EngineClient

_PROBE_S = 4.0  # an engine that does not answer within this is down
_LONG_CHARS = 20_000  # texts from here on are tokenized beside the event loop


class Service:
    """One model, served.

    Attributes:
        draining: No new work is taken; what runs may finish.
        in_flight: Requests that are being answered.
    """

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, model_name: str, max_model_len: int | None = None
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.max_model_len = min(max_model_len or client.info.max_model_len, client.info.max_model_len)
        self.metrics = Metrics(model_name)
        self.draining = False
        self.in_flight = 0
        self._running: WeakSet[Running] = WeakSet()

    # ---- is it well? ----

    def check_ready(self) -> None:
        """Return if new work is welcome.

        Raises:
            OverloadedError: The server is shutting down.
            EngineDownError: The engine is dead or hung.
        """
        if self.draining:
            raise OverloadedError("the server is shutting down and takes no new requests")
        self.client.health()

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

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts a request that shutting down waits for."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    # ---- from what a client says to jobs ----

    def check_model(self, name: str | None, *aliases: str) -> None:
        """Raise unless `name` is the model that is served (None: the client does not care)."""
        if name is not None and name not in (self.model_name, *aliases):
            raise UnknownModelError(f"the model '{shown(name)}' is not served here, '{self.model_name}' is", "model")

    def check_params(self, params: SamplingParams) -> None:
        """Raise a RequestError for a value that the engine would refuse."""
        check_params(params, self.client.info.vocab)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a prompt; hopelessly long ones are refused before any work is done on them."""
        least = -(-len(text) // self.tokenizer.longest_token)
        if least >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(text)} characters, {least} tokens at the very least, and the model length is "
                f"{self.max_model_len}, prompt and output together: shorten it",
                "prompt",
            )
        if len(text) < _LONG_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of a chat, up to where the assistant speaks."""
        template = self.tokenizer.chat_template
        if template is None:
            raise RequestError("this model has no chat template; send a text to /v1/completions", "messages")
        text = await asyncio.to_thread(template.render, messages)
        return await self.encode(text, add_special_tokens=False)

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
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the model length is {self.max_model_len}, prompt and output "
                f"together: shorten it to at most {self.max_model_len - 1}",
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


def with_seed(job: Job, seed: int | None) -> Job:
    """The same job with another seed."""
    return dataclasses.replace(job, params=msgspec.structs.replace(job.params, seed=seed))
