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
from e2p.evaluation.metrics import (
    arm_order,
    audited_metrics,
    means,
    metric_of,
    per_example,
    summarise,
)
from e2p.evaluation.significance import cluster_bootstrap

ARMS = ("none", "e2p")
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


def test_a_metric_may_be_measured_on_fewer_arms_and_examples() -> None:
    """Generation is dear: ROUGE of some examples in two arms does not spoil the likelihoods of all."""
    scores = make_scores(("none", "static", "e2p"))
    some = scores.filter((pl.col("metric") == "nll") & (pl.col("arm") != "static"), pl.col("example_id") <= "x2")
    both = pl.concat([scores, some.with_columns(metric=pl.lit("rougeL"), value=pl.lit(0.5))])
    assert per_example(both, "rougeL").columns == ["example_id", "user_id", "none", "e2p"]
    assert per_example(both, "rougeL").height == some["example_id"].n_unique() < per_example(both).height
    assert per_example(both).equals(per_example(scores))
    assert summarise(both, 100) == summarise(scores, 100)


def test_figures_that_the_scores_do_not_allow_are_left_out() -> None:
    scores = make_scores()
    less = summarise(scores.filter(pl.col("metric").is_in(["nll", "tokens"])), 100)
    full = summarise(scores, 100)
    assert set(full["e2p"]) - set(less["e2p"]) == {"bits_per_byte", "context_tokens"}
    assert less["e2p"]["perplexity_ci"] == full["e2p"]["perplexity_ci"]


def test_means_of_any_metric() -> None:
    rows = [(f"x{i}", f"u{i % 4}", arm, "auc", float(i % 3 == 0) + (arm == "e2p")) for i in range(9) for arm in ARMS]
    wide = per_example(table(rows), "auc")
    found = means(wide, "auc", resamples=500, seed=1)
    for arm in ARMS:
        boot = cluster_bootstrap(wide[arm].to_numpy(), wide["user_id"].to_numpy(), 500, 1)
        assert found[arm] == {"examples": 9, "users": 4, "auc": boot.mean, "auc_ci": [boot.low, boot.high]}
    assert means(wide.filter(pl.col("user_id") == "u0"), "auc")["e2p"]["auc_ci"] is None


@pytest.mark.parametrize(
    ("name", "label", "better"),
    [
        ("nats_per_token", "nats per token", "lower"),
        ("bits_per_byte", "bits per byte", "lower"),
        ("rougeL", "ROUGE-L", "higher"),
        ("hit_rate@10", "HitRate@10", "higher"),
        ("ndcg@5", "NDCG@5", "higher"),
        ("mrr@100", "MRR@100", "higher"),
        ("recall@1", "recall@1", "higher"),
        ("auc", "AUC", "higher"),
        ("engagement", "engagement", "higher"),
        ("affinity", "affinity", "higher"),
        ("accuracy", "accuracy", "higher"),
    ],
)
def test_known_metrics_have_a_direction(name: str, label: str, better: str) -> None:
    assert (metric_of(name).label, metric_of(name).better) == (label, better)


@pytest.mark.parametrize("name", ["dwell_time", "hit_rate", "hit_rate@0", "hit_rate@10x", "xndcg@5"])
def test_an_unknown_metric_asks_for_its_direction(name: str) -> None:
    with pytest.raises(DataError, match=f"is a lower or a higher {name} better"):
        metric_of(name)
    assert metric_of(name, {name: "lower"}).better == "lower"
    with pytest.raises(DataError, match="is a lower or a higher"):
        metric_of(name, {name: "up"})  # type: ignore[dict-item]


def test_which_metrics_are_judged() -> None:
    likelihoods = make_scores()
    other = table([("a", "u", "e2p", "rougeL", 0.1), ("a", "u", "e2p", "auc", 0.1)])
    assert audited_metrics(pl.concat([other, likelihoods])) == ["nats_per_token", "rougeL", "auc"]
    assert audited_metrics(other) == ["rougeL", "auc"]
    assert audited_metrics(likelihoods.filter(pl.col("metric") == "nll")) == ["nll"]
    given = table([("a", "u", "e2p", "auc", 0.1), ("a", "u", "e2p", "nats_per_token", 3.5)])
    assert audited_metrics(given) == ["auc", "nats_per_token"]
    assert per_example(given, "nats_per_token")["e2p"].to_list() == [3.5]
    with pytest.raises(DataError, match="no metric to judge by, only"):
        audited_metrics(likelihoods.filter(pl.col("metric").is_in(["tokens", "bytes"])))


def test_seeds_are_averaged_example_by_example() -> None:
    first = make_scores(seed=3)
    nll = pl.when(pl.col("metric") == "nll")
    seeds = [first.with_columns(value=nll.then(pl.col("value") + up).otherwise("value")) for up in (0.0, 1.0, 5.0)]
    seeds[1] = seeds[1].sample(fraction=1, shuffle=True, seed=0)
    one, together = per_example(first, "nll"), per_example(seeds, "nll")
    assert together["e2p"].to_list() == pytest.approx((one["e2p"] + 2).to_list())
    assert together["tokens"].equals(one["tokens"])
    assert per_example([first]).equals(per_example(first))
    # A corpus figure is of the mean sums; the sizes are the same in every seed.
    total, tokens = one["e2p"].sum() + 2 * one.height, one["tokens"].sum()
    assert summarise(seeds, 50)["e2p"]["nats_per_token"] == pytest.approx(total / tokens)


def test_seeds_of_which_one_lacks_something_are_refused() -> None:
    first = make_scores(seed=3)
    lone = pl.col("example_id") == first["example_id"][0]
    moved = first.with_columns(user_id=pl.when(lone).then(pl.lit("someone")).otherwise("user_id"))
    longer = pl.when(pl.col("metric") == "tokens").then(pl.col("value") + 1).otherwise("value")
    for other, message in (
        (first.filter(~lone), r"example 'x\d-\d' of user '\w+' has nll in some seeds only"),
        (moved, r"example 'x\d-\d' of user '\w+' has nll in some seeds only"),
        (first.filter(pl.col("arm") != "none"), "arm 'none' has nll in some seeds only; expected the same examples"),
        (first.filter(pl.col("metric") != "tokens"), "tokens is there in some seeds only"),
        (first.with_columns(value=longer), r"tokens of example 'x\d-\d' differs between seeds"),
    ):
        for seeds in ([first, other], [other, first]):
            with pytest.raises(DataError, match=message):
                per_example(seeds)
    with pytest.raises(DataError, match="nothing was evaluated"):
        per_example([])


@pytest.mark.parametrize("name", ["example_id", "user_id", "tokens"])
def test_an_arm_with_the_name_of_a_column_is_refused(name: str) -> None:
    scores = make_scores().with_columns(arm=pl.col("arm").replace("none", name))
    with pytest.raises(DataError, match=f"arm '{name}': expected another name than that of a column; rename the arm"):
        per_example(scores)


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
        (make_scores().filter(pl.col("metric") != "tokens"), r"arm 'none' has tokens for 0 of \d+ examples"),
        (make_scores().filter(pl.col("metric") != "nll"), "no nll; there is"),
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
