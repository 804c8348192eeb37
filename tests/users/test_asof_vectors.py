"""Vectors as of a time: the ridge equation by hand, nothing at or after the time, no vector without something known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.errors import ConfigError, DataError
from e2p.users.asof_vectors import Space, als_space, vectors_before

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
ALPHA, RIDGE = 3.0, 0.5
SCHEMA = {"user_id": pl.String, "item_id": pl.String, "weight": pl.Float64, "timestamp": TIME}


def table(rows: list[tuple[str, str, float, datetime]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def log(seed: int = 0, users: int = 20, items: int = 15, length: int = 14) -> pl.DataFrame:
    """Interactions on whole days, several on one day, items that come back."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for step in range(length):
            item = int(random.integers(items))
            weight = float(random.integers(1, 4))
            rows.append((f"u{user:02d}", f"i{item:02d}", weight, START + timedelta(days=int(step * random.random()))))
    return table(rows).sample(fraction=1, shuffle=True, seed=seed)


def space(frame: pl.DataFrame, until: datetime = START + timedelta(days=4)) -> Space:
    return als_space(frame.filter(pl.col("timestamp") < until), 5, RIDGE, ALPHA, 10, 7)


def by_hand(frame: pl.DataFrame, found: Space, user: str, time: datetime) -> tuple[np.ndarray, int]:
    """(Y'Y + sum (c - 1) y y' + lambda) x = sum c y, solved in float64; and the interactions that count."""
    y = found.item_vectors.astype(np.float64)
    place = {item: row for row, item in enumerate(found.items)}
    weight, seen = dict.fromkeys(place, 0.0), 0
    for who, item, w, when in frame.select("user_id", "item_id", "weight", "timestamp").iter_rows():
        if who == user and item in place and when < time:
            weight[item] += w
            seen += 1
    left, right = y.T @ y + RIDGE * np.eye(y.shape[1]), np.zeros(y.shape[1])
    for item, w in weight.items():
        if w:
            left += (ALPHA * w - 1) * np.outer(y[place[item]], y[place[item]])
            right += ALPHA * w * y[place[item]]
    return np.linalg.solve(left, right), seen


def everything(frame: pl.DataFrame) -> pl.DataFrame:
    """Every user at every one of his times, and before and after all of them."""
    ends = [frame["user_id"].unique().to_frame().with_columns(timestamp=pl.lit(t).cast(TIME)) for t in
            (START - timedelta(days=1), START + timedelta(days=99))]  # fmt: skip
    return pl.concat([frame.select("user_id", "timestamp").unique(maintain_order=True), *ends])


def test_a_vector_solves_the_least_squares_of_what_came_before() -> None:
    frame = log()
    found, asked = space(frame), everything(log())
    vectors, seen = vectors_before(frame, asked, found)
    assert vectors.dtype == np.float32
    assert len(set(seen.tolist())) > 8
    for row, (user, time) in enumerate(asked.iter_rows()):
        expected, count = by_hand(frame, found, user, time)
        assert seen[row] == count
        np.testing.assert_allclose(vectors[row], expected, rtol=2e-3, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40))
def test_neither_chunks_nor_order_nor_company_change_a_bit(seed: int, entries: int) -> None:
    frame = log(seed)
    found, asked = space(frame), everything(frame)
    whole, seen = vectors_before(frame, asked, found)
    order = np.random.default_rng(seed).permutation(asked.height)[: asked.height // 2]
    some, counts = vectors_before(frame.reverse(), asked[order], found, entries)
    np.testing.assert_array_equal(some, whole[order])
    np.testing.assert_array_equal(counts, seen[order])


def test_what_happens_at_the_time_or_later_changes_no_bit() -> None:
    frame, cut = log(), START + timedelta(days=6)
    found = space(frame)
    asked = frame.select("user_id").unique(maintain_order=True).with_columns(timestamp=pl.lit(cut).cast(TIME))
    whole, _ = vectors_before(frame, asked, found)
    early = frame.filter(pl.col("timestamp") < cut)
    other = frame.filter(pl.col("timestamp") >= cut).with_columns(item_id=pl.lit("i05"), weight=pl.lit(9.0))
    assert other.filter(pl.col("timestamp") == cut).height
    for changed in (early, pl.concat([early, other])):
        np.testing.assert_array_equal(vectors_before(changed, asked, found)[0], whole)
    later = asked.with_columns(pl.col("timestamp").dt.offset_by("1us"))
    assert (vectors_before(pl.concat([early, other]), later, found)[0] != whole).any()


def test_the_space_is_of_what_it_is_given() -> None:
    early = pl.col("timestamp") < START + timedelta(days=4)
    frame = log().filter(~early | (pl.col("item_id") != "i00"))
    found = space(frame)
    assert found.items.to_list() == sorted(found.items.to_list())
    assert "i00" not in found.items
    again, other = space(frame.reverse()), als_space(frame, 5, RIDGE, ALPHA, 10, 7)
    np.testing.assert_array_equal(again.item_vectors, found.item_vectors)
    assert found.version == again.version != other.version


def test_users_without_a_known_item_have_seen_nothing() -> None:
    frame = pl.concat([log(), table([("new", "unheard", 1.0, START)])])
    asked = pl.DataFrame({"user_id": ["new", "nobody", "u00"], "timestamp": [START + timedelta(days=50)] * 3})
    vectors, seen = vectors_before(frame, asked.cast({"timestamp": TIME}), space(log()))
    assert seen.tolist()[:2] == [0, 0]
    assert not vectors[:2].any()
    assert vectors[2].any()


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(DataError, match="expected more than 15 users and items"):
        als_space(log(), 15, RIDGE, ALPHA, 10, 7)
    with pytest.raises(ConfigError, match="alpha"):
        als_space(log(), 5, RIDGE, -1.0, 10, 7)
