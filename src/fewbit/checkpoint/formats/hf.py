"""Model Optimizer's unified Hugging Face layout; without quantization, an ordinary Hugging Face directory.

Layouts as Model Optimizer 0.47 writes them (`fewbit.checkpoint.packings.modelopt`). Two files say the same:
``hf_quant_config.json`` (TensorRT-LLM trusts it) and ``quantization_config`` in config.json (SGLang prefers it).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fewbit.checkpoint.files import DTYPES, Files, read_json
from fewbit.checkpoint.layout import InputScale, Packing, Quantization
from fewbit.checkpoint.names import Names, spellings
from fewbit.checkpoint.packings.modelopt import packing_of
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import INT4
from fewbit.numerics.format import FORMATS, Format
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape, by_input
from fewbit.version import __version__

NAME = "hf"
CONFIG = "hf_quant_config.json"

_FP8, _FP8_ROW, _INT8_ROW, _INT4 = (FORMATS[n] for n in ("fp8", "fp8_row", "int8_row", "int4_g128"))
_NVFP4, _MXFP4, _MXFP8 = (FORMATS[n] for n in ("nvfp4", "mxfp4", "mxfp8"))
ALGORITHMS = {
    "FP8": QuantSpec(_FP8, _FP8, "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": QuantSpec(_FP8_ROW, _FP8_ROW, "dynamic"),
    "fp8_pb_wo": QuantSpec(FORMATS["fp8_block"]),
    "W8A8_SQ_PER_CHANNEL": QuantSpec(_INT8_ROW, FORMATS["int8"], "static"),
    "W8A16": QuantSpec(_INT8_ROW),
    "W4A16_AWQ": QuantSpec(_INT4),
    "W4A8_AWQ": QuantSpec(_INT4, _FP8, "static"),
    "NVFP4": QuantSpec(_NVFP4, _NVFP4, "outer"),
    "NVFP4_AWQ": QuantSpec(_NVFP4, _NVFP4, "outer", prescale=True),
    "W4A16_NVFP4": QuantSpec(_NVFP4),
    "W4A8_NVFP4_FP8": QuantSpec(FORMATS["nvfp4_g32"], _FP8, "static"),
    "mxfp4": QuantSpec(_MXFP4, _MXFP4),
    "MXFP8": QuantSpec(_MXFP8, _MXFP8),
}
"""``quant_algo`` to what it means. INT4 also comes in other group sizes, ``mxfp4`` for weights alone; a prescale stands
where the files have one. (Upstream writes two of them in lower case.)"""
MIXED = "MIXED_PRECISION"
SMOOTHED = ("W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ")
"""Algorithms whose linears may have a ``pre_quant_scale``."""
AWQ = {"has_zero_point": False, "pre_quant_scale": True}
PRESCALED = (".attn.o", ".mlp.down")
"""Linears of INT4 whose ``pre_quant_scale`` TensorRT-LLM insists on finding, ones if need be."""
KV = {"FP8": KVSpec(_FP8, _FP8), "NVFP4": KVSpec(_NVFP4, _NVFP4)}


def detect(files: Files) -> bool:
    """Unquantized, or by either of the two files."""
    method = (files.config.get("quantization_config") or {}).get("quant_method")
    return method == "modelopt" or (method is None and not files.config.get("quantization_config"))


# --- how things lie in the files --------------------------------------------------------------------------------------


def packing(quant: QuantSpec) -> Packing:
    """See `FileFormat.packing`."""
    assert quant.weight is not None
    return packing_of(quant.weight, wide=quant.input is not None)


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    return InputScale("input_scale", ())


def prescale(linear: LinearShape, quant: QuantSpec) -> bool:
    """See `FileFormat.prescale`."""
    return quant.weight is not None and quant.weight.element == INT4 and linear.name.endswith(PRESCALED)


def kv_scale_names(layer: int, names: Names) -> tuple[str, str]:
    """See `FileFormat.kv_scale_names`."""
    return f"{names.module(f'layers.{layer}.attn.k')}.k_scale", f"{names.module(f'layers.{layer}.attn.v')}.v_scale"


def kv_scale_shape(kv: KVSpec, heads: int) -> tuple[int, ...]:
    """See `FileFormat.kv_scale_shape`."""
    return ()


# --- writing the two configs ------------------------------------------------------------------------------------------


def _algorithm(quant: QuantSpec) -> str | None:
    """The one word this layout has for a QuantSpec."""
    weight, plain = quant.weight, replace(quant, prescale=False)
    if weight is not None and weight.element == INT4 and weight.block[0] == 1 and weight.grouped:
        plain = replace(plain, weight=replace(_INT4, zero=weight.zero, act_order=weight.act_order))
    elif plain == QuantSpec(_MXFP4):
        plain = ALGORITHMS["mxfp4"]
    for word, meaning in ALGORITHMS.items():
        if plain == replace(meaning, prescale=False) and (word in SMOOTHED or not quant.prescale):
            return word
    return None


def _setting(quant: QuantSpec) -> dict[str, Any]:
    """What ``quantized_layers`` says of one linear."""
    word = _algorithm(quant)
    assert word is not None
    assert quant.weight is not None
    setting: dict[str, Any] = {"quant_algo": word}
    if quant.weight.grouped and quant.weight.block[0] == 1 and word != "mxfp4":
        setting["group_size"] = quant.weight.block[1]
    return setting | AWQ if word.endswith("AWQ") else setting


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    other = "use --export compressed-tensors, which can"
    quants = quantization.quant
    for group in by_input(spec.linears()):
        for linear in group:
            quant = quants.get(linear.name)
            if quant is not None and _algorithm(quant) is None:
                return f"{linear.name}: Model Optimizer's layout has no word for {quant}; {other}"
            if quant and quant.weight and quant.weight.element == INT4 and linear.out_features % 2:
                return f"{linear.name}: this layout packs INT4 along the rows and {linear.out_features} is odd; {other}"
    for kv in quantization.kv.values():
        if kv not in KV.values():
            return f"Model Optimizer's layout has no word for K and V in {kv}; {other}"
    if len(set(quantization.kv.values())) > 1 or (quantization.kv and len(quantization.kv) != len(spec.layers)):
        return f"one K and V format for all layers is written in this layout; {other}"
    return _why_not_joined(spec, quants)


def _why_not_joined(spec: DecoderSpec, quants: Mapping[str, QuantSpec]) -> str | None:
    """Engines join linears that read one input into one, whose numerics they look up once."""
    if len(quants) < 2:  # asked about one linear, not about a model
        return None
    for group in by_input(spec.linears()):
        first, *rest = group
        was = quants.get(first.name)
        for linear in rest:
            quant = quants.get(linear.name)
            if (was is None) != (quant is None) or (was and quant and _args(was) != _args(quant)):
                return (
                    f"{linear.name} ({quant or 'not quantized'}) reads the input of {first.name} "
                    f"({was or 'not quantized'}): engines of this layout join them and want one format; give both "
                    "the same, or use --export compressed-tensors"
                )
    return None


def _args(quant: QuantSpec) -> dict[str, Any]:
    """What ``config_groups`` says of one linear."""
    assert quant.weight is not None
    args = {"weights": _format_args(quant.weight)}
    return args if quant.input is None else {"input_activations": _format_args(quant.input), **args}


def _format_args(fmt: Format) -> dict[str, Any]:
    args: dict[str, Any] = {
        "dynamic": False,
        "num_bits": fmt.element.bits,
        "type": "int" if fmt.element.integer else "float",
    }
    if fmt.grouped and fmt.block[0] == 1:
        args["group_size"] = fmt.block[1]
    if fmt.element == INT4:
        args["scale_dtype"] = str(fmt.scale)  # the file holds float32: this says how many of its bits count
    return args


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """See `FileFormat.configs`."""
    quants = quantization.quant
    if not quants and not quantization.kv:
        return {}
    dense = [names.module(linear.name) for linear in spec.linears() if linear.name not in quants]
    dense = list(dict.fromkeys([*dense, *map(names.module, spec.routers())]))
    producer = {"name": "fewbit", "version": __version__}
    kv = next((word for word, kind in KV.items() if kind in quantization.kv.values()), None)
    nested: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": kv}
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": None, "ignore": dense, "producer": producer}
    layers = {names.module(name): (_setting(quant), _args(quant)) for name, quant in quants.items()}
    if any(setting["quant_algo"] == "NVFP4_AWQ" for setting, _ in layers.values()):  # then it is all the same word
        awq = _setting(ALGORITHMS["NVFP4_AWQ"])
        layers = {m: (awq if s["quant_algo"] == "NVFP4" else s, args) for m, (s, args) in layers.items()}
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for kind in layers.values():
        if kind not in kinds:
            kinds.append(kind)
    if len(kinds) == 1:
        ((setting, args),) = kinds
        nested |= setting
        flat["quant_algo"] = word = setting["quant_algo"]
        if word in ("FP8", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ", "W4A8_AWQ", "mxfp4"):
            flat["config_groups"] = {"group_0": {**args, "targets": ["Linear"]}}
    elif kinds:
        said = {module: setting for module, (setting, _) in layers.items()}
        nested |= {"quant_algo": MIXED, "quantized_layers": said}
        flat |= {"quant_algo": MIXED, "quantized_layers": said, "config_groups": {}}
        for number, kind in enumerate(kinds):
            targets = sorted(module for module, other in layers.items() if other == kind)
            flat["config_groups"][f"group_{number}"] = {**kind[1], "targets": targets}
    else:
        nested["quantized_layers"] = {}
    nested["exclude_modules"] = dense
    if kv:
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if kv == "FP8" else kv
    return {"quantization_config": flat, CONFIG: {"producer": producer, "quantization": nested}}


# --- reading them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    """What the two files say, whichever of them are there.

    Attributes:
        algo, group: of all linears, or ``MIXED_PRECISION``.
        layers: the same by module, if mixed.
        kv: of K and V.
        exclude: patterns of modules left alone.
        groups: ``config_groups`` of config.json, which alone say the dtype of INT4 scales and what ``mxfp4`` covers.
    """

    algo: str | None
    group: int | None
    layers: Mapping[str, Mapping[str, Any]]
    kv: str | None
    exclude: list[str]
    groups: tuple[Mapping[str, Any], ...]

    def args(self, module: str) -> Mapping[str, Any]:
        """The one of `groups` that means a module."""
        for group in self.groups:
            if module in group.get("targets", ()) or "Linear" in group.get("targets", ()):
                return group
        return {}


def _words(files: Files) -> _Words:
    flat = files.config.get("quantization_config") or {}
    nested = flat
    if (files.folder / CONFIG).is_file():
        stored = read_json(files.path / CONFIG)
        nested = stored.get("quantization", stored)
        if flat and nested.get("quant_algo") != flat.get("quant_algo"):
            raise CheckpointError(
                f"{CONFIG} says quant_algo {nested.get('quant_algo')!r} and config.json {flat.get('quant_algo')!r}"
            )
        if nested is stored:  # an older file, laid out like config.json
            flat = flat or nested
    scheme = flat.get("kv_cache_scheme")  # for FP8 an object; anything else is a bare word
    groups = tuple((flat.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    return _Words(
        algo=nested.get("quant_algo"),
        group=nested.get("group_size", weights.get("group_size")),
        layers=nested.get("quantized_layers") or flat.get("quantized_layers") or {},
        kv=nested.get("kv_cache_quant_algo", "FP8" if isinstance(scheme, dict) else scheme),
        exclude=nested.get("exclude_modules", nested.get("ignore", flat.get("ignore"))) or [],
        groups=groups,
    )


def _excluded(module: str, patterns: list[str]) -> bool:
    """Whether an exclude pattern means a module: by name, by wildcard, or by the name of a parent."""
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}.") for name in spellings(module) for p in patterns)


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `FileFormat.read`."""
    if not files.config.get("quantization_config") and not (files.folder / CONFIG).is_file():
        return Quantization({}, {})
    words = _words(files)
    quant: dict[str, QuantSpec] = {}
    for linear in spec.linears():
        module = names.module(linear.name)
        layer = next((words.layers[name] for name in spellings(module) if name in words.layers), None)
        if words.algo == MIXED:
            algo, group = (layer.get("quant_algo"), layer.get("group_size")) if layer else (None, None)
        else:
            algo, group = words.algo, words.group
        if algo is None or (spec.tied and linear.name == "lm_head") or _excluded(module, words.exclude):
            continue
        # smoothing scales that nothing could absorb lie beside some linears: the files say which
        smoothed = f"{module}.pre_quant_scale" in files.entries
        quant[linear.name] = replace(_spec_of(algo, group, words.args(module)), prescale=smoothed)
    if words.kv not in (None, *KV):
        raise UnsupportedError(f"{CONFIG}: kv_cache_quant_algo {words.kv!r} is not supported; known: {', '.join(KV)}")
    kv = dict.fromkeys(range(len(spec.layers)), KV[words.kv]) if words.kv else {}
    cast = not any(name in files.entries for layer in kv for name in kv_scale_names(layer, names))
    return Quantization(quant, kv, kv_cast=cast)


def _spec_of(algo: str, group: int | None, args: Mapping[str, Any]) -> QuantSpec:
    """The QuantSpec of ``quant_algo`` with its group size and what its config group says."""
    known = {word.upper(): kind for word, kind in ALGORITHMS.items()}  # engines write all in upper case
    if str(algo).upper() not in known:
        raise UnsupportedError(
            f"{CONFIG}: quant_algo {algo!r} is not supported; known: {', '.join(ALGORITHMS)}, {MIXED}"
        )
    kind = known[str(algo).upper()]
    assert kind.weight is not None
    if kind.weight.element == INT4:
        name, said = f"int4_g{group or 128}", args.get("weights", {}).get("scale_dtype", "torch.float32")
        scale = next((d for d in DTYPES.values() if str(d) == said), None)
        if name not in FORMATS or scale is None:
            raise UnsupportedError(f"{CONFIG}: INT4 groups of {group} with {said} scales are not supported")
        return replace(kind, weight=replace(FORMATS[name], scale=scale))
    if group not in (None, kind.weight.block[1]) and kind.weight.grouped:
        raise UnsupportedError(f"{CONFIG}: {algo} with groups of {group} is not supported")
    if algo == "mxfp4" and args and "input_activations" not in args:
        return QuantSpec(_MXFP4)
    return kind
