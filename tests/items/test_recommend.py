"""Recommending from a trained run: the lists are the decoder's own, new items are reachable, the command shows them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2p.cli import main
from e2p.config import ProjectorConfig, RunConfig
from e2p.config_io import load_yaml, save_yaml
from e2p.data.tables import open_embeddings
from e2p.errors import DataError
from e2p.evaluation.judge import judge
from e2p.items.recommend import ItemRecommender
from e2p.items.semantic_ids import SemanticIds, SemanticIdSettings
from e2p.items.trie import Trie
from e2p.items.vocabulary import add_code_tokens, open_codes
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.training.run import train
from tiny import tiny_backbone
from tiny_next import next_item_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = next_item_run(tmp_path_factory.mktemp("recommend"))
    judged = replace(config.evaluation, next_item=replace(config.evaluation.next_item, seen="keep"))
    config = replace(config, evaluation=judged)
    train(config)
    return config


@pytest.fixture(scope="module")
def recommender(config: RunConfig) -> ItemRecommender:
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    model = E2PModel.from_pretrained(Path(config.output) / "adapter", backbone)
    return ItemRecommender.of(model, open_codes(config.evaluation.next_item.codes))


def test_the_lists_are_those_of_the_evaluation(config: RunConfig, recommender: ItemRecommender) -> None:
    judge(config.output)
    kept = pl.read_parquet(Path(config.output) / "recommended.parquet")
    examples = pl.read_parquet(config.data.examples)
    vectors = open_embeddings(config.data.embeddings)
    names = recommender.vocabulary.ids
    own = kept.filter((pl.col("arm") == "e2p") & (pl.col("way") == "beam")).head(5)
    plain = kept.filter((pl.col("arm") == "none") & (pl.col("way") == "beam")).head(5)
    rows = [int(row) for row in own["example_id"]]
    numbers = [len(examples["prompt"][row].split()) - 3 for row in rows]  # some i0, then i1
    histories = [["i0"] * count + ["i1"] for count in numbers]
    users = vectors.keys["user_id"].to_list()
    of_users = np.stack([vectors.vectors[users.index(examples["user_id"][row])] for row in rows])
    for use_prefix, wanted in ((True, own), (False, plain)):
        found = recommender.recommend(histories, of_users, use_prefix=use_prefix, k=12)
        assert [[one.item for one in line] for line in found] == wanted["items"].to_list()
        for line, logprobs in zip(found, wanted["logprobs"], strict=True):
            np.testing.assert_allclose([one.logprob for one in line], logprobs.to_numpy(), atol=1e-4)
    drawn = recommender.recommend(histories, of_users, by="sample", samples=50, k=3)
    again = recommender.recommend(histories, of_users, by="sample", samples=50, k=3)
    assert drawn == again
    for line in drawn:
        assert len({one.item for one in line}) == len(line) <= 3
        assert all(one.item in names.rows for one in line)
        assert [one.logprob for one in line] == sorted((one.logprob for one in line), reverse=True)


@given(st.lists(st.integers(0, 11), max_size=12), st.integers(1, 12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_excluded_is_left_out_and_nothing_else(recommender: ItemRecommender, had: list[int], k: int) -> None:
    out = {f"i{item}" for item in had}
    history, vector = [["i3", "i4"]], np.array([[0.0, 1.0]], np.float32)
    whole = [one.item for one in recommender.recommend(history, vector, k=12, exact=True)[0]]
    found = [one.item for one in recommender.recommend(history, vector, exclude=[out], k=k, exact=True)[0]]
    assert found == [item for item in whole if item not in out][:k]


def test_many_users_are_read_in_passes(recommender: ItemRecommender) -> None:
    histories = [[f"i{row % 12}"] * (1 + row % 5) for row in range(11)]
    vectors = np.eye(2, dtype=np.float32)[np.arange(11) % 2]
    whole, parts = (recommender.recommend(histories, vectors, k=4, tokens_per_pass=size) for size in (8192, 40))
    assert [[one.item for one in found] for found in whole] == [[one.item for one in found] for found in parts]


def test_the_window_shows_the_newest_items(recommender: ItemRecommender) -> None:
    vector = np.array([[1.0, 0.0]], np.float32)
    short = ItemRecommender(recommender.model, recommender.vocabulary, window=2)
    long_, cut = short.recommend([["i5", "i7", "i2", "i3"]], vector), short.recommend([["i2", "i3"]], vector)
    assert long_ == cut
    assert recommender.recommend([["i5", "i7", "i2", "i3"]], vector) != long_


def test_new_items_are_reachable_at_once_and_the_trie_is_as_if_built_anew() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 4)).astype(np.float32)
    ids = SemanticIds.fit(vectors, [f"i{row}" for row in range(20)], SemanticIdSettings(sizes=(4, 4), separate=16))
    plain = tiny_backbone("llama")
    add_code_tokens(plain.tokenizer, ids)
    plain.model.resize_token_embeddings(len(plain.tokenizer), mean_resizing=False)
    backbone = FrozenBackbone(plain.model, plain.tokenizer)
    old = ItemRecommender.of(E2PModel.from_backbone(backbone, 3, ProjectorConfig()), ids)
    new = old.with_items(["new", "newer"], vectors[:2] + 0.01)
    whole = new.recommend([["i3"]], None, k=22, exact=True)[0]
    assert {"new", "newer"} < {one.item for one in whole}
    assert len(whole) == 22
    assert sum(np.exp(one.logprob) for one in whole) == pytest.approx(1, abs=1e-4)
    assert "new" not in {one.item for one in old.recommend([["i3"]], None, k=20)[0]}
    built = Trie.build(new.vocabulary.ids.codes, new.vocabulary.ids.sizes)
    assert all(torch.equal(getattr(new.vocabulary.trie, n), getattr(built, n)) for n in ("keys", "first", "items"))
    assert new.recommend([["new"]], None, k=2) != old.recommend([["i3"]], None, k=2)


@pytest.mark.parametrize(
    ("histories", "settings", "message"),
    [
        ([["i0"], []], {}, "row 1: expected a history of at least one item"),
        ([["i0", "i99"]], {}, "item 'i99': expected codes, got none"),
        ([["i0"]], {"profiles": ["a", "b"]}, "expected 1 profiles"),
        ([["i0"]], {"embeddings": np.zeros((1, 3), np.float32)}, "2"),
    ],
)
def test_what_cannot_be_answered_is_said(
    recommender: ItemRecommender, histories: list[list[str]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recommender.recommend(histories, **{"embeddings": np.zeros((len(histories), 2), np.float32), **settings})
    assert recommender.recommend([], None) == []


def test_the_command_shows_both_lists(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    own = load_yaml(Path(config.output) / "config.yaml")
    had = set(pl.read_parquet(own.evaluation.next_item.interactions).filter(pl.col("user_id") == "u30")["item_id"])
    for seen in ("drop", "keep"):
        judged = replace(own.evaluation, next_item=replace(own.evaluation.next_item, seen=seen))
        save_yaml(replace(own, evaluation=judged), Path(config.output) / "config.yaml")
        assert main(["recommend", config.output, "--users", "[u30,u31]", "--k", "3"]) == 0
        shown = capsys.readouterr().out
        assert "without the vector" in shown
        assert shown.count("film ") == 2 * (4 + 3 + 3)  # four had last, three and three recommended
        assert main(["recommend", config.output, "--users", "u30", "--k", "8"]) == 0
        named = Counter(f"i{word}" for word in re.findall(r"film (\d+)", capsys.readouterr().out))
        twice = {item for item in had if named[item] > 1}  # in the history, and recommended
        assert bool(twice) == (seen == "keep")
    vectors = pl.read_parquet(config.data.embeddings)
    try:
        vectors.filter(pl.col("user_id") != "u31").write_parquet(config.data.embeddings)
        assert main(["recommend", config.output, "--users", "u31"]) == 0
        assert "u31 (no vector)" in capsys.readouterr().out
        vectors.with_columns(version=pl.lit("v2")).write_parquet(config.data.embeddings)
        assert main(["recommend", config.output, "--users", "u31"]) == 2
        assert "expected vectors of version v1, got v2" in capsys.readouterr().err
    finally:
        vectors.write_parquet(config.data.embeddings)
    for wrong, words in (("nobody", "expected interactions of user 'nobody'"), ("[]", "at least one user")):
        assert main(["recommend", config.output, "--users", wrong]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert len(error.splitlines()) == 1
    assert main(["recommend", "nowhere", "--users", "u1"]) == 2
