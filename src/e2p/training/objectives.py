"""What is minimised, as pure functions of log-probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def lm_loss(logprobs: Float[Tensor, "n"], label_tokens: int) -> Float[Tensor, ""]:
    """Language-modelling loss: negative log-likelihood of the completions (paper, Eq. 4), in nats per token.

    Args:
        logprobs: log-probability of every labelled token of this pass, prompt and soft tokens excluded.
        label_tokens: labelled tokens of the whole optimiser step, over all passes and processes. Dividing by it, and
            not by the pass's own count, makes accumulated gradients equal those of one large batch.
    """
    return -logprobs.sum() / label_tokens


def contrastive_loss(
    own: Float[Tensor, "n"],
    strangers: Float[Tensor, "n"],
    lengths: Int[Tensor, "b"],
    margin: float,
    label_tokens: int,
) -> Float[Tensor, ""]:
    """Hinge on how much likelier a completion is with its own user's vector than with a stranger's; beyond the paper.

    Of a completion of m tokens: max(0, margin * m - (log p(own) - log p(stranger))). The sum over completions is
    divided by all labelled tokens, so it weighs completions as :func:`lm_loss` does.

    Args:
        own: log-probability of every labelled token with the example's own user, completions one after the other.
        strangers: the same tokens with another user's vector.
        lengths: labelled tokens of each completion; they sum to n.
        margin: in nats per token.
        label_tokens: as in :func:`lm_loss`.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths), device=own.device), lengths)
    gain = torch.zeros(len(lengths), dtype=own.dtype, device=own.device).index_add(0, row, own - strangers)
    return torch.relu(margin * lengths.to(own.dtype) - gain).sum() / label_tokens


def distillation_loss(divergence: Float[Tensor, "n"], label_tokens: int) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats per token; the teacher is the frozen model that reads the text profile.

    Args:
        divergence: at every labelled position, over the whole vocabulary.
        label_tokens: as in :func:`lm_loss`.
    """
    return divergence.sum() / label_tokens
