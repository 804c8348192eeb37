"""Scores whose truth is known, from one seed or several, of any metric: what the audit says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from e2p.config import RunConfig
from e2p.config_io import to_dict
from e2p.errors import DataError, RunError
from e2p.evaluation.audit import Scored, audit, differing, experiments, load_scored
from e2p.evaluation.metrics import per_example
from e2p.evaluation.significance import RULE, clustered_t, compare

PERSONAL = {"none": 4.0, "static": 3.5, "random": 3.5, "e2p": 3.2}


def long(wide: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Scores in long form out of a table with one column per arm."""
    keys = ["example_id", "user_id"]
    unpivoted = wide.unpivot(index=keys, variable_name="arm", value_name="value")
    return unpivoted.select(*keys, "arm", pl.lit(metric).alias("metric"), "value")


def simulated(
    arms: Mapping[str, float], seed: int = 0, metric: str = "nats_per_token", noise: float = 0.05, users: int = 30
) -> pl.DataFrame:
    """Scores in which the arms' means are as given; the same users and examples for every seed."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(users), 3)
    level = np.random.default_rng(99).normal(0, 0.5, len(who))
    wide = {"example_id": [f"x{i:03}" for i in range(len(who))], "user_id": [f"u{u}" for u in who]}
    return long(pl.DataFrame(wide | {a: level + m + rng.normal(0, noise, len(who)) for a, m in arms.items()}), metric)


def scored(scores: pl.DataFrame, seed: int | None = 42, name: str = "run", **about: Any) -> Scored:
    return Scored(name, scores, seed, None, about)


def likelihoods(nats: pl.DataFrame) -> pl.DataFrame:
    """The same nats per token as sums over completions of four tokens."""
    per_token = pl.col("value") * 4
    sizes = (("tokens", 4.0), ("bytes", 16.0), ("context_tokens", 1.0))
    return pl.concat(
        [nats.with_columns(metric=pl.lit("nll"), value=per_token)]
        + [nats.with_columns(metric=pl.lit(name), value=pl.lit(size)) for name, size in sizes]
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "personalised: better than a random user's vector and than one static token"),
        ({"random": 3.2, "static": 3.2}, "conditioned but not personalised: better than no prefix, no better than"),
        ({"none": 3.2, "random": 3.2, "static": 3.2}, "no effect: no better than"),
        ({"none": 2.9}, "harmful: worse than no prefix"),
    ],
)
def test_the_truth_of_simulated_scores_is_found(change: dict[str, float], line: str) -> None:
    """Arms with the mean of e2p get its very scores, so that nothing hangs on the draw."""
    arms = PERSONAL | change
    scores = simulated(arms)
    for arm, mean in arms.items():
        if arm != "e2p" and mean == arms["e2p"]:
            own = scores.filter(pl.col("arm") == "e2p").with_columns(arm=pl.lit(arm))
            scores = pl.concat([scores.filter(pl.col("arm") != arm), own])
    results = audit([scored(likelihoods(scores))], resamples=200)
    assert results["verdict"].startswith(line)
    assert (results["format"], results["rule"]) == (2, RULE)
    assert results["metric"] == {"name": "nats_per_token", "label": "nats per token", "better": "lower"}
    assert [row["name"] for row in results["comparisons"]][:3] == [
        "true minus random",
        "true minus static",
        "true minus none",
    ]


def null_scores(trial: int, users: int = 40) -> pl.DataFrame:
    """Arms that nothing tells apart: each user likes each arm more or less, by chance and by the same law."""
    rng = np.random.default_rng([20, trial])
    who = np.repeat(np.arange(users), rng.integers(2, 12, users))
    level = rng.normal(3, 1, users)[who] + rng.normal(0, 0.3, len(who))
    names = (*PERSONAL, "shuffled")
    arms = {arm: level + rng.normal(0, 0.3, users)[who] + rng.normal(0, 0.3, len(who)) for arm in names}
    return pl.DataFrame({"example_id": [f"{i:04}" for i in range(len(who))], "user_id": [f"u{u}" for u in who], **arms})


def test_false_positives_are_five_in_a_hundred() -> None:
    """200 null experiments: the test by users keeps its level, and Holm's that of the whole family.

    The paper's t-test over examples takes what one user likes for many independent findings."""
    found = [audit([scored(long(null_scores(trial), "nats_per_token"))], resamples=100) for trial in range(200)]
    headline = [results["comparisons"][0] for results in found]
    assert {row["name"] for row in headline} == {"true minus random"}
    low, high = stats.binom.ppf([0.005, 0.995], 200, 0.05)
    assert low <= sum(row["p_clustered"] < 0.05 for row in headline) <= high
    assert sum(row["p_ttest"] < 0.05 for row in headline) > 3 * high
    family = [min(row["p_holm"] for row in results["comparisons"]) for results in found]
    assert sum(p < 0.05 for p in family) <= high
    heads = [results["verdict"].split(":")[0] for results in found]
    assert heads.count("no effect") >= 200 - high
    assert heads.count("personalised") <= 1


def test_scores_in_which_higher_is_better() -> None:
    hits = {"none": 0.2, "static": 0.3, "random": 0.3, "e2p": 0.5}
    results = audit([scored(simulated(hits, metric="hit_rate@10"))], resamples=200)
    assert results["metric"] == {"name": "hit_rate@10", "label": "HitRate@10", "better": "higher"}
    first = results["comparisons"][0]
    assert (first["name"], first["verdict"]) == ("true minus random", "better")
    assert first["difference"] == pytest.approx(0.2, abs=0.02)
    assert first["ci"][0] > 0
    assert results["verdict"].startswith("personalised")
    assert results["arms"]["e2p"]["hit_rate@10"] == pytest.approx(0.5, abs=0.15)
    assert "perplexity" not in results["arms"]["e2p"]
    worse = audit([scored(simulated(hits | {"e2p": 0.1}, metric="hit_rate@10"))], resamples=200)
    assert worse["verdict"] == "harmful: worse than no prefix"


def test_an_unknown_metric_needs_its_direction() -> None:
    scores = simulated(PERSONAL, metric="dwell_time")
    with pytest.raises(DataError, match=r"lower or a higher dwell_time better\?.*--better\.dwell_time higher"):
        audit([scored(scores)])
    assert audit([scored(scores)], {"dwell_time": "lower"}, 200)["verdict"].startswith("personalised")
    assert audit([scored(scores)], {"dwell_time": "higher"}, 200)["verdict"].startswith("harmful")


def test_the_first_metric_makes_the_verdict_and_the_others_are_listed() -> None:
    nats = likelihoods(simulated(PERSONAL))
    rouge = simulated({"none": 0.5, "random": 0.5, "e2p": 0.2}, metric="rougeL").filter(pl.col("example_id") < "x030")
    results = audit([scored(pl.concat([rouge, nats]))], resamples=200)
    assert results["metric"]["name"] == "nats_per_token"
    assert results["verdict"].startswith("personalised")
    (other,) = results["other_metrics"]
    assert other["metric"] == {"name": "rougeL", "label": "ROUGE-L", "better": "higher"}
    assert {arm: figures["examples"] for arm, figures in other["arms"].items()} == dict.fromkeys(
        ("none", "random", "e2p"), 30
    )
    assert [row["verdict"] for row in other["comparisons"]] == ["worse", "worse"]
    alone = compare(per_example(rouge, "rougeL"), 200, 42, "rougeL", "higher")
    assert [row["p_holm"] for row in other["comparisons"]] == [c.p_holm for c in alone]  # a family of its own


def test_seeds_are_judged_together() -> None:
    seeds = [simulated(PERSONAL | {"e2p": mean}, seed) for seed, mean in enumerate((3.3, 3.2, 3.0))]
    results = audit([scored(s, 42 + n, f"r{n}") for n, s in enumerate(seeds)], resamples=300)
    assert (results["run"], results["runs"], results["seed"], results["seeds"]) == (
        "r0",
        ["r0", "r1", "r2"],
        42,
        [42, 43, 44],
    )
    row = results["comparisons"][0]
    tables = [s.pivot(on="arm", index=["example_id", "user_id"], values="value") for s in seeds]
    by_example = np.mean([(t["e2p"] - t["random"]).to_numpy() for t in tables], axis=0)
    assert row["difference"] == pytest.approx(by_example.mean())
    assert row["by_seed"] == pytest.approx([(t["e2p"] - t["random"]).mean() for t in tables])
    assert row["seed_std"] == pytest.approx(np.std(row["by_seed"], ddof=1))
    assert row["p_clustered"] == pytest.approx(clustered_t(by_example, tables[0]["user_id"].to_numpy()).p)
    assert (row["examples"], row["users"]) == (90, 30)
    one = audit([scored(seeds[0])], resamples=300)["comparisons"][0]
    assert (one["by_seed"], one["seed_std"]) == ((one["difference"],), 0)


def test_seeds_that_disagree_are_named_in_the_verdict() -> None:
    seeds = [simulated(PERSONAL | {"e2p": mean}, seed) for seed, mean in enumerate((3.55, 3.0))]
    line = audit([scored(s, n) for n, s in enumerate(seeds)], resamples=200)["verdict"]
    assert line.startswith("personalised")
    assert line.endswith("the seeds disagree in sign on true minus random and true minus static")


def test_a_leak_that_was_let_pass_makes_the_run_invalid() -> None:
    def check(fired: bool) -> dict[str, Any]:
        return {"name": "Test users in training", "fired": fired, "found": "3 of 9", "examples": []}

    clean = audit([scored(simulated(PERSONAL), leaks=[check(False)])], resamples=200)
    leaky = audit([scored(simulated(PERSONAL), leaks=[check(False), check(True)])], resamples=200)
    assert (clean["valid"], leaky["valid"]) == (True, False)
    assert leaky["verdict"] == f"not valid: Test users in training (allowed); otherwise {clean['verdict']}"
    assert [one["fired"] for one in leaky["leaks"]] == [False, True]
    unknown = audit([scored(simulated(PERSONAL))], resamples=200)
    assert (unknown["valid"], unknown["leaks"]) == (None, None)
    assert unknown["warnings"] == ["Leaks were not looked for: that takes the tables of a run."]


def settings(**changes: Any) -> dict[str, Any]:
    config = to_dict(RunConfig())
    for name, value in changes.items():
        part, _, key = name.partition("__")
        config[part] = config[part] | {key: value} if key else value
    return config


def test_runs_that_differ_in_their_seed_alone_are_one_experiment() -> None:
    scores = simulated(PERSONAL)
    tables = {"examples": "a", "split": "b", "vectors": "c"}
    runs = [
        scored(scores, 1, "one", config=settings(training__seed=1, output="x", data__examples="here"), inputs=tables),
        scored(scores, 1, "late", config=settings(training__seed=1, projector__position="after_bos"), inputs=tables),
        scored(scores, 2, "two", config=settings(training__seed=2, output="y", data__examples="there"), inputs=tables),
        scored(scores, 2, "other", config=settings(training__seed=2), inputs=tables | {"vectors": "d"}),
        scored(scores, None, "mine"),
    ]
    groups = experiments(runs)
    assert [[run.name for run in group] for group in groups] == [["one", "two"], ["late"], ["other"], ["mine"]]
    assert differing(groups[:3]) == [
        {"projector.position": "before_completion", "table of vectors": "c"},
        {"projector.position": "after_bos", "table of vectors": "c"},
        {"projector.position": "before_completion", "table of vectors": "d"},
    ]
    assert audit([runs[0], runs[2]], resamples=200)["seeds"] == [1, 2]
    with pytest.raises(DataError, match=r"'one' and 'late' are two experiments: they differ in projector\.position$"):
        audit(runs[:2])
    with pytest.raises(DataError, match="'one' and 'other' are two experiments: they differ in table of vectors"):
        audit([runs[0], runs[3]])
    with pytest.raises(DataError, match="'one' and 'again' are one experiment with the same training seed, 1"):
        audit([runs[0], scored(scores, 1, "again", config=runs[0].about["config"], inputs=tables)])
    with pytest.raises(DataError, match="at least one run"):
        audit([])


def test_the_bootstrap_is_that_of_the_runs_settings() -> None:
    scores, config = simulated(PERSONAL), settings(evaluation__resamples=150, evaluation__seed=7)
    own = audit([scored(scores, config=config)])["comparisons"]
    assert own == audit([scored(scores)], resamples=150, seed=7)["comparisons"]
    assert own[0]["ci"] != audit([scored(scores)], resamples=150, seed=8)["comparisons"][0]["ci"]


def test_what_the_seeds_warn_of_is_told_once() -> None:
    runs = [
        scored(simulated(PERSONAL), seed, leaks=[], warnings=warnings)
        for seed, warnings in ((1, ["No null arm."]), (2, ["No null arm.", "Worse than no prefix."]))
    ]
    assert audit(runs, resamples=200)["warnings"] == ["No null arm.", "Seed 2: Worse than no prefix."]


def test_scores_from_anywhere_are_read(tmp_path: Path) -> None:
    """Whole numbers for ids, a seed per row, covariates of one's own."""
    scores = pl.concat([simulated(PERSONAL, seed).with_columns(seed=pl.lit(seed)) for seed in (7, 8)])
    number = pl.col("example_id").str.slice(1).cast(pl.Int64)
    scores.with_columns(example_id=number, value=pl.col("value").cast(pl.Float32)).write_parquet(
        tmp_path / "scores.parquet"
    )
    activity = pl.DataFrame({"example_id": range(90), "activity": [1, 2, 3] * 30})
    activity.write_parquet(tmp_path / "covariates.parquet")
    found = load_scored(tmp_path)
    assert [(one.name, one.seed) for one in found] == [(tmp_path.name, 7), (tmp_path.name, 8)]
    results = audit(found, resamples=200)
    assert results["seeds"] == [7, 8]
    assert results["verdict"].startswith("personalised")
    assert [(part["by"], [b["label"] for b in part["bins"]]) for part in results["breakdowns"]] == [
        ("activity", ["1", "2", "3"])
    ]
    assert json.loads(json.dumps(results, allow_nan=False))["config"] == {}


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (
            None,
            RunError,
            r"scores\.parquet: not found; expected per-example scores with the columns example_id, user_id",
        ),
        (simulated(PERSONAL).drop("arm", "value"), DataError, "missing: arm, value"),
        (simulated(PERSONAL).with_columns(value=pl.lit("much")), DataError, "expected texts and numbers"),
        (simulated(PERSONAL).with_columns(user_id=pl.lit(None)), DataError, "user_id: expected a text in every row"),
        *(
            (simulated(PERSONAL).with_columns(seed=seed), DataError, "seed: expected a whole number in every row")
            for seed in (
                pl.lit("first"),
                pl.lit(1.5),
                pl.when(pl.col("example_id") != "x003").then(1),
                pl.lit(None),
            )
        ),
    ],
)
def test_unfit_files_are_named(
    scores: pl.DataFrame | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if scores is not None:
        scores.write_parquet(tmp_path / "scores.parquet")
    with pytest.raises(error, match=message) as caught:
        load_scored(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_seed_may_be_written_in_any_way(tmp_path: Path) -> None:
    for seed in (pl.lit("7"), pl.lit(7.0), pl.lit(7, pl.UInt8)):
        simulated(PERSONAL).with_columns(seed=seed).write_parquet(tmp_path / "scores.parquet")
        assert [one.seed for one in load_scored(tmp_path)] == [7]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"activity": ["low", "high", "high"] * 30}, "activity: expected numbers, got String"),
        (
            {"activity": range(90), "example_id": ["x000"] * 2 + [f"x{i:03}" for i in range(2, 90)]},
            "'x000' stands there",
        ),
    ],
)
def test_unfit_covariates_are_named(column: dict[str, Any], message: str, tmp_path: Path) -> None:
    simulated(PERSONAL).write_parquet(tmp_path / "scores.parquet")
    covariates = pl.DataFrame({"example_id": [f"x{i:03}" for i in range(90)]} | column)
    covariates.write_parquet(tmp_path / "covariates.parquet")
    with pytest.raises(DataError, match=rf"covariates\.parquet: .*{message}"):
        load_scored(tmp_path)


def test_scores_from_two_folders_of_one_name_are_two_experiments(tmp_path: Path) -> None:
    for place, seed in (("a", 1), ("b", 2)):
        (tmp_path / place / "mine").mkdir(parents=True)
        both = [simulated(PERSONAL).with_columns(seed=pl.lit(seed + more)) for more in (0, 10)]
        pl.concat(both).write_parquet(tmp_path / place / "mine" / "scores.parquet")
    found = [*load_scored(tmp_path / "a" / "mine"), *load_scored(tmp_path / "b" / "mine")]
    assert {one.name for one in found} == {"mine"}
    assert [[one.seed for one in group] for group in experiments(found)] == [[1, 11], [2, 12]]


def test_the_audit_loads_no_model() -> None:
    code = "import sys, e2p.evaluation.evaluate; print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
