"""What vendors say of their GPUs: the peaks of which MBU and MFU are shares."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewbit.errors import RequestError, nearest_name


@dataclass(frozen=True)
class Peak:
    """Bytes/s of a GPU's memory, its dense BF16 FLOP/s, and those with 8-bit inputs (FP8, else INT8)."""

    bytes_per_s: float
    flops_per_s: float
    eight_bit_flops_per_s: float

    def mixed(self, eight_bit_share: float) -> float:
        """FLOP/s where this share of the operations has 8-bit inputs and the others BF16."""
        return 1 / (eight_bit_share / self.eight_bit_flops_per_s + (1 - eight_bit_share) / self.flops_per_s)


PEAKS = {
    "l4": Peak(0.30e12, 121e12, 242e12),
    "l40s": Peak(0.864e12, 362e12, 733e12),
    "a100": Peak(2.039e12, 312e12, 624e12),
    "h100": Peak(3.35e12, 989e12, 1979e12),
    "h200": Peak(4.8e12, 989e12, 1979e12),
    "b200": Peak(8.0e12, 2250e12, 4500e12),
}
"""SXM modules of the largest memory, where there are several."""
_SLOWER = {"pcie", "nvl", "40gb", "mig"}
"""Words in a device's name that say it is another card than the table's, or a slice of one."""


def peak_named(name: str) -> Peak:
    """The peaks of a GPU.

    Raises:
        RequestError: it is not in the table.
    """
    if name.lower() not in PEAKS:
        raise RequestError(f"--gpu {name}: its peaks are not known; {nearest_name(name.lower(), PEAKS)}")
    return PEAKS[name.lower()]


def peak_of(device: str) -> tuple[str, Peak] | None:
    """The table's name and peaks of a device by its driver's name, ``NVIDIA H100 80GB HBM3``; None: not known."""
    words = set(re.split(r"[\s-]+", device.lower()))
    if words & _SLOWER:
        return None
    return next(((name, peak) for name, peak in PEAKS.items() if name in words), None)
