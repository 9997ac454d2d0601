"""Writing a checkpoint: in shards, whole or not at all, over nothing that was not to be replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fewbit.checkpoint.shards
from fewbit.checkpoint import CheckpointWriter, check_target, format_named, open_checkpoint
from fewbit.checkpoint.layout import Quantization
from fewbit.compress import compress, plan, read_recipe, run
from fewbit.compress.disk import Disk
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import CheckpointError
from helpers import make_model, same_tensors
from independent_decoder import decode


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"))


def small(source: Path, target: Path, recipe: str = "int8_wo", **options):
    checkpoint = open_checkpoint(source)
    chosen = parse_recipe("own", recipe) if ":" in recipe else read_recipe(recipe)
    return compress(checkpoint, plan(checkpoint, chosen), target, **options)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_written(source, tmp_path):
    small(source, tmp_path / "out")
    assert files(tmp_path) == ["out"]
    assert files(tmp_path / "out") == [
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert oct((tmp_path / "out").stat().st_mode)[-3:] == "755"
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "out"))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["recipe"] == "int8_wo"
    assert (tmp_path / "out" / "recipe.yaml").read_text().startswith("# INT8 weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("recipe", ["int4", "nvfp4_wo"])
def test_shards_and_their_index(source, tmp_path, monkeypatch, recipe):
    small(source, tmp_path / "one", recipe)
    monkeypatch.setattr(fewbit.checkpoint.shards, "SHARD_BYTES", 60_000)
    small(source, tmp_path / "many", recipe)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    same_tensors(one, many)
    assert (one.quant, one.kv, one.spec) == (many.quant, many.kv, many.spec)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert set(index["weight_map"].values()) == set(shards)
    found = {n: t for shard in shards for n, t in load_file(tmp_path / "many" / shard).items()}
    assert index["weight_map"].keys() == found.keys() == load_file(tmp_path / "one" / "model.safetensors").keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in found.values())
    for shard in shards:
        size = sum(t.numel() * t.itemsize for t in load_file(tmp_path / "many" / shard).values())
        assert size <= 60_000 or len(load_file(tmp_path / "many" / shard)) == 1
    theirs = decode(tmp_path / "one")
    assert all(torch.equal(t, theirs[n]) for n, t in decode(tmp_path / "many").items())


def test_scales_that_the_config_does_not_speak_of_are_extra(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fewbit.checkpoint.shards, "SHARD_BYTES", 100_000)
    small(source, tmp_path / "kept", "rules: []\nkv: {format: fp8}\ncalib: {samples: 1, length: 16}")
    monkeypatch.undo()
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "kept" / "config.json").write_text(json.dumps(config))
    index = tmp_path / "kept" / "model.safetensors.index.json"
    assert index.exists()
    with pytest.raises(CheckpointError, match=r"self_attn.k_scale' \(and 3 more\) in .* belongs to nothing"):
        open_checkpoint(tmp_path / "kept")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, CheckpointError("no")])
@pytest.mark.parametrize("when", ["compress 0", "compress 1", "check 0", "compress 2"])
@pytest.mark.parametrize("over", [False, True])
def test_interrupted_it_leaves_finished_layers_or_nothing(source, tmp_path, error, when, over):
    target = tmp_path / "out"
    if over:
        target.mkdir()
        (target / "precious").write_text("mine")
    seen = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(f"{stage} {done}")
        if seen[-1] == when:
            assert len(list(tmp_path.glob(".out.*"))) == 1  # it is under way
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        small(source, target, progress=progress, force=True)
    # finished layers are kept, unless it was the check that failed or the same would come again
    again = isinstance(error, CheckpointError) or when == "check 0"
    kept = [] if again or when == "compress 0" else [".out.unfinished"]
    assert files(tmp_path) == kept + (["out"] if over else [])
    if over:
        assert files(target) == ["precious"]


RECIPES = {
    "int4": "int4",
    "gptq after smoothing": """
rules: [{match: "layers.*", weight: int8_row, input: int8, input_scale: static}]
kv: {format: fp8}
techniques: [{smoothquant: {}}, {gptq: {}}]
calib: {samples: 4, length: 32}
""",
}


class StoppedError(Exception):
    pass


def stop_at(when: int):
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("compress", when):
            raise StoppedError

    return progress


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("threads", [False, True])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(source, tmp_path, monkeypatch, caplog, recipe, threads):
    if threads:  # as on a GPU
        monkeypatch.setattr(run, "Disk", lambda seconds, overlaps: Disk(seconds, True))
    whole, target = tmp_path / "whole", tmp_path / "out"
    report = small(source, whole, recipe)
    assert report.resumed_after == 0
    for when in (1, 2):  # layers: before the second, before the head
        with pytest.raises(StoppedError):
            small(source, target, recipe, progress=stop_at(when))
    assert "the same command goes on with it" in caplog.text
    again = small(source, target, recipe)
    assert again.resumed_after == 2
    assert files(tmp_path) == ["out", "whole"]
    assert {f.name: f.read_bytes() for f in target.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    assert (again.weight_error, again.output_error, again.kl) == (report.weight_error, report.output_error, report.kl)
    assert again.verified == report.verified


def test_unfinished_work_of_other_settings_is_thrown_away_by_force_only(source, tmp_path):
    with pytest.raises(StoppedError):
        small(source, tmp_path / "out", "int4", progress=stop_at(1))
    with pytest.raises(CheckpointError, match=r"out.unfinished holds unfinished work on another model, recipe or data"):
        small(source, tmp_path / "out", "int8_wo")
    assert small(source, tmp_path / "out", "int8_wo", force=True).resumed_after == 0
    assert files(tmp_path) == ["out"]
    assert str(open_checkpoint(tmp_path / "out").quant["layers.0.attn.q"].weight) == "int8_row"


def test_a_model_that_changed_since_is_another(source, tmp_path):
    own = make_model(tmp_path / "model")
    with pytest.raises(StoppedError):
        small(own, tmp_path / "out", progress=stop_at(1))
    os.utime(own / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="holds unfinished work on another model"):
        small(own, tmp_path / "out")


def test_two_runs_do_not_fill_one_folder(source, tmp_path):
    with (
        begin(source, tmp_path / "out"),
        pytest.raises(CheckpointError, match=r"another process is writing to .*out; wait for it"),
    ):
        begin(source, tmp_path / "out")
    assert files(tmp_path) == []


def test_a_killed_run_that_finished_nothing_begins_anew(source, tmp_path):
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    small(source, tmp_path / "out")
    assert files(tmp_path) == ["out"]
    assert files(tmp_path / "out")[:2] == ["config.json", "model.safetensors"]
    open_checkpoint(tmp_path / "out")


def test_what_goes_wrong_in_the_thread_is_raised(source, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Disk", lambda seconds, overlaps: Disk(seconds, True))
    add = CheckpointWriter.add

    def full(self, name, tensor):
        if name == "layers.1.mlp.up.weight":
            raise OSError("no space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", full)
    with pytest.raises(OSError, match="no space left"):
        small(source, tmp_path / "out")
    assert files(tmp_path) == [".out.unfinished"]
    monkeypatch.undo()
    assert small(source, tmp_path / "out").resumed_after == 1


def test_interrupted_between_the_two_renames(source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    rename = Path.rename

    def interrupted(self, to):
        if Path(to) == target and self.name.startswith(".out.") and "precious" not in files(self):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(source, target, force=True)
    assert files(tmp_path) == ["out"]
    assert files(target) == ["precious"]


def test_a_writer_that_cannot_begin_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fewbit.checkpoint.shards, "_cut", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(source, tmp_path / "out")
    assert files(tmp_path) == []


def test_a_folder_that_is_not_empty_is_replaced_only_by_force(source, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    small(source, target)  # empty: nothing to lose
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"out is not empty; choose another folder or pass --force"):
            small(source, target, "int4")
    assert str(open_checkpoint(target).quant["layers.0.attn.q"].weight) == "int8_row"
    (target / "stale").write_text("")
    small(source, target, "int4", force=True)
    assert str(open_checkpoint(target).quant["layers.0.attn.q"].weight) == "int4_g128"
    assert not (target / "stale").exists()
    assert files(tmp_path) == ["out"]


@pytest.mark.parametrize("total", [0, 1 << 40])
def test_a_disk_that_does_not_tell_its_size_is_not_full(source, tmp_path, monkeypatch, total):
    monkeypatch.setattr(fewbit.checkpoint.shards.shutil, "disk_usage", lambda _: SimpleNamespace(total=total, free=0))
    if total:
        with pytest.raises(CheckpointError, match="too full"):
            small(source, tmp_path / "out")
    else:
        small(source, tmp_path / "out")
        open_checkpoint(tmp_path / "out")


def test_a_file_is_never_replaced(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="out is a file; expected a folder to write to"):
            small(source, tmp_path / "out", force=force)


def test_the_model_that_is_read_is_never_replaced(tmp_path):
    source = make_model(tmp_path / "models" / "tiny")
    for target in (source, tmp_path / "models", tmp_path):
        with pytest.raises(CheckpointError, match=r"holds the model that is read, .*tiny; choose another folder"):
            small(source, target, force=True)
        with pytest.raises(CheckpointError, match="holds the model that is read"):
            check_target(target, True, source)
    small(source, source / "small")  # within it is no harm
    open_checkpoint(source)


def test_folders_on_the_way_are_made(source, tmp_path):
    small(source, tmp_path / "a" / "b" / "out")
    open_checkpoint(tmp_path / "a" / "b" / "out")


def begin(source: Path, target: Path) -> CheckpointWriter:
    c = open_checkpoint(source)
    dtypes = {n: c.tensors.dtype(n) for n in c.tensors}
    return CheckpointWriter(
        target, format_named("hf"), c.family, c.spec, Quantization({}, {}), dtypes, c.config, c.files, {}
    )


def test_a_tensor_that_never_came(source, tmp_path):
    tensors = open_checkpoint(source).tensors
    with begin(source, tmp_path / "out") as made:
        for name in tensors:
            if name != "layers.1.mlp.up.weight":
                made.add(name, tensors[name])
        with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' was never written"):
            made.finish()
    assert files(tmp_path) == []


def test_a_tensor_that_is_not_what_was_planned(source, tmp_path):
    with begin(source, tmp_path / "out") as made, pytest.raises(AssertionError, match="planned"):
        made.add("final_norm.weight", torch.ones(128, dtype=torch.float32))


def test_a_copy_is_the_same_model(source, tmp_path):
    """Without a quantization the writer writes an ordinary Hugging Face directory."""
    tensors = open_checkpoint(source).tensors
    with begin(source, tmp_path / "out") as made:
        for name in reversed(list(tensors)):  # any order will do
            made.add(name, tensors[name])
        made.finish()
        assert files(tmp_path) != ["out"]
        made.commit()
    copy = open_checkpoint(tmp_path / "out")
    same_tensors(copy, open_checkpoint(source))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == open_checkpoint(source).config


def test_heads(tmp_path):
    """A tied head stays tied; once it is quantized it is a tensor of its own."""
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    small(tied, tmp_path / "still", "int4")
    kept = open_checkpoint(tmp_path / "still")
    assert kept.spec.tied
    assert "lm_head.weight" not in load_file(tmp_path / "still" / "model.safetensors")
    for fmt in ("int8_row", "int4_g64_asym", "fp8", "nvfp4", "mxfp4"):
        out = tmp_path / fmt
        small(tied, out, f"rules: [{{match: lm_head, weight: {fmt}}}]")
        written = open_checkpoint(out)
        assert not written.spec.tied
        assert written.quant.keys() == {"lm_head"}
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(written.tensors["embed.weight"], kept.tensors["embed.weight"])
        assert written.tensors["lm_head.weight"].shape == (384, 128)
        assert torch.equal(decode(out)["lm_head.weight"], written.tensors["lm_head.weight"].dequantize())
