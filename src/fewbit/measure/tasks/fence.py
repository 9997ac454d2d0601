"""Runs one program behind its limits and, with Landlock, a fence around its files. A script, started by `sandbox`.

    python -I -S fence.py PROGRAM FENCED CPU AS FSIZE NOFILE NPROC CORE  < WORD

Limits are set here, in the new process: a fork of the process that starts it, which has threads, could stop for ever
before its exec. Nothing but the standard library may be imported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import struct
import sys

LIMITS = ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE")
VERSION = 3
"""Of Landlock's interface, Linux 6.2: before it, a fenced process could still cut any file short."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_NO_NEW_PRIVS = 38
_WRITE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGES = _WRITE | _TRUNCATE | sum(1 << bit for bit in range(4, 14))
"""Writing, and making, removing and moving entries of every kind (linux/landlock.h, LANDLOCK_ACCESS_FS_*)."""


def landlock() -> int:
    """The version of Landlock's interface; 0 where the kernel has none."""
    return max(0, _syscall(_CREATE_RULESET, 0, 0, 1)) if sys.platform == "linux" else 0


def fence() -> None:
    """Let this process and its children change files in the working directory only, and write to /dev/null.

    Raises:
        OSError: The kernel refuses.
    """
    handled = struct.pack("=Q", _CHANGES)
    rules = _done(_syscall(_CREATE_RULESET, handled, len(handled), 0))
    for path, access in ((".", _CHANGES), (os.devnull, _WRITE | _TRUNCATE)):
        beneath = struct.pack("=Qi", access, at := os.open(path, os.O_PATH))
        _done(_syscall(_ADD_RULE, rules, 1, beneath, 0))
        os.close(at)
    _done(ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    _done(_syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


def _syscall(number: int, *given: int | bytes) -> int:
    words = (one if isinstance(one, bytes) else ctypes.c_long(one) for one in given)
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *words))


def _done(status: int) -> int:
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return status


def main() -> None:
    """Run the program; the word on standard input is said once it has come to its end."""
    program, fenced, *most = sys.argv[1:]
    word = os.read(0, 64)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if fenced == "1":
        fence()
    for name, value in zip(LIMITS, map(int, most), strict=True):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    runpy.run_path(program, run_name="program")
    assert sys.__stdout__ is not None
    sys.__stdout__.flush()
    os.write(1, b"\n" + word + b"\n")


if __name__ == "__main__":
    main()
