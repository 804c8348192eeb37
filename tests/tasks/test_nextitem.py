"""Tables for the next item: against plain loops over the files, and blind to everything that comes later."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.cli import main
from e2p.config_io import load_yaml
from e2p.data.tables import example_batches, open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.items.catalogue import load_catalogue
from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import items_text
from e2p.tasks import nextitem, nextitem_texts
from e2p.tasks.nextitem_files import read
from e2p.tasks.nextitem_stages import adapt_targets, staged, targets
from e2p.training.inputs import join_tables
from nextitem_worlds import codes, films, histories, minionerec, movielens, parts_of, ratings, sequences

SMALL: dict[str, Any] = {"dimension": 4, "sizes": (4, 4), "window": 5, "iterations": 5}
KINDS = ("movielens", "sequences", "minionerec")


def fake_encoder(texts: Sequence[str], encoder: str, **_: object) -> np.ndarray:
    """A vector for each text, whatever stands beside it."""
    seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") for text in texts]
    return np.array([np.random.default_rng(seed).normal(size=6) for seed in seeds], dtype=np.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p.users.extract.encode_texts", fake_encoder)


def world(folder: Path, kind: str) -> Path:
    if kind == "movielens":
        return movielens(folder, ratings())
    return sequences(folder, histories()) if kind == "sequences" else minionerec(folder, histories())


def prepared(folder: Path, source: Path, **settings: Any) -> Path:
    chosen = SMALL | settings
    if "sizes" not in settings and chosen.get("code_vectors", "auto") == "auto" and list(source.glob("*.index.json")):
        chosen["sizes"] = ()  # those of the ready codes
    return nextitem.prepare(str(source), str(folder), **chosen)


def table(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / f"{name}.parquet")


def loops(kind: str) -> dict[str, list[tuple[str, str]]]:
    """Item and stage of everything that each user did, in order, by plain loops over what was written."""
    found: dict[str, list[tuple[str, str]]] = {}
    if kind == "movielens":
        rated = ratings()
        seconds = sorted(when for _, _, when in rated)
        cuts = [seconds[round(share * len(seconds))] for share in (0.55, 0.75, 0.8)]
        for user, film, when in sorted(rated, key=lambda rating: rating[2]):
            stage = nextitem.STAGES[sum(when >= cut for cut in cuts)]
            found.setdefault(str(user), []).append((str(film), stage))
        return found
    for user, items in histories().items():
        if kind == "sequences":
            stages = ["backbone"] * (len(items) - 3) + ["phi", "validation", "test"]
            found[str(user)] = list(zip(map(str, items), stages[-len(items) :], strict=True))
        else:
            names = {"history": "backbone", "valid": "phi", "test": "test"}
            stages = [names[part] for part in parts_of(user, items)]
            gone = max(0, stages.count("backbone") - 10)  # the first row's history is cut as all are
            found[f"A{user}"] = list(zip(map(str, items), stages, strict=True))[gone:]
    return found


def profile_of(kind: str, earlier: Sequence[str]) -> str:
    """The profile by its own words, newest title first."""
    if kind == "minionerec":
        title = "item {}, of a name, that has rather"
        return "last bought " + " ; ".join(title.format(item) for item in earlier[::-1][:3])
    by_id = {str(number): (title.lower().replace(";", ","), genres.lower()) for number, title, genres in films()}
    counts = Counter(g for item in earlier for g in by_id[item][1].split("|") if g != "(no genres listed)")
    best = sorted(counts, key=lambda genre: (-counts[genre], genre))[:3]
    liked = [f"likes {', '.join(best)}"] if best else []
    return " ; ".join([*liked, "last watched " + " ; ".join(by_id[item][0] for item in earlier[::-1][:3])])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_what_plain_loops_make_of_the_files(tmp_path: Path, kind: str) -> None:
    folder = prepared(tmp_path / "out", world(tmp_path / "source", kind))
    ids = SemanticIds.load(folder / "codes")

    def text(items: Sequence[str]) -> str:
        return items_text(ids, ids.rows_of(items).tolist())

    expected: dict[str, list[tuple[Any, ...]]] = {"examples": [], "adapt": []}
    validating = set(table(folder, "examples").filter(pl.col("split") == "validation")["user_id"])
    for user, items in loops(kind).items():
        names, last = [item for item, _ in items], sum(stage == "backbone" for _, stage in items) - 1
        for place, (item, stage) in enumerate(items):
            earlier = names[:place]
            if not earlier or (stage == "backbone" and (last - place) % 2):
                continue
            row = (user, item, "next after: " + text(earlier[-5:]), text([item]))
            row += () if kind == "sequences" else (profile_of(kind, earlier),)
            if stage == "backbone":
                expected["adapt"].append(row)
                continue
            split = {"phi": "train"}.get(stage, stage)
            if kind == "minionerec" and split == "train" and user in validating:
                split = "validation"  # whose users are drawn
            expected["examples"].append((*row, split, f"{user}-{place}", f"{user}:{split}"))
    columns = ["user_id", "item_id", "prompt", "completion", *(["profile"] if kind != "sequences" else [])]
    found = {"examples": table(folder, "examples").select(*columns, "split", "example_id", "group").rows(),
             "adapt": table(folder, "adapt").select(columns).rows()}  # fmt: skip
    for name in expected:
        assert len(expected[name]) > 30
        assert sorted(found[name]) == sorted(expected[name]), name
    assert ("profile" in table(folder, "examples").columns) == (kind != "sequences")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_follow_the_contract_and_train_as_they_are(tmp_path: Path, kind: str) -> None:
    folder = prepared(tmp_path / "out", world(tmp_path / "source", kind))
    examples = pl.concat(example_batches(str(folder / "examples.parquet")))
    assert pl.concat(example_batches(str(folder / "adapt.parquet"))).height > 30
    assert examples["example_id"].is_unique().all()
    config = load_yaml(folder / "config.yaml")
    joined = join_tables(config.data)  # refuses a group in two parts
    assert set(joined.split.tolist()) == {0, 1, 2}
    # All that a user is tested on is later than all that was learned of him.
    keys = joined.keys.with_columns(split=pl.Series(joined.split))
    ends = keys.group_by("user_id").agg(
        first=pl.col("timestamp").filter(pl.col("split") == 2).min(),
        last=pl.col("timestamp").filter(pl.col("split") < 2).max(),
    )
    assert ends.drop_nulls().filter(pl.col("first") <= pl.col("last")).is_empty()
    # The newest vector at an example's time is its own.
    mine = joined.vector_rows >= 0
    assert mine.mean() > 0.8
    stamps = joined.embeddings.keys["timestamp"].gather(joined.vector_rows[mine])
    assert (stamps == joined.keys["timestamp"].filter(pl.Series(mine))).all()
    ids, items = SemanticIds.load(folder / "codes"), load_catalogue(str(folder / "items.parquet"))
    assert ids.ids == items.ids
    assert items.dim == joined.embeddings.dim == 4
    told = config.evaluation.next_item
    assert (told.items, told.codes) == (str(folder / "items.parquet"), str(folder / "codes"))
    assert Path(told.interactions).is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_items_and_interactions_are_all_there(tmp_path: Path, kind: str) -> None:
    source = world(tmp_path / "source", kind)
    folder, data = prepared(tmp_path / "out", source), read(source)
    items, log = table(folder, "items"), table(folder, "interactions")
    assert log.select("user_id", "item_id", "timestamp").equals(data.log.select("user_id", "item_id", "timestamp"))
    assert set(items["item_id"]) == set(data.items["item_id"])
    stages = {user: [stage for _, stage in done] for user, done in loops(kind).items()}
    early, learned = Counter[str](), set()
    for user, own in log.group_by("user_id", maintain_order=True):
        for item, stage in zip(own["item_id"], own["stage"], strict=True):
            early[item] += stage in ("backbone", "phi")
            learned |= {item} if stage == "backbone" else set()
        if kind != "minionerec":
            assert own["stage"].to_list() == stages[str(user[0])]
    assert dict(items.select("item_id", "popularity").iter_rows()) == {item: early[item] for item in items["item_id"]}
    zero = np.abs(items["embedding"].to_numpy()).max(axis=1) == 0
    assert set(items["item_id"].filter(pl.Series(zero))) == set(items["item_id"]) - learned


def same(first: Path, second: Path, *names: str) -> list[bool]:
    return [table(first, name).equals(table(second, name)) for name in names]


def early_parts(folder: Path) -> tuple[Any, ...]:
    """What must not know anything but the first stage: item vectors, codes, and what the backbone learns."""
    ids = SemanticIds.load(folder / "codes")
    return (
        table(folder, "items").select("item_id", "embedding").rows(),
        dict(zip(ids.ids, ids.codes.tolist(), strict=True)),
        [book.tobytes() for book in ids.codebooks],
        table(folder, "adapt").rows(),
        table(folder, "embeddings")["version"].unique().to_list(),
    )


def changed_movielens(folder: Path, other: Callable[[int, int], int | None]) -> tuple[Path, tuple[float, ...]]:
    """The same ratings, later ones of another film or gone; and the shares that cut at the same times."""
    rated = sorted(ratings(), key=lambda rating: rating[2])
    cut = rated[round(0.55 * len(rated))][2]
    kept, counts = [], Counter[int]()
    for user, film, when in ratings():
        new = film if when < cut else other(user, film)
        stage = sum(when >= rated[round(share * len(rated))][2] for share in (0.55, 0.75, 0.8))
        if new is not None:
            kept.append((user, new, when))
            counts[stage] += 1
    return movielens(folder, kept), tuple(counts[stage] / len(kept) for stage in range(4))


@pytest.mark.parametrize("vectors", ["behaviour", "text", "both"])
@pytest.mark.parametrize("change", ["other films", "fewer"])
def test_what_comes_after_the_first_stage_of_a_split_by_time_changes_nothing_in_it(
    tmp_path: Path, vectors: str, change: str
) -> None:
    settings = {"code_vectors": vectors, "separating": 32}
    first = prepared(tmp_path / "first", movielens(tmp_path / "a", ratings()), **settings)
    other: Callable[[int, int], int | None]
    other = (
        (lambda user, film: 41 - film) if change == "other films" else (lambda user, film: film if user > 9 else None)
    )
    source, shares = changed_movielens(tmp_path / "b", other)
    second = prepared(tmp_path / "second", source, shares=shares, **settings)
    assert early_parts(first) == early_parts(second)
    assert same(first, second, "examples", "embeddings") == [False, False]


@pytest.mark.parametrize("vectors", ["auto", "behaviour"])
@pytest.mark.parametrize("kind", ["sequences", "minionerec"])
def test_what_comes_after_the_histories_changes_nothing_in_them(tmp_path: Path, kind: str, vectors: str) -> None:
    """Targets of half of the users become other items that are in the files anyway."""
    settings = {"code_vectors": vectors, "separating": 32}
    first = prepared(tmp_path / "first", world(tmp_path / "a", kind), **settings)
    bought = {}
    for user, items in histories().items():
        later = [stage != "backbone" for _, stage in loops(kind)[f"A{user}" if kind == "minionerec" else str(user)]]
        later = [False] * (len(items) - len(later)) + later
        new = [31 - item if late and user < 20 else item for item, late in zip(items, later, strict=True)]
        bought[user] = new
    assert {i for items in bought.values() for i in items} == {i for items in histories().values() for i in items}
    source = (sequences if kind == "sequences" else minionerec)(tmp_path / "b", bought)
    second = prepared(tmp_path / "second", source, **settings)
    assert early_parts(first) == early_parts(second)
    assert same(first, second, "examples", "embeddings") == [False, False]


def test_rows_of_the_test_file_that_vanish_change_nothing_earlier(tmp_path: Path) -> None:
    first = prepared(tmp_path / "first", minionerec(tmp_path / "a", histories()), code_vectors="behaviour")
    shorter, parts = {}, {}
    for user, items in histories().items():
        keep = len(items) - (user % 4 != 0 and user < 20)
        shorter[user], parts[user] = items[:keep], parts_of(user, items)[:keep]
    second = prepared(tmp_path / "second", minionerec(tmp_path / "b", shorter, parts), code_vectors="behaviour")
    assert early_parts(first) == early_parts(second)
    learned = [table(folder, "examples").filter(pl.col("split") != "test") for folder in (first, second)]
    assert learned[0].equals(learned[1])


def test_an_early_interaction_changes_all_of_it(tmp_path: Path) -> None:
    """The tests above could not fail if nothing depended on the interactions."""
    first = prepared(tmp_path / "first", sequences(tmp_path / "a", histories()))
    bought = histories()
    long = next(user for user, items in bought.items() if len(items) > 6)
    bought[long][0] = 31 - bought[long][0]
    second = prepared(tmp_path / "second", sequences(tmp_path / "b", bought))
    assert not any(one == other for one, other in zip(early_parts(first), early_parts(second), strict=True))


def test_a_vector_does_not_know_its_target_or_anything_later(tmp_path: Path) -> None:
    first = prepared(tmp_path / "first", sequences(tmp_path / "a", histories()))
    bought = histories()
    for user, items in bought.items():
        if user % 2:
            items[-2] = 31 - items[-2]  # the validation target; the test example has it behind
    second = prepared(tmp_path / "second", sequences(tmp_path / "b", bought))
    examples = table(first, "examples").select("user_id", "timestamp", "split")
    vectors = [examples.join(table(folder, "embeddings"), on=["user_id", "timestamp"]) for folder in (first, second)]
    odd = pl.col("user_id").cast(pl.Int64) % 2 == 1
    for part, who, equal in (
        ("train", odd, True),
        ("validation", odd, True),
        ("test", ~odd, True),
        ("test", odd, False),
    ):
        one, other = (frame.filter((pl.col("split") == part) & who)["embedding"].to_numpy() for frame in vectors)
        assert (one == other).all() == equal, part
    again, both = (table(folder, "examples").filter(pl.col("split") != "test") for folder in (first, second))
    assert again["prompt"].equals(both["prompt"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_holds_the_target_unless_it_was_there_before(tmp_path: Path, kind: str) -> None:
    folder = prepared(tmp_path / "out", world(tmp_path / "source", kind))
    titles = {item: name.lower() for item, name in table(folder, "items").select("item_id", "item").iter_rows()}
    fresh, log = 0, table(folder, "interactions")
    for name in ("examples", "adapt"):
        for row in table(folder, name).iter_rows(named=True):
            earlier = log.filter((pl.col("user_id") == row["user_id"]) & (pl.col("timestamp") < row["timestamp"]))
            if row["item_id"] in set(earlier["item_id"]):
                continue
            fresh += 1
            assert row["completion"] not in row["prompt"]
            if kind == "movielens":
                assert f" {titles[row['item_id']]}" not in row["profile"]
            elif kind == "minionerec":
                assert f"item {row['item_id']}," not in row["profile"]
    assert fresh > 100


def test_equal_seconds_stay_in_one_stage(tmp_path: Path) -> None:
    rated = [(user, film, 1_000 + film // 4) for user in range(1, 9) for film in range(1, 17)]
    data = read(movielens(tmp_path, rated))
    log = staged(data, "auto", (0.4, 0.2, 0.2, 0.2), 1, 42)
    assert log["stage"].n_unique() == 4
    assert (
        log.group_by(pl.col("timestamp").dt.truncate("1s")).agg(pl.col("stage").n_unique())["stage"].to_list()
        == [1] * 5
    )


def test_leave_one_out_counts_from_the_end_and_says_who_is_too_short(tmp_path: Path) -> None:
    data = read(sequences(tmp_path, {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [1, 2, 3, 4, 5, 6]}))
    log = staged(data, "auto", (), 2, 42)
    letters = log.group_by("user_id", maintain_order=True).agg(pl.col("stage").str.slice(0, 1).str.join(""))["stage"]
    assert letters.to_list() == ["t", "vt", "pvt", "ppvt", "bbppvt"]
    asked, lost = targets(log, 1, 0, 0, 0, 42)
    assert lost == {(part, "after fewer than one interaction"): 1 for part in ("test", "validation", "train")} | {
        ("train", "after fewer than one interaction"): 2}  # fmt: skip
    assert asked.filter(pl.col("split") == "train")["user_id"].to_list() == ["4", "5", "5"]
    with pytest.raises(DataError, match=r"train: expected examples, got none \(5 after fewer than 4 interactions\)"):
        targets(log, 4, 0, 0, 0, 42)


def test_a_tenth_of_the_users_validates_and_training_rows_are_the_backbones(tmp_path: Path) -> None:
    parts = {user: ["history", "valid", "valid"] for user in range(1, 41)} | {41: ["history", "train", "valid", "test"]}
    data = read(minionerec(tmp_path, {user: list(range(1, len(own) + 1)) for user, own in parts.items()}, parts))
    log = staged(data, "auto", (), 1, 42)
    stages = log.filter(pl.col("place") > 0).group_by("user_id").agg(pl.col("stage").unique())
    drawn = stages.filter(pl.col("stage").list.contains("validation"))
    assert drawn.height == 4
    assert log.filter(pl.col("user_id") == "A41")["stage"].to_list()[:2] == ["backbone", "backbone"]
    other = staged(data, "auto", (), 1, 7)
    assert not other.equals(log)
    with pytest.raises(ConfigError, match="split: expected leave_one_out or auto for minionerec files"):
        staged(data, "time", (0.5, 0.2, 0.1, 0.2), 1, 42)
    assert staged(data, "leave_one_out", (), 1, 42).filter(pl.col("stage") == "test").height == 41


def made_up(lengths: Sequence[int], stage: str = "test") -> pl.DataFrame:
    """A log of one part's targets: so many of each user, one backbone row before them, one row for each other part."""
    rows = []
    for user, length in enumerate(lengths):
        rows += [(f"u{user}", place, "backbone" if place == 0 else stage) for place in range(length + 1)]
    rows += [("x", place, part) for place, part in enumerate(("backbone", "phi", "validation", "test"))]
    frame = pl.DataFrame(rows, schema=["user_id", "place", "stage"], orient="row").cast({"place": pl.Int64})
    start = datetime(2024, 1, 1, tzinfo=UTC)
    return frame.with_columns(timestamp=pl.Series([start + timedelta(days=place) for _, place, _ in rows]))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(0, 5),
    st.sampled_from([("phi", "train"), ("test", "test")]),
)
def test_long_users_are_thinned_evenly(lengths: list[int], most: int, seed: int, part: tuple[str, str]) -> None:
    stage, split = part
    limits = (most, 0) if stage == "phi" else (0, most)
    asked, lost = targets(made_up(lengths, stage), 1, *limits, 0, seed)
    whole, _ = targets(made_up(lengths, stage), 1, *reversed(limits), 0, seed)
    assert whole.filter(pl.col("split") == split).height == sum(lengths) + 1  # the other limit is not this part's
    places = asked.filter(pl.col("split") == split).group_by("user_id").agg("place")
    kept = dict(places.iter_rows())
    assert sum(lost.values()) == sum(max(0, length - most) for length in lengths)
    for user, length in enumerate(lengths):
        own = kept[f"u{user}"]
        assert len(own) == min(length, most)
        if length > most:
            assert {after - before for before, after in pairwise(own)} <= {length // most, -(-length // most)}


def test_test_users_are_drawn_and_the_others_keep_their_training_rows(tmp_path: Path) -> None:
    source = sequences(tmp_path / "source", histories())
    everyone, few = prepared(tmp_path / "all", source), prepared(tmp_path / "few", source, most_test_users=7)
    test, learned = pl.col("split") == "test", pl.col("split") != "test"
    assert table(few, "examples").filter(test)["user_id"].n_unique() == 7
    assert table(few, "examples").filter(learned).equals(table(everyone, "examples").filter(learned))
    again = prepared(tmp_path / "seed", source, most_test_users=7, seed=7)
    assert set(table(again, "examples").filter(test)["user_id"]) != set(table(few, "examples").filter(test)["user_id"])


@pytest.mark.parametrize(("stride", "places"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [2, 6]), (9, [6])])
def test_windows_are_counted_from_the_last_item(stride: int, places: list[int]) -> None:
    rows = [(user, place, "backbone") for user, length in (("a", 7), ("b", 1), ("c", 2)) for place in range(length)]
    log = pl.DataFrame(rows, schema=["user_id", "place", "stage"], orient="row").cast({"place": pl.Int64})
    asked = adapt_targets(log, stride, 42)
    assert asked.filter(pl.col("user_id") == "a")["place"].to_list() == places
    assert set(asked["user_id"]) == {"a", "c"}  # one item has nothing before it
    assert asked.group_by("split").agg(pl.col("user_id").n_unique())["user_id"].to_list() == [1, 1]
    with pytest.raises(DataError, match="backbone: expected at least 2 users with 2 interactions"):
        adapt_targets(log.filter(pl.col("user_id") != "c"), stride, 42)


def test_prompts_do_not_depend_on_how_many_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = movielens(tmp_path / "source", ratings())
    first = prepared(tmp_path / "first", source)
    monkeypatch.setattr(nextitem_texts, "_ENTRIES", 3)
    assert same(first, prepared(tmp_path / "second", source), "examples", "adapt") == [True, True]


def test_ready_codes_are_taken_as_they_are_and_twins_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "out", minionerec(tmp_path / "source", histories()))
    ids = SemanticIds.load(folder / "codes")
    ready = codes(range(31))
    assert all(ids.tokens(row)[:3] == ready[item] for row, item in enumerate(ids.ids))
    assert (ids.sizes, ids.separated) == ((8, 4, 3, 256), True)
    assert {ids.tokens(ids.rows[item])[3] for item in ("1", "2")} == {"<d_0>", "<d_1>"}
    out = capsys.readouterr().out
    assert "codes: 31 items" in out
    assert "2 items share all but the last code, at most 2; ready" in out
    own = prepared(tmp_path / "own", tmp_path / "source", code_vectors="text")
    assert SemanticIds.load(own / "codes").sizes == (4, 4, 256)


@pytest.mark.parametrize(
    ("coded", "settings", "said"),
    [
        ({"7": ["<a_1>", "<b_1>"]}, {}, r"index_Shop\.index\.json: item '7': expected 3 codes"),
        ({"7": ["<a_1>", "<b_1>", "<d_1>"]}, {}, r"item '7': expected <c_0> to .* got '<d_1>'"),
        ({"7": ["<a_1>", "<b_1>", "<c_9>"]}, {"sizes": (8, 4, 3)}, r"\(item '7'\): expected codes 0 to 2 at c, got 9"),
        ({"7": None}, {}, r"item '7': expected a list of codes, got None"),
    ],
)
def test_bad_ready_codes_are_refused(
    tmp_path: Path, coded: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    source = minionerec(tmp_path / "source", histories(), coded=codes(range(31)) | coded)
    with pytest.raises(DataError, match=said):
        prepared(tmp_path / "out", source, **settings)
    assert not (tmp_path / "out").exists()


def test_items_without_ready_codes_are_refused_if_anybody_had_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = minionerec(tmp_path / "a", histories(), coded=codes(range(1, 31)))  # all but item 0, which nobody has
    folder = prepared(tmp_path / "out", source)
    assert "left out: 1 items without codes, which nobody had" in capsys.readouterr().out
    assert "0" not in table(folder, "items")["item_id"]
    source = minionerec(tmp_path / "b", histories(), coded=codes([i for i in range(31) if i != 7]))
    with pytest.raises(
        DataError, match=r"expected codes for every item, got none for 1, first for item '7' of user 'A"
    ):
        prepared(tmp_path / "none", source)


def test_codes_of_any_files_can_come_from_a_file(tmp_path: Path) -> None:
    source, file = sequences(tmp_path / "source", histories()), tmp_path / "codes.json"
    file.write_text(json.dumps(codes(range(1, 34))))  # more than the sequences have
    folder = prepared(tmp_path / "out", source, codes=str(file), sizes=())
    items = table(folder, "items")
    assert items["item_id"].to_list() == SemanticIds.load(folder / "codes").ids == [str(i) for i in range(1, 34)]
    assert items.filter(pl.col("item_id") == "33").select("item", "popularity").row(0) == ("33", 0)
    with pytest.raises(ConfigError, match=r"code_vectors: expected auto where codes come from .*, got 'text'"):
        prepared(tmp_path / "other", source, codes=str(file), code_vectors="text")


def test_codes_of_behaviour_leave_unseen_items_to_the_last_level(tmp_path: Path) -> None:
    bought = histories() | {41: [1, 2, 3, 4, 501], 42: [2, 3, 4, 5, 502]}
    ids = SemanticIds.load(prepared(tmp_path / "out", sequences(tmp_path / "source", bought)) / "codes")
    assert ids.ids[-2:] == ["501", "502"]  # behind those that codebooks were made of
    one, other = ids.codes[ids.rows["501"]], ids.codes[ids.rows["502"]]
    assert (one[:-1] == other[:-1]).all()
    assert one[-1] != other[-1]
    with pytest.raises(DataError, match="expected at most 1 items with equal codes"):
        prepared(tmp_path / "few", tmp_path / "source", separating=1)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    source = sequences(tmp_path / "source", histories())
    for change, said in (
        ({"window": 0}, "window: expected a whole number >= 1, got 0"),
        ({"stride": -1}, "stride"),
        ({"min_history": 0}, "min_history"),
        ({"phi_targets": 0}, "phi_targets"),
        ({"most_per_user": -1}, "most_per_user"),
        ({"most_tested_per_user": -1}, "most_tested_per_user"),
        ({"shares": (0.5, 0.5)}, r"shares: expected four numbers > 0 that sum to 1, got \[0\.5, 0\.5\]"),
        ({"shares": (0.5, 0.3, 0.0, 0.2)}, "shares"),
        ({"shares": (0.5, 0.3, 0.3, 0.2)}, "shares"),
        ({"split": "time"}, "split: expected leave_one_out or auto for sequences files, which have no times"),
        ({"code_vectors": "text"}, "code_vectors: expected behaviour or auto for sequences files without texts"),
        ({"sizes": (3, 4)}, "sizes: expected 1 to 25 powers of two"),
        ({"alpha": -1.0}, "alpha"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepared(tmp_path / "out", source, **change)
    with pytest.raises(DataError, match=r"expected at least 256 to make codes .* got 30; pass --sizes 8,8"):
        prepared(tmp_path / "out", source, sizes=())
    with pytest.raises(DataError, match="expected more than 64 users and items"):
        prepared(tmp_path / "out", source, dimension=64)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bought = histories() | {41: [1, 2], 42: [3]}
    source = sequences(tmp_path / "source", bought)
    words = ["prepare", "nextitem", str(source), str(tmp_path / "out"), "--dimension", "4", "--sizes", "4,4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        f"sequences: {sum(map(len, bought.values()))} interactions of 42 users with 30 items, 30 in the catalogue"
        in out
    )
    assert "stage test: 42 interactions of 42 users, 0 with items that the backbone's stage has not" in out
    assert (
        "examples test: 41 of 41 users (left out: 1 after fewer than one interaction; history cut to 20 items: 0" in out
    )
    assert "adapt: " in out
    assert "users with one interaction)" in out
    assert "codes: 30 items, used by level 4/4 (perplexity" in out
    assert main(words) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="expected a prepared task or nothing"):
        prepared(tmp_path / "out", source, overwrite=True)


def test_examples_without_anything_known_before_have_no_vector_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users who come after the first stage and begin with a film that nobody rated in it."""
    late = [(50, 1, 1_000_900_000), (50, 30, 1_000_900_001), (50, 31, 1_000_900_002)]
    early = [rating for rating in ratings() if rating[1] != 1]
    folder = prepared(tmp_path / "out", movielens(tmp_path / "source", early + late))
    assert "no vector, for nothing before is in the space: 1)" in capsys.readouterr().out
    given = table(folder, "embeddings").filter(pl.col("user_id") == "50")
    assert given["timestamp"].to_list() == [datetime.fromtimestamp(1_000_900_002, UTC)]
    joined = join_tables(load_yaml(folder / "config.yaml").data)
    assert (joined.vector_rows < 0).sum() == 1


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "counts", "settings"),
    [
        (
            "movielens_small",
            (100_004, 9_125),
            {"code_vectors": "behaviour", "separating": 4096, "most_per_user": 5, "most_tested_per_user": 5},
        ),
        ("amazon_beauty_sequences", (198_502, 12_101), {"most_test_users": 500, "separating": 256}),
        ("amazon_industrial", (22_743, 3_686), {"sizes": ()}),
    ],
)
def test_real_files_come_through(
    tmp_path: Path, shared: Path, name: str, counts: tuple[int, int], settings: dict[str, Any]
) -> None:
    chosen = {"dimension": 8, "sizes": (64, 64), "window": 10, "iterations": 3} | settings
    folder = nextitem.prepare(str(shared / "data" / name), str(tmp_path / "out"), **chosen)
    assert (table(folder, "interactions").height, table(folder, "items").height) == counts
    assert open_embeddings(str(folder / "embeddings.parquet")).dim == 8
    assert set(table(folder, "examples")["split"]) == {"train", "validation", "test"}
