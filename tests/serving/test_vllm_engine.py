"""The engine over vLLM servers, against servers without a model: what is sent, what is made of it, and what breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from e2p.config import BackboneConfig
from e2p.config_serving import ServingConfig, VLLMConfig
from e2p.errors import AdapterError, BackboneError, ConfigError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.model.token_table import TokenTable
from e2p.serving.engine import Delta, EngineBusyError, EngineError, RequestError, TokenIds, TokenLogprob
from e2p.serving.http.app import create_app
from e2p.serving.vllm_engine import VLLMEngine
from engines import ADAPTERS, PROMPTS, USERS, all_answered, answered, asked, build, saved
from fake_vllm import FakeVLLM
from tiny import TEMPLATE, tiny_backbone

ALIKE = TEMPLATE.replace("'|> ' + m['content']", "('|>' if m['role'] == 'assistant' else '|> ') + m['content']")


class World:
    """A checkpoint on disk, its table, adapters, and what each request's embeddings must be."""

    def __init__(self, folder: Path, template: str) -> None:
        backbone = tiny_backbone("llama", template=template)
        backbone.model.save_pretrained(folder / "checkpoint")
        backbone.tokenizer.save_pretrained(folder / "checkpoint")
        self.config = BackboneConfig(str(folder / "checkpoint"))
        self.models: dict[str, E2PModel] = {name: build(backbone, **values) for name, values in ADAPTERS.items()}
        self.folders = saved(self.models, folder)
        self.table = TokenTable.load(self.config)

    @torch.no_grad()
    def embeds(self, request: Any) -> torch.Tensor:
        """By the model itself."""
        model = self.models.get(request.adapter, self.models["late"])
        prompt = model.encoder.prompt(request.prompt)
        rows = model.backbone.embed(torch.tensor(prompt.ids))
        if request.personal.mode == "none":
            return rows
        at = model.splice_at(prompt)
        vector = request.personal.vector
        soft = model.prefix(None if vector is None else [vector], 1)[0]
        return torch.cat([rows[:at], soft, rows[at:]])

    def text(self, server: FakeVLLM, request: Any) -> str:
        """What a server must have said."""
        tokens = server.answer(self.embeds(request))[: request.sampling.max_tokens]
        return self.table.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), TEMPLATE)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One whose answers' turns begin as what asks for them ends."""
    return World(tmp_path_factory.mktemp("alike"), ALIKE)


@contextlib.asynccontextmanager
async def engine_on(world: World, *servers: FakeVLLM, away: int = 0, **settings: Any) -> AsyncIterator[VLLMEngine]:
    """An engine over these servers, of which the last ones are not there yet; it has started."""
    for server in servers:
        await server.start()
    for server in servers[len(servers) - away :]:
        await server.die()
    config = VLLMConfig(**{"check_seconds": 0.2, "pause_seconds": 5, "connect_seconds": 2, **settings})
    reserves = len(config.fallbacks)
    config = VLLMConfig(**{**vars(config), "fallbacks": [s.address for s in servers[len(servers) - reserves :]]})
    addresses = [server.address for server in servers[: len(servers) - reserves]]
    engine = VLLMEngine(world.table, world.folders, addresses, config, key=servers[0].key)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0)
        for server in servers:
            await server.die()


def play(story: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(story(), 60))  # type: ignore[arg-type]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come")


def requests() -> list[Any]:
    found = [asked(name, prompt, user) for name in ADAPTERS for prompt in PROMPTS for user in (USERS[0], USERS[1])]
    found += [asked(name, PROMPTS[1], "null") for name in ("late", "early", "middle")]
    return [*found, asked("backbone", PROMPTS[0]), asked("late", PROMPTS[1])]


# ---------------------------------------------------------------- what is sent, and what is made of the answers


@pytest.mark.parametrize("transport", ["embeddings", "auto", "chat"])
def test_servers_get_the_models_own_embeddings(world: World, transport: str) -> None:
    server = FakeVLLM(world.table, trusts=transport == "chat")

    async def story() -> Any:
        async with engine_on(world, server, transport=transport) as engine:
            return await all_answered(engine, requests()), await engine.health()

    found, health = play(story)
    for request, each in zip(requests(), found, strict=True):
        assert each.text == world.text(server, request), request
        assert each.started.prompt_tokens == len(world.models["late"].encoder.prompt(request.prompt).ids)
        count = 0 if request.personal.mode == "none" else ADAPTERS[request.adapter].get("prefix_tokens", 1)
        assert each.started.prefix_tokens == count
        assert (each.reasons, each.tokens) == ({0: "stop"}, {0: 6})
    assert len({each.text for each in found}) > 20
    routes = Counter(body["route"] for body in server.asked)
    soft = sum(request.personal.mode != "none" for request in requests())
    if transport == "chat":
        assert routes == {"/v1/chat/completions": soft, "/v1/completions": len(found) - soft}
    else:  # the server takes no templates, and the backbone's own begins an answer's turn otherwise
        assert routes["/v1/completions"] == len(found)
    assert health["running"] == 0
    assert health["other_tokens"] == 0


def test_a_turn_of_its_own_holds_soft_tokens_before_the_answer(alike: World) -> None:
    server = FakeVLLM(alike.table)
    asks = [asked("late", prompt, user) for prompt in PROMPTS for user in USERS[:2]]
    others = [asked("early", PROMPTS[0], USERS[0]), asked("late", PROMPTS[0], USERS[0], raw=True)]

    async def story() -> Any:
        async with engine_on(alike, server) as engine:
            await answered(engine, asks[0])  # which finds out that the server takes no templates
            server.asked.clear()
            found = await all_answered(engine, asks)
            routes = [body["route"] for body in server.asked]
            server.asked.clear()
            await all_answered(engine, others)
            return found, routes, [body["route"] for body in server.asked]

    found, routes, rest = play(story)
    assert [each.text for each in found] == [alike.text(server, request) for request in asks]
    assert routes == ["/v1/chat/completions"] * len(asks)
    assert rest == ["/v1/completions"] * len(others)


def test_a_server_that_makes_other_tokens_of_a_chat_is_sent_embeddings(alike: World) -> None:
    server = FakeVLLM(alike.table, other=True, trusts=True)
    asks = [asked("late", PROMPTS[0], user) for user in USERS]

    async def story() -> Any:
        async with engine_on(alike, server) as engine:
            found = [await answered(engine, request) for request in asks]
            return found, await engine.health()

    found, health = play(story)
    assert [each.text for each in found] == [alike.text(server, request) for request in asks]
    assert health["other_tokens"] == 2, "each form once, and not again"
    assert health["servers"][0]["chat"] == []


def test_a_chat_alone_is_refused_where_it_cannot_be_right(world: World, alike: World) -> None:
    async def story() -> None:
        request = asked("early", PROMPTS[0], USERS[0])
        async with engine_on(world, FakeVLLM(world.table), transport="chat") as engine:
            with pytest.raises(RequestError, match="untrusted chat template"):
                await answered(engine, request)
        async with engine_on(alike, FakeVLLM(alike.table, trusts=True, other=True), transport="chat") as engine:
            with pytest.raises(EngineError, match=r"vllm.transport: expected a chat with training's tokens"):
                await answered(engine, request)
            with pytest.raises(RequestError, match=r"vllm.transport: expected a prompt of 'early' that a chat makes"):
                await answered(engine, asked("early", "say <prompt_embeds>", USERS[0]))

    play(story)


def test_how_tokens_are_chosen_reaches_the_server(world: World) -> None:
    server = FakeVLLM(world.table)
    settings = {"temperature": 0.7, "top_p": 0.9, "seed": 2**64 - 1, "n": 3, "max_tokens": 4, "logprobs": 2}

    async def story() -> Any:
        async with engine_on(world, server, transport="embeddings") as engine:
            return await answered(engine, asked("late", PROMPTS[0], USERS[0], **settings))

    found = play(story)
    (body,) = server.asked
    named = {"temperature": 0.7, "top_p": 0.9, "seed": -1, "n": 3, "max_tokens": 4, "logprobs": 2, "stream": True}
    named |= {"model": "backbone", "stop_token_ids": [1], "return_token_ids": True, "top_k": 0, "min_p": 0.0}
    named |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: body[name] for name in named} == named
    assert found.reasons == dict.fromkeys(range(3), "length")
    assert found.tokens == dict.fromkeys(range(3), 4)
    first = found.logprobs[1][0]
    assert isinstance(first, TokenLogprob)
    assert (first.logprob, len(first.top), first.top[0]) == (-0.1, 2, (first.token, -0.1))


@pytest.mark.parametrize("transport", ["embeddings", "chat"])
def test_token_ids_are_continued_as_the_text_that_they_are(world: World, transport: str) -> None:
    server = FakeVLLM(world.table, trusts=True)
    ids = TokenIds(world.models["late"].encoder.tokenizer(PROMPTS[3])["input_ids"])

    async def story() -> None:
        async with engine_on(world, server, transport=transport) as engine:
            for adapter, user in (("late", USERS[0]), ("early", USERS[1]), ("backbone", None)):
                requests = [asked(adapter, prompt, user, raw=True) for prompt in (PROMPTS[3], ids)]
                text, given = await all_answered(engine, requests)
                assert (given.texts, given.started) == (text.texts, text.started)

    play(story)


def test_the_likeliest_tokens_are_the_same_for_all_answers_and_asked_for_once(world: World) -> None:
    server = FakeVLLM(world.table)

    async def story() -> Any:
        async with engine_on(world, server) as engine:
            return await answered(engine, asked("late", PROMPTS[0], USERS[0], n=3))

    found = play(story)
    assert found.texts == [world.text(server, asked("late", PROMPTS[0], USERS[0]))] * 3
    assert server.asked[-1]["n"] == 1


def test_stop_texts_are_found_here_and_end_the_servers_work(world: World) -> None:
    server = FakeVLLM(world.table, delay=0.05)
    request = asked("late", PROMPTS[0], USERS[0])
    whole = world.text(server, request)

    async def story() -> Any:
        async with engine_on(world, server, transport="embeddings") as engine:
            found = await answered(engine, asked("late", PROMPTS[0], USERS[0], stop=(whole[1:3],)))
            await until(lambda: not server.running)
            return found

    found = play(story)
    assert (found.text, found.reasons) == (whole[:1].strip(), {0: "stop"})
    assert server.gone == 1


def test_giving_up_ends_the_servers_work(world: World) -> None:
    server = FakeVLLM(world.table, delay=0.05)

    async def story() -> None:
        async with engine_on(world, server, transport="embeddings") as engine:
            events = engine.generate(asked("late", PROMPTS[0], USERS[0]))
            await anext(events)
            await events.aclose()
            await until(lambda: server.gone == 1 and not server.running)
            assert (await engine.health())["running"] == 0

    play(story)


def test_a_connection_is_used_again(world: World) -> None:
    server = FakeVLLM(world.table)

    async def story() -> int:
        async with engine_on(world, server, check_seconds=100) as engine:
            for _ in range(5):
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            return len(server._writers)

    assert play(story) == 1


# ---------------------------------------------------------------- salts


def salts(world: World, server: FakeVLLM, asks: list[Any], **settings: Any) -> list[str | None]:
    async def story() -> None:
        async with engine_on(world, server, transport="embeddings", **settings) as engine:
            for request in asks:
                await answered(engine, request)

    play(story)
    return [body.get("cache_salt") for body in server.asked]


def test_users_share_only_what_stands_before_their_soft_tokens(world: World) -> None:
    asks = [asked(name, PROMPTS[0], user) for name in ("late", "middle", "early", "static") for user in USERS[:2]]
    found = salts(world, FakeVLLM(world.table), [*asks, asks[0], asked("late", PROMPTS[0])])
    assert found[:4] == [None] * 4
    assert len(set(found[4:8])) == 4, "early ones share nothing in any case"
    assert found[8:] == [None, None]


def test_users_share_nothing_where_that_is_wished(world: World) -> None:
    asks = [asked("late", PROMPTS[0], user) for user in (USERS[0], USERS[1], "null")]
    asks += [asked("late", PROMPTS[0], USERS[0], strength=0.5), asked("middle", PROMPTS[0], USERS[0]), asks[0]]
    found = salts(world, FakeVLLM(world.table), asks, cache="users")
    assert all(salt is not None and len(salt) == 64 for salt in found)
    assert len(set(found)) == 5
    assert found[0] == found[5]


def test_a_server_that_does_not_tell_embeddings_apart_is_found_out(world: World) -> None:
    server = FakeVLLM(world.table, forgets=True)

    async def story() -> Any:
        async with engine_on(world, server) as engine:
            return (await engine.health())["servers"][0]["shares_prompts"]

    assert play(story) is False
    found = salts(world, FakeVLLM(world.table, forgets=True), [asked("late", PROMPTS[0], user) for user in USERS])
    assert len(set(found)) == len(USERS)


def test_no_vector_leaves_this_process(world: World) -> None:
    server = FakeVLLM(world.table)
    salts(world, server, [asked("late", PROMPTS[0], np.array([7.25, 1, 2, 3], np.float32))], cache="users")
    assert "7.25" not in json.dumps(server.asked)


# ---------------------------------------------------------------- servers that fail


@pytest.mark.parametrize(
    "plan", ["status 500", "status 503", "status 429", "hang up", "cut 0", "error 0", "status 404"]
)
def test_another_server_answers_where_one_fails_before_anything_is_said(world: World, plan: str) -> None:
    servers = [FakeVLLM(world.table), FakeVLLM(world.table)]
    request = asked("late", PROMPTS[0], USERS[0])

    async def story() -> Any:
        async with engine_on(world, *servers, transport="embeddings") as engine:
            for server in servers:
                server.plans.append(plan)
            # Whichever is asked first fails; the other one's failure is still to come.
            servers[1].plans.clear()
            return [await answered(engine, request) for _ in range(2)]

    assert {each.text for each in play(story)} == {world.text(servers[0], request)}
    assert not servers[0].plans


@pytest.mark.parametrize(
    ("plan", "kind", "match"),
    [
        ("cut 3", EngineError, "got: connection lost; try again"),
        ("end 3", EngineError, "got one that was cut off; try again"),
        ("error 3", EngineError, "got: EngineCore died"),
        ("stall 3", EngineError, "got: silence; try again"),
        ("status 500", EngineError, "got status 500: told to say 500"),
        ("status 429", EngineBusyError, "as many requests as it takes"),
        ("status 400", RequestError, "got its error 400: told to say 400"),
        ("hang up", EngineError, "got: connection lost; try again"),
        ("stall 0", EngineError, "got: silence; try again"),
    ],
)
def test_failures_are_told(world: World, plan: str, kind: type[Exception], match: str) -> None:
    server = FakeVLLM(world.table)

    async def story() -> None:
        async with engine_on(world, server, transport="embeddings", pause_seconds=1) as engine:
            server.plans.append(plan)
            with pytest.raises(kind, match=match) as caught:
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            assert type(caught.value) is kind
            assert str(server.port) not in str(caught.value), "clients learn no addresses"
            await until(lambda: engine._pool.upstreams[0].ready)
            await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    play(story)


def test_what_has_begun_is_not_begun_again(world: World) -> None:
    servers = [FakeVLLM(world.table), FakeVLLM(world.table)]

    async def story() -> None:
        async with engine_on(world, *servers, transport="embeddings") as engine:
            for server in servers:
                server.plans.append("cut 2")
            with pytest.raises(EngineError, match="connection lost"):
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    play(story)
    assert sum(len(server.asked) for server in servers) == 1


def test_a_request_that_kills_servers_is_not_given_to_all_of_them(world: World) -> None:
    servers = [FakeVLLM(world.table) for _ in range(4)]

    async def story() -> None:
        async with engine_on(world, *servers, transport="embeddings", attempts=2) as engine:
            for server in servers:
                server.plans.append("hang up")
            with pytest.raises(EngineError, match="connection lost"):
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    play(story)
    assert sum(len(server.asked) for server in servers) == 2


def test_the_one_that_has_least_to_do_is_asked(world: World) -> None:
    servers = [FakeVLLM(world.table, delay=0.01), FakeVLLM(world.table, delay=0.01)]

    async def story() -> None:
        async with engine_on(world, *servers, transport="embeddings") as engine:
            await all_answered(engine, [asked("late", PROMPTS[0], user) for user in USERS] * 4)

    play(story)
    assert [len(server.asked) for server in servers] == [16, 16]
    assert max(server.most for server in servers) <= 17


def test_servers_taken_away_are_told_and_taken_back_by_itself(world: World) -> None:
    servers = [FakeVLLM(world.table, delay=0.01), FakeVLLM(world.table, delay=0.01)]
    request = asked("late", PROMPTS[0], USERS[0])

    async def story() -> None:
        async with engine_on(world, *servers, transport="embeddings") as engine:
            await servers[0].die()
            found = await all_answered(engine, [request] * 8)
            assert {each.text for each in found} == {world.text(servers[0], request)}, "the other one answers"
            await servers[1].die()
            with pytest.raises(EngineError):
                await answered(engine, request)
            with pytest.raises(EngineError, match=r"got none of 2 \(connection (refused|lost)\); try again"):
                await answered(engine, request)
            health = await engine.health()
            assert (health["ready"], health["upstreams_ready"]) == (False, 0)
            await servers[1].start()
            await until(lambda: engine._pool.upstreams[1].ready)
            assert (await answered(engine, request)).text == world.text(servers[0], request)
            assert (await engine.health())["upstreams_ready"] == 1

    play(story)


def test_servers_may_come_after_the_engine(world: World) -> None:
    server = FakeVLLM(world.table)

    async def story() -> None:
        async with engine_on(world, server, away=1) as engine:
            assert not (await engine.health())["ready"]
            await server.start()
            await until(lambda: engine._pool.upstreams[0].ready)
            await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    play(story)


def test_fallbacks_are_asked_only_while_no_other_can_be(world: World) -> None:
    servers = [FakeVLLM(world.table), FakeVLLM(world.table)]

    async def story() -> None:
        async with engine_on(world, *servers, fallbacks=["http://placeholder:1"]) as engine:
            for _ in range(4):
                await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            assert not servers[1].asked
            await servers[0].die()
            await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            assert servers[1].asked
            await servers[0].start()
            await until(lambda: engine._pool.upstreams[0].ready)
            servers[1].asked.clear()
            await answered(engine, asked("late", PROMPTS[0], USERS[0]))
            assert not servers[1].asked

    play(story)


def test_a_sick_server_is_seen_by_its_health(world: World) -> None:
    server = FakeVLLM(world.table)

    async def story() -> None:
        async with engine_on(world, server) as engine:
            server.health = 503
            await until(lambda: not engine._pool.upstreams[0].ready)
            server.health = 200
            await until(lambda: engine._pool.upstreams[0].ready)

    play(story)


@pytest.mark.parametrize(
    ("changes", "settings", "match"),
    [
        ({"name": "other"}, {"model": "mine"}, r"vllm.model: expected the name of a model .* \(other\), got 'mine'"),
        ({"key": "sk-1"}, {}, "got status 401: Unauthorized"),
    ],
)
def test_a_server_that_is_set_up_otherwise_gets_no_requests(
    world: World, changes: dict[str, Any], settings: dict[str, Any], match: str
) -> None:
    async def story() -> None:
        async with engine_on(world, FakeVLLM(world.table), FakeVLLM(world.table, **changes), **settings) as engine:
            found = engine._pool.upstreams[1].reason
            assert re.search(match, found), found

    play(story)


def test_a_server_of_another_checkpoint_gets_no_requests(world: World, alike: World) -> None:
    other = TokenTable(world.table.rows.flip(0), 1.0, world.table.config, [1], world.table.tokenizer)

    async def story() -> None:
        async with engine_on(world, FakeVLLM(other)) as engine:
            assert "answers a prompt as embeddings like the same one as token ids" in engine._pool.upstreams[0].reason

    play(story)


def test_a_key_is_sent(world: World) -> None:
    server = FakeVLLM(world.table, key="sk-1")

    async def story() -> None:
        async with engine_on(world, server) as engine:
            await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    play(story)


# ---------------------------------------------------------------- requests, start and stop


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (asked("nobody", "hi"), "adapter: expected one of backbone, late"),
        (asked("late", "hi", np.zeros(3, np.float32)), "vector: expected a user vector of 4 numbers"),
        (asked("late", "hi", USERS[0], max_tokens=500), "max_tokens: expected at most"),
        (asked("late", "hi", USERS[0], n=99), "n: expected 1 to 32"),
    ],
)
def test_bad_requests_are_told_before_a_server_is_asked(world: World, request_: Any, match: str) -> None:
    server = FakeVLLM(world.table)

    async def story() -> None:
        async with engine_on(world, server) as engine:
            with pytest.raises(RequestError, match=match):
                await answered(engine, request_)

    play(story)
    assert not server.asked


def test_a_servers_own_window_counts(world: World) -> None:
    async def story() -> None:
        async with engine_on(world, FakeVLLM(world.table, window=40)) as engine:
            with pytest.raises(RequestError, match="within 40 tokens, which the vLLM server has room for"):
                await answered(engine, asked("late", PROMPTS[0], USERS[0], max_tokens=60))

    play(story)


@pytest.mark.parametrize("transport", ["embeddings", "chat"])
@pytest.mark.parametrize("window", [192, 60, 20])
def test_who_asks_for_no_length_gets_what_there_is_room_for(world: World, window: int, transport: str) -> None:
    """By the backbone's window, 192, and by the server's own; as long as it was said to be where that fits."""
    server = FakeVLLM(world.table, window=window, trusts=True)
    length = len(world.models["late"].encoder.prompt(PROMPTS[0]).ids) + 1

    async def story() -> None:
        async with engine_on(world, server, transport=transport) as engine:
            for asked_for, given in ((256, window - length), (5, 5), (window - length, window - length)):
                request = asked("late", PROMPTS[0], USERS[0], max_tokens=asked_for, shorten=True)
                found = await answered(engine, request)
                assert found.text == world.text(server, request)
                assert server.asked[-1]["max_tokens"] == given
            await answered(engine, asked("backbone", PROMPTS[0], max_tokens=256, shorten=True))
            assert server.asked[-1]["max_tokens"] == window - length + 1
            if window < 192:
                with pytest.raises(RequestError, match=f"within {window} tokens"):
                    await answered(engine, asked("backbone", "make a playlist " * 9, max_tokens=256, shorten=True))

    play(story)


def test_it_starts_once_and_stops_in_order(world: World) -> None:
    server = FakeVLLM(world.table, delay=0.02)

    async def story() -> None:
        engine = VLLMEngine(world.table, world.folders, [])
        assert await engine.health() == {"ready": False}
        with pytest.raises(EngineError, match="got one that has not"):
            await answered(engine, asked("late", "hi"))
        await engine.stop(0)
        async with engine_on(world, server) as engine:
            with pytest.raises(EngineError, match="got one that was; make another"):
                await engine.start()
            running = asyncio.create_task(answered(engine, asked("late", PROMPTS[0], USERS[0])))
            await until(lambda: server.running)
            await engine.stop(10)
            assert (await running).reasons == {0: "stop"}
            with pytest.raises(EngineError, match="is stopping or has stopped"):
                await answered(engine, asked("late", "hi"))

    play(story)
    with pytest.raises(ConfigError, match="expected names other than 'backbone'"):
        VLLMEngine(world.table, {"backbone": "x"}, [])


def test_what_outlasts_the_grace_is_told(world: World) -> None:
    """Before the first token, and between two of them; no other server is asked."""
    slow, silent = FakeVLLM(world.table, delay=0.2), FakeVLLM(world.table, delay=2)

    async def story() -> None:
        async with engine_on(world, slow, silent, pause_seconds=60, transport="embeddings") as engine:
            running = [asyncio.create_task(answered(engine, asked("late", PROMPTS[0], user))) for user in USERS[:4]]
            await until(lambda: slow.running == silent.running == 2)
            await asyncio.sleep(0.3)
            await engine.stop(0)
            found = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 10)
            assert all(isinstance(one, EngineError) for one in found)
            assert (await engine.health())["running"] == 0
            assert len(slow.asked) == len(silent.asked) == 2
            await until(lambda: not slow.running and not silent.running)

    play(story)


@pytest.mark.parametrize("window", [float("inf"), "nonsense"])
def test_a_server_that_says_what_nobody_foresaw_is_looked_at_again(world: World, window: Any) -> None:
    server = FakeVLLM(world.table, window=window)

    async def story() -> None:
        async with engine_on(world, server) as engine:
            (told,) = (await engine.health())["servers"]
            assert told["reason"].startswith("expected a")
            assert not told["ready"]
            server.window = 192
            await until(lambda: engine._pool.upstreams[0].ready)

    play(story)


def test_an_adapter_is_loaded_anew(world: World, tmp_path: Path) -> None:
    model = build(world.models["late"].backbone)
    model.save_pretrained(tmp_path / "late")

    async def story() -> None:
        server = await FakeVLLM(world.table).start()
        engine = VLLMEngine(world.table, {"late": tmp_path / "late"}, [server.address])
        await engine.start()
        before = engine.adapters()[1].revision
        with torch.no_grad():
            model.projector.w1.weight.mul_(2)
        model.save_pretrained(tmp_path / "late", overwrite=True)
        assert (await engine.reload("late")).revision != before
        (tmp_path / "late" / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterError):
            await engine.reload("late")
        with pytest.raises(RequestError, match="one that can be loaded anew"):
            await engine.reload("backbone")
        await engine.stop(0)
        await server.die()

    play(story)


def test_through_the_application_servers_that_are_away_are_503(world: World) -> None:
    server = FakeVLLM(world.table)

    async def story() -> None:
        async with engine_on(world, server) as engine:
            app = create_app(engine, None, ServingConfig(insecure=True))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                body = {"model": "late", "messages": [{"role": "user", "content": "hi"}]}
                body["e2p"] = {"vector": [1, 2, 3, 4]}  # type: ignore[assignment]
                good = await client.post("/v1/chat/completions", json=body)
                assert (good.status_code, good.json()["e2p"]["arm"]) == (200, "e2p")
                await server.die()
                for _ in range(2):
                    bad = await client.post("/v1/chat/completions", json=body)
                    assert (bad.status_code, bad.json()["error"]["code"]) == (503, "engine_unavailable")
                    assert bad.headers["retry-after"]
                assert (await client.get("/readyz")).status_code == 503
                assert 'figure="upstreams_ready"} 0.0' in (await client.get("/metrics")).text
                await server.start()
                await until(lambda: engine._pool.upstreams[0].ready)
                assert (await client.post("/v1/chat/completions", json=body)).json()["choices"] == good.json()[
                    "choices"
                ]

    play(story)


# ---------------------------------------------------------------- the table


def test_the_table_embeds_as_the_model_does(backbone: FrozenBackbone, tmp_path: Path) -> None:
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    table = TokenTable.load(BackboneConfig(str(tmp_path)))
    ids = torch.arange(backbone.model.get_input_embeddings().weight.shape[0])
    assert torch.equal(table.embed(ids), backbone.embed(ids))
    ours, theirs = table.fingerprint(), backbone.fingerprint()
    assert ours.pop("hidden_state") is None
    del theirs["hidden_state"]
    assert ours == theirs
    assert (table.ends(), table.window, table.hidden_size) == (backbone.ends(), backbone.window, backbone.hidden_size)


def test_a_table_in_several_files_is_found(world: World, tmp_path: Path) -> None:
    backbone = world.models["late"].backbone
    backbone.model.save_pretrained(tmp_path, max_shard_size="20KB")
    backbone.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(300)
    assert torch.equal(TokenTable.load(BackboneConfig(str(tmp_path))).embed(ids), backbone.embed(ids))


def test_adapters_of_another_backbone_are_refused(world: World, tmp_path: Path) -> None:
    other = tiny_backbone("llama", seed=1)
    build(other).save_pretrained(tmp_path / "other")

    async def story() -> None:
        engine = VLLMEngine(world.table, {"other": tmp_path / "other"}, [])
        with pytest.raises(AdapterError, match="embedding tables differ"):
            await engine.start()
        await engine.stop(0)

    play(story)


def test_folders_without_a_table_are_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone.model: expected a folder or a hub id"):
        TokenTable.load(BackboneConfig(""))
    for file in Path(world.config.model).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BackboneError, match=r"tokenizer, config.json and safetensors"):
        TokenTable.load(BackboneConfig(str(tmp_path)))
    broken = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 299}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    (tmp_path / "model.safetensors").write_bytes((Path(world.config.model) / "model.safetensors").read_bytes())
    with pytest.raises(BackboneError, match=r"expected token embeddings \[299, 32\] by config.json, got \[300, 32\]"):
        TokenTable.load(BackboneConfig(str(tmp_path)))


def test_deltas_tell_of_every_token(world: World) -> None:
    async def story() -> list[Any]:
        async with engine_on(world, FakeVLLM(world.table)) as engine:
            return [event async for event in engine.generate(asked("late", PROMPTS[0], USERS[0], max_tokens=3))]

    events = play(story)
    assert sum(event.tokens for event in events if isinstance(event, Delta)) == 3
