"""The bench of vLLM runs, against a server without a model. No time is asserted."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from e2p.bench.processes import cpu_seconds, held, vllm_serve
from e2p.bench.shapes import SHAPES, write_checkpoint
from e2p.bench.vllm import SIDES, bench
from e2p.config import BackboneConfig
from e2p.errors import ConfigError, E2PError
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
    cpu = result["sides"]["gateway"]["cpu_seconds"]
    assert {len(cpu[who]) for who in ("client", "gateway")} == {2}
    assert cpu["server"] == [None, None], "a server elsewhere is not looked at"
    assert set(result["sides"]["gateway"]["cpu_seconds_per_1000_tokens"]) <= {"client", "gateway"}
    asked = [body for body in server.asked if body["max_tokens"] == 5]
    by_salt = [[body["prompt_embeds"] for body in asked if body.get("cache_salt") == salt] for salt in ("direct", None)]
    assert sorted(by_salt[0]) == sorted(by_salt[1]), "both ways send the same embeddings"
    assert len(set(by_salt[0])) == 9


def test_sizes_must_be_numbers_of_things(backbone: str) -> None:
    with pytest.raises(ConfigError, match="users: expected a whole number >= 1, got 0"):
        bench(backbone, "http://127.0.0.1:9", users=0)


@pytest.mark.parametrize("given", [{}, {"upstream": "http://a", "python": "python"}, {"upstream": "a", "shape": "b"}])
def test_one_server_must_be_named(backbone: str, given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="upstream: expected it or --python"):
        bench(backbone, **given)


def test_a_checkpoint_of_a_shape_has_the_backbones_tokenizer_and_never_ends(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "small", (128, 2, 256, 2, 1))
    told = write_checkpoint(backbone, "small", tmp_path / "made", 0)
    made, table = (TokenTable.load(BackboneConfig(str(where))) for where in (tmp_path / "made", backbone))
    assert made.rows.shape == (told["vocabulary"], 128)
    assert made.rows.dtype == torch.bfloat16
    assert made.tokenizer("home").input_ids == table.tokenizer("home").input_ids
    assert made.ends() == table.ends()
    assert not made.rows[made.ends()].any()
    with pytest.raises(ConfigError, match="shape: expected one of llama-260m"):
        write_checkpoint(backbone, "other", tmp_path / "other", 0)


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def test_a_server_is_started_looked_at_and_ended(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/server.py "$@"\n')
    python.chmod(0o755)
    with vllm_serve(str(python), tmp_path, "float32", tmp_path / "log", seconds=60) as (address, pid):
        assert httpx.get(f"{address}/health").status_code == 200
        took, holds = cpu_seconds(pid), held(pid)
        assert took is not None
        assert took > 0
        assert holds is not None
        assert 1 < holds.anonymous_mib < holds.resident_mib
        assert holds.descriptors >= 3
        assert holds.threads == 1
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health")
    assert held(pid) is None
    assert cpu_seconds(pid) is None


def test_a_server_that_does_not_come_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(E2PError, match="expected a vLLM server from false, got none"),
        vllm_serve("false", tmp_path, "float32", tmp_path / "log"),
    ):
        raise AssertionError("it is not there")
    with (
        pytest.raises(E2PError, match="expected a Python interpreter at nowhere/python, got none"),
        vllm_serve("nowhere/python", tmp_path, "float32", tmp_path / "log"),
    ):
        raise AssertionError("it is not there")
