"""Memory for weights that every step reads from end to end: in large pages, where the system has them.

With pages of 4 KiB a processor looks up an address every 64 reads of a cache line and stops fetching ahead at each end.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_CHUNK = 64 << 20  # what is asked of the system at a time; a page counts only once it is written
_LINE = 64


class _Chunks:
    """Tensors one behind the other; a chunk goes back when none of its tensors is left and the next one is begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._used = self._size = 0

    def take(self, size: int) -> memoryview:
        """`size` bytes of zeros, from a cache line on."""
        with self._lock:
            if self._memory is None or self._used + size > self._size:
                self._size = max(size, _CHUNK)
                self._memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._used = 0
                with suppress(AttributeError, OSError):  # not Linux, or a kernel without large pages
                    self._memory.madvise(mmap.MADV_HUGEPAGE)
            begin, self._used = self._used, -(-(self._used + size) // _LINE) * _LINE
            return memoryview(self._memory)[begin : begin + size]


_chunks = _Chunks()


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like `torch.zeros`, for weights."""
    if not (count := math.prod(shape)):
        return torch.zeros(*shape, dtype=dtype)
    return torch.frombuffer(_chunks.take(count * dtype.itemsize), dtype=dtype).view(*shape)
