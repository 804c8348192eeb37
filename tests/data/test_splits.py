"""Splits: by group, reproducible, whatever the order of rows, and the table's own split where it has one."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import SplitConfig
from e2p.data.splits import SPLITS, drop_training_groups, resolve_splits, split_by_group
from e2p.errors import DataError

GROUPS = st.lists(st.sampled_from([f"g{i}" for i in range(12)]), min_size=1, max_size=60)
FRACTIONS = st.sampled_from([(0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (0.1, 0.45, 0.45)])


def by_group(groups: list[str], codes: np.ndarray) -> dict[str, set[int]]:
    parts: dict[str, set[int]] = {}
    for group, code in zip(groups, codes.tolist(), strict=True):
        parts.setdefault(group, set()).add(code)
    return parts


@given(GROUPS, FRACTIONS, st.integers(0, 5), st.randoms())
def test_split_properties(groups: list[str], fractions: tuple[float, float, float], seed: int, rng) -> None:
    config = SplitConfig(fractions, seed)
    distinct = sorted(set(groups))
    if len(distinct) < sum(f > 0 for f in fractions):
        with pytest.raises(DataError, match=rf"got {len(distinct)}; set a fraction to 0 or give more groups"):
            split_by_group(pl.Series(groups), config)
        return
    codes = split_by_group(pl.Series(groups), config)
    parts = by_group(groups, codes)
    assert codes.dtype == np.int8
    assert all(len(part) == 1 for part in parts.values())
    counts = [sum(part == {code} for part in parts.values()) for code in range(3)]
    for fraction, count in zip(fractions, counts, strict=True):
        assert (count > 0) == (fraction > 0)
        assert abs(count - fraction * len(distinct)) < 2
    order = list(range(len(groups)))
    rng.shuffle(order)
    again = split_by_group(pl.Series([groups[i] for i in order]), config)
    assert again.tolist() == codes[order].tolist()


def test_a_split_is_what_numpy_permutes() -> None:
    # The recipe in the docstring, by hand: sorted groups, one permutation, 8 / 1 / 1 of them.
    groups = pl.Series([f"g{i}" for i in range(10)])
    order = np.random.default_rng(42).permutation(10)
    codes = split_by_group(groups, SplitConfig())
    assert [codes[i] for i in order] == [0] * 8 + [1, 2]
    assert split_by_group(groups, SplitConfig(seed=43)).tolist() != codes.tolist()


def keys(split: list[str | None], group: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"row": range(len(split)), "group": group, "split": pl.Series(split, dtype=pl.String)})


def test_own_column_wins() -> None:
    table = keys(["test", "train", "validation", "test"], ["a", "b", "c", "a"])
    codes = resolve_splits(table, SplitConfig())
    assert codes.dtype == np.int8
    assert [SPLITS[code] for code in codes] == table["split"].to_list()


def test_without_own_column_groups_are_split() -> None:
    table = keys([None] * 20, [f"g{i % 10}" for i in range(20)])
    assert resolve_splits(table, SplitConfig()).tolist() == split_by_group(table["group"], SplitConfig()).tolist()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            ["train", None, "test"],
            r"row 1: split: expected one of train, validation, test, as in other rows, got None",
        ),
        (["train", "dev", "test"], r"row 1: split: .* got 'dev'"),
        (["train", "test", "test"], r"group 'a': expected one split, got train and test; put all"),
    ],
)
def test_a_bad_own_column_is_refused(split: list[str | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_splits(keys(split, ["a", "a", "b"]), SplitConfig())


@given(st.lists(st.sampled_from("abcdefghij"), min_size=3, max_size=60), st.floats(0.01, 1), st.integers(0, 9))
def test_a_share_of_the_training_groups_is_kept_whole_and_nested(groups: list[str], share: float, seed: int) -> None:
    series = pl.Series(groups, dtype=pl.String)
    codes = np.array([ord(group) % 3 for group in groups], np.int8)
    training = sorted({group for group, code in zip(groups, codes, strict=True) if code == 0})
    if not training:
        return
    kept = drop_training_groups(series, codes, share, seed)
    assert (kept[codes != 0] == codes[codes != 0]).all()
    own = {group for group, code in zip(groups, kept, strict=True) if code == 0}
    assert len(own) == max(1, round(share * len(training)))
    assert own.isdisjoint({group for group, code in zip(groups, kept, strict=True) if code == -2})
    less = drop_training_groups(series, codes, share / 2, seed)
    assert {group for group, code in zip(groups, less, strict=True) if code == 0} <= own
