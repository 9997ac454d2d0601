"""Which families, recipes, file formats and engines go together, asked of each: nothing here is written down twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.checkpoint import formats
from fewbit.checkpoint.acceptance import dialect_for, engines, rows_of
from fewbit.checkpoint.formats.trtllm import NAME as TRTLLM
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.checkpoint.trtllm.config import DECODERS
from fewbit.compress import built_in, read_recipe
from fewbit.compress.recipe import KV_FORMATS, Recipe
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.numerics.quantspec import KVSpec
from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig


@dataclass(frozen=True)
class Table:
    """A table of words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown has it."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables() -> list[Table]:
    """All of them."""
    return [by_format(), by_engine(), by_family()]


def by_format() -> Table:
    """Which file format can say which recipe, for an ordinary decoder."""
    spec = _ordinary()
    found = [
        (name, *("no" if fmt.why_not(spec, asked) else "yes" for fmt in formats().values()))
        for name, asked in _asked(spec).items()
    ]
    return Table("recipes and file formats", ("recipe", *(f"`{name}`" for name in formats())), tuple(found))


def by_engine() -> Table:
    """In which format an engine loads which recipe, for an ordinary decoder."""
    spec = _ordinary()

    def loaded(engine: str, asked: Quantization) -> str:
        try:
            return f"`{dialect_for(engine, spec, asked)}`"
        except UnsupportedError:
            return "no"

    found = [(name, *(loaded(engine, asked) for engine in engines())) for name, asked in _asked(spec).items()]
    heads = (f"{engine} {rows_of(engine)[0].version}" for engine in engines())
    return Table("recipes and engines", ("recipe", *heads), tuple(found))


def by_family() -> Table:
    """How many of the recipes a format can say for each family's tiny model."""
    rows = []
    for name, family in families().items():
        spec = family.read(HFConfig(family.TINY))
        recipes = {r: quant for r, recipe in _recipes().items() if (quant := _resolved(recipe, spec))}
        names, cells = Names(family, spec), []
        for fmt in formats().values():
            known = fmt.NAME != TRTLLM or family.TINY["architectures"][0] in DECODERS
            count = sum(
                known and fmt.why_not(spec, quant) is None
                for quant in recipes.values()
                if fmt.NAME == TRTLLM or Places(names, spec, quant.quant).why_not() is None
            )
            cells.append(f"{count} of {len(recipes)}" if count else "no")
        rows.append((f"`{name}`", *cells))
    return Table("families and file formats", ("family", *(f"`{name}`" for name in formats())), tuple(rows))


def _ordinary() -> DecoderSpec:
    llama = families()["llama"]
    return llama.read(HFConfig({**llama.TINY, "hidden_size": 1024, "head_dim": 256}))  # room for branches


def _recipes() -> Mapping[str, Recipe]:
    return {name: recipe for name in built_in() if not (recipe := read_recipe(name)).auto}


def _asked(spec: DecoderSpec) -> dict[str, Quantization]:
    """Every recipe, and every format of K and V by itself."""
    found = {f"`{name}`": Quantization(recipe.resolve(spec), {}) for name, recipe in _recipes().items()}
    for name, fmt in KV_FORMATS.items():
        found[f"`--kv {name}`"] = Quantization({}, dict.fromkeys(range(len(spec.layers)), KVSpec(fmt, fmt)))
    return found


def _resolved(recipe: Recipe, spec: DecoderSpec) -> Quantization | None:
    """What a recipe means for a model; None: its sizes do not fit."""
    try:
        return Quantization(recipe.resolve(spec), {})
    except FewbitError:
        return None
