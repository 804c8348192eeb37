"""Nearest rows and reranking against loops that are written out."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.errors import ConfigError, DataError
from e2p.items import retrieval
from e2p.items.catalogue import Catalogue
from e2p.items.retrieval import nearest, rerank


def score(query: Sequence[float], row: Sequence[float], measure: str) -> np.float32:
    dot = math.fsum(a * b for a, b in zip(query, row, strict=True))
    if measure == "cosine":
        lengths = math.sqrt(math.fsum(a * a for a in query)) * math.sqrt(math.fsum(b * b for b in row))
        dot = round(dot / lengths * 2**24) / 2**24 if lengths else 0.0
    return np.float32(dot)


def by_hand(query: Sequence[float], rows: Sequence[Sequence[float]], offered: set[int], measure: str) -> list[int]:
    return sorted(offered, key=lambda row: (-score(query, rows[row], measure), row))


@st.composite
def spaces(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Queries, rows and excluded rows; whole numbers, so that ties are common and dot products exact."""
    dim, queries, count = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 12))
    numbers = st.integers(-2, 2)

    def table(height: int) -> np.ndarray:
        cells = draw(st.lists(numbers, min_size=height * dim, max_size=height * dim))
        return np.array(cells, dtype=np.float32).reshape(height, dim)

    out = draw(st.lists(st.lists(st.integers(0, count - 1), max_size=6), min_size=queries, max_size=queries))
    return table(queries), table(count), out


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_QUERIES", 2)
    monkeypatch.setattr(retrieval, "_BLOCK", 8)  # four rows a block


@given(spaces(), st.integers(1, 14), st.sampled_from(["dot", "cosine"]), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_nearest_is_a_sorted_loop(
    space: tuple[np.ndarray, np.ndarray, list[list[int]]], k: int, measure: str, leave_out: bool, cut: bool
) -> None:
    queries, rows, out = space
    with pytest.MonkeyPatch.context() as patch:
        if cut:
            patch.setattr(retrieval, "_QUERIES", 2)
            patch.setattr(retrieval, "_BLOCK", 6)  # three rows a block
        found = nearest(queries, rows, k, measure, out if leave_out else None)
    for query, unwanted, chosen in zip(queries.tolist(), out, found, strict=True):
        offered = set(range(len(rows))) - (set(unwanted) if leave_out else set())
        assert chosen == by_hand(query, rows.tolist(), offered, measure)[:k]


@given(spaces(), st.integers(1, 14), st.integers(1, 8))
@settings(max_examples=100)
def test_rerank_is_a_loop(space: tuple[np.ndarray, np.ndarray, list[list[int]]], pool: int, length: int) -> None:
    users, rows, known = space
    queries = users[::-1].copy()
    catalogue = Catalogue([str(row) for row in range(len(rows))], ["x"] * len(rows), rows)
    found = rerank(users, catalogue, None, queries, known, length, pool)
    pools = []
    for query, unwanted in zip(queries.tolist(), known, strict=True):
        pools.append(by_hand(query, rows.tolist(), set(range(len(rows))) - set(unwanted), "cosine")[:pool])
    expected = [by_hand(u, rows.tolist(), set(p), "dot")[:length] for u, p in zip(users.tolist(), pools, strict=True)]
    assert found == expected
    assert rerank(users, catalogue, pools, None, [[]] * len(users), length) == expected


def test_candidates_are_the_pool_without_what_is_known() -> None:
    rows = np.array([[5], [4], [3], [2], [1]], np.float32)
    catalogue = Catalogue(list("abcde"), list("abcde"), rows)
    users = np.array([[1], [-1], [0]], np.float32)
    found = rerank(users, catalogue, [[1, 2, 4, 2], [0, 3], [4, 2, 3]], None, [[1], [], [2, 0]], 2)
    assert found == [[2, 4], [3, 0], [3, 4]]  # without a taste: by row


def test_the_users_favourites_come_first() -> None:
    random = np.random.default_rng(1)
    rows, users = (random.normal(size=(count, 8)).astype(np.float32) for count in (200, 5))
    catalogue = Catalogue([str(row) for row in range(200)], ["x"] * 200, rows)
    lists = rerank(users, catalogue, None, users, [[]] * 5, 10)
    means = (users @ rows.T).mean(1)
    assert all((rows[one] @ user).mean() > mean + 2 for one, user, mean in zip(lists, users, means, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_equal_vectors_stand_by_row_over_blocks() -> None:
    random = np.random.default_rng(2)
    rows = np.tile(random.normal(size=(1, 37)), (50, 1)).astype(np.float32)
    for measure in ("dot", "cosine"):
        found = nearest(random.normal(size=(3, 37)).astype(np.float32), rows, 30, measure)
        assert found == [list(range(30))] * 3


def test_memory_does_not_grow_with_queries_times_rows() -> None:
    random = np.random.default_rng(3)
    queries, rows = random.normal(size=(3000, 2)).astype(np.float32), random.normal(size=(40_000, 2)).astype(np.float32)
    tracemalloc.start()
    nearest(queries[:300], rows, 5)
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    nearest(queries[:900], rows, 5)
    many = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert many < 1.1 * few < 1.5e8  # all scores at once: 288 MB


def test_huge_and_opposite_numbers_are_ranked() -> None:
    rows = np.array([[-3e38], [3e38], [0]], np.float32)
    assert nearest(np.array([[3e38]], np.float32), rows, 3) == [[1, 2, 0]]
    assert nearest(np.array([[3e38]], np.float32), rows, 3, "cosine", [[1]]) == [[2, 0]]


ONE = Catalogue(["a", "b"], ["a", "b"], np.eye(2, dtype=np.float32))
EYE = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest(EYE, EYE, 0), ConfigError, "k: expected"),
        (lambda: nearest(EYE, EYE, 1, "l2"), ConfigError, "measure"),
        (lambda: nearest(EYE[:, :1], EYE, 1), DataError, r"queries: expected \[rows, 2\]"),
        (lambda: nearest(EYE, EYE[0], 1), DataError, r"vectors: expected \[N, D\]"),
        (lambda: nearest(EYE, EYE, 1, "dot", [[]]), DataError, "exclude: expected 2"),
        (lambda: nearest(EYE, EYE, 1, "dot", [[2], []]), DataError, "rows: expected 0 to 1, got 2"),
        (lambda: nearest(EYE, EYE, 1, "dot", [[-1], []]), DataError, "got -1"),
        (lambda: nearest(EYE * np.float32("nan"), EYE, 1), DataError, "queries: row 0: expected finite"),
        (lambda: nearest(EYE, np.array([[0, 0], [np.inf, 0]], np.float32), 1), DataError, "vectors: row 1"),
        (lambda: rerank(EYE, ONE, None, None, [[], []], 1), DataError, "candidates or query_vectors"),
        (lambda: rerank(EYE, ONE, None, EYE[:1], [[], []], 1), DataError, "query_vectors: expected 2"),
        (lambda: rerank(EYE, ONE, [[0]], None, [[], []], 1), DataError, "candidates: expected 2"),
        (lambda: rerank(EYE, ONE, [[0], [5]], None, [[], []], 1), DataError, "got 5"),
        (lambda: rerank(EYE, ONE, [[0], [0]], None, [[]], 1), DataError, "known: expected 2"),
        (lambda: rerank(EYE, ONE, [[0], [0]], None, [[], []], 0), ConfigError, "length"),
        (lambda: rerank(EYE, ONE, None, EYE, [[], []], 1, 0), ConfigError, "pool: expected"),
    ],
)
def test_what_cannot_be_asked(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
