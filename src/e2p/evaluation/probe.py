"""Does a vector tell its user's completion from another's? Asked without a language model, in seconds."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.batches import Ints

Floats = npt.NDArray[np.float32]

BUCKETS = 1024  # hashed words
WIDTH = 512  # numbers of a vector; longer ones are projected
RIVALS = 5  # other completions for each

# Scripts without spaces between words count by the character.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
_WORD = rf"[{_UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+"
_CODE = r"<([a-z])_(\d+)>"  # one level of a semantic id


class Probe(NamedTuple):
    """How well vectors tell completions apart: AUC (0.5: not at all), and the examples and users it was measured on."""

    auc: float
    examples: int
    users: int


def probe_auc(
    train_vectors: Floats,
    train_completions: pl.Series,
    test_vectors: Floats,
    test_completions: pl.Series,
    users: pl.Series,
    groups: pl.Series | None = None,
    prompts: pl.Series | None = None,
    seed: int = 42,
) -> Probe:
    """Does a vector tell its user's completion from another's? Without a language model, in seconds.

    A ridge regression learns from training examples what vector to expect of a completion's words (hashed, weighted by
    inverse document frequency, unit length). A test vector then chooses between its own completion and another test
    user's: the one whose expected vector is nearer, in units of what the regression leaves unexplained.

    Args:
        train_vectors: float32 [n, D], one row per training example.
        train_completions: texts [n].
        test_vectors: float32 [m, D], one row per test example.
        test_completions: texts [m].
        users: user of each test example [m].
        groups: its group [m]; the other completion is of another user and another group.
        prompts: its prompt [m]; the other completion is of the same prompt where there is one.
        seed: seed of the other completions, five for each example.

    Returns:
        Share of the choices that are right, ties counting half; NaN without another user or without training examples.
    """
    others = rivals(users, users if groups is None else groups, prompts, RIVALS, seed)
    known = (others >= 0).all(1) & (len(train_vectors) > 0)
    if not known.any():
        return Probe(float("nan"), 0, 0)
    mean, scale = statistics(train_vectors)
    x, y = (train_vectors - mean) / scale, (test_vectors - mean) / scale
    if x.shape[1] > WIDTH:  # a random projection keeps distances (Johnson and Lindenstrauss), and this to seconds
        shadow = np.random.default_rng([seed, 3]).normal(0, x.shape[1] ** -0.5, (x.shape[1], WIDTH)).astype(np.float32)
        x, y = x @ shadow, y @ shadow
    bags, asked = _bags(train_completions), _bags(test_completions)
    weight = np.log((1 + len(bags)) / (1 + (bags > 0).sum(0))) + 1
    bags, asked = (_unit(counts * weight) for counts in (bags, asked))
    bags, asked = bags - bags.mean(0), asked - bags.mean(0)
    # Both penalties were chosen on Persona-Chat, Last.fm and simulated tables; the AUC hardly depends on them.
    learned = np.linalg.solve(bags.T @ bags + 0.003 * len(bags) * np.eye(BUCKETS), bags.T @ x)
    rest, expected = x - bags @ learned, asked @ learned
    precision = np.linalg.inv(rest.T @ rest / len(rest) + 0.1 * np.eye(x.shape[1]))

    def away(which: Ints) -> npt.NDArray[np.float64]:
        apart = y[known] - expected[which]
        return ((apart @ precision) * apart).sum(1)

    own = away(np.flatnonzero(known))
    gaps = np.stack([away(others[known, n]) - own for n in range(RIVALS)]) / (1 + own)
    right = (gaps > 1e-6).mean() + (np.abs(gaps) <= 1e-6).mean() / 2
    return Probe(float(right), int(known.sum()), users.filter(pl.Series(known)).n_unique())


def rivals(users: pl.Series, groups: pl.Series, prompts: pl.Series | None, rounds: int, seed: int) -> Ints:
    """For each example, others at random: of other users and groups, and of the same prompt where there are such.

    Returns:
        Index of the other example [n, rounds]; -1 where there is no other user.
    """
    random, count = np.random.default_rng([seed, 2]), len(users)
    owners = np.stack([codes(users), codes(groups)])
    kinds = np.zeros(count, np.int64) if prompts is None else codes(prompts)
    sizes, order = np.bincount(kinds), np.argsort(kinds, kind="stable")
    first = np.cumsum(sizes) - sizes
    found = np.full((count, rounds), -1)
    for column in found.T:
        for same_prompt in [True] * 50 + [False] * 50:  # draws until each has met another user
            left = np.flatnonzero(column < 0)
            if not len(left):
                break
            kind = kinds[left]
            drawn = order[first[kind] + random.integers(sizes[kind])]
            pick = drawn if same_prompt else random.integers(count, size=len(left))
            other = (owners[:, pick] != owners[:, left]).all(0)
            column[left[other]] = pick[other]
    return found


def normalised(texts: pl.Expr) -> pl.Expr:
    """The words of a text in lower case, single spaces between them. An item's codes side by side are one word."""
    text = texts.str.normalize("NFKC").str.to_lowercase().str.replace_all(_CODE, "$1$2")
    return text.str.extract_all(_WORD).list.join(" ")


def codes(values: pl.Series) -> Ints:
    """Whole numbers instead of texts."""
    return np.unique(values.to_numpy(), return_inverse=True)[1].astype(np.int64)


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _bags(texts: pl.Series) -> npt.NDArray[np.float64]:
    """Counts of hashed words [n, BUCKETS]; crc32, for Polars' own hash changes with its version."""
    words = pl.select(row=pl.int_range(len(texts)), word=normalised(pl.lit(texts)).str.split(" ")).explode("word")
    names = words["word"].unique()
    buckets = pl.DataFrame({"word": names, "bucket": [zlib.crc32(name.encode()) % BUCKETS for name in names]})
    cells = words.join(buckets, on="word", how="left").select(pl.col("row") * BUCKETS + pl.col("bucket")).to_series()
    return np.bincount(cells.to_numpy(), minlength=len(texts) * BUCKETS).reshape(-1, BUCKETS).astype(np.float64)


def statistics(vectors: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of every number; 1 where it is constant."""
    mean, std = vectors.mean(0, dtype=np.float64), vectors.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6 * np.abs(mean), std, 1).astype(np.float32)
