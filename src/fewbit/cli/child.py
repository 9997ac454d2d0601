"""``python -m fewbit.cli.child COMMAND ...``: a command that another program started and that ends with it.

Standard input is a pipe that the other program holds open. When it ends, however that program ended, this one gets
the SIGTERM that nobody else would send it.
"""

from __future__ import annotations

import os
import signal
import threading

from fewbit.cli import main


def _watch() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    main()
