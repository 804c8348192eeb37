"""The demo with tiny sizes from simulation to report, and the share of the possible gain by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from e2p.cli import main
from e2p.config import BackboneConfig, DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from e2p.errors import RunError
from e2p.tasks import demo as demo_module
from e2p.tasks.demo import reached_share, run_demo
from e2p.tasks.pretrain import PretrainConfig
from e2p.tasks.simulate import SimulationConfig

WORLD = SimulationConfig(users=60, artists=40, tags=4, weeks=4, dimension=16, queries_per_user=2)
BACKBONE = PretrainConfig(documents=300, vocabulary=600, layers=1, width=32, heads=2)


def tiny_settings(cache: Path) -> RunConfig:
    return RunConfig(
        backbone=BackboneConfig(device="cpu"),
        data=DataConfig(max_completion_tokens=64, cache_dir=str(cache)),
        training=TrainingConfig(epochs=1, batch_size=16, learning_rate=1e-2, evals_per_epoch=1),
        evaluation=EvaluationConfig(resamples=100, max_new_tokens=6),
    )


@pytest.mark.slow
def test_the_demo_runs_from_simulation_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = tmp_path / "demo", tiny_settings(tmp_path / "cache")
    results = run_demo(folder, WORLD, BACKBONE, settings)
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert len(results["arms"]) == 8
    assert set(results["extra"]) == {
        "possible gain (simulator's own likelihood)",
        "gain of E2P over a static token",
    }
    (sample,) = results["samples"]
    assert [answer["arm"] for answer in sample["answers"]] == ["none", "e2p", "e2p", "e2p"]
    assert len({answer["user_id"] for answer in sample["answers"]}) == 4
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "possible gain" in page
    said = capsys.readouterr().out
    assert re.search(r"report: .*took \d+ s", said.replace("\n", ""))

    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="expected a new run folder, found one"):
        run_demo(folder, replace(WORLD, seed=7), BACKBONE, settings)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before  # the tables too


def test_the_demo_overwrites_no_folder_that_only_bears_its_tables_name(tmp_path: Path) -> None:
    tables = tmp_path / "mine-data"
    tables.mkdir()
    for name, overwrite in [("examples.parquet", False), ("thesis.tex", True)]:
        (tables / name).write_text("precious", encoding="utf-8")
        with pytest.raises(RunError, match="mine-data: expected no such folder"):
            run_demo(tmp_path / "mine", WORLD, BACKBONE, tiny_settings(tmp_path / "cache"), overwrite)
        assert (tables / name).read_text(encoding="utf-8") == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine-data"]
    assert demo_module._free(tmp_path / "mine").name == "mine-2"


@dataclass
class Known:
    """A world of three examples whose likelihoods are known."""

    examples: pl.DataFrame
    oracle_nll: list[float]
    popular_nll: list[float]


def scores(arms: dict[str, list[float]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"example_id": name, "user_id": name, "arm": arm, "metric": "nll", "value": value}
            for arm, values in arms.items()
            for name, value in zip(("b", "c"), values, strict=True)
        ]
    )


def test_the_reached_share_by_hand() -> None:
    """Test examples b and c: possible (6-4 + 10-6)/2 = 3 nats; won (7-6 + 9-8.5)/2 = 0.75 nats, a quarter."""
    world: Any = Known(pl.DataFrame({"example_id": ["a", "b", "c"]}), [1.0, 4.0, 6.0], [90.0, 6.0, 10.0])
    found = reached_share(world, scores({"static": [7.0, 9.0], "e2p": [6.0, 8.5]}))
    assert found == {
        "possible gain (simulator's own likelihood)": "3.00 nats per playlist",
        "gain of E2P over a static token": "0.75 nats per playlist, 25% of what is possible",
    }
    assert reached_share(world, scores({"none": [7.0, 9.0], "e2p": [6.0, 8.5]})) == {}


def test_the_command_takes_the_first_free_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo_module, "run_demo", lambda *given: seen.append(given))
    assert main(["demo"]) == 0
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo-2").mkdir()
    assert main(["demo", "--seed", "7"]) == 0
    assert main(["demo", "--output", "mine", "--overwrite"]) == 0
    assert [str(given[0]) for given in seen] == ["runs/demo", "runs/demo-3", "mine"]
    assert [given[1].seed for given in seen] == [42, 7, 42]
    assert [given[3].training.seed for given in seen] == [42, 7, 42]
    assert [given[4] for given in seen] == [False, False, True]
