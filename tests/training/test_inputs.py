"""What arms are trained and judged on: joins, splits, counts, and who is given whose vector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import RunConfig, SplitConfig
from e2p.data.tables import write_embeddings
from e2p.errors import ConfigError, DataError
from e2p.training.inputs import RunInputs, deal
from e2p.training.run import shuffled_rows
from tiny_run import WORDS, examples_frame, inputs_of, tiny_run


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
        "null_user_without_vector": 0,
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


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 30)), min_size=1, max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_nobody_is_dealt_a_vector_of_his_own(pairs: list[tuple[int, int]], seed: int) -> None:
    users = np.array([f"u{user}" for user, _ in pairs])
    # Rows of the table belong to one user each.
    rows = np.array([row * 10 + user if row >= 0 else -1 for user, row in pairs], np.int64)
    owners = {int(row): user for row, user in zip(rows, users, strict=True) if row >= 0}
    known = set(owners.values())
    if len(known) < 2:
        with pytest.raises(DataError, match=f"expected at least two users with a vector.*got {len(known)}"):
            deal(users, rows, [seed])
        return
    dealt = deal(users, rows, [seed])
    assert ((dealt < 0) == (rows < 0)).all()
    given_to: dict[str, set[str]] = {}
    for user, row in zip(users, dealt, strict=True):
        if row >= 0:
            assert owners[int(row)] != user
            given_to.setdefault(str(user), set()).add(owners[int(row)])
    assert all(len(others) == 1 for others in given_to.values())
    assert {next(iter(others)) for others in given_to.values()} == known  # a permutation of the users
    assert (deal(users, rows, [seed]) == dealt).all()


def test_another_seed_deals_anew() -> None:
    users, rows = np.array([f"u{i}" for i in range(30)]), np.arange(30)
    assert (deal(users, rows, [1]) != deal(users, rows, [2])).any()


def test_shuffled_rows_exchange_the_users(config: RunConfig) -> None:
    inputs = load(config)
    rows = shuffled_rows(inputs, 42)
    assert (rows != inputs.vector_rows).all()
    assert sorted(set(rows.tolist())) == sorted(set(inputs.vector_rows.tolist()))
    per_user = pl.DataFrame({"user": inputs.keys["user_id"], "row": rows}).group_by("user").agg(pl.col("row").unique())
    assert per_user["row"].list.len().to_list() == [1] * 20
