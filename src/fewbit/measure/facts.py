"""What a model directory holds and what it will need, from its headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fewbit.checkpoint import Checkpoint
from fewbit.checkpoint.acceptance import loaders
from fewbit.checkpoint.layout import Quantization
from fewbit.compress import Plan, bits_per_weight, group_name, summary
from fewbit.engine.fit import kv_bytes_per_token, need
from fewbit.model.load import Loader, choices
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.quantspec import InputScale, QuantSpec
from fewbit.ops.attention.cpu import why_not as attention_why_not
from fewbit.ops.device import arithmetic_dtype, device_info
from fewbit.ops.linear import LinearProblem, choose


@dataclass(frozen=True)
class Facts:
    """What `fewbit inspect` says.

    Attributes:
        architecture: the name in config.json.
        parameters: weights, a tied head counted once.
        linear_parameters: those of the linears of the layers (and of an untied head).
        layers, hidden, heads, kv_heads, head_dim, vocab, context: the decoder's sizes (heads of the first layer).
        format: the file format.
        dtype: of what is not quantized.
        groups: linears with the same numerics, and what these are.
        quantized_linears: how many linears are quantized.
        bits_per_weight: true bits per weight of the quantized linears (of all where none is).
        file_bytes: all tensors.
        kv: how K and V are stored.
        kv_bytes_per_token: of all layers.
        carried: tokenizer and other files beside the weights.
        engines: engines of the acceptance table, with their version, and why they do not load it; None: they do.
        remarks: what a user should know of how the files are read.
    """

    architecture: str
    parameters: int
    linear_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    format: str
    dtype: str
    groups: tuple[tuple[str, str], ...]
    quantized_linears: int
    bits_per_weight: float
    file_bytes: int
    kv: str
    kv_bytes_per_token: int
    carried: tuple[str, ...]
    engines: tuple[tuple[str, str, str | None], ...]
    remarks: tuple[str, ...]


def inspect(checkpoint: Checkpoint) -> Facts:
    """The facts of an open checkpoint."""
    spec, first = checkpoint.spec, checkpoint.spec.layers[0].attention
    linears = [linear for linear in spec.linears() if not (linear.name == "lm_head" and spec.tied)]
    plain = checkpoint.format == "hf" and not checkpoint.quant and not checkpoint.kv
    kv = ", ".join(dict.fromkeys(str(v) for v in checkpoint.kv.values())) or _short(checkpoint.dtype)
    return Facts(
        architecture=checkpoint.config["architectures"][0],
        parameters=spec.parameters,
        linear_parameters=sum(linear.out_features * linear.in_features for linear in linears),
        layers=len(spec.layers),
        hidden=spec.hidden,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        vocab=spec.vocab,
        context=spec.context,
        format="unquantized Hugging Face" if plain else checkpoint.format,
        dtype=_short(checkpoint.dtype),
        groups=tuple(summary(checkpoint.quant, spec)),
        quantized_linears=len(checkpoint.quant),
        bits_per_weight=bits_per_weight(checkpoint),
        file_bytes=sum(map(checkpoint.tensors.nbytes, checkpoint.tensors)),
        kv=kv,
        kv_bytes_per_token=kv_bytes_per_token(spec, checkpoint.kv, checkpoint.dtype),
        carried=tuple(checkpoint.files),
        engines=tuple(loaders(checkpoint.format, Quantization(checkpoint.quant, checkpoint.kv))),
        remarks=checkpoint.remarks,
    )


@dataclass(frozen=True)
class Memory:
    """What `fewbit plan` says, in bytes.

    Attributes:
        weights: as the chosen kernels hold them.
        files: the weights on disk.
        kv_per_token: K and V of one token.
        kv: of `batch` sequences of `context` tokens.
        workspace: activations of one step and its logits, an upper estimate; on a GPU with recorded graphs.
        total: weights, K and V, and workspace.
        device: which device it is held against.
        available: what is free there.
        longest_context: tokens a sequence can have at this batch, at most what the model was made for.
        largest_batch: sequences of `context` tokens that fit.
    """

    weights: int
    files: int
    kv_per_token: int
    kv: int
    workspace: int
    total: int
    device: str
    available: int
    batch: int
    context: int
    longest_context: int
    largest_batch: int

    @property
    def fits(self) -> bool:
        """Whether the sum is no more than what is free."""
        return self.total <= self.available


def memory(checkpoint: Checkpoint, planned: Plan | None, device: torch.device, batch: int, context: int) -> Memory:
    """What running a model takes, as it is or as a recipe would make it.

    Args:
        checkpoint: the model.
        planned: what a recipe would do to it; None: the model as it is.
        device: where it would run.
        batch: sequences at a time.
        context: tokens of each.
    """
    spec = planned.spec if planned else checkpoint.spec
    quant: Mapping[str, QuantSpec] = planned.quant if planned else checkpoint.quant
    kv = planned.kv if planned else checkpoint.kv
    info = device_info(device)
    takes = need(spec, quant, kv, checkpoint.dtype, device, batch, batch * context)
    files = 0
    for linear in spec.linears():
        if linear.name != "lm_head" or not spec.tied:
            numbers, kind = linear.out_features * linear.in_features, quant.get(linear.name, QuantSpec())
            files += int(numbers * file_bits(kind, numbers, linear.in_features, checkpoint.dtype) / 8)
    embed = spec.vocab * spec.hidden * checkpoint.dtype.itemsize
    per_token = kv_bytes_per_token(spec, kv, checkpoint.dtype)
    room = max(info.free_bytes - takes.total + takes.kv, 0) // max(per_token, 1)
    return Memory(
        weights=takes.weights,
        files=files + embed,
        kv_per_token=per_token,
        kv=takes.kv,
        workspace=takes.workspace + takes.graphs,
        total=takes.total,
        device=str(info),
        available=info.free_bytes,
        batch=batch,
        context=context,
        longest_context=min(room // batch, spec.context),
        largest_batch=room // context,
    )


def file_bits(quant: QuantSpec, numbers: int, columns: int, dtype: torch.dtype) -> float:
    """Bits a weight of a linear takes on disk, scales and a branch beside it included."""
    fmt = quant.weight
    if fmt is None:
        return dtype.itemsize * 8
    out = numbers // columns
    rows, cols = (size if size > 0 else full for size, full in zip(fmt.block, (out, columns), strict=True))
    beside = quant.lowrank * (out + columns) * dtype.itemsize * 8 / numbers
    return fmt.element.bits + (fmt.scale_bits + fmt.zero_bits) / (rows * cols) + beside


@dataclass(frozen=True)
class Explained:
    """Linears that run alike: their numerics, their kernel, and each better kernel with its reason to decline.

    `remark`: what is to be known of how the kernel computes.
    """

    linears: tuple[str, ...]
    numerics: str
    kernel: str
    declined: tuple[tuple[str, str], ...]
    remark: str | None = None


def explain(checkpoint: Checkpoint, device: torch.device, backend: str = "auto") -> list[Explained]:
    """What `model.load` would choose on a device, by groups of linears."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...], str | None], dict[str, None]] = {}
    info, dtype = device_info(device), arithmetic_dtype(device, checkpoint.dtype)
    for linear, quant, choice in choices(checkpoint, device, backend):
        problem = LinearProblem(quant, linear.out_features, linear.in_features, dtype, info, stored=checkpoint.dtype)
        key = str(quant), choice.kernel.name, choice.declined, choice.kernel.remark(problem)
        groups.setdefault(key, {})[group_name(linear.name)] = None
    return [Explained(tuple(names), *key) for key, names in groups.items()]


def forward(checkpoint: Checkpoint, device: torch.device, backend: str = "auto") -> str:
    """How `model.load` would run the whole of it on a device, in words."""
    loader = Loader(checkpoint, device, backend)
    if device.type != "cpu":
        reason = loader.fused_why_not()
        return "fused, each decode step one CUDA graph" if reason is None else f"layer by layer; not fused: {reason}"
    for index, layer in enumerate(checkpoint.spec.layers):
        if reason := loader.cpu_why_not(index):
            return f"layer {index} call by call: {reason}"
        if reason := attention_why_not(layer.attention, loader.codec(index)):
            return f"each layer in C but for attention, which {reason}"
    return "each layer in C"


def support_table(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """For each numeric format the kernel of a weight-only linear, and of one with inputs in the same format."""
    info, rows = device_info(device), []
    for name, fmt in FORMATS.items():
        how: InputScale = "outer" if fmt.outer else "static" if fmt.block == (ALL, ALL) else "dynamic"
        kinds = [QuantSpec(fmt), QuantSpec(fmt, fmt, how)]
        if fmt.zero or fmt.block[0] > 1:
            kinds.pop()  # inputs have no zeros, and their blocks do not span tokens
        kernels = [choose(LinearProblem(kind, 4096, 4096, dtype, info)).kernel.name for kind in kinds]
        rows.append((name, kernels[0], kernels[1] if len(kernels) > 1 else "–"))
    return rows


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
