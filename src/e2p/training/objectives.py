"""What is minimised, as pure functions of log-probabilities."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def lm_loss(logprobs: Float[Tensor, "n"], label_tokens: int) -> Float[Tensor, ""]:
    """Language-modelling loss: negative log-likelihood of the completions (paper, Eq. 4), in nats per token.

    Args:
        logprobs: log-probability of every labelled token of this pass, prompt and soft tokens excluded.
        label_tokens: labelled tokens of the whole optimiser step, over all passes and processes. Dividing by it, and
            not by the pass's own count, makes accumulated gradients equal those of one large batch.
    """
    return -logprobs.sum() / label_tokens
