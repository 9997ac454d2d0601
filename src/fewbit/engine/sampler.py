"""From logits to tokens.

In this order, each step exact:

1. log probabilities to report: log softmax of the model's own logits, before anything below;
2. repetition penalty r on every token of prompt and output: logit / r if positive, logit * r if not;
3. frequency and presence penalty on every token of the output: logit - f * count - p;
4. logit bias: logit + b;
5. forbidden ids: those that would end the request below min_tokens, the last token of a bad word whose other tokens
   were just said (prompt and output are looked at), all but the allowed ids, and what the grammar does not allow here;
6. temperature 0: the largest logit, the lowest id of equals. Otherwise: divide by the temperature;
7. min-p: drop what is less likely than min_p times the likeliest;
8. top-k: keep the k likeliest, of equals the lower ids;
9. top-p, of the distribution that is left: keep the likeliest tokens up to and including the one that reaches p;
10. draw: the first token, in order of ids, at which the cumulative probability exceeds u.

u comes from (seed, position) alone, so a draw depends on no neighbour, no chunk size and no preemption, and is the
same on every device as far as the logits are. Steps 6 to 10 are computed in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit.engine.batch import Draw, Drawn
from fewbit.engine.types import TokenLogprobs
from fewbit.ops.device import to_device, to_host

NO_TOKEN = (
    "every token is forbidden by min_tokens, bad_words, allowed_token_ids, the grammar, or several of them together: "
    "nothing is left to choose from"
)
NOT_FINITE = "the model's logits are not finite (NaN or infinity), so there is no token to choose"


@dataclass(frozen=True)
class Choice:
    """The outcome of `choose`, still on the device; `read` waits for it."""

    draws: Sequence[Draw]
    tokens: Tensor  # int64 [n]
    best: Tensor  # float32 [n], the largest logit after penalties and bans: not finite if something is wrong
    logprobs: Tensor | None = None  # float64 [rows that report, 1 + most alternatives], the chosen one first
    alternatives: Tensor | None = None  # int64, the ids of the others

    def read(self) -> list[Drawn]:
        """The chosen token of each row, with log probabilities where asked for."""
        reports = self._reports()
        drawn = []
        for draw, token, best in zip(self.draws, self.tokens.tolist(), self.best.tolist(), strict=True):
            report = next(reports) if draw.params.logprobs is not None else None
            if best == float("-inf"):
                drawn.append(Drawn(fault=NO_TOKEN, impossible=True))
            elif not abs(best) < float("inf"):
                drawn.append(Drawn(fault=NOT_FINITE))
            else:
                drawn.append(Drawn(token, report))
        return drawn

    def to_host(self) -> Choice:
        """The same on its way to pinned memory; who waits for the stream may `read` it without waiting again."""
        reports = self.logprobs, self.alternatives
        logprobs, alternatives = (None if x is None else to_host(x) for x in reports)
        return Choice(self.draws, to_host(self.tokens), to_host(self.best), logprobs, alternatives)

    def _reports(self) -> Iterator[TokenLogprobs]:
        if self.logprobs is None or self.alternatives is None:
            return
        counts = [d.params.logprobs for d in self.draws if d.params.logprobs is not None]
        for count, values, ids in zip(counts, self.logprobs.tolist(), self.alternatives.tolist(), strict=True):
            yield TokenLogprobs(values[0], tuple(zip(ids[:count], values[1 : 1 + count], strict=True)))


def choose(logits: Tensor, draws: Sequence[Draw]) -> Choice:
    """Choose the next token of every row.

    Args:
        logits: float32 [n, vocab]. Not changed.
        draws: how to choose in each row.
    """
    shaped = _shape(logits, draws)
    best, tokens = shaped.max(-1)
    rows = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    if rows:
        index = to_device(rows, torch.int64, logits.device)
        tokens[index] = _sample(shaped[index], [draws[i] for i in rows])
    reporting = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    if not reporting:
        return Choice(draws, tokens, best)
    index = to_device(reporting, torch.int64, logits.device)
    most = max(draws[i].params.logprobs or 0 for i in reporting)
    return Choice(draws, tokens, best, *report(logits[index], tokens[index], most))


def report(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Step 1: the log probability of one token a row and of the `most` likeliest ones, and the ids of these.

    Args:
        logits: float32 [n, vocab].
        tokens: int64 [n].
        most: how many of the likeliest; of equals the lower ids first, so the first one is the greedy one.

    Returns:
        float64 [n, 1 + most] and int64 [n, most].
    """
    ids = _likeliest(logits, most) if most else tokens[:, None][:, :0]
    logprobs = logits.double().log_softmax(-1)
    return logprobs.gather(-1, torch.cat([tokens[:, None], ids], -1)), ids


def _likeliest(logits: Tensor, most: int) -> Tensor:
    """Ids of the largest logits, in a fifth of the time that a stable sort takes."""
    # float32 in the order of integers: negative ones are turned round, and -0 is made 0. Below it the id, from the end
    bits = (logits + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    order -= torch.arange(logits.shape[-1], device=logits.device)
    return order.topk(most, -1).indices


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _shape(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Steps 2 to 5: penalties, biases and bans. A copy, if there is anything to do."""
    shaped = logits
    if any(draw.mask is not None for draw in draws):
        shaped = logits.masked_fill(~_allowed(draws, logits), float("-inf"))
    for row, draw in enumerate(draws):
        p = draw.params
        penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        banned = [*draw.forbidden, *_bad_endings(draw)]
        if not (penalized or banned or p.logit_bias or p.allowed_token_ids is not None):
            continue
        if shaped is logits:
            shaped = logits.clone()
        x = shaped[row]
        if p.repetition_penalty != 1:
            said = to_device(list(set(draw.tokens)), torch.int64, x.device)
            values = x[said]
            x[said] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and draw.output:
            said, counts = torch.unique(to_device(draw.output, torch.int64, x.device), return_counts=True)
            x[said] -= p.frequency_penalty * counts.to(x.dtype) + p.presence_penalty
        if p.logit_bias:
            ids, biases = zip(*p.logit_bias, strict=True)
            x[to_device(ids, torch.int64, x.device)] += to_device(biases, x.dtype, x.device)
        if p.allowed_token_ids is not None:
            allowed = to_device(p.allowed_token_ids, torch.int64, x.device)
            kept = x[allowed]
            x.fill_(float("-inf"))
            x[allowed] = kept
        if banned:
            x[to_device(banned, torch.int64, x.device)] = float("-inf")
    return shaped


def _allowed(draws: Sequence[Draw], logits: Tensor) -> Tensor:
    """What the grammars allow, bool [n, vocab]."""
    vocab = logits.shape[-1]
    width = -(-vocab // 32) * 4  # bytes of a mask
    masks = b"".join(b"\xff" * width if draw.mask is None else draw.mask for draw in draws)
    words = to_device(np.frombuffer(masks, np.int32), torch.int32, logits.device).view(len(draws), -1)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    return (bits & 1).bool().flatten(1)[:, :vocab]


def _bad_endings(draw: Draw) -> list[int]:
    """Tokens that would complete a bad word now."""
    tokens = draw.tokens
    return [w[-1] for w in draw.params.bad_words if len(w) == 1 or tuple(tokens[1 - len(w) :]) == w[:-1]]


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Steps 6 to 10 for rows with a temperature. logits: float32 [n, vocab]; returns int64 [n]."""

    def column(values: list[float]) -> Tensor:
        return to_device(values, torch.float64, x.device)[:, None]

    params = [draw.params for draw in draws]
    x = logits.double()
    # the largest becomes 0 first: then neither a tiny nor a huge temperature can overflow to a NaN
    x = (x - x.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        x = x.masked_fill(x < column([p.min_p for p in params]).log(), float("-inf"))
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        size = x.shape[-1]
        # the order is that of the float32 logits, which sort in half the time: what min-p cut is last in it anyway
        order = logits.sort(stable=True, dim=-1, descending=True).indices
        values = x.gather(-1, order)
        kept = column([float(p.top_k if p.top_k > 0 else size) for p in params])
        values = values.masked_fill(torch.arange(size, device=x.device) >= kept, float("-inf"))
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability
        limit = column([p.top_p if p.top_p < 1 else float("inf") for p in params])
        values = values.masked_fill(before >= limit, float("-inf"))
        x = torch.empty_like(x).scatter_(-1, order, values)
    probability = x.softmax(-1)
    cumulative = probability.cumsum(-1)
    u = column([uniform(draw.seed, len(draw.tokens)) for draw in draws])
    # a parallel cumulative sum need not be monotone to the last bit, hence the second condition: never pick a
    # token that was cut
    hit = (cumulative > u * cumulative[:, -1:]) & (probability > 0)
    return hit.to(torch.uint8).argmax(-1)
