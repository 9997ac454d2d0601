"""HTTP in, text out: OpenAI's protocol and KServe's as thin coats over one way of generating.

The room is also the function that most people want of it: ``fewbit.serve(DIR)`` is `fewbit.serve.handle.serve`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from fewbit.serve.app import create_app
from fewbit.serve.handle import Server, serve
from fewbit.serve.models import Models
from fewbit.serve.run import bind, serve_app

__all__ = ["Models", "Server", "bind", "create_app", "serve", "serve_app"]


class _Room(ModuleType):
    """A module that can be called: ``fewbit.serve`` must be the function and, since Python says so, this package."""

    def __call__(self, *args: Any, **options: Any) -> Server:
        return serve(*args, **options)


sys.modules[__name__].__class__ = _Room
