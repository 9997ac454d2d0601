"""The life of one request inside the engine. Integers only: no torch, no text."""

from __future__ import annotations

from typing import Protocol

from fewbit.engine.blocks import chain, root
from fewbit.engine.types import GenerateRequest


class Matcher(Protocol):
    """What follows an output that keeps to a grammar; `fewbit.text.grammar.Matcher` is one."""

    def mask(self) -> bytes:
        """What may come next, as `Draw.mask`; RequestError: nothing may."""
        ...

    def accept(self, token: int) -> None:
        """The next token; RequestError: it may not come."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing but the end can follow."""
        ...


class Request:
    """The life of one request."""

    __slots__ = (
        "blocks", "cached", "digests", "echoed", "ends", "flying", "id", "matcher", "params", "place", "prompt_tokens",
        "root", "seed", "serial", "stored", "tokens", "unwanted",
    )  # fmt: skip

    def __init__(
        self, request: GenerateRequest, seed: int, eos: tuple[int, ...], serial: int, matcher: Matcher | None = None
    ) -> None:
        self.serial, self.matcher = serial, matcher
        self.place = request.priority, serial  # in every queue
        self.root = root(request.salt)
        self.flying: list[int] = []  # first positions of the pieces that were advanced and not committed
        self.id, self.params, self.seed = request.id, request.params, seed
        self.tokens = list(request.prompt)  # prompt and output
        self.prompt_tokens = len(request.prompt)
        self.blocks: list[int] = []
        self.stored = 0  # tokens whose K and V are in the blocks
        self.echoed = request.params.prompt_logprobs_from - 1  # positions whose next token was reported, or need not be
        self.cached: int | None = None  # prompt tokens found in the prefix cache when it was first admitted
        self.digests: list[bytes] = []  # of its full blocks, as far as they were needed
        stops, ignored = frozenset(request.params.stop_token_ids), request.params.ignore_eos
        # where a grammar ends there is nothing to go on with, so ignoring means: do not end before
        self.ends = stops if ignored and matcher is None else stops | set(eos)
        self.unwanted = tuple(sorted(eos)) if ignored and matcher is not None else ()

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the model before the next one can be chosen."""
        return len(self.tokens) - self.stored

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def echoing(self) -> bool:
        """Whether log probabilities of its prompt are still to be reported."""
        return self.params.prompt_logprobs is not None and self.echoed < self.prompt_tokens - 1

    @property
    def due(self) -> bool:
        """Whether a step can do something for it: not when all its tokens are stored, or the last is being chosen."""
        return self.pending > 0 and self.output_tokens < max(self.params.max_tokens, 1)

    @property
    def longest(self) -> int:
        """Most tokens that can ever be stored for it."""
        return self.prompt_tokens + max(self.params.max_tokens, 1) - 1

    def digest_blocks(self, blocks: int, size: int) -> list[bytes]:
        """Digests of its first `blocks` full blocks of `size` tokens."""
        while len(self.digests) < blocks:
            index = len(self.digests)
            parent = self.digests[-1] if index else self.root
            self.digests.append(chain(parent, self.tokens[index * size : (index + 1) * size]))
        return self.digests[:blocks]
