"""Vectors in a stranger's table: a list column, a text of numbers, or a column for each number; or made of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.sources import Table, is_text, is_vector
from e2p.data.tables import write_embeddings
from e2p.errors import ConfigError, DataError
from e2p.tasks.table_examples import Plan
from e2p.tasks.table_fields import Field, field_of
from e2p.tasks.table_rows import BadRows, Fault, ParquetSink, blank
from e2p.tasks.table_times import Clock, clock_of

BATCH_ROWS = 16_384
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorSource:
    """Where the vectors stand.

    Args:
        table: the table.
        user: whose vector it is.
        columns: one column of lists or texts, or one column for each number.
        clock: since when there was that vector, if the table says.
        version: name of the vectors' space, if the table says.
    """

    table: Table
    user: Field
    columns: tuple[str, ...]
    clock: Clock | None
    version: Field | None

    @property
    def own(self) -> list[str]:
        """Columns that only vectors are made of."""
        return [*self.columns, *([self.clock.column] if self.clock else [])]

    @property
    def read(self) -> list[str]:
        """All columns that are needed."""
        fields = [field for field in (self.user, self.version) if field is not None]
        names = [column for field in fields for column in field.columns]
        times = [self.clock.column] if self.clock is not None else []
        return list(dict.fromkeys([*names, *times, *self.columns]))

    @property
    def said(self) -> str:
        """How a message names the vector's columns."""
        if len(self.columns) == 1:
            return f"column {self.columns[0]!r}"
        return f"columns {self.columns[0]!r} to {self.columns[-1]!r}"


@dataclass(frozen=True)
class VectorOptions:
    """What the options say about vectors; empty where they say nothing. See :func:`e2p.tasks.table.prepare`."""

    columns: tuple[str, ...] = ()
    user_id: str = ""
    timestamp: str = ""
    time_format: str = ""
    time_zone: str = ""
    version: str = ""

    def source(self, table: Table | None, plan: Plan) -> VectorSource | None:
        """Where the vectors stand: in a table of their own, or beside the examples, or nowhere.

        Beside the examples a time or a version is taken only if named: an example's time is not the vector's.
        """
        own = plan.table if table is None else table
        if table is None and not self.columns and "embedding" not in own.schema:
            if self != VectorOptions():
                raise ConfigError("vector_*, version: expected vectors that they are about, got none; add --embeddings")
            return None
        user = plan.texts["user_id"]
        if table is not None or self.user_id:
            shared = user.column if user.column in own.schema else None
            owner = field_of("user_id", self.user_id or shared or "", own, "vector_user_id")
            if owner is None:
                columns = ", ".join(own.schema)
                raise own.fault(f"expected a column 'user_id', found: {columns}; name it by --vector_user_id")
            user = owner
        clock = version = None
        if table is not None or self.timestamp or self.time_format or self.time_zone:
            clock = clock_of(self.timestamp, own, self.time_format, self.time_zone, "vector_timestamp")
        if table is not None or self.version:
            version = field_of("version", self.version, own)
        # As our own tables are read: a column that nobody named and nobody filled says nothing.
        if clock is not None and not self.timestamp and _is_unfilled(own, clock.column):
            clock = None
        if version is not None and not self.version and _is_unfilled(own, "version"):
            version = None
        return VectorSource(own, user, resolve_columns(self.columns, own), clock, version)


def _is_unfilled(table: Table, column: str) -> bool:
    return all(batch[column].null_count() == batch.height for _, batch in table.batches([column], BATCH_ROWS))


def resolve_columns(wanted: Sequence[str], table: Table) -> tuple[str, ...]:
    """The columns that an option names; f* stands for f0, f1, f2, ..., f10 in this order.

    Raises:
        ConfigError: no such column, one twice, or lists among several.
    """
    found: list[str] = []
    for name in wanted or ("embedding",):
        several = sorted((c for c in table.schema if fnmatchcase(c, name)), key=_natural)
        if name in table.schema:
            several = [name]
        if not several:
            columns = ", ".join(table.schema)
            raise ConfigError(f"vector_columns: expected columns of {table.name}, got {name!r}; it has {columns}")
        found += several
    twice = [name for index, name in enumerate(found) if name in found[:index]]
    if twice:
        raise ConfigError(f"vector_columns: expected each column once, got {twice[0]!r} twice; name it once")
    if len(found) == 1:
        expected = "numbers, a list of numbers, or a text of numbers"
        table.require_type(found[0], lambda d: d.is_numeric() or is_text(d) or is_vector(d), expected)
    for name in found if len(found) > 1 else ():
        table.require_type(name, lambda d: d.is_numeric() or is_text(d), "a number, one of several columns")
    return tuple(found)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def write_vectors(source: VectorSource, path: Path, bad: BadRows) -> tuple[int, int, int, int]:
    """Write the embedding table, a batch at a time; user ids and times are held, vectors are not.

    Returns:
        Rows read, vectors written, rows with the same vector as an earlier one of that user (and time), and D.

    Raises:
        DataError: a row cannot be used, unless ``bad`` counts it; or none is left.
    """
    dim, rows, written, merged = 0, 0, 0, 0
    seen: dict[tuple[str, datetime | None], tuple[int, int]] = {}
    with ParquetSink(path) as sink:
        for start, batch in source.table.batches(source.read, BATCH_ROWS):
            rows += batch.height
            frame = batch.with_columns(user_id=source.user.text()).select("user_id")
            faults = [Fault(f"{source.user.said}: expected a user id", blank(frame["user_id"]), frame["user_id"])]
            if source.clock is not None:
                times, fault = source.clock.utc(batch[source.clock.column])
                frame = frame.with_columns(times)
                missing = Fault(f"{source.clock.said}: expected a time, as the vectors have times", times.is_null())
                faults += [fault, missing]
            if source.version is not None:
                frame = frame.with_columns(batch.with_columns(version=source.version.text())["version"])
                faults.append(Fault(f"{source.version.said}: expected a version", blank(frame["version"])))
            lists, shown = _lists(batch, source.columns)
            dim = dim or _commonest_length(lists)
            block, vector_faults = _block(lists, shown, dim, source.said)
            faults += vector_faults
            sound = pl.select(pl.all_horizontal(*(~f.bad.fill_null(False) for f in faults))).to_series()
            again, other, where = _repeats(frame, block, sound, start, seen)
            one = "one vector a user" + (" and time" if source.clock is not None else "")
            hint = "" if source.clock is not None else " (or their --vector_timestamp)"
            faults.append(Fault(f"{source.user.said}: expected {one}{hint}", other, where))
            keep = bad.sift(faults, start, batch.height, source.table.name) & ~again
            merged += int(again.sum())
            written += int(keep.sum())
            vectors = pl.Series("embedding", block, dtype=pl.Array(pl.Float32, max(dim, 1)))
            sink.write(frame.insert_column(1, vectors).filter(keep))
    if not rows:
        raise source.table.empty()
    if not written:
        raise source.table.fault(f"no row has a vector that can be used: {'; '.join(bad.report('vectors', rows))}")
    return rows, written, merged, dim


def _lists(batch: pl.DataFrame, columns: tuple[str, ...]) -> tuple[pl.Series, pl.Series]:
    """Vectors as List(Float64), what is no number as null; and as they stand, for messages."""
    first = batch[columns[0]]
    if len(columns) > 1 or first.dtype.is_numeric():
        numbers = [pl.col(column).cast(pl.Float64, strict=False) for column in columns]
        texts = [pl.col(column).cast(pl.String).fill_null("none") for column in columns]
        frame = batch.select(lists=pl.concat_list(numbers), texts=pl.concat_str(texts, separator=", "))
        return frame["lists"], frame["texts"]
    if first.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        # JSON, what numpy prints, and numbers between blanks, commas, semicolons or bars.
        text = first.cast(pl.String)
        bare = text.str.strip_chars(" \t\r\n[]()").str.replace_all(r"\s*[,;|]\s*|\s+", ",")
        split = bare.str.split(",").list.eval(pl.element().cast(pl.Float64, strict=False))
        return split.set(blank(text) | (bare == ""), None), text
    lists = first.cast(pl.List(pl.Float64))
    return lists, pl.Series([None if row is None else f"{len(row)} numbers" for row in lists], dtype=pl.String)


def _commonest_length(lists: pl.Series) -> int:
    """D as most of the first batch has it: one short vector at the top shall not condemn all others."""
    lengths = lists.list.len().drop_nulls()
    return int(lengths.filter(lengths > 0).mode().sort().first() or 0)  # type: ignore[arg-type]


def _block(lists: pl.Series, shown: pl.Series, dim: int, said: str) -> tuple[Vectors, list[Fault]]:
    lengths = lists.list.len().fill_null(0)
    faults = [
        Fault(f"{said}: expected an embedding", lengths == 0),
        Fault(f"{said}: expected {dim} numbers as in other rows", (lengths != dim) & (lengths != 0), shown),
    ]
    block = np.zeros((len(lists), max(dim, 1)), dtype=np.float32)
    right = (lengths == dim).to_numpy() & (lengths > 0).to_numpy()
    if right.any():
        numbers = lists.filter(pl.Series(right)).explode().to_numpy().reshape(-1, dim)
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused
            block[right] = numbers.astype(np.float32)
    wild = pl.Series(~np.isfinite(block).all(axis=1))
    block[wild.to_numpy()] = 0
    faults.append(Fault(f"{said}: expected finite float32 numbers", wild, shown))
    return block, faults


def _repeats(
    frame: pl.DataFrame,
    block: Vectors,
    sound: pl.Series,
    start: int,
    seen: dict[tuple[str, datetime | None], tuple[int, int]],
) -> tuple[pl.Series, pl.Series, pl.Series]:
    """Rows whose user (and time) came before: with the same vector, with another, and what a message says of these."""
    times = frame["timestamp"].to_list() if "timestamp" in frame.columns else [None] * frame.height
    again, other = np.zeros(frame.height, bool), np.zeros(frame.height, bool)
    where: list[str | None] = [None] * frame.height
    for index, (user, time, good) in enumerate(zip(frame["user_id"], times, sound, strict=True)):
        if not good:
            continue
        vector = hash(block[index].tobytes())
        first, earlier = seen.setdefault((user, time), (start + index, vector))
        if first != start + index:
            again[index], other[index] = earlier == vector, earlier != vector
            where[index] = f"{user}: another vector than in row {first}"
    return pl.Series(again), pl.Series(other), pl.Series(where, dtype=pl.String)


def encode_profiles(folder: Path, encoder: str, pooling: Literal["mean", "last"], said: str) -> tuple[int, int]:
    """Vectors of the profile texts of a written example table: one a user, or one from each change of his text on.

    Args:
        folder: holds examples.parquet, our own, with a column profile; embeddings.parquet is written there.
        encoder: see :func:`e2p.users.extract.encode_texts`.
        pooling: of a causal language model.
        said: names the profile in messages.

    Returns:
        Vectors, and D.

    Raises:
        DataError: a user has several texts and nothing tells which was when; or there is no text.
    """
    from e2p.users.extract import encode_texts  # here: it brings torch

    frame = pl.read_parquet(folder / "examples.parquet")
    keys = ["user_id", "timestamp"] if "timestamp" in frame.columns else ["user_id"]
    frame = frame.select(*keys, "profile").filter(~blank(frame["profile"]))
    if frame.is_empty():
        raise DataError(f"{said}: expected texts to encode, got none; name their column by --profile")
    texts = frame.unique(["user_id", "profile"], maintain_order=True)
    changing = texts.filter(texts["user_id"].is_duplicated())
    if changing.is_empty():
        keys, frame = ["user_id"], texts
    else:
        user = changing["user_id"][0]
        if "timestamp" not in keys or frame["timestamp"].null_count():
            raise DataError(
                f"{said}: expected one text of user {user!r}, or times in all rows, got several; keep one text a user "
                "or name the times' column by --timestamp"
            )
        frame = frame.sort("user_id", "timestamp", maintain_order=True)
        same = (pl.col("profile") == pl.col("profile").shift()) & (pl.col("user_id") == pl.col("user_id").shift())
        frame = frame.filter(~same.fill_null(False))
        twice = frame.filter(frame.select(keys).is_duplicated())
        if twice.height:
            user, time = twice.select(keys).row(0)
            raise DataError(f"{said}: expected one text of user {user!r} at {time.isoformat()}, got two; keep one")
    distinct = frame.select("profile").unique(maintain_order=True).with_row_index("index")
    vectors = encode_texts(distinct["profile"].to_list(), encoder, pooling=pooling)
    rows = frame.join(distinct, on="profile", how="left", maintain_order="left")["index"].to_numpy()
    times = frame["timestamp"] if "timestamp" in keys else None
    write_embeddings(folder / "embeddings.parquet", frame["user_id"], vectors[rows], times, f"{encoder}-{pooling}")
    return frame.height, int(vectors.shape[1])
