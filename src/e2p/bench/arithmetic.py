"""How much arithmetic each side of `e2p bench train` needs: what a ratio of times can be explained by.

Counted in multiply-adds of matrix products: weights times tokens, padding included, once forward and once back (frozen
weights need no gradient of their own). Attention's own products are left out: these sequences are short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from e2p.config import TrainingConfig
from e2p.data.batches import Examples, epoch_steps
from e2p.model.backbone import FrozenBackbone


def layer_weights(backbone: FrozenBackbone) -> int:
    """Weights of the matrices between the token embeddings and the head."""
    tables = {id(module.weight) for module in backbone.base.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(p): p.numel() for p in backbone.base.parameters() if p.ndim == 2 and id(p) not in tables}
    return sum(matrices.values())


def count_peft(backbone: FrozenBackbone, lengths: Sequence[int], batch_size: int) -> dict[str, float]:
    """Batches as they come, padded to the longest row, a virtual token in front, logits everywhere."""
    parts = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    tokens = sum(len(part) * (max(part) + 1) for part in parts)
    head = backbone.head.linear.weight.numel()
    return {"layers": 2.0 * tokens * layer_weights(backbone), "prompt": 0.0, "head": 2.0 * tokens * head}


def count_ours(
    backbone: FrozenBackbone, examples: Examples, shared: bool, batch_size: int, seed: int
) -> dict[str, float]:
    """Our passes of an epoch with one soft token; ``prompt`` is what runs apart if ``shared``, without a way back."""
    tokens = labels = prompts = 0
    budget = TrainingConfig().tokens_per_pass
    for step in epoch_steps(examples, batch_size=batch_size, budget=budget, null_prob=0.0, seed=seed, epoch=0):
        labels += step.label_tokens
        for rows in step.passes:
            if examples.position == "before_completion" and shared:
                distinct = {examples.tokens[int(row)].prompt.tobytes() for row in rows}
                prompts += len(distinct) * int(examples.tokens.prompt_lengths[rows].max())
                tokens += len(rows) * int(examples.tokens.completion_lengths[rows].max())
            else:
                tokens += len(rows) * int(examples.widths(rows).max())
    weights, head = layer_weights(backbone), backbone.head.linear.weight.numel()
    return {"layers": 2.0 * tokens * weights, "prompt": 1.0 * prompts * weights, "head": 2.0 * labels * head}


def arithmetic(
    backbone: FrozenBackbone,
    lengths: Sequence[int],
    sides: Mapping[str, tuple[Examples, bool]],
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """For each side its multiply-adds, the shares of layers, prompt and head in them, and PEFT's as a multiple.

    Args:
        backbone: the model.
        lengths: tokens of each example, in PEFT's order.
        sides: for each of our sides the examples, and whether prompts run apart, once for all rows that share them.
        batch_size: examples per optimiser step.
        seed: seed of our order.
    """
    counts = {"peft": count_peft(backbone, lengths, batch_size)}
    counts |= {side: count_ours(backbone, *which, batch_size, seed) for side, which in sides.items()}
    totals = {side: sum(parts.values()) for side, parts in counts.items()}
    return {
        side: {
            "peft_to_this": round(totals["peft"] / totals[side], 3),
            **{f"{name}_share": round(value / totals[side], 3) for name, value in parts.items()},
            "multiply_adds": totals[side],
        }
        for side, parts in counts.items()
    }
