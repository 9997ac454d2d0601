"""One step as plain integers: what the scheduler hands to the runner, and what comes back. No torch.

A step can be sent to another process as it is: nothing else is needed to run it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fewbit.engine.types import SamplingParams, TokenLogprobs

PENDING = -1
"""Stands for a token that the step before this one is still choosing; the runner finds it on the device."""


class Draw(msgspec.Struct, frozen=True):
    """How the next token of a request is chosen."""

    params: SamplingParams
    seed: int  # with the position it gives the random number, so neighbours and preemption cannot change a draw
    tokens: Sequence[int]  # prompt and output so far: the request's own list, read when the step is launched
    prompt_tokens: int  # how many of `tokens` are the prompt
    forbidden: tuple[int, ...] = ()  # ids that may not come now: those that would end a request below its min_tokens
    mask: bytes | None = None  # what the grammar allows: a bit a token in words of 32, the lowest id in the lowest bit

    @property
    def output(self) -> Sequence[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def plain(self) -> bool:
        """Whether nothing but the likeliest token is wanted."""
        p = self.params
        free = not (self.forbidden or p.logit_bias or p.allowed_token_ids is not None or looks_back(p))
        return free and p.temperature == 0 and p.logprobs is None


def looks_back(p: SamplingParams) -> bool:
    """Whether a draw depends on which tokens came before it, beyond the logits."""
    penalized = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
    return bool(penalized or p.bad_words or p.grammar is not None)


class Echo(msgspec.Struct, frozen=True):
    """Tokens of a prompt whose log probabilities are wanted: those that follow the positions from `first` on."""

    first: int
    tokens: list[int]
    top: int  # how many alternatives to report beside each


class Piece(msgspec.Struct, frozen=True):
    """The part of one request that runs in this step.

    ``tokens`` have the positions ``first .. first + len(tokens) - 1``; K and V of position p live in slot
    ``blocks[p // block_size] * block_size + p % block_size``.
    """

    id: str
    tokens: list[int]
    first: int
    blocks: list[int]
    draw: Draw | None = None  # None: nothing is chosen, as for a prefill chunk that stops short of the end
    echo: Echo | None = None  # of positions of this piece
    serial: int = 0  # of the request: an id may be used again once its request has ended

    @property
    def end(self) -> int:
        """Number of tokens whose K and V are stored after this step."""
        return self.first + len(self.tokens)


class Batch(msgspec.Struct, frozen=True):
    """One step.

    ``wiped``: blocks that are made zeros first, since their last owner left something behind that is no number.
    """

    pieces: list[Piece]
    wiped: list[int] = []

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed."""
        return sum(len(piece.tokens) for piece in self.pieces)


class Drawn(msgspec.Struct, frozen=True):
    """What came of the `draw` and the `echo` of a piece, or why nothing did."""

    token: int = -1
    logprobs: TokenLogprobs | None = None
    fault: str = ""
    impossible: bool = False  # the fault is what was asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
