"""Every failure as an HTTP answer: one status a kind, and the two protocols' shapes of an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from fewbit.engine.types import EngineDownError, OverloadedError, QueueFullError
from fewbit.errors import FewbitError, RequestError, nearest_name
from fewbit.serve.body import ENCODINGS, EncodingError, TooLargeError, shown
from fewbit.serve.exchange import RequestTimeoutError

log = logging.getLogger(__name__)

_PLAIN = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_ESCAPED = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

M = TypeVar("M", bound=BaseModel)
_HEADERS = {
    401: {"WWW-Authenticate": 'Bearer realm="fewbit"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
    415: {"Accept-Encoding": ", ".join(ENCODINGS)},
}
_NOTHING: Mapping[str, type[BaseModel]] = MappingProxyType({})


class UnknownModelError(RequestError):
    """A model that is not served here."""


class ForbiddenError(RequestError):
    """Something that this server lets nobody do who asks it this way."""


class UnimplementedError(RequestError):
    """A part of a protocol that this server does not have."""


class GenerationError(Exception):
    """The engine could not go on with a request."""


class Problem(NamedTuple):
    """What the client is told."""

    status: int
    kind: str
    message: str
    param: str | None = None


def problem_of(error: Exception) -> Problem:
    """How an error is answered; what is no fault of the client's and not foreseen is logged with its traceback."""
    param = error.param if isinstance(error, RequestError) else None
    if isinstance(error, TooLargeError):
        return Problem(413, "RequestEntityTooLargeError", str(error))
    if isinstance(error, EncodingError):
        return Problem(415, "UnsupportedMediaTypeError", str(error))
    if isinstance(error, UnknownModelError):
        return Problem(404, "NotFoundError", str(error), param)
    if isinstance(error, ForbiddenError):
        return Problem(403, "PermissionDeniedError", str(error), param)
    if isinstance(error, UnimplementedError):
        return Problem(501, "NotImplementedError", str(error), param)
    if isinstance(error, QueueFullError):
        return Problem(429, "TooManyRequestsError", str(error), param)
    if isinstance(error, RequestTimeoutError):
        return Problem(504, "TimeoutError", str(error))
    if isinstance(error, (OverloadedError, EngineDownError)):
        return Problem(503, "ServiceUnavailableError", str(error), param)
    if isinstance(error, FewbitError):
        return Problem(400, "BadRequestError", str(error), param)
    if isinstance(error, GenerationError):
        return Problem(500, "InternalServerError", str(error))
    log.error("unforeseen failure", exc_info=error)
    return Problem(500, "InternalServerError", f"the server failed: {type(error).__name__}")


def openai_error(problem: Problem) -> dict[str, Any]:
    """The shape of OpenAI's errors."""
    status, kind, message, param = problem
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def kserve_error(problem: Problem) -> dict[str, Any]:
    """The shape of the v2 protocol's errors."""
    return {"error": problem.message}


def error_response(problem: Problem, path: str) -> Response:
    """An error in the shape of the protocol that `path` belongs to."""
    content = kserve_error(problem) if path.startswith("/v2") else openai_error(problem)
    return json_response(content, problem.status, _HEADERS.get(problem.status))


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(json_bytes(content), status, headers, media_type="application/json")


def json_bytes(content: Any) -> bytes:
    """Compact JSON. Half a surrogate pair, which a client's text may hold and an error may quote, stays an escape."""
    try:
        return _PLAIN.encode(content).encode()
    except UnicodeEncodeError:
        return _ESCAPED.encode(content).encode()


def validated(model: type[M], fields: dict[str, Any], nested: Mapping[str, type[BaseModel]] = _NOTHING) -> M:
    """`fields` as a `model`.

    Args:
        model: Strict.
        fields: The parsed body.
        nested: The models of the fields that are objects themselves (`a.b`: of field b of field a), for the names in
            error messages.

    Raises:
        RequestError: The first thing that is wrong, with the field's name; for an unknown field the nearest known one.
    """
    for name in fields:
        _check_name(name, name, model)
    try:
        return model.model_validate(fields)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
    loc, text, given = error["loc"], error["msg"], error["input"]
    param = _path(loc)
    if error["type"] == "extra_forbidden":
        holder = ".".join(part for part in loc[:-1] if isinstance(part, str))
        _check_name(param, str(loc[-1]), nested[holder])
    if error["type"] == "model_type":
        text = "must be an object"  # pydantic's own words name our class
    text = (
        text.removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("Field required", "is required")
    )
    got = "" if isinstance(given, (dict, list)) else f", got {shown(json.dumps(given))}"
    raise RequestError(f"{param} {text}{got}", param)


def _check_name(path: str, name: str, model: type[BaseModel]) -> None:
    known = {field.alias or own for own, field in model.model_fields.items()}
    if name not in known:
        raise RequestError(f"unknown field '{shown(path)}': {nearest_name(name[:100], known)}", shown(path))


def _path(loc: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') as messages[0].role."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{shown(part)}" if path else shown(part)
    return path
