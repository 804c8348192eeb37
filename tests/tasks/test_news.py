"""Headlines of PENS and MIND as tables: counted by hand and against a plain loop; no article and no user leaks."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from e2p.cli import main
from e2p.config_io import load_yaml
from e2p.data.tables import example_batches, open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.evaluation.leaks import check_leaks
from e2p.tasks.news import NOTHING, WORDING, dealt, numbered, prepare
from e2p.tasks.news_files import read
from e2p.tasks.news_users import profiles, user_vectors
from news_worlds import click, mind, mind_world, pens

SHARES = (0.5, 0.2, 0.3)


def prepared(tmp_path: Path, source: Path, name: str = "out", **settings: object) -> pl.DataFrame:
    chosen: dict[str, object] = {"dimension": 3, "shares": SHARES} | settings
    prepare(str(source), str(tmp_path / name), **chosen)  # type: ignore[arg-type]
    return pl.read_parquet(tmp_path / name / "examples.parquet")


def embeddings(folder: Path) -> dict[tuple[object, ...], np.ndarray]:
    table = open_embeddings(str(folder / "embeddings.parquet"))
    keys = table.keys.select([name for name in ("user_id", "timestamp") if name in table.keys.columns])
    return dict(zip(keys.rows(), table.vectors, strict=True))


def small_pens(folder: Path) -> Path:
    news = [(f"N{i}", f"Headline {i}", f"The body of article {i}. " * 3) for i in range(13)]
    news[9] = ("N9", "Headline 9", "")
    train = [
        click("U1", "N0 N1", "N2 N3 N4 N5", "N6 N99"),  # four clicked, of which three are drawn
        click("U1", "N0 N1 N2", "N3", "N6 N5 N12", "7/4/2019 6:43:49 AM"),  # N3 and N6 again, N5 was clicked before
        click("U2", "", "N2 N9", "N0 N10", "7/3/2019 8:00:00 AM"),  # N9 has no body; N10 is the test's
        click("U3", "N4 N5", "N4", "N1 N7", "7/3/2019 9:00:00 AM"),  # N4 is in the history; N7 is validation's
        click("U4", "N0 N3", "N1", "N2", "7/3/2019 9:00:00 AM"),
        click("U5", "N1 N3", "N0", "N2", "7/3/2019 9:00:00 AM"),
    ]
    valid = [click("U2", "N2", "N7", "N8", "7/5/2019 6:43:49 AM")]
    test = [["NT1", "N0,N5", "N10,N11,N10", "Mine;;Ours;;Mine, again"], ["NT2", "N3", "N10,N9", "Theirs;;Lost"]]
    return pens(folder, news, train, valid, test)


def test_pens_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = prepared(tmp_path, small_pens(tmp_path / "pens"), clicked=3)
    told = capsys.readouterr().out
    rows = {(row["user_id"], row["item_id"], row["completion"]): row for row in table.iter_rows(named=True)}
    assert len(rows) == table.height
    drawn = {item for user, item, _ in rows if user == "U1" and rows[user, item, f"Headline {item[1:]}"]["label"]}
    assert len(drawn) == 3
    assert drawn < {"N2", "N3", "N4", "N5"}
    others = {(user, item, row["label"]) for (user, item, _), row in rows.items() if user not in ("U1", "NT1", "NT2")}
    assert others == {
        ("U2", "N2", True),
        ("U2", "N0", False),
        ("U3", "N1", False),
        ("U4", "N1", True),
        ("U4", "N2", False),
        ("U5", "N0", True),
        ("U5", "N2", False),
        ("U2", "N7", True),
        ("U2", "N8", False),
    }
    assert {item for user, item, _ in rows if user == "U1" and item not in drawn} == {"N6", "N12"}
    own = {key: row for key, row in rows.items() if row["split"] == "test"}
    assert set(own) == {
        ("NT1", "N10", "Mine"),
        ("NT1", "N11", "Ours"),
        ("NT1", "N10", "Mine, again"),
        ("NT2", "N10", "Theirs"),
    }
    assert {row["source"] for row in own.values()} == {"rewritten"}
    for said in (
        "clicked: 2 articles without a body",
        "passed over: 1 articles that news.tsv lacks",
        "clicked: 1 articles in the user's history already",
        "clicked: 1 articles shown to the user before",
        "passed over: 1 articles shown to the user before",
        "passed over: 1 clicked another time",
        "passed over: 2 articles of a later part",
        "clicked: 1 beyond the most of an impression",
    ):
        reason, _, rest = said.partition(": ")
        count, _, text = rest.partition(" ")
        assert f"left out: {count} {reason}: {text}" in told
    assert table["example_id"].is_unique().all()
    row = rows["NT1", "N11", "Ours"]
    assert row["prompt"] == WORDING.format(" ".join(["The body of article 11."] * 3))
    assert row["profile"] == "Headline 5 ; Headline 0"
    assert (row["group"], row["category"], row["label"]) == ("N11", "news", True)
    vectors = embeddings(tmp_path / "out")
    u2 = [key for key in vectors if key[0] == "U2"]
    assert len(u2) == 1  # the first impression of U2 has no history, and so no vector
    assert len([key for key in vectors if key[0] == "U1"]) == 2


def by_hand(folder: Path, share: float) -> dict[tuple[str, str], tuple[bool, str]]:
    """What could become an example before articles and users are dealt: by user and article, label and source."""
    articles = {}
    for line in (folder / "news.tsv").read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        articles[cells[0]] = (cells[3], cells[4])
    visits = [line.split("\t") for line in (folder / "behaviors.tsv").read_text(encoding="utf-8").splitlines()]
    earlier: dict[str, set[str]] = {}
    found: dict[tuple[str, str], tuple[bool, str]] = {}
    passed: list[tuple[str, str]] = []
    for _, user, _, history, shown in visits:
        clicks = history.split()
        if user not in earlier:
            cut = len(clicks) - int(len(clicks) * share)
            earlier[user] = set(clicks[:cut])
            later = clicks[cut:]
        else:
            later = []
        known = earlier[user] if share else set(clicks)
        marks = dict(one.rsplit("-", 1) for one in shown.split())
        for item in [*(item for item, mark in marks.items() if mark == "1"), *later]:
            if articles.get(item, ("", ""))[1] and item not in known:
                found.setdefault(
                    (user, item), (True, "impression" if item in marks and marks[item] == "1" else "history")
                )
        passed += [(user, item) for item, mark in marks.items() if mark == "0" and item not in known]
    for user, item in passed:
        if articles.get(item, ("", ""))[1]:
            found.setdefault((user, item), (False, "impression"))
    return found


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_mind_against_a_plain_loop(tmp_path: Path, share: float, seed: int) -> None:
    source = mind_world(tmp_path / "mind", seed)
    table = prepared(tmp_path, source, history_share=share, clicked=99, passed=99, seed=seed)
    expected = by_hand(source, share)
    assert len(expected) > 100
    articles, users = dealt(read(source), numbered(read(source).visits, share), SHARES, seed)
    part, tested = dict(articles.iter_rows()), dict(users.iter_rows())
    kept = {key: value for key, value in expected.items() if (part[key[1]] == "test") == tested[key[0]]}
    assert {(r["user_id"], r["item_id"]): (r["label"], r["source"]) for r in table.iter_rows(named=True)} == kept
    assert all(part[item] == split for item, split in table.select("item_id", "split").iter_rows())


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_no_article_and_no_test_user_is_in_two_parts(tmp_path: Path, share: float) -> None:
    table = prepared(tmp_path, mind_world(tmp_path / "mind", users=120), history_share=share)
    assert table.group_by("item_id").agg(pl.col("split").n_unique())["split"].max() == 1
    users = {part: set(table.filter(pl.col("split") == part)["user_id"]) for part in ("train", "validation", "test")}
    assert not users["test"] & (users["train"] | users["validation"])
    assert all(users.values())


def test_no_article_of_pens_or_of_minds_parts_is_in_two(tmp_path: Path) -> None:
    table = prepared(tmp_path, small_pens(tmp_path / "pens"))
    assert table.group_by("item_id").agg(pl.col("split").n_unique())["split"].max() == 1
    mind_world(tmp_path / "parts" / "MINDsmall_train", 0)
    mind_world(tmp_path / "parts" / "MINDsmall_dev", 1, users=9, articles=12)
    table = prepared(tmp_path, tmp_path / "parts", "parts_out")
    assert table.group_by("item_id").agg(pl.col("split").n_unique())["split"].max() == 1
    assert table["split"].n_unique() == 3
    known = [int(item[1:]) for item in table.filter(pl.col("split") != "test")["item_id"]]
    assert min(known) >= 12  # the dev part's own, shown there or in its histories' neighbourhood, are the test's


def test_an_impression_gives_no_more_than_it_may(tmp_path: Path) -> None:
    source = mind_world(tmp_path / "mind", users=100)
    table = prepared(tmp_path, source, clicked=1, passed=2, history_share=0.5)
    counts = Counter(
        (row["example_id"].split("-")[0], row["label"])
        for row in table.filter(pl.col("source") == "impression").iter_rows(named=True)
    )
    assert max(count for (_, label), count in counts.items() if label) == 1
    assert max(count for (_, label), count in counts.items() if not label) == 2
    visits = defaultdict(int)
    for row in table.filter(pl.col("source") == "history").iter_rows(named=True):
        visits[row["example_id"].split("-")[0]] += 1
    assert max(visits.values()) > 1  # of a history all of the share are taken


def test_a_vector_sees_the_earlier_clicks_and_nothing_else(tmp_path: Path) -> None:
    """Other later clicks, and other impressions, change no vector and no profile."""
    source = mind_world(tmp_path / "mind", 5)
    prepared(tmp_path, source, "first", history_share=0.5, seed=3)
    path = source / "behaviors.tsv"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        number, user, time, history, shown = line.split("\t")
        clicks = history.split()
        kept = clicks[: len(clicks) - len(clicks) // 2]
        turned = shown.replace("-0", "-x").replace("-1", "-0").replace("-x", "-1")
        lines.append("\t".join([number, user, time, " ".join([*kept, *["N1"] * (len(clicks) // 2)]), turned]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepared(tmp_path, source, "second", history_share=0.5, seed=3)
    one, other = (embeddings(tmp_path / name) for name in ("first", "second"))
    both = set(one) & set(other)
    assert len(both) > 10
    for key in both:
        np.testing.assert_array_equal(one[key], other[key])
    texts = [
        dict(pl.read_parquet(tmp_path / name / "examples.parquet").select("user_id", "profile").unique().iter_rows())
        for name in ("first", "second")
    ]
    shared = set(texts[0]) & set(texts[1])
    assert len(shared) > 10
    assert all(texts[0][user] == texts[1][user] for user in shared)


def test_each_impression_has_a_vector_of_its_own_history(tmp_path: Path) -> None:
    """Equal histories have equal vectors, whoever's they are; a longer one has another, and the space is training's."""
    source = small_pens(tmp_path / "pens")
    path = source / "train.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("U5\tN1 N3\t", "U5\tN0 N1\t"), encoding="utf-8")
    prepared(tmp_path, source)
    found = embeddings(tmp_path / "out")
    first, second = sorted(key for key in found if key[0] == "U1")
    (other,) = (key for key in found if key[0] == "U5")
    np.testing.assert_allclose(found[first], found[other], rtol=1e-6)
    assert not np.allclose(found[first], found[second], rtol=1e-3)
    path = source / "personalized_test.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("NT2\tN3", 'NT2\t"N3,N0"'), encoding="utf-8")
    prepared(tmp_path, source, "other")
    again = embeddings(tmp_path / "other")
    for key in found:
        assert np.array_equal(found[key], again[key]) == (key[0] != "NT2")


def frame(histories: list[list[str]], dwell: list[list[float] | None] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {"visit": range(len(histories)), "history": histories, "dwell": dwell or [None] * len(histories)},
        schema={"visit": pl.Int64, "history": pl.List(pl.String), "dwell": pl.List(pl.Float64)},
    )


def shelf(titles: dict[str, str]) -> pl.DataFrame:
    return pl.DataFrame({"article_id": list(titles), "headline": list(titles.values())})


def test_a_profile_is_newest_first_or_longest_read_first() -> None:
    titles = shelf({"N1": "one", "N2": "two", "N3": "three", "N4": ""})
    visits = frame(
        [["N1", "N2", "N3"], ["N1", "N2", "N3", "N1"], ["N1", "N2", "N3"], ["N4", "N9"], [], ["N9", "N2"]],
        [None, None, [5.0, 60.0, 5.0], None, None, None],
    )
    found = dict(profiles(visits, titles, 100).iter_rows())
    assert found == {
        0: "three ; two ; one",
        1: "one ; three ; two",
        2: "two ; three ; one",
        5: "two",
    }
    assert dict(profiles(visits, titles, 11).iter_rows())[0] == "three ; two"
    assert dict(profiles(visits, titles, 10).iter_rows())[0] == "three"
    assert 0 not in dict(profiles(visits, titles, 4).iter_rows())


def test_a_vector_of_headlines_is_the_mean_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    import e2p.users.extract as extract

    def letters(texts: list[str], encoder: str) -> np.ndarray:
        assert encoder == "letters"
        assert len(set(texts)) == len(texts)
        return np.array([[text.count("a"), text.count("b"), len(text)] for text in texts], np.float32)

    monkeypatch.setattr(extract, "encode_texts", letters)
    titles = shelf({"N1": "aa", "N2": "bbb", "N3": "", "N4": "aa"})
    visits = frame([["N1", "N2", "N1"], ["N3"], [], ["N9", "N2", "N4"]])
    texts = profiles(visits, titles, 100)
    found, version = user_vectors(visits, visits, texts, titles, "headlines", "letters", 2, 1.0, 1.0, 0)
    expected = {0: [4 / 3, 1, 7 / 3], 3: [1, 1.5, 2.5]}
    assert version == "letters-headlines"
    assert {k: pytest.approx(v) for k, v in expected.items()} == {k: list(v) for k, v in found.iter_rows()}
    found, _ = user_vectors(visits, visits, texts, titles, "profile", "letters", 2, 1.0, 1.0, 0)
    assert {k: list(v) for k, v in found.iter_rows()} == {0: [2, 3, 8], 3: [2, 3, 8]}
    with pytest.raises(DataError, match="expected histories with headlines, got none"):
        user_vectors(frame([["N3"]]), visits, texts, titles, "headlines", "letters", 2, 1.0, 1.0, 0)


def test_both_kinds_of_vector_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import e2p.users.extract as extract

    monkeypatch.setattr(extract, "encode_texts", lambda texts, encoder: np.ones((len(texts), 2), np.float32))
    source = mind_world(tmp_path / "mind")
    prepared(tmp_path, source, "clicks", history_share=0.5)
    prepared(tmp_path, source, "both", history_share=0.5, vectors="both", encoder="ones")
    clicks, both = embeddings(tmp_path / "clicks"), embeddings(tmp_path / "both")
    assert set(clicks) <= set(both)
    for key, vector in clicks.items():
        np.testing.assert_array_equal(both[key][:3], vector)
    assert {tuple(vector[3:]) for vector in both.values()} <= {(1.0, 1.0), (0.0, 0.0)}


def test_the_tables_load_train_clean_and_say_their_settings(tmp_path: Path) -> None:
    from e2p.model.e2p import text_encoder
    from e2p.training.inputs import load_inputs
    from tiny import tiny_backbone

    source = mind_world(tmp_path / "mind", users=150)
    table = prepared(tmp_path, source, history_share=0.5, objective="kto")
    config = load_yaml(tmp_path / "out" / "config.yaml")
    assert config.objective.name == "kto"
    assert sum(batch.height for batch in example_batches(config.data.examples)) == table.height
    inputs = load_inputs(config.data, text_encoder(tiny_backbone("llama"), config.data, 1), "before_completion")
    for part in ("train", "validation", "test"):
        assert len(inputs.all_rows(part)) == table.filter(pl.col("split") == part).height
    fired = [check.name for check in check_leaks(inputs, config.data.examples) if check.fired]
    assert fired == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clicked": 0}, "clicked: expected a whole number >= 1, got 0"),
        ({"passed": -1}, "passed: expected a whole number >= 0, got -1"),
        ({"history_share": 1.0}, r"history_share: expected a number in \[0, 1\), got 1.0"),
        ({"shares": (0.5, 0.5)}, "shares: expected three numbers > 0 that sum to 1"),
        ({"shares": (0.5, 0.0, 0.5)}, "shares: expected three numbers > 0 that sum to 1"),
        ({"max_body_chars": 0}, "max_body_chars: expected a whole number >= 1, got 0"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path, tmp_path, **settings)


def test_a_part_without_examples_is_said_with_what_was_left_out(tmp_path: Path) -> None:
    news = [("N1", "One", "body"), ("N2", "Two", "")]
    source = mind(tmp_path / "mind", news, [("U1", "11/12/2019 2:14:46 PM", "N1", "N2-1 N7-0"), ("U1", "x", "", "")])
    with pytest.raises(DataError, match=r"got none; .*1 rows left out: time is no time.*clicked: articles without a"):
        prepared(tmp_path, source)
    assert not (tmp_path / "out").exists()


def test_an_earlier_output_stays_unless_told(tmp_path: Path) -> None:
    source = mind_world(tmp_path / "mind")
    prepared(tmp_path, source)
    with pytest.raises(RunError, match="add --overwrite"):
        prepared(tmp_path, source)
    prepared(tmp_path, source, overwrite=True)


def test_bodies_are_cut_at_a_word(tmp_path: Path) -> None:
    source = mind_world(tmp_path / "mind")
    table = prepared(tmp_path, source, max_body_chars=14)
    bodies = {text.removeprefix(WORDING.format("")) for text in table["prompt"]}
    assert max(map(len, bodies)) <= 14
    assert all(body.split()[0] == "body" and body.split()[1].isdigit() for body in bodies)


@pytest.mark.real_data
def test_the_slice_of_mind_by_hand(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shared / "data" / "mind_slice"
    assert main(["prepare", "news", str(source), str(tmp_path / "out"), "--shares", "0.45,0.1,0.45",
                 "--history_share", "0.5", "--clicked", "99", "--passed", "99"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "2,000 articles, 5,000 impressions of 4,637 users" in told
    table = pl.read_parquet(tmp_path / "out" / "examples.parquet")
    expected = by_hand(source, 0.5)
    articles, users = dealt(read(source), numbered(read(source).visits, 0.5), (0.45, 0.1, 0.45), 42)
    part, tested = dict(articles.iter_rows()), dict(users.iter_rows())
    kept = {key: value for key, value in expected.items() if (part[key[1]] == "test") == tested[key[0]]}
    assert {(r["user_id"], r["item_id"]): (r["label"], r["source"]) for r in table.iter_rows(named=True)} == kept
    assert table["profile"].null_count() == 0
    assert 0 < (table["profile"] == NOTHING).mean() < 0.9
