"""What the server writes to standard error: a line for each event, in words or as JSON. Never a prompt, never a key."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

from fewbit.engine import jsonlog
from fewbit.serve.exchange import Exchange

LogFormat = Literal["text", "json"]
_PROBES = frozenset({"/health", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""What is asked every few seconds and says nothing new."""
LEVELS = ("debug", "info", "warning", "error")

requests = logging.getLogger("fewbit.requests")
progress = logging.getLogger("fewbit.progress")
"""What a user is told on the way, whatever the level is."""


def set_up(form: LogFormat, level: str | None = None) -> None:
    """Write the log of this process, and of the engines that it starts, to standard error.

    Args:
        form: ``text`` or ``json``.
        level: One of `LEVELS`; None: requests are written as JSON, as text only what is out of the ordinary.
    """
    jsonlog.ask_for_json(form == "json")
    logging.basicConfig(handlers=[jsonlog.handler()], level=logging.WARNING, force=True)
    logging.captureWarnings(form == "json")
    progress.setLevel(logging.INFO)
    set_level(level or ("info" if form == "json" else "warning"))


def set_level(level: str) -> None:
    """Write what is at least this important."""
    logging.getLogger("fewbit").setLevel(level.upper())


def level() -> str:
    """How important something has to be to be written."""
    return logging.getLevelName(logging.getLogger("fewbit").getEffectiveLevel()).lower()


def answered(exchange: Exchange, method: str, path: str, status: int) -> None:
    """A request has been answered to the last byte, or its client has left.

    Args:
        exchange: The request.
        method: Of HTTP.
        path: Of the route, not of the client's making.
        status: What the answer began with.
    """
    importance = logging.DEBUG if path in _PROBES else logging.INFO
    if not requests.isEnabledFor(importance):
        return
    took = time.perf_counter() - exchange.began
    fields: dict[str, Any] = {
        "request_id": exchange.id,
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(took, 6),
    }
    if exchange.model:
        fields |= {"model": exchange.model, "prompt_tokens": exchange.prompt_tokens}
        fields |= {"output_tokens": exchange.output_tokens, "cached_tokens": exchange.cached_tokens}
    if exchange.first_token is not None:
        fields["first_token_seconds"] = round(exchange.first_token - exchange.began, 6)
    words = " ".join(f"{name}={value}" for name, value in fields.items())
    requests.log(importance, "%s", words, extra={"fields": fields})
