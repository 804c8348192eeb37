"""`e2p users`: tables in and out of every store, and what a person sees on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.cli import _parse, main
from e2p.data.tables import open_embeddings
from e2p.errors import DataError
from e2p.users.commands import delete_users, get_users, import_table
from e2p.users.store import PutCounts, StoredVector, VectorStore, open_store

DAY = datetime(2024, 5, 1, tzinfo=UTC)
Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit code, lines of stdout, and stderr."""

    def call(*words: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["users", *words])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def rows(count: int = 10, dim: int = 3, day: int = 0) -> pl.DataFrame:
    numbers = np.random.default_rng(day).standard_normal((count, dim), dtype=np.float32)
    users = [f"u{number}" for number in range(count)]
    return pl.DataFrame(
        {"user_id": users, "embedding": pl.Series(numbers, dtype=pl.Array(pl.Float32, dim))}
    ).with_columns(timestamp=pl.lit(DAY + timedelta(days=day)), version=pl.lit("v1"))


def written(tmp_path: Path, frame: pl.DataFrame, name: str = "table.parquet") -> str:
    path = tmp_path / name
    if path.suffix == ".csv":
        texts = pl.Series([json.dumps(row) for row in frame["embedding"].to_list()])
        frame.with_columns(embedding=texts).write_csv(path)
    elif path.suffix == ".jsonl":
        frame.with_columns(pl.col("timestamp").dt.to_string("iso:strict")).write_ndjson(path)
    else:
        frame.write_parquet(path)
    return str(path)


def found(store: VectorStore) -> dict[str, Any]:
    return {v.user_id: (v.embedding.tobytes(), v.timestamp, v.version) for v in store.iterate()}


def expected(frame: pl.DataFrame) -> dict[str, Any]:
    vectors = frame["embedding"].to_numpy()
    keys = frame.select("user_id", "timestamp", "version").rows()
    return {user: (row.tobytes(), time, version) for (user, time, version), row in zip(keys, vectors, strict=True)}


# ---------------------------------------------------------------- in and out


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv"])
def test_every_kind_of_table_goes_in(kind: str, name: str, address: str, tmp_path: Path, run: Run) -> None:
    frame = rows(20)
    code, out, err = run("import", written(tmp_path, frame, name), address, "--batch_size", "7")
    assert (code, err) == (0, "")
    assert out == [f"{address.split('?')[0]}: 20 rows read, 20 stored; 20 users now"]
    with open_store(address) as store:
        assert found(store) == expected(frame)


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_what_is_exported_is_imported_bit_for_bit(kind: str, address: str, tmp_path: Path, run: Run) -> None:
    odd = np.array([[-0.0, 1e-45, 3.4e38], [1 / 3, -1e-38, 7]], dtype=np.float32)
    times = [datetime(1, 1, 1, tzinfo=UTC), datetime(2024, 5, 1, 12, 0, 0, 123457, tzinfo=UTC)]
    names = ["ü" * 300, " 007 "]
    with open_store(address) as store:
        for user, numbers, time, version in zip(names, odd, times, ["", "v2"], strict=True):
            store.put(StoredVector(user, numbers, time, version))
        for number in range(9000):  # more than is written at once
            if number % 1000 == 0:
                store.put(StoredVector(f"u{number}", odd[0], times[1], ""))
        before = found(store)
    table, second = str(tmp_path / "out.parquet"), str(tmp_path / "second")
    code, out, err = run("export", address, table)
    assert (code, out, err) == (0, [f"{table}: 11 vectors of 3 numbers"], "")
    assert run("import", table, second)[0] == 0
    with open_store(second) as store:
        assert found(store) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_exported_table_is_an_embedding_table(folder: str, tmp_path: Path, run: Run) -> None:
    frame = rows(9000).with_columns(version=pl.lit(None, pl.String))
    run("import", written(tmp_path, frame), folder)
    assert run("export", folder, str(tmp_path / "new/out.parquet"))[0] == 0
    back = open_embeddings(str(tmp_path / "new/out.parquet"), tmp_path)
    assert back.versions == []
    assert dict(zip(back.keys["user_id"], map(bytes, back.vectors), strict=True)) == dict(
        zip(frame["user_id"], map(bytes, frame["embedding"].to_numpy()), strict=True)
    )


def test_importing_again_changes_nothing(folder: str, tmp_path: Path, run: Run) -> None:
    old, new = written(tmp_path, rows(10), "old.parquet"), written(tmp_path, rows(6, day=1), "new.parquet")
    assert run("import", old, folder)[1] == [f"{folder}: 10 rows read, 10 stored; 10 users now"]
    assert run("import", old, folder)[1] == [f"{folder}: 10 rows read, 0 stored, 10 unchanged; 10 users now"]
    assert run("import", new, folder)[1] == [f"{folder}: 6 rows read, 6 stored; 10 users now"]
    run("delete", folder, "u7", "u8")
    with open_store(folder) as store:
        before = found(store)
    line = f"{folder}: 10 rows read, 0 stored, 2 unchanged, 6 older than what is there, 2 not newer than their user's "
    assert run("import", old, folder)[1] == [line + "deletion; 8 users now"]
    with open_store(folder) as store:
        assert found(store) == before


def test_of_several_rows_the_newest_stays_whatever_the_batches(tmp_path: Path) -> None:
    frame = pl.concat([rows(9, day=day) for day in (3, 1, 4, 1, 2)])
    table = written(tmp_path, frame.sample(fraction=1, shuffle=True, seed=1))
    for size in (1, 4, 1000):
        folder = str(tmp_path / f"s{size}")
        counts = import_table(table, folder, batch_size=size)
        assert sum((counts.stored, counts.older, counts.unchanged)) == 45
        with open_store(folder) as store:
            assert found(store) == expected(rows(9, day=4))


def test_folders_of_files_are_one_table(folder: str, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for part in range(3):
        frame = rows(5).with_columns(user_id=pl.lit(f"part{part}-") + pl.col("user_id"))
        frame.write_parquet(tmp_path / f"parts/{part}.parquet")
    assert import_table(str(tmp_path / "parts"), folder) == PutCounts(stored=15)


def test_the_progress_bar_knows_the_rows_of_parquet(tmp_path: Path) -> None:
    from e2p.data.sources import open_table
    from e2p.users.commands import _rows

    assert _rows(open_table(written(tmp_path, rows(12)))) == 12
    assert _rows(open_table(written(tmp_path, rows(12), "t.csv"))) is None


# ---------------------------------------------------------------- how old a vector is


def test_a_table_without_times_needs_one_said(folder: str, tmp_path: Path, run: Run) -> None:
    table = written(tmp_path, rows(4).drop("timestamp", "version"))
    code, out, err = run("import", table, folder)
    assert (code, out) == (2, [])
    assert "expected a column 'timestamp', found none; say how old the vectors are by --timestamp 2024-05-01" in err
    assert not Path(folder).exists()
    assert run("import", table, folder, "--timestamp", "2024-05-01T02:00:00+02:00", "--version", "v7")[0] == 0
    with open_store(folder) as store:
        assert {(v.timestamp, v.version) for v in store.iterate()} == {(DAY, "v7")}
    before = datetime.now(UTC)
    assert run("import", table, folder, "--timestamp", "now")[1] == [f"{folder}: 4 rows read, 4 stored; 4 users now"]
    with open_store(folder) as store:
        times = {v.timestamp for v in store.iterate()}
    assert len(times) == 1
    assert before <= times.pop() <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timestamp", "now"], "has a column timestamp, got 'now'; leave it out"),
        (["--version", "v2"], "has a column version, got 'v2'; leave it out"),
        (["--batch_size", "0"], "batch_size: expected a whole number >= 1, got 0"),
    ],
)
def test_what_the_table_says_is_not_said_again(
    words: list[str], message: str, folder: str, tmp_path: Path, run: Run
) -> None:
    code, _, err = run("import", written(tmp_path, rows()), folder, *words)
    assert code == 2
    assert message in err
    assert not Path(folder).exists()


@pytest.mark.parametrize("time", ["2024-05-01T12:00:00", "2024-05-01", "yesterday", "1714521600"])
def test_a_time_without_zone_is_refused(time: str, folder: str, tmp_path: Path, run: Run) -> None:
    code, _, err = run("import", written(tmp_path, rows().drop("timestamp")), folder, "--timestamp", time)
    assert code == 2
    assert "timestamp: expected" in err


# ---------------------------------------------------------------- tables that cannot be used


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            lambda f: f.with_columns(embedding=pl.when(pl.col("user_id") == "u7").then(None).otherwise("embedding")),
            ["row 7 (user 'u7')", "expected an embedding of 3 numbers, got none"],
        ),
        (
            lambda f: f.with_columns(timestamp=pl.when(pl.col("user_id") != "u8").then("timestamp")),
            ["row 8 (user 'u8'): expected a timestamp, got none; fill it or drop the column"],
        ),
        (
            lambda f: f.with_columns(version=pl.when(pl.col("user_id") != "u9").then("version")),
            ["row 9 (user 'u9'): expected a version in all rows or in none"],
        ),
        (
            lambda f: f.with_columns(version=pl.when(pl.col("user_id") == "u9").then("version")),
            ["row 9 (user 'u9'): expected a version in all rows or in none"],
        ),
        (
            lambda f: f.with_columns(user_id=pl.when(pl.col("user_id") != "u6").then("user_id")),
            ["row 6 (user None): expected a user id, got none"],
        ),
        (
            lambda f: f.with_columns(
                embedding=pl.Series([[1.0, 2.0, 3.0]] * 6 + [[1.0, float("inf"), 3.0]] + [[1.0, 2.0, 3.0]] * 3)
            ),
            ["row 6 (user 'u6'): expected finite float32 numbers, got inf at 1"],
        ),
    ],
)
def test_a_bad_row_is_named_and_what_was_before_it_is_kept(
    spoil: Callable[[pl.DataFrame], pl.DataFrame], messages: list[str], folder: str, tmp_path: Path, run: Run
) -> None:
    bad, good = written(tmp_path, spoil(rows()), "bad.parquet"), written(tmp_path, rows(), "good.parquet")
    code, out, err = run("import", bad, folder, "--batch_size", "3")
    assert (code, out) == (2, [])
    assert len(err.splitlines()) == 1
    done = 9 if "row 9" in messages[0] else 6
    for message in (bad, *messages, f"; the {done} rows before are in the store, and the import can be repeated"):
        assert message in err
    with open_store(folder) as store:
        assert store.count() == done
    assert run("import", good, folder)[0] == 0
    with open_store(folder) as store:
        assert store.count() == 10


def test_a_table_of_another_dimension_changes_nothing(folder: str, tmp_path: Path, run: Run) -> None:
    run("import", written(tmp_path, rows()), folder)
    code, _, err = run("import", written(tmp_path, rows(5, dim=4, day=1), "four.parquet"), folder)
    assert code == 2
    assert "four.parquet: row 0 (user 'u0'): expected an embedding of 3 numbers, got 4" in err
    assert "the store holds vectors of 3; none was put" in err
    with open_store(folder) as store:
        assert found(store) == expected(rows())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "nowhere.parquet", "s"], "nowhere.parquet: no file matches"),
        (["get", "s", "u1"], "s: no store of user vectors is there; e2p users import TABLE s makes one"),
        (["stats", "s"], "s: no store of user vectors is there"),
        (["export", "s", "out.parquet"], "s: no store of user vectors is there"),
        (["delete", "s", "u1"], "s: no store of user vectors is there"),
        (["export", "s", "out.csv"], "table: expected a name that ends in .parquet, got 'out.csv'"),
        (["get", "s"], "required: users"),
        (["get"], "required: store"),
        (["stats", "redis://127.0.0.1:1/0"], "redis://127.0.0.1:1/0: Redis cannot be reached"),
        (["stats", "http://x"], "expected a folder, redis://host:6379/0"),
        (["stats", "s", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out, len(err.splitlines())) == (2, [], 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_an_empty_table_and_an_empty_store_are_refused(folder: str, tmp_path: Path, run: Run) -> None:
    empty = written(tmp_path, rows().clear())
    assert "the table is empty" in run("import", empty, folder)[2]
    open_store(folder).close()
    code, _, err = run("export", folder, str(tmp_path / "out.parquet"))
    assert code == 2
    assert "expected vectors to write, found none; import some first" in err
    assert not (tmp_path / "out.parquet").exists()


def test_a_table_is_not_overwritten_unless_asked(folder: str, tmp_path: Path, run: Run) -> None:
    run("import", written(tmp_path, rows()), folder)
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    assert "is there already; choose another name or pass --overwrite" in run("export", folder, str(out))[2]
    assert out.read_text() == "mine"
    assert run("export", folder, str(out), "--overwrite")[0] == 0
    assert pl.read_parquet(out).height == 10


# ---------------------------------------------------------------- asking and deleting


def test_get_shows_time_version_age_and_numbers(folder: str, run: Run) -> None:
    now = datetime.now(UTC)
    with open_store(folder) as store:
        store.put(StoredVector("u1", np.array([3, 4, 0, 0, 0, 0, 0]), now - timedelta(days=3, hours=1), "v1"))
        store.put(StoredVector("-5", np.zeros(7), now + timedelta(hours=2, minutes=1)))
        store.put(StoredVector("007", np.ones(7), now - timedelta(minutes=1, seconds=5), "é"))
    code, out, _ = run("get", folder, "u1", "007", "--", "-5")
    time = (now - timedelta(days=3, hours=1)).isoformat().replace("+00:00", "Z")
    assert code == 0
    assert out[0] == f"u1: {time} (3 days old), version v1, 7 numbers, norm 5: [3, 4, 0, 0, 0, 0, ...]"
    assert "007: " in out[1]
    assert "(1 minute old), version é" in out[1]
    assert out[2].startswith("-5: ")
    assert "(2 hours ahead of now), version (not named)" in out[2]
    code, out, _ = run("get", folder, "--json", "u1")
    assert code == 0
    assert json.loads(out[0]) == {
        "user_id": "u1",
        "timestamp": time,
        "version": "v1",
        "embedding": [3, 4, 0, 0, 0, 0, 0],
    }


def test_who_has_no_vector_is_named_and_the_others_are_shown(folder: str, tmp_path: Path, run: Run) -> None:
    run("import", written(tmp_path, rows()), folder)
    code, out, err = run("get", folder, "u1", "nobody", "u2")
    assert code == 2
    assert [line.split(":")[0] for line in out] == ["u1", "u2"]
    assert "no vector for 'nobody'; import or put one" in err


def test_delete_says_whom_it_found(folder: str, tmp_path: Path, run: Run) -> None:
    table = written(tmp_path, rows())
    run("import", table, folder)
    code, out, _ = run("delete", folder, "u1", "nobody", "u2")
    assert (code, out) == (0, [f"{folder}: 2 of 3 had a vector and were deleted", "no vector for 'nobody'"])
    assert run("stats", folder)[1][2:] == ["deleted and not put again since: 3 users"]
    run("delete", folder, "u3", "u1", "--forget")
    assert run("import", table, folder)[1] == [
        f"{folder}: 10 rows read, 2 stored, 7 unchanged, 1 not newer than their user's deletion; 9 users now"
    ]


def test_stats_count_versions(folder: str, tmp_path: Path, run: Run) -> None:
    run("import", written(tmp_path, rows()), folder)
    run("import", written(tmp_path, rows(4, day=1).with_columns(version=pl.lit("v2"))), folder)
    code, out, _ = run("stats", folder)
    assert code == 0
    assert out[0].startswith(f"{folder}: 10 users, vectors of 3 numbers, ")
    assert out[1:] == ["version v1: 6 users", "version v2: 4 users"]
    seen = json.loads(run("stats", folder, "--json")[1][0])
    assert (seen["users"], seen["dim"], seen["versions"], seen["deletions"]) == (10, 3, {"v1": 6, "v2": 4}, 0)


@pytest.mark.parametrize(
    ("words", "users", "flag"),
    [
        (["s", "u1"], ["u1"], False),
        (["s", "007", "null", "true"], ["007", "null", "true"], False),
        (["--json", "s", "u1", "a,b"], ["u1", "a,b"], True),
        (["s", "u1", "--json", "false", "u2"], ["u1", "u2"], False),
        (["s", "u1", "--", "-5", "--json"], ["u1", "-5", "--json"], False),
        (["s", "--", "--"], ["--"], False),
    ],
)
def test_users_are_words_after_the_store(words: list[str], users: list[str], flag: bool) -> None:
    assert _parse("e2p users get", get_users, words) == {"store": "s", "users": users, "json": flag}


def test_a_password_is_not_printed(run: Run) -> None:
    from e2p.users.commands import store_name

    assert store_name("redis://me:secret@host:1/0?prefix=x") == "redis://host:1/0"
    assert store_name("a/b@c?d") == "a/b@c?d"


def test_the_functions_may_be_called_as_well(folder: str, tmp_path: Path) -> None:
    import_table(written(tmp_path, rows()), folder)
    delete_users(folder, ["u1"])
    with pytest.raises(DataError, match="no vector for 'u1'"):
        get_users(folder, ["u1"])
