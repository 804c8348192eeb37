"""The engine for fleets: vLLM servers hold the backbone, this process what makes it personal.

Here are the tokenizer, phi of every adapter and the table of token embeddings, mapped from the checkpoint; no layers,
and no vLLM either. Requests are checked, tokenised and spliced as of the engine in this process, answers are made into
text by the same code, and between the two lies HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from e2p.config import BackboneConfig
from e2p.config_serving import VLLMConfig
from e2p.errors import ConfigError
from e2p.model.token_table import TokenTable
from e2p.serving.calls import Answer, Call, Limits
from e2p.serving.detokenise import Vocabulary
from e2p.serving.engine import (
    AdapterInfo,
    Delta,
    EngineError,
    Event,
    Finished,
    Reason,
    Request,
    RequestError,
    Started,
    TokenIds,
    prompt_size,
)
from e2p.serving.hf_requests import Served, Shelf
from e2p.serving.vllm_chat import as_trained, begins_turns_alike, chat_bodies
from e2p.serving.vllm_pool import Pool, Unreachable, Upstream
from e2p.serving.vllm_wire import GREEDY, Chunk, chunk_of, embeds_body, how, ids_body

T = TypeVar("T")

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_EVERYTHING = 2**40  # tokens: what a server keeps is its own affair
# Characters of a prompt, what stands around its turns included; numbers of its embeddings: a millisecond's work or two.
_SHORT, _SMALL = 4096, 2**18
# Where soft tokens stand here, others may share what precedes them.
_LATE = ("before_completion", "after_system")


class _OtherTokens(Exception):
    """A server makes other tokens of a chat than training did."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A request that has been found good.

    Args:
        request: as it came.
        served: whom it is for.
        call: its prompt, and how tokens are chosen.
        soft: soft tokens [K, H], or None.
        salt: what tells this user's prompts from others' where nothing else does; empty: of no user.
    """

    request: Request
    served: Served
    call: Call
    soft: Tensor | None
    salt: str


class VLLMEngine:
    """Implements :class:`e2p.serving.engine.Engine`.

    Args:
        backbone: where tokenizer and checkpoint lie here; the servers must hold the same.
        adapters: folders of adapters, or of runs, by the names that requests call them.
        upstreams: addresses of vLLM servers, started with --enable-prompt-embeds.
        config: how they are asked.
        bare: name of the backbone without an adapter.
        key: for the servers' API, or empty.
    """

    def __init__(
        self,
        backbone: BackboneConfig | TokenTable,
        adapters: Mapping[str, str | Path],
        upstreams: Sequence[str],
        config: VLLMConfig | None = None,
        *,
        bare: str = "backbone",
        key: str = "",
    ) -> None:
        if bare in adapters:
            raise ConfigError(f"adapters: expected names other than '{bare}', the bare backbone's; rename one of them")
        self.folders, self.upstreams, self.config = dict(adapters), list(upstreams), config or VLLMConfig()
        self._source, self._bare, self._key = backbone, bare, key
        self._served = Shelf()
        self._limits = Limits(self.config.n, _EVERYTHING)
        self._counts: Counter[str] = Counter()
        self._open = False
        self._running = 0
        self._table: TokenTable
        self._vocabulary: Vocabulary
        self._pool: Pool
        self._encoding = ThreadPoolExecutor(1, "e2p-encode")

    async def start(self) -> None:
        """Load tokenizer, table and adapters, and look at the servers; those that are away may come later.

        Raises:
            BackboneError: the table cannot be loaded.
            AdapterError: an adapter is broken, or of another backbone.
            MissingExtraError: aiohttp is not installed.
        """
        if self._served:
            raise EngineError("expected an engine that was never started, got one that was; make another")

        def load() -> Shelf:
            source = self._source
            self._table = TokenTable.load(source) if isinstance(source, BackboneConfig) else source
            self._vocabulary = Vocabulary(self._table.tokenizer)
            self._alike = begins_turns_alike(self._table.tokenizer)
            served = Shelf()
            served[self._bare] = Served.bare(self._bare, self._table)
            served.update({name: Served.load(name, folder, self._table) for name, folder in self.folders.items()})
            return served

        served = await self._aside(load)
        self._pool = Pool(self.upstreams, self.config, self._table, self._key)
        await self._pool.start()
        self._served, self._open = served, True

    async def stop(self, grace: float) -> None:
        """Finish what runs, for at most so many seconds; new requests get EngineError from now on."""
        was_open, self._open = self._open, False
        self._encoding.shutdown(wait=False)
        if not was_open:
            return
        end = asyncio.get_running_loop().time() + grace
        while self._running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        await self._pool.stop()

    def adapters(self) -> Sequence[AdapterInfo]:
        """What is served, the bare backbone first."""
        return [served.info for served in self._served.values()]

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer; see :meth:`e2p.serving.engine.Engine.generate`."""
        self._require_open()
        served = self._served.pick(request)
        job = await self._aside(partial(self._job, request, served), prompt_size(request.prompt, around=100) <= _SHORT)
        with self._counted():
            tried: list[Upstream] = []
            given = 0
            while True:
                upstream = self._pool.pick(tried)
                told = False
                try:
                    async with aclosing(self._answer(upstream, job)) as events:
                        async for event in events:
                            told = True
                            yield event
                    return
                except EngineError as error:
                    self._counts["failures"] += 1
                    given += not isinstance(error, Unreachable)
                    tried.append(upstream)
                    # Nothing has been said yet, so that another server may say it from the beginning.
                    if told or given >= self.config.attempts or not self._others(tried):
                        raise

    async def reload(self, name: str) -> AdapterInfo:
        """Load an adapter's folder anew; requests that were made keep the old one.

        Raises:
            RequestError: there is no adapter of that name.
            AdapterError: it is broken; the old one stays.
        """
        self._require_open()
        if name not in self.folders:
            names = ", ".join(self.folders) or "none"
            raise RequestError(f"adapter: expected one that can be loaded anew ({names}), got '{name}'")
        new = await self._aside(partial(Served.load, name, self.folders[name], self._table))
        self._served.renew(name, new)
        return new.info

    async def health(self) -> dict[str, Any]:
        """``ready``: at least one server is; figures; and ``servers``, one by one."""
        if not self._served:
            return {"ready": False}
        servers = self._pool.upstreams
        return {
            "ready": self._open and any(server.ready for server in servers),
            "upstreams": len(servers),
            "upstreams_ready": sum(server.ready for server in servers),
            "running": self._pool.running,
            **{name: self._counts[name] for name in ("requests", "prompt_tokens", "completion_tokens", "failures")},
            **{name: self._counts[name] for name in ("sent_bytes", "as_embeddings", "as_chat", "other_tokens")},
            "servers": [
                {
                    "address": server.address,
                    "ready": server.ready,
                    "reason": server.reason,
                    "running": server.running,
                    "failures": server.failures,
                    "shares_prompts": self.config.cache == "prompts" and server.tells,
                    "chat": sorted(server.forms),
                }
                for server in servers
            ],
        }

    # ------------------------------------------------------------------ a request

    def _job(self, request: Request, served: Served) -> _Job:
        call = served.call(request, self._limits)
        soft = call.prefix()
        personal = request.personal
        salt = ""
        if soft is not None:
            vector = b"null" if personal.vector is None else personal.vector.astype("<f4").tobytes()
            said = f"{served.info.name} {served.info.revision} {personal.mode} {personal.strength!r} ".encode()
            salt = hashlib.sha256(said + vector).hexdigest()
        return _Job(request, served, call, soft, salt)

    async def _answer(self, upstream: Upstream, job: _Job) -> AsyncGenerator[Event, None]:
        """One server's events, however the prompt travels there."""
        job = _fitted(job, upstream.window)
        call, doubted = job.call, list[str]()
        ways = self._ways(upstream, job)
        small = len(call.prompt.ids) * self._table.rows.shape[1] <= _SMALL
        refused: Exception = EngineError("expected a way to ask the vLLM server, got none")
        with upstream.working():
            while (way := await self._aside(lambda: next(ways, None), small)) is not None:
                form, body = way
                self._counts["sent_bytes"] += len(body)
                self._counts["as_chat" if form else "as_embeddings"] += job.soft is not None
                told = False
                try:
                    async with aclosing(self._events(upstream, job, form, body)) as events:
                        async for event in events:
                            if not told:  # what was refused before is not tried again there
                                upstream.forms.difference_update(doubted)
                                told = True
                            yield event
                    return
                except (RequestError, _OtherTokens) as error:
                    if told or not form:
                        raise
                    self._counts["other_tokens"] += isinstance(error, _OtherTokens)
                    doubted.append(form)
                    refused = error
        if isinstance(refused, _OtherTokens):
            refused = EngineError("vllm.transport: expected a chat with training's tokens, got others; set it to auto")
        raise refused

    def _ways(self, upstream: Upstream, job: _Job) -> Iterator[tuple[str, bytes]]:
        """Ways to ask a server, the best one first: the form of a chat (empty: none), and the body."""
        request, call, transport = job.request, job.call, self.config.transport
        ids, ends = call.prompt.ids, self._table.ends()
        early = job.served.info.position not in _LATE
        salt = job.salt if early or self.config.cache == "users" or not upstream.tells else ""
        fields = partial(how, call.sampling, upstream.model, ends, salt)
        if job.soft is None:
            yield "", ids_body(ids, fields(chat=False))
            return
        some = False
        if transport != "embeddings":
            late = call.at == len(ids) and not call.prompt.cut and not request.raw and job.served.encoder.plain_as_chat
            prompt = None if isinstance(request.prompt, TokenIds) or not (late and self._alike) else request.prompt
            tokenizer, forms = self._table.tokenizer, set(upstream.forms)
            for way in chat_bodies(tokenizer, prompt, ids, call.at, job.soft, fields(chat=True), forms):
                some = True
                yield way
        if transport != "chat":
            yield "", embeds_body(self._whole(call, job.soft), fields(chat=False))
        elif not some:
            raise RequestError(
                f"vllm.transport: expected a prompt of '{job.served.info.name}' that a chat makes training's tokens "
                "of, got one for which no form does; set it to auto"
            )

    def _whole(self, call: Call, soft: Tensor) -> Tensor:
        embeds = self._table.embed(torch.tensor(call.prompt.ids))
        whole = torch.cat([embeds[: call.at], soft.float(), embeds[call.at :]])
        return whole if self.config.dtype == "float32" else whole.bfloat16()

    async def _events(self, upstream: Upstream, job: _Job, form: str, body: bytes) -> AsyncGenerator[Event, None]:
        call, sampling, info = job.call, job.call.sampling, job.served.info
        ends, vocabulary = frozenset(self._table.ends()), self._vocabulary
        answers = [Answer.of(call, index, vocabulary) for index in range(sampling.n)]
        copies = sampling.n if sampling.temperature < GREEDY else 1
        left, going, started = set(range(sampling.n)), set(range(sampling.n // copies)), False
        read = partial(chunk_of, chat=bool(form), vocabulary=vocabulary, top=sampling.logprobs or 0)
        async with self._pool.post(upstream, _CHAT if form else _TEXT, body) as data, aclosing(data):
            async for event in data:
                chunk: Chunk = read(event)
                if not started:
                    if form and not as_trained(chunk.prompt, call.prompt.ids, call.at, call.prefix_tokens):
                        raise _OtherTokens
                    started = True
                    self._counts["prompt_tokens"] += len(call.prompt.ids)
                    yield Started(len(call.prompt.ids), call.prefix_tokens, info.revision)
                for piece in chunk.pieces:
                    for index in range(copies) if copies > 1 else (piece.answer,):
                        if index not in left:
                            continue
                        for said in _grown(answers[index], piece.tokens, piece.logprobs, piece.reason, ends):
                            if isinstance(said, Finished):
                                left.discard(index)
                                self._counts["completion_tokens"] += said.tokens
                            yield said
                    going -= {piece.answer} if piece.reason else set()
                if not left and going:
                    return  # stop texts are found here: what the server still does is ended with the connection
        if left:
            raise EngineError("expected every answer's end from the vLLM server, got a stream without it; try again")

    # ------------------------------------------------------------------ small things

    def _others(self, tried: Sequence[Upstream]) -> bool:
        return any(upstream.ready and upstream not in tried for upstream in self._pool.upstreams)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._counts["requests"] += 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _require_open(self) -> None:
        if not self._served:
            raise EngineError("expected an engine that has started, got one that has not; wait until it is ready")
        if not self._open:
            raise EngineError("expected an engine that runs, got one that is stopping or has stopped; ask another")

    async def _aside(self, job: Callable[[], T], little: bool = False) -> T:
        """Beside the event loop, one after the other; what is little at once, since a thread's turn takes longer."""
        if little:
            return job()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoding, job)
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            raise EngineError("expected an engine that runs, got one that is stopping; ask another") from None


def _fitted(job: _Job, window: int) -> _Job:
    """With an answer as long as there is room for, where none was asked for. Raises RequestError where none fits."""
    call, sampling = job.call, job.call.sampling
    left = window - call.longest + sampling.max_tokens
    if sampling.shorten and 0 < left < sampling.max_tokens:
        return replace(job, call=replace(call, sampling=replace(sampling, max_tokens=left)))
    if left < sampling.max_tokens:
        raise RequestError(
            f"max_tokens: expected prompt and answer within {window} tokens, which the vLLM server has room for, got "
            f"{call.longest}; lower it, or shorten the prompt"
        )
    return job


def _grown(
    answer: Answer, tokens: Sequence[int], logprobs: Sequence[Any], reason: str, ends: frozenset[int]
) -> Iterator[Delta | Finished]:
    """What new tokens make of an answer, up to its end.

    Raises:
        EngineError: the server gave it up.
    """
    finished = False
    for place, token in enumerate(tokens):
        for said in answer.grow(token, logprobs[place] if logprobs else None, ends):
            finished = isinstance(said, Finished)
            yield said
        if finished:
            return
    if reason:
        if reason not in ("stop", "length"):
            raise EngineError(f"expected an answer's end from the vLLM server, got '{reason}'; try again")
        known: Reason = "stop" if reason == "stop" else "length"
        yield from answer.end(known)
