"""Triton's models around the engine: `preprocessing` makes ids of texts, `postprocessing` texts of ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from fewbit.errors import RequestError
from fewbit.serve.kserve.asks import Ask, Row, biases
from fewbit.serve.kserve.signatures import Signature
from fewbit.serve.kserve.tensors import DATATYPES, MAX_ELEMENTS, Tensor, check_elements, texts
from fewbit.serve.schema import bad_word_ids
from fewbit.serve.service import Service


async def encoded(
    signature: Signature, rows: Sequence[Row], wanted: Sequence[str] | None, service: Service
) -> list[Tensor]:
    """What `preprocessing` answers: padded ids, words as ids and where each of them ends."""
    asked = [Ask(**row) for row in rows]
    tokenizer = service.tokenizer
    ids = []
    for ask in asked:
        await asyncio.sleep(0)  # others may go on between many rows
        ids.append(await service.encode(str(ask.prompt)))
    end = [ask.end_id if ask.end_id is not None else _id(tokenizer.eos_id) for ask in asked]
    pad = [ask.pad_id if ask.pad_id is not None else e for ask, e in zip(asked, end, strict=True)]
    stop = [[tokenizer.encode(w, add_special_tokens=False) for w in ask.stop] for ask in asked]
    found: dict[str, Any] = {
        "INPUT_ID": _rows(ids, pad),
        "REQUEST_INPUT_LEN": [[len(row)] for row in ids],
        "BAD_WORDS_IDS": _words([bad_word_ids(ask.bad_words, tokenizer) for ask in asked]),
        "STOP_WORDS_IDS": _words(stop),
        "OUT_END_ID": [[e] for e in end],
        "OUT_PAD_ID": [[p] for p in pad],
    }
    if any(ask.max_tokens is not None for ask in asked):
        found["REQUEST_OUTPUT_LEN"] = [[ask.max_tokens] for ask in asked]
    if any(ask.bias_words for ask in asked):
        found["EMBEDDING_BIAS"] = _bias(asked, service)
    known = {o.name: o.datatype for o in signature.outputs}
    for name in wanted or ():
        if name not in found:
            raise RequestError(
                f"the output '{name}' has nothing to hold: the input that it is made of is missing", name
            )
    return [Tensor(n, known[n], np.array(found[n], DATATYPES[known[n]])) for n in wanted or found]


def decoded(rows: Sequence[Row], service: Service) -> list[Tensor]:
    """What `postprocessing` answers: a text for each beam of each row."""
    said = []
    for row in rows:
        ids, lengths, names = row["tokens"], row["lengths"], row["names"]
        if len(lengths) != len(ids):
            name = names["lengths"]
            raise RequestError(f"'{name}' has {len(lengths)} lengths for {len(ids)} beams", name)
        for beam, length in zip(ids.tolist(), lengths, strict=True):
            if not 0 <= length <= len(beam):
                raise RequestError(f"{names['lengths']} {length} is not within the {len(beam)} ids of the row")
            said.append(service.tokenizer.decode(beam[:length], row.get("skip_special", True)))
    return [Tensor("OUTPUT", "BYTES", texts(said, (len(said),)))]


def _id(token: int | None) -> int:
    """-1 is what TensorRT-LLM says for none."""
    return -1 if token is None else token


def _rows(rows: Sequence[Sequence[int]], pads: Sequence[int]) -> list[list[int]]:
    longest = max(map(len, rows))
    check_elements(len(rows), longest)
    return [[*row, *[pad] * (longest - len(row))] for row, pad in zip(rows, pads, strict=True)]


def _words(rows: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """[rows, 2, longest]: ids one after the other, filled up with 0; where each word ends, filled up with -1."""
    longest = max(1, *(sum(map(len, row)) for row in rows))
    check_elements(len(rows), 2 * longest)
    found = []
    for row in rows:
        ids = [token for word in row for token in word]
        ends = np.cumsum([len(word) for word in row], dtype=int).tolist()
        found.append([[*ids, *[0] * (longest - len(ids))], [*ends, *[-1] * (longest - len(ends))]])
    return found


def _bias(asked: Sequence[Ask], service: Service) -> np.ndarray:
    vocab = service.client.info.vocab
    if len(asked) * vocab > MAX_ELEMENTS:
        raise RequestError(f"{len(asked)} rows of a bias for each of {vocab} tokens are too many: send fewer rows")
    found = np.zeros((len(asked), vocab), np.float32)
    for row, ask in zip(found, asked, strict=True):
        for token, weight in biases(ask, service.tokenizer):
            row[token] = weight
    return found
