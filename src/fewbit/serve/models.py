"""The models of one server: which there are, and one of them for as long as a request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.requests import Request

from fewbit.engine.types import EngineDownError, OverloadedError
from fewbit.serve.body import shown
from fewbit.serve.exchange import current
from fewbit.serve.loading import Given, Loader, LoadError, ModelState, Slot, Source
from fewbit.serve.metrics import Metrics
from fewbit.serve.problems import UnknownModelError
from fewbit.serve.service import Service

__all__ = ["LEASES", "LoadError", "ModelState", "Models", "Source"]

LEASES = "fewbit.leases"
"""Where a request's scope keeps the `AsyncExitStack` of the models it holds; the outermost application closes it."""

_SHOWN = 20  # names that an error lists


class Models:
    """The models of one server, by name.

    Args:
        services: That are loaded already; they belong to the caller.
        metrics: Of the server.
        source: Where models come from, instead; see `fewbit.serve.loading`.
        max_loaded: Models that may be loaded at a time; None: no limit.
        on_demand: Whether a request loads its model; else only `load` does.
        drain_s: How long `unload` lets requests that run go on.

    Attributes:
        metrics: Of the server.
        draining: No new work is taken; what runs may finish.
        in_flight: Requests that are being answered.
        trust_request_chat_template: Whether requests may bring a chat template, or variables for the model's own.
    """

    def __init__(
        self,
        services: Iterable[Service],
        metrics: Metrics,
        source: Source | None = None,
        *,
        max_loaded: int | None = None,
        on_demand: bool = True,
        drain_s: float = 30.0,
    ) -> None:
        self.metrics = metrics
        self.draining = False
        self.in_flight = 0
        self.trust_request_chat_template = False
        self._on_demand = on_demand
        self._required: tuple[str, ...] = ()
        self._awaited: list[str] = []  # of them, those that have not been loaded yet
        self._lost: asyncio.Queue[str] = asyncio.Queue()
        given = list(services)
        self._loader = Loader(source or Given(given), metrics, max_loaded, drain_s, self._note_lost)
        for service in given:
            self._loader.slots[service.name].service = service

    # ---- which there are ----

    @property
    def names(self) -> list[str]:
        """What requests may call the models; the first is the one that a request without a name means."""
        self._loader.look()
        return list(self._loader.slots)

    @property
    def ready(self) -> list[Service]:
        """Those that are loaded."""
        return [slot.service for slot in self._loader.slots.values() if slot.service is not None]

    def states(self) -> list[ModelState]:
        """How it is with each of them."""
        self._loader.look()
        return [slot.state for slot in self._loader.slots.values()]

    def state(self, name: str) -> ModelState:
        """How it is with one of them.

        Raises:
            UnknownModelError: There is none of this name.
        """
        return self._slot(name).state

    def comes_on_demand(self, name: str) -> bool:
        """Whether a request for this model, which is not loaded, would load it: the last attempt did not fail just now.

        Raises:
            UnknownModelError: There is none of this name.
        """
        slot = self._slot(name)
        return self._on_demand and slot.service is None and not slot.failed and slot.name not in self._awaited

    # ---- is it well? ----

    def check_open(self) -> None:
        """Return if new work is welcome; raise an OverloadedError if the server is shutting down."""
        if self.draining:
            raise OverloadedError("the server is shutting down and takes no new requests")

    async def check_ready(self) -> None:
        """Return if requests would be answered now by every model that is loaded, or that is yet to be preloaded.

        Raises:
            OverloadedError: The server is shutting down.
            EngineDownError: A model is not loaded yet, or its engine is dead or hung.
        """
        self.check_open()
        for name in self._awaited:
            state = self._slot(name).state
            raise EngineDownError(f"the model '{name}' is not ready ({state.state}): {state.reason}")
        for found in await asyncio.gather(*(s.probe() for s in self.ready), return_exceptions=True):
            if isinstance(found, BaseException):
                raise found

    async def check_generates(self) -> None:
        """`check_ready`, and every engine makes a token.

        Raises:
            OverloadedError: The server is shutting down, or too much waits.
            EngineDownError: One of them does not.
        """
        await self.check_ready()
        for service in self.ready:
            async with self.lease(service.name) as held:
                await held.generate_one()

    # ---- a model for a request ----

    @asynccontextmanager
    async def lease(self, name: str | None = None) -> AsyncIterator[Service]:
        """A model, ready to answer, that stays until the block is left. It is loaded if need be.

        Args:
            name: Of the model; None: the client does not care.

        Raises:
            UnknownModelError: There is none of this name.
            OverloadedError: The server is shutting down, or models in use leave no room for this one.
            EngineDownError: It could not be loaded, or its engine is dead or hung.
        """
        self.check_open()
        slot = self._slot(name)
        async with self._loader.using(slot):
            if not (self._on_demand or slot.service or slot.opening):
                raise EngineDownError(f"the model '{slot.name}' is not loaded, and requests do not load models here")
            service = await self._loader.load(slot)
            service.client.health()
            yield service

    async def service(self, request: Request, name: str | None = None) -> Service:
        """`lease` for as long as the answer to an HTTP request takes, a stream's last byte included."""
        leases: AsyncExitStack = request.scope[LEASES]
        async with current().in_time():
            return await leases.enter_async_context(self.lease(name))

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts a request that shutting down waits for."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    # ---- loading and unloading ----

    async def load(self, name: str) -> None:
        """Load a model; returns when it is ready. One that is loaded stays as it is.

        Raises:
            UnknownModelError: There is none of this name.
            OverloadedError: The server is shutting down, or models in use leave no room.
            LoadError: It could not be loaded.
        """
        self.check_open()
        slot = self._slot(name)
        async with self._loader.using(slot):
            await self._loader.load(slot)

    async def unload(self, name: str) -> None:
        """Unload a model once the requests that use it have ended; they are ended after `drain_s`.

        Raises:
            UnknownModelError: There is none of this name.
        """
        await self._loader.unload(self._slot(name))

    async def preload(self, names: Sequence[str]) -> None:
        """Load models, one after the other; until that is done the server is not ready.

        Raises:
            FewbitError: What the first that could not be loaded said.
        """
        self._required = tuple(self._slot(name).name for name in names)
        self._awaited = list(self._required)
        for name in self._required:
            slot = self._slot(name)
            try:
                async with self._loader.using(slot):
                    await self._loader.load(slot, quiet=True)
                self._awaited.remove(name)
            except LoadError as error:
                raise error.__cause__ or error from None

    async def until_lost(self) -> None:
        """Wait for the engine of a model that was preloaded to be gone for good.

        Raises:
            EngineDownError: It is, and why.
        """
        raise EngineDownError(await self._lost.get())

    def end_all(self) -> None:
        """End what runs; clients are told."""
        for service in self.ready:
            service.end_all()

    async def close(self) -> None:
        """Unload everything, and stop what is being loaded."""
        await self._loader.close()

    def _note_lost(self, name: str, reason: str) -> None:
        if name in self._required:
            self._lost.put_nowait(f"the model '{name}' cannot be brought back: {reason}")

    def _slot(self, name: str | None) -> Slot:
        slots = self._loader.slots
        if name not in slots:
            self._loader.look()
            slots = self._loader.slots
        if name is None and slots:
            return next(iter(slots.values()))
        if name is None:
            raise UnknownModelError("no model is served here yet", "model")
        if name not in slots:
            served = " and ".join(f"'{n}'" for n in itertools.islice(slots, _SHOWN)) or "none"
            verb = "are" if len(slots) > 1 else "is"
            raise UnknownModelError(f"the model '{shown(name)}' is not served here, {served} {verb}", "model")
        return slots[name]
