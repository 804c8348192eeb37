"""A page within the server: it asks the API as clients do, and the door in front of the page's own routes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from e2p.config_serving import LimitsConfig
from e2p.serving.http.errors import ApiError
from e2p.serving.http.limits import require_type, stream_body

PAGE = "/playground"
# Of all that Gradio answers, what its page asks for. Uploads, files, proxies, its own API, sessions of other
# processes, monitoring: not there.
OPEN = {
    "GET": re.compile(r"/|/theme\.css|/(assets|static)/[\w./-]+|/gradio_api/queue/data"),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel)"),
}
_HEADERS = {
    # The browser itself asks nobody but this server. Gradio's page has scripts within it and builds some from text.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Door:
    """Lets through what the page needs, in the size that the API takes, from the page alone.

    It asks for no key: what lies behind it tells nothing, and every function behind the page asks for the key.

    Args:
        app: Gradio's application.
        limits: of a body.
    """

    def __init__(self, app: Any, limits: LimitsConfig) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(scope["root_path"]) or "/"
        scope["route"] = SimpleNamespace(path=PAGE)  # for log and metrics; the path may hold a session's name
        allowed = OPEN.get(scope["method"])
        if allowed is None or not allowed.fullmatch(path) or ".." in path:
            raise ApiError(404, "not_found", "no such path; see /openapi.json")
        if scope["method"] == "POST":
            receive = await self._whole(Request(scope, receive), receive)
        # What a query can say to the page itself, such as an old state to load, is not needed.
        query = scope["query_string"] if path.startswith("/gradio_api") else b""

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                mine = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *mine]}
            await send(message)

        await self.app({**scope, "query_string": query}, receive, answer)

    async def _whole(self, request: Request, receive: Any) -> Any:
        """The body, read under the API's limits. Raises ApiError; also 403 for another page's request."""
        require_type(request, "application/json")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise ApiError(403, "origin_not_allowed", "another page may not use this one")
        parts = [part async for part in stream_body(request, self.limits.body_bytes, self.limits.read_seconds)]
        messages = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        return again


async def events(
    app: Any, path: str, body: dict[str, Any], authorization: str | None
) -> AsyncGenerator[dict[str, Any], None]:
    """A streamed answer of the application itself, asked as a client would ask: same checks, policies, limits and log.

    Closing the generator is what a client does who goes away: it ends the work.

    Args:
        app: the whole application.
        path: a route that streams.
        body: with ``stream``.
        authorization: the client's header of this name.

    Raises:
        ApiError: the response, or an event of it, is an error.
    """
    content = json.dumps(body).encode()
    given = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
    given |= {"authorization": authorization} if authorization else {}
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None},
        **{"server": ("localhost", None), "headers": Headers(given).raw},
    }
    unread = [{"type": "http.request", "body": content, "more_body": False}]
    gone, sent = asyncio.Event(), asyncio.Queue[dict[str, Any] | None]()

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        status, rest = 500, b""
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                status = message["status"]
                continue
            rest += message.get("body", b"")
            while status == 200 and b"\n\n" in rest:
                frame, _, rest = rest.partition(b"\n\n")
                if frame != b"data: [DONE]":
                    yield _checked(200, json.loads(frame.removeprefix(b"data: ")))
        if status != 200:
            _checked(status, json.loads(rest or b"{}"))
    finally:
        gone.set()
        await asyncio.gather(task, return_exceptions=True)


def _checked(status: int, value: dict[str, Any]) -> dict[str, Any]:
    if status == 200 and "error" not in value:
        return value
    error = value.get("error") or {"code": "internal_error", "message": "something broke here"}
    raise ApiError(status, error["code"], error["message"], error.get("param"))
