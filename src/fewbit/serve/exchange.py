"""The request that is being answered: its id, its deadline, and what became of it. For the log, traces, time limits.

Each protocol answers within `exchange`; what lies deeper finds the exchange by `current`, without being handed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from fewbit.errors import FewbitError, RequestError

SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
LONGEST_S = 24 * 3600.0


class RequestTimeoutError(FewbitError):
    """A request that took longer than it was allowed to."""


@dataclass
class Exchange:
    """One request. Times are those of `time.perf_counter`.

    Attributes:
        id: Names it in the log, in traces and to the client.
        model: That answered; empty: none was reached.
        submitted: When its first prompt went to an engine.
        first_token: When the first token came.
        last_token: When the last one did.
        prompt_tokens, output_tokens, cached_tokens: Of all its texts that are complete.
        deadline: When it is ended, in the time of the event loop; None: never.
        limit_s: How long that was from its beginning.
    """

    id: str
    began: float = field(default_factory=time.perf_counter)
    model: str = ""
    submitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    deadline: float | None = None
    limit_s: float = math.inf

    def limit(self, seconds: float) -> None:
        """End it this long after its beginning; of several limits the shortest holds."""
        if seconds < self.limit_s:
            self.limit_s = seconds
            self.deadline = asyncio.get_running_loop().time() + seconds - (time.perf_counter() - self.began)

    def token(self) -> None:
        """A token came."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token

    def completed(self, prompt: int, output: int, cached: int) -> None:
        """One of its texts is complete: so many tokens."""
        self.prompt_tokens += prompt
        self.output_tokens += output
        self.cached_tokens += cached

    def late(self) -> RequestTimeoutError:
        """What the client is told when the time is up."""
        done = "before its first token" if self.first_token is None else "before its text was complete"
        return RequestTimeoutError(f"the request was ended {done}: its time limit is {self.limit_s:g} s")

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Leaves the block when the time is up.

        Raises:
            RequestTimeoutError: It is.
        """
        scope = asyncio.timeout_at(self.deadline)
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise self.late() from None
            raise


_current: ContextVar[Exchange | None] = ContextVar("fewbit_exchange", default=None)


def current() -> Exchange:
    """The request that is being answered here; one of its own where there is none."""
    return _current.get() or Exchange("")


@contextlib.contextmanager
def exchange(request_id: str | None = None) -> Iterator[Exchange]:
    """Answer a request within this block.

    Args:
        request_id: As the client named it; taken if it is short and of plain characters, else one is made.
    """
    sane = request_id is not None and SANE_ID.fullmatch(request_id)
    made = Exchange(request_id if request_id is not None and sane else uuid.uuid4().hex)
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


def seconds_of(text: str) -> float:
    """The value of ``X-Request-Timeout``.

    Raises:
        RequestError: It is no time.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_S:
        raise RequestError(
            f"X-Request-Timeout must be a number of seconds, more than 0 and at most {LONGEST_S:g}, got '{text[:60]}'"
        )
    return value
