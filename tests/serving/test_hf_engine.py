"""The engine within this process: each answer is what the user would have got alone, whoever else is served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from e2p.config import BackboneConfig
from e2p.config_serving import EngineConfig
from e2p.data.templates import TextEncoder
from e2p.errors import AdapterError, BackboneError, ConfigError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.serving import hf_engine
from e2p.serving.calls import Limits
from e2p.serving.engine import (
    Delta,
    EngineBusyError,
    EngineError,
    Personal,
    Request,
    RequestError,
    Started,
    TokenIds,
)
from e2p.serving.hf_engine import HFEngine
from engines import ADAPTERS, PROMPTS, TEXT, USERS, all_answered, answered, asked, build, engine_on, saved, written
from tiny import EOS, logits_alone, make_batch, tiny_backbone


def adapters_on(backbone: FrozenBackbone) -> dict[str, E2PModel]:
    return {name: build(backbone, **values) for name, values in ADAPTERS.items()}


def alone(model: E2PModel, request: Request) -> str:
    """What E2PModel says to a greedy request."""
    personal = request.personal
    (text,) = model.generate(
        [request.prompt],
        None if personal.vector is None else [personal.vector],
        use_prefix=personal.mode != "none",
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
    )
    return text


@pytest.fixture(scope="module")
def models(llama: FrozenBackbone) -> dict[str, E2PModel]:
    return adapters_on(llama)


@pytest.fixture(scope="module")
def folders(models: dict[str, E2PModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(models, tmp_path_factory.mktemp("adapters"))


# ---------------------------------------------------------------- the same as alone


def test_greedy_answers_of_every_family_are_those_of_the_model_alone(backbone: FrozenBackbone, tmp_path: Path) -> None:
    models = adapters_on(backbone)
    folders = saved(models, tmp_path)
    requests = [
        asked(name, prompt, user, max_tokens=8)
        for name in models
        for prompt, user in zip(PROMPTS, (USERS[0], USERS[1], "null", USERS[0]), strict=True)
        if not (name == "static" and isinstance(user, str))
    ]
    requests += [asked("backbone", PROMPTS[0]), asked("late", PROMPTS[1])]

    async def play() -> list[str]:
        # Fewer rows than requests: they come and go while others run.
        async with engine_on(backbone, folders, rows=5) as engine:
            assert (await engine.health())["batching"] == "joined"
            return [found.text for found in await all_answered(engine, requests)]

    models["backbone"] = E2PModel.from_backbone(backbone, 4, data=TEXT)
    expected = [alone(models[request.adapter], request) for request in requests]
    assert asyncio.run(play()) == expected
    assert len(set(expected)) > 4, "the requests tell users and adapters apart"


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_what_keeps_more_than_keys_and_values_is_answered_too(family: str, tmp_path: Path) -> None:
    size = {"n_head": 4, "n_layer": 2} if family == "bloom" else {"num_hidden_layers": 2, "state_size": 8}
    backbone = other_family(family, **size)
    models = {"late": build(backbone)}
    requests = [asked("late", prompt, user, max_tokens=4) for prompt in PROMPTS[:3] for user in USERS[:2]]

    async def play() -> tuple[list[str], str]:
        async with engine_on(backbone, saved(models, tmp_path), rows=3) as engine:
            found = await all_answered(engine, requests)
            return [one.text for one in found], (await engine.health())["batching"]

    texts, batching = asyncio.run(play())
    assert texts == [alone(models["late"], request) for request in requests]
    assert batching == {"mamba": "reread", "bloom": "joined"}[family]


def other_family(family: str, **values: Any) -> FrozenBackbone:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tiny import PAD, VOCABULARY, tiny_tokenizer

    config = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.25, eos_token_id=EOS, pad_token_id=PAD, **values
    )
    torch.manual_seed(0)
    return FrozenBackbone(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), source=f"tiny-{family}")


def test_answers_and_their_logprobs_are_those_of_trainings_forward_pass(
    models: dict[str, E2PModel], folders: dict[str, Path]
) -> None:
    names = [name for name in models if name != "static"]
    requests = [asked(name, PROMPTS[0], USERS[2], max_tokens=9, logprobs=3) for name in names]

    async def play() -> Any:
        async with engine_on(models["late"].backbone, folders) as engine:
            return await all_answered(engine, requests)

    for name, found in zip(names, asyncio.run(play()), strict=True):
        model = models[name]
        prompt = model.encoder.prompt(PROMPTS[0])
        at = model.splice_at(prompt)
        with torch.no_grad():
            prefix = model.prefix(USERS[2:3], 1)
            (ids,) = model.backbone.generate([prompt], [at], prefix, max_new_tokens=9, do_sample=False)
            batch = make_batch([prompt.ids], [ids], [at], torch.tensor(USERS[2:3]))
            hidden, labels = model.backbone.completion_states(batch, prefix)
            logits = model.backbone.head(hidden)
            logprobs = model(batch)
        assert logits.argmax(-1).tolist() == labels.tolist() == ids
        assert found.text == model.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert found.tokens == {0: len(ids)}
        assert found.started.prompt_tokens == len(prompt.ids)
        assert found.started.prefix_tokens == model.projector.config.prefix_tokens
        assert [entry.logprob for entry in found.logprobs[0]] == pytest.approx(logprobs.tolist(), abs=1e-4)
        best = logits.log_softmax(-1).topk(3)
        for entry, ids_, values in zip(found.logprobs[0], best.indices.tolist(), best.values.tolist(), strict=True):
            assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-4)
            assert [text for text, _ in entry.top] == [written(model.backbone.tokenizer, token) for token in ids_]
            assert entry.token == entry.top[0][0], "greedy"


def test_no_answer_depends_on_who_else_is_served(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    """Hundreds of requests over shared prompts, coming at random, of which some are given up halfway."""
    chance = random.Random(5)
    requests = []
    for number in range(240):
        name = chance.choice(["late", "early", "middle"])
        user = chance.choice([*USERS, "null", None])
        how: dict[str, Any] = {"max_tokens": chance.randint(1, 12)}
        if chance.random() < 0.4:
            how |= {"temperature": chance.choice([0.5, 1.0]), "top_p": chance.choice([0.7, 1.0])}
            how |= {"seed": number % 7, "n": chance.randint(1, 3)}
        requests.append(asked(name, chance.choice(PROMPTS), user, **how))

    async def one(engine: HFEngine, request: Request) -> list[str] | None:
        for _ in range(chance.randint(0, 40)):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            events = engine.generate(request)
            for _ in range(chance.randint(1, 3)):
                with contextlib.suppress(StopAsyncIteration):
                    await anext(events)
            await events.aclose()
            return None
        return (await answered(engine, request)).texts

    async def play() -> tuple[list[list[str] | None], list[list[str]], dict[str, Any]]:
        async with engine_on(models["late"].backbone, folders, rows=9, cache_tokens=700, waiting=1000) as engine:
            together = await asyncio.gather(*(one(engine, request) for request in requests))
            health = await engine.health()
        async with engine_on(models["late"].backbone, folders) as engine:
            by_itself = [(await answered(engine, request)).texts for request in requests]
        return together, by_itself, health

    together, by_itself, health = asyncio.run(play())
    assert (health["running"], health["waiting"], health["failures"]) == (0, 0, 0)
    assert health["requests"] > 200
    kept = [place for place, texts in enumerate(together) if texts is not None]
    assert 170 < len(kept) < 240
    for place in kept:
        assert together[place] == by_itself[place], requests[place]
        if requests[place].sampling.temperature == 0 and place % 3 == 0:
            assert together[place] == [alone(models[requests[place].adapter], requests[place])]
    assert len({text for texts in by_itself for text in texts}) > 120, "a mistaken user would be seen"


# ---------------------------------------------------------------- sampling


def test_a_seed_gives_the_same_answers_alone_and_in_company(
    models: dict[str, E2PModel], folders: dict[str, Path]
) -> None:
    request = asked("late", PROMPTS[0], USERS[0], temperature=1.0, seed=3, n=3, max_tokens=12)
    company = [asked("early", prompt, user, temperature=0.8, max_tokens=20) for prompt in PROMPTS for user in USERS[:4]]

    async def play() -> Any:
        async with engine_on(models["late"].backbone, folders) as engine:
            by_itself = await answered(engine, request)
            among, *_ = await all_answered(engine, [request, *company])
            one = await answered(engine, replace(request, sampling=replace(request.sampling, n=1)))
            other = await answered(engine, replace(request, sampling=replace(request.sampling, seed=4)))
            negative = await answered(engine, replace(request, sampling=replace(request.sampling, seed=-4)))
            unseeded = replace(request, sampling=replace(request.sampling, seed=None))
            drawn = [await answered(engine, unseeded) for _ in range(2)]
            return by_itself, among, one, other, negative, drawn

    by_itself, among, one, other, negative, drawn = asyncio.run(play())
    assert among.texts == by_itself.texts
    assert one.texts == by_itself.texts[:1], "the first of three is the only one of one"
    assert len({*by_itself.texts, *other.texts, *negative.texts}) == 9
    assert drawn[0].texts != drawn[1].texts


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8)])
def test_first_tokens_are_distributed_as_the_model_says(
    models: dict[str, E2PModel], folders: dict[str, Path], temperature: float, top_p: float
) -> None:
    draws = 1600

    async def play() -> Any:
        async with engine_on(models["late"].backbone, folders, rows=64) as engine:
            how = {"temperature": temperature, "top_p": top_p, "n": 16, "max_tokens": 1, "logprobs": 0}
            many = [asked("late", PROMPTS[2], USERS[1], seed=seed, **how) for seed in range(draws // 16)]
            return await all_answered(engine, many)

    model = models["late"]
    ids = model.encoder.prompt(PROMPTS[2]).ids
    with torch.no_grad():
        logits = logits_alone(model.backbone.model, ids, model.prefix(USERS[1:2], 1)[0], len(ids))[-1].double().numpy()
    heated = np.exp((logits - logits.max()) / temperature)
    expected = heated / heated.sum()
    order = np.argsort(-expected)
    inside = order[: int((np.cumsum(expected[order]) < top_p).sum()) + 1]
    expected = np.where(np.isin(np.arange(len(expected)), inside), expected, 0)
    expected /= expected.sum()
    seen: Counter[str] = Counter()
    for found in asyncio.run(play()):
        for index in found.reasons:
            # The end token is no token of the answer.
            seen[found.logprobs[index][0].token if found.tokens[index] else "end"] += 1
    names = [written(model.backbone.tokenizer, token) for token in range(len(expected))]
    names[EOS] = "end"
    wanted: Counter[str] = Counter()
    for name, share in zip(names, expected * draws, strict=True):
        wanted[name] += share
    assert set(seen) <= {name for name, count in wanted.items() if count > 0}
    common = [name for name, count in wanted.items() if count >= 8]
    assert len(common) > 3
    counts = [*(seen[name] for name in common), draws - sum(seen[name] for name in common)]
    shares = [*(wanted[name] for name in common), draws - sum(wanted[name] for name in common)]
    if shares[-1] < 1:
        counts, shares = counts[:-1], [share * sum(counts[:-1]) / sum(shares[:-1]) for share in shares[:-1]]
    assert chisquare(counts, shares).pvalue > 1e-3


# ---------------------------------------------------------------- whose answer, and what of


def prefix_logprobs(model: E2PModel, prompt: Any, prefix: Tensor) -> list[float]:
    """Log-probabilities of the greedy tokens behind a prompt with this prefix, by a loop without a cache."""
    encoded = model.encoder.prompt(prompt)
    out: list[int] = []
    values = []
    while len(out) < 6:
        with torch.no_grad():
            logits = logits_alone(model.backbone.model, [*encoded.ids, *out], prefix, model.splice_at(encoded))[-1]
        out.append(int(logits.argmax()))
        if out[-1] == EOS:
            break
        values.append(float(logits.log_softmax(-1)[out[-1]]))
    return values


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_strength_leads_from_the_null_user_through_the_user(
    models: dict[str, E2PModel], folders: dict[str, Path], strength: float
) -> None:
    model = models["middle"]

    async def play() -> Any:
        async with engine_on(model.backbone, folders) as engine:
            return await answered(
                engine, asked("middle", PROMPTS[1], USERS[4], strength=strength, max_tokens=6, logprobs=0)
            )

    with torch.no_grad():
        user, null = model.prefix(USERS[4:5], 1)[0], model.prefix(None, 1)[0]
    expected = prefix_logprobs(model, PROMPTS[1], null + strength * (user - null))
    assert [entry.logprob for entry in asyncio.run(play()).logprobs[0]] == pytest.approx(expected, abs=1e-4)


def test_a_raw_text_is_continued_as_it_stands(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    model = models["late"]
    tokenizer, text = model.backbone.tokenizer, "make a playlist"
    ids = tokenizer(text)["input_ids"]
    out: list[int] = []
    while len(out) < 12:
        with torch.no_grad():
            out.append(int(logits_alone(model.backbone.model, [*ids, *out], None, 0)[-1].argmax()))
        if out[-1] == EOS:
            out.pop()
            break

    async def play() -> Any:
        async with engine_on(model.backbone, folders) as engine:
            raw = await all_answered(
                engine, [asked(name, text, raw=True, max_tokens=12) for name in ("backbone", "late")]
            )
            chat = await answered(engine, asked("backbone", text, max_tokens=12))
            return raw, chat

    raw, chat = asyncio.run(play())
    assert [found.text for found in raw] == [tokenizer.decode(out, skip_special_tokens=True)] * 2
    assert raw[0].started.prompt_tokens == len(ids) < chat.started.prompt_tokens


def test_token_ids_are_continued_as_the_text_that_they_are(
    models: dict[str, E2PModel], folders: dict[str, Path]
) -> None:
    backbone = models["late"].backbone
    ids = TokenIds(TextEncoder(backbone.tokenizer, chat="never").prompt(PROMPTS[3]).ids)

    async def play() -> None:
        async with engine_on(backbone, folders) as engine:
            for adapter, user in (("late", USERS[0]), ("early", USERS[1]), ("middle", USERS[0]), ("backbone", None)):
                requests = [asked(adapter, prompt, user, raw=True) for prompt in (PROMPTS[3], ids)]
                text, given = await all_answered(engine, requests)
                assert (given.texts, given.started) == (text.texts, text.started)
            for wrong in ((), (-1,), (2**31 - 1,)):
                with pytest.raises(RequestError, match="prompt: expected token ids from 0 to"):
                    await answered(engine, asked("late", TokenIds(wrong), USERS[0], raw=True))
            with pytest.raises(RequestError, match="expected at most 60 tokens for 'late', got 70; shorten it"):
                await answered(engine, asked("late", TokenIds([5] * 70), USERS[0], raw=True))
            with pytest.raises(RequestError, match="got token ids; set raw"):
                await answered(engine, asked("late", ids, USERS[0]))

    asyncio.run(play())


def test_an_answer_ends_before_its_stop_text(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    model = models["late"]
    whole = alone(model, asked("late", PROMPTS[3], USERS[0], max_tokens=30))
    assert len(whole) > 12
    middle = whole[5:8]
    assert middle not in whole[:7]

    async def play() -> Any:
        async with engine_on(model.backbone, folders) as engine:
            how = {"max_tokens": 30}
            cut = await answered(engine, asked("late", PROMPTS[3], USERS[0], stop=("never seen", middle), **how))
            held = await answered(engine, asked("late", PROMPTS[3], USERS[0], stop=(whole[-2:] + "~~",), **how))
            return cut, held

    cut, held = asyncio.run(play())
    assert (cut.text, cut.reasons) == (whole[:5].rstrip(), {0: "stop"})
    assert cut.tokens[0] < held.tokens[0]
    assert held.text == whole, "what began like a stop text and was none belongs to the answer"


def test_end_tokens_and_lengths_end_answers(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    model = models["late"]
    requests = [asked("late", prompt, user, max_tokens=40) for prompt in PROMPTS for user in USERS]

    async def play() -> Any:
        async with engine_on(model.backbone, folders) as engine:
            return await all_answered(engine, requests)

    found = asyncio.run(play())
    reasons = Counter(one.reasons[0] for one in found)
    assert reasons["stop"] > 0
    assert reasons["length"] > 0
    for request, one in zip(requests, found, strict=True):
        prompt = model.encoder.prompt(request.prompt)
        assert request.personal.vector is not None
        prefix = model.prefix([request.personal.vector], 1)
        (ids,) = model.backbone.generate([prompt], [len(prompt.ids)], prefix, max_new_tokens=40, do_sample=False)
        assert one.tokens[0] == len(ids)
        assert one.reasons[0] == ("length" if len(ids) == 40 else "stop")


def test_who_asks_for_no_length_gets_what_there_is_room_for(
    models: dict[str, E2PModel], folders: dict[str, Path]
) -> None:
    model = models["late"]
    window = model.backbone.window
    assert window is not None
    wished = asked("late", "hi", USERS[0], max_tokens=500, shorten=True, logprobs=0)

    async def play() -> Any:
        async with engine_on(model.backbone, folders) as engine:
            return await answered(engine, wished)

    found = asyncio.run(play())
    room = window - len(model.encoder.prompt("hi").ids) - 1
    prompt = model.encoder.prompt("hi")
    prefix = model.prefix([USERS[0]], 1)
    (ids,) = model.backbone.generate([prompt], [len(prompt.ids)], prefix, max_new_tokens=room, do_sample=False)
    assert found.tokens[0] == len(ids)
    assert found.reasons[0] == ("length" if len(ids) == room else "stop")


# ---------------------------------------------------------------- room, and giving up


async def settled(engine: HFEngine, **expected: int) -> None:
    for _ in range(400):
        health = await engine.health()
        if all(health[name] == value for name, value in expected.items()):
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"expected {expected}, got {health}")


def test_giving_up_frees_rows_and_places(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    # An answer that does not end by itself.
    user = next(u for u in USERS if len(alone(models["late"], asked("late", PROMPTS[0], u, max_tokens=100))) > 60)
    long = asked("late", PROMPTS[0], user, max_tokens=120)

    async def play() -> str:
        async with engine_on(models["late"].backbone, folders, rows=1, waiting=1) as engine:
            first = engine.generate(long)
            await anext(first)
            waiting = asyncio.create_task(answered(engine, long))
            await settled(engine, running=1, waiting=1)
            with pytest.raises(EngineBusyError, match="1 requests wait already"):
                await answered(engine, long)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await settled(engine, running=1, waiting=0)
            await first.aclose()
            await settled(engine, running=0, waiting=0)
            assert (await engine.health())["completion_tokens"] < 120
            return (await answered(engine, asked("late", "hi", USERS[0]))).text

    assert asyncio.run(play()) == alone(models["late"], asked("late", "hi", USERS[0]))


def test_limits_hold_and_nobody_is_overtaken(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    order: list[int] = []
    most = {"rows": 0, "tokens": 0}
    # The tenth of many short ones needs all the room there is: four rows of prompt, soft token and answer.
    room = 4 * (len(models["late"].encoder.prompt(PROMPTS[3]).ids) + 1 + 10)

    async def play() -> None:
        async with engine_on(models["late"].backbone, folders, rows=8, cache_tokens=room, waiting=100) as engine:
            assert engine._worker is not None
            rows = engine._worker._rows
            step = rows.step

            def watched(tokens: Any) -> Tensor:
                out = step(tokens)
                most["rows"] = max(most["rows"], len(rows.lengths))
                most["tokens"] = max(most["tokens"], len(rows.lengths) * max(rows.lengths))
                return out

            rows.step = watched  # type: ignore[method-assign]

            async def one(number: int, request: Request) -> None:
                events = engine.generate(request)
                await anext(events)
                order.append(number)
                async for _ in events:
                    pass

            many = [asked("late", PROMPTS[2], USERS[n % 8], max_tokens=5 + n % 3) for n in range(40)]
            many[10] = asked("late", PROMPTS[3], USERS[0], max_tokens=10, n=4)
            await asyncio.gather(*(one(number, request) for number, request in enumerate(many)))

    asyncio.run(play())
    assert order == list(range(40))
    assert most["rows"] == 8
    assert room - 8 <= most["tokens"] <= room


def test_stopping_lets_what_runs_finish(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    request = asked("late", PROMPTS[0], USERS[0], max_tokens=30)

    async def play(grace: float) -> Any:
        engine = HFEngine(models["late"].backbone, folders, limits=Limits(rows=2))
        await engine.start()
        running = [asyncio.create_task(answered(engine, request)) for _ in range(4)]
        while (await engine.health())["running"] + (await engine.health())["waiting"] < 4:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(engine.stop(grace))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="stopping or has stopped"):
            await answered(engine, request)
        with pytest.raises(EngineError, match="stopping or has stopped"):
            await engine.reload("late")
        found = await asyncio.gather(*running, return_exceptions=True)
        await stopping
        assert not (await engine.health())["ready"]
        await engine.stop(0)
        return found

    assert {found.text for found in asyncio.run(play(60))} == {alone(models["late"], request)}
    broken = asyncio.run(play(0))
    assert any(isinstance(found, EngineError) and "before the answer's end" in str(found) for found in broken)


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_exchanged_while_answers_run(models: dict[str, E2PModel], tmp_path: Path) -> None:
    backbone = models["late"].backbone
    old, new = build(backbone, seed=1), build(backbone, seed=2, prefix_tokens=2, position="after_bos")
    user = next(u for u in USERS if len(alone(old, asked("a", PROMPTS[0], u, max_tokens=60))) > 40)
    request = asked("a", PROMPTS[0], user, max_tokens=60)

    async def play() -> None:
        async with engine_on(backbone, saved({"a": old}, tmp_path)) as engine:
            (_, before) = engine.adapters()
            events = engine.generate(request)
            started = await anext(events)
            assert isinstance(started, Started)
            assert await engine.reload("a") == before, "the same weights, the same revision"
            saved({"a": new}, tmp_path)
            after = await engine.reload("a")
            assert list(engine.adapters())[1] == after
            assert (after.prefix_tokens, after.position) == (2, "after_bos")
            assert after.revision != before.revision
            second = asyncio.create_task(answered(engine, request))
            assert (started.revision, (await second).started.revision) == (before.revision, after.revision)
            text = "".join([event.text async for event in events if isinstance(event, Delta)])
            assert text == alone(old, request)
            assert (await second).text == alone(new, request) != text
            # Made for the earlier one, by whose dimension and versions its vector was chosen.
            late = await answered(engine, replace(request, revision=before.revision))
            assert (late.text, late.started.revision) == (text, before.revision)
            assert await engine.reload("a") == after
            assert (await answered(engine, replace(request, revision=before.revision))).text == text
            (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
            with pytest.raises(AdapterError):
                await engine.reload("a")
            assert (await answered(engine, request)).text == alone(new, request)
            for name in ("b", "backbone"):
                with pytest.raises(RequestError, match=rf"can be loaded anew \(a\), got '{name}'"):
                    await engine.reload(name)

    asyncio.run(play())


def test_what_is_served_is_told(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    async def play() -> Any:
        async with engine_on(models["late"].backbone, folders) as engine:
            return engine.adapters(), await engine.health()

    infos, health = asyncio.run(play())
    assert [info.name for info in infos] == ["backbone", *folders]
    assert [info.dimension for info in infos] == [0, 4, 4, 4, 4]
    assert [info.has_null for info in infos] == [False, True, True, True, False]
    assert [info.prefix_tokens for info in infos] == [0, 1, 3, 2, 1]
    assert len({info.revision for info in infos}) == 5
    assert health["ready"] is True
    assert health["running"] == health["cache_tokens"] == 0


def test_a_run_folder_names_its_adapter(models: dict[str, E2PModel], folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["late"], tmp_path / "run" / "adapter")

    async def play() -> Any:
        async with engine_on(models["late"].backbone, {"late": tmp_path / "run"}) as engine:
            return await answered(engine, asked("late", PROMPTS[0], USERS[0]))

    assert asyncio.run(play()).text == alone(models["late"], asked("late", PROMPTS[0], USERS[0]))


def test_what_cannot_start_says_so(models: dict[str, E2PModel], folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names other than 'late'"):
        HFEngine(models["late"].backbone, folders, bare="late")
    with pytest.raises(ConfigError, match="rows: expected a whole number >= 1, got 0"):
        Limits(rows=0)

    async def play(backbone: Any) -> None:
        engine = HFEngine(backbone, folders)
        assert await engine.health() == {"ready": False}
        with pytest.raises(EngineError, match="has not; wait"):
            await anext(engine.generate(asked("late", "hi")))
        try:
            await engine.start()
        finally:
            assert await engine.health() == {"ready": False}
            with pytest.raises(EngineError):
                await anext(engine.generate(asked("late", "hi")))
            await engine.stop(1)

    with pytest.raises(AdapterError, match="model_type llama there, gpt2 here"):
        asyncio.run(play(tiny_backbone("gpt2")))
    with pytest.raises(BackboneError, match="no such folder here"):
        asyncio.run(play(BackboneConfig(model=str(tmp_path / "nothing"))))


# ---------------------------------------------------------------- what goes wrong


def test_a_failure_hits_the_requests_concerned_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_backbone("llama")
    models = {"late": build(backbone)}
    user = next(u for u in USERS if len(alone(models["late"], asked("late", PROMPTS[0], u, max_tokens=60))) > 40)
    long, bad, short = (
        asked("late", PROMPTS[0], user, max_tokens=60),
        asked("late", "jazz jazz jazz", USERS[0]),
        asked("late", "hi", USERS[1]),
    )
    expected = {request: alone(models["late"], request) for request in (long, short)}
    width = len(models["late"].encoder.prompt(bad.prompt).ids) + 1
    plain, broken_step = backbone.hidden_states, False

    def breaking(inputs: Any, cache: Any = None, mask: Any = None) -> Tensor:
        hidden = plain(inputs, cache, mask)
        if width in inputs.mask.sum(1).tolist() and inputs.mask.shape[1] == inputs.embeds.shape[1]:
            raise RuntimeError("no memory\nfor this")
        if broken_step and inputs.embeds.shape[1] == 1:
            raise RuntimeError("a step")
        return hidden

    async def play() -> None:
        nonlocal broken_step
        async with engine_on(backbone, saved(models, tmp_path)) as engine:
            backbone.hidden_states = breaking  # type: ignore[method-assign]
            running = asyncio.create_task(answered(engine, long))
            await settled(engine, running=1)
            found = await asyncio.gather(*(answered(engine, r) for r in (short, bad, short)), return_exceptions=True)
            assert [getattr(found[at], "text", None) for at in (0, 2)] == [expected[short]] * 2
            assert isinstance(found[1], EngineError)
            assert re.search("failed on this request: RuntimeError: no memory for this$", str(found[1]))
            assert (await running).text == expected[long]
            assert (await engine.health())["ready"]
            broken_step = True
            found = await asyncio.gather(*(answered(engine, r) for r in (short, long)), return_exceptions=True)
            assert all(isinstance(one, EngineError) and "a step" in str(one) for one in found)
            for _ in range(3):
                with pytest.raises(EngineError):
                    await answered(engine, short)
            assert not (await engine.health())["ready"]
            broken_step = False
            assert (await answered(engine, short)).text == expected[short]
            health = await engine.health()
            assert health["ready"]
            assert (health["running"], health["failures"]) == (0, 6)

    asyncio.run(play())
    assert "failed: 1 of the requests" in caplog.text


def test_who_is_not_ready_is_tried_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever balances load gives it nothing meanwhile, so no request of its own would show that it can answer."""
    monkeypatch.setattr(hf_engine, "_REST", 0.5)
    backbone = tiny_backbone("llama")

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no memory")

    async def play() -> None:
        async with engine_on(backbone, saved({"late": build(backbone)}, tmp_path)) as engine:
            plain, backbone.hidden_states = backbone.hidden_states, broken  # type: ignore[method-assign]
            for failures in (3, 1):  # once tried again, one is enough
                assert (await engine.health())["ready"]
                for _ in range(failures):
                    with pytest.raises(EngineError, match="no memory"):
                        await answered(engine, asked("late", "hi"))
                assert not (await engine.health())["ready"]
                await asyncio.sleep(0.6)
            backbone.hidden_states = plain  # type: ignore[method-assign]
            await answered(engine, asked("late", "hi"))
            assert (await engine.health())["ready"]

    asyncio.run(play())


def test_the_settings_of_a_server_are_the_limits_there_are_without_any() -> None:
    settings = EngineConfig()
    assert Limits() == Limits(settings.rows, settings.cache_tokens, settings.prefill_tokens)


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    folders = saved({"late": build(backbone)}, tmp_path)

    async def play() -> None:
        async with engine_on(backbone, folders) as engine:
            plain = backbone.head.forward

            def poisoned(hidden: Tensor) -> Tensor:
                logits = plain(hidden)
                logits[-1] = torch.nan
                return logits

            backbone.head.forward = poisoned  # type: ignore[method-assign]
            for how in ({}, {"temperature": 1.0}):
                with pytest.raises(EngineError, match="logits are not numbers"):
                    await answered(engine, asked("late", "hi", USERS[0], n=2, **how))
            backbone.head.forward = plain  # type: ignore[method-assign]
            await settled(engine, running=0)
            assert (await answered(engine, asked("late", "hi", USERS[0]))).reasons

    asyncio.run(play())


def test_a_user_whose_numbers_overflow_harms_nobody(models: dict[str, E2PModel], folders: dict[str, Path]) -> None:
    """His soft tokens are no numbers; whoever is beside him, and whoever gets his row later, is answered as ever."""
    huge = np.full(4, 3e38, np.float32)
    assert not model_is_finite(models["late"], huge)
    good = [asked("late", prompt, user, max_tokens=12) for prompt in PROMPTS for user in USERS[:2]]

    async def play() -> tuple[list[Any], list[Any]]:
        async with engine_on(models["late"].backbone, folders, rows=3) as engine:
            mixed = [request for one in good for request in (one, asked("late", PROMPTS[3], huge))]
            both = await asyncio.gather(*(answered(engine, request) for request in mixed), return_exceptions=True)
            return both[::2], both[1::2]

    answers, refused = asyncio.run(play())
    assert [found.text for found in answers] == [alone(models["late"], request) for request in good]
    assert all(
        isinstance(found, RequestError) and "vector: expected numbers of the size" in str(found) for found in refused
    )


def test_a_user_whose_numbers_overflow_is_the_null_user_at_strength_0(
    models: dict[str, E2PModel], folders: dict[str, Path]
) -> None:
    huge = np.full(4, 3e38, np.float32)

    async def play() -> tuple[Any, Any]:
        async with engine_on(models["late"].backbone, folders) as engine:
            return await all_answered(
                engine, [asked("late", PROMPTS[0], huge, strength=0.0), asked("late", PROMPTS[0], "null")]
            )

    found, null = asyncio.run(play())
    assert found.text == null.text


def model_is_finite(model: E2PModel, vector: np.ndarray) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(model.prefix(vector[None], 1)).all())


def with_nan() -> np.ndarray:
    vector = USERS[0].copy()
    vector[1] = np.nan
    return vector


BAD: list[tuple[Request, str]] = [
    (asked("nobody", "hi"), r"adapter: expected one of backbone, late, early, middle, static, bare2, got 'nobody'"),
    (asked("late", "hi", USERS[0][:3]), r"vector: expected a user vector of 4 numbers, got shape \(3,\); give one"),
    (asked("late", "hi", with_nan()), "vector: expected finite numbers .* got NaN or infinity; give one"),
    (replace(asked("late", "hi"), personal=Personal("user")), "vector: expected 4 numbers with mode 'user', got none"),
    (replace(asked("late", "hi"), personal=Personal("null", USERS[0])), "vector: expected none with mode 'null'"),
    (replace(asked("late", "hi"), personal=Personal("none", None, 0.5)), "strength: expected 1 with mode 'none'"),
    (asked("late", "hi", USERS[0], strength=float("nan")), "strength: expected a finite number, got nan"),
    (asked("static", "hi", USERS[0], strength=0.5), "strength: expected 1, since 'static' has no null user, got 0.5"),
    (asked("bare2", "hi", USERS[0], strength=2), "strength: expected 1, since 'bare2' has no null user, got 2"),
    (asked("static", "hi", "null"), "mode: expected user or none, since 'static' has no null user, got null"),
    (asked("backbone", "hi", USERS[0]), "mode: expected none for the bare backbone 'backbone', got 'user'; name an"),
    (replace(asked("late", "hi"), personal=Personal("all")), "mode: expected user, null or none"),  # type: ignore[arg-type]
    (asked("late", "hello " * 90, USERS[0]), r"prompt: expected at most 60 tokens for 'late', got \d+; shorten it"),
    (asked("backbone", "hello " * 900), r"prompt: expected at most 191 tokens for 'backbone', got \d+; shorten it"),
    (asked("late", [], USERS[0]), "prompt: expected messages with a role"),
    (asked("late", [{"role": "user", "content": "hi"}], raw=True), "prompt: expected a text to be continued .* raw"),
    (asked("late", "hi", USERS[0], max_tokens=500), r"max_tokens: expected at most \d+ behind a prompt .* got 500"),
    (asked("late", "hi", max_tokens=0), "max_tokens: expected a whole number >= 1, got 0; raise it"),
    (asked("late", "hi", temperature=-1), "temperature: expected a number >= 0, got -1; 0 takes"),
    (asked("late", "hi", temperature=float("nan")), "temperature: expected a number >= 0, got nan"),
    (asked("late", "hi", top_p=0), "top_p: expected a number above 0, at most 1, got 0"),
    (asked("late", "hi", top_p=1.1), "top_p: expected a number above 0, at most 1, got 1.1"),
    (asked("late", "hi", n=0), "n: expected 1 to 32, got 0"),
    (asked("late", "hi", n=33), "n: expected 1 to 32, got 33"),
    (asked("late", "hi", stop=("a", "")), r"stop: expected texts that are not empty, got \('a', ''\)"),
    (asked("late", "hi", logprobs=21), "logprobs: expected 0 to 20, got 21; ask for fewer"),
]


def test_bad_requests_are_refused_before_any_event(
    models: dict[str, E2PModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    more = saved({"bare2": build(models["late"].backbone, null_prob=0.0)}, tmp_path)

    async def play() -> None:
        async with engine_on(models["late"].backbone, {**folders, **more}) as engine:
            for request, message in BAD:
                with pytest.raises(RequestError, match=message) as caught:
                    await anext(engine.generate(request))
                assert "\n" not in str(caught.value)
            assert (await engine.health())["requests"] == 0
            assert (await answered(engine, asked("late", "hi", USERS[0]))).reasons

    asyncio.run(play())


def test_truncating_adapters_cut_as_the_model_does(models: dict[str, E2PModel], tmp_path: Path) -> None:
    model = build(models["late"].backbone, data=replace(TEXT, long_prompt="truncate"))
    request = asked("cut", "hello there world " * 40, USERS[0])

    async def play() -> Any:
        async with engine_on(models["late"].backbone, saved({"cut": model}, tmp_path)) as engine:
            return await answered(engine, request)

    found = asyncio.run(play())
    assert found.text == alone(model, request)
    assert found.started.prompt_tokens <= 60
