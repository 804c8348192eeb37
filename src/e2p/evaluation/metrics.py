"""From per-example scores to numbers per arm: perplexity with its interval, bits per byte, cost in context.

Scores are a long table: ``example_id``, ``user_id``, ``arm``, ``metric``, ``value``. Stored are sums (nats,
tokens, bytes), never ratios, so that a corpus figure is the ratio of sums and not a mean of ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from e2p.config import ARMS
from e2p.errors import DataError
from e2p.evaluation.significance import bootstrap_totals, cluster_totals, percentile_interval

COLUMNS = ("example_id", "user_id", "arm", "metric", "value")
_RATIOS = {"nats_per_token": ("nll", "tokens", 1.0), "bits_per_byte": ("nll", "bytes", math.log(2))}


def arm_order(arms: Iterable[str]) -> list[str]:
    """The arms in the order of every table: that of :data:`e2p.config.ARMS`, then the rest by name."""
    rank = {arm: index for index, arm in enumerate(ARMS)}
    return sorted(set(arms), key=lambda arm: (rank.get(arm, len(ARMS)), arm))


def per_example(scores: pl.DataFrame, metric: str = "nats_per_token") -> pl.DataFrame:
    """One row per example and one column per arm: the input of every paired comparison.

    Args:
        scores: the long table of a run.
        metric: ``nats_per_token`` (nll / tokens), ``bits_per_byte`` (nll / ln 2 / bytes), or a stored metric.
            Only the completion's tokens and bytes count; prompt and prefix are masked.

    Returns:
        ``example_id``, ``user_id``, ``tokens`` (labelled tokens, where the scores have them), then the arms;
        sorted by ``example_id``.

    Raises:
        DataError: arms differ in their examples, completions were not the same, or a value is not finite.
    """
    above, below, unit = _RATIOS.get(metric, (metric, None, 1.0))
    wide = _pivot(scores, above)
    arms = wide.columns[2:]
    if below is not None:
        size = _same_in_all_arms(scores, below)
        wide = wide.with_columns(pl.col(arm) / unit / size for arm in arms)
    if "tokens" in scores["metric"].unique():
        wide = wide.with_columns(_same_in_all_arms(scores, "tokens").alias("tokens"))
        wide = wide.select("example_id", "user_id", "tokens", *arms)
    return wide


def summarise(scores: pl.DataFrame, resamples: int = 10_000, seed: int = 42) -> dict[str, dict[str, Any]]:
    """Figures per arm over the whole test set.

    Perplexity (paper, Section 4.3) is exp(sum of nll / sum of tokens) over the completions alone: prompt,
    profile and prefix are masked. Its 95% interval is a percentile bootstrap over *users*: examples of one
    user are not independent; all arms see the same resamples.

    Args:
        scores: the long table, with the metrics ``nll`` (nats), ``tokens``, ``bytes`` and ``context_tokens``.
        resamples: bootstrap resamples of the users.
        seed: seed of the resamples.

    Returns:
        By arm: ``examples``, ``users``, ``perplexity``, ``perplexity_ci`` (low, high; None with fewer than
        two users), ``nats_per_token``, ``bits_per_byte``, ``context_tokens`` (mean of the tokens that the
        conditioning adds).

    Raises:
        DataError: as :func:`per_example`.
    """
    nll = _pivot(scores, "nll")
    tokens = _same_in_all_arms(scores, "tokens").to_numpy()
    size = float(_same_in_all_arms(scores, "bytes").sum())
    context = _pivot(scores, "context_tokens")
    arms = nll.columns[2:]

    totals = cluster_totals(np.column_stack([nll.select(arms).to_numpy(), tokens]), nll["user_id"].to_numpy())
    resampled = bootstrap_totals(totals, resamples, seed)
    nats = totals[:, :-1].sum(0) / tokens.sum()
    summary: dict[str, dict[str, Any]] = {}
    for index, arm in enumerate(arms):
        interval = percentile_interval(resampled[:, index] / resampled[:, -1]) if len(totals) > 1 else None
        summary[arm] = {
            "examples": nll.height,
            "users": len(totals),
            "perplexity": _exp(nats[index]),
            "perplexity_ci": None if interval is None else [_exp(bound) for bound in interval],
            "nats_per_token": float(nats[index]),
            "bits_per_byte": float(nats[index] * tokens.sum() / math.log(2) / size),
            "context_tokens": float(context[arm].to_numpy().mean()),
        }
    return summary


def _exp(nats: float) -> float:
    return math.exp(min(float(nats), 700.0))  # a broken model's loss must not overflow the report


def _pivot(scores: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Checked wide table of one stored metric: example_id, user_id, arms."""
    missing = [column for column in COLUMNS if column not in scores.columns]
    if missing:
        raise DataError(f"scores: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    if scores.is_empty():
        raise DataError("scores: no rows; nothing was evaluated")
    part = scores.filter(pl.col("metric") == metric)
    _check_coverage(scores, part, metric)
    broken = part.filter(~pl.col("value").is_finite().fill_null(False))
    if not broken.is_empty():
        row = broken.row(0, named=True)
        raise DataError(
            f"scores: {metric} of arm '{row['arm']}' is {row['value']} for example '{row['example_id']}' "
            f"({broken.height} such values); expected finite numbers"
        )
    wide = part.pivot(on="arm", index=["example_id", "user_id"], values="value")
    twice = wide.filter(pl.col("example_id").is_duplicated())
    if not twice.is_empty():
        raise DataError(f"scores: example '{twice['example_id'][0]}' stands under more than one user")
    return wide.select("example_id", "user_id", *arm_order(wide.columns[2:])).sort("example_id")


def _check_coverage(scores: pl.DataFrame, part: pl.DataFrame, metric: str) -> None:
    """A paired comparison needs every arm to have exactly one value for every example."""
    expected = scores["example_id"].n_unique()
    counts = part.group_by("arm").agg(pl.len(), pl.col("example_id").n_unique().alias("examples"))
    found = {arm: (rows, examples) for arm, rows, examples in counts.iter_rows()}
    for arm in arm_order(scores["arm"]):
        rows, examples = found.get(arm, (0, 0))
        if examples != expected:
            raise DataError(
                f"scores: arm '{arm}' has {metric} for {examples} of {expected} examples; "
                "every arm must be scored on the same examples"
            )
        if rows != examples:
            raise DataError(f"scores: arm '{arm}' has {rows} values of {metric} for {examples} examples; expected one")


def _same_in_all_arms(scores: pl.DataFrame, metric: str) -> pl.Series:
    """A completion's size, > 0. If it differs between arms, they were not scored on the same completions."""
    wide = _pivot(scores, metric)
    values = wide.select(wide.columns[2:]).to_numpy()
    for wrong, what in (
        (values.min(1) != values.max(1), "differs between arms"),
        (values.min(1) <= 0, "is not > 0"),
    ):
        if wrong.any():
            raise DataError(f"scores: {metric} of example '{wide['example_id'][int(wrong.argmax())]}' {what}")
    return wide[wide.columns[2]]
