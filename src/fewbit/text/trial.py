"""A grammar of a stranger, tried in a process of its own: what takes too long, or breaks down, does so there.

Compiling one is native code, which cannot be interrupted, and some grammars of a few characters take it minutes. The
child compiles it over a vocabulary of single bytes and takes some steps of an output; if that is not done in time, or
takes too much memory, the child is killed and the grammar refused. Its file runs as a program that imports nothing of
fewbit, so that it starts at once; it ends when its parent does, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 0.6
"""Of the child's processor time: a grammar is no worse for a machine that has others to serve."""
_PATIENCE = 10  # times as long by the clock, and it is given up all the same
MEMORY = 2 << 30  # bytes of address space of the child
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,  # some 15 ms
    "step_max_items": 50_000,  # a few ms
    "max_lexer_states": 50_000,  # of one or two kB each
    "max_grammar_size": 500_000,
}
"""For every matcher (`llguidance.LLParserLimits`)."""

_STEPS = 24  # of an output that the child tries
_START_S = 20.0
_KNOWN = 1024  # grammars whose outcome is remembered
_AGAIN_S = 30.0  # after which one that was late is tried again: the machine may have been busy


class Trial:
    """One child, started when it is needed, asked by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest to what was wrong, until when

    def __call__(self, grammar: str) -> str:
        """What is wrong with a grammar, in the words of llguidance or ours; empty: nothing."""
        digest = hashlib.blake2b(grammar.encode("utf8", "surrogatepass")).digest()
        if (found := self._recall(digest)) is not None:  # without the lock: a known one waits for no stranger
            return found
        with self._lock:
            if (found := self._recall(digest)) is not None:
                return found
            self._known[digest] = self._try(grammar)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
            return self._known[digest][0]

    def _recall(self, digest: bytes) -> str | None:
        reason, until = self._known.get(digest, (None, 0.0))
        return reason if time.monotonic() < until else None

    def _try(self, grammar: str) -> tuple[str, float]:
        """What is wrong, and until when that is so: for good if llguidance says it."""
        try:
            child = self._started()
        except (OSError, EOFError):  # a TimeoutError is an OSError
            self.stop()
            return "it could not be tried, the process for that did not start", time.monotonic() + _AGAIN_S
        try:
            worked, began = _worked(child.pid), time.monotonic()
            assert child.stdin is not None
            child.stdin.write(json.dumps(grammar).encode() + b"\n")
            child.stdin.flush()

            def left() -> float:
                patience = began + _PATIENCE * LIMIT_S - time.monotonic()
                return min(worked + LIMIT_S - _worked(child.pid), patience)

            return str(json.loads(_line(child, left))), math.inf
        except TimeoutError:
            reason = f"it is too complex: compiling it took more than {LIMIT_S} s"
        except (OSError, EOFError):
            reason = "it is too complex: compiling it broke down"
        self.stop()
        return reason, time.monotonic() + _AGAIN_S

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.stop()
            command = [sys.executable, "-P", __file__]
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
            until = time.monotonic() + _START_S
            _line(self._child, lambda: until - time.monotonic())
        return self._child

    def stop(self) -> None:
        """End the child; the next grammar gets a new one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent any more
                    pipe.close()


def _worked(pid: int) -> float:
    """Seconds of processor time that a process has used; where the system does not tell, seconds of the clock."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, of proc(5)


def _line(child: subprocess.Popen[bytes], left: Callable[[], float]) -> bytes:
    """What the child says next, if it does while `left` says that there are seconds left."""
    assert child.stdout is not None
    file, said = child.stdout.fileno(), b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([file], [], [], max(left(), 0))
        if not ready:
            if left() > 0:
                continue
            raise TimeoutError
        more = os.read(file, 1 << 16)
        if not more:
            raise EOFError
        said += more
    return said


trial = Trial()


# ---- the child ----


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches it too; the parent decides
    with contextlib.suppress(OSError, ValueError):  # where the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance

    class Bytes:
        """A token a byte, and one that ends a text."""

        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
        tokens = (*(bytes([b]) for b in range(256)), b"<eos>")
        is_tokenizer_wrapper = True

        def __call__(self, text: str) -> list[int]:
            return list(text.encode())

    wrapper: Any = Bytes()
    tokenizer = llguidance.LLTokenizer(wrapper, slices=[])
    limits = llguidance.LLParserLimits(**LIMITS)
    _say("ready")
    for line in sys.stdin.buffer:
        # in a thread, so that the end of the pipe is noticed while it goes on
        threading.Thread(target=_answer, args=(llguidance, tokenizer, limits, json.loads(line))).start()
    os._exit(0)


def _answer(*args: Any) -> None:
    _say(_walk(*args))


def _say(text: str) -> None:
    sys.stdout.write(json.dumps(text) + "\n")
    sys.stdout.flush()


def _walk(llguidance: Any, tokenizer: Any, limits: Any, grammar: str) -> str:
    """Compile a grammar and take some random steps of an output."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    choose = random.Random(0).choice
    for _ in range(_STEPS):
        if matcher.is_error():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(256) if mask >> token & 1]
        if not allowed:
            done = matcher.is_accepting() and not matcher.is_error()
            return matcher.get_error() or ("" if done else "nothing satisfies it")
        matcher.consume_token(choose(allowed))
        if matcher.is_stopped():
            break
    return str(matcher.get_error())


if __name__ == "__main__":
    _main()
