"""HTTP in, text out: OpenAI's protocol and KServe's as thin coats over one way of generating."""

from __future__ import annotations

from fewbit.serve.app import create_app
from fewbit.serve.run import bind, serve, serve_app

__all__ = ["bind", "create_app", "serve", "serve_app"]
