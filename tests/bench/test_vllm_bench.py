"""The bench of vLLM runs, against a server without a model. No time is asserted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2p.bench.vllm import SIDES, bench
from e2p.config import BackboneConfig
from e2p.errors import ConfigError
from e2p.model.token_table import TokenTable
from fake_vllm import FakeVLLM
from tiny_run import write_backbone

SIZES = {"users": 3, "prompt_tokens": 20, "same_prompt_tokens": 30, "new_tokens": 5, "same_prompt_new_tokens": 2}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_backbone(tmp_path_factory.mktemp("vllm") / "backbone")


@pytest.fixture
def server(backbone: str) -> Iterator[FakeVLLM]:
    """In a thread of its own: the bench has its own event loop."""
    fake = FakeVLLM(TokenTable.load(BackboneConfig(backbone)))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
    yield fake
    asyncio.run_coroutine_threadsafe(fake.die(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.slow
def test_the_last_line_is_the_file(
    backbone: str, server: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    result = bench(backbone, server.address, **SIZES, rounds=2, output=str(output))
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert tuple(result["sides"]) == SIDES
    assert result["sides"]["direct"]["tokens"] == result["sides"]["gateway"]["tokens"]
    assert {len(side["seconds"]) for side in result["sides"].values()} == {2}
    asked = [body for body in server.asked if body["max_tokens"] == 5]
    by_salt = [[body["prompt_embeds"] for body in asked if body.get("cache_salt") == salt] for salt in ("direct", None)]
    assert sorted(by_salt[0]) == sorted(by_salt[1]), "both ways send the same embeddings"
    assert len(set(by_salt[0])) == 9


def test_sizes_must_be_numbers_of_things(backbone: str) -> None:
    with pytest.raises(ConfigError, match="users: expected a whole number >= 1, got 0"):
        bench(backbone, "http://127.0.0.1:9", users=0)
