"""The engine without a model keeps the contract that real engines keep, so that tests with it mean something."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from e2p.serving.engine import Delta, Engine, EngineError, Finished, Personal, Request, RequestError, Sampling, Started
from e2p.serving.fake_engine import ADAPTERS, Failure, FakeEngine


def ask(engine: FakeEngine, **fields: Any) -> list[Any]:
    """All events of a request."""

    async def work() -> list[Any]:
        await engine.start()
        return [event async for event in engine.generate(Request(**{"adapter": "taste", "prompt": "a b", **fields}))]

    return asyncio.run(work())


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def test_it_is_an_engine() -> None:
    engine: Engine = FakeEngine()
    assert engine.adapters() == ADAPTERS


def test_events_come_in_order() -> None:
    engine = FakeEngine()
    engine.queue("one two")
    assert ask(engine) == [
        Started(2, 0, "r1"),
        Delta(0, "one", 1),
        Delta(0, " two", 1),
        Finished(0, "stop", 2),
    ]
    assert engine.requests[0].prompt == "a b"
    assert (engine.running, engine.cancelled) == (0, 0)


def test_unqueued_it_tells_what_it_was_asked() -> None:
    engine = FakeEngine()
    personal = Personal("user", [1.0, 0.5], 0.25)  # type: ignore[arg-type]
    assert text_of(ask(engine, personal=personal, prompt=[{"role": "user", "content": "hi"}])) == (
        "taste user 0.25 [1 0.5] hi"
    )
    assert ask(engine, personal=personal)[0] == Started(2, 1, "r1")
    assert text_of(ask(FakeEngine(answer=lambda request: request.adapter.upper()))) == "TASTE"


def test_sampling_is_honoured() -> None:
    engine = FakeEngine(answer=lambda _: "one two three")
    assert ask(engine, sampling=Sampling(max_tokens=2))[-1] == Finished(0, "length", 2)
    assert text_of(ask(engine, sampling=Sampling(stop=("zzz", " three", " two")))) == "one"
    events = ask(engine, sampling=Sampling(n=2, logprobs=2))
    assert [text_of(events, i) for i in (0, 1)] == ["one two three"] * 2
    assert [e.index for e in events if isinstance(e, Finished)] == [0, 1]
    deltas = [e for e in events if isinstance(e, Delta)]
    assert [(t.token, t.logprob, t.top) for t in deltas[0].logprobs] == [
        ("one", -0.1, (("one", -0.1), (" other1", -1.1)))
    ]
    assert ask(engine, sampling=Sampling(logprobs=0))[1].logprobs[0].top == ()
    assert ask(engine)[1].logprobs == ()


def test_it_fails_as_told() -> None:
    engine = FakeEngine()
    engine.queue(Failure(EngineError("away")), Failure(EngineError("away"), after=2, text="one two three"))
    with pytest.raises(EngineError, match="away"):
        ask(engine)
    seen = []

    async def work() -> None:
        async for event in engine.generate(Request("taste", "a")):
            seen.append(event)

    with pytest.raises(EngineError, match="away"):
        asyncio.run(work())
    assert seen == [Started(1, 0, "r1"), Delta(0, "one", 1), Delta(0, " two", 1)]
    assert (engine.running, engine.cancelled) == (0, 0)


def test_what_it_cannot_answer() -> None:
    with pytest.raises(RequestError, match="expected one of taste, backbone, got 'other'"):
        ask(FakeEngine(), adapter="other")
    with pytest.raises(RequestError, match="without a null user"):
        ask(FakeEngine(), adapter="backbone", personal=Personal("null"))

    async def early() -> None:
        await anext(FakeEngine().generate(Request("taste", "a")))

    with pytest.raises(EngineError, match="has not started"):
        asyncio.run(early())


def test_who_stops_listening_is_counted() -> None:
    engine = FakeEngine(delay=0.01)

    async def leave() -> None:
        await engine.start()
        events = engine.generate(Request("taste", "a"))
        await anext(events)
        assert engine.running == 1
        await events.aclose()

    asyncio.run(leave())
    assert (engine.running, engine.cancelled) == (0, 1)
    engine.reset()
    assert (engine.requests, engine.cancelled) == ([], 0)


def test_stopping_waits_for_what_runs_but_not_forever() -> None:
    async def stop(grace: float) -> int:
        engine = FakeEngine(delay=0.05, answer=lambda _: "one two three")
        await engine.start()
        events: list[Any] = []

        async def listen() -> None:
            async for event in engine.generate(Request("taste", "a")):
                events.append(event)

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.02)
        await engine.stop(grace)
        done = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await engine.health() == {"ready": False, "running": 0}
        return int(done or isinstance(events[-1], Finished))

    assert asyncio.run(stop(5)) == 1
    assert asyncio.run(stop(0.01)) == 0


def test_a_reload_changes_the_revision() -> None:
    async def work() -> None:
        engine = FakeEngine()
        assert (await engine.reload("taste")).revision == "r2"
        assert [info.revision for info in engine.adapters()] == ["r2", "r1"]
        with pytest.raises(RequestError, match="expected one of"):
            await engine.reload("other")

    asyncio.run(work())
