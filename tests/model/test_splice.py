"""The splice against rows put together by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2p.model.splice import splice


def by_hand(tokens: Tensor, prefix: Tensor | None, at: int) -> Tensor:
    pieces = list(tokens)
    if prefix is not None:
        pieces[at:at] = list(prefix)
    return torch.stack(pieces) if pieces else torch.zeros(0, tokens.shape[-1])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3), st.booleans())
def test_every_row_is_what_a_loop_makes_of_it(data: st.DataObject, k: int, pad_left: bool) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    at = [data.draw(st.integers(0, length)) for length in lengths]
    width = max(lengths) + data.draw(st.integers(0, 2))
    tokens, prefix = torch.randn(len(lengths), width, 3), torch.randn(len(lengths), k, 3) if k else None
    out = splice(tokens, torch.tensor(lengths), prefix, torch.tensor(at), pad_left)
    total = width + k
    assert out.embeds.shape == (len(lengths), total, 3)
    for row, length in enumerate(lengths):
        real = length + k
        expected = by_hand(tokens[row, :length], None if prefix is None else prefix[row], at[row])
        where = slice(total - real, total) if pad_left else slice(0, real)
        assert torch.equal(out.embeds[row, where], expected)
        assert out.mask[row, where].tolist() == [1] * real
        assert out.positions[row, where].tolist() == list(range(real))
        assert int(out.mask[row].sum()) == real
        assert float(out.embeds[row].abs().sum()) == pytest.approx(float(expected.abs().sum()), rel=1e-5)


def test_padding_that_is_not_a_number_goes_nowhere() -> None:
    tokens = torch.full((1, 3, 2), float("nan"))
    tokens[0, 0] = 1.0
    out = splice(tokens, torch.tensor([1]), torch.ones(1, 1, 2), torch.tensor([1]))
    assert torch.equal(out.embeds[0, :2], torch.ones(2, 2))
    assert torch.equal(out.embeds[0, 2:], torch.zeros(2, 2))


def test_soft_tokens_get_the_backbones_precision() -> None:
    out = splice(torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.tensor([2]), torch.ones(1, 1, 4), torch.tensor([1]))
    assert out.embeds.dtype == torch.bfloat16


def test_the_gradient_reaches_the_soft_tokens_unchanged() -> None:
    prefix = torch.randn(2, 2, 3, requires_grad=True)
    out = splice(torch.randn(2, 4, 3), torch.tensor([4, 2]), prefix, torch.tensor([3, 0]))
    weights = torch.randn_like(out.embeds)
    (out.embeds * weights).sum().backward()
    assert prefix.grad is not None
    assert torch.equal(prefix.grad, torch.stack([weights[0, 3:5], weights[1, 0:2]]))
