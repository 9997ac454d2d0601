"""Scores of a task equal to a computation by hand with transformers: 200 questions of MMLU and of the Gauntlet.

The prompts are written here once more, from the rows. The storyteller knows little of this; its log-likelihoods are
what is compared.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError
from fewbit.measure.tasks.answer import Likelihood
from fewbit.measure.tasks.prompts import Continuation, Prompts
from fewbit.measure.tasks.source import Source, opened
from fewbit.measure.tasks.suite import Entry, Suite, ask_all, suite_of

LENGTH = 768
MMLU_ITEMS = 60
EACH = 28
TASKS = ("copa", "arc_easy", "piqa", "winograd", "lambada_openai")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def storyteller() -> Path:
    try:
        return demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so nothing was scored: {error}")


class KV(transformers.DynamicCache):
    """Keeps K and V in bfloat16, as the engine does for this model."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *where: Any, **more: Any) -> Any:
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *where, **more)


class Hand:
    """transformers, one text at a time."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def score(self, context: str, continuation: str) -> tuple[float, bool, int]:
        """Log-likelihood, whether it is what greedy decoding gives, tokens."""
        before, whole = self.tokenizer(context).input_ids, self.tokenizer(context + continuation).input_ids
        assert whole[: len(before)] == before, "a token reaches over the border; choose other rows"
        with torch.no_grad():
            logits = self.model(torch.tensor([whole]), past_key_values=KV()).logits[0, len(before) - 1 : -1].double()
        target = torch.tensor(whole[len(before) :])
        total = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
        return total, bool((logits.argmax(-1) == target).all()), len(target)

    def fits(self, texts: list[str]) -> bool:
        return max(len(self.tokenizer(text).input_ids) for text in texts) <= LENGTH - 1


class Recorded:
    """Keeps what an answerer said, by what it was asked."""

    def __init__(self, answerer: Any) -> None:
        self.answerer, self.said = answerer, {}

    async def likelihood(self, asked: Continuation) -> Likelihood:
        found = self.said[asked.context, asked.continuation] = await self.answerer.likelihood(asked)
        return found


def rows_of(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf8") as lines:
        return [json.loads(line) for line in lines]


def asked_of_the_engine(path: Path, entries: list[Entry], limit: int) -> tuple[dict, dict, dict]:
    """Results, the items and every likelihood."""

    async def main() -> tuple[dict, dict, dict]:
        async with opened(Source(str(path), max_model_len=LENGTH)) as asked:
            recorded = Recorded(asked.answerer)
            drawn = {e.name: e.chosen(asked, 4 * limit, 0) for e in entries}
            items = {name: [i for i in some if len(i.contexts[0]) < 1200][:limit] for name, some in drawn.items()}
            results = await ask_all(Suite(tuple(entries)), replace(asked, answerer=recorded), items=items)
            shown = {
                e.name: {
                    i.index: [x.index for x in Prompts(e.task, asked.tokenizer, asked.length).examples(i)]
                    for i in items[e.name]
                }
                for e in entries
            }
            return results, shown, recorded.said

    return asyncio.run(main())


def agree(outcome: Any, gold: int, options: list[tuple[float, bool, int]], per_token: bool, score: float) -> bool:
    """The choice by hand is the outcome's, unless two are as good up to rounding. Returns whether it was clear."""
    values = [total / (tokens if per_token else 1) for total, _, tokens in options]
    best = max(range(len(values)), key=lambda i: values[i])
    second = max(v for i, v in enumerate(values) if i != best)
    clear = values[best] - second > 0.1
    if clear:
        assert outcome.given == str(best)
        assert score == float(best == gold)
    return clear


def test_mmlu_by_log_likelihood(shared_data, storyteller):
    hand = Hand(storyteller)
    (entry,) = suite_of(["mmlu"], shared_data).entries
    results, _, said = asked_of_the_engine(storyteller, [entry], MMLU_ITEMS)
    test, dev = rows_of(shared_data / "mmlu" / "test.jsonl.gz"), rows_of(shared_data / "mmlu" / "dev.jsonl.gz")
    clear = 0
    for outcome in results["mmlu"].outcomes:
        row = test[outcome.index]
        shots = [r for r in dev if r["subject"] == row["subject"]][:5]

        def written(row: dict[str, Any]) -> str:
            lines = [row["question"], *(f"{c}. {text}" for c, text in zip("ABCD", row["choices"], strict=True))]
            return "\n".join(lines) + "\nAnswer:"

        def prompt(count: int, row: dict[str, Any] = row, shots: list = shots) -> str:
            subject = " ".join(["", *row["subject"].split("_")])  # as format_subject has it
            solved = "".join(f"{written(r)} {'ABCD'[r['answer']]}\n\n" for r in shots[:count])
            return (
                f"The following are multiple choice questions (with answers) about {subject}.\n\n{solved}{written(row)}"
            )

        count = next(n for n in range(5, -1, -1) if hand.fits([prompt(n) + f" {c}" for c in "ABCD"]))
        options = [hand.score(prompt(count), f" {c}") for c in "ABCD"]
        ids = hand.tokenizer(prompt(count)).input_ids
        for c, (total, _, _) in zip("ABCD", options, strict=True):
            whole = hand.tokenizer(prompt(count) + f" {c}").input_ids
            assert said[tuple(ids), tuple(whole[len(ids) :])].total == pytest.approx(total, abs=0.01)
        clear += agree(outcome, row["answer"], options, False, outcome.score)
    assert clear > MMLU_ITEMS / 2


def test_tasks_of_the_gauntlet(shared_data, storyteller):
    hand = Hand(storyteller)
    entries = [e for e in suite_of(["gauntlet"], shared_data).entries if e.task.name in TASKS]
    assert len(entries) == len(TASKS)
    results, shown, said = asked_of_the_engine(storyteller, entries, EACH)
    clear = asked = 0
    for entry in entries:
        task, rows = entry.task, rows_of(entry.task.file)
        between, answer = ("\nAnswer:" if task.name in ("arc_easy", "piqa") else ""), task.name
        for outcome in results[entry.name].outcomes:
            row = rows[outcome.index]

            def solved(other: dict[str, Any], name: str = answer, between: str = between) -> str:
                if name == "winograd":
                    return f"{other['context_options'][other['gold']]} {other['continuation']}"
                return f"{other['query']}{between} {other['choices'][other['gold']]}"

            examples = [f"{solved(rows[i])}\n" for i in shown[entry.name][outcome.index]]
            if answer == "winograd":
                pairs = [(context, f" {row['continuation']}") for context in row["context_options"]]
            elif answer == "lambada_openai":
                pairs = [(row["context"], f" {row['continuation']}")]
            else:
                pairs = [(f"{row['query']}{between}", f" {choice}") for choice in row["choices"]]
            while not hand.fits(["".join(examples) + a + b for a, b in pairs]):
                examples.pop()
            options = [hand.score("".join(examples) + a, b) for a, b in pairs]
            for (context, continuation), (total, greedy, tokens) in zip(pairs, options, strict=True):
                ids = hand.tokenizer("".join(examples) + context).input_ids
                whole = hand.tokenizer("".join(examples) + context + continuation).input_ids
                found = said[tuple(ids), tuple(whole[len(ids) :])]
                assert found.total == pytest.approx(total, rel=2e-3, abs=2e-3 * tokens + 0.01)  # K and V are BF16
                if answer == "lambada_openai":
                    assert (found.greedy, outcome.score) == (greedy, float(greedy))
            asked += 1
            if len(options) > 1:
                clear += agree(outcome, row["gold"], options, True, outcome.score)
    assert asked == EACH * len(TASKS)
    assert clear > asked / 2


def test_perplexity_is_that_of_transformers(storyteller):
    """A text of the bundled model in windows that slide: 1e-4 relative, against transformers' own losses."""
    from fewbit.checkpoint import open_checkpoint
    from fewbit.measure.quality import evaluate
    from fewbit.text import Tokenizer
    from fewbit.text.windows import read_documents, windows

    length, stride = 256, 96
    text = read_documents(storyteller / "heldout.txt.gz")
    cut = windows(text, Tokenizer.load(storyteller), length, 12, stride)
    found = evaluate(open_checkpoint(storyteller), None, cut, torch.device("cpu"), overlap=length - stride)
    hand, total, count = Hand(storyteller), 0.0, 0
    for number, window in enumerate(cut):
        labels = torch.tensor([window])
        labels[0, : length - stride if number else 0] = -100
        with torch.no_grad():
            loss = hand.model(torch.tensor([window]), labels=labels, past_key_values=KV()).loss.item()
        scored = length - 1 if number == 0 else stride
        total, count = total + loss * scored, count + scored
    assert found.perplexity.value == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
