"""Canonical names to a checkpoint's own, by the family's table."""

from __future__ import annotations

import re

from fewbit.checkpoint.files import Files
from fewbit.spec.decoder import DecoderSpec, LinearShape
from fewbit.spec.families import Family
from fewbit.spec.part import Part

_JOINED = ((re.compile(r"\.[qkv]_proj$"), ".qkv_proj"), (re.compile(r"\.(gate|up)_proj$"), ".gate_up_proj"))
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Names:
    """The names of one model's modules."""

    def __init__(self, family: Family, spec: DecoderSpec) -> None:
        self._table = {**family.NAMES, **(family.names(spec) if hasattr(family, "names") else {})}
        self.dropped = family.DROPPED + (("lm_head.weight",) if spec.tied else ())

    def module(self, canonical: str) -> str:
        """``layers.3.attn.q`` to ``model.layers.3.self_attn.q_proj``, or to the module that it shares with others."""
        found = self._entry(canonical)
        if found is None:
            raise KeyError(canonical)
        return found.module if isinstance(found, Part) else found

    def tensor(self, canonical: str) -> str:
        """``layers.3.attn.q.weight`` to ``model.layers.3.self_attn.q_proj.weight``, while it is not quantized."""
        module, _, leaf = canonical.rpartition(".")
        own = self._entry(canonical)
        if own is None:
            return f"{self.module(module)}.{leaf}"
        return own.module if isinstance(own, Part) else own

    def part(self, canonical: str) -> Part | None:
        """What the table says of a linear or a tensor that lies with others or otherwise, for this layer."""
        found = self._entry(canonical)
        return found if isinstance(found, Part) else None

    def _entry(self, canonical: str) -> str | Part | None:
        first, _, rest = canonical.partition(".")
        if first != "layers":
            return self._table.get(canonical)
        index, _, rest = rest.partition(".")
        expert = _EXPERT.search(f"{rest}.")
        role = rest.replace(f".experts.{expert[1]}", ".experts.{e}") if expert else rest
        found = self._table.get(f"layers.{{i}}.{role}")
        if found is None:
            return None
        at = {"i": index, "e": expert and expert[1]}
        if isinstance(found, str):
            return found.format(**at)
        owner = f"layers.{index}"
        return Part(
            found.module.format(**at),
            tuple(f"{owner}.{name.format(**at)}" for name in found.of),
            found.turns,
            found.transposed,
            found.stacked,
        )


def packed_linears(files: Files, spec: DecoderSpec, names: Names, suffix: str) -> list[LinearShape]:
    """The linears of a quantized model that are stored packed, for formats whose config does not name them.

    One is left dense where its plain weight lies there, and no packed one; where neither does, a packed one is missed.
    A head is packed only if it says so.
    """
    found = []
    for linear in spec.linears():
        module = names.module(linear.name)
        packed, plain = f"{module}.{suffix}" in files.entries, f"{module}.weight" in files.entries
        if packed or not (plain or linear.name == "lm_head"):
            found.append(linear)
    return found


def spellings(module: str) -> tuple[str, ...]:
    """What a config may call a module: its own name, and that of the joined one which engines make it part of."""
    return (module, *(pattern.sub(joined, module) for pattern, joined in _JOINED if pattern.search(module)))
