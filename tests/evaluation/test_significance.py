"""Every test against scipy or a formula written out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from e2p.errors import DataError, MissingExtraError
from e2p.evaluation import significance
from e2p.evaluation.significance import (
    COMPARISONS,
    Comparison,
    bootstrap_totals,
    cluster_bootstrap,
    cluster_totals,
    clustered_t,
    compare,
    holm,
    paired_t,
    percentile_interval,
    verdict,
)

values = st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(values, values), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_paired_t_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    if np.std(a - b) < 1e-3:
        return  # scipy warns and divides by zero there
    found, expected = paired_t(a, b), stats.ttest_rel(a, b)
    assert found.t == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.df == expected.df


@given(st.lists(st.tuples(values, st.integers(0, 5)), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_clustered_t_is_the_formula(rows: list[tuple[float, int]]) -> None:
    diff, clusters = [row[0] for row in rows], [row[1] for row in rows]
    mean = sum(diff) / len(diff)
    by_cluster: dict[int, float] = {}
    for value, cluster in rows:
        by_cluster[cluster] = by_cluster.get(cluster, 0.0) + value - mean
    groups = len(by_cluster)
    variance = groups / max(groups - 1, 1) * sum(u * u for u in by_cluster.values()) / len(diff) ** 2
    found = clustered_t(diff, [f"user {cluster}" for cluster in clusters])
    if groups < 2:
        assert found.p == 1
    elif variance > 1e-6:
        t = mean / math.sqrt(variance)
        assert found.t == pytest.approx(t)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(t), groups - 1))
        assert found.df == groups - 1


def test_clustered_t_of_equal_clusters_is_the_t_of_their_means() -> None:
    diff = np.random.default_rng(0).normal(0.2, 1, (12, 5))
    found = clustered_t(diff.ravel(), np.repeat(np.arange(12), 5))
    assert found.p == pytest.approx(stats.ttest_1samp(diff.mean(1), 0).pvalue)


def test_repeated_examples_fool_the_plain_t_only() -> None:
    diff = np.random.default_rng(1).normal(0.3, 1, 15)
    clusters = np.arange(15)
    many = np.repeat(diff, 20)
    assert paired_t(many, np.zeros(300)).p < paired_t(diff, np.zeros(15)).p / 10
    assert clustered_t(many, np.repeat(clusters, 20)).p == pytest.approx(clustered_t(diff, clusters).p)


def loop_holm(p: Sequence[float]) -> list[float]:
    """Holm by its words: the k-th smallest p times (m - k + 1), never less than the one before, at most 1."""
    adjusted = [0.0] * len(p)
    running = 0.0
    for k, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, (len(p) - k) * p[index])
        adjusted[index] = min(1.0, running)
    return adjusted


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm(p: list[float]) -> None:
    assert holm(p) == pytest.approx(loop_holm(p))


def test_totals_within_clusters() -> None:
    totals = cluster_totals(np.array([[1.0, 10], [2, 20], [4, 40]]), ["b", "a", "b"])
    assert totals.tolist() == [[2, 20], [5, 50]]


def test_bootstrap_is_the_mean_over_drawn_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = np.random.default_rng(0).normal(size=(7, 3))
    drawn = np.random.default_rng(5).integers(7, size=(50, 7))
    expected = [sum(totals[user] for user in row) for row in drawn]
    np.testing.assert_allclose(bootstrap_totals(totals, 50, seed=5), expected)
    monkeypatch.setattr(significance, "_CHUNK", 21)  # three resamples at once
    np.testing.assert_allclose(bootstrap_totals(totals, 50, seed=5), expected)


def test_bootstrap_agrees_with_normal_theory() -> None:
    diff = np.random.default_rng(2).normal(0.1, 1, 400)
    found = cluster_bootstrap(diff, np.arange(400), resamples=10_000, seed=1)
    error = diff.std(ddof=1) / 20
    assert found.mean == diff.mean()
    assert found.low == pytest.approx(diff.mean() - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(diff.mean() + 1.96 * error, abs=0.01)
    assert found.p == pytest.approx(stats.ttest_1samp(diff, 0).pvalue, abs=0.01)
    assert found == cluster_bootstrap(diff, np.arange(400), resamples=10_000, seed=1)


def test_bootstrap_is_scipys_where_every_user_has_one_example() -> None:
    """A skewed sample, so that the percentile interval is not the normal one."""
    diff = np.random.default_rng(11).exponential(1, 60) - 0.8
    found = cluster_bootstrap(diff, [f"u{i}" for i in range(60)], resamples=20_000, seed=2)
    rng = np.random.default_rng(3)
    expected = stats.bootstrap((diff,), np.mean, n_resamples=20_000, method="percentile", random_state=rng)
    low, high = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert high - diff.mean() > (diff.mean() - low) * 1.03
    centred = np.sort(expected.bootstrap_distribution)
    assert found.p == pytest.approx(2 * (np.searchsorted(centred, 0) + 1) / 20_001, abs=0.01)


def test_bootstrap_of_two_users_by_hand() -> None:
    """One user has one example of 4, the other three of 0, 1 and 2: a resample is aa, ab, ba or bb, equally likely.

    Their means over examples are 4, (4 + 3) / 4 twice, and 1; a quarter, a half and a quarter of all resamples."""
    totals = cluster_totals(np.array([[4.0, 1], [0, 1], [1, 1], [2, 1]]), ["a", "b", "b", "b"])
    resampled = bootstrap_totals(totals, 20_000, seed=5)
    means, counts = np.unique(resampled[:, 0] / resampled[:, 1], return_counts=True)
    assert means.tolist() == [1.0, 1.75, 4.0]
    expected = np.array([5000, 10_000, 5000])
    assert stats.chisquare(counts, expected).pvalue > 0.01
    assert percentile_interval(resampled[:, 0] / resampled[:, 1]) == (1.0, 4.0)
    # Shifted so that only bb is at or below zero: a quarter of the resamples, twice that is p.
    found = cluster_bootstrap([2.5, -1.5, -0.5, 0.5], ["a", "b", "b", "b"], 20_000, 5)
    assert (found.mean, found.low, found.high) == (0.25, -0.5, 2.5)
    assert found.p == pytest.approx(2 * (counts[0] + 1) / 20_001)


def test_interval_covers_in_95_of_100_clustered_samples() -> None:
    """60 users of unequal size, examples share half their variance; the plain interval covers far less."""
    rng = np.random.default_rng(7)
    trials, hits, plain_hits = 300, 0, 0
    for trial in range(trials):
        clusters = np.repeat(np.arange(60), rng.integers(1, 12, 60))
        diff = 0.3 + rng.normal(size=60)[clusters] + rng.normal(size=len(clusters))
        found = cluster_bootstrap(diff, clusters, resamples=1000, seed=trial)
        hits += found.low <= 0.3 <= found.high
        half = 1.96 * diff.std(ddof=1) / math.sqrt(len(diff))
        plain_hits += abs(diff.mean() - 0.3) <= half
    assert 0.90 <= hits / trials <= 0.98
    assert plain_hits / trials < 0.85


def test_clustered_t_keeps_its_level() -> None:
    rng = np.random.default_rng(8)
    rejected = 0
    for _ in range(600):
        clusters = np.repeat(np.arange(40), rng.integers(1, 10, 40))
        diff = rng.normal(size=40)[clusters] + rng.normal(size=len(clusters))
        rejected += clustered_t(diff, clusters).p < 0.05
    assert 0.02 <= rejected / 600 <= 0.09


def test_equal_arms_have_no_difference() -> None:
    ones = np.ones(10)
    assert paired_t(ones, ones) == (0.0, 9, 1.0)
    assert cluster_bootstrap(ones - ones, np.arange(10) % 3, 500) == (0.0, 0.0, 0.0, 1.0)


def test_a_constant_difference_is_certain() -> None:
    assert clustered_t(np.full(8, -0.5), np.arange(8) % 4).p == 0.0
    assert cluster_bootstrap(np.full(8, -0.5), np.arange(8) % 4, 999).p == 2 / 1000


def test_fewer_than_two_users_prove_nothing() -> None:
    assert clustered_t([], []).p == 1
    assert clustered_t([1.0, 2.0], ["u", "u"]).p == 1
    found = cluster_bootstrap([1.0, 2.0], ["u", "u"], 100)
    assert (found.mean, found.p) == (1.5, 1)
    assert math.isnan(found.low)


def wide_table(arms: dict[str, float], users: int = 30, each: int = 4, noise: float = 0.1) -> pl.DataFrame:
    """Scores in which an arm's mean is as given, for comparisons whose outcome is known."""
    rng = np.random.default_rng(4)
    n = users * each
    base = {
        "example_id": [f"x{i:04}" for i in range(n)],
        "user_id": [f"u{i % users}" for i in range(n)],
        "tokens": rng.integers(3, 40, n).astype(float),
    }
    level = rng.normal(0, 1, n)
    return pl.DataFrame(base | {arm: level + mean + rng.normal(0, noise, n) for arm, mean in arms.items()})


ALL = {
    "none": 4.0,
    "prompt": 3.6,
    "static": 3.4,
    "random": 3.4,
    "shuffled": 3.4,
    "null": 3.4,
    "e2p": 3.2,
    "e2p+prompt": 3.1,
}


def test_comparisons_equal_their_parts() -> None:
    wide = wide_table(ALL)
    found = compare(wide, resamples=2000, seed=3)
    assert [(c.name, c.arm, c.against) for c in found] == [entry for entry in COMPARISONS if entry[2] in ALL]
    assert [c.name for c in found[:5]] == [
        "true minus random",
        "true minus static",
        "true minus shuffled",
        "true minus none",
        "e2p+prompt minus prompt",
    ]
    assert [c.p_holm for c in found] == pytest.approx(loop_holm([c.p_clustered for c in found]))
    tokens, users = wide["tokens"].to_numpy(), wide["user_id"].to_numpy()
    for c in found:
        a, b = wide[c.arm].to_numpy(), wide[c.against].to_numpy()
        boot = cluster_bootstrap(a - b, users, 2000, 3)
        assert c.difference == pytest.approx((a - b).mean())
        # The corpus difference is that of the arms' nats per token, from sums.
        corpus = (a * tokens).sum() / tokens.sum() - (b * tokens).sum() / tokens.sum()
        assert c.corpus_difference == pytest.approx(corpus)
        assert c.ci == pytest.approx((boot.low, boot.high))
        assert c.p_bootstrap == pytest.approx(boot.p)
        assert c.p_ttest == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert c.p_clustered == pytest.approx(clustered_t(a - b, users).p)
        assert c.effect_size == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
        assert (c.examples, c.users, c.metric) == (120, 30, "nats_per_token")
        assert (c.by_seed, c.seed_std) == ((c.difference,), 0)


def test_where_higher_is_better_a_gain_is_positive() -> None:
    """The same scores upside down: signs turn, words and p do not."""
    wide = wide_table(ALL)
    upside_down = wide.with_columns(-pl.col(arm) for arm in ALL)
    lower = compare(wide, 500)
    higher = compare(upside_down, 500, metric="auc", better="higher")
    for one, other in zip(lower, higher, strict=True):
        assert other.difference == pytest.approx(-one.difference)
        assert other.corpus_difference == other.difference  # tokens weigh likelihoods alone
        assert (other.verdict, other.p_holm) == (one.verdict, pytest.approx(one.p_holm))
    assert {c.verdict for c in higher[:5]} == {"better"}
    assert higher[0].difference > 0
    assert verdict(higher) == verdict(lower)
    assert verdict(compare(upside_down, 500)) == "harmful: worse than no prefix"


def test_seeds_are_put_together_by_their_mean_and_their_spread_is_told() -> None:
    seeds = [wide_table(ALL | {"e2p": mean}) for mean in (3.3, 3.2, 3.0)]
    mean = seeds[0].with_columns((sum(one[arm] for one in seeds) / 3).alias(arm) for arm in ALL)
    found = compare(mean, 300, seeds=seeds)
    for c in found:
        alone = [(one[c.arm] - one[c.against]).mean() for one in seeds]
        assert c.by_seed == pytest.approx(alone)
        assert c.seed_std == pytest.approx(np.std(alone, ddof=1))
        assert c.difference == pytest.approx(np.mean(alone))
        assert c.p_clustered == pytest.approx(clustered_t(mean[c.arm] - mean[c.against], mean["user_id"]).p)


def test_seeds_that_disagree_are_said_in_the_verdict() -> None:
    seeds = [wide_table(ALL | {"e2p": mean}, noise=0.02) for mean in (3.43, 3.0)]
    mean = seeds[0].with_columns((sum(one[arm] for one in seeds) / 2).alias(arm) for arm in ALL)
    line = verdict(compare(mean, 300, seeds=seeds))
    assert line == (
        "personalised: better than a random user's vector and than one static token; "
        "the seeds disagree in sign on true minus random and true minus static"
    )


def test_a_leak_that_was_let_pass_stands_first() -> None:
    found = compare(wide_table(ALL), 100)
    assert verdict(found, ["test users in training"]) == (
        f"not valid: test users in training (allowed); otherwise {verdict(found)}"
    )


def test_an_arm_of_ones_own_is_compared_with() -> None:
    wide = wide_table({"none": 4.0, "e2p": 3.0, "adapter": 3.5})
    assert [(c.name, c.against) for c in compare(wide, 100)] == [
        ("true minus none", "none"),
        ("true minus adapter", "adapter"),
    ]


def test_survives_json() -> None:
    for c in compare(wide_table(ALL, users=1), 100) + compare(wide_table(ALL), 100):
        assert Comparison.from_dict(json.loads(json.dumps(dataclasses.asdict(c), allow_nan=False))) == c
    with pytest.raises(DataError, match="missing name, arm"):
        Comparison.from_dict({})


def test_only_arms_that_exist_are_compared() -> None:
    wide = wide_table({arm: ALL[arm] for arm in ("none", "random", "e2p")})
    assert [c.name for c in compare(wide, 100)] == ["true minus random", "true minus none"]
    assert compare(wide.drop("e2p"), 100) == []
    with pytest.raises(DataError, match="no examples"):
        compare(wide.clear(), 100)


def test_without_tokens_every_example_weighs_the_same() -> None:
    found = compare(wide_table(ALL).drop("tokens"), 100)[0]
    assert found.corpus_difference == pytest.approx(found.difference)


def test_equal_arms_and_single_users_bear_a_comparison() -> None:
    wide = wide_table({"e2p": 3.0}).with_columns(pl.col("e2p").alias("null"))
    (same,) = compare(wide, 200)
    assert (same.difference, same.ci, same.effect_size) == (0, (0, 0), 0)
    assert (same.p_ttest, same.p_clustered, same.p_bootstrap, same.p_holm) == (1, 1, 1, 1)
    assert same.verdict == "no difference"
    for single in (wide_table(ALL, users=1), wide_table(ALL, users=1, each=1)):
        found = compare(single, 200)
        assert {c.verdict for c in found} == {"too few users"}
        assert {c.ci for c in found} == {None}
        assert verdict(found) == "not judged: a test needs two users at least"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "personalised: better than a random user's vector and than one static token"),
        (
            {"none": 3.2},
            "personalised: better than a random user's vector and than one static token, but no better than no prefix",
        ),
        (
            {"random": 3.2},
            "conditioned but not personalised: better than no prefix, no better than a random user's vector",
        ),
        (
            {"random": 3.0, "static": 3.2},
            "conditioned but not personalised: better than no prefix, "
            "no better than a random user's vector or one static token",
        ),
        ({"random": 3.2, "none": 3.2}, "no effect: no better than a random user's vector or no prefix"),
        ({"none": 3.0}, "harmful: worse than no prefix"),
        ({"none": 3.0, "random": None, "static": None}, "harmful: worse than no prefix"),
        (
            {"none": None},
            "not judged: no control none; better than a random user's vector; better than one static token",
        ),
        ({"random": None, "none": None}, "not judged: no control random and none; better than one static token"),
        ({"random": None}, "not judged: no control random; better than one static token; better than no prefix"),
        (
            {"random": None, "static": None, "none": 3.2},
            "not judged: no control random and static; no better than no prefix",
        ),
        ({"e2p": None}, "not judged: the arm e2p or all of its controls are missing"),
    ],
)
def test_verdict(change: dict[str, float | None], line: str) -> None:
    arms = {arm: mean for arm, mean in (ALL | change).items() if mean is not None}
    # Arms with one mean are made equal, so that "no difference" does not hang on the draw.
    wide = wide_table(arms, noise=0.05)
    for arm, mean in arms.items():
        if "e2p" in arms and arm != "e2p" and mean == arms["e2p"]:
            wide = wide.with_columns(pl.col("e2p").alias(arm))
    assert verdict(compare(wide, 200)) == line


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtraError, match=r"e2p\[eval\]"):
        clustered_t([1.0, 2.0, 2.5], [0, 1, 2])
