"""One way to answer for completions and chat: submit, then answer whole or as a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from fewbit.serve.body import aside
from fewbit.serve.connection import EventStream, body_of
from fewbit.serve.exchange import current
from fewbit.serve.generation import Finish, Job, Piece, Result, Running, collect, pieces
from fewbit.serve.openai.requests import Sampled, seed_of
from fewbit.serve.openai.shapes import new_id, usage_so_far
from fewbit.serve.problems import json_bytes, json_response, openai_error, problem_of
from fewbit.serve.service import Service, with_seed

DONE = b"data: [DONE]\n\n"

Chunk = dict[str, Any]


class Coat(Protocol):
    """What differs between completions and chat."""

    @property
    def body(self) -> Sampled:
        """What was asked."""
        ...

    @property
    def service(self) -> Service:
        """The model that answers."""
        ...

    async def jobs(self) -> list[Job]:
        """One job a prompt."""
        ...

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def opening(self, choices: int) -> Iterable[Chunk]:
        """Chunks that come before anything is generated."""
        ...

    def chunks(self, index: int, piece: Piece) -> Iterable[Chunk]:
        """What a piece of a choice adds: nothing, while its text is held back."""
        ...

    def closing(self, finishes: Sequence[Finish]) -> Chunk:
        """The chunk of token counts."""
        ...


def request_id(body: Sampled) -> str:
    """What the client calls the request, in the body or in a header; the log and the answer's header call it so too."""
    exchange = current()
    exchange.id = body.request_id or exchange.id or new_id()
    return exchange.id


async def jobs_of(coat: Coat) -> list[Job]:
    """What the engine has to do for a request: `n` jobs a prompt, those of one prompt together."""
    return [with_seed(job, seed_of(coat.body.seed, k)) for job in await coat.jobs() for k in range(coat.body.choices)]


async def answer(request: Request, coat: Coat) -> Response:
    """Everything was checked that needs no tokens: submit and answer."""
    service, jobs = coat.service, await jobs_of(coat)
    if coat.body.stream:
        return EventStream(_stream(coat, jobs, await service.start(jobs)))

    async def work() -> Response:
        results = await collect(await service.start(jobs))
        size = sum(j.size_bytes(len(r.ids) + len(r.prompt_logprobs)) for j, r in zip(jobs, results, strict=True))
        return await aside(size, lambda: json_response(coat.whole(results)))

    return await body_of(request, work())


async def _stream(coat: Coat, jobs: Sequence[Job], running: Sequence[Running]) -> AsyncGenerator[bytes, None]:
    """The blocks of a stream; a failure on the way is a block too, since the status is long sent."""
    body = coat.body
    prompt, output = sum(len(job.prompt) for job in jobs[:: body.choices]), 0
    done: dict[int, Finish] = {}

    def block(chunk: Chunk) -> bytes:
        if body.wants_usage:
            chunk["usage"] = usage_so_far(prompt, output) if body.wants_running_usage else None
        return _data(chunk)

    def blocks(i: int, piece: Piece) -> list[bytes]:
        return [block(chunk) for chunk in coat.chunks(i, piece)]

    try:
        for chunk in coat.opening(len(running)):
            yield block(chunk)
        async with aclosing(pieces(running)) as all_pieces:
            async for i, piece in all_pieces:
                output += piece.token is not None
                if piece.finish is not None:
                    done[i] = piece.finish
                about_prompt = len(jobs[i].prompt) if piece.prompt_logprobs else 0
                for made in await aside(jobs[i].size_bytes(about_prompt), blocks, i, piece):
                    yield made
        if body.wants_usage:
            yield _data(coat.closing([done[i] for i in range(len(running))]))
    except Exception as e:  # house: the status is sent long ago; what was not foreseen is logged by problem_of
        yield _data(openai_error(problem_of(e)))
    yield DONE


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"
