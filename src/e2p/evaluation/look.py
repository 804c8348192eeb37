"""The look that all pictures share, and how one is written: as a PNG file, and as SVG in the page's text colour."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e2p.errors import MissingExtraError

# Readable on white and on near-black; the tone of "better" is the page's accent.
GREY = "#8a8f98"
TONES = {"better": "#0f8b6d", "worse": "#d0503f", "no difference": GREY, "too few users": GREY}
ARM_TONES = {
    **{"e2p": "#0f8b6d", "e2p+prompt": "#3d7dd8", "prompt": "#6f9fe0", "static": "#c98a1b"},
    **{"shuffled": "#a05fc0", "random": "#d0503f"},
}
PALETTE = ("#0f8b6d", "#d0503f", "#3d7dd8", "#c98a1b", "#a05fc0", "#5aa9a2", "#b8577f", "#8c7a5b")
INK = "#1b1f24"  # every text and axis; SVG turns it into the page's own colour
WIDTH = 3.7  # inches; in a column of the page and on a phone, texts then keep about their size
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "grid.color": GREY,
    "grid.alpha": 0.22,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "svg.hashsalt": "e2p",
    "text.parse_math": False,
}


class Picture(NamedTuple):
    """A figure's file name, what it shows in words, and its inline SVG."""

    name: str
    title: str
    caption: str
    svg: str


def picture(folder: Path, name: str, title: str, caption: str, height: float, paint: Callable[[Any], None]) -> Picture:
    """Let ``paint`` draw on a figure of ``height`` inches, write ``folder/name.png``, and return the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "a report with figures") from None
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A user's own words may need letters that the PNG's font lacks; the page has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white", metadata={"Software": None})
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    return Picture(name, title, caption, svg)


def rows(axes: Any, names: Sequence[str], bold: int = 0) -> None:
    """Name the rows of a horizontal plot, the first one on top, the first ``bold`` of them in bold."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    for label in axes.get_yticklabels()[:bold]:
        label.set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.margins(x=0.08)


def bar(axes: Any, value: float, interval: Sequence[float] | None, row: float, tone: str) -> None:
    """A value with its interval in a row of a horizontal plot."""
    if interval is not None:
        axes.plot(interval, [row, row], color=tone, linewidth=2.4, solid_capstyle="round")
    axes.plot(value, row, "o", color=tone, markersize=6)


def short(text: str, width: int = 28) -> str:
    """Any text as a label: one line, nothing that cannot be written, at most ``width`` characters."""
    words = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return words if len(words) <= width else f"{words[: width - 1]}…"
