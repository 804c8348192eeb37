"""The trie of codes against dictionaries and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.errors import DataError
from e2p.items.trie import Trie

Rows = list[tuple[int, ...]]


@st.composite
def coded(draw: st.DrawFn, fewest: int = 1) -> tuple[Rows, tuple[int, ...]]:
    """Different codes in any order, and the sizes of their levels."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    every = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    most = int(np.prod(sizes))
    return draw(st.lists(every, min_size=min(fewest, most), max_size=25, unique=True)), sizes


def table(rows: Rows, depth: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), depth)


def walk(trie: Trie, prefixes: Rows) -> torch.Tensor:
    """Nodes of prefixes of one length."""
    nodes = trie.root(len(prefixes))
    for codes in zip(*prefixes, strict=True):
        nodes = trie.step(nodes, torch.tensor(codes))
    return nodes


def every_prefix(sizes: tuple[int, ...], depth: int) -> Rows:
    return list(itertools.product(*(range(size) for size in sizes[:depth])))


def check(trie: Trie, rows: Rows, sizes: tuple[int, ...]) -> None:
    """Every prefix, those that no item has included: its node, what may follow, and its item."""
    follow: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for depth in range(len(sizes)):
            follow.setdefault(row[:depth], set()).add(row[depth])
    for depth in range(len(sizes) + 1):
        prefixes = every_prefix(sizes, depth)
        nodes = walk(trie, prefixes)
        assert nodes.dtype == torch.int64
        if depth == len(sizes):
            found = [rows.index(prefix) if prefix in rows else -1 for prefix in prefixes]
            assert trie.leaf(nodes).tolist() == found
            continue
        assert (nodes >= 0).tolist() == [prefix in follow for prefix in prefixes]
        assert trie.leaf(nodes).tolist() == [-1] * len(prefixes)
        mask = trie.allowed(nodes, depth)
        assert mask.shape == (len(prefixes), sizes[depth])
        assert mask.tolist() == [
            [code in follow.get(prefix, ()) for code in range(sizes[depth])] for prefix in prefixes
        ]


def same(one: Trie, other: Trie) -> None:
    assert (one.sizes, one.offsets, one.widest) == (other.sizes, other.offsets, other.widest)
    for name in ("keys", "first", "items"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@given(coded())
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_answered_as_a_dictionary_would(drawn: tuple[Rows, tuple[int, ...]]) -> None:
    rows, sizes = drawn
    trie = Trie.build(table(rows, len(sizes)), sizes)
    assert len(trie) == len(rows)
    check(trie, rows, sizes)


@given(coded(), st.data())
@settings(max_examples=100, deadline=None)
def test_insert_is_a_new_build(drawn: tuple[Rows, tuple[int, ...]], data: st.DataObject) -> None:
    rows, sizes = drawn
    old = data.draw(st.integers(1, len(rows)))
    codes = table(rows, len(sizes))
    first = Trie.build(codes[:old], sizes)
    untouched = [tensor.clone() for tensor in (first.keys, first.first, first.items)]
    same(first.insert(codes[old:]), Trie.build(codes, sizes))
    assert all(map(torch.equal, untouched, (first.keys, first.first, first.items)))
    again = data.draw(st.integers(0, old - 1))
    with pytest.raises(DataError, match=rf"row {len(first)}: expected codes that no other .* of row {again} too"):
        first.insert(codes[again : again + 1])


@given(coded(), st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_sampling_under_the_mask_never_leaves_the_items(
    drawn: tuple[Rows, tuple[int, ...]], seed: int, batch: int
) -> None:
    rows, sizes = drawn
    trie = Trie.build(table(rows, len(sizes)), sizes)
    random = torch.Generator().manual_seed(seed)
    nodes, written = trie.root(batch), []
    for level in range(len(sizes)):
        mask = trie.allowed(nodes, level)
        assert mask.any(-1).all()
        codes = torch.multinomial(mask.float(), 1, generator=random).squeeze(-1)
        nodes = trie.step(nodes, codes)
        written.append(codes.tolist())
    assert [rows[row] for row in trie.leaf(nodes).tolist()] == list(zip(*written, strict=True))


@given(coded(), st.lists(st.tuples(st.integers(-3, 80), st.integers(-3, 9)), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_numbers_that_are_no_node_or_no_code_lead_nowhere(
    drawn: tuple[Rows, tuple[int, ...]], asked: list[tuple[int, int]]
) -> None:
    rows, sizes = drawn
    trie = Trie.build(table(rows, len(sizes)), sizes)
    prefixes = sorted({row[:depth] for row in rows for depth in range(len(sizes) + 1)}, key=lambda p: (len(p), p))
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    nodes, codes = (torch.tensor(values) for values in zip(*asked, strict=True))
    expected = [number.get((*prefixes[node], code), -1) if 0 <= node < len(prefixes) else -1 for node, code in asked]
    assert trie.step(nodes, codes).tolist() == expected
    for level in range(len(sizes)):
        for node, row in zip(nodes.tolist(), trie.allowed(nodes, level), strict=True):
            at_level = 0 <= node < len(prefixes) and len(prefixes[node]) == level
            assert bool(row.any()) == at_level


def test_beams_may_have_any_shape_and_integers_any_width() -> None:
    trie = Trie.build(np.array([[0, 1], [2, 0], [2, 3]], dtype=np.int32), (3, 4))
    nodes = trie.step(trie.root(6).reshape(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.int32))
    assert (nodes >= 0).tolist() == [[True, False, True], [True, False, True]]
    mask = trie.allowed(nodes, 1)
    assert mask.shape == (2, 3, 4)
    assert mask[0].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert torch.equal(mask[1], mask[0].flip(0))
    turned = trie.step(nodes.T, torch.tensor([[1, 3], [1, 3], [3, 1]]))
    assert trie.leaf(turned).tolist() == [[0, 2], [-1, -1], [2, 0]]
    assert trie.allowed(trie.root(0), 0).shape == (0, 3)


def test_wide_levels_take_wide_integers() -> None:
    codes = np.array([[65_535, row] for row in range(40_000)])
    narrow, wide = Trie.build(codes[:, 1:], (40_000,)), Trie.build(np.column_stack([codes[:, 1], codes]), (65_536,) * 3)
    assert narrow.keys.dtype == narrow.first.dtype == narrow.items.dtype == torch.int32
    assert wide.keys.dtype == torch.int64
    assert wide.nbytes == sum(t.numel() * t.element_size() for t in (wide.keys, wide.first, wide.items))
    picked = torch.arange(0, 40_000, 777)
    nodes = wide.step(wide.step(wide.root(len(picked)), picked), torch.full_like(picked, 65_535))
    assert torch.equal(wide.leaf(wide.step(nodes, picked)), picked)
    assert (wide.step(nodes, picked - 1) == -1).all()


def test_moving_keeps_everything() -> None:
    trie = Trie.build(torch.tensor([[1, 0], [0, 1]]), [2, 2])
    same(trie, trie.to("cpu"))
    assert trie.to("meta").device.type == "meta"
    assert trie.to("meta").nbytes == trie.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_answers_the_same() -> None:
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(4096)[:900], (16, 16, 16)), axis=1)
    trie = Trie.build(codes, (16, 16, 16))
    there, nodes = trie.to("cuda"), trie.root(900)
    assert torch.equal(there.root(900).cpu(), nodes)
    for level in range(3):
        assert torch.equal(there.allowed(nodes.cuda(), level).cpu(), trie.allowed(nodes, level))
        step = torch.from_numpy(codes[:, level])
        after = trie.step(nodes, step)
        assert torch.equal(there.step(nodes.cuda(), step.cuda()).cpu(), after)
        nodes = after
    assert torch.equal(there.leaf(nodes.cuda()).cpu(), torch.arange(900))
    same(there.insert(np.empty((0, 3), np.int64)).to("cpu"), trie)


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (np.empty((0, 2), np.int64), (2, 2), "at least one item, got none"),
        (np.array([[0, 1], [0, 2]]), (2, 2), "row 1, level 1: expected 0 to 1, got 2"),
        (np.array([[0, -1]]), (2, 2), "row 0, level 1: expected 0 to 1, got -1"),
        (np.array([[0, 1], [1, 1], [0, 1]]), (2, 2), r"row 2: expected codes that no other .* \[0, 1\] of row 0 too"),
        (np.array([[0, 1]]), (2, 2, 2), r"expected whole numbers \[N, 3\], .* got int64 \[1, 2\]"),
        (np.array([0, 1]), (2,), r"expected whole numbers \[N, 1\], .* got int64 \[2\]"),
        (np.array([[0.0, 1.0]]), (2, 2), "got float64"),
        (np.array([[0]]), (), "a number of codes >= 1 for each level"),
        (np.array([[0]]), (0,), "a number of codes >= 1 for each level"),
    ],
)
def test_bad_codes_are_refused(codes: np.ndarray, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Trie.build(codes, sizes)


def test_bad_questions_and_bad_insertions_are_refused() -> None:
    trie = Trie.build(np.array([[0, 1], [1, 0]]), (2, 2))
    for level in (-1, 2):
        with pytest.raises(DataError, match="level: expected 0 to 1"):
            trie.allowed(trie.root(1), level)
    with pytest.raises(DataError, match="row 3: expected codes that no other"):
        trie.insert(np.array([[1, 1], [1, 1]]))
    with pytest.raises(DataError, match="row 2, level 0: expected 0 to 1, got 2"):
        trie.insert(np.array([[2, 1]]))
