"""Drawn and likeliest items against every item of small catalogues, scored one by one without a cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from e2p.data.templates import EncodedPrompt
from e2p.errors import BackboneError, ConfigError
from e2p.items.decoding import Ranked, best_items, sample_items, score_items
from e2p.items.semantic_ids import SemanticIds
from e2p.items.vocabulary import CodeVocabulary
from e2p.model.backbone import FrozenBackbone
from e2p.model.prefill import Prefilled, prefill
from tiny import VOCABULARY, logits_alone, tiny_backbone, tiny_model, tiny_tokenizer

_RANDOM = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(6, VOCABULARY, (count,), generator=_RANDOM).tolist() for count in (4, 11, 1, 8)]
AT = [1, 11, 0, 3]
PREFIX = torch.randn(len(PROMPTS), 2, 32, generator=_RANDOM)
CODES = [c for c in itertools.product(range(3), range(2), range(4)) if c not in [(0, 0, 0), (1, 0, 2), (1, 0, 3)]]


def vocabulary(codes: list[tuple[int, ...]], sizes: tuple[int, ...], seed: int = 0) -> CodeVocabulary:
    """A catalogue, each code a token drawn from the tiny vocabulary."""
    ids = SemanticIds([f"i{row}" for row in range(len(codes))], np.array(codes, np.int64), sizes, separated=False)
    tokens = 6 + torch.randperm(VOCABULARY - 6, generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
    return CodeVocabulary(ids, tokens.split(sizes))


SMALL = vocabulary([CODES[row] for row in np.random.default_rng(0).permutation(len(CODES))], (3, 2, 4))


def read(backbone: FrozenBackbone, rows: list[int] | None = None) -> Prefilled:
    rows = list(range(len(PROMPTS))) if rows is None else rows
    prompts = [EncodedPrompt(PROMPTS[row], 0, 0) for row in rows]
    return prefill(backbone, prompts, [AT[row] for row in rows], PREFIX[rows])


@torch.no_grad()
def exhaustive(backbone: FrozenBackbone, query: int, items: CodeVocabulary, temperature: float = 1.0) -> np.ndarray:
    """log p [N] of every item: for every beginning, one pass of the ordinary model over all of it."""
    codes = items.ids.codes.tolist()
    next_code: dict[tuple[int, ...], Tensor] = {}
    total = np.zeros(len(codes))
    for row, item in enumerate(codes):
        for level, code in enumerate(item):
            start = tuple(item[:level])
            if start not in next_code:
                tokens = [int(items.tokens[depth][c]) for depth, c in enumerate(start)]
                logits = logits_alone(backbone.model, [*PROMPTS[query], *tokens], PREFIX[query], AT[query])[-1]
                valid = sorted({other[level] for other in codes if tuple(other[:level]) == start})
                scores = torch.full((items.ids.sizes[level],), -torch.inf, dtype=torch.float64)
                scores[valid] = logits[items.tokens[level][valid]].double() / temperature
                next_code[start] = scores.log_softmax(-1)
            total[row] += float(next_code[start][code])
    return total


def all_queries(backbone: FrozenBackbone, items: CodeVocabulary = SMALL) -> np.ndarray:
    return np.stack([exhaustive(backbone, query, items) for query in range(len(PROMPTS))])


def check_best(found: Ranked, truth: np.ndarray, k: int) -> None:
    """Right where it says so; and what it returns is scored right in any case, best first."""
    for row in range(len(truth)):
        items, logprobs = found.rows[row].tolist(), found.logprobs[row].numpy()
        real = [item for item in items if item >= 0]
        assert items == real + [-1] * (k - len(real))
        assert len(set(real)) == len(real)
        assert np.all(logprobs[:-1] >= logprobs[1:])
        assert np.all(logprobs[len(real) :] == -np.inf)
        np.testing.assert_allclose(logprobs[: len(real)], truth[row][real], rtol=1e-4, atol=1e-4)
        if found.certain[row]:
            best = np.sort(truth[row])[::-1][:k]
            assert len(real) == len(best)
            np.testing.assert_allclose(logprobs[: len(real)], best, rtol=1e-4, atol=1e-4)


def test_every_way_to_score_agrees(backbone: FrozenBackbone) -> None:
    """All families: log-probabilities of draws and of beams are those of the ordinary model without a cache."""
    truth, start = all_queries(backbone), read(backbone)
    np.testing.assert_allclose(np.exp(truth).sum(1), 1, rtol=1e-5)
    drawn = sample_items(start, SMALL, 40, generator=torch.Generator().manual_seed(0))
    assert drawn.rows.shape == drawn.logprobs.shape == (4, 40)
    assert drawn.logprobs.dtype == torch.float32
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(truth, drawn.rows.numpy(), 1), rtol=1e-4, atol=1e-4)
    every = best_items(start, SMALL, len(CODES))
    assert every.certain.all()
    assert every.rows.tolist() == np.argsort(-truth, axis=1, kind="stable").tolist()
    check_best(every, truth, len(CODES))
    for k in (1, 4):
        check_best(best_items(start, SMALL, k), truth, k)
        exact = best_items(start, SMALL, k, exact=True)
        assert exact.certain.all()
        check_best(exact, truth, k)
    assert float(np.abs(truth[0] - truth[1]).max()) > 0.5


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_families_without_a_plain_cache(family: str) -> None:
    size = {"n_head": 4, "n_layer": 2} if family == "bloom" else {"num_hidden_layers": 2, "state_size": 8}
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.25, **size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    backbone = FrozenBackbone(model, tiny_tokenizer())
    truth, start = all_queries(backbone), read(backbone)
    drawn = sample_items(start, SMALL, 10)
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(truth, drawn.rows.numpy(), 1), rtol=1e-4, atol=1e-4)
    exact = best_items(start, SMALL, 3, width=1, exact=True)
    assert exact.certain.all()
    check_best(exact, truth, 3)


# Draws


def surprise(rows: Tensor, logprobs: np.ndarray) -> float:
    """p value of a chi-square test of drawn rows against probabilities; the rarest items count as one."""
    expected, seen = np.exp(logprobs) * len(rows), np.bincount(rows.numpy(), minlength=len(logprobs))
    rare = expected < 8
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    return float(stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_distribution_of_a_plain_loop(llama: FrozenBackbone, temperature: float) -> None:
    random = torch.Generator().manual_seed(1)
    found = sample_items(read(llama), SMALL, 4000, temperature, random)
    for query, rows in enumerate(found.rows):
        wanted = exhaustive(llama, query, SMALL, temperature)
        assert surprise(rows, wanted) > 1e-3
        # The test can fail: for another prompt, and another temperature.
        assert surprise(rows, exhaustive(llama, (query + 1) % 4, SMALL, temperature)) < 1e-9
        assert surprise(rows, exhaustive(llama, query, SMALL, 1.5 * temperature)) < 1e-9
    # Whatever the temperature, log-probabilities are those at 1.
    truth = np.take_along_axis(all_queries(llama), found.rows.numpy(), 1)
    np.testing.assert_allclose(found.logprobs, truth, rtol=1e-4, atol=1e-4)


def test_an_items_probability_is_what_it_is_drawn_with(backbone: FrozenBackbone) -> None:
    start = read(backbone)
    for temperature in (0.5, 1.0, 2.0):
        truth = np.stack([exhaustive(backbone, query, SMALL, temperature) for query in range(len(PROMPTS))])
        for rows in np.random.default_rng(1).integers(0, len(CODES), (3, len(PROMPTS))):
            found = score_items(start, SMALL, torch.from_numpy(rows), temperature)
            assert (found.shape, found.dtype) == ((len(PROMPTS),), torch.float32)
            np.testing.assert_allclose(found, truth[np.arange(len(PROMPTS)), rows], rtol=1e-4, atol=1e-4)


def test_draws_that_share_a_code_go_on_independently(llama: FrozenBackbone) -> None:
    """Pairs of draws of one call: a table of two items in a row is that of their product."""
    start = read(llama, [0] * 1500)
    pairs = sample_items(start, SMALL, 2, generator=torch.Generator().manual_seed(2), tokens_per_pass=20_000).rows
    logprobs, size = exhaustive(llama, 0, SMALL), len(CODES)
    both = (logprobs[:, None] + logprobs[None]).ravel()
    assert surprise(pairs[:, 0] * size + pairs[:, 1], both) > 1e-3
    assert surprise(pairs[:, 0] * size + pairs[:, 0], both) < 1e-9


def test_draws_are_seeded(llama: FrozenBackbone) -> None:
    start = read(llama)
    one, two, three = (
        sample_items(start, SMALL, 20, generator=torch.Generator().manual_seed(seed)).rows for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_what_draws_share_is_run_once(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    start, widths = read(llama), []
    inner = llama.base.forward

    def watched(**named: Any) -> Any:
        widths.append(named["inputs_embeds"].shape[:2])
        return inner(**named)

    monkeypatch.setattr(llama.base, "forward", watched)
    sample_items(start, SMALL, 1000, generator=torch.Generator().manual_seed(0), tokens_per_pass=100_000)
    assert widths == [(4, 3), (4, 6)]  # no more than there are partial codes, and nothing after the last code


def test_a_small_temperature_takes_the_likeliest_code(llama: FrozenBackbone) -> None:
    start = read(llama)
    cold = sample_items(start, SMALL, 5, temperature=1e-6)
    greedy = best_items(start, SMALL, 1, width=1)
    assert torch.equal(cold.rows, greedy.rows.expand(-1, 5))
    torch.testing.assert_close(cold.logprobs, greedy.logprobs.expand(-1, 5))


# The likeliest


def test_a_beam_that_errs_says_so(llama: FrozenBackbone) -> None:
    """A likely first code may lead to no likely item. Narrow beams miss the best one now and then, and know it."""
    start, missed, sure = read(llama), 0, 0
    for seed in range(12):
        items = vocabulary(CODES, (3, 2, 4), seed)
        truth = all_queries(llama, items)
        narrow = best_items(start, items, 1)
        check_best(narrow, truth, 1)
        wrong = narrow.rows[:, 0].numpy() != truth.argmax(1)
        assert not (wrong & narrow.certain.numpy()).any()
        missed += int(wrong.sum())
        sure += int(narrow.certain.sum())
        exact = best_items(start, items, 1, exact=True)
        assert exact.certain.all()
        assert exact.rows[:, 0].tolist() == truth.argmax(1).tolist()
    assert missed > 2
    assert sure > 2


@st.composite
def catalogues(draw: st.DrawFn) -> CodeVocabulary:
    """Different codes in any order."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    every = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(every, min_size=1, max_size=14, unique=True))
    return vocabulary(codes, sizes, draw(st.integers(0, 99)))


@given(catalogues(), st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 7, 8192]))
@settings(max_examples=40, deadline=None)
def test_any_catalogue(llama: FrozenBackbone, items: CodeVocabulary, k: int, width: int, tokens_per_pass: int) -> None:
    """No draw and no beam is anything but an item, what is certain is right, and what is to be exact is certain."""
    start, truth, size = read(llama), all_queries(llama, items), len(items.ids)
    drawn = sample_items(start, items, k, generator=torch.Generator().manual_seed(k), tokens_per_pass=tokens_per_pass)
    assert ((drawn.rows >= 0) & (drawn.rows < size)).all()
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(truth, drawn.rows.numpy(), 1), rtol=1e-4, atol=2e-4)
    check_best(best_items(start, items, k, width, tokens_per_pass=tokens_per_pass), truth, k)
    exact = best_items(start, items, k, width, exact=True, tokens_per_pass=tokens_per_pass)
    assert exact.certain.all()
    assert ((exact.rows >= 0).sum(1) == min(k, size)).all()
    check_best(exact, truth, k)


def test_more_than_the_catalogue_has(llama: FrozenBackbone) -> None:
    items, start = vocabulary([(1, 0), (0, 1), (1, 1)], (2, 2)), read(llama)
    found, truth = best_items(start, items, 5), all_queries(llama, items)
    check_best(found, truth, 5)
    assert found.certain.all()
    assert found.rows[:, 3:].tolist() == [[-1, -1]] * 4
    assert sorted(found.rows[0, :3].tolist()) == [0, 1, 2]
    drawn = sample_items(start, items, 50, generator=torch.Generator().manual_seed(0))
    assert set(drawn.rows.flatten().tolist()) == {0, 1, 2}
    # A narrow beam may find fewer than there are; then it cannot be certain.
    narrow = best_items(start, items, 3, width=1)
    assert (narrow.rows[:, 2] == -1).all()
    assert not narrow.certain.any()
    alone = vocabulary([(1, 0, 2)], (2, 1, 3))
    assert (
        best_items(start, alone, 1).logprobs.tolist() == sample_items(start, alone, 1).logprobs.tolist() == [[0.0]] * 4
    )


def test_equals_are_ranked_by_row() -> None:
    backbone = tiny_backbone("llama")
    backbone.head.scale = 0.0
    codes = list(itertools.product(range(2), range(2), range(2)))
    order = np.random.default_rng(1).permutation(8)
    items, start = vocabulary([codes[row] for row in order], (2, 2, 2)), read(backbone)
    everything = best_items(start, items, 8)
    assert everything.rows.tolist() == [list(range(8))] * 4
    assert everything.logprobs.numpy() == pytest.approx(3 * math.log(0.5), abs=1e-6)
    few = best_items(start, items, 3, exact=True)
    assert few.rows.tolist() == [[0, 1, 2]] * 4
    # All partial codes are equal, so those that a beam keeps are not certain to hold the first rows.
    assert not best_items(start, items, 3, width=3).certain.any()
    # As likely as the discarded code, whose only item has the lower row.
    forced = vocabulary([(1, 0), (0, 0)], (2, 1))
    beam = best_items(start, forced, 1)
    assert (beam.rows == 1).all()
    assert not beam.certain.any()
    assert (best_items(start, forced, 1, exact=True).rows == 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_batch_is_its_rows(family: str) -> None:
    backbone = tiny_backbone(family)
    start = read(backbone)
    together = best_items(start, SMALL, 4, 3)
    drawn = sample_items(start, SMALL, 30)
    for query in range(len(PROMPTS)):
        one = read(backbone, [query])
        single = best_items(one, SMALL, 4, 3)
        assert single.rows[0].tolist() == together.rows[query].tolist()
        assert bool(single.certain) == bool(together.certain[query])
        torch.testing.assert_close(single.logprobs[0], together.logprobs[query], rtol=1e-4, atol=1e-4)
        scores = dict(zip(drawn.rows[query].tolist(), drawn.logprobs[query].tolist(), strict=True))
        again = sample_items(one, SMALL, 30)
        for row, logprob in zip(again.rows[0].tolist(), again.logprobs[0].tolist(), strict=True):
            assert logprob == pytest.approx(scores.get(row, logprob), abs=1e-4)


@pytest.mark.parametrize(("tokens_per_pass", "prompts"), [(1, 1), (13, 2)])
def test_bounded_memory_changes_nothing(
    llama: FrozenBackbone, tokens_per_pass: int, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, shapes = read(llama), []
    inner = llama.base.forward

    def watched(**named: Any) -> Any:
        shapes.append(named["inputs_embeds"].shape[:2])
        return inner(**named)

    with monkeypatch.context() as patch:
        patch.setattr(llama.base, "forward", watched)
        drawn = sample_items(start, SMALL, 2, tokens_per_pass=tokens_per_pass)  # six tokens behind each prompt
    assert drawn.rows.shape == (4, 2)
    assert all(batch <= prompts and batch * width <= tokens_per_pass for batch, width in shapes)
    for width in (2, 9):
        expected = best_items(start, SMALL, 4, width)
        found = best_items(start, SMALL, 4, width, tokens_per_pass=tokens_per_pass)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.certain, expected.certain)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast() -> None:
    exact, rounded = (
        FrozenBackbone(tiny_model("llama"), tiny_tokenizer(), precision=p) for p in ("float32", "bfloat16")
    )
    truth, start = all_queries(exact), read(rounded)
    drawn = sample_items(start, SMALL, 200, generator=torch.Generator().manual_seed(0))
    best = best_items(start, SMALL, len(CODES))
    for found in (drawn, best):
        assert found.logprobs.dtype == torch.float32
        error = np.abs(found.logprobs.numpy() - np.take_along_axis(truth, found.rows.numpy(), 1)).mean()
        assert 1e-5 < error < 0.1
    # Both come from the same numbers.
    for query, row, logprob in zip(
        *(t.flatten().tolist() for t in index_of(drawn.rows)), drawn.logprobs.flatten(), strict=True
    ):
        place = best.rows[query].tolist().index(row)
        assert float(best.logprobs[query, place]) == pytest.approx(float(logprob), abs=0.05)


def index_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Query and value of every entry."""
    return torch.arange(len(rows))[:, None].expand_as(rows), rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same() -> None:
    here, there = tiny_backbone("llama"), FrozenBackbone(tiny_model("llama").cuda(), tiny_tokenizer())
    prompts = [EncodedPrompt(prompt, 0, 0) for prompt in PROMPTS]
    one, two = (prefill(backbone, prompts, AT, PREFIX.to(backbone.device)) for backbone in (here, there))
    expected, found = (best_items(start, SMALL, 4, exact=True) for start in (one, two))
    assert torch.equal(found.rows.cpu(), expected.rows)
    random = torch.Generator("cuda").manual_seed(0)
    drawn = sample_items(two, SMALL, 4000, generator=random)
    for query, rows in enumerate(drawn.rows.cpu()):
        assert surprise(rows, exhaustive(here, query, SMALL)) > 1e-3


def test_bad_numbers_are_refused(llama: FrozenBackbone) -> None:
    start = read(llama)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"temperature: expected a number > 0, got {temperature}"):
            sample_items(start, SMALL, temperature=temperature)
        with pytest.raises(ConfigError, match="temperature: expected a number > 0"):
            score_items(start, SMALL, torch.zeros(4, dtype=torch.int64), temperature)
    with pytest.raises(ConfigError, match="n: expected a whole number >= 1, got 0"):
        sample_items(start, SMALL, 0)
    with pytest.raises(ConfigError, match="k: expected a whole number >= 1, got 0"):
        best_items(start, SMALL, 0)
    with pytest.raises(ConfigError, match="width: expected a whole number >= 1, got 0"):
        best_items(start, SMALL, 3, width=0)
    for decode in (sample_items, best_items):
        with pytest.raises(ConfigError, match="tokens_per_pass: expected a whole number >= 1, got 0"):
            decode(start, SMALL, 3, tokens_per_pass=0)  # type: ignore[operator]


def test_codes_beyond_the_window_are_refused(llama: FrozenBackbone) -> None:
    start = prefill(llama, [EncodedPrompt([7] * 190, 0, 0)], [0], None)
    for decode in (sample_items, best_items):
        with pytest.raises(BackboneError, match="window of 192 tokens, got 193; shorten the prompt"):
            decode(start, SMALL, 3)  # type: ignore[operator]
