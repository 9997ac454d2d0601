"""The v2 protocol over HTTP: health, metadata, inference, generate, statistics, the model repository."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from fewbit.errors import RequestError
from fewbit.serve.body import aside, packed, parse_optional, read_body, read_object
from fewbit.serve.connection import EventStream, body_of
from fewbit.serve.kserve import describe, generate, repository
from fewbit.serve.kserve.front import Front
from fewbit.serve.kserve.messages import HEADER_LENGTH, InferAnswer, InferBody, InferRequest, parse, render
from fewbit.serve.kserve.tensors import Tensor
from fewbit.serve.openapi import operation
from fewbit.serve.problems import UnimplementedError, json_bytes, json_response, kserve_error, problem_of
from fewbit.serve.service import Service

_MODEL = "/v2/models/{model}"
_Object = dict[str, Any]


class Live(TypedDict):
    """That the process is there."""

    live: bool


class Ready(TypedDict):
    """That requests would be answered now; if not, the answer is an error."""

    ready: bool


def routes(front: Front) -> APIRouter:
    """What clients use.

    Args:
        front: The models by the protocol's names.
    """
    router, coat = APIRouter(), _Http(front)

    def add(method: str, path: str, handler: Any, **said: Any) -> None:
        paths = [path]
        if path.startswith(_MODEL):  # everything that is said of a model may be said of its version
            paths.append(path.replace(_MODEL, _MODEL + "/versions/{version}", 1))
        refuses = handler in (coat.fixed, coat.shared_memory)
        for one in paths:
            router.add_api_route(
                one,
                handler,
                methods=[method, "HEAD"] if one.startswith("/v2/health/") else [method],
                openapi_extra=operation(**said),
                include_in_schema=not refuses,
            )

    add("GET", "/v2", coat.server, answer=_Object)
    add("GET", "/v2/health/live", coat.live, answer=Live)
    add("GET", "/v2/health/ready", coat.ready, answer=Ready)
    add("GET", "/v2/models/stats", coat.all_statistics, answer=_Object)
    add("GET", _MODEL, coat.metadata, answer=_Object)
    add("GET", _MODEL + "/ready", coat.model_ready, answer=Ready)
    add("GET", _MODEL + "/config", coat.config, answer=_Object)
    add("GET", _MODEL + "/stats", coat.statistics, answer=_Object)
    add("POST", _MODEL + "/infer", coat.infer, body=InferBody, answer=InferAnswer)
    add("POST", _MODEL + "/generate", coat.generate, body=_Object, answer=_Object)
    add("POST", _MODEL + "/generate_stream", coat.generate_stream, body=_Object, stream=_Object)
    add("POST", "/v2/repository/index", coat.index, answer=list[repository.Entry])
    add("POST", "/v2/repository/models/{model}/load", coat.load)
    add("POST", "/v2/repository/models/{model}/unload", coat.unload)
    for path in ("/v2/trace/setting", _MODEL + "/trace/setting"):
        add("GET", path, coat.trace, answer=_Object)
        add("POST", path, coat.fixed)
    add("GET", "/v2/logging", coat.logging, answer=_Object)
    add("POST", "/v2/logging", coat.fixed)
    for kind in ("system", "cuda"):
        for method in ("GET", "POST"):
            add(method, f"/v2/{kind}sharedmemory/{{rest:path}}", coat.shared_memory)
    return router


class _Http:
    """The handlers."""

    def __init__(self, front: Front) -> None:
        self._front = front

    # ---- what the server is ----

    async def server(self, request: Request) -> Response:
        """What the server is."""
        return json_response(describe.server())

    async def live(self, request: Request) -> Response:
        """200 while the process is there."""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """200 while requests would be answered."""
        await self._front.models.check_ready()
        return json_response({"ready": True})

    async def trace(self, request: Request) -> Response:
        """The settings of tracing: there is none."""
        return json_response(describe.TRACE_SETTINGS)

    async def logging(self, request: Request) -> Response:
        """The settings of the log."""
        return json_response(describe.LOG_SETTINGS)

    async def fixed(self, request: Request) -> Response:
        """Settings that no request changes."""
        raise UnimplementedError(describe.FIXED)

    async def shared_memory(self, request: Request) -> Response:
        """Shared memory, which is not supported."""
        raise UnimplementedError(describe.NO_SHARED_MEMORY)

    # ---- what its models are ----

    async def metadata(self, request: Request) -> Response:
        """The inputs and outputs of a model."""
        return json_response(describe.metadata(self._front.find(*_name(request))))

    async def config(self, request: Request) -> Response:
        """The config of a model, as Triton writes it."""
        return json_response(describe.config(self._front, self._front.find(*_name(request))))

    async def model_ready(self, request: Request) -> Response:
        """200 while this model would answer."""
        await repository.check_ready(self._front, *_name(request))
        return json_response({"ready": True})

    async def statistics(self, request: Request) -> Response:
        """The counters of a model."""
        return json_response(repository.statistics(self._front, *_name(request)))

    async def all_statistics(self, request: Request) -> Response:
        """The counters of every model."""
        return json_response(repository.statistics(self._front))

    async def index(self, request: Request) -> Response:
        """Every model and its state."""
        fields = await read_body(request, parse_optional)
        return json_response(repository.index(self._front, repository.only_ready(fields)))

    async def load(self, request: Request) -> Response:
        """Load a model."""
        await repository.load(self._front, request.path_params["model"], await _parameters(request))
        return Response()

    async def unload(self, request: Request) -> Response:
        """Unload a model."""
        await repository.unload(self._front, request.path_params["model"], await _parameters(request))
        return Response()

    # ---- inference ----

    async def infer(self, request: Request) -> Response:
        """Tensors in, tensors out."""
        name, version = _name(request)
        length = request.headers.get(HEADER_LENGTH)
        asked, wanted = await read_body(request, lambda body: parse(body, length))
        found = await body_of(request, self._front.infer(name, version, asked, self._lease(request)))
        answer, end = await aside(_size_bytes(found), render, name, asked, found, wanted)
        headers = {} if end is None else {HEADER_LENGTH: str(end)}
        kind = "application/json" if end is None else "application/octet-stream"
        encoding, answer = await aside(len(answer), packed, answer, request.headers.get("accept-encoding", ""))
        if encoding:
            headers["Content-Encoding"] = encoding
        return Response(answer, headers=headers, media_type=kind)

    async def generate(self, request: Request) -> Response:
        """Plain JSON in, plain JSON out."""
        name, version = _name(request)
        asked = generate.parsed(self._front.signature(name), await read_object(request))
        found = await body_of(request, self._front.infer(name, version, asked, self._lease(request)))
        return await aside(_size_bytes(found), lambda: json_response(generate.flat(name, asked, found)))

    async def generate_stream(self, request: Request) -> Response:
        """Plain JSON in, a stream of plain JSON out."""
        name, version = _name(request)
        asked = generate.parsed(self._front.signature(name), await read_object(request))
        parts = self._front.stream(name, version, asked, self._lease(request))

        async def begin() -> list[Tensor] | None:
            return await anext(parts, None)

        # What is wrong with the request shows before the first part: it can still be said with a status.
        return EventStream(_events(name, asked, await body_of(request, begin()), parts))

    def _lease(self, request: Request) -> Any:
        async def lease(model: str | None) -> Service:
            return await self._front.models.service(request, model)

        return lease


async def _events(
    name: str, asked: InferRequest, first: list[Tensor] | None, parts: AsyncGenerator[list[Tensor], None]
) -> AsyncGenerator[bytes, None]:
    """The blocks of a stream; a failure on the way is a block too, since the status is long sent."""
    async with aclosing(parts):
        try:
            if first is not None:
                yield _block(generate.flat(name, asked, first))
            async for part in parts:
                yield _block(generate.flat(name, asked, part))
        except Exception as e:  # house: the status is sent long ago; what was not foreseen is logged by problem_of
            yield _block(kserve_error(problem_of(e)))


def _block(content: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


def _size_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def _name(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


async def _parameters(request: Request) -> dict[str, Any]:
    """Those of a call of the repository; the body may be empty."""
    fields = await read_body(request, parse_optional)
    parameters = fields.pop("parameters", None) or {}
    if fields or not isinstance(parameters, dict):
        raise RequestError("the body must be empty or an object that holds nothing but an object 'parameters'")
    return parameters
