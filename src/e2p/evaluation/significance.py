"""Is a difference between two arms real? Paired tests on per-example scores, clustered by user.

The paper tests with a paired t over examples (Appendix E). Examples of one user are not independent, so that
test is too sure of itself. It is reported for comparison; the verdict rests on a test whose unit is the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from e2p.config_evaluation import ARMS
from e2p.errors import DataError, MissingExtraError

Array = NDArray[np.float64]
Direction = Literal["lower", "higher"]

ALPHA = 0.05
# The first five are the headlines: whether the user's own vector did it, then what it adds to nothing and to a text
# profile. The rest explain.
COMPARISONS = (
    ("true minus random", "e2p", "random"),
    ("true minus static", "e2p", "static"),
    ("true minus shuffled", "e2p", "shuffled"),
    ("true minus none", "e2p", "none"),
    ("e2p+prompt minus prompt", "e2p+prompt", "prompt"),
    ("true minus rerank", "e2p", "rerank"),
    ("true minus retrieval", "e2p", "retrieval"),
    ("true minus null", "e2p", "null"),
    ("true minus prompt", "e2p", "prompt"),
    ("static minus none", "static", "none"),
    ("prompt minus none", "prompt", "none"),
)
# The controls that the verdict needs, in words.
CONTROLS = {"random": "a random user's vector", "static": "one static token", "none": "no prefix"}
RULE = (
    "The verdict rests on three comparisons: the user's own vector (arm e2p) with a random user's vector, with one "
    "static token, and with no prefix. In each, an example's difference is averaged over the training seeds and "
    "tested with the user as the unit (t-test with user-clustered standard errors, Holm's correction over all "
    "comparisons of the first metric). Better and worse mean a corrected p below 0.05. "
    "Harmful: worse than no prefix. "
    "Personalised: not harmful, better than a random user's vector and better than one static token. "
    "Conditioned but not personalised: better than no prefix, but not better than both of these. "
    "No effect: neither harmful nor better than both of these nor better than no prefix. "
    "Not judged: fewer than two users; or not harmful, and one of the arms e2p, random, static and none is missing. "
    "Not valid: a leak check fired, and the audit was told to go on."
)
_CHUNK = 2_000_000  # user draws held at once in the bootstrap: 16 MB


class TTest(NamedTuple):
    """A two-sided t-test of a mean against zero."""

    t: float
    df: int
    p: float


class Bootstrap(NamedTuple):
    """A mean, its 95% percentile interval, and the two-sided p at which that interval just touches zero."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """One arm against another on the same examples. Where lower is better, a negative difference is a gain.

    Args:
        name: such as ``true minus random``; ``true`` is the arm ``e2p``.
        arm: the arm in question.
        against: its control.
        metric: what is compared, per example.
        difference: mean over examples of the per-example difference, itself a mean over the training seeds.
        corpus_difference: of nats per token, the same weighted by tokens: difference of the arms' corpus nats per
            token, so that exp of it is the ratio of their perplexities. Of other metrics, the difference.
        ci: 95% interval of ``difference``, bootstrap over users; None with fewer than two users.
        p_ttest: the paper's test, a paired two-sided t over examples (ignores that users repeat).
        p_clustered: t with a user-clustered (CR1) standard error and users - 1 degrees of freedom.
        p_bootstrap: two-sided p of the bootstrap over users; not below 2 / (resamples + 1).
        effect_size: Cohen's d_z, mean difference / its standard deviation over examples; 0 without variance.
        examples: number of pairs.
        users: number of clusters.
        p_holm: ``p_clustered`` adjusted by Holm for all comparisons of the metric.
        verdict: ``better``, ``worse`` (at ``p_holm`` < 0.05), ``no difference``, or ``too few users``.
        by_seed: mean difference of each training seed.
        seed_std: standard deviation of ``by_seed`` (n - 1); 0 for one seed.
    """

    name: str
    arm: str
    against: str
    metric: str
    difference: float
    corpus_difference: float
    ci: tuple[float, float] | None
    p_ttest: float
    p_clustered: float
    p_bootstrap: float
    effect_size: float
    examples: int
    users: int
    p_holm: float
    verdict: str
    by_seed: tuple[float, ...] = ()
    seed_std: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Read back what ``dataclasses.asdict`` and JSON made of it. Raises DataError for a missing key."""
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise DataError(f"comparison: missing {', '.join(missing)}")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known["ci"] = None if known["ci"] is None else tuple(known["ci"])
        return cls(**known | {"by_seed": tuple(known.get("by_seed") or ())})


def compare(
    wide: pl.DataFrame,
    resamples: int = 10_000,
    seed: int = 42,
    metric: str = "nats_per_token",
    better: Direction = "lower",
    seeds: Sequence[pl.DataFrame] = (),
) -> list[Comparison]:
    """All of :data:`COMPARISONS` for which both arms exist, in that order, then e2p against arms not known here.

    Args:
        wide: of :func:`e2p.evaluation.metrics.per_example`: ``user_id``, one column per arm, ``tokens`` if there are.
            With several training seeds, their mean.
        resamples: bootstrap resamples of the users, the same ones for every comparison.
        seed: seed of the resamples.
        metric: name of what ``wide`` holds.
        better: whether lower or higher values of it are better.
        seeds: the same table of each training seed, for the spread over seeds; none: ``wide`` is the only one.
    """
    if wide.is_empty():
        raise DataError("comparisons: no examples")
    arms = [name for name in wide.columns if name not in ("example_id", "user_id", "tokens")]
    others = [(f"true minus {arm}", "e2p", arm) for arm in arms if arm not in ARMS]
    present = [entry for entry in (*COMPARISONS, *others) if entry[1] in arms and entry[2] in arms]
    if not present:
        return []
    clusters = wide["user_id"].to_numpy()
    users = wide["user_id"].n_unique()
    weighted = metric == "nats_per_token" and "tokens" in wide.columns
    weights = wide["tokens"].to_numpy().astype(float) if weighted else np.ones(wide.height)
    values = {arm: wide[arm].to_numpy().astype(float) for _, *pair in present for arm in pair}
    differences = np.column_stack([values[arm] - values[against] for _, arm, against in present])
    resampled = _resampled_means(differences, clusters, resamples, seed)
    clustered = [clustered_t(column, clusters).p for column in differences.T]

    found = []
    for index, ((name, arm, against), p_holm) in enumerate(zip(present, holm(clustered), strict=True)):
        difference = differences[:, index]
        mean = float(difference.mean())
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        by_seed = [float((one[arm] - one[against]).to_numpy().mean()) for one in seeds or (wide,)]
        found.append(
            Comparison(
                name=name,
                arm=arm,
                against=against,
                metric=metric,
                difference=mean,
                corpus_difference=float(np.average(difference, weights=weights)),
                ci=percentile_interval(resampled[:, index]) if users > 1 else None,
                p_ttest=paired_t(values[arm], values[against]).p,
                p_clustered=clustered[index],
                p_bootstrap=_bootstrap_p(resampled[:, index]) if users > 1 else 1.0,
                effect_size=mean / spread if spread > 0 else 0.0,
                examples=wide.height,
                users=users,
                p_holm=p_holm,
                verdict=_word(mean if better == "lower" else -mean, p_holm, users),
                by_seed=tuple(by_seed),
                seed_std=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0,
            )
        )
    return found


def verdict(comparisons: Sequence[Comparison], fired: Sequence[str] = ()) -> str:
    """One plain line, by :data:`RULE`: did the user's vector matter?

    Args:
        comparisons: of :func:`compare`.
        fired: names of the leak checks that fired.
    """
    decisive = {c.against: c for c in comparisons if c.arm == "e2p" and c.against in CONTROLS}
    line = _judged({c.against: c.verdict for c in comparisons if c.arm == "e2p"})
    torn = [c.name for c in decisive.values() if c.by_seed and min(c.by_seed) < 0 < max(c.by_seed)]
    if torn:
        line += f"; the seeds disagree in sign on {' and '.join(torn)}"
    return f"not valid: {' and '.join(fired)} (allowed); otherwise {line}" if fired else line


def _judged(words: Mapping[str, str]) -> str:
    """The verdict from the word on every control."""
    if not words:
        return "not judged: the arm e2p or all of its controls are missing"
    if "too few users" in words.values():
        return "not judged: a test needs two users at least"
    if words.get("none") == "worse":
        return "harmful: worse than no prefix"
    missing = [arm for arm in CONTROLS if arm not in words]
    if missing:
        seen = [
            f"{'' if words[arm] == 'better' else 'no '}better than {CONTROLS[arm]}" for arm in CONTROLS if arm in words
        ]
        return "; ".join([f"not judged: no control {' and '.join(missing)}", *seen])
    lost = " or ".join(CONTROLS[arm] for arm in ("random", "static") if words[arm] != "better")
    if not lost:
        doubt = "" if words["none"] == "better" else ", but no better than no prefix"
        return f"personalised: better than a random user's vector and than one static token{doubt}"
    if words["none"] == "better":
        return f"conditioned but not personalised: better than no prefix, no better than {lost}"
    return f"no effect: no better than {lost} or no prefix"


def require_tests(users: Sequence[str] | NDArray[Any], part: str = "test") -> None:
    """Make sure, before long work, that differences between these users can be tested.

    Raises:
        DataError: fewer than two users.
        MissingExtraError: scipy is not installed.
    """
    found = len(np.unique(np.asarray(users)))
    if found < 2:
        raise DataError(f"the {part} part: expected at least two users, got {found}; change data.split or add users")
    _student_cdf(0.0, 1)


def paired_t(a: ArrayLike, b: ArrayLike) -> TTest:
    """Paired two-sided t-test of a - b (paper, Appendix E); scipy's ``ttest_rel`` that bears equal arms."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return clustered_t(difference, np.arange(len(difference)))


def clustered_t(diff: ArrayLike, clusters: ArrayLike) -> TTest:
    """Two-sided t-test of mean(diff) = 0 with a cluster-robust standard error.

    CR1 sandwich (Liang and Zeger 1986; Cameron and Miller 2015, Section II) of a regression on a constant:
    with G clusters, N values and u_g the sum of cluster g's residuals,
    var = G / (G - 1) * sum(u_g ** 2) / N ** 2, and G - 1 degrees of freedom.
    If every cluster has one value, this is the ordinary t-test.

    Args:
        diff: [N] differences.
        clusters: [N] cluster of each, any labels.

    Returns:
        p = 1 for fewer than two clusters and for differences that are all zero.
    """
    values = np.asarray(diff, dtype=float)
    mean = float(values.mean()) if len(values) else 0.0
    residuals = cluster_totals((values - mean)[:, None], clusters)[:, 0]
    groups = len(residuals)
    if groups < 2 or not values.any():
        return TTest(0.0, max(groups - 1, 0), 1.0)
    error = float(np.sqrt(groups / (groups - 1) * np.square(residuals).sum())) / len(values)
    if error == 0:
        return TTest(float(np.copysign(np.inf, mean)), groups - 1, 0.0) if mean else TTest(0.0, groups - 1, 1.0)
    t = mean / error
    return TTest(t, groups - 1, 2 * _student_cdf(-abs(t), groups - 1))


def cluster_bootstrap(diff: ArrayLike, clusters: ArrayLike, resamples: int = 10_000, seed: int = 42) -> Bootstrap:
    """Percentile bootstrap of mean(diff) that draws whole clusters, with replacement.

    Args:
        diff: [N] differences.
        clusters: [N] cluster of each, any labels.
        resamples: number of resamples.
        seed: the same seed draws the same clusters.

    Returns:
        mean, low, high, p; with fewer than two clusters low and high are NaN and p is 1.
    """
    values = np.asarray(diff, dtype=float)
    mean = float(values.mean())
    if len(np.unique(np.asarray(clusters))) < 2:
        return Bootstrap(mean, float("nan"), float("nan"), 1.0)
    resampled = _resampled_means(values[:, None], clusters, resamples, seed)[:, 0]
    return Bootstrap(mean, *percentile_interval(resampled), _bootstrap_p(resampled))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979), in the order given."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def cluster_totals(values: Array, clusters: ArrayLike) -> Array:
    """Sums of the rows [N, M] within each cluster: [clusters, M], clusters in sorted order."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = [np.bincount(index, weights=column, minlength=len(names)) for column in values.T]
    return np.column_stack(sums)


def bootstrap_totals(totals: Array, resamples: int, seed: int) -> Array:
    """Column totals [resamples, M] of clusters drawn with replacement from [clusters, M].

    Any ratio of such totals (a mean, a perplexity) follows from them, for all arms at once.
    """
    users = len(totals)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // users)
    parts = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(users, size=(size, users)) + np.arange(size)[:, None] * users
        times = np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users)
        parts.append(times.astype(float) @ totals)
    return np.concatenate(parts)


def percentile_interval(resampled: Array) -> tuple[float, float]:
    """The middle 95% of the resampled statistics."""
    low, high = np.quantile(resampled, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def _resampled_means(values: Array, clusters: ArrayLike, resamples: int, seed: int) -> Array:
    totals = cluster_totals(np.column_stack([values, np.ones(len(values))]), clusters)
    resampled = bootstrap_totals(totals, resamples, seed)
    means: Array = resampled[:, :-1] / resampled[:, -1:]
    return means


def _bootstrap_p(resampled: Array) -> float:
    """Twice the smaller tail beyond zero; the observed sample counts as one resample, so p is never zero."""
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(resampled) + 1)))


def _word(mean: float, p: float, users: int) -> str:
    if users < 2:
        return "too few users"
    if p >= ALPHA:
        return "no difference"
    return "better" if mean < 0 else "worse"


def _student_cdf(t: float, df: int) -> float:
    try:
        from scipy.special import stdtr  # far lighter than scipy.stats
    except ImportError:
        raise MissingExtraError("scipy", "eval", "a significance test") from None
    return float(stdtr(df, t))
