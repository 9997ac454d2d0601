"""compare: what it asks of its processes, what it keeps of them, and what it makes of their ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from fewbit import cli
from fewbit.measure import compare
from helpers import make_model

TEXT = "The fox went over the hill and under the oak; the children told each other stories. " * 8
SIZES = ("--batch", "1,2", "--input", "16", "--output", "3", "--runs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "base"), make_model(folder / "other")


@pytest.fixture
def here(monkeypatch) -> list[list[str]]:
    """Its processes are commands in this one; what was asked of them."""
    asked: list[list[str]] = []

    def child(arguments, tell) -> compare.Ended:
        asked.append(list(arguments))
        with redirect_stdout(io.StringIO()) as out:
            status = cli.run([*arguments, "-q"])
        return compare.Ended(status, out.getvalue(), "")

    monkeypatch.setattr(compare, "child", child)
    return asked


def test_rows_are_measured_once_and_stand_beside_the_base(models, here, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path / "run")]
    words += ["--data", str(text), "--length", "32", "--windows", "2"]
    assert cli.run([*words, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "base"
    assert [(m["label"], [c["batch"] for c in m["cells"]]) for m in found["models"]] == [
        ("base", [1, 2]), ("other", [1, 2]),
    ]  # fmt: skip
    base, other = (m["quality"] for m in found["models"])
    assert other["perplexity_base"] == pytest.approx(base["perplexity"])
    assert other["kl_mean"] == pytest.approx(0, abs=1e-9)  # the same weights
    assert other["top1_agreement"] == 1
    assert [words[:2] for words in here] == [["bench", "offline"]] * 2 + [["eval", str(m)] for m in models]
    here.clear()
    assert cli.run([*words, "-q"]) == 0
    assert here == []
    out = capsys.readouterr().out
    cells = [m["cells"][1] for m in found["models"]]
    assert f"{cells[1]['tokens_per_s'] / cells[0]['tokens_per_s']:.2f}" in out
    assert "100.0% ± 0.0%" in out


def test_tasks_give_a_score_and_what_it_is_of_the_bases(models, here, tmp_path, capsys):
    (tmp_path / "guess.jsonl").write_text(
        "".join(json.dumps({"query": f"word {i}", "choices": ["a", "b"], "gold": i % 2}) + "\n" for i in range(6))
    )
    (tmp_path / "guess.yaml").write_text("name: guess\nkind: multiple_choice\nfile: guess.jsonl\n")
    words = ["compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path / "run"), "-q"]
    assert cli.run([*words, "--tasks", str(tmp_path / "guess.yaml"), "--limit", "4", "--json"]) == 0
    base, other = (m["quality"]["tasks"] for m in json.loads(capsys.readouterr().out)["models"])
    assert next(iter(other.values()))["paired"]["base"] == next(iter(base.values()))["accuracy"]
    assert cli.run([*words, "--tasks", str(tmp_path / "guess.yaml"), "--limit", "4"]) == 0
    assert f"{next(iter(base.values()))['accuracy']:.1%}" in capsys.readouterr().out
    answers = [list(map(json.loads, file.open())) for file in (tmp_path / "run" / ".answers").rglob("guess.jsonl")]
    assert len(answers) == 3  # of the base, and of the other with the base once more
    here.clear()
    (tmp_path / "guess.jsonl").write_text((tmp_path / "guess.jsonl").read_text().replace("word", "term"))
    assert cli.run([*words, "--tasks", str(tmp_path / "guess.yaml"), "--limit", "4"]) == 0
    assert [asked[0] for asked in here] == ["eval"] * 2  # of the new questions
    assert cli.run([*words, "--limit", "4"]) == 2
    assert "give --tasks as well" in capsys.readouterr().err


def test_programs_are_run_only_where_that_may_be(models, here, tmp_path, capsys, monkeypatch):
    """The options go to the processes that ask the models, and to no other. What a model says stands in a string."""
    rows = [{"prompt": "said = '''", "test": f"'''\nassert {right}"} for right in (True, True, False)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "code.yaml").write_text("{name: mine, kind: code, file: code.jsonl, max_tokens: 3, delimiter: ''}")
    words = ["compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path / "run"), "-q", "--json"]
    words += ["--tasks", str(tmp_path / "code.yaml")]
    monkeypatch.setattr("fewbit.measure.tasks.suite.missing", lambda: "there is no fence")
    for given, fault in (
        ([], "where that may be, give --allow-code-execution"),
        (["--allow-code-execution"], "there is no fence; where that may be, give --allow-unconfined-code"),
    ):
        assert cli.run([*words, *given]) == 2
        assert fault in capsys.readouterr().err
    assert here == []  # nothing was measured
    assert cli.run([*words, "--allow-code-execution", "--allow-unconfined-code"]) == 0
    for one in json.loads(capsys.readouterr().out)["models"]:
        assert one["quality"]["tasks"]["mine"]["accuracy"] == pytest.approx(2 / 3)
    for asked in here:
        flags = [word for word in asked if word.startswith("--allow")]
        assert flags == (["--allow-code-execution", "--allow-unconfined-code"] if asked[0] == "eval" else [])
    monkeypatch.setattr("fewbit.measure.tasks.suite.missing", lambda: None)
    here.clear()
    assert cli.run([*words[:-1], str(tmp_path / "code.yaml"), "--limit", "1", "--allow-code-execution"]) == 0
    assert [[word for word in asked if word.startswith("--allow")] for asked in here] == [
        ["--allow-code-execution"]
    ] * 2


def test_rows_of_another_device_are_named(models, here, tmp_path, capsys):
    words = ["compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path), "-q"]
    assert cli.run(words) == 0
    assert "left out" not in capsys.readouterr().out
    for number, file in enumerate(sorted(tmp_path.glob("*.json"))[:3]):
        row = json.loads(file.read_text())
        row["key"]["device"] = "NVIDIA H100"
        (tmp_path / f"bench-offline-of-another-{number}.json").write_text(json.dumps(row))
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "left out: 3 rows of NVIDIA H100, which fewbit report shows" in out
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"NVIDIA H100": 3}


def test_quality_is_shown_where_no_speed_is(models, here, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["compare", *map(str, models), "--batch", "1", "--output", "3", "--runs", "1", "--device", "cpu", "-q"]
    words += ["--data", str(text), "--length", "32", "--windows", "2", "--run-dir", str(tmp_path / "run")]
    assert cli.run([*words, "--input", "99999"]) == 0
    out = capsys.readouterr().out
    assert out.count("failed: ") == 2
    assert "100.0% ± 0.0%" in out
    assert cli.run([*words, "--input", "99999,16"]) == 0  # the first row of each failed
    assert "100.0% ± 0.0%" in capsys.readouterr().out


def test_a_killed_process_fails_one_row_and_the_next_goes_on(here, tmp_path, capsys, monkeypatch, models):
    healthy, ended = compare.child, iter([compare.Ended(-9, "", "batch 1: warming up")])
    monkeypatch.setattr(compare, "child", lambda words, tell: next(ended, None) or healthy(words, tell))
    words = ["compare", "--config", str(models[0]), "--recipes", "int8", *SIZES, "--run-dir", str(tmp_path), "-q"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "failed: BF16, 1 x 16 + 3: the process was killed by signal 9; out of memory?" in out
    assert len(here) == 2
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert cli.run([*words, "--retry"]) == 0
    assert "failed" not in capsys.readouterr().out
    assert len(here) == 3


def test_answers_that_another_process_writes_are_no_failure(models, here, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path / "run")]
    words += ["--data", str(text), "--length", "32", "--windows", "2", "-q"]
    assert cli.run(words) == 0
    base = next((tmp_path / "run").glob("eval-base-*.json"))
    base.unlink()
    with (tmp_path / "run" / ".answers" / base.stem / "text.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.run(words) == 3
    assert "another fewbit writes to it" in capsys.readouterr().err
    assert not base.exists()
    assert cli.run(words) == 0
    assert "failed" not in base.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give directories, the base first"),
        (["BASE"], "expected a base and one directory or more"),
        (["BASE", "OTHER", "--config", "llama3-8b"], "give directories, the base first, or --config"),
        (["--config", "llama3-8b"], "--config needs --recipes"),
        (["--config", "llama3-8b", "--recipes", "fp8,fp8"], "each once"),
        (["--config", "llama3-8b", "--recipes", "fp9"], "fp9"),
        (["--config", "llama3-8b", "--recipes", "fp8", "--data", "x"], "random weights predict nothing"),
        (["BASE", "OTHER", "--kv", "fp8"], "--kv is for random weights"),
        (["BASE", "OTHER", "--data", "gone.txt"], "gone.txt: no such file"),
        (["BASE", "gone"], "gone"),
        (["BASE", "OTHER", "--tasks", "mlmu"], "did you mean 'mmlu'"),
        (["BASE", "OTHER", "--tasks", "lm-eval:arc_easy"], "no column for tasks of lm-eval"),
        (["BASE", "OTHER", "--tasks", "perplexity"], "give it with --text FILE"),
        (["BASE", "OTHER", "--tasks", "needle", "--text", "gone.txt"], "--text gone.txt: no such file"),
        (["BASE", "OTHER", "--tasks", "gone.yaml"], "gone.yaml"),
    ],
)
def test_wrong_words_are_one_line(models, tmp_path, capsys, words, said):
    named = {"BASE": str(models[0]), "OTHER": str(models[1])}
    words = [named.get(word, word) for word in words]
    assert cli.run(["compare", *words, "--device", "cpu", "--run-dir", str(tmp_path / "run"), "-q"]) == 2
    ended = capsys.readouterr()
    assert said in ended.err
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert not list(tmp_path.rglob("*.json"))  # nothing was measured before


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_ctrl_c_loses_no_row(models, tmp_path):
    """Real processes: stopped after the first row, gone on with by the same command."""
    words = [sys.executable, "-m", "fewbit.cli", "compare", *map(str, models), *SIZES, "--run-dir", str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 600
        while not list(tmp_path.glob("*.json")):
            assert process.poll() is None
            assert time.monotonic() < until, "no row after 600 s"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=600)
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    if process.returncode == 0:  # held up since the first row, this process came after the last
        assert len(kept) == 4, said
    else:
        assert process.returncode == 130, said
        assert f"rows in {tmp_path}; the same command goes on from there" in said
    assert kept
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ, timeout=600)
    assert done.returncode == 0, done.stderr
    now = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(now) == 4
    assert now.items() >= kept.items()
