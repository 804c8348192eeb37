"""`e2p bench store` in miniature: what it measures is the real thing, and its last line is its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from e2p.bench.store import bench, timed, write_table
from e2p.cli import main
from e2p.data.tables import open_embeddings
from e2p.errors import ConfigError


@pytest.mark.slow
def test_it_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"users": 3000, "dimension": 8, "reads": 40, "puts": 5, "output": tmp_path / "store.json"}
    assert main(["bench", "store", *(f"--{name}={value}" for name, value in sizes.items())]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == json.loads((tmp_path / "store.json").read_text())
    assert printed["users"] == 3000
    assert set(printed["stores"]) == {"lmdb"} | ({"redis"} if shutil.which("redis-server") else set())
    for found in printed["stores"].values():
        assert (found["import"]["stored"], found["import"]["unchanged"]) == (3000, 0)
        assert (found["again"]["stored"], found["again"]["unchanged"]) == (0, 3000)
        assert found["import"]["seconds"] > 0
        assert max(mib for mib in found["import"]["resident_mib"] if mib) > 10
        assert [found[name]["calls"] for name in ("get", "get_many", "put")] == [40, 4, 5]
        assert found["get_and_project"]["calls"] == 40
        for name in ("get", "get_many", "put", "get_and_project"):
            assert 0 < found[name]["p50_us"] <= found[name]["p99_us"] <= found[name]["most_us"]
        assert found["bytes"] > 3000 * 8 * 4
    assert printed["stores"]["lmdb"]["put_not_durable"]["calls"] == 5
    assert printed["stores"]["lmdb"]["import_in_order"]["stored"] == 3000


def test_its_table_holds_every_user_once(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", 70_000, 2, 3)
    table = open_embeddings(str(tmp_path / "t.parquet"), tmp_path)
    assert set(table.keys["user_id"]) == {f"u{user:07d}" for user in range(70_000)}
    assert table.versions == ["v1"]
    assert not table.keys["user_id"].is_sorted()
    write_table(tmp_path / "s.parquet", 70_000, 2, 3, shuffled=False)
    assert open_embeddings(str(tmp_path / "s.parquet"), tmp_path).keys["user_id"].is_sorted()


def test_calls_are_timed_one_by_one() -> None:
    seen: list[int] = []
    found = timed(seen.append, [1, 2, 3])
    assert (seen, found["calls"]) == ([1, 2, 3], 3)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="users: expected a whole number >= 1, got 0"):
        bench(users=0, output=str(tmp_path / "x.json"))
