"""From a request to whose answer it is: the stored vector or the request's own, policies, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

import anyio
import numpy as np

from e2p.config_serving import PoliciesConfig
from e2p.errors import DataError, StoreError
from e2p.serving.engine import AdapterInfo, Personal
from e2p.serving.http.errors import ApiError
from e2p.serving.http.schemas import Personalisation
from e2p.users.store import StoredVector, VectorStore

Arm = Literal["e2p", "null", "none"]
_LOOKUPS_AT_ONCE = 64
_MESSAGES = {
    "no_user": 'expected a user, as user: "u123" or e2p.vector, got neither',
    "unknown_user": "the store holds no vector of this user; PUT one first",
    "old_vector": "this user's vector is older than policies.max_age_seconds; PUT a new one",
    "other_version": "this user's vector is of another version than the adapter was trained with; PUT one of the right",
    "other_dimension": "this user's vector has another dimension than the adapter takes; name another model",
    "store_unavailable": "the store of user vectors cannot be read now; try again",
}
_STATUS = {"no_user": 400, "unknown_user": 404, "store_unavailable": 503}


@dataclass(frozen=True)
class VectorInfo:
    """Where a vector came from, without its numbers."""

    source: Literal["store", "request"]
    version: str
    timestamp: datetime | None = None
    age_seconds: float | None = None

    def told(self) -> dict[str, Any]:
        """As a response has it."""
        return {
            "source": self.source,
            "version": self.version,
            "timestamp": None if self.timestamp is None else iso(self.timestamp),
            "age_seconds": None if self.age_seconds is None else round(self.age_seconds, 3),
        }


@dataclass(frozen=True)
class Person:
    """Whose answer it is to be, and what the response says of that.

    Args:
        personal: what the engine is asked.
        arm: e2p, null or none.
        adapter: which.
        vector: what is known of the vector that is used, or that a policy set aside.
        reason: why it is not the user's own answer; empty if it is.
    """

    personal: Personal
    arm: Arm
    adapter: AdapterInfo
    vector: VectorInfo | None = None
    reason: str = ""

    def same(self, other: Person) -> bool:
        """Whether the same is asked of the engine, for the same reason, by the same state of the vector."""
        mine, its = (
            (one.arm, one.reason, one.adapter.revision, one.personal.mode, one.personal.strength,
             one.vector and replace(one.vector, age_seconds=None))
            for one in (self, other)
        )  # fmt: skip
        vectors = (self.personal.vector, other.personal.vector)
        return mine == its and (vectors[0] is vectors[1] or np.array_equal(*vectors))  # type: ignore[arg-type]

    def told(self) -> dict[str, Any]:
        """The field ``e2p`` of a response."""
        return {
            "arm": self.arm,
            "adapter": self.adapter.name,
            "adapter_revision": self.adapter.revision,
            "vector": None if self.vector is None else self.vector.told(),
            "strength": self.personal.strength if self.arm == "e2p" else None,
            "reason": self.reason or None,
        }

    def headers(self) -> dict[str, str]:
        """The same as headers; what is not plain ASCII is percent-encoded."""
        values = {"arm": self.arm, "adapter": self.adapter.name, "adapter-revision": self.adapter.revision}
        if self.vector is not None:
            values["vector-version"] = self.vector.version
            if self.vector.age_seconds is not None:
                values["vector-age"] = f"{self.vector.age_seconds:.3f}"
        if self.reason:
            values["reason"] = self.reason
        return {f"x-e2p-{name}": quote(value, safe="/:,") for name, value in values.items()}


@dataclass(eq=False)
class People:
    """Users and policies. Holds no copy of a vector: what was put or deleted counts for the very next request.

    Args:
        store: where vectors are, or None.
        policies: who answers where a vector cannot.
        seen: told of every lookup: its outcome and the vector's age in seconds.
        trouble: told why the store could not be read.
        now: the time.
    """

    store: VectorStore | None
    policies: PoliciesConfig
    seen: Callable[[str, float | None], None] = lambda outcome, age: None
    trouble: Callable[[StoreError], None] = lambda error: None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _limiter: anyio.CapacityLimiter | None = field(default=None, init=False)

    async def person(self, user: str | None, asked: Personalisation | None, adapter: AdapterInfo) -> Person:
        """Who it is.

        Raises:
            ApiError: the request contradicts itself or the adapter, or a policy says error.
        """
        asked = asked or Personalisation.model_validate({})
        _require_sense(asked, adapter)
        if asked.arm != "e2p":
            return Person(Personal(asked.arm), asked.arm, adapter, reason="asked")
        if not adapter.dimension:
            return Person(Personal("none"), "none", adapter, reason="bare_model")
        if asked.vector is not None:
            vector = np.asarray(asked.vector, np.float32)
            return self._user(vector, VectorInfo("request", asked.version or ""), asked, adapter)
        if user is None:
            return self._policy("no_user", self.policies.no_user, adapter)
        return await self._stored(user, asked, adapter)

    async def find(self, user: str) -> StoredVector | None:
        """The user's vector. In a thread, since a store may have to read a disk or ask another machine."""
        if self.store is None:
            return None
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_LOOKUPS_AT_ONCE)
        return await anyio.to_thread.run_sync(self.store.get, user, limiter=self._limiter)

    async def _stored(self, user: str, asked: Personalisation, adapter: AdapterInfo) -> Person:
        rules = self.policies
        try:
            found = await self.find(user)
        except StoreError as error:
            self.seen("error", None)
            self.trouble(error)
            return self._policy("store_unavailable", rules.store_unavailable, adapter)
        except DataError as error:
            raise ApiError(400, "invalid_value", f"user: {error}", "user") from None
        if found is None:
            self.seen("unknown", None)
            return self._policy("unknown_user", rules.unknown_user, adapter)
        age = (self.now() - found.timestamp).total_seconds()
        info = VectorInfo("store", found.version, found.timestamp, age)
        reason, rule, outcome = "", "use", "found"
        if len(found.embedding) != adapter.dimension:
            reason, rule = "other_dimension", "error" if rules.other_version == "use" else rules.other_version
        elif adapter.versions and found.version not in adapter.versions:
            reason, rule = "other_version", rules.other_version
        elif rules.max_age_seconds is not None and age > rules.max_age_seconds:
            reason, rule = "old_vector", rules.old_vector
        self.seen(reason or outcome, age)
        if rule != "use":
            return self._policy(reason, rule, adapter, info)
        return self._user(found.embedding, info, asked, adapter, reason)

    def _user(
        self, vector: np.ndarray, info: VectorInfo, asked: Personalisation, adapter: AdapterInfo, reason: str = ""
    ) -> Person:
        strength = 1.0 if asked.strength is None else float(asked.strength)
        return Person(Personal("user", vector, strength), "e2p", adapter, info, reason)

    def _policy(self, reason: str, rule: str, adapter: AdapterInfo, info: VectorInfo | None = None) -> Person:
        if rule == "error":
            retry: Mapping[str, str] = {"Retry-After": "1"} if reason == "store_unavailable" else {}
            raise ApiError(_STATUS.get(reason, 409), reason, _MESSAGES[reason], "user", retry)
        if rule == "null" and adapter.has_null:
            return Person(Personal("null"), "null", adapter, info, reason)
        return Person(Personal("none"), "none", adapter, info, reason + ",no_null_user" * (rule == "null"))


def _require_sense(asked: Personalisation, adapter: AdapterInfo) -> None:
    if asked.arm != "e2p":
        for name in ("vector", "version", "strength"):
            if getattr(asked, name) is not None:
                raise ApiError(400, "invalid_value", f"e2p.{name}: means nothing with arm {asked.arm}", f"e2p.{name}")
        if asked.arm == "null" and not adapter.has_null:
            raise ApiError(400, "no_null_user", "e2p.arm: this adapter was trained without a null user", "e2p.arm")
        return
    if asked.version is not None and asked.vector is None:
        raise ApiError(400, "invalid_value", "e2p.version: expected e2p.vector beside it", "e2p.version")
    if asked.vector is not None:
        if not adapter.dimension:
            raise ApiError(
                400, "not_personal", "e2p.vector: this model is a bare backbone; name an adapter", "e2p.vector"
            )
        if len(asked.vector) != adapter.dimension:
            said = f"e2p.vector: expected {adapter.dimension} numbers, got {len(asked.vector)}"
            raise ApiError(400, "wrong_dimension", said, "e2p.vector")
        with np.errstate(over="ignore"):  # what overflows becomes infinite
            vector = np.asarray(asked.vector, np.float32)
        if not np.isfinite(vector).all():
            raise ApiError(400, "invalid_value", "e2p.vector: expected numbers within float32", "e2p.vector")
        if asked.version is not None and adapter.versions and asked.version not in adapter.versions:
            said = f"e2p.version: expected {' or '.join(adapter.versions)}; send a vector of that space"
            raise ApiError(400, "other_version", said, "e2p.version")
    if asked.strength is not None and asked.strength != 1 and not adapter.has_null:
        said = "e2p.strength: expected 1, since this adapter was trained without a null user"
        raise ApiError(400, "no_null_user", said, "e2p.strength")


def iso(time: datetime) -> str:
    """A time as the API writes it."""
    return time.isoformat().replace("+00:00", "Z")
