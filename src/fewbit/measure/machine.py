"""What figures depend on besides the model: the device, its driver, and the versions of what ran."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from fewbit.ops.device import card_name, device_info
from fewbit.version import __version__

_ASKED = {
    "driver": "driver_version", "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit", "temperature_c": "temperature.gpu",
}  # fmt: skip


def versions(device: torch.device) -> dict[str, Any]:
    """What decides figures besides model and settings, to key rows and journals: the device, and what runs on it."""
    found = {"device": device_info(device).name, "fewbit": __version__, "torch": torch.__version__}
    if device.type != "cuda":
        return found | {"threads": torch.get_num_threads()}
    return found | {"driver": _driver(device)}


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions; of a GPU also the driver, and clocks, power limit and temperature as they are now."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device_info(device)),
        "fewbit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    if device.type != "cuda":
        return found | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    return found | {"cuda": torch.version.cuda} | _card(device)


@functools.cache
def _driver(device: torch.device) -> str | None:
    return _card(device).get("driver")


def _card(device: torch.device) -> dict[str, str]:
    """What the driver's own tool says; nothing where it is not there."""
    wanted = [f"--query-gpu={','.join(_ASKED.values())}", f"--id={card_name(device)}"]
    query = ["nvidia-smi", *wanted, "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = told.stdout.strip().split(", ")
    return dict(zip(_ASKED, values, strict=True)) if len(values) == len(_ASKED) else {}
