"""Times in a stranger's table, in whatever form he says that they have. Nothing about them is guessed."""

from __future__ import annotations

import re
import zoneinfo
from dataclasses import dataclass

import polars as pl

from e2p.data.sources import UTC, Table
from e2p.errors import ConfigError
from e2p.tasks.table_fields import field_of
from e2p.tasks.table_rows import Fault

EPOCHS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}  # microseconds in one
# Spelled out, since a reader that finds the format by itself may take 01/02 for either of two days.
ISO = r"^\s*(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(?:[.,](\d+))?)?\s*(Z|[+-]\d\d(?::?\d\d)?)?\s*$"
YEARS = (1900, 2200)  # what lies outside is a number of another unit, or a format without a date


@dataclass(frozen=True)
class Clock:
    """How times are written; nothing about them is guessed.

    Args:
        column: the column with the times.
        said: names it in messages.
        form: seconds, milliseconds or microseconds since 1970, a strptime format, or empty: ISO 8601, or ready times.
        zone: of times that name none.
    """

    column: str
    said: str
    form: str = ""
    zone: str = ""

    def utc(self, values: pl.Series) -> tuple[pl.Series, Fault]:
        """Times as Datetime(us, UTC), null where there is none or a wrong one, and which are wrong."""
        if values.dtype == pl.Null:
            values = values.cast(pl.String)
        if isinstance(values.dtype, pl.Datetime | pl.Date):
            times = self._placed(values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values)
            wanted = f"a time that the zone {self.zone} has once"
        elif self.form in EPOCHS:
            size = EPOCHS[self.form]
            number = values.cast(pl.Float64, strict=False)  # exact to the microsecond in all years that are taken
            ticks = (number.set(~number.is_finite(), None) * size).round().cast(pl.Int64, strict=False)
            times = ticks.cast(UTC)
            wanted = f"{self.form} since 1970"
        elif self.form:
            parsed = values.str.to_datetime(self.form, strict=False, time_unit="us")
            times, wanted = self._placed(parsed), f"a time like {self.form!r}"
        else:
            times = self._iso(values)
            wanted = "a time like 2024-05-01T12:00:00" + ("" if self.zone else "Z (or a --time_zone or --time_format)")
        years = times.dt.year()
        times = times.set((years < YEARS[0]) | (years > YEARS[1]), None).alias("timestamp")
        reason = f"{self.said}: expected {wanted}, in the years {YEARS[0]} to {YEARS[1]}"
        return times, Fault(reason, times.is_null() & values.is_not_null(), values)

    def _placed(self, times: pl.Series) -> pl.Series:
        if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is None:
            # A time that a zone has twice or never has (summer time) is no time.
            times = times.dt.replace_time_zone(self.zone, ambiguous="null", non_existent="null")
        return times.dt.convert_time_zone("UTC").dt.cast_time_unit("us")

    def _iso(self, values: pl.Series) -> pl.Series:
        pieces = values.str.extract_groups(ISO).struct.unnest()
        day, minutes, seconds, part, offset = (pieces[name] for name in pieces.columns)
        clock = minutes.fill_null("00:00") + seconds.fill_null(":00") + "." + part.fill_null("0").str.slice(0, 6)
        whole = day + "T" + clock
        zoned = offset.str.replace("Z", "+0000", literal=True).str.replace(":", "", literal=True)
        zoned = zoned.set(zoned.str.len_chars() == 3, None).fill_null(offset + "00")
        # A day alone, with an offset, is no time: nothing says when in it.
        zoned = zoned.set(minutes.is_null(), None)
        known = (whole + zoned).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", strict=False, time_unit="us")
        known = known.cast(UTC)
        if not self.zone:
            return known
        naive = whole.set(offset.is_not_null(), None)
        plain = naive.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", strict=False, time_unit="us")
        return known.zip_with(known.is_not_null(), self._placed(plain))


def clock_of(wanted: str, table: Table, form: str, zone: str, option: str = "timestamp") -> Clock | None:
    """Read the options about times; see :class:`Clock`.

    Raises:
        ConfigError: no such column, an unknown zone, or form and zone that do not fit the column.
    """
    prefix = option.removesuffix("timestamp")
    found = field_of("timestamp", wanted, table, option)
    if found is None:
        if form or zone:
            raise ConfigError(
                f"{prefix}time_format, {prefix}time_zone: expected times, got none; name their --{option}"
            )
        return None
    column, said = found.column, found.said
    if column is None:
        raise ConfigError(f"{option}: expected a column, got {wanted!r}; write the times into one column")
    if zone:
        try:
            zoneinfo.ZoneInfo(zone)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
            raise ConfigError(
                f"{prefix}time_zone: expected a zone such as UTC or Europe/Berlin, got {zone!r}"
            ) from None
    dtype = table.schema[column]
    has_zone = (
        (isinstance(dtype, pl.Datetime) and dtype.time_zone is not None)
        or form in EPOCHS
        or bool(re.search(r"%[:#]{0,3}z|%\+", form))
    )
    read_as_text = table.kind != "parquet" or dtype == pl.String or dtype == pl.Null
    if isinstance(dtype, pl.Datetime | pl.Date) and table.kind == "parquet":
        if form:
            raise ConfigError(f"{prefix}time_format: expected none, since {said} holds {dtype}; drop it")
    elif not read_as_text and not (dtype.is_numeric() and form in EPOCHS):
        raise ConfigError(
            f"{said}: expected times as text, got {dtype}; pass --{prefix}time_format seconds or milliseconds if they "
            "are numbers since 1970"
        )
    elif not form:
        return Clock(column, said, form, zone)
    if has_zone and zone:
        raise ConfigError(f"{prefix}time_zone: expected none, since the times of {said} have one; drop it")
    if not has_zone and not zone:
        raise ConfigError(
            f"{said}: expected times with a zone, got none ({form or dtype}); if they are UTC pass "
            f"--{prefix}time_zone UTC"
        )
    return Clock(column, said, form, zone)
