"""Next items: rankings against loops over the definitions, a run in miniature, and tables that cannot judge."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import (
    EvaluationConfig,
    NextItemConfig,
    RunConfig,
)
from e2p.config_io import save_yaml
from e2p.errors import BackboneError, ConfigError, DataError
from e2p.evaluation.judge import is_scored, judge, judged_keys, table_keys
from e2p.evaluation.next_item import load_next_items, rank_of, without_model
from e2p.evaluation.report import write_report
from e2p.items.recommend import ItemRecommender
from e2p.items.semantic_ids import SemanticIds
from e2p.items.vocabulary import open_codes
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from e2p.training.run import train
from tiny import logprobs_alone
from tiny_next import GROUP, ITEMS, item, next_item_run
from tiny_run import inputs_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return next_item_run(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def results(config: RunConfig) -> dict[str, Any]:
    train(config)
    return judge(config.output)


@pytest.fixture(scope="module")
def loaded(config: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(config)


def by_name(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sections = [results, *results["other_metrics"]]
    return {one["metric"]["name"]: one["arms"] for one in sections}


def test_the_verdict_rests_on_the_hit_rate_and_the_user_is_heard(results: dict[str, Any]) -> None:
    assert results["metric"]["name"] == "hit_rate@8"
    assert results["metric"]["label"] == "HitRate@8"
    found = by_name(results)
    assert set(found["hit_rate@8"]) == {"none", "prompt", "static", "random", "e2p", "retrieval", "popularity"}
    assert set(found["nats_per_token"]) == {"none", "prompt", "static", "random", "e2p"}
    # The group is the first code, and only the vector tells it.
    for name, least in (("nats_per_token", -0.2), ("recall@3", 0.1), ("hit_rate@8", 0.05)):
        e2p, random = (found[name][arm][name] for arm in ("e2p", "random"))
        assert e2p < random + least if least < 0 else e2p > random + least
    assert found["recall@8"]["retrieval"]["recall@8"] == 1.0  # six items of the group, of which some were had
    names = [row["name"] for row in results["comparisons"]]
    assert "true minus retrieval" in names


def test_scores_are_what_the_kept_lists_say(config: RunConfig, results: dict[str, Any]) -> None:
    kept = pl.read_parquet(Path(config.output) / "recommended.parquet")
    scores = pl.read_parquet(Path(config.output) / "scores.parquet")
    table = pl.read_parquet(config.data.examples)
    true = dict(zip(map(str, range(table.height)), table["item_id"], strict=True))
    got = {(row["example_id"], row["arm"], row["metric"]): row["value"] for row in scores.iter_rows(named=True)}
    seen = 0
    for row in kept.iter_rows(named=True):
        items, of = row["items"], row["example_id"]
        assert len(set(items)) == len(items)
        place = items.index(true[of]) + 1 if true[of] in items else None
        if row["logprobs"] is not None:
            assert row["logprobs"] == sorted(row["logprobs"], reverse=True)
        if row["way"] == "true":
            p = math.exp(row["logprobs"][0]) if items else 0.0
            assert items in ([true[of]], [])
            assert got[of, row["arm"], "expected_hit_rate@8"] == pytest.approx(1 - (1 - p) ** 8)
            continue
        for k in (1, 3, 8):
            hit = place is not None and place <= k
            if row["way"] == "sampled":
                assert got[of, row["arm"], f"hit_rate@{k}"] == hit
                continue
            assert got[of, row["arm"], f"recall@{k}"] == hit
            assert got[of, row["arm"], f"mrr@{k}"] == pytest.approx(1 / place if hit else 0)
            assert got[of, row["arm"], f"ndcg@{k}"] == pytest.approx(1 / math.log2(place + 1) if hit else 0)
            if row["arm"] in ("retrieval", "popularity"):  # one ranking for both
                assert got[of, row["arm"], f"hit_rate@{k}"] == hit
                assert got[of, row["arm"], "expected_hit_rate@8"] == (place is not None and place <= 8)
            seen += hit
    assert seen > 10
    arms = results["next_item"]["arms"]
    lists = kept.filter((pl.col("arm") == "e2p") & (pl.col("way") == "beam"))["items"].to_list()
    assert arms["e2p"]["coverage"]["3"] == len({one for found in lists for one in found[:3]}) / ITEMS
    drawn = kept.filter((pl.col("arm") == "none") & (pl.col("way") == "sampled"))["items"].list.len()
    assert arms["none"]["distinct"] == pytest.approx(drawn.mean())
    assert arms["retrieval"]["distinct"] is None


def test_log_probabilities_are_the_models_own_among_valid_codes(
    config: RunConfig, results: dict[str, Any], loaded: tuple[Any, RunInputs]
) -> None:
    """Of the bare model: each code's log p of the whole vocabulary, renormalised over what may follow."""
    backbone, inputs = loaded
    shelf = load_next_items(config.evaluation.next_item, config.data, inputs, backbone)
    tokens = [[int(shelf.vocabulary.tokens[level][c]) for level, c in enumerate(codes)]
              for codes in shelf.vocabulary.ids.codes.tolist()]  # fmt: skip
    kept = pl.read_parquet(Path(config.output) / "recommended.parquet")
    row = kept.filter((pl.col("arm") == "none") & (pl.col("way") == "beam")).row(3, named=True)
    prompt = inputs.tokens[int(row["example_id"])].prompt.tolist()
    with torch.no_grad():
        parts = torch.stack([logprobs_alone(backbone.model, prompt, ids, None, 0) for ids in tokens])
    first, second = parts.T
    groups = torch.tensor([0] * GROUP + [1] * GROUP)
    firsts = torch.stack([first[0], first[GROUP]]).log_softmax(0)[groups]
    seconds = torch.cat([second[:GROUP].log_softmax(0), second[GROUP:].log_softmax(0)])
    whole = firsts + seconds
    (had,) = shelf.had(inputs.keys[int(row["example_id"])])
    order = [int(number) for number in whole.argsort(descending=True) if number not in had.tolist()]
    assert row["items"] == [item(number) for number in order]
    np.testing.assert_allclose(row["logprobs"], whole[order].numpy(), atol=1e-4)
    own = kept.filter(
        (pl.col("arm") == "none") & (pl.col("example_id") == row["example_id"]) & (pl.col("way") == "true")
    )
    (true,) = own["items"].to_list()
    assert own["logprobs"].to_list() == [pytest.approx([float(whole[shelf.vocabulary.ids.rows[true[0]]])], abs=1e-4)]
    assert all(own["certain"] is None or 0 <= own["certain"] <= 1 for own in results["next_item"]["arms"].values())


def test_examples_without_times_cannot_be_judged(config: RunConfig, loaded: tuple[Any, RunInputs]) -> None:
    inputs = loaded[1]
    bare = replace(inputs, keys=inputs.keys.with_columns(timestamp=pl.lit(None, inputs.keys["timestamp"].dtype)))
    with pytest.raises(DataError, match="expected a timestamp for every test example"):
        load_next_items(config.evaluation.next_item, config.data, bare, loaded[0])


def test_retrieval_and_popularity_offer_nothing_that_was_had(config: RunConfig, results: dict[str, Any]) -> None:
    kept = pl.read_parquet(Path(config.output) / "recommended.parquet")
    table = pl.read_parquet(config.data.examples)
    had = pl.read_parquet(config.evaluation.next_item.interactions)
    popular = sorted(range(ITEMS), key=lambda number: (-(number % GROUP), number))
    checked = 0
    for row in kept.filter(pl.col("arm").is_in(["retrieval", "popularity"])).iter_rows(named=True):
        example = table.row(int(row["example_id"]), named=True)
        before = had.filter((pl.col("user_id") == row["user_id"]) & (pl.col("timestamp") < example["timestamp"]))
        out = set(before["item_id"])
        assert len(out) in (2, 3)
        assert not out & set(row["items"])
        if row["arm"] == "popularity":
            assert row["items"] == [item(number) for number in popular if item(number) not in out]
        else:
            taste = int(row["user_id"][1:]) % 2
            own = [item(number) for number in range(GROUP * taste, GROUP * taste + GROUP) if item(number) not in out]
            assert row["items"][: len(own)] == own  # equal products go by row
        checked += 1
    assert checked == 2 * 20


def test_the_report_has_the_table_and_the_codes(config: RunConfig, results: dict[str, Any]) -> None:
    write_report(Path(config.output))
    for name in ("report.html", "report.md"):
        text = (Path(config.output) / name).read_text(encoding="utf-8")
        for words in ("Next items", "HitRate@8", "coverage", "12 items have codes", "Codes of 2 levels, 2 × 6"):
            assert words in text, (name, words)
    assert "tab:next-items" in (Path(config.output) / "tables.tex").read_text()


def test_examples_are_shown_with_the_items_names(config: RunConfig, results: dict[str, Any]) -> None:
    (sample,) = results["samples"]
    films = [0] * len(re.findall('"film 0"', sample["prompt"])) + [1]
    assert sample["prompt"] == "next after: " + " ".join(f'"film {film}"' for film in films)
    nobody, own = sample["answers"]
    recommender = ItemRecommender.of(
        E2PModel.from_pretrained(Path(config.output) / "adapter"), open_codes(config.evaluation.next_item.codes)
    )
    history = [[item(film) for film in films]]
    vector = np.eye(2, dtype=np.float32)[[int(own["user_id"].removeprefix("u")) % 2]]
    for answer, use_prefix in ((nobody, False), (own, True)):
        (best,) = recommender.recommend(history, vector, use_prefix=use_prefix, k=3)
        assert answer["text"] == " ; ".join(f'"film {one.item.removeprefix("i")}"' for one in best)


def test_judging_again_draws_the_same(config: RunConfig, results: dict[str, Any]) -> None:
    first = pl.read_parquet(Path(config.output) / "recommended.parquet")
    judge(config.output)
    assert pl.read_parquet(Path(config.output) / "recommended.parquet").equals(first)


def test_scores_are_stale_once_a_table_that_they_were_judged_with_has_changed(
    config: RunConfig, results: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    for name in ("items", "interactions", "codes"):
        place = tmp_path / name
        judged = getattr(config.evaluation.next_item, name)
        shutil.copytree(judged, place) if name == "codes" else shutil.copy(judged, place)
    moved = {name: str(tmp_path / name) for name in ("items", "interactions", "codes")}
    other = replace(config, output=str(run), evaluation=replace(
        config.evaluation, next_item=replace(config.evaluation.next_item, **moved)
    ))  # fmt: skip
    assert judged_keys(other) == judged_keys(config)  # their contents count, not their places
    save_yaml(config, run / "config.yaml")
    assert is_scored(run, table_keys(config))
    table = pl.read_parquet(tmp_path / "items").with_columns(popularity=pl.lit(1))
    table.write_parquet(tmp_path / "items")
    assert not is_scored(run, table_keys(other))
    assert table_keys(replace(config, evaluation=EvaluationConfig())).keys() == {"examples", "embeddings"}


@given(
    st.lists(st.permutations(range(6)).map(list), min_size=1, max_size=5),
    st.lists(st.integers(0, 8), min_size=5, max_size=5),
)
def test_rank_is_the_place_in_the_list(lists: list[list[int]], targets: list[int]) -> None:
    cut = [found[:4] for found in lists]
    ranks = rank_of(cut, np.array(targets[: len(cut)]))
    for rank, found, true in zip(ranks, cut, targets, strict=False):
        assert (rank == 0 and true not in found) or found[rank - 1] == true


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("items", lambda t: t.drop("popularity"), "popularity"),
        ("items", lambda t: t.filter(pl.col("item_id") != "i3"), r"expected every item that has codes, got no 'i3'"),
        ("items", lambda t: t.with_columns(pl.col("embedding").arr.to_list().list.head(1)), "of 2 numbers"),
        ("interactions", lambda t: t.drop("timestamp"), "timestamp"),
        (
            "examples",
            lambda t: t.with_columns(item_id=pl.lit("i99")),
            r"row 60: item 'i99' has no codes in .*give it codes",
        ),
        ("examples", lambda t: t.with_columns(item_id=pl.lit("i5")), r"expected the codes of item 'i5' as completion"),
        ("examples", lambda t: t.drop("item_id"), "item_id"),
    ],
)
def test_tables_that_cannot_judge_are_named(
    config: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, table: str, change: Any, message: str
) -> None:
    judged = config.evaluation.next_item
    paths = {"items": judged.items, "interactions": judged.interactions, "examples": config.data.examples}
    changed = tmp_path / f"{table}.parquet"
    change(pl.read_parquet(paths[table])).write_parquet(changed)
    paths[table] = str(changed)
    source = paths.pop("examples")
    with pytest.raises(DataError, match=message):
        load_next_items(replace(judged, **paths), replace(config.data, examples=source), loaded[1], loaded[0])


def test_a_backbone_that_does_not_speak_the_codes_is_refused(
    config: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    backbone, inputs = loaded
    judged, source = config.evaluation.next_item, config.data
    more = SemanticIds(["i0", "i1"], np.array([[0, 0], [1, 9]]), (2, 10), False)
    more.save(tmp_path / "more")
    with pytest.raises(BackboneError, match=r"got none for <b_6> and 3 others; run e2p adapt"):
        load_next_items(replace(judged, codes=str(tmp_path / "more")), source, inputs, backbone)
    own = SemanticIds.load(judged.codes)
    for name, codes in (("same", own.codes), ("other", own.codes[::-1])):
        SemanticIds(own.ids, codes, own.sizes, False).save(tmp_path / name / "codes")
    plain = backbone.source
    try:
        backbone.source = str(tmp_path / "same")
        load_next_items(judged, source, inputs, backbone)
        grown = SemanticIds([*own.ids[:-1]], own.codes[:-1], own.sizes, False)  # the catalogue has gained an item since
        grown.save(tmp_path / "grown" / "codes")
        backbone.source = str(tmp_path / "grown")
        load_next_items(judged, source, inputs, backbone)
        backbone.source = str(tmp_path / "other")
        with pytest.raises(BackboneError, match=r"got one of version \w+; adapt it to these"):
            load_next_items(judged, source, inputs, backbone)
        for name, taught in (("chat", "never"), ("profile_template", "persona: {profile}")):
            backbone.source = str(tmp_path / name)
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapt.json").write_text(json.dumps({"settings": {name: taught}}))
            with pytest.raises(ConfigError, match=rf"data\.{name}: expected '{taught}'"):
                load_next_items(judged, source, inputs, backbone)
    finally:
        backbone.source = plain


def test_what_was_had_is_dropped_from_every_ranking_or_from_none(config: RunConfig, tmp_path: Path) -> None:
    had = pl.read_parquet(config.evaluation.next_item.interactions)
    table = pl.read_parquet(config.data.examples)
    before = {}
    for row, example in enumerate(table.iter_rows(named=True)):
        own = had.filter((pl.col("user_id") == example["user_id"]) & (pl.col("timestamp") < example["timestamp"]))
        before[str(row)] = set(own["item_id"])
    for seen in ("drop", "keep"):
        run = tmp_path / seen
        judged = replace(config.evaluation, next_item=replace(config.evaluation.next_item, seen=seen))
        shutil.copytree(config.output, run)
        save_yaml(replace(config, evaluation=judged, output=str(run)), run / "config.yaml")
        results = judge(run)
        kept = pl.read_parquet(run / "recommended.parquet")
        repeats = dict.fromkeys(kept["arm"].unique(), 0)
        for row in kept.iter_rows(named=True):
            repeats[row["arm"]] += len(before[row["example_id"]] & set(row["items"]))
        assert all(count == 0 if seen == "drop" else count > 0 for count in repeats.values()), (seen, repeats)
        assert results["next_item"]["seen_targets"] == 0


def test_who_has_no_vector_is_offered_what_is_popular(config: RunConfig, tmp_path: Path) -> None:
    table = pl.read_parquet(config.data.embeddings)
    table.filter(pl.col("user_id") != "u35").write_parquet(tmp_path / "embeddings.parquet")
    data = replace(config.data, embeddings=str(tmp_path / "embeddings.parquet"), missing_vector="null")
    backbone, inputs = inputs_of(replace(config, data=data))
    shelf = load_next_items(config.evaluation.next_item, data, inputs, backbone)
    retrieved, popular = (without_model(arm, inputs, shelf) for arm in ("retrieval", "popularity"))
    same = retrieved.filter(pl.col("user_id") == "u35")["items"].to_list()
    assert same == popular.filter(pl.col("user_id") == "u35")["items"].to_list()
    assert retrieved["items"].to_list() != popular["items"].to_list()


def test_settings_that_make_no_sense_are_refused() -> None:
    tables = {"items": "a", "codes": "b", "interactions": "c"}
    for wrong in ({"cutoffs": (10, 5)}, {"cutoffs": (5, 31)}, {"samples": 0}, {"temperature": 0.0}, {"cutoffs": ()}):
        with pytest.raises(ConfigError, match=r"evaluation\.next_item"):
            NextItemConfig(**{**tables, **wrong})
    with pytest.raises(ConfigError, match=r"expected items, codes and interactions, or none"):
        NextItemConfig(items="a")
    with pytest.raises(ConfigError, match="an arm with a language model too"):
        EvaluationConfig(arms=("retrieval", "popularity"))
