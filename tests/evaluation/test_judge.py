"""A run in miniature scored and judged: what is written, recomputed from the backbone alone, and what is not redone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from e2p.config import MODEL_ARMS, EvaluationConfig, RunConfig
from e2p.config_io import to_dict
from e2p.data.tables import write_embeddings
from e2p.errors import DataError, RunError
from e2p.evaluation.audit import audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.evaluation.judge import judge
from e2p.evaluation.report import load_results
from e2p.training.run import train
from tiny_run import WORDS, examples_frame, inputs_of, tiny_run, write_tables


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any], Path]:
    config = tiny_run(tmp_path_factory.mktemp("audit"), epochs=4)
    train(config)
    return config, judge(config.output), Path(config.output)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of two steps that only one control is asked for."""
    config = tiny_run(tmp_path, max_steps=2)
    return replace(config, evaluation=EvaluationConfig(("none", "static", "e2p"), 100, 1, 4))


def test_scores_are_one_row_per_example_arm_and_metric(judged: tuple[RunConfig, dict[str, Any], Path]) -> None:
    _, _, folder = judged
    scores = pl.read_parquet(folder / "scores.parquet")
    assert dict(scores.schema) == {
        "example_id": pl.String,
        "user_id": pl.String,
        "arm": pl.String,
        "metric": pl.String,
        "value": pl.Float64,
    }
    assert scores.height == 8 * len(MODEL_ARMS) * 4
    assert not scores.select("example_id", "arm", "metric").is_duplicated().any()
    assert set(scores["metric"]) == {"nll", "tokens", "bytes", "context_tokens"}
    assert set(scores["user_id"]) == {"u16", "u17", "u18", "u19"}


def test_perplexity_is_what_transformers_own_loss_gives(judged: tuple[RunConfig, dict[str, Any], Path]) -> None:
    """The bare arm: the causal LM's own loss with the prompt's labels at -100, weighted by tokens."""
    config, results, _ = judged
    backbone, inputs = inputs_of(config)
    nats = tokens = 0.0
    for row in inputs.rows("test").tolist():
        item = inputs.tokens[row]
        ids = torch.tensor([[*item.prompt.tolist(), *item.completion.tolist()]])
        labels = ids.clone()
        labels[:, : len(item.prompt)] = -100
        with torch.no_grad():
            loss = float(backbone.model(ids, labels=labels).loss)
        nats, tokens = nats + loss * len(item.completion), tokens + len(item.completion)
    assert results["arms"]["none"]["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-4)
    assert results["arms"]["none"]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_results_hold_what_the_report_needs(judged: tuple[RunConfig, dict[str, Any], Path]) -> None:
    config, results, folder = judged
    assert load_results(folder) == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(results)) == load_results(folder)
    assert (results["format"], results["run"], results["task"], results["seed"]) == (2, "run", "tables", 42)
    assert results["config"] == to_dict(config)
    assert list(results["arms"]) == list(MODEL_ARMS)
    assert set(results["training"]) == {"e2p", "static", "shuffled"}
    assert results["training"]["e2p"]["steps"] == results["training"]["static"]["steps"]  # the same budget
    assert results["data"]["test"] == 8
    names = [row["name"] for row in results["comparisons"]]
    assert {"true minus random", "true minus static", "true minus shuffled", "true minus none"} <= set(names)
    assert results["warnings"] == []
    (sample,) = results["samples"]
    assert [answer["arm"] for answer in sample["answers"]] == ["none", "e2p", "e2p"]
    assert all(answer["profile"].startswith("likes ") for answer in sample["answers"][1:])


def test_what_the_breakdowns_and_a_later_audit_need_is_written(judged: tuple[RunConfig, dict[str, Any], Path]) -> None:
    config, results, folder = judged
    by = pl.read_parquet(folder / "covariates.parquet")
    assert by.columns == ["example_id", "user_id", "activity", "distance", "tokens"]
    assert set(by["example_id"]) == set(pl.read_parquet(folder / "scores.parquet")["example_id"])
    (again,) = load_scored(folder)
    assert (again.name, again.seed) == ("run", 42)
    assert audit([again]) == results
    assert again.about["inputs"] == inputs_of(config)[1].identity()
    assert results["prefix"]["user_share"] > 0
    assert [check["fired"] for check in results["leaks"]] == [False] * len(results["leaks"])
    assert results["leaks"]
    assert results["valid"] is True


def test_a_difference_of_arms_is_the_mean_of_the_differences(judged: tuple[RunConfig, dict[str, Any], Path]) -> None:
    _, results, folder = judged
    scores = pl.read_parquet(folder / "scores.parquet")
    wide = scores.filter(pl.col("metric") == "nll").pivot(on="arm", index="example_id", values="value")
    tokens = scores.filter((pl.col("metric") == "tokens") & (pl.col("arm") == "e2p"))
    joined = wide.join(tokens.select("example_id", "value"), on="example_id")
    by_hand = ((joined["e2p"] - joined["random"]) / joined["value"]).mean()
    row = next(row for row in results["comparisons"] if row["name"] == "true minus random")
    assert row["difference"] == pytest.approx(by_hand, abs=1e-9)


def test_controls_are_trained_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config)
    first = judge(config.output)
    stamp = Path(config.output, "controls", "static", "adapter", "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("e2p.evaluation.judge.train_arm", None)  # would be called to train
    second = judge(config.output)
    assert Path(config.output, "controls", "static", "adapter", "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert not Path(config.output, "controls", "shuffled").exists()
    assert first["arms"] == second["arms"]
    assert first["comparisons"] == second["comparisons"]


def test_an_interrupted_control_goes_on(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from e2p.model.e2p import E2PModel

    train(config)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(E2PModel, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            judge(config.output)
    results = judge(config.output)
    assert results["training"]["static"]["steps"] == 2


@pytest.mark.parametrize("how", ["no column", "one without"])
def test_without_profiles_the_prompt_arms_are_left_out(config: RunConfig, how: str) -> None:
    frame = examples_frame(profile=how != "no column")
    if how == "one without":
        frame = frame.with_columns(profile=pl.when(pl.col("example_id") != "e3-1").then("profile"))
    frame.write_parquet(config.data.examples)
    config = replace(config, evaluation=EvaluationConfig(("none", "prompt", "e2p", "e2p+prompt"), 100, 0, 4))
    train(config)
    results = judge(config.output)
    assert list(results["arms"]) == ["none", "e2p"]
    assert results["warnings"][0].startswith("The arms prompt and e2p+prompt are left out")
    assert results["samples"] == []


def test_a_useless_adapter_is_said_loudly(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    path = Path(config.output, "training.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    record["validation"] = {"prefix": 9.0, "none": 8.0}
    path.write_text(json.dumps(record), encoding="utf-8")
    capsys.readouterr()
    evaluate([config.output])
    captured = capsys.readouterr()
    assert "THE PREFIX IS WORSE THAN NO PREFIX" in captured.err
    assert load_results(Path(config.output))["warnings"][0].endswith("Do not serve this adapter.")
    assert "worse than no prefix" in Path(config.output, "report.html").read_text(encoding="utf-8")
    assert "true minus static" in captured.out


def test_vectors_of_another_version_are_refused(config: RunConfig) -> None:
    train(config)
    table = pl.read_parquet(config.data.embeddings)
    write_embeddings(config.data.embeddings, table["user_id"], table["embedding"].to_numpy(), version="v2")
    with pytest.raises(DataError, match="expected vectors of version v1, which the adapter was trained with, got v2"):
        judge(config.output)


def test_a_folder_without_a_finished_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a run with config\.yaml and adapter/.*run e2p train first"):
        judge(tmp_path)


def test_a_lost_record_is_one_clear_error(config: RunConfig) -> None:
    train(config)
    Path(config.output, "training.json").unlink()
    with pytest.raises(RunError, match=r"training\.json: expected the record of a training"):
        judge(config.output, Console(quiet=True))


def test_the_tables_of_the_fixture_are_what_they_say(tmp_path: Path) -> None:
    """The tests above rely on it: one user one part, test users u16 to u19, one-hot vectors."""
    examples, embeddings = write_tables(tmp_path)
    frame = pl.read_parquet(examples)
    assert frame.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1
    assert frame.filter(pl.col("split") == "test")["user_id"].unique().sort().to_list() == ["u16", "u17", "u18", "u19"]
    assert pl.read_parquet(embeddings)["embedding"].to_numpy().sum(1).tolist() == [1.0] * 20


def test_a_training_user_cannot_become_a_test_user(config: RunConfig) -> None:
    """One user fewer, and the seeded split falls elsewhere."""
    examples = examples_frame().drop("split")
    examples.write_parquet(config.data.examples)
    train(config)
    examples.filter(pl.col("user_id") != "u07").write_parquet(config.data.examples)
    with pytest.raises(RunError, match="expected the tables that it was trained on, got other examples and split and"):
        judge(config.output)
    examples.write_parquet(config.data.examples)
    assert set(judge(config.output)["arms"]) == {"none", "static", "e2p"}


def test_one_test_user_is_refused_before_controls_are_trained(config: RunConfig) -> None:
    examples = examples_frame().with_columns(
        split=pl.when(pl.col("user_id").is_in(["u17", "u18", "u19"])).then(pl.lit("train")).otherwise("split")
    )
    examples.write_parquet(config.data.examples)
    train(config)
    with pytest.raises(DataError, match="expected at least two users, got 1"):
        judge(config.output)
    assert not (Path(config.output) / "controls").exists()


def with_arms(config: RunConfig, *arms: str, **changes: Any) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, arms=arms, **changes))


def test_a_profile_too_long_for_the_window_costs_the_prompt_arms_alone(config: RunConfig) -> None:
    examples = examples_frame().with_columns(profile=pl.lit("likes jazz " * 40))
    examples.write_parquet(config.data.examples)
    train(with_arms(config, "none", "prompt", "e2p"))
    results = judge(config.output)
    assert set(results["arms"]) == {"none", "e2p"}
    assert "prompt and e2p+prompt are left out" in results["warnings"][0]
    assert "expected a prompt of at most 64 tokens" in results["warnings"][0]


def test_turns_that_a_profile_pushes_out_are_counted(config: RunConfig) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": "make a playlist for the train home"} for n in range(3)]
    frame = examples_frame().drop("prompt").with_columns(messages=pl.Series([turns] * 40))
    frame.write_parquet(config.data.examples)
    config = with_arms(config, "none", "prompt", "e2p")
    size = len(inputs_of(config)[1].tokens[0].prompt)
    train(replace(config, data=replace(config.data, max_prompt_tokens=size, long_prompt="truncate")))
    results = judge(config.output)
    assert any("8 of 8 prompts lost older turns" in warning for warning in results["warnings"])
    assert results["arms"]["prompt"]["context_tokens"] > 0


def test_an_untrained_null_user_is_not_judged(config: RunConfig) -> None:
    config = replace(with_arms(config, "none", "null", "e2p"), projector=replace(config.projector, null_prob=0.0))
    train(config)
    results = judge(config.output)
    assert set(results["arms"]) == {"none", "e2p"}
    assert "null user has not been trained" in results["warnings"][0]


def test_a_leak_stops_the_judging_before_controls_are_trained(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user with examples in training and in test, whose split is by his group of one example."""
    torn = pl.when(pl.col("example_id") == "e0-1").then(pl.lit("test")).otherwise("split")
    examples_frame().with_columns(split=torn, group="example_id").write_parquet(config.data.examples)
    train(config)
    with pytest.raises(DataError, match=r"run: Test users in training: 1 of 5 .*pass --allow_leaks to go on;"):
        judge(config.output)
    assert not (Path(config.output) / "controls").exists()
    results = judge(config.output, allow_leaks=True)
    assert results["verdict"].startswith("not valid: Test users in training (allowed); otherwise ")
    assert results["valid"] is False
    assert "u00" in results["leaks"][0]["examples"][0]


def test_sample_answers_fit_in_the_window_and_cost_nothing_if_they_fail(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_arms(config, "none", "e2p", max_new_tokens=500))  # of a window of 192
    assert len(judge(config.output)["samples"][0]["answers"]) == 2

    def fail(*_: Any, **__: Any) -> None:
        raise DataError("no answer")

    def surprise(*_: Any, **__: Any) -> None:
        raise ValueError("Input X contains infinity")

    monkeypatch.setattr("e2p.model.e2p.E2PModel.generate", fail)
    monkeypatch.setattr("e2p.evaluation.judge.describe_space", surprise)
    results = judge(config.output)
    assert results["samples"] == []
    assert results["warnings"] == [
        "No sample answers: no answer",
        "No map of the users: Input X contains infinity",
    ]
    assert load_results(Path(config.output))["arms"] == results["arms"]


def test_a_setting_names_the_column_that_colours_the_map(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, users=60, max_steps=2)
    evaluation = EvaluationConfig(("none", "static", "random", "e2p"), 100, 0, 4, attribute="completion")
    config = replace(config, evaluation=evaluation)
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    write_embeddings(config.data.embeddings, [f"u{u:02d}" for u in range(60)], vectors)
    train(config)
    found = judge(config.output)["space"]
    assert found["coloured_by"] == "completion"
    assert {cluster["name"] for cluster in found["clusters"]} == {f"{word} {word}" for word in WORDS}
