"""Logs of JSON, for the server's process and for those of its engines, which inherit the wish in their environment."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

WORDS = "%(levelname)s %(name)s: %(message)s"
_VARIABLE = "FEWBIT_LOG_FORMAT"


def ask_for_json(wanted: bool) -> None:
    """Say what processes that are started from now on write."""
    os.environ[_VARIABLE] = "json" if wanted else "text"


def formatter() -> logging.Formatter:
    """What this process was told to write with."""
    return JsonLines() if os.environ.get(_VARIABLE) == "json" else logging.Formatter(WORDS)


class JsonLines(logging.Formatter):
    """A JSON object a line; a record's `fields` take the place of its message."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = getattr(record, "fields", None)
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        entry |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
