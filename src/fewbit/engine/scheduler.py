"""What runs in the next step. Integers only: no torch, no text, no clock.

A request waits, runs, and ends exactly once:

    submit ──► waiting ──admit──► running ──commit──► ended (stop, length, error)
                  ▲                  │
                  └────preempted─────┘                abort: from anywhere to ended

Of its tokens (prompt and output so far) the first `stored` have K and V in its blocks; the others are *pending*. A
request with one pending token decodes, one with more is in its prefill, also when it comes back after a preemption.

Who gets what: every decode first (so a long prompt never stalls those who are being answered), oldest first; then
prefill chunks of running requests in what is left of the budget; then waiting requests, in order of arrival. A waiting
request therefore starts in the very next step that has room for it.

Nothing can get stuck: `check_request` refuses what could never fit, the youngest is put back first, so the oldest can
always take the blocks of everybody else, and what it finishes is freed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from fewbit.engine.batch import Batch, Draw, Drawn, Piece
from fewbit.engine.blocks import BlockPool, chain
from fewbit.engine.check import check_request
from fewbit.engine.config import EngineConfig
from fewbit.engine.types import Ending, EndReason, Event, GenerateRequest, OverloadedError, Stats
from fewbit.errors import RequestError


class Request:
    """The life of one request."""

    __slots__ = ("blocks", "cached", "digests", "ends", "id", "params", "prompt_tokens", "seed", "stored", "tokens")

    def __init__(self, request: GenerateRequest, seed: int, eos: tuple[int, ...]) -> None:
        self.id, self.params, self.seed = request.id, request.params, seed
        self.tokens = list(request.prompt)  # prompt and output
        self.prompt_tokens = len(request.prompt)
        self.blocks: list[int] = []
        self.stored = 0  # tokens whose K and V are in the blocks
        self.cached: int | None = None  # prompt tokens found in the prefix cache when it was first admitted
        self.digests: list[bytes] = []  # of its full blocks, as far as they were needed
        self.ends = frozenset(request.params.stop_token_ids) | (frozenset() if request.params.ignore_eos else set(eos))

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the model before the next one can be chosen."""
        return len(self.tokens) - self.stored

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def longest(self) -> int:
        """Most tokens that can ever be stored for it."""
        return self.prompt_tokens + self.params.max_tokens - 1

    def digest_blocks(self, blocks: int, size: int) -> list[bytes]:
        """Digests of its first `blocks` full blocks of `size` tokens."""
        while len(self.digests) < blocks:
            index = len(self.digests)
            parent = self.digests[-1] if index else b""
            self.digests.append(chain(parent, self.tokens[index * size : (index + 1) * size]))
        return self.digests[:blocks]


class Scheduler:
    """Requests in, batches out, results in, events out. One thread only."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.prefix_cache)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival, as `waiting` is
        self._requests: dict[str, Request] = {}
        self._seeds = random.Random(config.seed) if config.seed is not None else random.SystemRandom()
        self._counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()

    # ---- in and out ----

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises:
            OverloadedError: the queue is full.
            RequestError: it cannot be honoured.
        """
        check_request(request, self.config)
        if request.id in self._requests:
            raise RequestError(f"a request with the id '{request.id}' is still running; choose another id", "id")
        if len(self.waiting) >= self.config.max_queued:
            raise OverloadedError(
                f"{len(self.waiting)} requests are waiting already (max_queued {self.config.max_queued}); retry later"
            )
        given = request.params.seed
        seed = self._seeds.getrandbits(64) if given is None else given
        self._requests[request.id] = new = Request(request, seed, self.config.eos_token_ids)
        self.waiting.append(new)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now. An id that is unknown, or ended already, is nothing to worry about: no event."""
        request = self._requests.get(request_id)
        return [] if request is None else [self._end(request, "abort")]

    def fail(self, request_ids: Iterable[str], detail: str) -> list[Event]:
        """End these requests, whose step went wrong."""
        found = [self._requests[i] for i in request_ids if i in self._requests]
        return [self._end(request, "error", detail) for request in found]

    @property
    def requests(self) -> list[str]:
        """Ids of all requests that have not ended."""
        return list(self._requests)

    # ---- one step ----

    def schedule(self) -> Batch:
        """The next step; no pieces if there is nothing to do."""
        plan: dict[Request, int] = {}  # tokens to compute of each request
        left = self.config.max_batch_tokens
        preemptions = self._counts["preemptions"]
        decoding = [r for r in self.running if r.pending == 1]
        prefilling = [r for r in self.running if r.pending > 1]
        for request in decoding + prefilling:
            count = min(request.pending, left)
            if count == 0 or not request.blocks:  # no blocks: just put back for an older one's sake
                continue
            while not self.pool.grow(request.blocks, request.stored + count):
                victim = self.running[-1]
                left += plan.pop(victim, 0)
                self._preempt(victim)
                if victim is request:
                    break
            else:
                plan[request] = count
                left -= count
        # whoever was put back has to wait for a step without shortage, or the two would swap places for ever
        if preemptions == self._counts["preemptions"]:
            while left and self.waiting and len(self.running) < self.config.max_batch and self._admit(self.waiting[0]):
                request = self.waiting.popleft()
                self.running.append(request)
                plan[request] = min(request.pending, left)
                left -= plan[request]
        assert plan or not self._requests, "there is always somebody who can go on"
        return Batch([self._piece(request, count) for request, count in plan.items()])

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its cached prefix and room for all it has to compute, if that can be had now."""
        pool, size = self.pool, self.config.block_size
        known = (len(request.tokens) - 1) // size if self.config.prefix_cache else 0
        cached = pool.match(request.digest_blocks(known, size), request.tokens)
        if self.config.policy == "guaranteed_no_evict":
            need, spare = request.longest, 0  # nobody grows after admission, so nothing has to be kept back
        else:
            # each running request may need its next block soon: do not start what would be put back at once
            need, spare = len(request.tokens), len(self.running)
        fresh = pool.blocks_for(need) - len(cached)
        if fresh + pool.idle_among(cached) + spare > pool.free:
            return False
        pool.hold(cached)
        request.blocks = cached
        request.stored = len(cached) * size
        grown = pool.grow(request.blocks, need)
        assert grown, "the room was counted a moment ago"
        if request.cached is None:
            request.cached = request.stored
            self._counts["prompt_tokens"] += request.prompt_tokens
            self._counts["prefix_queries"] += request.prompt_tokens if self.config.prefix_cache else 0
            self._counts["prefix_hits"] += request.stored
        return True

    def _preempt(self, request: Request) -> None:
        """Put the youngest running request back; its tokens are kept and computed again later."""
        assert self.running[-1] is request
        self.running.pop()
        self.pool.release(request.blocks)
        request.stored = 0
        self.waiting.appendleft(request)  # it is older than everyone who waits
        self._counts["preemptions"] += 1

    def _piece(self, request: Request, count: int) -> Piece:
        first, end = request.stored, request.stored + count
        draw = None
        if end == len(request.tokens):
            short = request.output_tokens < request.params.min_tokens
            forbidden = tuple(sorted(request.ends)) if short else ()
            draw = Draw(request.params, request.seed, request.tokens, request.prompt_tokens, forbidden)
        return Piece(request.id, request.tokens[first:end], first, request.blocks[: self.pool.blocks_for(end)], draw)

    def commit(self, batch: Batch, drawn: Mapping[str, Drawn]) -> list[Event]:
        """Take in what a step computed: `drawn` has an entry for every piece with a draw."""
        events = []
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += batch.tokens
        for piece in batch.pieces:
            request = self._requests.get(piece.id)
            if request is None or request.stored != piece.first:  # it ended while the step ran
                continue
            request.stored = piece.end
            self._publish(request, piece.first)
            if piece.draw is not None:
                events.append(self._accept(request, drawn[piece.id]))
        return events

    def _publish(self, request: Request, first: int) -> None:
        """Make the blocks that were filled by the step that began at `first` findable."""
        if not self.config.prefix_cache:
            return
        size = self.config.block_size
        digests = request.digest_blocks(request.stored // size, size)
        for index in range(first // size, request.stored // size):
            self.pool.publish(request.blocks[index], digests[index], request.tokens[index * size : (index + 1) * size])

    def _accept(self, request: Request, drawn: Drawn) -> Event:
        if drawn.fault:
            return self._end(request, "error", drawn.fault)
        if drawn.token in request.ends:
            return self._end(request, "stop", stop_token=drawn.token)
        request.tokens.append(drawn.token)
        self._counts["output_tokens"] += 1
        ended = request.output_tokens == request.params.max_tokens
        ending = self._end(request, "length").ending if ended else None
        return Event(request.id, drawn.token, drawn.logprobs, ending)

    def _end(self, request: Request, reason: EndReason, detail: str = "", stop_token: int | None = None) -> Event:
        """The one place where a request ends: it is forgotten here, so it cannot end twice."""
        del self._requests[request.id]
        if request.blocks or request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.release(request.blocks)
        self._endings[reason] += 1
        ending = Ending(reason, detail, stop_token, request.prompt_tokens, request.cached or 0, request.output_tokens)
        return Event(request.id, ending=ending)

    # ---- looking at it ----

    def check(self) -> None:
        """Assert all laws; for tests, after every step."""
        self.pool.check([r.blocks for r in self.running])
        assert all(not r.blocks and r.stored == 0 for r in self.waiting), "who waits holds nothing"
        assert {r.id for r in self.running} | {r.id for r in self.waiting} == set(self._requests)
        assert len(self.running) + len(self.waiting) == len(self._requests)
        for r in self.running:
            assert 0 <= r.stored < len(r.tokens) <= self.config.max_model_len
            assert r.stored <= len(r.blocks) * self.config.block_size

    def stats(self) -> Stats:
        """What this part of the engine knows; the rest is filled in above."""
        pool, counts = self.pool, self._counts
        return Stats(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks=pool.num_blocks,
            blocks_used=pool.num_blocks - pool.free,
            blocks_free=pool.free,
            blocks_cached=pool.idle,
            steps_total=counts["steps"],
            computed_tokens_total=counts["computed_tokens"],
            prompt_tokens_total=counts["prompt_tokens"],
            output_tokens_total=counts["output_tokens"],
            prefix_queries_total=counts["prefix_queries"],
            prefix_hits_total=counts["prefix_hits"],
            preemptions_total=counts["preemptions"],
            endings_total=dict(self._endings),
        )
