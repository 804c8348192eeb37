"""The report's pictures, drawn once as PNG files and once as SVG that takes the page's text colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from e2p.errors import MissingExtraError
from e2p.evaluation.metrics import arm_order, per_example
from e2p.evaluation.significance import Comparison, cluster_totals

# Readable on white and on near-black; the tone of "better" is the page's accent.
TONES = {"better": "#0f8b6d", "worse": "#d0503f", "no difference": "#8a8f98", "too few users": "#8a8f98"}
ARM_TONES = {"e2p": "#0f8b6d", "e2p+prompt": "#3d7dd8", "static": "#c98a1b", "shuffled": "#a05fc0"}
_INK = "#1b1f24"  # every text and axis; SVG turns it into the page's own colour
_WIDTH = 5.8  # inches; with this, texts have about the page's own size
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#8a8f98",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.22,
    "xtick.color": _INK,
    "ytick.color": _INK,
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


def draw(
    results: dict[str, Any], comparisons: Sequence[Comparison], scores: pl.DataFrame | None, folder: Path
) -> list[Picture]:
    """Draw what the results allow, write ``folder/*.png``, and return the pictures in the report's order.

    Args:
        results: a run's ``results.json``.
        comparisons: the same results' comparisons, in table order.
        scores: the run's per-example scores, for the gains by user; None leaves that picture out.
        folder: where the PNG files go; made if missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "a report with figures") from None
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    gains = _gains(scores)
    with matplotlib.rc_context(_STYLE):
        if comparisons:
            figure = Figure(figsize=(_WIDTH, 0.8 + 0.36 * len(comparisons)), layout="constrained")
            _differences(figure.subplots(), comparisons)
            pictures.append(_save(figure, folder, "differences", "Differences", _DIFFERENCES))
        if results["arms"]:
            figure = Figure(figsize=(_WIDTH, 0.8 + 0.36 * len(results["arms"])), layout="constrained")
            _perplexity(figure.subplots(), results["arms"])
            pictures.append(_save(figure, folder, "perplexity", "Perplexity by arm", _PERPLEXITY))
        if gains is not None:
            against, values = gains
            figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
            _histogram(figure.subplots(), values, against)
            text = _GAINS.format(against=against, share=float((values > 0).mean()), users=len(values))
            pictures.append(_save(figure, folder, "gains", "Gain by user", text))
        if any(part.get("history") for part in results["training"].values()):
            figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
            _curves(figure.subplots(), results["training"])
            pictures.append(_save(figure, folder, "learning", "Learning curves", _CURVES))
    return pictures


_DIFFERENCES = (
    "Mean difference in nats per token, with 95% intervals from a bootstrap over users. "
    "Left of zero: better. Grey: no difference after Holm's correction."
)
_PERPLEXITY = "Perplexity of the completions, with 95% intervals from a bootstrap over users. Left is better."
_GAINS = (
    "Mean gain of the user's own vector over the arm {against}, user by user. Right of zero: the user gains; "
    "that is {share:.0%} of {users:,} users."
)
_CURVES = (
    "Training loss (faint) and validation loss (points; the best is ringed), nats per token. "
    "Dashed: the frozen model without prefix on the same validation data."
)


def _differences(axes: Any, comparisons: Sequence[Comparison]) -> None:
    for row, comparison in enumerate(comparisons):
        tone = TONES.get(comparison.verdict, _INK)
        if comparison.ci is not None:
            axes.plot(comparison.ci, [row, row], color=tone, linewidth=2.4, solid_capstyle="round")
        axes.plot(comparison.difference, row, "o", color=tone, markersize=6.5)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_xlabel("nats per token")
    _rows(axes, [comparison.name for comparison in comparisons], bold=2)


def _perplexity(axes: Any, arms: dict[str, dict[str, Any]]) -> None:
    names = arm_order(arms)
    for row, arm in enumerate(names):
        value, interval = arms[arm]["perplexity"], arms[arm].get("perplexity_ci")
        tone = ARM_TONES["e2p"] if arm.startswith("e2p") else TONES["no difference"]
        if interval is not None:
            axes.plot(interval, [row, row], color=tone, linewidth=2.4, solid_capstyle="round")
        axes.plot(value, row, "o", color=tone, markersize=6.5)
        axes.annotate(f"{value:.2f}", (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xlabel("perplexity")
    _rows(axes, names)


def _rows(axes: Any, names: Sequence[str], bold: int = 0) -> None:
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels()[:bold]:
        label.set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)  # first row on top
    axes.grid(False, axis="y")
    axes.margins(x=0.08)


def _gains(scores: pl.DataFrame | None) -> tuple[str, np.ndarray] | None:
    """Per user, mean over examples of control minus e2p (nats per token), with the first control there is."""
    if scores is None:
        return None
    wide = per_example(scores)
    controls = [arm for arm in ("random", "static", "none") if arm in wide.columns]
    if "e2p" not in wide.columns or not controls:
        return None
    gain = (wide[controls[0]] - wide["e2p"]).to_numpy()
    totals = cluster_totals(np.column_stack([gain, np.ones(len(gain))]), wide["user_id"].to_numpy())
    return controls[0], totals[:, 0] / totals[:, 1]


def _histogram(axes: Any, values: np.ndarray, against: str) -> None:
    # Two users in a hundred on either side may lie far out; they are counted in the outermost bars.
    low, high = np.quantile(values, [0.01, 0.99])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / 36
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width  # zero is an edge
    counts, edges = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    colours = [TONES["better"] if left >= -width / 2 else TONES["worse"] for left in edges[:-1]]
    axes.bar(edges[:-1], counts, width * 0.92, align="edge", color=colours)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_ylim(0, counts.max() * 1.18)  # room for the text at the mean
    mean = float(values.mean())
    axes.axvline(mean, color=_INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate(f"mean {mean:+.3f}", (mean, 1), (5, -9), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_xlabel(f"gain over {against}, nats per token")
    axes.set_ylabel("users")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")


def _curves(axes: Any, training: dict[str, dict[str, Any]]) -> None:
    shown = []
    for arm in arm_order(training):
        history = training[arm].get("history") or []
        tone = ARM_TONES.get(arm, TONES["no difference"])
        losses, held_out = _points(history, "loss"), _points(history, "eval_loss")
        if losses:
            axes.plot(*zip(*losses, strict=True), color=tone, linewidth=1, alpha=0.5)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=tone, linewidth=1.8, markersize=4, label=arm)
            step, loss = min(held_out, key=lambda point: point[1])
            axes.plot(step, loss, "o", markersize=10, markerfacecolor="none", markeredgecolor=tone)
        shown += [loss for _, loss in held_out] + [loss for _, loss in losses[len(losses) // 10 :]]
    frozen = [(part.get("validation") or {}).get("none") for part in training.values()]
    floor = [float(loss) for loss in frozen if loss is not None and np.isfinite(loss)]
    if floor:
        axes.axhline(floor[0], color=_INK, linewidth=1, linestyle="--", label="no prefix")
        shown.append(floor[0])
    if shown:  # the first steps of a fresh prefix may be far off and must not flatten the rest
        room = 0.08 * (max(shown) - min(shown) or 1)
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_xlabel("optimiser step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("nats per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, fontsize=9.5)


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """The finite values of a curve: a run that diverged still gets its report."""
    found = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    return [(step, value) for step, value in found if np.isfinite(value)]


def _save(figure: Any, folder: Path, name: str, title: str, caption: str) -> Picture:
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white", metadata={"Software": None})
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    svg = text[text.index("<svg") :].replace(_INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return Picture(name, title, caption, svg)
