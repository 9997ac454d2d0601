"""Tasks: their prompts, their scores against a computation by hand, and runs that are stopped and go on."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.errors import RecipeError
from fewbit.measure.tasks.answer import EngineAnswerer, Likelihood
from fewbit.measure.tasks.gauntlet import Gauntlet, composite, gauntlet
from fewbit.measure.tasks.mmlu import mmlu
from fewbit.measure.tasks.prompts import Prompts
from fewbit.measure.tasks.run import Outcome, Result, is_right, run_task
from fewbit.measure.tasks.suite import compared
from fewbit.measure.tasks.task import Task, read_tasks
from fewbit.model import DenseAttend, load
from fewbit.text import Tokenizer

MODEL = Path(__file__).resolve().parents[3] / "models" / "storyteller"
ROWS = [
    {"query": "The bear saw a", "choices": ["big tree.", "of of of.", "blue the."], "gold": 0},
    {"query": "Lily was very", "choices": ["happy.", "and."], "gold": 1},
    {"query": "Once upon a", "choices": ["time", "mouse house"], "gold": 0},
    {"query": "Once upon a time there", "choices": ["was a little girl who loved to play", "had"], "gold": 0},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return folder / name


def described(folder: Path, **fields) -> Task:
    fields = {"name": "bears", "kind": "multiple_choice", "file": write(folder, "bears.jsonl", ROWS), **fields}
    return Task(**fields)


def over(options: EngineOptions, work):
    """`work(answerer)` with an engine for the storyteller."""

    async def main():
        client = InProcessClient(open_engine(MODEL, options))
        try:
            return await work(EngineAnswerer(client, Tokenizer.load(MODEL)))
        finally:
            await client.close()

    return asyncio.run(main())


def test_examples_then_the_question(tmp_path, tokenizer):
    task = described(tmp_path, shots=2, delimiter="\nAnswer: ", before="Q: ", preamble="Choose.\n")
    prompts, items = Prompts(task, tokenizer, 512), task.items()
    shown = prompts.examples(items[1])
    assert len(shown) == 2
    assert items[1] not in shown
    assert shown == Prompts(task, tokenizer, 512).examples(items[1])
    assert (
        len({tuple(e.index for e in Prompts(task, tokenizer, 512, seed).examples(items[1])) for seed in range(9)}) > 1
    )
    first, second = (f"Q: {e.contexts[0]}\nAnswer: {e.answers[e.gold]}\n" for e in shown)
    assert prompts.text(items[1], shown) == f"Choose.\n{first}{second}Q: Lily was very\nAnswer:"
    for made, choice in zip(prompts.continuations(items[1]), items[1].answers, strict=True):
        whole = tokenizer.encode(prompts.text(items[1], shown) + " " + choice)
        assert list(made.context + made.continuation) == whole
        assert tokenizer.decode(made.continuation).strip() == choice


def test_examples_give_way_to_a_long_question(tmp_path, tokenizer):
    task = described(tmp_path, shots=3)
    items = task.items()
    bare = max(
        len(m.context) + len(m.continuation)
        for m in Prompts(described(tmp_path), tokenizer, 512).continuations(items[1])
    )
    for length in (bare, bare + 12, 512):
        made = Prompts(task, tokenizer, length).continuations(items[1])
        assert max(len(m.context) + len(m.continuation) for m in made) <= length
    with pytest.raises(RecipeError, match=rf"row 2: {bare} tokens without any example, and the model takes {bare - 1}"):
        Prompts(task, tokenizer, bare - 1).continuations(items[1])


def test_mmlu_reads_as_its_authors_wrote_it(tmp_path, tokenizer):
    row = {"subject": "high_school_biology", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
    write(tmp_path, "dev.jsonl", [row | {"question": f"Dev {i}?", "answer": 0} for i in range(6)])
    write(tmp_path, "test.jsonl", [row])
    task = mmlu(tmp_path, shots=1)
    prompts, (item,) = Prompts(task, tokenizer, 512), task.items()
    assert prompts.text(item, prompts.examples(item)) == (
        "The following are multiple choice questions (with answers) about  high school biology.\n\n"
        "Dev 0?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
        "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    assert [tokenizer.decode(m.continuation) for m in prompts.continuations(item)] == [" A", " B", " C", " D"]
    assert len(Prompts(mmlu(tmp_path), tokenizer, 512).examples(item)) == 5
    generated = mmlu(tmp_path, "generate")
    (item,) = generated.items()
    assert is_right(generated, item, " C\n")
    assert not is_right(generated, item, " A. C")
    with pytest.raises(RecipeError, match="no test"):
        mmlu(tmp_path / "elsewhere")


def test_likelihoods_are_those_of_the_model_in_one_piece(tmp_path, tokenizer):
    tasks = [described(tmp_path, shots=1, length=length) for length in ("tokens", "characters", "none")]
    prompts, items = Prompts(tasks[0], tokenizer, 256), tasks[0].items()
    decoder = load(open_checkpoint(MODEL))

    def by_hand(made):
        ids = torch.tensor(made.context + made.continuation)
        hidden = decoder.hidden(ids, torch.arange(len(ids)), DenseAttend(decoder.codecs, len(ids)))
        rows = decoder.logits(hidden).double().log_softmax(-1)[len(made.context) - 1 : -1]
        total = rows.gather(1, ids[len(made.context) :, None]).sum().item()
        return total, bool((rows.argmax(-1) == ids[len(made.context) :]).all())

    async def work(answerer):
        results = [await run_task(task, items, prompts, answerer) for task in tasks]
        return results, [[await answerer.likelihood(m) for m in prompts.continuations(i)] for i in items]

    results, found = over(EngineOptions(max_batch=4, max_model_len=256, backend="exact"), work)
    for n, (item, likelihoods) in enumerate(zip(items, found, strict=True)):
        made = prompts.continuations(item)
        expected = [by_hand(one) for one in made]
        assert [f.total for f in likelihoods] == pytest.approx([e[0] for e in expected], abs=1e-4)
        assert [f.greedy for f in likelihoods] == [e[1] for e in expected]
        for result in results:
            divisors = [
                {"tokens": len(m.continuation), "characters": m.characters}.get(result.task.length, 1) for m in made
            ]
            best = max(range(len(made)), key=lambda i: expected[i][0] / divisors[i])
            assert (result.outcomes[n].given, result.outcomes[n].score) == (str(best), float(best == item.gold))
    assert len({tuple(o.given for o in r.outcomes) for r in results}) > 1, "the lengths matter for these items"
    low, high = results[0].interval
    assert low <= results[0].accuracy <= high


def test_generated_texts_end_at_a_stop_and_are_compared(tmp_path, tokenizer):
    rows = [
        {"context": "Once upon a", "answer": "An age", "aliases": ["Time, there!"]},
        {"context": "Lily", "answer": "xyz"},
    ]
    task = Task(
        "stories", "generation", write(tmp_path, "g.jsonl", rows), max_tokens=8, stop=(" lived",), normalize=True
    )  # fmt: skip

    async def work(answerer):
        return await run_task(task, task.items(), Prompts(task, tokenizer, 128), answerer)

    result = over(EngineOptions(max_batch=2, max_model_len=128), work)
    assert [o.score for o in result.outcomes] == [1, 0]
    assert result.outcomes[0].given == " time there"


def test_an_alias_of_which_nothing_is_left_accepts_nothing(tmp_path):
    row = {"context": "Who?", "answer": "Ada", "aliases": ["The", "?!", ""]}
    file = write(tmp_path, "g.jsonl", [row])
    task = Task("who", "generation", file, match="begins", normalize=True)
    (item,) = task.items()
    assert is_right(task, item, "Ada, of course")
    assert not is_right(task, item, "Bob")


def test_a_stopped_run_goes_on_and_another_model_is_refused(tmp_path, tokenizer):
    task, journal = described(tmp_path), tmp_path / "run" / "bears.jsonl"
    prompts, items = Prompts(task, tokenizer, 256), task.items()

    class Stops:
        """Answers twice, then is interrupted."""

        def __init__(self, answerer, left):
            self.answerer, self.left, self.asked = answerer, left, 0

        async def likelihood(self, asked):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked += 1
            return await self.answerer.likelihood(asked)

    async def part(answerer):
        return await run_task(task, items, prompts, Stops(answerer, 5), journal=journal, key={"asked": "a"}, at_once=1)

    async def rest(answerer):
        counted = Stops(answerer, -1)
        return await run_task(task, items, prompts, counted, journal=journal, key={"asked": "a"}), counted.asked

    async def whole(answerer):
        return await run_task(task, items, prompts, answerer)

    options = EngineOptions(max_batch=2, max_model_len=256)
    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        over(options, part)
    with journal.open("a") as file:
        file.write('{"index": 3, "sc')  # killed while it wrote
    resumed, asked = over(options, rest)
    assert resumed == over(options, whole)
    assert asked == 4, "two of four items were known"
    with pytest.raises(RecipeError, match='holds results with asked "a", now it is "b"'):
        over(options, lambda a: run_task(task, items, prompts, a, journal=journal, key={"asked": "b"}))


def test_a_half_line_is_cut_off_in_place_and_a_journal_has_one_writer(tmp_path, tokenizer):
    task, journal = described(tmp_path), tmp_path / "run" / "bears.jsonl"
    prompts, items = Prompts(task, tokenizer, 256), task.items()

    class Tells:
        """Answers the same to everything, but first tries to open the journal that is being written."""

        async def likelihood(self, asked):
            with pytest.raises(RecipeError, match="another fewbit writes to it"):
                await run_task(task, items, prompts, self, journal=journal)
            return Likelihood((-1.0,), False, 1)

    def again():
        return asyncio.run(run_task(task, items, prompts, Tells(), journal=journal))

    whole = again()
    before, place = journal.read_bytes(), journal.stat().st_ino
    journal.write_bytes(before[:-9])
    assert again() == whole
    assert (journal.read_bytes(), journal.stat().st_ino) == (before, place)
    journal.write_bytes(before[:3])
    assert again() == whole
    journal.write_bytes(b"[]\n{}\n")
    with pytest.raises(RecipeError, match="line 1: not a line of a journal"):
        again()
    for line in ({"index": 0, "right": 1}, {"index": 0, "score": "1", "given": "a"}, {"index": 0}):
        journal.write_bytes(before.splitlines(keepends=True)[0] + json.dumps(line).encode() + b"\n")
        with pytest.raises(RecipeError, match="line 2: not a line of a journal; remove it"):
            again()


def test_the_composite_of_a_worked_example(tmp_path):
    """Accuracy 0.30 at baseline 0.25 is 0.0667; a category is the mean of its tasks, the score that of categories."""
    files = {
        "world_knowledge/arc_easy": {"query": "q", "choices": ["a", "b"], "gold": 0},
        "commonsense_reasoning/copa": {"query": "q", "choices": ["a", "b"], "gold": 0},
        "commonsense_reasoning/piqa": {"query": "q", "choices": ["a", "b"], "gold": 0},
        "language_understanding/winogrande": {"context_options": ["a", "b"], "continuation": "c", "gold": 1},
        "symbolic_problem_solving/svamp": {"context": "c", "answer": "1"},
    }
    for name, row in files.items():
        write(tmp_path, f"{name}.jsonl", [row])
    packed = tmp_path / "world_knowledge" / "arc_easy.jsonl"
    (tmp_path / "world_knowledge" / "arc_easy.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    found = gauntlet(tmp_path)
    assert "mmlu" in found.missing["world_knowledge"]
    by_name = {task.name: task for task in found.tasks}
    assert by_name["arc_easy"].items()[0].answers == ("a", "b")
    assert by_name["winogrande"].items()[0].contexts == ("a", "b")

    def result(name, right, of):
        return Result(by_name[name], tuple(Outcome(i, float(i < right), "") for i in range(of)))

    results = {
        "arc_easy": result("arc_easy", 30, 100),
        "copa": result("copa", 75, 100),
        "piqa": result("piqa", 40, 100),
        "winogrande": result("winogrande", 60, 100),
    }
    made = composite(found, results)
    assert made.score is None, "two categories have no result"
    assert made.categories["world_knowledge"] == pytest.approx(0.0667, abs=1e-4)
    assert made.categories["commonsense_reasoning"] == pytest.approx((0.5 - 0.2) / 2)
    assert made.categories["language_understanding"] == pytest.approx(0.2)
    with pytest.raises(RecipeError, match="none of the gauntlet's files"):
        gauntlet(tmp_path / "elsewhere")


def test_a_score_by_groups(tmp_path, tokenizer):
    """Three of four of a large group and none of one of a small one: 0.375, not 0.6."""
    rows = [ROWS[0] | {"category": "large" if i < 8 else "small"} for i in range(10)]
    task = described(tmp_path, file=write(tmp_path, "g.jsonl", rows), by_group=True, shots=1, baseline=0.25)
    items, prompts = task.items(), Prompts(task, tokenizer, 256)
    for item in items:
        (example,) = prompts.examples(item)
        assert (example.group, example.index != item.index) == (item.group, True)

    def result(right):
        return Result(task, tuple(Outcome(i.index, float(i.index < right), "", i.group) for i in items))

    found, base = result(6), result(8)
    assert found.accuracy == pytest.approx(0.375)
    assert found.above_chance == pytest.approx((0.375 - 0.25) / 0.75)
    low, high = found.interval
    assert low <= 0.375 <= high
    pair = compared(found, base)
    assert (pair["base"], pair["difference"]) == pytest.approx((0.5, -0.125))
    assert (pair["lost"], pair["won"], pair["flips"], pair["p"]) == (2, 0, 0.2, 0.5)
    write(tmp_path, "g.jsonl", ROWS)
    with pytest.raises(RecipeError, match="line 1: no field 'category'"):
        task.items()


def test_examples_that_did_not_fit_are_counted_and_not_compared(tmp_path, tokenizer):
    task = described(tmp_path, shots=3)
    items = task.items()

    class Same:
        async def likelihood(self, asked):
            return Likelihood((-1.0,), False, 1)

    def asked(length):
        return asyncio.run(run_task(task, items, Prompts(task, tokenizer, length), Same()))

    longest = max(
        len(m.context + m.continuation) for i in items for m in Prompts(task, tokenizer, 512).continuations(i)
    )
    whole, tight = asked(512), asked(longest - 1)
    assert {o.shots for o in whole.outcomes} == {3}
    equal = sum(o.shots == 3 for o in tight.outcomes)
    assert 0 < equal < len(items)
    assert compared(whole, whole)["items"] == len(items)
    assert compared(whole, tight)["items"] == equal
    none = replace(tight, outcomes=tuple(replace(o, shots=0) for o in tight.outcomes))
    assert compared(whole, none) is None


def test_a_composite_of_some_questions_is_not_complete():
    tasks = {c: (Task(c, "generation", MODEL, by_group=False),) for c in ("a", "b")}
    listed = Gauntlet(tasks, {"a": (), "b": ()})
    whole = {c: Result(t, (Outcome(0, 1.0, ""),)) for c, (t,) in tasks.items()}
    assert composite(listed, whole).complete
    assert not composite(listed, whole | {"b": replace(whole["b"], whole=False)}).complete


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: a\nkind: quiz\nfile: a.jsonl", "unknown kind 'quiz'"),
        ("name: a\nkind: schema", "a task needs 'file', a text"),
        ("name: a\nkind: schema\nfile: a.jsonl\nshot: 3", "unknown field 'shot': did you mean 'shots'?"),
        ("name: a\nkind: schema\nfile: a.jsonl\nshots: many", "'shots' must be a whole number, got 'many'"),
        ("name: a\nkind: schema\nfile: a.jsonl\nshots: true", "'shots' must be a whole number, got True"),
        ("name: a\nkind: schema\nfile: a.jsonl\nbaseline: 1", "baseline must lie in"),
        ("name: a\nkind: schema\nfile: a.jsonl\nlength: bytes", "length must be one of tokens, characters, none"),
        ("- 3", "a task is an object of fields, got int"),
        ("[", "not a description of tasks"),
    ],
)
def test_wrong_descriptions(tmp_path, text, fault):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(RecipeError, match="(?s).*" + fault.replace("(", "\\(").replace("?", "\\?")):
        read_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"query": "a", "choices": ["b"], "gold": 1}', "line 1: the right answer must be a number below 1, got 1"),
        ('{"query": "a", "gold": 0}', "line 1: no field 'choices'"),
        ('{"query": 3, "choices": ["b"], "gold": 0}', "line 1: expected a text, got 3"),
        ('{"query": ', "line 1: not JSON"),
        ("[1]", "line 1: expected an object, found list"),
        ("", "holds no row"),
    ],
)
def test_wrong_rows(tmp_path, row, fault):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(RecipeError, match=fault):
        Task("a", "multiple_choice", tmp_path / "rows.jsonl").items()


@pytest.mark.slow
def test_the_gauntlet_and_mmlu_of_the_shared_data_can_be_asked(shared_data, tokenizer):
    found = gauntlet(shared_data / "gauntlet")
    assert {name for names in found.missing.values() for name in names} == {
        "mmlu", "hellaswag", "bigbench_elementary_math_qa", "squad", "coqa",
    }  # fmt: skip
    for task in [*found.tasks, mmlu(shared_data / "mmlu"), mmlu(shared_data / "mmlu", "generate")]:
        items, prompts = task.items(), Prompts(task, tokenizer, 8192)
        for item in (items[0], items[-1]):
            assert prompts.question(item) if task.kind == "generation" else prompts.continuations(item)
