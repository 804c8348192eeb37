"""Finding and opening files: every way in which there is nothing to read."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.data.sources import UTC, cache_root, locator, open_table, to_utc
from e2p.errors import DataError


def rows_of(source: str) -> int:
    table = open_table(source)
    return sum(frame.height for _, frame in table.batches(list(table.schema), 100))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"no parquet at all", r"t\.parquet: cannot be read as Parquet: .*; check the file"),
        ("t.parquet", b"", r"t\.parquet: cannot be read as Parquet"),
        ("t.jsonl", b"", r"t\.jsonl: the table is empty: expected at least one row"),
        ("t.csv", b"", r"t\.csv: the table is empty: expected at least one row"),
        (
            "t.jsonl",
            b'{"a": 1}\n{"a": \n',
            r"t\.jsonl: cannot be read as JSON Lines: .*note that JSON has no NaN",
        ),
        ("t.jsonl", b'{"a": NaN}\n', r"t\.jsonl: cannot be read as JSON Lines: .*note that JSON has no NaN"),
        ("t.csv", b"a,b\n1,2,3\n", r"t\.csv: cannot be read as CSV"),
        ("t.csv", b"a,b\n\xff\xfe,2\n", r"t\.csv: cannot be read as CSV"),
        ("t.tsv", b"a\n1\n", r"t\.tsv: expected files that all end in one of \.parquet, .*, got \.tsv"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        rows_of(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": range(10_000)}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        rows_of(str(path))


@pytest.mark.parametrize("name", ["none.parquet", "none*.jsonl", "folder"])
def test_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no file matches; expected \.parquet, .* there: check the path"):
        open_table(str(tmp_path / name))


def test_mixed_endings_and_mixed_columns(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "1.parquet")
    pl.DataFrame({"a": ["x"]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        rows_of(str(tmp_path / "*.parquet"))
    (tmp_path / "3.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"expected files that all end in one of .*, got \.csv, \.parquet; choose one"):
        open_table(str(tmp_path))


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path) -> None:
    for ending in ("parquet", "csv", "jsonl"):
        path = tmp_path / f"a[1].{ending}"
        frame = pl.DataFrame({"a": [1, 2]})
        {"parquet": frame.write_parquet, "csv": frame.write_csv, "jsonl": frame.write_ndjson}[ending](path)
        assert rows_of(str(path)) == 2


def test_absent_columns_are_null_and_empty_csv_cells_too(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('prompt,profile\n"",""\n x , \n')
    ((start, frame),) = open_table(str(tmp_path / "t.csv")).batches(["profile", "prompt", "label"], 10)
    assert start == 0
    assert frame.rows() == [(None, "", None), (None, " x ", None)]


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2P_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("E2P_CACHE")
    assert cache_root() == Path.home() / ".cache" / "e2p"


ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIMES = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=ZONES)


@given(st.lists(TIMES, min_size=1, max_size=8), st.sampled_from(["T", " "]), st.randoms())
def test_texts_with_a_zone_become_the_instant_that_python_reads(times: list[datetime], sep: str, rng) -> None:
    texts = [time.isoformat(sep, rng.choice(["auto", "microseconds"])) for time in times]
    values = to_utc(pl.Series("timestamp", [*texts, None]), str)
    assert values.dtype == UTC
    assert values.to_list() == [*times, None]


@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)), st.sampled_from(["T", " "]))
def test_texts_without_a_zone_are_refused(time: datetime, sep: str) -> None:
    for text in (time.isoformat(sep), time.isoformat(sep, "minutes"), time.date().isoformat(), str(time.year)):
        with pytest.raises(DataError, match=r"t\.csv: row 8 \(user 'b'\): timestamp .* got no time zone"):
            to_utc(pl.Series(["2024-05-01T12:00:00Z", text]), locator("t.csv", 7, pl.Series(["a", "b"])))


@pytest.mark.parametrize("text", ["2024-05-01T12:00Z", "2024-05-01T14:00:00+02", "2024-05-01 14:00:00+0200"])
def test_other_spellings_of_a_zone(text: str) -> None:
    assert to_utc(pl.Series([text]), str).to_list() == [datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(0)))]
