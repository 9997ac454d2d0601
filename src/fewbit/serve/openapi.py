"""GET /openapi.json: what every route of the server takes and gives, from the types that the code itself uses.

A route says it where it is added: `add_api_route(..., openapi_extra=operation(body=X, answer=Y))`; one that is there
only to say that something is not supported, with `include_in_schema=False`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from typing_extensions import TypedDict

from fewbit.serve.problems import json_response
from fewbit.version import __version__

PATH = "/openapi.json"
_REF = "#/components/schemas/{model}"


class ErrorDetails(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: int


class Error(TypedDict):
    """An error of OpenAI's routes."""

    error: ErrorDetails


class KServeError(TypedDict):
    """An error of the v2 protocol."""

    error: str


@dataclass(frozen=True)
class Operation:
    """What a route takes and gives.

    Attributes:
        body: The type of the JSON that it takes; None: none.
        answer: The type of the JSON that it gives; None: none.
        stream: The type of the objects in its stream of events, where it gives one; they are `data:` lines.
        media: The media type of an answer that is no JSON.
    """

    body: Any = None
    answer: Any = None
    stream: Any = None
    media: str | None = None


def operation(**fields: Any) -> dict[str, Any]:
    """An `Operation` as `add_api_route` takes it for `openapi_extra`."""
    return {"operation": Operation(**fields)}


def add_route(app: FastAPI) -> None:
    """Serve the document of all routes that `app` will have by the first time it is asked for."""
    made: list[dict[str, Any]] = []

    async def openapi(request: Request) -> Response:
        """This document."""
        if not made:
            made.append(document(app))
        return json_response(made[0])

    app.add_api_route(PATH, openapi, methods=["GET"], openapi_extra=operation(answer=dict[str, Any]))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application's routes."""
    found = [(route, _operation(route)) for route in flat(app.routes) if route.include_in_schema]
    schemas, definitions = _schemas([described for _, described in found])
    paths: dict[str, dict[str, Any]] = {}
    for route, described in found:
        for method in sorted(route.methods or ()):
            entry = _entry(route, described, schemas, method)
            paths.setdefault(route.path_format, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "fewbit", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def flat(routes: Sequence[BaseRoute]) -> Iterator[APIRoute]:
    """All routes; newer releases of FastAPI keep those of an included router in that."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from flat(router.routes)


def _operation(route: APIRoute) -> Operation:
    described = (route.openapi_extra or {}).get("operation")
    return described if isinstance(described, Operation) else Operation()


def _schemas(described: list[Operation]) -> tuple[dict[tuple[Any, str], Any], dict[str, Any]]:
    """The schema of each type by (type, mode), and those that they refer to by name."""
    wanted: dict[tuple[Any, str], TypeAdapter[Any]] = {}
    for one in described:
        for kind, mode in ((one.body, "validation"), (one.answer, "serialization"), (one.stream, "serialization")):
            if kind is not None:
                wanted.setdefault((kind, mode), TypeAdapter(kind))
    for kind in (Error, KServeError):
        wanted[kind, "serialization"] = TypeAdapter(kind)
    keys = list(wanted)
    inputs = [(i, mode, wanted[kind, mode]) for i, (kind, mode) in enumerate(keys)]
    made, rest = TypeAdapter.json_schemas(inputs, ref_template=_REF)  # type: ignore[arg-type]
    definitions = rest.get("$defs", {})
    for schema in definitions.values():
        if "properties" in schema:  # of answers too: nothing comes that is not said here
            schema.setdefault("additionalProperties", False)
            for field in schema["properties"].values():
                field.pop("title", None)  # the name once more
                if field.get("default", 0) in (None, []):
                    del field["default"]  # to leave a field out and to say null is the same
    return {keys[i]: schema for (i, _), schema in made.items()}, definitions


def _entry(route: APIRoute, one: Operation, schemas: dict[tuple[Any, str], Any], method: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "operationId": f"{method.lower()}{route.path_format}",
        "summary": (inspect.getdoc(route.endpoint) or route.name).partition("\n")[0],
        "responses": dict(_responses(route, one, schemas, method)),
    }
    if names := list(route.param_convertors):
        text = {"type": "string", "minLength": 1}
        entry["parameters"] = [{"name": n, "in": "path", "required": True, "schema": text} for n in names]
    if one.body is not None:
        content = {"application/json": {"schema": schemas[one.body, "validation"]}}
        entry["requestBody"] = {"required": True, "content": content}
    return entry


def _responses(
    route: APIRoute, one: Operation, schemas: dict[tuple[Any, str], Any], method: str
) -> Iterator[tuple[str, Any]]:
    content: dict[str, Any] = {}
    if one.answer is not None:
        content["application/json"] = {"schema": schemas[one.answer, "serialization"]}
    if one.stream is not None:
        # As OpenAPI 3.2 says it: an event is an object, and what is in its `data:` line is JSON as text.
        told = {"contentMediaType": "application/json", "contentSchema": schemas[one.stream, "serialization"]}
        item = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", **told}}}
        content["text/event-stream"] = {"x-itemSchema": item}
    if one.media is not None:
        content[one.media] = {"schema": {"type": "string"}}
    if method == "HEAD":
        content = {}
    yield "200", {"description": "The answer.", **({"content": content} if content else {})}
    error = schemas[KServeError if route.path_format.startswith("/v2") else Error, "serialization"]
    for status, text in (("4XX", "What is wrong with the request."), ("5XX", "Why it cannot be answered.")):
        no_body = method == "HEAD"
        shape = {} if no_body else {"content": {"application/json": {"schema": error}}}
        yield status, {"description": text, **shape}
