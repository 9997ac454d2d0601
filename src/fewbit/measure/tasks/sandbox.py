"""Running a program that nobody has read: in a process of its own, with little time, memory, disk and environment.

Where the system lets it (`missing`), the program has no network, sees no other process, its children end with it, and
it changes files in its own folder only. It is a fence against what models write by mistake, not a prison: it can read
the files that the user can read, and a program that means to can say that it came to its end. Programs of a model that
is not trusted belong into a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fewbit.measure.tasks import fence

_NAMESPACES = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_TAIL = 4096  # bytes of a program's output that are looked at


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_s: Seconds of processor time of each process; of the clock all together get `wall_s`.
        memory: Bytes of address space of a process.
        file: Bytes of each file that it writes, its output included.
        files: Open at a time.
        processes: Of its user at a time, its threads included; the kernel does not hold root to it.
    """

    cpu_s: int = 10
    wall_s: float = 60.0
    memory: int = 1 << 30
    file: int = 1 << 20
    files: int = 32
    processes: int = 64


@dataclass(frozen=True)
class Ran:
    """How a program ended: whether it came to its end, and what happened else."""

    finished: bool
    reason: str = ""


def run_program(source: str, limits: Limits = Limits()) -> Ran:
    """Run Python source; it has passed only if its last statement was reached and nothing was raised.

    Leaving early, also with exit status 0, is no success: whoever runs it (`fence`) says a word after its end that
    stands in no file. What `missing` names does not hold it.
    """
    word = secrets.token_hex(16)
    # the output is a file without a name: the folder is the program's, which may do with it what it likes
    with (
        tempfile.TemporaryDirectory(prefix="fewbit-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
    ):
        file = Path(folder) / "program.py"
        file.write_text(source, "utf8")
        numbers = (limits.cpu_s, limits.memory, limits.file, limits.files, limits.processes, 0)
        command = [sys.executable, "-I", "-S", fence.__file__, str(file), str(int(fences())), *map(str, numbers)]
        if namespaces():
            command = [shutil.which("unshare") or "unshare", *_NAMESPACES, "--", *command]
        child = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin as told:
                told.write(word.encode())
            status = child.wait(limits.wall_s)
        except subprocess.TimeoutExpired:
            return Ran(False, f"stopped after {limits.wall_s:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(max(0, out.seek(0, os.SEEK_END) - _TAIL))
        lines = out.read(_TAIL).decode("utf8", "replace").split("\n")
        if status == 0 and word in lines[-2:]:
            return Ran(True)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Ran(False, "it left before its end" if status == 0 else f"exit status {status}: {last}"[:300])


def missing() -> str:
    """What this system cannot keep a program from, in words; nothing where it can."""
    faults = [] if namespaces() else ["a program would reach the network (no namespaces: unshare)"]
    if not fences():
        faults.append("it would change any file of yours (no Landlock, which Linux has since 6.2)")
    return " and ".join(faults)


@functools.cache
def namespaces() -> bool:
    """Whether a program can be kept from the network here."""
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        return False
    done = subprocess.run([unshare, *_NAMESPACES, "--", "true"], capture_output=True, timeout=60, check=False)
    return done.returncode == 0


@functools.cache
def fences() -> bool:
    """Whether a program can be kept from changing other files than its own here."""
    if fence.landlock() < fence.VERSION:
        return False
    with tempfile.TemporaryDirectory(prefix="fewbit-program-") as folder:
        words = [sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({fence.__file__!r})['fence']()"]
        done = subprocess.run(words, cwd=folder, env={}, capture_output=True, timeout=60, check=False)
    return done.returncode == 0
