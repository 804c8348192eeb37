"""The probe against scikit-learn's ridge and a loop over choices, and on vectors that hold everything or nothing."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import Ridge

from e2p.evaluation.probe import BUCKETS, RIVALS, normalised, probe_auc, rivals

WORDS = [f"w{number}" for number in range(300)]


def texts(count: int, seed: int, words: int = 8) -> pl.Series:
    drawn = np.random.default_rng(seed).integers(len(WORDS), size=(count, words))
    return pl.Series([" ".join(WORDS[word] for word in row) for row in drawn])


def bag(text: str) -> np.ndarray:
    counts = np.zeros(BUCKETS)
    for word, times in Counter(text.split()).items():
        counts[zlib.crc32(word.encode()) % BUCKETS] += times
    return counts


def names(count: int, each: int) -> pl.Series:
    return pl.Series([f"u{number // each}" for number in range(count)])


def test_the_auc_is_that_of_sklearns_ridge_and_a_loop() -> None:
    random = np.random.default_rng(0)
    train, test, users = texts(400, 1), texts(60, 2), names(60, 2)
    mix = random.normal(size=(BUCKETS, 6))
    x, y = (
        (np.stack([bag(text) for text in part]) @ mix + random.normal(size=(len(part), 6)) * 3).astype(np.float32)
        for part in (train, test)
    )
    probe = probe_auc(x, train, y, test, users, seed=7)

    raw = np.stack([bag(text) for text in train])
    idf = np.array([math.log(401 / (1 + (raw[:, bucket] > 0).sum())) + 1 for bucket in range(BUCKETS)])

    def unit(counts: np.ndarray) -> np.ndarray:
        return counts * idf / np.linalg.norm(counts * idf)

    z, w = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
    ridge = Ridge(alpha=0.003 * 400, solver="cholesky").fit(np.stack([unit(row) for row in raw]), z)
    rest = z - ridge.predict(np.stack([unit(row) for row in raw]))
    inverse = np.linalg.inv(rest.T @ rest / 400 + 0.1 * np.eye(6))
    expected = ridge.predict(np.stack([unit(bag(text)) for text in test]))
    wins = []
    for example, others in enumerate(rivals(users, users, None, RIVALS, 7)):
        distances = [(w[example] - expected[which]) @ inverse @ (w[example] - expected[which]) for which in others]
        own = (w[example] - expected[example]) @ inverse @ (w[example] - expected[example])
        wins += [own < distance for distance in distances]
    assert 0.6 < np.mean(wins) < 0.98
    assert probe.auc == pytest.approx(np.mean(wins), abs=0.011)  # float32: at most three close calls of 300 differ
    assert (probe.examples, probe.users) == (60, 30)


@pytest.mark.parametrize("dimension", [48, 700])  # more than 512 numbers are projected
def test_vectors_made_of_the_completion_tell_it_and_noise_does_not(dimension: int) -> None:
    random = np.random.default_rng(3)
    train, test = texts(1500, 4), texts(300, 5)
    mix = random.normal(size=(BUCKETS, dimension))
    x, y = (np.stack([bag(text) for text in part]) @ mix for part in (train, test))
    made = probe_auc(x.astype(np.float32), train, y.astype(np.float32), test, names(300, 3))
    noise = random.normal(size=(1800, dimension)).astype(np.float32)
    unmade = probe_auc(noise[:1500], train, noise[1500:], test, names(300, 3))
    assert made.auc > 0.99
    assert unmade.auc == pytest.approx(0.5, abs=0.06)


def test_equal_completions_are_ties() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    same = pl.Series(["the same words for all"] * 20)
    assert probe_auc(vectors[:20], texts(20, 0), vectors[20:], same, names(20, 2)).auc == 0.5


def test_without_another_user_or_training_there_is_no_auc() -> None:
    vectors = np.zeros((4, 2), np.float32)
    for train, users in ((vectors, pl.Series(["a"] * 4)), (vectors[:0], names(4, 1))):
        probe = probe_auc(train, texts(len(train), 0), vectors, texts(4, 1), users)
        assert math.isnan(probe.auc)
        assert (probe.examples, probe.users) == (0, 0)
    empty = probe_auc(vectors, texts(4, 0), vectors[:0], texts(0, 0), pl.Series([], dtype=pl.String))
    assert empty.examples == 0


def test_rivals_are_others_and_share_the_prompt_where_they_can() -> None:
    users = pl.Series(["a", "a", "b", "b", "c", "c", "d"])
    groups = pl.Series(["1", "1", "1", "1", "2", "2", "3"])
    prompts = pl.Series(["x", "y", "x", "y", "x", "y", "z"])
    found = rivals(users, groups, prompts, 200, 0)
    assert found.shape == (7, 200)
    partners = [set(row.tolist()) for row in found]
    assert partners[:4] == [{4}, {5}, {4}, {5}]  # b is of a's group
    assert partners[4] == {0, 2}
    assert partners[6] == {0, 1, 2, 3, 4, 5}  # nobody else was asked z
    assert (rivals(pl.Series(["a"] * 3), pl.Series(["a"] * 3), None, 2, 0) == -1).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  Don't STOP — me,\nnow!! ", "don t stop me now"),
        ("ＦＵＬＬ width ﬁ", "full width fi"),
        ("Cafe\u0301 Röyksopp №5", "café röyksopp no5"),
        ("音楽が好き OK", "音 楽 が 好 き ok"),
        ("हिन्दी में", "हिन्दी में"),
        ("...", ""),
    ],
)
def test_words_are_those_of_any_script(text: str, words: str) -> None:
    assert pl.select(normalised(pl.lit(text))).item() == words


def test_an_items_codes_are_one_word() -> None:
    texts = pl.DataFrame({"text": ["<a_12><b_3> <A_1><b_200>", "a_12 b", "next after: <a_0><b_1><c_2>"]})
    words = texts.select(normalised(pl.col("text")))["text"].to_list()
    assert words[0] == "a12b3 a1b200"
    assert words[2] == "next after a0b1c2"
