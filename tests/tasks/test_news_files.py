"""PENS and MIND in their official layouts, odd rows included: what is not as documented is counted by line."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.errors import DataError
from e2p.tasks.news_files import News, read
from news_worlds import PENS_NEWS, click, mind, pens, raw, tsv

NEWS = [("N1", "One", "first body"), ("N2", "Two", "second body"), ("N3", "Three", "third body")]


def articles(news: News) -> dict[str, tuple[str, str]]:
    return {name: (title, body) for name, title, body, _ in news.articles.iter_rows()}


def faults(news: News) -> dict[str, int]:
    return {reason: count for (_, reason), count in news.faults.counts.items()}


def test_pens_is_read_by_hand(tmp_path: Path) -> None:
    folder = pens(
        tmp_path,
        NEWS,
        [click("U1", "N1 N2", "N3", "N2 N9"), click("U1", "", "N1", "", "7/4/2019 12:00:00 PM")],
        [click("U2", "N3", "N2", "N1")],
        [["NT1", "N1,N2", "N3,N1,N3", "Mine;;  My own\t;;Mine again"]],
    )
    news = read(folder)
    assert (news.kind, news.faults.told()) == ("pens", [])
    assert articles(news) == {name: (title, body) for name, title, body in NEWS}
    first, second, third, test = news.visits.iter_rows(named=True)
    assert (first["user_id"], first["history"], first["clicked"], first["passed"]) == (
        "U1",
        ["N1", "N2"],
        ["N3"],
        ["N2", "N9"],
    )
    assert first["dwell"] == [10.0, 10.0]
    assert first["timestamp"] == datetime(2019, 7, 3, 6, 43, 49, tzinfo=UTC)
    assert (second["history"], second["dwell"], second["passed"]) == ([], None, [])
    assert [one["split"] for one in (first, second, third, test)] == ["train", "train", "validation", "test"]
    assert test["history"] == ["N1", "N2"]
    assert test["clicked"] == ["N3", "N1", "N3"]
    assert test["rewritten"] == ["Mine", "My own", "Mine again"]
    assert test["timestamp"] > second["timestamp"]


def test_a_history_is_ordered_by_its_exposure_times_and_dwell_follows(tmp_path: Path) -> None:
    times = "#TAB#".join(["6/19/2019 5:10:01 PM", "6/19/2019 5:10:01 AM", "6/18/2019 11:00:00 PM"])
    row = click("U1", "N1 N2 N3", "N9", "", dwell="5 6 7", exposed=times)
    untimed = click("U2", "N1 N2 N3", "N9", "", dwell="5 6", exposed="soon")
    news = read(pens(tmp_path, NEWS, [row, untimed]))
    assert news.visits["history"].to_list() == [["N3", "N2", "N1"], ["N1", "N2", "N3"]]
    assert news.visits["dwell"].to_list() == [[7.0, 6.0, 5.0], None]


def test_a_history_of_three_hundred_clicks_is_whole(tmp_path: Path) -> None:
    ids = [f"N{number}" for number in range(300)]
    news = read(pens(tmp_path / "pens", NEWS, [click("U1", " ".join(ids), "N1", "", exposed="")]))
    assert news.visits["history"][0].to_list() == ids
    news = read(mind(tmp_path / "mind", NEWS, [("U1", "11/12/2019 2:14:46 PM", " ".join(ids), "N1-1")]))
    assert news.visits["history"][0].to_list() == ids


def test_tabs_quotes_and_line_breaks_inside_a_quoted_cell(tmp_path: Path) -> None:
    odd = [
        ("N1", 'He said "no"\tand left', "a body\nof two lines\twith a tab"),
        ("N2", '"Joker" wins', 'ends with a "quote"'),
        ("N3", "naïve café 日本 😀", "line\u2028separator\x85inside"),
    ]
    news = read(pens(tmp_path, odd, [click("U1", "N1", "N2", "N3")]))
    assert news.faults.told() == []
    assert articles(news) == {
        "N1": ('He said "no" and left', "a body of two lines with a tab"),
        "N2": ('"Joker" wins', 'ends with a "quote"'),
        "N3": ("naïve café 日本 😀", "line separator inside"),
    }


def test_a_quote_that_never_closes_costs_no_other_row(tmp_path: Path) -> None:
    folder = pens(
        tmp_path, [*NEWS, *((f"N{i}", f"Title {i}", f"body {i}") for i in range(4, 9))], [click("U1", "", "N1", "")]
    )
    path = folder / "news.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[2] = lines[2].replace("Two", '"Two')
    lines[5] = lines[5].replace("Title 5", '"Title" 5')
    path.write_text("\n".join(lines), encoding="utf-8")
    news = read(folder)
    assert list(articles(news)) == [f"N{i}" for i in range(1, 9)]
    assert articles(news)["N2"][0] == '"Two'
    assert articles(news)["N5"][0] == '"Title" 5'


def test_mind_has_no_quotes_at_all(tmp_path: Path) -> None:
    odd = [("N1", '"Joker" wins "it', 'an "abstract'), ("N2", '"', "body"), ("N3", "plain", '"')]
    news = read(mind(tmp_path, odd, [("U1", "11/12/2019 2:14:46 PM", "N3 N3 N1", "N1-1 N2-0 N-7-0")]))
    assert articles(news) == {name: (title, body) for name, title, body in odd}
    (visit,) = news.visits.iter_rows(named=True)
    assert visit["timestamp"] == datetime(2019, 11, 12, 14, 14, 46, tzinfo=UTC)
    assert (visit["history"], visit["clicked"], visit["passed"]) == (["N3", "N3", "N1"], ["N1"], ["N2", "N-7"])
    assert (visit["split"], visit["dwell"], visit["rewritten"]) == (None, None, None)


def test_minds_parts_are_training_and_test(tmp_path: Path) -> None:
    mind(tmp_path / "MINDsmall_train", NEWS[:2], [("U1", "11/12/2019 2:14:46 PM", "", "N1-1")])
    again = [("N2", "Two, corrected", "other body"), NEWS[2]]
    mind(tmp_path / "MINDsmall_dev", again, [("U1", "11/15/2019 2:14:46 PM", "N1", "N3-1 N2-0")])
    news = read(tmp_path)
    assert articles(news) == {name: (title, body) for name, title, body in NEWS}
    assert news.visits["split"].to_list() == ["train", "test"]
    assert news.faults.told() == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["U1", "N1"], "not 9 columns"),
        (["", *click("U1", "N1", "N2", "")[1:]], "without a user"),
        (click("U1", "N1", "N2", "", start="2019-07-03"), "start is no time"),
        (click("U1", "N1", "N2", "", start=""), "start is no time"),
    ],
)
def test_bad_impressions_of_pens_are_counted_and_named(tmp_path: Path, row: list[str], reason: str) -> None:
    good = click("U1", "N1", "N2", "N3")
    news = read(pens(tmp_path, NEWS, [good, row, good, row]))
    assert news.visits.height == 2
    assert faults(news) == {reason: 2}
    assert news.faults.told() == [f"{tmp_path / 'train.tsv'}: 2 rows left out: {reason} (line 3, 5)"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["NT1", "N1", "N1,N2", "one"], "not as many headlines as articles"),
        (["NT1", "N1", "N1", "one;;two"], "not as many headlines as articles"),
        (["", "N1", "N1", "one"], "without a user"),
        (["NT1", "N1", "N1"], "not 4 columns"),
    ],
)
def test_bad_rows_of_pens_test_are_counted_and_named(tmp_path: Path, row: list[str], reason: str) -> None:
    news = read(pens(tmp_path, NEWS, [click("U1", "N1", "N2", "N3")], test=[row]))
    assert news.visits.height == 1
    assert news.faults.told() == [f"{tmp_path / 'personalized_test.tsv'}: 1 rows left out: {reason} (line 2)"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["", "11/12/2019 2:14:46 PM", "N1", "N1-1"], "without a user"),
        (["U1", "yesterday", "N1", "N1-1"], "time is no time"),
        (["U1", "11/12/2019 2:14:46 PM", "N1", "N1"], "impressions are not like N123-1 N456-0"),
        (["U1", "11/12/2019 2:14:46 PM", "N1", "N1-2"], "impressions are not like N123-1 N456-0"),
        (["U1", "11/12/2019 2:14:46 PM", "N1", ""], "impressions are not like N123-1 N456-0"),
        (["U1", "11/12/2019 2:14:46 PM", "N1"], "not 5 columns"),
    ],
)
def test_bad_impressions_of_mind_are_counted_and_named(tmp_path: Path, row: list[str], reason: str) -> None:
    good = ["U1", "11/12/2019 2:14:46 PM", "N1", "N2-1 N3-0"]
    news = read(mind(tmp_path, NEWS, [row, good, *[row] * 6]))
    assert news.visits.height == 1
    told = f"{tmp_path / 'behaviors.tsv'}: 7 rows left out: {reason} (line 1, 3, 4, 5, 6, …)"
    assert news.faults.told() == [told]


def test_articles_twice_and_without_id(tmp_path: Path) -> None:
    news = read(mind(tmp_path, [*NEWS, ("N1", "Another", "body"), ("", "No id", "body")], [
        ("U1", "11/12/2019 2:14:46 PM", "", "N1-1"),
    ]))  # fmt: skip
    assert articles(news)["N1"] == ("One", "first body")
    assert faults(news) == {"articles that came before": 1, "without an article id": 1}


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected personalized_test\.tsv, train\.tsv"):
        read(tmp_path)
    folder = mind(tmp_path / "a", NEWS, [("U1", "11/12/2019 2:14:46 PM", "", "N1-1")])
    (folder / "news.tsv").unlink()
    with pytest.raises(DataError, match=r"news\.tsv: expected one of the official files, got: No such file"):
        read(folder)
    folder = pens(tmp_path / "b", NEWS, [click("U1", "N1", "N2", "N3")])
    tsv(folder / "news.tsv", [[*PENS_NEWS[:4], "Text"], ["N1", "a", "b", "c", "d"]])
    with pytest.raises(DataError, match=r"news\.tsv:1: expected a header with newsid, .*, got no newsbody"):
        read(folder)
    folder = mind(tmp_path / "c", NEWS, [("", "11/12/2019 2:14:46 PM", "", "N1-1")])
    with pytest.raises(DataError, match=r"expected impressions, got none as documented.*without a user \(line 1\)"):
        read(folder)
    (folder / "news.tsv").write_bytes(b"N1\xff")
    with pytest.raises(DataError, match=r"news\.tsv: expected one of the official files, got: no UTF-8 at byte 2"):
        read(folder)


# What a cell of a spreadsheet may hold. No carriage return: text files on the way here turn it into a line feed.
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00", exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6))
def test_what_a_spreadsheet_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("pens")
    news = [(f"N{number}", title, body) for number, (title, body) in enumerate(cells)]
    found = read(pens(folder, news, [click("U1", "", "N1", "")]))
    assert found.faults.told() == []
    expected = {name: (" ".join(title.split()), " ".join(body.split())) for name, title, body in news}
    assert articles(found) == expected
    text = (folder / "news.tsv").read_text(encoding="utf-8")
    reference = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[1:]
    assert [row[3:5] for row in reference] == [[title, body] for _, title, body in news]


@given(st.lists(st.text(st.sampled_from('ab"\t\n'), max_size=12), min_size=1, max_size=8))
def test_whatever_stands_in_a_file_no_good_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, junk: list[str]
) -> None:
    folder = pens(tmp_path_factory.mktemp("pens"), NEWS, [click("U1", "", "N1", "")])
    path = folder / "news.tsv"
    good = path.read_text(encoding="utf-8").split("\n")[1:4]
    lines = [path.read_text(encoding="utf-8").split("\n")[0], good[0], *junk, good[1], good[2], ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    # Junk may close a quote of its own over a good row, but only into a row that looks whole: here it cannot.
    assert {"N1", "N2", "N3"} <= set(articles(read(folder)))


def test_mind_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    folder = mind(tmp_path, NEWS, [("U1", "11/12/2019 2:14:46 PM", "N1", "N2-1")])
    for name in ("news.tsv", "behaviors.tsv"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    news = read(folder)
    assert news.faults.told() == []
    assert news.visits["clicked"].to_list() == [["N2"]]
    assert raw(tmp_path / "x.tsv", [["a"]]).read_text() == "a\n"
