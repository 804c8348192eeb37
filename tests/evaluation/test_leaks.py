"""Every check fires on a planted leak, and not on its clean twin."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import DataConfig
from e2p.data.tables import write_embeddings
from e2p.errors import DataError
from e2p.evaluation import leaks
from e2p.evaluation.leaks import LeakCheck, check_leaks, ngrams, standing
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import text_encoder
from e2p.tasks.simulate import SimulationConfig, simulate
from e2p.training.inputs import RunInputs, load_inputs
from tiny_run import inputs_of, tiny_run

USERS, EACH = 60, 5  # 40 users train, 10 validate, 10 test
NAMES = ("users", "future", "profile", "vector", "copied")
START = datetime(2024, 1, 1, tzinfo=UTC)
WORDS = [f"word{number}" for number in range(400)]
Load = Callable[..., tuple[RunInputs, str]]


def sentences(count: int, words: int, seed: int) -> list[str]:
    drawn = np.random.default_rng(seed).integers(len(WORDS), size=(count, words))
    return [" ".join(WORDS[word] for word in row) for row in drawn]


def table(**columns: Any) -> pl.DataFrame:
    """Example e<user>-<n>: random words of ten as completion, other ones as profile; nothing leaks."""
    user = np.repeat(np.arange(USERS), EACH)
    frame = pl.DataFrame(
        {
            "example_id": [f"e{u}-{n % EACH}" for n, u in enumerate(user)],
            "user_id": [f"u{u:02d}" for u in user],
            "prompt": "hello there",
            "completion": sentences(len(user), 10, 0),
            "profile": np.repeat(sentences(USERS, 20, 1), EACH),
            "split": np.select([user < 40, user < 50], ["train", "validation"], "test"),
        }
    )
    return frame.with_columns(**columns)


def noise(dimension: int = 8, rows: int = USERS) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(rows, dimension)).astype(np.float32)


@pytest.fixture
def load(tmp_path: Path, llama: FrozenBackbone) -> Load:
    """Inputs of an example frame and of a vector per user (or of rows of an embedding table)."""

    def make(
        frame: pl.DataFrame, vectors: np.ndarray, times: Sequence[datetime] | None = None
    ) -> tuple[RunInputs, str]:
        source = str(tmp_path / "examples.parquet")
        frame.write_parquet(source)
        users = frame["user_id"].unique(maintain_order=True)
        write_embeddings(tmp_path / "vectors.parquet", users, vectors, times)
        config = DataConfig(source, str(tmp_path / "vectors.parquet"), cache_dir=str(tmp_path / "cache"))
        return load_inputs(config, text_encoder(llama, config, 1), "before_completion"), source

    return make


def checks(made: tuple[RunInputs, str], seed: int = 42) -> dict[str, LeakCheck]:
    return dict(zip(NAMES, check_leaks(*made, seed), strict=True))


def fired(found: dict[str, LeakCheck]) -> set[str]:
    return {name for name, check in found.items() if check.fired}


def told(found: dict[str, LeakCheck]) -> set[str]:
    return {name for name, check in found.items() if check.told}


def figures(found: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", found)]


def test_a_clean_run_fires_nothing_and_says_what_was_judged(load: Load) -> None:
    found = checks(load(table(), noise()))
    assert fired(found) == set()
    assert found["users"].found == "none of 10 test users has examples in training or validation"
    assert found["profile"].found.startswith(
        "test: 0 of 50 completions stand in the own profile, 0 in another's; train"
    )
    assert "AUC 0." in found["vector"].found
    assert found["copied"].found.startswith("0 of 50 test completions of at least 8 words (0.0%)")
    assert all(check.examples == () for check in found.values())
    assert told(found) == {"users", "profile", "copied"}  # no timestamps; fifty test examples are few for the probe


def test_the_run_in_miniature_fires_nothing(tmp_path: Path) -> None:
    """One-hot users: all test vectors are copies of training users', and all completions two words."""
    config = tiny_run(tmp_path)
    _, inputs = inputs_of(config)
    found = checks((inputs, config.data.examples))
    assert fired(found) == set()
    assert told(found) == {"users", "profile"}
    assert "4 of 4 test vectors are near-copies" in found["vector"].found
    assert "test: 0 of 8 completions of fewer than 5 words" in found["profile"].found


def test_in_miniature_a_profile_that_is_the_completion_fires(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    frame = pl.read_parquet(config.data.examples).with_columns(profile="completion")
    frame.write_parquet(config.data.examples)
    _, inputs = inputs_of(config)
    assert fired(checks((inputs, config.data.examples))) == {"profile"}


def test_the_simulated_service_fires_nothing(tmp_path: Path, load: Load, llama: FrozenBackbone) -> None:
    """Its listeners ask again for what they like, as their profiles say; nothing was made from what they ask for."""
    world = simulate(SimulationConfig(users=400, queries_per_user=5))
    world.examples.write_parquet(tmp_path / "e.parquet")
    world.embeddings.write_parquet(tmp_path / "v.parquet")
    config = DataConfig(str(tmp_path / "e.parquet"), str(tmp_path / "v.parquet"), cache_dir=str(tmp_path / "cache"))
    found = checks((load_inputs(config, text_encoder(llama, config, 1), "before_completion"), config.examples))
    assert fired(found) == set()
    assert told(found) == set(NAMES)
    own, other = (float(n) for n in re.findall(r"of a list's items ([\d.]+)% and ([\d.]+)%", found["profile"].found)[0])
    assert own > 2 * other > 0
    (auc,) = re.findall(r"AUC (0\.\d+)", found["vector"].found)
    assert 0.7 < float(auc) < 0.97
    assert found["future"].found.startswith("0 of 2,000 examples")


def test_the_simulated_service_fires_nothing_where_it_is_asked_for_one_artist(
    tmp_path: Path, llama: FrozenBackbone
) -> None:
    """Honest profiles name one in five of the artists that are asked for, of two or three words."""
    world = simulate(SimulationConfig(users=400, queries_per_user=5, playlist_length=1))
    world.examples.write_parquet(tmp_path / "e.parquet")
    world.embeddings.write_parquet(tmp_path / "v.parquet")
    config = DataConfig(str(tmp_path / "e.parquet"), str(tmp_path / "v.parquet"), cache_dir=str(tmp_path / "cache"))
    found = checks((load_inputs(config, text_encoder(llama, config, 1), "before_completion"), config.examples))
    assert fired(found) == set()
    held, of, _, chance = figures(found["profile"].found)[:4]
    assert (of, held > 3 * chance, held > 0.1 * of) == (200, True, True)
    assert (found["vector"].told, found["copied"].told) == (False, False)
    assert re.search(r"too short to judge: completions of [12]\.\d words on average$", found["vector"].found)
    assert found["copied"].found.endswith("too few to judge")


# --- users and times


def crossing(offset: timedelta | None) -> pl.DataFrame:
    """User u00, in training until hour 4, has five examples in test too, from ``offset`` after that on."""
    frame = table(group=pl.col("example_id"))
    more = frame.head(EACH).with_columns(
        example_id=pl.col("example_id") + "-again",
        group=pl.lit("again"),
        split=pl.lit("test"),
        completion=pl.Series(sentences(EACH, 10, 9)),
    )
    both = pl.concat([frame, more])
    hours = pl.Series([*(n % EACH for n in range(len(frame))), *range(EACH)])
    if offset is None:
        return both
    late = pl.Series([timedelta()] * len(frame) + [offset + timedelta(hours=4)] * EACH)
    return both.with_columns(timestamp=pl.lit(START) + hours.cast(pl.Duration("us")) * 3_600_000_000 + late)


def test_a_test_user_in_training_fires(load: Load) -> None:
    found = checks(load(crossing(None), noise()))
    assert fired(found) == {"users"}
    assert found["users"].examples == ("user u00: 5 examples in test, 5 in training or validation",)
    assert figures(found["users"].found) == [1, 11]


@pytest.mark.parametrize(("offset", "fires"), [(timedelta(hours=1), False), (timedelta(0), True)])
def test_a_split_by_time_is_one_if_all_is_later(load: Load, offset: timedelta, fires: bool) -> None:
    frame = crossing(offset)
    found = checks(load(frame, noise()))
    assert found["users"].fired is fires
    assert found["vector"].found.startswith("0 of 11 test vectors")  # nobody is his own near-copy
    if not fires:
        assert found["users"].found == "split by time: 1 users in both, all test examples later"
        unknown = pl.when(pl.col("example_id") == "e0-2").then(None).otherwise("timestamp")
        assert checks(load(frame.with_columns(timestamp=unknown), noise()))["users"].fired


def test_users_in_test_and_validation_count_as_trained_on(load: Load) -> None:
    frame = crossing(None).with_columns(
        split=pl.when(pl.col("split") == "train", pl.col("user_id") == "u00")
        .then(pl.lit("validation"))
        .otherwise("split")
    )
    assert checks(load(frame, noise()))["users"].fired


def test_vectors_from_the_future(load: Load) -> None:
    frame = table(timestamp=pl.lit(START + timedelta(days=1)))
    frame = pl.concat(
        [frame, frame.tail(1).with_columns(example_id=pl.lit("late"), timestamp=START + timedelta(days=9))]
    )
    made, source = load(frame, noise(), [START + timedelta(days=u == 7) for u in range(USERS)])
    clean = checks((made, source))["future"]
    assert (clean.fired, figures(clean.found)) == (False, [0, 301])
    keys = made.embeddings.keys.with_columns(
        timestamp=pl.when(pl.col("user_id") == "u07")
        .then(START + timedelta(days=1, microseconds=1))
        .otherwise("timestamp")
    )
    late = checks((replace(made, embeddings=replace(made.embeddings, keys=keys)), source))["future"]
    assert late.fired
    assert figures(late.found) == [5, 301]
    assert late.examples[0] == ("e7-0: of 2024-01-02T00:00:00+00:00, its vector of 2024-01-02T00:00:00.000001+00:00")


def test_times_on_one_side_tell_nothing(load: Load) -> None:
    timed = checks(load(table(timestamp=pl.lit(START)), noise()))["future"]
    assert (timed.fired, timed.found) == (
        False,
        "cannot be told: the examples have timestamps, the vectors have none",
    )
    found = checks(load(table(), noise()))["future"]
    assert (found.fired, found.told, found.found) == (False, False, "cannot be told: the examples have no timestamps")


# --- the profile


def test_without_test_examples_or_vectors_there_is_nothing_to_judge(load: Load) -> None:
    inputs, source = load(table(timestamp=pl.lit(START)), noise(), [START] * USERS)
    untested = checks((replace(inputs, split=np.minimum(inputs.split, 1)), source))
    assert fired(untested) == told(untested) - {"future"} == set()
    assert untested["users"].found == "nothing to judge: no test examples"
    assert untested["profile"].found.startswith("test: nothing to judge: no completion with a profile; training: 0 of")
    without = checks((replace(inputs, vector_rows=np.full(USERS * EACH, -1)), source))["future"]
    assert (without.fired, without.told, without.found) == (False, False, "nothing to judge: no example has a vector")


@given(
    st.lists(st.sampled_from("abc"), max_size=9),
    st.lists(st.sampled_from("abc"), max_size=14),
    st.integers(min_value=3, max_value=6),
)
def test_shared_ngrams_are_those_of_a_loop(completion: list[str], profile: list[str], n: int) -> None:
    runs = {tuple(profile[i : i + k]) for k in range(1, n + 1) for i in range(len(profile) - k + 1)}
    size = min(n, len(completion))
    own = [tuple(completion[i : i + size]) for i in range(len(completion) - size + 1)] if size else []
    grams = ngrams(" ".join(completion), n)
    assert [tuple(gram.split()) for gram in grams] == own
    assert standing(grams, " ".join(profile)) == [" ".join(gram) for gram in own if gram in runs]


def test_phrases_stand_as_whole_words() -> None:
    assert standing(["air", "blur", "low"], "i like air and slow blurred things") == ["air"]


@pytest.mark.parametrize("part", ["test", "train"])
def test_a_profile_that_quotes_the_completion_fires(load: Load, part: str) -> None:
    """Two examples of a hundred; half of the completion, in other case and punctuation."""
    told = pl.col("example_id").is_in(["e3-0", "e9-1", "e11-1", "e14-2", "e51-0", "e52-1", "e53-1"])
    quote = pl.format("{} I SAID: {}!", "profile", pl.col("completion").str.slice(0, 60).str.to_uppercase())
    frame = table(profile=pl.when(told, pl.col("split") == part).then(quote).otherwise("profile"))
    found = checks(load(frame, noise()))
    assert fired(found) == {"profile"}
    first = {"test": "e51-0", "train": "e3-0"}[part]
    assert found["profile"].examples[0].startswith(f"{first}: word")
    words = frame.filter(pl.col("example_id") == first)["completion"].item().split()
    assert found["profile"].examples[0] == f"{first}: {' '.join(words)}"[: len(found["profile"].examples[0])]
    assert len(found["profile"].examples) == 3


def test_two_cases_are_chance_and_so_is_what_all_profiles_say(load: Load) -> None:
    told = pl.col("example_id").is_in(["e51-0", "e52-1"])
    two = table(profile=pl.when(told).then("completion").otherwise("profile"))
    found = checks(load(two, noise()))["profile"]
    assert (found.fired, figures(found.found)[:3]) == (False, [2, 50, 0])
    stock = table(
        profile=pl.format("{} i am glad to help you", "profile"),
        completion=pl.when(pl.col("example_id").str.ends_with("-0"))
        .then(pl.lit("I am glad to help you."))
        .otherwise("completion"),
    )
    found = checks(load(stock, noise()))["profile"]
    assert (found.fired, figures(found.found)[:3]) == (False, [10, 50, 10])


@pytest.mark.parametrize(("cases", "fires"), [(4, False), (5, True)])
def test_more_than_one_in_a_hundred_fires(load: Load, cases: int, fires: bool) -> None:
    again = table(example_id=pl.col("example_id") + "-again", completion=pl.Series(sentences(USERS * EACH, 10, 5)))
    told = pl.int_range(pl.len()) < cases
    frame = pl.concat([table(), again]).with_columns(profile=pl.when(told).then("completion").otherwise("profile"))
    found = checks(load(frame, noise()))["profile"]
    assert found.fired is fires
    assert f"training: {cases} of 400 completions" in found.found


@pytest.mark.parametrize("words", [1, 2, 4])
def test_short_completions_are_judged_whole_and_all_together(load: Load, words: int) -> None:
    """A favourite that is asked for four times in five is taste; nearly always, it was written into the profile."""
    short = table(completion=pl.col("completion").str.split(" ").list.head(words).list.join(" "))
    liked = pl.format("likes {} now", "completion")
    found = checks(load(short.with_columns(profile=liked), noise()))
    assert fired(found) == {"profile"}
    assert found["profile"].found.startswith(
        "test: 50 of 50 completions of fewer than 5 words stand in the own profile"
    )
    assert found["profile"].examples[0] == f"e50-0: {short['completion'][50 * EACH]}"
    often = pl.when(pl.col("example_id").str.ends_with("-0")).then("profile").otherwise(liked)
    found = checks(load(short.with_columns(profile=often), noise()))
    assert fired(found) == set()
    assert found["profile"].told
    assert figures(found["profile"].found)[0] == pytest.approx(40, abs=3)  # one word may stand in a profile by chance


def test_labels_that_most_profiles_name_and_few_short_replies_are_no_leak(load: Load) -> None:
    labels = ["pop", "rock", "jazz", "soul"]
    three = pl.Series([" ".join(labels[:n] + labels[n + 1 :]) for n in np.arange(USERS * EACH) % 4])
    label = pl.Series([labels[(n + 1) % 4] for n in range(USERS * EACH)])
    found = checks(load(table(completion=label, profile=three), noise()))["profile"]
    held, of, _, chance = figures(found.found)[:4]
    assert (found.fired, held, of) == (False, 50, 50)
    assert chance > 25
    again = table(example_id=pl.col("example_id") + "-again", completion=pl.Series(sentences(USERS * EACH, 10, 5)))
    reply = pl.int_range(pl.len()) < 4
    frame = pl.concat([table(), again]).with_columns(
        completion=pl.when(reply).then(pl.lit("i do")).otherwise("completion"),
        profile=pl.when(reply).then(pl.lit("i do sing")).otherwise("profile"),
    )
    found = checks(load(frame, noise()))["profile"]
    assert (found.fired, found.examples) == (False, ())
    assert "training: 4 of 4 completions of fewer than 5 words" in found.found


@pytest.mark.parametrize("separator", [" ; ", ", ", "\n"])
def test_lists_are_judged_by_item_in_any_order(load: Load, separator: str) -> None:
    """Own favourites: all of the list is a leak, half of it is a listener who comes back."""
    items = pl.Series([[f"{a} {b}", c, f"{d} band", e] for a, b, c, d, e in
                       (text.split() for text in sentences(USERS * EACH, 5, 4))])  # fmt: skip
    frame = table(completion=items.list.join(separator))
    whole = frame.with_columns(profile=pl.format("i like {}.", items.list.reverse().list.join(", ")))
    found = checks(load(whole, noise()))
    assert fired(found) == {"profile"}
    assert "test: 0 of 50 completions" in found["profile"].found
    assert "test: 50 of 50 lists stand in the own profile, 0 in another's" in found["profile"].found
    assert found["profile"].examples[0].count(", ") == 3
    half = frame.with_columns(profile=pl.format("i like {}.", items.list.head(2).list.reverse().list.join(", ")))
    found = checks(load(half, noise()))
    assert fired(found) == set()
    assert "test: 0 of 50 lists" in found["profile"].found
    assert "(of a list's items 50.0% and" in found["profile"].found


def test_the_exchange_is_with_another_group(load: Load) -> None:
    """Two users share every group and its profile: quoting it is not made chance by the twin's saying the same."""
    frame = table(group=pl.lit("g") + (pl.col("user_id").str.slice(1).cast(pl.Int64) // 2).cast(pl.String))
    first = pl.col("completion").first().over("group")
    told = checks(load(frame.with_columns(completion=first, profile=first), noise()))["profile"]
    assert told.fired
    assert told.found.startswith("test: 50 of 50 completions stand in the own profile, 0 in another's")


def test_without_profiles_or_other_users_there_is_nothing_to_judge(load: Load) -> None:
    nothing = "nothing to judge: no completion with a profile"
    empty = pl.Series(["", None, " ! "] * (USERS * EACH // 3))
    for frame in (table().drop("profile"), table(profile=empty)):
        found = checks(load(frame, noise()))["profile"]
        assert (found.fired, found.told, found.found) == (False, False, f"test: {nothing}; training: {nothing}")
    alone = table(split=pl.when(pl.col("user_id") > "u50", pl.col("split") == "test").then(None).otherwise("split"))
    alone = alone.filter(pl.col("split").is_not_null())
    found = checks(load(alone, noise(rows=51)))["profile"]
    assert (found.fired, found.told) == (False, False)
    assert found.found.startswith("test: nothing to judge: too few to compare with another user's; training: 0 of 200")


# --- the vector, and completions in training


def twins(completions: bool, vectors: bool) -> tuple[pl.DataFrame, np.ndarray]:
    """Test users u50 to u54 are training users u00 to u04 under another name, with their completions or vectors."""
    frame, made = table(), noise()
    if vectors:
        made[50:55] = made[:5]
    if completions:
        texts = frame["completion"].to_list()
        texts[50 * EACH : 55 * EACH] = texts[: 5 * EACH]
        frame = frame.with_columns(completion=pl.Series(texts))
    return frame, made


def test_accounts_that_are_copies_fire(load: Load) -> None:
    found = checks(load(*twins(True, True)))
    assert fired(found) == {"vector", "copied"}
    assert figures(found["vector"].found)[:4] == [5, 10, 25, 25]
    assert found["vector"].examples[0].startswith("e50-0: u50 and training user u00: word")
    assert found["copied"].found.startswith("25 of 50 test completions of at least 8 words (50.0%)")
    assert found["copied"].examples[0].startswith("e50-0: word")


def test_equal_vectors_alone_and_equal_texts_alone_are_no_leak(load: Load) -> None:
    """Users may share a segment's vector; and strangers may write the same."""
    vectors = checks(load(*twins(False, True)))
    assert fired(vectors) == set()
    assert vectors["vector"].found.startswith(
        "5 of 10 test vectors are near-copies of another training user's, who wrote 0"
    )
    texts = checks(load(*twins(True, False)))
    assert fired(texts) == set()
    assert texts["vector"].found.startswith("0 of 10 test vectors")
    assert texts["copied"].found.startswith("25 of 50")
    assert texts["copied"].examples[0].startswith("e50-0: word")


def test_the_nearest_user_need_not_be_a_copy_for_completions_to_be_recited(load: Load) -> None:
    frame, made = twins(True, True)
    made[50:55] += 0.05
    assert fired(checks(load(frame, made))) == {"copied"}


def test_short_completions_of_equal_users_are_not_judged(load: Load) -> None:
    frame, made = twins(True, True)
    short = frame.with_columns(completion=pl.col("completion").str.split(" ").list.head(4).list.join(" "))
    found = checks(load(short, made))
    assert fired(found) == set()
    assert told(found) == {"users", "profile"}


@pytest.mark.parametrize("jitter", [0.0, 1e-5])
@pytest.mark.parametrize(("share", "doubled"), [(0.3, False), (0.9, False), (1.0, False), (1.0, True)])
def test_near_copies_are_known_however_many_there_are(load: Load, share: float, jitter: float, doubled: bool) -> None:
    """So many test vectors are a training user's, a little moved; or everybody in training has two accounts as well."""
    frame, made, random = table(), noise(16), np.random.default_rng(3)
    if doubled:
        made[20:40] = made[:20] + jitter * random.normal(size=(20, 16))
    copies = round(share * 10)
    made[50 : 50 + copies] = made[:copies] + jitter * random.normal(size=(copies, 16))
    texts = frame["completion"].to_list()
    texts[50 * EACH : (50 + copies) * EACH] = texts[: copies * EACH]
    if doubled:
        texts[20 * EACH : 40 * EACH] = texts[: 20 * EACH]
    found = checks(load(frame.with_columns(completion=pl.Series(texts)), made))
    assert fired(found) == {"vector", "copied"}
    assert found["vector"].found.startswith(f"{copies} of 10 test vectors are near-copies")
    assert found["vector"].told


def test_few_kinds_of_users_with_their_stock_sentences_are_no_near_copies(load: Load) -> None:
    """One-hot in four kinds, five words a kind: the twin says the same four times as often as a stranger, not ten."""
    kind = pl.col("user_id").str.slice(1).cast(pl.Int64) % 4
    frame = table(completion=pl.format("i would like some kind{}", kind))
    found = checks(load(frame, np.eye(4, dtype=np.float32)[np.arange(USERS) % 4]))
    assert fired(found) == set()
    near, users, same, judged, chance = figures(found["vector"].found.partition(";")[0].replace("5 words", ""))
    assert (near, users, same, judged) == (10, 10, 50, 50)
    assert chance == pytest.approx(12.5, abs=4)


@pytest.mark.parametrize("kinds", [1, 4, 20])
def test_segments_vectors_shared_by_many_users_are_no_leak(load: Load, kinds: int) -> None:
    found = checks(load(table(), np.eye(kinds, 20, dtype=np.float32)[np.arange(USERS) % kinds]))
    assert fired(found) == set()
    assert found["vector"].found.startswith(
        "10 of 10 test vectors are near-copies of another training user's, who wrote 0"
    )


def test_a_vector_made_of_the_completions_fires_and_a_vector_of_taste_does_not(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, each = 200, 4
    user = np.repeat(np.arange(users), each)
    favourites = np.random.default_rng(0).integers(len(WORDS), size=(users, 30))
    drawn = np.take_along_axis(favourites[user], np.random.default_rng(1).integers(30, size=(len(user), 8)), 1)
    frame = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "prompt": "hello",
            "completion": [" ".join(WORDS[word] for word in row) for row in drawn],
            "split": np.select([user < 150, user < 155], ["train", "validation"], "test"),
        }
    )

    def vectors(words: np.ndarray) -> np.ndarray:
        counts = np.zeros((users, len(WORDS)), np.float32)
        np.add.at(counts, (np.arange(users)[:, None], words), 1)
        return counts @ np.random.default_rng(2).normal(size=(len(WORDS), 200)).astype(np.float32)

    leaked = checks(load(frame, vectors(drawn.reshape(users, -1))))
    assert fired(leaked) == {"vector"}
    taste = checks(load(frame, vectors(favourites)))
    assert (fired(taste), taste["vector"].told) == (set(), True)
    (auc,) = re.findall(r"AUC (0\.\d+) \(180 examples, 45 users\)", taste["vector"].found)
    assert 0.75 < float(auc) < 0.99
    monkeypatch.setattr(leaks, "PROBED", (181, 20))
    few = checks(load(frame, vectors(drawn.reshape(users, -1))))
    assert (fired(few), few["vector"].told) == (set(), False)
    assert "(180 examples, 45 users: too few to judge)" in few["vector"].found


# --- large tables and wrong ones


def test_samples_are_said_and_seeded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, made = twins(True, True)
    loaded = load(frame, made)
    monkeypatch.setattr(leaks, "SAMPLE", 40)
    monkeypatch.setattr(leaks, "NEIGHBOURS", (8, 100))
    found = checks(loaded)
    assert found == checks(loaded)
    assert found != checks(loaded, seed=1)
    assert "test: 0 of 40 completions" in found["profile"].found
    assert found["profile"].found.endswith("(a sample of 40 examples of test and training)")
    assert "a sample of 8 test and 100 training vectors at most" in found["vector"].found
    # Test completions are looked for among all of training's, whatever was sampled.
    assert figures(found["copied"].found)[0] == pytest.approx(20, abs=6)


def test_users_without_vectors_can_be_checked(load: Load) -> None:
    inputs, source = load(table(), noise())
    none = replace(inputs, vector_rows=np.full(USERS * EACH, -1))
    found = checks((none, source))
    assert fired(found) == set()
    assert told(found) == {"users", "profile"}
    assert found["vector"].found == (
        "0 of 0 test vectors are near-copies of another training user's; nothing for the probe to judge: it needs "
        "training vectors and two test users with vectors"
    )


def test_another_table_is_refused(load: Load, tmp_path: Path) -> None:
    inputs, _ = load(table(), noise())
    for name, frame in (("short", table().head(10)), ("long", pl.concat([table(), table(example_id=pl.lit("x"))[:1]]))):
        frame.write_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=rf"{name}\.parquet: expected the 300 examples of the run"):
            check_leaks(inputs, str(tmp_path / f"{name}.parquet"))
