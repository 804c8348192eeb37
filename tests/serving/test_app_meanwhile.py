"""What changes while a request is under way: vectors, adapters loaded anew, a store or the server itself gone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from e2p.config_serving import LimitsConfig, PoliciesConfig
from e2p.errors import StoreError
from e2p.serving.engine import Request, Started
from e2p.serving.fake_engine import FakeEngine
from e2p.users.store_memory import MemoryStore
from served import Server, error_of, key, secret, serving, stored, wait_until

LINES = {"content-type": "application/x-ndjson"}


class Held(FakeEngine):
    """Lets prompts wait on, as an engine does that has no room: nothing begins before ``free`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.asked = 0

    async def generate(self, request: Request) -> Any:
        self.asked += 1
        while not self.free.is_set():
            await asyncio.sleep(0.005)
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield event


@contextmanager
def held(engine: Held | None = None, **settings: Any) -> Iterator[tuple[Server, Held]]:
    engine = engine or Held()
    with serving(engine, **settings) as server:
        server.put("u1", (1, 1, 1))
        yield server, engine
        engine.free.set()


def ask_meanwhile(server: Server, engine: Held, change: Callable[[], Any], path: str = "", **body: Any) -> Any:
    """The response to a request that waited within the engine while something changed."""
    found: list[httpx.Response] = []
    fields = {"model": "taste", "user": "u1", **(body or {"messages": [{"role": "user", "content": "hello"}]})}
    asking = threading.Thread(
        target=lambda: found.append(server.http.post(path or "/v1/chat/completions", json=fields))
    )
    asking.start()
    wait_until(lambda: engine.asked)
    change()
    time.sleep(0.3)  # a lookup counts for a quarter of a second
    engine.free.set()
    asking.join(10)
    return found[0]


def said(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def test_an_answer_that_has_not_begun_follows_a_new_vector() -> None:
    with held() as (server, engine):
        response = ask_meanwhile(server, engine, lambda: server.put("u1", (2, 2, 2), version="v1"))
        assert said(response) == "taste user 1 [2 2 2] hello"
        assert engine.cancelled == 1
        assert (engine.running, server.service().queue.held) == (0, 0)


def test_a_deleted_vector_is_not_used_for_an_answer_that_has_not_begun() -> None:
    with held() as (server, engine):
        response = ask_meanwhile(server, engine, lambda: server.http.delete("/v1/users/u1/embedding?forget=true"))
        assert said(response) == "taste null 1 [] hello"
        assert response.json()["e2p"]["reason"] == response.headers["x-e2p-reason"] == "unknown_user"
    with held(policies=PoliciesConfig(unknown_user="error")) as (server, engine):
        response = ask_meanwhile(server, engine, lambda: server.http.delete("/v1/users/u1/embedding"))
        assert error_of(response)[:2] == (404, "unknown_user")
        assert (engine.running, server.service().queue.held) == (0, 0)


def test_an_answer_is_not_begun_again_where_nothing_has_changed() -> None:
    with held() as (server, engine):
        response = ask_meanwhile(server, engine, lambda: server.put("u2", (2, 2, 2)))
        assert said(response) == "taste user 1 [1 1 1] hello"
        assert (engine.asked, engine.cancelled) == (1, 0)


def test_a_store_that_goes_away_meanwhile_takes_nothing_back() -> None:
    class Leaves(MemoryStore):
        away = False

        def get(self, user_id: str) -> Any:
            if self.away:
                raise StoreError("away")
            return super().get(user_id)

    for rule in ("null", "error"):
        store = Leaves()
        with held(store=store, policies=PoliciesConfig(store_unavailable=rule)) as (server, engine):  # type: ignore[arg-type]
            leave = partial(setattr, store, "away", True)
            assert said(ask_meanwhile(server, engine, leave)).startswith("taste user 1")


def test_a_user_whose_vector_never_rests_is_answered_all_the_same() -> None:
    class Restless(Held):
        """Every time it lets a prompt begin, there is another vector."""

        server: Server

        async def generate(self, request: Request) -> Any:
            await asyncio.sleep(0.3)
            self.server.store.put(stored("u1", self.asked + 2, 0, 0))
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    yield event

    engine = Restless()
    engine.free.set()
    with held(engine) as (server, _):
        engine.server = server
        assert re.fullmatch(r"taste user 1 \[\d 0 0\] hello", said(server.chat(user="u1")))
        assert engine.asked == 4


def test_each_of_several_prompts_has_the_vector_of_its_own_turn() -> None:
    with held(limits=LimitsConfig(running=1)) as (server, engine):
        body = {"prompt": ["a", "b", "c"]}
        change: list[Any] = []

        class Between(threading.Thread):
            def run(self) -> None:
                wait_until(lambda: len(engine.requests) == 1)
                server.store.delete("u1")

        watcher = Between()
        engine.delay = 0.1
        watcher.start()
        response = ask_meanwhile(server, engine, lambda: change, "/v1/completions", **body)
        watcher.join(10)
        texts = [choice["text"] for choice in response.json()["choices"]]
        assert texts == ["taste user 1 [1 1 1] a", "taste null 1 [] b", "taste null 1 [] c"]


def test_an_adapter_loaded_anew_keeps_what_was_asked_of_the_old_one() -> None:
    class Telling(Held):
        async def _events(self, request: Request) -> Any:
            async for event in super()._events(request):
                if isinstance(event, Started):
                    self.revisions.append(event.revision)
                yield event

        revisions: list[str]

    engine = Telling()
    engine.revisions = []
    with held(engine, limits=LimitsConfig(running=1)) as (server, _):
        reload = lambda: server.http.post("/v1/models/taste/reload")  # noqa: E731
        response = ask_meanwhile(server, engine, reload, "/v1/completions", prompt=["a", "b", "c"])
        assert response.status_code == 200
        assert response.json()["e2p"]["adapter_revision"] == "r1"
        assert engine.revisions == ["r1"] * 3
        assert server.chat().json()["e2p"]["adapter_revision"] == "r2"


def test_an_adapter_loaded_anew_twice_is_asked_by_its_own_rules() -> None:
    """What was asked for is no more: the policies decide again, by the new one's versions."""

    class Newer(Held):
        def renew(self) -> None:
            for _ in range(2):
                asyncio.run(self.reload("taste"))
            info = self._adapters["taste"]
            object.__setattr__(info, "versions", ("v2",))

    for rule, status in (("error", 409), ("null", 200)):
        engine = Newer()
        with held(engine, policies=PoliciesConfig(other_version=rule)) as (server, _):  # type: ignore[arg-type]
            response = ask_meanwhile(server, engine, engine.renew)
            assert response.status_code == status
            if status == 200:
                assert (said(response), response.json()["e2p"]["adapter_revision"]) == ("taste null 1 [] hello", "r3")


# ---------------------------------------------------------------- what operators are told


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "e2p.serving"]


def test_the_log_says_why_a_store_cannot_be_used_but_not_for_whom(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryStore):
        def get(self, user_id: str) -> Any:
            raise StoreError(f"/data: the record of {'u:' + user_id!r} is damaged; put the user's vector again")

        def put(self, vector: Any) -> Any:
            raise StoreError("/data: No space left on device")

    caplog.set_level(logging.INFO, "e2p.serving")
    with serving(store=Full()) as server:
        for _ in range(3):
            assert server.put("ana").status_code == 503
            server.chat(user="ana")
    reasons = [line["reason"] for line in lines_of(caplog) if line.get("error") == "store"]
    assert reasons == [
        "/data: No space left on device",
        "/data: a record is damaged; put the user's vector again",
    ]


def test_the_log_says_which_key_did_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "e2p.serving")
    with serving(keys=[key("app", "generate"), key("feed", "users:write")]) as server:
        feed = {"authorization": f"Bearer {secret('feed')}"}
        server.http.delete("/v1/users/u1/embedding", headers=feed)
        server.http.post("/v1/users/embeddings", content=b"", headers=feed | LINES)
        server.chat(secret("app"), temperature="hot")
        server.chat("sk-nobody-knows-this")
    assert [(line["status"], line.get("key")) for line in lines_of(caplog)] == [
        *((200, "feed"), (200, "feed"), (400, "app"), (401, None)),
    ]


def rows(count: int, start: int = 0) -> bytes:
    return b"".join(
        json.dumps({"user_id": f"u{n}", "embedding": [1, 2, 3]}).encode() + b"\n" for n in range(start, start + count)
    )


def test_what_an_upload_had_stored_before_it_broke_off_is_counted() -> None:
    with serving(limits=LimitsConfig(upload_bytes=100_000)) as server:
        body = (rows(256, at) for at in range(0, 2560, 256))
        assert server.http.post("/v1/users/embeddings", content=body, headers=LINES).status_code == 413
        count = server.store.count()
        assert count >= 256
        assert f'e2p_vectors_total{{outcome="stored"}} {count}.0' in server.http.get("/metrics").text


def test_an_upload_that_the_end_of_the_server_cuts_off_says_what_is_stored() -> None:
    with serving() as server:
        found: list[httpx.Response] = []
        go_on = threading.Event()

        def body() -> Iterator[bytes]:
            yield rows(300)
            go_on.wait(20)

        def send() -> None:
            found.append(server.http.post("/v1/users/embeddings", content=body(), headers=LINES))

        sending = threading.Thread(target=send)
        sending.start()
        wait_until(lambda: server.store.count() == 256)
        server.uvicorn.should_exit = True
        wait_until(lambda: found or not server.thread.is_alive(), 15)
        go_on.set()
        sending.join(10)
        assert error_of(found[0])[:2] == (503, "stopping")
        assert found[0].json()["e2p"]["stored"] == 256


def test_a_path_is_not_another_with_a_line_break_behind_it() -> None:
    with serving() as server:
        body = {"embedding": [1, 2, 3]}
        assert server.http.put("/v1/users/u1/embedding%0A", json=body).status_code == 404
        assert server.http.post("/v1/users/embeddings%0A", content=rows(1), headers=LINES).status_code == 404
        assert server.store.count() == 0
