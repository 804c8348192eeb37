"""The catalogue of next-item prediction: vectors, and the codes that are made of them or came ready."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.errors import ConfigError, DataError
from e2p.items.semantic_ids import SemanticIds, SemanticIdSettings, read_codes
from e2p.tasks.nextitem_files import Histories
from e2p.users.asof_vectors import Space

CodeVectors = Literal["auto", "text", "behaviour", "both"]
SIZES = (256, 256)
Floats = npt.NDArray[np.float32]


def ready_codes(
    path: str | Path, data: Histories, sizes: tuple[int, ...], separating: int
) -> tuple[SemanticIds, pl.DataFrame]:
    """Codes from a file, and the items in their order: the file's, all of them.

    An item of the catalogue without codes, in which nobody had a part, is left out and counted in ``data.left_out``.

    Args:
        path: JSON file, as :func:`e2p.items.semantic_ids.read_codes` takes it.
        data: what was read.
        sizes: codes of each level; none: as the file's greatest code needs.
        separating: codes of the separating level, where one is needed.

    Raises:
        DataError: the file is not usable, a code is beyond ``sizes``, or an item of an interaction has no codes.
    """
    ids = read_codes(path, sizes or None, separating)
    coded = pl.DataFrame({"item_id": ids.ids})
    bare = data.log.join(coded, on="item_id", how="anti", maintain_order="left")
    if bare.height:
        raise DataError(
            f"{path}: expected codes for every item, got none for {bare['item_id'].n_unique():,}, first for item "
            f"{bare['item_id'][0]!r} of user {bare['user_id'][0]!r}; add them, or make codes with --code_vectors text"
        )
    data.left_out["items without codes, which nobody had"] += data.items.join(coded, on="item_id", how="anti").height
    items = coded.join(data.items, on="item_id", how="left", maintain_order="left")
    return ids, items.with_columns(pl.coalesce("item", "item_id").alias("item"), pl.col("genres").fill_null([]))


def make_codes(
    data: Histories,
    space: Space,
    vectors: CodeVectors,
    encoder: str,
    sizes: tuple[int, ...],
    separating: int,
    seed: int,
) -> tuple[SemanticIds, pl.DataFrame]:
    """Codes of all items by residual quantisation, and the items in their order.

    Codebooks are made of the items that something is known of: that have a text, or with behaviour that the backbone's
    stage has seen. The others are given codes of these codebooks afterwards, as they would be on the day they appear.

    Args:
        data: what was read.
        space: item vectors of the backbone's stage.
        vectors: what codes are made of; parts have unit length, or are zero where nothing is known. ``auto``: text
            where there are texts, else behaviour.
        encoder: of the texts.
        sizes: codes of each level; none: :data:`SIZES`.
        separating: codes of the last level.
        seed: of the codebooks.

    Raises:
        ConfigError: text without texts.
        DataError: fewer items than codes in a level, or more items with equal codes than the last level separates.
        MissingExtraError: faiss or the encoder's package is not installed.
    """
    sizes = sizes or SIZES
    texts = data.items["text"]
    if vectors == "auto":
        vectors = "behaviour" if texts.null_count() == len(texts) else "text"
    if vectors != "behaviour" and texts.null_count() == len(texts):
        raise ConfigError(
            f"code_vectors: expected behaviour or auto for {data.kind} files without texts, got {vectors!r}"
        )
    items, parts = data.items, []
    if vectors != "behaviour":
        parts.append(text_vectors(texts, encoder))
    if vectors != "text":
        parts.append(unit(in_space(items["item_id"], space)))
    known = np.abs(parts[-1]).max(axis=1) > 0  # with both, by behaviour
    if known.sum() < max(sizes):
        most = 1 << max(1, int(known.sum()).bit_length() - 2)
        raise DataError(
            f"items: expected at least {max(sizes)} to make codes of sizes {list(sizes)} from, got {known.sum()}; pass "
            f"--sizes {most},{most}, or smaller"
        )
    values = np.concatenate(parts, axis=1)
    first, later = items.filter(pl.Series(known)), items.filter(pl.Series(~known))
    settings = SemanticIdSettings(sizes=sizes, separate=separating, seed=seed)
    ids = SemanticIds.fit(values[known], first["item_id"].to_list(), settings)
    if later.height:
        ids = ids.encode(later["item_id"].to_list(), values[~known])
    return ids, pl.concat([first, later])


def text_vectors(texts: pl.Series, encoder: str) -> Floats:
    """Vectors of unit length, float32 [n, D], by a text encoder; zero where there is no text."""
    from e2p.users.extract import encode_texts  # here: it brings torch

    some = texts.is_not_null().to_numpy()
    encoded = unit(encode_texts(texts.drop_nulls().to_list(), encoder))
    vectors = np.zeros((len(texts), encoded.shape[1]), dtype=np.float32)
    vectors[some] = encoded
    return vectors


def in_space(items: pl.Series, space: Space) -> Floats:
    """Item vectors of a space, float32 [n, D]; zero for items that are not in it."""
    rows = space.items.alias("item_id").to_frame().with_row_index("row")
    found = items.alias("item_id").to_frame().join(rows, on="item_id", how="left", maintain_order="left")["row"]
    vectors = np.zeros((len(items), space.item_vectors.shape[1]), dtype=np.float32)
    known = found.is_not_null().to_numpy()
    vectors[known] = space.item_vectors[found.drop_nulls().to_numpy()]
    return vectors


def unit(vectors: Floats) -> Floats:
    """Vectors of unit length; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
