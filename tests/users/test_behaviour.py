"""Vectors from interactions: the closed form by hand, nothing from the future, one space over time, bad tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.cli import main
from e2p.data.tables import open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.users.behaviour import Factors, FactorSettings, read_interactions
from e2p.users.behaviour import factorise as factorise_with

MONDAY = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")


def factorise(frame: pl.DataFrame, **settings: Any) -> Factors:
    return factorise_with(frame, FactorSettings(**settings))


def plays(users: int = 40, items: int = 24, weeks: int = 0, seed: int = 0) -> pl.DataFrame:
    """Users of two kinds: even ones play the first half of the items, odd ones the second, now and then another."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for play in range(12):
            half = user % 2 if random.random() < 0.95 else 1 - user % 2
            item = int(random.integers(items // 2)) + half * items // 2
            when = MONDAY + timedelta(weeks=play % weeks, hours=int(random.integers(168))) if weeks else None
            rows.append((f"u{user:02d}", f"i{item:02d}", float(random.integers(1, 5)), when))
    frame = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "weight": pl.Float64,
                                       "timestamp": TIME}, orient="row")  # fmt: skip
    return frame if weeks else frame.drop("timestamp")


@pytest.mark.parametrize(("method", "iterations"), [("als", 60), ("bpr", 800), ("lightgcn", 60)])
def test_users_of_a_kind_lie_together_and_next_to_their_items(method: str, iterations: int) -> None:
    found = factorise(plays(), method=method, dimension=6, iterations=iterations)
    assert found.user_vectors.shape == (40, 6)
    assert found.item_vectors.shape == (24, 6)
    affinity = found.user_vectors @ found.item_vectors.T
    own = np.array([[int(user[1:]) % 2 == int(item[1:]) // 12 for item in found.items] for user in found.users])
    assert affinity[own].mean() > affinity[~own].mean() + 0.2


def test_als_is_the_least_squares_that_hu_koren_and_volinsky_wrote_down() -> None:
    """A user given the items: (Y'CY + lambda I) x = Y'C p with confidence 1 + alpha w (implicit counts alpha w)."""
    frame = plays(weeks=4)
    found = factorise(frame, dimension=5, refresh="week", alpha=3.0, regularization=0.5)
    y = found.item_vectors.astype(np.float64)
    assert found.timestamps is not None
    for row in (0, len(found.users) // 2, len(found.users) - 1):
        user, end = found.users[row], found.timestamps[row]
        seen = frame.filter((pl.col("user_id") == user) & (pl.col("timestamp") < end))
        weight = {item: seen.filter(pl.col("item_id") == item)["weight"].sum() for item in found.items}
        confidence = np.array([3.0 * weight[item] if weight[item] else 1.0 for item in found.items])
        liked = np.array([weight[item] > 0 for item in found.items], float)
        left = y.T @ (confidence[:, None] * y) + 0.5 * np.eye(5)
        np.testing.assert_allclose(
            found.user_vectors[row], np.linalg.solve(left, y.T @ (confidence * liked)), rtol=2e-3, atol=2e-4
        )


def test_a_week_ends_on_monday_and_only_who_did_something_gets_a_new_vector() -> None:
    week = timedelta(weeks=1)
    rows = [(f"u{u}", f"i{i}", 1.0, MONDAY + timedelta(hours=u)) for u in range(6) for i in range(6) if (u + i) % 2]
    rows += [("u0", "i1", 2.0, MONDAY + week), ("u1", "new", 1.0, MONDAY + week), ("u2", "i3", 1.0, MONDAY + 3 * week)]
    frame = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "weight": pl.Float64,
                                       "timestamp": TIME}, orient="row")  # fmt: skip
    found = factorise(frame, dimension=2, refresh="week", space_share=0.3)
    assert found.timestamps is not None
    assert list(zip(found.users, found.timestamps, strict=True)) == [
        *[(f"u{u}", MONDAY + week) for u in range(6)],
        ("u0", MONDAY + 2 * week),
        ("u2", MONDAY + 4 * week),
    ]
    assert found.left_out == 1
    assert "new" not in found.items


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(0, 50))
def test_what_comes_later_changes_no_earlier_vector(cut: int, seed: int) -> None:
    frame = plays(weeks=6, seed=seed)
    until = MONDAY + timedelta(weeks=cut)
    share = 2 / 6  # the space is of the first two weeks, whatever follows
    whole = factorise(frame, dimension=4, refresh="week", space_share=share)
    early = factorise(frame.filter(pl.col("timestamp") < until), dimension=4, refresh="week", space_share=2 / cut)
    assert whole.timestamps is not None
    assert early.timestamps is not None
    keep = (whole.timestamps <= until).to_numpy()
    assert whole.version == early.version
    assert whole.users.filter(pl.Series(keep)).to_list() == early.users.to_list()
    np.testing.assert_array_equal(whole.user_vectors[keep], early.user_vectors)


def test_other_interactions_in_the_space_are_another_version() -> None:
    assert factorise(plays(seed=1), dimension=4).version != factorise(plays(seed=2), dimension=4).version
    assert factorise(plays(seed=1), dimension=4).version == factorise(plays(seed=1), dimension=4).version


def test_the_command_writes_tables_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plays(weeks=4).write_parquet(tmp_path / "plays.parquet")
    out, items = tmp_path / "vectors.parquet", tmp_path / "items.parquet"
    command = ["behaviour", str(tmp_path / "plays.parquet"), str(out), "--items", str(items), "--dimension", "5",
               "--refresh", "week"]  # fmt: skip
    assert main(command) == 0
    table = open_embeddings(str(out), tmp_path)
    assert table.dim == 5
    assert len(table.versions) == 1
    assert table.keys["timestamp"].null_count() == 0
    assert pl.read_parquet(items).columns == ["item_id", "embedding", "version"]
    assert "users, version als-5-" in capsys.readouterr().out
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_without_refresh_a_vector_is_known_after_the_last_interaction_and_not_at_it() -> None:
    frame = plays(weeks=3)
    found = factorise(frame, dimension=4)
    assert found.timestamps is not None
    last = frame["timestamp"].max()
    assert isinstance(last, datetime)
    assert set(found.timestamps) == {last + timedelta(microseconds=1)}
    assert factorise(plays(), dimension=4).timestamps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": [None, "i"]}, r"row 0 \(user 'u'\): item_id: expected an item, got none"),
        ({"weight": [1.0, -2.0]}, r"row 1 \(user 'v'\): weight: expected a number > 0, got -2.0"),
        ({"weight": [1.0, float("nan")]}, r"row 1 \(user 'v'\): weight: expected a number > 0, got nan"),
        ({"weight": ["1", "much"]}, r"row 1 \(user 'v'\): weight: expected a number > 0, got 'much'"),
        ({"timestamp": ["2024-01-01T00:00:00Z", None]}, r"row 1 \(user 'v'\): timestamp: expected one in every row"),
        ({"timestamp": ["2024-01-01", "2024-01-02"]}, "expected UTC, got no time zone"),
        ({"user_id": [None, "v"]}, "row 0"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    frame = pl.DataFrame({"user_id": ["u", "v"], "item_id": ["i", "j"], "weight": [1.0, 2.0]} | change)
    frame.write_parquet(tmp_path / "plays.parquet")
    with pytest.raises(DataError, match=message):
        read_interactions(str(tmp_path / "plays.parquet"))


def test_settings_out_of_range_and_small_tables_are_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"dimension": 0}, "dimension: expected a whole number >= 1"),
        ({"dimension": 1, "method": "bpr"}, "dimension"),
        ({"method": "bpr", "refresh": "week"}, "refresh: expected method als"),
        ({"method": "lightgcn", "refresh": "week"}, "refresh: expected method als"),
        ({"method": "svd"}, "method: expected one of als, bpr, lightgcn, got 'svd'"),
        ({"refresh": "hour"}, "refresh: expected one of never, day"),
        ({"space_share": 0.0}, "space_share"),
        ({"regularization": 0.0}, "regularization"),
        ({"alpha": -1.0}, "alpha"),
        ({"iterations": 0}, "iterations"),
        ({"layers": 0}, "layers: expected a whole number >= 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number > 0, got nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            FactorSettings(**change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected more than 40 users and items"):
        factorise(plays(), dimension=40)
    with pytest.raises(DataError, match="expected a column timestamp, got none"):
        factorise(plays(), dimension=4, refresh="week")
    plays().write_parquet(tmp_path / "plays.parquet")
    before = (tmp_path / "plays.parquet").read_bytes()
    from e2p.users.behaviour import behaviour

    with pytest.raises(RunError, match="is there already"):
        behaviour(str(tmp_path / "plays.parquet"), str(tmp_path / "plays.parquet"), overwrite=True)
    assert (tmp_path / "plays.parquet").read_bytes() == before
