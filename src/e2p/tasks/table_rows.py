"""Rows that cannot be used: the first stops the work, or all are counted by reason and the first few named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from e2p.data.checks import check_messages
from e2p.errors import DataError, RunError

NAMED = 3  # bad rows of each kind that are named


@dataclass(frozen=True, eq=False)
class Fault:
    """One thing that may be wrong with rows.

    Args:
        reason: what was expected, with the user's names; counted under this.
        bad: which rows of the batch.
        got: what stood there, for the message; None: nothing did.
    """

    reason: str
    bad: pl.Series
    got: pl.Series | None = None


@dataclass
class BadRows:
    """Rows that cannot be used: the first one stops the work, or all are counted by reason.

    Args:
        skip: count and go on.
        counts: rows by reason.
        named: the first few of each reason.
    """

    skip: bool
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def sift(self, faults: Sequence[Fault], start: int, height: int, source: str) -> pl.Series:
        """Which of a batch's rows are sound. A row with several faults counts under the first.

        Raises:
            DataError: not ``skip``: the first bad row, with file, row and reason.
        """
        sound = pl.Series([True] * height, dtype=pl.Boolean)
        first: tuple[int, Fault] | None = None
        for fault in faults:
            rows = (fault.bad.fill_null(False) & sound).arg_true().to_list()
            if not rows:
                continue
            sound = sound & ~fault.bad.fill_null(False)
            self.counts[fault.reason] += len(rows)
            shown = self.named.setdefault(fault.reason, [])
            shown += [f"{start + row} ({self._got(fault, row)})" for row in rows[: NAMED - len(shown)]]
            if first is None or rows[0] < first[0]:
                first = rows[0], fault
        if first is not None and not self.skip:
            row, fault = first
            raise DataError(
                f"{source}: row {start + row}: {fault.reason}, got {self._got(fault, row)}; mend the row, or leave "
                "such rows out with --bad_rows skip"
            )
        return sound

    @staticmethod
    def _got(fault: Fault, row: int) -> str:
        value = None if fault.got is None else fault.got[row]
        return "none" if value is None else repr(value if isinstance(value, int | float) else str(value)[:60])

    def report(self, what: str, rows: int) -> list[str]:
        """Lines that say what was left out and why."""
        if not self.counts:
            return []
        lines = [f"skipped {what}: {self.counts.total():,} of {rows:,} rows"]
        for reason, count in self.counts.most_common():
            more = ", ..." if count > len(self.named[reason]) else ""
            lines.append(f"  {count:,}: {reason}; row {', '.join(self.named[reason])}{more}")
        return lines


def blank(texts: pl.Series) -> pl.Series:
    """Which texts are missing or say nothing."""
    return texts.is_null() | (texts.str.strip_chars() == "")


def complaints(values: pl.Series) -> list[str]:
    """What is wrong with the messages of each row; empty where nothing is. Found by halves: most rows are sound."""
    try:
        check_messages(values, lambda index: "")
    except DataError as error:
        if len(values) == 1:
            return [str(error).partition(", got ")[0].removeprefix(": ").removeprefix("messages: ")]
        half = len(values) // 2
        return complaints(values[:half]) + complaints(values[half:])
    return [""] * len(values)


def messages_of(values: pl.Series, said: str) -> tuple[pl.Series, list[Fault]]:
    """Messages as our table wants them, null where they are unsound, and the faults."""
    found = complaints(values) if len(values) else []
    wrong = pl.Series([bool(text) for text in found], dtype=pl.Boolean)
    shown = values if values.dtype == pl.String else pl.Series([str(value) for value in values], dtype=pl.String)
    faults = [
        Fault(f"{said}: {reason}", pl.Series([text == reason for text in found]), shown)
        for reason in dict.fromkeys(found)
        if reason
    ]
    sound = pl.select(pl.when(~wrong).then(values.alias("messages")).alias("messages")).to_series()
    return check_messages(sound, lambda index: ""), faults


class ParquetSink:
    """Frames with the same columns into one Parquet file, one after another, so that no more than one is held.

    Args:
        path: the file; made with the first frame.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def __enter__(self) -> ParquetSink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, frame: pl.DataFrame) -> None:
        """Append a frame. Raises RunError when it does not fit on the disk."""
        from pyarrow.parquet import ParquetWriter

        # A dictionary of categories is a batch's own, and the next batch has another.
        words = [name for name, dtype in frame.schema.items() if dtype in (pl.Categorical, pl.Enum)]
        table = frame.cast(dict.fromkeys(words, pl.String)).to_arrow(compat_level=pl.CompatLevel.oldest())
        try:
            if self._writer is None:
                self._writer = ParquetWriter(self._path, table.schema, compression="zstd")
            self._writer.write_table(table)
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error}; make room or name another place") from None
