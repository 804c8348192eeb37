"""What operators see: Prometheus metrics and one log line for each request. No prompt, no vector, no user id."""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from e2p.errors import StoreError
from e2p.users.store import PutCounts

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_QUIET = 10.0
_RECORD = re.compile(r"the record of .*(?= is damaged)", re.DOTALL)  # names a user
_AGES = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400, 365 * 86400)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(eq=False)
class Record:
    """One request, as the log and the metrics tell it.

    Args:
        request_id: drawn here; a client's own could be anything.
        method: of HTTP.
        route: the template, such as /v1/users/{user_id}/embedding, and never the path.
        status: of the response; 499: the client went away.
        facts: adapter, arm, tokens and the like.
    """

    request_id: str
    method: str
    route: str = "none"
    status: int = 500
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.started


class Telemetry:
    """Metrics of one server, in a registry of its own.

    Args:
        log_users: whether the log may name users.
        gauges: name -> what it is now, read when metrics are asked for.
    """

    def __init__(self, log_users: bool, gauges: dict[str, Callable[[], float]]) -> None:
        self.log_users = log_users
        self._troubles: dict[str, float] = {}
        self.log = logging.getLogger("e2p.serving")
        self.registry = CollectorRegistry()
        many: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("e2p_requests", "Requests.", ["route", "method", "status"], **many)
        self.seconds = Histogram(
            "e2p_request_seconds", "From a request to the end of its response.", ["route"], buckets=_SECONDS, **many
        )
        self.answers = Counter("e2p_answers", "Answers by what served them.", ["adapter", "arm", "reason"], **many)
        self.tokens = Counter("e2p_tokens", "Tokens read and written.", ["adapter", "kind"], **many)
        self.first = Histogram(
            "e2p_first_token_seconds", "From a request to its first token.", ["adapter"], buckets=_SECONDS, **many
        )
        self.lookups = Counter("e2p_lookups", "Lookups of a user's vector.", ["outcome"], **many)
        self.age = Histogram("e2p_vector_age_seconds", "Age of the vectors found.", buckets=_AGES, **many)
        self.vectors = Counter("e2p_vectors", "Vectors put, by what became of them.", ["outcome"], **many)
        self.engine = Gauge("e2p_engine", "What the engine says of itself.", ["figure"], **many)
        for name, read in gauges.items():
            Gauge(f"e2p_{name}", f"Requests that are {name} now.", **many).set_function(read)

    def lookup(self, outcome: str, age: float | None) -> None:
        """A user's vector was looked up."""
        self.lookups.labels(outcome).inc()
        if age is not None:
            self.age.observe(max(0.0, age))

    def uploaded(self, counts: PutCounts, failed: int) -> None:
        """Many vectors were put, some of them not."""
        for outcome in ("stored", "unchanged", "older", "deleted"):
            self.vectors.labels(outcome).inc(getattr(counts, outcome))
        self.vectors.labels("failed").inc(failed)

    def done(self, record: Record) -> None:
        """A request is at its end."""
        self.requests.labels(record.route, record.method, str(record.status)).inc()
        self.seconds.labels(record.route).observe(record.seconds())
        user = record.facts.pop("user", None)
        facts = record.facts | ({"user": user} if self.log_users and user is not None else {})
        line = {
            "time": datetime.now(UTC),
            "request_id": record.request_id,
            "route": record.route,
            "method": record.method,
            "status": record.status,
            "seconds": round(record.seconds(), 6),
            **facts,
        }
        self.log.info(orjson.dumps(line, default=str).decode())

    def failed(self, record: Record, error: BaseException) -> None:
        """Something broke: its kind and where, but not its message, which may quote what was asked."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        line = {"time": datetime.now(UTC), "request_id": record.request_id, "error": type(error).__name__, "at": where}
        self.log.error(orjson.dumps(line).decode())

    def trouble(self, error: StoreError) -> None:
        """The store cannot be used: why, as no response says it; the same reason once in ten seconds."""
        reason, now = _RECORD.sub("a record", str(error)), time.monotonic()
        if now - self._troubles.get(reason, -_QUIET) < _QUIET:
            return
        self._troubles = {why: at for why, at in self._troubles.items() if now - at < _QUIET} | {reason: now}
        self.log.error(orjson.dumps({"time": datetime.now(UTC), "error": "store", "reason": reason}).decode())

    def expose(self, health: dict[str, Any]) -> bytes:
        """All metrics in Prometheus's text form, with the numbers out of the engine's health."""
        for name, value in health.items():
            if isinstance(value, bool | int | float):
                self.engine.labels(name).set(float(value))
        return generate_latest(self.registry)
