"""The OpenAPI document. Routes read their bodies themselves, after the key was checked, so bodies are told here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import e2p.serving.http.schemas as schemas
from e2p.serving.http.uploads import NDJSON, PARQUET

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (
    schemas.ChatRequest,
    schemas.CompletionRequest,
    schemas.PutEmbedding,
    schemas.UploadRow,
)
_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
        }
    },
}


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route with a JSON body."""
    ref = {"schema": {"$ref": _REF.format(model=kind.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": ref}}}


def upload_body() -> dict[str, Any]:
    """``openapi_extra`` of the bulk upload."""
    kinds = {kind: {"schema": {"type": "string"}} for kind in NDJSON}
    kinds |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in PARQUET}
    return {"requestBody": {"required": True, "content": kinds}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: errors that are its own, and those that any may have."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {status: {"description": "an error in OpenAI's form", "content": content} for status in statuses}


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title="e2p", version="1", routes=app.routes)
        _, made = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_REF)
        parts = found.setdefault("components", {})
        parts["schemas"] = {"Error": _ERROR, **made["$defs"]}
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in found["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]  # FastAPI's own, which is an error 400 here
                operation["responses"]["default"] = errors(0)[0]
        app.openapi_schema = found
    return app.openapi_schema
