"""Reading ahead and writing behind: threads for the disk while the device computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")
_HANDS = 4


class Disk:
    """Reads one thing after another, and writes likewise, in the order in which they were asked for; a context manager.

    Args:
        seconds: the time spent is added here, by stage.
        overlaps: in threads; else a read is done when its result is asked for and a write at once, so that no more
            is held than without.
    """

    def __init__(self, seconds: dict[str, float], overlaps: bool) -> None:
        self._seconds = seconds
        self._reader, self._writer, self._hands = (
            ThreadPoolExecutor(count, name) if overlaps else None
            for count, name in ((1, "reader"), (1, "writer"), (_HANDS, "hand"))
        )
        self._writes: list[Future[None]] = []
        self._before: list[Future[None]] = []
        self._failed = False  # after a write that failed none is done: the last notes that all before it were

    def read(self, call: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Begin to read; what is returned gives the result, or raises what went wrong."""
        if self._reader is None:
            return lambda: self._timed("load", call, *args)
        return self._reader.submit(self._timed, "load", call, *args).result

    def each(self, call: Callable[[A], T], items: Iterable[A]) -> Iterable[T]:
        """What `call` gives for each item, in order: parts of what is read, several at a time."""

        def work(item: A) -> T:
            with torch.inference_mode():  # is not inherited by a thread
                return call(item)

        return self._hands.map(work, items) if self._hands else map(work, items)

    def write(self, call: Callable[..., None], *args: Any) -> None:
        """Write soon. Raises what went wrong with earlier ones."""
        if self._writer is None:
            self._timed("write", call, *args)
            return
        for write in [w for w in self._writes if w.done()]:
            write.result()
            self._writes.remove(write)
        self._writes.append(self._writer.submit(self._try, call, *args))

    def catch_up(self) -> None:
        """Wait for what was asked for before the last call: a slow disk holds the loop up before memory is full."""
        for write in self._before:
            write.result()
        self._before = list(self._writes)

    def wait(self) -> None:
        """Until everything is written. Raises what went wrong."""
        for write in self._writes:
            write.result()
        self._writes.clear()

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            self._timed("write", call, *args)
        except BaseException:
            self._failed = True
            raise

    def _timed(self, stage: str, call: Callable[..., T], *args: Any) -> T:
        start = time.perf_counter()
        try:
            with torch.inference_mode():  # is not inherited by a thread
                return call(*args)
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._reader, self._writer, self._hands):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
