"""Point-in-time join: every example gets the newest vector that existed at its time, never a later one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.tables import EmbeddingTable
from e2p.errors import DataError


@dataclass(frozen=True, eq=False)
class Joined:
    """Which vector belongs to which example.

    Args:
        rows: int64 [n examples], row of ``EmbeddingTable.vectors``; -1 where the user has none by that time.
        unknown_user: examples whose user has no vector at all.
        too_early: examples that are older than their user's first vector.
        first_missing: one line about the first example with -1: row, user, time; empty if there is none.
    """

    rows: npt.NDArray[np.int64]
    unknown_user: int
    too_early: int
    first_missing: str


def asof_rows(examples: pl.DataFrame, embeddings: EmbeddingTable) -> Joined:
    """Join examples to vectors by user and, where the vectors have times, by time.

    Args:
        examples: columns user_id and timestamp (Datetime us UTC), in any order; row is for messages.
        embeddings: without timestamps every example of a user gets that user's one vector.

    Raises:
        DataError: with the row, for an example without time while the vectors have times.
    """
    timed = "timestamp" in embeddings.keys.columns
    if timed and examples["timestamp"].null_count():
        first = examples["timestamp"].is_null().arg_true()[0]
        raise DataError(
            f"{_describe(examples, first)}: expected a timestamp for the point-in-time join, got none; the "
            f"vectors of {embeddings.source} have timestamps: fill the example's, or drop the vectors'"
        )
    # Whole numbers instead of texts for the users: the join of 1M examples with 10M vectors takes seconds.
    users = examples.select("user_id").unique(maintain_order=True).with_row_index("code")
    left = examples.lazy().select("user_id", *(["timestamp"] if timed else [])).with_row_index("example")
    left = left.join(users.lazy(), on="user_id", how="left").drop("user_id")
    vectors = embeddings.keys.lazy().with_row_index("vector").join(users.lazy(), on="user_id", how="inner")
    right = vectors.select("code", "vector", *(["timestamp"] if timed else []))
    if timed:
        # `vector` in the sort: of equal times the last row wins, whatever the engine's order.
        joined = left.sort("timestamp").join_asof(
            right.sort("timestamp", "vector"),
            on="timestamp",
            by="code",
            strategy="backward",
            check_sortedness=False,  # cannot be checked per user; both sides were sorted in this statement
        )
    else:
        joined = left.join(right, on="code", how="left")
    known, found = pl.collect_all(
        [right.select(pl.col("code").unique()), joined.sort("example").select("code", "vector")]
    )
    missing = found["vector"].is_null()
    unknown = missing & ~found["code"].is_in(known["code"].implode())
    too_early = missing & ~unknown
    return Joined(
        rows=found["vector"].cast(pl.Int64).fill_null(-1).to_numpy(),
        unknown_user=int(unknown.sum()),
        too_early=int(too_early.sum()),
        first_missing=_first_missing(examples, missing, unknown),
    )


def _first_missing(examples: pl.DataFrame, missing: pl.Series, unknown: pl.Series) -> str:
    if not missing.any():
        return ""
    first = missing.arg_true()[0]
    reason = "the user has no vector" if unknown[first] else "the user's first vector is newer"
    return f"{_describe(examples, first)}: {reason}"


def _describe(examples: pl.DataFrame, index: int) -> str:
    row = examples["row"][index] if "row" in examples.columns else index
    time = examples["timestamp"][index] if "timestamp" in examples.columns else None
    return f"row {row} (user {examples['user_id'][index]!r}{f', {time.isoformat()}' if time else ''})"
