"""Against real vLLM: the answers of the engine in this process, and nobody's answer to anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from e2p.config import BackboneConfig, DataConfig
from e2p.config_serving import VLLMConfig
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.serving.engine import EngineError, Request
from e2p.serving.vllm_engine import VLLMEngine
from engines import ADAPTERS, PROMPTS, USERS, all_answered, answered, asked, build, engine_on, saved
from tiny import make_batch
from vllm_servers import MARKS, VLLMServer

pytestmark = MARKS

LONG = "the train home and old soul music, the user likes it; " * 6
FORMS: dict[str, tuple[str, set[str]]] = {
    "embeddings": ("embeddings", set()),
    "chat_template": ("chat", {"template"}),
    "chat_turn": ("auto", {"turn"}),
}


class World:
    """A backbone here and on a server, adapters, and requests with the answers of the engine in this process."""

    def __init__(self, folder: Path, server: VLLMServer) -> None:
        self.checkpoint, self.server = server.folder, server
        self.backbone = FrozenBackbone.load(BackboneConfig(str(server.folder)), "float32")
        data = DataConfig(max_prompt_tokens=250, max_completion_tokens=16)
        self.models: dict[str, E2PModel] = {
            name: build(self.backbone, data=data, **values) for name, values in ADAPTERS.items()
        }
        self.folders = saved(self.models, folder)
        self._found: dict[Any, Any] = {}

    @contextlib.asynccontextmanager
    async def engine(self, form: str = "embeddings", **settings: Any) -> AsyncIterator[VLLMEngine]:
        transport, forms = FORMS[form]
        config = VLLMConfig(**{"transport": transport, "pause_seconds": 300, "connect_seconds": 30, **settings})
        engine = VLLMEngine(BackboneConfig(str(self.checkpoint)), self.folders, [self.server.address], config)
        await engine.start()
        for upstream in engine._pool.upstreams:
            upstream.forms = set(forms)
        try:
            yield engine
        finally:
            await engine.stop(0)

    def here(self, requests: list[Request]) -> list[Any]:
        """Answers of the engine in this process."""

        async def play() -> list[Any]:
            async with engine_on(self.backbone, self.folders) as engine:
                return await all_answered(engine, requests)

        return asyncio.run(play())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, servers: dict[str, VLLMServer]) -> dict[str, World]:
    return {name: World(tmp_path_factory.mktemp(name), server) for name, server in servers.items()}


def requests_of(world: World) -> list[Request]:
    users = (USERS[0], USERS[1], "null")
    found = [
        asked(name, prompt, user, max_tokens=10, logprobs=3)
        for name in world.models
        for prompt in PROMPTS
        for user in users
        if not (name == "static" and isinstance(user, str))
    ]
    found += [asked("late", PROMPTS[0], USERS[0], strength=strength) for strength in (0.0, 0.5, 2.0)]
    return [
        *found,
        asked("backbone", PROMPTS[0]),
        asked("early", PROMPTS[1]),
        asked("late", "soul", USERS[3], raw=True),
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["small", "tiny"])
def test_answers_are_those_of_the_engine_in_this_process(worlds: dict[str, World], name: str, form: str) -> None:
    if (name, form) == ("tiny", "chat_turn"):
        pytest.skip("its template writes a space before an answer")
    world = worlds[name]
    requests = requests_of(world)
    if form == "chat_turn":
        requests = [r for r in requests if r.adapter == "late" and r.personal.mode != "none" and not r.raw]

    async def play() -> tuple[list[Any], dict[str, Any]]:
        async with world.engine(form) as engine:
            return await all_answered(engine, requests), await engine.health()

    found, health = asyncio.run(play())
    soft = sum(request.personal.mode != "none" for request in requests)
    assert (health["as_chat"], health["as_embeddings"]) == ((0, soft) if form == "embeddings" else (soft, 0))
    assert health["other_tokens"] == 0
    for request, there, here in zip(requests, found, world.here(requests), strict=True):
        assert there.texts == here.texts, request
        assert (there.tokens, there.reasons) == (here.tokens, here.reasons)
        assert there.started.prompt_tokens == here.started.prompt_tokens
        assert there.started.prefix_tokens == here.started.prefix_tokens
        for ours, theirs in zip(here.logprobs.get(0, []), there.logprobs.get(0, []), strict=True):
            assert theirs.token == ours.token
            assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-3)
            assert [value for _, value in theirs.top] == pytest.approx([value for _, value in ours.top], abs=1e-3)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_answers_are_those_of_trainings_forward_pass(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    names = [each for each in world.models if each != "static"]
    requests = [asked(each, PROMPTS[0], USERS[2], max_tokens=9, logprobs=0) for each in names]

    async def play() -> list[Any]:
        async with world.engine() as engine:
            return await all_answered(engine, requests)

    for each, found in zip(names, asyncio.run(play()), strict=True):
        model = world.models[each]
        prompt = model.encoder.prompt(PROMPTS[0])
        at = model.splice_at(prompt)
        with torch.no_grad():
            prefix = model.prefix(USERS[2:3], 1)
            (ids,) = model.backbone.generate([prompt], [at], prefix, max_new_tokens=9, do_sample=False)
            batch = make_batch([prompt.ids], [ids], [at], torch.tensor(USERS[2:3]))
            logprobs = model(batch)
        assert found.text == model.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert [entry.logprob for entry in found.logprobs[0]] == pytest.approx(logprobs.tolist(), abs=1e-3)


@pytest.mark.parametrize("cache", ["prompts", "users"])
@pytest.mark.parametrize("form", ["embeddings", "chat_template"])
def test_hundreds_at_once_over_shared_prompts_get_their_own_answers(
    worlds: dict[str, World], form: str, cache: str
) -> None:
    world = worlds["small"]
    prompts = [LONG, LONG + "a", LONG * 2]
    different = [
        asked(name, p, u, max_tokens=6) for name in ("late", "middle", "early") for p in prompts for u in USERS
    ]
    alone = dict(zip(map(id, different), (found.text for found in world.here(different)), strict=True))
    requests = different * 4
    random.Random(3).shuffle(requests)
    hits = world.server.metric("vllm:prefix_cache_hits_total")

    async def play() -> list[Any]:
        async with world.engine(form, cache=cache) as engine:
            (server,) = (await engine.health())["servers"]
            assert server["shares_prompts"] == (cache == "prompts")
            return await all_answered(engine, requests)

    found = asyncio.run(play())
    assert [each.text for each in found] == [alone[id(request)] for request in requests]
    assert len(set(alone.values())) > len(USERS), "the answers tell users apart"
    assert world.server.metric("vllm:prefix_cache_hits_total") > hits + 1000, "the cache was in use"


def test_stop_texts_several_answers_and_seeds(worlds: dict[str, World]) -> None:
    world = worlds["tiny"]
    request = asked("late", PROMPTS[0], USERS[0], max_tokens=12)
    (whole,) = world.here([request])
    stop = (whole.text[len(whole.text) // 2 :][:2],)
    drawn = asked("late", PROMPTS[0], USERS[0], max_tokens=12, temperature=1.0, n=3, seed=7, top_p=0.9)
    requests = [
        asked("late", PROMPTS[0], USERS[0], max_tokens=12, stop=stop),
        asked("late", PROMPTS[0], USERS[0], max_tokens=12, n=3),
        drawn,
        drawn,
    ]

    async def play() -> list[Any]:
        async with world.engine() as engine:
            return await all_answered(engine, requests)

    stopped, three, once, again = asyncio.run(play())
    (here,) = world.here(requests[:1])
    assert (stopped.text, stopped.reasons) == (here.text, here.reasons)
    assert three.texts == [whole.text] * 3
    assert once.texts == again.texts
    assert len(set(once.texts)) > 1


def test_giving_up_ends_the_servers_work(worlds: dict[str, World]) -> None:
    world = worlds["tiny"]

    async def play() -> float:
        async with world.engine() as engine:
            before = world.server.metric("vllm:generation_tokens_total")
            events = engine.generate(asked("late", "go on", USERS[0], max_tokens=150))
            await anext(events)
            await anext(events)
            await events.aclose()
            await asyncio.sleep(3)
            return world.server.metric("vllm:generation_tokens_total") - before

    assert asyncio.run(play()) < 150


def test_a_server_with_another_checkpoint_gets_no_requests(worlds: dict[str, World]) -> None:
    async def play() -> dict[str, Any]:
        ours = worlds["tiny"]
        engine = VLLMEngine(BackboneConfig(str(ours.checkpoint)), ours.folders, [worlds["small"].server.address])
        await engine.start()
        try:
            with pytest.raises(EngineError, match="got none of 1"):
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            return await engine.health()
        finally:
            await engine.stop(0)

    assert not asyncio.run(play())["ready"]
