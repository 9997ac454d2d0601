"""How a family says that several of our linears lie in one tensor of its files, or otherwise than [out, in]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QKV = ("attn.q", "attn.k", "attn.v")
GATE_UP = ("mlp.gate", "mlp.up")


@dataclass(frozen=True)
class Part:
    """Where a linear of a layer lies, if not in a module of its own; the value of an entry of a family's ``NAMES``.

    An entry for a linear (``layers.{i}.attn.q``) holds however it is stored. One for a tensor of it
    (``layers.{i}.attn.q.weight``) holds while the linear is not quantized: a quantized one lies [out, in] in the module
    that ``NAMES`` gives for the linear.

    Attributes:
        module: the stored module, or the stored tensor.
        of: the linears whose rows lie in it, in this order, by their names in the layer.
        turns: how they follow each other: one after another; or of each K/V head the query heads that read it, its key
            and its value; or row by row.
        transposed: the weight is stored [in, out].
        stacked: it holds all experts, [experts, ...].
    """

    module: str
    of: tuple[str, ...]
    turns: Literal["one", "kv_heads", "rows"] = "one"
    transposed: bool = False
    stacked: bool = False


def joined(module: str, of: tuple[str, ...], turns: Literal["one", "kv_heads", "rows"] = "one") -> dict[str, Part]:
    """Entries of ``NAMES`` for linears whose rows lie in one module."""
    return {f"layers.{{i}}.{name}": Part(module, of, turns) for name in of}
