"""For whom does it work? The gain by user, by his activity, by his distance from the training users, and by length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.errors import DataError
from e2p.evaluation.significance import (
    Direction,
    bootstrap_totals,
    cluster_bootstrap,
    cluster_totals,
    percentile_interval,
)

if TYPE_CHECKING:  # the audit of scores alone loads no torch
    from e2p.training.inputs import RunInputs

Array = npt.NDArray[np.float64]

# By, column of the covariates, and what it is in words.
BREAKDOWNS = (
    ("activity", "activity", "examples of the user in the table"),
    ("distance", "distance", "distance of the user's vector from the nearest training user (standardised)"),
    ("length", "tokens", "tokens of the completion"),
)
_TRAINING_VECTORS = 100_000  # the most that are compared with; as many as the input statistics are fitted on
_CELLS = 20_000_000  # distances held at once: 80 MB
_WIDTH = 512  # numbers of a vector by which the nearest one is looked for


def covariates(inputs: RunInputs) -> pl.DataFrame:
    """What the breakdowns go by, for every test example.

    Returns:
        ``example_id``, ``user_id``, ``activity`` (examples of the user in the whole table), ``distance`` (Euclidean,
        of the user's vector from the nearest vector of *another* user that training used, with the dimensions at the
        training vectors' unit variance; null without a vector), ``tokens`` (labelled tokens of the completion).
        Of vectors of more than 512 numbers, the nearest one is looked for in a seeded random projection to 512, which
        keeps distances to a few per cent; the distance from the one found is exact.
    """
    rows = inputs.rows("test")
    activity = inputs.keys.select("example_id", "user_id", activity=pl.len().over("user_id").cast(pl.Int64))
    return activity[rows].with_columns(
        distance=pl.Series(_distances(inputs)).fill_nan(None),
        tokens=pl.Series(inputs.tokens.completion_lengths[rows].astype(np.int64)),
    )


def _distances(inputs: RunInputs) -> Array:
    """Distance from the nearest training vector of another user, for every test example; NaN without one."""
    train = np.unique(inputs.vector_rows[inputs.rows("train")])
    train = train[train >= 0]
    if len(train) > _TRAINING_VECTORS:
        train = train[np.linspace(0, len(train) - 1, _TRAINING_VECTORS).astype(np.int64)]
    asked, which = np.unique(inputs.vector_rows[inputs.rows("test")], return_inverse=True)
    nearest = np.full(len(asked), np.nan)
    if len(train):
        vectors = inputs.embeddings.vectors
        owner = np.unique(inputs.embeddings.keys["user_id"].to_numpy(), return_inverse=True)[1]
        known = np.asarray(vectors[train], np.float32)
        mean, spread = known.mean(0, dtype=np.float64), known.std(0, dtype=np.float64)
        # In float32 throughout, so that no copy takes more room than the vectors.
        mean, spread = mean.astype(np.float32), np.where(spread > 1e-8, spread, 1.0).astype(np.float32)
        shadow = None
        if known.shape[1] > _WIDTH:  # Johnson and Lindenstrauss
            drawn = np.random.default_rng([42, 5]).normal(0, _WIDTH**-0.5, (known.shape[1], _WIDTH))
            shadow = drawn.astype(np.float32)

        def placed(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            rows = (rows - mean) / spread
            return rows if shadow is None else rows @ shadow

        known = placed(known)
        lengths = (known**2).sum(1)
        size = max(1, _CELLS // len(train))
        for start in range(int(np.searchsorted(asked, 0)), len(asked), size):  # -1: no vector
            part = slice(start, start + size)
            here = np.asarray(vectors[asked[part]], np.float32)
            squares = lengths - 2 * placed(here) @ known.T  # and here's own, which does not change the order
            squares[owner[asked[part], None] == owner[train]] = np.inf
            best = squares.argmin(1)
            # Small differences of large squares are not exact; of the nearest one it is taken again.
            exact = np.linalg.norm((here - vectors[train[best]]) / spread, axis=1)
            nearest[part] = np.where(np.isfinite(squares.min(1)), exact, np.nan)
    return nearest[which]


def breakdowns(wide: pl.DataFrame, by: pl.DataFrame, resamples: int = 10_000, seed: int = 42) -> list[dict[str, Any]]:
    """The difference between the user's own vector and its control, by terciles of what is known of the examples.

    Args:
        wide: of :func:`e2p.evaluation.metrics.per_example`; with several training seeds, their mean.
        by: of :func:`covariates`; columns may be missing.
        resamples: bootstrap resamples of the users, for the intervals.
        seed: seed of the resamples.

    Returns:
        One entry for each of :data:`BREAKDOWNS` that says something: ``by``, ``label``, ``comparison`` (true minus
        random, or without that arm true minus none), ``bins`` with ``label``, ``low``, ``high`` (smallest and
        largest value in it), ``examples``, ``users``, ``difference``, ``ci`` (95%, bootstrap over users; None with
        one user). Left out: what has the same value everywhere, and examples of which it is not known (null, NaN).

    Raises:
        DataError: as :func:`check_covariates`.
    """
    control = next((arm for arm in ("random", "none") if arm in wide.columns), None)
    if control is None or "e2p" not in wide.columns:
        return []
    check_covariates(by)
    differences = wide.select("example_id", "user_id", difference=pl.col("e2p") - pl.col(control))
    found = []
    for name, column, label in BREAKDOWNS:
        if column not in by.columns:
            continue
        known = by.select("example_id", value=pl.col(column).cast(pl.Float64)).filter(pl.col("value").is_finite())
        joined = differences.join(known, on="example_id", maintain_order="left")
        bins = [
            _bin(joined, low, high, text, resamples, seed) for low, high, text in terciles(joined["value"].to_numpy())
        ]
        if len(bins) > 1:
            found.append({"by": name, "label": label, "comparison": f"true minus {control}", "bins": bins})
    return found


def check_covariates(by: pl.DataFrame, where: str = "covariates") -> None:
    """Raises DataError if what examples are divided by is not numbers, or an example stands there twice."""
    for _, column, _ in BREAKDOWNS:
        kind = by.schema.get(column, pl.Null())
        if not (kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
            raise DataError(f"{where}: {column}: expected numbers, got {kind}")
    twice = by.filter(pl.col("example_id").is_duplicated() & pl.col("example_id").is_not_null())
    if not twice.is_empty():
        raise DataError(f"{where}: example '{twice['example_id'][0]}' stands there twice; expected one row for each")


def gains(wide: pl.DataFrame, better: Direction, resamples: int = 10_000, seed: int = 42) -> dict[str, Any]:
    """What each arm wins over no prefix, and each user by his own vector: what the report draws. Positive is a gain.

    Args:
        wide: of :func:`e2p.evaluation.metrics.per_example`; with several training seeds, their mean.
        better: whether lower or higher values are better.
        resamples: bootstrap resamples of the users, for the intervals: those of the comparisons.
        seed: seed of the resamples.

    Returns:
        ``over_none``: by arm ``gain`` (mean over examples) and ``ci`` (95%; None with fewer than two users);
        ``against``: the first of random, static and none that there is; ``by_user``: the gain of e2p over it, for each
        user the mean over his examples, six digits. What cannot be told is empty.
    """
    sign, users = (-1.0 if better == "higher" else 1.0), wide["user_id"].to_numpy()
    arms = [name for name in wide.columns if name not in ("example_id", "user_id", "tokens")]
    found: dict[str, Any] = {"over_none": {}, "against": None, "by_user": []}

    def totals_over(control: str, others: list[str]) -> Array:
        columns = [sign * (wide[control] - wide[arm]).to_numpy() for arm in others]
        return cluster_totals(np.column_stack([*columns, np.ones(wide.height)]), users)

    others = [arm for arm in arms if arm != "none"]
    if "none" in arms and others:
        totals = totals_over("none", others)
        resampled = bootstrap_totals(totals, resamples, seed)
        for index, arm in enumerate(others):
            drawn = percentile_interval(resampled[:, index] / resampled[:, -1]) if len(totals) > 1 else None
            gain = float(totals[:, index].sum() / wide.height)
            found["over_none"][arm] = {"gain": gain, "ci": None if drawn is None else list(drawn)}
    controls = [arm for arm in ("random", "static", "none") if arm in arms]
    if "e2p" in arms and controls:
        own, count = totals_over(controls[0], ["e2p"]).T
        found |= {"against": controls[0], "by_user": [float(f"{gain:.6g}") for gain in own / count]}
    return found


def terciles(values: Array) -> Iterator[tuple[float, float, str]]:
    """Smallest value, largest value and label of up to three bins with about as many values each.

    Equal values stay together, so that there are fewer bins where one value is frequent.
    """
    if not len(values):
        return
    cuts = np.unique(np.quantile(values, [1 / 3, 2 / 3], method="inverted_cdf"))
    which = np.searchsorted(cuts, values)  # what equals a cut is below it
    present = np.unique(which)
    whole = bool((values == np.round(values)).all())
    for index in present:
        part = values[which == index]
        low, high = float(part.min()), float(part.max())
        first, last = (f"{bound:.0f}" if whole else f"{round(bound, 3):.3g}" for bound in (low, high))
        label = first if first == last else f"{first}–{last}"
        yield low, high, f"{first}+" if index == present[-1] and first != last and len(present) > 1 else label


def _bin(joined: pl.DataFrame, low: float, high: float, label: str, resamples: int, seed: int) -> dict[str, Any]:
    part = joined.filter(pl.col("value").is_between(low, high))
    users = part["user_id"].n_unique()
    estimate = cluster_bootstrap(part["difference"].to_numpy(), part["user_id"].to_numpy(), resamples, seed)
    return {
        "label": label,
        "low": low,
        "high": high,
        "examples": part.height,
        "users": users,
        "difference": estimate.mean,
        "ci": [estimate.low, estimate.high] if users > 1 else None,
    }
