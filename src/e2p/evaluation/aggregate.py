"""Several runs of one experiment -> mean and spread of their figures, and the tables of README and docs.

Puts together what runs have found, each by itself; :func:`e2p.evaluation.audit.audit` puts their scores together.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from e2p.errors import DataError
from e2p.evaluation.metrics import arm_order

# Settings in which runs of one experiment may differ.
_FREE = {"seed", "output", "examples", "embeddings", "cache_dir", "device"}


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put several runs, equal but for their seed, together.

    Args:
        results: the runs' ``results.json``.

    Returns:
        ``task``, ``seeds``, ``runs``, ``provenance`` (one per run), ``config`` (the first run's), ``data``
        (one per run), ``arms`` and ``comparisons``. A figure is ``{mean, std, min, max, values}`` over seeds,
        std with n - 1 (0 for one seed). An interval is the hull of the seeds' 95% intervals: rather too wide
        than too narrow. Every seed's Holm-adjusted p stands in ``p``, the largest in ``p_max``.

    Raises:
        DataError: no runs, a repeated seed, a run of several seeds, or runs that differ in settings, arms or
            comparisons.
    """
    if not results:
        raise DataError("aggregate: expected at least one run's results, got none")
    _check_same(results)
    first = results[0]
    return {
        "format": 1,
        "task": first.get("task"),
        "seeds": [run["seed"] for run in results],
        "runs": [run["run"] for run in results],
        "provenance": [run.get("provenance") for run in results],
        "config": first.get("config"),
        "metric": first.get("metric"),
        "data": [run.get("data") for run in results],
        "arms": {arm: _arm([run["arms"][arm] for run in results]) for arm in arm_order(first["arms"])},
        "comparisons": [
            _comparison([run["comparisons"][index] for run in results]) for index in range(len(first["comparisons"]))
        ],
    }


def markdown_table(aggregated: Mapping[str, Any]) -> str:
    """Two Markdown tables of :func:`aggregate`'s output: comparisons, then arms. One seed needs no spread."""
    seeds, metric = len(aggregated["seeds"]), (aggregated.get("metric") or {}).get("label", "nats per token")
    lines = [
        f"| comparison | {metric} [95% interval] | over seeds | largest p | examples | users | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in aggregated["comparisons"]:
        figure = row["difference"]
        cells = [
            row["name"],
            f"{signed(figure['mean'])} {interval(row['ci'], signed)}",
            _spread(figure, seeds),
            p_value(row["p_max"]),
            f"{row['examples']:,}",
            f"{row['users']:,}",
            str(seeds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not all({"perplexity", "bits_per_byte", "context_tokens"} <= row.keys() for row in aggregated["arms"].values()):
        return "\n".join(lines) + "\n"  # no likelihoods
    lines += [
        "",
        "| arm | perplexity [95% interval] | over seeds | bits per byte | added tokens | examples | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in aggregated["arms"].items():
        figure = row["perplexity"]
        cells = [
            arm,
            f"{figure['mean']:.2f} {interval(row['perplexity_ci'], '{:.2f}'.format)}",
            _spread(figure, seeds),
            f"{row['bits_per_byte']['mean']:.3f}",
            f"{row['context_tokens']['mean']:.1f}",
            f"{row['examples']:,}",
            str(seeds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def signed(value: float) -> str:
    """A difference with a real minus sign; three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def interval(bounds: Sequence[float] | None, show: Any = signed) -> str:
    """``[low, high]``, or a dash where there is none."""
    return "–" if bounds is None else f"[{show(bounds[0])}, {show(bounds[1])}]"


def p_value(p: float) -> str:
    """Three decimals; what is smaller than 0.001 is said to be so."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _spread(figure: Mapping[str, Any], seeds: int) -> str:
    return "–" if seeds < 2 else f"± {figure['std']:.3f}"


def _figure(values: Sequence[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": statistics.fmean(values),
        "std": std,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def _hull(intervals: Sequence[Sequence[float] | None]) -> list[float] | None:
    known = [bounds for bounds in intervals if bounds is not None]
    if len(known) < len(intervals):
        return None
    return [min(bounds[0] for bounds in known), max(bounds[1] for bounds in known)]


def _arm(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [name for name in runs[0] if name not in ("examples", "users") and not name.endswith("_ci")]
    figures = {name: _figure([run[name] for run in runs]) for name in known}
    hulls = {name: _hull([run[name] for run in runs]) for name in runs[0] if name.endswith("_ci")}
    return figures | hulls | {name: min(run[name] for run in runs) for name in ("examples", "users")}


def _comparison(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = {
        name: _figure([run[name] for run in runs]) for name in ("difference", "corpus_difference", "effect_size")
    }
    p = [run["p_holm"] for run in runs]
    return {
        **{name: runs[0][name] for name in ("name", "arm", "against", "metric")},
        **figures,
        "ci": _hull([run["ci"] for run in runs]),
        "p": p,
        "p_max": max(p),
        "p_ttest": [run["p_ttest"] for run in runs],
        "p_bootstrap": [run["p_bootstrap"] for run in runs],
        "verdicts": [run["verdict"] for run in runs],
        "examples": min(run["examples"] for run in runs),
        "users": min(run["users"] for run in runs),
    }


def _check_same(results: Sequence[Mapping[str, Any]]) -> None:
    """Means over runs that differ in more than their seed would hide what differs."""
    first, seeds = results[0], [run["seed"] for run in results]
    for run in results:
        if len(run.get("seeds") or []) > 1:
            raise DataError(
                f"aggregate: run '{run['run']}' has {len(run['seeds'])} seeds together already; give one each"
            )
    if len(set(seeds)) < len(seeds):
        raise DataError(f"aggregate: seeds repeat: {', '.join(map(str, seeds))}; each run must have its own")
    for run in results[1:]:
        here, there = _flat(first.get("config") or {}), _flat(run.get("config") or {})
        differs = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        differs[:0] = [part for part in ("task", "metric") if run.get(part) != first.get(part)]
        for part in ("arms", "comparisons"):
            if _names(run, part) != _names(first, part):
                differs.append(part)
        if differs:
            raise DataError(f"aggregate: runs '{first['run']}' and '{run['run']}' differ in {', '.join(differs)}")


def _names(run: Mapping[str, Any], part: str) -> list[str]:
    return arm_order(run["arms"]) if part == "arms" else [row["name"] for row in run["comparisons"]]


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        elif key not in _FREE:
            found[above + key] = value
    return found
