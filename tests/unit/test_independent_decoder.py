"""The decoder that judges our exports is judged itself: by the compressed-tensors library's files, and by hand."""

import json

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

from independent_decoder import decode

P = "model.layers.0.mlp.gate_proj"
W = torch.randn(512, 256, generator=torch.Generator().manual_seed(3))

# layout, arguments, published relative error on a Gaussian matrix
LAYOUTS = {
    "int8 channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, 0.0075),
    "int8 group": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}, 0.0060),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, 0.0075),
    "int8 naive": ("naive-quantized", {"num_bits": 8, "strategy": "channel"}, 0.0075),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, 0.0266),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, 0.0265),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        0.0265,
    ),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, 0.1115),
    "int4 asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
        0.1011,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
        0.0952,
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        0.1118,
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        0.0265,
    ),
}


def by_the_library(layout, args):
    """The tensors that the library stores for W, and the weight it reads back."""
    rows, cols = {"tensor": W.shape, "channel": (1, 256), "block": (128, 128)}.get(
        args.strategy, (1, args.group_size or 256)
    )
    blocks = W.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
    globe = generate_gparam(W.amin(), W.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, global_scale=globe)
    scale = scale.reshape(1) if args.strategy == "tensor" else scale
    state = {"weight": W, "weight_scale": scale.float(), "weight_zero_point": zero.to(torch.int8)}
    if globe is not None:
        state["weight_global_scale"] = globe
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def write(folder, tensors, quantization, **other):
    folder.mkdir(exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    for name, content in other.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_what_the_compressed_tensors_library_writes(name, tmp_path):
    layout, settings, published = LAYOUTS[name]
    args = QuantizationArgs(**settings)
    stored, read_back = by_the_library(layout, args)
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
        "ignore": ["lm_head", "re:.*embed.*"],
    }
    dense = {"lm_head.weight": torch.ones(4, 4, dtype=torch.bfloat16), f"{P}.bias": torch.ones(512)}
    write(tmp_path, {f"{P}.{k}": v for k, v in stored.items()} | dense, config)
    found = decode(tmp_path)
    assert found.keys() == {f"{P}.weight", f"{P}.bias", "lm_head.weight"}
    assert all(t.dtype == torch.float32 for t in found.values())
    mine = found[f"{P}.weight"]
    # the library reads the 4-bit floats back in bfloat16
    assert torch.allclose(mine, read_back.float(), rtol=1e-6 if read_back.dtype == torch.float32 else 2**-7, atol=1e-9)
    assert (mine - W).norm() / W.norm() == pytest.approx(published, rel=0.1)


def modelopt(folder, algo, parts, **words):
    quantization = {"quant_algo": algo, "exclude_modules": ["lm_head", "model.embed*"], **words}
    config = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]}
    tensors = {f"{P}.{k}": v for k, v in parts.items()} | {"lm_head.weight": torch.ones(2, 2)}
    written = {"producer": {"name": "modelopt"}, "quantization": quantization}
    return decode(write(folder, tensors, config, hf_quant_config=written))[f"{P}.weight"]


def test_reads_model_optimizers_layouts_written_by_hand(tmp_path):
    fp8 = torch.tensor([[1.0, -448.0], [0.5, 2.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.5)
    assert modelopt(tmp_path, "FP8", {"weight": fp8, "weight_scale": scale, "input_scale": scale}).tolist() == [
        [0.5, -224.0],
        [0.25, 1.0],
    ]
    rows = torch.tensor([1.0, 10.0])
    parts = {"weight": fp8, "weight_scale": rows}
    assert modelopt(tmp_path, "FP8_PER_CHANNEL_PER_TOKEN", parts).tolist() == [[1, -448], [5, 20]]
    int8 = torch.tensor([[-128, 127], [1, -1]], dtype=torch.int8)
    assert modelopt(tmp_path, "W8A16", {"weight": int8, "weight_scale": rows}).tolist() == [[-128, 127], [10, -10]]


def test_reads_model_optimizers_int4_which_is_packed_along_the_rows(tmp_path):
    packed = torch.full((1, 128), 0x7F, dtype=torch.uint8)  # row 0: 0xF is -1; row 1: 7
    parts = {"weight": packed, "weight_scale": torch.tensor([[2.0], [3.0]])}
    value = modelopt(tmp_path, "W4A16_AWQ", parts, group_size=128)
    assert (value[0] == -2).all()
    assert (value[1] == 21).all()
    parts["pre_quant_scale"] = torch.arange(128).bfloat16()
    value = modelopt(tmp_path, "W4A16_AWQ", parts, group_size=128)
    assert torch.equal(value[1], 21 * torch.arange(128.0))


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4"])
def test_reads_model_optimizers_nvfp4(tmp_path, algo):
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)  # codes 0, 1, ... 15
    parts = {
        "weight": packed,
        "weight_scale": torch.tensor([[4.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
    }
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert modelopt(tmp_path, algo, parts, group_size=16)[0].tolist() == [2 * v for v in numbers] + [
        -2 * v for v in numbers
    ]


def test_goes_through_the_index_and_minds_what_it_says(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b.weight": torch.zeros(2).half()}, tmp_path / "model-2.safetensors")
    places = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert {n: t.tolist() for n, t in decode(tmp_path).items()} == {"a.weight": [1, 1], "b.weight": [0, 0]}
    index.write_text(json.dumps({"weight_map": places | {"c.weight": "model-2.safetensors"}}))
    with pytest.raises(AssertionError, match="disagree about"):
        decode(tmp_path)
