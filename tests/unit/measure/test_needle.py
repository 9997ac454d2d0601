"""Needles: prompts of the lengths asked for, the number where it was put, the same for the same seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewbit.errors import RecipeError
from fewbit.measure.tasks.needle import ANSWER_TOKENS, CHOICES, Needle
from fewbit.measure.tasks.prompts import Prompts
from fewbit.text import Tokenizer

MODEL = Path(__file__).resolve().parents[3] / "models" / "storyteller"
TEXT = MODEL / "heldout.txt.gz"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


def test_lengths_and_depths(tokenizer):
    needle = Needle((256, 700), (0, 50, 100), 3)
    items = needle.items(TEXT, tokenizer, 1024)
    assert len(items) == 2 * 3 * 3
    prompts = Prompts(needle.task(TEXT), tokenizer, 1024)
    for item in items:
        length, depth = map(int, item.group.split("@"))
        tokens = max(len(one.context) + len(one.continuation) for one in prompts.continuations(item))
        assert length - 24 <= tokens <= length
        (text,) = item.contexts
        asked = re.search(r"What is the secret number of (\w+)\?", text)
        told = re.search(rf"The secret number of {asked[1]} is (\d+)\. Remember it", text)
        assert told[1] == item.answers[item.gold]
        assert len(set(item.answers)) == CHOICES
        share = told.start() / (asked.start() - len(told[0]))
        assert abs(share - depth / 100) < 0.25  # whole sentences, of which a short text has few
    assert len({item.contexts for item in items}) == len(items)
    assert len({item.gold for item in items}) > 1


def test_the_seed_decides(tokenizer):
    first, again, other = (Needle((300,), (30,), 2, seed=s).items(TEXT, tokenizer, 512) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_generated_answers_leave_room(tokenizer):
    needle = Needle(None, (50,), 1, scorer="generate")
    items = needle.items(TEXT, tokenizer, 1024 + ANSWER_TOKENS)
    assert [item.group for item in items] == ["512@50", "1024@50"]
    assert all(len(item.answers) == 1 for item in items)
    task = needle.task(TEXT)
    assert (task.kind, task.baseline) == ("generation", 0)
    for item in items:
        assert len(Prompts(task, tokenizer, 1024 + ANSWER_TOKENS).question(item)) <= 1024


@pytest.mark.parametrize(
    ("needle", "fault"),
    [
        (Needle((9000,)), "--needle-lengths 9000: the model takes 2047 tokens"),
        (Needle((40,)), "needle and question alone take"),
    ],
)
def test_lengths_that_do_not_fit(tokenizer, needle, fault):
    with pytest.raises(RecipeError, match=fault):
        needle.items(TEXT, tokenizer, 2047)


def test_texts_that_will_not_do(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Only this. " * 10)
    with pytest.raises(RecipeError, match="fewer words than"):
        Needle((512,)).items(tmp_path / "a.txt", tokenizer, 2047)
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2, 3]}\n')
    with pytest.raises(RecipeError, match="no text to hide a needle in"):
        Needle((512,)).items(tmp_path / "a.jsonl", tokenizer, 2047)
    with pytest.raises(RecipeError, match="--needle-depths 101: expected percent"):
        Needle(depths=(101,))
