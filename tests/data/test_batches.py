"""Steps, passes and padding: every row once, within the budget, the same with any number of processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.data.batches import Examples, Step, epoch_steps, steps_per_epoch, token_passes
from e2p.data.tokenised import Row


class Tokens:
    """A tokenised table whose ids tell row and place."""

    def __init__(self, prompts: list[int], completions: list[int]) -> None:
        self.prompt_lengths = np.array(prompts, np.int32)
        self.completion_lengths = np.array(completions, np.int32)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Row:
        prompt = np.arange(self.prompt_lengths[index], dtype=np.int32) + 1
        completion = 100 * (index + 1) + np.arange(self.completion_lengths[index], dtype=np.int32)
        return Row(prompt, completion, min(1, len(prompt)), min(2, len(prompt)))


def examples(prompts: list[int], completions: list[int], rows: list[int] | None = None, **changes: Any) -> Examples:
    count = len(prompts)
    values: dict[str, Any] = {
        "tokens": Tokens(prompts, completions),
        "rows": np.array(range(count) if rows is None else rows, np.int64),
        "vector_rows": np.arange(count) % 3,
        "vectors": np.arange(12, dtype=np.float32).reshape(3, 4) + 1,
        "position": "after_bos",
    }
    return Examples(**{**values, **changes})


def plan(data: Examples, **changes: Any) -> list[Step]:
    settings_: dict[str, Any] = {"batch_size": 8, "budget": 64, "null_prob": 0.2, "seed": 1, "epoch": 0}
    return list(epoch_steps(data, **{**settings_, **changes}))


def rows_of(step: Step) -> list[int]:
    return [int(row) for part in step.passes for row in part]


def drops_of(step: Step) -> set[int]:
    pairs = zip(step.passes, step.dropped, strict=True)
    return {int(row) for part, drop in pairs for row, gone in zip(part, drop, strict=True) if gone}


@st.composite
def tables(draw: st.DrawFn) -> Examples:
    lengths = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=60))
    rows = draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    return examples([a for a, _ in lengths], [b for _, b in lengths], rows)


@settings(max_examples=80, deadline=None)
@given(tables(), st.integers(1, 16), st.integers(1, 100), st.integers(0, 5), st.integers(1, 3))
def test_an_epoch_covers_every_row_once_within_the_budget(
    data: Examples, batch_size: int, budget: int, epoch: int, world: int
) -> None:
    arguments = {"batch_size": batch_size, "budget": budget, "epoch": epoch}
    alone = plan(data, **arguments)
    ranks = [plan(data, **arguments, rank=rank, world=world) for rank in range(world)]
    assert sorted(row for step in alone for row in rows_of(step)) == sorted(data.rows.tolist())
    assert len(alone) == steps_per_epoch(data, batch_size)
    assert all(len(rank) == len(alone) for rank in ranks)
    for at, step in enumerate(alone):
        parts = [rank[at] for rank in ranks]
        assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(step))
        assert 1 <= len(rows_of(step)) <= batch_size
        assert max(len(rows_of(p)) for p in parts) - min(len(rows_of(p)) for p in parts) <= 1
        assert set().union(*map(drops_of, parts)) == drops_of(step)
        labels = int(data.tokens.completion_lengths[rows_of(step)].sum())
        assert {part.label_tokens for part in [*parts, step]} == {labels}
        for part in parts:
            for some in part.passes:
                assert len(some) == 1 or int(data.widths(some).max()) * len(some) <= budget


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_passes_cover_all_longest_first_and_none_could_take_the_next_row(widths: list[int], budget: int) -> None:
    passes = token_passes(np.array(widths), budget)
    assert sorted(np.concatenate(passes).tolist()) == list(range(len(widths)))
    ordered = [widths[i] for part in passes for i in part]
    assert ordered == sorted(widths, reverse=True)
    for part in passes[:-1]:
        assert (len(part) + 1) * widths[part[0]] > budget


def test_the_plan_is_a_pure_function_and_epochs_and_seeds_differ() -> None:
    data = examples(list(range(1, 101)), [3] * 100)
    first = plan(data)
    np.random.seed(5)  # noqa: NPY002
    np.random.rand(7)  # noqa: NPY002
    again = plan(data)
    assert [rows_of(s) for s in first] == [rows_of(s) for s in again]
    assert [drops_of(s) for s in first] == [drops_of(s) for s in again]
    for other in (plan(data, epoch=1), plan(data, seed=2)):
        assert [rows_of(s) for s in first] != [rows_of(s) for s in other]
        assert set().union(*map(drops_of, first)) != set().union(*map(drops_of, other))


def test_drops_do_not_depend_on_batches() -> None:
    data = examples([5] * 200, [3] * 200)
    dropped = [set().union(*map(drops_of, plan(data, **c))) for c in ({}, {"batch_size": 3}, {"budget": 9})]
    assert dropped[0] == dropped[1] == dropped[2]
    assert dropped[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_share_of_dropped_vectors_is_null_prob(share: float) -> None:
    data = examples([2] * 4000, [1] * 4000)
    got = np.mean([sum(len(drops_of(s)) for s in plan(data, null_prob=share, epoch=e)) / 4000 for e in range(3)])
    assert abs(got - share) < 4 * np.sqrt(share * (1 - share) / 12000) + 1e-9


def test_rows_of_a_step_have_similar_lengths_and_steps_are_mixed() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    steps = plan(examples(lengths.tolist(), [1] * 640), batch_size=10, budget=10**6)
    spans = [np.ptp(lengths[rows_of(s)]) for s in steps]
    assert np.mean(spans) < 5
    means = [lengths[rows_of(s)].mean() for s in steps]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4


# Batches


@pytest.mark.parametrize(
    ("position", "splice"),
    [
        ("before_bos", [0, 0, 0]),
        ("after_bos", [1, 1, 1]),
        ("after_system", [2, 1, 2]),
        ("before_completion", [4, 1, 4]),
    ],
)
def test_a_batch_is_its_rows_padded(position: Any, splice: list[int]) -> None:
    data = examples([2, 4, 1, 4], [1, 3, 2, 1], position=position)
    batch = data.batch(np.array([1, 2, 3]))
    assert len(batch) == 3
    assert batch.prompt.tolist() == [[1, 2, 3, 4], [1, 0, 0, 0], [1, 2, 3, 4]]
    assert batch.prompt_lengths.tolist() == [4, 1, 4]
    assert batch.completion.tolist() == [[200, 201, 202], [300, 301, 0], [400, 0, 0]]
    assert batch.completion_lengths.tolist() == [3, 2, 1]
    assert batch.splice.tolist() == splice
    assert batch.shared.tolist() == [0, 1, 0]
    assert batch.unique.tolist() == [0, 1]
    assert batch.index.tolist() == [1, 2, 3]
    assert batch.embeddings.dtype == torch.float32
    assert data.label_tokens(np.array([1, 2, 3])) == 6


def test_prompts_that_differ_are_not_shared() -> None:
    class Distinct(Tokens):
        def __getitem__(self, index: int) -> Row:
            row = super().__getitem__(index)
            return Row(row.prompt + index // 2, row.completion, 1, 1)

    data = examples([3] * 6, [2] * 6)
    data = Examples(Distinct([3] * 6, [2] * 6), data.rows, data.vector_rows, data.vectors, "before_completion")  # type: ignore[arg-type]
    batch = data.batch(np.array([5, 0, 4, 1, 2]))
    assert batch.shared.tolist() == [0, 1, 0, 1, 2]
    assert batch.unique.tolist() == [0, 1, 4]
    for row, group in enumerate(batch.shared.tolist()):
        assert torch.equal(batch.prompt[row], batch.prompt[batch.unique[group]])


def test_vectors_are_looked_up_and_absent_or_dropped_ones_are_zero() -> None:
    data = examples([2] * 4, [1] * 4, vector_rows=np.array([2, -1, 0, 1]))
    batch = data.batch(np.array([0, 1, 2, 3]), drop=np.array([False, False, True, False]))
    assert batch.present.tolist() == [True, False, False, True]
    assert batch.embeddings.tolist() == [[9, 10, 11, 12], [0] * 4, [0] * 4, [5, 6, 7, 8]]
    assert data.batch(np.array([2])).present.tolist() == [True]


def test_a_batch_moves_whole() -> None:
    batch = examples([2, 3], [1, 1]).batch(np.array([0, 1]))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in vars(batch))
    assert SimpleNamespace(**vars(batch)).prompt.device.type == "cpu"
