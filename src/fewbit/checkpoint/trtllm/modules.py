"""Which linears lie in which tensor of a TensorRT-LLM checkpoint, and how the ranks share it.

A module holds the rows of its members one after another; experts are stacked on an axis before. Ranks of one pipeline
stage cut a module's rows (q, k, v each by itself) or its columns, and stages take layers in equal, contiguous shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fewbit.checkpoint.layout import Shape, Stored
from fewbit.numerics.format import ALL, Format
from fewbit.spec.decoder import MLP, DecoderSpec, MoE

ROWS, COLUMNS = "rows", "columns"
LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "weight_scale": "weights_scaling_factor",
    "weight_scale_2": "weights_scaling_factor_2",
    "input_scale": "activation_scaling_factor",
    "pre_quant_scale": "prequant_scaling_factor",
}
"""Last names of tensors in Model Optimizer's Hugging Face layout to those here."""
PER_CHANNEL = "per_channel_scale"
"""What ``weights_scaling_factor`` is called for FP8 with a scale a row."""


@dataclass(frozen=True)
class Parallel:
    """Over how many ranks a model is split: `tp` in each of `pp` pipeline stages; rank = stage * tp + its place."""

    tp: int = 1
    pp: int = 1

    def stage(self, layer: int, layers: int) -> int:
        """The pipeline stage of a layer."""
        return layer // (layers // self.pp)


@dataclass(frozen=True)
class Module:
    """A fused module.

    Attributes:
        name: in its rank's file, where layers count from 0 in every stage.
        title: with the layer's number in the whole model.
        stage: its pipeline stage.
        members: canonical names of the linears whose rows it holds, in order.
        rows: of each member.
        split: what tensor-parallel ranks cut: `ROWS`, `COLUMNS`, or nothing.
        expert: which one of `experts` the members belong to; None: no mixture.
    """

    name: str
    title: str
    stage: int
    members: tuple[str, ...]
    rows: tuple[int, ...]
    split: str | None = None
    expert: int | None = None
    experts: int = 0


@dataclass(frozen=True)
class Sharing:
    """Linears that must have scales in common.

    Attributes:
        weights: they need one scale of the whole weight, where the format has one.
        inputs: they need one calibrated scale of their input.
        fused: they lie in one tensor; else TensorRT-LLM joins them when it builds an engine, and only those with a
            scale of the whole weight.
    """

    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    fused: bool = True


def modules(spec: DecoderSpec, parallel: Parallel) -> Iterator[Module]:
    """Every module, in the order of a forward pass. Norms, embedding and routers are modules of one member."""
    last = parallel.pp - 1
    rows = {linear.name: linear.out_features for linear in spec.linears()}

    def module(name: str, stage: int, *members: str, split: str | None = None, title: str = "") -> Module:
        sizes = tuple(rows.get(member, 0) for member in members)
        return Module(name, title or name, stage, members, sizes, split)

    yield module("transformer.vocab_embedding", 0, "embed", split=ROWS)
    for index, layer in enumerate(spec.layers):
        stage, p = parallel.stage(index, len(spec.layers)), f"layers.{index}"
        here = f"transformer.layers.{index - stage * (len(spec.layers) // parallel.pp)}"

        def of(name: str, *members: str, split: str | None = None) -> Module:
            title = f"transformer.layers.{index}.{name}"  # noqa: B023  # used in this turn alone
            return module(f"{here}.{name}", stage, *members, split=split, title=title)  # noqa: B023

        yield of("input_layernorm", f"{p}.pre_attn")
        yield of("attention.qkv", *(f"{p}.attn.{n}" for n in "qkv"), split=ROWS)
        if layer.attention.qk_norm:
            yield of("attention.q_layernorm", f"{p}.attn.q_norm")
            yield of("attention.k_layernorm", f"{p}.attn.k_norm")
        yield of("attention.dense", f"{p}.attn.o", split=COLUMNS)
        yield of("post_layernorm", f"{p}.pre_mlp")
        if isinstance(layer.mlp, MoE):
            yield of("mlp.router", f"{p}.mlp.router")
            count = layer.mlp.experts
            for e in range(count):
                name = f"{p}.mlp.experts.{e}"
                for joined in (
                    of("mlp.fc", f"{name}.up", f"{name}.gate", split=ROWS),
                    of("mlp.proj", f"{name}.down", split=COLUMNS),
                ):
                    yield Module(**{**vars(joined), "expert": e, "experts": count})
        else:
            yield of("mlp.fc", f"{p}.mlp.gate", split=ROWS)
            yield of("mlp.gate", f"{p}.mlp.up", split=ROWS)
            yield of("mlp.proj", f"{p}.mlp.down", split=COLUMNS)
    yield module("transformer.ln_f", last, "final_norm")
    yield module("lm_head", last, "lm_head", split=ROWS)


def axes(leaf: str, dims: int) -> tuple[str, ...]:
    """What the axes of one member's tensor count: rows of the weight, columns, or blocks of either."""
    if leaf == "pre_quant_scale":
        return (COLUMNS,)
    return (ROWS, COLUMNS)[:dims]


def rank_shape(module: Module, leaf: str, parts: list[Stored], tp: int, scalar: Shape) -> Stored:
    """One rank's tensor of a module, of each member's; `scalar`: the shape of a single number."""
    first = parts[0]
    kinds = axes(leaf, len(first.shape))
    shape = list(first.shape)
    if ROWS in kinds:
        shape[kinds.index(ROWS)] = sum(part.shape[kinds.index(ROWS)] for part in parts)
    if module.split in kinds:
        at = kinds.index(module.split)
        shape[at] = -(-shape[at] // tp)
    whole = tuple(shape) if kinds else scalar
    if module.expert is not None and leaf != "input_scale":
        whole = (module.experts, *whole)
    return Stored(first.dtype, whole)


def sharing(spec: DecoderSpec) -> Iterator[Sharing]:
    """What linears must have together."""
    for index, layer in enumerate(spec.layers):
        p = f"layers.{index}"
        qkv = tuple(f"{p}.attn.{n}" for n in "qkv")
        yield Sharing(qkv, qkv)
        if isinstance(layer.mlp, MLP):
            pair = (f"{p}.mlp.gate", f"{p}.mlp.up")
            yield Sharing(pair, pair, fused=False)
            continue
        names = [f"{p}.mlp.experts.{e}" for e in range(layer.mlp.experts)]
        for name in names:
            yield Sharing((f"{name}.gate", f"{name}.up"), ())
        yield Sharing((), tuple(f"{name}.{n}" for name in names for n in ("gate", "up")))
        yield Sharing((), tuple(f"{name}.down" for name in names))


def why_not_split(spec: DecoderSpec, weights: dict[str, Format], parallel: Parallel) -> str | None:
    """None: the model can be split so; else what stands in the way."""
    tp, pp = parallel.tp, parallel.pp
    if tp < 1 or pp < 1:
        return f"--tp {tp} --pp {pp}: expected at least one rank"
    if len(spec.layers) % pp:
        return f"{len(spec.layers)} layers do not divide into {pp} pipeline stages; choose another --pp"
    for index, layer in enumerate(spec.layers):
        a, width = layer.attention, layer.mlp.width
        for count, what in ((a.heads, "attention heads"), (a.kv_heads, "key/value heads"), (width, "MLP columns")):
            if count % tp:
                return f"layer {index}: {count} {what} do not divide over {tp} ranks; choose another --tp"
    shapes = {linear.name: linear for linear in spec.linears()}
    split = {name: module.split for module in modules(spec, Parallel()) for name in module.members}
    for name, fmt in weights.items():
        rows, columns = shapes[name].out_features, shapes[name].in_features
        if split[name] == ROWS and rows % tp:
            return f"{name}: its {rows} rows do not divide over {tp} ranks; choose another --tp"
        if split[name] == COLUMNS and fmt.block[1] != ALL and columns // tp % fmt.block[1]:
            return (
                f"{name}: {columns} columns over {tp} ranks cut through groups of {fmt.block[1]}; choose another --tp"
            )
        if fmt.element.bits == 4 and split[name] == ROWS and rows // tp % 2:
            return f"{name}: {rows} rows over {tp} ranks are odd, and INT4 is packed by pairs; choose another --tp"
    return None
