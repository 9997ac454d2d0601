"""An event loop whose time stands still while anything happens, and jumps when nothing does.

What is scripted to take an hour takes none, and takes exactly an hour by `loop.time`. So delays are compared with the
truth to the microsecond, on a machine however busy. TCP between two ends in one loop goes over a unix socket, where
bytes have arrived once they are sent: the kernel holds nothing back while the time jumps.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Coroutine
from typing import Any

_OUTSIDE_S = 5.0  # with no timer left, only a thread can go on


class _Jumping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if ready := super().select(0):
            return ready
        if timeout is None:
            return super().select(_OUTSIDE_S)
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        self._inside: dict[int, str] = {}  # ports that are listened on here, and the unix socket of each
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    async def create_server(self, factory, *args, **kwargs):
        outer = await super().create_server(factory, *args, **kwargs)
        port = outer.sockets[0].getsockname()[1]
        self._inside[port] = f"\0fewbit-{os.getpid()}-{port}"
        inner, close = await self.create_unix_server(factory, self._inside[port]), outer.close

        def close_both() -> None:
            self._inside.pop(port, None)
            inner.close()
            close()

        outer.close = close_both
        return outer

    async def create_connection(self, factory, host=None, port=None, **kwargs):
        if port in self._inside:
            return await self.create_unix_connection(factory, self._inside[port])
        return await super().create_connection(factory, host, port, **kwargs)


def run_virtually(main: Coroutine) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
