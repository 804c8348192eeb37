"""What the routes share: engine, store, keys, limits, metrics; and how one request is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from e2p.config_serving import ServingConfig, is_loopback
from e2p.serving.engine import AdapterInfo, Engine, prompt_size
from e2p.serving.engine import Request as Asked
from e2p.serving.http.answers import Answer, EventStream
from e2p.serving.http.auth import Key
from e2p.serving.http.errors import ApiError
from e2p.serving.http.limits import Queue, while_listening
from e2p.serving.http.people import People, Person
from e2p.serving.http.responses import JSON
from e2p.serving.http.schemas import ChatRequest, CompletionRequest, too_much
from e2p.serving.http.streams import Reply, frames, whole
from e2p.serving.http.telemetry import Record, Telemetry
from e2p.serving.http.vectors import Vectors
from e2p.users.store import VectorStore

_SLACK = 10.0  # seconds that a stream may last beyond its work, for a client that reads slowly


@dataclass(eq=False)
class Service:
    """One server's parts.

    Args:
        engine: who generates; started.
        store: users' vectors, or None.
        config: settings.
        keys: who may ask; empty: everyone.
    """

    engine: Engine
    store: VectorStore | None
    config: ServingConfig
    keys: Sequence[Key]
    queue: Queue = field(init=False)
    uploads: Queue = field(init=False)
    telemetry: Telemetry = field(init=False)
    people: People = field(init=False)
    vectors: Vectors = field(init=False)

    def __post_init__(self) -> None:
        limits = self.config.limits
        self.queue = Queue(limits.running, limits.waiting)
        self.uploads = Queue(limits.uploads, 0)
        gauges = {"running": lambda: float(self.queue.held), "waiting": lambda: float(self.queue.waits)}
        self.telemetry = Telemetry(self.config.log_users, gauges)
        trouble = self.telemetry.trouble
        self.people = People(self.store, self.config.policies, self.telemetry.lookup, trouble)
        self.vectors = Vectors(self.store, self._dimensions, limits.ahead_seconds, trouble=trouble)

    def adapter(self, name: str) -> AdapterInfo:
        """The adapter of a name. Raises ApiError 404."""
        for info in self.engine.adapters():
            if info.name == name:
                return info
        known = ", ".join(info.name for info in self.engine.adapters())
        raise ApiError(404, "model_not_found", f"model: expected one of {known}; got another", "model")

    def trusts(self, host: str) -> bool:
        """Whether a request without a key may name this host.

        A page in a browser on this machine reaches a server on it by a name of its own that points here; then the
        browser says that name.
        """
        if self.keys or self.config.insecure:
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return is_loopback(name)

    async def answer(self, http: Request, record: Record, key: Key, asked: ChatRequest | CompletionRequest) -> Response:
        """Answer a request, whole or as a stream. Raises ApiError."""
        limits, chat = self.config.limits, isinstance(asked, ChatRequest)
        if asked.user is not None:
            record.facts["user"] = asked.user
            key.require_user(asked.user)
        prompts, sampling = asked.prompts(), asked.sampling(limits)
        if len(prompts) > limits.prompts:
            raise too_much("prompt", limits.prompts, len(prompts))
        size = sum(map(prompt_size, prompts))
        if size > limits.prompt_chars:
            raise too_much("messages" if chat else "prompt", limits.prompt_chars, size)
        self.adapter(asked.model)

        async def prepare(adapter: AdapterInfo | None) -> tuple[Person, list[Asked]]:
            info = adapter or self.adapter(asked.model)
            person = await self.people.person(asked.user, asked.e2p, info)
            make = partial(Asked, personal=person.personal, sampling=sampling, raw=not chat, revision=info.revision)
            return person, [make(asked.model, each) for each in prompts]

        work = Answer(self.engine, self.queue, prepare, limits.seconds)
        try:
            started = await while_listening(http.receive, work.first())
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            told = sampling.logprobs is not None
            reply = Reply(chat, asked.model, sampling.n * len(prompts), told, usage, work.person, started)
            record.facts |= {"adapter": asked.model, "arm": work.person.arm, "reason": work.person.reason}
            if asked.stream:

                async def close() -> None:
                    await work.close()
                    self._count(reply, record)

                events = frames(reply, work.rest(), lambda error: self._failed(record, error))
                return EventStream(events, close, record, limits.seconds + _SLACK, work.person.headers())
            body = await while_listening(http.receive, whole(reply, work.rest()))
            self._count(reply, record)
            return JSON(body, headers=work.person.headers())
        except BaseException:
            await asyncio.shield(work.close())
            raise

    def _failed(self, record: Record, error: Exception) -> None:
        record.facts["error"] = error.code if isinstance(error, ApiError) else "internal_error"
        if not isinstance(error, ApiError):
            self.telemetry.failed(record, error)

    def _count(self, reply: Reply, record: Record) -> None:
        name, person, metrics = reply.person.adapter.name, reply.person, self.telemetry
        metrics.answers.labels(name, person.arm, person.reason).inc()
        metrics.tokens.labels(name, "prompt").inc(reply.read)
        metrics.tokens.labels(name, "completion").inc(reply.written)
        if reply.first_token is not None:
            metrics.first.labels(name).observe(reply.first_token - record.started)
        record.facts |= {"prompt_tokens": reply.read, "completion_tokens": reply.written}

    def _dimensions(self) -> list[int]:
        return [info.dimension for info in self.engine.adapters()]
