"""What is minimised, as pure functions of log-probabilities."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
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


def kl_baseline(total: Float[Tensor, ""], pairs: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """z0 of Kahneman-Tversky optimisation: max(0, mean of log p(policy) - log p(reference) over mismatched pairs).

    An estimate of KL(policy || reference) that no gradient goes through (Ethayarajh et al. 2024, Section 4.1).

    Args:
        total: sum over the step's pairs, each a row's prompt and soft tokens with another row's completion, in nats.
        pairs: their number.
    """
    return (_wide(total.detach()) / pairs).clamp(min=0)


def kto_losses(
    policy: Float[Tensor, "b"],
    reference: Float[Tensor, "b"],
    engaged: Bool[Tensor, "b"],
    baseline: Float[Tensor, ""],
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Float[Tensor, "b"]:
    """Kahneman-Tversky loss of each row (Ethayarajh et al. 2024, Eq. 7).

    With r = log p(policy) - log p(reference): weight * (1 - sigmoid(beta (r - z0))) of an engaged row,
    weight * (1 - sigmoid(beta (z0 - r))) of another. Computed as the sigmoid of the negative, in float32 at least.

    Args:
        policy: log-likelihood of each completion with soft tokens, in nats; or its mean per token.
        reference: the same of the frozen model without them.
        engaged: the labels.
        baseline: z0, of :func:`kl_baseline`.
        beta: how fast value saturates.
        weights: of engaged rows and of the others.
    """
    sign = torch.where(engaged, 1.0, -1.0)
    ratio = _wide(policy) - _wide(reference)
    return torch.where(engaged, weights[0], weights[1]) * torch.sigmoid(-sign * (ratio - baseline) * beta)


def engagement_losses(
    loglikelihood: Float[Tensor, "b"], engaged: Bool[Tensor, "b"], alpha: float
) -> Float[Tensor, "b"]:
    """The paper's Eq. 5 of each row, negated: -(y log p + alpha (1 - y) log(1 - p)), in float32 at least.

    The paper calls it KTO; it is a weighted binary cross-entropy in the completion's likelihood p.

    Args:
        loglikelihood: log p of each completion with soft tokens, <= 0; or its mean per token.
        engaged: the labels y.
        alpha: weight of rows that are not engaged.
    """
    logp = _wide(loglikelihood)
    return -torch.where(engaged, logp, alpha * log1mexp(logp))


def miss_losses(loglikelihood: Float[Tensor, "b"], draws: int) -> Float[Tensor, "b"]:
    """How often none of n independent draws is the completion, (1 - p)^n; beyond the paper.

    One minus it is what the paper's HitRate@n is on average, so minimising it is training for what is measured. The
    gradient is that of the log-likelihood times n p (1 - p)^(n - 1): what is too unlikely to be drawn pulls at nothing,
    where the log-likelihood pulls hardest at it.

    Args:
        loglikelihood: log p of each completion with soft tokens, <= 0.
        draws: n.
    """
    return torch.exp(draws * log1mexp(_wide(loglikelihood)))


def log1mexp(logp: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 - exp(x)) of x <= 0, without loss of digits (Mächler 2012).

    Where x is so near to 0 that p rounds to 1, the value is that of the next smaller p (about -16 in float32), and the
    gradient stays finite and points away from p = 1.
    """
    x = -logp
    least = torch.finfo(x.dtype).eps
    # The value of `least` with the gradient of x: a clamp would give none where it is needed most.
    x = torch.where(x < least, x - x.detach() + least, x)
    near = x < math.log(2)
    # Of both branches the one not taken gets a harmless argument, or its infinite gradient times 0 would be NaN.
    small, large = torch.where(near, x, 0.5), torch.where(near, 1.0, x)
    return torch.where(near, torch.log(-torch.expm1(-small)), torch.log1p(-torch.exp(-large)))


def _wide(values: Tensor) -> Tensor:
    """Half precision as float32."""
    return values if values.dtype == torch.float64 else values.float()
