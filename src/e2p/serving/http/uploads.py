"""Many vectors in one body: NDJSON line by line, or Parquet. Memory stays bounded; bad rows are told by number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any

import polars as pl

from e2p.data.checks import check_users
from e2p.data.sources import locator, to_utc
from e2p.data.vectors import to_vectors
from e2p.errors import DataError
from e2p.serving.http.auth import Key
from e2p.serving.http.errors import ApiError
from e2p.serving.http.schemas import UploadRow, parse
from e2p.serving.http.vectors import Vectors
from e2p.users.records import from_microseconds
from e2p.users.store import PutCounts, StoredVector

NDJSON = ("application/x-ndjson", "application/jsonl", "application/ndjson")
PARQUET = ("application/vnd.apache.parquet", "application/x-parquet")
_ROWS, _BYTES, _TOLD = 256, 1 << 20, 100
_TEXT = 1024
_HOPELESS = 100_000  # rows that failed, after which the others are not looked at
# Of a row group's column, decoded: beyond the first it must not be packed tighter than this, which no users' vectors
# are. Texts are held whole, so that they have a bound of their own.
_UNPACKED, _PACKED, _TEXTS = 1 << 26, 100, 1 << 28
_COLUMNS = ("user_id", "embedding", "timestamp", "version")


@dataclass(eq=False)
class Report:
    """What became of an upload.

    Args:
        unit: what rows are counted by: line or row, from 1.
        began: when; the time of vectors that name none, so that a user who is deleted meanwhile stays deleted.
    """

    unit: str
    began: datetime
    read: int = 0
    failed: int = 0
    counts: PutCounts = field(default_factory=PutCounts)
    errors: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, number: int, code: str, message: str) -> None:
        """A row is not in the store. The first 100 are told."""
        self.failed += 1
        if len(self.errors) < _TOLD:
            self.errors.append({self.unit: number, "code": code, "message": message})

    def require_hope(self) -> None:
        """Raise ApiError 422 where so many rows have failed that the table is another one than was meant."""
        if self.failed > _HOPELESS:
            said = (
                f"more than {_HOPELESS:,} rows are wrong, so the others were not read; see e2p.errors, mend the table"
            )
            raise ApiError(422, "rows_failed", said, headers={"Connection": "close"})

    def told(self) -> dict[str, Any]:
        """As the response has it."""
        counts = {name: getattr(self.counts, name) for name in ("stored", "unchanged", "older", "deleted")}
        return {"object": "users.embeddings", "read": self.read, **counts, "failed": self.failed, "errors": self.errors}


async def upload_lines(parts: AsyncIterator[bytes], vectors: Vectors, key: Key, row_bytes: int, report: Report) -> None:
    """Put the lines of an NDJSON body as they arrive: each batch of at most 256 as a whole, bad lines left out.

    Raises:
        ApiError: the body breaks off or the store is away; what was put before stays, and the report says how much.
    """
    batch, size = list[tuple[int, bytes]](), 0

    async def put() -> None:
        nonlocal batch, size
        lines, batch, size = batch, [], 0
        await vectors.call(lambda: _put_lines(lines, vectors, key, report))
        report.require_hope()

    async for number, line in _lines(parts, row_bytes):
        if line is None:
            report.read += 1
            report.fail(number, "row_too_large", f"expected a line of at most {row_bytes:,} bytes, got more")
            continue
        batch.append((number, line))
        size += len(line)
        if len(batch) == _ROWS or size >= _BYTES:
            await put()
    if batch:
        await put()


async def _lines(parts: AsyncIterator[bytes], limit: int) -> AsyncIterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one that is too long. Holds one line and one part."""
    rest, number, skipping = b"", 1, False
    async for part in parts:
        *ended, last = part.split(b"\n")
        for piece in ended:
            line = rest + piece
            if skipping or len(line) > limit:
                yield number, None
            elif line.strip():
                yield number, line
            rest, skipping, number = b"", False, number + 1
        if not skipping:
            rest += last
            if len(rest) > limit:
                rest, skipping = b"", True
    if skipping:
        yield number, None
    elif rest.strip():
        yield number, rest


def _put_lines(lines: Sequence[tuple[int, bytes]], vectors: Vectors, key: Key, report: Report) -> None:
    allowed, good = vectors.allowed_dimensions(), list[tuple[int, StoredVector]]()
    for number, line in lines:
        report.read += 1
        try:
            row = parse(UploadRow, line)
            key.require_user(row.user_id)
            vector = vectors.checked(row.user_id, row, allowed, report.began)
        except ApiError as error:
            report.fail(number, error.code, error.message)
            continue
        allowed = (len(vector.embedding),)  # a store holds one dimension
        good.append((number, vector))
    _put(good, vectors, report)


def _put(good: Sequence[tuple[int, StoredVector]], vectors: Vectors, report: Report) -> None:
    try:
        report.counts += vectors.put_many([vector for _, vector in good])
    except DataError as error:  # another dimension came first meanwhile
        for number, _ in good:
            report.fail(number, "wrong_dimension", vectors.plain(error))


async def upload_parquet(parts: AsyncIterator[bytes], vectors: Vectors, key: Key, report: Report) -> None:
    """Put the rows of a Parquet body, which is kept in a temporary file meanwhile.

    Raises:
        ApiError: it is no such table, or the store is away; what was put before stays, and the report says how much.
    """
    with tempfile.TemporaryFile() as file:
        async for part in parts:
            file.write(part)
        file.seek(0)
        await vectors.call(lambda: _put_parquet(file, vectors, key, report))


def _put_parquet(file: IO[bytes], vectors: Vectors, key: Key, report: Report) -> None:
    allowed = vectors.allowed_dimensions()
    for start, frame in _batches(file, allowed):
        report.read += len(frame)
        good: list[tuple[int, StoredVector]] = []
        try:
            good = list(enumerate(_checked(frame, vectors, key, allowed, report.began), start + 1))
        except (DataError, ApiError):
            for at in range(len(frame)):  # one by one, to tell which
                try:
                    (vector,) = _checked(frame[at : at + 1], vectors, key, allowed, report.began)
                    good.append((start + at + 1, vector))
                except ApiError as error:
                    report.fail(start + at + 1, error.code, error.message)
                except DataError as error:
                    report.fail(start + at + 1, "invalid_value", str(error).partition(": row 0 ")[2] or str(error))
        _put(good, vectors, report)
        report.require_hope()
        allowed = vectors.allowed_dimensions()


def _checked(
    frame: pl.DataFrame, vectors: Vectors, key: Key, allowed: Sequence[int], began: datetime
) -> list[StoredVector]:
    """The rows, by the checks of every embedding table. Raises DataError, ApiError for the first that is wrong."""
    where = locator("upload", 0, frame["user_id"])
    users = check_users(frame["user_id"], where)
    block = to_vectors(frame["embedding"], allowed[0] if len(allowed) == 1 else None, where)
    if allowed and block.shape[1] not in allowed:
        said = f"embedding: expected {' or '.join(map(str, allowed))} numbers, got {block.shape[1]}"
        raise ApiError(400, "wrong_dimension", said)
    moments = to_utc(frame["timestamp"], where).fill_null(pl.lit(began).cast(pl.Datetime("us", "UTC")))
    for user in users:
        key.require_user(user)
    try:
        times = [from_microseconds(value) for value in moments.to_physical()]
    except OverflowError:
        said = "timestamp: expected a time in the years 1 to 9999; check its unit"
        raise ApiError(400, "invalid_value", said) from None
    vectors.require_time(max(times))
    versions = frame["version"].cast(pl.String).fill_null("")
    return [StoredVector(*row) for row in zip(users, block, times, versions, strict=True)]


def _batches(file: IO[bytes], allowed: Sequence[int]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Rows from 0 and frames of at most 256 rows with the four columns. Raises ApiError 400, DataError.

    A small file can claim to be huge. So only plain types are read, texts stay in dictionaries until their length is
    known, a row group must not hold more numbers than its rows can have, and nothing may be packed far tighter than
    vectors can be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    bounds = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 18}
    try:
        size = file.seek(0, os.SEEK_END)
        schema = pq.ParquetFile(file, **bounds).metadata.schema
        leaves = {schema.column(at).path: schema.column(at).physical_type for at in range(len(schema.names))}
        texts = [name for name in ("user_id", "version") if leaves.get(name) == "BYTE_ARRAY"]
        table = pq.ParquetFile(file, read_dictionary=texts, buffer_size=1 << 16, pre_buffer=False, **bounds)
        _require_types(table.schema_arrow, pa)
        _require_sizes(table.metadata, allowed, size)
        names, start = [name for name in _COLUMNS if name in table.schema_arrow.names], 0
        for batch in table.iter_batches(_ROWS, columns=names):
            batch.validate(full=True)  # a damaged file may hold texts that are no UTF-8, which Polars would trust
            for name in texts:
                _require_short(batch.column(name), name, pa)
            frame = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(frame, pl.DataFrame)
            absent = [pl.lit(None, pl.String).alias(name) for name in _COLUMNS if name not in names]
            plain = [pl.col("user_id", "version").cast(pl.String)]  # out of their dictionaries
            yield start, frame.with_columns(absent).select(_COLUMNS).with_columns(plain)
            start += len(frame)
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, pl.exceptions.PolarsError):
        said = "expected a Parquet table, got something that cannot be read as one; write it again"
        raise ApiError(400, "invalid_parquet", said) from None


def _require_types(schema: Any, pa: Any) -> None:
    """Refuse columns that are missing, and types other than plain ones. Raises ApiError 400."""
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "user_id": ("texts or whole numbers", lambda t: _is_text(t, pa) or pa.types.is_integer(t)),
        "embedding": ("lists of numbers", lambda t: _is_vector(t, pa)),
        "timestamp": ("times with a zone", lambda t: pa.types.is_timestamp(t) and t.tz is not None),
        "version": ("texts", lambda t: _is_text(t, pa) or pa.types.is_null(t)),
    }
    for name, (expected, accepted) in kinds.items():
        if schema.names.count(name) > 1 or (name in _COLUMNS[:2] and name not in schema.names):
            raise ApiError(400, "invalid_parquet", f"expected one column {name}; got {', '.join(schema.names)[:200]}")
        if name in schema.names and not accepted(schema.field(name).type):
            said = f"column {name}: expected {expected}, got {str(schema.field(name).type)[:100]}; convert it"
            raise ApiError(400, "invalid_parquet", said)


def _is_text(kind: Any, pa: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_vector(kind: Any, pa: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    numbers = (pa.types.is_floating, pa.types.is_integer)
    return any(is_(kind) for is_ in lists) and any(is_(kind.value_type) for is_ in numbers)


def _require_sizes(metadata: Any, allowed: Sequence[int], size: int) -> None:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows > size:
        raise ApiError(
            400, "invalid_parquet", f"expected a byte for each row at least, got {rows} rows in {size} bytes"
        )
    for group in groups:
        for column in (group.column(at) for at in range(group.num_columns)):
            name, _, _ = column.path_in_schema.partition(".")
            if name == "embedding" and column.num_values > group.num_rows * max(allowed, default=0):
                expected = " or ".join(map(str, allowed))
                got = f"{column.num_values / group.num_rows:g}" if group.num_rows else "more"
                said = f"embedding: expected {expected} numbers in every row, got {got}"
                raise ApiError(400, "wrong_dimension", said)
            most = max(_UNPACKED, _PACKED * min(column.total_compressed_size, size))
            most = min(most, _TEXTS) if column.physical_type == "BYTE_ARRAY" else most
            if name in _COLUMNS and column.total_uncompressed_size > most:
                said = f"column {name}: expected at most {most:,} bytes in a row group, unpacked; write smaller ones"
                raise ApiError(400, "invalid_parquet", said)


def _require_short(column: Any, name: str, pa: Any) -> None:
    import pyarrow.compute as pc

    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_integer(texts.type) or pa.types.is_null(texts.type) or not len(texts):
        return
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    if longest > _TEXT:
        raise ApiError(400, "invalid_parquet", f"column {name}: expected at most {_TEXT} bytes, got {longest}")
