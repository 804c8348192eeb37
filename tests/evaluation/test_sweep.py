"""`e2p sweep`: which points there are, that finished ones are not run again, and what the tables say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from e2p.cli import main
from e2p.config import RunConfig
from e2p.config_io import to_dict
from e2p.errors import ConfigError
from e2p.evaluation import sweep as room
from e2p.evaluation.sweep import SweepConfig, changed_settings, load_sweep, points, run_sweep
from e2p.evaluation.sweep_tables import Entry, _row, table
from e2p.training.inputs import deal
from tiny_run import inputs_of, tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_run(tmp_path_factory.mktemp("sweep"), max_steps=4)


def config_of(base: RunConfig, folder: Path, **values: Any) -> SweepConfig:
    return SweepConfig(replace(base, output=str(folder)), output=str(folder), **values)


def test_one_setting_at_a_time_then_variants_then_every_combination(base: RunConfig, tmp_path: Path) -> None:
    config = config_of(
        base,
        tmp_path,
        vary={"projector.hidden_dim": [4, 8], "training.learning_rate": [0.1]},
        variants={"both": {"projector.hidden_dim": 4, "training.learning_rate": 0.1}},
        grid={"projector.hidden_dim": [4, 8], "projector.prefix_tokens": [1, 2]},
        static=("projector.hidden_dim",),
        seeds=(1, 2),
    )
    found = [(p.key, p.value, p.arm, p.config.training.seed) for p in points(config)]
    assert [entry for entry in found if entry[3] == 1] == [
        ("base", None, "e2p", 1),
        ("base", None, "static", 1),
        ("projector.hidden_dim", 4, "e2p", 1),
        ("projector.hidden_dim", 4, "static", 1),
        ("projector.hidden_dim", 8, "e2p", 1),
        ("projector.hidden_dim", 8, "static", 1),
        ("training.learning_rate", 0.1, "e2p", 1),
        ("variants", "both", "e2p", 1),
        ("grid", "projector.hidden_dim 4, projector.prefix_tokens 1", "e2p", 1),
        ("grid", "projector.hidden_dim 4, projector.prefix_tokens 2", "e2p", 1),
        ("grid", "projector.hidden_dim 8, projector.prefix_tokens 1", "e2p", 1),
        ("grid", "projector.hidden_dim 8, projector.prefix_tokens 2", "e2p", 1),
    ]
    assert len(found) == 24
    by_name = {(p.key, p.value, p.arm, p.config.training.seed): p for p in points(config)}
    both = by_name["variants", "both", "e2p", 1].config
    assert (both.projector.hidden_dim, both.training.learning_rate, both.training.seed) == (4, 0.1, 1)
    # The base's own value, in whatever table, is the base's run; another seed, arm or table content is another run.
    assert base.projector.hidden_dim == 8
    names = {key: point.id("tables") for key, point in by_name.items()}
    assert names["base", None, "e2p", 1] == names["projector.hidden_dim", 8, "e2p", 1]
    assert len(set(names.values())) == 16
    assert by_name["base", None, "e2p", 1].id("other tables") != names["base", None, "e2p", 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector.width": 3}, "projector.width: expected a setting"),
        ({"projector": {"hidden_dim": 3}}, "projector: expected a setting"),
        ({"nowhere.at.all": 3}, "nowhere.at.all: expected a setting"),
        ({"projector.hidden_dim": 0}, "projector.hidden_dim: expected a whole number >= 1"),
        ({"projector.hidden_dim": "wide"}, "hidden_dim"),
        ({"projector.hidden_dim": None}, "projector.hidden_dim: expected a value, got nothing"),
    ],
)
def test_an_unknown_setting_or_a_wrong_value_is_refused(base: RunConfig, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed_settings(base, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a mapping with base"),
        ("vary: {a: [1]}", "expected a mapping with base"),
        ("base: {}\nvery: {}", "unknown key 'very'"),
        ("base: {}\nvary: {projector.hidden_dim: 3}", r"vary.projector.hidden_dim: expected a list of values, got 3"),
        ("base: {}\nvary: {projector.hidden_dim: []}", r"expected a list of values, got \[\]"),
        ("base: {}", "expected something to vary"),
        ("base: {}\nvary: {projector.hidden_dim: [3]}\nseeds: [1, 1]", "expected different whole numbers"),
        ("base: {}\nvary: {projector.hidden_dim: [3]}\nstatic: [projector.norm]", "got 'projector.norm'"),
        ("base: {}\nvary: {projector.hidden_dim: [3, 0]}", "expected a whole number >= 1, got 0"),
        ("base: {projector: {hiden_dim: 3}}\nvary: {projector.norm: [paper]}", "hiden_dim"),
        ("base: nowhere.yaml\nvary: {projector.norm: [paper]}", "nowhere.yaml: cannot be read"),
        ("base: {}\nseeds: 3\nvary: {projector.norm: [paper]}", "seeds: got int"),
        ("base: {", "cannot be read as YAML"),
        ("base: {}\nvary: {evaluation.arms: [[e2p]]}", "evaluation.arms: does not change what a sweep shows"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_sweep(tmp_path / "sweep.yaml")
    assert "sweep.yaml" in str(caught.value)


def test_the_command_runs_what_is_missing_and_writes_tables_and_curves(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    content = {
        "base": to_dict(base),
        "vary": {"projector.hidden_dim": [4, 16], "data.max_prompt_tokens": [64, 2]},
        "static": ["projector.hidden_dim"],
        "output": str(tmp_path / "out"),
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    ran = []
    original = room.run_point
    monkeypatch.setattr(room, "run_point", lambda point, *rest: ran.append(point) or original(point, *rest))
    assert main(["sweep", str(file)]) == 0
    assert [(p.key, p.value, p.arm) for p in ran] == [
        ("base", None, "e2p"),
        ("base", None, "static"),
        ("projector.hidden_dim", 4, "e2p"),
        ("projector.hidden_dim", 4, "static"),
        ("projector.hidden_dim", 16, "e2p"),
        ("projector.hidden_dim", 16, "static"),
        ("data.max_prompt_tokens", 2, "e2p"),  # 64 is the base's; 2 are too few
    ]
    out = tmp_path / "out"
    summary = json.loads((out / "sweep.json").read_text())
    widths = summary["tables"]["projector.hidden_dim"]
    assert [(row["value"], row["base"]) for row in widths] == [(4, False), (8, True), (16, False)]
    assert all(row["true_minus_static"] == pytest.approx(row["prefix"] - row["static"]) for row in widths)
    limits = summary["tables"]["data.max_prompt_tokens"]
    assert [(row["value"], row["base"]) for row in limits] == [(2, False), (64, True)]
    assert limits[1]["prefix"] == widths[1]["prefix"]
    assert limits[0]["prefix"] is None
    assert "expected a prompt of at most 2 tokens" in limits[0]["failed"][0]
    assert (out / "figures").is_dir()
    assert len(pl.read_csv(out / "sweep.csv")) == 5
    text = (out / "sweep.md").read_text()
    assert "failed: " in text
    assert "**8**" in text
    assert not list(out.glob("runs/*/**/checkpoint-*"))[2:]  # only the failed point may have left some

    # Once more: nothing but what failed; then with one value more: that one.
    ran.clear()
    assert main(["sweep", str(file)]) == 0
    assert [p.value for p in ran] == [2]
    content["vary"] = {"projector.hidden_dim": [4, 16, 5]}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    ran.clear()
    run_sweep(load_sweep(file))
    assert [(p.value, p.arm) for p in ran] == [(5, "e2p"), (5, "static")]
    assert "points: " in capsys.readouterr().out


def test_the_figures_are_those_of_validation_examples_taken_one_by_one(base: RunConfig, tmp_path: Path) -> None:
    import torch

    from e2p.model.e2p import E2PModel

    config = config_of(base, tmp_path, vary={"projector.hidden_dim": [8]})
    row = run_sweep(config)["tables"]["projector.hidden_dim"][0]
    backbone, inputs = inputs_of(base)
    (folder,) = (tmp_path / "runs").iterdir()
    model = E2PModel.from_pretrained(folder / "adapter", backbone)
    rows, examples = inputs.rows("validation"), inputs.examples("validation")
    exchanged = deal(inputs, rows, [base.evaluation.seed, 3])
    nats: dict[str, list[float]] = {"own": [], "other": [], "none": []}
    with torch.no_grad():
        for at in rows.tolist():
            one = np.array([at])
            nats["own"].append(-float(model(examples.batch(one)).sum()))
            nats["other"].append(-float(model(examples.batch(one, None, exchanged[one])).sum()))
            nats["none"].append(-float(model(examples.batch(one), use_prefix=False).sum()))
    tokens = inputs.tokens.completion_lengths[rows]
    for name, arm in (("prefix", "own"), ("random", "other"), ("none", "none")):
        assert row[name] == pytest.approx(sum(nats[arm]) / tokens.sum(), abs=1e-4)
    each = (np.array(nats["own"]) - np.array(nats["other"])) / tokens
    assert row["true_minus_random"] == pytest.approx(each.mean(), abs=1e-4)
    assert row["ci"][0] <= row["true_minus_random"] <= row["ci"][1]


def test_an_interrupted_point_is_resumed(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base, tmp_path / "a", vary={"projector.hidden_dim": [8]})
    whole = run_sweep(config)["tables"]["projector.hidden_dim"][0]
    again = config_of(base, tmp_path / "b", vary={"projector.hidden_dim": [8]})
    original = room.train_arm

    def killed(*arguments: Any, **keywords: Any) -> Any:
        original(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "train_arm", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(again)
    (folder,) = (tmp_path / "b" / "runs").iterdir()
    assert list(folder.glob("checkpoints/checkpoint-*"))
    monkeypatch.setattr(room, "train_arm", original)
    row = run_sweep(again)["tables"]["projector.hidden_dim"][0]
    assert row["prefix"] == pytest.approx(whole["prefix"], abs=1e-6)


def test_a_table_leaves_out_columns_that_hold_nothing_and_shortens_paths() -> None:
    row = {"value": "tables/mini|lm.parquet", "base": True, "prefix": 3.0, "random": 3.2, "true_minus_random": -0.2,
           "ci": [-0.3, -0.1], "p": 0.0004, "seeds": 1, "failed": []}  # fmt: skip
    assert table([row]).splitlines() == [
        "| value | nats per token | another user's vector | true minus random | 95% interval | p |",
        "| --- | --- | --- | --- | --- | --- |",
        "| **mini\\|lm** | 3.000 | 3.200 | −0.200 | [−0.300, −0.100] | < 0.001 |",
    ]
    seeds = table([{**row, "static": 3.1, "true_minus_static": -0.1, "seeds": 3}]).splitlines()[2]
    assert seeds == "| **mini\\|lm** | 3.000 | 3.100 | −0.100 | 3.200 | −0.200 | [−0.300, −0.100] | < 0.001 | 3 |"


def test_how_points_are_judged_is_part_of_what_they_are(base: RunConfig, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, vary={"evaluation.seed": [1, 2], "evaluation.resamples": [100, 200]})
    assert len({point.id("") for point in points(config)}) == 4  # 100 resamples are the base's
    moved = config_of(base, tmp_path / "elsewhere", vary=config.vary)
    assert {point.id("") for point in points(moved)} == {point.id("") for point in points(config)}


def test_a_moved_sweep_goes_on_with_an_interrupted_point(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = room.train_arm

    def killed(*arguments: Any, **keywords: Any) -> Any:
        original(*arguments, **keywords)
        for adapter in tmp_path.rglob("adapter"):
            adapter.rename(adapter.with_name("half"))
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "train_arm", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config_of(base, tmp_path / "a", vary={"projector.hidden_dim": [8]}))
    monkeypatch.setattr(room, "train_arm", original)
    (tmp_path / "a").rename(tmp_path / "b")
    (row,) = run_sweep(config_of(base, tmp_path / "b", vary={"projector.hidden_dim": [8]}))["tables"][
        "projector.hidden_dim"
    ]
    assert not row["failed"]


def test_what_is_trained_but_not_judged_is_not_trained_again(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(base, tmp_path, vary={"projector.hidden_dim": [8]})
    original, trained = room.train_arm, []
    monkeypatch.setattr(room, "train_arm", lambda *a, **k: trained.append(a) or original(*a, **k))
    judged = room.example_nats

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(room, "example_nats", out_of_memory)
    (row,) = run_sweep(config)["tables"]["projector.hidden_dim"]
    assert row["failed"] == ["out of memory"]
    monkeypatch.setattr(room, "example_nats", judged)
    (row,) = run_sweep(config)["tables"]["projector.hidden_dim"]
    assert row["prefix"] is not None
    assert len(trained) == 1
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_one_validation_user_is_refused_before_the_training(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "train_arm", lambda *_: pytest.fail("was trained"))
    frame = pl.read_parquet(base.data.examples)
    few = frame.filter((pl.col("split") != "validation") | (pl.col("user_id") == "u12"))
    few.write_parquet(tmp_path / "few.parquet")
    one = replace(base, data=replace(base.data, examples=str(tmp_path / "few.parquet")))
    (row,) = run_sweep(config_of(one, tmp_path / "out", vary={"projector.hidden_dim": [8]}))["tables"][
        "projector.hidden_dim"
    ]
    assert "the validation part: expected at least two users, got 1" in row["failed"][0]


def test_a_line_that_a_kill_has_cut_short_swallows_nothing(base: RunConfig, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, vary={"projector.hidden_dim": [8, 4]})
    run_sweep(config)
    log = tmp_path / room.POINTS
    whole = log.read_text()
    log.write_text(whole[:-40])
    run_sweep(config)
    assert len(room._finished(log)) == 2


def test_true_minus_static_is_of_the_seeds_that_both_have() -> None:
    def entry(arm: str, seed: int, prefix: float | None) -> Entry:
        user = {"random": 3.5, "true_minus_random": -0.5, "ci": [-1.0, 0.0], "p": 0.5, "none": 4.0, "seconds": 1.0,
                "parameters": 1, "steps": 1, "examples": {"train": 1}}  # fmt: skip
        result = {"failed": "no"} if prefix is None else {"prefix": prefix, **user}
        return Entry("projector.hidden_dim", 8, arm, seed, result)

    row = _row(8, [entry("e2p", 1, 3.0), entry("e2p", 2, 2.0), entry("static", 1, 3.0), entry("static", 2, None)])
    assert row["true_minus_static"] == 0
    assert row["prefix"] == 2.5


SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in SHIPPED if not file.name.startswith("base_")], ids=lambda f: f.stem)
def test_the_shipped_sweeps_are_sweeps(file: Path) -> None:
    config = load_sweep(file)
    found = list(points(config))
    assert {point.key for point in found} == {"base", *config.vary, *(["variants"] if config.variants else [])}
    assert len({point.id("") for point in found}) > 8


@pytest.mark.real_data
@pytest.mark.slow
def test_a_shipped_sweep_runs_on_the_real_tables(tmp_path: Path, shared: Path) -> None:
    """In miniature: two steps a point, three of the points, some of the listeners."""
    from e2p.tasks import music

    tables = music.prepare(str(shared / "data" / "lastfm_2k"), str(tmp_path / "tables"))
    pl.read_parquet(tables / "examples.parquet").head(1500).write_parquet(tmp_path / "some.parquet")
    config = load_sweep(SHIPPED[0].with_name("objectives_lastfm.yaml"))
    base = changed_settings(
        config.base,
        {
            "backbone.model": str(shared / "backbone"),
            "data.examples": str(tmp_path / "some.parquet"),
            "data.embeddings": str(tmp_path / "tables" / "embeddings.parquet"),
            "data.cache_dir": str(tmp_path / "cache"),
            "training.max_steps": 2,
            "projector.hidden_dim": 32,
        },
    )
    some = {name: config.variants[name] for name in ("contrast 0.3", "distill 0.3", "static + user")}
    rows = run_sweep(replace(config, base=base, variants=some, output=str(tmp_path / "out")))["tables"]["variants"]
    assert [row["value"] for row in rows] == ["base", *some]
    assert all(0 < row["prefix"] < 6 and not row["failed"] for row in rows)
    assert len({row["prefix"] for row in rows}) == 4
