"""Codes of items: what they keep of the vectors, how new items get theirs, and how they are kept and read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.items.residual import decode, groups, separate
from e2p.items.semantic_ids import SemanticIds, SemanticIdSettings, read_codes
from e2p.items.trie import Trie

SIZES = (16, 8, 8)


def drawn(count: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    """Vectors in heaps: sixteen centres far apart, and what is left of them near to each."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(16, dim)) * 10
    return (centres[random.integers(0, 16, count)] + random.normal(size=(count, dim))).astype(np.float32)


def names(count: int, start: int = 0) -> list[str]:
    return [f"item-{row}" for row in range(start, start + count)]


@pytest.fixture(scope="module")
def fitted() -> SemanticIds:
    pytest.importorskip("faiss")
    return SemanticIds.fit(drawn(400), names(400), SemanticIdSettings(sizes=SIZES, separate=128))


def equal(one: SemanticIds, other: SemanticIds) -> None:
    for name in ("ids", "sizes", "separated", "spread", "settings", "version"):
        assert getattr(one, name) == getattr(other, name)
    pairs = [(one.codes, other.codes), (one.errors, other.errors), *zip(one.codebooks, other.codebooks, strict=True)]
    for left, right in pairs:
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()


def test_codes_are_those_of_the_nearest_sums(fitted: SemanticIds) -> None:
    """Nearly all items get the best of all 1,024 sums."""
    vectors = drawn(400)
    every = np.stack(np.meshgrid(*(np.arange(size) for size in SIZES), indexing="ij"), axis=-1).reshape(-1, 3)
    sums = decode(every, fitted.codebooks).astype(np.float64)
    distances = np.square(vectors[:, None].astype(np.float64) - sums[None]).sum(axis=-1)
    got = np.square(vectors - fitted.reconstruct(), dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(fitted.errors * fitted.spread, got, rtol=1e-4, atol=1e-5)
    assert np.mean(got <= distances.min(axis=1) * 1.001 + 1e-6) > 0.9
    assert fitted.report()["reconstruction_error"] == pytest.approx(
        got.mean() / np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean(), rel=1e-4
    )


def test_items_of_the_catalogue_get_their_own_codes_back(fitted: SemanticIds) -> None:
    assert fitted.codes.dtype == np.int64
    assert np.array_equal(fitted.quantise(drawn(400)), fitted.codes[:, :-1])
    again = fitted.encode([f"copy of {item}" for item in fitted.ids], drawn(400))
    assert np.array_equal(again.codes[400:, :-1], fitted.codes[:, :-1])
    assert len(np.unique(again.codes, axis=0)) == 800


def test_fitting_again_gives_the_same(fitted: SemanticIds) -> None:
    settings = fitted.settings
    assert settings is not None
    equal(fitted, SemanticIds.fit(drawn(400), names(400), settings))
    assert SemanticIds.fit(drawn(400), names(400), replace(settings, seed=1)).version != fitted.version
    assert SemanticIds.fit(drawn(400), names(400), replace(settings, training_items=50)).version != fitted.version


def test_more_levels_reconstruct_better() -> None:
    pytest.importorskip("faiss")
    errors = []
    for levels in range(1, 5):
        made = SemanticIds.fit(drawn(400), names(400), SemanticIdSettings(sizes=(16,) * levels))
        errors.append(made.report()["reconstruction_error"])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.2
    assert errors[-1] < errors[0] / 5


def test_a_beam_wider_than_the_first_level_is_as_good() -> None:
    """faiss leaves such a beam unsorted, and then takes any code for the best."""
    pytest.importorskip("faiss")
    for sizes in ((2,), (4,), (4, 2), (2, 2, 16)):
        greedy, wide = (
            SemanticIds.fit(drawn(200), names(200), SemanticIdSettings(sizes=sizes, beam=beam)) for beam in (1, 50)
        )
        assert wide.report()["reconstruction_error"] < greedy.report()["reconstruction_error"] * 1.1


def test_a_new_item_begins_like_the_old_one_it_is_near_to(fitted: SemanticIds) -> None:
    near = drawn(400) + np.random.default_rng(3).normal(size=(400, 6)).astype(np.float32) * 1e-3
    more = fitted.encode(names(400, 400), near)
    same = fitted.codes[:, :-1] == more.codes[400:, :-1]
    assert same[:, 0].mean() > 0.98
    assert same.all(axis=1).mean() > 0.9


def test_new_items_leave_the_old_ones_and_the_vocabulary_alone(fitted: SemanticIds) -> None:
    more = fitted.encode(names(100, 400), drawn(100, seed=5))
    assert more.ids == names(500)
    assert np.array_equal(more.codes[:400], fitted.codes)
    assert np.array_equal(more.errors[:400], fitted.errors)
    assert len(more.errors) == len(more) == 500
    assert (more.version, more.token_names(), more.sizes) == (fitted.version, fitted.token_names(), fitted.sizes)
    assert len(fitted) == 400
    one_by_one = fitted
    for row, vector in enumerate(drawn(100, seed=5)):
        one_by_one = one_by_one.encode([f"item-{400 + row}"], vector[None])
    assert len(np.unique(one_by_one.codes, axis=0)) == 500
    trie = Trie.build(fitted.codes, fitted.sizes).insert(more.codes[400:])
    nodes = trie.root(500)
    for level in range(4):
        assert trie.allowed(nodes, level)[np.arange(500), more.codes[:, level]].all()
        nodes = trie.step(nodes, trie.root(500) + trie.root(500).new_tensor(more.codes[:, level]))
    assert trie.leaf(nodes).tolist() == list(range(500))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_the_last_level_counts_in_order_of_id(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    codes = np.array(pairs, dtype=np.int64)
    ids = data.draw(st.permutations([f"{row:02d}" for row in range(len(pairs))]))
    seen: dict[tuple[int, int], int] = {}
    expected = {}
    for item, pair in sorted(zip(ids, pairs, strict=True)):
        expected[item] = seen[pair] = seen.get(pair, -1) + 1
    last = separate(codes, ids, 30, "here")
    assert last.tolist() == [expected[item] for item in ids]
    old = data.draw(st.integers(0, len(pairs) - 1))
    before = np.column_stack([codes[:old], separate(codes[:old], ids[:old], 30, "here")]) if old else None
    after = separate(codes[old:], ids[old:], 30, "here", before)
    full = np.column_stack([codes, np.concatenate([before[:, -1] if before is not None else after[:0], after])])
    assert len({tuple(row) for row in full.tolist()}) == len(pairs)
    for group in set(pairs):  # without gaps
        assert sorted(full[(codes == group).all(axis=1), -1]) == list(range(pairs.count(group)))
    largest = max(map(pairs.count, pairs))
    if largest > 1:
        with pytest.raises(DataError, match=rf"expected at most {largest - 1} items .* got {largest} with"):
            separate(codes, ids, largest - 1, "here")


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30))
def test_groups_are_those_of_equal_rows(rows: list[list[int]]) -> None:
    number, counts = groups(np.array(rows))
    assert [rows.count(row) for row in rows] == counts[number].tolist()
    assert [[a == b for b in rows] for a in rows] == (number[:, None] == number[None]).tolist()


def test_the_report_counts_what_can_be_counted_by_hand() -> None:
    codes = np.array([[0, 1, 0], [0, 1, 1], [2, 1, 0], [3, 0, 0]])
    report = SemanticIds(["a", "b", "c", "d"], codes, (4, 2, 8), True).report()
    assert report["collisions"] == {"items": 2, "groups": 1, "largest": 2}
    assert report["separating"] == {"size": 8, "used": 2}
    assert report["reconstruction_error"] is None
    assert report["items"] == 4
    first, second, _ = report["levels"]
    assert first == {"size": 4, "used": 3, "entropy": 1.5, "perplexity": 2**1.5, "top_code": 0, "top_share": 0.5}
    assert (second["used"], second["top_code"], second["top_share"]) == (2, 1, 0.75)
    assert second["entropy"] == pytest.approx(0.8112781)
    assert json.loads(json.dumps(report)) == report


def test_codes_are_told_as_texts() -> None:
    made = SemanticIds(["x", "y"], np.array([[12, 0, 3], [1, 1, 0]]), (16, 2, 4), False)
    assert made.tokens(0) == ["<a_12>", "<b_0>", "<c_3>"]
    every = made.token_names()
    assert len(every) == len(set(every)) == 22
    assert [every[0], every[15], every[16], every[18], every[-1]] == ["<a_0>", "<a_15>", "<b_0>", "<c_0>", "<c_3>"]
    assert made.rows_of(["y", "x", "y"]).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="item 'z': expected codes, got none"):
        made.rows_of(["x", "z"])


def test_saving_and_loading_keep_every_bit(fitted: SemanticIds, tmp_path: Path) -> None:
    (tmp_path / "catalogue.parquet").write_text("stays")
    fitted.save(tmp_path)
    loaded = SemanticIds.load(tmp_path)
    equal(fitted, loaded)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(kept) == 3
    loaded.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    new = drawn(20, seed=8)
    more, same = fitted.encode(names(20, 400), new), loaded.encode(names(20, 400), new)
    equal(more, same)
    more.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    equal(SemanticIds.load(tmp_path), more)


def test_a_write_that_fails_leaves_the_old_codes(
    fitted: SemanticIds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.save(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DataError, match="cannot be written: disk full"):
        fitted.encode(["new"], drawn(1)).save(tmp_path)
    equal(SemanticIds.load(tmp_path), fitted)
    assert len(list(tmp_path.iterdir())) == 2


def test_ready_codes_are_saved_too(tmp_path: Path) -> None:
    ready = SemanticIds(["x", "ü"], np.array([[1, 0], [0, 1]]), (2, 2), False)
    ready.save(tmp_path / "new" / "folder")
    equal(SemanticIds.load(tmp_path / "new" / "folder"), ready)


def edit(key: str, value: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        record = json.loads(path.read_text())
        record[key] = value
        path.write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "FileNotFoundError"),
        (lambda path: path.write_text("{"), "JSONDecodeError"),
        (lambda path: path.write_text("[]"), "TypeError"),
        (lambda path: path.write_text("{}"), "KeyError: 'format'"),
        (edit("format", 99), "expected format 1, got 99"),
        (edit("version", "other"), "expected version other, got"),
        (edit("sizes", [4, 2, 1]), "expected codes .*, got 1"),
        (edit("ids", ["a", "a"]), "expected an id once, got item 'a' again"),
        (edit("ids", ["a"]), r"expected codes \[1, 3\]"),
        (edit("tensors", "elsewhere.safetensors"), "FileNotFoundError"),
        (lambda path: next(path.parent.glob("*.safetensors")).write_bytes(b"0"), "expected tensors of sha256"),
    ],
)
def test_spoilt_files_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    SemanticIds(["a", "b"], np.array([[0, 1, 1], [3, 0, 0]]), (4, 2, 2), False).save(tmp_path)
    spoil(tmp_path / "semantic_ids.json")
    with pytest.raises(DataError, match=message):
        SemanticIds.load(tmp_path)


def written(folder: Path, text: Any) -> Path:
    path = folder / "codes.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def test_ready_codes_are_read(tmp_path: Path) -> None:
    plain = read_codes(written(tmp_path, {"7": ["<a_1>", "<b_20>"], "8": ["<a_0>", "<b_3>"]}))
    assert (plain.ids, plain.codes.tolist()) == (["7", "8"], [[1, 20], [0, 3]])
    assert (plain.sizes, plain.separated) == ((2, 21), False)
    assert plain.report()["collisions"] == {"items": 0, "groups": 0, "largest": 1}
    twins = {"9": ["<a_1>", "<b_2>"], "10": ["<a_1>", "<b_2>"], "11": ["<a_1>", "<b_3>"]}
    shared = read_codes(written(tmp_path, twins), sizes=(4, 8), separating=5)
    assert shared.codes.tolist() == [[1, 2, 1], [1, 2, 0], [1, 3, 0]]  # in order of id, as texts
    assert (shared.sizes, shared.separated, shared.tokens(0)[-1]) == ((4, 8, 5), True, "<c_1>")
    assert shared.version != plain.version
    for refused in (lambda: shared.encode(["12"], drawn(1)), shared.reconstruct, lambda: shared.quantise(drawn(1))):
        with pytest.raises(DataError, match="got ready codes"):
            refused()
    with pytest.raises(DataError, match="No such file"):
        read_codes(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": ["<a_1>", "<b_1>"], "y": ["<a_1>"]}, "item 'y': expected 2 codes, .* got 1"),
        ({"x": ["<a_1>"], "y": []}, r"item 'y': expected a list of codes, got \[\]"),
        ({"x": None}, "item 'x': expected a list of codes, got None"),
        ({"x": ["<a_1>", "<a_1>"]}, "item 'x': expected <b_0> .*, got '<a_1>'"),
        ({"x": ["<a_01>"]}, "item 'x': expected <a_0> to <a_65535>, got '<a_01>'"),
        ({"x": ["<a_-1>"]}, "got '<a_-1>'"),
        ({"x": ["<a_70000>"]}, "got '<a_70000>'"),
        ({"x": [3]}, "item 'x': expected <a_0> .*, got 3"),
        ({"x": ["<a_1>"] * 26}, "item 'x': expected 25 codes"),
        ({"x": ["<a_1>"], "y": ["<a_9>"]}, r"\(item 'y'\): expected codes 0 to 7 at a, got 9"),
        ({"x": ["<a_1>"], "y": ["<a_1>"], "z": ["<a_1>"]}, "expected at most 2 items with equal codes .* got 3"),
        ({"x": ["<a_1>", "<b_2>"]}, "expected 1 codes for each item, got 2"),
        ({" ": ["<a_1>"]}, "row 0: expected an item id, got ' '"),
        ({}, "expected at least one item, got none"),
        ([], "expected a JSON object of codes by item, got list"),
        ('{"x": ["<a_1>"], "x": ["<a_2>"]}', "expected an id once, got item 'x' again"),
        ("{", "expected a JSON object of codes by item, got: "),
    ],
)
def test_ready_codes_that_are_none_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_codes(path, sizes=(8,), separating=2)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1], [0, 1]], r"row 1 \(item 'b'\): expected codes of its own, got <a_0><b_1> of item 'a' too"),
        ([[0, 1], [0, 2]], r"row 1 \(item 'b'\): expected codes 0 to 1 at b, got 2"),
        ([[0, 1], [-1, 0]], r"row 1 \(item 'b'\): expected codes 0 to 1 at a, got -1"),
        ([[0, 1]], r"expected codes \[2, 2\] .* got \[1, 2\]; give every item all codes"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SemanticIds(["a", "b"], np.array(codes), (2, 2), False)


def spoilt(row: int, value: float) -> np.ndarray:
    vectors = drawn(40)
    vectors[row, 2] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (spoilt(7, np.nan), names(40), r"row 7 \(item 'item-7'\): expected finite float32 numbers, got nan at 2"),
        (spoilt(7, np.inf), names(40), r"row 7 \(item 'item-7'\): expected finite"),
        (spoilt(7, 1e20), names(40), r"row 7 \(item 'item-7'\): expected a vector no longer than 1e\+15, got 1e\+20"),
        (drawn(15), names(15), "expected at least 16 items, as many as a level has codes, got 15"),
        (drawn(40), names(39), r"expected vectors \[39, D\] .* got \[40, 6\]"),
        (drawn(40)[:, 0], names(40), r"expected vectors \[40, D\] .* got \[40\]"),
        (drawn(40), [*names(39), "item-3"], "row 39: expected an id once, got item 'item-3' again"),
        (np.zeros((40, 6), np.float32), names(40), "item 'item-9': expected at most 32 items with .* got 40"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vectors: np.ndarray, ids: list[str], message: str) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(DataError, match=message):
        SemanticIds.fit(vectors, ids, SemanticIdSettings(sizes=SIZES, separate=32))


def test_new_items_that_do_not_fit_are_refused(fitted: SemanticIds) -> None:
    with pytest.raises(DataError, match="expected an id once, got item 'item-3' again"):
        fitted.encode(["item-3"], drawn(1))
    with pytest.raises(DataError, match=r"expected vectors \[1, 6\] .* got \[1, 5\]"):
        fitted.encode(["new"], drawn(1, 5))
    with pytest.raises(DataError, match=r"row 0 \(item 'new'\): expected finite"):
        fitted.encode(["new"], np.full((1, 6), np.nan, np.float32))
    with pytest.raises(DataError, match=r"item 'new-\d+': expected at most 128 items with equal codes"):
        fitted.encode([f"new-{row}" for row in range(129)], np.repeat(drawn(1), 129, axis=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes: expected 1 to 25 powers of two"),
        ({"sizes": (256, 100)}, "sizes: expected 1 to 25 powers of two"),
        ({"sizes": (1,)}, "sizes"),
        ({"sizes": (1 << 17,)}, "sizes"),
        ({"beam": 0}, "beam: expected a whole number >= 1, got 0"),
        ({"separate": 0}, "separate: expected"),
        ({"training_items": 255}, "training_items: expected a whole number >= 256, got 255"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SemanticIdSettings(**values)


def test_without_faiss_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"faiss-cpu.*pip install 'e2p\[recsys\]'"):
        SemanticIds.fit(drawn(300), names(300))


@pytest.mark.real_data
def test_the_ready_codes_of_amazon_industrial_are_complete(shared: Path, tmp_path: Path) -> None:
    """The figures of its README: 3,686 items on three levels. 31 of them share their codes with another."""
    path = shared / "data" / "amazon_industrial" / "index_Industrial_and_Scientific.index.json"
    made = read_codes(path)
    raw = json.loads(path.read_text())
    assert len(made) == 3686
    assert made.sizes == (252, 256, 256, 256)
    assert all(made.tokens(row)[:3] == raw[item] for row, item in enumerate(made.ids))
    report = made.report()
    assert report["collisions"] == {"items": 31, "groups": 15, "largest": 3}
    assert report["separating"] == {"size": 256, "used": 3}
    trie = Trie.build(made.codes, made.sizes)
    nodes = trie.root(len(made))
    for level in range(4):
        nodes = trie.step(nodes, nodes.new_tensor(made.codes[:, level]))
    assert trie.leaf(nodes).tolist() == list(range(3686))
    made.save(tmp_path)
    equal(SemanticIds.load(tmp_path), made)
