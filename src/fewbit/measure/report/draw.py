"""How figures look: colours that colour-blind readers tell apart, and never colour alone; the page's own ink."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the colour of the page's text, which light and dark pages differ in."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
"""Okabe and Ito's, without the yellow, which is faint on white."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_SETTINGS: Any = {
    "font.size": 9, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 9, "axes.titlelocation": "left", "grid.color": INK, "grid.alpha": 0.15, "axes.grid": True,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """The settings under which figures are made and written.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "a report is drawn by matplotlib, which is not here: pip install 'fewbit[report]'"
        ) from None
    with matplotlib.rc_context(_SETTINGS):
        yield


def styles() -> Iterator[dict[str, Any]]:
    """One style for each line: colour, marker and dash all change from one to the next, and repeat only together."""
    for colour, marker, dash in zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": dash, "markersize": 5, "linewidth": 1.4}


def figure(width: float = 6.4, height: float = 3.6) -> Figure:
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def batches(axes: Axes, sizes: set[int]) -> None:
    """A logarithmic axis of batch sizes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.minorticks_off()
    axes.set_xlabel("sequences at a time")


def plain_log(axes: Axes) -> None:
    """A logarithmic axis of values, with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg(made: Figure, name: str) -> str:
    """A figure to stand inside a page: its ink is the text's, and its ids are nobody else's."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ', r"<svg \1", text, count=1)


def png(made: Figure, file: Path) -> None:
    """A figure on white."""
    for axes in made.axes:
        axes.set_facecolor("white")
    made.savefig(file, dpi=160, facecolor="white", metadata={"Software": None})
    for axes in made.axes:
        axes.set_facecolor("none")
