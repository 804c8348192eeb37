"""What is known of a reader before an impression: the profile in words, and the vector."""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from e2p.errors import DataError
from e2p.users.asof_vectors import als_space, vectors_before
from e2p.users.behaviour import Floats

Vectors = Literal["clicks", "headlines", "profile", "both"]
ITERATIONS = 15  # of ALS


def profiles(visits: pl.DataFrame, articles: pl.DataFrame, most: int) -> pl.DataFrame:
    """``visit`` and ``profile``: headlines of the history, whole ones, joined by `` ; ``, up to ``most`` characters.

    Where it is known how long each was read, the longest read stand first, else the newest; of equal ones the newest.
    Visits without a headline are not there.
    """
    titles = articles.filter(pl.col("headline") != "").select("headline", item_id="article_id")
    clicks = _clicks(visits).join(titles, on="item_id", maintain_order="left")
    clicks = clicks.sort(
        ["visit", "dwell", "place"], descending=[False, True, True], nulls_last=True, maintain_order=True
    ).unique(["visit", "item_id"], keep="first", maintain_order=True)
    length = (pl.col("headline").str.len_chars() + 3).cum_sum().over("visit") - 3
    kept = clicks.filter(length <= most)
    return kept.group_by("visit", maintain_order=True).agg(profile=pl.col("headline").str.join(" ; "))


def user_vectors(
    visits: pl.DataFrame,
    fit_on: pl.DataFrame,
    texts: pl.DataFrame,
    articles: pl.DataFrame,
    kind: Vectors,
    encoder: str,
    dimension: int,
    regularization: float,
    alpha: float,
    seed: int,
) -> tuple[pl.DataFrame, str]:
    """The vector of each visit's user, of the visit's history and nothing else.

    Args:
        visits: ``visit`` and ``history``.
        fit_on: the visits whose histories the factors of ``clicks`` are fitted on, of each user the longest.
        texts: of :func:`profiles`.
        articles: ``article_id`` and ``headline``.
        kind: as in :func:`e2p.tasks.news.prepare`.
        encoder: of headlines and profiles.
        dimension: numbers of a vector of clicks.
        regularization: of the factors.
        alpha: how much a click counts, where none counts 1.
        seed: of the factors.

    Returns:
        ``visit`` and ``embedding``, for the visits that something is known of; with ``both``, zeros stand for the half
        that is not. And what the vectors are called.

    Raises:
        DataError: nothing is known of anybody.
        MissingExtraError, BackboneError, ConfigError: as the space and the encoder.
    """
    found: list[tuple[Floats, np.ndarray]] = []  # vectors of all visits, and which of them there are
    names = []
    numbers = visits["visit"].to_numpy()
    if kind in ("clicks", "both"):
        longest = fit_on.sort(pl.col("history").list.len(), descending=True, maintain_order=True)
        longest = longest.unique("user_id", keep="first", maintain_order=True)
        counts = _clicks(longest).select("item_id", user_id="visit", weight=pl.lit(1.0))
        space = als_space(counts, dimension, regularization, alpha, ITERATIONS, seed)
        before = _clicks(visits).select("item_id", user_id="visit", weight=pl.lit(1.0), timestamp=pl.lit(0, pl.Int64))
        asked = visits.select(user_id="visit", timestamp=pl.lit(1, pl.Int64))
        vectors, seen = vectors_before(before, asked, space)
        found.append((vectors, seen > 0))
        names.append(space.version)
    if kind in ("headlines", "both"):
        found.append(_of_headlines(visits, articles, encoder))
        names.append(f"{encoder}-headlines")
    if kind == "profile":
        found.append(_of_profiles(numbers, texts, encoder))
        names.append(f"{encoder}-profile")
    some = np.any([there for _, there in found], axis=0)
    if not some.any():
        raise DataError("vectors: expected users with a history, got none; check the histories' columns")
    together = np.concatenate([vectors for vectors, _ in found], axis=1)[some]
    embedding = pl.Series("embedding", together, dtype=pl.Array(pl.Float32, together.shape[1]))
    return pl.DataFrame({"visit": numbers[some]}).with_columns(embedding), "-".join(names)


def _clicks(visits: pl.DataFrame) -> pl.DataFrame:
    """visit, item_id, dwell (null where unknown) and place, one row a click."""
    there = visits.filter(pl.col("history").list.len() > 0)
    unknown = pl.col("history").list.eval(pl.lit(None, pl.Float64))
    rows = there.select("visit", dwell=pl.coalesce("dwell", unknown), item_id="history").explode("dwell", "item_id")
    return rows.with_columns(place=pl.int_range(pl.len()).over("visit"))


def _of_headlines(visits: pl.DataFrame, articles: pl.DataFrame, encoder: str) -> tuple[Floats, np.ndarray]:
    """Mean of the vectors of the headlines clicked, each headline encoded once."""
    titles = articles.filter(pl.col("headline") != "").select("headline", item_id="article_id")
    clicks = _clicks(visits).join(titles, on="item_id", maintain_order="left")
    distinct = clicks["headline"].unique().sort()
    if distinct.is_empty():
        raise DataError("vectors: expected histories with headlines, got none in news.tsv; take vectors of clicks")
    encoded = _encoded(distinct.to_list(), encoder)
    at = pl.DataFrame({"headline": distinct}).with_row_index("text")
    clicks = clicks.join(at, on="headline", maintain_order="left")
    row = pl.DataFrame({"visit": visits["visit"]}).with_row_index("row")
    clicks = clicks.join(row, on="visit", maintain_order="left")
    sums = np.zeros((visits.height, encoded.shape[1]), np.float32)
    rows, which = clicks["row"].to_numpy(), clicks["text"].to_numpy()
    np.add.at(sums, rows, encoded[which])
    counts = np.bincount(rows, minlength=visits.height)
    sums /= np.maximum(counts, 1)[:, None]
    return sums, counts > 0


def _of_profiles(visits: np.ndarray, texts: pl.DataFrame, encoder: str) -> tuple[Floats, np.ndarray]:
    """The encoder's vector of each visit's profile text; equal texts are encoded once."""
    own = dict(zip(texts["visit"].to_list(), texts["profile"].to_list(), strict=True))
    distinct = {text: at for at, text in enumerate(dict.fromkeys(own.values()))}
    if not distinct:
        raise DataError("vectors: expected profiles, got none; raise max_profile_chars or take vectors of clicks")
    encoded = _encoded(list(distinct), encoder)
    rows = np.array([distinct.get(own.get(visit, ""), -1) for visit in visits.tolist()], np.int64)
    vectors = encoded[np.maximum(rows, 0)]
    vectors[rows < 0] = 0
    return vectors, rows >= 0


def _encoded(texts: list[str], encoder: str) -> Floats:
    from e2p.users.extract import encode_texts  # here: it brings torch

    return encode_texts(texts, encoder)
