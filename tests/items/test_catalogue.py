"""Tables of items that are refused, and texts read back: a slip of spelling is forgiven, an invention is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.items import catalogue as module
from e2p.items.catalogue import Catalogue, ReadBack, load_catalogue, normalise, playlist_text, read_back, reading

NAMES = ["Radiohead", "Muse", "Sigur Rós", "The Beatles", "U2", "blink-182", "Portishead", "Volume 11", "AC/DC", "MUSE"]
ARTISTS = Path(__file__).resolve().parents[3] / "shared/data/lastfm_2k/artists.dat"


def catalogue_of(names: list[str]) -> Catalogue:
    vectors = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    return Catalogue([f"i{row}" for row in range(len(names))], names, vectors)


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return catalogue_of(NAMES)


def write(folder: Path, kind: str, rows: list[dict[str, object]]) -> str:
    path = folder / f"items.{kind}"
    if kind == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        pl.DataFrame(flat).write_csv(path)
    return str(path)


ROWS: list[dict[str, object]] = [
    {"item_id": "007", "item": "Bond", "embedding": [1.0, 0.5], "genre": "spy"},
    {"item_id": "8", "item": "bond", "embedding": [0.0, 0.0], "genre": "spy"},
    {"item_id": "9", "item": "Garbage", "embedding": [0.25, -2.0], "genre": "rock"},
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_all_three_formats_give_one_catalogue(tmp_path: Path, kind: str) -> None:
    found = load_catalogue(write(tmp_path, kind, ROWS))
    assert (found.ids, found.names) == (["007", "8", "9"], ["Bond", "bond", "Garbage"])
    assert found.vectors.dtype == np.float32
    assert found.vectors.tolist() == [[1.0, 0.5], [0.0, 0.0], [0.25, -2.0]]
    assert (len(found), found.dim, found.rows["9"]) == (3, 2, 2)


def test_items_that_share_a_name_are_read_as_the_first(tmp_path: Path) -> None:
    found = load_catalogue(write(tmp_path, "parquet", ROWS))
    assert found.shared_names == 1
    assert found.read_as.tolist() == [0, 0, 2]
    assert read_back(["BOND ; garbage"], found) == [ReadBack(2, [0, 2], 0, 0)]


def test_rows_are_counted_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 1)
    source = write(tmp_path, "parquet", [*ROWS, {**ROWS[0], "item_id": "10", "item": " "}])
    with pytest.raises(DataError, match=r"items.parquet: row 3 \(item '10'\): expected a name, got ' '"):
        load_catalogue(source)


def changed(column: str, value: object, row: int = 2) -> list[dict[str, object]]:
    return [{**one, column: value} if index == row else one for index, one in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed("item", None), r"row 2 \(item '9'\): expected a name, got None"),
        (changed("item_id", None), r"row 2.*expected an item id, got none"),
        (changed("item_id", "007"), r"row 2 \(item '007'\): expected an id once, got it in row 0 too"),
        (changed("embedding", [1.0]), r"row 2 \(item '9'\): expected an embedding of 2 numbers, got 1"),
        (changed("embedding", None), r"row 2 \(item '9'\): expected an embedding of 2 numbers, got none"),
        (changed("embedding", [1.0, float("nan")]), r"row 2 \(item '9'\): expected finite float32 numbers, got nan"),
        (changed("embedding", [1.0, 1e300]), r"row 2 \(item '9'\): expected finite float32 numbers, got inf"),
        ([{k: v for k, v in row.items() if k != "item"} for row in ROWS], r"expected a column 'item'"),
        ([{**row, "item": 3} for row in ROWS], r"column 'item': expected text, got Int64"),
    ],
)
def test_a_table_is_refused_with_its_row(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_catalogue(write(tmp_path, "parquet", rows))


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    schema = {"item_id": pl.String, "item": pl.String, "embedding": pl.List(pl.Float32)}
    pl.DataFrame(schema=schema).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="the table is empty"):
        load_catalogue(str(tmp_path / "items.parquet"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Catalogue([], [], np.empty((0, 2), np.float32)), "at least one item"),
        (lambda: Catalogue(["a"], [], np.ones((1, 2), np.float32)), "got 0 names"),
        (lambda: Catalogue(["a"], ["x"], np.ones((2, 2), np.float32)), r"\[2, 2\]"),
        (lambda: Catalogue(["a"], ["x"], np.ones((1, 0), np.float32)), r"\[1, 0\]"),
        (lambda: Catalogue(["a", "a"], ["x", "y"], np.ones((2, 1), np.float32)), "row 1.*once"),
    ],
)
def test_a_catalogue_made_by_hand_is_checked_too(make: Callable[[], Catalogue], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ReadBack(0, [], 0, 0)),
        (" ; ;\n", ReadBack(0, [], 0, 0)),
        ("radiohead ; muse", ReadBack(2, [0, 1], 0, 0)),
        ("muse;  RADIOHEAD ;", ReadBack(2, [1, 0], 0, 0)),
        ("sigur  rós\nthe beatles", ReadBack(2, [2, 3], 0, 0)),
        ("sigur ro\u0301s", ReadBack(1, [2], 0, 0)),  # composed and decomposed letters are one
        ("ｍｕｓｅ；u2", ReadBack(2, [1, 4], 0, 0)),  # so are wide ones, the separator among them
        ("radiohaed", ReadBack(1, [], 0, 1)),  # two letters swapped in nine: too far
        ("radioheads", ReadBack(1, [0], 0, 0)),
        ("the beatle", ReadBack(1, [3], 0, 0)),
        ("muse ; radiohead ; MUSE", ReadBack(3, [1, 0], 1, 0)),
        ("radiohead ; radioheadd", ReadBack(2, [0], 1, 0)),  # both are read as one item
        ("nobody we know ; Nobody  we know ; muse", ReadBack(3, [1], 1, 1)),
        ("volume 12", ReadBack(1, [], 0, 1)),
        ("blink-183", ReadBack(1, [], 0, 1)),
        ("blink 182", ReadBack(1, [], 0, 1)),
        ("ac/dc", ReadBack(1, [8], 0, 0)),
    ],
)
def test_a_text_is_read(known: Catalogue, text: str, expected: ReadBack) -> None:
    assert read_back([text], known) == [expected]


@pytest.mark.parametrize("text", ["mused", "mouse", "mus", "u", "u3", "u22", "acdc", "m", "1", "?", "the", "beatles"])
def test_a_short_name_is_not_stretched(known: Catalogue, text: str) -> None:
    assert read_back([text], known) == [ReadBack(1, [], 0, 1)]


def test_a_number_is_never_a_slip() -> None:
    known = catalogue_of(["Circuito Reggae 11", "Donkey Kong Country"])
    texts = ["circuito reggae 12", "circuito reggae", "donkey kong country 2", "circuito regae 11"]
    assert [one.items for one in read_back(texts, known)] == [[], [], [], [0]]


def test_part_of_a_name_is_not_the_name() -> None:
    known = catalogue_of(["Florence + the Machine", "Rage Against the Machine", "Nick Cave"])
    texts = ["the machine", "machine", "florence", "nick cave & the bad seeds", "rage against the machines"]
    assert [one.items for one in read_back(texts, known)] == [[], [], [], [], [1]]


def test_an_exact_name_goes_before_a_near_one_and_the_nearest_first() -> None:
    known = catalogue_of(["elephants in a row", "elephant in a row", "elephants in a raw"])
    assert read_back(["elephant in a row ; elephants in a rows"], known)[0].items == [1, 0]


def test_the_cutoff_decides(known: Catalogue) -> None:
    assert read_back(["radiohaed"], known, cutoff=80)[0].items == [0]
    assert read_back(["radioheads"], known, cutoff=100)[0].inventions == 1
    for wrong in (0, 101, float("nan")):
        with pytest.raises(ConfigError, match="cutoff"):
            read_back([""], known, cutoff=wrong)


def test_another_separator(known: Catalogue) -> None:
    assert read_back(["muse | u2"], known, separator=" | ")[0].items == [1, 4]
    for wrong in ("  ", "", " AND "):
        with pytest.raises(ConfigError, match="separator"):
            read_back([""], known, separator=wrong)
    with pytest.raises(DataError, match=r"row 1 \(item 'i1'\).*'a ; b'"):
        read_back([""], catalogue_of(["x", "a ; b"]))


def test_each_different_entry_is_looked_up_once(known: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    likest = module._likest
    monkeypatch.setattr(module, "_likest", lambda entry, *rest: [asked.append(entry), likest(entry, *rest)][1])
    read_back(["radioheads ; muse", "RADIOHEADS ; nobody", "nobody"] * 50, known)
    assert sorted(asked) == ["nobody", "radioheads"]


def test_rapidfuzz_is_asked_for_only_where_it_is_needed(known: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz", None)
    assert read_back(["muse"], known)[0].items == [1]
    with pytest.raises(MissingExtraError, match=r"e2p\[recsys\]"):
        read_back(["mused"], known)


def test_totals() -> None:
    known = catalogue_of(NAMES)
    found = read_back(["muse ; u2 ; muse", "", "nobody here ; nobody here ; radiohead"], known)
    assert reading(found) == {
        "entries": 6,
        "found": 3,
        "inventions": 1,
        "duplicates": 2,
        "empty": 1,
        "miss_rate": 0.25,
    }
    assert reading([])["miss_rate"] is None


@given(st.lists(st.sampled_from(range(len(NAMES) - 1)), unique=True, max_size=6))
def test_reading_is_the_inverse_of_writing(rows: list[int]) -> None:
    known = catalogue_of(NAMES)
    text = playlist_text([known.names[row] for row in rows])
    assert read_back([text, text.upper()], known) == [ReadBack(len(rows), rows, 0, 0)] * 2


@pytest.mark.parametrize("name", ["a;b", "a\nb", "a；b", "a\u2028b"])
def test_a_name_that_would_be_read_as_two_is_not_written(name: str) -> None:
    with pytest.raises(DataError, match="in one line without ';'"):
        playlist_text(["x", name])


@given(st.lists(st.text(st.sampled_from("abmuse2;\n É"), max_size=12), max_size=5))
def test_entries_are_items_duplicates_and_inventions(texts: list[str]) -> None:
    for text, one in zip(texts, read_back(texts, catalogue_of(NAMES)), strict=True):
        assert one.entries == len(one.items) + one.duplicates + one.inventions
        assert one.entries == sum(bool(part.strip()) for part in text.replace("\n", ";").split(";"))
        assert len(set(one.items)) == len(one.items)


@given(st.text(max_size=20))
def test_a_normalised_name_stays_as_it_is(name: str) -> None:
    once = normalise(name)
    assert normalise(once) == once
    assert normalise(f"  {name}\t") == once


@pytest.mark.real_data
@pytest.mark.skipif(not ARTISTS.exists(), reason="the public data is not beside the project")
def test_real_names_with_a_slip_are_found_and_others_are_not() -> None:
    """The figures beside CUTOFF, on a smaller draw: half of the names are the catalogue, the others inventions."""
    from e2p.tasks.music import read

    names = read(ARTISTS.parent).names["name"].to_list()
    random = np.random.default_rng(0)
    order = random.permutation(len(names))
    known = catalogue_of([names[index] for index in order[: len(names) // 2]])
    assert read_back([playlist_text(known.names)], known)[0].items == np.unique(known.read_as).tolist()

    strangers = {normalise(names[index]) for index in order[len(names) // 2 :]} - set(known.by_name)
    drawn = random.choice(sorted(strangers), 1000, replace=False).tolist()
    assert reading(read_back(drawn, known))["found"] < 25

    rows = [row for row in random.choice(len(known), 1500, replace=False).tolist() if len(known.names[row]) >= 10]
    slips = [normalise(known.names[row]) for row in rows]
    for index, name in enumerate(slips):
        at = int(random.integers(len(name)))
        slips[index] = name[:at] + "x" + name[at + 1 :]
    found = read_back(slips, known)
    right = sum(one.items == [int(known.read_as[row])] for one, row in zip(found, rows, strict=True))
    assert right > 0.95 * len(rows)
    assert sum(bool(one.items) for one in found) - right < 0.01 * len(rows)
