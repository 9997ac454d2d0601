"""compressed-tensors as others write it, where no golden file says it: act-order, bitmasks, patterns, older configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import export, open_checkpoint
from fewbit.checkpoint.layout import inverse
from fewbit.compress import compress, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.model import load
from fewbit.numerics.qtensor import QTensor
from helpers import dense_logits, edit_json, ids, make_model, same_tensors


def change(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def configure(path: Path, edit) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def made(tmp_path: Path, rules: str, **model) -> Path:
    source = open_checkpoint(make_model(tmp_path / "source", **model))
    recipe = parse_recipe("own", f"rules: [{rules}]\ncalib: {{samples: 1, length: 16}}")
    compress(source, plan(source, recipe, "compressed-tensors"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def int4(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("int4"), '{match: "layers.*", weight: int4_g32}')


# --- act-order --------------------------------------------------------------------------------------------------------


def test_act_order_takes_each_column_s_scale_by_its_table(int4, tmp_path):
    path = Path(shutil.copytree(int4, tmp_path / "model"))
    orders = {}

    def shuffle(tensors):
        for seed, name in enumerate([n for n in tensors if n.endswith("weight_packed")]):
            module, columns = name.removesuffix(".weight_packed"), tensors[name].shape[1] * 8
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) // 32
            tensors[f"{module}.weight_g_idx"] = orders[module] = order.int()

    change(path, shuffle)
    configure(path, lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"))
    checkpoint, plain = open_checkpoint(path), open_checkpoint(int4)
    assert {str(q) for q in checkpoint.quant.values()} == {"int4_g32_act_order weights"}
    for name, module in (("layers.0.attn.k", "self_attn.k_proj"), ("layers.1.mlp.down", "mlp.down_proj")):
        q = checkpoint.tensors[f"{name}.weight"]
        before = plain.tensors[f"{name}.weight"]
        assert isinstance(q, QTensor)
        order = orders[f"model.layers.{name.split('.')[1]}.{module}"]
        value = ((before.codes ^ 8).double() - 8) * before.scale.double()[:, order]
        assert torch.equal(q.dequantize().double(), value)
    window = [ids(12)]
    assert not torch.equal(dense_logits(load(checkpoint), window), dense_logits(load(plain), window))
    with pytest.raises(UnsupportedError, match="no longer reads the table of groups that act-order needs"):
        export(checkpoint, "compressed-tensors", tmp_path / "out")


def test_a_table_that_names_a_group_too_many(int4, tmp_path):
    path = Path(shutil.copytree(int4, tmp_path / "model"))

    def add(tensors):
        for name in [n for n in tensors if n.endswith("weight_packed")]:
            columns = tensors[name].shape[1] * 8
            tensors[name.replace("packed", "g_idx")] = torch.arange(columns, dtype=torch.int32) // 32 + 1

    change(path, add)
    checkpoint = open_checkpoint(path)
    with pytest.raises(FewbitError, match=r"q_proj: weight_g_idx names groups 1 to 4, there are 4"):
        checkpoint.tensors["layers.0.attn.q.weight"]


# --- 2:4 and other bitmasks -------------------------------------------------------------------------------------------


def masked(dense: torch.Tensor, flat: bool) -> dict[str, torch.Tensor]:
    """The layout from its description, a row and a bit at a time."""
    rows, columns = dense.shape
    values, masks, offsets = [], [], [0]
    whole = dense.float()
    for row in range(rows):
        kept = whole[row] != 0
        values.append(dense[row][kept])
        bits = [int(b) for b in kept] + [0] * (-columns % 8)
        masks.append(
            [sum(bit << i for i, bit in enumerate(bits[start : start + 8])) for start in range(0, len(bits), 8)]
        )
        offsets.append(offsets[-1] + int(kept.sum()))
    joined = torch.cat([v.view(torch.uint8) for v in values]).view(dense.dtype)
    parts = {
        "shape": torch.tensor([[rows], [columns]]),
        "compressed": joined if flat else joined.view(rows, -1),
        "bitmask": torch.tensor(masks, dtype=torch.uint8),
    }
    return parts | {"row_offsets": torch.tensor(offsets[:-1])} if flat else parts


def prune(dense: torch.Tensor, flat: bool, seed: int) -> torch.Tensor:
    """Two of four elements (or about a third of all) become zero, and no others are."""
    random = torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed))
    keep = random < 0.33 if flat else random.unflatten(-1, (-1, 4)).argsort(-1).argsort(-1).flatten(-2) < 2
    codes = dense.view(torch.uint8 if dense.itemsize == 1 else torch.int16)
    return torch.where(keep, torch.where(codes << 1 == 0, codes + 1, codes), 0).view(dense.dtype)


@pytest.mark.parametrize("storage", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("kind", ["dense", "fp8_row"])
def test_sparse_weights_are_read_as_dense_ones(storage, kind, tmp_path):
    flat = storage == "sparse-bitmask"
    if kind == "fp8_row":
        path = made(tmp_path, '{match: "layers.*", weight: fp8_row, input: fp8_row}')
    else:
        path = make_model(tmp_path / "dense")
        edit_json(path / "config.json", quantization_config={"quant_method": "compressed-tensors", "format": "dense"})
    plain, stored = Path(shutil.copytree(path, tmp_path / "plain")), Path(shutil.copytree(path, tmp_path / "stored"))

    def prune_all(tensors):
        for seed, name in enumerate([n for n in tensors if n.endswith("_proj.weight")]):
            tensors[name] = prune(tensors[name], flat, seed)

    def mask_all(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            module = name.removesuffix(".weight")
            tensors.update({f"{module}.{part}": t for part, t in masked(tensors.pop(name), flat).items()})

    change(plain, prune_all)
    change(stored, prune_all)
    change(stored, mask_all)
    configure(stored, lambda q: q.update(sparsity_config={"format": storage, "sparsity_structure": "2:4"}))
    a, b = open_checkpoint(plain), open_checkpoint(stored)
    assert a.quant == b.quant
    same_tensors(a, b)
    assert (stored / "model.safetensors").stat().st_size < (plain / "model.safetensors").stat().st_size
    export(b, "hf", tmp_path / "out")
    same_tensors(a, open_checkpoint(tmp_path / "out"))

    change(stored, lambda tensors: tensors["model.layers.1.mlp.up_proj.bitmask"][3].fill_(255))
    with pytest.raises(FewbitError, match=r"up_proj.bitmask' marks \d+ elements, .*up_proj.compressed' holds \d+"):
        open_checkpoint(stored).tensors["layers.1.mlp.up.weight"]
    change(stored, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.shape"))
    with pytest.raises(FewbitError, match=r"'model.layers.0.mlp.up_proj.shape' is missing, though there is"):
        open_checkpoint(stored)


# --- configs of others ------------------------------------------------------------------------------------------------

FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


def kinds(path: Path) -> dict[str, str]:
    """The kind of every linear of the first layer."""
    found = open_checkpoint(path).quant
    return {name.removeprefix("layers.0."): str(q.weight) for name, q in found.items() if name.startswith("layers.0.")}


def test_the_nearest_target_wins_and_joined_names_are_known(tmp_path):
    """A full name before a pattern before a class, whatever their order; q, k, v by the name that vLLM gives them."""
    path = made(tmp_path, '{match: "layers.*.attn.[qkv]", weight: fp8_row}, {match: "layers.*.mlp.*", weight: fp8_row}')
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {**INT8, "num_bits": 4}, "format": "int-quantized"},
        "group_1": {"targets": ["re:.*mlp.*", "model.layers.0.self_attn.qkv_proj"], "weights": FP8},
        "group_2": {"targets": ["re:.*1.self_attn.qkv_proj$"], "weights": FP8},
    }
    ignore = ["re:.*o_proj", "lm_head"]
    configure(path, lambda q: q.update(config_groups=groups, format="float-quantized", ignore=ignore))
    fp8 = dict.fromkeys(("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "mlp.down"), "fp8_row")
    assert kinds(path) == fp8
    configure(path, lambda q: q.update(ignore=["lm_head", "re:.*self_attn"]))
    with pytest.raises(FewbitError, match=r"self_attn\.[qkv]_proj.weight' is torch.float8_e4m3fn, though the config"):
        open_checkpoint(path)


def test_a_config_without_nulls_and_one_with_the_format_only_on_top(int4, tmp_path):
    """Release 0.20 leaves out what is null; before 0.11 groups had no format of their own."""
    path = Path(shutil.copytree(int4, tmp_path / "model"))

    def strip(config):
        del config["config_groups"]["group_0"]["format"]
        for holder in (config, config["config_groups"]["group_0"], config["config_groups"]["group_0"]["weights"]):
            for key in [k for k, v in holder.items() if v is None]:
                del holder[key]

    configure(path, strip)
    assert open_checkpoint(path).quant == open_checkpoint(int4).quant
    same_tensors(open_checkpoint(path), open_checkpoint(int4))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"input_activations": {**INT8, "strategy": "tensor", "symmetric": False}}, "inputs with zero points are not"),
        ({"format": "marlin-24"}, "format 'marlin-24' of int4_g32 weights is not read; known: int-quantized"),
        ({"format": "int-quantized"}, r"weight' \[128, 128\] is missing"),
        ({"weights": {"num_bits": 9, "type": "int", "strategy": "channel"}}, "compressed-tensors arguments"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}, "compressed-tensors arguments"),
    ],
)
def test_what_cannot_be_read_is_one_line(edit, sentence, int4, tmp_path):
    path = Path(shutil.copytree(int4, tmp_path / "model"))
    configure(path, lambda q: q["config_groups"]["group_0"].update(edit))
    with pytest.raises(FewbitError, match=sentence) as e:
        open_checkpoint(path)
    assert "\n" not in str(e.value)


def test_codes_that_do_not_fit_their_bits(tmp_path):
    path = made(tmp_path, '{match: "layers.*", weight: int8_row, input: int8_row}')
    configure(path, lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4))
    with pytest.raises(FewbitError, match=r"q_proj: holds codes from -?\d+ to \d+, more than 4 bits can say"):
        open_checkpoint(path).tensors["layers.0.attn.q.weight"]


def test_a_divisor_comes_back_to_the_bit():
    """Not every float32 is the reciprocal of a float32."""
    random = torch.Generator().manual_seed(0)
    for value in (torch.rand(500, generator=random) * 10000 + 0.01).tolist():
        stored = torch.tensor(value)
        ours = inverse(stored)
        assert torch.equal(ours.double().reciprocal().float(), stored)
        assert abs(ours.double() * stored.double() - 1) < 1e-7
    assert inverse(torch.tensor(1024.0)).dtype == torch.float32
