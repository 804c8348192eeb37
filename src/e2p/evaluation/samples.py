"""The same question, answered for a few users: what a report shows first."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from e2p.config import RunConfig
from e2p.data.tables import example_batches
from e2p.data.templates import Prompt
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs


def samples(config: RunConfig, model: E2PModel, inputs: RunInputs) -> list[dict[str, Any]]:
    """The first test example's prompt, answered by the bare backbone and for a few test users."""
    rows = inputs.rows("test")
    random = np.random.default_rng([config.evaluation.seed, 4])
    users = inputs.keys["user_id"].to_numpy()
    _, firsts = np.unique(users[rows], return_index=True)
    count = min(config.evaluation.samples, len(firsts))
    if not count:
        return []
    chosen = rows[np.sort(random.choice(firsts, count, replace=False))]
    wanted = _texts(config.data.examples, {int(row) for row in (rows[0], *chosen)})
    first = wanted[int(rows[0])]
    prompt = first["messages"] or first["prompt"]
    which = inputs.vector_rows[chosen]
    vectors = [inputs.embeddings.vectors[row] if row >= 0 else None for row in which]
    length = _room(config, model, prompt)
    plain = model.generate([prompt], use_prefix=False, max_new_tokens=length, do_sample=False)[0]
    personal = model.generate([prompt] * count, vectors, max_new_tokens=length, do_sample=False)
    answers = [{"user_id": "", "profile": None, "arm": "none", "text": plain}] + [
        {"user_id": str(users[row]), "profile": wanted[int(row)]["profile"], "arm": "e2p", "text": text}
        for row, text in zip(chosen, personal, strict=True)
    ]
    shown = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return [{"prompt": shown, "answers": answers}]


def _room(config: RunConfig, model: E2PModel, prompt: Prompt) -> int:
    """New tokens that are asked for, or that still fit in the backbone's window."""
    asked, window = config.evaluation.max_new_tokens, model.backbone.window
    taken = len(model.encoder.prompt(prompt).ids) + model.projector.config.prefix_tokens
    return asked if window is None else max(1, min(asked, window - taken))


def _texts(source: str, rows: set[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for frame in example_batches(source):
        for row in frame.filter(pl.col("row").is_in(list(rows))).iter_rows(named=True):
            found[row["row"]] = row
        if len(found) == len(rows):
            break
    return found
