"""From per-example scores to numbers per arm: means and perplexity with intervals, bits per byte, cost in context.

Scores are a long table: ``example_id``, ``user_id``, ``arm``, ``metric``, ``value``. Likelihoods are stored as sums
(nats, tokens, bytes), never ratios, so that a corpus figure is the ratio of sums and not a mean of ratios. Whatever
else is measured example by example (ROUGE, HitRate@k, engagement) is stored as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from e2p.config_evaluation import ARMS
from e2p.errors import DataError
from e2p.evaluation.significance import Direction, bootstrap_totals, cluster_totals, percentile_interval

COLUMNS = ("example_id", "user_id", "arm", "metric", "value")
# The long table of one training seed; or one of each, and then their mean, example by example, is what counts.
Scores = pl.DataFrame | Sequence[pl.DataFrame]
_RESERVED = ("example_id", "user_id", "tokens")  # columns beside the arms
_RATIOS = {"nats_per_token": ("nll", "tokens", 1.0), "bits_per_byte": ("nll", "bytes", math.log(2))}
_PARTS = ("nll", "tokens", "bytes", "context_tokens")  # what likelihoods are made of
_SAME = "expected the same examples, arms and metrics in each"
_KNOWN: dict[str, tuple[str, Direction]] = {
    "nats_per_token": ("nats per token", "lower"),
    "bits_per_byte": ("bits per byte", "lower"),
    "nll": ("nats per completion", "lower"),
    "perplexity": ("perplexity", "lower"),
    "rouge1": ("ROUGE-1", "higher"),
    "rouge2": ("ROUGE-2", "higher"),
    "rougeL": ("ROUGE-L", "higher"),
    "auc": ("AUC", "higher"),
    "engagement": ("engagement", "higher"),
    "affinity": ("affinity", "higher"),
    "playlist_hits": ("playlist hit rate", "higher"),
    "on_request": ("share on request", "higher"),
    "known": ("share known", "lower"),
    "invented": ("share invented", "lower"),
    "popularity": ("popularity percentile", "lower"),
    "accuracy": ("accuracy", "higher"),
    "copied": ("share copied", "lower"),
    "words": ("words", "lower"),  # of a length neither is better; a test needs a sign
}
TEXTS = ("rouge1", "rouge2", "rougeL", "copied", "words")  # what generated texts are measured by
_SAMPLED = "_sampled"
_RANKED = {
    "hit_rate": "HitRate",
    "expected_hit_rate": "expected HitRate",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "recall": "recall",
    "precision": "precision",
}


@dataclass(frozen=True)
class Metric:
    """What is measured on every example.

    Args:
        name: as in the scores.
        label: as people write it.
        better: whether lower or higher values are better.
    """

    name: str
    label: str
    better: Direction


def metric_of(name: str, better: Mapping[str, Direction] | None = None) -> Metric:
    """A metric by name; ``hit_rate@10``, ``ndcg@5`` and the like are known for every k, ``rougeL_sampled`` and the
    like for drawn texts.

    Args:
        name: of the metric.
        better: the direction of metrics that e2p does not know.

    Raises:
        DataError: the metric is not known and no direction is given.
    """
    ranked = re.fullmatch(rf"({'|'.join(_RANKED)})@([1-9]\d*)", name)
    label, known = (f"{_RANKED[ranked[1]]}@{ranked[2]}", "higher") if ranked else _KNOWN.get(name, (name, None))
    if name.endswith(_SAMPLED) and (base := name.removesuffix(_SAMPLED)) in TEXTS:
        label, known = f"{_KNOWN[base][0]} of draws", _KNOWN[base][1]
    direction = (better or {}).get(name, known)
    if direction not in ("lower", "higher"):
        raise DataError(
            f"scores: is a lower or a higher {name} better? It is no metric that e2p knows; say so with "
            f"--better.{name} higher, in Python with better={{'{name}': 'higher'}}"
        )
    return Metric(name, label, "lower" if direction == "lower" else "higher")


def text_metric(name: str, way: str) -> str:
    """What a measure of greedy or of sampled texts is called in the scores."""
    return name + _SAMPLED if way == "sampled" else name


def audited_metrics(scores: Scores, headline: str = "") -> list[str]:
    """The metrics that scores can be judged by: the headline if it is there, nats per token where there are
    likelihoods, then the others in the order in which they stand there. The first drives the verdict.

    Raises:
        DataError: there is none, or the seeds differ in theirs.
    """
    stored = _stored(_tables(scores))
    likelihood = "nats_per_token" if "tokens" in stored else "nll"
    found = [likelihood] if "nll" in stored else []
    found += [name for name in stored if name not in (*_PARTS, *found)]
    if not found:
        raise DataError(f"scores: no metric to judge by, only {', '.join(stored) or 'no rows'}")
    return sorted(found, key=lambda name: name != headline)


def arm_order(arms: Iterable[str]) -> list[str]:
    """The arms in the order of every table: that of :data:`e2p.config.ARMS`, then the rest by name."""
    rank = {arm: index for index, arm in enumerate(ARMS)}
    return sorted(set(arms), key=lambda arm: (rank.get(arm, len(ARMS)), arm))


def per_example(scores: Scores, metric: str = "nats_per_token") -> pl.DataFrame:
    """One row per example and one column per arm: the input of every paired comparison.

    Args:
        scores: the long table of a run, or of each training seed: then their mean.
        metric: a stored metric, ``nats_per_token`` (nll / tokens) or ``bits_per_byte`` (nll / ln 2 / bytes).
            Only the completion's tokens and bytes count; prompt and prefix are masked.

    Returns:
        ``example_id``, ``user_id``, for likelihoods ``tokens`` (labelled tokens, where the scores have them), then the
        arms that have the metric; sorted by ``example_id``.

    Raises:
        DataError: arms or seeds differ in their examples, completions were not the same, an arm bears the name of a
            column, or a value is not finite.
    """
    tables = _tables(scores)
    stored = _stored(tables)
    above, below, unit = (metric, None, 1.0) if metric in stored else _RATIOS.get(metric, (metric, None, 1.0))
    wide = _pivot(tables, above)
    arms = wide.columns[2:]
    if below is not None:
        size = _same_in_all_arms(tables, below, wide)
        wide = wide.with_columns(pl.col(arm) / unit / size for arm in arms)
    if above == "nll" and "tokens" in stored:
        wide = wide.with_columns(_same_in_all_arms(tables, "tokens", wide).alias("tokens"))
        wide = wide.select("example_id", "user_id", "tokens", *arms)
    return wide


def means(wide: pl.DataFrame, metric: str, resamples: int = 10_000, seed: int = 42) -> dict[str, dict[str, Any]]:
    """Mean over examples of any metric, per arm.

    Args:
        wide: of :func:`per_example`.
        metric: name of what ``wide`` holds.
        resamples: bootstrap resamples of the users, the same ones for every arm.
        seed: seed of the resamples.

    Returns:
        By arm: ``examples``, ``users``, ``<metric>`` (the mean), ``<metric>_ci`` (95%, percentile bootstrap over users;
        None with fewer than two users).
    """
    arms = [name for name in wide.columns[2:] if name != "tokens"]
    values = np.column_stack([wide.select(arms).to_numpy(), np.ones(wide.height)])
    totals = cluster_totals(values, wide["user_id"].to_numpy())
    resampled = bootstrap_totals(totals, resamples, seed)
    found: dict[str, dict[str, Any]] = {}
    for index, arm in enumerate(arms):
        interval = percentile_interval(resampled[:, index] / resampled[:, -1]) if len(totals) > 1 else None
        found[arm] = {"examples": wide.height, "users": len(totals), metric: float(values[:, index].mean())}
        found[arm][f"{metric}_ci"] = None if interval is None else list(interval)
    return found


def summarise(scores: Scores, resamples: int = 10_000, seed: int = 42) -> dict[str, dict[str, Any]]:
    """Likelihood figures per arm over the whole test set.

    Perplexity (paper, Section 4.3) is exp(sum of nll / sum of tokens) over the completions alone: prompt,
    profile and prefix are masked. Its 95% interval is a percentile bootstrap over *users*: examples of one
    user are not independent; all arms see the same resamples.

    Args:
        scores: the long table, or those of the training seeds, with the metrics ``nll`` (nats) and ``tokens``, if
            possible ``bytes`` and ``context_tokens``.
        resamples: bootstrap resamples of the users.
        seed: seed of the resamples.

    Returns:
        By arm: ``examples``, ``users``, ``perplexity``, ``perplexity_ci`` (low, high; None with fewer than
        two users), ``nats_per_token``, ``bits_per_byte``, ``context_tokens`` (mean of the tokens that the
        conditioning adds); the last two where the scores allow it.

    Raises:
        DataError: as :func:`per_example`.
    """
    tables = _tables(scores)
    stored = _stored(tables)
    nll = _pivot(tables, "nll")
    tokens = _same_in_all_arms(tables, "tokens", nll).to_numpy()
    size = float(_same_in_all_arms(tables, "bytes", nll).sum()) if "bytes" in stored else None
    context = _pivot(tables, "context_tokens", nll) if "context_tokens" in stored else None
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
        }
        if size is not None:
            summary[arm]["bits_per_byte"] = float(nats[index] * tokens.sum() / math.log(2) / size)
        if context is not None:
            summary[arm]["context_tokens"] = float(context[arm].to_numpy().mean())
    return summary


def _exp(nats: float) -> float:
    return math.exp(min(float(nats), 700.0))  # a broken model's loss must not overflow the report


def _tables(scores: Scores) -> list[pl.DataFrame]:
    tables = [scores] if isinstance(scores, pl.DataFrame) else list(scores)
    for table in tables:
        missing = [column for column in COLUMNS if column not in table.columns]
        if missing:
            raise DataError(f"scores: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    if not tables or any(table.is_empty() for table in tables):
        raise DataError("scores: no rows; nothing was evaluated")
    return tables


def _stored(tables: Sequence[pl.DataFrame]) -> list[str]:
    """The metrics in the tables, in the order in which they stand there."""
    first, *others = (table["metric"].unique(maintain_order=True).to_list() for table in tables)
    for other in others:
        if differs := sorted(set(first) ^ set(other)):
            raise DataError(f"scores: {differs[0]} is there in some seeds only; {_SAME}")
    return first


def _pivot(tables: Sequence[pl.DataFrame], metric: str, like: pl.DataFrame | None = None) -> pl.DataFrame:
    """Checked wide table of one stored metric: example_id, user_id, arms; for the examples and arms of ``like``.

    Of several seeds the mean; one metric of one seed is held in memory beside it."""
    mean = _pivot_one(tables[0], metric, like)
    arms = mean.columns[2:]
    for table in tables[1:]:
        wide = _pivot_one(table, metric, like)
        if differs := sorted(set(arms) ^ set(wide.columns[2:])):
            raise DataError(f"scores: arm '{differs[0]}' has {metric} in some seeds only; {_SAME}")
        if not wide[:, :2].equals(mean[:, :2]):
            one, other = (frame.select("example_id", "user_id") for frame in (mean, wide))
            lone = pl.concat([one.join(other, one.columns, "anti"), other.join(one, one.columns, "anti")])
            raise DataError(
                f"scores: example '{lone['example_id'][0]}' of user '{lone['user_id'][0]}' has {metric} in some seeds "
                f"only; {_SAME}"
            )
        mean = mean.with_columns(pl.col(arm) + wide[arm] for arm in arms)
    return mean.with_columns(pl.col(arm) / len(tables) for arm in arms) if len(tables) > 1 else mean


def _pivot_one(scores: pl.DataFrame, metric: str, like: pl.DataFrame | None) -> pl.DataFrame:
    part = scores.filter(pl.col("metric") == metric)
    if like is not None:
        part = part.filter(pl.col("arm").is_in(like.columns[2:])).join(like.select("example_id"), "example_id", "semi")
    elif part.is_empty():
        raise DataError(f"scores: no {metric}; there is {', '.join(scores['metric'].unique(maintain_order=True))}")
    if reserved := sorted(set(part["arm"].unique()) & set(_RESERVED)):
        raise DataError(f"scores: arm '{reserved[0]}': expected another name than that of a column; rename the arm")
    _check_coverage(part, metric, like)
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


def _check_coverage(part: pl.DataFrame, metric: str, like: pl.DataFrame | None) -> None:
    """A paired comparison needs every arm to have exactly one value for every example."""
    expected = part["example_id"].n_unique() if like is None else like.height
    counts = part.group_by("arm").agg(pl.len(), pl.col("example_id").n_unique().alias("examples"))
    found = {arm: (rows, examples) for arm, rows, examples in counts.iter_rows()}
    for arm in arm_order(part["arm"] if like is None else like.columns[2:]):
        rows, examples = found.get(arm, (0, 0))
        if examples != expected:
            raise DataError(
                f"scores: arm '{arm}' has {metric} for {examples} of {expected} examples; "
                "every arm must be scored on the same examples"
            )
        if rows != examples:
            raise DataError(f"scores: arm '{arm}' has {rows} values of {metric} for {examples} examples; expected one")


def _same_in_all_arms(tables: Sequence[pl.DataFrame], metric: str, like: pl.DataFrame) -> pl.Series:
    """A completion's size, > 0. If it differs between arms or seeds, they were not scored on the same completions."""
    sizes: list[pl.Series] = []
    for table in tables:
        wide = _pivot_one(table, metric, like)
        values = wide.select(wide.columns[2:]).to_numpy()
        sizes.append(wide[wide.columns[2]])
        for wrong, what in (
            (values.min(1) != values.max(1), "differs between arms"),
            (values.min(1) <= 0, "is not > 0"),
            ((sizes[-1] != sizes[0]).to_numpy(), "differs between seeds"),
        ):
            if wrong.any():
                raise DataError(f"scores: {metric} of example '{wide['example_id'][int(wrong.argmax())]}' {what}")
    return sizes[0]
