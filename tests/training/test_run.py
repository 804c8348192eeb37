"""`e2p train` as users run it: killed and resumed, on two processes, refused, diverged, and whether it learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from e2p.cli import main
from e2p.config import ProjectorConfig, RunConfig
from e2p.config_io import load_yaml
from e2p.errors import ConfigError, RunError
from e2p.model.e2p import E2PModel
from e2p.training.run import (
    arm_folder,
    check_folder,
    is_useless,
    prepare_folder,
    train,
    train_arm,
    with_seed,
)
from tiny_run import inputs_of, tiny_run, with_training, write_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def record(config: RunConfig) -> dict[str, Any]:
    return json.loads(Path(config.output, "training.json").read_text(encoding="utf-8"))


def adapter(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output, "adapter", "adapter_model.safetensors"))


def assert_same_run(one: RunConfig, other: RunConfig, tolerance: float) -> None:
    """Same losses step by step and the same weights."""
    a, b = record(one), record(other)
    assert [e["step"] for e in a["history"]] == [e["step"] for e in b["history"]]
    for x, y in zip(a["history"], b["history"], strict=True):
        assert x == pytest.approx(y, abs=tolerance)
    assert a["best_step"] == b["best_step"]
    assert a["validation"] == pytest.approx(b["validation"], abs=tolerance)
    for name, value in adapter(one).items():
        torch.testing.assert_close(value, adapter(other)[name], atol=tolerance, rtol=0)


def run_in(folder: Path, config: RunConfig, name: str) -> RunConfig:
    return replace(config, output=str(folder / name))


# ---------------------------------------------------------------- killed, and on two processes


@pytest.mark.slow
def test_a_killed_run_is_resumed_as_if_nothing_had_happened(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, epochs=30, evals_per_epoch=1)  # three steps an epoch
    whole, killed = run_in(tmp_path, base, "whole"), run_in(tmp_path, base, "killed")
    yaml = write_config(killed, tmp_path / "run.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "e2p.cli", "train", yaml], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    wanted = Path(killed.output, "checkpoints", "checkpoint-12", "trainer_state.json")
    deadline = time.monotonic() + 400  # for a crowded machine
    while not wanted.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path(killed.output, "adapter").exists()
    assert main(["train", yaml]) == 2  # found, and left as it is
    assert main(["train", yaml, "--resume"]) == 0
    train(whole)
    assert_same_run(whole, killed, 0)
    assert len(record(killed)["history"]) == 2 * 90 - 60  # a loss a step, a validation every third


@pytest.mark.slow
@pytest.mark.parametrize("examples", [24, 17], ids=["even steps", "a last step of one example"])
def test_two_processes_train_as_one(tmp_path: Path, examples: int) -> None:
    base = tiny_run(tmp_path, evals_per_epoch=1, tokens_per_pass=60)
    frame = pl.read_parquet(base.data.examples)
    in_train = pl.col("split") == "train"
    frame.filter(~in_train | (in_train.cum_sum() <= examples)).write_parquet(base.data.examples)
    one, two = run_in(tmp_path, base, "one"), run_in(tmp_path, base, "two")
    # The two race for a cache that is not there yet.
    two = replace(two, data=replace(two.data, cache_dir=str(tmp_path / "cold")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "e2p.cli", "train", write_config(two, tmp_path / "two.yaml")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("adapter: ") == 1  # the first process alone speaks
    train(one)
    assert_same_run(one, two, 1e-5)
    assert record(one)["steps"] == 2 * -(-examples // 8)
    if examples == 24:
        return
    again = subprocess.run(
        [*command, "-m", "e2p.cli", "train", str(tmp_path / "two.yaml")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert again.returncode != 0
    assert "expected a new run folder, found one; pass --overwrite" in again.stderr
    assert_same_run(one, two, 1e-5)


# ---------------------------------------------------------------- the run folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path, max_steps=2)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_folder_is_never_overwritten_unasked(config: RunConfig) -> None:
    folder = prepare_folder(config, overwrite=False, resume=False)
    assert load_yaml(folder / "config.yaml") == config
    (folder / "scores.parquet").write_text("x", encoding="utf-8")
    before = tree(folder)
    with pytest.raises(RunError, match="expected a new run folder, found one; pass --overwrite"):
        train(config)
    assert tree(folder) == before
    prepare_folder(config, overwrite=True, resume=False)
    assert set(tree(folder)) == {"config.yaml"}
    assert tree(folder.with_name(f"{folder.name}.replaced")) == before


def test_what_is_no_run_is_not_overwritten_even_if_asked(config: RunConfig) -> None:
    folder = Path(config.output)
    folder.mkdir()
    (folder / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match=r"holds 'thesis\.tex', so it is no run folder"):
        train(config, overwrite=True)
    assert tree(folder) == {"thesis.tex": b"x"}


def test_a_file_in_the_place_of_the_folder_is_left(config: RunConfig) -> None:
    Path(config.output).write_text("x", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(RunError):
            train(config, overwrite=overwrite)
    assert Path(config.output).read_text(encoding="utf-8") == "x"


def test_an_empty_folder_is_taken(config: RunConfig) -> None:
    Path(config.output).mkdir()
    assert check_folder(config, overwrite=False, resume=False) == Path(config.output)
    assert prepare_folder(config, overwrite=False, resume=False).is_dir()


def test_a_folder_that_cannot_be_made_is_one_clear_error(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="cannot be written: Not a directory; name another --output"):
        prepare_folder(replace(config, output=str(tmp_path / "file" / "run")), overwrite=False, resume=False)


def test_resuming_needs_a_run_with_the_same_settings(config: RunConfig) -> None:
    with pytest.raises(RunError, match="expected an interrupted run to resume, found none"):
        train(config, resume=True)
    prepare_folder(config, overwrite=False, resume=False)
    with pytest.raises(RunError, match=r"the settings differ from those in its config\.yaml"):
        train(with_training(config, learning_rate=0.5), resume=True)
    with pytest.raises(RunError, match="choose one"):
        train(config, overwrite=True, resume=True)


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(config: RunConfig) -> None:
    prepare_folder(config, overwrite=False, resume=False)
    train(config, resume=True)
    assert record(config)["steps"] == 2


def test_bad_inputs_cost_no_earlier_run_and_leave_no_empty_one(config: RunConfig) -> None:
    train(config)
    before = tree(Path(config.output))
    pl.read_parquet(config.data.embeddings).head(3).write_parquet(config.data.embeddings)
    assert main(["train", write_config(config, Path(config.output + ".yaml")), "--overwrite"]) == 2
    assert tree(Path(config.output)) == before
    fresh = replace(config, output=config.output + "-2")
    assert main(["train", write_config(fresh, Path(config.output + ".yaml"))]) == 2
    assert not Path(fresh.output).exists()


# ---------------------------------------------------------------- what is learned, and what is said about it


def test_a_useless_prefix_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training users all say one thing and the validation users another, so what is learned can only harm."""
    config = tiny_run(tmp_path, each=16, epochs=1, evals_per_epoch=1, learning_rate=3e-2)  # 24 steps, one validation
    examples = pl.read_parquet(config.data.examples)
    says = pl.when(pl.col("split") == "train").then(pl.lit("jazz jazz jazz")).otherwise(pl.lit("home again"))
    examples.with_columns(completion=says).write_parquet(config.data.examples)
    train(config)
    assert is_useless(record(config)["validation"])
    said = capsys.readouterr().err
    assert "THE PREFIX IS WORSE THAN NO PREFIX" in said
    assert "Do not serve this adapter" in said


def test_a_useful_prefix_is_not_called_useless(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(with_training(config, max_steps=30))
    assert "WORSE" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prefix", "none", "useless"), [(1.0, 2.0, False), (2.0, 2.0, True), (3.0, 2.0, True), (float("nan"), 2.0, True)]
)
def test_when_a_prefix_is_useless(prefix: float, none: float, useless: bool) -> None:
    assert is_useless({"prefix": prefix, "none": none}) is useless


def test_a_diverged_training_leaves_no_adapter(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p.training.trainer.E2PTrainer.mean_loss", lambda *_, **__: float("nan"))
    with pytest.raises(RunError, match=r"the training diverged: validation loss nan; .*Lower training\.learning_rate"):
        train(config)
    assert not Path(config.output, "adapter").exists()


def test_a_record_says_what_was_done(config: RunConfig) -> None:
    train(config)
    found = record(config)
    assert found["steps"] == 2
    assert found["parameters"] == 4 * 8 + 2 * 8 + 8 * 32 + 32 + 4  # W1, LayerNorm, W2, b, the null user
    assert found["best_step"] in (1, 2)
    assert {"prefix", "none", "unit"} == set(found["validation"])
    assert found["provenance"]["versions"]["torch"]
    model = E2PModel.from_pretrained(Path(config.output, "adapter"))
    assert model.embedding_versions == ["v1"]
    assert model.metrics["validation nats per token"] == round(found["validation"]["prefix"], 4)


def test_another_seed_is_another_run_of_the_same_split(config: RunConfig) -> None:
    other = with_seed(config, 7, "elsewhere")
    assert (other.training.seed, other.output, other.data) == (7, "elsewhere", config.data)


def test_an_unknown_arm_is_refused(config: RunConfig, tmp_path: Path) -> None:
    backbone, inputs = inputs_of(config)
    with pytest.raises(ConfigError, match="arm: expected one of e2p, static, shuffled, got 'none'"):
        train_arm(config, backbone, inputs, "none", tmp_path, None)
    assert arm_folder(tmp_path, "static") == tmp_path / "controls" / "static"


@pytest.mark.slow
def test_phi_learns_the_user_and_the_shuffled_control_does_not(tmp_path: Path) -> None:
    """One-hot users whose completion is their word: on unseen users with the same vectors the right vector helps."""
    from e2p.evaluation.arms import random_rows
    from e2p.training.scoring import score_batches

    config = tiny_run(tmp_path, users=40, each=3, epochs=25, evals_per_epoch=1)
    config = replace(config, projector=ProjectorConfig(hidden_dim=16, null_prob=0.1))
    backbone, inputs = inputs_of(config)

    def nats(model: E2PModel, rows: Any = None) -> float:
        parts = [p for _, p in score_batches(model, inputs.examples("test", vector_rows=rows), 4096)]
        return -float(torch.cat(parts).mean())

    console = Console(quiet=True)
    models = {
        arm: train_arm(config, backbone, inputs, arm, tmp_path / "run", console)[0]
        for arm in ("e2p", "static", "shuffled")
    }
    true = nats(models["e2p"])
    # Some of the other users like the same word: then a random vector is the right one.
    others = random_rows(inputs, 42)
    other_word = np.flatnonzero(
        (inputs.embeddings.vectors[others] * inputs.embeddings.vectors[inputs.vector_rows]).sum(1) == 0
    )
    assert np.isin(inputs.rows("test"), other_word).sum() > len(inputs.rows("test")) // 2
    assert true < nats(models["e2p"], others) - 0.3
    assert true < nats(models["static"]) - 0.3
    assert true < nats(models["shuffled"]) - 0.3
    saved = {
        arm: set(load_file(arm_folder(tmp_path / "run", arm) / "adapter/adapter_model.safetensors")) for arm in models
    }
    assert saved["static"] == saved["e2p"] - {"null_vector"}
    assert saved["shuffled"] == saved["e2p"]


def test_a_folder_that_only_bears_the_name_of_an_overwritten_run_is_left(config: RunConfig) -> None:
    other = Path(f"{config.output}.replaced")
    other.mkdir()
    (other / "thesis.tex").write_text("x", encoding="utf-8")
    train(config)
    with pytest.raises(RunError, match=r"run\.replaced: holds 'thesis\.tex'"):
        train(config, overwrite=True)
    assert tree(other) == {"thesis.tex": b"x"}
    assert record(config)["steps"] == 2


@pytest.mark.parametrize("bad", ["init_text", "diverged"])
def test_a_run_is_replaced_only_by_one_that_got_somewhere(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    train(config)
    folder, kept = Path(config.output), Path(f"{config.output}.replaced")
    before = tree(folder)
    if bad == "init_text":  # found out when phi is made, after the tables were read
        monkeypatch.setattr("e2p.training.run.E2PModel.from_backbone", failing(ConfigError("init_text")))
        with pytest.raises(ConfigError, match="init_text"):
            train(config, overwrite=True)
        assert tree(folder) == before
        assert not kept.exists()
    else:  # after its first checkpoint: both are kept, and a further failure costs neither the first
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr("e2p.training.trainer.E2PTrainer.mean_loss", lambda *_, **__: float("nan"))
                with pytest.raises(RunError, match="diverged"):
                    train(config, overwrite=True)
            assert tree(kept) == before
    monkeypatch.undo()
    train(with_training(config, max_steps=3), overwrite=True)
    assert record(config)["steps"] == 3
    assert not kept.exists()


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("what", ["examples", "vectors", "split"])
def test_an_interrupted_run_is_not_resumed_on_other_tables(config: RunConfig, what: str) -> None:
    train(config)
    before = tree(Path(config.output))
    examples, vectors = pl.read_parquet(config.data.examples), pl.read_parquet(config.data.embeddings)
    if what == "vectors":
        vectors[::-1].with_columns(user_id=vectors["user_id"]).write_parquet(config.data.embeddings)
    else:
        column = {"examples": {"completion": pl.lit("home home")}, "split": {"split": pl.col("split").reverse()}}[what]
        examples.with_columns(**column).write_parquet(config.data.examples)
    with pytest.raises(RunError, match=rf"expected the tables that it was trained on, got other .*{what}"):
        train(config, resume=True)
    assert tree(Path(config.output)) == before
