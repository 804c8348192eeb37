"""Errors in the form of OpenAI's API: status, message, type, param, code. Loads no web framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        code: a word that programs can tell apart.
        message: expected, got, what to do.
        param: field of the request that is at fault.
        headers: such as Retry-After.
        extra: fields that stand beside ``error`` in the body.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The response's body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **self.extra}
