"""Starting, watching and stopping an engine process. No torch in here: the process that serves HTTP needs none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fewbit import errors
from fewbit.engine.config import EngineOptions
from fewbit.engine.socketclient import SocketClient
from fewbit.engine.types import EngineDownError
from fewbit.errors import FewbitError

_PREFIX = "fewbit-engine-"
COMMAND = (sys.executable, "-m", "fewbit.engine.process")


class EngineProcess:
    """A child that runs an engine. It dies with this process, however this one ends."""

    def __init__(self, command: Sequence[str], drain_s: float) -> None:
        self._folder = PrivateFolder()
        self.socket = self._folder.path / "engine.sock"
        self._drain_s = drain_s
        self._process: subprocess.Popen[str] | None = None
        self._error: OSError | None = None
        started = threading.Event()
        line = [*command, "--socket", str(self.socket), "--drain-s", str(drain_s)]
        # Linux ends the child when the *thread* that started it ends, so that thread has to live as long as the child
        self._thread = threading.Thread(
            target=self._live, args=(line, started), name="fewbit-engine-parent", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._error is not None:
            raise EngineDownError(f"the engine process cannot be started: {self._error}")

    def _live(self, command: list[str], started: threading.Event) -> None:
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            self._error = error
        started.set()
        if self._process is not None:
            self._process.wait()
        self._folder.remove()

    @property
    def process(self) -> subprocess.Popen[str]:
        """The child."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def exit_reason(self) -> str | None:
        """How it ended, in words; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait until the engine takes requests.

        Raises:
            FewbitError: what the engine reported, in its own class; EngineDownError if it just ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "progress" in message:
                progress(message["progress"])
            elif "error" in message:
                self.kill()
                raise _error_named(message["error"]["kind"], message["error"]["message"])
            elif "ready" in message:
                return
        self._thread.join(5)
        raise EngineDownError(f"the engine process {self.exit_reason()} before it was ready")

    async def connect(self) -> SocketClient:
        """A new client of this engine."""
        return await SocketClient.connect(self.socket)

    def stop(self) -> int:
        """Let running requests finish (at most `drain_s`), end the process and return its status."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self._drain_s + 5)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """End the process now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self._thread.join(5)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def spawn(
    model: str | Path,
    options: EngineOptions | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    drain_s: float = 30.0,
    command: Sequence[str] = COMMAND,
) -> EngineProcess:
    """Start an engine process and wait until it takes requests.

    Args:
        model: the model directory.
        options: see `EngineOptions`.
        progress: told in words what the process is doing.
        drain_s: how long `EngineProcess.stop` and a SIGTERM wait for running requests.
        command: the program, for tests.

    Raises:
        FewbitError: the engine could not open the model, in the words it would have used here.
    """
    child = launch(model, options, drain_s=drain_s, command=command)
    try:
        child.wait_ready(progress or (lambda text: None))
    except BaseException:
        child.kill()
        raise
    return child


def launch(
    model: str | Path,
    options: EngineOptions | None = None,
    *,
    drain_s: float = 30.0,
    command: Sequence[str] = COMMAND,
) -> EngineProcess:
    """Start an engine process, for whoever waits for it in another way; see `spawn`."""
    given = msgspec.json.encode(options or EngineOptions()).decode()
    return EngineProcess([*command, "--model", str(model), "--options", given], drain_s)


def _error_named(kind: str, message: str) -> FewbitError:
    found = getattr(errors, kind, None) if kind else None
    if isinstance(found, type) and issubclass(found, FewbitError):
        return found(message)
    return EngineDownError(f"the engine process could not be started: {message}")


class PrivateFolder:
    """A new folder that only this user can enter, with a path short enough for a socket (108 bytes on Linux).

    It is locked while the process lives that made it: whoever makes another takes away those that were left behind by
    processes which were killed.

    Attributes:
        path: Where it is.

    Raises:
        EngineDownError: There is no place for it.
    """

    def __init__(self) -> None:
        try:
            while not self._make():
                pass
        except OSError as error:
            raise EngineDownError(
                f"no folder for the engine's socket can be made: {error.strerror or error}; make room in "
                f"{error.filename or 'the folder for temporary files'}, or name another one with TMPDIR"
            ) from error

    def _make(self) -> bool:
        """False: another process took it for one that was left behind, before it was locked."""
        self.path = _made(tempfile.gettempdir())
        if len(os.fsencode(self.path)) > 80:
            self.path.rmdir()
            self.path = _made("/tmp")
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # where there are no locks nobody can take it away either
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if self.path.is_dir():
            return True
        os.close(self._lock)
        return False

    def remove(self) -> None:
        """It, and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _made(parent: str) -> Path:
    """A new folder in this one, once those of the dead are gone from there."""
    for left in Path(parent).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            finally:
                os.close(lock)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
