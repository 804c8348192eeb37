"""The same question, answered for a few users: what a report shows first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from e2p.config import RunConfig
from e2p.data.tables import example_batches
from e2p.data.templates import Prompt
from e2p.evaluation.next_item import NextItems
from e2p.items.decoding import best_items
from e2p.items.texts import naming
from e2p.model.e2p import E2PModel
from e2p.model.prefill import prefill
from e2p.training.inputs import RunInputs

_SHOWN = 3  # of the likeliest items


def samples(
    config: RunConfig, model: E2PModel, inputs: RunInputs, shelf: NextItems | None = None
) -> list[dict[str, Any]]:
    """The first test example's prompt, answered by the bare backbone and for a few test users; of next items, by the
    names of the likeliest ones."""
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
    if shelf is None:
        how: dict[str, Any] = {"max_new_tokens": _room(config, model, prompt), "do_sample": False}
        (plain,) = model.generate([prompt], use_prefix=False, **how)
        personal = model.generate([prompt] * count, vectors, **how)
    else:
        plain, *personal = _likeliest(model, shelf, prompt, vectors)
    answers = [{"user_id": "", "profile": None, "arm": "none", "text": plain}] + [
        {"user_id": str(users[row]), "profile": wanted[int(row)]["profile"], "arm": "e2p", "text": text}
        for row, text in zip(chosen, personal, strict=True)
    ]
    asked = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    if shelf is not None:
        asked = naming(shelf.vocabulary.ids, shelf.names)(asked)
    return [{"prompt": asked, "answers": answers}]


@torch.no_grad()
def _likeliest(model: E2PModel, shelf: NextItems, prompt: Prompt, vectors: Sequence[Any]) -> list[str]:
    """The likeliest items by name: of the bare backbone, then for each vector."""
    encoded = model.encoder.prompt(prompt)
    found = []
    for count, prefix in ((1, None), (len(vectors), model.prefix(vectors, len(vectors)))):
        read = prefill(model.backbone, [encoded] * count, [model.splice_at(encoded)] * count, prefix)
        found += best_items(read, shelf.vocabulary, _SHOWN).rows.tolist()
    return [" ; ".join(f'"{shelf.names[row]}"' for row in rows if row >= 0) for rows in found]


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
