"""Log-probabilities of many examples without gradients, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from e2p.data.batches import Batch, Examples, Ints, token_passes
from e2p.model.e2p import E2PModel


def score_batches(
    model: E2PModel, examples: Examples, budget: int, use_prefix: bool = True, rank: int = 0, world: int = 1
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of similar length with the flat log-probabilities of their completions' tokens."""
    mine = examples.rows[rank::world]
    for part in token_passes(examples.widths(mine), budget):
        batch = examples.batch(mine[part])
        with torch.no_grad():
            logprobs = model(batch.to(model.backbone.device), use_prefix)
        yield batch, logprobs


def loglikelihoods(
    model: E2PModel,
    examples: Examples,
    rows: Ints,
    budget: int,
    *,
    completions: Ints | None = None,
    drop: npt.NDArray[np.bool_] | None = None,
    use_prefix: bool = True,
    progress: Progress | None = None,
    task: Any = None,
) -> npt.NDArray[np.float32]:
    """Log-likelihood of each row's whole completion, or of another row's completion after its prompt, in nats [n].

    Args:
        model: the model; without ``use_prefix`` the frozen one.
        examples: prompts, completions and vectors.
        rows: rows of the table [n].
        budget: padded tokens in a forward pass.
        completions: rows whose completions stand in the place of the rows' own [n].
        drop: marks rows whose vector is replaced by the null user [n].
        use_prefix: whether soft tokens stand in the input.
        progress: advanced by the rows of every pass, under ``task``.
    """
    found = np.zeros(len(rows), np.float32)
    for part in token_passes(examples.widths(rows, completions), budget):
        batch = examples.batch(
            rows[part],
            None if drop is None else drop[part],
            completions=None if completions is None else completions[part],
        )
        with torch.no_grad():
            logprobs = model(batch.to(model.backbone.device), use_prefix)
        found[part] = per_completion(logprobs, batch.completion_lengths.to(logprobs.device)).cpu().numpy()
        if progress:
            progress.update(task, advance=len(part))
    return found


def per_completion(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each completion's tokens [b] of flat values [n], float32 at least; gradients go through.

    Args:
        logprobs: one value for every labelled token, completion after completion.
        lengths: labelled tokens of each completion; they sum to n.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths)
    values = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    return torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, row, values)
