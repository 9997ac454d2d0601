"""Runs that stop and go on: windows of a text, and whatever else a model was asked."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import weakref
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import Checkpoint, open_checkpoint
from fewbit.cli import run
from fewbit.errors import RecipeError
from fewbit.measure import quality
from fewbit.measure.journal import Journal
from fewbit.measure.tasks.answer import JournalledAnswerer, Likelihood
from fewbit.measure.tasks.predict import losses
from fewbit.measure.tasks.prompts import Continuation
from fewbit.measure.tasks.source import Asked
from helpers import ids, make_model

WINDOWS = [ids(16, 256, seed) for seed in range(6)] + [ids(9, 256, 7)]
OVERLAP = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    assert (
        run(["compress", str(make_model(folder / "base")), "--recipe", "int8_wo", "-o", str(folder / "m"), "-q"]) == 0
    )
    return [open_checkpoint(folder / name) for name in ("m", "base")]


class Stops(Journal):
    """Ctrl-C before the next line."""

    def __init__(self, path: Path, left: int = -1) -> None:
        super().__init__(path, {}, quality.JOURNALLED)
        self.left, self.added = left, []

    def add(self, line):
        if len(self.added) == self.left:
            raise KeyboardInterrupt
        self.added.append(line["window"])
        return super().add(line)


@pytest.mark.parametrize("based", [True, False])
def test_a_text_that_was_stopped_anywhere_goes_on_to_the_same_figures(models, based, tmp_path, monkeypatch):
    monkeypatch.setitem(quality.TOKENS, "cpu", 40)  # two windows at a time

    def measured(journal):
        base = models[1] if based else None
        return quality.evaluate(models[0], base, WINDOWS, torch.device("cpu"), overlap=OVERLAP, journal=journal)

    whole = measured(None)
    assert (whole.kl_max is not None) == based
    for left in range(len(WINDOWS)):
        path = tmp_path / f"{left}.jsonl"
        with Stops(path, left) as first, pytest.raises(KeyboardInterrupt):
            measured(first)
        with Stops(path) as second:
            assert measured(second) == whole
        assert first.added + second.added == list(range(len(WINDOWS)))  # nothing lost, nothing twice

    def never(*given, **more):
        raise AssertionError("a model was run")

    monkeypatch.setattr(quality, "Forward", never)
    with Stops(path) as third:
        assert measured(third) == whole
    monkeypatch.undo()
    assert measured(None).perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)  # all windows at a time


def test_one_group_is_let_go_before_the_next_is_made(models, monkeypatch):
    monkeypatch.setitem(quality.TOKENS, "cpu", 40)
    alive: weakref.WeakSet[quality.Forward] = weakref.WeakSet()
    counts = []

    class Counted(quality.Forward):
        def __init__(self, *given):
            counts.append(len(alive))
            super().__init__(*given)
            alive.add(self)

    monkeypatch.setattr(quality, "Forward", Counted)
    quality.evaluate(models[0], models[1], WINDOWS, torch.device("cpu"))
    assert counts == [0, 1] * 4


def test_what_a_journal_holds_of_a_group_that_is_computed_again_is_its_own(models, tmp_path):
    def measured():
        with Stops(tmp_path / "text.jsonl") as journal:
            return quality.evaluate(models[0], None, WINDOWS, torch.device("cpu"), journal=journal), journal.added

    whole, _ = measured()
    first, *lines = (tmp_path / "text.jsonl").read_text().splitlines()
    changed = json.loads(lines[0])
    changed["losses"] = [loss + 1 for loss in changed["losses"]]
    (tmp_path / "text.jsonl").write_text("\n".join([first, json.dumps(changed), *lines[1:-1], ""]))
    again, added = measured()
    assert added == [len(WINDOWS) - 1]
    predicted = [len(window) - 1 for window in WINDOWS]
    raised = torch.tensor(whole.perplexity.value).log().item() + predicted[0] / sum(predicted)
    assert torch.tensor(again.perplexity.value).log().item() == pytest.approx(raised, rel=1e-6)


def test_windows_go_together_as_far_as_their_tokens_do():
    assert list(quality._groups([[0] * n for n in (3, 3, 9, 2, 2, 2)], 6)) == [range(2), range(2, 3), range(3, 6)]


def test_what_a_model_was_asked_is_not_asked_again(tmp_path):
    class Counts:
        def __init__(self) -> None:
            self.asked = 0

        async def likelihood(self, asked):
            self.asked += 1
            if self.asked == 4:
                raise KeyboardInterrupt
            return Likelihood(tuple(-1 / (3 + i) for i in asked.continuation), True, asked.characters)

        async def text(self, prompt, max_tokens, stop):
            self.asked += 1
            return f"{prompt} {max_tokens} {stop}"

    def asked(work, counts):
        with Journal(tmp_path / "model.jsonl", {}, JournalledAnswerer.NAMES) as journal:
            return asyncio.run(work(JournalledAnswerer(counts, journal)))

    def text(answerer):
        return losses(Asked(answerer, None, None, 64, {}), WINDOWS, OVERLAP, at_once=1)

    first, second, plain = Counts(), Counts(), Counts()
    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        asked(text, first)
    second.asked = 4  # this one is not interrupted
    found = asked(text, second)
    assert second.asked - 4 == len(WINDOWS) - 3
    plain.asked = 4
    assert all(torch.equal(a, b) for a, b in zip(found, asyncio.run(text(plain)), strict=True))

    async def others(answerer):
        one = Continuation((1,), (2, 3), 5)
        split = Continuation((1, 2), (3,), 5)
        assert await answerer.likelihood(one) == await answerer.likelihood(one) != await answerer.likelihood(split)
        return [await answerer.text([1], n, stop) for n in (4, 5) for stop in ([], ["."], [])]

    third = Counts()
    third.asked = 10
    said = asked(others, third)
    assert said == ["[1] 4 []", "[1] 4 ['.']", "[1] 4 []", "[1] 5 []", "[1] 5 ['.']", "[1] 5 []"]
    assert third.asked - 10 == 2 + 4


def test_known_answers_are_told_first_and_together(tmp_path):
    class Waits:
        async def likelihood(self, asked):
            await asyncio.sleep(0)
            return Likelihood(tuple(-1.0 for _ in asked.continuation), True, asked.characters)

    def told(windows):
        said = []
        with Journal(tmp_path / "model.jsonl", {}, JournalledAnswerer.NAMES) as journal:
            asked = Asked(JournalledAnswerer(Waits(), journal), None, None, 64, {})
            work = losses(asked, windows, at_once=2, progress=lambda stage, done, total: said.append(done))
            assert len(asyncio.run(work)) == len(windows)
        return said

    assert told(WINDOWS[:4])[-1] == 4
    again = told(WINDOWS)
    assert (again[0], again[-1]) == (4, len(WINDOWS))
    assert told(WINDOWS) == [len(WINDOWS)]


def test_the_command_goes_on_with_a_text_and_refuses_another(models, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("The fox went over the hill and under the oak. " * 40)
    model, base = (str(one.path) for one in models)
    words = ["eval", model, "--base", base, "--data", str(tmp_path / "book.txt"), "-o", str(tmp_path / "run"), "-q"]
    assert run([*words, "--length", "64"]) == 0
    first, journal = capsys.readouterr().out, tmp_path / "run" / "text.jsonl"
    before = journal.read_bytes()
    assert before.count(b"\n") > 2
    journal.write_bytes(before[: before.rindex(b'{"window"')])
    assert run([*words, "--length", "64"]) == 0
    assert capsys.readouterr().out == first
    assert journal.read_bytes() == before
    assert run([*words, "--length", "32"]) == 3
    assert "holds results with windows " in capsys.readouterr().err


@pytest.mark.parametrize(
    "held", [b"Once upon a time", b'{"text": "a"}\n{"text": "b', b"[1]\n2", b'{"settings": 3}\n', b"\n"]
)
def test_a_file_that_is_no_journal_stays_as_it_is(held, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(held)
    with pytest.raises(RecipeError, match="line 1: not a line of a journal; give another -o"):
        Journal(file, {"a": 1}, ("window",))
    assert file.read_bytes() == held


def test_a_refused_journal_keeps_its_half_line(tmp_path):
    file = tmp_path / "text.jsonl"
    with Journal(file, {"a": 1}, ("window",)) as journal:
        journal.add({"window": 0})
    held = file.read_bytes() + b'{"win'
    file.write_bytes(held)
    with pytest.raises(RecipeError, match="holds results with a 1, now it is 2"):
        Journal(file, {"a": 2}, ("window",))
    assert file.read_bytes() == held
    with Journal(file, {"a": 1}, ("window",)) as journal:
        assert len(journal) == 1
    assert file.read_bytes() == held[:-5]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.EWOULDBLOCK, "another fewbit writes to it"),
        (errno.ENOLCK, "cannot be locked .No locks available"),
        (errno.ENOSYS, "cannot be locked .Function not implemented"),
    ],
)
def test_a_lock_that_is_not_given_is_told_with_its_reason(code, told, tmp_path, monkeypatch):
    def refuses(*given):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(RecipeError, match=told):
        Journal(tmp_path / "text.jsonl", {}, ("window",))
