"""Metrics against plain loops, and every way in which scores can be unfit for a paired comparison."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.errors import DataError
from e2p.evaluation.metrics import arm_order, per_example, summarise

Row = tuple[str, str, str, str, float]


def table(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["example_id", "user_id", "arm", "metric", "value"], orient="row")


def make_scores(arms: tuple[str, ...] = ("e2p", "none"), users: int = 6, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(users):
        for k in range(int(rng.integers(1, 5))):
            tokens, size = int(rng.integers(1, 30)), int(rng.integers(30, 90))
            for arm in arms:
                key = (f"x{user}-{k}", f"u{user}", arm)
                rows.append((*key, "nll", float(tokens * rng.uniform(1, 5))))
                rows.append((*key, "tokens", float(tokens)))
                rows.append((*key, "bytes", float(size)))
                rows.append((*key, "context_tokens", float(rng.integers(0, 3))))
    order = rng.permutation(len(rows))
    return table([rows[i] for i in order])


def sums(scores: pl.DataFrame) -> dict[tuple[str, str], float]:
    """Sum by (arm, metric), by a plain loop."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for row in scores.iter_rows(named=True):
        total[row["arm"], row["metric"]] += row["value"]
    return total


@given(seed=st.integers(0, 10_000), users=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_summary_equals_a_plain_loop(seed: int, users: int) -> None:
    scores = make_scores(("shuffled", "none", "e2p"), users, seed)
    summary = summarise(scores, resamples=100)
    total = sums(scores)
    assert list(summary) == ["none", "shuffled", "e2p"]
    for arm, figures in summary.items():
        nats = total[arm, "nll"] / total[arm, "tokens"]
        assert figures["nats_per_token"] == pytest.approx(nats)
        assert figures["perplexity"] == pytest.approx(math.exp(nats))
        assert figures["bits_per_byte"] == pytest.approx(total[arm, "nll"] / math.log(2) / total[arm, "bytes"])
        assert figures["context_tokens"] == pytest.approx(total[arm, "context_tokens"] / figures["examples"])
        assert figures["examples"] == scores["example_id"].n_unique()
        assert figures["users"] == users
        if users == 1:
            assert figures["perplexity_ci"] is None
        else:
            low, high = figures["perplexity_ci"]
            assert low <= high


def test_by_hand() -> None:
    rows: list[Row] = []
    for example, nll, tokens in (("a", 2.0, 2.0), ("b", 6.0, 2.0)):
        for metric, value in (("nll", nll), ("tokens", tokens), ("bytes", 4.0), ("context_tokens", 1.0)):
            rows.append((example, f"user of {example}", "e2p", metric, value))
    figures = summarise(table(rows), resamples=2000)["e2p"]
    assert figures["perplexity"] == pytest.approx(math.exp(2))
    assert figures["bits_per_byte"] == pytest.approx(1 / math.log(2))
    # Two users: a resample is aa, ab or bb, so the interval goes from one user's perplexity to the other's.
    assert figures["perplexity_ci"] == pytest.approx([math.exp(1), math.exp(3)])


def test_interval_resamples_users_not_examples() -> None:
    """With many equal examples per user the interval must stay that of the few users."""

    def width(copies: int) -> float:
        rows: list[Row] = []
        rng = np.random.default_rng(3)
        for user, nats in enumerate(rng.normal(3, 0.5, 20)):
            for k in range(copies):
                values = (("nll", 5 * nats), ("tokens", 5.0), ("bytes", 9.0), ("context_tokens", 0.0))
                rows += [(f"{user}.{k}", f"u{user}", "none", metric, value) for metric, value in values]
        low, high = summarise(table(rows), resamples=2000)["none"]["perplexity_ci"]
        return high - low

    assert width(10) == pytest.approx(width(1))


def test_wide_table_equals_a_plain_loop() -> None:
    scores = make_scores(("e2p+prompt", "e2p", "none"))
    value = {(r["example_id"], r["arm"], r["metric"]): r["value"] for r in scores.iter_rows(named=True)}
    nats, bits, raw = (per_example(scores, m) for m in ("nats_per_token", "bits_per_byte", "nll"))
    assert nats.columns == ["example_id", "user_id", "tokens", "none", "e2p", "e2p+prompt"]
    assert nats["example_id"].is_sorted()
    for i, (example, user, tokens) in enumerate(nats.select("example_id", "user_id", "tokens").iter_rows()):
        assert example.startswith(user.replace("u", "x"))
        for arm in ("none", "e2p", "e2p+prompt"):
            nll = value[example, arm, "nll"]
            assert tokens == value[example, arm, "tokens"]
            assert raw[arm][i] == nll
            assert nats[arm][i] == pytest.approx(nll / tokens)
            assert bits[arm][i] == pytest.approx(nll / math.log(2) / value[example, arm, "bytes"])


def test_other_metrics_need_no_tokens() -> None:
    scores = table([("a", "u", "none", "rouge", 0.5), ("b", "v", "none", "rouge", 0.25)])
    assert per_example(scores, "rouge").to_dict(as_series=False) == {
        "example_id": ["a", "b"],
        "user_id": ["u", "v"],
        "none": [0.5, 0.25],
    }


def test_arms_stand_in_the_order_of_the_config() -> None:
    assert arm_order(["e2p+prompt", "zeta", "e2p", "alpha", "none"]) == [
        "none",
        "e2p",
        "e2p+prompt",
        "alpha",
        "zeta",
    ]


def change(column: str, value: object, arm: str = "e2p", metric: str = "nll") -> pl.DataFrame:
    """Good scores in which one row has another value."""
    scores = make_scores()
    row = int(((scores["arm"] == arm) & (scores["metric"] == metric)).arg_max() or 0)
    values = scores[column].to_list()
    values[row] = value
    return scores.with_columns(pl.Series(column, values))


def drop_one(scores: pl.DataFrame) -> pl.DataFrame:
    return scores.filter(~((pl.col("arm") == "e2p") & (pl.col("example_id") == "x0-0")))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (make_scores().drop("arm"), "missing: arm"),
        (make_scores().clear(), "no rows"),
        (drop_one(make_scores()), r"arm 'e2p' has nll for \d+ of \d+ examples"),
        (make_scores().filter(pl.col("metric") != "bytes"), r"arm 'none' has bytes for 0 of \d+ examples"),
        (pl.concat([make_scores(), make_scores()]), r"arm 'none' has \d+ values of nll for \d+ examples"),
        (change("value", math.nan), r"nll of arm 'e2p' is nan for example 'x"),
        (change("value", math.inf), r"is inf for example"),
        (change("value", None), r"is None for example"),
        (change("user_id", "another"), "stands under more than one user"),
        (change("value", 99.0, metric="tokens"), "tokens of example 'x.*' differs between arms"),
        (
            make_scores().with_columns(
                pl.when(pl.col("metric") == "tokens").then(0.0).otherwise("value").alias("value")
            ),
            "tokens of example 'x.*' is not > 0",
        ),
    ],
)
def test_unfit_scores_are_refused(scores: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise(scores, resamples=100)


def test_a_broken_model_does_not_overflow() -> None:
    scores = make_scores().with_columns(pl.when(pl.col("metric") == "nll").then(1e6).otherwise("value").alias("value"))
    assert math.isfinite(summarise(scores, resamples=100)["e2p"]["perplexity"])
