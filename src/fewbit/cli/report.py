"""report: a run's folder as one page, with its figures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.common import JsonOption, QuietOption, VerboseOption, note, pairs, print_json
from fewbit.errors import RequestError


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUNDIR", help="Folder of results, as --run-dir keeps them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write [default: RUNDIR/report.html]")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page [default: the folder's name]")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """One HTML page, and PNG files, of what a run found: tables and figures, nothing fetched.

    The folder may hold what compare, bench offline and eval keep there, and files of bench serve -o --save-detailed and
    of compress --json. Figures for which it holds nothing are left out and named.
    """
    from fewbit.measure.report import collect, draw, figures, page

    found = collect.collect(folder)
    file = output or folder / "report.html"
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--output {file}: there is no folder {file.absolute().parent}")
    pictures = file.with_suffix("")
    with draw.drawing():
        made = figures.all_of(found)
        drawn, left_out = figures.split(made)
        text = page.page(found, made, title or f"fewbit: {folder.resolve().name}")
        if drawn:
            pictures.mkdir(exist_ok=True)
        for one in drawn:
            draw.png(one.figure, pictures / f"{one.name}.png")
    file.write_text(text, "utf8")
    if json:
        return print_json(
            "report",
            {
                "html": str(file),
                "figures": {one.name: str(pictures / f"{one.name}.png") for one in drawn},
                "left_out": {gone.title: gone.reason for gone in left_out},
                "failed": [f"{what}: {why}" for what, why in found.failed],
            },
        )
    pairs([("page", str(file)), ("figures", f"{len(drawn)} in {pictures}" if drawn else "none")])
    for gone in left_out:
        note(f"left out: {gone.title}: {gone.reason}")
    return None
