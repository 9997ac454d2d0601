"""bench offline on a CPU: figures that follow from each other, rows that are kept, rows that fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.cli.offline import row_of, subject_of
from fewbit.errors import RequestError
from fewbit.measure import machine, offline
from fewbit.measure.runfolder import Row, RunFolder, identity, write_object
from helpers import make_model

SIZES = ("--input", "24", "--output", "4", "--runs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_sweep_is_kept_row_by_row_and_not_measured_again(tiny, tmp_path, capsys, monkeypatch):
    command = ["bench", "offline", str(tiny), "--batch", "1,3", *SIZES, "--run-dir", str(tmp_path), "--json"]
    assert cli.run([*command, "-q"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(c["batch"], c["input"], c["output"], c["model"]) for c in cells] == [
        (1, 24, 4, "tiny"),
        (3, 24, 4, "tiny"),
    ]
    spec = open_checkpoint(tiny).spec
    for cell in cells:
        weights = sum(x.out_features * x.in_features for x in spec.linears()) * 2  # bfloat16
        a = spec.layers[0].attention
        kv = len(spec.layers) * 2 * a.kv_heads * a.head_dim * 2 * (24 + 4 / 2) * cell["batch"]
        assert cell["step_bytes"] == pytest.approx(weights + kv)
        assert cell["mbu"] == pytest.approx(cell["step_bytes"] / cell["per_token_s"] / cell["peak_bytes_per_s"])
        assert cell["peak"] == "measured"
        assert cell["peak_bytes_per_s"] == cell["ceilings"]["copy"]
        assert 0 < cell["first_token_s"] < cell["batch"] * 4 / cell["tokens_per_s"]
        assert cell["bits_per_weight"] == 16
        assert cell["environment"]["torch"]
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 2
    monkeypatch.setattr(offline, "Bench", None)  # whoever measures now fails
    assert cli.run(command) == 0
    ended = capsys.readouterr()
    assert json.loads(ended.out)["cells"] == cells
    assert f"2 of 2 rows are in {tmp_path} already" in ended.err


def test_a_row_that_fails_is_a_row_and_the_others_go_on(tiny, tmp_path, capsys):
    command = ["bench", "offline", "--config", str(tiny), "--recipe", "int8", "--kv", "fp8", "--device", "cpu", "-q"]
    command += ["--batch", "2", "--input", "99999,16", "--output", "2", "--runs", "1", "--run-dir", str(tmp_path)]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "failed: 2 x 99999 + 2: prompts of 99999 and answers of 2 tokens exceed" in out
    cells = [json.loads(file.read_text())["cells"][0] for file in tmp_path.glob("*.json")]
    assert sum("failed" in cell for cell in cells) == 1
    good = next(cell for cell in cells if "failed" not in cell)
    assert (good["recipe"], good["kv"], good["model"]) == ("int8", "fp8", None)
    assert 8 < good["bits_per_weight"] < 9
    failed = ["99999" if word == "99999,16" else word for word in command]
    for again in (failed, [*failed, "--retry"]):
        assert cli.run(again) == 2
        ended = capsys.readouterr()
        assert "exceed" in ended.err
        assert ended.out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give what is to be measured"),
        (["DIR", "--config", "llama3-8b"], "one of them"),
        (["DIR", "--recipe", "int8"], "--recipe is for random weights"),
        (["--config", "llama3-8b", "--batch", "1,x"], "--batch 1,x: expected numbers from 1 on"),
        (["--config", "llama3-8b", "--output", "1"], "--output 1: expected numbers from 2 on"),
        (["DIR", "--retry"], "give --run-dir as well"),
        (["--config", "llama4-8b"], "did you mean 'llama3-8b'"),
    ],
)
def test_wrong_words_are_one_line(tiny, capsys, words, said):
    words = [str(tiny) if word == "DIR" else word for word in words]
    assert cli.run(["bench", "offline", *words, "--device", "cpu", "-q"]) == 2
    ended = capsys.readouterr()
    assert said in ended.err
    assert (ended.out, ended.err.count("\n")) == ("", 1)


def test_a_rows_file_follows_from_everything_that_decides_it(tmp_path):
    folder = RunFolder(tmp_path / "new")
    one, other = Row("eval", "a/b c", {"seed": 0}), Row("eval", "a/b c", {"seed": 1})
    assert one.file != other.file
    assert one.file.startswith("eval-a-b-c-")
    assert folder.read(one) is None
    folder.write(one, {"value": 3})
    assert folder.read(one) == {"schema": 1, "command": "eval", "key": {"seed": 0}, "value": 3}
    assert [file.name for file in folder.path.iterdir()] == [one.file]
    (folder.path / one.file).write_text('{"cut')
    with pytest.raises(RequestError, match="not JSON"):
        folder.read(one)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="cannot be made"):
        RunFolder(tmp_path / "file")


def test_an_object_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    write_object(file, {"a": 1})

    def full(path, text, encoding):
        path.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_object(file, {"a": 2})
    assert json.loads(file.read_bytes()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_that_is_written_again_is_another(tiny, tmp_path):
    first = identity(open_checkpoint(tiny))
    assert identity(open_checkpoint(tiny)) == first
    again = make_model(tmp_path / "again")
    assert identity(open_checkpoint(again)) != first


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_directory_with_another_tokenizer_is_another(name, tmp_path):
    model = make_model(tmp_path / "model")
    first = identity(open_checkpoint(model))
    (model / "notes.md").write_text("no part of the model")
    assert identity(open_checkpoint(model)) == first
    (model / name).write_text("{ }")
    assert identity(open_checkpoint(model)) != first


def test_a_row_is_measured_again_after_an_upgrade_and_with_other_threads(tiny, monkeypatch):
    device = torch.device("cpu")
    subject = subject_of(device, str(tiny), None, None, None, None)

    def file() -> str:
        return row_of(subject, offline.Cell(1, 2, 3), "cpu", 1, 0).file

    first = file()
    assert file() == first
    found = {first}
    for owner, name, value in (
        (machine, "__version__", "99"), (torch, "__version__", "99"), (torch, "get_num_threads", lambda: 99),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.add(file())
    assert len(found) == 4
    assert file() == first


def test_the_drivers_tool_is_asked_about_the_card_that_pytorch_means(monkeypatch):
    asked = []

    def run(query, **_) -> SimpleNamespace:
        asked.extend(query)
        return SimpleNamespace(stdout="550.1, 1, 2, 3, 4\n")

    uuid = "1b2c-3d4e"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine._card(torch.device("cuda", 0))["driver"] == "550.1"
    assert f"--id=GPU-{uuid}" in asked
