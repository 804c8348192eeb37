"""Several seeds together: the arithmetic by hand, and refusal of runs that differ in more than their seed."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from e2p.errors import DataError
from e2p.evaluation.aggregate import aggregate, interval, markdown_table, p_value, signed


def run(seed: int, perplexity: float, difference: float, p: float, width: float = 0.1) -> dict[str, Any]:
    arm = {"nats_per_token": 3.0, "bits_per_byte": 1.2, "context_tokens": 1.0, "examples": 100, "users": 20}
    arm |= {"perplexity": perplexity, "perplexity_ci": [perplexity - width, perplexity + width]}
    comparison = {
        "name": "true minus random",
        "arm": "e2p",
        "against": "random",
        "metric": "nats_per_token",
        "difference": difference,
        "corpus_difference": difference,
        "ci": [difference - width, difference + width],
        "p_ttest": p / 10,
        "p_clustered": p / 2,
        "p_bootstrap": p / 2,
        "p_holm": p,
        "effect_size": -0.5,
        "examples": 100,
        "users": 20,
        "verdict": "better",
    }
    return {
        "format": 1,
        "run": f"seed{seed}",
        "task": "demo",
        "seed": seed,
        "provenance": {"commit": "abc"},
        "config": {"output": f"runs/{seed}", "training": {"seed": seed, "learning_rate": 1e-3}},
        "data": {"test": 100},
        "arms": {"e2p": dict(arm), "random": dict(arm)},
        "comparisons": [comparison],
    }


RUNS = [run(1, 20.0, -0.2, 0.001), run(2, 21.0, -0.1, 0.03, width=0.4), run(3, 22.0, -0.3, 0.0001)]


def test_means_and_spreads() -> None:
    found = json.loads(json.dumps(aggregate(RUNS), allow_nan=False))
    assert found["seeds"] == [1, 2, 3]
    assert list(found["arms"]) == ["random", "e2p"]
    perplexity = found["arms"]["e2p"]["perplexity"]
    assert perplexity == {"mean": 21.0, "std": 1.0, "min": 20.0, "max": 22.0, "values": [20.0, 21.0, 22.0]}
    assert found["arms"]["e2p"]["perplexity_ci"] == pytest.approx([19.9, 22.1])
    (row,) = found["comparisons"]
    assert row["difference"]["mean"] == pytest.approx(-0.2)
    assert row["difference"]["std"] == pytest.approx(statistics.stdev([-0.2, -0.1, -0.3]))
    assert row["ci"] == pytest.approx([-0.5, 0.3])
    assert (row["p"], row["p_max"]) == ([0.001, 0.03, 0.0001], 0.03)
    assert row["verdicts"] == ["better"] * 3


def test_one_seed_has_no_spread() -> None:
    found = aggregate(RUNS[:1])
    assert found["arms"]["e2p"]["perplexity"]["std"] == 0
    assert "±" not in markdown_table(found)


def test_a_missing_interval_stays_missing() -> None:
    runs = copy.deepcopy(RUNS)
    runs[1]["arms"]["e2p"]["perplexity_ci"] = None
    runs[1]["comparisons"][0]["ci"] = None
    found = aggregate(runs)
    assert found["arms"]["e2p"]["perplexity_ci"] is None
    assert found["comparisons"][0]["ci"] is None
    assert "–" in markdown_table(found)


def test_a_ranking_metric_has_no_perplexity() -> None:
    runs = copy.deepcopy(RUNS)
    for hits, one in zip((0.1, 0.2, 0.6), runs, strict=True):
        one["metric"] = {"name": "hit_rate@10", "label": "HitRate@10", "better": "higher"}
        for arm in one["arms"]:
            one["arms"][arm] = {"examples": 9, "users": 3, "hit_rate@10": hits, "hit_rate@10_ci": [0, hits + 0.1]}
    found = aggregate(runs)
    assert found["arms"]["e2p"]["hit_rate@10"]["mean"] == pytest.approx(0.3)
    assert found["arms"]["e2p"]["hit_rate@10_ci"] == [0, pytest.approx(0.7)]
    assert markdown_table(found).startswith("| comparison | HitRate@10 [95% interval] |")


def test_markdown_table() -> None:
    lines = markdown_table(aggregate(RUNS)).splitlines()
    assert "| true minus random | −0.200 [−0.500, +0.300] | ± 0.100 | 0.030 | 100 | 20 | 3 |" in lines
    assert "| e2p | 21.00 [19.90, 22.10] | ± 1.000 | 1.200 | 1.0 | 100 | 3 |" in lines
    assert len({line.count("|") for line in lines if line}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(seed=1), "seeds repeat: 1, 1"),
        (lambda r: r.update(seeds=[2, 3]), "run 'seed2' has 2 seeds together already"),
        (lambda r: r.update(task="other"), "differ in task"),
        (lambda r: r.update(metric={"name": "auc"}), "differ in metric"),
        (lambda r: r["config"]["training"].update(learning_rate=0.1), r"differ in training\.learning_rate"),
        (lambda r: r["arms"].pop("random"), "differ in arms"),
        (lambda r: r["comparisons"].clear(), "differ in comparisons"),
    ],
)
def test_other_experiments_are_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    runs = copy.deepcopy(RUNS[:2])
    change(runs[1])
    with pytest.raises(DataError, match=message):
        aggregate(runs)


def test_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one run"):
        aggregate([])


def test_formats() -> None:
    assert (signed(-0.1234), signed(0.5)) == ("−0.123", "+0.500")
    assert (interval((-1.0, 2.0)), interval(None)) == ("[−1.000, +2.000]", "–")
    assert (p_value(0.0002), p_value(0.0421)) == ("< 0.001", "0.042")
