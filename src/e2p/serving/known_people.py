"""What a run folder tells a visitor of its users: where they lie, what is known of them, what they were asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import polars as pl

from e2p.config_io import load_yaml
from e2p.data.sources import READ_ERRORS, open_table
from e2p.errors import E2PError
from e2p.evaluation.figures_space import SPACE_COLUMNS
from e2p.evaluation.look import GREY

_PROMPTS = 4
_ROWS = 100_000
_COLUMNS = ("user_id", "profile", "prompt", "messages")
_SIDE, _EDGE, _GAP = 260.0, 12.0, 28.0


@dataclass(frozen=True)
class Place:
    """A user on both maps: (x, y) of his vector and of his soft tokens, each from 0 to 1."""

    vector: tuple[float, float]
    prefix: tuple[float, float]


@dataclass(frozen=True)
class KnownPeople:
    """Users of a run, as far as its folder and its example table tell of them; empty where there is nothing.

    Args:
        places: on the t-SNE maps of ``space.parquet``, test users first.
        profiles: text profiles out of the example table.
        prompts: what examples ask most often.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    profiles: Mapping[str, str] = field(default_factory=dict)
    prompts: Sequence[str] = ()

    def far_apart(self, users: Sequence[str]) -> tuple[str, ...]:
        """The first of some users and the one whose soft tokens lie farthest from his; fewer where there are fewer."""
        first = users[:1]
        on_map = [user for user in users[1:] if user in self.places]
        if not on_map or users[0] not in self.places:
            return tuple(users[:2])
        here = self.places[users[0]].prefix
        return (*first, max(on_map, key=lambda user: math.dist(here, self.places[user].prefix)))


def known_people(folder: str) -> KnownPeople:
    """Read a run's or an adapter's folder. What is not there or cannot be read is left out: nobody needs it."""
    path = Path(folder).expanduser()
    run = path if (path / "config.yaml").is_file() else path.resolve().parent
    places = _places(run / "space.parquet")
    try:
        frame = _first_rows(load_yaml(run / "config.yaml").data.examples)
    except (E2PError, OSError):
        return KnownPeople(places)
    return KnownPeople(places, _profiles(frame, places), _prompts(frame))


def _first_rows(source: str) -> pl.DataFrame:
    """The first rows of an example table: enough to know what is asked, whatever its size. Raises DataError."""
    table, parts, rows = open_table(source), [], 0
    table.require("user_id")
    for start, part in table.batches([name for name in _COLUMNS if name in table.schema], 16_384):
        parts.append(part)
        rows = start + part.height
        if rows >= _ROWS:
            break
    return pl.concat(parts)


def _places(path: Path) -> dict[str, Place]:
    try:
        frame = pl.read_parquet(path, columns=list(SPACE_COLUMNS))
    except READ_ERRORS:
        return {}
    columns = {}
    for part in ("embedding", "prefix"):
        points = frame.select(f"{part}_x", f"{part}_y").to_numpy()
        low, high = points.min(0, initial=0), points.max(0, initial=0)
        # One scale for both axes: distances on the map are t-SNE's own.
        columns[part] = ((points - (low + high) / 2) / (float((high - low).max()) or 1.0) + 0.5).tolist()
    rows = zip(frame["user_id"], columns["embedding"], columns["prefix"], strict=True)
    return {str(user): Place((x, y), (u, v)) for user, (x, y), (u, v) in rows}


def _profiles(frame: pl.DataFrame, places: Mapping[str, Place]) -> dict[str, str]:
    if "profile" not in frame.columns:
        return {}
    rows = frame.select(pl.col("user_id").cast(pl.String), pl.col("profile").cast(pl.String)).drop_nulls()
    # Users beyond the map can be typed, but a table of millions of profiles is not held for that.
    kept = rows.filter(pl.col("user_id").is_in(list(places))) if places else rows.head(1000)
    return dict(kept.unique("user_id", keep="first", maintain_order=True).iter_rows())


def _prompts(frame: pl.DataFrame) -> tuple[str, ...]:
    """The commonest prompts of one turn; longer dialogues do not fit into a line."""
    if "prompt" in frame.columns:
        texts = frame["prompt"].cast(pl.String)
    elif isinstance(frame.schema.get("messages"), pl.List):
        single = frame.filter(pl.col("messages").list.len() == 1)["messages"].list.first()
        texts = single.filter(single.struct.field("role") == "user").struct.field("content")
    else:
        return ()
    short = texts.drop_nulls().filter(texts.drop_nulls().str.len_chars().is_between(1, 120))
    counts = short.rename("prompt").value_counts().sort(["count", "prompt"], descending=[True, False])
    return tuple(counts["prompt"].head(_PROMPTS))


# ---------------------------------------------------------------- the map


def draw_map(places: Mapping[str, Place], picked: Iterable[tuple[str, str, str]]) -> str:
    """Both maps side by side as SVG, everybody in grey.

    Args:
        places: users.
        picked: user, label and colour of those that are marked, if they are on the map.
    """
    if not places:
        return ""
    marked = [pick for pick in picked if pick[0] in places]
    width, height = 2 * _SIDE + _GAP, _SIDE + 22
    label = f"Maps of {len(places)} users; marked: {', '.join(user for user, _, _ in marked) or 'none'}"
    parts = [f'<svg class="e2p-map" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">']
    for index, (part, title) in enumerate((("vector", "their vectors"), ("prefix", "their soft tokens"))):
        left = index * (_SIDE + _GAP)
        parts.append(f'<g transform="translate({left:g} 22)"><text class="e2p-title" x="0" y="-8">{title}</text>')
        parts.append(f'<rect width="{_SIDE:g}" height="{_SIDE:g}" rx="8" class="e2p-frame"/><g fill="{GREY}">')
        for user, place in places.items():
            x, y = _at(getattr(place, part))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.9"><title>{escape(user)}</title></circle>')
        parts.append("</g>")
        for user, label, colour in marked:
            x, y = _at(getattr(places[user], part))
            parts.append(
                f'<g class="e2p-mark"><circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" fill="{colour}"/>'
                f'<text x="{x:.1f}" y="{y + 3.6:.1f}">{escape(label)}</text><title>{escape(user)}</title></g>'
            )
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def _at(point: tuple[float, float]) -> tuple[float, float]:
    inner = _SIDE - 2 * _EDGE
    return _EDGE + inner * point[0], _EDGE + inner * (1 - point[1])
