"""Canonical names to a checkpoint's own, by the family's table."""

from __future__ import annotations

import re

from fewbit.checkpoint.files import Files
from fewbit.spec.decoder import DecoderSpec, LinearShape
from fewbit.spec.families import Family

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Names:
    """The names of one model's modules."""

    def __init__(self, family: Family, spec: DecoderSpec) -> None:
        self._table = dict(family.NAMES)
        self.dropped = family.DROPPED + (("lm_head.weight",) if spec.tied else ())

    def module(self, canonical: str) -> str:
        """``layers.3.attn.q`` to ``model.layers.3.self_attn.q_proj``."""
        first, _, rest = canonical.partition(".")
        if first != "layers":
            return self._table[canonical]
        index, _, rest = rest.partition(".")
        expert = _EXPERT.search(rest)
        role = _EXPERT.sub(".experts.{e}.", rest)
        return self._table[f"layers.{{i}}.{role}"].format(i=index, e=expert and expert[1])

    def tensor(self, canonical: str) -> str:
        """``layers.3.attn.q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
        module, _, leaf = canonical.rpartition(".")
        return f"{self.module(module)}.{leaf}"


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
