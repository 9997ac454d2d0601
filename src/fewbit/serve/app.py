"""The application: both protocols, health and metrics over the models of one server."""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict

from fewbit.engine.types import Stats
from fewbit.errors import FewbitError
from fewbit.serve import kserve, logs, openai, openapi, page
from fewbit.serve.auth import Gate
from fewbit.serve.exchange import current, exchange, seconds_of
from fewbit.serve.models import LEASES, Models
from fewbit.serve.openapi import operation
from fewbit.serve.problems import GenerationError, Problem, error_response, json_response, problem_of
from fewbit.serve.tracing import NoTraces, Traces
from fewbit.version import __version__

_ID = b"x-request-id"


@dataclass(frozen=True)
class Manner:
    """How an application treats requests, whatever they ask for.

    Attributes:
        gate: Who may ask.
        timeout_s: How long a request may take; None: as long as it does. A client may say less.
        traces: Where spans go.
    """

    gate: Gate = field(default_factory=Gate)
    timeout_s: float | None = None
    traces: Traces = field(default_factory=NoTraces)


def create_app(models: Models, triton: kserve.Options | None = None, manner: Manner | None = None) -> FastAPI:
    """An ASGI application.

    Args:
        models: That it serves; it has them as `app.state.models`.
        triton: How it speaks the v2 protocol; the `kserve.Front` is `app.state.front`.
        manner: How it treats requests.
    """
    app = bare_app(models, manner or Manner())
    app.state.front = front = kserve.Front(models, triton)
    app.include_router(openai.routes(models))
    app.include_router(kserve.routes(front))
    app.include_router(page.routes())
    for path, check in (("/health", _health), ("/ping", _health), ("/health_generate", _health_generate)):
        app.add_api_route(path, check, methods=["GET", "HEAD"], openapi_extra=operation())
    app.add_api_route("/version", _version, methods=["GET"], openapi_extra=operation(answer=Version))
    app.add_api_route("/metrics", _metrics, methods=["GET", "HEAD"], openapi_extra=operation(media="text/plain"))
    openapi.add_route(app)
    return app


def bare_app(models: Models, manner: Manner) -> FastAPI:
    """An application without routes, for them to be added."""
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(
        title="fewbit", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.models = models
    for kind in (FewbitError, GenerationError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_middleware(_Outermost, models=models, manner=manner)
    return app


class Version(TypedDict):
    """Of fewbit."""

    version: str


async def _version(request: Request) -> Response:
    """The version of the server."""
    answer: Version = {"version": __version__}
    return json_response(answer)


async def _health(request: Request) -> Response:
    """200 only while the engine answers."""
    models: Models = request.app.state.models
    await models.check_ready()
    return Response()


async def _health_generate(request: Request) -> Response:
    """Not only whether the engines answer, but whether each of them makes a token."""
    models: Models = request.app.state.models
    await models.check_generates()
    return Response()


async def _metrics(request: Request) -> Response:
    """Prometheus."""
    models: Models = request.app.state.models
    stats: dict[str, Stats | None] = {}
    for service in models.ready:
        try:
            stats[service.name] = await service.probe()
        except FewbitError:
            stats[service.name] = None
    return Response(models.metrics.render(stats), media_type=CONTENT_TYPE_LATEST)


async def _on_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    models: Models = request.app.state.models
    models.metrics.rejected(problem.kind)
    return error_response(problem, request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    kinds = {404: "NotFoundError", 405: "MethodNotAllowedError"}
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = error_response(
        Problem(error.status_code, kinds.get(error.status_code, "BadRequestError"), text), request.url.path
    )
    response.headers.update(error.headers or {})
    return response


async def _on_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the metrics."""
    return Response(status_code=499)


class _Outermost:
    """What is done for every request.

    It gets an id and a time limit, passes the gate or does not, is counted, logged and traced; and what nothing else
    caught becomes an error of the right shape.
    """

    def __init__(self, app: ASGIApp, models: Models, manner: Manner) -> None:
        self._app, self._models, self._manner = app, models, manner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        metrics, status = self._models.metrics, 0
        working = self._models.answering() if scope["method"] == "POST" else contextlib.nullcontext()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_ID, asked.id.encode())]
                metrics.answered(_route(scope), status)
            await send(message)

        with exchange(_header(scope, _ID)) as asked, self._manner.traces.request(scope, asked) as span:
            try:
                if (refusal := self._manner.gate.refusal(scope)) is not None:
                    metrics.rejected(refusal.kind)
                    return await error_response(refusal, scope["path"])(scope, receive, counted)
                self._limit(scope)
                with working:
                    async with AsyncExitStack() as scope[LEASES]:
                        await self._app(scope, receive, counted)
            except Exception as e:  # house: the log has it, the client gets a 500, the server goes on
                problem = problem_of(e)
                if not status:
                    metrics.rejected(problem.kind)
                    await error_response(problem, scope["path"])(scope, receive, counted)
            finally:
                span.end(_route(scope), status)
                logs.answered(asked, scope["method"], _route(scope), status)

    def _limit(self, scope: Scope) -> None:
        if self._manner.timeout_s is not None:
            current().limit(self._manner.timeout_s)
        if (text := _header(scope, b"x-request-timeout")) is not None:
            current().limit(seconds_of(text))


def _header(scope: Scope, name: bytes) -> str | None:
    """The value of a header; None: it is not there."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _route(scope: Scope) -> str:
    """The path of the route that answers, or would if the gate had let it; it is not of the client's making."""
    routes = openapi.flat(scope["app"].routes)
    route = scope.get("route") or next((route for route in routes if route.matches(scope)[0] is not Match.NONE), None)
    return getattr(route, "path", "other")
