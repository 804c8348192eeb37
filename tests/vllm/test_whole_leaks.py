"""Hundreds ask `e2p serve` at once, over shared prompts: everyone gets his own answer, on both engines."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

from vllm_servers import MARKS
from whole_app import ADAPTERS, CHANGING, PROMPTS, STABLE, App, World

pytestmark = [pytest.mark.slow]
NEW = 12  # tokens of an answer


@pytest.fixture(params=["hf", pytest.param("vllm", marks=MARKS)])
def app(request: pytest.FixtureRequest) -> App:
    found: App = request.getfixturevalue(f"{request.param}_app")
    return found


def client_of(app: App) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{app.base}/v1", api_key="none-needed", max_retries=0, timeout=120)


async def ask(client: openai.AsyncOpenAI, name: str, prompt: Any, user: str, stream: bool) -> tuple[str, Any]:
    """The answer, and what is told of it."""
    asked = {"model": name, "messages": prompt, "user": user, "temperature": 0, "max_tokens": NEW}
    if not stream:
        answer: Any = await client.chat.completions.create(**asked)
        return answer.choices[0].message.content, answer.e2p
    chunks: list[Any] = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    assert chunks[-1].choices[0].finish_reason
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[0].e2p


def own_answers(world: World) -> dict[tuple[str, int, str], str]:
    """Of the model alone, to every user at every prompt by every adapter; they tell users apart."""
    found = {}
    for name, place in itertools.product(ADAPTERS, range(len(PROMPTS))):
        texts = world.said(name, PROMPTS[place], STABLE.values(), NEW)
        assert len(set(texts)) >= len(texts) / 2, "a mistaken user would be seen"
        found |= {(name, place, user): text for user, text in zip(STABLE, texts, strict=True)}
    return found


def test_hundreds_at_once_get_their_own_answers(app: App, world: World) -> None:
    chance, expected = random.Random(3), own_answers(world)
    asked = [*expected]
    chance.shuffle(asked)
    hits = app.upstream.metric("vllm:prefix_cache_hits_total") if app.upstream else 0

    async def play() -> tuple[list[str], list[str]]:
        async with client_of(app) as client:

            async def one(name: str, place: int, user: str) -> str:
                return (await ask(client, name, PROMPTS[place], user, chance.random() < 0.5))[0]

            together = await asyncio.gather(*(one(*each) for each in asked))
            return together, [await one(*each) for each in asked[:20]]

    together, alone = asyncio.run(play())
    assert len(asked) > 250
    assert dict(zip(asked, together, strict=True)) == expected
    assert alone == together[:20]
    if app.upstream:
        assert app.upstream.metric("vllm:prefix_cache_hits_total") > hits + 5000, "the cache was in use"


@dataclass
class Changes:
    """Vectors that one user had: version, when it was sent, when that was acknowledged. No version: deleted."""

    user: str
    entries: list[tuple[str, float, float]] = field(default_factory=list)

    async def put(self, http: httpx.AsyncClient, number: int) -> None:
        vector, start = CHANGING[self.user][number % 3].tolist(), time.monotonic()
        body = {"embedding": vector, "version": f"v{number}"}
        answer = await http.put(f"/v1/users/{self.user}/embedding", json=body)
        assert answer.json()["outcome"] == "stored", answer.text
        self.entries.append((f"v{number}", start, time.monotonic()))

    async def delete(self, http: httpx.AsyncClient) -> None:
        start = time.monotonic()
        assert (await http.delete(f"/v1/users/{self.user}/embedding")).json()["deleted"] is True
        self.entries.append(("", start, time.monotonic()))

    def during(self, start: float, end: float) -> set[str]:
        """Versions that the user may have had within this time."""
        found = set()
        for place, (version, sent, _) in enumerate(self.entries):
            ended = self.entries[place + 1][2] if place + 1 < len(self.entries) else end
            if sent <= end and ended >= start:
                found.add(version)
        return found


def test_nobody_gets_a_vector_that_is_anothers_or_was_his_before(app: App, world: World) -> None:
    """Others' vectors are put and deleted all the while."""
    chance, expected = random.Random(4), own_answers(world)
    stable = chance.sample([*expected], 100)
    changes = {user: Changes(user) for user in CHANGING}
    changing = [(n, p, u) for n in ADAPTERS for p in range(len(PROMPTS)) for u in CHANGING for _ in range(3)]
    asked = [*stable, *changing]
    chance.shuffle(asked)
    over, places = asyncio.Event(), asyncio.Semaphore(32)  # so that changes come between

    async def change(http: httpx.AsyncClient, one: Changes) -> None:
        for number in itertools.count(1):
            if over.is_set():
                return
            if number % 4 == 0:
                await one.delete(http)
            await one.put(http, number)
            await asyncio.sleep(0.01)

    async def play() -> list[tuple[str, Any, float, float]]:
        async with client_of(app) as client, httpx.AsyncClient(base_url=app.base, timeout=60) as http:

            async def one(name: str, place: int, user: str) -> tuple[str, Any, float, float]:
                async with places:
                    start = time.monotonic()
                    text, told = await ask(client, name, PROMPTS[place], user, chance.random() < 0.5)
                    return text, told, start, time.monotonic()

            for each in changes.values():
                await each.put(http, 0)
            writers = [asyncio.create_task(change(http, each)) for each in changes.values()]
            found = await asyncio.gather(*(one(*each) for each in asked))
            over.set()
            await asyncio.gather(*writers)
            return found

    seen: Counter[str] = Counter()
    for (name, place, user), (text, told, start, end) in zip(asked, asyncio.run(play()), strict=True):
        if user in STABLE:
            assert text == expected[name, place, user]
            continue
        version = told["vector"]["version"] if told["arm"] == "e2p" else ""
        assert version in changes[user].during(start, end), (user, version)
        assert (told["arm"], told["reason"]) == (("e2p", None) if version else ("null", "unknown_user"))
        vector = CHANGING[user][int(version[1:]) % 3] if version else None
        assert text == world.said(name, PROMPTS[place], [vector], NEW)[0], (user, version)
        seen[version] += 1
    assert len(seen) > 5, "vectors did change"
    assert all(len(each.entries) > 8 for each in changes.values())
