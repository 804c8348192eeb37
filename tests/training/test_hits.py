"""Training for what HitRate rewards: the loss by hand and by drawing, a step in passes, validation, what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import ObjectiveConfig, RunConfig
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from e2p.training.objectives import miss_losses
from e2p.training.run import train_arm
from e2p.training.scoring import loglikelihoods
from tiny_run import assert_resumes, inputs_of, tiny_run, with_training

HITS = ObjectiveConfig(name="hits", draws=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return replace(tiny_run(tmp_path_factory.mktemp("hits")), objective=HITS)


@pytest.fixture(scope="module")
def loaded(base: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(base)


def chances(model: E2PModel, inputs: RunInputs, part: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How likely each completion is, one row at a time."""
    rows = inputs.rows(part)
    with torch.no_grad():
        found = [float(model(inputs.examples(part).batch(np.array([row]))).double().sum()) for row in rows]
    return np.exp(np.array(found))


@given(st.lists(st.floats(1e-9, 1 - 1e-6), min_size=1, max_size=20), st.integers(1, 100))
def test_it_is_how_often_no_draw_is_the_completion(p: list[float], draws: int) -> None:
    logp = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    losses = miss_losses(logp, draws)
    assert losses.tolist() == pytest.approx([(1 - one) ** draws for one in p], abs=1e-9)
    losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-draws * one * (1 - one) ** (draws - 1) for one in p], abs=1e-9)


def test_it_is_what_draws_come_to() -> None:
    p = 0.07
    missed = (np.random.default_rng(0).random((200_000, 8)) >= p).all(1).mean()
    assert float(miss_losses(torch.tensor([p]).log(), 8)) == pytest.approx(missed, abs=0.004)


def test_what_is_certain_or_out_of_reach_has_finite_gradients() -> None:
    logp = torch.tensor([0.0, -1e-9, -200.0, -1e4], requires_grad=True)
    losses = miss_losses(logp, 30)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, 0, 1, 1])
    assert logp.grad is not None
    assert bool(torch.isfinite(logp.grad).all())


@pytest.mark.parametrize("likelihood", [0.0, 0.1])
def test_a_step_in_small_passes_is_the_mean_over_its_examples(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, likelihood: float
) -> None:
    backbone, inputs = loaded
    config = with_training(base, max_steps=1, batch_size=len(inputs.rows("train")), tokens_per_pass=40)
    config = replace(config, projector=replace(config.projector, null_prob=0.0))
    config = replace(config, objective=replace(HITS, likelihood=likelihood), output=str(tmp_path))
    _, record = train_arm(config, *loaded, "e2p", tmp_path, None)
    fresh = E2PModel.from_backbone(
        backbone, inputs.embeddings.dim, config.projector, data=config.data, seed=config.training.seed
    )
    fresh.projector.fit_input(torch.from_numpy(inputs.train_vectors()))
    p = chances(fresh, inputs, "train")
    tokens = inputs.tokens.completion_lengths[inputs.rows("train")]
    by_hand = ((1 - p) ** 3 - likelihood * np.log(p) / tokens).mean()
    assert next(e["loss"] for e in record["history"] if "loss" in e) == pytest.approx(by_hand, abs=1e-5)


def test_validation_measures_misses(base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path) -> None:
    model, record = train_arm(with_training(base, epochs=4), *loaded, "e2p", tmp_path, None)
    _, inputs = loaded
    validation = record["validation"]
    assert validation["unit"] == "misses in 3 draws"
    assert validation["prefix"] == pytest.approx(((1 - chances(model, inputs, "validation")) ** 3).mean(), abs=1e-5)
    bare = loglikelihoods(model, inputs.examples("validation"), inputs.rows("validation"), 400, use_prefix=False)
    assert validation["none"] == pytest.approx(((1 - np.exp(bare.astype(float))) ** 3).mean(), abs=1e-5)


def test_it_gets_more_hits_than_likelihood_where_a_part_cannot_be_told(base: RunConfig, tmp_path: Path) -> None:
    """Half of the examples end in what no vector tells; likelihood spends itself on them."""
    frame = pl.read_parquet(base.data.examples)
    odd = pl.int_range(pl.len()) % 2 == 1
    others = pl.Series([f"{n % 7}{n % 11}{n % 13}" for n in range(len(frame))])
    frame = frame.with_columns(completion=pl.when(odd).then(others).otherwise(pl.col("completion").str.slice(0, 1)))
    frame.write_parquet(tmp_path / "examples.parquet")
    config = with_training(base, epochs=40, evals_per_epoch=1)
    config = replace(config, data=replace(config.data, examples=str(tmp_path / "examples.parquet")))
    loaded = inputs_of(config)
    hits = {}
    for name, objective in (
        ("lm", ObjectiveConfig()),
        ("hits", ObjectiveConfig(name="hits", draws=300, likelihood=0.01)),
    ):
        model, _ = train_arm(replace(config, objective=objective), *loaded, "e2p", tmp_path / name, None)
        hits[name] = float((1 - (1 - chances(model, loaded[1], "test")) ** 300).mean())
    assert hits["hits"] > 1.5 * hits["lm"] > 0.01


def test_a_resumed_training_comes_to_the_same(base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path) -> None:
    assert_resumes(base, loaded, tmp_path)


def test_a_share_may_be_read_with_the_profile(base: RunConfig) -> None:
    assert with_training(base, profile_share=0.5).training.profile_share == 0.5
