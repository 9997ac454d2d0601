"""`fewbit eval --tasks`: which are meant, the same scores whoever is asked, answers of servers, runs that stop."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stub_server import Script, stub_server

import fewbit
from fewbit.checkpoint import open_checkpoint
from fewbit.cli import run
from fewbit.errors import RecipeError
from fewbit.measure.load.endpoint import client_of
from fewbit.measure.tasks.answer import AnswerError, Likelihood, several
from fewbit.measure.tasks.predict import losses, predicted
from fewbit.measure.tasks.prompts import Continuation
from fewbit.measure.tasks.remote import HttpAnswerer, served
from fewbit.measure.tasks.source import Asked, Source, is_url, known, opened
from fewbit.measure.tasks.suite import ask_all, report, suite_of
from fewbit.model import DenseAttend, load
from fewbit.text import Tokenizer

MODEL = Path(__file__).resolve().parents[3] / "models" / "storyteller"
ENDINGS = [
    {"query": "Once upon a", "choices": ["time", "mouse house"], "gold": 0, "category": "openings"},
    {"query": "Lily was very", "choices": ["happy.", "and."], "gold": 1},
    {"query": "The bear saw a", "choices": ["big tree.", "of of of.", "blue the."], "gold": 0},
    {"query": "He lived in a great", "choices": ["forest", "of the"], "gold": 0},
]
STORIES = [
    {"context": "Once upon a", "answer": " time there"},
    {"context": "They lived happily ever", "answer": " after"},
]
DESCRIBED = """
- {name: endings, kind: multiple_choice, file: endings.jsonl, shots: 1, baseline: 0.5}
- {name: stories, kind: generation, file: stories.jsonl, delimiter: "", max_tokens: 3, stop: ["."], match: begins}
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    for name, rows in {"endings": ENDINGS, "stories": STORIES}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(DESCRIBED)
    return tmp_path / "mine.yaml"


class Direct:
    """A plain forward of the whole text, in one piece, without the engine."""

    def __init__(self) -> None:
        self.decoder, self.tokenizer = load(open_checkpoint(MODEL)), Tokenizer.load(MODEL)

    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        hidden = self.decoder.hidden(
            torch.tensor(ids), torch.arange(len(ids)), DenseAttend(self.decoder.codecs, len(ids))
        )
        return self.decoder.logits(hidden).double().log_softmax(-1)

    async def likelihood(self, asked: Continuation) -> Likelihood:
        ids = [*asked.context, *asked.continuation]
        rows, target = self._log_probs(ids)[len(asked.context) - 1 : -1], torch.tensor(asked.continuation)
        each = rows.gather(1, target[:, None])[:, 0].tolist()
        return Likelihood(tuple(each), bool((rows.argmax(-1) == target).all()), asked.characters)

    async def text(self, prompt, max_tokens, stop) -> str:
        ids = list(prompt)
        for _ in range(max_tokens):
            ids.append(int(self._log_probs(ids)[-1].argmax()))
            text = self.tokenizer.decode(ids)[len(self.tokenizer.decode(prompt)) :]
            for end in stop:
                if end in text:
                    return text[: text.index(end)]
        return text


async def measured(asked: Asked, suite, windows, **more):
    return await ask_all(suite, asked, **more), await losses(asked, windows, 16)


def by_source(source: Source, suite, windows):
    async def main():
        async with opened(source) as asked:
            return await measured(asked, suite, windows)

    return asyncio.run(main())


def compared_with_a_plain_forward(found, length: int, suite, windows) -> None:
    """Scores and perplexity, up to rounding, of the same questions put to `Direct`."""
    direct = Direct()
    asked = Asked(direct, direct.tokenizer, MODEL, length - 1, {})
    results, lost = asyncio.run(measured(asked, suite, windows))
    for name, result in results.items():
        assert [o.given for o in found[0][name].outcomes] == [o.given for o in result.outcomes]
        assert found[0][name].accuracy == result.accuracy
    mine, plain = predicted(windows, 16, found[1], None), predicted(windows, 16, lost, None)
    assert mine.perplexity.value == pytest.approx(plain.perplexity.value, rel=1e-4)
    assert mine.tokens == plain.tokens == sum(map(len, windows)) - 16 * (len(windows) - 1)


def cut(length: int) -> list[list[int]]:
    ids = Tokenizer.load(MODEL).encode("Once upon a time there lived a king who had three sons. " * 8)
    return [ids[i : i + length] for i in range(0, 3 * (length - 16), length - 16)]


def test_the_engine_scores_as_a_plain_forward(tasks):
    suite, windows = suite_of([str(tasks)]), cut(40)
    found = by_source(Source(str(MODEL), max_batch=4, max_model_len=256), suite, windows)
    compared_with_a_plain_forward(found, 256, suite, windows)
    made = report(suite, found[0], found[0])["tasks"]["endings"]
    assert made["groups"] == {"openings": 1.0}
    assert made["paired"]["recovery"] == 1
    assert made["paired"]["flips"] == made["paired"]["difference"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_scores_as_the_engine_to_the_last_bit(tasks):
    suite, windows = suite_of([str(tasks)]), cut(40)
    with fewbit.serve(MODEL, port=0, grpc_port=0, device="cpu", exact=True, max_model_len=256) as server:
        over_http = by_source(Source(server.url, tokenizer=str(MODEL)), suite, windows)
    found = by_source(Source(str(MODEL), max_model_len=256), suite, windows)
    assert {n: r.outcomes for n, r in over_http[0].items()} == {n: r.outcomes for n, r in found[0].items()}
    assert all(torch.equal(a, b) for a, b in zip(over_http[1], found[1], strict=True))
    compared_with_a_plain_forward(over_http, 256, suite, windows)


def test_a_limit_takes_a_part_of_a_larger_one(tasks):
    (entry,) = [e for e in suite_of([str(tasks)]).entries if e.name == "endings"]
    asked = Asked(None, None, MODEL, 64, {})
    taken = [{item.index for item in entry.chosen(asked, n, 5)} for n in (1, 2, 3, 4, 9)]
    assert [len(t) for t in taken] == [1, 2, 3, 4, 4]
    assert all(a <= b for a, b in itertools.pairwise(taken))
    assert len({tuple(i.index for i in entry.chosen(asked, 1, seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["mlu"], "--tasks mlu: did you mean 'mmlu'?"),
        (["mmlu"], "--tasks mmlu reads local files: give the folder"),
        (["needle"], "give it with --text FILE"),
        (["lm-eval:"], "needs a task of lm-eval"),
        (["lm-eval:a", "lm-eval:a"], "two tasks are called 'a'"),
        (["MINE", "MINE"], "two tasks are called 'endings'"),
        (["gone.yaml"], "not a description of tasks"),
    ],
)
def test_wrong_names(tasks, names, fault):
    with pytest.raises(RecipeError) as error:
        suite_of([str(tasks) if name == "MINE" else name for name in names])
    assert fault in str(error.value)


def test_what_is_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_url("http://server")
    assert is_url("127.0.0.1:8000")
    assert is_url("server:8000/v1")
    assert not is_url("models/storyteller")
    assert not is_url("org/name")
    (tmp_path / "a:1").mkdir()
    assert not is_url("a:1")


# --- a server's answers -----------------------------------------------------------------------------------------------


def answered(scripts: list[Script], work):
    """`work(answerer)` with a server that gives these answers, the last one again and again; and what it was asked."""

    async def main():
        async with stub_server(lambda number, body: scripts[min(number, len(scripts) - 1)]) as stub:
            client = client_of(stub.url, None)
            try:
                return await work(HttpAnswerer(client, "m")), stub.seen
            finally:
                await client.close()

    return asyncio.run(main())


def said(payload: object, status: int = 200, **headers: str) -> Script:
    return Script([(0.0, json.dumps(payload).encode())], status, headers=headers)


def echoed(logprobs: list, top: list) -> Script:
    return said({"choices": [{"text": "", "logprobs": {"token_logprobs": logprobs, "top_logprobs": top}}]})


ASKED = Continuation((5, 6), (7, 8), 3)
WHOLE = echoed([None, -1.0, -2.0, -0.5, -9.0], [None, {"a": -1.0}, {"b": -1.5, "c": -2.0}, {"d": -0.5}, {"e": -9.0}])


def test_log_probabilities_are_those_of_the_continuation():
    found, seen = answered([WHOLE], lambda a: a.likelihood(ASKED))
    assert found == Likelihood((-2.0, -0.5), False, 3)
    (_, _, body) = seen[0]
    assert (body["prompt"], body["echo"], body["max_tokens"]) == ([5, 6, 7, 8], True, 1)


def test_a_busy_server_is_asked_again():
    busy = said({"error": {"message": "full"}}, 429, **{"Retry-After": "0"})
    found, seen = answered([busy, busy, WHOLE], lambda a: a.likelihood(ASKED))
    assert found.total == -2.5
    assert len(seen) == 3


def test_as_many_are_asked_at_a_time_as_was_said():
    async def main():
        client, under_way, all_here = client_of("127.0.0.1:1", None), 0, asyncio.Event()

        async def exchange(request, told):
            nonlocal under_way
            under_way += 1
            if under_way == 200:
                all_here.set()
            await all_here.wait()
            told(0.0, WHOLE.parts[0][1])
            return SimpleNamespace(status=200, headers={})

        client.exchange = exchange
        answerer = HttpAnswerer(client, "m")
        work = [answerer.likelihood(ASKED) for _ in range(200)]
        async with asyncio.timeout(60):
            return await several(work, 200, lambda done: None)

    assert len(asyncio.run(main())) == 200


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (echoed([-9.0], [{"e": -9.0}]), "1 log probabilities came for a prompt of 4 tokens"),
        (said({"choices": [{"text": ""}]}), "0 log probabilities came for a prompt of 4 tokens"),
        (echoed([None, -1.0, None, -0.5], [None, {}, {}, {}]), "came without its log probability"),
        (said({"error": {"message": "prompt too long"}}, 400), "HTTP 400: prompt too long"),
        (said({"choices": []}), "no completion but"),
        (Script([(0.0, b"<html>")]), "no completion but b'<html>'"),
    ],
)
def test_answers_that_will_not_do(script, fault):
    with pytest.raises(AnswerError, match=fault):
        answered([script], lambda a: a.likelihood(ASKED))


def test_a_server_that_is_not_there():
    async def main():
        client = client_of("127.0.0.1:1", None)
        with pytest.raises(AnswerError, match="is a server running there"):
            await served(client, None)

    asyncio.run(main())


# --- the command ------------------------------------------------------------------------------------------------------


def evaluated(capsys, *words: object) -> dict:
    assert run(["eval", str(MODEL), "--json", "-q", "--max-model-len", "256", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_tasks_against_a_base_and_their_journals(tasks, tmp_path, capsys):
    words = ("--tasks", tasks, "--base", MODEL, "--out", tmp_path / "run", "--limit", 3)
    made = evaluated(capsys, *words)
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == made
    assert (made["result_schema"], made["limit"], made["seed"]) == (1, 3, 0)
    endings = made["tasks"]["endings"]
    assert endings["items"] == endings["paired"]["items"] == 3
    assert endings["base"]["accuracy"] == endings["accuracy"]
    assert len(endings["data"]["file"]["sha256"]) == 64
    journals = [tmp_path / "run" / which / "endings.jsonl" for which in ("model", "base")]
    assert [len(j.read_text().splitlines()) for j in journals] == [4, 4]
    assert not list((tmp_path / "run").glob("*.jsonl"))  # of what lm-eval asks, or a text over HTTP: neither is there
    before = [j.read_bytes() for j in journals]
    assert evaluated(capsys, *words) == made  # nothing is asked again
    assert [j.read_bytes() for j in journals] == before
    assert run(["eval", str(MODEL), *map(str, words), "--max-model-len", "128", "-q"]) == 3
    assert "holds results with max_model_len 256, now it is 128;" in capsys.readouterr().err
    assert run(["eval", str(MODEL), "--tasks", str(tasks), "--base", str(MODEL), "--max-model-len", "256", "-q"]) == 0
    shown = capsys.readouterr().out
    assert "endings" in shown
    assert "recovery" in shown


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--tasks", "code", "--data", "."], "no human_eval.jsonl"),
        (["--tasks", "perplexity"], "no text to predict"),
        ([], "no text to predict"),
        (["--tasks", "mmlu", "--data", "gone"], "no such folder"),
        (["--tasks", "mmlu", "--data", ".", "--scorer", "guess"], "--scorer guess"),
        (["--tasks", "needle", "--text", "t.txt", "--needle-lengths", "1k"], "expected whole numbers by commas"),
        (["--tasks", "a.yaml", "--tokenizer", "x"], "--tokenizer is for a server"),
        (["--data", "t.txt", "--text", "t.txt"], "both name a text"),
        (["--data", "t.txt", "--limit", "3"], "--limit is about tasks; give --tasks as well"),
        (["--data", "t.txt", "--lm-eval-path", "."], "--lm-eval-path is about tasks"),
        (["--data", "t.txt", "--stride", "600"], "a stride lies between 1 and the length of a window, 512"),
        (["--base", "127.0.0.1:1", "--data", "t.txt"], "give the model's directory: --tokenizer DIR"),
    ],
)
def test_wrong_inputs_are_one_line(tmp_path, monkeypatch, capsys, words, fault):
    (tmp_path / "t.txt").write_text("Once upon a time. " * 400)
    (tmp_path / "a.yaml").write_text("{name: a, kind: multiple_choice, file: a.jsonl}")
    monkeypatch.chdir(tmp_path)
    assert run(["eval", str(MODEL), "-q", *words]) == 2
    said = capsys.readouterr()
    assert fault in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_base_that_cannot_be_asked_is_found_before_the_first_question(tasks, tmp_path, capsys, monkeypatch):
    def never(*given, **more):
        raise AssertionError("the model was asked")

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 40)
    monkeypatch.setattr("fewbit.measure.tasks.suite.run_task", never)
    monkeypatch.setattr("fewbit.measure.quality.evaluate", never)
    words = ["eval", str(MODEL), "-q", "--max-model-len", "256", "--text", str(text)]
    words += ["--tasks", f"perplexity,{tasks}"]
    (unreadable := tmp_path / "unreadable").mkdir()
    for name in ("config.json", "model.safetensors"):
        (unreadable / name).write_bytes((MODEL / name).read_bytes())
    for base, fault in (
        (["gone/typo"], "gone/typo"),
        (["127.0.0.1:1", "--tokenizer", str(MODEL)], "is a server running there"),
        ([str(unreadable)], "tokenizer"),
    ):
        assert run([*words, "--base", *base]) == 2
        said = capsys.readouterr().err
        assert fault in said
        assert said.count("\n") == 1
    (tmp_path / "stories.jsonl").write_text(json.dumps({"context": "far too long " * 300, "answer": "x"}))
    assert run(words) == 2
    assert "task 'stories', row 1" in capsys.readouterr().err


def test_a_task_that_lm_eval_does_not_know_is_found_before_the_text_is_predicted(tmp_path, capsys, monkeypatch):
    def never(*given, **more):
        raise AssertionError("a text was predicted")

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 40)
    monkeypatch.setattr("fewbit.measure.quality.evaluate", never)
    assert run(["eval", str(MODEL), "-q", "--text", str(text), "--tasks", "perplexity,lm-eval:no_such_task"]) == 2
    said = capsys.readouterr().err
    assert "no such task in lm-eval" in said or "fewbit[lm-eval]" in said


def test_ctrl_c_without_a_folder_says_that_nothing_was_kept(tasks, tmp_path, capsys, monkeypatch):
    async def stopped(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbit.measure.tasks.suite.run_task", stopped)
    words = ["eval", str(MODEL), "--tasks", str(tasks), "--max-model-len", "256"]
    assert run(words) == 130
    assert "nothing was kept; with -o RUNDIR" in capsys.readouterr().err
    assert run([*words, "-o", str(tmp_path / "run")]) == 130
    assert "nothing was kept" not in capsys.readouterr().err


def test_the_length_of_prompts_is_the_models_or_8192_whatever_memory_is_free():
    length = asyncio.run(known(Source(str(MODEL)))).length
    assert length == min(open_checkpoint(MODEL).spec.context, 8192) - 1
    assert asyncio.run(known(Source(str(MODEL), max_model_len=64))).length == 63


def test_another_model_behind_the_same_address_has_another_key():
    def key(text: str) -> dict:
        async def main():
            async with stub_server(lambda number, body: said({"choices": [{"text": text}]})) as stub:
                source = Source(stub.url, tokenizer=str(MODEL), max_model_len=256)
                async with opened(source) as asked:
                    return asked.key | {"model": asked.key["model"].split(" ", 1)[1]}  # without the port

        return asyncio.run(main())

    assert key(" 42") == key(" 42") != key(" 43")
    assert fewbit.__version__ == key(" 42")["fewbit"]


def test_another_machine_is_refused_with_what_differs(tasks, tmp_path, capsys, monkeypatch):
    words = (
        "eval",
        str(MODEL),
        "--tasks",
        str(tasks),
        "--limit",
        "1",
        "--max-model-len",
        "256",
        "-q",
        "--device",
        "cpu",
    )
    assert run([*words, "-o", str(tmp_path)]) == 0
    monkeypatch.setattr("fewbit.measure.machine.torch.get_num_threads", lambda: 99)
    assert run([*words, "-o", str(tmp_path)]) == 3
    assert ", now it is 99; go on with the same settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_loses_nothing(tasks, tmp_path):
    rows = [row | {"query": f"{n} {row['query']}"} for n in range(300) for row in ENDINGS]
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "fewbit.cli", "eval", str(MODEL), "--tasks", str(tasks), "--json"]
    words += ["--max-model-len", "256", "-o"]
    process = subprocess.Popen([*words, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal, limit = tmp_path / "run" / "model" / "endings.jsonl", time.monotonic() + 240
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    known = journal.read_bytes()
    assert known.count(b"\n") < len(rows)
    # a part of the questions will do to see that what was known is as good as what is asked now
    words = [*words[:-1], "--limit", "48", "-o"]
    whole = [json.loads(subprocess.check_output([*words, str(tmp_path / run)])) for run in ("run", "other")]
    assert journal.read_bytes().startswith(known)
    assert whole[0]["tasks"]["endings"]["items"] == 48
    assert whole[0]["tasks"] == whole[1]["tasks"]
