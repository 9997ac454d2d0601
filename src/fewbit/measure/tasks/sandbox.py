"""Running a program that nobody has read: in a process of its own, with little time, memory, disk and environment.

Where the kernel lets an ordinary user make namespaces (Linux, `unshare`), the program has no network and its children
end with it. It is a fence against what models write by mistake, not a prison: it can read the files that the user can
read. Programs of a model that is not trusted belong into a virtual machine.
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

# Limits are set by the child itself: a fork of this process, which has threads, could stop for ever before its exec.
_CHILD = """
import resource, runpy, sys
for name, most in zip(("CPU", "AS", "FSIZE", "NOFILE", "CORE"), map(int, sys.argv[2:])):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
runpy.run_path(sys.argv[1], run_name="program")
"""
_NAMESPACES = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_s: Seconds of processor time; of the clock it gets `wall_s`.
        memory: Bytes of address space of a process.
        file: Bytes of each file that it writes, its output included.
        files: Open at a time.
    """

    cpu_s: int = 10
    wall_s: float = 60.0
    memory: int = 1 << 30
    file: int = 1 << 20
    files: int = 32


@dataclass(frozen=True)
class Ran:
    """How a program ended: whether it came to its end, and what happened else."""

    finished: bool
    reason: str = ""


def run_program(source: str, limits: Limits = Limits()) -> Ran:
    """Run Python source; it has passed only if its last statement was reached and nothing was raised.

    Leaving early, also with exit status 0, is no success: the program's last line must say a word that it cannot know
    before.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="fewbit-program-") as folder:
        file, said = Path(folder) / "program.py", Path(folder) / ".said"
        file.write_text(f"{source}\nprint({chr(10) + word!r}, flush=True)\n", "utf8")
        numbers = (limits.cpu_s, limits.memory, limits.file, limits.files, 0)
        command = [sys.executable, "-I", "-S", "-c", _CHILD, str(file), *map(str, numbers)]
        if namespaces():
            command = [shutil.which("unshare") or "unshare", *_NAMESPACES, "--", *command]
        with said.open("wb") as out:
            child = subprocess.Popen(
                command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = child.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                return Ran(False, f"stopped after {limits.wall_s:g} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lines = said.read_bytes()[-4096:].decode("utf8", "replace").split("\n")
        if status == 0 and word in lines[-2:]:
            return Ran(True)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Ran(False, "it left before its end" if status == 0 else f"exit status {status}: {last}"[:300])


@functools.cache
def namespaces() -> bool:
    """Whether a program can be kept from the network here."""
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        return False
    done = subprocess.run([unshare, *_NAMESPACES, "--", "true"], capture_output=True, timeout=60, check=False)
    return done.returncode == 0
