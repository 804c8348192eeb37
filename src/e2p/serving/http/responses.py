"""Responses in JSON, errors among them, and the edge of the server, where every request is counted and told."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import TYPE_CHECKING, Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from e2p.serving.http.errors import ApiError
from e2p.serving.http.telemetry import Record

if TYPE_CHECKING:
    from e2p.serving.http.service import Service

_CODES = {404: "not_found", 405: "method_not_allowed"}


class JSON(Response):
    """A body in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def record_of(request: Request) -> Record:
    """What is kept of this request for log and metrics."""
    return request.scope["e2p.record"]


async def on_api_error(request: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    assert isinstance(error, ApiError)
    record_of(request).facts.setdefault("error", error.code)
    # OpenAI's client sends a request again at 409, which here would say the same again.
    again = {"x-should-retry": "false"} if error.status == 409 else {}
    return JSON(error.body(), error.status, headers={**error.headers, **again})


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    if error.status_code == 404:
        said = "no such path; see /openapi.json"
    elif error.status_code == 405:
        said = f"{request.method}: this path does not take this method; see /openapi.json"
    else:
        said = "this request cannot be understood"
    headers = {k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"}
    return await on_api_error(request, ApiError(error.status_code, code, said, headers=headers))


class Edge:
    """The outermost ASGI layer: a record of every request, an id for it, and an answer where something breaks."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        record = Record(f"req_{uuid.uuid4().hex}", scope["method"] if scope["method"] in _METHODS else "other")
        scope["e2p.record"] = record
        started = False

        async def answer(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", record.request_id.encode())]}
            await send(message)

        try:
            host = _header(scope["headers"], b"host")
            if not self.service.trusts(host):
                raise ApiError(403, "host_not_allowed", "without keys, this server answers to localhost alone")
            origin = _header(scope["headers"], b"origin")
            if origin and not self.service.trusts(origin.partition("://")[2]):
                raise ApiError(403, "origin_not_allowed", "without keys, this server answers to no page from elsewhere")
            if scope["path"].endswith("\n"):  # a route's end matches before it as well
                raise ApiError(404, "not_found", "no such path; see /openapi.json")
            await self.app(scope, receive, answer)
        except ApiError as error:
            record.facts.setdefault("error", error.code)
            if not started:
                await JSON(error.body(), error.status, headers=dict(error.headers))(scope, receive, answer)
        except asyncio.CancelledError:  # the server's, which stops and has waited long enough: no error of ours
            stopping = ApiError(503, "stopping", "this server stops; try again", headers={"Retry-After": "1"})
            record.facts["error"] = stopping.code
            if (report := scope.get("e2p.report")) is not None:  # of an upload: what is in the store already
                stopping = ApiError(stopping.status, stopping.code, stopping.message, headers=stopping.headers,
                                    extra={"e2p": report})  # fmt: skip
            if not started:
                await JSON(stopping.body(), 503, headers=dict(stopping.headers))(scope, receive, answer)
        except Exception as error:
            self.service.telemetry.failed(record, error)
            record.facts["error"] = "internal_error"
            if not started:
                broken = ApiError(500, "internal_error", "something broke here; the operator's log says where")
                await JSON(broken.body(), 500)(scope, receive, answer)
        finally:
            record.route = _KIND.sub("}", getattr(scope.get("route"), "path", "none"))
            self.service.telemetry.done(record)


_KIND = re.compile(r":\w+}")  # of a part of a route's path
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


def _header(headers: Any, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
