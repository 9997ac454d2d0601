"""`fewbit tune` from the command line: made-up models in this process, the bundled one in processes of its own."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.measure.journal import Journal
from fewbit.measure.pareto import dominates
from fewbit.measure.tune import JOURNALLED, Candidate, Protocol, Search, Window, Workers, read_goal
from fewbit.measure.tune.worker import STAGES
from helpers import WIDE, make_model

FACTS = {"ttft_ms", "time_per_token_ms", "tokens_per_s", "memory_gb", "bits_per_weight"}
QUALITY = {"recovery", "perplexity", "kl", "top1"}
SMALL = ("--length", 32, "--windows", 8, "--calib-length", 32, "--calib-windows", 4, "--prompt", 8, "--tokens", 4)


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """Measurements are taken in this process, which spares the start of torch in another; which ones."""
    asked = []

    def here(self: Workers, stage: str, **request: Any) -> dict[str, Any]:
        asked.append(stage)
        whole = {**vars(self.protocol), "model": str(self.protocol.model), **request}
        try:
            return STAGES[stage](whole, torch.device("cpu"), lambda *_: None)
        except FewbitError as error:
            raise UnsupportedError(str(error)) from None

    monkeypatch.setattr(Workers, "_run", here)
    return asked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", **WIDE)


def same(a: Path, b: Path) -> bool:
    mine, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_best_is_written_with_its_recipe(fewbit, stages, tiny, tmp_path):
    out = tmp_path / "out"
    asked = ("tune", tiny, "--target", "recovery>=0.5, memory_gb<=1", "--minimize", "bits_per_weight", "-o", out)
    # with --calib-length in the recipe's text, and K and V, another command makes the same
    done = fewbit(*asked, "--recipes", "int8,int4_awq,nvfp4_svd", "--kv", "fp8", *SMALL, "--json", "-q")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    rows = {row["name"]: row for row in found["rows"]}
    assert (found["command"], found["best"], found["whole"]) == ("tune", "int4_awq+kv_fp8", True)
    assert found["base"]["figures"].keys() >= FACTS | QUALITY
    assert found["base"]["figures"]["bits_per_weight"] == 16
    assert found["base"]["figures"]["recovery"] == 1
    best = rows[found["best"]]["figures"]
    assert best.keys() >= FACTS | QUALITY
    assert 4 < best["bits_per_weight"] < 4.3
    assert rows["nvfp4_svd+kv_fp8"]["failed"]
    assert "a branch of rank 32" in rows["nvfp4_svd+kv_fp8"]["out"]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["kv"] == {"format": "fp8", "scale": "static"}
    assert recipe["calib"] == {"samples": 4, "length": 32}
    assert fewbit("compress", tiny, "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "-q").status == 0
    assert same(out, tmp_path / "again")
    run = tmp_path / "out.tune"
    assert sorted(file.name for file in run.iterdir()) == ["journal.jsonl", "result.json", "windows.json"]
    assert json.loads((run / "result.json").read_text())["best"] == found["best"]

    # again: everything is known, and the checkpoint is made anew
    assert fewbit(*asked, "--recipes", "int8", "--kv", "fp8", *SMALL).err.startswith("fewbit: ")  # OUT is not empty
    stages.clear()
    done = fewbit(*asked, "--recipes", "int8,int4_awq,nvfp4_svd", "--kv", "fp8", *SMALL, "--force")
    assert (done.status, stages) == (0, ["make"])
    assert same(out, tmp_path / "again")
    assert "best: int4_awq+kv_fp8, bits_per_weight 4" in done.out
    assert "the front over bits_per_weight, recovery, memory_gb: " in done.out
    assert "going on after" in done.err

    # with other settings: one line
    done = fewbit(*asked, "--recipes", "int8", "--kv", "fp8", *SMALL, "--force")
    assert done.status == 3
    assert 'holds results with candidates "int8+kv_fp8,' in done.err.splitlines()[-1]


def test_a_mixture_is_written_as_ordinary_rules(fewbit, stages, tiny, tmp_path):
    out = tmp_path / "out"
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("techniques: [{auto: {bits: 9.0, candidates: [int8, none], score: gradient, windows: 2}}]\n")
    done = fewbit(
        "tune", tiny, "--target", "kl<=10", "--maximize", "recovery", "-o", out, "--recipes", recipe, "--kv", "none",
        *SMALL,
    )  # fmt: skip
    assert done.status == 0, done.err
    rules = yaml.safe_load((out / "recipe.yaml").read_text())["rules"]
    assert {rule["weight"] for rule in rules} <= {"int8_row", "none"}
    assert fewbit("compress", tiny, "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "-q").status == 0
    assert same(out, tmp_path / "again")


def test_a_target_that_nobody_meets(fewbit, stages, tiny, tmp_path):
    out = tmp_path / "out"
    done = fewbit(
        "tune", tiny, "--target", "bits_per_weight<=2", "-o", out, "--recipes", "int8,int4", "--kv", "none", *SMALL
    )
    assert done.status == 2
    last = done.err.splitlines()[-1]
    assert last.startswith(
        "fewbit: no candidate meets bits_per_weight<=2; nothing was written. Nearest: int4 (bits_per_"
    )
    assert "misses bits_per_weight<=2 (4." in " ".join(done.out.split())
    assert not out.exists()
    assert "quality" not in stages  # decided by the files alone
    assert stages == ["speed", "make", "make"]


def test_a_budget_that_ends_at_once(fewbit, tiny, tmp_path):
    done = fewbit("tune", tiny, "--target", "kl<=1", "-o", tmp_path / "out", "--budget", 1e-9, *SMALL)
    assert done.status == 2
    assert "the same command goes on" in done.err
    assert "nothing was written" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--target", "speed<=3"),
            "--target 'speed<=3': no such figure; known: recovery, perplexity, kl, top1, score, score_recovery, ttft",
        ),
        (("--target", "kl<=1", "--minimize", "recovery"), "--minimize recovery: more of it is better; use --maximize"),
        (("--target", "kl<=1", "--recipes", "int5"), "--recipes: unknown recipe 'int5'"),
        (("--target", "kl<=1", "--recipes", ""), "--recipes : expected names by commas"),
        (("--target", "kl<=1", "--run", __file__), f"--run {__file__} is a file; expected the folder of a search"),
        (("--target", "kl<=1", "-o", "kept", "--run", "kept"), "--run kept lies in -o kept"),
        (("--target", "kl<=1", "-o", "kept", "--run", "kept/../kept/search"), "which the best checkpoint replaces"),
        (("--target", "kl<=1", "--kv", "fp7"), "--kv fp7: did you mean 'fp8'"),
        (("--target", "kl<=1", "--budget", "0"), "--budget 0: expected minutes above 0"),
        (("--target", "kl<=1", "--budget", "nan"), "--budget nan: expected minutes above 0"),
        (("--target", "kl<=1", "--prompt", "100000"), "--prompt and --tokens together: 100064 tokens exceed"),
        (("--target", "kl<=1", "--length", "100000"), "--length: 100000 tokens exceed"),
        (("--target", "kl<=1", "--length", "16", "--windows", "1000000"), "the shipped text has no 1000000 windows"),
        (("--target", "kl<=1", "--data", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--target", "kl<=1", "--calib", "a.txt:-1"), "--calib: the share of a.txt is -1"),
        (("--target", "score>=0.5"), "score and score_recovery are of tasks; say of which: --tasks FILE.yaml"),
        (("--target", "kl<=1", "--tasks", "mmlu"), "--tasks is for a goal that names score or score_recovery"),
        (("--target", "kl<=1", "--limit", "3"), "--limit is for a goal that names score or score_recovery"),
        (("--target", "score>=0.5", "--tasks", "needle"), "--tasks needle: tune asks mmlu, gauntlet and FILE.yaml"),
        (("--target", "score>=0.5", "--tasks", "mmlu"), "give the folder that holds them with --task-data FOLDER"),
        (("--target", "score>=0.5", "--tasks", "gone.yaml"), "gone.yaml: not a description of tasks"),
    ],
)
def test_wrong_inputs_are_one_clear_line(fewbit, tiny, tmp_path, arguments, words):
    done = fewbit("tune", tiny, "-o", tmp_path / "out", "--tokens", 64, "--prompt", 8, "--length", 32, *arguments)
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert words in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tune").exists()


def described(folder: Path, tasks: dict[str, list[dict]]) -> Path:
    """A file that describes tasks, multiple choice, beside their rows."""
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = [{"name": name, "kind": "multiple_choice", "file": f"{name}.jsonl", "shots": 1} for name in tasks]
    (folder / "tasks.yaml").write_text(yaml.safe_dump(described))
    return folder / "tasks.yaml"


def words(count: int) -> list[dict]:
    """Questions that nobody knows the answer to, so that a random model has about half of them right."""
    both = [("oak", "hill"), ("sea", "fox"), ("under", "over"), ("the children", "stories")]
    return [{"query": f"{n} the fox", "choices": both[n % 4], "gold": n // 4 % 2} for n in range(count)]


def test_the_score_of_tasks(fewbit, stages, tiny, tmp_path):
    """Two tasks of 16 and 4 questions, whose accuracies count alike, as `fewbit eval` finds them."""
    tasks, out = described(tmp_path, {"many": words(16), "few": words(4)}), tmp_path / "out"
    asked = ("tune", tiny, "--target", "score_recovery>=0.5", "--minimize", "bits_per_weight", "-o", out)
    asked += ("--recipes", "int8,int4", "--kv", "none", "--tasks", tasks, *SMALL)
    done = fewbit(*asked, "--json", "-q")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (found["questions"], found["best"], found["base"]["figures"]["score_recovery"]) == (20, "int4", 1)
    assert len(found["rows"][1]["scores"]) == 20
    judged = json.loads(fewbit("eval", out, "--base", tiny, "--tasks", tasks, "--json", "-q").out)["tasks"].values()
    score, base = (sum(t["accuracy"] for t in of) / 2 for of in (judged, [t["base"] for t in judged]))
    best = found["rows"][1]["figures"]
    assert (best["score"], found["base"]["figures"]["score"]) == pytest.approx((score, base))
    assert best["score_recovery"] == pytest.approx(score / base)

    stages.clear()
    done = fewbit(*asked, "--force")
    assert (done.status, stages) == (0, ["make"])
    assert " of base " in done.out
    done = fewbit(*asked, "--force", "--limit", 3)
    assert done.status == 3
    assert "holds results with tasks " in done.err.splitlines()[-1]
    programs = tmp_path / "programs.yaml"
    programs.write_text("{name: mine, kind: code, file: many.jsonl}")
    done = fewbit("tune", tiny, "--target", "score>=0.5", "-o", tmp_path / "o", "--tasks", programs, *SMALL)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "mine runs programs that a model wrote, which tune does not" in done.err


def test_a_quantized_model_is_refused(fewbit, tiny, tmp_path):
    assert fewbit("compress", tiny, "--recipe", "int8", "-o", tmp_path / "small", "-q").status == 0
    done = fewbit("tune", tmp_path / "small", "--target", "kl<=1", "-o", tmp_path / "out", *SMALL)
    assert done.status == 2
    assert "is already quantized" in done.err


def test_a_worker_reports_what_a_user_can_be_told(tiny, tmp_path):
    """A real process."""
    workers = Workers(Protocol(tiny, "cpu"), tmp_path, [[1, 2, 3]])
    with pytest.raises(UnsupportedError, match="matches no layer"):
        workers.make(Candidate("wrong", "rules: [{match: nothing, weight: int8_row}]"))


# --- the bundled model, in processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storyteller() -> Path:
    try:
        return demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so nothing was tuned: {error}")


RECIPES = "int8,int4,w4a8,mxfp4_wo"
ON_BOOKS = ("--kv", "none", "--windows", "12", "--length", "128", "--runs", "1", "--tokens", "8", "--prompt", "16")
AXES = ("bits_per_weight", "recovery")


def command(model: Path, out: Path, *options: str) -> list[str]:
    target = ("--target", "recovery>=0.95, bits_per_weight<=16", "--minimize", "bits_per_weight")
    whole = ("tune", str(model), *target, "-o", str(out), "--recipes", RECIPES, *ON_BOOKS, "--json", *options)
    return [sys.executable, "-m", "fewbit.cli", *whole]


class Replay:
    """A measurer that says what an exhaustive search has measured."""

    def __init__(self, journal: Path) -> None:
        lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        self.known = {(line["candidate"], line["stage"]): line for line in lines}

    def base(self):
        return self.known["as it was", "speed"]["figures"]

    def make(self, candidate):
        return {key: self.known[candidate.name, "make"][key] for key in ("figures", "recipe")}

    def speed(self, candidate):
        return self.known[candidate.name, "speed"]["figures"]

    def quality(self, candidate, start, stop):
        return [Window(**w) for w in self.known[candidate.name, "quality 0:12"]["windows"][start:stop]]

    def forget(self, candidate):
        pass


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_what_is_found_lies_on_the_true_front(storyteller, tmp_path):
    """Everything is measured once; a race that is stopped and gone on with must find what lies on that front.

    Quality and bits are the same in every run. Speed is not, so a goal of speed is held to the speeds of the exhaustive
    run itself.
    """
    every = subprocess.run(
        command(storyteller, tmp_path / "every", "--exhaustive"), capture_output=True, text=True, check=False
    )
    assert every.returncode == 0, every.stderr
    whole = json.loads(every.stdout)
    figures = {row["name"]: row["figures"] for row in whole["rows"]}
    assert figures.keys() == set(RECIPES.split(","))
    assert all(len(row["windows"]) == 12 and row["out"] is None for row in whole["rows"])
    points = {name: (f["bits_per_weight"], -f["recovery"]) for name, f in figures.items()}
    front = {name for name, p in points.items() if not any(dominates(q, p) for q in points.values())}
    assert set(whole["front"]) == front
    assert 1 < len(front) <= len(points)

    # Ctrl-C in the middle of it
    out = tmp_path / "out"
    journal = tmp_path / "out.tune" / "journal.jsonl"
    racing = subprocess.Popen(
        command(storyteller, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        end = time.monotonic() + 600
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 5:
            assert racing.poll() is None, racing.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(racing.pid, signal.SIGINT)
        _, said = racing.communicate(timeout=120)
    finally:
        racing.kill()
        racing.wait()
    assert racing.returncode == 130, said
    before = journal.read_bytes()
    assert not out.exists()
    done = subprocess.run(command(storyteller, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(before)
    assert len({line.partition(b'"seconds"')[0] for line in before.splitlines()}) == len(before.splitlines())
    found = json.loads(done.stdout)
    assert found["best"] == whole["best"]
    assert found["best"] in front
    assert same(out, tmp_path / "every")
    for row in found["rows"]:
        exact = next(other for other in whole["rows"] if other["name"] == row["name"])
        for window, other in zip(row["windows"], exact["windows"], strict=False):
            assert window == pytest.approx(other, rel=1e-6, abs=1e-9)
        assert row["out"] is None or row["name"] != whole["best"]
    again = [sys.executable, "-m", "fewbit.cli", "compress", str(storyteller), "--recipe", str(out / "recipe.yaml")]
    made = subprocess.run([*again, "-o", str(tmp_path / "again"), "-q"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert same(out, tmp_path / "again")

    # speed: by the exhaustive run's own measurements
    for target, minimize in (("recovery>=0.9", "time_per_token"), ("recovery>=0.99", "ttft"), ("kl<=0.03", "memory")):
        goal, replay = read_goal(target, minimize), Replay(tmp_path / "every.tune" / "journal.jsonl")
        candidates = [Candidate(name, "") for name in figures]
        with Journal(tmp_path / minimize / "journal.jsonl", {}, JOURNALLED) as kept:
            outcome = Search(candidates, goal, replay, kept, 12).run()
        possible = [name for name, f in figures.items() if not goal.missed(f)]
        assert outcome.best in possible
        best = goal.costs(figures[outcome.best])
        assert best[0] == min(goal.costs(figures[name])[0] for name in possible)
        assert not any(dominates(goal.costs(f), best) for f in figures.values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_goal_of_tasks_is_met_as_eval_says(storyteller, tmp_path):
    """Which of four pieces goes on with a story: what is found by racing is what `fewbit eval` finds of the winner."""
    text = gzip.decompress((storyteller / "heldout.txt.gz").read_bytes()).decode()
    told = [part for part in text.split("\n\n") if 200 < len(part) < 600 and "\n" not in part][:60]
    cuts = [part.index(" ", 120) for part in told]
    pieces = [part[cut : cut + 60] for part, cut in zip(told, cuts, strict=True)]
    rows = [
        {"query": part[:cut], "choices": [pieces[(n + i - n % 4) % len(told)] for i in range(4)], "gold": n % 4}
        for n, (part, cut) in enumerate(zip(told, cuts, strict=True))
    ]
    tasks, out = described(tmp_path, {"endings": rows}), tmp_path / "out"
    target = ("--target", "score_recovery>=0.8", "--minimize", "bits_per_weight", "--tasks", str(tasks))
    words = ("tune", str(storyteller), *target, "-o", str(out), "--recipes", "int8,int4", *ON_BOOKS, "--json")
    done = subprocess.run([sys.executable, "-m", "fewbit.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = next(row for row in found["rows"] if row["name"] == found["best"])
    judge = ("eval", str(out), "--base", str(storyteller), "--tasks", str(tasks), "--json")
    judged = subprocess.run([sys.executable, "-m", "fewbit.cli", *judge], capture_output=True, text=True, check=True)
    pair = json.loads(judged.stdout)["tasks"]["endings"]["paired"]
    assert pair["base"] > 0.35, "chance is 0.25"
    assert len(best["scores"]) == pair["items"] == 60
    assert best["figures"]["score"] == pytest.approx(pair["model"])
    assert best["figures"]["score_recovery"] == pytest.approx(pair["recovery"])
    assert pair["recovery"] >= 0.8
