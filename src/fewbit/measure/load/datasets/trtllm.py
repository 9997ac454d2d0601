"""The JSONL of trtllm-bench: ``{"task_id": 0, "prompt": text or "input_ids": [...], "output_tokens": 128}``."""

from __future__ import annotations

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import Sample, Wanted, drawn, ids_in, length_in
from fewbit.measure.rows import rows

FILE = True
EXACT = True
USES = frozenset[str]()


def read(wanted: Wanted) -> list[Sample]:
    """The rows' prompts."""
    found = []
    for where, row in rows(wanted.file):
        outputs = wanted.output_tokens or length_in(row, "output_tokens", where)
        if outputs is None:
            raise RequestError(f"{where}: output_tokens is missing")
        if (ids := row.get("input_ids")) is not None:
            tokens = ids_in(ids, where)
            found.append(Sample(tokens, outputs, len(tokens)))
        elif isinstance(text := row.get("prompt"), str) and text:
            found.append(Sample(text, outputs, wanted.count_tokens(text)))
        else:
            raise RequestError(f"{where}: expected prompt (a text) or input_ids")
    return drawn(found, wanted)
