"""A server that speaks vLLM's HTTP and has no model: it tells what it was asked, fails as it is told, and dies.

Its answer to a prompt is a few tokens drawn from a hash of the prompt's embeddings, so that every user gets another.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2p.model.token_table import TokenTable
from e2p.serving.vllm_wire import PLACEHOLDER

SOFT = 99_999  # what it calls a soft token's place


@dataclass(eq=False)
class FakeVLLM:
    """One server on this machine, in the test's own event loop.

    Args:
        table: the backbone's embeddings.
        name: of its model.
        window: longest prompt and answer.
        trusts: takes chat templates in requests.
        forgets: keeps prompts without telling embeddings apart, as a server must not.
        other: makes other tokens of chats than training did.
        delay: seconds before each token.

    Attributes:
        plans: what becomes of the next requests for an answer: ``status 500``, ``cut 2`` (after two tokens),
            ``end 2`` (the same in order), ``stall 2``, ``error 2`` (an error's event), ``hang up``.
        asked: bodies of these requests, with their route.
        gone: requests whose caller went away before the end.
    """

    table: TokenTable
    name: str = "backbone"
    window: int = 192
    trusts: bool = False
    forgets: bool = False
    other: bool = False
    delay: float = 0.0
    port: int = 0
    plans: deque[str] = field(default_factory=deque)
    asked: list[dict[str, Any]] = field(default_factory=list)
    looks: int = 0
    gone: int = 0
    running: int = 0
    most: int = 0
    key: str = ""
    health: int = 200
    _server: Any = None
    _writers: set[Any] = field(default_factory=set)
    _kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> FakeVLLM:
        """Listen; again at the same port after :meth:`die`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def die(self) -> None:
        """As by kill -9: nobody listens, and every connection breaks."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._kept.clear()
        await asyncio.sleep(0)

    def answer(self, prompt: Tensor, seed: Any = None) -> list[int]:
        """Tokens of its answer to a prompt's embeddings."""
        text = np.round(prompt.float().numpy(), 2) + 0.0
        digest = hashlib.sha256(text.astype("<f4").tobytes() + str(seed).encode()).digest()
        return [10 + byte % 250 for byte in digest[:6]]

    # ------------------------------------------------------------------ HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    lines = head.split("\r\n")
                    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                    body = await reader.readexactly(int(headers.get("content-length", 0)))
                    await self._route(lines[0].split(" ")[1], headers, body, writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _route(self, route: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        if self.key and route != "/health" and headers.get("authorization") != f"bearer {self.key}".lower():
            return await _whole(writer, 401, {"error": "Unauthorized"})
        if route == "/health":
            self.looks += 1
            return await _whole(writer, self.health, {})
        if route == "/v1/models":
            return await _whole(writer, 200, {"data": [{"id": self.name, "max_model_len": self.window}]})
        asked = json.loads(body)
        if not asked["stream"]:
            return await _whole(writer, 200, self._looked_through(asked))
        self.asked.append({"route": route, **asked})
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._stream(route, asked, writer)
        except ConnectionError:
            self.gone += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, route: str, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        plan, _, number = (self.plans.popleft() if self.plans else "").partition(" ")
        if plan == "status":
            return await _whole(writer, int(number), {"error": {"message": f"told to say {number}"}})
        if plan == "hang":
            writer.transport.abort()
            raise ConnectionResetError
        chat = route == "/v1/chat/completions"
        if "chat_template" in asked and not self.trusts:
            return await _whole(writer, 400, {"error": {"message": "untrusted chat template"}})
        prompt, ids = self._chat(asked) if chat else (self._prompt(asked), None)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if chat:
            await _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "prompt_token_ids": ids})
        ends = asked["stop_token_ids"]
        count = 0
        rows = [self.answer(prompt, asked.get("seed") if asked["temperature"] else None) for _ in range(asked["n"])]
        for step in range(7):
            for index, row in enumerate(rows):
                if plan in ("cut", "end", "stall", "error") and count == int(number):
                    if plan == "stall":
                        await writer.drain()
                        await asyncio.sleep(60)
                    if plan == "error":
                        await _event(writer, {"error": {"message": "EngineCore died", "code": 500}})
                    if plan == "end":
                        writer.write(b"0\r\n\r\n")
                    writer.close()
                    return
                if step >= min(7, asked["max_tokens"]):
                    continue
                count += 1
                await asyncio.sleep(self.delay)
                token = row[step] if step < 6 else ends[0]
                last = "stop" if step == 6 else "length" if step + 1 == asked["max_tokens"] else None
                choice: dict[str, Any] = {"index": index, "token_ids": [token], "finish_reason": last}
                if asked.get("logprobs") is not None:
                    choice["logprobs"] = _logprobs(token, step, asked, chat)
                await _event(writer, {"choices": [choice]})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    # ------------------------------------------------------------------ prompts

    def _prompt(self, asked: dict[str, Any]) -> Tensor:
        if "prompt" in asked:
            return self.table.embed(torch.tensor(asked["prompt"]))
        found = _unpacked(asked["prompt_embeds"])
        if self.forgets:
            return self._kept.setdefault(len(found), found)
        return found

    def _chat(self, asked: dict[str, Any]) -> tuple[Tensor, list[int]]:
        softs: list[Tensor] = []
        messages = []
        for message in asked["messages"]:
            content = message["content"]
            if isinstance(content, list):
                softs += [_unpacked(part["data"]) for part in content]
                content = PLACEHOLDER
            messages.append({"role": message["role"], "content": content})
        if "chat_template" in asked:
            text = "".join(message["content"] for message in messages)
        else:
            text = self.table.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        before, after = (
            self.table.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(PLACEHOLDER)
        )
        if self.other:
            before = [5, *before]
        rows = [self.table.embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, after)]
        return torch.cat([rows[0], softs[0], rows[1]]), [*before, *[SOFT] * len(softs[0]), *after]

    def _looked_through(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The likeliest next tokens, some of which the last token decides and some the whole prompt."""
        digest = self.answer(self._prompt(asked))
        best = {f"token_id:{token}": -1.0 - place for place, token in enumerate(digest[:5])}
        return {"choices": [{"index": 0, "logprobs": {"top_logprobs": [best]}}]}


def _unpacked(text: str) -> Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


def _logprobs(token: int, step: int, asked: dict[str, Any], chat: bool) -> dict[str, Any]:
    """The token at -(step + 1) / 10, others less likely by 1 each, in no order."""
    best = [(f"token_id:{token}", -(step + 1) / 10), *((f"token_id:{30 + i}", -i - 1.0) for i in range(3))]
    count = asked["top_logprobs"] if chat else asked["logprobs"]
    best = best[: max(count, 1)][::-1]
    if chat:
        told: Sequence[Any] = [{"token": name, "logprob": value} for name, value in best]
        return {"content": [{"token": f"token_id:{token}", "logprob": -(step + 1) / 10, "top_logprobs": told}]}
    return {"tokens": [f"token_id:{token}"], "token_logprobs": [-(step + 1) / 10], "top_logprobs": [dict(best)]}


async def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    data = b"data: " + json.dumps(value).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()


async def _whole(writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body)))
    writer.write(body)
    await writer.drain()
