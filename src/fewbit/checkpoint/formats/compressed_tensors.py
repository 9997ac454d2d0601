"""compressed-tensors: what llm-compressor writes and vLLM, SGLang and transformers load. It can say every recipe.

Layouts: github.com/vllm-project/compressed-tensors, release 0.20 (`fewbit.checkpoint.packings.compressed_tensors`).
Scales may be stored in any float dtype; ours are written in the dtype of the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import InputScale, Packing, Quantization
from fewbit.checkpoint.names import Names, spellings
from fewbit.checkpoint.packings.compressed_tensors import BY_WORD, MX, NVFP4, PLAIN, WORDS
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E2M1, E4M3, E8M0, Element
from fewbit.numerics.format import ALL, FORMATS, Format, integer_format
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape

NAME = "compressed-tensors"
OWN = "fewbit"
"""The ``quant_method`` of files with low-rank branches, of which the library knows nothing: others then refuse them."""
VERSION = "0.20.0"


def detect(files: Files) -> bool:
    """By config.json alone."""
    return (files.config.get("quantization_config") or {}).get("quant_method") in ("compressed-tensors", OWN)


# --- how things lie in the files --------------------------------------------------------------------------------------


def packing(quant: QuantSpec) -> Packing:
    """See `FileFormat.packing`."""
    fmt = quant.weight
    assert fmt is not None
    if fmt.scale is E8M0:
        return MX
    if fmt.outer:
        return NVFP4
    return WORDS if fmt.element.integer and (fmt.element.bits < 8 or quant.input is None) else PLAIN


def _word_for_packing(quant: QuantSpec) -> str:
    """The library's name for that layout."""
    assert quant.weight is not None
    layout, element = packing(quant), quant.weight.element
    if layout is PLAIN:
        return "int-quantized" if element.integer else "float-quantized"
    if layout is MX:
        return "mxfp8-quantized" if element == E4M3 else "mxfp4-pack-quantized"
    return next(word for word, other in BY_WORD.items() if other is layout)


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    if quant.input_scale == "outer":
        return InputScale("input_global_scale", (1,), reciprocal=True)
    return InputScale("input_scale", (1,), any_float=True)


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
            if fmt is not None and _why_not_format(fmt):
                return f"{name}: compressed-tensors has no word for {fmt}{_why_not_format(fmt)}"
        if quant.prescale:
            return f"{name}: compressed-tensors has no place for a prescale vector; use --export hf"
    if len(set(quantization.kv.values())) > 1 or (quantization.kv and len(quantization.kv) != len(spec.layers)):
        return "compressed-tensors says one KV format for all layers"
    for kv in quantization.kv.values():
        if kv.k != kv.v or kv.k.block not in ((ALL, ALL), (1, ALL)):
            return f"compressed-tensors says one format for K and V, with a scale a layer or a head, not {kv}"
    return None


def _why_not_format(fmt: Format) -> str | None:
    if fmt.act_order:
        return "; its library no longer reads the table of groups that act-order needs"
    known = fmt.element.integer or fmt.element in (E4M3, E2M1)
    if not known or fmt.zero not in (None, "int"):
        return "; use fp8 (E4M3)"
    return "; use nvfp4, whose blocks are of 16" if fmt.outer and fmt.block != (1, 16) else None


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
    """QuantizationArgs as a Format (float scales in a dtype of ours; the file says in which they really are)."""
    bits, kind, strategy = args.get("num_bits"), args.get("type"), str(args.get("strategy"))
    group, asym = args.get("group_size"), not args.get("symmetric", True)
    block = {
        "tensor": (ALL, ALL),
        "channel": (1, ALL),
        "token": (1, ALL),
        "attn_head": (1, ALL),
        "group": (1, group),
        "tensor_group": (1, group),
        "block": tuple(args.get("block_structure") or ()),
    }.get(strategy)
    if (
        kind == "int"
        and isinstance(bits, int)
        and 2 <= bits <= 8
        and block
        and block[0] in (1, ALL)
        and isinstance(block[1], int)
    ):
        return integer_format(bits, block, asym=asym)
    for fmt in FORMATS.values():
        if (
            kind == "float"
            and fmt.block == block
            and fmt.element.bits == bits
            and fmt.element in (E4M3, E2M1)
            and not asym
            and fmt.outer == (strategy == "tensor_group")
            and (bits == 4 or (fmt.scale is E8M0) == (args.get("scale_dtype") == "torch.uint8"))
        ):
            return fmt
    raise UnsupportedError(f"{where}: compressed-tensors arguments {dict(args)} are not supported")


class _Patterns:
    """What ``targets`` or ``ignore`` mean: names, ``re:`` patterns, and classes, of which every linear is a Linear."""

    def __init__(self, patterns: list[str]) -> None:
        self._exact = {pattern for pattern in patterns if not pattern.startswith("re:")}
        self._expressions = [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]

    def nearness(self, module: str) -> int:
        """How exactly they mean a linear: by name 3, by pattern 2, by class 1, not at all 0."""
        names = spellings(module)
        if any(name in self._exact for name in names):
            return 3
        if any(expression.match(name) for name in names for expression in self._expressions):
            return 2
        return int("Linear" in self._exact)


def _group_spec(group: Mapping[str, Any], where: str) -> QuantSpec:
    if not group.get("weights"):
        raise UnsupportedError(f"{where}: quantizes no weights, which is not supported")
    weight, inputs = _format(group["weights"], where), group.get("input_activations")
    if inputs and not inputs.get("symmetric", True):
        raise UnsupportedError(f"{where}: inputs with zero points are not supported")
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
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedError("compressed-tensors: transforms are not supported")
    groups = [
        (_Patterns(group.get("targets", [])), _group_spec(group, name), group.get("format") or config.get("format"))
        for name, group in (config.get("config_groups") or {}).items()
    ]
    ignored = _Patterns(config.get("ignore") or [])
    quant: dict[str, QuantSpec] = {}
    packings: dict[str, Packing] = {}
    for linear in spec.linears():
        module = names.module(linear.name)
        if ignored.nearness(module) or (linear.name == "lm_head" and spec.tied):
            continue
        nearest = max((group[0].nearness(module) for group in groups), default=0)
        for patterns, kind, word in groups:
            if nearest and patterns.nearness(module) == nearest:
                quant[linear.name] = _as_stored(kind, files, module)
                packings[linear.name] = _packing_called(word, kind)
                break
    scheme = config.get("kv_cache_scheme")
    kv = {}
    if scheme:
        if scheme.get("dynamic"):
            raise UnsupportedError("compressed-tensors: a dynamic kv_cache_scheme is not supported")
        fmt = _format(scheme, "kv_cache_scheme")
        kv = dict.fromkeys(range(len(spec.layers)), KVSpec(fmt, fmt))
    return Quantization(quant, kv, packings=packings)


def _packing_called(word: str | None, kind: QuantSpec) -> Packing:
    """How weights lie by the library's name for it; several names may lead to one file."""
    if word in (None, "mixed-precision"):
        return packing(kind)
    if word not in BY_WORD:
        raise UnsupportedError(
            f"compressed-tensors: format '{word}' of {kind} is not read; known: {', '.join(BY_WORD)}"
        )
    return BY_WORD[str(word)]


def _as_stored(kind: QuantSpec, files: Files, module: str) -> QuantSpec:
    """The spec with the float dtype in which this linear's scales really are, and act-order where it has its table."""
    assert kind.weight is not None
    weight, entry = kind.weight, files.entries.get(f"{module}.weight_scale")
    if weight.element.integer and f"{module}.weight_g_idx" in files.entries:
        weight = integer_format(weight.element.bits, weight.block, asym=weight.zero is not None, act_order=True)
    if isinstance(weight.scale, Element) or entry is None or not entry.dtype.is_floating_point:
        return replace(kind, weight=weight)  # a missing tensor is reported with all the others
    return replace(kind, weight=replace(weight, scale=entry.dtype))
