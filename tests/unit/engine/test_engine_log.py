"""A log that cannot be written."""

from __future__ import annotations

import logging
import sys

import pytest

from fewbit.engine import jsonlog


class File:
    """What fails as it is told to."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.text = error, ""

    def write(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("error", "told"), [(OSError(28, "No space left on device"), False), (ValueError("x"), True)])
def test_a_line_that_is_lost_leaves_no_words_of_logging(monkeypatch, capsys, error, told):
    """A disk that is full is nobody's mistake; any other error is one of the program."""
    file = File(error)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", file)
        made = jsonlog.handler()
    made.handle(logging.makeLogRecord({"msg": "lost"}))
    file.error = None
    made.handle(logging.makeLogRecord({"msg": "kept"}))
    assert ("--- Logging error ---" in capsys.readouterr().err) == told
    assert file.text.startswith("\n")  # the line that was lost may have left a part
    assert file.text.count("kept") == 1
