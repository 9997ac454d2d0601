"""lm-evaluation-harness asking a server scores a model exactly as the model is scored directly.

Three tasks made of the bundled held-out stories (choose a continuation, generate, perplexity), through lm-eval's
`local-completions` with the server's tokenizer and with one of its own. Each log-likelihood is compared with that of
`fewbit.Engine` (the same float) and with that of transformers. Then `fewbit eval --tasks lm-eval:NAME`, which runs the
harness with the engine as its model.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from client_server import run

import fewbit

pytestmark = pytest.mark.slow

LENGTH = 2048  # lm-eval's own limit, and the model's
UNTIL = [".", "!", "?"]
TASKS = {
    "stories_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "stories_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": UNTIL, "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "stories_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
WAYS = {
    "the server's tokenizer": ("tokenizer_backend=auto", "1"),
    "its own tokenizer, four prompts a request": (
        "tokenizer_backend=huggingface,tokenizer={model},num_concurrent=2",
        "4",
    ),
}


@pytest.fixture(scope="module")
def tasks(storyteller, tmp_path_factory) -> Path:
    """A folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    text = gzip.decompress((storyteller / "heldout.txt.gz").read_bytes()).decode()
    told = [p for p in text.split("\n\n") if 200 < len(p) < 600 and "\n" not in p]
    choices = []
    for i, paragraph in enumerate(told[:24]):
        cut = paragraph.index(" ", 120)
        others = [other[(at := other.index(" ", 120)) : at + 60] for other in told[i + 1 : i + 4]]
        answers = [*others[: i % 4], paragraph[cut : cut + 60], *others[i % 4 :]]
        choices.append({"text": paragraph[:cut], "choices": answers, "answer": i % 4})
    whole = [{"text": paragraph} for paragraph in told[24:36]] + [{"text": text[:9000]}]  # more than the model's length
    for name, rows in {"stories_choice": choices, "stories_until": choices, "stories_rolling": whole}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **TASKS[name]}))
    return folder


@pytest.fixture(scope="module", params=WAYS)
def reported(request, tasks, server, storyteller, program, tmp_path_factory) -> dict[str, Any]:
    """What lm-eval reported: the score and the samples of each task."""
    how, batch = WAYS[request.param]
    folder = tmp_path_factory.mktemp("lm-eval")
    arguments = f"model=storyteller,base_url={server}/v1/completions," + how.format(model=storyteller)
    said = run(
        [
            *(program("lm-eval", "lm_eval"), "run", "--model", "local-completions", "--model_args", arguments),
            *("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", batch),
            *("--output_path", str(folder / "out"), "--log_samples", "--seed", "1"),
        ],
        folder,
        HF_HOME=str(folder / "hf"),
        LMEVAL_LOG_LEVEL="INFO",
    )
    assert ("remote tokenizer" in said) == ("auto" in how), said
    (results,) = (folder / "out").rglob("results_*.json")
    found: dict[str, Any] = {"scores": json.loads(results.read_text())["results"]}
    for name in TASKS:
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = sorted(rows, key=lambda row: row["doc_id"])
    return found


@pytest.fixture(scope="module")
def engine(storyteller):
    with fewbit.Engine(storyteller, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def exact(storyteller):
    """Asked as `fewbit eval` asks."""
    with fewbit.Engine(storyteller, device="cpu", backend="exact") as made:
        yield made


@pytest.fixture(scope="module")
def oracle(storyteller):
    return transformers.AutoModelForCausalLM.from_pretrained(storyteller, dtype=torch.float32).eval()


def direct(engine: fewbit.Engine, ids: Sequence[int], scored: int) -> tuple[float, bool]:
    """Log-likelihood of the last `scored` ids after the others, and whether each was the likeliest."""
    (answer,) = engine.generate(ids, max_tokens=1, temperature=0, prompt_logprobs=1)
    last = answer.prompt_logprobs[-scored:]
    return sum(p.chosen for p in last), all(p.chosen == max(v for _, v in p.top) for p in last)


class KV(transformers.DynamicCache):
    """Keeps K and V in bfloat16, as the engine does for this model."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *where: Any, **more: Any) -> Any:
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *where, **more)


def by_transformers(oracle: Any, ids: Sequence[int], scored: int) -> float:
    with torch.no_grad():
        logits = oracle(torch.tensor([ids]), past_key_values=KV()).logits[0, :-1].double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return chosen[-scored:].sum().item()


def test_choices_are_scored_as_directly(reported, engine, oracle):
    def encode(text: str) -> list[int]:
        return engine.tokenizer.encode(text, add_special_tokens=False)

    right = 0
    for sample in reported["stories_choice"]:
        doc, sums = sample["doc"], []
        for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
            ids = encode(doc["text"] + choice)
            scored = len(ids) - len(encode(doc["text"]))
            wanted = direct(engine, ids, scored)
            assert (float(response[0]), response[1] in (True, "True")) == wanted
            assert by_transformers(oracle, ids, scored) == pytest.approx(wanted[0], abs=1e-3 * scored + 0.01)
            sums.append(wanted[0])
        right += sums.index(max(sums)) == doc["answer"]
    score = reported["scores"]["stories_choice"]["acc,none"]
    assert score == right / len(reported["stories_choice"])
    assert score > 0.4, "chance is 0.25: the harness got no log-probabilities of the prompt"


def test_generated_texts_are_the_engines(reported, engine):
    for sample in reported["stories_until"]:
        ids = engine.tokenizer.encode(sample["doc"]["text"], add_special_tokens=False)
        (wanted,) = engine.generate(ids, max_tokens=24, temperature=0, stop=[*UNTIL, "<|endoftext|>"])
        assert sample["resps"] == [[wanted.text]]
    assert any(sample["resps"][0][0].strip() for sample in reported["stories_until"])


def test_perplexity_is_that_of_the_model(reported, engine, oracle):
    start = engine.tokenizer.encode("")  # opens every text
    total, octets = 0.0, 0
    for sample in reported["stories_rolling"]:
        text = sample["doc"]["text"]
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
        windows = [([*start, *ids[: LENGTH - 2]], min(len(ids), LENGTH - 2))]
        if len(ids) > LENGTH - 2:  # the rest after as much of what is before it as fits
            windows.append((ids[-(LENGTH - 1) :], len(ids) - (LENGTH - 2)))
        direct_sum = 0.0
        for window, scored in windows:
            direct_sum += (wanted := direct(engine, window, scored)[0])
            assert by_transformers(oracle, window, scored) == pytest.approx(wanted, abs=1e-3 * scored + 0.01)
        assert float(sample["filtered_resps"][0]) == direct_sum
        total, octets = total + direct_sum, octets + len(text.encode())
    assert any(len(s["doc"]["text"]) > 8000 for s in reported["stories_rolling"])
    bits = reported["scores"]["stories_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / octets / 0.6931471805599453, rel=1e-12)


@pytest.fixture(scope="module")
def delegated(tasks, storyteller, program, tmp_path_factory) -> dict[str, Any]:
    """What `fewbit eval` says of the three tasks. The harness's packages stand behind ours, which have torch."""
    (packages,) = Path(program("lm-eval", "python")).parents[1].glob("lib/python*/site-packages")
    folder = tmp_path_factory.mktemp("delegated")
    start = f"import sys; sys.path.append({str(packages)!r}); from fewbit.cli import run; sys.exit(run(sys.argv[1:]))"
    names = ",".join(f"lm-eval:{name}" for name in TASKS)
    words = [sys.executable, "-c", start, "eval", str(storyteller), "--tasks", names, "--lm-eval-path", str(tasks)]
    environment = {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(Path(fewbit.__file__).parents[1])}
    result, journal = folder / "run" / "eval.json", folder / "run" / "model.jsonl"
    found, kept = [], []
    for _ in range(2):  # the second time as after Ctrl-C: half of the answers are known
        run([*words, "--out", str(folder / "run"), "--device", "cpu", "-q"], folder, **environment)
        found.append(json.loads(result.read_text())["lm_eval"])
        kept.append(journal.read_bytes().splitlines(keepends=True))
        journal.write_bytes(b"".join(kept[0][: len(kept[0]) // 2]))
    assert len(kept[0]) > 100
    assert sorted(kept[0]) == sorted(kept[1])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.timeout(900)
def test_eval_runs_the_harness_with_the_engine(delegated, tasks, exact):
    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]

    def encode(text: str) -> list[int]:
        return exact.tokenizer.encode(text, add_special_tokens=False)

    found = {name: task["metrics"] for name, task in delegated["tasks"].items()}
    right = 0
    for row in rows("stories_choice"):
        sums = [
            direct(exact, encode(row["text"] + c), len(encode(row["text"] + c)) - len(encode(row["text"])))[0]
            for c in row["choices"]
        ]
        right += sums.index(max(sums)) == row["answer"]
    assert found["stories_choice"]["acc,none"] == right / len(rows("stories_choice")) > 0.4
    assert len(delegated["tasks"]["stories_choice"]["intervals"]["acc,none"]) == 2
    assert delegated["tasks"]["stories_rolling"]["intervals"] == {}, "bits per byte are no mean over texts"
    same = 0
    for row in rows("stories_until"):
        (said,) = exact.generate(encode(row["text"]), max_tokens=24, temperature=0, stop=UNTIL)
        same += said.text == row["choices"][row["answer"]]
    assert found["stories_until"]["exact_match,none"] == same / len(rows("stories_until"))
    start, total, octets = exact.tokenizer.encode(""), 0.0, 0
    for row in rows("stories_rolling"):
        ids = encode(row["text"])
        total += direct(exact, [*start, *ids[: LENGTH - 2]], min(len(ids), LENGTH - 2))[0]
        if len(ids) > LENGTH - 2:
            total += direct(exact, ids[-(LENGTH - 1) :], len(ids) - (LENGTH - 2))[0]
        octets += len(row["text"].encode())
    bits = found["stories_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / octets / 0.6931471805599453, rel=1e-9)
    assert delegated["cut_prompts"] == 0
