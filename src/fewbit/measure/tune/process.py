"""Measuring each candidate in a process of its own, so that memory is free between them and a crash is one row."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoint.writer import check_target
from fewbit.errors import UnsupportedError
from fewbit.measure.tune.candidates import Candidate
from fewbit.measure.tune.evidence import Window
from fewbit.measure.tune.questions import Questions
from fewbit.measure.tune.search import LostError, OutOfTimeError

_TAIL = 300  # characters of a dead process's last words
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much is done, and of how much."""


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes:
        model: the directory of the model.
        device: ``cpu`` or ``cuda:N``.
        batch: sequences at a time.
        prompt: tokens of each prompt.
        tokens: tokens of each answer.
        runs: that are counted.
    """

    model: Path
    device: str
    batch: int = 1
    prompt: int = 128
    tokens: int = 64
    runs: int = 3


class Workers:
    """Measures candidates one at a time; see `fewbit.measure.tune.search.Measurer`.

    Args:
        protocol: what is measured.
        folder: of the run: windows and checkpoints lie here.
        windows: token ids of the text, in the order in which they are looked at.
        questions: of tasks, if the goal names their score.
        deadline: of `time.monotonic`; when it comes the measurement under way is ended. None: there is none.
        bars: makes what is called with the progress of one measurement.
    """

    def __init__(
        self, protocol: Protocol, folder: Path, windows: Sequence[Sequence[int]], deadline: float | None = None,
        bars: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(lambda stage, done, total: None),
        questions: Questions | None = None,
    ) -> None:  # fmt: skip
        self.protocol, self.folder, self.deadline, self.bars = protocol, folder, deadline, bars
        folder.mkdir(parents=True, exist_ok=True)
        self.windows = folder / "windows.json"
        self.windows.write_text(json.dumps([list(window) for window in windows]), "utf8")
        self.questions = folder / "questions.json"
        if questions is not None:
            questions.write(self.questions)

    def checkpoint(self, candidate: Candidate) -> Path:
        """Where a candidate's checkpoint lies."""
        return self.folder / "candidates" / candidate.name

    def base(self) -> dict[str, float]:
        """See `Measurer.base`."""
        found: dict[str, float] = self._run("speed", target=str(self.protocol.model), facts=True)["figures"]
        return found

    def make(self, candidate: Candidate) -> dict[str, Any]:
        """See `Measurer.make`."""
        target = self.checkpoint(candidate)
        target.parent.mkdir(parents=True, exist_ok=True)
        return self._run("make", target=str(target), name=candidate.name, recipe=candidate.text)

    def speed(self, candidate: Candidate) -> dict[str, float]:
        """See `Measurer.speed`."""
        found: dict[str, float] = self._run("speed", target=self._there(candidate), facts=False)["figures"]
        return found

    def quality(self, candidate: Candidate, start: int, stop: int) -> list[Window]:
        """See `Measurer.quality`."""
        where = {"windows": str(self.windows), "start": start, "stop": stop}
        found = self._run("quality", target=self._there(candidate), **where)["windows"]
        return [Window(*means) for means in found]

    def answers(self, candidate: Candidate | None, start: int, stop: int) -> list[float]:
        """See `Measurer.answers`."""
        target = str(self.protocol.model) if candidate is None else self._there(candidate)
        where = {"questions": str(self.questions), "start": start, "stop": stop}
        found: list[float] = self._run("tasks", target=target, **where)["scores"]
        return found

    def forget(self, candidate: Candidate) -> None:
        """See `Measurer.forget`."""
        shutil.rmtree(self.checkpoint(candidate), ignore_errors=True)

    def deliver(self, candidate: Candidate, output: Path, force: bool) -> None:
        """Move a candidate's checkpoint to where it is wanted, which appears whole or not at all; forget the others."""
        source = Path(self._there(candidate))
        check_target(output, force, self.protocol.model)
        beside = output.absolute().parent / f".{output.name}.tuned"
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.move(source, beside)
        if output.is_dir():
            shutil.rmtree(output)
        beside.rename(output)
        shutil.rmtree(self.folder / "candidates", ignore_errors=True)

    def _there(self, candidate: Candidate) -> str:
        """A candidate's checkpoint, made again if an earlier search has let it go."""
        if not self.checkpoint(candidate).is_dir():
            self.make(candidate)
        return str(self.checkpoint(candidate))

    def _run(self, stage: str, **request: Any) -> dict[str, Any]:
        """One process.

        Raises:
            UnsupportedError: what it reported.
            LostError: it ended without a word.
            OutOfTimeError: the deadline has come.
        """
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise OutOfTimeError
        p = self.protocol
        request |= {"stage": stage, "model": str(p.model), "device": p.device, "batch": p.batch}
        request |= {"prompt": p.prompt, "tokens": p.tokens, "runs": p.runs}
        with tempfile.TemporaryFile("w+", errors="replace") as words:
            # in a group of its own: Ctrl-C is this process's to take, which then ends the other
            child = subprocess.Popen(
                [sys.executable, "-m", "fewbit.measure.tune.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=words, text=True, process_group=0,
            )  # fmt: skip
            late = threading.Event()

            def stop() -> None:
                late.set()
                child.terminate()

            timer = threading.Timer(left or 0, stop)
            timer.daemon = True
            try:
                if left is not None:
                    timer.start()
                message = self._listen(child, json.dumps(request))
            finally:
                timer.cancel()
                _end(child)
            if "found" in message:
                found: dict[str, Any] = message["found"]
                return found
            if late.is_set():
                raise OutOfTimeError
            if "error" in message:
                raise UnsupportedError(message["error"])
            words.seek(0)
            last = " ".join(words.read()[-_TAIL:].split()) or "no last words"
            raise LostError(f"its process ended with status {child.returncode} ({last})")

    def _listen(self, child: subprocess.Popen[str], request: str) -> dict[str, Any]:
        """The last message of a process; empty if it ended without one."""
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(request + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return {}
        with self.bars() as progress:
            for line in child.stdout:
                message: dict[str, Any] = json.loads(line)
                if "progress" not in message:
                    return message
                progress(*message["progress"])
        child.wait()
        return {}


def _end(child: subprocess.Popen[str]) -> None:
    """End a process that may have ended already."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that nobody read
                pipe.close()
