"""Who may ask: API keys, and the names under which a server on this machine alone may be called."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from starlette.types import Scope

from fewbit.errors import RecipeError
from fewbit.serve.problems import Problem

log = logging.getLogger(__name__)

KEY_VARIABLE = "FEWBIT_API_KEY"
OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready", "/"})
"""Answered without a key: the probes of whoever runs the server, and the page, which asks its reader for one."""
OPEN_FOLDER = "/page/"  # what the page loads
_SHORTEST_KEY = 8
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Keys:
    """API keys. They are kept as digests, and every one is compared with every time."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Take the keys.

        Raises:
            RecipeError: There is none, or one that is too short, or that no header can carry.
        """
        given = list(keys)
        for number, key in enumerate(given, 1):
            if len(key) < _SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
                raise RecipeError(
                    f"API key {number} of {len(given)} must have at least {_SHORTEST_KEY} characters of printable "
                    "ASCII without spaces"
                )
        if not given:
            raise RecipeError("there is no API key in there; expected one a line")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in given]

    def why_not(self, authorization: Sequence[bytes]) -> str | None:
        """Why a request may not pass; None: it may.

        Args:
            authorization: The values of all its headers of this name.
        """
        if not authorization:
            return "an API key is needed: send 'Authorization: Bearer KEY'"
        if len(authorization) > 1:
            return "the header Authorization is given more than once"
        scheme, _, key = authorization[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return "the header Authorization must be 'Bearer KEY'"
        digest = hashlib.sha256(key).digest()
        right = False
        for known in self._digests:
            right |= hmac.compare_digest(digest, known)
        return None if right else "the API key is wrong"

    def allows(self, authorization: str | None) -> bool:
        """Whether this header, of a protocol that has it once, holds a key."""
        return self.why_not([] if authorization is None else [authorization.encode("latin-1", "replace")]) is None


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys | None:
    """The keys of a file (one a line, ``#`` begins a comment) or of the environment; None: neither is there.

    Raises:
        RecipeError: The file cannot be read, or a key in it is no key.
    """
    if file is None:
        value = environment.get(KEY_VARIABLE)
        return None if value is None else Keys([value.strip()])
    try:
        mode = file.stat().st_mode
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the API keys in {file} cannot be read: {error}") from None
    if mode & stat.S_IROTH:
        log.warning("everybody on this machine can read the API keys in %s; better: chmod o-rwx %s", file, file)
    lines = (line.strip() for line in text.splitlines())
    return Keys(line for line in lines if line and not line.startswith("#"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """What is asked of every request before anything else.

    Args:
        keys: One of which it must carry; None: none is needed.
        hosts: Names under which the server may be called, beside those of the loopback; None: any. A page from
            elsewhere that a browser on this machine shows could else call it by a name that leads to 127.0.0.1.
    """

    def __init__(self, keys: Keys | None = None, hosts: Iterable[str] | None = None) -> None:
        self._keys = keys
        self._hosts = None if hosts is None else _LOOPBACK | {host.lower() for host in hosts}

    def refusal(self, scope: Scope) -> Problem | None:
        """Why a request may not pass; None: it may."""
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if self._hosts is not None and not self._is_for_us([v for k, v in headers if k == b"host"]):
            return Problem(
                403,
                "PermissionDeniedError",
                "this server is not called by the name in the header Host; --allowed-host adds it",
            )
        if self._hosts is not None and not all(self._is_ours(v) for k, v in headers if k == b"origin"):
            return Problem(
                403,
                "PermissionDeniedError",
                "this server is not asked by pages of other sites, as the header Origin says; --allowed-host adds one",
            )
        path: str = scope["path"]
        if self._keys is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return None
        why = self._keys.why_not([v for k, v in headers if k == b"authorization"])
        return None if why is None else Problem(401, "AuthenticationError", why)

    def _is_for_us(self, hosts: Sequence[bytes]) -> bool:
        assert self._hosts is not None
        if not hosts:  # HTTP/1.0, which no browser speaks
            return True
        return len(hosts) == 1 and self._names_us(hosts[0])

    def _is_ours(self, origin: bytes) -> bool:
        """Whether a page is of this server, or of another one on this machine."""
        scheme, _, host = origin.partition(b"://")
        return scheme in (b"http", b"https") and self._names_us(host)

    def _names_us(self, host: bytes) -> bool:
        assert self._hosts is not None
        if (match := _HOST.fullmatch(host)) is None:
            return False
        return match[1].decode().strip("[]").lower() in self._hosts
