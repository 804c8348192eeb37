"""`e2p evaluate` with several seeds, several runs, and scores from anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.cli import main
from e2p.config import EvaluationConfig, RunConfig
from e2p.config_io import load_yaml, save_yaml, to_dict
from e2p.errors import ConfigError, DataError, RunError
from e2p.evaluation.audit import audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.evaluation.report import load_results, report
from e2p.training.run import train
from tiny_run import tiny_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of two steps that only one control is asked for."""
    config = tiny_run(tmp_path, max_steps=2)
    return replace(config, evaluation=EvaluationConfig(("none", "static", "e2p"), 100, 0, 4))


def nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, nothing may be trained or scored, and no backbone loaded."""
    for name in ("train_arm", "score_arm"):
        monkeypatch.setattr(f"e2p.evaluation.judge.{name}", None)
    monkeypatch.setattr("e2p.model.backbone.FrozenBackbone.load", None)


def test_other_seeds_are_trained_judged_and_put_together(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(config.output)
    train(config)
    evaluate([str(run)], seeds=(43,))
    folders = [run, run / "seeds" / "43"]
    for folder, seed in zip(folders, (42, 43), strict=True):
        assert load_yaml(folder / "config.yaml").training.seed == seed
        assert (folder / "controls" / "static" / "adapter").is_dir()
        assert (folder / "report.html").is_file()
    joint = load_results(run)
    assert (joint["seeds"], joint["runs"]) == ([42, 43], ["run", "run/seeds/43"])
    alone = [audit(load_scored(folder)) for folder in folders]
    assert load_results(folders[1]) == json.loads(json.dumps(alone[1]))
    for index, row in enumerate(joint["comparisons"]):
        each = [results["comparisons"][index]["difference"] for results in alone]
        assert row["by_seed"] == pytest.approx(each)
        assert row["difference"] == pytest.approx(np.mean(each))
    assert len({results["arms"]["e2p"]["perplexity"] for results in alone}) == 2
    gained = [[row["gains"]["over_none"]["e2p"]["gain"] for row in alone], joint["gains"]["over_none"]["e2p"]["gain"]]
    assert gained[1] == pytest.approx(np.mean(gained[0]))
    users = np.mean([results["gains"]["by_user"] for results in alone], axis=0)
    assert joint["gains"]["by_user"] == pytest.approx(users, rel=1e-4, abs=1e-9)
    assert set(pl.read_parquet(run / "scores.parquet").columns) == {"example_id", "user_id", "arm", "metric", "value"}

    nothing_more(monkeypatch)
    before = (run / "results.json").read_bytes()
    (run / "report.html").unlink()
    evaluate([str(run)], seeds=(42, 43))
    assert (run / "results.json").read_bytes() == before
    report(str(run))
    assert "43" in (run / "report.html").read_text(encoding="utf-8")


def test_an_interrupted_seed_goes_on(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from e2p.model.e2p import E2PModel

    run = Path(config.output)
    train(config)
    evaluate([str(run)])
    adapter = run / "adapter" / "adapter_model.safetensors"
    stamp = adapter.stat().st_mtime_ns

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(E2PModel, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate([str(run)], seeds=(43,))
    assert not (run / "seeds" / "43" / "adapter").exists()
    moved = run.with_name("elsewhere")
    run.rename(moved)  # a run may be moved
    evaluate([str(moved)], seeds=(43,))
    assert load_results(moved)["seeds"] == [42, 43]
    assert load_results(moved / "seeds" / "43")["training"]["e2p"]["steps"] == 2
    assert (moved / "adapter" / adapter.name).stat().st_mtime_ns == stamp


def test_a_seed_with_other_settings_is_refused_before_work(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(config.output)
    train(config)
    folder = run / "seeds" / "43"
    folder.mkdir(parents=True)
    other = replace(config.training, seed=43, learning_rate=0.5)
    save_yaml(replace(config, training=other, output=str(folder)), folder / "config.yaml")
    nothing_more(monkeypatch)
    with pytest.raises(RunError, match=r"with another seed, got other training\.learning_rate; delete the folder"):
        evaluate([str(run)], seeds=(44, 43))


def test_how_it_is_judged_may_change(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained again; the seeds are scored anew, with the run's settings."""
    run = Path(config.output)
    train(config)
    evaluate([str(run)], seeds=(43,))
    changed = replace(config, evaluation=replace(config.evaluation, arms=("none", "random", "static", "e2p")))
    save_yaml(changed, run / "config.yaml")
    with monkeypatch.context() as patched:
        patched.setattr("e2p.evaluation.judge.train_arm", None)
        evaluate([str(run)], seeds=(43,))
    for folder in (run, run / "seeds" / "43"):
        assert "random" in load_results(folder)["arms"]
        assert load_yaml(folder / "config.yaml").evaluation == changed.evaluation
    assert load_yaml(run / "seeds" / "43" / "config.yaml").output == str(run / "seeds" / "43")
    assert load_results(run)["seeds"] == [42, 43]
    nothing_more(monkeypatch)
    evaluate([str(run)], seeds=(43,))


def test_scores_of_other_tables_are_not_reported(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, examples = Path(config.output), Path(config.data.examples)
    train(config)
    evaluate([str(run)], seeds=(43,))
    table = examples.read_bytes()
    pl.read_parquet(examples).with_columns(completion=pl.lit("home home")).write_parquet(examples)
    for seeds in ((43,), (43, 44)):
        with pytest.raises(RunError, match="run: expected the tables that it was trained on, got other examples"):
            evaluate([str(run)], seeds=seeds)
    assert not (run / "seeds" / "44").exists()  # nothing is trained in vain
    examples.write_bytes(table)
    nothing_more(monkeypatch)
    evaluate([str(run)], seeds=(43,))
    examples.unlink()  # scores outlive their tables
    evaluate([str(run)], seeds=(43,))


def test_controls_of_other_tables_are_found_before_work(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(config.output)
    train(config)
    evaluate([str(run)], seeds=(43,))
    (run / "seeds" / "43" / "scored.json").unlink()
    hashes = run / "seeds" / "43" / "controls" / "static" / "inputs.json"
    hashes.write_text(hashes.read_text(encoding="utf-8").replace('"examples": "', '"examples": "x'), encoding="utf-8")
    monkeypatch.setattr("e2p.evaluation.judge.train_arm", None)
    with pytest.raises(RunError, match="static: expected the tables that it was trained on, got other examples"):
        evaluate([str(run)], seeds=(44, 43))


def test_leaks_found_earlier_are_still_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from e2p.evaluation.leaks import LeakCheck

    run = Path(config.output)
    train(config)
    fired = LeakCheck("Test users in training", True, "3 of 4 test users", ("user u16: 2",))
    monkeypatch.setattr("e2p.evaluation.judge.check_leaks", lambda *_: [fired])
    with pytest.raises(DataError, match=r"Test users in training: 3 of 4 test users; pass --allow_leaks to go on"):
        evaluate([str(run)], seeds=(43,))
    assert not (run / "controls").exists()
    assert not (run / "seeds").exists()
    evaluate([str(run)], allow_leaks=True)
    results = load_results(run)
    assert results["valid"] is False
    assert results["verdict"].startswith("not valid: Test users in training (allowed); otherwise ")
    assert results["leaks"][0]["examples"] == ["user u16: 2"]
    nothing_more(monkeypatch)
    with pytest.raises(DataError, match="pass --allow_leaks"):
        evaluate([str(run)], seeds=(42,))
    evaluate([str(run)], seeds=(42,), allow_leaks=True)


def folder_of_scores(folder: Path, gain: float, draw: int = 0, metric: str = "hit_rate@10", **about: Any) -> str:
    """Scores of 20 users, where a user's own vector brings so much more than another's; a run's with settings."""
    rng, rows = np.random.default_rng(draw), []
    for user in range(20):
        for n in range(3):
            for arm, mean in {"none": 0.2, "static": 0.3, "random": 0.3, "e2p": 0.3 + gain}.items():
                rows.append((f"{user}.{n}", f"u{user}", arm, metric, mean + rng.normal(0, 0.02)))
    folder.mkdir(parents=True)
    names = ["example_id", "user_id", "arm", "metric", "value"]
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "scores.parquet")
    if about:
        (folder / "scored.json").write_text(json.dumps(about), encoding="utf-8")
    return str(folder)


def test_anyones_scores_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_scores(tmp_path / "theirs", 0.2)
    assert main(["evaluate", folder]) == 0
    said = capsys.readouterr().out
    assert "personalised: better than a random user's vector" in said
    assert "HitRate@10" in said
    results = load_results(Path(folder))
    assert results["comparisons"][0]["difference"] == pytest.approx(0.2, abs=0.02)
    assert "HitRate@10" in Path(folder, "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="--seeds trains a run again, but this folder holds scores alone"):
        evaluate([folder], seeds=(43,))


def test_a_metric_of_ones_own_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_scores(tmp_path / "dwell", 0.2, metric="dwell_time")
    assert main(["evaluate", folder]) == 2
    assert "say so with --better.dwell_time higher" in capsys.readouterr().err
    assert main(["evaluate", folder, "--better.dwell_time", "higher"]) == 0
    assert load_results(Path(folder))["verdict"].startswith("personalised")


def test_runs_are_laid_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds of one experiment, another experiment, and scores of which nothing more is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def about(seed: int, position: str) -> dict[str, Any]:
        config = RunConfig(output=f"runs/{seed}")
        config = replace(config, training=replace(config.training, seed=seed))
        config = replace(config, projector=replace(config.projector, position=position))  # type: ignore[arg-type]
        return {"seed": seed, "config": to_dict(config), "inputs": {"examples": "e"}, "leaks": []}

    folder_of_scores(Path("a/run"), 0.1, 1, **about(1, "after_bos"))
    folder_of_scores(Path("b/run"), 0.3, 2, **about(2, "after_bos"))
    folder_of_scores(Path("late"), 0.0, 3, **about(1, "before_completion"))
    folder_of_scores(Path("mine"), -0.2, 4)
    assert main(["evaluate", "a/run", "b/run", "late", "mine", "--output", "out"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["a/run", "1,", "2", "HitRate@10"] in [line[:4] for line in lines]
    assert "a/run (projector.position after_bos" in out
    assert "audit: out/audit.md" in out
    audited = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))
    runs = [(one["runs"], one["verdict"].split(":")[0]) for one in audited["experiments"]]
    assert runs == [
        (["a/run", "b/run"], "personalised"),
        (["late"], "conditioned but not personalised"),
        (["mine"], "harmful"),
    ]
    assert audited["experiments"][0]["comparisons"][0]["by_seed"] == pytest.approx([0.1, 0.3], abs=0.02)
    assert audited["experiments"][1]["differs"]["projector.position"] == "before_completion"
    page = Path("out/audit.md").read_text(encoding="utf-8")
    assert [line.split()[1] for line in page.splitlines() if line.startswith("## ")] == ["a/run", "late", "mine"]
    assert "| a/run | 1, 2 | HitRate@10 | +0.199 (p \\< 0.001) |" in page
    # Each folder keeps what was found in it alone.
    assert load_results(Path("b/run"))["seeds"] == [2]
    folder_of_scores(Path("c/run"), 0.1, 5, **about(1, "after_bos"))
    with pytest.raises(DataError, match="'a/run' and 'c/run' are one experiment with the same training seed, 1"):
        evaluate(["a/run", "c/run"])


def test_folders_that_bear_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [folder_of_scores(tmp_path / exp / "runs" / "mine", gain) for exp, gain in (("one", 0.2), ("two", -0.2))]
    for seed, folder in enumerate(folders):
        path = Path(folder, "scores.parquet")
        pl.read_parquet(path).with_columns(seed=pl.lit(seed)).write_parquet(path)
    evaluate([*folders, folder_of_scores(tmp_path / "theirs", 0.1)], output=str(tmp_path / "out"))
    audited = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))["experiments"]
    assert [(one["run"], one["verdict"].split(":")[0]) for one in audited] == [
        ("one/runs/mine", "personalised"),
        ("two/runs/mine", "harmful"),
        (f"{tmp_path.name}/theirs", "personalised"),
    ]


def test_a_direction_for_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    folder = folder_of_scores(tmp_path / "mine", 0.2, metric="accuracy")
    with pytest.raises(DataError, match=r"--better\.acuracy: expected a metric of the scores \(accuracy\)"):
        evaluate([folder], better={"acuracy": "lower"})
    assert not Path(folder, "results.json").exists()
    other = folder_of_scores(tmp_path / "theirs", 0.2, metric="dwell_time")
    evaluate([folder, other], better={"dwell_time": "higher"})


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"metric": pl.lit("nats_per_token")}, "nats per token"),
        ({"value": pl.col("value").cast(pl.String)}, "HitRate@10"),
    ],
)
def test_scores_in_other_clothes_get_their_report(change: dict[str, Any], shown: str, tmp_path: Path) -> None:
    path = Path(folder_of_scores(tmp_path / "theirs", 0.2), "scores.parquet")
    pl.read_parquet(path).with_columns(**change).write_parquet(path)
    evaluate([str(path.parent)])
    text = (path.parent / "report.md").read_text(encoding="utf-8")
    assert shown in text
    assert "Gain by user" in text


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ConfigError, "runs: expected at least one folder"),
        (["mine", "./mine"], ConfigError, "expected every folder once"),
        (["mine", "nowhere"], RunError, r"nowhere: expected a run .* or a scores\.parquet, found neither"),
    ],
)
def test_what_is_not_there_is_said_before_work(
    runs: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of_scores(tmp_path / "mine", 0.1)
    with pytest.raises(error, match=message):
        evaluate(runs)
    assert not Path("mine/results.json").exists()
