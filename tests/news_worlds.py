"""Small PENS and MIND folders in their official layouts, for the tests that read them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PENS_NEWS = ["News ID", "Category", "Topic", "Headline", "News body", "Title entity", "Entity content"]
PENS_CLICKS = [
    "UserID",
    "ClicknewsID",
    "dwelltime",
    "exposure_time",
    "pos",
    "neg",
    "start",
    "end",
    "dwelltime_pos",
]
PENS_TEST = ["userid", "clicknewsID", "posnewID", "rewrite_titles"]


def tsv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """As pandas writes it: quotes where a cell needs them."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def raw(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """As MIND is written: no cell is quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pens(folder: Path, news: Sequence[Sequence[str]], train: Sequence[Sequence[str]] = (),
         valid: Sequence[Sequence[str]] = (), test: Sequence[Sequence[str]] = ()) -> Path:  # fmt: skip
    """PENS v7: articles as (id, headline, body)."""
    tsv(
        folder / "news.tsv",
        [PENS_NEWS, *([one, "news", "world", title, body, "{}", "{}"] for one, title, body in news)],
    )
    for name, rows in (("train", train), ("valid", valid)):
        tsv(folder / f"{name}.tsv", [PENS_CLICKS, *rows])
    tsv(folder / "personalized_test.tsv", [PENS_TEST, *test])
    return folder


def click(user: str, history: str, pos: str, neg: str, start: str = "7/3/2019 6:43:49 AM", dwell: str | None = None,
          exposed: str | None = None) -> list[str]:  # fmt: skip
    """A row of train.tsv or valid.tsv."""
    count = len(history.split())
    dwell = " ".join(["10"] * count) if dwell is None else dwell
    times = "#TAB#".join(f"6/{day + 1}/2019 5:10:01 AM" for day in range(count)) if exposed is None else exposed
    return [user, history, dwell, times, pos, neg, start, "7/3/2019 7:06:06 AM", " ".join(["34"] * len(pos.split()))]


def mind(folder: Path, news: Sequence[Sequence[str]], visits: Sequence[Sequence[str]]) -> Path:
    """MIND: articles as (id, title, abstract), visits as (user, time, history, impressions)."""
    articles = [[one, "sports", "golf", title, body, "https://x", "[]", "[]"] for one, title, body in news]
    raw(folder / "news.tsv", articles)
    raw(folder / "behaviors.tsv", [[str(number), *visit] for number, visit in enumerate(visits, start=1)])
    return folder


def mind_world(folder: Path, seed: int = 0, users: int = 60, articles: int = 40) -> Path:
    """Random clicks on articles N0, N1, ...; some have no body, some are not in news.tsv, some users no history."""
    rng = np.random.default_rng(seed)
    news = [(f"N{i}", f"Headline {i} of {i}", "" if i % 11 == 10 else f"body {i} " * 4) for i in range(articles)]
    visits = []
    for user in range(users):
        history = [f"N{i}" for i in rng.choice(articles + 6, rng.integers(0, 16) if user % 9 else 0, replace=True)]
        for day in range(int(rng.integers(1, 3))):
            shown = rng.choice(articles + 6, 8, replace=False)
            marks = rng.random(8) < 0.4
            listed = " ".join(f"N{i}-{int(mark)}" for i, mark in zip(shown, marks, strict=True))
            visits.append((f"U{user}", f"11/{10 + day}/2019 {1 + user % 12}:14:46 PM", " ".join(history), listed))
    return mind(folder, news, visits)
