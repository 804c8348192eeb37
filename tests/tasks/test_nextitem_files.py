"""Official layouts as they are published, read into one form; what is not as documented is named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from e2p.errors import DataError
from e2p.tasks.nextitem_files import read
from nextitem_worlds import codes, histories, minionerec, movielens, ratings, sequences

DAY_1 = datetime(2000, 1, 1, tzinfo=UTC)


def rows(frame: pl.DataFrame, user: str) -> list[str]:
    return frame.filter(pl.col("user_id") == user)["item_id"].to_list()


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_movielens_is_read_by_user_and_time_and_ties_keep_their_order(tmp_path: Path) -> None:
    rated = [(2, 3, 100), (2, 1, 90), (2, 4, 100), (10, 3, 5), (2, 2, 100), (2, 5, 101)]
    data = read(movielens(tmp_path, rated))
    assert (data.kind, data.timed, data.codes) == ("movielens", True, None)
    assert rows(data.log, "2") == ["1", "3", "4", "2", "5"]
    times = data.log.filter(pl.col("user_id") == "2")["timestamp"]
    assert times.dt.epoch("us").to_list() == [90_000_000, 100_000_000, 100_000_001, 100_000_002, 101_000_000]
    assert times.dtype == pl.Datetime("us", "UTC")
    first, second, third = data.items.head(3).rows()
    assert first == ("1", "Film 1 (1951)", "Film 1 (1951)", [])
    assert second == ("2", 'Second, The, "Two" (1952)', 'Second, The, "Two" (1952), drama', ["drama"])
    assert third[2:] == ("Film 3 (1953), comedy, war", ["comedy", "war"])


def test_ratings_of_films_that_nobody_named_are_left_out_and_counted(tmp_path: Path) -> None:
    data = read(movielens(tmp_path, [(1, 3, 100), (1, 777, 101), (2, 777, 102)]))
    assert rows(data.log, "1") == ["3"]
    assert data.left_out == {"ratings of films that movies.csv lacks": 2}


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "ratings.csv",
            "rating,timestamp",
            "rating,when",
            r"ratings\.csv: expected a column 'timestamp', found: userId",
        ),
        ("ratings.csv", "3.5,101", "3.5,soon", r"row 1: timestamp: expected seconds since 1970, got 'soon'"),
        ("ratings.csv", "3.5,101", "3.5,", r"row 1: timestamp: expected seconds since 1970, got none"),
        ("ratings.csv", "3.5,101", "3.5", r"row 1: timestamp: expected seconds since 1970, got none"),
        ("ratings.csv", "3.5,101", "3.5,1475517600000", r"row 1: timestamp: expected seconds since 1970"),
        ("ratings.csv", "3.5,101", "3.5,101,9", r"ratings\.csv: row 1: expected 4 fields, got 5"),
        ("ratings.csv", "1,4,", "1,four,", r"row 1: movieId: expected a whole number, got 'four'"),
        ("ratings.csv", "1,4,", "-1,4,", r"row 1: userId: expected a whole number, got '-1'"),
        ("ratings.csv", "1,4,", "\r\n1,4,", r"row 1: userId: expected a whole number, got none"),
        ("movies.csv", "movieId,title", "movieId,name", r"movies\.csv: expected a column 'title'"),
        ("movies.csv", "\n3,", "\n4,", r"movies\.csv: row 3: expected each film once, got 4 again"),
    ],
)
def test_bad_movielens_files_are_refused(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    folder = movielens(tmp_path, [(1, 3, 100), (1, 4, 101)])
    replaced(folder / file, old, new)
    with pytest.raises(DataError, match=said):
        read(folder)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    folder = movielens(tmp_path / "a", [(1, 3, 100)])
    (folder / "movies.csv").unlink()
    with pytest.raises(DataError, match=r"movies\.csv: not found; take the official files"):
        read(folder)
    with pytest.raises(DataError, match=r"ratings\.csv: the table is empty"):
        read(movielens(tmp_path / "b", []))
    with pytest.raises(DataError, match=r"expected the files of one data set, of ratings\.csv .*, got none of them"):
        read(tmp_path)
    both = sequences(movielens(tmp_path / "c", ratings()), histories())
    with pytest.raises(DataError, match="got movielens and sequences"):
        read(both)


def test_sequences_keep_their_order_and_get_a_day_for_every_item(tmp_path: Path) -> None:
    data = read(sequences(tmp_path, {7: [3, 1, 3], 12: [2, 1]}, {"1": "B001", "3": " B003; x"}))
    assert (data.kind, data.timed) == ("sequences", False)
    assert rows(data.log, "7") == ["3", "1", "3"]
    assert data.log.filter(pl.col("user_id") == "12")["timestamp"].to_list() == [DAY_1, DAY_1.replace(day=2)]
    assert dict(data.items.select("item_id", "item").iter_rows()) == {"1": "B001", "2": "2", "3": "B003, x"}
    assert data.items["text"].null_count() == 3  # a store's number is no text
    unnamed = read(sequences(tmp_path / "plain", {7: [3, 1]}))
    assert unnamed.items["item"].to_list() == ["1", "3"]


def test_lines_without_items_are_counted_and_blank_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "sequential.txt").write_text("\ufeff1 5  6\r\n\n2\n3 6 \n", encoding="utf-8")
    data = read(tmp_path)
    assert data.log.select("user_id", "item_id").rows() == [("1", "5"), ("1", "6"), ("3", "6")]
    assert data.left_out == {"users without items": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 2 3\n2 x 3\n", r"sequential\.txt:2: expected 'user item item \.\.\.', whole numbers, got '2 x 3'"),
        ("1 2 3\n\n2 -4\n", r"sequential\.txt:3: "),
        ("1 2 3\n2 1.5\n", r"sequential\.txt:2: "),
        ("1 2 3\n2 4\n1 5\n", r"sequential\.txt:3: expected a user's items in one line, got user 1 in line 1 too"),
        ("1\n2\n", "expected users with items, got none"),
        ("", "expected users with items, got none"),
    ],
)
def test_bad_sequences_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sequential.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ("{", r"datamaps\.json: expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected an object with 'id2item'"),
    ],
)
def test_bad_maps_are_refused(tmp_path: Path, maps: str, said: str) -> None:
    folder = sequences(tmp_path, {1: [2, 3]})
    (folder / "datamaps.json").write_text(maps)
    with pytest.raises(DataError, match=said):
        read(folder)


def test_rows_of_a_user_are_one_sequence_longer_than_any_history(tmp_path: Path) -> None:
    items = [*range(1, 16), 3, 3]
    parts = ["history"] * 4 + ["valid"] * 8 + ["test"] * 5
    data = read(minionerec(tmp_path, {5: items, 6: [9, 8, 9]}, {5: parts, 6: ["history", "valid", "test"]}))
    assert (data.kind, data.timed, data.codes) == ("minionerec", False, tmp_path / "index_Shop.index.json")
    assert rows(data.log, "A5") == list(map(str, items))
    assert data.log.filter(pl.col("user_id") == "A5")["part"].to_list() == parts
    assert rows(data.log, "A6") == ["9", "8", "9"]
    assert data.log.filter(pl.col("user_id") == "A6")["timestamp"].to_list()[-1] == DAY_1.replace(day=3)
    item = data.items.row(by_predicate=pl.col("item_id") == "3", named=True)
    assert item["item"] == "Item 3, of a name, that has rather more words than are shown"
    assert item["text"] == f"{item['item']}. x"


def test_training_rows_come_first_if_they_are_there(tmp_path: Path) -> None:
    parts = ["history", "train", "train", "valid", "test"]
    data = read(minionerec(tmp_path, {5: [1, 2, 3, 4, 5]}, {5: parts}))
    assert data.log["part"].to_list() == parts
    for part in ("train", "valid", "test"):  # as in the repository: a folder for each
        (tmp_path / part).mkdir()
        (tmp_path / f"{part}_Shop.csv").rename(tmp_path / part / "Shop_5_2016-10-2018-11.csv")
    assert read(tmp_path).log.equals(data.log)


def test_a_first_row_may_have_an_empty_history(tmp_path: Path) -> None:
    data = read(minionerec(tmp_path, {5: [1, 2], 6: [3]}, {5: ["valid", "test"], 6: ["test"]}))
    assert rows(data.log, "A5") == ["1", "2"]
    assert rows(data.log, "A6") == ["3"]


def test_items_are_called_by_their_ids_where_no_text_came_along(tmp_path: Path) -> None:
    folder = minionerec(tmp_path, {5: [1, 2, 3]}, {5: ["history", "valid", "test"]}, described={"1": {"title": "One"}})
    data = read(folder)
    assert data.items.head(3).select("item_id", "item", "text").rows() == [
        ("1", "One", "One"),
        ("0", "0", None),
        ("2", "2", None),
    ]
    (folder / "index_Shop.item.json").unlink()
    assert read(folder).items["text"].null_count() == 31
    (folder / "index_Shop.index.json").unlink()
    with pytest.raises(DataError, match=r"expected \*\.item\.json or \*\.index\.json, got neither"):
        read(folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("test_Shop.csv", "history_item_id", "history", "expected a column 'history_item_id'"),
        (
            "test_Shop.csv",
            '"[1, 2, 3]"',
            '"[1, 2"',
            r"row 0 \(user 'A5'\): history_item_id: expected a list like \[1, 2\], got '\[1, 2'",
        ),
        ("test_Shop.csv", '"[1, 2, 3]"', "\"[1, 'x', 3]\"", r"row 0 \(user 'A5'\): history_item_id"),
        ("test_Shop.csv", '"[1, 2, 3]"', "", r"row 0 \(user 'A5'\): history_item_id: expected a list .* got None"),
        (
            "test_Shop.csv",
            '"[1, 2, 3]"',
            '"[1, 9, 3]"',
            r"test_Shop\.csv: row 0 \(user 'A5'\): expected a history that ends in",
        ),
        (
            "test_Shop.csv",
            '"[1, 2, 3]"',
            '"[0, 1, 2, 3]"',
            r"row 0 \(user 'A5'\): expected a history that ends in .* got 0, 1",
        ),
        ("test_Shop.csv", '"[1, 2, 3]",4', '"[1, 2, 3]",four', "row 0: item_id: expected a whole number, got 'four'"),
        ("test_Shop.csv", '"[1, 2, 3]",4', '"[1, 2, 3]",400', r"row 0 \(user 'A5'\): expected items of .* got 400"),
        ("test_Shop.csv", "A5", "", "row 0: user_id: expected a user, got none"),
        (
            "valid_Shop.csv",
            '"[1, 2]"',
            '"[1, 200]"',
            r"valid_Shop\.csv: row 0 \(user 'A5'\): expected items of .* got 200",
        ),
        ("index_Shop.item.json", '{"title"', '["title", {"title"', r"index_Shop\.item\.json: expected JSON"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    folder = minionerec(tmp_path, {5: [1, 2, 3, 4]}, {5: ["history", "history", "valid", "test"]})
    replaced(folder / file, old, new)
    with pytest.raises(DataError, match=said):
        read(folder)


def change_texts(folder: Path) -> None:
    (folder / "index_Shop.item.json").write_text(json.dumps({"1": "One"}))


def second_codes(folder: Path) -> None:
    (folder / "other.index.json").write_text(json.dumps(codes(range(3))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_texts, "item '1': expected an object with title, got 'One'"),
        (second_codes, r"expected one \*\.index\.json, got index_Shop\.index\.json and other\.index\.json"),
        (lambda folder: (folder / "valid_Shop.csv").unlink(), r"expected valid_\*\.csv, got none"),
    ],
)
def test_bad_sets_of_files_are_refused(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    folder = minionerec(tmp_path, histories())
    change(folder)
    with pytest.raises(DataError, match=said):
        read(folder)
