"""Everything a run's folder holds, sorted by what it says: rows of speed, load on servers, quality, compressions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.errors import RequestError

Object = dict[str, Any]


@dataclass
class Collected:
    """The objects of a folder.

    Attributes:
        folder: Where.
        cells: Rows of `bench offline` that have figures; of equal ones the newest.
        failed: Rows that have none: what, and why; not those that a later row of the same sizes made good.
        loads: Objects of `bench serve`, by name; where several have one, by their files' as well.
        evals: Objects of `eval`, by the model's name, likewise.
        compressions: Objects of `compress`, by the name of what was written, likewise.
        others: Files that are none of these.
    """

    folder: Path
    cells: list[Object] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    loads: dict[str, Object] = field(default_factory=dict)
    evals: dict[str, Object] = field(default_factory=dict)
    compressions: dict[str, Object] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.cells or self.failed or self.loads or self.evals or self.compressions)


def collect(folder: Path) -> Collected:
    """Read a folder and the folders in it.

    Raises:
        RequestError: There is no such folder, or it holds no result.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give the --run-dir of a measurement")
    found = Collected(folder)
    seen: dict[Any, Object] = {}
    failed: list[Object] = []
    for file in sorted(folder.rglob("*.json")):
        name = str(file.relative_to(folder))
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            one = json.loads(file.read_text("utf8"))
        except (OSError, ValueError):
            one = None
        if not isinstance(one, dict) or not _sort(found, seen, failed, name, one):
            found.others.append(name)
    for cell in failed:
        good = seen.get(_key(cell))
        if good is None or _date(good) < _date(cell):
            where = f"{label(cell)}, {cell['batch']} x {cell['input']} + {cell['output']}"
            found.failed.append((_on(where, cell["environment"].get("device")), cell["failed"]))
    found.loads = _by_name(found.loads, lambda file, one: str(one.get("label") or Path(file).stem))
    devices = {_device(one) for one in found.evals.values()} - {None}
    found.evals = _by_name(found.evals, lambda _, one: _on(name_of(one), _device(one) if len(devices) > 1 else None))
    found.compressions = _by_name(found.compressions, written)
    order = lambda c: (-(c.get("bits_per_weight") or _guess(c)), label(c), *(c[k] for k in SIZES))  # noqa: E731
    found.cells = sorted(seen.values(), key=order)
    if found.empty:
        raise RequestError(
            f"{folder}: holds no results; give the --run-dir of fewbit compare or bench offline, or put what "
            "bench serve -o, eval -o and compress --json wrote there"
        )
    return found


def _sort(found: Collected, seen: dict[Any, Object], failed: list[Object], file: str, one: Object) -> bool:
    """Put the object of a file where it belongs; False: it says nothing that is known here."""
    command = one.get("command")
    if isinstance(one.get("cells"), list):
        for cell in one["cells"]:
            _cell(seen, failed, cell | {"environment": cell.get("environment") or _of_record(one)})
    elif command == "bench serve" or str(one.get("result_schema", "")).startswith("fewbit.bench.serve"):
        found.loads[file] = one
    elif command == "eval" and "failed" in one:
        found.failed.append((_on(f"{name_of(one)}, quality", _device(one)), one["failed"]))
    elif command == "eval" or (Path(file).name == "eval.json" and "tasks" in one):
        found.evals[file] = one
    elif command == "compress" and "weight_error" in one:
        found.compressions[file] = one
    else:
        return False
    return True


def _by_name(files: Mapping[str, Object], name: Callable[[str, Object], str]) -> dict[str, Object]:
    """Objects of files by name, those of one name told apart by their files."""
    names = {file: name(file, one) for file, one in files.items()}
    counted = Counter(names.values())
    return {names[f] if counted[names[f]] == 1 else f"{names[f]} ({f})": one for f, one in files.items()}


def _cell(seen: dict[Any, Object], failed: list[Object], cell: Object) -> None:
    if "failed" in cell:
        failed.append(cell)
        return
    other = seen.get(_key(cell))
    if other is None or _date(other) <= _date(cell):
        seen[_key(cell)] = cell


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return *owner(cell), cell["environment"].get("device"), *(cell[k] for k in SIZES)


SIZES = ("batch", "input", "output")


def _date(cell: Mapping[str, Any]) -> str:
    return str(cell["environment"].get("date") or "")


def _of_record(one: Mapping[str, Any]) -> Object:
    """The environment in the record of a GPU, which says it once for all cells."""
    return {"device": one.get("gpu") or _device(one), "date": one.get("date"), **one.get("versions", {})}


def _device(one: Mapping[str, Any]) -> str | None:
    """The device that the key of a row names."""
    return (one.get("key") or {}).get("device")


def _on(name: str, device: str | None) -> str:
    return f"{name}, {device}" if device else name


def name_of(one: Mapping[str, Any]) -> str:
    """The name of the model that `eval` was about."""
    return str(one.get("label") or Path(str(one.get("model") or "model")).name)


def written(name: str, one: Mapping[str, Any]) -> str:
    """The name of the folder that `compress` wrote; `name`: of its object, where that does not say it."""
    return Path(str(one.get("output", Path(name).stem))).name


def owner(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is about, besides its sizes and its device: two folders of one name are two models."""
    return label(cell), cell.get("config"), _path(cell)


def _path(cell: Mapping[str, Any]) -> str | None:
    return str(Path(cell["path"])) if cell.get("path") else None


def label(cell: Mapping[str, Any]) -> str:
    """What a figure calls a row: its model, or its recipe and formats of K and V and of the head."""
    if cell.get("model"):
        return str(cell["model"])
    parts = [cell.get("recipe") or "BF16"]
    parts += [f"{cell['kv']} K/V"] if cell.get("kv") else []
    parts += [f"{cell['head']} head"] if cell.get("head") else []
    return ", ".join(parts)


def lines(cells: Iterable[Object]) -> dict[str, list[Object]]:
    """Cells by what they have in common besides the batch, in order of batch."""
    cells = list(cells)
    shapes = {(c["input"], c["output"]) for c in cells}
    configs = {c.get("config") for c in cells}
    devices = {c["environment"].get("device") for c in cells}
    places: dict[str, set[str | None]] = {}
    for cell in cells:
        places.setdefault(label(cell), set()).add(_path(cell))
    found: dict[str, list[Object]] = {}
    for cell in cells:
        name = label(cell)
        name += f" ({_path(cell)})" if len(places[name]) > 1 and _path(cell) else ""
        name += f", {cell['config']}" if len(configs) > 1 and cell.get("config") else ""
        name += f", {cell['input']} + {cell['output']}" if len(shapes) > 1 else ""
        name += f", {cell['environment'].get('device')}" if len(devices) > 1 else ""
        found.setdefault(name, []).append(cell)
    return {name: sorted(some, key=lambda c: c["batch"]) for name, some in found.items()}


def base_of(cells: Iterable[Object]) -> str | None:
    """The line that speeds are compared with: what has the most bits a weight, unquantized K and V first."""
    drawn = lines(cells)
    if len(drawn) < 2:
        return None
    return max(drawn, key=lambda name: (drawn[name][0].get("bits_per_weight") or _guess(drawn[name][0]), -len(name)))


def _guess(cell: Mapping[str, Any]) -> float:
    """Older records do not say the bits."""
    return 0.0 if cell.get("recipe") else 16.0


def recoveries(found: Collected) -> list[tuple[str, float | None, float, str]]:
    """Models of a known quality beside their base: name, bits a weight, recovery, of what.

    Recovery is the mean over tasks of model / base; where no task was asked, perplexity of the base / the model's. Bits
    are None where no row and no compression says them, or several that differ might be meant. A model that was measured
    alone is the base, at 1, if another was held against it; else nothing is known of what it kept.
    """
    made = []
    sizes = _sizes(found)
    bases = {name for one in found.evals.values() for name in _identities(one, "base", "against")}
    for name, one in found.evals.items():
        size = sizes(one)
        if parts := task_recoveries(one):
            made.append((name, size, sum(parts) / len(parts), TASKS))
        elif one.get("perplexity_base"):
            made.append((name, size, one["perplexity_base"] / one["perplexity"], PERPLEXITY))
        elif one.get("perplexity") and bases & _identities(one, "model", "model"):
            made.append((name, size, 1.0, "base"))
    return made


def task_recoveries(one: Object) -> list[float]:
    """Recovery on each task that an `eval` asked a model and its base."""
    parts = [t["paired"]["recovery"] for t in (one.get("tasks") or {}).values() if t.get("paired")]
    return [part for part in parts if part is not None]


def _identities(one: Object, place: str, content: str) -> set[tuple[str, str]]:
    """What tells a model of an `eval`: its path, and in the rows of `compare` what its folder held."""
    path, held = one.get(place), (one.get("key") or {}).get(content)
    return ({("path", str(Path(path)))} if path else set()) | ({("content", str(held))} if held else set())


def _sizes(found: Collected) -> Callable[[Object], float | None]:
    """What gives the bits per weight of the model that an `eval` was about.

    It is found by its path, else by its name, if models of that name are not told apart by their paths.
    """
    rows: dict[str, set[float]] = {}
    written_: dict[str, set[float]] = {}
    for cell in found.cells:
        for name in {label(cell), _path(cell)} - {None}:
            if cell.get("bits_per_weight"):
                rows.setdefault(str(name), set()).add(cell["bits_per_weight"])
    for name, one in found.compressions.items():
        if "layer_bits" in one["verified"]:
            for key in {str(Path(one.get("output", name))), written(name, one)}:
                written_.setdefault(key, set()).add(one["verified"]["layer_bits"])
    places: dict[str, set[str]] = {}
    for one in found.evals.values():
        places.setdefault(name_of(one), set()).add(str(one.get("model")))

    def size(one: Object) -> float | None:
        name = name_of(one)
        keys = [str(Path(one["model"]))] if one.get("model") else []
        keys += [name] if len(places[name]) == 1 else []
        several = next((of[key] for key in keys for of in (rows, written_) if key in of), set())
        return next(iter(several)) if len(several) == 1 else None

    return size


TASKS = "mean over tasks of model / base"
PERPLEXITY = "perplexity of the base / the model's"
