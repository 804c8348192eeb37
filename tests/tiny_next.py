"""A next-item task in miniature: twelve items in two groups, users of two tastes, a backbone with their tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from e2p.config import (
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    NextItemConfig,
    ProjectorConfig,
    RunConfig,
    TrainingConfig,
)
from e2p.data.tables import write_embeddings
from e2p.items.adapt import speaking
from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import items_text
from tiny_run import write_backbone

ITEMS, GROUP, USERS = 12, 6, 40
START = datetime(2026, 1, 1, tzinfo=UTC)


def item(number: int) -> str:
    return f"i{number}"


def next_item_run(folder: Path) -> RunConfig:
    """Tables, codes, a backbone that knows their tokens, and settings, in ``folder``; the run goes to ``folder/run``.

    Users of two tastes, told by their vectors, take items of their own group, one a day, each once.
    """
    codes = np.array([[number // GROUP, number % GROUP] for number in range(ITEMS)])
    ids = SemanticIds([item(number) for number in range(ITEMS)], codes, (2, GROUP), False)
    ids.save(folder / "codes")
    write_backbone(folder / "plain")
    model, tokenizer, _ = speaking(str(folder / "plain"), ids, 0)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    rng = np.random.default_rng(0)
    examples, interactions = [], []
    for user in range(USERS):
        taken = (GROUP * (user % 2) + rng.permutation(GROUP)[:4]).tolist()
        for day, number in enumerate(taken):
            interactions.append({"user_id": f"u{user}", "item_id": item(number), "timestamp": START + timedelta(day)})
        part = "train" if user < 24 else "validation" if user < 30 else "test"
        for at in (2, 3):
            examples.append({
                "user_id": f"u{user}",
                "timestamp": START + timedelta(at),
                "prompt": "next after: " + items_text(ids, [0] * (user % 3) + [1]),  # tells nothing
                "completion": items_text(ids, taken[at : at + 1]),
                "profile": f"likes {'old soul' if user % 2 else 'slow jazz'}",
                "item_id": item(taken[at]),
                "split": part,
            })  # fmt: skip
    pl.DataFrame(examples).write_parquet(folder / "examples.parquet")
    pl.DataFrame(interactions).write_parquet(folder / "interactions.parquet")
    vectors = np.eye(2, dtype=np.float32)[np.arange(USERS) % 2]
    times = pl.Series([START] * USERS, dtype=pl.Datetime("us", "UTC"))
    write_embeddings(folder / "embeddings.parquet", [f"u{user}" for user in range(USERS)], vectors, times, "v1")
    pl.DataFrame(
        {
            "item_id": [item(number) for number in reversed(range(ITEMS))],  # in another order than the codes
            "item": [f"film {number}" for number in reversed(range(ITEMS))],
            "embedding": pl.Series(
                np.eye(2, dtype=np.float32)[np.arange(ITEMS)[::-1] // GROUP], dtype=pl.Array(pl.Float32, 2)
            ),
            "popularity": [number % GROUP for number in reversed(range(ITEMS))],
        }
    ).write_parquet(folder / "items.parquet")
    judged = NextItemConfig(
        items=str(folder / "items.parquet"),
        codes=str(folder / "codes"),
        interactions=str(folder / "interactions.parquet"),
        samples=8,
        beam=12,
        cutoffs=(1, 3, 8),
    )
    return RunConfig(
        backbone=BackboneConfig(model=str(folder / "backbone"), device="cpu"),
        data=DataConfig(
            examples=str(folder / "examples.parquet"),
            embeddings=str(folder / "embeddings.parquet"),
            max_prompt_tokens=64,
            max_completion_tokens=8,
            cache_dir=str(folder / "cache"),
        ),
        projector=ProjectorConfig(hidden_dim=8, null_prob=0.0),
        training=TrainingConfig(epochs=12, batch_size=8, learning_rate=2e-2, precision="float32"),
        evaluation=EvaluationConfig(
            arms=("none", "prompt", "static", "random", "e2p", "retrieval", "popularity"),
            resamples=100,
            samples=1,
            max_new_tokens=4,
            next_item=judged,
        ),
        output=str(folder / "run"),
    )
