"""A run's tables, checked, split, joined and tokenised: what every arm is trained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.config import DataConfig, Position
from e2p.data.asof import asof_rows
from e2p.data.batches import Examples, Ints
from e2p.data.sources import cache_root
from e2p.data.splits import SPLITS, resolve_splits
from e2p.data.tables import EmbeddingTable, example_keys, open_embeddings
from e2p.data.templates import TextEncoder
from e2p.data.tokenised import TokenisedExamples, tokenise
from e2p.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Tokenised examples of a run with their vectors.

    Args:
        keys: example_id, user_id, timestamp, group per row of the example table.
        split: 0 train, 1 validation, 2 test per row; -1: dropped.
        vector_rows: row of the embedding table per example, -1 without one.
        embeddings: the embedding table.
        tokens: examples without profile text.
        position: where the soft tokens stand.
        counts: examples, users and what was dropped, cut or lacked a vector, for the record.
    """

    keys: pl.DataFrame
    split: npt.NDArray[np.int8]
    vector_rows: Ints
    embeddings: EmbeddingTable
    tokens: TokenisedExamples
    position: Position
    counts: Mapping[str, int]

    def rows(self, part: str) -> Ints:
        """Rows of a part: train, validation or test."""
        return np.flatnonzero(self.split == SPLITS.index(part))

    def examples(
        self, part: str, *, vector_rows: Ints | None = None, tokens: TokenisedExamples | None = None
    ) -> Examples:
        """One part, with other vectors or other tokens where an arm asks for them."""
        return Examples(
            tokens or self.tokens,
            self.rows(part),
            self.vector_rows if vector_rows is None else vector_rows,
            self.embeddings.vectors,
            self.position,
        )

    def train_vectors(self) -> npt.NDArray[np.float32]:
        """The distinct vectors that training examples use: what the input statistics are fitted on [n, D].

        At most 100,000, evenly spread, so that memory stays bounded."""
        used = np.unique(self.vector_rows[self.rows("train")])
        used = used[used >= 0]
        if len(used) > 100_000:
            used = used[np.linspace(0, len(used) - 1, 100_000).astype(np.int64)]
        return np.asarray(self.embeddings.vectors[used], np.float32)


def load_inputs(config: DataConfig, encoder: TextEncoder, position: Position) -> RunInputs:
    """Read, check, split, join and tokenise.

    Raises:
        ConfigError: a table is not named.
        DataError: a table is not usable; a part is empty; vectors of several versions are mixed; a user has no vector
            by an example's time and ``data.missing_vector`` is ``error``.
    """
    for name in ("examples", "embeddings"):
        if not getattr(config, name):
            raise ConfigError(f"data.{name}: expected a table, got nothing; set it to a Parquet, JSONL or CSV file")
    cache = cache_root(config.cache_dir)
    keys = example_keys(config.examples)
    embeddings = open_embeddings(config.embeddings, cache)
    if len(embeddings.versions) > 1:
        raise DataError(
            f"{config.embeddings}: expected vectors of one version, got {', '.join(embeddings.versions)}; two versions "
            "are two unrelated spaces: keep the rows of one"
        )
    joined = asof_rows(keys, embeddings)
    split = resolve_splits(keys, config.split).astype(np.int8)
    missing = joined.rows < 0
    if missing.any():
        if config.missing_vector == "error":
            raise DataError(
                f"{config.examples}: {int(missing.sum())} of {len(keys)} examples have no vector at or before their "
                f"time in {config.embeddings}; the first is {joined.first_missing}. Add the vectors, or set "
                "data.missing_vector to drop or null"
            )
        if config.missing_vector == "drop":
            split[missing] = -1
    for code, part in enumerate(SPLITS):
        if not (split == code).any():
            raise DataError(f"{config.examples}: the {part} part is empty; change data.split or the column 'split'")
    tokens = tokenise(config.examples, encoder, cache)
    kept = split >= 0
    counts = {
        **{part: int((split == code).sum()) for code, part in enumerate(SPLITS)},
        **{f"{part}_users": keys.filter(split == code)["user_id"].n_unique() for code, part in enumerate(SPLITS)},
        "dropped_without_vector": int((~kept).sum()),
        "null_user_without_vector": int((missing & kept).sum()),
        "cut_prompts": int((tokens.column("cut_prompt")[kept] > 0).sum()),
        "cut_completions": int(tokens.column("cut_completion")[kept].sum()),
    }
    return RunInputs(keys, split, joined.rows, embeddings, tokens, position, counts)


def deal(user_ids: npt.NDArray[Any], vector_rows: Ints, seed: Sequence[int]) -> Ints:
    """Give every user a vector row of another user, seeded, nobody his own.

    A user with several vectors hands on the one that stands last in the embedding table.

    Args:
        user_ids: user per example [n].
        vector_rows: vector row per example, -1 without one [n].
        seed: numpy seed.

    Returns:
        Vector row per example [n]; -1 stays -1.

    Raises:
        DataError: fewer than two users have a vector.
    """
    users, which = np.unique(user_ids, return_inverse=True)
    last = np.full(len(users), -1, np.int64)
    np.maximum.at(last, which, vector_rows)
    known = np.flatnonzero(last >= 0)
    if len(known) < 2:
        raise DataError(f"expected at least two users with a vector to exchange them, got {len(known)}")
    order = known[np.random.default_rng(list(seed)).permutation(len(known))]
    other = np.full(len(users), -1, np.int64)
    other[order] = last[np.roll(order, 1)]  # one cycle through all users has no fixed point
    return np.where(vector_rows >= 0, other[which], -1)
