"""One request in work: places in the queue, whose answer it is, the engine's events; cancelled when nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from starlette.responses import StreamingResponse

from e2p.serving.engine import AdapterInfo, Engine, EngineBusyError, EngineError, Event, Request, RequestError, Started
from e2p.serving.http.errors import ApiError
from e2p.serving.http.limits import Queue, timed_out, while_listening
from e2p.serving.http.people import Person
from e2p.serving.http.telemetry import Record

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_AHEAD = 256  # events that an engine may be ahead of a client that reads slowly
_FRESH, _AGAIN = 0.25, 3  # seconds for which a lookup counts until a prompt has been read; how often it is begun again


class Answer:
    """Events of one request, made by one task from start to end, and by one more for each further prompt.

    The vector is looked up when the place in the queue is had and not before, for each prompt anew; and where the
    engine has let the prompt wait on, once more before anything is said: waiting does not age it. Answers to further
    prompts are counted on: where each prompt gets two, those to the second one are 2 and 3.

    Args:
        engine: who answers.
        places: the queue.
        prepare: finds whose answer it is and makes the engine's requests, one for each prompt; by an adapter as it was,
            or as it is now.
        seconds: for everything, from now on.
    """

    def __init__(
        self,
        engine: Engine,
        places: Queue,
        prepare: Callable[[AdapterInfo | None], Awaitable[tuple[Person, Sequence[Request]]]],
        seconds: float,
    ) -> None:
        self._engine, self._places, self._prepare, self._seconds = engine, places, prepare, seconds
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue(_AHEAD)
        self._person: Person | None = None
        self._task = asyncio.create_task(self._run())

    @property
    def person(self) -> Person:
        """Whose answer it is; known when the first event has come."""
        assert self._person is not None
        return self._person

    async def first(self) -> Started:
        """The start. Raises ApiError."""
        event = await self._next()
        assert isinstance(event, Started)
        if event.revision and self._person is not None:
            adapter = replace(self._person.adapter, revision=event.revision)
            self._person = replace(self._person, adapter=adapter)
        return event

    async def rest(self) -> AsyncGenerator[list[Event], None]:
        """All events after the start, together those that are there already. Raises ApiError."""
        while (event := await self._next()) is not None:
            events = [event]
            while not self._events.empty():
                following = self._events.get_nowait()
                if following is None or isinstance(following, Exception):
                    yield events
                    if following is not None:
                        raise following
                    return
                events.append(following)
            yield events

    async def close(self) -> None:
        """End the work, if it goes on."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _next(self) -> Event | None:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def _run(self) -> None:
        ending: Exception | None = None
        try:
            async with asyncio.timeout(self._seconds), AsyncExitStack() as held:
                await held.enter_async_context(self._places.place())
                self._person, requests = await self._prepare(None)
                if len(requests) == 1:
                    await self._generate(self._person, requests, 0)
                else:
                    async with asyncio.TaskGroup() as tasks:
                        for number in range(1, len(requests)):
                            tasks.create_task(self._also(self._person.adapter, number))
                        await self._generate(self._person, requests, 0)
                        await held.aclose()  # for one of the others, it may be
        except TimeoutError:
            ending = timed_out(self._seconds)
        except ExceptionGroup as errors:
            ending = as_api_error(errors.exceptions[0])
        except Exception as error:
            ending = as_api_error(error)
        await self._events.put(ending)

    async def _also(self, adapter: AdapterInfo, number: int) -> None:
        async with self._places.place(more=True):
            await self._generate(*await self._prepare(adapter), number)

    async def _generate(self, person: Person, requests: Sequence[Request], number: int) -> None:
        """Answer one of the prompts; from the beginning where its vector is another by now."""
        for again in range(_AGAIN, -1, -1):
            looked, request = time.monotonic(), requests[number]
            async with aclosing(self._engine.generate(request)) as events:
                started = await anext(events)
                assert isinstance(started, Started)
                # Its adapter was loaded anew twice meanwhile: another was asked for, or all prompts get the same.
                other = started.revision not in ("", person.adapter.revision)
                if other and (number or not again):
                    raise EngineError("the adapter was loaded anew too often while this waited; try again")
                if other or (again and time.monotonic() - looked > _FRESH):
                    found = await self._another(person, None if other else person.adapter)
                    if found is not None or other:
                        person, requests = found or await self._prepare(None)
                        if not number:
                            self._person = person
                        continue
                await self._events.put(started)
                first = number * request.sampling.n
                async for event in events:
                    if first and not isinstance(event, Started):
                        event = replace(event, index=first + event.index)
                    await self._events.put(event)
                return

    async def _another(self, person: Person, adapter: AdapterInfo | None) -> tuple[Person, Sequence[Request]] | None:
        """What is to be asked where it is not the same as before. A store that is away now was there before."""
        try:
            found, requests = await self._prepare(adapter)
        except ApiError as error:
            if error.code != "store_unavailable":
                raise
            return None
        gone = found.reason.startswith("store_unavailable") and not person.reason.startswith("store_unavailable")
        return None if gone or found.same(person) else (found, requests)


def as_api_error(error: Exception) -> Exception:
    """What a client is told of an engine's error; what was not foreseen stays as it is."""
    if isinstance(error, RequestError):
        return ApiError(400, "invalid_request", str(error))
    if isinstance(error, EngineBusyError):
        return ApiError(429, "queue_full", str(error), headers={"Retry-After": "1"})
    if isinstance(error, EngineError):
        return ApiError(503, "engine_unavailable", str(error), headers={"Retry-After": "1"})
    return error


class EventStream(StreamingResponse):
    """Server-sent events that stop the work behind them as soon as the client is gone.

    Args:
        frames: what is sent.
        close: ends the work.
        record: told when the client goes away.
        seconds: for the whole response, so that a client that does not read is not waited for.
        headers: of the response.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        record: Record,
        seconds: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(frames, media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        self._frames, self._close, self._record, self._seconds = frames, close, record, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await while_listening(receive, self._pump(send))
        except ApiError as error:
            self._record.facts["error"] = error.code
        except TimeoutError:
            self._record.facts["error"] = "deadline"
        finally:
            await self._frames.aclose()
            await self._close()

    async def _pump(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
