"""An engine's events as OpenAI's responses: whole, or as server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from e2p.serving.engine import Delta, Event, Finished, Started, TokenLogprob, token_bytes
from e2p.serving.http.errors import ApiError
from e2p.serving.http.people import Person

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # what OpenAI writes for a token that cannot come; JSON has no infinity


@dataclass(eq=False)
class Reply:
    """What all parts of one response share.

    Args:
        chat: of chat completions, or of completions.
        model: as the client called it.
        n: answers, to all prompts together.
        logprobs: whether they were asked for.
        include_usage: whether a stream ends with the tokens used.
        person: whose answer it is.
        started: what the engine said first; for further prompts it says so again.
    """

    chat: bool
    model: str
    n: int
    logprobs: bool
    include_usage: bool
    person: Person
    started: Started
    read: int = field(init=False)
    written: int = 0
    first_token: float | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.read = self.started.prompt_tokens

    def usage(self) -> dict[str, Any]:
        """Tokens. Soft tokens are not counted: no text stands for them."""
        read, written = self.read, self.written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def head(self, chunk: bool) -> dict[str, Any]:
        """What stands in a response beside its choices."""
        if self.chat:
            name, kind = f"chatcmpl-{self.name}", "chat.completion.chunk" if chunk else "chat.completion"
        else:
            name, kind = f"cmpl-{self.name}", "text_completion"
        return {
            "id": name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.person.adapter.revision,
        }

    def seen(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, Delta):
            self.written += event.tokens  # and not at the end, which an answer may not reach
            self.first_token = self.first_token or time.perf_counter()
        elif isinstance(event, Started):
            self.read += event.prompt_tokens


async def whole(reply: Reply, parts: AsyncGenerator[list[Event], None]) -> dict[str, Any]:
    """The response that is not streamed."""
    texts, reasons = [""] * reply.n, ["stop"] * reply.n
    tokens: list[list[Any]] = [[] for _ in range(reply.n)]
    async for events in parts:
        for event in events:
            reply.seen(event)
            if isinstance(event, Delta):
                texts[event.index] += event.text
                # As they come: of a long answer, all at the end would hold up everyone else.
                tokens[event.index] += _chat_rows(event.logprobs) if reply.chat else event.logprobs
            elif isinstance(event, Finished):
                reasons[event.index] = event.reason
    choices = []
    for index, text in enumerate(texts):
        choice: dict[str, Any] = {"index": index, "finish_reason": reasons[index], "logprobs": None}
        if reply.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if reply.logprobs:
            told = tokens[index]
            choice["logprobs"] = {"content": told, "refusal": None} if reply.chat else _text_logprobs(told, 0)
        choices.append(choice)
    return {**reply.head(chunk=False), "choices": choices, "usage": reply.usage(), "e2p": reply.person.told()}


async def frames(
    reply: Reply, parts: AsyncGenerator[list[Event], None], failed: Callable[[Exception], None]
) -> AsyncGenerator[bytes, None]:
    """The response as server-sent events. An error after the start is the last, without [DONE]; ``failed`` hears it.

    What is there at once is sent at once: to hand bytes to the system costs more than to make them.
    """
    offsets = [0] * reply.n
    said = b""
    for index in range(reply.n if reply.chat else 1):
        chunk = _chunk(reply, index, "", role=True)
        said += _frame(chunk if index else {**chunk, "e2p": reply.person.told()})
    try:
        async for events in parts:
            said += b"".join(_frames(reply, events, offsets))
            if said:
                yield said
            said = b""
    except Exception as error:
        failed(error)
        broken = ApiError(500, "internal_error", "something broke here; the operator's log says where")
        yield said + _frame((error if isinstance(error, ApiError) else broken).body())
        return
    usage = {**reply.head(chunk=True), "choices": [], "usage": reply.usage()} if reply.include_usage else None
    yield said + (b"" if usage is None else _frame(usage)) + DONE


def _frames(reply: Reply, events: Iterable[Event], offsets: list[int]) -> Iterator[bytes]:
    """Frames of some events; ``offsets`` are where each answer's text has come to, for log-probabilities."""
    for event in events:
        reply.seen(event)
        if isinstance(event, Delta) and (event.text or event.logprobs):
            logprobs = None
            if reply.logprobs:
                at, tokens = offsets[event.index], event.logprobs
                logprobs = _chat_logprobs(tokens) if reply.chat else _text_logprobs(tokens, at)
                offsets[event.index] += sum(_characters(token.token) for token in tokens)
            yield _frame(_chunk(reply, event.index, event.text, logprobs=logprobs))
        elif isinstance(event, Finished):
            yield _frame(_chunk(reply, event.index, "", reason=event.reason))


def _chunk(
    reply: Reply,
    index: int,
    text: str,
    role: bool = False,
    reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
    if reply.chat:
        choice["delta"] = {"role": "assistant", "content": ""} if role else {} if reason else {"content": text}
    else:
        choice["text"] = text
    usage = {"usage": None} if reply.include_usage else {}
    return {**reply.head(chunk=True), "choices": [choice], **usage}


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    return {"content": _chat_rows(tokens), "refusal": None}


def _chat_rows(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": max(logprob, _LEAST), "bytes": list(token_bytes(token))}

    return [{**one(t.token, t.logprob), "top_logprobs": [one(*pair) for pair in t.top]} for t in tokens]


def _ranked(top: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The likeliest first; of tokens that read alike, the likeliest alone."""
    found: dict[str, float] = {}
    for name, value in top:
        found.setdefault(name, max(value, _LEAST))
    return found


def _characters(token: str) -> int:
    """That begin in a token: the other bytes of UTF-8 look like 10xxxxxx."""
    return sum(byte & 0xC0 != 0x80 for byte in token_bytes(token))


def _text_logprobs(tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    rows = list(tokens)
    offsets = []
    for token in rows:
        offsets.append(offset)
        offset += _characters(token.token)
    return {
        "tokens": [t.token for t in rows],
        "token_logprobs": [max(t.logprob, _LEAST) for t in rows],
        "top_logprobs": [_ranked(t.top) for t in rows],
        "text_offset": offsets,
    }
