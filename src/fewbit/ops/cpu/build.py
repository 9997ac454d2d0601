"""From `cpu.c` and what it includes to a library: built once with the system's compiler, kept in a cache, loaded.

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
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
        "plain": ("-msse4.1",),  # rounds in one instruction
    },
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",), "plain": ()},
}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_CALLS = {  # what each instruction set has, and its arguments
    "linear": (*[_POINTER] * 3, _LONG, _INT),
    "normalize": (_POINTER, _LONG, _LONG, _POINTER, ctypes.c_float, _POINTER),
    "before": (*[_POINTER] * 7, _LONG, _INT),
    "after": (*[_POINTER] * 4, _LONG, _INT),
    "layers": (*[_POINTER] * 4, _LONG, *[_POINTER] * 2, _INT),
    "attend": (*[_POINTER] * 7, _INT),
}
_SECONDS = 120  # a compiler is given
_WAIT = 3 * _SECONDS  # another process that builds is given: flags are tried, then it compiles, then it links


class Unbuilt(Exception):  # noqa: N818 (a state, not a fault)
    """Why there is no library, in one line."""


class Missing(str):
    """Why there is no library, for a user to read."""

    __slots__ = ()


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        path: its file.
        compiler: the command that built it.
        variants: names of the instruction sets that it was built for.
        usable: those that this processor has, best first.
        threads: whether it shares work out over threads.
        calls: its functions.
    """

    path: Path
    compiler: str
    variants: tuple[str, ...]
    usable: tuple[str, ...]
    threads: bool
    calls: Any

    def call(self, name: str, variant: str | None = None) -> Callable[..., int]:
        """A function as an instruction set has it; None: the best one."""
        found: Callable[..., int] = getattr(self.calls, f"fewbit_{name}_{variant or self.usable[0]}")
        return found


@functools.cache
def library() -> Library | Missing:
    """The library, built if it is not yet; or the reason why there is none."""
    try:
        return build(_cache())
    except Unbuilt as why:
        return Missing(why)
    except Exception as error:  # house: without this library everything still works, and the reason is told
        return Missing(f"cannot build {SOURCE.name}: {type(error).__name__}: {error}")


def build(cache: Path) -> Library:
    """Find the library in a folder, or build it there.

    Raises:
        Unbuilt: there is no compiler, it fails, or the folder cannot be written to, or others may write to it.
    """
    compiler = _compiler()
    variants = VARIANTS.get({"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine()))
    kinds = variants or {"plain": ()}
    try:
        openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
        path = cache / f"cpu-{_key(compiler, kinds, openmp)}.so"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(cache, stat.S_ISDIR)
        if found := _found(path, compiler):
            return found
        with _lock(cache):
            if found := _found(path, compiler):  # another process was building
                return found
            path.unlink(missing_ok=True)
            _compile(compiler, kinds, openmp, path)
            return _load(path, compiler)
    except OSError as error:
        raise Unbuilt(f"cannot build in {cache} ({error.strerror or error}); set XDG_CACHE_HOME to a folder") from error


def _cache() -> Path:
    """The folder of the library; an $XDG_CACHE_HOME that is not absolute counts for nothing, as its specification says.

    Raises:
        Unbuilt: this user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "fewbit"
    except RuntimeError as error:
        raise Unbuilt("this user has no home folder to build in; set XDG_CACHE_HOME to a folder") from error


def _check_owner(path: Path, kind: Callable[[int], bool]) -> None:
    """What is loaded runs as this user: so nobody else may have put it there, but for root.

    Raises:
        Unbuilt: somebody may; or it is a link, or not of this `kind`.
    """
    facts = path.lstat()
    if (
        not kind(facts.st_mode)
        or facts.st_uid not in (0, os.geteuid())
        or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise Unbuilt(f"{path} is not this user's alone; set XDG_CACHE_HOME to a folder of your own")


def _found(path: Path, compiler: Sequence[str]) -> Library | None:
    """The library that is there; None: there is none, or one that does not load."""
    try:
        _check_owner(path, stat.S_ISREG)
        return _load(path, compiler)
    except (OSError, AttributeError):
        return None


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One process builds, the others wait.

    Raises:
        Unbuilt: it takes too long; the process may have been stopped.
    """
    file = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when closed, or by the end of the process
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Unbuilt(f"another process is building in {cache} for over {_WAIT} s; end it") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(file)


def _compiler() -> list[str]:
    """The compiler's command: $CC, else cc, gcc or clang.

    Raises:
        Unbuilt: there is none.
    """
    given = os.environ.get("CC", "")
    try:
        wanted = shlex.split(given)
    except ValueError as error:
        raise Unbuilt(f"CC is no command: {given} ({error}); unset it or give the name of a compiler") from error
    if wanted:
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
    sources = [file.read_text() for file in sorted(SOURCE.parent.glob("*.[ch]"))]
    made_of = (sources, list(compiler), str(program), facts.st_size, int(facts.st_mtime), FLAGS, kinds)
    return hashlib.sha256(repr((*made_of, [str(path) for path in openmp])).encode()).hexdigest()[:16]


def _compile(compiler: Sequence[str], kinds: dict[str, tuple[str, ...]], openmp: Sequence[Path], path: Path) -> None:
    """Build for all kinds that the compiler knows, into `path` at once.

    What it knows is found with empty files. Whatever fails then is a failure and no smaller library: that would stay.

    Raises:
        Unbuilt: it fails.
    """
    name_of = " ".join(compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def objects(name: str) -> str:
            return str(Path(folder) / f"{name}.o")

        def command(name: str, *options: str) -> list[str]:
            return [*compiler, *FLAGS, *options, "-c", str(SOURCE), "-o", objects(name)]

        empty = ["-x", "c", os.devnull]
        unknown = _run({name: [*compiler, *FLAGS, *flags, "-E", *empty] for name, flags in kinds.items()})
        if "plain" in unknown:
            raise Unbuilt(f"{name_of} cannot compile {SOURCE.name}: {unknown['plain']}")
        made = [name for name in kinds if name not in unknown]
        # torch's own OpenMP first: two would each have their threads, waiting for work on the same cores
        ways = [(["-fopenmp"], [str(lib), "-Wl,--no-undefined"]) for lib in openmp[:1]] + [(["-fopenmp"], ["-fopenmp"])]
        parallel = Path(folder) / "trial.c"  # something to link: what an empty file needs says nothing
        parallel.write_text("void f(int *x) {\n#pragma omp parallel for\n for (int i = 0; i < 9; i++) x[i] = i;\n}\n")
        for threads, libraries in ways:
            made_of = [*compiler, *FLAGS, *threads, "-c", str(parallel), "-o", objects("trial")]
            linked = [*compiler, "-shared", "-o", objects("all"), objects("trial"), *libraries]
            if not _run({"trial": made_of}) and not _run({"trial": linked}):
                break
        else:
            threads, libraries = [], []

        table = f"-DVARIANTS={' '.join(f'VARIANT_OF({name})' for name in made)}"
        sources = {name: command(name, f"-DVARIANT={name}", *kinds[name], *threads) for name in made}
        for name, why in _run({"main": command("main", table, *threads), **sources}).items():
            raise Unbuilt(f"{name_of} cannot compile {SOURCE.name} ({name}): {why}")
        shared = [*compiler, "-shared", "-o", objects("all"), *map(objects, made), objects("main"), "-lm", *libraries]
        for why in _run({"all": shared}).values():
            raise Unbuilt(f"{name_of} cannot link {SOURCE.name}: {why}")
        with open(objects("all"), "rb+") as built:
            os.fchmod(built.fileno(), 0o600)
            os.fsync(built.fileno())  # else a machine that stops now may have a file of zeros under the name
        os.replace(objects("all"), path)


def _run(commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Run commands beside each other: the first error of each that failed.

    Raises:
        Unbuilt: one does not start, is killed or takes too long, which says nothing about what it was told to do.
    """
    end, running = time.monotonic() + _SECONDS, dict[str, subprocess.Popen[str]]()
    try:
        for name, command in commands.items():
            running[name] = _start(command)
        return {name: why for name, process in running.items() if (why := _wait(process, end))}
    finally:
        for process in running.values():
            _end(process)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    english = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.Popen(
            command, stdin=null, stdout=null, stderr=pipe, env=english,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise Unbuilt(f"{command[0]} does not start: {error.strerror}") from error


def _wait(process: subprocess.Popen[str], end: float) -> str:
    """Empty once it is done; else its first error.

    Raises:
        Unbuilt: it was killed, or one of the programs that it started was; or it is not done at `end`.
    """
    try:
        _, said = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Unbuilt(f"the compiler was not done after {_SECONDS} s; try again on a machine less busy") from None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines or [f"exit status {process.returncode}"]
    if process.returncode < 0 or (process.returncode and "signal" in errors[0]):
        raise Unbuilt(f"the compiler was killed ({errors[0]}); try again with more memory free")
    return errors[0] if process.returncode else ""


def _end(process: subprocess.Popen[str]) -> None:
    """End a compiler, and the programs that it started, if it has not ended."""
    if process.returncode is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.stderr:
        process.stderr.close()
    process.wait()


def _load(path: Path, compiler: Sequence[str]) -> Library:
    """The library of a file; see `Library`."""
    calls = ctypes.CDLL(str(path))
    calls.fewbit_variant.restype = ctypes.c_char_p
    names: list[str] = []
    while name := calls.fewbit_variant(len(names)):
        names.append(name.decode())
        for call, arguments in _CALLS.items():
            getattr(calls, f"fewbit_{call}_{names[-1]}").argtypes = arguments
    usable = tuple(name for name in names if calls.fewbit_runs(name.encode()))
    if not usable:
        raise Unbuilt("this processor has none of the instruction sets that there are kernels for, not even SSE4.1")
    return Library(path, " ".join(compiler), tuple(names), usable, bool(calls.fewbit_threads()), calls)
