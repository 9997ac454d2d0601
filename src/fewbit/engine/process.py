"""The engine process: ``python -m fewbit.engine.process --socket PATH --model DIR``. Started by `spawn`.

It reports on its standard output, a JSON object a line: ``{"progress": TEXT}``, then ``{"ready": true}`` or
``{"error": {"kind": CLASS, "message": TEXT}}``. Standard input is a pipe that the parent holds open: when it ends,
the parent is gone and so is this process. SIGTERM finishes what is running and takes nothing new; a second one ends
it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

import msgspec

from fewbit.engine import jsonlog
from fewbit.engine.config import EngineOptions
from fewbit.engine.server import EngineServer
from fewbit.errors import FewbitError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fewbit.engine.engine import Engine

Open = Callable[[str, EngineOptions, Callable[[str], None]], "Engine"]

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None, build: Open | None = None) -> int:
    """Run an engine until it is told to stop. Returns the exit status.

    Args:
        argv: the command line.
        build: makes the engine from model, options and a callback for progress; None: `open_engine`.
    """
    parser = argparse.ArgumentParser(prog="python -m fewbit.engine.process", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the unix socket, in a folder of the parent's")
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", default="{}", help="EngineOptions as JSON")
    parser.add_argument("--drain-s", type=float, default=30.0, help="how long a SIGTERM waits for running requests")
    args = parser.parse_args(argv)
    logging.basicConfig(handlers=[jsonlog.handler()], level=logging.WARNING)
    report = _take_stdout()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the parent decides
    try:
        options = msgspec.json.decode(args.options, type=EngineOptions)
        engine = (build or _open)(args.model, options, lambda text: _say(report, progress=text))
    except FewbitError as error:
        _say(report, error={"kind": type(error).__name__, "message": str(error)})
        return 2
    except Exception as error:  # house: the parent has to learn why, whatever it is
        log.exception("the engine could not be started")
        _say(report, error={"kind": "", "message": f"{type(error).__name__}: {error}"})
        return 1
    return asyncio.run(_serve(engine, args.socket, args.drain_s, report))


def _open(model: str, options: EngineOptions, tell: Callable[[str], None]) -> Engine:
    from fewbit.engine.engine import open_engine  # takes seconds, in which the parent may end

    return open_engine(model, options, tell)


async def _serve(engine: Engine, path: str, drain_s: float, report: IO[str]) -> int:
    server = EngineServer(engine)
    listener = await asyncio.start_unix_server(server.connection, path)
    draining = False

    def terminate() -> None:
        nonlocal draining
        if draining:
            os._exit(128 + signal.SIGTERM)
        draining = True
        threading.Thread(target=_drain, args=(server, drain_s), daemon=True).start()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    _say(report, ready=True)
    report.close()
    await server.ended.wait()
    listener.close()
    await server.flush(2.0)
    return 1 if server.loop.broken is not None else 0


def _drain(server: EngineServer, limit_s: float) -> None:
    if not server.loop.drain(limit_s):
        log.warning("requests were still running after %g s; they are aborted", limit_s)
        server.loop.stop()


def _take_stdout() -> IO[str]:
    """Keep standard output for reports; what anybody prints goes to standard error."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return report


def _say(report: IO[str], **message: Any) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()


def _die_with_parent() -> None:
    """Arrange that no engine is ever left without a parent.

    Two ways, since neither is enough alone: the kernel's signal exists on Linux only, and the end of the pipe is not
    noticed while C code holds the interpreter.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
