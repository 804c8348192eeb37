"""Public files of next-item prediction as tables: MovieLens, sequences of TIGER and P5, MiniOneRec's Amazon rows."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from e2p.data.sources import UTC as TIME
from e2p.data.sources import first_true, locator, open_table
from e2p.errors import DataError
from e2p.tasks.music_files import clean

Kind = Literal["movielens", "sequences", "minionerec"]
START = datetime(2000, 1, 1, tzinfo=UTC)  # of the made-up times: the n-th interaction of a user is n days later
TOO_LATE = 253_402_300_800  # the year 10000, in seconds: milliseconds would come out later still
ROWS = 262_144
PARTS = ("history", "train", "valid", "test")  # where an interaction of MiniOneRec's files stands
_LIST = r"^\s*\[\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\]\s*$"
_LONGEST = 400  # characters of a text that stands for an item; a sentence encoder reads about as much


@dataclass(frozen=True, eq=False)
class Histories:
    """What the files say.

    Args:
        log: user_id, item_id (both String), timestamp (Datetime us UTC), by user and time; of one user no two times
            are equal. MiniOneRec's has ``part`` too: where the files have it from, one of :data:`PARTS`.
        items: item_id, item (its name; the id where there is none), text (what stands for it before a sentence encoder;
            null where there is nothing), genres (List[String], lower case). One row an item, all of the log's and more.
        kind: which files these are.
        timed: whether the times are real ones; otherwise they say the order within a user and nothing else.
        codes: ready codes that came along.
        left_out: how many rows were not taken, by reason.
    """

    log: pl.DataFrame
    items: pl.DataFrame
    kind: Kind
    timed: bool
    codes: Path | None = None
    left_out: Counter[str] = field(default_factory=Counter)


def read(source: str | Path) -> Histories:
    """Read what lies in a folder: MovieLens, sequences, or MiniOneRec's files.

    Raises:
        DataError: none or several of them are there, or a file is not as documented; with file and line or row.
    """
    folder = Path(source)
    found = [name for name, marks in MARKS.items() if any(path for mark in marks for path in folder.glob(mark))]
    if len(found) != 1:
        wanted = "; ".join(f"{marks[0]} ({name})" for name, marks in MARKS.items())
        raise DataError(
            f"{source}: expected the files of one data set, of {wanted}, got {' and '.join(found) or 'none of them'}; "
            "name the folder that holds them"
        )
    return {"movielens": read_movielens, "sequences": read_sequences, "minionerec": read_minionerec}[found[0]](folder)


MARKS = {
    "movielens": ("ratings.csv",),
    "sequences": ("sequential.txt",),
    "minionerec": ("test_*.csv", "test/*.csv"),
}


def read_movielens(folder: Path) -> Histories:
    """MovieLens in CSV: ratings.csv (userId, movieId, timestamp in seconds) and movies.csv (movieId, title, genres).

    A rating is an interaction whatever its stars. Ratings of one second follow each other as in the file. Those of a
    film that movies.csv lacks are left out and counted: nothing is known of it.

    Raises:
        DataError: a file or column is missing, a number is none, or a film comes twice; with file and row.
    """
    ratings = _csv(folder / "ratings.csv", ("userId", "movieId", "timestamp"))
    movies = _csv(folder / "movies.csv", ("movieId", "title", "genres"))
    for name, table in (("ratings.csv", ratings), ("movies.csv", movies)):
        for column in ("userId", "movieId", "timestamp"):
            if column in table.columns:
                _whole(table[column], f"{folder / name}", column, TOO_LATE if column == "timestamp" else 2**62)
    twice = first_true(~movies["movieId"].is_first_distinct())
    if twice is not None:
        raise DataError(
            f"{folder / 'movies.csv'}: row {twice}: expected each film once, got {movies['movieId'][twice]} again"
        )
    log = ratings.join(movies, on="movieId", how="semi", maintain_order="left")
    left_out = Counter({"ratings of films that movies.csv lacks": ratings.height - log.height})
    seconds = pl.from_epoch(pl.col("timestamp").cast(pl.Int64)).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    log = log.select(user_id="userId", item_id="movieId", timestamp=seconds)
    log = log.sort("user_id", "timestamp", maintain_order=True)
    tie = pl.int_range(pl.len()).over("user_id", "timestamp")
    log = log.with_columns(pl.col("timestamp") + pl.duration(microseconds=tie))
    genres = pl.col("genres").fill_null("").str.to_lowercase().str.split("|")
    genres = genres.list.eval(pl.element().filter(~pl.element().is_in(["", "(no genres listed)"])))
    named = _named(movies["movieId"], movies["title"]).with_columns(movies.select(genres).to_series())
    text = pl.concat_str("text", pl.col("genres").list.join(", ").replace("", None), separator=", ", ignore_nulls=True)
    return Histories(log, named.with_columns(text.replace("", None).alias("text")), "movielens", True, None, left_out)


def read_sequences(folder: Path) -> Histories:
    """The TIGER and P5 benchmark's sequential.txt, ``user item item ...`` in order; optional datamaps.json.

    Lines of a user without items are left out and counted. Of datamaps.json the items' own ids become their names.

    Raises:
        DataError: a line that is not whole numbers, a user in two lines, or a datamaps.json that is none; with line.
    """
    path = folder / "sequential.txt"
    lines = pl.Series("line", _text(path).split("\n")).str.strip_chars().to_frame().with_row_index("number", offset=1)
    lines = lines.filter(pl.col("line") != "")
    bad = first_true(~lines["line"].str.contains(r"^[0-9]+(\s+[0-9]+)*$"))
    if bad is not None:
        number, line = lines.row(bad)
        raise DataError(f"{path}:{number}: expected 'user item item ...', whole numbers, got {line[:60]!r}; mend it")
    words = pl.col("line").str.extract_all("[0-9]+")
    lines = lines.select("number", user_id=words.list.first(), item_id=words.list.slice(1))
    again = first_true(~lines["user_id"].is_first_distinct())
    if again is not None:
        same = lines.filter(pl.col("user_id") == lines["user_id"][again])["number"]
        raise DataError(
            f"{path}:{same[1]}: expected a user's items in one line, got user {lines['user_id'][again]} in line "
            f"{same[0]} too; join them in order"
        )
    some = lines.filter(pl.col("item_id").list.len() > 0)
    if some.is_empty():
        raise DataError(f"{path}: expected users with items, got none; take the benchmark's file")
    left_out = Counter({"users without items": lines.height - some.height})
    log = _dated(some.select("user_id", "item_id").explode("item_id").sort("user_id", maintain_order=True))
    ids = log["item_id"].unique().sort()
    names, maps = ids, folder / "datamaps.json"
    if maps.is_file():
        known = _object(maps).get("id2item")
        if not isinstance(known, dict):
            raise DataError(f"{maps}: expected an object with 'id2item', got {type(known).__name__}; take the official")
        names = pl.Series([str(known.get(item, "")) for item in ids], dtype=pl.String)
    # A store's number says nothing to a sentence encoder.
    items = _named(ids, names).with_columns(text=pl.lit(None, pl.String))
    return Histories(log, items, "sequences", False, None, left_out)


def read_minionerec(folder: Path) -> Histories:
    """Amazon as MiniOneRec has it: rows of a history and the item after it, item texts, ready codes.

    A user's rows follow each other: the history of each ends the sequence of the first one's history and the items of
    the rows since. That sequence is what is read; it is longer than a history, which the files cut at ten items.

    Files: ``test_*.csv`` and ``valid_*.csv``, maybe ``train_*.csv`` (or in folders of these names), with user_id,
    history_item_id and item_id; ``*.item.json`` and ``*.index.json``, at least one of them. An item without a title is
    called by its id.

    Raises:
        DataError: a file or column is missing, a list is broken, a history is not of its user's sequence, an item is in
            neither JSON file; with file and row.
    """
    texts, codes = _one(folder, "*.item.json", "index/*.item.json"), _one(folder, "*.index.json", "index/*.index.json")
    if texts is None and codes is None:
        raise DataError(f"{folder}: expected *.item.json or *.index.json, got neither; add the items' texts or codes")
    described = {} if texts is None else _object(texts)
    ids = list(dict.fromkeys([*described, *({} if codes is None else _object(codes))]))
    rows = []
    for part in PARTS[1:]:
        path = _one(folder, f"{part}_*.csv", f"{part}/*.csv")
        if path is not None:
            rows.append(_rows(path, ids).with_columns(part=pl.lit(part, pl.Enum(PARTS)), file=pl.lit(str(path))))
        elif part != "train":
            raise DataError(f"{folder}: expected {part}_*.csv, got none; put the official file there")
    entries = [_entry(described, item, texts) for item in ids]
    named = _named(pl.Series(ids), pl.Series([title for title, _ in entries], dtype=pl.String))
    more = pl.Series("more", [text for _, text in entries], dtype=pl.String).str.slice(0, _LONGEST).replace("", None)
    text = pl.concat_str("text", named.select(more).to_series(), separator=". ", ignore_nulls=True).replace("", None)
    return Histories(
        _dated(_sequences(pl.concat(rows))), named.with_columns(text.alias("text")), "minionerec", False, codes
    )


def _rows(path: Path, ids: Sequence[str]) -> pl.DataFrame:
    """row, user_id, history (List[String]) and item_id of a file, checked."""
    table = _csv(path, ("user_id", "history_item_id", "item_id"))
    where = locator(str(path), 0, table["user_id"])
    bad = first_true(table["user_id"].is_null())
    if bad is not None:
        raise DataError(f"{path}: row {bad}: user_id: expected a user, got none; fill it or drop the row")
    broken = first_true(~table["history_item_id"].str.contains(_LIST).fill_null(False))
    if broken is not None:
        got = table["history_item_id"][broken]
        raise DataError(f"{where(broken)}: history_item_id: expected a list like [1, 2], got {got!r:.60}; mend the row")
    _whole(table["item_id"], str(path), "item_id")
    history = pl.col("history_item_id").str.extract_all("[0-9]+")
    table = table.with_row_index("row").select("row", "user_id", "item_id", history=history)
    known = pl.Series(ids).implode()
    unknown = first_true(
        ~table["item_id"].is_in(known) | ~table["history"].list.eval(pl.element().is_in(known)).list.all()
    )
    if unknown is not None:
        got = [item for item in (*table["history"][unknown], table["item_id"][unknown]) if item not in set(ids)]
        raise DataError(
            f"{where(unknown)}: expected items of *.item.json or *.index.json, got {got[0]}; take the files "
            "of one release"
        )
    return table


def _sequences(rows: pl.DataFrame) -> pl.DataFrame:
    """user_id, item_id and part of each user's one sequence, in order; a history that is not of it is refused."""
    rows = rows.sort("user_id", maintain_order=True)
    first = rows.filter(pl.col("user_id").is_first_distinct())
    start = (
        first.select("user_id", "history").explode("history", empty_as_null=False).select("user_id", item_id="history")
    )
    start = start.with_columns(part=pl.lit("history", pl.Enum(PARTS)))
    log = pl.concat([start, rows.select("user_id", "item_id", "part")]).sort("user_id", maintain_order=True)
    # Where each row's target stands, and whether the items before it are the row's history.
    targets = log.with_row_index("place").filter(pl.col("part") != "history")
    begins = log.with_row_index("begin").group_by("user_id").agg(pl.col("begin").min())
    checked = rows.with_columns(place=targets["place"]).join(begins, on="user_id", maintain_order="left", how="left")
    size = pl.col("history").list.len().cast(pl.Int64)
    checked = checked.with_row_index("number").with_columns(since=pl.col("place").cast(pl.Int64) - size)
    flat = checked.select("number", "history", pl.int_ranges("since", pl.col("place").cast(pl.Int64)).alias("at"))
    flat = flat.explode("history", "at", empty_as_null=False).filter(pl.col("at") >= 0)
    same = flat.select("number", same=log["item_id"].gather(flat["at"]) == pl.col("history"))
    wrong = same.filter(~pl.col("same"))["number"].unique()
    bad = first_true((checked["since"] < checked["begin"]) | checked["number"].is_in(wrong.implode()))
    if bad is not None:
        file, row, user, got = checked.select("file", "row", "user_id", "history").row(bad)
        raise DataError(
            f"{file}: row {row} (user {user!r}): expected a history that ends in the items of the user's rows before, "
            f"got {', '.join(got)[:60]}; keep all rows of a user, in order"
        )
    return log


def _dated(log: pl.DataFrame) -> pl.DataFrame:
    """A log by user, with a made-up time for each place in a user's sequence."""
    place = pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")
    return log.with_columns(timestamp=(pl.lit(START) + pl.duration(days=place)).cast(TIME))


def _named(ids: pl.Series, names: pl.Series) -> pl.DataFrame:
    """item_id, item, text and genres: tidied names, ids for those that have none; the text is the name, if any."""
    name = names.fill_null("").map_elements(clean, return_dtype=pl.String)
    frame = pl.DataFrame([ids.cast(pl.String).alias("item_id"), name.alias("text").replace("", None)])
    empty = pl.lit([], pl.List(pl.String))
    return frame.select("item_id", pl.coalesce("text", "item_id").alias("item"), "text", genres=empty)


def _entry(described: dict[str, Any], item: str, path: Path | None) -> tuple[str, str]:
    """Title and description of an item; both may be empty."""
    entry = described.get(item, {})
    if not isinstance(entry, dict):
        raise DataError(
            f"{path}: item {item!r}: expected an object with title, got {entry!r:.60}; take the official file"
        )
    title, text = (entry.get(key) or "" for key in ("title", "description"))
    if isinstance(text, str):  # a list that was written as Python writes it
        text = text.strip("[]").strip("'\"")
    return str(title), clean(" ".join(map(str, text)) if isinstance(text, list) else str(text))


def _csv(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of a CSV file as texts, blank ones as null. Raises DataError with file, and the row that is too long."""
    if not path.is_file():
        raise DataError(f"{path}: not found; take the official files")
    table = open_table(path)
    table.require(*columns)
    try:
        # All columns: where some are left out, Polars lets rows pass that have too many fields.
        parts = [batch.select(columns) for _, batch in table.batches(tuple(table.schema), ROWS)]
    except DataError as error:
        raise _long_row(path, len(table.schema)) or error from None
    if not sum(part.height for part in parts):
        raise table.empty()
    return pl.concat(parts)


def _long_row(path: Path, width: int) -> DataError | None:
    """The fault of a row with more fields than the header; Polars does not say which."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, fields in enumerate(csv.reader(lines)):
                if len(fields) > width:
                    return DataError(
                        f"{path}: row {number - 1}: expected {width} fields, got {len(fields)}; mend the row"
                    )
    except (OSError, ValueError, csv.Error):
        pass
    return None


def _whole(values: pl.Series, path: str, column: str, below: int = 2**62) -> None:
    numbers = values.str.contains("^[0-9]{1,19}$") & (values.cast(pl.Int64, strict=False) < below).fill_null(False)
    bad = first_true(~numbers.fill_null(False))
    if bad is not None:
        what = "seconds since 1970" if column == "timestamp" else "a whole number"
        got = "none" if values[bad] is None else repr(values[bad])
        raise DataError(f"{path}: row {bad}: {column}: expected {what}, got {got:.60}; mend or drop the row")


def _one(folder: Path, *patterns: str) -> Path | None:
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if len(found) > 1:
        raise DataError(f"{folder}: expected one {patterns[0]}, got {found[0].name} and {found[1].name}; keep one")
    return found[0] if found else None


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got: {' '.join(str(error).split())}; take the official file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object by item, got {type(content).__name__}; take the official file")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got byte {error.start}; take the official file") from None
