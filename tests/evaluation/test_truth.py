"""Worlds whose truth is known: vectors that carry taste, vectors that are noise, a training that was broken on purpose.

A simulated streaming service, a language model that has read its catalogue, phi, controls, audit, end to end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.config import (
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    ProjectorConfig,
    RunConfig,
    SplitConfig,
    TrainingConfig,
)
from e2p.data.tables import write_frame
from e2p.evaluation.judge import judge
from e2p.tasks.pretrain import PretrainConfig, pretrained_backbone
from e2p.tasks.simulate import SimulationConfig, simulate
from e2p.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Tables and backbone of the simulated service, and settings of a run on them."""
    folder = tmp_path_factory.mktemp("truth")
    service = simulate(SimulationConfig(users=900, artists=60, tags=6, weeks=4, dimension=24, taste_strength=2.5))
    write_frame(folder / "examples.parquet", service.examples)
    write_frame(folder / "embeddings.parquet", service.embeddings)
    size = PretrainConfig(documents=5000, vocabulary=1000, layers=2, width=96, heads=4)
    backbone = pretrained_backbone(service, folder / "cache", config=size, progress=False)
    return RunConfig(
        backbone=BackboneConfig(model=str(backbone), device="cpu", attn="eager"),
        data=DataConfig(
            examples=str(folder / "examples.parquet"),
            embeddings=str(folder / "embeddings.parquet"),
            split=SplitConfig((0.65, 0.05, 0.3)),
            max_completion_tokens=64,
            cache_dir=str(folder / "cache"),
        ),
        projector=ProjectorConfig(hidden_dim=64, position="after_bos", user_scale=0.5),
        training=TrainingConfig(epochs=4, batch_size=32, learning_rate=1e-2, evals_per_epoch=1, precision="float32"),
        evaluation=EvaluationConfig(arms=("none", "static", "random", "e2p"), resamples=1000, samples=0),
        output=str(folder / "run"),
    )


def verdict_of(config: RunConfig, name: str) -> dict[str, Any]:
    config = replace(config, output=f"{config.output}-{name}")
    train(config)
    return judge(config.output)


def rewritten(config: RunConfig, **tables: pl.DataFrame) -> RunConfig:
    """The same run on other tables, beside the first ones."""
    paths = {}
    for name, frame in tables.items():
        path = Path(getattr(config.data, name)).with_name(f"other-{name}-{len(frame.columns)}.parquet")
        write_frame(path, frame)
        paths[name] = str(path)
    return replace(config, data=replace(config.data, **paths))


def test_vectors_that_carry_taste_are_found_personalised(world: RunConfig) -> None:
    results = verdict_of(world, "taste")
    assert results["verdict"].startswith("personalised")
    gain = {c["name"]: c["difference"] for c in results["comparisons"]}
    assert gain["true minus random"] < -0.05


def test_vectors_that_are_noise_are_conditioned_but_not_personalised(world: RunConfig) -> None:
    frame = pl.read_parquet(world.data.embeddings)
    # Of few numbers: 24 are enough to learn 585 listeners by heart, which eats up what the prefix gains for everybody.
    noise = np.random.default_rng(0).normal(size=(len(frame), 2)).astype(np.float32)
    column = pl.Series("embedding", noise, dtype=pl.Array(pl.Float32, 2))
    results = verdict_of(rewritten(world, embeddings=frame.with_columns(column)), "noise")
    assert results["verdict"].startswith("conditioned but not personalised")
    assert {c["name"]: c["verdict"] for c in results["comparisons"]}["true minus none"] == "better"


def test_a_training_on_answers_of_other_requests_is_harmful(world: RunConfig) -> None:
    """Somebody joined prompts and completions in the wrong order: training looks fine, listeners are worse off."""
    frame = pl.read_parquet(world.data.examples)
    users = frame["user_id"].unique().sort()
    part = pl.Series("split", ["train"] * 585 + ["validation"] * 45 + ["test"] * 270)
    frame = frame.join(pl.DataFrame({"user_id": users, "split": part}), on="user_id", maintain_order="left")
    words = np.random.default_rng(1)
    wrong = [" ".join(words.permutation(text.split())[::-1]) for text in frame["completion"]]
    broken = frame.with_columns(
        completion=pl.when(pl.col("split") == "test").then("completion").otherwise(pl.Series(wrong))
    )
    results = verdict_of(rewritten(world, examples=broken), "broken")
    assert results["verdict"].startswith("harmful")
    assert results["training"]["e2p"]["validation"]["prefix"] < results["training"]["e2p"]["validation"]["none"]
