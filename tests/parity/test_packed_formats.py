"""What other tools packed, read by us: AutoAWQ's and GPTQ's layouts, held to a packer that knows nothing of fewbit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import packers
from fewbit import open_checkpoint
from fewbit.checkpoint.conversion import export
from fewbit.checkpoint.names import Names
from fewbit.compress import compress, plan, read_recipe
from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.measure import facts
from fewbit.model import load
from fewbit.numerics.qtensor import QTensor
from helpers import dense_logits, edit_json, ids, make_model

Pack = Callable[[packers.Whole], dict]


def pack_model(root: Path, draw: Callable[[int, int, int], packers.Whole], pack: Pack, config: dict) -> Path:
    """A tiny Llama whose linears are packed in `root/packed`, and the same numbers dense in `root/dense`."""
    dense = make_model(root / "dense", dtype=torch.float32, attention_bias=True)
    tensors = load_file(dense / "model.safetensors")
    packed = make_model(root / "packed", dtype=torch.float32, attention_bias=True)
    found = {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith("_proj.weight"):
            whole = draw(*tensor.shape, seed)
            tensors[name] = torch.from_numpy(whole.dense)
            found |= {name.replace("weight", part): torch.from_numpy(a) for part, a in pack(whole).items()}
        else:
            found[name] = tensor
    save_file(tensors, dense / "model.safetensors")
    save_file(found, packed / "model.safetensors")
    edit_json(packed / "config.json", quantization_config=config)
    return packed


def same_as_dense(packed: Path) -> None:
    """Every weight is bit for bit what the packer says, and so are the logits."""
    ours, dense = open_checkpoint(packed), open_checkpoint(packed.parent / "dense")
    assert set(ours.quant) == {linear.name for linear in ours.spec.linears()} - {"lm_head"}
    for name, tensor in dense.tensors.items():
        mine = ours.tensors[name]
        assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, tensor), name
    window = [ids(24)]
    assert torch.equal(
        dense_logits(load(ours, backend="reference"), window), dense_logits(load(dense, backend="reference"), window)
    )


def gptq_config(bits=4, group=32, sym=False, order=False, v2=False, **more) -> dict:
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": order, **form, **more}


def gptq_model(root: Path, bits=4, group=32, sym=False, order=False, v2=False, **more) -> Path:
    return pack_model(
        root,
        lambda out, columns, seed: packers.draw(out, columns, bits, group, sym, order, seed),
        lambda w: packers.gptq(w, v2),
        gptq_config(bits, group, sym, order, v2, **more),
    )


def awq_model(root: Path, group=32, **more) -> Path:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **more}
    return pack_model(
        root, lambda out, columns, seed: packers.draw(out, columns, 4, group, False, False, seed), packers.awq, config
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group", "sym", "order", "v2"),
    [(32, False, False, False), (64, True, True, False), (-1, False, False, True), (32, False, True, True)],
    ids=["v1", "v1 sym act-order", "v2 whole columns", "v2 act-order"],
)
def test_gptq(tmp_path, bits, group, sym, order, v2):
    packed = gptq_model(tmp_path, bits, group, sym, order, v2)
    same_as_dense(packed)
    found = facts.inspect(open_checkpoint(packed))
    assert found.format == "gptq"
    name = f"int{bits}_" + ("row" if group == -1 else f"g{group}") + "_asym" * (not sym) + "_act_order" * order
    assert [numerics for _, numerics in found.groups] == [f"{name} weights", "as it was"]


@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq(tmp_path, group):
    packed = awq_model(tmp_path, group)
    same_as_dense(packed)
    found = facts.inspect(open_checkpoint(packed))
    assert found.format == "awq"
    assert found.groups[0][1] == ("int4_row_asym weights" if group == -1 else f"int4_g{group}_asym weights")


def test_configs_of_older_files(tmp_path):
    """AutoGPTQ and AutoAWQ wrote a file of their own, in words of their own."""
    packed = gptq_model(tmp_path / "gptq")
    edit_json(packed / "config.json", quantization_config=None)
    text = {k: v for k, v in gptq_config().items() if k != "quant_method"}
    (packed / "quantize_config.json").write_text(json.dumps(text))
    same_as_dense(packed)
    edit_json(packed / "config.json", quantization_config=gptq_config())
    (packed / "quantize_config.json").write_text(json.dumps(text | {"group_size": 64}))
    with pytest.raises(CheckpointError, match=r"quantize_config.json says group_size 64 and config.json 32"):
        open_checkpoint(packed)
    packed = awq_model(tmp_path / "awq")
    edit_json(packed / "config.json", quantization_config=None)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (packed / "quant_config.json").write_text(json.dumps(old))
    same_as_dense(packed)


def change(packed: Path, edit: Callable[[dict], None]) -> None:
    tensors = load_file(packed / "model.safetensors")
    edit(tensors)
    save_file(tensors, packed / "model.safetensors")


def test_a_bias_of_zeros_that_older_files_carry(tmp_path):
    packed = gptq_model(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    change(packed, lambda t: t.update({f"{name}.bias": torch.zeros(256, dtype=torch.float16)}))
    same_as_dense(packed)
    change(packed, lambda t: t[f"{name}.bias"].add_(1))
    with pytest.raises(CheckpointError, match=f"{name}: has a bias that is not zero"):
        open_checkpoint(packed).tensors["layers.0.mlp.up.weight"]


def test_layers_left_dense_are_told_by_their_tensors(tmp_path):
    packed, down = gptq_model(tmp_path), "model.layers.1.mlp.down_proj"
    weight = load_file(packed.parent / "dense" / "model.safetensors")[f"{down}.weight"]

    def edit(tensors: dict) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{down}.{part}"]
        tensors[f"{down}.weight"] = weight

    change(packed, edit)
    opened = open_checkpoint(packed)
    assert "layers.1.mlp.down" not in opened.quant
    assert torch.equal(opened.tensors["layers.1.mlp.down.weight"], weight)


Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[dict, dict, Callable[[dict], object], str]] = {
    "missing g_idx": ({"order": True}, {}, lambda t: t.pop(f"{Q}.g_idx"), rf"'{Q}.g_idx' \[128\] is missing"),
    "missing zeros": ({}, {}, lambda t: t.pop(f"{Q}.qzeros"), rf"'{Q}.qzeros' \[4, 16\] is missing"),
    "missing weight": ({}, {}, lambda t: t.pop(f"{Q}.qweight"), rf"'{Q}.qweight' \[16, 128\] is missing"),
    "wrong shape": (
        {},
        {},
        lambda t: t.update({f"{Q}.scales": torch.ones(3, 128).half()}),
        r"scales' has shape \[3, 128\], expected \[4, 128\]",
    ),
    "wrong dtype": (
        {},
        {},
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}),
        "qweight' is torch.int64, expected torch.int32",
    ),
    "group of 100": ({}, {"group_size": 100}, lambda t: None, "128 columns do not divide into groups of 100"),
    "group of 0": ({}, {"group_size": 0}, lambda t: None, "group_size is 0, expected a number of columns, or -1"),
    "unknown bits": ({}, {"bits": 5}, lambda t: None, "5 bits are not supported; known: 2, 3, 4, 8"),
    "bits as text": ({}, {"bits": [4]}, lambda t: None, "GPTQ: .4. bits are not supported"),
    "a word for a flag": ({}, {"desc_act": "false"}, lambda t: None, "desc_act is 'false', expected true or false"),
    "another layout": ({}, {"checkpoint_format": "marlin"}, lambda t: None, "'marlin' is not supported; known: gptq"),
    "rules": ({}, {"dynamic": {"+:x": {"bits": 8}}}, lambda t: None, "rules for some layers .* are not supported"),
    "other bits": ({}, {"bits": 8}, lambda t: None, r"qweight' has shape \[16, 128\], expected \[32, 128\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_gptq_is_one_clear_line(tmp_path, case):
    made, config, edit, message = BROKEN[case]
    packed = gptq_model(tmp_path, **made)
    change(packed, edit)
    raw = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_json(packed / "config.json", quantization_config=raw | config)
    with pytest.raises(FewbitError, match=message) as e:
        open_checkpoint(packed)
    assert "\n" not in str(e.value)


def test_gptq_that_contradicts_itself_is_found_when_a_weight_is_read(tmp_path):
    packed = gptq_model(tmp_path)
    before = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_json(packed / "config.json", quantization_config=before | {"sym": True})
    with pytest.raises(CheckpointError, match=f"{Q}: its config says 'sym': true, but qzeros"):
        open_checkpoint(packed).tensors["layers.0.attn.q.weight"]
    edit_json(packed / "config.json", quantization_config=before)
    change(packed, lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0)))
    with pytest.raises(CheckpointError, match=f"{Q}: g_idx orders the columns, though 'desc_act' is false"):
        open_checkpoint(packed).tensors["layers.0.attn.q.weight"]
    edit_json(packed / "config.json", quantization_config=before | {"desc_act": True})
    change(packed, lambda t: t[f"{Q}.g_idx"].fill_(7))
    with pytest.raises(CheckpointError, match=f"{Q}: g_idx names group 7, expected 0 to 3"):
        open_checkpoint(packed).tensors["layers.0.attn.q.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 3}, "AWQ: 3 bits, version 'gemm', zero_point True are not supported; known: 4 bits"),
        ({"version": "gemv"}, "version 'gemv'"),
        ({"zero_point": False}, "zero_point False"),
        ({"group_size": 100}, "does not divide into words of 8 outputs and groups of 100 columns"),
        ({"group_size": "32"}, "group_size is '32', expected a number"),
        ({"group_size": 64}, r"qzeros' has shape \[4, 16\], expected \[2, 16\]"),
    ],
)
def test_broken_awq_is_one_clear_line(tmp_path, config, message):
    packed = awq_model(tmp_path)
    raw = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_json(packed / "config.json", quantization_config=raw | config)
    with pytest.raises(FewbitError, match=message) as e:
        open_checkpoint(packed)
    assert "\n" not in str(e.value)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), attention_bias=True)


WRITTEN = [
    ("gptq", "int4", 4),
    ("gptq", "int4_awq_asym", 4),
    ("gptq", "int8_wo", 8),
    ("awq", "int4_awq_asym", 4),
    ("awq", "int4", 4),
]


@pytest.mark.parametrize(("to", "recipe", "bits"), WRITTEN)
def test_written_as_the_packer_would(to, recipe, bits, source, tmp_path):
    """Compressed, read back code for code, and the tensors of the file are the packer's."""
    kind = read_recipe(recipe)
    kind = replace(kind, calibration=replace(kind.calibration, samples=3, length=48))
    report = compress(open_checkpoint(source), plan(open_checkpoint(source), kind, to), tmp_path / "out")
    assert report.verified is not None
    written = open_checkpoint(tmp_path / "out")
    assert written.format == to
    tensors, names = load_file(tmp_path / "out" / "model.safetensors"), Names(written.family, written.spec)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name in written.quant:
        q = written.tensors[f"{name}.weight"]
        half, columns = 1 << (bits - 1), q.shape[1]
        zero = torch.zeros_like(q.scale, dtype=torch.int8) if q.zero is None else q.zero
        group = columns // q.scale.shape[1]
        whole = packers.Whole(
            bits,
            ((q.codes ^ half).int()).numpy(),
            (zero.int() + half).numpy(),
            q.scale.float().numpy(),
            torch.arange(columns).numpy() // group,
        )
        expected = packers.awq(whole) if to == "awq" else packers.gptq(whole, config["checkpoint_format"] != "gptq")
        for part, array in expected.items():
            found = tensors[f"{names.module(name)}.{part}"]
            assert torch.equal(found.float() if part == "scales" else found, torch.from_numpy(array)), (name, part)
    if to == "gptq":
        assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
        assert config["checkpoint_format"] == ("gptq_v2" if "asym" in recipe else "gptq")
        assert (config["sym"], config["desc_act"], config["bits"]) == ("asym" not in recipe, False, bits)
        if "asym" not in recipe:  # the word every engine knows symmetric weights by
            assert (tensors[f"{Q}.qzeros"] == (0x77777777 if bits == 4 else 0x7F7F7F7F)).all()


@pytest.mark.parametrize(
    ("to", "recipe", "message"),
    [
        ("gptq", "fp8", "GPTQ's layout has no word for"),
        ("awq", "int8_wo", "AutoAWQ's layout has no word for"),
        ("gptq", "w4a8", "GPTQ's layout has no word for"),
        ("awq", "nvfp4", "AutoAWQ's layout has no word for"),
    ],
)
def test_what_they_cannot_say_is_refused_before_any_weight_is_read(to, recipe, message, source):
    with pytest.raises(UnsupportedError, match=message):
        plan(open_checkpoint(source), read_recipe(recipe), to)
    with pytest.raises(UnsupportedError, match="no place for scales of K and V"):
        plan(open_checkpoint(source), read_recipe("int4").with_kv("fp8"), to)


def test_symmetric_weights_go_from_gptq_to_awq_and_the_other_way_with_zeros(tmp_path):
    """Codes and scales carried over; the same numbers as the dense model has."""
    packed = gptq_model(tmp_path / "one", sym=True)
    export(open_checkpoint(packed), "awq", tmp_path / "one" / "awq")
    same_as_dense(tmp_path / "one" / "awq")
    packed = awq_model(tmp_path / "two")
    export(open_checkpoint(packed), "gptq", tmp_path / "two" / "gptq")
    same_as_dense(tmp_path / "two" / "gptq")
    assert open_checkpoint(tmp_path / "two" / "gptq").format == "gptq"


def test_act_order_is_carried_over(tmp_path):
    packed = gptq_model(tmp_path, sym=True, order=True)
    export(open_checkpoint(packed), "gptq", tmp_path / "again")
    same_as_dense(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_linears_that_lie_in_one_module(to, tmp_path):
    """Phi-3 has q, k and v in one, gate and up in another: so have its packed files."""
    source = make_model(tmp_path / "phi3", "phi3")
    kind = read_recipe("int4_awq_asym")
    kind = replace(kind, techniques=(), calibration=replace(kind.calibration, samples=3, length=48))
    compress(open_checkpoint(source), plan(open_checkpoint(source), kind, to), tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.layers.0.self_attn.qkv_proj.qweight" in names
    other = open_checkpoint(compressed(source, kind, tmp_path / "other"))
    for name, tensor in other.tensors.items():
        mine = written.tensors[name]
        assert torch.equal(*(t.dequantize() if isinstance(t, QTensor) else t for t in (mine, tensor))), name


def compressed(source: Path, kind, target: Path) -> Path:
    compress(open_checkpoint(source), plan(open_checkpoint(source), kind, "compressed-tensors"), target)
    return target
