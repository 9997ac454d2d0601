"""What the browser visits: a server in a thread, and what its models that are not there say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fewbit.serve import bind, serve_app

WAIT_S = 90.0
"""How long anything that has to happen may take, on a machine that may have others to serve."""
SAYS = "un, deux, trois 🙂 quatre\ncinq"
SAYS_SMALL = "un, deux, six 🙂 quatre\nneuf"


@contextmanager
def serving(app) -> Iterator[str]:
    """The URL of `app`, served in a thread so that tests can look at its engines."""
    listener, ready, url = bind(port=0), threading.Event(), []

    async def main() -> None:
        await serve_app(app, listener, drain_s=2, on_ready=lambda u: (url.append(u), ready.set()))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(WAIT_S)
    try:
        yield url[0]
    finally:
        app.state.models.draining = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
