"""compressed-tensors: what llm-compressor writes and vLLM, SGLang and transformers load. It can say every recipe.

Layouts: github.com/vllm-project/compressed-tensors, release 0.20. Scales may be stored in any float dtype; ours are
written in the dtype of the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import InputScale, Packing, Quantization, Shape, Stored, scale_grid
from fewbit.checkpoint.names import Names
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E2M1, E4M3, E8M0, INT4, INT8, Element
from fewbit.numerics.format import ALL, FORMATS, Format
from fewbit.numerics.pack import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape

NAME = "compressed-tensors"
OWN = "fewbit"
"""The ``quant_method`` of files with low-rank branches, of which the library knows nothing: others then refuse them."""
CAST = {INT8: torch.int8, E4M3: torch.float8_e4m3fn}
VERSION = "0.20.0"


def detect(files: Files) -> bool:
    """By config.json alone."""
    return (files.config.get("quantization_config") or {}).get("quant_method") in ("compressed-tensors", OWN)


# --- packings ---------------------------------------------------------------------------------------------------------


def _scale_shape(fmt: Format, shape: Shape) -> Shape:
    return (1,) if fmt.block == (ALL, ALL) else scale_grid(fmt, shape)


def _float_scale(fmt: Format) -> torch.dtype:
    assert isinstance(fmt.scale, torch.dtype)
    return fmt.scale


def _plain_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(CAST[fmt.element], shape),
        "weight_scale": Stored(_float_scale(fmt), _scale_shape(fmt, shape)),
    }


def _plain_pack(q: QTensor) -> dict[str, Tensor]:
    scale = q.scale.reshape(_scale_shape(q.format, tuple(q.shape)))
    return {"weight": q.codes.view(CAST[q.format.element]), "weight_scale": scale}


def _plain_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    return QTensor(fmt, parts["weight"].view(torch.uint8), parts["weight_scale"].reshape(scale_grid(fmt, shape)))


PLAIN = Packing(_plain_stored, _plain_pack, _plain_unpack)
"""One code a byte: ``int-quantized`` and ``float-quantized``."""


def _words_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    per_word = 32 // fmt.element.bits
    out, columns = shape
    stored = {
        "weight_packed": Stored(torch.int32, (out, -(-columns // per_word))),
        "weight_scale": Stored(_float_scale(fmt), _scale_shape(fmt, shape)),
        "weight_shape": Stored(torch.int64, (2,)),
    }
    if fmt.zero:
        stored["weight_zero_point"] = Stored(torch.int32, (-(-out // per_word), scale_grid(fmt, shape)[1]))
    return stored


def _words_pack(q: QTensor) -> dict[str, Tensor]:
    bits = q.format.element.bits
    half = 1 << (bits - 1)  # stored as value + half: in two's complement that flips the top bit
    parts = {
        "weight_packed": pack_words(q.codes ^ half, bits),
        "weight_scale": q.scale.reshape(_scale_shape(q.format, tuple(q.shape))),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        parts["weight_zero_point"] = pack_words((q.zero.int() + half).to(torch.uint8), bits, dim=0)
    return parts


def _words_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    bits = fmt.element.bits
    half = 1 << (bits - 1)
    if parts["weight_shape"].tolist() != list(shape):
        raise CheckpointError(f"weight_shape says {parts['weight_shape'].tolist()}, the model's config {list(shape)}")
    codes = unpack_words(parts["weight_packed"], bits, shape[1]) ^ half
    zero = None
    if fmt.zero:
        zero = (unpack_words(parts["weight_zero_point"], bits, shape[0], dim=0).int() - half).to(torch.int8)
    return QTensor(fmt, codes, parts["weight_scale"].reshape(scale_grid(fmt, shape)), zero=zero)


WORDS = Packing(_words_stored, _words_pack, _words_unpack)
"""``pack-quantized``: integer weights alone, shifted to be unsigned, in 32-bit words along the columns."""


def _nvfp4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight_packed": Stored(torch.uint8, (shape[0], shape[1] // 2)),
        "weight_scale": Stored(torch.float8_e4m3fn, scale_grid(fmt, shape)),
        "weight_global_scale": Stored(torch.float32, (1,)),
    }


def _nvfp4_pack(q: QTensor) -> dict[str, Tensor]:
    assert q.outer is not None
    return {
        "weight_packed": pack_nibbles(q.codes),
        "weight_scale": q.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": q.outer.reciprocal().reshape(1),  # this dialect divides by it
    }


def _nvfp4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    outer = parts["weight_global_scale"].reciprocal().reshape(())
    return QTensor(fmt, unpack_nibbles(parts["weight_packed"]), parts["weight_scale"].view(torch.uint8), outer)


NVFP4 = Packing(_nvfp4_stored, _nvfp4_pack, _nvfp4_unpack)
"""``nvfp4-pack-quantized``."""


def _mx_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    scale = Stored(torch.uint8, scale_grid(fmt, shape))
    if fmt.element == E4M3:
        return {"weight": Stored(torch.float8_e4m3fn, shape), "weight_scale": scale}
    return {"weight_packed": Stored(torch.uint8, (shape[0], shape[1] // 2)), "weight_scale": scale}


def _mx_pack(q: QTensor) -> dict[str, Tensor]:
    if q.format.element == E4M3:
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.scale}
    return {"weight_packed": pack_nibbles(q.codes), "weight_scale": q.scale}


def _mx_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    codes = parts["weight"].view(torch.uint8) if fmt.element == E4M3 else unpack_nibbles(parts["weight_packed"])
    return QTensor(fmt, codes, parts["weight_scale"])


MX = Packing(_mx_stored, _mx_pack, _mx_unpack)
"""``mxfp4-pack-quantized`` and ``mxfp8-quantized``."""


def packing(quant: QuantSpec) -> Packing:
    """See `FileFormat.packing`."""
    fmt = quant.weight
    assert fmt is not None
    if fmt.scale is E8M0:
        return MX
    if fmt.outer:
        return NVFP4
    if fmt.element == INT4 or (fmt.element == INT8 and quant.input is None):
        return WORDS
    return PLAIN


def _word_for_packing(quant: QuantSpec) -> str:
    """The library's name for that layout."""
    assert quant.weight is not None
    layout = packing(quant)
    if layout is MX:
        return "mxfp8-quantized" if quant.weight.element == E4M3 else "mxfp4-pack-quantized"
    if layout is NVFP4:
        return "nvfp4-pack-quantized"
    if layout is WORDS:
        return "pack-quantized"
    return "int-quantized" if quant.weight.element == INT8 else "float-quantized"


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    if quant.input_scale == "outer":
        return InputScale("input_global_scale", (1,), reciprocal=True)
    return InputScale("input_scale", (1,))


def prescale(linear: LinearShape, quant: QuantSpec) -> bool:
    """This format has no place for one."""
    return False


def kv_scale_names(layer: int, names: Names) -> tuple[str, str]:
    """See `FileFormat.kv_scale_names`."""
    attention = names.module(f"layers.{layer}.attn")
    return f"{attention}.k_scale", f"{attention}.v_scale"


def kv_scale_shape(kv: KVSpec, heads: int) -> tuple[int, ...]:
    """See `FileFormat.kv_scale_shape`."""
    return (1,) if kv.k.block == (ALL, ALL) else (heads, 1, 1)


# --- config.json ------------------------------------------------------------------------------------------------------


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    for name, quant in quantization.quant.items():
        if quant.weight is None:
            return f"{name}: an input is quantized but not its weight, which compressed-tensors does not load"
        for fmt in (quant.weight, quant.input):
            if fmt is not None and fmt.element not in (INT4, INT8, E4M3, E2M1):
                return f"{name}: compressed-tensors has no word for {fmt}; use fp8 (E4M3)"
        if quant.prescale:
            return f"{name}: compressed-tensors has no place for a prescale vector; use --export hf"
    if len(set(quantization.kv.values())) > 1 or (quantization.kv and len(quantization.kv) != len(spec.layers)):
        return "compressed-tensors says one KV format for all layers"
    for kv in quantization.kv.values():
        if kv.k != kv.v or kv.k.block not in ((ALL, ALL), (1, ALL)):
            return f"compressed-tensors says one format for K and V, with a scale a layer or a head, not {kv}"
    return None


def _args(fmt: Format, dynamic: bool | str, per_token: bool = False) -> dict[str, Any]:
    """A Format as the library's QuantizationArgs."""
    args: dict[str, Any] = {
        "num_bits": fmt.element.bits,
        "type": "int" if fmt.element.integer else "float",
        "symmetric": fmt.zero is None,
        "dynamic": dynamic,
    }
    if fmt.block == (ALL, ALL):
        return args | {"strategy": "tensor"}
    if fmt.block == (1, ALL):
        return args | {"strategy": "token" if per_token else "channel"}
    if fmt.block[0] != 1:
        return args | {"strategy": "block", "block_structure": list(fmt.block)}
    args["group_size"] = fmt.block[1]
    if isinstance(fmt.scale, Element):
        args["scale_dtype"] = "torch.uint8" if fmt.scale is E8M0 else "torch.float8_e4m3fn"
    return args | {"strategy": "tensor_group" if fmt.outer else "group"}


def _kv_args(kv: KVSpec) -> dict[str, Any]:
    args = _args(kv.k, False)
    return args | {"strategy": "attn_head"} if kv.k.block == (1, ALL) else args


def _group(quant: QuantSpec, targets: list[str]) -> dict[str, Any]:
    assert quant.weight is not None
    inputs = None
    if quant.input is not None:
        dynamic: dict[str, bool | str] = {"dynamic": True, "static": False, "outer": "local"}
        inputs = _args(quant.input, dynamic[quant.input_scale], per_token=True)
    group = {
        "targets": targets,
        "weights": _args(quant.weight, False),
        "input_activations": inputs,
        "output_activations": None,
        "format": _word_for_packing(quant),
    }
    return group | {"lowrank": quant.lowrank} if quant.lowrank else group


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """See `FileFormat.configs`."""
    quant = quantization.quant
    kinds = list(dict.fromkeys(quant.values()))
    dense = [names.module(linear.name) for linear in spec.linears() if linear.name not in quant]
    dense += map(names.module, spec.routers())
    groups = {}
    for number, kind in enumerate(kinds):
        members = [names.module(name) for name, other in quant.items() if other == kind]
        groups[f"group_{number}"] = _group(kind, ["Linear"] if len(kinds) == 1 else members)
    words = {_word_for_packing(kind) for kind in kinds}
    kv = next(iter(quantization.kv.values()), None)
    return {
        "quantization_config": {
            "quant_method": OWN if any(kind.lowrank for kind in kinds) else "compressed-tensors",
            "format": ("dense" if not words else words.pop()) if len(words) < 2 else "mixed-precision",
            "config_groups": groups,
            "ignore": dense,
            "kv_cache_scheme": None if kv is None else _kv_args(kv),
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }
    }


def _format(args: Mapping[str, Any], where: str) -> Format:
    """QuantizationArgs as a Format (float scales as float32; the file says what they are)."""
    bits, kind, strategy = args.get("num_bits"), args.get("type"), args.get("strategy")
    group = args.get("group_size")
    symmetric = args.get("symmetric", True)
    block = {
        "tensor": (ALL, ALL),
        "channel": (1, ALL),
        "token": (1, ALL),
        "attn_head": (1, ALL),
        "group": (1, group),
        "tensor_group": (1, group),
        "block": tuple(args.get("block_structure") or ()),
    }.get(str(strategy))
    for fmt in FORMATS.values():
        if (
            fmt.block == block
            and fmt.element.bits == bits
            and fmt.element in (INT4, INT8, E4M3, E2M1)
            and fmt.element.integer == (kind == "int")
            and (fmt.zero is None) == bool(symmetric)
            and fmt.outer == (strategy == "tensor_group")
        ):
            return fmt
    raise UnsupportedError(f"{where}: compressed-tensors arguments {dict(args)} are not supported")


def _matcher(targets: Sequence[str]) -> Callable[[str], bool]:
    """Whether target or ignore patterns mean a linear, by its name: of a mixture there are thousands of both."""
    exact = {pattern for pattern in targets if not pattern.startswith("re:")}
    patterns = [re.compile(pattern[3:]) for pattern in targets if pattern.startswith("re:")]
    return lambda module: "Linear" in exact or module in exact or any(p.match(module) for p in patterns)


def _group_spec(group: Mapping[str, Any], where: str) -> QuantSpec:
    if not group.get("weights"):
        raise UnsupportedError(f"{where}: quantizes no weights, which is not supported")
    weight, inputs = _format(group["weights"], where), group.get("input_activations")
    if group.get("output_activations"):
        raise UnsupportedError(f"{where}: output_activations are not supported")
    rank = group.get("lowrank", 0)
    if not isinstance(rank, int) or rank < 0:
        raise CheckpointError(f"{where}: 'lowrank' is {rank!r}, expected a rank")
    if not inputs:
        return QuantSpec(weight, lowrank=rank)
    scale = {True: "dynamic", False: "static", "local": "outer"}.get(inputs.get("dynamic", False))
    if scale is None:
        raise CheckpointError(f"{where}: 'dynamic' is {inputs.get('dynamic')!r}, expected true, false or \"local\"")
    return QuantSpec(weight, _format(inputs, where), scale, lowrank=rank)  # type: ignore[arg-type]


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `FileFormat.read`."""
    config = files.config["quantization_config"]
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnsupportedError("compressed-tensors: sparse storage is not supported")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedError("compressed-tensors: transforms are not supported")
    groups = [(g.get("targets", []), _group_spec(g, name)) for name, g in config.get("config_groups", {}).items()]
    ignored = _matcher(config.get("ignore") or [])
    # a full name says more than a class
    kinds = [(_matcher(targets), kind) for targets, kind in sorted(groups, key=lambda g: "Linear" in g[0])]
    quant: dict[str, QuantSpec] = {}
    for linear in spec.linears():
        module = names.module(linear.name)
        if ignored(module) or (linear.name == "lm_head" and spec.tied):
            continue
        for targeted, kind in kinds:
            if targeted(module):
                quant[linear.name] = _as_stored(kind, files, module)
                break
    scheme = config.get("kv_cache_scheme")
    kv = {}
    if scheme:
        if scheme.get("dynamic"):
            raise UnsupportedError("compressed-tensors: a dynamic kv_cache_scheme is not supported")
        fmt = _format(scheme, "kv_cache_scheme")
        kv = dict.fromkeys(range(len(spec.layers)), KVSpec(fmt, fmt))
    return Quantization(quant, kv)


def _as_stored(kind: QuantSpec, files: Files, module: str) -> QuantSpec:
    """The spec with the float dtype in which this linear's scales really are."""
    assert kind.weight is not None
    entry = files.entries.get(f"{module}.weight_scale")
    if isinstance(kind.weight.scale, Element) or entry is None or not entry.dtype.is_floating_point:
        return kind  # a missing tensor is reported with all the others
    return replace(kind, weight=replace(kind.weight, scale=entry.dtype))
