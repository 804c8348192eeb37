"""What benchmarks/sasrec.py reads: sequences in a text file, or the tables of `e2p prepare nextitem`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.errors import DataError

Ints = npt.NDArray[np.int64]
START = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Queries:
    """What is asked: ``rows`` (user_id, timestamp, item_id), the target's code, and codes of the items before it."""

    rows: pl.DataFrame
    targets: Ints
    histories: list[Ints]


@dataclass(frozen=True)
class Data:
    """Items coded by their sorted ids, the sequences to train on, and the queries."""

    items: int
    train: list[Ints]
    validation: Queries
    test: Queries
    about: dict[str, Any]


def from_sequences(path: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series]:
    """Interactions, examples and items of a file of ``user item item ...``; times as `e2p prepare` makes them up."""
    users: list[str] = []
    lines: list[list[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        user, *items = line.split() or [""]
        if len(items) < 3:
            raise DataError(
                f"{path}, line {number}: expected a user and at least three items (train, validation, test), "
                f"got {line[:80]!r}; mend or delete the line"
            )
        users.append(user)
        lines.append(items)
    if not users or len(set(users)) < len(users):
        raise DataError(
            f"{path}: expected one line for each user, got {len(users)} lines of {len(set(users))} users; "
            "join the lines of a user"
        )
    table = pl.DataFrame({"user_id": users, "item_id": lines}).explode("item_id")
    place = pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")
    from_end = pl.int_range(pl.len(), dtype=pl.Int64).reverse().over("user_id")
    table = table.with_columns(timestamp=START + place * timedelta(days=1))
    parts = pl.when(from_end == 0).then(pl.lit("test")).when(from_end == 1).then(pl.lit("validation"))
    return table, table.with_columns(split=parts.otherwise(pl.lit("train"))), table["item_id"]


def from_tables(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series]:
    """Interactions, examples and items that ``e2p prepare nextitem`` wrote."""
    tables = []
    for name, wanted in (
        ("interactions", ["user_id", "item_id", "timestamp"]),
        ("examples", ["user_id", "timestamp", "item_id", "split"]),
        ("items", ["item_id"]),
    ):
        path = folder / f"{name}.parquet"
        if not path.is_file():
            raise DataError(f"{path}: expected a table of `e2p prepare nextitem`, got no such file; prepare it first")
        table = pl.read_parquet(path)
        missing = [column for column in wanted if column not in table.columns]
        if missing:
            raise DataError(f"{path}: expected the columns {wanted}, got none named {missing}; prepare it again")
        tables.append(table.select(wanted))
    return tables[0], tables[1], tables[2]["item_id"]


def load(interactions: pl.DataFrame, examples: pl.DataFrame, items: pl.Series) -> Data:
    """Code the items, cut off what is held out, and put the history before each query.

    A split by time (every training example before the first validation one) trains on interactions before that moment;
    any other on each user's interactions before the first of theirs that is held out.
    """
    held = examples.filter(pl.col("split") != "train")
    for part in ("validation", "test"):
        if not held.filter(pl.col("split") == part).height:
            raise DataError(f"examples: expected rows with the split {part}, got none; prepare them again")
    ids = pl.concat([items, interactions["item_id"], examples["item_id"]]).unique().sort()
    codes = pl.DataFrame({"item_id": ids}).with_row_index("code").with_columns(pl.col("code").cast(pl.Int64))
    told = interactions.join(codes, on="item_id").sort("user_id", "timestamp", maintain_order=True)
    start = held.filter(pl.col("split") == "validation")["timestamp"].min()
    by_time = bool((examples.filter(pl.col("split") == "train")["timestamp"] < start).all())
    if by_time:
        kept = told.filter(pl.col("timestamp") < start)
    else:
        first = held.group_by("user_id").agg(first=pl.col("timestamp").min())
        kept = told.join(first, on="user_id", how="left", maintain_order="left").filter(
            (pl.col("timestamp") < pl.col("first")).fill_null(True)
        )
    train = [codes.to_numpy() for codes in kept.group_by("user_id", maintain_order=True).agg("code")["code"]]
    grouped = told.group_by("user_id", maintain_order=True).agg("timestamp", "code")
    known = {
        user: (times.to_numpy(), items.to_numpy())
        for user, times, items in zip(grouped["user_id"], grouped["timestamp"], grouped["code"], strict=True)
    }
    asked = {part: _queries(held.filter(pl.col("split") == part), codes, known) for part in ("validation", "test")}
    about = {
        "split": "time" if by_time else "each user's last",
        "users": told["user_id"].n_unique(),
        "items": len(ids),
        "interactions": told.height,
        "trained_interactions": kept.height,
        "queries": {part: len(queries.targets) for part, queries in asked.items()},
        "query_users": {part: queries.rows["user_id"].n_unique() for part, queries in asked.items()},
        **_hard(asked["test"], kept),
    }
    return Data(len(ids), train, asked["validation"], asked["test"], about)


def _queries(rows: pl.DataFrame, codes: pl.DataFrame, known: dict[Any, tuple[Any, Ints]]) -> Queries:
    rows = rows.select("user_id", "timestamp", "item_id").sort("user_id", "timestamp", "item_id")
    none = (np.empty(0, np.int64), np.empty(0, np.int64))
    histories = []
    for user, moment in zip(rows["user_id"], rows["timestamp"].to_numpy(), strict=True):
        times, items = known.get(user, none)
        histories.append(items[: np.searchsorted(times, moment)] if len(items) else items)
    targets = rows.join(codes, on="item_id", how="left", maintain_order="left")["code"].to_numpy()
    return Queries(rows, targets, histories)


def _hard(queries: Queries, kept: pl.DataFrame) -> dict[str, int]:
    """Test queries that no baseline of this kind can answer, counted."""
    trained = set(kept["code"].to_list())
    pairs = list(zip(queries.targets.tolist(), queries.histories, strict=True))
    return {
        "test_without_history": sum(not len(history) for _, history in pairs),
        "test_of_untrained_items": sum(target not in trained for target, _ in pairs),
        "test_of_items_had_before": sum(bool((history == target).any()) for target, history in pairs),
    }
