"""Tables: the same content through every format, and a message with file, row and user for every fault."""

from __future__ import annotations

import json
from datetime import UTC as ZONE
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.data import vectors as vectors_module
from e2p.data.sources import UTC
from e2p.data.tables import (
    content_key,
    example_batches,
    example_keys,
    open_embeddings,
    write_embeddings,
    write_frame,
)
from e2p.errors import DataError, RunError

NOON = "2024-05-01T12:00:00Z"
EXAMPLE = {"user_id": "u1", "prompt": "Hello", "completion": "Hi"}
FORMATS = ["jsonl", "csv", "parquet"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as the ending says; in CSV nested values become JSON text."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        pl.DataFrame(flat, infer_schema_length=None).write_csv(path)
    else:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    return str(path)


def read(source: str, rows: int = 8192) -> pl.DataFrame:
    return pl.concat(list(example_batches(source, rows)))


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("ending", FORMATS)
def test_embeddings_are_the_same_from_every_format(tmp_path: Path, ending: str) -> None:
    rows = [
        {
            "user_id": "007",
            "embedding": [0.1, 2.0],
            "timestamp": "2024-05-01T12:00:00Z",
            "version": "v2",
            "x": 1,
        },
        {
            "user_id": "b",
            "embedding": [3.5, 1e30],
            "timestamp": "2024-05-01T14:00:00+02:00",
            "version": "v1",
            "x": 2,
        },
    ]
    table = open_embeddings(write(tmp_path / f"e.{ending}", rows))
    assert table.vectors.dtype == np.float32
    np.testing.assert_array_equal(table.vectors, np.array([[0.1, 2.0], [3.5, 1e30]], dtype=np.float32))
    assert table.keys.schema == {"user_id": pl.String, "timestamp": UTC, "version": pl.String}
    assert table.keys["user_id"].to_list() == ["007", "b"]
    assert table.keys["timestamp"].to_list() == [datetime(2024, 5, 1, 12, tzinfo=ZONE)] * 2
    assert (table.dim, table.versions) == (2, ["v1", "v2"])


@pytest.mark.parametrize(
    "dtype",
    [
        pl.List(pl.Float64),
        pl.List(pl.Float32),
        pl.List(pl.Int16),
        pl.Array(pl.Int64, 2),
        pl.Array(pl.Float32, 2),
    ],
)
def test_every_list_of_numbers_becomes_float32(tmp_path: Path, dtype: pl.DataType) -> None:
    path = tmp_path / "e.parquet"
    pl.DataFrame({"user_id": [1, 2], "embedding": pl.Series([[1, 2], [3, 4]], dtype=dtype)}).write_parquet(path)
    table = open_embeddings(str(path), expected_dim=2)
    np.testing.assert_array_equal(table.vectors, np.array([[1, 2], [3, 4]], dtype=np.float32))
    assert table.keys.columns == ["user_id"]
    assert table.keys["user_id"].to_list() == ["1", "2"]
    assert table.versions == []


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_written_embeddings_come_back(tmp_path_factory: pytest.TempPathFactory, n: int, d: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("e") / "e.parquet"
    values = np.random.default_rng(seed).normal(size=(n, d))
    times = [datetime(2024, 1, 1, second=i, tzinfo=ZONE) for i in range(n)]
    write_embeddings(path, ["u"] * n, values, times, version="v1")
    table = open_embeddings(str(path))
    np.testing.assert_array_equal(table.vectors, values.astype(np.float32))
    assert table.keys["timestamp"].to_list() == times
    assert table.versions == ["v1"]
    assert pl.read_parquet_schema(path)["embedding"] == pl.Array(pl.Float32, d)


def test_many_vectors_live_on_disk_under_the_key_of_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(size=(70_000, 3)).astype(np.float32)
    write_embeddings(tmp_path / "e.parquet", [str(i) for i in range(70_000)], values)
    in_memory = open_embeddings(str(tmp_path / "e.parquet"), tmp_path / "cache")
    assert not isinstance(in_memory.vectors, np.memmap)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(vectors_module, "IN_MEMORY_BYTES", 300_000)
    mapped = open_embeddings(str(tmp_path / "e.parquet"), tmp_path / "cache")
    again = open_embeddings(str(tmp_path / "e.parquet"), tmp_path / "cache")
    assert isinstance(mapped.vectors, np.memmap)
    np.testing.assert_array_equal(mapped.vectors, values)
    np.testing.assert_array_equal(again.vectors, values)
    assert mapped.keys["user_id"].to_list() == [str(i) for i in range(70_000)]
    assert len(list((tmp_path / "cache" / "vectors").iterdir())) == 1


def test_an_interrupted_reading_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "IN_MEMORY_BYTES", 0)
    rows = [{"user_id": str(i), "embedding": [1.0] if i < 20_000 else [1.0, 2.0]} for i in range(20_001)]
    with pytest.raises(DataError, match=r"row 20000 \(user '20000'\): expected an embedding of 1 numbers, got 2"):
        open_embeddings(write(tmp_path / "e.jsonl", rows), tmp_path)
    assert list((tmp_path / "vectors").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "IN_MEMORY_BYTES", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        open_embeddings(write(tmp_path / "e.jsonl", [{"user_id": "a", "embedding": [1.0]}]), tmp_path / "file")


A, B = {"user_id": "a", "embedding": [1.0, 2.0]}, {"user_id": "b", "embedding": [3.0, 4.0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"user": "a", "vector": [1.0]}],
            r"expected a column 'user_id' and 'embedding', found: user, vector; add",
        ),
        ([A, B | {"embedding": [1.0]}], r"row 1 \(user 'b'\): expected an embedding of 2 numbers, got 1"),
        ([A, B | {"embedding": None}], r"row 1 \(user 'b'\): expected an embedding of 2 numbers, got none"),
        ([A, B | {"embedding": [1.0, None]}], r"row 1 \(user 'b'\): expected finite .* got nan at 1"),
        (
            [A, B | {"embedding": [1e39, 1.0]}],
            r"row 1 \(user 'b'\): expected finite float32 numbers, got inf at 0",
        ),
        ([A, B | {"user_id": None}], r"row 1 \(user None\): expected a user id, got none"),
        ([A, B | {"user_id": " "}], r"row 1 \(user .*\): expected a user id, got none"),
        ([A, B, A], r"expected one row for user 'a', got rows 0 and 2; keep one"),
        (
            [
                A | {"timestamp": NOON},
                B | {"timestamp": NOON},
                B | {"timestamp": "2024-05-01T13:00:00+01:00"},
            ],
            r"expected one row for user 'b' at 2024-05-01T12:00:00\+00:00, got rows 1 and 2",
        ),
        ([A | {"timestamp": NOON}, B], r"row 1 \(user 'b'\): expected a timestamp, as other rows have one"),
        ([A | {"version": "v1"}, B], r"row 1 \(user 'b'\): expected a version, as other rows have one"),
        (
            [A | {"timestamp": NOON}, B | {"timestamp": "2024-05-01 12:00:00"}],
            r"row 1 \(user 'b'\): timestamp '2024-05-01 12:00:00': expected UTC, got no time zone; write ISO",
        ),
        (
            [A | {"timestamp": "2024-13-01T12:00:00Z"}],
            r"row 0 \(user 'a'\): timestamp '2024-13.*expected a time like",
        ),
        ([A | {"embedding": []}], r"row 0 \(user 'a'\): expected an embedding of 1 numbers, got 0"),
    ],
)
@pytest.mark.parametrize("ending", FORMATS)
def test_bad_embeddings_are_refused(tmp_path: Path, ending: str, rows: list[dict[str, Any]], message: str) -> None:
    source = write(tmp_path / f"e.{ending}", rows)
    with pytest.raises(DataError, match=message) as error:
        open_embeddings(source)
    assert str(error.value).startswith(source)
    assert "\n" not in str(error.value)


def test_expected_dim_is_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 \(user 'a'\): expected an embedding of 3 numbers, got 2"):
        open_embeddings(write(tmp_path / "e.jsonl", [A]), expected_dim=3)


def test_a_text_that_is_no_vector_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text('user_id,embedding\na,"[1, 2]"\nb,"[1, NaN]"\n')
    with pytest.raises(DataError, match=r"row 1 \(user 'b'\): expected an embedding such as .*, got '\[1, NaN\]'"):
        open_embeddings(str(path))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            pl.Series([datetime(2024, 1, 1)]),
            r"row 0 \(user 'a'\): timestamp: expected UTC, got Datetime.*replace_time",
        ),
        (pl.Series([1_700_000_000]), r"timestamp: expected UTC, got Int64 without a time zone.*from_epoch"),
    ],
)
def test_times_without_zone_are_never_guessed(tmp_path: Path, times: pl.Series, message: str) -> None:
    pl.DataFrame(
        [pl.Series("user_id", ["a"]), pl.Series("embedding", [[1.0]]), times.alias("timestamp")]
    ).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match=message):
        open_embeddings(str(tmp_path / "e.parquet"))


def test_other_zones_and_precisions_become_utc_microseconds(tmp_path: Path) -> None:
    times = pl.Series(["2024-05-01T12:00:00Z"]).str.to_datetime(time_zone="UTC", time_unit="ns")
    frame = pl.DataFrame(
        {"user_id": ["a"], "embedding": [[1.0]], "timestamp": times.dt.convert_time_zone("Asia/Tokyo")}
    )
    frame.write_parquet(tmp_path / "e.parquet")
    keys = open_embeddings(str(tmp_path / "e.parquet")).keys
    assert keys["timestamp"].to_list() == [datetime(2024, 5, 1, 12, tzinfo=ZONE)]
    assert keys.schema["timestamp"] == UTC


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": np.ones((3, 2))}, r"expected vectors \[2, D\], a row per user, got \(3, 2\)"),
        ({"vectors": np.ones((2, 0))}, r"got \(2, 0\)"),
        (
            {"vectors": np.array([[1.0], [1e300]])},
            r"row 1 \(user 'b'\): expected finite float32 numbers, got inf",
        ),
        ({"timestamps": [datetime(2024, 1, 1)] * 2}, r"expected UTC"),
        (
            {"timestamps": [datetime(2024, 1, 1, tzinfo=ZONE)]},
            r"expected 2 timestamps, one per user, got 1",
        ),
        ({"user_ids": ["a", "a"]}, r"expected one row for user 'a', got rows 0 and 1"),
        ({"user_ids": ["a", ""]}, r"row 1 \(user ''\): expected a user id"),
    ],
)
def test_write_embeddings_refuses_what_reading_would(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_embeddings(tmp_path / "e.parquet", **{"user_ids": ["a", "b"], "vectors": np.ones((2, 2))} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_frame(tmp_path / "t.parquet", pl.DataFrame({"a": [1]}))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(RunError, match=r"t\.parquet: cannot be written: disk full"):
        write_frame(tmp_path / "t.parquet", pl.DataFrame({"a": [2]}))
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    assert pl.read_parquet(tmp_path / "t.parquet")["a"].to_list() == [1]


# ---------------------------------------------------------------- examples


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "hi", ü'}]


@pytest.mark.parametrize("ending", FORMATS)
def test_examples_are_the_same_from_every_format(tmp_path: Path, ending: str) -> None:
    rows = [
        {"user_id": "007", "messages": TURNS, "completion": "Hi", "timestamp": NOON, "label": True,
         "group": "g", "item_id": "i", "profile": "likes tea", "split": "train", "example_id": "x", "x": 1},
        {"user_id": "b", "messages": TURNS[1:], "completion": "Yo\nyo", "timestamp": None, "label": False,
         "group": None, "item_id": None, "profile": None, "split": "test", "example_id": "y", "x": 2},
    ]  # fmt: skip
    frame = read(write(tmp_path / f"t.{ending}", rows))
    assert frame.schema == {
        "row": pl.Int64,
        "example_id": pl.String,
        "user_id": pl.String,
        "timestamp": UTC,
        "group": pl.String,
        "split": pl.String,
        "prompt": pl.String,
        "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String})),
        "completion": pl.String,
        "profile": pl.String,
        "label": pl.Boolean,
        "item_id": pl.String,
    }
    noon = datetime(2024, 5, 1, 12, tzinfo=ZONE)
    known = [{k: v for k, v in row.items() if k != "x"} for row in rows]
    expected = [
        known[0] | {"row": 0, "prompt": None, "timestamp": noon},
        known[1] | {"row": 1, "prompt": None, "group": "b"},
    ]
    assert frame.to_dicts() == [{column: row[column] for column in frame.columns} for row in expected]


@pytest.mark.parametrize("ending", FORMATS)
def test_defaults(tmp_path: Path, ending: str) -> None:
    rows = [{"user_id": i, "prompt": "p", "completion": "c"} for i in (3, 4)]
    frame = read(write(tmp_path / f"t.{ending}", rows))
    assert frame.select("row", "example_id", "user_id", "group").rows() == [
        (0, "0", "3", "3"),
        (1, "1", "4", "4"),
    ]
    optional = frame.select("messages", "timestamp", "profile", "label", "item_id", "split")
    assert optional.null_count().row(0) == (2,) * 6


@pytest.mark.parametrize("ending", FORMATS)
def test_batches_keep_file_order_and_global_rows(tmp_path: Path, ending: str) -> None:
    for part in range(3):
        rows = [EXAMPLE | {"user_id": f"u{part}-{i}"} for i in range(50)]
        write(tmp_path / f"part{part}.{ending}", rows)
    for source in (str(tmp_path / f"part*.{ending}"), str(tmp_path)):
        batches = list(example_batches(source, rows=40))
        assert max(batch.height for batch in batches) <= 40
        frame = pl.concat(batches)
        assert frame["row"].to_list() == list(range(150))
        assert frame["user_id"].to_list() == [f"u{part}-{i}" for part in range(3) for i in range(50)]
        assert example_keys(source).equals(frame.select("row", "example_id", "user_id", "timestamp", "group", "split"))


def test_a_column_that_starts_late_is_seen(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [EXAMPLE] * 3000 + [EXAMPLE | {"label": True, "user_id": 5}]
    frame = read(write(tmp_path / "t.jsonl", rows))
    assert frame["label"].null_count() == 3000
    assert frame.row(-1, named=True)["label"] is True
    assert frame.row(-1, named=True)["user_id"] == "5"


@pytest.mark.parametrize(
    "values", [[True, False, None], [1, 0, None], [1.0, 0.0, None], ["true", "False", None], ["1", "0", None]]
)
def test_labels(tmp_path: Path, values: list[object]) -> None:
    for ending in FORMATS:
        rows = [EXAMPLE | {"label": value} for value in values]
        assert read(write(tmp_path / f"t.{ending}", rows))["label"].to_list() == [True, False, None]


def turns(*pairs: tuple[str | None, str | None]) -> dict[str, Any]:
    return {"prompt": None, "messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, r"row 1 \(user None\): expected a user id, got none"),
        ({"completion": None}, r"row 1 \(user 'u1'\): expected a completion with text, got None"),
        ({"completion": " \t"}, r"row 1 \(user 'u1'\): expected a completion with text"),
        ({"prompt": None}, r"row 1 \(user 'u1'\): expected exactly one of prompt and messages, got neither"),
        ({"messages": TURNS}, r"row 1 \(user 'u1'\): expected exactly one of prompt and messages, got both"),
        (
            turns(("user", "a"), ("assistant", "b")),
            r"row 1 .*: messages: expected a last turn that is not the assist",
        ),
        (
            turns(("bot", "a"), ("user", "b")),
            r"row 1 .*: messages: expected roles out of system, user, assistant, tool",
        ),
        (turns((None, "a"), ("user", "b")), r"row 1 .*: messages: expected roles out of"),
        (turns(("user", "a"), ("user", None)), r"row 1 .*: messages: expected a text as every content"),
        (turns(), r"row 1 .*: messages: expected at least one message, got none"),
        ({"timestamp": "2024-05-01T12:00:00"}, r"row 1 .* expected UTC, got no time zone"),
        ({"split": "dev"}, r"row 1 .*: split: expected one of train, validation, test, got 'dev'"),
        ({"label": "maybe"}, r"row 1 .*: label: expected true or false, got 'maybe'"),
        ({"example_id": "a"}, r"row 0: expected an example_id, got none"),
    ],
)
@pytest.mark.parametrize("ending", FORMATS)
def test_bad_examples_are_refused(tmp_path: Path, ending: str, change: dict[str, Any], message: str) -> None:
    source = write(tmp_path / f"t.{ending}", [EXAMPLE, EXAMPLE | change])
    with pytest.raises(DataError, match=message) as error:
        read(source)
    assert str(error.value).startswith(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"user_id": "a", "completion": "c", "text": "t"},
            r"'prompt' or 'messages', found: user_id, completion, text",
        ),
        ({"user_id": "a", "prompt": "p"}, r"expected a column 'completion', found: user_id, prompt"),
        ({"prompt": "p", "completion": "c"}, r"expected a column 'user_id', found: prompt, completion"),
    ],
)
@pytest.mark.parametrize("ending", FORMATS)
def test_missing_columns_list_what_there_is(tmp_path: Path, ending: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / f"t.{ending}", [row]))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_prompt_of_turns_is_told_apart_from_text(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError, match=r"column 'prompt': expected text, got List"):
        read(write(tmp_path / f"t.{ending}", [EXAMPLE | {"prompt": TURNS}]))


def test_duplicate_example_ids_name_both_rows(tmp_path: Path) -> None:
    rows = [EXAMPLE | {"example_id": name} for name in ("x", "y", "z", "y")]
    source = write(tmp_path / "t.jsonl", rows)
    for reader in (read, example_keys):
        with pytest.raises(DataError, match=r"expected one row for example 'y', got rows 1 and 3; keep one"):
            reader(source)


# ---------------------------------------------------------------- content key


def test_content_key_follows_what_the_table_says(tmp_path: Path) -> None:
    rows = [EXAMPLE | {"completion": f"c{i}", "extra": i} for i in range(9)]
    (tmp_path / "other").mkdir()
    key = content_key(write(tmp_path / "t.jsonl", rows))
    assert key == content_key(write(tmp_path / "other" / "name.jsonl", rows))
    assert key == content_key(write(tmp_path / "u.jsonl", [row | {"extra": 0} for row in rows]))
    for part in range(3):
        write(tmp_path / f"cut{part}.jsonl", rows[part * 3 : part * 3 + 3])
    assert key == content_key(str(tmp_path / "cut*.jsonl"))
    others = [
        content_key(str(tmp_path / "t.jsonl"), "salt"),
        content_key(write(tmp_path / "v.jsonl", rows[::-1])),
        content_key(write(tmp_path / "w.jsonl", [*rows[:-1], EXAMPLE])),
        content_key(write(tmp_path / "x.jsonl", rows[:-1])),
    ]
    assert len({key, *others}) == 5


def test_content_key_sees_vectors(tmp_path: Path) -> None:
    keys = set()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        write_embeddings(tmp_path / f"{name}.parquet", ["u"], np.array([[value, 0.0]]))
        keys.add(content_key(str(tmp_path / f"{name}.parquet")))
    assert len(keys) == 2


# ---------------------------------------------------------------- real data


@pytest.mark.real_data
def test_real_persona_texts_survive_the_round_trip(shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data/persona_chat/train_self_original_no_cands.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1)[1].split("\t")[:2] for line in lines if "\t" in line][:3000]
    rows = [{"user_id": str(i), "prompt": p, "completion": c} for i, (p, c) in enumerate(pairs)]
    frames = [read(write(tmp_path / f"t.{ending}", rows), rows=512) for ending in FORMATS]
    assert frames[0].height == len(pairs) > 2000
    for frame in frames:
        assert frame.equals(frames[0])
    assert frames[0].select("prompt", "completion").rows() == [tuple(pair) for pair in pairs]
