"""Building the CPU kernels: what a compiler, a cache and others on the machine may do, and what is said of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.cpu import build as cpu_build
from fewbit.ops.device import device_info
from fewbit.ops.linear import LinearProblem, choose
from fewbit.ops.linear.cpu import Cpu

BUILT = cpu_build.library()
needs_compiler = pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}")
PROBLEM = LinearProblem(QuantSpec(FORMATS["int8_row"]), 64, 256, torch.float32, device_info(torch.device("cpu")))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_it_says_so_and_torch_does_the_work(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build.library.cache_clear()
    try:
        why = "no C compiler (cc, gcc or clang): decoding is slower without; install gcc"
        assert cpu_build.library() == why
        assert Cpu().why_not(PROBLEM) == why
        assert choose(PROBLEM).kernel.name == "dense"
        with pytest.raises(UnsupportedError, match="no C compiler"):
            choose(PROBLEM, "cpu")
    finally:
        cpu_build.library.cache_clear()


def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    bad = script(tmp_path / "bad", "echo 'cpu.c:1: error: no such thing' >&2; echo more >&2; exit 1")
    monkeypatch.setenv("CC", bad)
    with pytest.raises(cpu_build.Unbuilt) as failed:
        cpu_build.build(tmp_path / "cache")
    assert str(failed.value) == f"{bad} cannot compile cpu.c: cpu.c:1: error: no such thing"
    monkeypatch.setenv("CC", "nowhere-cc")
    with pytest.raises(cpu_build.Unbuilt, match="CC names 'nowhere-cc', which is not there"):
        cpu_build.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(cpu_build.Unbuilt, match="set XDG_CACHE_HOME"):
        cpu_build.build(tmp_path / "cache")


def test_a_cache_that_is_a_file_is_one_line(tmp_path):
    if isinstance(BUILT, str):
        pytest.skip(f"CPU KERNELS ARE NOT TESTED: {BUILT}")
    (tmp_path / "cache").write_text("")
    with pytest.raises(cpu_build.Unbuilt, match=r"cannot build in .*cache .*; set XDG_CACHE_HOME"):
        cpu_build.build(tmp_path / "cache")


@needs_compiler
def test_a_variant_that_the_compiler_does_not_know_is_left_out(monkeypatch, tmp_path):
    real = cpu_build._compiler()
    picky = script(
        tmp_path / "picky",
        f'case "$*" in *-mavx*|*dotprod*) echo "error: unknown option" >&2; exit 1;; esac; exec {" ".join(real)} "$@"',
    )
    monkeypatch.setenv("CC", picky)
    built = cpu_build.build(tmp_path / "cache")
    assert built.variants == built.usable == ("plain",)
    assert [path.name for path in (tmp_path / "cache").glob("*.so")] == [built.path.name]
    before = built.path.stat().st_mtime_ns
    assert cpu_build.build(tmp_path / "cache").path.stat().st_mtime_ns == before  # found, not made again


@pytest.fixture
def failing(monkeypatch, tmp_path) -> str:
    """A compiler that fails at once."""
    monkeypatch.setenv("CC", given := script(tmp_path / "failing", "echo error: reached >&2; exit 1"))
    return given


def reason(cache: Path) -> str:
    with pytest.raises(cpu_build.Unbuilt) as failed:
        cpu_build.build(cache)
    return str(failed.value)


@pytest.mark.parametrize("how", ["group", "world", "link", "owner"])
def test_a_cache_of_others_is_not_used(how, failing, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    assert "reached" in reason(cache)
    if how == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    elif how == "owner" and os.geteuid() == 0:
        os.chown(cache, 1, -1)
    elif how == "owner":
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
    else:
        cache.chmod({"group": 0o770, "world": 0o707}[how])
    assert reason(cache) == f"{cache} is not this user's alone; set XDG_CACHE_HOME to a folder of your own"


def test_a_lock_that_is_a_link_writes_to_nothing(failing, tmp_path):
    (victim := tmp_path / "victim").write_text("dear")
    (cache := tmp_path / "cache").mkdir(mode=0o700)
    (cache / "lock").symlink_to(victim)
    assert "cannot build in" in reason(cache)
    assert victim.read_text() == "dear"


def test_a_builder_that_was_stopped_is_not_waited_for(failing, monkeypatch, tmp_path):
    (cache := tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(cpu_build, "_WAIT", 0.2)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is building" in reason(cache)
    assert "reached" in reason(cache)


@needs_compiler
def test_a_library_is_its_users_alone(tmp_path):
    (cache := tmp_path / "cache").mkdir(mode=0o700)
    there = cache / BUILT.path.name
    shutil.copy(BUILT.path, there)  # with its mode
    assert stat.S_IMODE(there.stat().st_mode) == 0o600
    assert cpu_build.build(cache).usable == BUILT.usable
    assert not (cache / "lock").exists()  # found, not made
    there.chmod(0o666)
    assert "is not this user's alone" in reason(cache)


@needs_compiler
def test_a_library_that_does_not_load_is_made_again(tmp_path):
    (cache := tmp_path / "cache").mkdir(mode=0o700)
    there = cache / BUILT.path.name
    there.write_bytes(b"")
    there.chmod(0o600)
    assert cpu_build.build(cache).usable == BUILT.usable
    assert there.stat().st_size > 0


@needs_compiler
@pytest.mark.parametrize("failure", ["echo 'error: no space left' >&2; exit 1", "kill -9 $$"])
def test_what_fails_once_is_no_smaller_library_for_good(failure, monkeypatch, tmp_path):
    real = " ".join(cpu_build._compiler())
    flaky = script(tmp_path / "flaky", f'case "$*" in *DVARIANT=plain*) {failure};; esac; exec {real} "$@"')
    monkeypatch.setenv("CC", flaky)
    monkeypatch.setattr(cpu_build, "VARIANTS", {})  # `plain` alone: quick
    assert ("no space left" if "echo" in failure else "was killed") in reason(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.parametrize("then", ["late", "another that does not start"])
def test_compilers_are_ended_with_all_that_they_started(then, monkeypatch, tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(cpu_build, "_SECONDS", 1)
    commands = {"slow": [script(tmp_path / "slow", f"exec 9>{pipe}; sleep 600; exit 1")]}
    try:
        if then != "late":
            commands["none"] = [str(tmp_path / "nowhere")]
        with pytest.raises(cpu_build.Unbuilt, match="not done after 1 s" if then == "late" else "does not start"):
            cpu_build._run(commands)
        end = time.monotonic() + 60
        while True:
            try:
                assert os.read(reader, 1) == b""  # nobody holds the other end
                break
            except BlockingIOError:
                assert time.monotonic() < end, "something still runs"
                time.sleep(0.02)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("CC", '"gcc', 'CC is no command: "gcc (No closing quotation); unset it or give the name of a compiler'),
        ("HOME", None, "this user has no home folder to build in; set XDG_CACHE_HOME to a folder"),
        ("_key", OSError("gone"), "cannot build in {cache} (gone); set XDG_CACHE_HOME to a folder"),
        ("_load", ValueError("odd"), "cannot build cpu.c: ValueError: odd"),
    ],
)
def test_whatever_goes_wrong_is_one_line_and_ends_nothing(name, value, wanted, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", script(tmp_path / "true", "exit 0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*_):
        raise value or RuntimeError("Could not determine home directory.")

    if value is None:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # counts for nothing
        monkeypatch.setattr(Path, "home", fail)
    elif isinstance(value, str):
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(cpu_build, name, fail)
        if name == "_load":
            monkeypatch.setattr(cpu_build, "_check_owner", lambda *_: None)
    cpu_build.library.cache_clear()
    try:
        assert cpu_build.library() == wanted.format(cache=tmp_path / "fewbit")
    finally:
        cpu_build.library.cache_clear()
