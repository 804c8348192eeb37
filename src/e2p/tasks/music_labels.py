"""Playlists that were engaged with and playlists that were not, so made that only the listener tells them apart.

A listener's own playlist of a query is engaged; somebody else's engaged playlist of the same query is not. What keeps
a model from finding the label without the listener:

- Within a part (training, validation, test) and a query the not engaged playlists are a permutation of the engaged
  ones. Every text has each label equally often, so a completion alone says nothing about its label.
- Both rows of a pair have the same user and the same messages, so they say nothing either.
- Engaged playlists hold no artist of the half that made the vector. Not engaged ones hold no artist that the listener
  played in either half, so that neither kind shows itself by artists the vector has seen.
- No completion stands in two parts.

A part's rows follow from the plays of that part's listeners, and for the last rule from those of earlier parts:
nothing that validation or test listeners play changes a training row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.config import SplitConfig
from e2p.data.splits import SPLITS, split_by_group
from e2p.errors import DataError, MissingExtraError

# Most listeners of one query that are matched at once: the matrix is its square. An assignment of 512 takes 0.05 s.
BLOCK = 512
WORDINGS = (
    "make a playlist of {} music",
    "play me some {}",
    "i want to hear {} artists",
    "a {} playlist please",
    "what {} should i listen to",
)
FEW = "of a query with too few listeners in the part"
TWICE = "of the same text as one in an earlier part"
CLASH = "for want of another's without artists that the listener played"


def labelled(
    engaged: pl.DataFrame,
    plays: pl.DataFrame,
    names: pl.DataFrame,
    listeners: list[str],
    seed: int,
    min_query_listeners: int = 5,
    split: SplitConfig | None = None,
) -> tuple[pl.DataFrame, Counter[tuple[str, str]]]:
    """The labelled table, two rows for each engaged playlist that stays, and what was dropped.

    Args:
        engaged: example_id, user_id, messages, completion, group, query, items: what listeners really play.
        plays: user, artist: all plays, of both halves.
        names: artist, item_id, name. Items with the same name are the same to a reader, so here too.
        listeners: all user ids that may stand in the table; the split is drawn over them, whoever has playlists.
        seed: seed of the matching and of the wordings.
        min_query_listeners: fewest listeners of a query in a part.
        split: fractions and seed of the split of the listeners; SplitConfig's defaults.

    Returns:
        Table: example_id (``-yes`` and ``-no``), user_id, messages, completion, group, query, items, label, split; and
        the number of engaged playlists dropped, by part and reason.

    Raises:
        DataError: too few listeners for the split, or a part without any playlist left.
        MissingExtraError: scipy is not installed.
    """
    users = pl.Series("user_id", listeners, dtype=pl.String)
    parts = pl.DataFrame({"user_id": users, "part": split_by_group(users, split or SplitConfig())})
    found = engaged.join(parts, on="user_id", how="inner", maintain_order="left")
    dropped: Counter[tuple[str, str]] = Counter()
    for reason, keep in (
        (TWICE, pl.col("part") == pl.col("part").min().over("completion")),
        (FEW, pl.len().over("query", "part") >= min_query_listeners),
    ):
        marked = found.with_columns(keep=keep)
        _count(dropped, marked.filter(~pl.col("keep")), reason)
        found = marked.filter("keep").drop("keep")
    others = _others(found, plays, names, seed)
    _count(dropped, found.filter(pl.Series(others < 0)), CLASH)
    for code, name in enumerate(SPLITS):
        if not ((found["part"] == code).to_numpy() & (others >= 0)).any():
            reasons = ", ".join(f"{count} {reason}" for (part, reason), count in dropped.items() if part == name)
            raise DataError(
                f"{name}: expected queries that {min_query_listeners} listeners have playlists of, got none "
                f"(dropped: {reasons or 'nothing'}); lower min_query_listeners or give more listeners"
            )
    return _both(found, others, seed), dropped


def _count(dropped: Counter[tuple[str, str]], rows: pl.DataFrame, reason: str) -> None:
    for part, count in rows["part"].value_counts().sort("part").iter_rows():
        dropped[SPLITS[part], reason] += count


def _others(found: pl.DataFrame, plays: pl.DataFrame, names: pl.DataFrame, seed: int) -> npt.NDArray[np.int64]:
    """Row whose playlist is shown to each row's listener as the one not engaged with; -1 where there is none."""
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        raise MissingExtraError("scipy", "recsys", "playlists with labels") from None
    codes = names.select("artist", "item_id", code=pl.col("name").rank("dense").cast(pl.Int64) - 1)
    users = found["user_id"].unique(maintain_order=True)
    rows = pl.DataFrame({"user": users.cast(pl.Int64), "row": np.arange(len(users))})
    heard = plays.join(rows, on="user").join(codes, on="artist").select("row", "code").unique()
    listed = found.select(pl.int_range(pl.len()).alias("row"), item_id="items").explode("item_id")
    listed = listed.join(codes, on="item_id").select("row", "code").unique()
    width = (codes["code"].max() or 0) + 1  # type: ignore[operator]

    def incidence(pairs: pl.DataFrame, height: int) -> Any:
        marks = np.ones(pairs.height, dtype=np.int32)
        return csr_matrix((marks, (pairs["row"].to_numpy(), pairs["code"].to_numpy())), shape=(height, width))

    played, shown = incidence(heard, len(users)), incidence(listed, found.height)
    owner = found.join(rows, left_on=pl.col("user_id").cast(pl.Int64), right_on="user", maintain_order="left")["row"]
    owners = owner.to_numpy()
    others = np.full(found.height, -1, dtype=np.int64)
    asked = found.select("query", "part", user=pl.col("user_id").cast(pl.Int64), row=pl.int_range(pl.len()))
    for (query, part), group in asked.sort("part", "query", "user").group_by("query", "part", maintain_order=True):
        rng = np.random.default_rng([seed, _number(f"{part} {query}", 8)])
        order = rng.permutation(group["row"].to_numpy())
        for block in np.array_split(order, -(-len(order) // BLOCK)):
            clash = (played[owners[block]] @ shown[block].T).toarray() > 0
            chosen = strangers(clash, rng)
            others[block] = np.where(chosen >= 0, block[chosen], -1)
    return others


def strangers(clash: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Give as many listeners as possible another's playlist, so that the playlists given are those of these listeners.

    A listener that is left out is a fixed point of a permutation of all; the fewest fixed points are one assignment
    problem: they cost 1, allowed pairs (nearly) nothing, and pairs that clash more than leaving everybody out.

    Args:
        clash: [n, n], whether listener i played any artist of playlist j; j's own listener is j.
        rng: decides among equally good answers.

    Returns:
        [n] index of the playlist that each listener gets, -1 for those left out. The others' are a permutation of
        them, none their own.
    """
    from scipy.optimize import linear_sum_assignment

    size = len(clash)
    cost = rng.random((size, size)) / (2 * size)
    cost[clash] = 2 * size
    np.fill_diagonal(cost, 1)
    chosen = np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)
    return np.where(chosen == np.arange(size), -1, chosen)


def _both(found: pl.DataFrame, others: npt.NDArray[np.int64], seed: int) -> pl.DataFrame:
    """Two rows for each that has another's playlist, the engaged one first."""
    rows = np.flatnonzero(others >= 0)
    own, given = found[rows], found[others[rows]]
    texts = [wording(seed, user, query) for user, query in own.select("user_id", "query").iter_rows()]
    own = own.with_columns(
        pl.Series("messages", [[{"role": "user", "content": text}] for text in texts], dtype=found.schema["messages"]),
        split=pl.col("part").replace_strict(dict(enumerate(SPLITS)), return_dtype=pl.String),
    )
    kinds = []
    for label, name, shown in ((True, "yes", own), (False, "no", given)):
        kinds.append(
            own.select(
                pl.col("example_id") + f"-{name}",
                "user_id",
                "messages",
                shown["completion"],
                "group",
                "query",
                shown["items"],
                label=pl.lit(label),
                split="split",
            )
        )
    order = np.arange(2 * len(rows)).reshape(2, -1).T.ravel()
    return pl.concat(kinds)[order]


def wording(seed: int, user: str, query: str) -> str:
    """The request of a listener for a query; seed, user and query decide how it is worded."""
    return WORDINGS[_number(f"{seed} {user} {query}", 8) % len(WORDINGS)].format(query)


def _number(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")
