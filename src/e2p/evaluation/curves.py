"""Curves: a training's losses by step, and a sweep's results by the value of one setting."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2p.evaluation.look import ARM_TONES, GREY, INK, Picture, picture, short
from e2p.evaluation.metrics import arm_order

_LOG_FROM = 30.0  # ratio of the largest to the smallest value from which an axis is logarithmic


def draw_learning(training: Mapping[str, Mapping[str, Any]], folder: Path) -> Picture | None:
    """Training and validation loss of every trained arm; None where no history was kept."""
    if not any(part.get("history") for part in training.values()):
        return None
    unit = unit_of(training)
    caption = (
        f"Training loss (faint) and validation loss (points; the best is ringed), {unit}. "
        "Dashed: the frozen model without prefix on the same validation data."
    )
    return picture(
        folder, "learning", "Learning curves", caption, 3.0, lambda figure: _losses(figure.subplots(), training, unit)
    )


def unit_of(training: Mapping[str, Mapping[str, Any]]) -> str:
    """What the losses of a run's trainings are counted in."""
    units = [(part.get("validation") or {}).get("unit") for part in training.values()]
    return next((str(unit) for unit in units if unit), "nats per token")


def draw_sweep(key: str, points: Sequence[Mapping[str, Any]], folder: Path) -> Picture:
    """What one setting does: validation loss above, true minus random below.

    Args:
        key: the setting, such as ``training.learning_rate``; the file is named by it.
        points: each with ``value`` of the setting, ``prefix`` (nats per token of e2p), ``none``, and, where they are
            known, ``static``, ``true_minus_random``, its ``ci`` and its values ``by_seed``; the point that is the
            ``base`` of other sweeps is ringed. What is not finite is left out.
        folder: where the PNG file goes; made if missing.
    """
    places, labels, log = _axis([point["value"] for point in points])
    placed = sorted(zip(places, points, strict=True), key=lambda pair: pair[0])
    user = [(x, point) for x, point in placed if _finite(point, "true_minus_random")]
    # Between values that have no order there is nothing for a line to run through.
    joined = "-" if all(_is_number(point["value"]) for point in points) else ""

    def paint(figure: Any) -> None:
        ratios = [3, 2] if user else None
        panels = figure.subplots(2 if user else 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        upper = panels[0]
        for name, arm in (("static", "static"), ("prefix", "e2p")):
            curve = [(x, point[name]) for x, point in placed if _finite(point, name)]
            if curve:
                upper.plot(*zip(*curve, strict=True), f"o{joined}", color=ARM_TONES[arm], linewidth=1.8, markersize=4.5,
                           label=arm)  # fmt: skip
        for x, point in placed:
            if point.get("base") and _finite(point, "prefix"):
                upper.plot(
                    x, point["prefix"], "o", markersize=10, markerfacecolor="none", markeredgecolor=ARM_TONES["e2p"]
                )
        floor = [(x, point["none"]) for x, point in placed if _finite(point, "none")]
        if floor:
            upper.plot(*zip(*floor, strict=True), color=INK, linewidth=1, linestyle="--", label="no prefix")
        upper.set_ylabel("nats per token")
        if upper.get_legend_handles_labels()[0]:
            upper.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8.5)
        if user:
            lower, tone = panels[1], ARM_TONES["e2p"]
            for x, point in user:
                if point.get("ci") is not None:
                    lower.plot([x, x], point["ci"], color=tone, linewidth=2.2, solid_capstyle="round")
                if len(point.get("by_seed") or ()) > 1:
                    own = point["by_seed"]
                    lower.plot(
                        [x] * len(own), own, "o", color=INK, markersize=2.6, alpha=0.6, markeredgewidth=0, zorder=3
                    )
            curve = [(x, point["true_minus_random"]) for x, point in user]
            lower.plot(*zip(*curve, strict=True), f"o{joined}", color=tone, linewidth=1.2, markersize=4.5)
            lower.axhline(0, color=INK, linewidth=1)
            lower.set_ylabel("true minus random")
        _label_axis(panels[-1], key, labels, log)
        figure.align_ylabels(panels)

    caption = "Validation loss; lower is better."
    caption += " Ringed: the value elsewhere." if any(point.get("base") for point in points) else ""
    if user:
        caption += (
            " Below: with the user's own vector minus with another user's, with 95% intervals; below zero, the user "
        )
        caption += "matters."
    name = re.sub(r"\W+", "_", f"sweep_{key}")
    # Long names of values stand aslant under the axis and need room.
    slant = 0.06 * max(map(len, labels)) if labels and _aslant(labels) else 0.0
    return picture(folder, name, short(key, 60), caption, (4.0 if user else 2.7) + slant, paint)


def _losses(axes: Any, training: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    shown: list[float] = []
    for arm in arm_order(training):
        history = training[arm].get("history") or []
        tone = ARM_TONES.get(arm, GREY)
        losses, held_out = _points(history, "loss"), _points(history, "eval_loss")
        if losses:
            axes.plot(*zip(*losses, strict=True), color=tone, linewidth=1, alpha=0.5)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=tone, linewidth=1.8, markersize=3.6, label=arm)
            step, loss = min(held_out, key=lambda point: point[1])
            axes.plot(step, loss, "o", markersize=9, markerfacecolor="none", markeredgecolor=tone)
        shown += [loss for _, loss in held_out] + [loss for _, loss in losses[len(losses) // 10 :]]
    frozen = [(part.get("validation") or {}).get("none") for part in training.values()]
    floor = [float(loss) for loss in frozen if loss is not None and np.isfinite(loss)]
    if floor:
        axes.axhline(floor[0], color=INK, linewidth=1, linestyle="--", label="no prefix")
        shown.append(floor[0])
    if shown:  # the first steps of a fresh prefix may be far off and must not flatten the rest
        room = 0.08 * (max(shown) - min(shown) or 1)
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_xlabel("optimiser step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(unit)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=8.5)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The finite values of a curve: a run that diverged still gets its report."""
    return [(entry["step"], entry[key]) for entry in history if _finite(entry, key)]


def _finite(entry: Mapping[str, Any], key: str) -> bool:
    return entry.get(key) is not None and math.isfinite(entry[key])


def _axis(values: Sequence[Any]) -> tuple[list[float], list[str] | None, bool]:
    """Where values stand, their labels (None: the axis's own numbers), and whether the axis is logarithmic."""
    if all(map(_is_number, values)):
        numbers = [float(value) for value in values]
        if min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_FROM:
            return numbers, None, True
        # Numbers that lie closer together are told apart best as names, in their order.
        distinct = sorted(set(values), key=float)
    else:
        distinct = list(dict.fromkeys(map(_name, values)))
    names = [_name(value) for value in distinct]
    return [float(names.index(_name(value))) for value in values], names, False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(value: Any) -> str:
    """A value of a setting, short: of a path, its name."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", f"{value:g}")
    text = str(value)
    return short(Path(text).stem if "/" in text else text, 22)


def _aslant(labels: Sequence[str]) -> bool:
    return max(map(len, labels)) * len(labels) > 45


def _label_axis(axes: Any, key: str, labels: Sequence[str] | None, log: bool) -> None:
    axes.set_xlabel(short(key, 60))
    if log:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _name(float(value))))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.06)
    elif labels is not None:
        turned = {"rotation": 32, "ha": "right", "rotation_mode": "anchor"} if _aslant(labels) else {}
        axes.set_xticks(range(len(labels)), labels, **turned)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.grid(False, axis="x")
