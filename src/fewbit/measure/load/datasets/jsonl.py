"""JSONL with one of ``prompt`` (text, token ids), ``text``, ``ids``, ``messages`` and ``turns`` (the first is asked).

``output_tokens`` says how long an answer may be, else ``--output-len``, else 128. Other fields are a row's own.
"""

from __future__ import annotations

from typing import Any

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import OUTPUT_TOKENS, Sample, Wanted, drawn, ids_in, length_in
from fewbit.measure.rows import rows

FILE = True
EXACT = False
USES = frozenset[str]()
FIELDS = ("prompt", "text", "ids", "messages", "turns")


def read(wanted: Wanted) -> list[Sample]:
    """The rows' prompts."""
    return drawn([_sample(row, where, wanted) for where, row in rows(wanted.file)], wanted)


def _sample(row: dict[str, Any], where: str, wanted: Wanted) -> Sample:
    given = [name for name in FIELDS if name in row]
    if len(given) != 1:
        raise RequestError(f"{where}: expected one of {', '.join(FIELDS)}, found {' and '.join(given) or 'none'}")
    value = row[given[0]]
    outputs = wanted.output_tokens or length_in(row, "output_tokens", where) or OUTPUT_TOKENS
    if given[0] == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise RequestError(f"{where}: expected messages, a list of objects that is not empty")
        return Sample(value, outputs)
    if given[0] == "turns":
        value = value[0] if isinstance(value, list) and value else None
    if given[0] == "ids" or isinstance(value, list):
        ids = ids_in(value, where)
        return Sample(ids, outputs, len(ids))
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where}: {given[0]} holds no text")
    return Sample(value, outputs, wanted.count_tokens(value))
