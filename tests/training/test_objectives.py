"""The loss is a pure function: what passes and processes add up to is what one batch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2p.training.objectives import lm_loss


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
