"""What engines load: facts with their sources, asked before any work and by the tests of what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from fewbit.checkpoint import open_checkpoint, plan_for
from fewbit.checkpoint.acceptance import ROWS, dialect_for, engines, loaders, nearest, rows_of, words
from fewbit.checkpoint.formats import formats
from fewbit.checkpoint.layout import Quantization
from fewbit.cli import run
from fewbit.compress import built_in, compress, dialect, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import UnsupportedError
from fewbit.model import KVCodec, load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from helpers import dense_logits, ids, make_model

FP8, ROW, NVFP4, INT8 = (FORMATS[name] for name in ("fp8", "fp8_row", "nvfp4", "int8_row"))
INT4, ASYM, BLOCK, MXFP4 = (FORMATS[name] for name in ("int4_g128", "int4_g128_asym", "fp8_block", "mxfp4"))
STATIC, TOKEN = QuantSpec(FP8, FP8, "static"), QuantSpec(ROW, ROW)
FOUR, SMOOTH = QuantSpec(NVFP4, NVFP4, "outer"), QuantSpec(INT8, FORMATS["int8"], "static")
FACTS = [  # the matrix of what was read in the loaders, one by one: engine, dialect, numerics, whether it loads
    ("vllm", "hf", STATIC, True),
    ("vllm", "hf", TOKEN, True),
    ("vllm", "hf", QuantSpec(BLOCK), True),
    ("vllm", "hf", FOUR, True),
    ("vllm", "hf", QuantSpec(NVFP4), True),
    ("vllm", "hf", replace(FOUR, prescale=True), False),
    ("vllm", "hf", QuantSpec(INT4), False),
    ("vllm", "hf", QuantSpec(INT8), False),
    ("vllm", "hf", SMOOTH, False),
    ("sglang", "hf", STATIC, True),
    ("sglang", "hf", TOKEN, False),
    ("sglang", "hf", QuantSpec(BLOCK), False),
    ("sglang", "hf", FOUR, True),
    ("sglang", "hf", QuantSpec(INT4), False),
    ("sglang", "hf", SMOOTH, False),
    ("tensorrt-llm", "hf", STATIC, True),
    ("tensorrt-llm", "hf", TOKEN, True),
    ("tensorrt-llm", "hf", FOUR, True),
    ("tensorrt-llm", "hf", QuantSpec(INT4), True),
    ("tensorrt-llm", "hf", QuantSpec(INT4, FP8, "static"), True),
    ("tensorrt-llm", "hf", QuantSpec(INT8), True),
    ("tensorrt-llm", "hf", SMOOTH, False),
    ("vllm", "compressed-tensors", STATIC, True),
    ("vllm", "compressed-tensors", TOKEN, True),
    ("vllm", "compressed-tensors", QuantSpec(INT8, INT8), True),
    ("vllm", "compressed-tensors", QuantSpec(INT4), True),
    ("vllm", "compressed-tensors", QuantSpec(ASYM), True),
    ("vllm", "compressed-tensors", QuantSpec(INT4, ROW), True),
    ("vllm", "compressed-tensors", FOUR, True),
    ("vllm", "compressed-tensors", QuantSpec(MXFP4), True),
    ("vllm", "compressed-tensors", replace(FOUR, lowrank=32), False),
    ("tensorrt-llm", "compressed-tensors", STATIC, False),
    ("tensorrt-llm", "compressed-tensors", TOKEN, True),
    ("tensorrt-llm", "compressed-tensors", QuantSpec(INT8, INT8), False),
    ("tensorrt-llm", "compressed-tensors", QuantSpec(INT4), False),
    ("tensorrt-llm", "compressed-tensors", QuantSpec(NVFP4), False),
    ("tensorrt-llm", "compressed-tensors", FOUR, True),
    ("tensorrt-llm", "compressed-tensors", QuantSpec(MXFP4), True),
    ("tensorrt-llm", "compressed-tensors", QuantSpec(MXFP4, MXFP4), False),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(("engine", "dialect", "quant", "loads"), FACTS)
def test_the_facts(engine, dialect, quant, loads):
    asked = Quantization({"layers.0.attn.q": quant}, {})
    reasons = {name: reason for name, _, reason in loaders(dialect, asked)}
    assert (reasons[engine] is None) == loads
    assert reasons["fewbit"] is None


def test_the_table_says_where_it_is_from():
    assert {row.dialect for row in ROWS} <= {*formats(), "*"}
    assert all(row.source and row.version for row in ROWS)
    assert engines() == ("vllm", "sglang", "tensorrt-llm", "transformers", "fewbit")
    kinds = {words(quant) for quant in (*(fact[2] for fact in FACTS), *(r.quant for n in built_in()
             for r in read_recipe(n).rules))}  # fmt: skip
    for row in ROWS:
        assert set(row.notes) <= set(row.loads)
        for pattern in row.loads:  # none that nothing could ever match
            weight = pattern.removesuffix(" prescaled").split("/")[0]
            assert pattern in kinds or weight in FORMATS or "*" in weight or "[" in weight, pattern


def test_k_and_v():
    cache = {0: KVSpec(FP8, FP8)}
    loaded = {n: r is None for n, _, r in loaders("compressed-tensors", Quantization({}, cache))}
    assert loaded == {"vllm": True, "sglang": False, "tensorrt-llm": False, "transformers": True, "fewbit": True}
    eight = {0: KVSpec(FORMATS["int8"], FORMATS["int8"])}
    assert [n for n, _, r in loaders("compressed-tensors", Quantization({}, eight)) if not r] == [
        "transformers",
        "fewbit",
    ]


def test_the_dialect_an_engine_loads(source):
    checkpoint = open_checkpoint(source)
    found = {(n, e): dialect(checkpoint, read_recipe(n), e) for n, e in (
        ("fp8", "vllm"), ("fp8", "sglang"), ("fp8", "tensorrt-llm"), ("int4_awq", "tensorrt-llm"),
        ("int4_awq", "transformers"), ("mxfp4_wo", "tensorrt-llm"), ("w4a8", "fewbit"))}  # fmt: skip
    assert list(found.values()) == [
        "compressed-tensors", "hf", "hf", "hf", "compressed-tensors", "compressed-tensors", "compressed-tensors"
    ]  # fmt: skip


def test_what_none_loads_is_refused_with_the_nearest_recipe(source):
    checkpoint = open_checkpoint(source)
    for recipe, engine, said in (
        ("int8_sq_static", "tensorrt-llm", "'int8_wo'"),
        ("int4_awq_asym", "tensorrt-llm", "'int4'"),
        ("mxfp4", "sglang", "'nvfp4'"),
        ("fp8_dynamic", "sglang", "'fp8'"),
    ):
        with pytest.raises(UnsupportedError) as error:
            dialect(checkpoint, read_recipe(recipe), engine)
        assert "as layers.0.attn.q is" in str(error.value)
        assert str(error.value).endswith(f"the nearest recipe that it does load is {said}")
    with pytest.raises(UnsupportedError, match=r"does not load K and V in int8$"):
        dialect(checkpoint, read_recipe("fp8").with_kv("int8"), "vllm")
    with pytest.raises(UnsupportedError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        dialect(checkpoint, read_recipe("fp8"), "vlm")
    mixed = parse_recipe("auto", "techniques: [{auto: {candidates: [int4, int8_wo], bits: 6}}]")
    assert dialect(checkpoint, mixed, "vllm") == "compressed-tensors"
    with pytest.raises(UnsupportedError, match="loads one kind of numerics in a model, not 2"):
        dialect(checkpoint, mixed, "transformers")


def test_the_nearest_is_of_those_that_load(source):
    spec = open_checkpoint(source).spec
    asked = Quantization({"layers.0.attn.q": SMOOTH}, {})
    assert nearest("sglang", spec, asked, {"a": FOUR, "b": STATIC, "c": SMOOTH}) == "b"
    assert nearest("sglang", spec, asked, {"c": SMOOTH}) is None
    with pytest.raises(UnsupportedError, match="does not load"):
        dialect_for("sglang", spec, asked)
    assert [row.dialect for row in rows_of("fewbit")] == ["compressed-tensors", "hf"]


def small(recipe: str):
    chosen = read_recipe(recipe)
    return replace(chosen, calibration=replace(chosen.calibration, samples=2, length=32))


def test_export_for_an_engine(source, tmp_path, capsys):
    checkpoint = open_checkpoint(source)
    compress(checkpoint, plan(checkpoint, small("fp8")), tmp_path / "fp8")
    compress(checkpoint, plan(checkpoint, small("int4_awq_asym")), tmp_path / "asym")
    assert run(["export", str(tmp_path / "fp8"), "--for", "sglang", "-o", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["equal"]) == ("hf", said["tensors"])
    written = open_checkpoint(tmp_path / "out")
    assert {n for n, _, r in loaders(written.format, Quantization(written.quant, written.kv)) if not r} == {
        "vllm", "sglang", "tensorrt-llm", "fewbit"
    }  # fmt: skip
    asym = open_checkpoint(tmp_path / "asym")
    with pytest.raises(UnsupportedError, match="with --requantize"):
        plan_for(asym, "tensorrt-llm")
    planned = plan_for(asym, "tensorrt-llm", requantize=True)
    assert (planned.to, len(planned.rounded)) == ("hf", 14)
    with pytest.raises(UnsupportedError, match="needs calibrated inputs: compress the original for it"):
        plan_for(asym, "sglang", requantize=True)
    assert plan_for(checkpoint, "vllm").quant == {}
    both = ["export", str(tmp_path / "fp8"), "-o", str(tmp_path / "two")]
    assert run(both) == run([*both, "--to", "hf", "--for", "vllm"]) == run([*both, "--for", "vllm", "--tp", "2"]) == 2
    assert "give --to FORMAT or --for ENGINE" in capsys.readouterr().err


def test_compress_for_an_engine_refuses_before_calibration(source, tmp_path, capsys, monkeypatch):
    from fewbit import compress as room

    few = ["--samples", "2", "--length", "32", "--sample-tokens", "0"]
    command = ["compress", str(source), "-o", str(tmp_path / "out"), *few]
    assert run([*command, "--recipe", "fp8", "--for", "tensorrt-llm", "-q"]) == 0
    assert open_checkpoint(tmp_path / "out").format == "hf"
    monkeypatch.setattr(room, "decide", None)
    monkeypatch.setattr(room, "compress", None)
    again = [*command, "--force", "--for"]
    assert run([*again, "sglang", "--recipe", "int4_awq"]) == 2
    assert "the nearest recipe that it does load is 'nvfp4'" in capsys.readouterr().err
    assert run([*again, "transformers", "--recipe", "auto"]) == 2
    assert run([*again, "vllm", "--recipe", "fp8", "--export", "hf"]) == 2
    assert "both name the format" in capsys.readouterr().err


def test_inspect_says_who_loads_a_directory(source, tmp_path, capsys):
    checkpoint = open_checkpoint(source)
    compress(checkpoint, plan(checkpoint, small("int4")), tmp_path / "int4")
    assert run(["inspect", str(tmp_path / "int4")]) == 0
    said = capsys.readouterr().out
    assert "vllm 0.26.0, transformers 5.17.0, fewbit" in said
    assert "not: sglang of mid-2026 was not seen to load 'compressed-tensors'" in said
    assert "tensorrt-llm of mid-2026 (compressed-tensors) does not load int4_g128, as layers.0.attn.q is" in said
    assert run(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["engines"]
    assert [reason for _, _, reason in found] == [None] * 5


def test_support(capsys):
    assert run(["support", "--markdown"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("## ")] == [
        "## recipes and file formats", "## recipes and engines", "## families and file formats"
    ]  # fmt: skip
    assert "| `int8_sq_static` | `compressed-tensors` | no | no |" in said
    assert run(["support", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tables"]) == 3


@pytest.mark.parametrize("kv", ["fp8", "int8_head"])
def test_transformers_rounds_k_and_v_as_we_do(kv, source, tmp_path):
    checkpoint = open_checkpoint(source)
    compress(checkpoint, plan(checkpoint, small("int4").with_kv(kv)), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([ids(24)])).logits[0]
    ours = dense_logits(load(open_checkpoint(tmp_path / "out")), [ids(24)])
    exact = load(open_checkpoint(tmp_path / "out"))
    exact.codecs = tuple(KVCodec(torch.float32) for _ in exact.codecs)
    assert (ours - theirs).norm() / theirs.norm() < 1e-3
    assert (dense_logits(exact, [ids(24)]) - theirs).norm() / theirs.norm() > 1e-3
