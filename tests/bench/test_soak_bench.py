"""`e2p bench soak` in seconds: every kind of request is made, what is told adds up, and a failing server is told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from e2p.bench.processes import Held
from e2p.bench.soak import _Done, _Load, _part, _summary, _World
from e2p.cli import main
from e2p.errors import ConfigError
from tiny_run import write_backbone

LOAD = _Load(10, 4, 1, 8, 10.0, 5, 1.0, 0)


@pytest.mark.slow
def test_it_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    sizes = {"minutes": 0.15, "parts": 3, "users": 200, "dimension": 4, "clients": 3, "prompt_tokens": 20}
    sizes |= {"new_tokens": 8, "writes_per_second": 20, "upload_rows": 50, "upload_seconds": 2}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    assert main(["bench", "soak", backbone, *words, f"--output={tmp_path / 'soak.json'}"]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == json.loads((tmp_path / "soak.json").read_text())
    summary, parts = printed["summary"], printed["by_part"]
    assert summary["errors"] == {}
    assert set(summary["requests"]) == {"stream", "whole", "left", "put", "get", "delete", "upload"}
    assert summary["tokens_per_second"] > 0
    assert len(parts) == 3
    for kind, count in summary["requests"].items():
        assert sum(part["requests"].get(kind, 0) for part in parts) == count
    for part in parts:
        assert part["anonymous_mib"] < part["resident_mib"]
        assert part["descriptors"] > 5
        assert part["threads"] >= 1
        assert 0 < part["answer_seconds"]["p50"] <= part["answer_seconds"]["p99"]
    assert summary["p99_ratio"]["answer_seconds"] > 0
    assert isinstance(summary["memory_mib_per_minute"], float)


def test_what_is_told_adds_up() -> None:
    world = _World("", [], LOAD, 120.0, time.perf_counter())
    world.seen = [(second, Held(200 + second, 100 + 2 * second / 60, 9, 3)) for second in range(120)]
    world.done = [_Done(second + 0.5, "stream", 200, 0.1, 1.0 if second < 80 else 3.0, 10) for second in range(120)]
    world.done += [_Done(10.0, "whole", 503), _Done(119.0, "put", 0), _Done(121.0, "left", 200, 0.2)]
    found = _summary(world)
    assert found["memory_mib_per_minute"] == pytest.approx(2.0)
    assert found["errors"] == {"503": 1, "none": 1}
    assert found["p99_ratio"] == {"first_token_seconds": 1.0, "answer_seconds": 3.0}
    assert found["tokens_per_second"] == 10.0
    first, last = _part(world, 0, 4), _part(world, 3, 4)
    assert first["errors"] == {"503": 1}
    assert first["requests"] == {"stream": 30, "whole": 1}
    assert last["requests"] == {"stream": 30, "put": 1, "left": 1}, "what ran at the end counts too"
    assert (first["resident_mib"], first["descriptors"], first["threads"]) == (229, 9, 3)


@pytest.mark.parametrize(("name", "value"), [("clients", 0), ("minutes", 0.0), ("upload_seconds", -1.0)])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    from e2p.bench.soak import bench

    with pytest.raises(ConfigError, match=f"{name}: expected a (whole )?number"):
        bench("nowhere", **{name: value})
