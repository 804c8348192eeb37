"""The bench of serving runs, and its sides ask what they say. No time is asserted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from e2p.bench.quiet import quiet
from e2p.bench.serve import PAIRS, SIDES, _Setting, _Sides, bench
from e2p.errors import BackboneError, ConfigError
from e2p.serving.engine import Event, Request, Started
from tiny_run import write_backbone

SIZES = {"users": 3, "prompt_tokens": 20, "profile_tokens": 7, "same_prompt_tokens": 40, "new_tokens": 5}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_backbone(tmp_path_factory.mktemp("serve") / "backbone")


@pytest.mark.slow
def test_the_last_line_is_the_file(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    result = bench(backbone, **SIZES, rounds=2, output=str(output))
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert str(tmp_path) not in output.read_text()
    assert result["bench"] == "serve"
    assert {name: result[name] for name in SIZES} == SIZES
    assert {"commit", "command", "hardware"} <= set(result["provenance"])
    assert tuple(result["sides"]) == SIDES
    for side in result["sides"].values():
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == len(side["first_token_seconds"]) == 2
        assert all(first < whole for first, whole in zip(side["first_token_seconds"], side["seconds"], strict=True))
    assert set(result["ratios"]) == {f"{side} to {base}" for side, base in PAIRS}
    assert all(set(ratio) == {"speed", "speed_cpu_time", "first_token"} for ratio in result["ratios"].values())


def test_sides_ask_what_they_say(backbone: str, tmp_path: Path) -> None:
    seen: list[tuple[Request, Started]] = []
    most = 0

    async def play() -> dict[str, tuple[list[tuple[Request, Started]], int]]:
        nonlocal most
        many = _Sides(_Setting(backbone, **SIZES, precision="float32", attn="sdpa", seed=1), tmp_path)
        plain, now = many.engine.generate, 0

        async def watched(request: Request) -> AsyncGenerator[Event, None]:
            nonlocal most, now
            now += 1
            most = max(most, now)
            async for event in plain(request):
                if isinstance(event, Started):
                    seen.append((request, event))
                yield event
            now -= 1

        many.engine.generate = watched  # type: ignore[method-assign]
        await many.engine.start()
        found = {}
        for side in SIDES:
            seen.clear()
            most = 0
            assert len(await many.run(side)) == 3
            found[side] = (list(seen), most)
        await many.engine.stop(0)
        return found

    with quiet():
        found = asyncio.run(play())
    about: dict[str, Any] = {
        side: {(r.adapter, r.personal.mode, s.prompt_tokens, s.prefix_tokens) for r, s in asked}
        for side, (asked, _) in found.items()
    }
    assert about == {
        "alone": {("answer", "user", 20, 1)},
        "together": {("answer", "user", 20, 1)},
        "no_prefix": {("answer", "none", 20, 0)},
        "profile": {("answer", "none", 27, 0)},
        "same_prompt": {("answer", "user", 40, 1)},
        "same_prompt_start": {("start", "user", 40, 1)},
    }
    assert {side: at_once for side, (_, at_once) in found.items()} == {
        side: 1 if side == "alone" else 3 for side in SIDES
    }
    prompts = {side: [str(r.prompt) for r, _ in asked] for side, (asked, _) in found.items()}
    assert {side: len(set(prompts[side])) for side in SIDES} == {s: 1 if s.startswith("same") else 3 for s in SIDES}
    assert sorted(prompts["alone"]) == sorted(prompts["together"]) == sorted(prompts["no_prefix"])
    vectors = {str(r.personal.vector) for r, _ in found["same_prompt"][0]}
    assert len(vectors) == 3


def test_numbers_out_of_range_are_refused(backbone: str) -> None:
    for name in (*SIZES, "rounds"):
        with pytest.raises(ConfigError, match=f"{name}: expected a whole number >= 1, got 0"):
            bench(backbone, **{**SIZES, name: 0})  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="window of at least 306 tokens, got 192; ask for shorter prompts"):
        bench(backbone, **{**SIZES, "same_prompt_tokens": 300})
