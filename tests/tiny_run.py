"""A whole run in miniature: a tiny backbone on disk, one-hot users whose completions name their own word, settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from e2p.config import BackboneConfig, DataConfig, EvaluationConfig, ProjectorConfig, RunConfig, TrainingConfig
from e2p.config_io import save_yaml
from e2p.data.tables import write_embeddings
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import text_encoder
from e2p.training.inputs import RunInputs, load_inputs
from e2p.training.run import train_arm
from tiny import tiny_backbone

WORDS = ("jazz", "soul", "music", "home")
PROMPTS = ("make a playlist", "hello there", "the train home", "old soul")
PARTS = ("train", "train", "train", "validation", "test")
DIMENSION = len(WORDS)


def write_backbone(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A tiny random Llama with its tokenizer, as `backbone.model` names it."""
    tiny = tiny_backbone("llama", seed, **changes)
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def examples_frame(users: int = 20, each: int = 2, profile: bool = True) -> pl.DataFrame:
    """User u likes the word u % 4 and stands in one part; his completion is that word, twice."""
    rows = []
    for user in range(users):
        word = WORDS[user % len(WORDS)]
        for n in range(each):
            rows.append(
                {
                    "example_id": f"e{user}-{n}",
                    "user_id": f"u{user:02d}",
                    "prompt": PROMPTS[(user + n) % len(PROMPTS)],
                    "completion": f"{word} {word}",
                    "profile": f"likes {word}",
                    "split": PARTS[(user // len(WORDS)) % len(PARTS)],
                }
            )
    frame = pl.DataFrame(rows)
    return frame if profile else frame.drop("profile")


def write_tables(folder: Path, users: int = 20, each: int = 2, profile: bool = True) -> tuple[str, str]:
    """Example and embedding table; the vectors are one-hot in the word that the user likes."""
    folder.mkdir(parents=True, exist_ok=True)
    examples_frame(users, each, profile).write_parquet(folder / "examples.parquet")
    vectors = np.eye(DIMENSION, dtype=np.float32)[np.arange(users) % DIMENSION]
    write_embeddings(folder / "embeddings.parquet", [f"u{u:02d}" for u in range(users)], vectors, version="v1")
    return str(folder / "examples.parquet"), str(folder / "embeddings.parquet")


def tiny_run(folder: Path, *, users: int = 20, each: int = 2, profile: bool = True, **training: Any) -> RunConfig:
    """Settings of a run on fresh tables and a fresh backbone in ``folder``; the run itself goes to ``folder/run``."""
    examples, embeddings = write_tables(folder / "tables", users, each, profile)
    model = folder / "backbone"
    budget = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", **training}
    return RunConfig(
        backbone=BackboneConfig(model=str(model) if model.is_dir() else write_backbone(model), device="cpu"),
        data=DataConfig(
            examples=examples,
            embeddings=embeddings,
            max_prompt_tokens=64,
            max_completion_tokens=16,
            cache_dir=str(folder / "cache"),
        ),
        projector=ProjectorConfig(hidden_dim=8, null_prob=0.25),
        training=TrainingConfig(**budget),
        evaluation=EvaluationConfig(resamples=100, samples=2, max_new_tokens=4),
        output=str(folder / "run"),
    )


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with another budget."""
    return replace(config, training=replace(config.training, **changes))


def inputs_of(config: RunConfig) -> tuple[FrozenBackbone, RunInputs]:
    """Backbone and inputs of a run, as `e2p train` loads them."""
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    encoder = text_encoder(backbone, config.data, config.projector.prefix_tokens)
    return backbone, load_inputs(config.data, encoder, config.projector.position)


def assert_resumes(config: RunConfig, loaded: tuple[Any, Any], folder: Path) -> None:
    """A training that was killed while it wrote its last checkpoint goes on to what it would have come to."""
    whole, record = train_arm(config, *loaded, "e2p", folder / "whole", None)
    train_arm(config, *loaded, "e2p", folder / "parts", None)
    (folder / "parts" / "checkpoints" / f"checkpoint-{record['steps']}" / "trainer_state.json").unlink()
    resumed, again = train_arm(config, *loaded, "e2p", folder / "parts", None, resume=True)
    assert again["steps"] == record["steps"]
    for name, value in whole.projector.state_dict().items():
        torch.testing.assert_close(resumed.projector.state_dict()[name], value, atol=1e-6, rtol=0)


def write_config(config: RunConfig, path: Path) -> str:
    """The settings as a YAML for the command line."""
    save_yaml(config, path)
    return str(path)
