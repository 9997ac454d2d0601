"""The application: both protocols, health and metrics over one service."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewbit.errors import FewbitError
from fewbit.serve import kserve, openai
from fewbit.serve.problems import GenerationError, Problem, error_response, problem_of
from fewbit.serve.service import Service
from fewbit.text import Tokenizer
from fewbit.version import __version__

if TYPE_CHECKING:
    from fewbit.engine.client import EngineClient


def create_app(
    client: EngineClient, tokenizer: Tokenizer, model_name: str, max_model_len: int | None = None
) -> FastAPI:
    """An ASGI application that serves one model.

    Args:
        client: The engine; it belongs to the caller, who closes it.
        tokenizer: The model's.
        model_name: What requests call the model.
        max_model_len: Prompt and output together; None: what the engine allows.

    Returns:
        The application; `app.state.service` is its `Service`.
    """
    service = Service(client, tokenizer, model_name, max_model_len)
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(
        title="fewbit", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.include_router(openai.routes(service))
    app.include_router(kserve.routes(service))
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/metrics", _metrics, methods=["GET", "HEAD"])
    for kind in (FewbitError, GenerationError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_middleware(_Outermost, service=service)
    return app


async def _health(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_ready()
    await service.probe()
    return Response()


async def _metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    try:
        stats = await service.probe()
    except FewbitError:
        stats = None
    return Response(service.metrics.render(stats), media_type=CONTENT_TYPE_LATEST)


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(problem_of(error), request.url.path)


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
    """Counts requests and answers, and turns what nothing else caught into an error of the right shape."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False
        working = self._service.answering() if scope["method"] == "POST" else contextlib.nullcontext()

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = scope.get("route")
                self._service.metrics.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            with working:
                await self._app(scope, receive, counted)
        except Exception as e:  # house: the log has it, the client gets a 500, the server goes on
            problem = problem_of(e)
            if not begun:
                await error_response(problem, scope["path"])(scope, receive, counted)
