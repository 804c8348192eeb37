"""`e2p users`: a store of vectors filled from tables, written to one, asked, and told to forget."""

from __future__ import annotations

import json as json_text
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from e2p.data.checks import check_types, check_users
from e2p.data.sources import Table, first_true, locator, open_table, to_utc
from e2p.data.tables import EMBEDDING_COLUMNS, require_folder
from e2p.data.vectors import to_vectors
from e2p.errors import ConfigError, DataError, E2PError, RunError, StoreError
from e2p.users.records import in_utc, microseconds
from e2p.users.store import PutCounts, StoredVector, VectorBatch, VectorStore, open_store

_RELEASE_BYTES = 1 << 23  # of vectors, after which a store may give back the pages that it has looked at
_SHOWN = 6  # numbers of a vector


def import_table(table: str, store: str, batch_size: int = 32_768, timestamp: str = "", version: str = "") -> PutCounts:
    """Put the vectors of an embedding table into a store; of several rows of a user the newest stays.

    The table is read in constant memory, whatever its size. A batch is in the store as a whole or not at all (in Redis,
    256 rows of it), and on disk when the next one begins. Importing again, after an interruption or by mistake, changes
    nothing: a row older than what is there, or not newer than its user's deletion, is left out and counted.

    Args:
        table: embedding table: user_id, embedding and optionally timestamp (UTC) and version.
        store: folder of the store, or redis://host:6379/0; made if it is not there.
        batch_size: rows written at once. A folder's other writers wait that long; of a table in no order of its users,
            smaller batches cost more writing.
        timestamp: of all rows of a table that has no timestamps: a time such as 2024-05-01T12:00:00Z, or now. There
            is no default, since it says which vectors these may replace.
        version: of all rows of a table that has no versions.

    Raises:
        DataError: the table cannot be used, with file, row and user; batches before that row are in the store.
        ConfigError: a setting is out of range, or the table has timestamps or versions of its own.
        StoreError: the store cannot be opened or written.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected a whole number >= 1, got {batch_size}")
    source = open_table(table)
    source.require("user_id", "embedding")
    check_types(source)
    at = _given_time(source, timestamp)
    if version and _has(source, "version"):
        raise ConfigError(f"version: expected none, since {table} has a column version, got {version!r}; leave it out")
    counts, done, released = PutCounts(), 0, 0
    with open_store(store) as target, _progress() as progress:
        task = progress.add_task("importing", total=_rows(source))
        try:
            for batch in _batches(source, batch_size, at, version, target.dim):
                counts += target.put_many(batch)
                done += len(batch)
                progress.update(task, completed=done)
                released += batch.embeddings.nbytes
                if released >= _RELEASE_BYTES:
                    _release(target)
                    released = 0
        except E2PError as error:
            kept = (
                f"the {done:,} rows before are in the store, and the import can be repeated" if done else "none was put"
            )
            raise type(error)(f"{error}; {kept}") from None
        if not done:
            raise source.empty()
        users = target.count()
    left = [f"{counts.older:,} older than what is there"] * bool(counts.older)
    left += [f"{counts.deleted:,} not newer than their user's deletion"] * bool(counts.deleted)
    print(f"{store_name(store)}: {done:,} rows read, {', '.join(_stored(counts) + left)}; {users:,} users now")
    return counts


def export_table(store: str, table: str, overwrite: bool = False) -> None:
    """Write a store's vectors as an embedding table, bit for bit what e2p users import reads back.

    It is written in constant memory and in one atomic step. Writing to the store may go on meanwhile.

    Args:
        store: folder of the store, or redis://host:6379/0.
        table: Parquet file to write; columns user_id, embedding, timestamp and, if there are any, version.
        overwrite: replace the table if it is there.

    Raises:
        StoreError: there is no store, or it cannot be read.
        DataError: the store holds no vectors.
        RunError: the table is there already or cannot be written.
    """
    path = Path(table)
    if path.suffix != ".parquet":
        raise ConfigError(f"table: expected a name that ends in .parquet, got {table!r}")
    if path.exists() and not overwrite:
        raise RunError(f"{table}: is there already; choose another name or pass --overwrite")
    with open_store(store, create=False) as source, _progress() as progress:
        found = source.stats()
        if not found.users or found.dim is None:
            raise DataError(f"{store_name(store)}: expected vectors to write, found none; import some first")
        require_folder(path.parent)
        task = progress.add_task("exporting", total=found.users)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                temporary, done = Path(folder, path.name), 0
                for done in _write(temporary, source, found.dim, any(found.versions)):
                    progress.update(task, completed=done)
                os.replace(temporary, path)
        except OSError as error:
            raise RunError(f"{table}: cannot be written: {error}; make room or name another place") from None
    print(f"{table}: {done:,} vectors of {found.dim} numbers")


def get_users(store: str, users: list[str], json: bool = False) -> None:
    """Show users' vectors: time, version, age, length and first numbers.

    Args:
        store: folder of the store, or redis://host:6379/0.
        users: whose; ids that begin with a dash after --.
        json: one line of JSON for each, with the whole vector.

    Raises:
        StoreError: there is no store, or it cannot be read.
        DataError: a user has no vector; the others are shown.
    """
    now = datetime.now(UTC)
    with open_store(store, create=False) as source:
        found = source.get_many(users)
    for vector in found:
        if vector is not None:
            print(json_text.dumps(_plain(vector), ensure_ascii=False) if json else _line(vector, now))
    missing = [user for user, vector in zip(users, found, strict=True) if vector is None]
    if missing:
        raise DataError(f"{store_name(store)}: no vector for {', '.join(map(repr, missing))}; import or put one")


def delete_users(store: str, users: list[str], forget: bool = False) -> None:
    """Remove users' vectors. What is not newer than this deletion does not come back by an import.

    For that, a hash of each id and the time stay in the store, and no id.

    Args:
        store: folder of the store, or redis://host:6379/0.
        users: whose; ids that begin with a dash after --.
        forget: keep no trace of them at all; importing an old table will then bring them back.

    Raises:
        StoreError: there is no store, or it cannot be written.
    """
    with open_store(store, create=False) as target:
        missing = [user for user in users if not target.delete(user, forget=forget)]
    print(f"{store_name(store)}: {len(users) - len(missing):,} of {len(users):,} had a vector and were deleted")
    if missing:
        print(f"no vector for {', '.join(map(repr, missing))}")


def store_stats(store: str, json: bool = False) -> None:
    """Say what a store holds: users, dimension, versions, deletions, size.

    Args:
        store: folder of the store, or redis://host:6379/0.
        json: as JSON.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    with open_store(store, create=False) as source:
        found = source.stats()
    if json:
        names = ("address", "users", "dim", "deletions", "nbytes")
        values = {name: getattr(found, name) for name in names} | {"versions": dict(found.versions)}
        print(json_text.dumps(values, ensure_ascii=False))
        return
    size = "" if found.nbytes is None else f", {found.nbytes / 2**20:,.1f} MiB"
    print(f"{found.address}: {found.users:,} users, vectors of {found.dim or 'no'} numbers{size}")
    for version, count in sorted(found.versions.items()):
        print(f"version {version or '(not named)'}: {count:,} users")
    if found.deletions:
        print(f"deleted and not put again since: {found.deletions:,} users")


def store_name(address: str) -> str:
    """An address as it may be shown: without user name and password."""
    scheme, split, rest = address.partition("://")
    return f"{scheme}{split}{rest.split('?')[0].rpartition('@')[2]}" if split else address


def _batches(table: Table, rows: int, at: int | None, version: str, dim: int | None) -> Iterator[VectorBatch]:
    named = True if version else None  # whether the rows have versions: all or none
    for start, frame in table.batches(EMBEDDING_COLUMNS, rows):
        where = locator(table.name, start, frame["user_id"])
        users = check_users(frame["user_id"], where)
        try:
            block = to_vectors(frame["embedding"], dim, where)
        except DataError as error:
            if start == 0 and dim is not None:
                raise DataError(f"{error}, and the store holds vectors of {dim}") from None
            raise
        dim = block.shape[1]
        times = to_utc(frame["timestamp"], where)
        missing = first_true(times.is_null())
        if at is None and missing is not None:
            raise DataError(f"{where(missing)}: expected a timestamp, got none; fill it or drop the column")
        names = frame["version"].cast(pl.String) if not version else pl.repeat(version, len(users), eager=True)
        named = bool(names.null_count() < len(names)) if named is None else named
        odd = first_true(names.is_null() if named else names.is_not_null())
        if odd is not None:
            raise DataError(f"{where(odd)}: expected a version in all rows or in none; fill it or drop the column")
        moments = np.full(len(users), at, np.int64) if at is not None else times.to_physical().to_numpy()
        yield VectorBatch(users.to_list(), block, moments, names.fill_null("").to_list())


def _release(store: VectorStore) -> None:
    """Pages of a folder's file count as this process's memory while it looks at them, the whole file in the end."""
    release = getattr(store, "release_pages", None)
    if release is not None:
        release()


def _given_time(table: Table, timestamp: str) -> int | None:
    """Microseconds for all rows, or None where the table has its own."""
    if _has(table, "timestamp"):
        if timestamp:
            raise ConfigError(
                f"timestamp: expected none, since {table.name} has a column timestamp, got {timestamp!r}; leave it out"
            )
        return None
    if not timestamp:
        raise table.fault(
            "expected a column 'timestamp', found none; say how old the vectors are by --timestamp "
            "2024-05-01T12:00:00Z, or --timestamp now to replace whatever is in the store"
        )
    if timestamp == "now":
        return microseconds(datetime.now(UTC))
    try:
        time = datetime.fromisoformat(timestamp)
    except ValueError:
        raise ConfigError(f"timestamp: expected now or a time like 2024-05-01T12:00:00Z, got {timestamp!r}") from None
    try:
        return microseconds(in_utc(time, "--timestamp"))
    except DataError as error:
        raise ConfigError(str(error)) from None


def _has(table: Table, column: str) -> bool:
    return table.schema.get(column, pl.Null) != pl.Null


def _rows(table: Table) -> int | None:
    """Rows of a Parquet table, from its footers; other kinds would have to be read."""
    if table.kind != "parquet":
        return None
    return int(pl.scan_parquet(list(table.files), glob="://" in table.name).select(pl.len()).collect().item())


def _stored(counts: PutCounts) -> list[str]:
    return [f"{counts.stored:,} stored"] + [f"{counts.unchanged:,} unchanged"] * bool(counts.unchanged)


def _write(path: Path, store: VectorStore, dim: int, named: bool, rows: int = 8192) -> Iterator[int]:
    """Write a Parquet file piece by piece; yields the rows written so far."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields: list[Any] = [
        ("user_id", pa.string()),
        ("embedding", pa.list_(pa.float32(), dim)),
        ("timestamp", pa.timestamp("us", tz="UTC")),
    ]
    schema, done, vectors = pa.schema(fields + [("version", pa.string())] * named), 0, store.iterate()
    with pq.ParquetWriter(path, schema) as writer:
        while piece := list(islice(vectors, rows)):
            batch = VectorBatch.of(piece)
            if not named and any(batch.versions):
                raise StoreError(f"{store.address}: vectors of a version came while it was written; export again")
            columns = [
                pa.array(batch.user_ids, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(batch.embeddings.reshape(-1)), dim),
                pa.array(batch.timestamps, schema.field("timestamp").type),
            ]
            columns += [pa.array(batch.versions, pa.string())] * named
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            done += len(piece)
            yield done


def _line(vector: StoredVector, now: datetime) -> str:
    shown = [f"{number:.4g}" for number in vector.embedding[:_SHOWN]] + ["..."] * (len(vector.embedding) > _SHOWN)
    length = float(np.linalg.norm(vector.embedding.astype(np.float64)))
    return (
        f"{vector.user_id}: {_iso(vector.timestamp)} ({_age(now - vector.timestamp)}), version "
        f"{vector.version or '(not named)'}, {len(vector.embedding)} numbers, norm {length:.4g}: [{', '.join(shown)}]"
    )


def _plain(vector: StoredVector) -> dict[str, Any]:
    return {
        "user_id": vector.user_id,
        "timestamp": _iso(vector.timestamp),
        "version": vector.version,
        "embedding": vector.embedding.tolist(),
    }


def _iso(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _age(age: timedelta) -> str:
    seconds = abs(int(age.total_seconds()))
    if not seconds:
        return "just now"
    size, name = next(
        (size, name)
        for size, name in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
        if seconds >= size
    )
    count = seconds // size
    return f"{count:,} {name}{'s' * (count > 1)} {'old' if age > timedelta(0) else 'ahead of now'}"


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
