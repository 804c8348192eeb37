"""Would this listener keep this playlist? A predictor learned from past playlists, and the affinity.

The paper measures generated playlists offline by a binary classifier that was trained on past recommendations, "given
the user's embedding, the original query text, and representations of the tracks in the generated playlist" (Appendix
A, "Engagement Predictor Details"). Such a number is worth what the classifier is worth, so it is judged first: on
users that it was not fitted on, beside one that sees the user's vector alone, and by its calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.evaluation.significance import percentile_interval

Array = NDArray[np.float64]
Features = NDArray[np.float32]
Kind = Literal["logistic", "boosting"]

BLOCKS = 4  # of D columns: user, query, mean of the tracks, user times mean
SCALARS = 6  # see features()
# What is chosen by folds of users: the inverse strength C of the penalty, or the number of trees.
GRID: dict[Kind, tuple[float, ...]] = {"logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "boosting": (30, 100)}
FOLDS = 3
BINS = 10


def features(user_vectors: ArrayLike, query_vectors: ArrayLike, item_vectors: Sequence[ArrayLike]) -> Features:
    """What the predictor sees of n playlists.

    Columns: the user's vector, the query's, the mean of the tracks', user times mean (each D); then mean, highest and
    lowest cosine of user and track, cosine of query and mean, cosine of user and query, dot product of user and mean.
    Neither the order of the tracks nor their number is seen: a list said twice has the same features. Zero vectors
    have cosine 0.

    Args:
        user_vectors: [n, D].
        query_vectors: [n, D], in the space of the items, such as the mean of those that answer the query.
        item_vectors: n arrays [m, D] of the tracks, m >= 1 and not always the same.

    Returns:
        float32 [n, 4 D + 6].

    Raises:
        DataError: a playlist without tracks, shapes that differ, or a number that is not finite; with the row.
    """
    users, queries = np.asarray(user_vectors, dtype=float), np.asarray(query_vectors, dtype=float)
    if users.ndim != 2 or queries.shape != users.shape or len(item_vectors) != len(users):
        raise DataError(
            f"features: expected users [n, D], queries [n, D] and n playlists, got {list(users.shape)}, "
            f"{list(queries.shape)} and {len(item_vectors)}; align them"
        )
    count, dim = users.shape
    lists = [np.asarray(tracks, dtype=float) for tracks in item_vectors]
    for row, tracks in enumerate(lists):
        if not len(tracks):
            raise DataError(f"features: row {row}: expected at least one track, got none; drop the row and count it")
        if tracks.shape != (len(tracks), dim):
            raise DataError(f"features: row {row}: expected tracks [m, {dim}], got {list(tracks.shape)}; use one space")
    if not count:
        return np.empty((0, BLOCKS * dim + SCALARS), np.float32)
    lengths = np.array([len(tracks) for tracks in lists])
    starts, tracks = np.cumsum(lengths) - lengths, np.concatenate(lists)
    owners = np.repeat(np.arange(count), lengths)
    means = np.add.reduceat(tracks, starts) / lengths[:, None]
    unit_users = _unit(users)
    cosines = (unit_users[owners] * _unit(tracks)).sum(1)
    scalars = (
        np.add.reduceat(cosines, starts) / lengths,
        np.maximum.reduceat(cosines, starts),
        np.minimum.reduceat(cosines, starts),
        (_unit(queries) * _unit(means)).sum(1),
        (unit_users * _unit(queries)).sum(1),
        (users * means).sum(1),
    )
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused below
        table = np.column_stack([users, queries, means, users * means, *scalars]).astype(np.float32)
    _require_finite(table)
    return table


@dataclass(frozen=True, eq=False)
class EngagementPredictor:
    """A binary classifier of playlists, and the same one on the user's vector alone.

    Who clicks much is found without looking at a playlist; the second one shows how much of the first is that.

    Args:
        kind: ``logistic``: standardised features, logistic regression; ``boosting``: boosted trees on histograms.
        dim: D.
        setting: C, or the number of trees, that folds of users chose.
        user_setting: that of the user's vector alone.
        model: scikit-learn's classifier.
        user_model: that of the user's vector alone.
    """

    kind: Kind
    dim: int
    setting: float
    user_setting: float
    model: Any
    user_model: Any

    @classmethod
    def fit(
        cls, features: Features, labels: ArrayLike, users: Sequence[str], kind: Kind = "logistic", seed: int = 42
    ) -> EngagementPredictor:
        """Learn from past playlists; the strength is chosen by the log loss on folds of users.

        Args:
            features: float32 [n, 4 D + 6] of :func:`features`.
            labels: [n], whether the user engaged.
            users: n user ids.
            kind: the classifier.
            seed: of the boosting; all else is deterministic.

        Raises:
            ConfigError: the kind is unknown.
            DataError: one class only, fewer than two users, lengths that differ, a number that is not finite.
            MissingExtraError: scikit-learn is not installed.
        """
        if kind not in GRID:
            raise ConfigError(f"kind: expected one of {', '.join(GRID)}, got {kind}; choose one")
        truth, names = _checked(features, labels, users)
        if len(np.unique(names)) < 2:
            raise DataError(f"engagement: expected at least two users, got {len(np.unique(names))}; add users")
        dim = _dim(features)
        setting, model = _fitted(features, truth, names, kind, seed)
        user_setting, user_model = _fitted(features[:, :dim], truth, names, kind, seed)
        return cls(kind, dim, setting, user_setting, model, user_model)

    def predict(self, features: Features) -> Array:
        """Probabilities [n] of engagement, of features [n, 4 D + 6]. Raises DataError for another width."""
        return _probabilities(self.model, self._own(features))

    def predict_user(self, features: Features) -> Array:
        """Probabilities [n] by the user's vector alone, of the same features."""
        return _probabilities(self.user_model, self._own(features)[:, : self.dim])

    def _own(self, features: Features) -> Features:
        width = BLOCKS * self.dim + SCALARS
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"engagement: expected features [n, {width}], got {list(features.shape)}; use one space")
        _require_finite(features)
        return features


def judge_predictor(
    predictor: EngagementPredictor,
    features: Features,
    labels: ArrayLike,
    users: Sequence[str],
    resamples: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """How good a predictor is on users that it was not fitted on.

    Args:
        predictor: fitted on other users.
        features: float32 [n, 4 D + 6].
        labels: [n], whether the user engaged.
        users: n user ids.
        resamples: bootstrap resamples of the users.
        seed: of the bootstrap.

    Returns:
        For JSON: ``auc``; ``auc_ci``: 95% interval, bootstrap over users, None with fewer than two; ``auc_user``: of
        the user's vector alone; ``share``: (auc_user - 0.5) / (auc - 0.5), the part of the skill that needs no
        playlist, None unless auc > 0.5; ``calibration``: ten bins of equally many examples by prediction, each with
        ``predicted`` and ``engaged`` (means) and ``count``; ``brier``: mean squared error of the probability;
        ``engaged``: share of the labels; ``examples``; ``users``.

    Raises:
        DataError: one class only, lengths that differ, or a number that is not finite.
    """
    truth, names = _checked(features, labels, users)
    own, alone = predictor.predict(features), predictor.predict_user(features)
    once, levels = np.ones(len(truth)), _levels(own)
    auc, auc_user = _auc(levels, truth, once), _auc(_levels(alone), truth, once)
    order = np.argsort(own, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return {
        "auc": auc,
        "auc_ci": _auc_interval(levels, truth, names, resamples, seed),
        "auc_user": auc_user,
        "share": (auc_user - 0.5) / (auc - 0.5) if auc > 0.5 else None,
        "calibration": [
            {"predicted": float(own[part].mean()), "engaged": float(truth[part].mean()), "count": len(part)}
            for part in bins
        ],
        "brier": float(np.square(own - truth).mean()),
        "engaged": float(truth.mean()),
        "examples": len(truth),
        "users": len(np.unique(names)),
    }


def affinity(user_vector: ArrayLike, item_vectors: ArrayLike) -> float:
    """Mean cosine of a user's vector [D] and those of tracks [m, D]; zero vectors count as 0, no tracks give 0.

    Raises:
        DataError: dimensions differ, or a number is not finite.
    """
    user, tracks = np.asarray(user_vector, dtype=float), np.asarray(item_vectors, dtype=float)
    if not len(tracks):
        return 0.0
    if user.ndim != 1 or tracks.shape != (len(tracks), len(user)):
        raise DataError(
            f"affinity: expected a user [D] and tracks [m, D], got {list(user.shape)} and {list(tracks.shape)}; "
            "use one space"
        )
    mean = float((_unit(tracks) @ _unit(user[None])[0]).mean())
    if not np.isfinite(mean):
        raise DataError("affinity: expected finite numbers, got NaN or infinity; mend the vectors")
    return mean


def agreement(engagement: Mapping[str, float], hit_rate: Mapping[str, float]) -> dict[str, Any]:
    """Do predicted engagement and hits order the arms alike? Over the arms that have both.

    Args:
        engagement: mean predicted engagement of each arm.
        hit_rate: share of its playlists with an item that the user played, or another measure of truth.

    Returns:
        ``spearman`` and ``kendall`` (tau-b), None with fewer than two arms or where one side is the same for all;
        ``arms``; ``pairs`` of arms; ``in_order``: pairs that both order alike; ``tied``: pairs that are equal on one
        side at least, in order or not being no question.

    Raises:
        DataError: a mean is not finite.
        MissingExtraError: scipy is not installed.
    """
    arms = [arm for arm in engagement if arm in hit_rate]
    values = np.array([[float(engagement[arm]), float(hit_rate[arm])] for arm in arms]).reshape(-1, 2)
    for arm, pair in zip(arms, values, strict=True):
        if not np.isfinite(pair).all():
            raise DataError(f"arm {arm}: expected finite means, got {pair.tolist()}; leave it out")
    first, second = np.triu_indices(len(arms), 1)
    signs = np.sign(values[first] - values[second]).prod(1)
    told = len(arms) > 1 and (np.ptp(values, axis=0) > 0).all()
    return {
        "spearman": _correlation("spearmanr", values) if told else None,
        "kendall": _correlation("kendalltau", values) if told else None,
        "arms": len(arms),
        "pairs": len(signs),
        "in_order": int((signs > 0).sum()),
        "tied": int((signs == 0).sum()),
    }


def _fitted(table: Features, truth: Array, users: NDArray[Any], kind: Kind, seed: int) -> tuple[float, Any]:
    """The setting with the lowest log loss on held-out users, and a model of it on all of them.

    Folds that would be fitted on one class are left out; if all are, the grid's middle is taken.
    """
    try:
        from sklearn.model_selection import GroupKFold
    except ImportError:
        raise MissingExtraError("scikit-learn", "eval", "an engagement predictor") from None
    make = _maker(kind, seed)
    folds = GroupKFold(min(FOLDS, len(np.unique(users)))).split(table, truth, users)
    usable = [(fit, held) for fit, held in folds if len(np.unique(truth[fit])) == 2]
    grid = GRID[kind]
    losses = []
    for setting in grid if usable else ():
        loss = 0.0
        for fit, held in usable:
            found = np.clip(_probabilities(make(setting).fit(table[fit], truth[fit]), table[held]), 1e-7, 1 - 1e-7)
            loss -= float(np.log(np.where(truth[held] > 0, found, 1 - found)).sum())
        losses.append(loss)
    best = grid[int(np.argmin(losses))] if losses else grid[len(grid) // 2]
    return best, make(best).fit(table, truth)


def _maker(kind: Kind, seed: int) -> Callable[[float], Any]:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def logistic(setting: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=setting, max_iter=2000))

    def boosting(setting: float) -> Any:
        # Its own early stopping would hold out examples, not users.
        return HistGradientBoostingClassifier(max_iter=int(setting), early_stopping=False, random_state=seed)

    return logistic if kind == "logistic" else boosting


def _probabilities(model: Any, table: Features) -> Array:
    return np.asarray(model.predict_proba(table)[:, 1], dtype=float) if len(table) else np.empty(0)


def _auc(levels: NDArray[np.int64], truth: Array, times: Array) -> float:
    """Probability that an engaged example stands above another one, ties counting half; NaN with one class.

    Args:
        levels: [n] ranks of the scores from 0, equal scores having one.
        truth: [n], 0 or 1.
        times: [n], how often each example counts.
    """
    ups, downs = np.bincount(levels, times * truth), np.bincount(levels, times * (1 - truth))
    pairs = ups.sum() * downs.sum()
    return float((ups * (np.cumsum(downs) - downs / 2)).sum() / pairs) if pairs else float("nan")


def _auc_interval(
    levels: NDArray[np.int64], truth: Array, users: NDArray[Any], resamples: int, seed: int
) -> list[float] | None:
    """95% percentile interval over users drawn with replacement; draws of one class are left out."""
    names, owner = np.unique(users, return_inverse=True)
    if len(names) < 2:
        return None
    random = np.random.default_rng(seed)
    found = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names)).astype(float)
        found[index] = _auc(levels, truth, times[owner])
    kept = found[~np.isnan(found)]
    return list(percentile_interval(kept)) if len(kept) else None


def _levels(scores: Array) -> NDArray[np.int64]:
    return np.unique(scores, return_inverse=True)[1].astype(np.int64)


def _checked(table: Features, labels: ArrayLike, users: Sequence[str]) -> tuple[Array, NDArray[Any]]:
    truth, names = np.asarray(labels, dtype=float), np.asarray(users)
    if table.ndim != 2 or truth.shape != (len(table),) or names.shape != (len(table),):
        raise DataError(
            f"engagement: expected features [n, F], n labels and n users, got {list(table.shape)}, {len(truth)} and "
            f"{len(names)}; align them"
        )
    wrong = np.flatnonzero(~np.isin(truth, (0, 1)))
    if len(wrong):
        raise DataError(f"engagement: row {wrong[0]}: expected a label 0 or 1, got {truth[wrong[0]]}; mend it")
    if len(np.unique(truth)) < 2:
        got = f"{len(truth)} of one class" if len(truth) else "none"
        raise DataError(f"engagement: expected engaged and other examples, got {got}; add examples of the other")
    _require_finite(table)
    return truth, names


def _dim(table: Features) -> int:
    dim, rest = divmod(table.shape[1] - SCALARS, BLOCKS)
    if rest or dim < 1:
        raise DataError(f"engagement: expected 4 D + 6 columns, got {table.shape[1]}; make them with features()")
    return dim


def _require_finite(table: Features) -> None:
    bad = np.flatnonzero(~np.isfinite(table).all(1))
    if len(bad):
        raise DataError(f"engagement: row {bad[0]}: expected finite numbers, got NaN or infinity; mend the vectors")


def _correlation(name: str, values: Array) -> float:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "eval", "an agreement of measures") from None
    return float(getattr(stats, name)(values[:, 0], values[:, 1]).statistic)


def _unit(rows: Array) -> Array:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
