"""The loss is a pure function: what passes and processes add up to is what one batch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2p.training.objectives import contrastive_loss, distillation_loss, lm_loss


def test_the_loss_is_nats_per_token_of_the_whole_step() -> None:
    logprobs = torch.log(torch.tensor([0.5, 0.25]))
    assert float(lm_loss(logprobs, 2)) == pytest.approx((0.6931 + 1.3863) / 2, abs=1e-4)
    assert float(lm_loss(logprobs, 4)) == pytest.approx((0.6931 + 1.3863) / 4, abs=1e-4)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.integers(0, 30))
def test_parts_add_up_to_the_whole(values: list[float], cut: int) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    parts = lm_loss(whole[:cut], len(values)) + lm_loss(whole[cut:], len(values))
    assert float(parts) == pytest.approx(float(lm_loss(whole, len(values))), abs=1e-4)


def test_every_token_has_the_same_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    lm_loss(logprobs, 6).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1 / 6] * 3)


@given(
    st.lists(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=6), min_size=1, max_size=8),
    st.floats(0.01, 3),
)
def test_the_contrastive_term_is_a_hinge_a_completion(
    completions: list[list[tuple[float, float]]], margin: float
) -> None:
    lengths = [len(completion) for completion in completions]
    by_hand = sum(
        max(0.0, margin * len(completion) - sum(own - other for own, other in completion)) for completion in completions
    )
    own, others = torch.tensor([pair for completion in completions for pair in completion], dtype=torch.float64).T
    loss = contrastive_loss(own, others, torch.tensor(lengths), margin, sum(lengths))
    assert float(loss) == pytest.approx(by_hand / sum(lengths), abs=1e-9)


def test_the_contrastive_term_pulls_at_both_users_until_the_margin_is_reached() -> None:
    own = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    others = torch.tensor([-1.2, -1.2, -9.0], requires_grad=True)
    contrastive_loss(own, others, torch.tensor([2, 1]), 0.5, 3).backward()
    assert own.grad is not None
    assert others.grad is not None
    assert own.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0])  # the second completion is far beyond it
    assert others.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 0])


def test_distillation_is_the_mean_divergence() -> None:
    assert float(distillation_loss(torch.tensor([0.5, 0.1]), 4)) == pytest.approx(0.15)
