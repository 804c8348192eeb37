"""Pictures of where the users lie and of what their soft tokens resemble."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from e2p.evaluation.look import GREY, INK, PALETTE, Picture, picture, rows, short
from e2p.evaluation.tables import token

SPACE_COLUMNS = ("user_id", "cluster", "embedding_x", "embedding_y", "prefix_x", "prefix_y")


def draw_space(space: Mapping[str, Any] | None, points: pl.DataFrame | None, folder: Path) -> Picture | None:
    """The users before and after phi, side by side (the paper's Figure 2)."""
    if space is None or points is None:
        return None
    names = [str(cluster["name"]) for cluster in space["clusters"]]

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, 2)
        for axes, part, title in zip(panels, ("embedding", "prefix"), ("embedding space", "prefix space"), strict=True):
            for index, name in enumerate(names):
                own = points.filter(pl.col("cluster") == name)
                axes.plot(own[f"{part}_x"], own[f"{part}_y"], "o", color=PALETTE[index % len(PALETTE)], alpha=0.75,
                          markersize=2.4, markeredgewidth=0, label=short(name, 18))  # fmt: skip
            axes.set_title(title, fontweight="normal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_box_aspect(1)
            axes.spines["bottom"].set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, markerscale=2,
                      handletextpad=0.1, columnspacing=1.2)  # fmt: skip

    height = 2.15 + 0.18 * -(-len(names) // 3)
    return picture(folder, "space", "Users before and after phi", space_caption(space), height, paint)


def draw_likeness(prefix: Mapping[str, Any] | None, folder: Path) -> Picture | None:
    """Tokens nearest to the mean prefix."""
    if prefix is None or not prefix["nearest"]:
        return None
    several = any("soft_token" in near for near in prefix["nearest"])
    nearest = prefix["nearest"]
    if several:  # the best few of each soft token
        order = sorted({near["soft_token"] for near in nearest})
        each = max(1, 12 // len(order))
        nearest = [near for which in order for near in [n for n in nearest if n["soft_token"] == which][:each]]
    chance = prefix.get("chance")

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        values = [near["cosine"] for near in nearest]
        tones = [PALETTE[0] if chance is None or value > chance else GREY for value in values]
        axes.barh(range(len(values)), values, height=0.62, color=tones)
        for row, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (1, row), xycoords=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8.5
            )
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1, linestyle="--")
        names = [token(near["token"]) for near in nearest]
        rows(
            axes,
            [f"{near['soft_token']} {name}" for near, name in zip(nearest, names, strict=True)] if several else names,
        )
        axes.set_xlim(min(0, *values), max(*values, chance or 0) * 1.22 or 1)
        axes.set_xlabel("cosine with the mean prefix")

    return picture(
        folder, "likeness", "What the prefix resembles", likeness_caption(prefix), 0.7 + 0.22 * len(nearest), paint
    )


def space_caption(space: Mapping[str, Any]) -> str:
    """What the map shows, with how far phi keeps neighbours together."""
    return (
        f"{space['users']:,} users mapped by t-SNE, before and after phi; colours: {space['coloured_by']}. Of a user's "
        f"{space['neighbours']} nearest neighbours in embedding space, {space['preservation']:.0%} are also among the "
        f"{space['neighbours']} nearest in prefix space; by chance it would be {space['chance']:.0%}. Neighbours are "
        "counted in the spaces themselves, not on the map."
    )


def likeness_caption(prefix: Mapping[str, Any]) -> str:
    """What the bars show, with the prefix's size beside a token's and the users' share in it."""
    norm, chance = prefix["norm"], prefix.get("chance")
    several = any("soft_token" in near for near in prefix["nearest"])
    return (
        f"Tokens nearest to the mean prefix{', by soft token' if several else ''}; a dot is a space. "
        + ("" if chance is None else f"Dashed: what any random direction reaches ({chance:.2f}). ")
        + f"The prefix's norm is {norm['mean']:.3g} ± {norm['std']:.2g} over users, a token's "
        f"{prefix['token_norm']:.3g}. {prefix['user_share']:.0%} of the prefix (mean square) differs between users."
    )
