"""fewbit makes language models small and runs them fast.

The names most people need; each is imported when first used, so that ``import fewbit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbit.version import __version__

if TYPE_CHECKING:
    from fewbit.checkpoint import Checkpoint, export, open_checkpoint
    from fewbit.client import Client
    from fewbit.compress import Recipe, read_recipe
    from fewbit.compress.fake import quantizers
    from fewbit.compress.module import quantize
    from fewbit.compress.quantizer import Quantizer
    from fewbit.compress.state import restore_state, save_state
    from fewbit.demo import demo_model
    from fewbit.deployment import deploy
    from fewbit.errors import FewbitError
    from fewbit.local import Engine
    from fewbit.serve import serve

_HOMES = {
    "Checkpoint": "fewbit.checkpoint",
    "export": "fewbit.checkpoint",
    "open_checkpoint": "fewbit.checkpoint",
    "Recipe": "fewbit.compress",
    "read_recipe": "fewbit.compress",
    "Quantizer": "fewbit.compress.quantizer",
    "quantize": "fewbit.compress.module",
    "quantizers": "fewbit.compress.fake",
    "restore_state": "fewbit.compress.state",
    "save_state": "fewbit.compress.state",
    "Client": "fewbit.client",
    "Engine": "fewbit.local",
    "FewbitError": "fewbit.errors",
    "demo_model": "fewbit.demo",
    "deploy": "fewbit.deployment",
}

__all__ = [
    "Checkpoint",
    "Client",
    "Engine",
    "FewbitError",
    "Quantizer",
    "Recipe",
    "__version__",
    "demo_model",
    "deploy",
    "export",
    "open_checkpoint",
    "quantize",
    "quantizers",
    "read_recipe",
    "restore_state",
    "save_state",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name == "serve":  # a room that can be called
        return importlib.import_module("fewbit.serve")
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
