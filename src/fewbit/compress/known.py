"""Modules whose structure is known: transformers' decoders of the families that fewbit reads.

What makes the input of each linear is then known too, so techniques can move scales there instead of into prescales,
and the module can be written as a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.checkpoint.names import Names
from fewbit.compress.fake import FakeLinear
from fewbit.compress.stats import Block, Stats
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, by_input, key_of
from fewbit.spec.families import Family, families
from fewbit.spec.hfconfig import HFConfig


@dataclass(frozen=True)
class Known:
    """A module and what it is.

    Attributes:
        module: a decoder.
        family: whose names it uses.
        spec: its shape.
        config: what its config.json says.
    """

    module: nn.Module
    family: Family
    spec: DecoderSpec
    config: dict[str, Any]

    @property
    def names(self) -> Names:
        """Canonical names to the module's."""
        return Names(self.family, self.spec)

    def tensor(self, canonical: str) -> Tensor:
        """A parameter by its canonical name."""
        owner, _, leaf = canonical.rpartition(".")
        found = getattr(self.module.get_submodule(self.names.module(owner)), leaf)
        assert isinstance(found, Tensor)
        return found

    def together(self) -> list[list[str]]:
        """Linears that read one input, by their names in the module."""
        inner = (linear for linear in self.spec.linears() if linear.name != "lm_head")
        return [[self.names.module(linear.name) for linear in group] for group in by_input(inner)]

    def blocks(self, quant: Mapping[str, QuantSpec], stats: Mapping[str, Stats]) -> Iterator[Block]:
        """One block a layer, in float32; those of which a linear was never run are left out.

        Args:
            quant: QuantSpec by linear, by their names in the module.
            stats: statistics by linear.
        """
        for index, layer in enumerate(self.spec.layers):
            linears = {shape.name: self.names.module(shape.name) for shape in self.spec.layer_linears(index)}
            wanted = {name: quant[source] for name, source in linears.items() if source in quant}
            if not wanted or any(linears[name] not in stats for name in wanted):
                continue
            tensors = {name: self.tensor(name) for name in self.spec.layer_tensors(index)}
            copies = {name: t.detach().float().clone() for name, t in tensors.items()}
            yield Block(
                index,
                layer,
                wanted,
                weights={name: copies[f"{name}.weight"] for name in linears},
                norms={key_of(name): copies[name] for name in self.spec.layer_vectors(index)},
                dtype=tensors[f"layers.{index}.attn.o.weight"].dtype,
                biases={name: copies[f"{name}.bias"] for name in linears if f"{name}.bias" in copies},
                stats={name: stats[source] for name, source in linears.items() if name in wanted},
            )

    def store(self, block: Block) -> None:
        """Put the weights, biases and norms of a block into the module."""
        for name in self.spec.layer_tensors(block.index):
            owner, _, leaf = name.rpartition(".")
            if owner in block.weights:
                new = block.biases[owner] if leaf == "bias" else block.weights[owner]
            else:
                new = block.norms[key_of(name)]
            self.tensor(name).copy_(new)


def known(module: nn.Module) -> Known | None:
    """What a module is, if it is a decoder of transformers that fewbit can read; else None.

    Raises:
        UnsupportedError: it is a mixture whose experts are no linears of their own, which would be left out.
    """
    name, config = type(module).__name__, getattr(module, "config", None)
    family = next((f for f in families().values() if name in f.ARCHITECTURES), None)
    if family is None or config is None or not hasattr(config, "to_json_string"):
        return None
    words = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [name]}
    try:
        spec = family.read(HFConfig(words))
    except (CheckpointError, UnsupportedError):
        return None
    found = Known(module, family, spec, words)
    try:
        linears = [module.get_submodule(found.names.module(linear.name)) for linear in spec.linears()]
        biased = [
            (linear.bias is not None) == shape.bias for linear, shape in zip(linears, spec.linears(), strict=True)
        ]
        fits = all(biased) and all(found.tensor(n).shape == torch.Size(shape) for n, shape in spec.tensors().items())
    except AttributeError:
        if not spec.routers():
            return None
        raise UnsupportedError(
            f"{name} holds all experts of a layer in one tensor, of which nothing could be quantized; save the model "
            "and compress its directory: fewbit compress DIR"
        ) from None
    return found if fits and {type(linear) for linear in linears} <= {nn.Linear, FakeLinear} else None
