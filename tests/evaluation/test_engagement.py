"""The engagement predictor in a world whose tastes are known, its judge against scikit-learn, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.evaluation import engagement
from e2p.evaluation.engagement import EngagementPredictor, affinity, agreement, features, judge_predictor

DIM, EACH = 6, 12


class World(NamedTuple):
    tastes: np.ndarray  # [users, D]
    items: np.ndarray  # [N, D]
    features: np.ndarray
    labels: np.ndarray
    users: np.ndarray


def world(seed: int, users: int = 80, sharpness: float = 8.0, balanced: bool = False) -> World:
    """Users engage with what is near to their taste; ``balanced``: with the better half of each one's playlists."""
    random = np.random.default_rng(seed)
    tastes, items = random.normal(size=(users, DIM)), np.random.default_rng(99).normal(size=(300, DIM))
    owner = np.repeat(np.arange(users), EACH)
    lists = [items[random.integers(300, size=random.integers(1, 8))] for _ in owner]
    queries = np.stack([tracks.mean(0) for tracks in lists]) + random.normal(size=(len(owner), DIM))
    liking = np.array([affinity(tastes[user], tracks) for user, tracks in zip(owner, lists, strict=True)])
    if balanced:
        liking += random.normal(size=len(liking)) / sharpness
        labels = liking > np.median(liking.reshape(users, EACH), axis=1)[owner]
    else:
        labels = random.random(len(owner)) < 1 / (1 + np.exp(-sharpness * liking))
    names = np.array([f"u{seed}-{user}" for user in owner])
    return World(tastes, items, features(tastes[owner], queries, lists), labels, names)


@pytest.fixture(scope="module")
def old() -> World:
    return world(1)


@pytest.fixture(scope="module")
def new() -> World:
    return world(2)


@pytest.fixture(scope="module", params=["logistic", "boosting"])
def predictor(request: pytest.FixtureRequest, old: World) -> EngagementPredictor:
    return EngagementPredictor.fit(old.features, old.labels, old.users.tolist(), request.param)


def judged(fitted: EngagementPredictor, on: World, resamples: int = 200) -> dict[str, Any]:
    return judge_predictor(fitted, on.features, on.labels, on.users.tolist(), resamples)


def test_the_features_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    users, queries = random.normal(size=(5, DIM)), random.normal(size=(5, DIM))
    lists = [random.normal(size=(size, DIM)) for size in (1, 3, 2, 7, 1)]
    table = features(users, queries, lists)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    for row, user, query, tracks in zip(table, users, queries, lists, strict=True):
        mean, near = sum(tracks) / len(tracks), [cosine(user, track) for track in tracks]
        scalars = [sum(near) / len(near), max(near), min(near), cosine(query, mean), cosine(user, query), user @ mean]
        assert row == pytest.approx(np.concatenate([user, query, mean, user * mean, scalars]), abs=1e-5)
    assert table.dtype == np.float32
    assert table.shape == (5, 4 * DIM + 6)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 4))
@settings(max_examples=30)
def test_neither_order_nor_number_of_tracks_is_seen(seed: int, count: int, times: int) -> None:
    random = np.random.default_rng(seed)
    user, query, tracks = (random.normal(size=(size, 3)) for size in (1, 1, count))
    once = features(user, query, [tracks])
    assert features(user, query, [np.tile(tracks, (times, 1))]) == pytest.approx(once, abs=1e-6)
    assert features(user, query, [random.permutation(tracks)]) == pytest.approx(once, abs=1e-6)


def test_zero_vectors_are_no_nan() -> None:
    assert (features(np.zeros((1, 2)), np.zeros((1, 2)), [np.zeros((3, 2))]) == 0).all()
    assert features(np.empty((0, 2)), np.empty((0, 2)), []).shape == (0, 14)


def test_a_longer_list_is_not_rated_for_its_length(predictor: EngagementPredictor, new: World) -> None:
    tracks = [new.items[row : row + 2] for row in range(80)]
    queries = np.stack([two.mean(0) for two in tracks])
    once = predictor.predict(features(new.tastes, queries, tracks))
    more = predictor.predict(features(new.tastes, queries, [np.tile(two, (4, 1)) for two in tracks]))
    assert more == pytest.approx(once, abs=1e-3 if predictor.kind == "logistic" else 0.1)


def test_new_users_are_predicted(predictor: EngagementPredictor, new: World) -> None:
    found = judged(predictor, new)
    assert found["auc"] > 0.68
    assert found["auc_ci"][0] > 0.6
    assert 0.4 < found["auc_user"] < 0.6
    assert abs(found["share"]) < 0.5
    assert found["brier"] < found["engaged"] * (1 - found["engaged"])  # better than always the mean
    assert (found["examples"], found["users"]) == (80 * EACH, 80)
    assert json.loads(json.dumps(found)) == found


def test_shuffled_labels_teach_nothing(old: World, new: World) -> None:
    """One draw may fall on either side, for liking is one direction among few; their mean may not."""
    random, found = np.random.default_rng(0), []
    for _ in range(8):
        fitted = EngagementPredictor.fit(old.features, random.permutation(old.labels), old.users.tolist())
        found.append(judged(fitted, new, 2)["auc"])
        assert fitted.predict(new.features).std() < 0.03
    assert np.mean(found) == pytest.approx(0.5, abs=0.1)


def test_shuffled_truth_is_not_predicted(predictor: EngagementPredictor, new: World) -> None:
    shuffled = new._replace(labels=np.random.default_rng(0).permutation(new.labels))
    low, high = judged(predictor, shuffled)["auc_ci"]
    assert low < 0.5 < high


def test_where_every_user_engages_half_the_time_the_vector_alone_tells_nothing() -> None:
    before, after = world(3, balanced=True), world(4, balanced=True)
    fitted = EngagementPredictor.fit(before.features, before.labels, before.users.tolist())
    found = judged(fitted, after)
    assert found["auc"] > 0.7
    assert found["auc_user"] == pytest.approx(0.5, abs=0.02)
    assert found["share"] == pytest.approx(0, abs=0.1)


def test_where_only_the_user_matters_the_share_is_one(old: World, new: World) -> None:
    def eager(one: World) -> np.ndarray:
        return one.features[:, 0] + np.random.default_rng(5).normal(size=len(one.labels)) > 0

    fitted = EngagementPredictor.fit(old.features, eager(old), old.users.tolist())
    found = judged(fitted, new._replace(labels=eager(new)))
    assert found["auc_user"] > 0.7
    assert found["share"] == pytest.approx(1, abs=0.1)


def test_the_users_nearest_items_are_predicted_to_engage_more(predictor: EngagementPredictor, new: World) -> None:
    random = np.random.default_rng(3)
    order = np.argsort(-new.tastes @ new.items.T, axis=1)
    queries = np.zeros_like(new.tastes)
    lists = [order[:, :5], random.integers(300, size=(80, 5)), order[:, -5:]]
    best, any_five, worst = (
        predictor.predict(features(new.tastes, queries, list(new.items[rows]))).mean() for rows in lists
    )
    assert best > any_five + 0.1 > worst + 0.2


def test_the_judge_agrees_with_scikit_learn(predictor: EngagementPredictor, new: World) -> None:
    found, scores = judged(predictor, new), predictor.predict(new.features)
    assert found["auc"] == pytest.approx(roc_auc_score(new.labels, scores))
    assert found["auc_user"] == pytest.approx(roc_auc_score(new.labels, predictor.predict_user(new.features)))
    assert found["brier"] == pytest.approx(brier_score_loss(new.labels, scores))
    assert found["auc_ci"][0] < found["auc"] < found["auc_ci"][1]
    bins = found["calibration"]
    assert [one["count"] for one in bins] == [80 * EACH // 10] * 10
    assert sum(one["count"] * one["engaged"] for one in bins) == pytest.approx(new.labels.sum())
    assert sum(one["count"] * one["predicted"] for one in bins) == pytest.approx(scores.sum())
    assert [one["predicted"] for one in bins] == sorted(one["predicted"] for one in bins)
    if predictor.kind == "logistic":  # trees give equal scores, which quantiles do not part
        engaged, predicted = calibration_curve(new.labels, scores, n_bins=10, strategy="quantile")
        assert [one["predicted"] for one in bins] == pytest.approx(predicted)
        assert [one["engaged"] for one in bins] == pytest.approx(engaged)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30))
def test_the_area_counts_ties_and_repeats_as_scikit_learn_does(rows: list[tuple[int, bool, int]]) -> None:
    scores, truth, times = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = engagement._auc(engagement._levels(scores), truth, times)
    if (times * truth).sum() and (times * (1 - truth)).sum():
        assert found == pytest.approx(roc_auc_score(truth, scores, sample_weight=times))
    else:
        assert np.isnan(found)


def test_the_interval_is_that_of_a_loop_over_users_and_wider_than_over_examples(new: World) -> None:
    random = np.random.default_rng(0)
    # Users differ and each has one label: what counts is the number of users, not that of their examples.
    users = np.repeat(np.arange(30), 20)
    truth = np.repeat(np.arange(30) % 2, 20).astype(float)
    scores = truth + np.repeat(random.normal(size=30), 20) * 1.5
    low, high = engagement._auc_interval(engagement._levels(scores), truth, users, 100, 7) or [0, 0]
    draws = np.random.default_rng(7)
    loop = []
    for _ in range(100):
        rows = np.concatenate([np.flatnonzero(users == user) for user in draws.integers(30, size=30)])
        loop.append(roc_auc_score(truth[rows], scores[rows]))
    assert (low, high) == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])))
    apart = engagement._auc_interval(engagement._levels(scores), truth, np.arange(600), 100, 7) or [0, 0]
    assert high - low > 2 * (apart[1] - apart[0])
    assert engagement._auc_interval(engagement._levels(scores), truth, np.zeros(600), 100, 7) is None


def test_a_predictor_worse_than_chance_has_no_share(predictor: EngagementPredictor, new: World) -> None:
    assert judged(predictor, new._replace(labels=~new.labels))["share"] is None


def test_the_same_seed_gives_the_same_numbers() -> None:
    few, others = world(6, users=10), world(7, users=10)
    for kind in ("logistic", "boosting"):
        first, second = (
            judged(EngagementPredictor.fit(few.features, few.labels, few.users.tolist(), kind), others)
            for _ in range(2)
        )
        assert first == second


def test_folds_never_share_a_user(old: World) -> None:
    """A feature that names the user is worth nothing in folds of users: the strongest penalty wins."""
    random = np.random.default_rng(0)
    owner = np.unique(old.users, return_inverse=True)[1]
    table = random.normal(size=(80, 4 * 40 + 6)).astype(np.float32)[owner]
    labels = (random.random(80) < 0.5)[owner] ^ (random.random(len(owner)) < 0.1)
    fitted = EngagementPredictor.fit(table, labels, old.users.tolist())
    assert fitted.setting == engagement.GRID["logistic"][0]


def test_users_of_one_class_each_can_be_learned_from() -> None:
    table = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    fitted = EngagementPredictor.fit(table, [True] * 10 + [False] * 10, ["a"] * 10 + ["b"] * 10)
    assert fitted.setting == 1e-2  # no fold to choose by
    assert fitted.predict(table[:0]).shape == (0,)


def fit(table: np.ndarray, labels: list[Any], users: list[str]) -> EngagementPredictor:
    return EngagementPredictor.fit(table, labels, users)


T = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
Y, U = [0, 1, 0, 1], ["a", "a", "b", "b"]
GOOD = EngagementPredictor("logistic", 1, 1.0, 1.0, None, None)
BAD = T.copy()
BAD[2, 3] = np.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(T, [1, 1, 1, 1], U), "expected engaged and other examples, got 4 of one class"),
        (lambda: fit(T[:0], [], []), "got none"),
        (lambda: fit(T, Y, ["a"] * 4), "at least two users, got 1"),
        (lambda: fit(T, Y[:3], U), r"got \[4, 10\], 3 and 4"),
        (lambda: fit(T, Y, U[:3]), r"got \[4, 10\], 4 and 3"),
        (lambda: fit(T, [0, 1, 0.5, 1], U), "row 2: expected a label 0 or 1, got 0.5"),
        (lambda: fit(T, [0, 1, np.nan, 1], U), "row 2: expected a label 0 or 1, got nan"),
        (lambda: fit(T[:, :9], Y, U), r"4 D \+ 6 columns, got 9"),
        (lambda: fit(T[:, :6], Y, U), r"4 D \+ 6 columns, got 6"),
        (lambda: fit(BAD, Y, U), "row 2: expected finite"),
        (lambda: GOOD.predict(BAD), "row 2: expected finite"),
        (lambda: GOOD.predict(T[:, :6]), r"features \[n, 10\], got \[4, 6\]"),
        (lambda: judge_predictor(GOOD, T, [0, 0, 0, 0], U), "of one class"),
        (lambda: features(T, T, [T, T, T[:0], T]), "row 2: expected at least one track, got none"),
        (lambda: features(T, T, [T, T[:, :3], T, T]), r"row 1: expected tracks \[m, 10\], got \[4, 3\]"),
        (lambda: features(T, T, [T]), "and 1; align"),
        (lambda: features(T, T[:, :2], [T] * 4), r"\[4, 2\]"),
        (lambda: features(T, BAD, [T] * 4), "row 2: expected finite"),
        (lambda: affinity(T[0], T[:, :3]), r"got \[10\] and \[4, 3\]"),
        (lambda: affinity(T[2], BAD), "finite"),
        (lambda: agreement({"a": float("nan"), "b": 1}, {"a": 1, "b": 2}), "arm a: expected finite"),
    ],
)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="logistic, boosting, got forest"):
        EngagementPredictor.fit(T, Y, U, "forest")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*e2p\[eval\]"):
        fit(T, Y, U)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*e2p\[eval\]"):
        agreement({"a": 1, "b": 2}, {"a": 1, "b": 2})


def test_affinity_is_the_mean_cosine() -> None:
    assert affinity([2, 0], [[3, 0], [0, 1]]) == pytest.approx(0.5)
    assert affinity([1, 0], [[-1e-30, 0]]) == pytest.approx(-1)
    assert affinity([2, 0], [[3, 0], [0, 0]]) == pytest.approx(0.5)
    assert affinity([0, 0], [[3, 0]]) == 0
    assert affinity([1, 0], []) == affinity([1, 0], np.empty((0, 2))) == 0


NUMBERS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=7)


@given(NUMBERS)
def test_agreement_is_that_of_scipy_and_a_loop(pairs: list[tuple[int, int]]) -> None:
    first = {f"arm{number}": a / 4 for number, (a, _) in enumerate(pairs)}
    second = {f"arm{number}": b / 4 for number, (_, b) in enumerate(pairs)}
    found = agreement({**first, "only here": 9}, {"only there": 9, **second})
    apart = [(a - c) * (b - d) for i, (a, b) in enumerate(pairs) for c, d in pairs[:i]]
    assert (found["arms"], found["pairs"]) == (len(pairs), len(apart))
    assert found["in_order"] == sum(one > 0 for one in apart)
    assert found["tied"] == sum(one == 0 for one in apart)
    if len(pairs) < 2 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        assert found["spearman"] is None is found["kendall"]
    else:
        a, b = zip(*pairs, strict=True)
        assert found["spearman"] == pytest.approx(spearmanr(a, b).statistic)
        assert found["kendall"] == pytest.approx(kendalltau(a, b).statistic)


def test_arms_in_one_order_agree() -> None:
    rates = {"none": 0.1, "prompt": 0.3, "e2p": 0.5}
    found = agreement({arm: value / 2 + 0.2 for arm, value in rates.items()}, rates)
    assert found == {"spearman": 1, "kendall": pytest.approx(1), "arms": 3, "pairs": 3, "in_order": 3, "tied": 0}
