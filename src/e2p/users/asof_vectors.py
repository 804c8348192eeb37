"""Many vectors for one user: each as of its own time, of what he had done before it, all in one space.

An example of the past must not see the vector of today. Where the space is made of an early part of the interactions,
a vector for any later moment follows from it in closed form, with no further training: the same least squares that ALS
solves for a user in each of its passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.errors import MissingExtraError
from e2p.users.behaviour import Floats, als, check_size, matrix_of, space_version

ENTRIES = 4_000_000  # interactions held at once while users are folded in, one for each vector that sees it


@dataclass(frozen=True, eq=False)
class Space:
    """Item vectors that ALS has made, and what folds a history into them.

    Args:
        items: item id of each row of ``item_vectors``, sorted.
        item_vectors: float32 [items, D].
        version: names the space.
        model: implicit's ALS.
    """

    items: pl.Series
    item_vectors: Floats
    version: str
    model: Any


def als_space(
    interactions: pl.DataFrame, dimension: int, regularization: float, alpha: float, iterations: int, seed: int
) -> Space:
    """Factorise interactions by implicit-feedback ALS (Hu, Koren and Volinsky 2008).

    Args:
        interactions: user_id, item_id and weight (> 0). Their order does not matter.
        dimension: numbers in a vector, D.
        regularization: of the factors, > 0.
        alpha: how much an interaction of weight 1 counts, where none counts 1.
        iterations: passes over the interactions.
        seed: of the start.

    Raises:
        ConfigError: a setting is out of range.
        DataError: not more users and items than dimensions.
        MissingExtraError: implicit is not installed.
    """
    users, items, counts = matrix_of(interactions)
    check_size(dimension, users, items)
    model = als(counts, dimension, regularization, alpha, iterations, seed)
    vectors = np.asarray(model.item_factors, np.float32)
    return Space(items, vectors, space_version("als", vectors), model)


def vectors_before(
    interactions: pl.DataFrame, asked: pl.DataFrame, space: Space, entries: int = ENTRIES
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """A user's vector as of a time: of his interactions strictly before it, and of nothing else.

    With Y the items' vectors, w the weight of an item in what came before and c = alpha w, it is the x that solves
    (Y'Y + sum (c - 1) y y' + regularization) x = sum c y, sums over those items.

    Args:
        interactions: user_id, item_id, weight and timestamp; items that are not in the space count for nothing.
        asked: user_id and timestamp, n rows; of the same type of time.
        space: where the vectors live.
        entries: most interactions held at once; the result does not depend on it.

    Returns:
        Vectors, float32 [n, D], and how many interactions each has seen, int64 [n]. Where that is 0 the vector is zero.

    Raises:
        MissingExtraError: implicit is not installed.
    """
    try:
        from scipy.sparse import csr_matrix
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise MissingExtraError("implicit", "recsys", "vectors from interactions") from None
    users = asked.select(pl.col("user_id").unique().sort()).with_row_index("user")
    items = space.items.alias("item_id").to_frame().with_row_index("item")
    known = interactions.join(users, on="user_id").join(items, on="item_id").sort("user", "timestamp", "item")
    wanted = asked.select("user_id", "timestamp").join(users, on="user_id", how="left", maintain_order="left")
    # User and time as one whole number, so that one search in the sorted interactions finds where each history ends.
    moments = pl.concat([known["timestamp"], wanted["timestamp"]]).unique().sort().to_physical().to_numpy()

    def place(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
        when = np.searchsorted(moments, frame["timestamp"].to_physical().to_numpy())
        return frame["user"].cast(pl.Int64).to_numpy() * len(moments) + when

    keys, whose = place(known), wanted["user"].cast(pl.Int64).to_numpy()
    first, last = np.searchsorted(keys, whose * len(moments)), np.searchsorted(keys, place(wanted))
    columns, weights = known["item"].cast(pl.Int64).to_numpy(), known["weight"].cast(pl.Float32).to_numpy()
    seen = (last - first).astype(np.int64)
    ends = np.cumsum(seen)
    vectors = np.zeros((len(seen), space.item_vectors.shape[1]), dtype=np.float32)
    start = 0
    while start < len(seen):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + entries, side="right")))
        counts = seen[start:stop]
        bounds = np.concatenate([[0], np.cumsum(counts)])
        which = np.arange(bounds[-1]) + np.repeat(first[start:stop] - bounds[:-1], counts)
        shape = (len(counts), len(space.items))
        history = csr_matrix((weights[which], columns[which], bounds), shape=shape)
        history.sum_duplicates()
        with threadpool_limits(1, "blas"):  # more would gain nothing here, and sum in another order
            vectors[start:stop] = space.model.recalculate_user(np.arange(len(counts)), history)
        start = stop
    return vectors, seen
