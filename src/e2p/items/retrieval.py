"""Playlists without generation: items near to the query, best for the user first. What a generator has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from e2p.data.vectors import Vectors
from e2p.errors import ConfigError, DataError
from e2p.items.catalogue import Catalogue

Rows = Sequence[int] | npt.NDArray[np.int64]
Measure = Literal["dot", "cosine"]
_BLOCK = 1 << 22  # scores held at once: 32 MB in float64
_QUERIES = 256  # queries in a block
_COSINE = 2.0**24  # steps from 0 to 1 that cosines are rounded to: orthogonal vectors tie at 0


def rerank(
    user_vectors: Vectors,
    catalogue: Catalogue,
    candidates: Sequence[Rows] | None,
    query_vectors: Vectors | None,
    known: Sequence[Rows],
    length: int,
    pool: int = 100,
) -> list[list[int]]:
    """For each user and query, the items of the query's pool that suit the user best.

    The score is the dot product of the user's and the item's vector, the affinity in a factor model. Equal scores go
    by row.

    Args:
        user_vectors: float32 [B, D].
        catalogue: N items with vectors of D numbers.
        candidates: the B pools, rows of the catalogue; None: the ``pool`` items whose vectors have the highest cosine
            with the query's, among those that the user does not know.
        query_vectors: float32 [B, D], only needed without ``candidates``.
        known: rows that are not recommended to each user, B times; those that the user's vector was made of.
        length: items of a playlist.
        pool: items of a pool that is found by the query.

    Returns:
        B lists of rows, best first; shorter than ``length`` where the pool is.

    Raises:
        ConfigError: ``length`` or ``pool`` is below 1.
        DataError: lengths or dimensions differ, a row is not in the catalogue, a number is not finite, or there are
            neither candidates nor query vectors.
    """
    _at_least_one("length", length)
    _at_least_one("pool", pool)
    users = _vectors(user_vectors, catalogue.dim, "user_vectors")
    count = len(users)
    if candidates is None:
        if query_vectors is None:
            raise DataError("rerank: expected candidates or query_vectors, got neither; pass one")
        _same_length("query_vectors", query_vectors, count)
        candidates = nearest(query_vectors, catalogue.vectors, pool, "cosine", known)
    _same_length("candidates", candidates, count)
    _same_length("known", known, count)
    found = []
    for user, offered, unwanted in zip(users, candidates, known, strict=True):
        rows = np.setdiff1d(_rows(offered, len(catalogue)), _rows(unwanted, len(catalogue)))
        scores = _rounded(catalogue.vectors[rows].astype(np.float64) @ user.astype(np.float64))
        found.append(rows[np.argsort(-scores, kind="stable")[:length]].tolist())
    return found


def nearest(
    queries: Vectors,
    vectors: Vectors,
    k: int,
    measure: Measure = "dot",
    exclude: Sequence[Rows] | None = None,
) -> list[list[int]]:
    """The k rows of ``vectors`` with the highest score for each query, exactly, best first, equal scores by row.

    Blocks of queries meet blocks of vectors, so memory does not grow with B times N. Scores are computed in float64 and
    compared as float32 (cosines in steps of 2^-24): equal vectors then score equally wherever they stand.

    Args:
        queries: [B, D].
        vectors: [N, D].
        k: rows for each query.
        measure: ``dot``, or ``cosine``, which is 0 for a zero vector.
        exclude: rows that are not offered to each query, B times.

    Returns:
        B lists of rows; shorter than k where fewer are left.

    Raises:
        ConfigError: k is below 1 or the measure is unknown.
        DataError: shapes differ, a row is out of range, or a number is not finite.
    """
    _at_least_one("k", k)
    if measure not in ("dot", "cosine"):
        raise ConfigError(f"measure: expected dot or cosine, got {measure}; choose one")
    if np.ndim(vectors) != 2:
        raise DataError(f"vectors: expected [N, D], got {list(np.shape(vectors))}; stack them")
    asked = _vectors(queries, vectors.shape[1], "queries")
    unwanted = None
    if exclude is not None:
        _same_length("exclude", exclude, len(asked))
        unwanted = [_rows(rows, len(vectors)) for rows in exclude]
    found: list[list[int]] = []
    width = max(1, _BLOCK // _QUERIES)
    for first in range(0, len(asked), _QUERIES):
        block = _prepared(asked[first : first + _QUERIES], measure)
        best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in block]
        for start in range(0, len(vectors), width):
            part = _vectors(vectors[start : start + width], vectors.shape[1], "vectors", start)
            exact = block @ _prepared(part, measure).T
            scores = _rounded(np.rint(exact * _COSINE) / _COSINE if measure == "cosine" else exact)
            for index, (row, (rows, values)) in enumerate(zip(scores, best, strict=True)):
                if unwanted is not None:
                    out = unwanted[first + index]
                    row[out[(out >= start) & (out < start + len(part))] - start] = -np.inf
                chosen = _top(row, k)
                joined = np.concatenate([rows, chosen + start])
                merged = np.concatenate([values, row[chosen]])
                order = np.argsort(-merged, kind="stable")[:k]  # earlier rows stand first
                best[index] = (joined[order], merged[order])
        found += [rows[values > -np.inf].tolist() for rows, values in best]
    return found


def _top(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Indices of the k highest scores, ascending; of those that equal the lowest of them, the first ones."""
    if len(scores) <= k:
        return np.arange(len(scores))
    least = scores[np.argpartition(scores, len(scores) - k)[len(scores) - k]]
    above = np.flatnonzero(scores > least)
    level = np.flatnonzero(scores == least)[: k - len(above)]
    return np.sort(np.concatenate([above, level]))


def _prepared(rows: Vectors, measure: Measure) -> npt.NDArray[np.float64]:
    exact = rows.astype(np.float64)
    if measure == "dot":
        return exact
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(lengths > 0, lengths, 1)


def _rounded(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32 they are all equally good
        return np.clip(scores.astype(np.float32), np.finfo(np.float32).min, np.finfo(np.float32).max)


def _vectors(rows: Vectors, dim: int, name: str, start: int = 0) -> Vectors:
    values = np.asarray(rows)
    if values.ndim != 2 or values.shape[1] != dim:
        raise DataError(f"{name}: expected [rows, {dim}], as the items have, got {list(values.shape)}; use one space")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0]) + start
        raise DataError(f"{name}: row {row}: expected finite numbers, got {values[row - start].tolist()}; mend it")
    return values


def _rows(rows: Rows, count: int) -> npt.NDArray[np.int64]:
    values = np.unique(np.asarray(rows, dtype=np.int64))
    if len(values) and not 0 <= values[0] <= values[-1] < count:
        wrong = values[0] if values[0] < 0 else values[-1]
        raise DataError(f"rows: expected 0 to {count - 1}, got {wrong}; use rows of this catalogue")
    return values


def _same_length(name: str, given: Sequence[object] | Vectors, count: int) -> None:
    if len(given) != count:
        raise DataError(f"{name}: expected {count}, one for each user or query, got {len(given)}; align them")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: expected a whole number >= 1, got {value}; raise it")
