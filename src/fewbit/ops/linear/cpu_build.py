"""From `cpu.c` to a library: built once with the system's compiler, kept in a cache, loaded with ctypes.

Nothing here is a reason to fail: without a compiler, or where it or the cache does not work, `library` says why in one
line, `fewbit doctor` prints it, and the kernels of torch do the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512vnni")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {  # best first; avx512vl is AVX-VNNI's code in another encoding
    "x86_64": {
        "avx512vnni": (*_AVX2, *_AVX512, "-mavx512bw"),
        "avx512vl": (*_AVX2, *_AVX512, "-mno-avx512bw"),
        "avxvnni": (*_AVX2, "-mavxvnni"),
        "avx2": _AVX2,
        "plain": (),
    },
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",), "plain": ()},
}
_SECONDS = 120  # a compiler is given


class Unbuilt(Exception):  # noqa: N818 (a state, not a fault)
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        path: its file.
        variants: names of the instruction sets that it was built for, in the order of its table.
        usable: those that this processor has, best first.
        threads: whether it shares work out over threads.
        calls: its functions.
    """

    path: Path
    variants: tuple[str, ...]
    usable: tuple[str, ...]
    threads: bool
    calls: Any

    def index(self, variant: str | None = None) -> int:
        """The number of a variant in the table; None: the best one."""
        return self.variants.index(variant or self.usable[0])


@functools.cache
def library() -> Library | str:
    """The library, built if it is not yet; or the reason why there is none, for a user to read."""
    try:
        return build(_cache())
    except Unbuilt as why:
        return str(why)


def build(cache: Path) -> Library:
    """Find the library in a folder, or build it there.

    Raises:
        Unbuilt: there is no compiler, it fails, or the folder cannot be written to.
    """
    compiler = _compiler()
    variants = VARIANTS.get({"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine()))
    kinds = variants or {"plain": ()}
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    path = cache / f"cpu-{_key(compiler, kinds, openmp)}.so"
    try:
        if not path.exists():
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(cache / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when it is closed, or by the end of the process
                if not path.exists():
                    _compile(compiler, kinds, openmp, path)
        return _load(path)
    except OSError as error:
        raise Unbuilt(f"cannot build in {cache} ({error.strerror or error}); set XDG_CACHE_HOME to a folder") from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit"


def _compiler() -> list[str]:
    """The compiler's command: $CC, else cc, gcc or clang.

    Raises:
        Unbuilt: there is none.
    """
    if wanted := shlex.split(os.environ.get("CC", "")):
        if not shutil.which(wanted[0]):
            raise Unbuilt(f"CC names '{wanted[0]}', which is not there; unset it or install that compiler")
        return wanted
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise Unbuilt("no C compiler (cc, gcc or clang): decoding is slower without; install gcc")


def _key(compiler: Sequence[str], kinds: dict[str, tuple[str, ...]], openmp: Sequence[Path]) -> str:
    """What the library depends on, as a hash."""
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    facts = program.stat()
    made_of = (SOURCE.read_text(), list(compiler), str(program), facts.st_size, facts.st_mtime_ns, FLAGS, kinds)
    return hashlib.sha256(repr((*made_of, [str(path) for path in openmp])).encode()).hexdigest()[:16]


def _compile(compiler: Sequence[str], kinds: dict[str, tuple[str, ...]], openmp: Sequence[Path], path: Path) -> None:
    """Build for all kinds that the compiler knows, into `path` at once.

    Raises:
        Unbuilt: it cannot even build the plain one.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def objects(name: str) -> str:
            return str(Path(folder) / f"{name}.o")

        def command(name: str, *options: str) -> list[str]:
            return [*compiler, *FLAGS, *options, "-c", str(SOURCE), "-o", objects(name)]

        running = {name: _start(command(name, f"-DVARIANT={name}", *flags)) for name, flags in kinds.items()}
        failed = {name: why for name, process in running.items() if (why := _wait(process))}
        if "plain" in failed:
            raise Unbuilt(f"{' '.join(compiler)} cannot compile {SOURCE.name}: {failed['plain']}")
        made = [name for name in kinds if name not in failed]
        table = [f"-DVARIANTS={' '.join(f'VARIANT_OF({name})' for name in made)}"]
        if platform.machine() in ("x86_64", "AMD64"):
            table.append("-msse4.1")  # rounds in one instruction
        shared = [*compiler, "-shared", "-o", objects("all"), *map(objects, made), objects("main"), "-lm"]
        # torch's own OpenMP first: two would each have their threads, waiting for work on the same cores
        ways = [(["-fopenmp"], [str(lib), "-Wl,--no-undefined"]) for lib in openmp[:1]]
        for flags, libraries in (*ways, (["-fopenmp"], ["-fopenmp"]), ([], [])):
            why = _wait(_start(command("main", *table, *flags))) or _wait(_start([*shared, *libraries]))
            if not why:
                break
        else:
            raise Unbuilt(f"{' '.join(compiler)} cannot link {SOURCE.name}: {why}")
        os.replace(objects("all"), path)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise Unbuilt(f"{command[0]} does not start: {error.strerror}") from error


def _wait(process: subprocess.Popen[str]) -> str:
    """Empty once it is done; else its first error."""
    try:
        _, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it was not done after {_SECONDS} s"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines or [f"exit status {process.returncode}"]
    return errors[0] if process.returncode else ""


def _load(path: Path) -> Library:
    """The library of a file; see `Library`."""
    calls = ctypes.CDLL(str(path))
    calls.fewbit_variant.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    calls.fewbit_linear.argtypes = (pointer, pointer, pointer, ctypes.c_int64, number, number)
    names: list[str] = []
    while name := calls.fewbit_variant(len(names)):
        names.append(name.decode())
    usable = tuple(name for name in names if calls.fewbit_runs(name.encode()))
    return Library(path, tuple(names), usable, bool(calls.fewbit_threads()), calls)
