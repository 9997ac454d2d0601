"""Recipes: what to do to a model, as a YAML file.

Read strictly, and resolved to one QuantSpec a layer before any weight is read.

A recipe file::

    rules:                        # the first that matches a linear's canonical name decides
      - {match: "layers.*.mlp.down", weight: int8_row}
      - {match: "layers.*", weight: int4_g128, input: none, input_scale: dynamic}
    kv: {format: fp8, scale: static}
    techniques:                   # in order; none: rounding to nearest
      - round_to_nearest: {}
    calib: {samples: 32, length: 512, data: [texts.jsonl:0.7, code.txt:0.3], method: mse}
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from fewbit.compress.calibrators import Method
from fewbit.compress.techniques import Technique, auto, svdquant, technique_named
from fewbit.errors import RecipeError, UnsupportedError, nearest_name
from fewbit.numerics.format import ALL, FORMATS, Format, format_named
from fewbit.numerics.quantspec import InputScale, KVSpec, QuantSpec
from fewbit.numerics.reference import check_fits
from fewbit.spec.decoder import DecoderSpec, LinearShape, role_of

KV_FORMATS = {"fp8": FORMATS["fp8"], "int8": FORMATS["int8"], "int4": FORMATS["int4_tensor"]}
KV_FORMATS |= {f"{name}_head": FORMATS[f"{name}_row"] for name in KV_FORMATS}
"""What ``--kv`` and ``kv`` may say, and the format over (heads, head_dim) that it means: a scale a layer, or a head."""
HEADS = {"fp8": "fp8_row", "int4": "int4_g128"}
"""What ``--head`` may say, and the format it means."""

_BUILT_IN = importlib.resources.files("fewbit.compress") / "recipes"


@dataclass(frozen=True)
class Rule:
    """Linears whose canonical name matches a shell pattern (``*`` also crosses dots) get these numerics."""

    match: str
    quant: QuantSpec


@dataclass(frozen=True)
class Source:
    """A file of calibration data, and its share of the windows beside the other files'."""

    path: Path
    share: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Which data, and how much of it: `samples` windows of `length` tokens.

    Attributes:
        samples: windows.
        length: tokens of each.
        data: where from; none: the text shipped with fewbit.
        seed: 0: the first windows of each file; else which ones is drawn.
        method: how far the scale of a static input, of K and of V reaches; see `fewbit.compress.calibrators`.
        percentile: of that method, in per cent.
    """

    samples: int = 32
    length: int = 512
    data: tuple[Source, ...] = ()
    seed: int = 0
    method: Method = "max"
    percentile: float = 99.99

    def counts(self) -> list[int]:
        """How many windows each of `data` gives: its share, rounded so that they are `samples` in all."""
        total = sum(source.share for source in self.data)
        exact = [self.samples * source.share / total for source in self.data]
        counts = [int(number) for number in exact]
        order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in order[: self.samples - sum(counts)]:
            counts[i] += 1
        return counts


@dataclass(frozen=True)
class Recipe:
    """A recipe as read; `name` is the built-in's or the file's, `text` what was read."""

    name: str
    text: str
    rules: tuple[Rule, ...]
    kv: KVSpec | None = None
    techniques: tuple[Technique, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)

    def with_kv(self, name: str | None) -> Recipe:
        """The same recipe with another format for K and V; None keeps its own."""
        return self if name is None else replace(self, kv=_kv({"format": name}, "--kv"))

    def with_head(self, name: str | None) -> Recipe:
        """The same recipe with the weights of the language-model head in another format; None keeps its own.

        Raises:
            RecipeError: no such format for a head.
        """
        if name is None:
            return self
        if name not in HEADS:
            raise RecipeError(f"--head {name}: {nearest_name(name, HEADS)}")
        return replace(self, rules=(Rule("lm_head", QuantSpec(FORMATS[HEADS[name]])), *self.rules))

    @property
    def auto(self) -> auto.Settings | None:
        """The technique that makes the rules by measuring; None: the rules are there."""
        return next((t for t in self.techniques if isinstance(t, auto.Settings)), None)

    @property
    def splitting(self) -> svdquant.Settings | None:
        """The technique that puts a branch beside each quantized linear; None: there is none."""
        return next((t for t in self.techniques if isinstance(t, svdquant.Settings)), None)

    def with_method(self, name: str | None) -> Recipe:
        """The same recipe with another method for the range of calibrated scales; None keeps its own.

        Raises:
            RecipeError: no such method.
        """
        if name is None:
            return self
        if name not in get_args(Method):
            raise RecipeError(f"--method {name}: {nearest_name(name, get_args(Method))}")
        return replace(self, calibration=replace(self.calibration, method=cast("Method", name)))

    def resolve(self, spec: DecoderSpec) -> dict[str, QuantSpec]:
        """QuantSpec by linear; linears that stay as they are are absent.

        Raises:
            RecipeError: a rule decides nothing.
            UnsupportedError: a layer does not divide into the blocks of its format.
        """
        decided: dict[str, QuantSpec] = {}
        used: set[int] = set()
        for linear in spec.linears():
            for number, rule in enumerate(self.rules):
                if fnmatch.fnmatchcase(linear.name, rule.match):
                    used.add(number)
                    if rule.quant.weight is not None:
                        _check_fits(linear, rule.quant)
                        decided[linear.name] = self._with_branch(linear, rule.quant)
                    break
        for number, rule in enumerate(self.rules):
            if number not in used:
                _refuse_idle(rule, number, spec)
        return decided

    def _with_branch(self, linear: LinearShape, quant: QuantSpec) -> QuantSpec:
        if self.splitting is None or linear.name == "lm_head":
            return quant
        rank, smaller = self.splitting.rank, min(linear.in_features, linear.out_features)
        if 4 * rank > smaller:
            raise UnsupportedError(
                f"{linear.name}: a branch of rank {rank} is no small part of {linear.out_features} x "
                f"{linear.in_features}; give svdquant a rank of at most {smaller // 4}"
            )
        return replace(quant, lowrank=rank)


AS_IT_WAS = Recipe("as it was", "", ())
"""The recipe that changes nothing, to begin from."""


def built_in() -> dict[str, str]:
    """Every built-in recipe with its first comment line."""
    found = sorted((f for f in _BUILT_IN.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf8").splitlines()[0].lstrip("# ") for f in found}


def read_recipe(name: str) -> Recipe:
    """A built-in recipe by its name, or a YAML file by its path.

    Raises:
        RecipeError: no such recipe, or something wrong in it; the message names the place.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        try:
            return parse_recipe(path.stem, path.read_text("utf8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {name} cannot be read: {error}") from None
    if name not in (known := built_in()):
        raise RecipeError(f"unknown recipe '{name}'; {nearest_name(name, known)} (a file's name ends in .yaml)")
    return parse_recipe(name, (_BUILT_IN / f"{name}.yaml").read_text("utf8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """A recipe from YAML.

    Raises:
        RecipeError: see `read_recipe`.
    """
    try:
        raw = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"recipe {name} is not YAML: {' '.join(str(error).split())}") from None
    top = _object(raw, name, ("rules", "kv", "techniques", "calib"))
    rules = _list(top.get("rules"), f"{name}: rules")
    recipe = Recipe(
        name=name,
        text=text,
        rules=tuple(_rule(rule, f"{name}: rules[{number}]") for number, rule in enumerate(rules)),
        kv=_kv(top["kv"], f"{name}: kv") if top.get("kv") is not None else None,
        techniques=tuple(
            _technique(t, f"{name}: techniques[{n}]") for n, t in enumerate(_list(top.get("techniques"), name))
        ),
        calibration=_calibration(top.get("calib") or {}, f"{name}: calib"),
    )
    kinds = [type(t) for t in recipe.techniques]
    if twice := next((k for k in kinds if kinds.count(k) > 1), None):
        raise RecipeError(f"{name}: technique {twice.__module__.rpartition('.')[2]} stands twice")
    if recipe.auto is not None and recipe.splitting is not None:
        raise RecipeError(f"{name}: auto cannot count the branches of svdquant; run svdquant on the recipe it made")
    if rules and recipe.auto is not None:
        raise RecipeError(f"{name}: auto makes the rules; leave them out")
    if not rules and "kv" not in top and recipe.auto is None:
        raise RecipeError(f"recipe {name} has neither rules nor kv: it would change nothing")
    return recipe


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are checked."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _object(raw: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected keys ({', '.join(known)}), got {raw!r}")
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; {nearest_name(str(key), known)}")
    return raw


def _list(raw: Any, where: str) -> list[Any]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise RecipeError(f"{where}: expected a list, got {raw!r}")
    return raw


def _format(raw: Any, where: str) -> Format | None:
    if raw is None or raw == "none":
        return None
    if not isinstance(raw, str):
        raise RecipeError(f"{where}: expected the name of a format or none, got {raw!r}")
    try:
        return format_named(raw)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _rule(raw: Any, where: str) -> Rule:
    fields = _object(raw, where, ("match", "weight", "input", "input_scale"))
    if not isinstance(fields.get("match"), str) or "weight" not in fields:
        raise RecipeError(f"{where}: needs 'match' (a pattern) and 'weight' (a format, or none)")
    weight, given = _format(fields["weight"], f"{where}: weight"), _format(fields.get("input"), f"{where}: input")
    scale = fields.get("input_scale", "dynamic")
    if scale not in get_args(InputScale):
        raise RecipeError(f"{where}: input_scale is {scale!r}; known: {', '.join(get_args(InputScale))}")
    if given is None:
        if fields.get("input_scale") not in (None, "dynamic"):
            raise RecipeError(f"{where}: input_scale {scale} without an input format")
        return Rule(fields["match"], QuantSpec(weight))
    if weight is None:
        raise RecipeError(f"{where}: an input format needs a weight format")
    if problem := _input_problem(given, scale):
        raise RecipeError(f"{where}: {problem}")
    return Rule(fields["match"], QuantSpec(weight, given, scale))


def _input_problem(fmt: Format, scale: str) -> str | None:
    """Why an input cannot be rounded so, if it cannot: a token's numbers must not depend on its neighbours."""
    if fmt.zero or fmt.block[0] not in (1, ALL):
        return f"inputs cannot be {fmt}"
    if fmt.outer != (scale == "outer"):
        return f"{fmt} inputs need input_scale: {'outer' if fmt.outer else 'static or dynamic'}"
    if (fmt.block == (ALL, ALL)) != (scale == "static"):
        need = "static (one scale for all tokens)" if fmt.block == (ALL, ALL) else "dynamic (a scale for each token)"
        return f"{fmt} inputs need input_scale: {need}"
    return None


def _kv(raw: Any, where: str) -> KVSpec:
    fields = _object(raw, where, ("format", "scale"))
    name = fields.get("format")
    if not isinstance(name, str) or name not in KV_FORMATS:
        raise RecipeError(f"{where}: K and V format {name!r} is unknown; known: {', '.join(KV_FORMATS)}")
    if fields.get("scale", "static") != "static":
        raise RecipeError(f"{where}: scale {fields['scale']!r} is unknown; known: static")
    return KVSpec(KV_FORMATS[name], KV_FORMATS[name])


def _technique(raw: Any, where: str) -> Technique:
    if not isinstance(raw, dict) or len(raw) != 1:
        raise RecipeError(f"{where}: expected one name with its settings, such as round_to_nearest: {{}}")
    ((name, settings),) = raw.items()
    try:
        return technique_named(str(name), settings or {})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _calibration(raw: Any, where: str) -> Calibration:
    fields = dict(_object(raw, where, ("samples", "length", "data", "seed", "method", "percentile")))
    for key, least in (("samples", 1), ("length", 1), ("seed", 0)):
        value = fields.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RecipeError(f"{where}: {key} is {value!r}, expected a whole number of at least {least}")
    if (method := fields.get("method", "max")) not in get_args(Method):
        raise RecipeError(f"{where}: method is {method!r}; known: {', '.join(get_args(Method))}")
    percentile = fields.get("percentile", 99.99)
    if not isinstance(percentile, int | float) or isinstance(percentile, bool) or not 0 < percentile <= 100:
        raise RecipeError(f"{where}: percentile is {percentile!r}, expected a number above 0 and up to 100")
    if "percentile" in fields and method != "percentile":
        raise RecipeError(f"{where}: percentile without method: percentile")
    data = fields.pop("data", None)
    given = data if isinstance(data, list) else [] if data is None else [data]
    sources = []
    for item in given:
        if not isinstance(item, str):
            raise RecipeError(f"{where}: data is {item!r}, expected FILE or FILE:SHARE, or a list of them")
        sources.append(source_of(item, f"{where}: data"))
    return Calibration(**fields, data=tuple(sources))


def source_of(text: str, where: str) -> Source:
    """``FILE`` or ``FILE:SHARE``, as recipes and ``--calib`` have it.

    Raises:
        RecipeError: the share is not a number above 0.
    """
    name, colon, share = text.rpartition(":")
    try:
        number = float(share)
    except ValueError:
        return Source(Path(text))
    if not colon or Path(text).exists():
        return Source(Path(text))
    if not (number > 0 and math.isfinite(number)):
        raise RecipeError(f"{where}: the share of {name} is {share}, expected a number above 0")
    return Source(Path(name), number)


def _check_fits(linear: LinearShape, quant: QuantSpec) -> None:
    for fmt in (quant.weight, quant.input):
        try:
            if fmt is not None:
                check_fits(fmt, (linear.out_features, linear.in_features))
        except UnsupportedError as error:
            raise UnsupportedError(f"{linear.name}: {error}") from None


def _refuse_idle(rule: Rule, number: int, spec: DecoderSpec) -> None:
    names = [linear.name for linear in spec.linears()]
    if any(fnmatch.fnmatchcase(name, rule.match) for name in names):
        raise RecipeError(f"rules[{number}] '{rule.match}' decides nothing: earlier rules match all of its layers")
    raise RecipeError(f"rules[{number}] '{rule.match}' matches no layer; {nearest_name(rule.match, names[:8])}")


def summary(decided: Mapping[str, QuantSpec], spec: DecoderSpec) -> list[tuple[str, str]]:
    """Groups of linears with the same numerics, layer numbers left out: (``layers.*.attn.q …``, what they get)."""
    groups: dict[str, dict[str, None]] = {}
    for linear in spec.linears():
        groups.setdefault(str(decided.get(linear.name, QuantSpec())), {})[group_name(linear.name)] = None
    return [(", ".join(names), kind) for kind, names in groups.items()]


def group_name(linear: str) -> str:
    """``layers.3.attn.q`` to ``layers.*.attn.q``, ``layers.3.mlp.experts.7.up`` to ``layers.*.mlp.experts.*.up``."""
    return f"layers.*.{role_of(linear)}" if linear.startswith("layers.") else linear
