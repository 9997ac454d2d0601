"""Reads what fewbit exports the way a stranger would: from the descriptions of the two layouts, with none of its code.

`decode` turns a model directory into float32 weights under their Hugging Face names. It is slow, plain and strict: a
format, a dtype or a shape that it does not expect is an error, never a guess. It imports nothing of fewbit.

W [o, i] is a weight; o outputs, i inputs. A byte of two 4-bit codes holds the one with the even index in bits 0-3.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # sign << 3 | index
COMPANIONS = re.compile(
    r"\.(weight_(scale|scale_2|global_scale|zero_point|shape|g_idx)|input_(scale|zero_point|global_scale)"
    r"|pre_quant_scale|[qkv]_scale)$"
)


def decode(model_dir: str | Path) -> dict[str, Tensor]:
    """Every weight of the directory, dequantized, by the name it has in the unquantized model."""
    folder = Path(model_dir)
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    tensors = _read(folder)
    result = {}
    for name, tensor in tensors.items():
        if COMPANIONS.search(name):
            continue
        module, _, kind = name.rpartition(".")
        parts = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.rpartition(".")[0] == module}
        if kind not in ("weight", "weight_packed") or "weight_scale" not in parts:
            assert tensor.is_floating_point(), f"{name} is {tensor.dtype} and has no scale"
            result[name] = tensor.float()
            continue
        assert quantization, f"{name} has a scale, but config.json says nothing of quantization"
        if quantization["quant_method"] == "compressed-tensors":
            weight = _compressed_tensors(module, parts, quantization)
        else:
            assert quantization["quant_method"] == "modelopt", quantization["quant_method"]
            weight = _modelopt(module, parts, quantization, folder)
        assert weight.isfinite().all(), f"{name} holds NaN or infinity"
        result[module + ".weight"] = weight
    return result


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors; with an index every file it names, and each tensor from the file the index says."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", "pt") as file:
            places = dict.fromkeys(file.keys(), "model.safetensors")
    tensors = {}
    for shard in sorted(set(places.values())):
        with safe_open(folder / shard, "pt") as file:
            named = {n for n, s in places.items() if s == shard}
            assert set(file.keys()) == named, (
                f"{shard}: the index and the file disagree about {set(file.keys()) ^ named}"
            )
            tensors |= {n: file.get_tensor(n) for n in sorted(named)}
    return tensors


# -- compressed-tensors


def _compressed_tensors(module: str, parts: dict[str, Tensor], config: dict) -> Tensor:
    assert not any(_matches(pattern, module) for pattern in config.get("ignore") or []), (
        f"{module} is ignored, yet has a scale"
    )
    group = _group_of(module, config)
    layout, args = group.get("format") or config["format"], group["weights"]
    kind = (args["type"], args["num_bits"])
    scale = parts["weight_scale"]
    if layout == "nvfp4-pack-quantized":
        assert (scale.dtype, args["strategy"], args["group_size"]) == (torch.float8_e4m3fn, "tensor_group", 16)
        assert parts["weight_global_scale"].shape == (1,)
        return _e2m1(parts["weight_packed"]) * _by_group(scale.float() / parts["weight_global_scale"].float(), 16)
    if layout == "mxfp4-pack-quantized":
        assert args["group_size"] == 32
        return _e2m1(parts["weight_packed"]) * _by_group(_e8m0(scale), 32)
    if layout == "mxfp8-quantized":
        assert args["group_size"] == 32
        return _fp8(parts["weight"]) * _by_group(_e8m0(scale), 32)
    if layout == "pack-quantized":
        return _pack_quantized(parts, args)
    assert layout in ("int-quantized", "float-quantized", "naive-quantized"), layout
    weight = parts["weight"]
    assert weight.dtype == {"int": torch.int8, "float": torch.float8_e4m3fn}[kind[0]]
    zero = parts.get("weight_zero_point")
    assert (zero is None) == args.get("symmetric", True)
    value = weight.float()
    if zero is not None:
        value = value - _spread(zero.float(), args, weight.shape)
    return value * _spread(scale.float(), args, weight.shape)


def _pack_quantized(parts: dict[str, Tensor], args: dict) -> Tensor:
    """32-bit words of codes, the first lowest, each its value + 2^(bits-1); zero points alike but along the rows."""
    bits = args["num_bits"]
    rows, cols = parts["weight_shape"].tolist()
    words = parts["weight_packed"]
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-cols * bits // 32))
    value = _words(words, bits)[:, :cols]
    scale = parts["weight_scale"].float()
    if not args.get("symmetric", True):
        zero = parts["weight_zero_point"]
        assert zero.dtype == (torch.int8 if args["strategy"] == "tensor" else torch.int32)
        zero = zero.float() if args["strategy"] == "tensor" else _words(zero.T, bits).T[:rows]
        assert zero.shape == scale.shape
        value = value - _spread(zero, args, (rows, cols))
    else:
        assert "weight_zero_point" not in parts
    return value * _spread(scale, args, (rows, cols))


def _words(words: Tensor, bits: int) -> Tensor:
    """Codes follow each other bit by bit, also from one word into the next."""
    single = torch.stack([(words.long() >> place) & 1 for place in range(32)], -1).flatten(-2)
    single = single[:, : single.shape[1] // bits * bits].unflatten(-1, (-1, bits))
    codes = (single << torch.arange(bits)).sum(-1)
    return (codes - 2 ** (bits - 1)).float()


def _spread(scale: Tensor, args: dict, shape: tuple[int, ...]) -> Tensor:
    """One number a block to one a weight."""
    rows, cols = shape
    strategy = args["strategy"]
    if strategy == "tensor":
        assert scale.numel() == 1
        return scale.reshape(1, 1)
    if strategy == "channel":
        assert scale.shape == (rows, 1)
        return scale
    if strategy == "group":
        assert scale.shape == (rows, cols // args["group_size"])
        assert cols % args["group_size"] == 0
        return _by_group(scale, args["group_size"])
    assert strategy == "block", strategy
    high, wide = args["block_structure"]
    assert scale.shape == (-(-rows // high), -(-cols // wide))
    return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]


def _group_of(module: str, config: dict) -> dict:
    """The group that names the module, by name or pattern before class; every quantized module here is a Linear."""
    groups = config["config_groups"].values()
    named = [g for g in groups if any(_matches(t, module) for t in g["targets"])]
    found = named or [g for g in groups if "Linear" in g["targets"]]
    assert found, f"no config group targets {module}"
    return found[0]


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


# -- Model Optimizer's unified layout


def _modelopt(module: str, parts: dict[str, Tensor], config: dict, folder: Path) -> Tensor:
    written = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    algo = config["quant_algo"]
    assert algo == written["quant_algo"], "config.json and hf_quant_config.json disagree"
    if algo == "MIXED_PRECISION":
        written = written["quantized_layers"][module]
        assert written == config["quantized_layers"][module]
        algo = written["quant_algo"]
    else:
        assert not any(_glob(p, module) for p in written["exclude_modules"]), f"{module} is excluded, yet has a scale"
    weight, scale = parts["weight"], parts["weight_scale"]
    if algo == "FP8":
        assert scale.shape == ()
        assert scale.dtype == torch.float32
        value = _fp8(weight) * scale
    elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
        assert scale.shape == (weight.shape[0],)
        value = _fp8(weight) * scale[:, None]
    elif algo == "fp8_pb_wo":
        rows, cols = (-(-size // 128) for size in weight.shape)
        assert scale.shape == ((rows, 1, cols, 1) if rows * cols > 1 else ())
        blocks = scale.reshape(rows, cols).repeat_interleave(128, 0).repeat_interleave(128, 1)
        value = _fp8(weight) * blocks[: weight.shape[0], : weight.shape[1]]
    elif algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        assert weight.dtype == torch.int8
        assert scale.shape == (weight.shape[0],)
        value = weight.float() * scale[:, None]
    elif algo in ("W4A16_AWQ", "W4A8_AWQ"):
        assert ("weight_scale_2" in parts) == (algo == "W4A8_AWQ")
        value = _int4_along_rows(weight)
        group = written["group_size"]
        assert scale.shape == (value.shape[0], value.shape[1] // group)
        value = value * _by_group(scale, group)
    elif algo in ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"):
        assert scale.dtype == torch.float8_e4m3fn
        assert parts["weight_scale_2"].shape == ()
        value = _e2m1(weight) * _by_group(scale.float() * parts["weight_scale_2"], written["group_size"])
    elif algo == "mxfp4":
        value = _e2m1(weight) * _by_group(_e8m0(scale), 32)
    elif algo == "MXFP8":
        value = _fp8(weight) * _by_group(_e8m0(scale), written["group_size"])
    else:
        raise AssertionError(f"no rule for quant_algo {algo}")
    if "pre_quant_scale" in parts:  # multiplies the input before the product: the weight that acts on the input itself
        assert parts["pre_quant_scale"].shape == (value.shape[1],)
        value = value * parts["pre_quant_scale"].float()
    return value


def _glob(pattern: str, module: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None


def _int4_along_rows(packed: Tensor) -> Tensor:
    """[o/2, i] bytes: byte row r holds output row 2r in its low nibbles and 2r+1 in its high ones, two's complement."""
    assert packed.dtype == torch.uint8
    nibbles = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1).float()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


# -- numbers


def _e2m1(packed: Tensor) -> Tensor:
    """[o, i/2] bytes of two codes along the columns."""
    assert packed.dtype == torch.uint8
    return E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def _fp8(weight: Tensor) -> Tensor:
    assert weight.dtype == torch.float8_e4m3fn
    return weight.float()


def _e8m0(scale: Tensor) -> Tensor:
    """A power of two with a bias of 127."""
    assert scale.dtype == torch.uint8
    return torch.pow(2.0, scale.double() - 127).float()


def _by_group(scale: Tensor, group: int) -> Tensor:
    return scale.float().repeat_interleave(group, -1)
