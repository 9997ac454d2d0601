"""What `fewbit tune` tries: recipes times K/V formats, each written out whole, so that its text reproduces it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from fewbit.compress.recipe import KV_FORMATS, parse_recipe, read_recipe
from fewbit.errors import RecipeError, nearest_name

AS_GIVEN = "none"
"""The K/V format that leaves K and V as the recipe has them."""


@dataclass(frozen=True)
class Candidate:
    """A recipe to try: a name for people and folders, and its YAML, which says everything."""

    name: str
    text: str


@cache
def _table() -> dict[str, Any]:
    """The order in which candidates are tried: see candidates.yaml."""
    found: dict[str, Any] = yaml.safe_load(
        (importlib.resources.files(__package__) / "candidates.yaml").read_text("utf8")
    )
    return found


def _own() -> dict[str, str]:
    """Recipes that stand in candidates.yaml alone, as YAML by name."""
    entries = [entry for entry in _table()["recipes"] if isinstance(entry, dict)]
    return {e["name"]: _dump({key: value for key, value in e.items() if key != "name"}) for e in entries}


def names() -> tuple[str, ...]:
    """Of the recipes that are tried where nothing else is said, in order."""
    return tuple(entry["name"] if isinstance(entry, dict) else entry for entry in _table()["recipes"])


def kv_names() -> tuple[str, ...]:
    """Of the K/V formats that are tried where nothing else is said, in order."""
    return tuple(_table()["kv"])


def candidates(
    recipes: Sequence[str], kv: Sequence[str], calibration: Mapping[str, Any] | None = None
) -> list[Candidate]:
    """Every recipe with every K/V format: recipes in their order under the first format, then under the next.

    Args:
        recipes: of `names`, built-in ones, or files.
        kv: of `KV_FORMATS`, or `AS_GIVEN`.
        calibration: keys of ``calib`` that replace those of each recipe.

    Raises:
        RecipeError: a recipe or a format is unknown, or one stands twice.
    """
    for option, given in (("--recipes", recipes), ("--kv", kv)):
        if not all(given):
            raise RecipeError(f"{option} {','.join(given)}: expected names by commas, one of them is empty")
        if twice := next((name for name in given if list(given).count(name) > 1), None):
            raise RecipeError(f"{option}: {twice} stands twice")
    for name in kv:
        if name != AS_GIVEN and name not in KV_FORMATS:
            raise RecipeError(f"--kv {name}: {nearest_name(name, [AS_GIVEN, *KV_FORMATS])}")
    read = [_read(name) for name in recipes]
    made = [
        Candidate(name if fmt == AS_GIVEN else f"{name}+kv_{fmt}", _whole(text, fmt, calibration or {}))
        for fmt in kv
        for name, text in read
    ]
    called = [candidate.name for candidate in made]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise RecipeError(f"--recipes: two candidates are called {twice}; rename a file")
    for candidate in made:
        parse_recipe(candidate.name, candidate.text)
    return made


def _read(name: str) -> tuple[str, str]:
    """A recipe's name and text."""
    if name in (own := _own()):
        return name, own[name]
    try:
        recipe = read_recipe(name)
    except RecipeError as error:
        hint = f"; of tune's own: {', '.join(own)}" if "unknown recipe" in str(error) else ""
        raise RecipeError(f"--recipes: {error}{hint}") from None
    return recipe.name, recipe.text


def _whole(text: str, kv: str, calibration: Mapping[str, Any]) -> str:
    """A recipe's text with K and V and the calibration in it."""
    if kv == AS_GIVEN and not calibration:
        return text
    raw = yaml.safe_load(text)
    if kv != AS_GIVEN:
        raw["kv"] = {"format": kv, "scale": "static"}
    if calibration:
        raw["calib"] = {**(raw.get("calib") or {}), **calibration}
    first = text.partition("\n")[0]
    return (f"{first}\n" if first.startswith("#") else "") + _dump(raw)


def _dump(raw: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(raw), sort_keys=False, width=120)
