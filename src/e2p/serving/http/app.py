"""The routes: OpenAI's, users' vectors, and what operators need. Who may, how much and what follows is elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from e2p.config_serving import ServingConfig
from e2p.errors import E2PError
from e2p.serving.engine import Engine, EngineError
from e2p.serving.http import telemetry
from e2p.serving.http.auth import Key, authenticate
from e2p.serving.http.errors import ApiError
from e2p.serving.http.limits import read_body, require_type, stream_body
from e2p.serving.http.openapi import document, errors, json_body, upload_body
from e2p.serving.http.people import iso
from e2p.serving.http.responses import JSON, Edge, on_api_error, on_http_error, record_of
from e2p.serving.http.schemas import MAX_ID, ChatRequest, CompletionRequest, PutEmbedding, parse
from e2p.serving.http.service import Service
from e2p.serving.http.uploads import NDJSON, PARQUET, Report, upload_lines, upload_parquet
from e2p.serving.http.vectors import told
from e2p.users.store import VectorStore

router = APIRouter()


class _Text(PathConvertor):
    """Any text: that of ``path`` leaves out line breaks, and such a user could be neither read nor deleted."""

    regex = "(?s:.*)"


register_url_convertor("text", _Text())


def create_app(
    engine: Engine, store: VectorStore | None = None, config: ServingConfig | None = None, keys: Sequence[Key] = ()
) -> FastAPI:
    """The ASGI application.

    Args:
        engine: started already; it is stopped when the application shuts down.
        store: users' vectors; closed then too. None: only vectors in requests.
        config: settings; default: the defaults.
        keys: who may do what (:func:`e2p.serving.http.auth.read_keys`); empty: everyone who reaches it, everything.
    """
    config = config or ServingConfig()
    service = Service(engine, store, config, keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.stop(config.grace_seconds)
        if store is not None:
            store.close()

    app = FastAPI(title="e2p", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would repeat the path, user id included
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_query)
    app.add_middleware(Edge, service=service)
    return app


async def _on_wrong_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    name = str(error.errors()[0]["loc"][-1])
    return await on_api_error(request, ApiError(400, "invalid_value", f"{name}: expected another value", name))


def service_of(request: Request) -> Service:
    """The parts of the server that got this request."""
    return request.app.state.service


def allowed(scope: str | None) -> Callable[[Request], Awaitable[Key]]:
    """The check of a route's key, which comes before its body is read; None: any key will do."""

    async def check(request: Request) -> Key:
        given = request.headers.getlist("authorization")  # of several, one in front of this server may mean another
        key = authenticate(service_of(request).keys, given[0] if len(given) == 1 else None, scope)
        record_of(request).facts["key"] = key.name
        if "user_id" in request.path_params:
            user = user_in_path(request)
            record_of(request).facts["user"] = user
            key.require_user(user)
        return key

    return check


def user_in_path(request: Request) -> str:
    """The id that a path names. Raises ApiError 400 for one that no request for an answer could name."""
    user: str = request.path_params["user_id"]
    try:
        unquote_to_bytes(request.scope.get("raw_path") or b"").decode()
    except UnicodeDecodeError:  # decoded with U+FFFD in place of such bytes, so that two ids could be one
        said = "user_id: expected UTF-8, percent-encoded, got other bytes"
        raise ApiError(400, "invalid_value", said, "user_id") from None
    if len(user) > MAX_ID:
        said = f"user_id: expected at most {MAX_ID} characters, got {len(user)}"
        raise ApiError(400, "invalid_value", said, "user_id")
    return user


STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
Generates = Annotated[Key, Depends(allowed("generate"))]
Reads = Annotated[Key, Depends(allowed("users:read"))]
Writes = Annotated[Key, Depends(allowed("users:write"))]
Measures = Annotated[Key, Depends(allowed("metrics"))]
Administers = Annotated[Key, Depends(allowed("admin"))]
Holds = Annotated[Key, Depends(allowed(None))]

# ---------------------------------------------------------------- OpenAI's


@router.post(
    "/v1/chat/completions", openapi_extra=json_body(ChatRequest), responses=STREAM | errors(400, 404, 413, 429)
)
async def chat(request: Request, key: Generates) -> Response:
    """Answer messages."""
    service = service_of(request)
    asked = parse(ChatRequest, await read_body(request, service.config.limits))
    return await service.answer(request, record_of(request), key, asked)


@router.post(
    "/v1/completions", openapi_extra=json_body(CompletionRequest), responses=STREAM | errors(400, 404, 413, 429)
)
async def completions(request: Request, key: Generates) -> Response:
    """Continue a text as it stands."""
    service = service_of(request)
    asked = parse(CompletionRequest, await read_body(request, service.config.limits))
    return await service.answer(request, record_of(request), key, asked)


@router.get("/v1/models")
async def models(request: Request, key: Generates) -> Response:
    """Adapters, and the bare backbone."""
    return JSON({"object": "list", "data": [_model(info) for info in service_of(request).engine.adapters()]})


@router.get("/v1/models/{name:path}", responses=errors(404))
async def model(name: str, request: Request, key: Generates) -> Response:
    """One of them."""
    return JSON(_model(service_of(request).adapter(name)))


@router.post("/v1/models/{name:path}/reload", responses=errors(404, 409))
async def reload(name: str, request: Request, key: Administers) -> Response:
    """Load an adapter's folder anew. Requests that run keep the old one; so does everyone where it cannot be loaded."""
    service = service_of(request)
    service.adapter(name)
    try:
        info = await service.engine.reload(name)
    except EngineError as error:
        raise ApiError(503, "engine_unavailable", str(error), headers={"Retry-After": "1"}) from None
    except E2PError as error:
        raise ApiError(409, "not_reloaded", f"the old one is served on: {error}", "name") from None
    return JSON(_model(info))


def _model(info: Any) -> dict[str, Any]:
    about = {
        "dimension": info.dimension,
        "versions": list(info.versions),
        "has_null": info.has_null,
        "revision": info.revision,
        "prefix_tokens": info.prefix_tokens,
        "position": info.position,
    }
    return {"id": info.name, "object": "model", "created": 0, "owned_by": "e2p", "e2p": about}


# ---------------------------------------------------------------- users' vectors


@router.put("/v1/users/{user_id:text}/embedding", openapi_extra=json_body(PutEmbedding), responses=errors(400, 409))
async def put_embedding(user_id: str, request: Request, key: Writes) -> Response:
    """Put a user's vector. An older timestamp replaces nothing; then ``stored`` is false."""
    service = service_of(request)
    row = parse(PutEmbedding, await read_body(request, service.config.limits))
    vector, outcome = await service.vectors.put(user_id, row)
    service.telemetry.vectors.labels(outcome).inc()
    if outcome == "deleted":
        said = f"this user was deleted, and {iso(vector.timestamp)} is not later; put a newer vector"
        raise ApiError(409, "user_deleted", said, "timestamp")
    body = told(vector, service.vectors.now(), numbers=False)
    return JSON({**body, "stored": outcome == "stored", "outcome": outcome})


@router.get("/v1/users/{user_id:text}/embedding", responses=errors(404))
async def get_embedding(
    user_id: str, request: Request, key: Reads, vector: Annotated[bool, Query(description="with its numbers")] = False
) -> Response:
    """A user's vector: time, version, age, and its numbers with ``vector=true``."""
    service = service_of(request)
    return JSON(told(await service.vectors.get(user_id), service.vectors.now(), numbers=vector))


@router.delete("/v1/users/{user_id:text}/embedding", responses=errors(400))
async def delete_embedding(
    user_id: str, request: Request, key: Writes, forget: Annotated[bool, Query(description="keep no trace")] = False
) -> Response:
    """Remove a user. What is not newer than this does not come back."""
    deleted = await service_of(request).vectors.delete(user_id, forget)
    return JSON({"object": "user.embedding.deleted", "user_id": user_id, "deleted": deleted})


@router.post("/v1/users/embeddings", openapi_extra=upload_body(), responses=errors(400, 413, 415, 422, 429))
async def upload(request: Request, key: Writes) -> Response:
    """Put many vectors: NDJSON or Parquet. 422 where rows were left out; the others are in the store."""
    service = service_of(request)
    limits, vectors = service.config.limits, service.vectors
    kind = require_type(request, *NDJSON, *PARQUET)
    vectors.require_store()
    report = Report("line" if kind in NDJSON else "row", vectors.now())
    async with service.uploads.place():
        parts = stream_body(request, limits.upload_bytes, limits.read_seconds)
        try:
            if kind in NDJSON:
                await upload_lines(parts, vectors, key, limits.body_bytes, report)
            else:
                await upload_parquet(parts, vectors, key, report)
        except ApiError as error:  # what was put before stays
            extra = {"e2p": report.told()}
            raise ApiError(error.status, error.code, error.message, error.param, error.headers, extra) from None
        except asyncio.CancelledError:
            request.scope["e2p.report"] = report.told()
            raise
        finally:
            service.telemetry.uploaded(report.counts, report.failed)
    if report.failed:
        said = f"{report.failed} of {report.read} rows are not in the store, the others are; see e2p.errors"
        raise ApiError(422, "rows_failed", said, extra={"e2p": report.told()})
    return JSON(report.told())


# ---------------------------------------------------------------- operators


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Response:
    """The process answers. Needs no key."""
    return JSON({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=errors(503))
async def readyz(request: Request) -> Response:
    """Engine and store can serve. Needs no key, and says nothing else."""
    service = service_of(request)
    ready = bool((await service.engine.health()).get("ready"))
    if ready and service.store is not None:
        await service.vectors.call(service.store.count)
    if not ready:
        raise ApiError(503, "not_ready", "the engine is starting or stopping", headers={"Retry-After": "1"})
    return JSON({"status": "ready"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, key: Measures) -> Response:
    """For Prometheus."""
    service = service_of(request)
    text = service.telemetry.expose(await service.engine.health())
    return Response(text, headers={"content-type": telemetry.CONTENT_TYPE})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, key: Holds) -> Response:
    """The schema of all this."""
    return JSON(document(request.app))
