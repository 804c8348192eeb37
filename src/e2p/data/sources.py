"""One way to read Parquet, JSON Lines and CSV, local or remote: streamed batches, faults with file and row.

JSON Lines and CSV are read as text, column by column, and parsed afterwards: so ``007`` stays a user id, no
type depends on the first rows, and a bad value has a row number.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from e2p.errors import DataError

Kind = Literal["parquet", "jsonl", "csv"]
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
KIND_NAMES: dict[Kind, str] = {"parquet": "Parquet", "jsonl": "JSON Lines", "csv": "CSV"}
UTC = pl.Datetime("us", "UTC")
Where = Callable[[int], str]  # file, row and user of the i-th value of a batch
ZONED = r":\d\d([.,]\d+)?\s*(Z|[+-]\d\d(:?\d\d)?)\s*$"  # after a time of day: 2024-01-02 ends in no offset
READ_ERRORS = (pl.exceptions.PolarsError, OSError, UnicodeDecodeError)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Folder for derived data: the given one, else ``$E2P_CACHE``, else ``~/.cache/e2p``; not created."""
    return Path(cache_dir or os.environ.get("E2P_CACHE") or "~/.cache/e2p").expanduser()


def one_line(error: BaseException) -> str:
    """First sentence of a library's message, for our own one-line errors."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


@dataclass(frozen=True)
class Table:
    """An opened table: where it is, what it is written in, its columns and their types (JSONL: as inferred).

    Raises DataError from every method when a file cannot be read.
    """

    name: str
    kind: Kind
    files: tuple[str, ...]
    schema: dict[str, pl.DataType]

    def fault(self, text: str) -> DataError:
        return DataError(f"{self.name}: {text}")

    def unreadable(self, error: BaseException) -> DataError:
        hint = "; note that JSON has no NaN" if self.kind == "jsonl" else ""
        return self.fault(f"cannot be read as {KIND_NAMES[self.kind]}: {one_line(error)}; check the file{hint}")

    def empty(self) -> DataError:
        return self.fault("the table is empty: expected at least one row; check what wrote it")

    def require(self, *columns: str) -> None:
        """Raise DataError with the columns found unless all of these are there."""
        missing = [column for column in columns if column not in self.schema]
        if missing:
            raise self.lacks(" and ".join(map(repr, missing)))

    def lacks(self, wanted: str) -> DataError:
        return self.fault(f"expected a column {wanted}, found: {', '.join(self.schema) or 'none'}; add or rename it")

    def require_type(self, column: str, accepted: Callable[[pl.DataType], bool], expected: str) -> None:
        """Raise DataError when the column is there and its type is not accepted; all-null columns pass."""
        dtype = self.schema.get(column)
        if dtype is not None and dtype != pl.Null and not accepted(dtype):
            raise self.fault(f"column '{column}': expected {expected}, got {dtype}; convert the column")

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield (number of the batch's first row from 0, frame of exactly these columns) in file order.

        A column that the table lacks is null. Text formats give Strings, except JSONL's lists of numbers.
        """
        start = 0
        present = [column for column in columns if column in self.schema]
        absent = [pl.lit(None, pl.String).alias(column) for column in columns if column not in present]
        try:
            for batch in self._scan(present).collect_batches(chunk_size=rows, maintain_order=True):
                frame = batch.with_columns(absent).select(columns)
                if self.kind == "csv":  # where an empty text is a missing one, except that a prompt may be empty
                    filled = [pl.col(c) for c in columns if c != "prompt"]
                    frame = frame.with_columns(pl.when(c.str.strip_chars() != "").then(c) for c in filled)
                yield start, frame
                start += batch.height
        except READ_ERRORS as error:
            raise self.unreadable(error) from None

    def _scan(self, columns: list[str]) -> pl.LazyFrame:
        files = list(self.files)
        if self.kind == "parquet":
            return pl.scan_parquet(files, glob="://" in self.name).select(columns)
        if self.kind == "csv":
            return pl.scan_csv(files, infer_schema=False, glob="://" in self.name).select(columns)
        # Lists of numbers are not read as text: that is slower, and 1e30 would be an unreadable whole number.
        numbers, vector = [c for c in columns if is_vector(self.schema[c])], pl.List(pl.Float64)
        types = {column: vector if column in numbers else pl.String() for column in columns}
        return pl.scan_ndjson(_literal(files), schema=types)


def open_table(source: str | Path) -> Table:
    """Find the files of a path, folder, glob or s3://, gs://, hf:// address and read their columns.

    Raises:
        DataError: nothing is there, the ending is unknown or mixed, the table is empty, or a file is corrupt.
    """
    name = str(source)
    files = [name] if "://" in name else _local_files(name)
    kinds = {KINDS.get(Path(file).suffix.lower()) for file in files}
    kind = kinds.pop()
    if kind is None or kinds:
        got = ", ".join(sorted({Path(file).suffix or Path(file).name for file in files}))
        raise DataError(f"{name}: expected files that all end in one of {', '.join(KINDS)}, got {got}; choose one")
    table = Table(name, kind, tuple(files), {})
    try:
        if kind == "parquet":
            schema = pl.scan_parquet(files, glob="://" in name).collect_schema()
        elif kind == "csv":
            schema = pl.scan_csv(files, infer_schema=False, glob="://" in name).collect_schema()
        else:
            schema = pl.scan_ndjson(_literal(files), infer_schema_length=None).collect_schema()
    except pl.exceptions.NoDataError:
        raise table.empty() from None
    except READ_ERRORS as error:
        if kind == "jsonl" and "empty reader" in str(error):
            raise table.empty() from None
        raise table.unreadable(error) from None
    return Table(name, kind, tuple(files), dict(schema))


def _literal(files: Sequence[str]) -> list[str]:
    """Local names with their glob characters escaped, for the one scan that has no switch for them."""
    return [file if "://" in file else glob.escape(file) for file in files]


def _local_files(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in KINDS)
    elif path.exists():
        files = [str(path)]
    else:
        files = sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise DataError(f"{name}: no file matches; expected {', '.join(KINDS)} there: check the path")
    return files


def is_text(dtype: pl.DataType) -> bool:
    return dtype in (pl.String, pl.Categorical, pl.Enum)


def is_vector(dtype: pl.DataType) -> bool:
    return isinstance(dtype, pl.List | pl.Array) and pl.Series([], dtype=dtype.inner).dtype.is_numeric()


def is_id(dtype: pl.DataType) -> bool:
    return is_text(dtype) or dtype.is_integer()


def first_true(flags: pl.Series) -> int | None:
    """Index of the first true value; nulls count as false."""
    return flags.fill_null(False).arg_max() if flags.any() else None


def locator(source: str, start: int, users: pl.Series) -> Where:
    """Names the i-th row of a batch that begins at row ``start``."""
    return lambda index: f"{source}: row {start + index} (user {users[index]!r})"


def to_utc(values: pl.Series, where: Where) -> pl.Series:
    """Times as Datetime(us, UTC), from a column with any time zone or from ISO 8601 text with Z or an offset.

    Args:
        values: the column; nulls stay null.
        where: names the i-th value in a message.

    Raises:
        DataError: a time without zone (never guessed: a wrong guess leaks the future), or no time at all.
    """
    if values.dtype == pl.Null:
        return values.cast(UTC)
    if values.dtype == pl.String:
        naive = first_true(~values.str.contains(ZONED) & values.is_not_null())
        if naive is not None:
            raise DataError(
                f"{where(naive)}: timestamp {values[naive]!r}: expected UTC, got no time zone; "
                "write ISO 8601 with Z or an offset, such as 2024-05-01T12:00:00Z"
            )
        times = values.str.strip_chars().str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
        bad = first_true(times.is_null() & values.is_not_null())
        if bad is not None:
            raise DataError(
                f"{where(bad)}: timestamp {values[bad]!r}: expected a time like 2024-05-01T12:00:00Z; mend it"
            )
        return times
    if isinstance(values.dtype, pl.Datetime) and values.dtype.time_zone is not None:
        return values.dt.convert_time_zone("UTC").dt.cast_time_unit("us")
    raise DataError(
        f"{where(0)}: timestamp: expected UTC, got {values.dtype} without a time zone; if it is UTC, "
        "convert it once with pl.col('timestamp').dt.replace_time_zone('UTC') (numbers: pl.from_epoch first)"
    )


def parse_json(values: pl.Series, dtype: pl.DataType, where: Where, expected: str) -> pl.Series:
    """Parse a column of JSON texts; nulls stay null. Raises DataError with the first row that does not."""
    try:
        return values.str.json_decode(dtype)
    except pl.exceptions.PolarsError as error:
        for index, text in enumerate(values):  # only now, to name the row
            try:
                json.loads(text or "null", parse_constant=_no_constant)
                pl.Series([text], dtype=pl.String).str.json_decode(dtype)
            except (ValueError, pl.exceptions.PolarsError):
                raise DataError(f"{where(index)}: expected {expected}, got {text[:60]!r}; mend it") from None
        raise DataError(f"{where(0)}: expected {expected}: {one_line(error)}") from None


def _no_constant(name: str) -> float:
    raise ValueError(name)
