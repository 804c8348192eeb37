"""The point-in-time join against a loop that anyone can check by eye."""

from __future__ import annotations

from datetime import UTC as ZONE
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.data.asof import asof_rows
from e2p.data.sources import UTC
from e2p.data.tables import EmbeddingTable
from e2p.errors import DataError

START = datetime(2024, 1, 1, tzinfo=ZONE)
USERS = st.sampled_from(["a", "b", "c", "ä"])
HOURS = st.integers(0, 6)  # few values, so that ties are common


def at(hour: int) -> datetime:
    return START + timedelta(hours=hour)


def examples(rows: list[tuple[str, int | None]]) -> pl.DataFrame:
    times = [None if hour is None else at(hour) for _, hour in rows]
    return pl.DataFrame(
        {"row": range(len(rows)), "user_id": [user for user, _ in rows], "timestamp": times},
        schema={"row": pl.Int64, "user_id": pl.String, "timestamp": UTC},
    )


def embeddings(rows: list[tuple[str, int]], timed: bool = True) -> EmbeddingTable:
    keys = examples(rows).drop("row")
    vectors = np.arange(len(rows), dtype=np.float32).reshape(-1, 1)
    return EmbeddingTable(keys if timed else keys.drop("timestamp"), vectors, "vectors.parquet")


def loop(queries: list[tuple[str, int]], versions: list[tuple[str, int]]) -> tuple[list[int], int, int]:
    rows, unknown, early = [], 0, 0
    for user, hour in queries:
        own = [(h, i) for i, (u, h) in enumerate(versions) if u == user]
        past = [(h, i) for h, i in own if h <= hour]
        rows.append(max(past)[1] if past else -1)
        unknown += not own
        early += bool(own) and not past
    return rows, unknown, early


@given(
    st.lists(st.tuples(USERS, HOURS), max_size=20),
    st.lists(st.tuples(USERS, HOURS), unique=True, max_size=15),
)
def test_join_equals_the_loop(queries: list[tuple[str, int]], versions: list[tuple[str, int]]) -> None:
    joined = asof_rows(examples(queries), embeddings(versions))
    rows, unknown, early = loop(queries, versions)
    assert joined.rows.dtype == np.int64
    assert joined.rows.tolist() == rows
    assert (joined.unknown_user, joined.too_early) == (unknown, early)
    assert bool(joined.first_missing) == (-1 in rows)
    if -1 in rows:
        assert joined.first_missing.startswith(f"row {rows.index(-1)} (user {queries[rows.index(-1)][0]!r}, 2024-")


@given(st.lists(st.tuples(USERS, HOURS), max_size=20), st.lists(USERS, unique=True))
def test_without_vector_times_the_join_is_by_user(queries: list[tuple[str, int]], users: list[str]) -> None:
    joined = asof_rows(examples(queries), embeddings([(user, 0) for user in users], timed=False))
    assert joined.rows.tolist() == [users.index(user) if user in users else -1 for user, _ in queries]
    assert joined.too_early == 0
    assert joined.unknown_user == sum(user not in users for user, _ in queries)


def test_a_vector_of_the_same_microsecond_counts_and_one_later_does_not() -> None:
    table = embeddings([("a", 1), ("a", 2)])
    query = examples([("a", 2), ("a", 2), ("a", 1)]).with_columns(
        pl.col("timestamp") - pl.Series([0, 1, 1]).cast(pl.Duration("us"))
    )
    joined = asof_rows(query, table)
    assert joined.rows.tolist() == [1, 0, -1]
    assert joined.first_missing == (
        "row 2 (user 'a', 2024-01-01T00:59:59.999999+00:00): the user's first vector is newer"
    )


def test_an_example_without_time_cannot_be_joined_to_timed_vectors() -> None:
    with pytest.raises(DataError, match=r"row 1 \(user 'b'\): expected a timestamp for the point-in-time join"):
        asof_rows(examples([("a", 1), ("b", None)]), embeddings([("a", 0)]))
    assert asof_rows(examples([("a", None)]), embeddings([("a", 0)], timed=False)).rows.tolist() == [0]


def test_row_numbers_in_messages_are_those_of_the_table() -> None:
    joined = asof_rows(examples([("a", 1), ("z", 1)]).tail(1), embeddings([("a", 0)]))
    assert joined.first_missing == "row 1 (user 'z', 2024-01-01T01:00:00+00:00): the user has no vector"


def test_many_rows_in_any_order_agree_with_searchsorted() -> None:
    rng = np.random.default_rng(0)
    versions = pl.DataFrame({"u": rng.integers(0, 300, 40_000), "t": rng.integers(0, 10**12, 40_000)}).unique()
    queries = pl.DataFrame({"u": rng.integers(0, 310, 20_000), "t": rng.integers(0, 10**12, 20_000)})

    def keyed(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.select(user_id=pl.col("u").cast(pl.String), timestamp=pl.col("t").cast(UTC))

    table = EmbeddingTable(keyed(versions), np.zeros((versions.height, 1), np.float32), "v")
    rows = asof_rows(keyed(queries), table).rows
    users, times = versions["u"].to_numpy(), versions["t"].to_numpy()
    for user in range(310):
        own = np.flatnonzero(users == user)
        own = own[np.argsort(times[own])]
        asked = np.flatnonzero(queries["u"].to_numpy() == user)
        position = np.searchsorted(times[own], queries["t"].to_numpy()[asked], side="right") - 1
        expected = np.where(position < 0, -1, own[position] if len(own) else -1)
        np.testing.assert_array_equal(rows[asked], expected)
