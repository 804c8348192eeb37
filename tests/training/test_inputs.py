"""What arms are trained and judged on: joins, splits, counts, and who is given whose vector."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import RunConfig, SplitConfig
from e2p.data.tables import EmbeddingTable, write_embeddings
from e2p.data.tokenised import TokenisedExamples
from e2p.errors import ConfigError, DataError
from e2p.training.inputs import RunInputs, deal, strangers
from e2p.training.run import shuffled_rows
from tiny_run import WORDS, examples_frame, inputs_of, tiny_run

TIME = pl.Datetime("us", "UTC")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


def load(config: RunConfig, **data: Any) -> RunInputs:
    return inputs_of(replace(config, data=replace(config.data, **data)))[1]


def keep_vectors(config: RunConfig, users: list[str]) -> None:
    table = pl.read_parquet(config.data.embeddings)
    table.filter(pl.col("user_id").is_in(users)).write_parquet(config.data.embeddings)


def test_parts_vectors_and_counts(config: RunConfig) -> None:
    inputs = load(config)
    assert dict(inputs.counts) == {
        "train": 24,
        "validation": 8,
        "test": 8,
        "train_users": 12,
        "validation_users": 4,
        "test_users": 4,
        "dropped_without_vector": 0,
        "left_out_by_train_share": 0,
        "null_user_without_vector": 0,
        "not_engaged": 0,
        "not_labelled": 0,
        "cut_prompts": 0,
        "cut_completions": 0,
    }
    users = inputs.keys["user_id"].to_list()
    for row in range(40):
        vector = inputs.embeddings.vectors[inputs.vector_rows[row]]
        assert vector.tolist() == np.eye(4)[int(users[row][1:]) % len(WORDS)].tolist()
    assert sorted(np.concatenate([inputs.rows(part) for part in ("train", "validation", "test")])) == list(range(40))
    assert inputs.train_vectors().shape == (12, 4)
    batch = inputs.examples("test").batch(inputs.rows("test")[:3])
    assert batch.present.tolist() == [True] * 3
    nobody = inputs.examples("test", vector_rows=np.full(40, -1)).batch(inputs.rows("test")[:3])
    assert not nobody.present.any()
    assert not nobody.embeddings.any()


def test_cut_texts_are_counted(config: RunConfig) -> None:
    counts = load(config, max_completion_tokens=1, max_prompt_tokens=6, long_prompt="truncate", chat="never").counts
    assert counts["cut_completions"] == 40
    # "make a playlist" and "the train home" have seven tokens, the other two prompts fewer.
    assert counts["cut_prompts"] == 20


def test_examples_without_a_vector_stop_are_dropped_or_get_the_null_user(config: RunConfig) -> None:
    keep_vectors(config, [f"u{u:02d}" for u in range(20) if u not in (1, 13)])
    with pytest.raises(DataError, match=r"4 of 40 examples have no vector.*row 2 \(user 'u01'\): the user has no vec"):
        load(config)
    dropped = load(config, missing_vector="drop")
    assert (dropped.counts["dropped_without_vector"], dropped.counts["null_user_without_vector"]) == (4, 0)
    assert (dropped.counts["train"], dropped.counts["validation"]) == (22, 6)
    assert len(dropped.rows("train")) == 22
    null = load(config, missing_vector="null")
    assert (null.counts["dropped_without_vector"], null.counts["null_user_without_vector"]) == (0, 4)
    assert null.counts["train"] == 24
    rows = np.flatnonzero(null.vector_rows < 0)
    assert null.keys["user_id"][rows.tolist()].unique().sort().to_list() == ["u01", "u13"]


def test_two_versions_are_never_mixed(config: RunConfig) -> None:
    table = pl.read_parquet(config.data.embeddings)
    version = pl.when(pl.col("user_id") < "u10").then(pl.lit("v1")).otherwise(pl.lit("v2"))
    table.with_columns(version=version).write_parquet(config.data.embeddings)
    with pytest.raises(DataError, match=r"expected vectors of one version, got v1, v2"):
        load(config)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_an_empty_part_is_refused(config: RunConfig, part: str) -> None:
    examples_frame().filter(pl.col("split") != part).write_parquet(config.data.examples)
    with pytest.raises(DataError, match=rf"the {part} part is empty"):
        load(config)


def test_a_part_emptied_by_dropping_is_refused(config: RunConfig) -> None:
    keep_vectors(config, [f"u{u:02d}" for u in range(16)])
    with pytest.raises(DataError, match="the test part is empty"):
        load(config, missing_vector="drop")


def test_a_fraction_of_zero_is_refused_with_the_part(config: RunConfig) -> None:
    examples_frame().drop("split").write_parquet(config.data.examples)
    with pytest.raises(DataError, match="the validation part is empty"):
        load(config, split=SplitConfig((0.8, 0.0, 0.2)))


@pytest.mark.parametrize("name", ["examples", "embeddings"])
def test_a_table_must_be_named(config: RunConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}: expected a table, got nothing"):
        load(config, **{name: ""})


def test_statistics_are_of_training_users_alone(config: RunConfig) -> None:
    vectors = np.zeros((20, 4), np.float32)
    vectors[12:] = 100.0  # validation and test users
    write_embeddings(config.data.embeddings, [f"u{u:02d}" for u in range(20)], vectors)
    assert not load(config).train_vectors().any()


# ---------------------------------------------------------------- dealing


def inputs_by_hand(examples: list[tuple[int, int]], vectors: list[tuple[int, int]]) -> RunInputs:
    """Examples (user, week) and vectors (user, week), joined by a loop."""

    def times(weeks: list[int]) -> pl.Series:
        return pl.Series([datetime(2024, 1, 1, tzinfo=UTC) + timedelta(weeks=w) for w in weeks], dtype=TIME)

    def newest(user: int, week: int) -> int:
        older = [(w, at) for at, (owner, w) in enumerate(vectors) if owner == user and w <= week]
        return max(older)[1] if older else -1

    users, weeks = [f"u{user}" for user, _ in examples], [week for _, week in examples]
    keys = pl.DataFrame({"row": range(len(examples)), "user_id": users, "timestamp": times(weeks)})
    owners = pl.DataFrame({"user_id": [f"u{u}" for u, _ in vectors], "timestamp": times([w for _, w in vectors])})
    table = EmbeddingTable(owners, np.zeros((len(vectors), 1), np.float32), "vectors")
    rows = np.array([newest(user, week) for user, week in examples], np.int64)
    nothing = object.__new__(TokenisedExamples)
    split, labels = np.zeros(len(examples), np.int8), np.full(len(examples), -1, np.int8)
    return RunInputs(keys, split, rows, table, labels, nothing, "before_completion", {})


PAIRS = st.tuples(st.integers(0, 5), st.integers(0, 9))


@given(st.lists(PAIRS, min_size=1, max_size=40), st.lists(PAIRS, min_size=1, max_size=30, unique=True), st.data())
def test_everybody_is_dealt_one_others_vectors_as_of_his_own_examples(
    examples: list[tuple[int, int]], vectors: list[tuple[int, int]], data: st.DataObject
) -> None:
    inputs = inputs_by_hand(examples, vectors)
    part = data.draw(st.lists(st.sampled_from(range(len(examples))), min_size=1, unique=True).map(sorted).map(np.array))
    seed = [data.draw(st.integers(0, 99))]
    known = {examples[at][0] for at in part if inputs.vector_rows[at] >= 0}
    if len(known) < 2:
        with pytest.raises(DataError, match=f"expected at least two users with a vector.*got {len(known)}"):
            deal(inputs, part, seed)
        return
    dealt = deal(inputs, part, seed)
    assert (deal(inputs, part, seed) == dealt).all()
    rest = np.setdiff1d(np.arange(len(examples)), part)
    assert (dealt[rest] == inputs.vector_rows[rest]).all()
    given_to: dict[int, set[int]] = {}
    for at in part:
        (user, week), own = examples[at], inputs.vector_rows[at]
        assert (dealt[at] < 0) == (own < 0)
        if own < 0:
            continue
        owner, made = vectors[dealt[at]]
        given_to.setdefault(user, set()).add(owner)
        weeks = [w for u, w in vectors if u == owner]
        assert made == max((w for w in weeks if w <= week), default=min(weeks))
    assert all(len(others) == 1 and user not in others for user, others in given_to.items())
    assert {next(iter(others)) for others in given_to.values()} == known  # a permutation of the users


def test_another_seed_deals_anew() -> None:
    inputs = inputs_by_hand([(user, 0) for user in range(30)], [(user, 0) for user in range(30)])
    everyone = np.arange(30)
    assert (deal(inputs, everyone, [1]) != deal(inputs, everyone, [2])).any()


def test_shuffled_rows_exchange_the_users(config: RunConfig) -> None:
    inputs = load(config)
    rows = shuffled_rows(inputs, 42)
    assert (rows != inputs.vector_rows).all()
    assert sorted(set(rows.tolist())) == sorted(set(inputs.vector_rows.tolist()))
    per_user = pl.DataFrame({"user": inputs.keys["user_id"], "row": rows}).group_by("user").agg(pl.col("row").unique())
    assert per_user["row"].list.len().to_list() == [1] * 20


@given(
    st.lists(PAIRS, min_size=1, max_size=40), st.lists(PAIRS, min_size=1, max_size=30, unique=True), st.integers(0, 9)
)
def test_a_stranger_is_another_user_as_of_the_examples_time(
    examples: list[tuple[int, int]], vectors: list[tuple[int, int]], seed: int
) -> None:
    inputs = inputs_by_hand(examples, vectors)
    part = np.arange(0, len(examples), 2)
    known = {examples[at][0] for at in part if inputs.vector_rows[at] >= 0}
    if len(known) < 2:
        with pytest.raises(DataError, match="expected at least two users with a vector"):
            strangers(inputs, part, [seed])
        return
    found = strangers(inputs, part, [seed])
    assert (strangers(inputs, part, [seed]) == found).all()
    assert (found[1::2] == inputs.vector_rows[1::2]).all()
    for at in part:
        (user, week), own = examples[at], inputs.vector_rows[at]
        assert (found[at] < 0) == (own < 0)
        if own >= 0:
            owner, made = vectors[found[at]]
            assert owner != user
            assert owner in known
            weeks = [w for u, w in vectors if u == owner]
            assert made == max((w for w in weeks if w <= week), default=min(weeks))


def test_strangers_differ_from_example_to_example_and_all_are_met() -> None:
    inputs = inputs_by_hand([(user, 0) for user in range(5)] * 100, [(user, 0) for user in range(5)])
    found = strangers(inputs, np.arange(500), [1])
    of_the_first = found[::5]
    assert np.bincount(of_the_first, minlength=5)[0] == 0
    assert (np.bincount(of_the_first, minlength=5)[1:] > 10).all()


def test_a_share_of_the_training_users_leaves_the_rest_of_the_split_as_it_was(config: RunConfig) -> None:
    whole = load(config)
    part = load(replace(config, data=replace(config.data, train_share=0.5)))
    assert part.counts["train_users"] == whole.counts["train_users"] // 2
    assert part.counts["dropped_without_vector"] == 0
    assert part.counts["left_out_by_train_share"] == whole.counts["train"] - part.counts["train"] > 0
    for name in ("validation", "test"):
        assert (part.rows(name) == whole.rows(name)).all()
    assert set(part.rows("train")) < set(whole.rows("train"))
