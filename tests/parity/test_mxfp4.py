"""gpt-oss with its experts in MXFP4, as transformers decodes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fewbit import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.measure import facts
from fewbit.model import load
from fewbit.numerics.qtensor import QTensor
from helpers import dense_logits, edit_json, ids, make_model

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny gpt-oss in `packed`, and in `dense` what transformers makes of it."""
    root = tmp_path_factory.mktemp("gpt_oss")
    dense = make_model(root / "dense", "gpt_oss", dtype=torch.float32)
    packed = Path(shutil.copytree(dense, root / "packed"))
    tensors, found, random = load_file(dense / "model.safetensors"), {}, torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random).to(torch.uint8)
        scales = torch.randint(119, 125, (experts, rows, columns // 32), generator=random).to(torch.uint8)
        found[f"{name}_blocks"], found[f"{name}_scales"] = blocks, scales
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, dense / "model.safetensors")
    save_file(found, packed / "model.safetensors")
    edit_json(packed / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return root


def test_experts_are_what_transformers_decodes_them_to(made):
    ours, dense = open_checkpoint(made / "packed"), open_checkpoint(made / "dense")
    assert set(ours.tensors) == set(dense.tensors)
    assert len(ours.quant) == 2 * 4 * 3
    for name, tensor in dense.tensors.items():
        mine = ours.tensors[name]
        assert isinstance(mine, QTensor) == (".experts." in name and name.endswith("weight"))
        assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, tensor), name
    window = [ids(24)]
    expected = dense_logits(load(dense, backend="reference"), window)
    assert torch.equal(dense_logits(load(ours, backend="reference"), window), expected)
    found = facts.inspect(ours)
    assert found.format == "mxfp4"
    assert any(numerics == "mxfp4 weights" for _, numerics in found.groups)
    assert found.bits_per_weight == 4.25


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "packed", tmp_path / "model"))


UP = f"{EXPERTS}.gate_up_proj"
BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {
    "no scales": (lambda t: t.pop(f"{UP}_scales"), f"'{EXPERTS}.0.gate_proj.weight_scale' [256, 4] is missing"),
    "no blocks": (lambda t: t.pop(f"{UP}_blocks"), f"'{UP}' [4, 128, 512] is missing"),
    "no bias": (lambda t: t.pop(f"{UP}_bias"), f"'{EXPERTS}.0.gate_proj.bias' [256] is missing"),
    "odd blocks": (
        lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][..., :15].clone()}),
        f"'{UP}_blocks' is torch.uint8 [4, 512, 4, 15], which no MXFP4 expert has",
    ),
    "an odd row": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, :511].clone()}),
        f"'{UP}_scales' is torch.uint8 [4, 511, 4], which no MXFP4 expert has",
    ),
    "floats": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}),
        f"'{UP}_scales' is torch.float32 [4, 512, 4], which no MXFP4 expert has",
    ),
    "an expert less": (
        lambda t: t.update({f"{UP}_{p}": t[f"{UP}_{p}"][:3].clone() for p in ("blocks", "scales", "bias")}),
        f"{EXPERTS}",
    ),
    "nothing": (
        lambda t: [t.pop(n) for n in list(t) if n.endswith(("_blocks", "_scales"))],
        "config.json calls the model mxfp4, and no expert is stored so",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_mxfp4_is_one_clear_line(model, case):
    edit, message = BROKEN[case]
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(FewbitError) as e:
        open_checkpoint(model)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
