"""Traces with times, as Mooncake publishes and aiperf replays them, one request a line in order of time.

``{"timestamp": milliseconds, "input_length": 655, "output_length": 52, "hash_ids": [0, 1, 2]}``; ``text_input`` or
``messages`` may stand in place of ``input_length``. A hash id is a block of 512 tokens: equal ones, equal tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import OUTPUT_TOKENS, Sample, Wanted, length_in
from fewbit.measure.load.datasets.random import sample_of, vocabulary
from fewbit.measure.rows import rows

FILE = True
EXACT = True
USES = frozenset({"as_text", "time_scale"})
BLOCK = 512
_ASKED = ("input_length", "text_input", "messages")


def read(wanted: Wanted) -> list[Sample]:
    """The first `wanted.count` requests of the trace."""
    found: list[Sample] = []
    for where, row in rows(wanted.file):
        if len(found) == wanted.count:
            break
        at = row.get("timestamp")
        if isinstance(at, bool) or not isinstance(at, int | float) or at < 0:
            raise RequestError(f"{where}: timestamp is {at!r}; expected milliseconds from 0 on")
        found.append(_sample(row, where, at / 1e3, wanted))
        if len(found) > 1 and at / 1e3 < (found[-2].at or 0):
            raise RequestError(f"{where}: timestamp {at:g} comes before the one of the row above")
    if len(found) < wanted.count:
        raise RequestError(f"{wanted.file}: holds {len(found)} requests, {wanted.count} are wanted; give --num-prompts")
    return found


def _sample(row: dict[str, Any], where: str, at: float, wanted: Wanted) -> Sample:
    given = [name for name in _ASKED if name in row]
    if len(given) != 1:
        raise RequestError(f"{where}: expected one of {', '.join(_ASKED)}, found {' and '.join(given) or 'none'}")
    outputs = wanted.output_tokens or length_in(row, "output_length", where) or OUTPUT_TOKENS
    value = row[given[0]]
    if given[0] == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise RequestError(f"{where}: expected messages, a list of objects that is not empty")
        return Sample(value, outputs, at=at)
    if given[0] == "text_input":
        if not isinstance(value, str) or not value:
            raise RequestError(f"{where}: text_input holds no text")
        return Sample(value, outputs, wanted.count_tokens(value), at)
    length = length_in(row, "input_length", where)
    assert length is not None or value is None
    if length is None:
        raise RequestError(f"{where}: input_length is missing")
    hashes = row.get("hash_ids") or []
    if not isinstance(hashes, list) or not all(type(one) is int for one in hashes):
        raise RequestError(f"{where}: hash_ids holds no whole numbers")
    tokenizer = wanted.need_tokenizer("this trace gives lengths, its prompts are made of random tokens")
    ids = vocabulary(tokenizer)
    known = _blocks(hashes, ids, wanted.seed)[:length]
    draw = random.Random(f"{wanted.seed} {where}")
    return sample_of(draw, tokenizer, ids, known, length - len(known), outputs, at=at, as_text=wanted.as_text)


def _blocks(hashes: Sequence[int], ids: Sequence[int], seed: int) -> list[int]:
    return [token for one in hashes for token in random.Random(f"{seed} block {one}").choices(ids, k=BLOCK)]
