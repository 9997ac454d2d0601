"""Looking the machine over: what `fewbit doctor` prints."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit.numerics.format import FORMATS
from fewbit.numerics.reference import quantize
from fewbit.ops.cpu.build import library
from fewbit.ops.device import device_info
from fewbit.version import __version__


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is as it should be, and whether fewbit cannot do without."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


def examine(device: torch.device) -> list[Finding]:
    """Look at versions, device, disk and arithmetic."""
    info = device_info(device)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    found = [
        Finding("fewbit", True, f"{__version__} at {Path(__file__).parents[1]}"),
        Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", True, torch.__version__),
        Finding("device", True, f"{info}, {info.free_bytes / 2**30:.1f} of {info.memory_bytes / 2**30:.1f} GiB free"),
        Finding("temporary space", free > 2**30, f"{free / 2**30:.1f} GiB in {tempfile.gettempdir()}"),
    ]
    for name, use in (
        ("openai", "fewbit demo"),
        ("huggingface-hub", "Hub ids in place of directories"),
        ("triton", "GPU kernels"),
    ):
        try:
            found.append(Finding(name, True, importlib.metadata.version(name), needed=False))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, f"not installed; needed for {use}", needed=False))
    found += [_cpu_kernels(), _arithmetic(device)]
    return found


def _cpu_kernels() -> Finding:
    """Whether few-bit weights can be multiplied on the CPU as they are."""
    built = library()
    if isinstance(built, str):
        return Finding("CPU kernels", False, built, needed=False)
    alone = "" if built.threads else ", on one thread: the compiler has no OpenMP"
    how = f"{built.usable[0]}{alone}, compiled by {built.compiler}, in {built.path}"
    rounding = "inputs of few-bit weights are rounded to INT8, --exact leaves them as they are"
    return Finding("CPU kernels", True, f"{how}; {rounding}", needed=False)


def _arithmetic(device: torch.device) -> Finding:
    """Every format rounds a matrix, on the device and on the CPU, to the same bits."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    wrong = [name for name, fmt in FORMATS.items() if not quantize(x.to(device), fmt).to("cpu").equal(quantize(x, fmt))]
    detail = f"{len(FORMATS)} formats round alike on {device} and on the CPU"
    return Finding("arithmetic", not wrong, f"{', '.join(wrong)} round differently on {device}" if wrong else detail)
