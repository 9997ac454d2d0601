"""Write the generated parts of the documentation, between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

python tools/readme.py           rewrite README.md and docs/
python tools/readme.py --check   say what is out of date, and exit with 1 if anything is
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import typer

from fewbit.checkpoint import formats
from fewbit.cli import app
from fewbit.compress import built_in, read_recipe
from fewbit.measure.facts import support_table
from fewbit.spec.families import families

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(columns: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def support() -> str:
    """Kernel by numeric format, on a CPU and (weights in BF16) on a GPU: what ``fewbit explain`` prints."""
    cpu = support_table(torch.device("cpu"), torch.float32)
    return table(["format", "kernel, weights only", "kernel, weights and inputs"], cpu)


def recipes() -> str:
    rows = []
    for name, text in built_in().items():
        (rule,) = read_recipe(name).rules
        rows.append((f"`{name}`", str(rule.quant), text))
    return table(["recipe", "numerics", "in words"], rows)


def architectures() -> str:
    rows = [(name, ", ".join(f"`{a}`" for a in family.ARCHITECTURES)) for name, family in families().items()]
    return table(["family", "`architectures` in config.json"], rows)


def exports() -> str:
    return "".join(f"- `{name}`\n" for name in formats())


def commands() -> str:
    """The help of every command."""
    whole = typer.main.get_command(app)
    with whole.make_context("fewbit", [], resilient_parsing=True) as context:
        names = whole.list_commands(context)
        parts = []
        for name in names:
            command = whole.get_command(context, name)
            inner = command.make_context(name, [], parent=context, resilient_parsing=True)
            inner.max_content_width = 100
            inner.terminal_width = 100
            parts.append(f"## fewbit {name}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(parts)


PARTS = {
    "support": support,
    "recipes": recipes,
    "architectures": architectures,
    "exports": exports,
    "commands": commands,
}


def main() -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text("utf8")
        fresh = PART.sub(lambda found: found[1] + "\n" + PARTS[found[2]]().strip() + "\n\n" + found[3], text)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(fresh, "utf8")
    if stale:
        print(("out of date: " if "--check" in sys.argv else "rewritten: ") + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
