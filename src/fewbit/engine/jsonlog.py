"""The log on standard error, of the server and of its engines, which inherit what was asked for: words or JSON.

Where standard error is a file on a full disk, lines are lost, and nothing else is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

WORDS = "%(levelname)s %(name)s: %(message)s"
_VARIABLE = "FEWBIT_LOG_FORMAT"


def ask_for_json(wanted: bool) -> None:
    """Say what processes that are started from now on write."""
    os.environ[_VARIABLE] = "json" if wanted else "text"


def handler() -> logging.Handler:
    """Writes to standard error as this process was told to."""
    made = _Lines(sys.stderr)
    made.setFormatter(JsonLines() if os.environ.get(_VARIABLE) == "json" else logging.Formatter(WORDS))
    return made


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """A write that fails may leave a part of a line: the next line does not go on with it."""

    _torn = False

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self._torn:
            self._torn, text = False, f"\n{text}"
        return text

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of logging's)
        self._torn = True
        if not isinstance(sys.exception(), OSError):  # logging would write a traceback to the file that took no line
            super().handleError(record)


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
