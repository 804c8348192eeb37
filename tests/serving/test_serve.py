"""`e2p serve` as a process: it says where it is, answers, finishes what runs, and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from e2p.config import BackboneConfig
from e2p.config_serving import ServingConfig
from e2p.errors import AdapterError, ConfigError
from e2p.serving.fake_engine import FakeEngine
from e2p.serving.serve import backbone_of, listen, serve_engine
from e2p.users.store import StoredVector, open_store
from served import HELLO, error_of
from tiny_run import tiny_run, write_config

FAKE = """
import sys
from e2p.config_serving import ServingConfig
from e2p.serving.fake_engine import FakeEngine
from e2p.serving.serve import serve_engine
grace = float(sys.argv[2]) if len(sys.argv) > 2 else 5
serve_engine(lambda: FakeEngine(delay=0.05), ServingConfig(port=0, store=sys.argv[1], grace_seconds=grace))
"""


@contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and the line that it says."""
    environment = {**os.environ, "E2P_KEYS": ""}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        guard = threading.Timer(240, server.kill)
        guard.start()
        try:
            line = server.stdout.readline()
            assert line, server.stderr.read()[-2000:]
            yield server, line
        finally:
            server.kill()
            guard.cancel()


def test_a_server_says_where_it_is_finishes_what_runs_and_ends(tmp_path: Path) -> None:
    with process("-c", FAKE, str(tmp_path / "store")) as (server, line):
        assert "/v1 serves taste, backbone; " in line
        assert f"{tmp_path / 'store'}: 0 users; for everyone on this machine" in line
        base = line.split("/v1 ")[0]
        with httpx.Client(base_url=base, timeout=20) as http:
            vector = {"embedding": [1, 2, 3], "version": "v1"}
            assert http.put("/v1/users/u1/embedding", json=vector).status_code == 200
            body = {"model": "taste", "messages": HELLO, "user": "u1", "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                parts = response.iter_text()
                first = next(parts)
                server.send_signal(signal.SIGTERM)
                text = first + "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert server.wait(20) == 0
        log = server.stderr.read()
        assert [json.loads(each)["status"] for each in log.splitlines()] == [200, 200]
    with open_store(str(tmp_path / "store"), create=False) as store:
        assert store.get("u1").embedding.tolist() == [1, 2, 3]


@pytest.mark.parametrize("stream", [True, False])
def test_what_takes_too_long_to_finish_is_told_so(stream: bool, tmp_path: Path) -> None:
    with process("-c", FAKE, str(tmp_path / "store"), "1") as (server, line):
        base = line.split("/v1 ")[0]
        words = [{"role": "user", "content": "word " * 400}]  # 20 seconds
        asked: dict[str, Any] = {"model": "taste", "messages": words, "max_tokens": 400, "stream": stream}
        timer = threading.Timer(1, server.send_signal, [signal.SIGTERM])
        timer.start()
        with httpx.Client(base_url=base, timeout=20) as http:
            if stream:
                with pytest.raises(
                    httpx.RemoteProtocolError
                ):  # an answer that is cut off is never taken for a whole one
                    http.post("/v1/chat/completions", json=asked)
            else:
                assert error_of(http.post("/v1/chat/completions", json=asked)) == (503, "stopping", None)
        assert server.wait(20) == 0
        log = server.stderr.read()
        assert "Traceback" not in log
        (told,) = [json.loads(each) for each in log.splitlines() if each.startswith("{")]
        assert (told["status"], told["error"]) == (200 if stream else 503, "stopping")


def test_headers_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the port may send them; httptools, which uvicorn takes where it is installed, keeps them all."""
    seen: list[str] = []

    async def look(server: uvicorn.Server, sockets: Any) -> None:
        seen.append(str(server.config.http))

    monkeypatch.delenv("E2P_KEYS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(uvicorn.Server, "serve", look)
        serve_engine(FakeEngine, ServingConfig(port=0))
    assert seen == ["h11"]
    with process("-c", FAKE, str(tmp_path / "store")) as (_, line):
        host, port = line.split("/v1 ")[0].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 100_000)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_ctrl_c_ends_it_too(tmp_path: Path) -> None:
    with process("-c", FAKE, str(tmp_path / "store")) as (server, _):
        server.send_signal(signal.SIGINT)
        assert server.wait(20) != 0
        assert "Application shutdown" not in server.stderr.read()


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port: 127.0.0.1:{port} cannot be had: .*; choose another"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_a_store_of_another_dimension_is_told(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "store")) as store:
        store.put(StoredVector("u1", [1, 2], datetime.now(UTC)))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", FAKE, str(tmp_path / "store")], capture_output=True, text=True, timeout=60
    )
    assert "expected vectors of 3 numbers, which the adapters take, got 2 in" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny run, trained for a moment."""
    from e2p.cli import main

    folder = tmp_path_factory.mktemp("run")
    config = tiny_run(folder, max_steps=1)
    assert main(["train", write_config(config, folder / "run.yaml")]) == 0
    return config


@pytest.mark.slow
def test_the_backbone_is_the_runs_but_for_what_is_asked(run: Any, tmp_path: Path) -> None:
    asked = BackboneConfig()
    assert backbone_of(run.output, asked) == run.backbone
    assert backbone_of(f"{run.output}/adapter", asked) == run.backbone
    other = backbone_of(run.output, BackboneConfig(model="elsewhere", dtype="bfloat16"))
    assert (other.model, other.dtype, other.device) == ("elsewhere", "bfloat16", run.backbone.device)
    with pytest.raises(AdapterError):
        backbone_of(str(tmp_path), asked)


@pytest.mark.slow
def test_a_run_is_served_with_its_users(run: Any, tmp_path: Path) -> None:
    from e2p.cli import main

    store = str(tmp_path / "store")
    assert main(["users", "import", run.data.embeddings, store, "--timestamp", "now"]) == 0
    words = ["-m", "e2p.cli", "serve", run.output, "--port", "0", "--store", store]
    with process(*words) as (server, line):
        base, name = line.split(" ")[0], Path(run.output).name
        assert f"serves backbone, {name}" in line or f"serves {name}" in line
        with openai.OpenAI(base_url=base, api_key="none-needed", max_retries=0) as client:
            assert name in [m.id for m in client.models.list()]
            asked: dict[str, Any] = {"model": name, "messages": HELLO, "max_tokens": 4, "temperature": 0}
            answer = client.chat.completions.create(**asked, user="u01")
            assert answer.e2p["arm"] == "e2p"
            assert answer.usage.completion_tokens <= 4
            chunks = list(client.chat.completions.create(**asked, user="u01", stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
            assert client.chat.completions.create(**asked, user="nobody").e2p["reason"] == "unknown_user"
            found = client.post(f"/models/{name}/reload", cast_to=object)
            assert found["e2p"]["revision"] == answer.e2p["adapter_revision"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
