"""What a decode step costs, by group of linears and format: a table measured on one device, with which `auto` plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.quantspec import KVSpec
from fewbit.spec.decoder import DecoderSpec, MoE, by_role, role_of

SCHEMA = 1


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step, measured by ``fewbit bench step``. Times of groups are taken to add up.

    Attributes:
        device: on which.
        shape: sizes of the model's layers and vocabulary, see `shape_of`.
        kv: the format of K and V; None: the model's own dtype.
        batch, context: sequences, and tokens of each that are in the cache.
        base: the candidate that all linears have where nothing else is said.
        fixed: all that does not depend on the number of layers.
        layer: one layer, all its linears as `base`.
        more: what a candidate adds to that (or, below zero, saves), by the first linear of a group and candidate.
        spread: by what part the rounds of one measurement differed at the most.
    """

    device: str
    shape: Mapping[str, int]
    kv: str | None
    batch: int
    context: int
    base: str
    fixed: float
    layer: float
    more: Mapping[str, Mapping[str, float]]
    spread: float

    def seconds(self, layers: int) -> float:
        """A step of a model of so many layers, all its linears as `base`."""
        return self.fixed + layers * self.layer

    def of(self, role: str, candidate: str) -> float:
        """What `candidate` adds in one layer for the linears that read one input, the first of which is `role`.

        Raises:
            RecipeError: the table does not hold it.
        """
        known = self.more[role]
        if candidate not in known:
            raise RecipeError(
                f"auto: the table of step times holds {', '.join(known)}, not {candidate}; measure it with fewbit "
                "bench step"
            )
        return known[candidate]

    def check(self, spec: DecoderSpec, kv: KVSpec | None, candidates: Sequence[str]) -> None:
        """Raise unless the table is of this model and holds the candidates.

        Raises:
            UnsupportedError: it is of another shape, or of K and V in another format.
            RecipeError: a candidate is missing.
        """
        groups = groups_of(spec)
        if (mine := shape_of(spec)) != self.shape:
            differ = ", ".join(f"{n} {self.shape.get(n)}, the model has {v}" for n, v in mine.items()
                               if self.shape.get(n) != v)  # fmt: skip
            raise UnsupportedError(f"auto: the step times were measured with {differ}; measure this model")
        asked, measured = (str(word or "the model's own dtype") for word in (kv, self.kv))
        if asked != measured:
            raise UnsupportedError(f"auto: the step times were measured with K and V in {measured}, not {asked}")

        for group in groups:
            for name in candidates:
                self.of(group[0], name)

    def write(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", "utf8")

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """Read a table.

        Raises:
            RecipeError: there is none, or it is not one.
        """
        try:
            raw: Any = json.loads(path.read_text("utf8"))
            if raw.pop("schema") != SCHEMA:
                raise ValueError(f"of schema {SCHEMA} is expected")
            made = cls(**raw)
            if not all(isinstance(d, dict) for d in (made.shape, made.more, *made.more.values())):
                raise ValueError("'shape' and 'more' are expected to be objects")
            return made
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecipeError(
                f"auto: {path} is no table of step times ({error}); make one with fewbit bench step"
            ) from None


def shape_of(spec: DecoderSpec) -> dict[str, int]:
    """The sizes on which a step's time depends, but for the number of layers."""
    first = spec.layers[0]
    m = first.mlp
    mixture = {"experts": m.experts, "top_k": m.top_k} if isinstance(m, MoE) else {"experts": 1, "top_k": 1}
    return {
        "hidden": spec.hidden, "width": first.mlp.width, "heads": first.attention.heads,
        "kv_heads": first.attention.kv_heads, "head_dim": first.attention.head_dim, "vocab": spec.vocab, **mixture,
    }  # fmt: skip


def groups_of(spec: DecoderSpec) -> list[tuple[str, ...]]:
    """The roles of a layer's linears in groups that read one input: ``attn.q``, ``attn.k``, ``attn.v`` and so on.

    Raises:
        UnsupportedError: layers have other linears than the first, whose time says nothing of theirs.
    """
    found = {
        tuple(
            tuple(dict.fromkeys(role_of(shape.name) for shape in group)) for group in by_role(spec.layer_linears(index))
        )
        for index in range(len(spec.layers))
    }
    if len(found) > 1:
        raise UnsupportedError(
            "step times are of models whose layers are alike; some of this one have experts, some not"
        )
    return list(found.pop())
