"""What a request may cost: size and pace of its body, a place in the queue, time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from e2p.config_serving import LimitsConfig
from e2p.serving.http.errors import ApiError

T = TypeVar("T")
_PACE = 1024  # bytes a second, which a body may be ``read_seconds`` behind


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """The body, refused as soon as it is too large or too late. Raises ApiError 408, 413, 415 or 499."""
    require_type(request, "application/json")
    try:
        async with asyncio.timeout(limits.seconds):
            parts = [part async for part in stream_body(request, limits.body_bytes, limits.read_seconds)]
    except TimeoutError:
        raise too_slow(f"took more than {limits.seconds:g} seconds") from None
    return b"".join(parts)


async def stream_body(request: Request, limit: int, pause: float) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        ApiError: 413 beyond ``limit`` bytes; 408 after a pause of so many seconds, or where all pauses together are so
            much more than 1 KiB a second would make: who sends a byte now and then would else stay for ever.
    """
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > limit:
        raise too_large(limit)
    size, waited, stream = 0, 0.0, request.stream()
    while True:
        start = time.monotonic()
        try:
            part = await asyncio.wait_for(anext(stream), min(pause, pause + size / _PACE - waited))
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise too_slow(f"paused for more than {pause:g} seconds, or came slower than 1 KiB a second") from None
        except ClientDisconnect:
            raise client_gone() from None
        size, waited = size + len(part), waited + time.monotonic() - start
        if size > limit:
            raise too_large(limit)
        if part:
            yield part


def require_type(request: Request, *types: str) -> str:
    """The body's content type. Raises ApiError 415 for another: a web page may send a plain text anywhere unasked."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in types:
        raise ApiError(415, "unsupported_media_type", f"content-type: expected {' or '.join(types)}")
    return found


def too_large(limit: int) -> ApiError:
    """Error 413. The rest of the body is not read, so the connection ends."""
    said = f"expected a body of at most {limit:,} bytes, got more; send less at once"
    return ApiError(413, "body_too_large", said, headers={"Connection": "close"})


def too_slow(what: str) -> ApiError:
    """Error 408. The rest of the body is not read, so the connection ends."""
    return ApiError(408, "body_timeout", f"the body {what}; send it again", headers={"Connection": "close"})


def client_gone() -> ApiError:
    """For the log alone: nobody is there to read it."""
    return ApiError(499, "client_gone", "the client went away")


@dataclass(eq=False)
class Queue:
    """At most ``running`` requests go on at once, and at most ``waiting`` wait for that.

    Args:
        running: places.
        waiting: who may wait.
    """

    running: int
    waiting: int
    held: int = field(default=0, init=False)
    waits: int = field(default=0, init=False)
    _seconds: float = field(default=1.0, init=False)  # a running mean of how long a place is held

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.running)

    @asynccontextmanager
    async def place(self, more: bool = False) -> AsyncIterator[None]:
        """Hold a place. Raises ApiError 429 with Retry-After where too many wait already.

        Args:
            more: for who has been let in already and does more at once, such as another prompt of one request.
        """
        if self._places.locked() and self.waits >= self.waiting and not more:
            said = f"{self.held} requests are running and {self.waits} are waiting; try again later"
            raise ApiError(429, "queue_full", said, headers={"Retry-After": str(self.retry_after())})
        self.waits += 1
        try:
            await self._places.acquire()
        finally:
            self.waits -= 1
        self.held += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.held -= 1
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            self._places.release()

    def retry_after(self) -> int:
        """Seconds until a place may be free, by how long places were held of late; 1 to 60."""
        return min(60, max(1, math.ceil(self._seconds * (self.waits + 1) / self.running)))


def timed_out(seconds: float) -> ApiError:
    """Error 504: the answer took too long."""
    return ApiError(504, "deadline", f"no whole answer within {seconds:g} seconds; ask for fewer tokens or try again")


async def while_listening(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """Do the work unless the client goes away first, which cancels it. Raises ApiError 499 then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
