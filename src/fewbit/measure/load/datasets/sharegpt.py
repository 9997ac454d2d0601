"""ShareGPT JSON: ``[{"conversations": [{"value": ...}, {"value": ...}, ...]}, ...]``, filtered as vLLM does.

The first turn is the prompt, the second gives the length of the answer. Both must have 4 tokens or more, the prompt
1,024 at most, and both together 2,048.
"""

from __future__ import annotations

import json

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import Sample, Wanted, drawn
from fewbit.measure.rows import read_text

FILE = True
EXACT = False
USES = frozenset[str]()
LEAST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048


def read(wanted: Wanted) -> list[Sample]:
    """Conversations that pass the filter."""
    tokenizer = wanted.need_tokenizer("data set sharegpt counts tokens")
    try:
        entries = json.loads(read_text(wanted.file))
    except json.JSONDecodeError as error:
        raise RequestError(f"{wanted.file} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(entries, list):
        raise RequestError(f"{wanted.file}: expected a list of conversations, found {type(entries).__name__}")
    found = []
    for number, entry in enumerate(entries, 1):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns
        ):
            raise RequestError(f"{wanted.file} entry {number}: expected conversations, a list of {{'value': text}}")
        if len(turns) < 2:
            continue
        asked, answered = (len(tokenizer.encode(turn["value"])) for turn in turns[:2])
        answered = wanted.output_tokens or answered
        if min(asked, answered) >= LEAST and asked <= LONGEST_PROMPT and asked + answered <= LONGEST:
            found.append(Sample(turns[0]["value"], answered, asked))
    if not found:
        raise RequestError(f"{wanted.file}: none of {len(entries)} conversations passes the filter of lengths")
    return drawn(found, wanted)
