"""`e2p serve` whose vLLM is taken away in mid-load: that is told, or another answers, and it comes back by itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from serve_process import ServeProcess, serving_processes
from served import error_of
from vllm_servers import MARKS, Relay, VLLMServer
from whole_app import STABLE, App, World

pytestmark = MARKS
NEW, LONG = 20, 320  # tokens of an answer; of those that are to be broken within
# Its likeliest tokens are the likeliest by far enough that no answer hangs on a float's last bits.
PROMPT = [{"role": "user", "content": "old soul music"}]


@dataclass
class Answer:
    """What a client was sent."""

    text: str = ""
    status: int = 0
    begun: bool = False
    error: str = ""


@dataclass
class Load:
    """All users ask at once, every other one for a stream; what came of each."""

    base: str
    world: World
    new: int = NEW
    begun: int = 0

    async def play(self) -> list[Answer]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=self.base, timeout=120, limits=limits) as http:
            cases = [(name, user) for name in ("taste", "early") for user in STABLE]
            work = [self.ask(http, *each, stream=place % 2 == 0) for place, each in enumerate(cases)]
            answers = await asyncio.gather(*work)
        expected = [t for name in ("taste", "early") for t in self.world.said(name, PROMPT, STABLE.values(), self.new)]
        for answer, text in zip(answers, expected, strict=True):
            if answer.error:
                assert answer.error == "engine_unavailable"
                assert text.startswith(answer.text), "what was said before was right"
            else:
                assert (answer.status, answer.text) == (200, text)
        return answers

    async def ask(self, http: httpx.AsyncClient, name: str, user: str, stream: bool) -> Answer:
        body = {
            "model": name,
            "messages": PROMPT,
            "user": user,
            "temperature": 0,
            "max_tokens": self.new,
            "stream": stream,
        }
        found = Answer()
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            found.status = answer.status_code
            if found.status != 200:
                await answer.aread()
                assert error_of(answer)[:2] == (503, "engine_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
                found.error = error_of(answer)[1] or ""
            elif not stream:
                found.text = json.loads(await answer.aread())["choices"][0]["message"]["content"]
            else:
                events = [line async for line in self.lines(answer, found)]
                if found.error:
                    assert "[DONE]" not in events
                else:
                    assert events[-1] == "[DONE]"
        return found

    async def lines(self, answer: httpx.Response, found: Answer) -> Any:
        """Data of a stream's events; an error is the last."""
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not found.error, "nothing comes behind the error"
            data = line.removeprefix("data: ")
            event = {} if data == "[DONE]" else json.loads(data)
            found.error = event.get("error", {}).get("code", "")
            piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
            if piece and not found.begun:
                found.begun, self.begun = True, self.begun + 1
            found.text += piece
            yield data

    async def broken_by(self, take_away: Callable[[], None]) -> list[Answer]:
        """The same, and the server is taken away in the midst of it."""
        self.new = LONG
        work = asyncio.create_task(self.play())
        await until(lambda: work.done() or self.begun > 10)
        assert not work.done()
        await asyncio.to_thread(take_away)
        return await work


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.01)


def ready(base: str) -> bool:
    return httpx.get(f"{base}/readyz", timeout=60).status_code == 200


def failed(answers: list[Answer]) -> tuple[int, int]:
    """Answers that broke after they had begun, and those that are 503."""
    return sum(a.status == 200 and bool(a.error) for a in answers), sum(a.status == 503 for a in answers)


def test_vllm_taken_away_in_mid_load_is_told_or_made_up_for_and_comes_back_by_itself(
    vllm_app: App, world: World, servers: dict[str, VLLMServer]
) -> None:
    tiny, everyone = servers["tiny"], 2 * len(STABLE)
    relay = Relay(tiny.port)
    words = ["--engine", "vllm", "--upstreams", relay.address, "--vllm.fallbacks", tiny.address]
    words += ["--vllm.connect_seconds", "30", "--vllm.check_seconds", "1", "--store", str(world.folder / "vllm-store")]
    backed = ServeProcess(world.folder, *world.words, *words, name="backed")
    with serving_processes(backed):
        # One server goes, and another is there.
        broken, refused = failed(asyncio.run(Load(backed.base, world).broken_by(relay.cut)))
        assert 0 < broken + refused < everyone, "what had begun is told, and the rest is answered"
        assert served_by(backed.base) == 1
        assert failed(asyncio.run(Load(backed.base, world).play())) == (0, 0)
        relay.mend()
        asyncio.run(until(lambda: served_by(backed.base) == 2))
        taken = relay.taken
        assert failed(asyncio.run(Load(backed.base, world).play())) == (0, 0)
        assert relay.taken > taken + 20, "a fallback is asked only while no other can be"

        # kill -9 of the only one.
        broken, refused = failed(asyncio.run(Load(vllm_app.base, world).broken_by(tiny.kill)))
        assert broken > 0
        assert broken + refused > 10
        for base in (vllm_app.base, backed.base):
            start = time.monotonic()
            assert failed(asyncio.run(Load(base, world).play())) == (0, everyone)
            assert time.monotonic() - start < 10, "nobody waits for a server that is not there"
            assert error_of(httpx.get(f"{base}/readyz"))[:2] == (503, "not_ready")
            assert httpx.get(f"{base}/healthz").status_code == 200
        tiny.start()
        tiny.wait()
        asyncio.run(until(lambda: ready(vllm_app.base) and ready(backed.base)))
        for process in (vllm_app.process, backed):
            assert failed(asyncio.run(Load(process.base, world).play())) == (0, 0)
            assert "Traceback" not in process.said()
    relay.cut()


def served_by(base: str) -> int:
    """vLLM servers that are ready."""
    text = httpx.get(f"{base}/metrics", timeout=60).text
    return round(float(text.partition('e2p_engine{figure="upstreams_ready"} ')[2].split()[0]))
