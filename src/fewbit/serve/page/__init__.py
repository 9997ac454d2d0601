"""The page that `GET /` serves: chat, two models side by side, a live view of the engines; files of `static/`.

Nothing here is secret and nothing is asked of the engine, so the page needs no API key: it asks its reader for one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Scripts and styles only from files of this server, requests only to this server, text never taken for markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked about each time: a new version of fewbit shows at once
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def routes() -> APIRouter:
    """The router of the page and of the files that it loads."""
    page = {name: _read(name) for name in _names()}
    router = APIRouter(include_in_schema=False)  # for people, not for programs

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _answer(request, page[INDEX])

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in page or name == INDEX:
            raise HTTPException(404)
        return _answer(request, page[name])

    return router


def _names() -> list[str]:
    return sorted(f.name for f in files(__name__).joinpath("static").iterdir())


def _read(name: str) -> _File:
    content = files(__name__).joinpath("static", name).read_bytes()
    return _File(content, _TYPES[name.rpartition(".")[2]], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    if any(tag in (file.etag, "*") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
