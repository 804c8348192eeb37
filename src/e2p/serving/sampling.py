"""The next token of each row by its own settings, all rows at once. Knows no model and no text."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def row_numbers(seed: int | None, index: int) -> np.random.Generator:
    """The random numbers of one answer: they depend on its seed and its place among the answers and on nothing else."""
    seed = secrets.randbits(64) if seed is None else seed % 2**64
    return np.random.default_rng([seed, index])


def draw(
    logits: Float[Tensor, "r v"],
    temperature: Float[Tensor, "r"],
    top_p: Float[Tensor, "r"],
    uniforms: Float[Tensor, "r"],
) -> Int[Tensor, "r"]:
    """One token a row: the likeliest at temperature 0, else drawn from softmax(logits / temperature) within top-p.

    A token is drawn by inverting the distribution function at the row's own uniform number, in the order of the
    vocabulary. So a row's token depends on that row alone, and last bits of its logits, which depend on who else is in
    the batch, matter only where the number lies within these bits of an edge.

    Args:
        logits: the model's.
        temperature: 0: the likeliest token.
        top_p: tokens are drawn from the smallest set of the likeliest whose probabilities sum to at least this.
        uniforms: float64, in [0, 1).
    """
    best = logits.max(-1)
    warm = (temperature > 0).nonzero().squeeze(-1)
    if not len(warm):
        return best.indices
    # From the greatest one down, that no temperature is too small to divide by.
    heated = (logits[warm] - best.values[warm, None]).double() / temperature[warm, None]
    probabilities = heated.softmax(-1)
    within = top_p[warm]
    narrow = (within < 1).nonzero().squeeze(-1)
    if len(narrow):
        ranked = probabilities[narrow].sort(dim=-1, descending=True, stable=True)
        out = ranked.values.cumsum(-1) - ranked.values >= within[narrow, None]
        kept = ranked.values.masked_fill(out, 0)
        probabilities[narrow] = torch.zeros_like(kept).scatter_(-1, ranked.indices, kept)
    sums = probabilities.cumsum(-1)
    # The first token whose sum exceeds the number: never one of probability 0.
    at = torch.searchsorted(sums, uniforms[warm, None] * sums[:, -1:], right=True).squeeze(-1)
    tokens = best.indices.clone()
    # In the last place of a sum a product may round up to it.
    last = (probabilities > 0).int().cumsum(-1).argmax(-1)
    tokens[warm] = torch.minimum(at, last)
    return tokens


def logprobs_of(
    logits: Float[Tensor, "r v"], tokens: Int[Tensor, "r"], top: int
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """Log-probabilities of tokens, and of each row's ``top`` likeliest ones: these tokens, and their own."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    own = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return own.tolist(), best.indices.tolist(), best.values.tolist()
