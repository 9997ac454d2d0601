"""A server beside whatever else a script or a notebook does: ``fewbit.serve(DIR)``."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, RecipeError

log = logging.getLogger(__name__)


class Server:
    """A ``fewbit serve`` in a process of its own. It ends with this one; ``with`` ends it with the block.

    What it writes goes to the log of this module.

    Attributes:
        url: Where it answers.
    """

    def __init__(self, arguments: Sequence[str], quiet: bool = False) -> None:
        """Start it and wait until it answers.

        Args:
            arguments: Of ``fewbit serve``, without ``-q``: of what that hides one line is waited for.
            quiet: Whether what it writes is of no more interest than for debugging.

        Raises:
            FewbitError: In the server's own words, why it does not.
        """
        command = [sys.executable, "-m", "fewbit.cli.child", "serve", *arguments]
        self._log = logging.DEBUG if quiet else logging.INFO
        # in a group of its own: Ctrl-C is this process's to take, which then tells the server
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
        self.url = ""
        said = ""
        try:
            for said in self._lines():
                if found := re.search(r"""(?:^|")serving .* on (https?://\S+)""", said):
                    self.url = found[1]
                    break
        except BaseException:
            self.stop()
            raise
        if not self.url:
            status = self._process.wait()
            raise RecipeError(said.removeprefix("fewbit: ") or f"the server ended with status {status}")
        # a pipe that nobody reads would stop the server
        threading.Thread(target=deque, args=(self._lines(), 0), name="fewbit-serve-log", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process that answers HTTP; the engine's is its child."""
        return self._process.pid

    def _lines(self) -> Iterator[str]:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            log.log(self._log, "%s", line.rstrip())
            yield line.rstrip()

    def wait(self) -> None:
        """Until it ends, or until Ctrl-C, which ends it.

        Raises:
            FewbitError: It ended by itself, and not well.
        """
        try:
            status = self._process.wait()
        except BaseException:
            self.stop()
            raise
        if status:
            raise FewbitError(f"the server at {self.url} ended with status {status}")

    def stop(self) -> None:
        """Take nothing new, let what runs finish (`drain` seconds at most), and end."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def serve(model: str | Path, port: int = 8000, *, block: bool = False, quiet: bool = False, **options: Any) -> Server:
    """Serve a model over HTTP, in a process of its own.

        with fewbit.serve("models/storyteller") as server:
            print(fewbit.Client(server.url).query(["Once upon a time"]))

    Args:
        model: Its directory, or a Hub id.
        port: To listen on; 0: a free one.
        block: Return only when the server has ended; Ctrl-C ends it.
        quiet: Log what the server writes as DEBUG, not as INFO.
        **options: Of the command ``fewbit serve``, with ``_`` for ``-``: ``max_batch=8``, ``prefix_cache=False``.

    Raises:
        FewbitError: In the server's own words, why it does not start.
    """
    server = Server([str(model), *arguments_of({"port": port, **options})], quiet)
    if block:
        server.wait()
    return server


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Keyword arguments as a command line: ``True`` and ``False`` are flags, None says nothing, a list repeats."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for one in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
                words += [f"--{flag}", str(one)]
    return words
