"""Fine-grained FP8 and bitsandbytes: what the libraries themselves make of the same files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from fewbit import open_checkpoint
from fewbit.checkpoint.names import Names
from fewbit.errors import FewbitError
from fewbit.measure import facts
from fewbit.model import Loader, load
from fewbit.numerics.qtensor import QTensor
from helpers import dense_logits, edit_json, ids, make_model

BNB = Path(__file__).parent.parent / "golden" / "bitsandbytes"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def change(model: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def refused(model: Path) -> str:
    with pytest.raises(FewbitError) as e:
        open_checkpoint(model)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- fine-grained FP8 -------------------------------------------------------------------------------------------------


def fp8_model(root: Path, scale: torch.dtype = torch.float32, config: dict = BLOCKS, **overrides) -> Path:
    """Random codes and scales in `root/fp8`, the weights they stand for in `root/dense`."""
    dense = make_model(root / "dense", dtype=torch.float32, **overrides)
    path = Path(shutil.copytree(dense, root / "fp8"))
    tensors, packed = load_file(dense / "model.safetensors"), {}
    random = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        packed[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = tensor.shape
        codes = (torch.randn(rows, columns, generator=random) * 60).to(torch.float8_e4m3fn)
        grid = torch.exp2(torch.randint(-11, -8, (-(-rows // 128), -(-columns // 128)), generator=random).float())
        if scale == torch.float32:
            grid = grid * (1 + torch.rand(grid.shape, generator=random))
        weight = torch.empty(rows, columns)
        for r in range(0, rows, 128):
            for c in range(0, columns, 128):
                weight[r : r + 128, c : c + 128] = codes[r : r + 128, c : c + 128].float() * grid[r // 128, c // 128]
        packed[name], packed[f"{name}_scale_inv"] = codes, grid.to(scale)
        tensors[name] = weight
    save_file(tensors, dense / "model.safetensors")
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    edit_json(path / "config.json", quantization_config=config)
    return path


RAGGED = {"intermediate_size": 200, "hidden_size": 160, "head_dim": 40}


@pytest.mark.parametrize("scale", [torch.float32, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["whole blocks", "ragged edges"])
def test_fine_grained_fp8(tmp_path, sizes, scale):
    path = fp8_model(tmp_path, scale, **sizes)
    ours, dense = open_checkpoint(path), open_checkpoint(tmp_path / "dense")
    for name, tensor in dense.tensors.items():
        mine = ours.tensors[name]
        assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, tensor), name
    found = facts.inspect(ours)
    assert (found.format, found.groups[0][1]) == ("fp8", "fp8_block weights, fp8_g128 inputs (dynamic)")
    # weights alone: exactly the dense model
    alone = replace(ours, quant={name: replace(quant, input=None) for name, quant in ours.quant.items()})
    window = [ids(20)]
    expected = dense_logits(load(dense, backend="reference"), window)
    assert torch.equal(dense_logits(load(alone, backend="reference"), window), expected)
    rounded = dense_logits(load(ours, backend="reference"), window)
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["whole blocks", "ragged edges"])
def test_inputs_are_rounded_in_groups_of_128_by_their_own_largest(tmp_path, sizes):
    checkpoint = open_checkpoint(fp8_model(tmp_path, **sizes))
    (down,) = [x for x in checkpoint.spec.linears() if x.name == "layers.1.mlp.down"]
    x = torch.randn(5, down.in_features, generator=torch.Generator().manual_seed(1)) * 3
    weight = checkpoint.tensors["layers.1.mlp.down.weight"].dequantize().double()
    expected = torch.zeros(5, down.out_features, dtype=torch.float64)
    for start in range(0, down.in_features, 128):
        part = x[:, start : start + 128]
        scale = part.abs().amax(1, keepdim=True) / 448
        rounded = (part / scale).to(torch.float8_e4m3fn).double() * scale.double()
        expected += rounded @ weight[:, start : start + 128].t()
    ours = Loader(checkpoint, torch.device("cpu"), "reference").linear(down)(x)
    assert torch.allclose(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_transformers_decodes_fine_grained_fp8_to_the_same(tmp_path):
    """By the step of its loader; all of the loader wants the accelerate package."""
    path = fp8_model(tmp_path)
    checkpoint, tensors = open_checkpoint(path), load_file(path / "model.safetensors")
    names, step = Names(checkpoint.family, checkpoint.spec), Fp8Dequantize(None)
    for name in checkpoint.quant:
        weight = f"{names.module(name)}.weight"
        parts = {"weight$": [tensors[weight]], "weight_scale_inv": [tensors[f"{weight}_scale_inv"]]}
        (theirs,) = step.convert(parts).values()
        assert torch.equal(checkpoint.tensors[f"{name}.weight"].dequantize(), theirs.float())


def test_one_scale_for_the_tensor_and_a_calibrated_input(tmp_path):
    config = {**BLOCKS, "weight_block_size": None, "activation_scheme": "static"}
    path = fp8_model(tmp_path, config=config)
    assert "weight_scale_inv' has shape [1, 1], expected []" in refused(path)

    def one_scale(tensors: dict) -> None:
        for name in [n for n in tensors if n.endswith("scale_inv")]:
            tensors[name] = tensors[name][0, 0].clone()
            tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.04)

    change(path, one_scale)
    checkpoint = open_checkpoint(path)
    assert str(checkpoint.quant["layers.0.mlp.up"]) == "fp8 weights, fp8 inputs (static)"
    assert checkpoint.tensors["layers.0.mlp.up.input_scale"] == torch.tensor(0.04)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = tensors[name].float() * tensors[f"{name}_scale_inv"]
    assert torch.equal(checkpoint.tensors["layers.0.mlp.up.weight"].dequantize(), expected)
    edit_json(path / "config.json", quantization_config=config | {"activation_scheme": "dynamic"})
    assert "activation_scale' (and 13 more) in" in refused(path)


UP = "model.layers.0.mlp.up_proj.weight"
BROKEN_FP8 = {
    "no scale": ({}, lambda t: t.pop(f"{UP}_scale_inv"), rf"'{UP}_scale_inv' [2, 1] is missing"),
    "wrong grid": (
        {},
        lambda t: t.update({f"{UP}_scale_inv": torch.ones(1, 2)}),
        "scale_inv' has shape [1, 2], expected [2, 1]",
    ),
    "other blocks": ({"weight_block_size": [64, 128]}, None, "scale_inv' has shape [1, 1], expected [2, 1]"),
    "blocks of 0": ({"weight_block_size": [0, 128]}, None, "weight_block_size is [0, 128], expected rows and columns"),
    "a number": ({"weight_block_size": 128}, None, "weight_block_size is 128, expected rows and columns"),
    "e5m2": ({"fmt": "e5m2"}, None, "fmt 'e5m2' is not supported; known: e4m3"),
    "static": ({"activation_scheme": "static"}, None, "blocks with activation_scheme 'static' are not supported"),
    "nothing": (
        {},
        lambda t: t.update({n: x.float() for n, x in t.items() if x.dtype == torch.float8_e4m3fn}),
        "config.json calls the model fp8, and no linear is stored so",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FP8)
def test_broken_fp8_is_one_clear_line(tmp_path, case):
    config, edit, message = BROKEN_FP8[case]
    path = fp8_model(tmp_path, config=BLOCKS | config)
    if edit:
        change(path, edit)
    assert message in refused(path)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path) -> Path:
    return Path(shutil.copytree(BNB, tmp_path / "bitsandbytes"))


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_nf4_is_what_bitsandbytes_decodes_it_to(golden, kind):
    expected = json.loads((golden / "expected.json").read_text())
    checkpoint = open_checkpoint(golden / kind)
    names = Names(checkpoint.family, checkpoint.spec)
    hashes = {
        names.module(n): hashlib.sha256(checkpoint.tensors[f"{n}.weight"].dequantize().numpy().tobytes()).hexdigest()
        for n in checkpoint.quant
    }
    assert hashes == expected[kind]["sha256"]
    logits = dense_logits(load(checkpoint, backend="reference"), [expected["tokens"]])
    theirs = torch.tensor(expected[kind]["logits"])
    assert (logits - theirs).norm() < 1e-2 * theirs.norm()  # its product on a CPU is coarser than float32
    found = facts.inspect(checkpoint)
    assert (found.format, found.groups[0][1], found.quantized_linears) == ("bitsandbytes", "nf4_g64 weights", 7)


def test_int8_rows_of_bitsandbytes(golden):
    checkpoint, tensors = open_checkpoint(golden / "int8"), load_file(golden / "int8" / "model.safetensors")
    names = Names(checkpoint.family, checkpoint.spec)
    assert len(checkpoint.quant) == 7
    weights = {}
    for name in checkpoint.quant:
        module = names.module(name)
        expected = tensors[f"{module}.weight"].double() * tensors[f"{module}.SCB"].double()[:, None] / 127
        weights[f"{module}.weight"] = ours = checkpoint.tensors[f"{name}.weight"].dequantize()
        assert torch.allclose(ours.double(), expected, rtol=1e-6, atol=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(golden / "int8"))
    model.load_state_dict({n: t for n, t in tensors.items() if t.is_floating_point()} | weights, strict=False)
    with torch.no_grad():
        theirs = model(torch.tensor([list(range(9))])).logits[0]
    ours = dense_logits(load(checkpoint, backend="reference"), [list(range(9))])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


K = "model.layers.0.self_attn.k_proj.weight"
STATE = f"{K}.quant_state.bitsandbytes__nf4"
BROKEN_BNB = {
    "no absmax": ({}, lambda t: t.pop(f"{K}.absmax"), f"'{K}.absmax' [32] is missing"),
    "no state": ({}, lambda t: t.pop(STATE), f"'{STATE}' [0] is missing"),
    "no nested absmax": ({}, lambda t: t.pop(f"{K}.nested_absmax"), f"'{K}.nested_absmax' [1] is missing"),
    "half a weight": ({}, lambda t: t.update({K: t[K][::2].clone()}), "has shape [512, 1], expected [1024, 1]"),
    "odd blocks": (
        {},
        lambda t: t.update({f"{K}.absmax": torch.zeros(20, dtype=torch.uint8)}),
        "layers.0.attn.k: rows of 64 do not divide into blocks of 102",
    ),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, None, "fp4 in uint8 is not supported; known: nf4 in uint8, and INT8"),
    "another storage": ({"bnb_4bit_quant_storage": "bfloat16"}, None, "nf4 in bfloat16 is not supported"),
}


@pytest.mark.parametrize("case", BROKEN_BNB)
def test_broken_bitsandbytes_is_one_clear_line(golden, case):
    config, edit, message = BROKEN_BNB[case]
    path = golden / "nf4_double"
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_json(path / "config.json", quantization_config=raw | config)
    if edit:
        change(path, edit)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"blocksize": 64', b'"blocksize": 32', "says [32, 64] in blocks of 32 (and 256), the files [32, 64] in bl"),
        (b'"shape": [32, 64]', b'"shape": [64, 32]', "says [64, 32] in blocks of 64 (and 256)"),
        (b'{"', b'["', "its quant_state is not understood: JSONDecodeError"),
        (b'"nested_blocksize": 256', b'"nested_blocksize": 128', "(and 128)"),
    ],
)
def test_a_quant_state_that_says_something_else(golden, old, new, message):
    path = golden / "nf4_double"

    def edit(tensors: dict) -> None:
        text = bytes(tensors[STATE].tolist())
        assert old in text
        tensors[STATE] = torch.tensor(list(text.replace(old, new, 1)), dtype=torch.uint8)

    change(path, edit)
    with pytest.raises(FewbitError) as e:
        open_checkpoint(path).tensors["layers.0.attn.k.weight"]
    assert message in str(e.value)
    assert str(e.value).startswith("model.layers.0.self_attn.k_proj: ")


def test_another_codebook_is_refused(golden):
    change(golden / "nf4", lambda t: t[f"{K}.quant_map"].mul_(1.01))
    with pytest.raises(FewbitError, match="its quant_map is not that of NF4"):
        open_checkpoint(golden / "nf4").tensors["layers.0.attn.k.weight"]
