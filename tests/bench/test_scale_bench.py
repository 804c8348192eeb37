"""`e2p bench scale` in miniature: what it measures is the real thing, and its last line is its result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from e2p.bench.scale import bench, random_codes, random_versions
from e2p.cli import main
from e2p.data.asof import asof_rows
from e2p.errors import ConfigError


def test_it_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"items": 500, "versions": 900, "examples": 300, "users": 50, "rounds": 2}
    settings = [f"--{name}={value}" for name, value in (sizes | {"output": tmp_path / "scale.json"}).items()]
    assert main(["bench", "scale", *settings]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == json.loads((tmp_path / "scale.json").read_text())
    assert printed["items"] == 500
    assert printed["trie"]["bytes"] > 4 * 500
    for name in ("trie", "join"):
        seconds = printed[name]["seconds"]
        assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]


def test_codes_differ_and_versions_are_joined_by_time() -> None:
    codes = random_codes(5000, 3)
    assert len(np.unique(codes, axis=0)) == len(codes) == 5000
    table, asked = random_versions(400, 200, 20, 3)
    rows = asof_rows(asked, table).rows
    users, times = (table.keys[name].to_list() for name in ("user_id", "timestamp"))
    for (user, time), row in zip(asked.iter_rows(), rows, strict=True):
        mine = [(times[at], at) for at in range(400) if users[at] == user and times[at] <= time]
        assert row == (max(mine)[1] if mine else -1)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="items: expected a whole number from 1"):
        bench(items=0, output=str(tmp_path / "x.json"))
