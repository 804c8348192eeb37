"""What the arms answer: texts for every test prompt, seeded, many users at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress

from e2p.data.batches import Ints, token_passes
from e2p.data.templates import EncodedPrompt
from e2p.evaluation.arms import Arm
from e2p.training.inputs import RunInputs

COLUMNS = ("example_id", "user_id", "arm", "draw", "text", "cut")


def answer(
    arm: Arm,
    inputs: RunInputs,
    budget: int,
    *,
    draws: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Answers of one arm to all test prompts.

    Every arm draws with the same random numbers in the same order, so that arms differ by what they are and less by
    luck.

    Args:
        arm: the arm.
        inputs: the run's inputs.
        budget: tokens of prompts and answers held at a time.
        draws: answers for each prompt.
        temperature: 0: the likeliest token each time.
        max_new_tokens: longest answer; fewer where the backbone's window is shorter.
        seed: of the draws.
        progress: where progress is shown.

    Returns:
        ``example_id``, ``user_id``, ``arm``, ``draw``, ``text`` and ``cut``: whether the answer was not at its end.
    """
    rows, model = arm.examples.rows, arm.model
    task: Any = progress.add_task(f"{arm.name} answers", total=draws * len(rows)) if progress else None
    texts, cut = np.full((draws, len(rows)), "", object), np.zeros((draws, len(rows)), bool)
    lengths = arm.examples.tokens.prompt_lengths[rows].astype(np.int64)
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    gpus = [model.backbone.device] if model.backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        for draw in range(draws):
            for number, part in enumerate(token_passes(lengths + max_new_tokens, budget)):
                torch.manual_seed(int(np.random.SeedSequence([seed, 7, draw, number]).generate_state(1)[0]))
                ids, room = continued(arm, rows[part], max_new_tokens, settings)
                for at, row in zip(part, ids, strict=True):
                    texts[draw, at] = model.encoder.tokenizer.decode(row, skip_special_tokens=True).strip()
                    cut[draw, at] = len(row) >= room
                if progress:
                    progress.update(task, advance=len(part))
    keys = inputs.keys.select("example_id", "user_id")[rows]
    return pl.concat(
        keys.with_columns(
            arm=pl.lit(arm.name),
            draw=pl.lit(draw, pl.Int64),
            text=pl.Series(texts[draw].tolist(), dtype=pl.String),
            cut=pl.Series(cut[draw]),
        )
        for draw in range(draws)
    )


@torch.no_grad()
def continued(arm: Arm, rows: Ints, most: int, settings: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Continue the prompts of some rows in one batch, until all of them are at their end.

    Args:
        arm: the arm.
        rows: of the example table.
        most: new tokens; fewer where the backbone's window is shorter.
        settings: for transformers' ``generate``.

    Returns:
        New ids of each row, and how many there could have been.
    """
    model, backbone = arm.model, arm.model.backbone
    batch = arm.examples.batch(rows).to(backbone.device)
    prefix = model.projector(batch.embeddings, batch.present) if arm.use_prefix else None
    items = [arm.examples.tokens[int(row)] for row in rows]
    prompts = [EncodedPrompt(item.prompt.tolist(), item.after_bos, item.after_system, 0) for item in items]
    taken = max(len(prompt.ids) for prompt in prompts) + model.projector.config.prefix_tokens
    room = most if backbone.window is None else max(1, min(most, backbone.window - taken))
    at = [model.splice_at(prompt) for prompt in prompts]
    return backbone.generate(prompts, at, prefix, max_new_tokens=room, **settings), room
