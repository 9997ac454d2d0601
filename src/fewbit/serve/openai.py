"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fewbit.errors import FewbitError
from fewbit.serve import shapes
from fewbit.serve.body import read_object
from fewbit.serve.connection import EventStream, body_of
from fewbit.serve.generation import Finish, Job, Piece, Result, Running, collect, pieces
from fewbit.serve.problems import json_bytes, json_response, openai_error, problem_of, validated
from fewbit.serve.schema import ChatRequest, CompletionRequest, Sampled, seed_of, without_neutral
from fewbit.serve.service import Service, renamed, with_seed

DONE = b"data: [DONE]\n\n"


class Coat(Protocol):
    """What differs between completions and chat."""

    whole: shapes.Envelope
    chunk: shapes.Envelope

    @property
    def body(self) -> Sampled:
        """What was asked."""
        ...

    async def jobs(self) -> list[Job]:
        """One job a prompt."""
        ...

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """A whole choice."""
        ...

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Choices of the chunks that come before any text."""
        ...

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        ...


def routes(service: Service) -> APIRouter:
    """The router of one service."""
    router = APIRouter()
    began = int(time.time())

    @router.get("/v1/models")
    async def models() -> Response:
        card = {
            "id": service.model_name,
            "object": "model",
            "created": began,
            "owned_by": "fewbit",
            "root": service.model_name,
            "parent": None,
            "max_model_len": service.max_model_len,
            "permission": [],
        }
        return json_response({"object": "list", "data": [card]})

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = _parsed(CompletionRequest, await read_object(request))
        return await _answer(service, request, Completion(service, body))

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = _parsed(ChatRequest, await read_object(request))
        return await _answer(service, request, Chat(service, body))

    return router


def _parsed(model: type[Any], fields: dict[str, Any]) -> Any:
    body = validated(model, without_neutral(model, fields), model.nested)
    body.check()
    return body


class Completion:
    """The coat of /v1/completions."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.body, self._service = body, service
        self.params = body.sampling(logprobs=body.logprobs)
        service.check_params(self.params)
        self.whole = self.chunk = shapes.Envelope("text_completion", service.model_name, "cmpl")
        self._echoes: list[str] = []
        self._offsets: dict[int, shapes.CompletionLogprobs] = {}

    async def jobs(self) -> list[Job]:
        """See `Coat`."""
        service, jobs = self._service, []
        for prompt in self.body.prompts:
            ids = await service.encode(prompt) if isinstance(prompt, str) else prompt
            jobs.append(
                service.job(ids, self.params, self.body.max_tokens is not None, continues=True, **_cut(self.body))
            )
            if self.body.echo:
                self._echoes.append(prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt))
        return jobs

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """See `Coat`."""
        text = self._echo(index) + result.text
        return shapes.completion_choice(index, text, result.finish, self._logprobs(index, result.tokens))

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """See `Coat`."""
        if not self.body.echo:
            return []
        return [shapes.completion_choice(i, self._echo(i), None, None) for i in range(choices)]

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """See `Coat`."""
        return shapes.completion_choice(index, piece.text, piece.finish, self._logprobs(index, _tokens(piece)))

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.body.choices] if self.body.echo else ""

    def _logprobs(self, index: int, tokens: shapes.Tokens) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        if index not in self._offsets:
            self._offsets[index] = shapes.CompletionLogprobs(self._service.tokenizer)
        return self._offsets[index].of(tokens)


class Chat:
    """The coat of /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.body, self._service = body, service
        limit = service.max_model_len if body.limit_tokens is None else body.limit_tokens
        self.params = body.sampling(max_tokens=limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        self._names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if body.max_completion_tokens is not None:
            self._names["max_tokens"] = "max_completion_tokens"
        try:
            service.check_params(self.params)
        except FewbitError as e:
            raise renamed(e, self._names) from e
        self.whole = shapes.Envelope("chat.completion", service.model_name, "chatcmpl")
        self.chunk = shapes.Envelope("chat.completion.chunk", service.model_name, "chatcmpl")

    async def jobs(self) -> list[Job]:
        """See `Coat`."""
        try:
            ids = await self._service.render([m.template_fields() for m in self.body.messages])
            return [self._service.job(ids, self.params, self.body.limit_tokens is not None, **_cut(self.body))]
        except FewbitError as e:
            raise renamed(e, self._names) from e

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """See `Coat`."""
        return shapes.chat_choice(index, result.text, result.finish, self._logprobs(result.tokens))

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """See `Coat`."""
        return [shapes.chat_delta(i, {"role": "assistant", "content": ""}) for i in range(choices)]

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """See `Coat`."""
        delta = {"content": piece.text} if piece.text else {}
        return shapes.chat_delta(index, delta, piece.finish, self._logprobs(_tokens(piece)))

    def _logprobs(self, tokens: shapes.Tokens) -> dict[str, Any] | None:
        return shapes.chat_logprobs(self._service.tokenizer, tokens) if self.body.logprobs else None


def _cut(body: Sampled) -> dict[str, Any]:
    return {
        "stop": body.stop,
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
    }


def _tokens(piece: Piece) -> shapes.Tokens:
    return [(piece.token, piece.logprobs)] if piece.token is not None and piece.logprobs is not None else []


async def _answer(service: Service, request: Request, coat: Coat) -> Response:
    """Everything was checked that needs no model: look it up, submit, answer whole or as a stream."""
    body = coat.body
    service.check_model(body.model)
    service.check_ready()
    jobs = await coat.jobs()
    jobs = [with_seed(job, seed_of(body.seed, k)) for job in jobs for k in range(body.choices)]
    prompts = len(jobs) // body.choices
    if body.stream:
        return EventStream(_stream(coat, await service.start(jobs), prompts))

    async def work() -> list[Result]:
        return await collect(await service.start(jobs))

    results = await body_of(request, work())
    choices = [coat.choice(i, result) for i, result in enumerate(results)]
    return json_response(coat.whole.wrap(choices, usage=shapes.usage((r.finish for r in results), prompts)))


async def _stream(coat: Coat, running: Sequence[Running], prompts: int) -> AsyncGenerator[bytes, None]:
    """The blocks of a stream; a failure on the way is a block too, since the status is long sent."""
    no_usage: dict[str, Any] = {"usage": None} if coat.body.wants_usage else {}
    done: dict[int, Finish] = {}
    try:
        for choice in coat.opening(len(running)):
            yield _data(coat.chunk.wrap([choice], **no_usage))
        async with aclosing(pieces(running)) as all_pieces:
            async for i, piece in all_pieces:
                if piece.finish is not None:
                    done[i] = piece.finish
                elif not piece.text and piece.logprobs is None:
                    continue  # held back: half a character, or what may become a stop string
                yield _data(coat.chunk.wrap([coat.delta(i, piece)], **no_usage))
        if coat.body.wants_usage:
            yield _data(coat.chunk.wrap([], usage=shapes.usage((done[i] for i in range(len(running))), prompts)))
    except Exception as e:  # house: the status is sent long ago; what was not foreseen is logged by problem_of
        yield _data(openai_error(problem_of(e)))
    yield DONE


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"
