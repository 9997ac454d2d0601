"""What runs in the next step. Integers only: no torch, no text, no clock.

A request waits, runs, and ends exactly once:

    submit ──► waiting ──admit──► running ──commit──► ended (stop, length, error)
                  ▲                  │
                  └────preempted─────┘                abort: from anywhere to ended

Of its tokens (prompt and output so far) the first `stored` have K and V in its blocks; the others are *pending*. A
request with one pending token decodes, one with more is in its prefill, also when it comes back after a preemption.

Who gets what: every decode first (so a long prompt never stalls those who are being answered), oldest first; then
prefill chunks of running requests in what is left of the budget; then waiting requests. The order is that of priority
(the lowest number first) and, among equals, of arrival; a request that was put back keeps its place in it. The first
that waits therefore starts in the very next step that has room for it. Nobody who runs is put back for a better
priority, but who keeps sending better ones can keep the others waiting for ever.

A step can be planned while the one before it still runs: `advance` then counts that step's tokens as stored and puts
`PENDING` where its choice will stand; `commit` fills it in. At most one step is under way when another is planned.

Nothing can get stuck: `check_request` refuses what could never fit, and the last in order is put back first, so the
first of those who run can always take the blocks of all others; it finishes, and what it held is freed.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping

from fewbit.engine.batch import PENDING, Batch, Draw, Drawn, Echo, Piece, looks_back
from fewbit.engine.blocks import BlockPool
from fewbit.engine.check import check_request
from fewbit.engine.config import EngineConfig
from fewbit.engine.request import Matcher, Request
from fewbit.engine.types import Ending, EndReason, Event, GenerateRequest, QueueFullError, Stats
from fewbit.errors import RequestError

MAX_ECHO = 512
"""Positions of a prompt that one event reports at most."""


class Scheduler:
    """Requests in, batches out, results in, events out. One thread only."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.prefix_cache)
        self.waiting: list[Request] = []  # in order of priority and arrival
        self.running: list[Request] = []  # in the same order
        self._requests: dict[str, Request] = {}
        self._serials = itertools.count(1)
        self._seeds = random.Random(config.seed) if config.seed is not None else random.SystemRandom()
        self._tainted: list[int] = []  # blocks that must be wiped before anyone reads them
        self._counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()

    # ---- in and out ----

    def submit(self, request: GenerateRequest, matcher: Matcher | None = None) -> None:
        """Queue a request, with a matcher of its own if it has a grammar.

        Raises:
            QueueFullError: the queue is full.
            RequestError: it cannot be honoured.
        """
        check_request(request, self.config)
        if request.id in self._requests:
            raise RequestError(f"a request with the id '{request.id}' is still running; choose another id", "id")
        if len(self.waiting) >= self.config.max_queued:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already (max_queued {self.config.max_queued}); retry later"
            )
        tokens, most = self.waiting_tokens, self.config.max_queued_tokens
        if most is not None and self.waiting and tokens + len(request.prompt) > most:
            raise QueueFullError(
                f"{tokens} tokens are waiting already, and a prompt of {len(request.prompt)} would make them more than "
                f"{most} (max_queued_tokens); retry later"
            )
        given = request.params.seed
        seed = self._seeds.getrandbits(64) if given is None else given
        new = Request(request, seed, self.config.eos_token_ids, next(self._serials), matcher)
        self._requests[request.id] = new
        _insert(self.waiting, new)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now. An id that is unknown, or ended already, is nothing to worry about: no event."""
        request = self._requests.get(request_id)
        return [] if request is None else [self._end(request, "abort")]

    def fail(self, batch: Batch, detail: str) -> list[Event]:
        """End the requests of a step that went wrong."""
        found = [request for piece in batch.pieces if (request := self._find(piece)) is not None]
        return [self._end(request, "error", detail) for request in found]

    @property
    def waiting_tokens(self) -> int:
        """Tokens that those who wait would have to compute."""
        return sum(len(request.tokens) for request in self.waiting)

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
        due = [r for r in self.running if r.due]
        decoding = [r for r in due if r.pending == 1]
        prefilling = [r for r in due if r.pending > 1]
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
                request = self.waiting.pop(0)
                _insert(self.running, request)
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
        if request.echoing:  # what was not reported has to be computed
            known = min(known, request.echoed // size)
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
            looked = self.config.prefix_cache and not (request.echoing and request.echoed < size)
            self._counts["prefix_queries"] += request.prompt_tokens if looked else 0
            self._counts["prefix_hits"] += request.stored
        return True

    def _preempt(self, request: Request) -> None:
        """Put the last running request back; its tokens are kept and computed again later."""
        assert self.running[-1] is request
        self.running.pop()
        self.pool.release(request.blocks)
        request.stored = 0
        _insert(self.waiting, request)
        self._counts["preemptions"] += 1

    def _piece(self, request: Request, count: int) -> Piece:
        first, end = request.stored, request.stored + count
        draw = None
        if end == len(request.tokens) and request.params.max_tokens:
            short = request.output_tokens < request.params.min_tokens
            forbidden = tuple(sorted(request.ends)) if short else request.unwanted
            mask = None if request.matcher is None else request.matcher.mask()
            draw = Draw(request.params, request.seed, request.tokens, request.prompt_tokens, forbidden, mask)
        blocks = request.blocks[: self.pool.blocks_for(end)]
        echo = self._echo(request, first, end) if request.params.prompt_logprobs is not None else None
        return Piece(request.id, request.tokens[first:end], first, blocks, draw, echo, request.serial)

    def _echo(self, request: Request, first: int, end: int) -> Echo | None:
        """What is still to be reported of the positions from `first` to `end`."""
        first, end = max(first, request.echoed), min(end, request.prompt_tokens - 1)
        if first >= end:
            return None
        return Echo(first, request.tokens[first + 1 : end + 1], request.params.prompt_logprobs or 0)

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
        """Take in what a step computed: `drawn` has an entry for every piece with a draw or an echo."""
        events: list[Event] = []
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
            outcome = drawn[piece.id] if piece.draw or piece.echo else Drawn()
            if outcome.fault:
                events.append(self._end(request, "error", outcome.fault, impossible=outcome.impossible))
                continue
            if kept:
                self._publish(request, piece.first, piece.end)
            events += self._echoed(request, piece.echo, outcome)
            if piece.draw is not None:
                events.append(self._accept(request, outcome, piece.end))
            elif request.params.max_tokens == 0 and piece.end == request.prompt_tokens:
                events.append(self._end(request, "length"))
        return events

    def _publish(self, request: Request, first: int, end: int) -> None:
        """Make the blocks that were filled by the step from `first` to `end` findable."""
        if not self.config.prefix_cache:
            return
        size = self.config.block_size
        digests = request.digest_blocks(end // size, size)
        for index in range(first // size, end // size):
            self.pool.publish(request.blocks[index], digests[index], request.tokens[index * size : (index + 1) * size])

    def _echoed(self, request: Request, echo: Echo | None, drawn: Drawn) -> Iterator[Event]:
        """What a step found out about the prompt, less what an earlier one said before the request was put back."""
        if echo is None:
            return
        assert echo.first <= request.echoed, "positions are reported in order"
        new = drawn.prompt_logprobs[request.echoed - echo.first :]
        request.echoed += len(new)
        for at in range(0, len(new), MAX_ECHO):
            yield Event(request.id, prompt_logprobs=new[at : at + MAX_ECHO])

    def _accept(self, request: Request, drawn: Drawn, at: int) -> Event:
        """The token at position `at` is known."""
        if drawn.token in request.ends:
            del request.tokens[at:]
            return self._end(request, "stop", stop_token=drawn.token)
        request.tokens[at] = drawn.token
        self._counts["output_tokens"] += 1
        reason, detail = self._after(request, at)
        # a fault after a token is the grammar's, which is the request's own
        ending = None if reason is None else self._end(request, reason, detail, impossible=reason == "error").ending
        return Event(request.id, drawn.token, drawn.logprobs, ending)

    def _after(self, request: Request, at: int) -> tuple[EndReason | None, str]:
        """Whether the token at `at` is the last one, and why."""
        said, least = at + 1 - request.prompt_tokens, request.params.min_tokens
        if request.matcher is not None:
            try:
                request.matcher.accept(request.tokens[at])
                done = request.matcher.done
                if not done:
                    request.matcher.mask()  # if there is none, this is the place to say so
            except RequestError as error:
                return "error", str(error)
            if done and said < least:
                return "error", f"the grammar is complete after {said} tokens, fewer than min_tokens ({least})"
            if done:
                return "stop", ""
        return ("length" if said == request.params.max_tokens else None), ""

    def _end(
        self,
        request: Request,
        reason: EndReason,
        detail: str = "",
        stop_token: int | None = None,
        impossible: bool = False,
    ) -> Event:
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
        counts = request.prompt_tokens, request.cached or 0, request.output_tokens
        ending = Ending(reason, detail, stop_token, *counts, impossible)
        return Event(request.id, ending=ending)

    # ---- looking at it ----

    def check(self) -> None:
        """Assert all laws; for tests, after every step."""
        self.pool.check([r.blocks for r in self.running])
        assert all(not r.blocks and r.stored == 0 for r in self.waiting), "who waits holds nothing"
        assert {r.id for r in self.running} | {r.id for r in self.waiting} == set(self._requests)
        assert len(self.running) + len(self.waiting) == len(self._requests)
        assert all(q == sorted(q, key=_place) for q in (self.running, self.waiting)), "queues are in order"
        for r in self.running:
            assert 0 <= r.stored <= len(r.tokens) <= self.config.max_model_len
            assert r.stored < len(r.tokens) or (r.flying and not r.params.max_tokens), "there is something to do"
            assert r.stored <= len(r.blocks) * self.config.block_size

    def stats(self) -> Stats:
        """What this part of the engine knows; the rest is filled in above."""
        pool, counts = self.pool, self._counts
        return Stats(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=self.waiting_tokens,
            waiting_preempted=sum(request.cached is not None for request in self.waiting),
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


def _place(request: Request) -> tuple[int, int]:
    return request.place


def _insert(queue: list[Request], request: Request) -> None:
    bisect.insort(queue, request, key=_place)
