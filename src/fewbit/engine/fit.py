"""What running a model takes, before anything is allocated: the one sum behind plan, loading and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fewbit.engine.config import STEP_TOKENS
from fewbit.errors import UnsupportedError
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.ops.device import arithmetic_dtype, device_info
from fewbit.ops.linear import LinearProblem, choose
from fewbit.ops.linear.gpu import GpuKernel
from fewbit.spec.decoder import DecoderSpec

_GRAPHS = 64 << 20  # that recorded steps and the GPU's own bookkeeping were seen to take
_GIB = 2.0**30


@dataclass(frozen=True)
class Need:
    """Bytes: weights as the kernels hold them, K and V, the largest step's workspace, recorded graphs."""

    weights: int
    kv: int
    workspace: int
    graphs: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.kv + self.workspace + self.graphs

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("K/V", self.kv), ("workspace", self.workspace), ("graphs", self.graphs))
        text = " + ".join(f"{name} {size / _GIB:.1f}" for name, size in parts if size or name != "graphs")
        return f"{text} = {self.total / _GIB:.1f} GiB"


def kv_bytes_per_token(spec: DecoderSpec, kv: Mapping[int, KVSpec], dtype: torch.dtype) -> int:
    """Bytes that K and V of one token take, over all layers."""
    total = 0
    for index, layer in enumerate(spec.layers):
        numbers = layer.attention.kv_heads * layer.attention.head_dim
        stored = kv.get(index)
        bits = [dtype.itemsize * 8] * 2 if stored is None else [stored.k.element.bits, stored.v.element.bits]
        total += numbers * sum(bits) // 8
    return total


def need(
    spec: DecoderSpec, quant: Mapping[str, QuantSpec], kv: Mapping[int, KVSpec], stored: torch.dtype,
    device: torch.device, batch: int, cached: int, step_tokens: int | None = None, backend: str = "auto",
) -> Need:  # fmt: skip
    """What a model takes with `batch` sequences, and `cached` tokens of theirs in the cache.

    Args:
        spec: its shape.
        quant: the numerics of its linears.
        kv: of K and V, by layer.
        stored: dtype of what is not quantized.
        device: where it would run.
        batch: sequences at a time.
        cached: tokens of all of them together.
        step_tokens: most tokens of a step; None: the engine's default there.
        backend: as in `fewbit.model.load`.

    Raises:
        UnsupportedError: `backend` cannot run it.
    """
    info, dtype = device_info(device), arithmetic_dtype(device, stored)
    weights, scratch = spec.vocab * spec.hidden * stored.itemsize, 0  # the embedding
    for linear in spec.linears():
        problem = LinearProblem(
            quant.get(linear.name, QuantSpec()), linear.out_features, linear.in_features, dtype, info, stored=stored
        )  # fmt: skip
        kernel = choose(problem, backend).kernel
        if linear.name == "lm_head" and spec.tied and kernel.device == "cuda":
            continue  # it reads the embedding itself
        weights += kernel.weight_bytes(problem)
        if isinstance(kernel, GpuKernel) and kernel.decodes:
            scratch = max(scratch, 2 * linear.out_features * linear.in_features * 2)  # two at a time, in bfloat16
    widest = max(max(layer.mlp.width, spec.hidden) for layer in spec.layers)
    tokens = STEP_TOKENS[device.type] if step_tokens is None else step_tokens
    workspace = tokens * widest * 6 * dtype.itemsize + max(batch, 1) * spec.vocab * 4 * 3 + scratch
    return Need(
        weights, kv_bytes_per_token(spec, kv, stored) * cached, workspace, _GRAPHS if info.kind == "cuda" else 0
    )


def check_fit(needed: Need, free: int, what: str, others: Iterable[tuple[str, Need]]) -> None:
    """Raise if something does not fit.

    Args:
        needed: what it takes.
        free: bytes that can be had.
        what: its settings in words.
        others: settings in words that may do instead, best first, and what they take; read only if they are wanted.

    Raises:
        UnsupportedError: the sum, and up to three settings that would fit.
    """
    if needed.total <= free:
        return
    ways = [text for text, other in others if other.total <= free][:3]
    if len(ways) < 3:
        ways.append(f"a device with {needed.total / _GIB:.1f} GiB free")
    raise UnsupportedError(
        f"{what} does not fit: {needed}, free {free / _GIB:.1f} GiB; what would fit: {'; '.join(ways)}"
    )
