"""A run's tables, checked, split, joined and tokenised: what every arm is trained and judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.config import DataConfig, Position
from e2p.data.asof import asof_rows
from e2p.data.batches import Examples, Ints
from e2p.data.sources import cache_root
from e2p.data.splits import LEFT_OUT, SPLITS, drop_training_groups, resolve_splits
from e2p.data.tables import EmbeddingTable, example_keys, example_labels, open_embeddings
from e2p.data.templates import TextEncoder
from e2p.data.tokenised import TokenisedExamples, tokenise
from e2p.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Tokenised examples of a run with their vectors.

    Args:
        keys: example_id, user_id, timestamp, group per row of the example table.
        split: 0 train, 1 validation, 2 test per row; -1: dropped; -2: beyond ``data.train_share``.
        vector_rows: row of the embedding table per example, -1 without one.
        embeddings: the embedding table.
        labels: 1 engaged, 0 not engaged, -1 not labelled, per row.
        tokens: examples without profile text.
        position: where the soft tokens stand.
        counts: examples, users and what was dropped, cut or lacked a vector, for the record.
    """

    keys: pl.DataFrame
    split: npt.NDArray[np.int8]
    vector_rows: Ints
    embeddings: EmbeddingTable
    labels: npt.NDArray[np.int8]
    tokens: TokenisedExamples
    position: Position
    counts: Mapping[str, int]

    def rows(self, part: str) -> Ints:
        """Rows of a part (train, validation or test) that show what to answer: in a table with labels the engaged."""
        return np.flatnonzero((self.split == SPLITS.index(part)) & _shows(self.labels))

    def all_rows(self, part: str) -> Ints:
        """Rows of a part, whatever their labels."""
        return np.flatnonzero(self.split == SPLITS.index(part))

    def examples(
        self,
        part: str,
        *,
        vector_rows: Ints | None = None,
        tokens: TokenisedExamples | None = None,
        rows: Ints | None = None,
    ) -> Examples:
        """One part's :meth:`rows`; other rows, vectors or tokens where an objective or an arm asks for them."""
        return Examples(
            tokens or self.tokens,
            self.rows(part) if rows is None else rows,
            self.vector_rows if vector_rows is None else vector_rows,
            self.embeddings.vectors,
            self.position,
        )

    def identity(self) -> dict[str, str]:
        """Hashes of the examples with everything that makes ids of them, of the split, and of the users' vectors: to
        know the same inputs again, so that nobody is judged on what he was trained on."""
        vectors = hashlib.blake2b(self.vector_rows.tobytes(), digest_size=16)
        used = np.unique(self.vector_rows[self.vector_rows >= 0])
        for start in range(0, len(used), 65_536):
            vectors.update(np.ascontiguousarray(self.embeddings.vectors[used[start : start + 65_536]]).tobytes())
        return {
            "examples": self.tokens.folder.name,
            "split": hashlib.blake2b(self.split.tobytes(), digest_size=16).hexdigest(),
            "vectors": vectors.hexdigest(),
        }

    def train_vectors(self) -> npt.NDArray[np.float32]:
        """The distinct vectors that training examples use: what the input statistics are fitted on [n, D].

        At most 100,000, evenly spread, so that memory stays bounded."""
        used = np.unique(self.vector_rows[self.rows("train")])
        used = used[used >= 0]
        if len(used) > 100_000:
            used = used[np.linspace(0, len(used) - 1, 100_000).astype(np.int64)]
        return np.asarray(self.embeddings.vectors[used], np.float32)


@dataclass(frozen=True, eq=False)
class JoinedTables:
    """A run's two tables, checked, joined and split; fields as in :class:`RunInputs`."""

    keys: pl.DataFrame
    split: npt.NDArray[np.int8]
    vector_rows: Ints
    embeddings: EmbeddingTable
    labels: npt.NDArray[np.int8]


def join_tables(config: DataConfig) -> JoinedTables:
    """Read, check, join and split: what needs no language model, and so comes before one is loaded.

    Raises:
        ConfigError: a table is not named.
        DataError: a table is not usable; a part is empty; vectors of several versions are mixed; a user has no vector
            by an example's time and ``data.missing_vector`` is ``error``.
    """
    for name in ("examples", "embeddings"):
        if not getattr(config, name):
            raise ConfigError(f"data.{name}: expected a table, got nothing; set it to a Parquet, JSONL or CSV file")
    keys = example_keys(config.examples)
    embeddings = open_embeddings(config.embeddings, cache_root(config.cache_dir))
    if len(embeddings.versions) > 1:
        raise DataError(
            f"{config.embeddings}: expected vectors of one version, got {', '.join(embeddings.versions)}; two versions "
            "are two unrelated spaces: keep the rows of one"
        )
    joined = asof_rows(keys, embeddings)
    split = resolve_splits(keys, config.split).astype(np.int8)
    if config.train_share < 1:
        split = drop_training_groups(keys["group"], split, config.train_share, config.split.seed)
    missing = (joined.rows < 0) & (split >= 0)
    if missing.any():
        if config.missing_vector == "error":
            raise DataError(
                f"{config.examples}: {int(missing.sum())} of {len(keys)} examples have no vector at or before their "
                f"time in {config.embeddings}; the first is {joined.first_missing}. Add the vectors, or set "
                "data.missing_vector to drop or null"
            )
        if config.missing_vector == "drop":
            split[missing] = -1
    labels = example_labels(config.examples).cast(pl.Int8).fill_null(-1).to_numpy()
    for code, part in enumerate(SPLITS):
        if not (split == code).any():
            raise DataError(f"{config.examples}: the {part} part is empty; change data.split or the column 'split'")
        if not ((split == code) & _shows(labels)).any():
            raise DataError(
                f"{config.examples}: the {part} part: expected engaged examples, got none with label true; "
                "change data.split or the column 'split'"
            )
    return JoinedTables(keys, split, joined.rows, embeddings, labels)


def load_inputs(
    config: DataConfig, encoder: TextEncoder, position: Position, tables: JoinedTables | None = None
) -> RunInputs:
    """Tokenise a run's examples, once, and put them together with its tables.

    Args:
        config: the run's data settings.
        encoder: how texts become ids.
        position: where the soft tokens stand.
        tables: what :func:`join_tables` returned, if it was called already.

    Raises:
        ConfigError, DataError: as :func:`join_tables`; or a row that cannot be encoded.
    """
    tables = tables or join_tables(config)
    keys, split = tables.keys, tables.split
    tokens = tokenise(config.examples, encoder, cache_root(config.cache_dir))
    kept = split >= 0
    counts = {
        **{part: int((split == code).sum()) for code, part in enumerate(SPLITS)},
        **{f"{part}_users": keys.filter(split == code)["user_id"].n_unique() for code, part in enumerate(SPLITS)},
        "dropped_without_vector": int((split == -1).sum()),
        "left_out_by_train_share": int((split == LEFT_OUT).sum()),
        "null_user_without_vector": int(((tables.vector_rows < 0) & kept).sum()),
        "not_engaged": int(((tables.labels == 0) & kept).sum()),
        "not_labelled": int(((tables.labels < 0) & kept).sum()) if (tables.labels >= 0).any() else 0,
        "cut_prompts": int((tokens.column("cut_prompt")[kept] > 0).sum()),
        "cut_completions": int(tokens.column("cut_completion")[kept].sum()),
    }
    return RunInputs(keys, split, tables.vector_rows, tables.embeddings, tables.labels, tokens, position, counts)


def _shows(labels: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Which rows show what to answer."""
    return labels == 1 if (labels >= 0).any() else np.ones(len(labels), bool)


def deal(inputs: RunInputs, rows: Ints, seed: Sequence[int]) -> Ints:
    """Exchange the users of some rows, seeded: each gets the vectors of one other of them, nobody his own.

    An example gets the other user's newest vector at its own time, as it would get its own user's, so that age does not
    differ; where the other had none by then, his first.

    Args:
        inputs: the run's inputs.
        rows: rows of the example table whose users take part [n].
        seed: numpy seed.

    Returns:
        Vector row for every example of the table [N]: exchanged in ``rows``, the own one elsewhere; -1 stays -1.

    Raises:
        DataError: fewer than two users have a vector.
    """
    own = inputs.vector_rows[rows]
    users, which = np.unique(inputs.keys["user_id"].to_numpy()[rows], return_inverse=True)
    known = _known(which, own)
    order = known[np.random.default_rng(list(seed)).permutation(len(known))]
    other = np.arange(len(users))
    other[order] = np.roll(order, 1)  # one cycle through all users has no fixed point
    out = inputs.vector_rows.copy()
    out[rows] = np.where(own >= 0, _as_of(inputs, rows, users[other[which]], own), -1)
    return out


def strangers(inputs: RunInputs, rows: Ints, seed: Sequence[int]) -> Ints:
    """For each example by itself, another user among those of ``rows``, seeded: what the contrastive term is against.

    Arguments, result and errors as of :func:`deal`, which exchanges whole users; times are respected in the same way.
    """
    own = inputs.vector_rows[rows]
    users, which = np.unique(inputs.keys["user_id"].to_numpy()[rows], return_inverse=True)
    known = _known(which, own)
    at = np.searchsorted(known, which)  # his place among the known users, if he is one
    step = np.random.default_rng(list(seed)).integers(1, len(known), len(rows))
    out = inputs.vector_rows.copy()
    out[rows] = np.where(own >= 0, _as_of(inputs, rows, users[known[(at + step) % len(known)]], own), -1)
    return out


def _known(which: Ints, own: Ints) -> Ints:
    """Users, as numbers, that have a vector."""
    known = np.unique(which[own >= 0])
    if len(known) < 2:
        raise DataError(f"expected at least two users with a vector to exchange them, got {len(known)}")
    return known


def _as_of(inputs: RunInputs, rows: Ints, users: npt.NDArray[np.object_], own: Ints) -> Ints:
    """Vector rows of these users as of these examples' times [n]; where one had none yet, his first."""
    asked = inputs.keys[rows].with_columns(user_id=pl.Series(users, dtype=pl.String))
    found = asof_rows(asked, inputs.embeddings).rows.copy()
    none_yet = np.flatnonzero((own >= 0) & (found < 0))
    if len(none_yet):
        first = inputs.embeddings.keys.with_row_index("row").sort("timestamp").unique("user_id", keep="first")
        names = pl.DataFrame({"user_id": users[none_yet]}, schema={"user_id": pl.String})
        found[none_yet] = names.join(first, on="user_id", how="left", maintain_order="left")["row"].to_numpy()
    return found
