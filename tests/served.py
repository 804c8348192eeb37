"""A real server on a free port of this machine, in a thread, with an engine that needs no model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import openai
import uvicorn

from e2p.config_serving import LimitsConfig, PoliciesConfig, ServingConfig
from e2p.serving.fake_engine import FakeEngine
from e2p.serving.http.app import create_app
from e2p.serving.http.auth import Key, digest_of
from e2p.serving.serve import listen
from e2p.users.store import StoredVector, VectorStore, open_store

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    """What a test needs of it."""

    base: str
    engine: FakeEngine
    store: VectorStore | None
    app: Any
    uvicorn: uvicorn.Server
    thread: threading.Thread
    http: httpx.Client
    clients: list[openai.OpenAI] = field(default_factory=list)

    def openai(self, key: str = "none-needed", **options: Any) -> openai.OpenAI:
        """The official client; it does not try again unless told."""
        client = openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, **{"max_retries": 0, **options})
        self.clients.append(client)
        return client

    def chat(self, key: str = "", **fields: Any) -> httpx.Response:
        """POST a chat request that asks for nothing special."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": "taste", "messages": HELLO, **fields}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def put(self, user: str, vector: Sequence[float] = (1, 2, 3), version: str = "v1", **fields: Any) -> httpx.Response:
        """PUT a vector."""
        return self.http.put(f"/v1/users/{user}/embedding", json={"embedding": [*vector], "version": version, **fields})

    def service(self) -> Any:
        """What the routes share."""
        return self.app.state.service


@contextmanager
def serving(
    engine: FakeEngine | None = None,
    store: VectorStore | str | None = "memory://",
    limits: LimitsConfig | None = None,
    policies: PoliciesConfig | None = None,
    keys: Sequence[Key] = (),
    playground: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """Start a server and stop it."""
    engine = engine or FakeEngine()
    asyncio.run(engine.start())
    kept = open_store(store) if isinstance(store, str) else store
    config = ServingConfig(limits=limits or LimitsConfig(), policies=policies or PoliciesConfig(), **settings)
    app = create_app(engine, kept, config, keys)
    if playground is not None:
        asyncio.run(_with_playground(app, playground))
    with listen("127.0.0.1", 0) as listener:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(app, access_log=False, log_config=None, timeout_graceful_shutdown=5, ws="none")
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        with httpx.Client(base_url=base, timeout=20) as http:
            running = Server(base, engine, kept, app, server, thread, http)
            try:
                yield running
            finally:
                for client in running.clients:
                    client.close()
                server.should_exit = True
                thread.join(15)
                assert not thread.is_alive()


async def _with_playground(app: Any, folders: Mapping[str, str]) -> None:
    """Within a loop, as `e2p serve` does it: else Gradio makes loops that nobody closes."""
    from e2p.serving.playground import add_playground

    add_playground(app, folders)


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for something that another thread does; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def key(name: str, *scopes: str, prefix: str = "") -> Key:
    """A key whose secret is its name, made longer."""
    return Key(name, digest_of(secret(name)), frozenset(scopes), prefix)


def secret(name: str) -> str:
    return f"sk-{name}-0123456789"


def stored(user: str, *numbers: float, version: str = "v1", at: datetime | None = None) -> StoredVector:
    return StoredVector(user, numbers, at or datetime.now(UTC), version)  # type: ignore[arg-type]


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and param of an error, which must be in OpenAI's form."""
    body = response.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"].endswith("_error")
    return response.status_code, error["code"], error["param"]
