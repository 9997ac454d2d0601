"""Canonical names to a checkpoint's own, by the family's table."""

from __future__ import annotations

import re

from fewbit.spec.decoder import DecoderSpec
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
