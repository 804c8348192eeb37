"""The next token: distributions by counting, edges by hand, and rows that know nothing of each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from e2p.serving.sampling import draw, logprobs_of, row_numbers

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 1.5, -torch.inf])


def drawn(logits: Tensor, temperature: float, top_p: float, uniforms: Any) -> list[int]:
    """Tokens of rows that are all alike."""
    rows = len(uniforms)
    same = torch.ones(rows, dtype=torch.float64)
    numbers = torch.as_tensor(uniforms, dtype=torch.float64)
    return draw(logits.expand(rows, -1), temperature * same, top_p * same, numbers).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.4, 0.75, 1.0])
def test_tokens_are_drawn_from_the_heated_softmax_within_top_p(temperature: float, top_p: float) -> None:
    heated = np.exp(LOGITS.double().numpy() / temperature)
    shares = heated / heated.sum()
    kept, total = [], 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if total >= top_p:
            break
        kept.append(token)
        total += shares[token]
    kept = [token for token in kept if shares[token] > 0]
    draws = 20_000
    tokens = drawn(LOGITS, temperature, top_p, np.random.default_rng(1).random(draws))
    counts = np.bincount(tokens, minlength=len(shares))
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = shares[kept] / shares[kept].sum() * draws
    if len(kept) > 1:
        assert chisquare(counts[kept], expected).pvalue > 1e-3
    else:
        assert counts[kept[0]] == draws


def test_the_check_of_distributions_can_fail() -> None:
    counts = np.bincount(drawn(LOGITS, 1.1, 1.0, np.random.default_rng(1).random(20_000)), minlength=7)[:6]
    assert chisquare(counts, LOGITS[:6].double().softmax(-1).numpy() * 20_000).pvalue < 1e-3


def test_temperature_0_takes_the_likeliest_whatever_the_number() -> None:
    assert drawn(LOGITS, 0.0, 1.0, [0.0, 0.5, 0.999]) == [0, 0, 0]
    assert drawn(LOGITS, 1e-30, 1.0, [0.0, 0.5, 0.999]) == [0, 0, 0]
    assert drawn(LOGITS, 1.0, 1e-9, [0.0, 0.5, 0.999]) == [0, 0, 0]


def test_the_least_and_greatest_numbers_draw_tokens_that_can_be() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    edge = float(np.nextafter(1.0, 0.0))
    assert drawn(logits, 1.0, 1.0, [0.0, edge]) == [1, 2]
    wide = torch.cat([torch.zeros(50_000), torch.full((10,), -1e9)])
    assert drawn(wide, 1.0, 1.0, [edge]) == [49_999]


def test_rows_know_nothing_of_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator)
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0] * 10, dtype=torch.float64)
    top_p = torch.tensor([1.0, 0.9, 0.2, 1.0, 0.5] * 8, dtype=torch.float64)
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    together = draw(logits, temperature, top_p, uniforms)
    for row in range(40):
        one = slice(row, row + 1)
        assert together[one].tolist() == draw(logits[one], temperature[one], top_p[one], uniforms[one]).tolist()
    # Equally likely tokens are drawn alike in whatever order sorting puts them.
    same = torch.zeros(1, 8)
    eighths = torch.arange(8, dtype=torch.float64) / 8 + 0.01
    assert draw(same.expand(8, -1), torch.ones(8).double(), torch.ones(8).double(), eighths).tolist() == list(range(8))


def test_numbers_depend_on_seed_and_place_alone() -> None:
    first = row_numbers(3, 1).random(5).tolist()
    assert row_numbers(3, 1).random(5).tolist() == first
    others = [row_numbers(seed, index).random(5).tolist() for seed, index in ((3, 0), (4, 1), (1, 3), (-3, 1))]
    assert len({tuple(numbers) for numbers in [first, *others]}) == 5
    assert row_numbers(None, 0).random() != row_numbers(None, 0).random()


def test_logprobs_are_the_models() -> None:
    logits = torch.stack([LOGITS[:6], LOGITS[:6].flip(0)])
    own, tops, values = logprobs_of(logits, torch.tensor([3, 0]), 2)
    expected = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    assert own == pytest.approx([float(expected[0, 3]), float(expected[1, 0])])
    assert tops == [[0, 5], [5, 0]]
    assert values[0] == pytest.approx([float(expected[0, 0]), float(expected[0, 5])])
    assert logprobs_of(logits, torch.tensor([3, 0]), 0)[1:] == ([[], []], [[], []])
    assert len(logprobs_of(logits, torch.tensor([3, 0]), 99)[1][0]) == 6
