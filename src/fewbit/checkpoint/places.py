"""Where the tensors of a model lie in its files: alone, or with others in one, by the family's table.

A fused tensor is cut when it is read and joined again when it is written, so that nobody else knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, Files, read_rows
from fewbit.checkpoint.names import Names
from fewbit.errors import UnsupportedError
from fewbit.numerics.format import ALL
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape, MoE
from fewbit.spec.part import Part


@dataclass(frozen=True)
class Place:
    """A stored tensor, and which of ours lie in it.

    Attributes:
        source: its name, or for a quantized linear that of the module.
        names: canonical names of the tensors (or linears) whose rows it holds.
        rows: how many of each.
        tail: the sizes of their other axes: (in,) or ().
        turns: in so many turns, in each of which a part of the rows of each follows the other's.
        transposed: rows are the last axis.
        expert: which of the `experts` whose tensors are stacked.
        experts: how many; 0: it is not stacked.
    """

    source: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    tail: tuple[int, ...]
    turns: int = 1
    transposed: bool = False
    expert: int = 0
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        shape = (sum(self.rows), *self.tail)
        shape = shape[::-1] if self.transposed else shape
        return (self.experts, *shape) if self.experts else shape

    def read(self, files: Files, name: str, device: torch.device = CPU) -> Tensor:
        """One of its tensors; where its rows lie together nothing else is read."""
        if self.experts:
            whole = read_rows(files, self.source, self.expert, self.expert + 1, device)[0]
        elif self.turns == 1 and not self.transposed and len(self.names) > 1:
            at = self.names.index(name)
            start = sum(self.rows[:at])
            return read_rows(files, self.source, start, start + self.rows[at], device)
        else:
            whole = files.read(self.source, device)
        return self.cut(whole.T if self.transposed else whole, name).contiguous()

    def cut(self, whole: Tensor, name: str, unit: int = 1) -> Tensor:
        """The rows of one of them in a tensor of all rows; or of what every `unit` rows have together."""
        if len(self.names) == 1:
            return whole
        sizes = [rows // self.turns // unit for rows in self.rows]
        at = self.names.index(name)
        found: Tensor = whole.unflatten(0, (self.turns, -1)).narrow(1, sum(sizes[:at]), sizes[at]).flatten(0, 1)
        return found

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """All rows of the tensors in it, as they are stored (of one expert)."""
        whole = parts[self.names[0]]
        if len(self.names) > 1:
            turns = [parts[name].unflatten(0, (self.turns, -1)) for name in self.names]
            whole = torch.cat(turns, 1).flatten(0, 1)
        return whole.T if self.transposed and whole.ndim == 2 else whole

    def cut_codes(self, q: QTensor, name: str) -> QTensor:
        """The rows of one linear in a quantized tensor of all."""
        if len(self.names) == 1:
            return q
        found = {"codes": self.cut(q.codes, name).contiguous()}
        for part, t in q.parts().items():
            if part in ("scale", "zero"):
                found[part] = t if q.format.block[0] == ALL else self.cut(t, name, q.format.block[0]).contiguous()
        return QTensor(q.format, **{**q.parts(), **found})

    def join_codes(self, parts: Mapping[str, QTensor]) -> QTensor:
        """The quantized tensor of all rows.

        Raises:
            UnsupportedError: what all rows have together differs.
        """
        first = parts[self.names[0]]
        if len(self.names) == 1:
            return first
        fields = {name: q.parts() for name, q in parts.items()}
        found = {}
        for part, tensor in first.parts().items():
            if part in ("codes", "scale", "zero") and not (part != "codes" and first.format.block[0] == ALL):
                found[part] = self.join({name: of[part] for name, of in fields.items()})
            elif all(torch.equal(of[part], tensor) for of in fields.values()):
                found[part] = tensor
            else:
                raise UnsupportedError(f"{self.source}: {', '.join(self.names)} lie in it and differ in their {part}")
        return QTensor(first.format, **found)


class Places:
    """Where the linears of a model lie.

    Args:
        names: the model's names.
        spec: its shape.
        quant: what is quantized.
    """

    def __init__(self, names: Names, spec: DecoderSpec, quant: Mapping[str, QuantSpec]) -> None:
        self.names, self.spec, self.quant = names, spec, quant
        self._linears = {linear.name: linear for linear in spec.linears()}
        self._shapes = spec.tensors()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by its canonical name."""
        return self._shapes[name]

    def of_linear(self, name: str) -> Place:
        """Where a linear lies that is quantized: always [out, in]."""
        part = self.names.part(name)
        together = part.of if part else (name,)
        linears = [self._linears[n] for n in together]
        rows = tuple(linear.out_features for linear in linears)
        return Place(self.names.module(name), together, rows, (linears[0].in_features,), self._turns(part, linears))

    def whole(self, name: str) -> LinearShape:
        """All that lies where a linear does, as one linear of its stored name."""
        place, linear = self.of_linear(name), self._linears[name]
        return LinearShape(name, sum(place.rows), linear.in_features, linear.bias)

    def of_tensor(self, name: str) -> Place:
        """Where a tensor lies that is not quantized."""
        owner, _, leaf = name.rpartition(".")
        shape = self._shapes[name]
        quantized = owner in self.quant
        part = (None if quantized else self.names.part(name)) or self.names.part(owner)
        if part is None:
            source = f"{self.names.module(owner)}.{leaf}" if quantized else self.names.tensor(name)
            return Place(source, (name,), shape[:1], shape[1:])
        linears = [self._linears[n.removesuffix(f".{leaf}")] for n in part.of]
        rows = tuple(linear.out_features for linear in linears)
        names = tuple(f"{linear.name}.{leaf}" for linear in linears)
        source = part.module if self.names.part(name) and not quantized else f"{part.module}.{leaf}"
        place = Place(source, names, rows, shape[1:], self._turns(part, linears), part.transposed and leaf == "weight")
        if not part.stacked:
            return place
        mixture = self.spec.layers[int(name.split(".")[1])].mlp
        assert isinstance(mixture, MoE)
        expert = int(owner.split(".experts.")[1].split(".")[0])
        return Place(
            source, names, rows, place.tail, place.turns, place.transposed, expert=expert, experts=mixture.experts
        )

    def _turns(self, part: Part | None, linears: Sequence[LinearShape]) -> int:
        if part is None or part.turns == "one":
            return 1
        if part.turns == "rows":
            return linears[0].out_features
        return self.spec.layers[int(linears[0].name.split(".")[1])].attention.kv_heads

    def check(self) -> None:
        """Raise if linears that lie in one tensor are not quantized alike.

        Raises:
            UnsupportedError: the linears, and what to do.
        """
        if reason := self.why_not():
            raise UnsupportedError(reason)

    def why_not(self) -> str | None:
        """None: the family's files can hold what is quantized so; else why not, with the linears and what to do."""
        for name in self._linears:
            for together, where in self._together(name):
                kinds = {self.quant.get(n) for n in together}
                lie = f"{', '.join(together[:3])} lie in one tensor of this family's files ({where})"
                if len(kinds) > 1:
                    return f"{lie} and would differ in their numerics; give them one rule"
                kind = next(iter(kinds))
                if kind is None or len(together) == 1:
                    continue
                if kind.lowrank:
                    return f"{lie}, which has no place for a low-rank branch of each; use a recipe without one"
                place = self.of_linear(name)
                block = kind.weight.block[0] if kind.weight else 1
                if block not in (1, ALL) and any(rows // place.turns % block for rows in place.rows):
                    return f"{lie}, and their parts of it end inside blocks of {block} rows ({kind.weight})"
        return None

    def _together(self, name: str) -> list[tuple[tuple[str, ...], str]]:
        """The linears that must be alike for a linear's sake, and the tensor because of which."""
        found = []
        if (part := self.names.part(name)) is not None:
            found.append((part.of, part.module))
        part = self.names.part(f"{name}.weight")
        if part is not None and part.stacked:
            head, _, rest = name.partition(".experts.")
            mixture = self.spec.layers[int(name.split(".")[1])].mlp
            assert isinstance(mixture, MoE)
            leaves = {n.split(".experts.")[1].partition(".")[2] for n in part.of}
            if rest.startswith("0."):
                together = tuple(
                    f"{head}.experts.{e}.{leaf}" for e in range(mixture.experts) for leaf in sorted(leaves)
                )
                found.append((together, part.module))
        return found
