"""Example tables and embedding tables: read in bounded memory, checked row by row, written atomically.

Rows are counted from 0 over all files of a source, in file order; error messages use the same numbers.
A source is a path, a folder, a glob or an s3://, gs:// or hf:// address of Parquet, JSON Lines or CSV files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

from e2p.data.checks import (
    check_embedding_keys,
    check_keys,
    check_labels,
    check_texts,
    check_types,
    check_unique,
    check_users,
)
from e2p.data.sources import Table, cache_root, locator, open_table, to_utc
from e2p.data.vectors import Vectors, VectorSink, require_finite, to_vectors
from e2p.errors import DataError, RunError

KEY_COLUMNS = ("example_id", "user_id", "timestamp", "group", "split")
TEXT_COLUMNS = ("prompt", "messages", "completion", "profile", "label", "item_id")
EMBEDDING_COLUMNS = ("user_id", "embedding", "timestamp", "version")
EXAMPLE_COLUMNS = ("row", *KEY_COLUMNS, *TEXT_COLUMNS)
VECTOR_ROWS = 16_384  # rows held at once, with vectors or without
KEY_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """All versions of all users' vectors.

    Args:
        keys: row i belongs to ``vectors[i]``. Columns user_id (String), timestamp (Datetime us UTC) and
            version (String), the last two only if the source has them.
        vectors: float32 [N, D]; an ``np.memmap`` when large.
        source: where it was read from.
    """

    keys: pl.DataFrame
    vectors: Vectors
    source: str

    @property
    def dim(self) -> int:
        """D, the numbers in a vector."""
        return int(self.vectors.shape[1])

    @property
    def versions(self) -> list[str]:
        """Distinct versions, sorted; empty if the source names none. Two versions are not comparable."""
        return sorted(self.keys["version"].unique()) if "version" in self.keys.columns else []


def open_embeddings(source: str, cache_dir: Path | None = None, expected_dim: int | None = None) -> EmbeddingTable:
    """Read and check an embedding table: user_id, embedding, optional timestamp (UTC) and version.

    Args:
        source: the table. The embedding is a list or array of any number type (JSON text in CSV); it becomes
            float32.
        cache_dir: where the vectors of a large table are kept, in a file named by their content.
        expected_dim: D that the caller needs, if it knows.

    Raises:
        DataError: with file, row and user: missing column, wrong or mixed dimension, NaN or infinity, null
            user, time without zone, missing time, two vectors for one user (and time), empty table,
            unreadable file.
    """
    table = open_table(source)
    table.require("user_id", "embedding")
    check_types(table)
    sink, keys, dim = VectorSink(cache_root(cache_dir) / "vectors"), [], expected_dim
    try:
        for start, batch in table.batches(EMBEDDING_COLUMNS, VECTOR_ROWS):
            where = locator(source, start, batch["user_id"])
            users = check_users(batch["user_id"], where)
            block = to_vectors(batch["embedding"], dim, where)
            dim = block.shape[1]
            sink.add(block)
            keys.append(pl.DataFrame([users, to_utc(batch["timestamp"], where), batch["version"].cast(pl.String)]))
        if not keys:
            raise table.empty()
        return EmbeddingTable(check_embedding_keys(pl.concat(keys), source), sink.finish(), source)
    finally:
        sink.close()


def example_batches(source: str, rows: int = 8192) -> Iterator[pl.DataFrame]:
    """Yield the checked rows of an example table in file order, in bounded memory.

    Columns: row (Int64), example_id, user_id, timestamp (Datetime us UTC), group, split, prompt, messages
    (List[Struct{role, content}]), completion, profile, label (Boolean), item_id; String where nothing is
    said. ``example_id`` defaults to the row number as text, ``group`` to the user; the other optional ones
    are null. Exactly one of prompt and messages is set in a row.

    Args:
        source: the table; messages may be JSON text.
        rows: the most rows in a batch.

    Raises:
        DataError: with file, row and user, for whatever breaks the contract above, and for an empty table.
    """
    table = _open_examples(source)
    table.require("completion")
    if not {"prompt", "messages"} & set(table.schema):
        raise table.lacks("'prompt' or 'messages'")
    start = -1
    for start, batch in table.batches(KEY_COLUMNS + TEXT_COLUMNS, rows):
        where = locator(source, start, batch["user_id"])
        yield check_keys(batch, start, where).hstack(check_texts(batch, where)).select(EXAMPLE_COLUMNS)
    if start < 0:
        raise table.empty()


def example_keys(source: str) -> pl.DataFrame:
    """Row, example_id, user_id, timestamp, group and split of all examples; their texts are not read.

    Raises:
        DataError: as :func:`example_batches`, for these columns.
    """
    table = _open_examples(source)
    parts = [
        check_keys(batch, start, locator(source, start, batch["user_id"]))
        for start, batch in table.batches(KEY_COLUMNS, KEY_ROWS)
    ]
    if not parts:
        raise table.empty()
    return pl.concat(parts)


def example_labels(source: str) -> pl.Series:
    """Label (engaged or not) of every example, Boolean; null where there is none.

    Raises:
        DataError: as :func:`example_batches`, for this column.
    """
    table = _open_examples(source)
    parts = [
        check_labels(batch["label"], locator(source, start, batch["user_id"]))
        for start, batch in table.batches(("user_id", "label"), KEY_ROWS)
    ]
    if not parts:
        raise table.empty()
    return pl.concat(parts)


def content_key(source: str, *salt: str) -> str:
    """Hex key of what a table says in the columns that e2p knows, and of the salts: names a cache entry.

    Another folder, another cut into files and unknown columns do not change it; the order of rows does.

    Raises:
        DataError: the table cannot be read.
    """
    table = open_table(source)
    known = [c for c in dict.fromkeys(KEY_COLUMNS + TEXT_COLUMNS + EMBEDDING_COLUMNS) if c in table.schema]
    texts, numbers = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    texts.update(repr((known, salt)).encode())
    for _, batch in table.batches(known, VECTOR_ROWS):
        if "embedding" in known and batch["embedding"].dtype.is_nested():
            flat = batch.drop_in_place("embedding").explode().cast(pl.Float32)
            numbers.update(flat.to_numpy().tobytes())
        texts.update(batch.write_ndjson().encode())
    texts.update(numbers.digest())
    return texts.hexdigest()


def write_embeddings(
    path: str | Path,
    user_ids: Sequence[str] | pl.Series,
    vectors: Vectors,
    timestamps: Sequence[datetime] | pl.Series | None = None,
    version: str | None = None,
) -> None:
    """Write an embedding table as Parquet, embedding as Array(Float32, D), in one atomic step.

    Args:
        path: the file; replaced if it is there.
        user_ids: N ids.
        vectors: [N, D], finite; kept as float32.
        timestamps: N times with a time zone.
        version: name of the space that the vectors live in.

    Raises:
        DataError: lengths differ, D is 0, a number is not finite in float32, an id or a time zone is missing,
            or two rows have the same user (and time).
    """
    users = pl.Series("user_id", user_ids)
    where = locator(str(path), 0, users)
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
        block = np.ascontiguousarray(vectors, dtype=np.float32)
    if block.ndim != 2 or block.shape[0] != len(users) or block.shape[1] == 0:
        raise DataError(f"{path}: expected vectors [{len(users)}, D], a row per user, got {block.shape}")
    require_finite(block, where)
    keys = check_users(users, where).to_frame()
    if timestamps is not None:
        times = pl.Series("timestamp", timestamps)
        if len(times) != len(users):
            raise DataError(f"{path}: expected {len(users)} timestamps, one per user, got {len(times)}")
        keys = keys.with_columns(to_utc(times, where))
    check_unique(keys, "user", str(path))
    frame = keys.insert_column(1, pl.Series("embedding", block))
    write_frame(path, frame if version is None else frame.with_columns(version=pl.lit(version)))


def write_frame(path: str | Path, frame: pl.DataFrame) -> None:
    """Write a frame as Parquet so that a reader sees the old file or the new one, never half of one.

    Raises:
        RunError: it cannot be written there.
    """
    target = Path(path)
    require_folder(target.parent)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            frame.write_parquet(Path(folder, target.name))
            os.replace(Path(folder, target.name), target)
    except (OSError, pl.exceptions.ComputeError) as error:
        raise RunError(f"{path}: cannot be written: {error}; make room or name another place") from None


def require_folder(folder: Path) -> None:
    """Make a folder for output, with its parents; before long work, so that it is not done for nothing.

    Raises:
        RunError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{folder}: expected a folder to write to, got: {reason}; name another place") from None


def _open_examples(source: str) -> Table:
    table = open_table(source)
    table.require("user_id")
    check_types(table)
    ids = [
        batch.cast(pl.String) for _, batch in table.batches(["example_id"], KEY_ROWS) if "example_id" in table.schema
    ]
    if ids and (frame := pl.concat(ids))["example_id"].null_count() < frame.height:
        missing = frame["example_id"].is_null().arg_true()
        if len(missing):
            raise table.fault(f"row {missing[0]}: expected an example_id, got none; fill it or drop the column")
        check_unique(frame, "example", source)
    return table
