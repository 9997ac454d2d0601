"""Random tokens: prompts of a given length that no prefix cache knows, but for a prefix that all share if asked."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fewbit.errors import RequestError
from fewbit.measure.load.datasets import OUTPUT_TOKENS, Sample, Wanted
from fewbit.text import Tokenizer

FILE = False
EXACT = True
USES = frozenset({"input_tokens", "range_ratio", "prefix_tokens", "as_text"})
INPUT_TOKENS = 1024
_TRIES = 8  # until a text has the length that is wanted: what tokens say together may be other tokens


def read(wanted: Wanted) -> list[Sample]:
    """Samples of random tokens."""
    tokenizer = wanted.need_tokenizer("data set random draws tokens of the model's vocabulary")
    if not 0 <= wanted.range_ratio < 1:
        raise RequestError(f"range ratio {wanted.range_ratio:g}: expected a share from 0 to below 1")
    draw, ids = random.Random(wanted.seed), vocabulary(tokenizer)
    prefix = draw.choices(ids, k=wanted.prefix_tokens)
    found = []
    for _ in range(wanted.count):
        inputs = _around(draw, wanted.input_tokens or INPUT_TOKENS, wanted.range_ratio)
        outputs = _around(draw, wanted.output_tokens or OUTPUT_TOKENS, wanted.range_ratio)
        found.append(sample_of(draw, tokenizer, ids, prefix, inputs, outputs, as_text=wanted.as_text))
    return found


def vocabulary(tokenizer: Tokenizer) -> Sequence[int]:
    """Ids that may stand in a prompt: no special tokens, no single bytes."""
    left_out = tokenizer.special_ids | tokenizer.byte_ids
    return [token for token in range(tokenizer.vocab_size) if token not in left_out]


def sample_of(
    draw: random.Random,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    prefix: Sequence[int],
    inputs: int,
    outputs: int,
    *,
    at: float | None = None,
    as_text: bool = False,
) -> Sample:
    """A prompt of a prefix and `inputs` random tokens after it; as text, with the length that a tokenizer finds."""
    prompt = [*prefix, *draw.choices(ids, k=inputs)]
    if not as_text:
        return Sample(tuple(prompt), outputs, len(prompt), at)
    wanted, text = len(prompt), tokenizer.decode(prompt)
    for _ in range(_TRIES):
        again = tokenizer.encode(text)
        if len(again) == wanted:
            break
        # cut or lengthen at the end: the prefix stays
        again = again[:wanted] + draw.choices(ids, k=max(wanted - len(again), 0))
        text = tokenizer.decode(again)
    return Sample(text, outputs, len(tokenizer.encode(text)), at)


def _around(draw: random.Random, middle: int, ratio: float) -> int:
    return max(draw.randint(round(middle * (1 - ratio)), round(middle * (1 + ratio))), 1)
