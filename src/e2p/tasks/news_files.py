"""Public files of news reading as tables: PENS (v7) and MIND, in their official layouts.

Both are tab-separated, and they quote differently: PENS as spreadsheets do (a field with a tab, a line break or a quote
stands in quotes), MIND not at all, where a headline may begin with a quote that never closes.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from e2p.data.sources import UTC as TIME
from e2p.errors import DataError

Kind = Literal["pens", "mind"]
TIMES = "%m/%d/%Y %I:%M:%S %p"  # of both; without a time zone, and only their order matters here
MOST_LINES = 1_000  # that a quoted field may span; beyond, its quote was never meant to open one
NAMED = 5  # lines that are named of each kind of fault
_PENS_NEWS = ("newsid", "category", "topic", "headline", "newsbody")
_PENS_CLICKS = ("userid", "clicknewsid", "dwelltime", "exposuretime", "pos", "neg", "start")
_PENS_TEST = ("userid", "clicknewsid", "posnewid", "rewritetitles")
_ARTICLES = {"article_id": pl.String, "headline": pl.String, "body": pl.String, "category": pl.String}
_VISITS: dict[str, Any] = {
    "user_id": pl.String,
    "timestamp": TIME,
    "history": pl.List(pl.String),
    "dwell": pl.List(pl.Float64),
    "clicked": pl.List(pl.String),
    "passed": pl.List(pl.String),
    "rewritten": pl.List(pl.String),
    "split": pl.String,
}


@dataclass(eq=False)
class Faults:
    """Rows that were not taken: how many by file and reason, and the first lines of each."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lines: defaultdict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, path: Path, line: int, reason: str) -> None:
        """Note a row that begins at this line, counted from 1."""
        self.counts[str(path), reason] += 1
        if len(self.lines[str(path), reason]) < NAMED:
            self.lines[str(path), reason].append(line)

    def told(self) -> list[str]:
        """One line for each file and reason."""
        found = []
        for (path, reason), count in self.counts.items():
            lines = ", ".join(map(str, self.lines[path, reason]))
            found.append(f"{path}: {count:,} rows left out: {reason} (line {lines}{', …' if count > NAMED else ''})")
        return found


@dataclass(frozen=True, eq=False)
class News:
    """What the files say.

    Args:
        articles: article_id, headline, body, category; texts may be empty. One row an article.
        visits: one row an impression: user_id, timestamp (Datetime us UTC; null where the files have none), history
            (article ids clicked before, oldest first), dwell (seconds on each of them, null where unknown), clicked and
            passed (article ids shown), rewritten (PENS' test: the user's own headline of each one clicked; else null),
            split (null where the files divide nothing).
        kind: which files these are.
        faults: rows that are not as documented.
    """

    articles: pl.DataFrame
    visits: pl.DataFrame
    kind: Kind
    faults: Faults


def read(source: str | Path) -> News:
    """Read what lies in a folder: PENS, MIND, or MIND's folders of train and dev.

    Raises:
        DataError: a file is missing, is no text, has another header, or nothing in it is as documented.
    """
    folder = Path(source)
    pens = folder / "personalized_test.tsv"
    parts = {part: sorted(folder.glob(f"*{part}*/behaviors.tsv")) for part in ("train", "dev")}
    if pens.is_file():
        return read_pens(folder)
    if (folder / "behaviors.tsv").is_file():
        return read_mind({None: folder})
    if all(len(found) == 1 for found in parts.values()):
        return read_mind({"train": parts["train"][0].parent, "test": parts["dev"][0].parent})
    raise DataError(
        f"{source}: expected personalized_test.tsv, train.tsv, valid.tsv and news.tsv (PENS), or behaviors.tsv and "
        "news.tsv (MIND), or folders of MIND's train and dev parts, got none of them; name the folder that holds them"
    )


def read_pens(folder: Path) -> News:
    """PENS: news.tsv, train.tsv, valid.tsv and personalized_test.tsv, with their headers; more columns may be there.

    Lists of ids are separated by spaces or commas. An impression of train.tsv and valid.tsv happens at its ``start``;
    the test's users wrote their headlines after all of them, which is the time that they get.

    Raises:
        DataError: as :func:`read`.
    """
    faults = Faults()
    articles: dict[str, tuple[str, ...]] = {}
    path = folder / "news.tsv"
    for line, row in _pens_rows(path, _PENS_NEWS, faults):
        _article(articles, row["newsid"], (row["headline"], row["newsbody"], row["category"]), path, line, faults)
    visits: list[tuple[Any, ...]] = []
    for name, split in (("train.tsv", "train"), ("valid.tsv", "validation")):
        path = folder / name
        for line, row in _pens_rows(path, _PENS_CLICKS, faults):
            when = _time(row["start"])
            if not row["userid"] or when is None:
                faults.add(path, line, "without a user" if not row["userid"] else "start is no time")
                continue
            history, dwell = _ordered(_ids(row["clicknewsid"]), row["dwelltime"], row["exposuretime"])
            clicked, passed = _ids(row["pos"]), _ids(row["neg"])
            visits.append((row["userid"], when, history, dwell, clicked, passed, None, split))
    last = max((visit[1] for visit in visits), default=datetime(2000, 1, 1, tzinfo=UTC))
    after = datetime.fromtimestamp(last.timestamp() + 1, UTC)
    path = folder / "personalized_test.tsv"
    for line, row in _pens_rows(path, _PENS_TEST, faults):
        shown, written = _ids(row["posnewid"]), [title.strip() for title in row["rewritetitles"].split(";;")]
        if not row["userid"] or len(shown) != len(written):
            reason = "without a user" if not row["userid"] else "not as many headlines as articles"
            faults.add(path, line, reason)
            continue
        visits.append((row["userid"], after, _ids(row["clicknewsid"]), None, shown, [], written, "test"))
    return _news(articles, visits, "pens", folder, faults)


def read_mind(parts: Mapping[str | None, Path]) -> News:
    """MIND: behaviors.tsv and news.tsv of each part, without header and without quoting; the abstract is the body.

    Raises:
        DataError: as :func:`read`.
    """
    faults = Faults()
    articles: dict[str, tuple[str, ...]] = {}
    visits: list[tuple[Any, ...]] = []
    for split, folder in parts.items():
        path = folder / "news.tsv"
        known: dict[str, tuple[str, ...]] = {}  # a part's own: the other one has many of them again
        for line, cells in _raw_rows(path, 8, faults):
            _article(known, cells[0], (cells[3], cells[4], cells[1]), path, line, faults)
        articles = known | articles
        path = folder / "behaviors.tsv"
        for line, cells in _raw_rows(path, 5, faults):
            _, user, time, history, shown = (cell.strip() for cell in cells)
            when, marked = _time(time), [one.rpartition("-") for one in shown.split()]
            if not user or when is None:
                faults.add(path, line, "without a user" if not user else "time is no time")
            elif not marked or any(not article or mark not in ("0", "1") for article, _, mark in marked):
                faults.add(path, line, "impressions are not like N123-1 N456-0")
            else:
                clicked, passed = ([article for article, _, mark in marked if mark == kind] for kind in ("1", "0"))
                visits.append((user, when, history.split(), None, clicked, passed, None, split))
    return _news(articles, visits, "mind", next(iter(parts.values())), faults)


def _news(
    articles: Mapping[str, Sequence[str]], visits: Sequence[tuple[Any, ...]], kind: Kind, where: Path, faults: Faults
) -> News:
    for what, found in (("article", articles), ("impression", visits)):
        if not found:
            told = "; ".join(faults.told())
            raise DataError(f"{where}: expected {what}s, got none as documented; check the files{told and ': '}{told}")
    table = pl.DataFrame([(name, *texts) for name, texts in articles.items()], schema=_ARTICLES, orient="row")
    return News(table, pl.DataFrame(visits, schema=_VISITS, orient="row"), kind, faults)


def _article(
    articles: dict[str, tuple[str, ...]], name: str, texts: tuple[str, ...], path: Path, line: int, faults: Faults
) -> None:
    name = name.strip()
    if not name or name in articles:
        faults.add(path, line, "articles that came before" if name else "without an article id")
    else:
        articles[name] = tuple(" ".join(text.split()) for text in texts)


def _ids(text: str) -> list[str]:
    return [one for one in re.split(r"[\s,]+", text.strip()) if one]


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text.strip(), TIMES).replace(tzinfo=UTC)
    except ValueError:
        return None


def _ordered(history: list[str], dwelling: str, exposed: str) -> tuple[list[str], list[float] | None]:
    """A history oldest first by its exposure times, where each click has one, with the seconds that it was read."""
    try:
        dwell = [float(one) for one in dwelling.split()]
    except ValueError:
        dwell = []
    known = len(dwell) == len(history) > 0
    times = [when for one in exposed.split("#TAB#") if (when := _time(one))]
    if len(times) == len(history):
        order = sorted(range(len(history)), key=lambda at: times[at])
        history = [history[at] for at in order]
        dwell = [dwell[at] for at in order] if known else dwell
    return history, dwell if known else None


def _raw_rows(path: Path, columns: int, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of a file in which a tab always ends a cell."""
    for line, text in enumerate(_lines(path), start=1):
        cells = text.split("\t")
        if len(cells) == columns:
            yield line, cells
        elif text.strip():
            faults.add(path, line, f"not {columns} columns")


def _pens_rows(path: Path, wanted: Iterable[str], faults: Faults) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by name, of a file with a header and quotes as spreadsheets write them.

    A quote that no later line closes, in a file that some other program wrote, would swallow all rows up to the next
    one. So a row is what the quotes say only if that gives as many cells as the header has; else the line stands for
    itself, and its quotes are text.
    """
    lines = _lines(path)
    header = [re.sub(r"[^a-z]", "", cell.lower()) for cell in _cells([lines[0]]) or []] if lines else []
    if missing := [name for name in wanted if name not in header]:
        raise DataError(
            f"{path}:1: expected a header with {', '.join(wanted)}, got no {', '.join(missing)}; take the official file"
        )
    at = 1
    while at < len(lines):
        start, cells = at, _cells(lines[at : at + 1])
        at += 1
        if not lines[start].strip():
            continue
        if cells is None or len(cells) != len(header):
            raw = lines[start].split("\t")
            whole = raw if len(raw) == len(header) else None
            # A quoted line break in the last cell leaves a line that looks whole: then what follows does not.
            if cells is None and not (whole and _looks_whole(lines[at : at + 1], len(header))):
                cells, at = _joined(lines, start, len(header))
                cells = cells or whole
            else:
                cells = whole
        if cells is None:
            faults.add(path, start + 1, f"not {len(header)} columns")
        else:
            yield start + 1, dict(zip(header, cells, strict=True))


def _looks_whole(following: list[str], columns: int) -> bool:
    return not following or not following[0].strip() or following[0].count("\t") == columns - 1


def _joined(lines: list[str], start: int, columns: int) -> tuple[list[str] | None, int]:
    """The row that a quoted field spreads over several lines, and the first line after it."""
    for end in range(start + 2, min(start + MOST_LINES, len(lines)) + 1):
        if '"' in lines[end - 1] and (cells := _cells(lines[start:end])) is not None:
            return (cells, end) if len(cells) == columns else (None, start + 1)
    return None, start + 1


def _cells(lines: list[str]) -> list[str] | None:
    """Cells of one row; None if its quotes do not close, or stand where they cannot."""
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _lines(path: Path) -> list[str]:
    """Lines as a line feed ends them: other characters that end one for Python occur inside headlines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"
        raise DataError(f"{path}: expected one of the official files, got: {reason}; check the path") from None
    return [line.removesuffix("\r") for line in text.split("\n")]
