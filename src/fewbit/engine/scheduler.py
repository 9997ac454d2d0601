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

A step can be planned while the one before it still runs: `advance` then counts that step's tokens as stored and puts
`PENDING` where its choice will stand; `commit` fills it in. At most one step is under way when another is planned.

Nothing can get stuck: `check_request` refuses what could never fit, the youngest is put back first, so the oldest can
always take the blocks of everybody else, and what it finishes is freed.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Mapping

from fewbit.engine.batch import PENDING, Batch, Draw, Drawn, Piece, looks_back
from fewbit.engine.blocks import BlockPool, chain
from fewbit.engine.check import check_request
from fewbit.engine.config import EngineConfig
from fewbit.engine.types import Ending, EndReason, Event, GenerateRequest, OverloadedError, Stats
from fewbit.errors import RequestError


class Request:
    """The life of one request."""

    __slots__ = (
        "blocks", "cached", "digests", "ends", "flying", "id", "params", "prompt_tokens", "seed", "serial", "stored",
        "tokens",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, seed: int, eos: tuple[int, ...], serial: int) -> None:
        self.serial = serial
        self.flying: list[int] = []  # first positions of the pieces that were advanced and not committed
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
        self._serials = itertools.count(1)
        self._seeds = random.Random(config.seed) if config.seed is not None else random.SystemRandom()
        self._tainted: list[int] = []  # blocks that must be wiped before anyone reads them
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
        self._requests[request.id] = new = Request(request, seed, self.config.eos_token_ids, next(self._serials))
        self.waiting.append(new)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now. An id that is unknown, or ended already, is nothing to worry about: no event."""
        request = self._requests.get(request_id)
        return [] if request is None else [self._end(request, "abort")]

    def fail(self, batch: Batch, detail: str) -> list[Event]:
        """End the requests of a step that went wrong."""
        found = [request for piece in batch.pieces if (request := self._find(piece)) is not None]
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
        # who has all its tokens, the last one still being chosen, has nothing more to compute
        decoding = [r for r in self.running if r.pending == 1 and r.output_tokens < r.params.max_tokens]
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
            while self.waiting and len(self.running) < self.config.max_batch and self._worth(self.waiting[0], left):
                if not self._admit(self.waiting[0]):
                    break
                request = self.waiting.popleft()
                self.running.append(request)
                plan[request] = min(request.pending, left)
                left -= plan[request]
        assert plan or not self._requests or self.flying, "there is always somebody who can go on"
        pieces = [self._piece(request, count) for request, count in plan.items()]
        wiped, self._tainted = (self._tainted, []) if pieces else ([], self._tainted)
        return Batch(pieces, wiped)

    def _worth(self, request: Request, left: int) -> bool:
        """Whether what is left of the budget is enough to start on: a prompt is not cut for the sake of a scrap."""
        return left >= min(len(request.tokens), max(self.config.max_batch_tokens // 8, 1))

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
        blocks = request.blocks[: self.pool.blocks_for(end)]
        return Piece(request.id, request.tokens[first:end], first, blocks, draw, request.serial)

    @property
    def flying(self) -> bool:
        """Whether a step was advanced and not committed yet."""
        return any(r.flying for r in self._requests.values())

    @property
    def looks_back(self) -> bool:
        """Whether somebody's next draw needs to know the tokens of the step under way."""
        return any(looks_back(r.params) for r in self.running)

    def advance(self, batch: Batch) -> None:
        """Count a step that was launched as done, so that the next one can be planned; `commit` follows."""
        for piece in batch.pieces:
            request = self._find(piece)
            if request is None or request.stored != piece.first:  # ended, or put back, since it was planned
                continue
            request.flying.append(piece.first)
            request.stored = piece.end
            if piece.draw is not None:
                request.tokens.append(PENDING)

    def _find(self, piece: Piece) -> Request | None:
        """The request that a piece belongs to, unless it has ended."""
        request = self._requests.get(piece.id)
        return request if request is not None and request.serial == piece.serial else None

    def commit(self, batch: Batch, drawn: Mapping[str, Drawn]) -> list[Event]:
        """Take in what a step computed: `drawn` has an entry for every piece with a draw."""
        events = []
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += batch.tokens
        for piece in batch.pieces:
            request = self._find(piece)
            if request is None:  # it ended while the step ran
                continue
            if request.flying and request.flying[0] == piece.first:
                del request.flying[0]
                kept = request.stored >= piece.end  # else it was put back, and its blocks are others' now
            elif request.stored == piece.first:
                request.stored, kept = piece.end, True
                if piece.draw is not None:
                    request.tokens.append(PENDING)
            else:
                continue
            outcome = drawn[piece.id] if piece.draw is not None else None
            if kept and not (outcome and outcome.fault):
                self._publish(request, piece.first, piece.end)
            if outcome is not None:
                events.append(self._accept(request, outcome, piece.end))
        return events

    def _publish(self, request: Request, first: int, end: int) -> None:
        """Make the blocks that were filled by the step from `first` to `end` findable."""
        if not self.config.prefix_cache:
            return
        size = self.config.block_size
        digests = request.digest_blocks(end // size, size)
        for index in range(first // size, end // size):
            self.pool.publish(request.blocks[index], digests[index], request.tokens[index * size : (index + 1) * size])

    def _accept(self, request: Request, drawn: Drawn, at: int) -> Event:
        """The token at position `at` is known."""
        if drawn.fault or drawn.token in request.ends:
            del request.tokens[at:]
            if drawn.fault:
                return self._end(request, "error", drawn.fault)
            return self._end(request, "stop", stop_token=drawn.token)
        request.tokens[at] = drawn.token
        self._counts["output_tokens"] += 1
        ended = at + 1 - request.prompt_tokens == request.params.max_tokens
        ending = self._end(request, "length").ending if ended else None
        return Event(request.id, drawn.token, drawn.logprobs, ending)

    def _end(self, request: Request, reason: EndReason, detail: str = "", stop_token: int | None = None) -> Event:
        """The one place where a request ends: it is forgotten here, so it cannot end twice."""
        while request.tokens[-1] == PENDING:  # nobody will wait for it
            request.tokens.pop()
        del self._requests[request.id]
        if request.blocks or request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if reason == "error":  # what it stored may be no numbers, which not even masks keep from others
            self._tainted += self.pool.discard(request.blocks)
        else:
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
