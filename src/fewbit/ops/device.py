"""What the machine is: asked once, passed around as plain facts."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbit.errors import UnsupportedError


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about one device.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: as the vendor calls it.
        capability: compute capability of a GPU, (0, 0) for a CPU.
        memory_bytes: memory in all.
        free_bytes: memory not in use now.
    """

    kind: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return self.name if self.kind == "cpu" else f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


def device_named(text: str) -> torch.device:
    """The device a user means by ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        UnsupportedError: no such device here.
    """
    if text == "auto":
        text = "cuda:0" if gpu_count() else "cpu"
    if text == "cpu":
        return torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UnsupportedError(f"unknown device '{text}'; expected cpu, cuda or cuda:N")
    count = gpu_count()
    number = int(index or 0)
    if number >= count:
        raise UnsupportedError(f"no device '{text}' here: PyTorch sees {count} CUDA devices; use --device cpu")
    return torch.device("cuda", number)


def arithmetic_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of activations: float32 on a CPU whatever is stored, else the checkpoint's own.

    Bfloat16 on a CPU is slower, and its sums depend on how a prompt was cut into chunks.
    """
    return torch.float32 if device.type == "cpu" else stored


def device_info(device: torch.device) -> DeviceInfo:
    """The facts about `device`, read now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceInfo(
            "cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), total, free
        )
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    return DeviceInfo("cpu", _cpu_name(), (0, 0), total, _available_bytes() or page * os.sysconf("SC_AVPHYS_PAGES"))


def card_name(device: torch.device) -> str:
    """What the driver's own tools call a GPU: PyTorch's numbers are others where CUDA_VISIBLE_DEVICES is set."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def forget_peak(device: torch.device) -> None:
    """Begin to count the peaks anew, where the system lets us: a model that ran before in this process is no matter."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def device_peak_bytes(device: torch.device) -> int:
    """Largest memory this process took from a GPU so far, what its allocator kept in store included; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:
        # not getrusage, to which on Linux the peak of the process that started this one counts too
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give memory that is no longer used back to the system.

    The C library keeps what was freed in pieces of up to 32 MB, and what a loop over layers frees and takes in turn
    does not fit the same holes: without this a process grows from layer to layer.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    """Glibc's malloc_trim; None in other C libraries."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def _cpu_name() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"CPU, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def _available_bytes() -> int:
    """Linux's own estimate of what can be had without swapping; 0 where there is none."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels, events and graphs go to `device` while this is entered: PyTorch's current device, kept by thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def rough_products() -> Iterator[None]:
    """Float32 products may be made of numbers rounded to 10 bits: where a GPU is eight times faster so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def to_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers on a device; to a GPU through pinned memory, so that the host waits for nothing that is under way."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    if isinstance(values, np.ndarray):  # which torch does not pin on the way
        return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy of a GPU's tensor in pinned memory, on its way."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def make_current(device: torch.device) -> None:
    """`current`, for the rest of this thread: a command has one device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def dependent_launches(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it is complete: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def gpu_name(device: torch.device) -> str:
    """What the vendor calls a GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


HOPPER_SHARED = 227 << 10
_LARGE_SHARED = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): HOPPER_SHARED,
    (10, 0): HOPPER_SHARED,
    (10, 3): HOPPER_SHARED,
}


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have (CUDA programming guide, technical specifications).

    An H100's where there is no GPU.
    """
    if device.type != "cuda":
        return HOPPER_SHARED
    return _LARGE_SHARED.get(torch.cuda.get_device_capability(device), 99 << 10)


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed that compiles our kernels."""
    return importlib.util.find_spec("triton") is not None


def gpu_count() -> int:
    """How many CUDA devices PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
