"""What a generation answers: a `Text` grows with each piece, and outputs are made of texts, whole or piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fewbit.engine.types import TokenLogprobs
from fewbit.serve.generation import Finish, Job, Piece
from fewbit.serve.kserve.asks import Ask
from fewbit.serve.kserve.signatures import Output, Signature
from fewbit.serve.kserve.tensors import DATATYPES, Tensor, texts
from fewbit.serve.openai.shapes import FLOOR
from fewbit.serve.service import Service
from fewbit.text import Tokenizer

# The Open Inference Protocol's words for how a text ended.
_REASONS = {"length": "length", "stop": "eos_token", "string": "stop_sequence"}


@dataclass
class Text:
    """One text that is generated: a row of the request, and which of its texts.

    Attributes:
        prompt: What comes before it, if the answer repeats the prompt; a text or ids, as the model answers.
        tokens, logprobs, text: So far; in a `piece` what is new.
        count: Tokens so far.
        cumulative: Sum of the log-probabilities so far.
        arrival, first, last: Nanoseconds of a clock that only goes forward: submitted, first token, last token.
    """

    batch: int
    sequence: int
    ask: Ask
    job: Job
    prompt: str | tuple[int, ...] = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    count: int = 0
    cumulative: float = 0.0
    finish: Finish | None = None
    arrival: int = field(default_factory=time.monotonic_ns)
    first: int = 0
    last: int = 0

    def most_tokens(self) -> int:
        """How many it may have in the end, with the prompt if that is repeated."""
        repeated = 0 if isinstance(self.prompt, str) else len(self.prompt)
        return repeated + self.job.params.max_tokens

    def take(self, piece: Piece) -> Text:
        """Grow by a piece; what is new, as a text of its own."""
        new = replace(self, prompt="", tokens=[], logprobs=[], prompt_logprobs=[], text=piece.text)
        if piece.token is not None:
            self.last = time.monotonic_ns()
            self.first = self.first or self.last
            self.count += 1
            new.tokens = [piece.token]
        if piece.logprobs is not None:
            self.cumulative += max(FLOOR, piece.logprobs.chosen)
            new.logprobs = [piece.logprobs]
        new.prompt_logprobs = list(piece.prompt_logprobs)
        self.text += new.text
        for mine, added in (
            (self.tokens, new.tokens),
            (self.logprobs, new.logprobs),
            (self.prompt_logprobs, new.prompt_logprobs),
        ):
            mine += added  # type: ignore[operator]
        self.finish = new.finish = piece.finish
        new.first, new.last, new.count, new.cumulative = self.first, self.last, self.count, self.cumulative
        return new


def outputs(
    signature: Signature, wanted: Sequence[str] | None, found: Sequence[Text], several: bool, service: Service
) -> list[Tensor]:
    """The tensors of an answer.

    Args:
        signature: Of the model.
        wanted: Names, in the order in which they are wanted; None: what the model gives by itself.
        found: The texts, whole or new pieces of them.
        several: Whether the request has more than one text.
        service: The model.
    """
    on = {name for one in found for name, value in vars(one.ask).items() if value not in (None, False)}
    if several:
        on.add("choices")
    known = {o.name: o for o in signature.outputs}
    names = [*known] if wanted is None or signature.only_if_asked else wanted
    chosen = [known[n] for n in names if wanted is None or n in wanted]
    given = [o for o in chosen if not o.when or o.when in on or (wanted is not None and not signature.only_if_asked)]
    return [_tensor(o, found, service) for o in given]


def _tensor(output: Output, found: Sequence[Text], service: Service) -> Tensor:
    values = MAKERS[output.means](found, service)
    if values.dtype != DATATYPES["BYTES"]:
        values = values.astype(DATATYPES[output.datatype])
    return Tensor(output.name, output.datatype, values)


# ---- one output each ----


def _said(one: Text) -> str:
    prompt = one.prompt if isinstance(one.prompt, str) else ""
    return prompt + one.text


def _ids(one: Text) -> list[int]:
    prompt = [] if isinstance(one.prompt, str) else one.prompt
    return [*prompt, *one.tokens]


def _column(of: Callable[[Text], float]) -> Callable[[Sequence[Text], Service], np.ndarray]:
    return lambda found, service: np.array([[of(one)] for one in found])


def _padded(rows: Sequence[Sequence[float]], pads: Sequence[float]) -> np.ndarray:
    """[rows, longest]."""
    longest = max(map(len, rows))
    return np.array([[*row, *[pad] * (longest - len(row))] for row, pad in zip(rows, pads, strict=True)])


def _padded_ids(found: Sequence[Text], service: Service) -> np.ndarray:
    pads = [_first(one.ask.pad_id, one.ask.end_id, service.tokenizer.eos_id, 0) for one in found]
    return _padded([_ids(one) for one in found], pads)[:, None]


def _first(*values: int | None) -> int:
    return next(v for v in values if v is not None)


def _log_probs(found: Sequence[Text], service: Service) -> np.ndarray:
    return _padded([[_floor(p.chosen) for p in one.logprobs] for one in found], [0.0] * len(found))


def _floor(logprob: float) -> float:
    return max(FLOOR, logprob)


def _objects(of: Callable[[Text, Tokenizer], Any]) -> Callable[[Sequence[Text], Service], np.ndarray]:
    """A column of JSON texts."""
    return lambda found, service: texts([json.dumps(of(one, service.tokenizer)) for one in found], (len(found), 1))


def _alternatives(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, float]]:
    """For each token the likeliest ones; of several with the same text the likeliest counts."""
    found = []
    for one in logprobs:
        best: dict[str, float] = {}
        for token, value in one.top:
            best.setdefault(_shown(tokenizer, token), _floor(value))
        found.append(best)
    return found


def _prompt_log_probs(one: Text, tokenizer: Tokenizer) -> list[dict[str, float] | None]:
    """For each token of the prompt itself and the likeliest ones; nothing comes before the first."""
    found: list[dict[str, float] | None] = [None]
    for token, logprobs in zip(one.job.prompt[1:], one.prompt_logprobs, strict=False):
        found.append({_shown(tokenizer, token): _floor(logprobs.chosen)} | _alternatives(tokenizer, [logprobs])[0])
    return found


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


def _details(one: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [
        {
            "id": token,
            "text": _shown(tokenizer, token),
            "logprob": _floor(logprobs.chosen),
            "special": token in tokenizer.special_ids,
        }
        for token, logprobs in zip(one.tokens, one.logprobs, strict=True)
    ]
    return {"finish_reason": _reason(one), "logprobs": tokens}


def _reason(one: Text) -> str | None:
    if one.finish is None:
        return None
    return _REASONS["string" if isinstance(one.finish.stop_reason, str) else one.finish.reason]


def _blocks(one: Text, service: Service) -> tuple[int, int]:
    """K/V blocks that this text took and those it found; the last token's K and V are never stored."""
    size = service.client.info.block_size
    reused = (one.finish.cached_tokens if one.finish else 0) // size
    return -(-max(0, len(one.job.prompt) + one.count - 1) // size) - reused, reused


MAKERS: Mapping[str, Callable[[Sequence[Text], Service], np.ndarray]] = {
    "text": lambda found, service: texts([_said(one) for one in found], (len(found),)),
    "text_column": lambda found, service: texts([_said(one) for one in found], (len(found), 1)),
    "ids": _padded_ids,
    "length": _column(lambda one: len(_ids(one))),
    "cum_log_probs": _column(lambda one: one.cumulative),
    "log_probs": _log_probs,
    "log_probs_of_beams": lambda found, service: _log_probs(found, service)[:, None],
    "top_log_probs": _objects(lambda one, tokenizer: _alternatives(tokenizer, one.logprobs)),
    "prompt_log_probs": _objects(_prompt_log_probs),
    "batch_index": _column(lambda one: one.batch),
    "sequence_index": _column(lambda one: one.sequence),
    "input_tokens": _column(lambda one: len(one.job.prompt)),
    "output_tokens": _column(lambda one: one.count),
    "new_blocks": lambda found, service: np.array([[_blocks(one, service)[0]] for one in found]),
    "reused_blocks": lambda found, service: np.array([[_blocks(one, service)[1]] for one in found]),
    "arrival": _column(lambda one: one.arrival),
    "first_token": _column(lambda one: one.first),
    "last_token": _column(lambda one: one.last),
    "details": _objects(_details),
}
"""What an output holds, by `Output.means`: of texts, an array with a row for each."""
