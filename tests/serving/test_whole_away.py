"""`e2p serve` whose ground is taken away in mid-load: kill -9 of itself, and of Redis; what was acknowledged stays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from e2p.users.store import StoredVector, open_store
from redis_process import BINARY, RedisProcess
from serve_process import ServeProcess, serving_processes
from served import error_of
from whole_app import DIMENSION, PROMPTS, STABLE, World, write_checkpoint

pytestmark = [pytest.mark.slow]
PROMPT = PROMPTS[2]
DAY = datetime(2024, 5, 1, tzinfo=UTC)
NEW = 8  # tokens of an answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(folder, write_checkpoint(folder / "checkpoint"))


@dataclass
class Writers:
    """Clients that put and delete, each its own users, and keep what they were told. Step -1: there is no vector."""

    base: str = ""
    kept: dict[str, int] = field(default_factory=dict)  # the last step that was acknowledged
    sent: dict[str, list[int]] = field(default_factory=dict)  # those sent since then, which may have come to be or not
    refused: Counter[tuple[int, str]] = field(default_factory=Counter)
    acknowledged: int = 0
    over: bool = False

    async def put(self, http: httpx.AsyncClient, user: str, step: int) -> bool:
        """Whether it is acknowledged."""
        self.sent.setdefault(user, []).append(step)
        answer = await http.put(f"/v1/users/{user}/embedding", json=body_of(step))
        if answer.status_code != 200:
            return self._refused(answer)
        assert answer.json()["outcome"] == "stored"
        self._kept(user, step)
        return True

    async def delete(self, http: httpx.AsyncClient, user: str) -> bool:
        """The same for a deletion."""
        self.sent.setdefault(user, []).append(-1)
        answer = await http.delete(f"/v1/users/{user}/embedding")
        if answer.status_code != 200:
            return self._refused(answer)
        assert answer.json()["deleted"] is True
        self._kept(user, -1)
        return True

    async def write(self, number: int) -> None:
        """Until it is over, or the server is gone."""
        async with httpx.AsyncClient(base_url=self.base, timeout=60) as http:
            with contextlib.suppress(httpx.TransportError):
                for step in itertools.count():
                    if self.over:
                        return
                    user = f"w{number}-{step // 200}-{step % 20}"
                    if -1 in (self.kept.get(user), *self.sent.get(user, [])):
                        continue  # what is put with an older time than the deletion is refused
                    if await self.put(http, user, step) and step % 17 == 16:
                        await self.delete(http, user)

    async def until(self, acknowledged: int) -> None:
        """Until so many are."""
        await until(lambda: self.acknowledged >= acknowledged)

    def check(self, address: str) -> None:
        """Nothing that was acknowledged is lost, and what is older overwrites nothing."""
        with open_store(address, create=False) as store:
            for user, sent in self.sent.items():
                found, kept = store.get(user), self.kept.get(user, -1)
                step = -1 if found is None else (found.timestamp - DAY) // timedelta(hours=1)
                assert step in (kept, *sent), user
                if found is not None:
                    assert found.embedding.tolist() == numbers_of(step)
                    assert store.put(replace(found, timestamp=time_of(step - 1))) == "older"
                elif self.kept.get(user) == -1:
                    assert store.put(StoredVector(user, np.ones(DIMENSION, np.float32), DAY)) == "deleted"
            stats = store.stats()
            assert store.count() == sum(stats.versions.values()) == len(list(store.iterate()))

    def _kept(self, user: str, step: int) -> None:
        self.kept[user], self.sent[user] = step, []
        self.acknowledged += 1

    def _refused(self, answer: httpx.Response) -> bool:
        assert answer.headers["retry-after"]
        self.refused[error_of(answer)[:2]] += 1
        return False


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.005)


# ---------------------------------------------------------------- kill -9 of the server


def test_no_acknowledged_vector_is_lost_by_kill_9_of_the_server(world: World) -> None:
    address, writers = world.store("killed"), Writers()
    server = ServeProcess(world.folder, *world.words, "--store", address, name="killed")
    bulk = itertools.count()

    async def lines() -> AsyncIterator[bytes]:
        for number in bulk:  # goes on behind what the killed server has read
            yield json.dumps({"user_id": f"bulk{number:07}", **body_of(1)}).encode() + b"\n"

    async def upload() -> None:
        headers = {"content-type": "application/x-ndjson"}
        async with httpx.AsyncClient(base_url=server.base, timeout=60) as http:
            with pytest.raises(httpx.TransportError):
                await http.post("/v1/users/embeddings", content=lines(), headers=headers)

    async def load(first: int, acknowledged: int) -> None:
        writers.base = server.base
        tasks = [asyncio.create_task(writers.write(first + number)) for number in range(5)]
        tasks.append(asyncio.create_task(upload()))
        await writers.until(acknowledged)
        server.kill()
        await asyncio.gather(*tasks)

    def goes_on() -> None:
        """Started again, it has what it had acknowledged, and refuses what is older."""
        sure = {user: step for user, step in writers.kept.items() if not writers.sent[user]}
        with httpx.Client(base_url=server.base, timeout=30) as http:
            assert http.get("/readyz").status_code == 200
            for user, step in [*sure.items()][-40:]:
                answer = http.put(f"/v1/users/{user}/embedding", json=body_of(max(step - 1, 0)))
                if step < 0:
                    assert error_of(answer)[:2] == (409, "user_deleted")
                else:
                    assert answer.json()["outcome"] in ("older", "unchanged")
                    found = http.get(f"/v1/users/{user}/embedding?vector=true").json()
                    assert found["embedding"] == numbers_of(step)
            user = next(user for user, step in sure.items() if step > 0)
            expected = world.said("taste", PROMPT, [np.asarray(numbers_of(sure[user]), np.float32)], NEW)
            assert chat(http, user).json()["choices"][0]["message"]["content"] == expected[0]

    try:
        server.start()
        server.wait()
        asyncio.run(load(0, 120))
        writers.check(address)
        server.start()
        server.wait()
        goes_on()
        asyncio.run(load(5, 500))
        writers.check(address)
    finally:
        server.kill()
    assert not writers.refused
    with open_store(address, create=False) as store:
        rows = [vector.user_id for vector in store.iterate() if vector.user_id.startswith("bulk")]
    assert len(rows) > 0
    assert len(rows) % 256 == 0, "whole batches"


# ---------------------------------------------------------------- Redis


POLICIES = ("error", "null", "none")


@dataclass
class Asked:
    """A request for an answer: when, and what came of it."""

    user: str
    start: float
    end: float
    answer: httpx.Response


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    if BINARY is None:
        pytest.skip("no redis-server is installed: make redis")
    server = RedisProcess(tmp_path, persistent=True)
    yield server
    server.stop(kill=True)


def test_redis_taken_away_in_mid_load_is_told_and_comes_back_by_itself(world: World, redis: RedisProcess) -> None:
    address = world.store(redis.address("e2p"))
    apps = {
        policy: ServeProcess(
            world.folder, *world.words, "--store", address, "--policies.store_unavailable", policy, name=policy
        )
        for policy in POLICIES
    }
    writers, users, over = Writers(), [*STABLE][:8], asyncio.Event()
    found: dict[str, list[Asked]] = {policy: [] for policy in POLICIES}
    times: list[float] = []

    async def read(policy: str) -> None:
        async with httpx.AsyncClient(base_url=apps[policy].base, timeout=60) as http:
            for user in itertools.cycle(users):
                if over.is_set():
                    return
                start = time.monotonic()
                answer = await http.post("/v1/chat/completions", json=chat_body(user))
                found[policy].append(Asked(user, start, time.monotonic(), answer))

    async def at(count: int) -> None:
        """Until so many more answers of each have come, and the time then."""
        had = {policy: len(each) for policy, each in found.items()}
        await until(lambda: all(len(found[policy]) >= had[policy] + count for policy in POLICIES))
        times.append(time.monotonic())

    async def play() -> None:
        writers.base = apps["error"].base
        tasks = [asyncio.create_task(read(policy)) for policy in POLICIES for _ in range(2)]
        tasks += [asyncio.create_task(writers.write(number)) for number in range(3)]
        await writers.until(30)
        await at(8)
        await asyncio.to_thread(redis.stop, kill=True)
        times.append(time.monotonic())
        await at(8)
        had = writers.acknowledged  # only now: what Redis had stored in its last moment is still told
        await asyncio.to_thread(away, apps)
        assert writers.acknowledged == had, "nothing is said to be stored by nobody"
        times.append(time.monotonic())
        await asyncio.to_thread(redis.start)
        times.append(time.monotonic())
        await writers.until(had + 30)
        await at(8)
        over.set()
        writers.over = True
        await asyncio.gather(*tasks)

    with serving_processes(*apps.values()):
        asyncio.run(play())
        for app in apps.values():
            assert httpx.get(f"{app.base}/readyz").status_code == 200
            assert "Traceback" not in app.said()
    before, dead, _, waking, up, _ = times
    assert set(writers.refused) == {(503, "store_unavailable")}
    writers.check(address)
    own = dict(zip(users, world.said("taste", PROMPT, (STABLE[user] for user in users), NEW), strict=True))
    others = {
        "null": world.said("taste", PROMPT, [None], NEW)[0],
        "none": world.models["taste"].generate([PROMPT], use_prefix=False, max_new_tokens=NEW, do_sample=False)[0],
    }
    assert len({*own.values(), *others.values()}) > 6
    for policy, answers in found.items():
        while_dead = [each for each in answers if each.start > dead and each.end < waking]
        while_up = [each for each in answers if each.end < before or each.start > up]
        assert len(while_dead) >= 6
        assert len(while_up) >= 12
        for each in answers:
            expect(each.answer, policy, own[each.user], others)
        assert {told(each.answer) for each in while_dead} == {"error" if policy == "error" else policy}
        assert {told(each.answer) for each in while_up} == {"e2p"}, "recovery needs nobody"


def expect(answer: httpx.Response, policy: str, own: str, others: dict[str, str]) -> None:
    """An answer is the user's own, or what the policy says, and tells which."""
    if answer.status_code != 200:
        assert policy == "error"
        assert error_of(answer) == (503, "store_unavailable", "user")
        assert int(answer.headers["retry-after"]) >= 1
        return
    body = answer.json()
    if body["e2p"]["arm"] != "e2p":
        assert (body["e2p"]["arm"], body["e2p"]["reason"]) == (policy, "store_unavailable")
        assert answer.headers["x-e2p-reason"] == "store_unavailable"
    assert body["choices"][0]["message"]["content"] == (own if body["e2p"]["arm"] == "e2p" else others[policy])


def told(answer: httpx.Response) -> str:
    return str(answer.json()["e2p"]["arm"]) if answer.status_code == 200 else "error"


def away(apps: dict[str, ServeProcess]) -> None:
    """What every route says while Redis is away."""
    for policy, app in apps.items():
        with httpx.Client(base_url=app.base, timeout=60) as http:
            assert http.get("/healthz").status_code == 200
            for answer in (
                http.get("/readyz"),
                http.put("/v1/users/s01/embedding", json=body_of(1)),
                http.get("/v1/users/s01/embedding"),
                http.delete("/v1/users/s01/embedding"),
                http.post(
                    "/v1/users/embeddings",
                    content=json.dumps({"user_id": "s01", **body_of(1)}),
                    headers={"content-type": "application/x-ndjson"},
                ),
            ):
                assert error_of(answer)[:2] == (503, "store_unavailable"), answer.text
                assert answer.headers["retry-after"]
                assert "127.0.0.1" not in answer.text
            given = chat(http, "s01", e2p={"vector": STABLE["s01"].tolist()})
            assert given.json()["e2p"]["arm"] == "e2p", "a vector in the request needs no store"
        with openai.OpenAI(base_url=f"{app.base}/v1", api_key="none-needed", max_retries=0) as client:
            asked: Any = chat_body("s01")
            if policy != "error":
                assert client.chat.completions.create(**asked).e2p["reason"] == "store_unavailable"  # type: ignore[attr-defined]
                continue
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as refused:
                    client.chat.completions.create(**asked, stream=stream)
                assert refused.value.code == "store_unavailable"


# ---------------------------------------------------------------- requests


def numbers_of(step: int) -> list[float]:
    """The vector of a step, which can be told by it."""
    return [float(step), 1.0, -1.0]


def time_of(step: int) -> datetime:
    return DAY + timedelta(hours=step)


def body_of(step: int) -> dict[str, Any]:
    return {"embedding": numbers_of(step), "version": "v1", "timestamp": time_of(step).isoformat()}


def chat_body(user: str, **fields: Any) -> dict[str, Any]:
    return {"model": "taste", "messages": PROMPT, "user": user, "temperature": 0, "max_tokens": NEW, **fields}


def chat(http: httpx.Client, user: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json=chat_body(user, **fields))
