"""The report's pictures: what the arms reach, what it costs, and for whom. Space and curves have rooms of their own."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from e2p.evaluation.curves import draw_learning
from e2p.evaluation.curves import draw_sweep as draw_sweep  # so that all pictures can be had here
from e2p.evaluation.figures_space import draw_likeness, draw_space
from e2p.evaluation.look import ARM_TONES, GREY, INK, TONES, Picture, bar, picture, rows, short
from e2p.evaluation.metrics import arm_order
from e2p.evaluation.playlist_report import draw_calibration
from e2p.evaluation.significance import Comparison
from e2p.evaluation.tables import Metric
from e2p.evaluation.tables import perplexity as show_perplexity

LEAD = ("differences", "gains", "context")  # the three pictures that stand right under the verdict


class Gain(NamedTuple):
    """What an arm wins over the bare model, and the tokens that it adds to every prompt."""

    arm: str
    tokens: float
    gain: float
    ci: tuple[float, float] | None


def draw(
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    space: pl.DataFrame | None,
    folder: Path,
) -> list[Picture]:
    """Draw what the results allow, write ``folder/*.png``, and return the pictures in the report's order.

    Args:
        results: a run's ``results.json``.
        comparisons: the same results' comparisons in the headline metric, in table order.
        space: the run's ``space.parquet``, for the map of the users; None leaves that picture out.
        folder: where the PNG files go; made if missing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    metric, arms = Metric.of(results), results["arms"]
    gains, seeds = results.get("gains") or {}, len(results.get("seeds") or ())
    found: list[Picture | None] = [
        draw_differences(comparisons, metric, folder),
        draw_gains(gains, metric, folder, seeds),
        draw_context(costed(results), gains, metric, folder),
        draw_calibration(results.get("playlists"), folder),
        draw_arms(arms, metric, folder),
        draw_breakdowns(results.get("breakdowns") or [], metric, folder),
        draw_space(results.get("space"), space, folder),
        draw_likeness(results.get("prefix"), folder),
        draw_learning(results["training"], folder),
    ]
    return [one for one in found if one is not None]


def draw_differences(comparisons: Sequence[Comparison], metric: Metric, folder: Path) -> Picture | None:
    """Every comparison with its interval, and a dot for every training seed where there are several."""
    if not comparisons:
        return None
    several = any(len(c.by_seed) > 1 for c in comparisons)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for row, comparison in enumerate(comparisons):
            tone = TONES.get(comparison.verdict, INK)
            bar(axes, comparison.difference, comparison.ci, row, tone)
            if len(comparison.by_seed) > 1:
                at = [row + 0.3] * len(comparison.by_seed)
                axes.plot(comparison.by_seed, at, "o", color=tone, markersize=3.2, alpha=0.65, markeredgewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel(metric.label)
        axes.locator_params(axis="x", nbins=3)  # long names leave little room for numbers
        rows(axes, [comparison.name for comparison in comparisons], bold=2)

    side = "Left" if metric.better == "lower" else "Right"
    caption = (
        f"Mean difference in {metric.label}, with 95% intervals from a bootstrap over users. {side} of zero: better. "
        "Grey: no difference after Holm's correction."
    ) + (" Small dots: the training seeds, one by one." if several else "")
    height = 0.75 + (0.36 if several else 0.31) * len(comparisons)
    return picture(folder, "differences", "What makes the difference", caption, height, paint)


def draw_gains(gains: Mapping[str, Any], metric: Metric, folder: Path, seeds: int = 1) -> Picture | None:
    """How many users gain how much by their own vector, in the mean of so many training seeds."""
    values, against = np.array(gains.get("by_user") or (), float), str(gains.get("against"))
    if not len(values):
        return None
    caption = (
        f"Mean gain of the user's own vector over the arm {against}, user by user"
        f"{f', over {seeds} training seeds' if seeds > 1 else ''}. Right of zero: the user gains; "
        f"that is {float((values > 0).mean()):.0%} of {len(values):,} users."
    )
    if same := int((values == 0).sum()):
        caption += f" Grey: no difference for {same:,}."
    return picture(
        folder,
        "gains",
        "Gain by user",
        caption,
        2.7,
        lambda figure: _histogram(figure.subplots(), values, against, metric),
    )


def draw_context(arms: Mapping[str, Any], gains: Mapping[str, Any], metric: Metric, folder: Path) -> Picture | None:
    """What each arm wins over the bare model against the tokens that it costs in every prompt."""
    found = gains_over_none(arms, gains, metric)
    if not found:
        return None
    own = " Over all tokens; intervals are each arm's own." if metric.perplexity and not gains.get("over_none") else ""
    caption = (
        f"Gain over the bare model (dashed) against the tokens that the conditioning adds to every prompt; with 95% "
        f"intervals. Top left: much for little. Arms of one cost stand side by side.{own}"
    )
    return picture(
        folder, "context", "Gain against context", caption, 2.9, lambda figure: _context(figure, found, metric)
    )


def costed(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms with the tokens that they add to a prompt; these stand with the likelihoods, whatever comes first."""
    costs: dict[str, dict[str, Any]] = {}
    for section in results.get("other_metrics") or ():
        for arm, figures in section["arms"].items():
            if "context_tokens" in figures:
                costs[arm] = {"context_tokens": figures["context_tokens"]}
    return {arm: costs.get(arm, {}) | figures for arm, figures in results["arms"].items()}


def gains_over_none(arms: Mapping[str, Any], gains: Mapping[str, Any], metric: Metric) -> list[Gain]:
    """Gain over the arm none of every arm whose cost is known.

    It is the results' own (a mean over examples, as in the comparisons); in results of before there were any, it
    follows from the arms' own figures.
    """
    names = [arm for arm in arm_order(arms) if arm != "none" and arms[arm].get("context_tokens") is not None]
    if "none" not in arms:
        return []
    if over_none := gains.get("over_none"):
        told = [(arm, over_none[arm]["gain"], over_none[arm]["ci"]) for arm in names if arm in over_none]
        return [Gain(arm, arms[arm]["context_tokens"], float(gain), _sorted(ci)) for arm, gain, ci in told]
    found, floor = [], metric.mean(arms["none"])
    for arm in names:
        if floor is not None and (mean := metric.mean(arms[arm])) is not None:
            ends = None if mean[1] is None else [metric.sign * (floor[0] - bound) for bound in mean[1]]
            found.append(Gain(arm, arms[arm]["context_tokens"], metric.sign * (floor[0] - mean[0]), _sorted(ends)))
    return found


def draw_arms(arms: Mapping[str, Any], metric: Metric, folder: Path) -> Picture | None:
    """Every arm's perplexity, or its mean of another headline metric."""
    names, values = [], []
    perplexity = metric.perplexity
    for arm in arm_order(arms):
        mean = metric.mean(arms[arm])
        if perplexity and arms[arm].get("perplexity") is not None:
            mean = arms[arm]["perplexity"], arms[arm].get("perplexity_ci")
        if mean is not None:
            names.append(arm)
            values.append(mean)
    if not names:
        return None
    label = "perplexity" if perplexity else metric.label

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for row, (arm, (value, interval)) in enumerate(zip(names, values, strict=True)):
            bar(axes, value, interval, row, ARM_TONES["e2p"] if arm.startswith("e2p") else GREY)
            text = show_perplexity(value) if perplexity else f"{value:.3f}"
            axes.annotate(text, (value, row), (0, 5), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set_xlabel(label)
        rows(axes, names)

    side = "Left" if metric.better == "lower" else "Right"
    title = f"{label[0].upper()}{label[1:]} by arm"
    caption = f"{title}, with 95% intervals from a bootstrap over users. {side} is better."
    return picture(folder, "arms", title, caption, 0.75 + 0.36 * len(names), paint)


def draw_breakdowns(breakdowns: Sequence[Mapping[str, Any]], metric: Metric, folder: Path) -> Picture | None:
    """For whom it works: one panel for everything that examples are divided by."""
    if not breakdowns:
        return None
    titles = [textwrap.wrap(short(str(one["label"]), 120), 36) for one in breakdowns]
    # A panel's height is its rows and the lines of its title, so that rows are as far apart in all of them.
    heights = [0.3 + 0.2 * len(title) + 0.28 * len(one["bins"]) for title, one in zip(titles, breakdowns, strict=True)]

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(breakdowns), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for axes, title, one in zip(panels, titles, breakdowns, strict=True):
            for row, part in enumerate(one["bins"]):
                low, high = part["ci"] or (np.nan, np.nan)
                word = "better" if metric.sign * part["difference"] < 0 else "worse"
                bar(axes, part["difference"], part["ci"], row, TONES[word] if low > 0 or high < 0 else GREY)
            axes.axvline(0, color=INK, linewidth=1)
            axes.set_title("\n".join(title), loc="left", fontsize=9, fontweight="normal")
            rows(axes, [str(part["label"]) for part in one["bins"]])
        panels[-1].set_xlabel(f"{short(str(breakdowns[0]['comparison']), 40)}, {metric.label}")

    side = "Left" if metric.better == "lower" else "Right"
    caption = (
        "Difference between the user's own vector and its control by what is known of the example, with 95% intervals "
        f"from a bootstrap over users, each for itself. {side} of zero: better. Grey: the interval holds zero."
    )
    return picture(folder, "breakdowns", "For whom it works", caption, 0.5 + sum(heights), paint)


def _sorted(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ends is None else (float(min(ends)), float(max(ends)))


def _histogram(axes: Any, values: np.ndarray, against: str, metric: Metric) -> None:
    # Two users in a hundred on either side may lie far out; they are counted in the outermost bars.
    low, high = np.quantile(values, [0.01, 0.99])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / 30
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width  # zero is an edge
    counts, edges = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    colours = [TONES["better"] if left >= -width / 2 else TONES["worse"] for left in edges[:-1]]
    axes.bar(edges[:-1], counts, width * 0.92, align="edge", color=colours)
    if same := int((values == 0).sum()):  # of a rate, many: neither a gain nor a loss
        at = min(int(np.searchsorted(edges, 0, "right")) - 1, len(counts) - 1)
        axes.bar(edges[at], same, width * 0.92, align="edge", color=GREY)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_ylim(0, counts.max() * 1.18)  # room for the text at the mean
    mean = float(values.mean())
    axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    left = mean > (edges[0] + edges[-1]) / 2  # there is more room on that side
    axes.annotate(f"mean {mean:+.3f}".replace("-", "−"), (mean, 1), (-5 if left else 5, -9),
                  xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8.5,
                  ha="right" if left else "left")  # fmt: skip
    axes.set_xlabel(f"gain over {against}, {metric.label}")
    axes.set_ylabel("users")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")


def _context(figure: Any, gains: Sequence[Gain], metric: Metric) -> None:
    from matplotlib.transforms import offset_copy

    axes = figure.subplots()
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    groups: list[list[Gain]] = []
    for gain in sorted(gains, key=lambda gain: gain.tokens):
        if not groups or gain.tokens > groups[-1][0].tokens * 1.5 + 0.5:
            groups.append([])
        groups[-1].append(gain)
    for group in groups:
        group.sort(key=lambda gain: -gain.gain)
        for place, gain in enumerate(group):
            tone = ARM_TONES.get(gain.arm, GREY)
            beside = offset_copy(axes.transData, figure, x=5.5 * (place - (len(group) - 1) / 2), units="points")
            if gain.ci is not None:
                axes.plot(
                    [gain.tokens] * 2, gain.ci, color=tone, linewidth=2.2, solid_capstyle="round", transform=beside
                )
            axes.plot(gain.tokens, gain.gain, "o", color=tone, markersize=6, transform=beside)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    most = max(gain.tokens for gain in gains)
    axes.set_xlim(-0.3, max(most, 1) * 13)  # room for the names
    ticks = [0] + [10**power for power in range(5) if 10**power <= most * 3]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    ends = [0.0, *(gain.gain for gain in gains), *(end for gain in gains for end in gain.ci or ())]
    room = 0.08 * (max(ends) - min(ends) or 1)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("tokens added to the prompt")
    axes.set_ylabel(f"gain over none, {metric.label}")
    figure.draw_without_rendering()  # names are spread in points, which need the final size
    figure.set_layout_engine("none")
    to_points = 72 / figure.dpi
    for group in groups:
        heights = [axes.transData.transform((0, gain.gain))[1] * to_points for gain in group]
        right = 5.5 * (len(group) - 1) / 2 + 8
        for gain, at, height in zip(group, spread(heights, 11), heights, strict=True):
            axes.annotate(gain.arm, (gain.tokens, gain.gain), (right, at - height), textcoords="offset points",
                          va="center", fontsize=8.5, color=ARM_TONES.get(gain.arm, GREY))  # fmt: skip


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Heights, highest first, moved as little as possible so that they are ``apart`` (pool adjacent violators)."""
    blocks: list[list[float]] = []  # sum of the tops that a block's members ask for, members
    for place, height in enumerate(heights):
        blocks.append([height + place * apart, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] < blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    tops = [total / members for total, members in blocks for _ in range(int(members))]
    return [top - place * apart for place, top in enumerate(tops)]
