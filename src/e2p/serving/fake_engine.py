"""An engine without a model, for tests of what stands around one: yours and ours.

    engine = FakeEngine()
    engine.queue("Hello Ana.", Failure(EngineError("away"), after=1))
    app = create_app(engine, open_store("memory://"))

Without queued answers it tells what it was asked, so that a test sees whose vector arrived.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from e2p.serving.engine import (
    AdapterInfo,
    Delta,
    Engine,
    EngineError,
    Event,
    Finished,
    Reason,
    Request,
    RequestError,
    Started,
    TokenIds,
    TokenLogprob,
)

ADAPTERS = (
    AdapterInfo("taste", 3, ("v1",), True, "r1", 1, "before_completion"),
    AdapterInfo("backbone", 0, (), False, "r1", 0, "before_completion"),
)


@dataclass(frozen=True)
class Failure:
    """An answer that breaks.

    Args:
        error: what is raised.
        after: tokens before it; 0: none, and not even the start.
        text: whose tokens these are.
    """

    error: Exception
    after: int = 0
    text: str = "one two three four five six seven eight"


def echo(request: Request) -> str:
    """What was asked, as words: whose answer, strength, vector, prompt."""
    personal = request.personal
    vector = "" if personal.vector is None else " ".join(f"{number:g}" for number in personal.vector)
    return f"{request.adapter} {personal.mode} {personal.strength:g} [{vector}] {_texts(request)[-1]}"


def _texts(request: Request) -> list[str]:
    """Of the prompt: messages' contents; token ids as words."""
    prompt = request.prompt
    if isinstance(prompt, TokenIds):
        return [" ".join(map(str, prompt))]
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


class FakeEngine(Engine):
    """Answers by a rule, or what was queued. Tokens are words with the space before them.

    Args:
        adapters: what it says that it serves.
        answer: what is said to a request where nothing is queued; a sequence: one text for each of n answers.
        delay: seconds before each token.

    Attributes:
        requests: all that were asked.
        running: requests in work now.
        cancelled: requests whose caller stopped listening.
    """

    def __init__(
        self,
        adapters: Sequence[AdapterInfo] = ADAPTERS,
        answer: Callable[[Request], str | Sequence[str] | Failure] = echo,
        delay: float = 0.0,
    ) -> None:
        self._adapters = {info.name: info for info in adapters}
        self._before: dict[str, AdapterInfo] = {}
        self._answer, self.delay = answer, delay
        self._queued: deque[str | Sequence[str] | Failure] = deque()
        self.requests: list[Request] = []
        self.running = self.cancelled = 0
        self.ready = False

    def queue(self, *answers: str | Sequence[str] | Failure) -> None:
        """Answer the next requests so, one each."""
        self._queued.extend(answers)

    def reset(self) -> None:
        """Forget what was asked and what is queued."""
        self._queued.clear()
        self.requests.clear()
        self.cancelled = 0

    async def start(self) -> None:
        self.ready = True

    async def stop(self, grace: float) -> None:
        self.ready = False
        deadline = asyncio.get_running_loop().time() + grace
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    def adapters(self) -> Sequence[AdapterInfo]:
        return tuple(self._adapters.values())

    async def reload(self, name: str) -> AdapterInfo:
        if name not in self._adapters:
            raise RequestError(f"expected one of {', '.join(self._adapters)}, got {name!r}")
        old = self._adapters[name]
        self._before[name] = old
        self._adapters[name] = replace(old, revision=f"r{int(old.revision[1:]) + 1}")
        return self._adapters[name]

    async def health(self) -> dict[str, Any]:
        return {"ready": self.ready, "running": self.running}

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        if not self.ready:
            raise EngineError("the engine has not started, or is stopping; try again")
        self.requests.append(request)
        self.running += 1
        ended = False
        try:
            async for event in self._events(request):
                yield event
            ended = True
        except Exception:
            ended = True
            raise
        finally:
            self.running -= 1
            self.cancelled += not ended

    async def _events(self, request: Request) -> AsyncGenerator[Event, None]:
        info = self._adapters.get(request.adapter)
        if info is None:
            raise RequestError(f"expected one of {', '.join(self._adapters)}, got {request.adapter!r}")
        before = self._before.get(request.adapter)
        if before is not None and before.revision == request.revision:
            info = before
        if request.personal.mode == "null" and not info.has_null:
            raise RequestError(f"{request.adapter}: was trained without a null user")
        answer = self._queued.popleft() if self._queued else self._answer(request)
        failure = answer if isinstance(answer, Failure) else None
        if failure is not None and not failure.after:
            await asyncio.sleep(self.delay)
            raise failure.error
        texts = failure.text if failure else answer
        given = [texts] * request.sampling.n if isinstance(texts, str) else list(texts)  # type: ignore[arg-type]
        answers = [_tokens(text, request) for text in given]
        words = sum(len(text.split()) for text in _texts(request))
        yield Started(words, info.prefix_tokens if request.personal.mode != "none" else 0, info.revision)
        said = 0
        for step in range(max(len(tokens) for tokens, _ in answers)):
            for index, (tokens, _) in enumerate(answers):
                if step < len(tokens):
                    await asyncio.sleep(self.delay)
                    if failure is not None and said >= failure.after:
                        raise failure.error
                    said += 1
                    yield Delta(index, tokens[step], 1, _logprobs(tokens[step], step, request))
        for index, (tokens, reason) in enumerate(answers):
            yield Finished(index, reason, len(tokens))


def _tokens(text: str, request: Request) -> tuple[list[str], Reason]:
    ends = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
    tokens = re.findall(r"\s*\S+|\s+$", text[: min(ends)] if ends else text)
    cut = tokens[: request.sampling.max_tokens]
    return cut, "length" if len(cut) < len(tokens) else "stop"


def _logprobs(token: str, step: int, request: Request) -> tuple[TokenLogprob, ...]:
    """The token itself at -(step + 1) / 10 nats, the others less likely by 1 each."""
    wanted = request.sampling.logprobs
    if wanted is None:
        return ()
    own = -(step + 1) / 10
    top = [(token, own), *((f" other{i}", own - i) for i in range(1, wanted))]
    return (TokenLogprob(token, own, tuple(top[:wanted])),)
