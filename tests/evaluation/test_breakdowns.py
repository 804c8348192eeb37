"""The gain by groups of examples: bins by hand, distances by a plain loop, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.config import RunConfig
from e2p.data.tables import write_embeddings
from e2p.errors import DataError
from e2p.evaluation import breakdowns as breakdowns_module
from e2p.evaluation.breakdowns import breakdowns, covariates, gains, terciles
from e2p.evaluation.significance import cluster_bootstrap, compare
from e2p.training.inputs import RunInputs
from tiny_run import examples_frame, inputs_of, tiny_run


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_bins_hold_every_value_once_and_part_no_equal_ones(values: list[int]) -> None:
    bins = list(terciles(np.array(values, float)))
    assert 1 <= len(bins) <= 3
    assert sum(sum(low <= value <= high for value in values) for low, high, _ in bins) == len(values)
    assert bins == sorted(bins)
    assert all(one[1] < other[0] for one, other in pairwise(bins))
    if len(set(values)) == len(values) and len(values) % 3 == 0:
        assert [sum(low <= value <= high for value in values) for low, high, _ in bins] == [len(values) // 3] * 3


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 90], ["1–3", "4–6", "7+"]),
        ([1, 1, 1, 1, 1, 1, 1, 2, 9], ["1", "2+"]),
        ([1, 2, 2, 2, 2, 2, 2, 2, 2], ["1–2"]),
        ([1, 1, 1, 2, 2, 2, 3, 3, 3], ["1", "2", "3"]),
        ([4, 4, 4], ["4"]),
        ([6e-7, 1.25, 1.5, 2.25, 2.5, 31.125], ["0–1.25", "1.5–2.25", "2.5+"]),
        ([], []),
    ],
)
def test_bins_by_hand(values: list[float], labels: list[str]) -> None:
    assert [label for _, _, label in terciles(np.array(values, float))] == labels


def example_wide() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Twelve examples of six users; the gain over random is a tenth of the activity, over none ten times that."""
    activity = np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], float)
    ids = [f"x{i:02}" for i in range(12)]
    level = np.random.default_rng(0).normal(3, 1, 12)
    wide = pl.DataFrame(
        {
            "example_id": ids,
            "user_id": [f"u{int(a)}" for a in activity],
            "none": level + activity,
            "random": level + activity / 10,
            "e2p": level,
        }
    )
    by = pl.DataFrame({"example_id": ids[::-1], "activity": activity[::-1].astype(int), "tokens": [7] * 12})
    return wide, by


def test_each_bin_is_tested_by_itself() -> None:
    wide, by = example_wide()
    (found,) = breakdowns(wide, by, resamples=400, seed=3)  # all completions are of one length, which says nothing
    assert (found["by"], found["comparison"]) == ("activity", "true minus random")
    assert [(b["label"], b["examples"], b["users"]) for b in found["bins"]] == [
        ("1–2", 4, 2),
        ("3–4", 4, 2),
        ("5+", 4, 2),
    ]
    for part, own in zip(found["bins"], ([1, 2], [3, 4], [5, 6]), strict=True):
        assert (part["low"], part["high"]) == (own[0], own[1])
        assert part["difference"] == pytest.approx(-sum(own) / 20)
        diff = -np.repeat(own, 2) / 10
        boot = cluster_bootstrap(diff, np.repeat(own, 2), 400, 3)
        assert part["ci"] == pytest.approx([boot.low, boot.high])


def test_a_bin_of_one_user_has_no_interval_and_none_stands_in_for_random() -> None:
    wide, by = example_wide()
    one = by.with_columns(activity=pl.when(pl.col("activity") < 6).then(1).otherwise(2))
    (found,) = breakdowns(wide.drop("random"), one, 100)
    assert found["comparison"] == "true minus none"
    assert [(b["label"], b["users"], b["ci"] is None) for b in found["bins"]] == [("1", 5, False), ("2", 1, True)]
    assert found["bins"][1]["difference"] == pytest.approx(-6)


def test_without_controls_or_covariates_there_is_nothing_to_break_down() -> None:
    wide, by = example_wide()
    assert breakdowns(wide.drop("e2p"), by, 100) == []
    assert breakdowns(wide.drop("random", "none"), by, 100) == []
    assert breakdowns(wide, by.select("example_id"), 100) == []
    assert breakdowns(wide, by.with_columns(activity=None), 100) == []
    known = by.with_columns(activity=pl.when(pl.col("activity") > 2).then("activity"))
    assert sum(b["examples"] for b in breakdowns(wide, known, 100)[0]["bins"]) == 8


def test_what_is_not_a_number_costs_its_example_alone() -> None:
    wide, by = example_wide()
    for hole in (float("nan"), float("inf")):
        holes = by.with_columns(activity=pl.when(pl.col("activity") > 2).then(pl.col("activity") * 1.0).otherwise(hole))
        (found,) = breakdowns(wide, holes, 100)
        assert sum(part["examples"] for part in found["bins"]) == 8


def test_unfit_covariates_are_named() -> None:
    wide, by = example_wide()
    with pytest.raises(DataError, match="covariates: activity: expected numbers, got String"):
        breakdowns(wide, by.with_columns(pl.col("activity").cast(pl.String)), 100)
    with pytest.raises(DataError, match="covariates: example 'x03' stands there twice; expected one row for each"):
        breakdowns(wide, pl.concat([by, by.filter(pl.col("example_id") == "x03")]), 100)
    nameless = pl.concat([by, by.with_columns(example_id=pl.lit(None, pl.String))])
    assert breakdowns(wide, nameless, 100) == breakdowns(wide, by, 100)


def test_gains_by_user_are_means_over_his_examples() -> None:
    wide, _ = example_wide()
    found = gains(wide, "lower", 100)
    assert (found["against"], found["by_user"]) == ("random", pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rel=1e-5))
    assert gains(wide, "higher", 100)["by_user"] == pytest.approx([-gain for gain in found["by_user"]])
    bare = gains(wide.drop("random"), "lower", 100)
    assert (bare["against"], bare["by_user"]) == ("none", pytest.approx([1, 2, 3, 4, 5, 6], rel=1e-5))
    assert gains(wide.drop("e2p"), "lower", 100)["by_user"] == []
    assert gains(wide.drop("none"), "lower", 100)["over_none"] == {}
    assert gains(wide.select("example_id", "user_id", "none"), "lower", 100)["over_none"] == {}


def test_gains_over_none_are_those_of_the_comparisons() -> None:
    wide, _ = example_wide()
    wide = wide.with_columns(tokens=pl.lit(4.0), mine=pl.col("e2p") + 0.5)
    found = gains(wide, "lower", 400, 3)["over_none"]
    assert set(found) == {"random", "e2p", "mine"}
    (tested,) = (c for c in compare(wide, 400, 3) if c.name == "true minus none")
    assert found["e2p"]["gain"] == pytest.approx(-tested.difference)
    assert found["e2p"]["ci"] == pytest.approx([-end for end in reversed(tested.ci or ())])
    boot = cluster_bootstrap((wide["none"] - wide["mine"]).to_numpy(), wide["user_id"].to_numpy(), 400, 3)
    assert (found["mine"]["gain"], *found["mine"]["ci"]) == pytest.approx((boot.mean, boot.low, boot.high))
    alone = gains(wide.with_columns(user_id=pl.lit("u")), "lower", 100)["over_none"]
    assert [part["ci"] for part in alone.values()] == [None] * 3


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Vectors in general position; u19 has none, u05 and u18 share one, and u00 has examples in two parts."""
    config = tiny_run(tmp_path)
    examples = examples_frame(each=3).filter(pl.col("example_id") != "e17-1")
    part = pl.when(pl.col("example_id") == "e0-2").then(pl.lit("test")).otherwise("split")
    examples.with_columns(split=part, group="example_id").write_parquet(config.data.examples)
    vectors = np.random.default_rng(3).normal(2, [1, 10, 0.1], (20, 3)).astype(np.float32)
    vectors[18] = vectors[5]
    write_embeddings(config.data.embeddings, [f"u{u:02d}" for u in range(19)], vectors[:19])
    return replace(config, data=replace(config.data, missing_vector="null"))


def loop_distance(inputs: RunInputs, row: int) -> float | None:
    """Nearest training vector of another user, by a loop; each dimension is divided by its spread in training."""
    users = inputs.keys["user_id"].to_list()
    train = {int(inputs.vector_rows[r]): users[r] for r in inputs.rows("train").tolist()}
    vectors = np.asarray(inputs.embeddings.vectors, float)
    spread = vectors[list(train)].std(0)
    if inputs.vector_rows[row] < 0:
        return None
    own = vectors[inputs.vector_rows[row]]
    return min(float(np.linalg.norm((own - vectors[t]) / spread)) for t, user in train.items() if user != users[row])


def test_covariates_are_those_of_plain_loops(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = inputs_of(config)
    found = covariates(inputs)
    rows = inputs.rows("test").tolist()
    users = inputs.keys["user_id"].to_list()
    assert found["example_id"].to_list() == [inputs.keys["example_id"][row] for row in rows]
    assert found["user_id"].to_list() == [users[row] for row in rows]
    assert found["activity"].to_list() == [users.count(users[row]) for row in rows]
    assert set(found["activity"]) == {2, 3}
    assert found["tokens"].to_list() == [len(inputs.tokens[row].completion) for row in rows]
    expected = [loop_distance(inputs, row) for row in rows]
    assert [distance is None for distance in found["distance"]] == [distance is None for distance in expected]
    known = [distance for distance in expected if distance is not None]
    assert found["distance"].drop_nulls().to_list() == pytest.approx(known, rel=1e-4, abs=1e-6)
    by_user = dict(zip(found["user_id"], found["distance"], strict=True))
    assert by_user["u18"] == 0  # another user's vector, the same
    assert by_user["u00"] > 0.1  # not his own, which he was trained with
    assert by_user["u19"] is None
    monkeypatch.setattr(breakdowns_module, "_CELLS", 25)  # two at a time
    assert covariates(inputs).equals(found)


def test_many_training_vectors_are_thinned_out_evenly(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = inputs_of(config)
    full = covariates(inputs)["distance"].drop_nulls()
    monkeypatch.setattr(breakdowns_module, "_TRAINING_VECTORS", 4)
    thin = covariates(inputs)["distance"].drop_nulls()
    assert len(thin) == len(full)
    assert not thin.equals(full)


def test_wide_vectors_are_looked_for_in_a_projection(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users in far pairs: the projection finds the partner, and the distance from him is exact."""
    random = np.random.default_rng(0)
    pairs = random.normal(0, 5, (10, 600)).repeat(2, 0) + random.normal(0, 0.3, (20, 600))
    order = random.permutation(20)
    write_embeddings(config.data.embeddings, [f"u{u:02d}" for u in order], pairs.astype(np.float32))
    _, inputs = inputs_of(config)
    rows = inputs.rows("test").tolist()
    projected = covariates(inputs)["distance"]
    expected = [loop_distance(inputs, row) for row in rows]
    partners = [distance for distance in expected if distance is not None and distance < 10]
    assert partners
    for found, exact in zip(projected, expected, strict=True):
        assert exact is not None
        assert exact - 1e-3 < found < exact * (1 + 1e-4 if exact < 10 else 1.15)
    monkeypatch.setattr(breakdowns_module, "_WIDTH", 1)
    poor = covariates(inputs)["distance"]
    assert (poor > projected - 1e-3).all()
    assert (poor > projected + 1).any()
