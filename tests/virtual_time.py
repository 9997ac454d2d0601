"""An event loop whose time stands still while anything happens, and jumps when nothing does.

Sockets are real; what is scripted to take an hour takes none, and takes exactly an hour by `loop.time`. So delays are
compared with the truth to the microsecond, on a machine however busy.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any

_UNDERWAY_S = 0.0002  # what the kernel may still have to carry from one socket of this process to another
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
            time.sleep(_UNDERWAY_S)
            if ready := super().select(0):
                return ready
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(main: Coroutine) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
