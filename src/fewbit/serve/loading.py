"""Loading and unloading the models of one server, within what memory there is.

A model is loaded once, however many ask for it meanwhile; if that fails all of them are told why, and whoever asks next
tries again. Where the budget or `max_loaded` leave no room, the least recently used model that nobody uses is unloaded;
one in use never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from fewbit.engine.types import EngineDownError, OverloadedError
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.serve.metrics import Metrics
from fewbit.serve.service import Service

log = logging.getLogger(__name__)

ROOM_S = 30.0
"""How long a model waits to be loaded while all the memory is in use; then the request is refused."""

AGAIN_S = 30.0
"""For so long a model that could not be loaded is not ready; then it is said to be, since a request would try again.
Clients that ask before they send one would else never do so."""

State = Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
Tell = Callable[[str], None]


class ModelState(NamedTuple):
    """How it is with a model, in the words of Triton's repository index."""

    name: str
    state: State
    reason: str = ""


class LoadError(EngineDownError):
    """A model that could not be loaded; the next request tries again."""


class Source(Protocol):
    """Where models come from.

    Attributes:
        budget: Bytes that loaded models may take; None: no limit. Known once `cost` has answered.
    """

    budget: int | None

    def names(self) -> Sequence[str]:
        """Those there are now; the first is the default."""
        ...

    async def cost(self, name: str) -> int:
        """Bytes that the model will take.

        Raises:
            FewbitError: It cannot be opened.
        """
        ...

    async def open(self, name: str, metrics: Metrics, tell: Tell, lost: Tell) -> Service:
        """Load it.

        Args:
            name: Of the model.
            metrics: Of the server.
            tell: Told in words how far it is.
            lost: Told why, should its engine be gone for good some day.

        Raises:
            FewbitError: It cannot be loaded.
        """
        ...

    async def close(self, service: Service) -> None:
        """Let it go, and its memory."""
        ...


class Slot:
    """One model's place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.service: Service | None = None
        self.users = 0  # requests that use it or wait for it
        self.used = 0  # when it was last used: a number that grows
        self.cost = 0
        self.reason = ""
        self.failed_s: float | None = None  # when, if it could not be loaded the last time
        self.opening: asyncio.Task[Service] | None = None
        self.closing: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything goes on here, so that it may not be forgotten."""
        return self.service is not None or self.opening is not None or self.closing is not None or self.users > 0

    @property
    def idle(self) -> bool:
        """Whether it could be unloaded now."""
        return self.service is not None and self.closing is None and not self.users

    @property
    def failed(self) -> bool:
        """Whether it could not be loaded, and it is too early to say that another attempt may do better."""
        return self.failed_s is not None and time.monotonic() - self.failed_s < AGAIN_S

    @property
    def state(self) -> ModelState:
        """How it is with the model."""
        if self.closing is not None:
            return ModelState(self.name, "UNLOADING", self.reason)
        if self.opening is not None:
            return ModelState(self.name, "LOADING", self.reason)
        if self.service is None:
            return ModelState(self.name, "UNAVAILABLE", self.reason or "not loaded")
        try:
            self.service.client.health()
        except EngineDownError as error:
            return ModelState(self.name, "UNAVAILABLE", str(error))
        return ModelState(self.name, "READY")

    def say(self, reason: str) -> None:
        """What to answer to those who ask how it is."""
        self.reason = reason


class Loader:
    """Loads and unloads.

    Args:
        source: Where the models come from.
        metrics: Of the server.
        max_loaded: Models that may be loaded at a time; None: no limit.
        drain_s: How long `unload` lets requests that run go on.
        lost: Told of a model whose engine is gone for good, and why.
    """

    def __init__(
        self,
        source: Source,
        metrics: Metrics,
        max_loaded: int | None,
        drain_s: float,
        lost: Callable[[str, str], None],
    ) -> None:
        self._source, self._metrics = source, metrics
        self._max_loaded, self._drain_s = max_loaded, drain_s
        self._tell_lost = lost
        self._clock = itertools.count(1)
        self._making_room = asyncio.Lock()
        self._freed = asyncio.Event()
        self.slots: dict[str, Slot] = {}
        self.look()

    def look(self) -> None:
        """Take up what is new at the source, and forget what is gone from there and not loaded."""
        names = self._source.names()
        kept = {name: slot for name, slot in self.slots.items() if slot.busy}
        self.slots = {name: self.slots.get(name) or Slot(name) for name in names} | kept

    @contextlib.asynccontextmanager
    async def using(self, slot: Slot) -> AsyncGenerator[None]:
        """The model is not unloaded until the block is left; if it is going just now, wait until it is gone."""
        while slot.closing is not None:
            await asyncio.shield(slot.closing)
        slot.users += 1
        try:
            yield
        finally:
            slot.users -= 1
            slot.used = next(self._clock)
            self._freed.set()

    async def load(self, slot: Slot, quiet: bool = False) -> Service:
        """The model, loaded now if it was not.

        Args:
            slot: Its place.
            quiet: Whether the log says nothing if it fails, since the caller does.

        Raises:
            OverloadedError: Models in use leave no room.
            LoadError: It could not be loaded; its cause is the reason.
        """
        if slot.service is not None and slot.closing is None:
            return slot.service
        if slot.opening is None:
            slot.opening = asyncio.create_task(self._open(slot, quiet))
            slot.opening.add_done_callback(_seen)
        return await asyncio.shield(slot.opening)  # who asked may leave, the others still wait

    async def unload(self, slot: Slot, reason: str = "unloaded", drain_s: float | None = None) -> None:
        """Let a model go once nobody uses it any more; those who still do after `drain_s` are told."""
        if slot.opening is not None:
            await asyncio.wait([slot.opening])
        if slot.closing is None and slot.service is not None:
            limit = self._drain_s if drain_s is None else drain_s
            slot.closing = asyncio.create_task(self._close(slot, slot.service, reason, limit))
        if slot.closing is not None:
            await asyncio.shield(slot.closing)

    async def close(self) -> None:
        """Unload everything, and stop what is being loaded."""
        for slot in self.slots.values():
            if slot.opening is not None:
                slot.opening.cancel()
        await asyncio.gather(*(self.unload(slot, drain_s=0.0) for slot in self.slots.values()))

    async def _open(self, slot: Slot, quiet: bool) -> Service:
        def lost(reason: str) -> None:
            self._tell_lost(slot.name, reason)
            if slot.closing is None and slot.service is not None:
                slot.closing = asyncio.create_task(self._close(slot, slot.service, reason, 0.0))

        slot.reason = "waits for its turn to be loaded"
        try:
            await self._make_room(slot)
            slot.service = await self._source.open(slot.name, self._metrics, slot.say, lost)
            slot.reason, slot.failed_s = "", None
            self._metrics.of(slot.name).loaded(True)
        except OverloadedError as error:
            slot.reason = str(error)
            raise
        except FewbitError as error:
            slot.reason, slot.failed_s = str(error), time.monotonic()
            log.log(
                logging.DEBUG if quiet else logging.ERROR,
                "the model '%s' could not be loaded: %s", slot.name, slot.reason,
            )  # fmt: skip
            raise LoadError(f"the model '{slot.name}' could not be loaded: {slot.reason}") from error
        except Exception as error:
            slot.reason, slot.failed_s = f"failed with {type(error).__name__}", time.monotonic()
            log.exception("the model '%s' could not be loaded", slot.name)
            raise LoadError(f"the model '{slot.name}' could not be loaded: {slot.reason}") from error
        finally:
            slot.opening = None
            slot.used = next(self._clock)
            if slot.service is None:
                slot.cost = 0
                self._metrics.of(slot.name).loaded(False)
                self._freed.set()
        log.info("the model '%s' is loaded", slot.name)
        return slot.service

    async def _make_room(self, slot: Slot) -> None:
        """Take what the model needs, once there is room for it: others are unloaded until there is."""
        cost = await self._source.cost(slot.name)
        budget = self._source.budget
        if budget is not None and cost > budget:
            raise UnsupportedError(
                f"it takes {cost / 2**30:.2f} GiB, all models together may take {budget / 2**30:.2f}: raise "
                "--memory-budget, or lower --max-model-len, --max-batch or --kv-blocks"
            )
        try:
            async with asyncio.timeout(ROOM_S), self._making_room:
                while (held := self._held(slot)) and not self._fits(held, cost):
                    idle = [other for other in held if other.idle]
                    self._freed.clear()
                    if idle:
                        oldest = min(idle, key=lambda other: other.used)
                        await self.unload(oldest, f"unloaded to make room for '{slot.name}'")
                    else:
                        await self._freed.wait()
                slot.cost = max(cost, 1)
        except TimeoutError:
            names = ", ".join(f"'{other.name}'" for other in self._held(slot))
            raise OverloadedError(
                f"there is no room for the model '{slot.name}' while {names} are in use; try again later"
            ) from None

    def _held(self, slot: Slot) -> list[Slot]:
        """The other models that take memory, or are about to."""
        return [other for other in self.slots.values() if other is not slot and (other.cost or other.service)]

    def _fits(self, held: Sequence[Slot], cost: int) -> bool:
        if self._max_loaded is not None and len(held) >= self._max_loaded:
            return False
        budget = self._source.budget
        return budget is None or sum(other.cost for other in held) + cost <= budget

    async def _close(self, slot: Slot, service: Service, reason: str, drain_s: float) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    while slot.users:
                        self._freed.clear()
                        await self._freed.wait()
            service.end_all()
            await self._source.close(service)
        finally:
            slot.service, slot.closing, slot.cost, slot.reason = None, None, 0, reason
            self._freed.set()
        log.info("the model '%s' is unloaded: %s", slot.name, reason)


def _seen(task: asyncio.Task[Service]) -> None:
    """A failure that nobody waits for any more stands in the slot and in the log; that is enough."""
    if not task.cancelled():
        task.exception()


class Given:
    """Models that are open already and belong to somebody else: unloading one only hides it."""

    budget: int | None = None

    def __init__(self, services: Sequence[Service]) -> None:
        self._services = {service.name: service for service in services}

    def names(self) -> Sequence[str]:
        """See `Source`."""
        return list(self._services)

    async def cost(self, name: str) -> int:
        """See `Source`."""
        return 0

    async def open(self, name: str, metrics: Metrics, tell: Tell, lost: Tell) -> Service:
        """See `Source`."""
        return self._services[name]

    async def close(self, service: Service) -> None:
        """See `Source`."""
