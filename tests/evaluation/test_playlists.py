"""Playlists judged by hand-made shelves, and a labelled run in miniature from answers to verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.config import EvaluationConfig, ObjectiveConfig, PlaylistsConfig, RunConfig
from e2p.config_io import save_yaml
from e2p.data.tables import write_embeddings
from e2p.errors import ConfigError, DataError
from e2p.evaluation.answers import answer
from e2p.evaluation.arms import Arm, build_arms, random_rows, score_arm
from e2p.evaluation.audit import Scored, audit
from e2p.evaluation.judge import judge
from e2p.evaluation.playlists import Shelf, judge_playlists, load_shelf, rerank_answers
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from e2p.training.run import train
from e2p.training.scoring import loglikelihoods
from tiny_run import PROMPTS, inputs_of, tiny_run

# Eight items in two kinds; the users of a kind like the items of that kind.
NAMES = ("Jazz One", "Jazz Two", "Jazz Three", "Jazz Four", "Soul One", "Soul Two", "Soul Three", "Soul Four")
KINDS = 2


def world(config: RunConfig) -> RunConfig:
    """Users of two kinds: of even number jazz, of odd number soul. Each has played two items that made his vector and
    two that did not; he is asked for either kind, engaged with his own and not with the other kind's lists."""
    folder = Path(config.data.examples).parent
    users = pl.read_parquet(config.data.examples).select("user_id", "split").unique(maintain_order=True)
    random = np.random.default_rng(0)
    rows, plays, known, vectors = [], [], [], []
    for user, split in users.iter_rows():
        kind = int(user[1:]) % KINDS
        own, others = np.arange(4) + 4 * kind, np.arange(4) + 4 * (1 - kind)
        own = random.permutation(own)
        known += [(user, f"i{item}") for item in own[:2]]
        plays += [(user, f"i{item}", NAMES[item]) for item in own[2:]]
        vectors.append(np.eye(2)[kind] + random.normal(0, 0.05, 2))
        for n, (items, label) in enumerate([(own[2:], True), (others[:2], False)] * 2):
            rows.append(
                {
                    "example_id": f"{user}-{n}",
                    "user_id": user,
                    "prompt": PROMPTS[n // 2],
                    "completion": " ; ".join(NAMES[item] for item in items),
                    "split": split,
                    "label": label,
                    "query": f"q{n // 2}",
                    "items": [f"i{item}" for item in items],
                }
            )
    pl.DataFrame(rows).write_parquet(config.data.examples)
    write_embeddings(folder / "embeddings.parquet", users["user_id"], np.array(vectors, np.float32), version="v1")
    names = pl.DataFrame({"item_id": [f"i{i}" for i in range(7)], "item": NAMES[:7]})  # of the last, nothing is known
    space = pl.Series("embedding", np.repeat(np.eye(2), 4, 0)[:7].astype(np.float32), dtype=pl.Array(pl.Float32, 2))
    names.with_columns(space).write_parquet(folder / "items.parquet")
    queries = pl.DataFrame({"query": ["q0", "q1"], "items": [[f"i{i}" for i in range(7)]] * 2})
    flat = pl.Series("embedding", np.full((2, 2), 0.5, np.float32), dtype=pl.Array(pl.Float32, 2))
    queries.with_columns(flat).write_parquet(folder / "queries.parquet")
    pl.DataFrame(plays, schema=["user_id", "item_id", "item"], orient="row").write_parquet(folder / "plays.parquet")
    pl.DataFrame(known, schema=["user_id", "item_id"], orient="row").write_parquet(folder / "known.parquet")
    tables = {name: str(folder / f"{name}.parquet") for name in ("items", "queries", "plays", "known")}
    arms = ("none", "static", "random", "e2p", "rerank")
    judged = EvaluationConfig(arms, 100, 1, 6, playlists=PlaylistsConfig(**tables, answers=2))
    return replace(config, evaluation=judged, data=replace(config.data, max_completion_tokens=48))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return world(tiny_run(tmp_path_factory.mktemp("playlists"), users=40, max_steps=4))


@pytest.fixture(scope="module")
def loaded(config: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(config)


@pytest.fixture(scope="module")
def shelf(config: RunConfig, loaded: tuple[Any, RunInputs]) -> Shelf:
    return load_shelf(config.evaluation.playlists, config.data.examples, loaded[1], 1, 200)


def answers_of(inputs: RunInputs, texts: list[tuple[int, str, bool]], arm: str = "e2p") -> pl.DataFrame:
    """Answers to test examples, by their number."""
    rows = inputs.rows("test")[[at for at, _, _ in texts]]
    return inputs.keys.select("example_id", "user_id")[rows].with_columns(
        arm=pl.lit(arm),
        draw=pl.lit(0, pl.Int64),
        text=pl.Series([text for _, text, _ in texts]),
        cut=pl.Series([cut for _, _, cut in texts]),
    )


def metrics(scores: pl.DataFrame) -> dict[str, dict[str, float]]:
    return {str(m): dict(part.select("example_id", "value").iter_rows()) for (m,), part in scores.group_by("metric")}


def test_hits_affinity_and_inventions_by_hand(shelf: Shelf, loaded: tuple[Any, RunInputs]) -> None:
    inputs = loaded[1]
    row = int(inputs.rows("test")[0])
    user = inputs.keys["user_id"][row]
    held, known = (sorted(shelf.catalogue.names[i] for i in of[user]) for of in (shelf.plays, shelf.known))
    kind = int(user[1:]) % KINDS
    stranger = NAMES[4 * (1 - kind)]
    text = f"{held[0].upper()} ; {known[0]}"  # the longest training list has two entries
    scores, about = judge_playlists(answers_of(inputs, [(0, f"{text} ; {held[1]}", False)]), shelf, inputs)
    example = inputs.keys["example_id"][row]
    found = {name: values[example] for name, values in metrics(scores).items()}
    # What he knows is no place lost.
    assert (found["playlist_hits"], found["known"], found["invented"]) == (1.0, 0.5, 0.0)
    assert about["longest"] == 2
    for text, cut, expected in (
        (f"{stranger} ; nobody ever heard of them", False, (0, 0, 0.5)),
        (f"{known[0]} ; {known[1]}", False, (0, 1, 0)),
        (f"{held[0]}\n{held[0]}", False, (0.5, 0, 0)),  # the second is a repetition, and no second hit
        (f"{held[0]} ; {held[1][:4]}", True, (1, 0, 0)),  # half a name does not count
        (f"{held[0]} ; ", True, (1, 0, 0)),
        ("", False, (0, 0, 0)),
        (" ; ;", True, (0, 0, 0)),
    ):
        scores, about = judge_playlists(answers_of(inputs, [(0, text, cut)]), shelf, inputs)
        found = {name: values[example] for name, values in metrics(scores).items()}
        assert (found["playlist_hits"], found["known"], found["invented"]) == expected, text
        if not about["readings"]["e2p"]["found"]:
            assert about["readings"]["e2p"]["empty"] == 1
        if expected[1] == 1 or not about["readings"]["e2p"]["found"]:  # nothing new
            assert found["engagement"] == found["affinity"] == found["on_request"] == 0


def test_an_item_that_no_vector_is_known_of_can_be_hit(shelf: Shelf, loaded: tuple[Any, RunInputs]) -> None:
    inputs = loaded[1]
    assert shelf.catalogue.names[-1] == NAMES[7]
    assert not shelf.catalogue.vectors[-1].any()
    at, row = next(
        (at, row) for at, row in enumerate(inputs.rows("test")) if 7 in shelf.plays[inputs.keys["user_id"][int(row)]]
    )
    scores, _ = judge_playlists(answers_of(inputs, [(at, NAMES[7], False)]), shelf, inputs)
    found = metrics(scores)
    example = inputs.keys["example_id"][int(row)]
    assert found["playlist_hits"][example] == 1
    assert found["affinity"][example] == 0


def test_own_kind_is_liked_by_the_predictor_and_it_ranks_arms_as_plays_do(
    shelf: Shelf, loaded: tuple[Any, RunInputs]
) -> None:
    inputs = loaded[1]
    users = inputs.keys["user_id"].to_numpy()[inputs.rows("test")]
    mine, foreign = [], []
    for at, user in enumerate(users):
        mine.append((at, " ; ".join(shelf.catalogue.names[i] for i in sorted(shelf.plays[user])), False))
        foreign.append((at, " ; ".join(NAMES[4 * (1 - int(user[1:]) % KINDS) :][:2]), False))
    both = pl.concat([answers_of(inputs, mine, "e2p"), answers_of(inputs, foreign, "none")])
    scores, about = judge_playlists(both, shelf, inputs)
    means = dict(scores.group_by("arm", "metric").agg(pl.col("value").mean()).select(
        pl.concat_str("arm", "metric", separator=" "), "value").iter_rows())  # fmt: skip
    assert means["e2p playlist_hits"] == 1
    assert means["none playlist_hits"] == 0
    assert means["e2p engagement"] > 0.6 > 0.4 > means["none engagement"]
    assert means["e2p affinity"] > means["none affinity"] + 0.5
    predictor = about["predictor"]
    assert predictor["auc"] > 0.95
    assert predictor["auc_ci"][0] <= predictor["auc"] <= predictor["auc_ci"][1]
    assert predictor["auc_user"] == pytest.approx(0.5)  # every user has as many of either label
    agreed = audit([Scored("music", scores, about={"playlists": about})], resamples=100)["playlists"]["agreement"]
    assert agreed["in_order"] == agreed["pairs"] == 1


def test_draws_are_averaged(shelf: Shelf, loaded: tuple[Any, RunInputs]) -> None:
    inputs = loaded[1]
    held = [shelf.catalogue.names[i] for i in shelf.plays[inputs.keys["user_id"][int(inputs.rows("test")[0])]]]
    one, two = (answers_of(inputs, [(0, text, False)]) for text in (held[0], "nobody"))
    scores, _ = judge_playlists(pl.concat([one, two.with_columns(draw=pl.lit(1, pl.Int64))]), shelf, inputs)
    assert list(metrics(scores)["playlist_hits"].values()) == [0.5]


def test_reranking_offers_the_own_kind_and_nothing_known(shelf: Shelf, loaded: tuple[Any, RunInputs]) -> None:
    frame = rerank_answers(shelf, loaded[1])
    assert set(frame["arm"]) == {"rerank"}
    assert frame.height == len(loaded[1].rows("test"))
    for user, text in frame.select("user_id", "text").iter_rows():
        kind, named = int(user[1:]) % KINDS, [shelf.catalogue.names.index(name) for name in text.split(" ; ")]
        assert len(named) == shelf.longest
        assert not set(named) & shelf.known[user]
        candidates = [i for i in range(4 * kind, 4 * kind + 4) if i not in shelf.known[user] and i < 7]
        assert set(candidates[: len(named)]) <= set(named)


def arms_of(config: RunConfig, loaded: tuple[Any, RunInputs]) -> dict[str, Arm]:
    backbone, inputs = loaded
    models = {
        name: E2PModel.from_backbone(backbone, 2, config.projector, data=config.data, static=name == "static", seed=1)
        for name in ("e2p", "static")
    }
    return {arm.name: arm for arm in build_arms(("none", "static", "random", "e2p"), models, inputs, None, 3, 3)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_repeat_and_likeliest_ones_are_generates_own(
    config: RunConfig, loaded: tuple[Any, RunInputs], temperature: float
) -> None:
    arm, inputs = arms_of(config, loaded)["e2p"], loaded[1]
    settings: dict[str, Any] = {"draws": 2, "temperature": temperature, "max_new_tokens": 5, "seed": 4}
    first, again = (answer(arm, inputs, 10_000, **settings) for _ in range(2))
    assert first.equals(again)
    assert first.height == 2 * len(inputs.rows("test"))
    draws = [first.filter(pl.col("draw") == draw)["text"].to_list() for draw in range(2)]
    assert (draws[0] == draws[1]) == (temperature == 0)
    if temperature == 0:
        table = pl.read_parquet(config.data.examples)
        rows = inputs.rows("test").tolist()
        vectors = [inputs.embeddings.vectors[inputs.vector_rows[row]] for row in rows]
        plain = arm.model.generate(table["prompt"][rows].to_list(), vectors, max_new_tokens=5, do_sample=False)
        assert draws[0] == plain
        small = answer(arm, inputs, 40, **settings)  # other passes
        assert small["text"].to_list() == first["text"].to_list()


def test_auc_is_the_share_of_the_users_own_passed_over_rows_that_are_less_likely(
    config: RunConfig, loaded: tuple[Any, RunInputs]
) -> None:
    inputs = loaded[1]
    users = inputs.keys["user_id"].to_numpy()
    for arm in arms_of(config, loaded).values():
        found = metrics(score_arm(arm, inputs, 300))
        rows = inputs.all_rows("test")
        own = loglikelihoods(arm.model, arm.examples, rows, 300, use_prefix=arm.use_prefix)
        per_token = dict(zip(rows.tolist(), own / inputs.tokens.completion_lengths[rows], strict=True))
        for row in inputs.rows("test").tolist():
            others = [r for r in rows.tolist() if users[r] == users[row] and inputs.labels[r] == 0]
            wins = [(per_token[row] > per_token[r]) + 0.5 * (per_token[row] == per_token[r]) for r in others]
            assert found["auc"][inputs.keys["example_id"][row]] == pytest.approx(sum(wins) / len(wins))
        assert set(found["nll"]) == set(inputs.keys["example_id"][inputs.rows("test")])  # engaged rows alone


def test_a_random_user_takes_all_rows_with_him(loaded: tuple[Any, RunInputs]) -> None:
    inputs = loaded[1]
    dealt = random_rows(inputs, 5)
    users = inputs.keys["user_id"].to_numpy()
    for user in np.unique(users[inputs.all_rows("test")]):
        mine = np.flatnonzero(users == user)
        assert len(set(dealt[mine])) == 1
        assert not set(dealt[mine]) & set(inputs.vector_rows[mine])


@pytest.mark.parametrize("name", ["kto", "engagement"])
def test_a_labelled_run_is_judged_by_its_playlists(config: RunConfig, tmp_path: Path, name: Any) -> None:
    run = replace(config, objective=ObjectiveConfig(name=name), output=str(tmp_path / "run"))
    train(run)
    results = judge(run.output)
    assert results["metric"]["name"] == "playlist_hits"
    others = {other["metric"]["name"]: other for other in results["other_metrics"]}
    assert list(others) == ["nats_per_token", "auc", "engagement", "affinity", "on_request", "known", "invented"]
    assert list(results["arms"]) == ["none", "static", "random", "e2p", "rerank"]
    assert list(others["auc"]["arms"]) == ["none", "static", "random", "e2p"]  # reranking has no likelihood
    assert results["verdict"]
    assert results["playlists"]["predictor"]["examples"] == 32
    assert set(results["playlists"]["readings"]) == set(results["arms"])
    answers = pl.read_parquet(tmp_path / "run" / "answers.parquet")
    counted = dict(answers.group_by("arm").len().iter_rows())
    assert counted == {"none": 32, "static": 32, "random": 32, "e2p": 32, "rerank": 16}


def test_another_headline_and_one_that_nobody_measured(config: RunConfig, tmp_path: Path) -> None:
    judged = replace(config.evaluation, headline="auc", playlists=PlaylistsConfig())
    run = replace(config, evaluation=judged, output=str(tmp_path / "run"))
    train(run)
    assert judge(run.output)["metric"]["name"] == "auc"
    for wrong in ("playlist_hits", "bits_per_byte", "acu"):  # without playlists; not an audited one; a slip
        save_yaml(replace(run, evaluation=replace(judged, headline=wrong)), tmp_path / "run" / "config.yaml")
        (tmp_path / "run" / "scores.parquet").unlink(missing_ok=True)
        with pytest.raises(DataError, match=r"evaluation\.headline: expected one of nats_per_token, auc, got"):
            judge(run.output)
        assert not (tmp_path / "run" / "scores.parquet").exists()  # before anything is scored
    with pytest.raises(ConfigError, match=r"evaluation\.playlists: expected items, queries, plays and known, or none"):
        PlaylistsConfig(items="items.parquet")


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("items", lambda t: t.with_columns(item=pl.lit(None, pl.String)), r"items.parquet: row 0 .*expected"),
        ("items", lambda t: t.drop("item"), "item"),
        ("items", lambda t: t.with_columns(pl.col("embedding").cast(pl.List(pl.Float32)).list.head(1)), "of 2 numbers"),
        ("queries", lambda t: t.filter(pl.col("query") != "q1"), "query 'q1' is not in .*queries.parquet; add it"),
        (
            "plays",
            lambda t: t.with_columns(item=pl.lit("a;b"), item_id=pl.lit("x")),
            r"plays.parquet: item 'a;b' .*one line",
        ),
        (
            "examples",
            lambda t: t.with_columns(query=pl.when("label").then("query").otherwise(pl.lit("?"))),
            r"query '\?'",
        ),
        ("examples", lambda t: t.with_columns(items=pl.lit(["?"], pl.List(pl.String))), "got none, as in 48 of 48"),
        ("plays", lambda t: t.with_columns(user_id=pl.lit("nobody")), "expected held-out plays of the test users"),
        ("examples", lambda t: t.drop("items"), "items"),
        (
            "examples",
            lambda t: t.with_columns(items=pl.lit([], pl.List(pl.String))),
            "got none, as in 48 of 48",
        ),
    ],
)
def test_tables_that_cannot_judge_are_named(
    config: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, table: str, change: Any, message: str
) -> None:
    paths = {name: getattr(config.evaluation.playlists, name) for name in ("items", "queries", "plays", "known")}
    paths["examples"] = config.data.examples
    changed = tmp_path / f"{table}.parquet"
    change(pl.read_parquet(paths[table])).write_parquet(changed)
    paths[table] = str(changed)
    source = paths.pop("examples")
    with pytest.raises(DataError, match=message):
        load_shelf(PlaylistsConfig(**paths), source, loaded[1], 1, 100)
