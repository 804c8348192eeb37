"""Users' vectors put, read and deleted: the checks that a store cannot make, and calls that do not hold up the loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio
import numpy as np

from e2p.errors import DataError, StoreError
from e2p.serving.http.errors import ApiError
from e2p.serving.http.people import iso
from e2p.serving.http.schemas import PutEmbedding
from e2p.users.store import Outcome, PutCounts, StoredVector, VectorBatch, VectorStore

T = TypeVar("T")
_WRITERS = 8


@dataclass(eq=False)
class Vectors:
    """A store behind HTTP.

    Args:
        store: where vectors are, or None.
        dimensions: what the adapters take, now.
        ahead_seconds: how far ahead of this clock a timestamp may be.
        now: the time.
        trouble: told why the store could not be used.
    """

    store: VectorStore | None
    dimensions: Callable[[], Collection[int]]
    ahead_seconds: float
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    trouble: Callable[[StoreError], None] = lambda error: None
    _limiter: anyio.CapacityLimiter | None = field(default=None, init=False)

    def require_store(self) -> VectorStore:
        """The store. Raises ApiError 404 where the server has none."""
        if self.store is None:
            raise ApiError(404, "no_store", "this server has no store of user vectors; start it with --store")
        return self.store

    def allowed_dimensions(self) -> tuple[int, ...]:
        """What a vector's dimension may be: the store's own, or an adapter's while it is empty."""
        held = self.require_store().dim
        return (held,) if held is not None else tuple(sorted(set(self.dimensions()) - {0}))

    def checked(self, user_id: str, row: PutEmbedding, allowed: Sequence[int], at: datetime) -> StoredVector:
        """A vector as the store takes it; ``at`` is its time where it names none. Raises ApiError 400."""
        if allowed and len(row.embedding) not in allowed:
            expected = " or ".join(map(str, allowed))
            said = f"embedding: expected {expected} numbers, got {len(row.embedding)}"
            raise ApiError(400, "wrong_dimension", said, "embedding")
        time = row.timestamp or at
        self.require_time(time)
        try:
            with np.errstate(over="ignore"):
                return StoredVector(user_id, np.asarray(row.embedding, np.float32), time, row.version)
        except (DataError, OverflowError) as error:
            raise ApiError(400, "invalid_value", str(error), "embedding") from None

    def require_time(self, time: datetime) -> None:
        """Raise ApiError 400 for a timestamp that is too far ahead."""
        ahead = (time - self.now()).total_seconds()
        if ahead > self.ahead_seconds:
            said = (
                f"timestamp: {iso(time)} is {ahead:.0f} seconds ahead of this server's clock; check its unit and zone"
            )
            raise ApiError(400, "timestamp_ahead", said, "timestamp")

    async def put(self, user_id: str, row: PutEmbedding) -> tuple[StoredVector, Outcome]:
        """Put one vector. Raises ApiError."""

        def work() -> tuple[StoredVector, Outcome]:
            vector = self.checked(user_id, row, self.allowed_dimensions(), self.now())
            return vector, self.require_store().put(vector)

        return await self.call(work)

    async def get(self, user_id: str) -> StoredVector:
        """The user's vector. Raises ApiError 404."""
        found = await self.call(lambda: self.require_store().get(user_id))
        if found is None:
            raise ApiError(404, "user_not_found", "the store holds no vector of this user; PUT one first", "user_id")
        return found

    async def delete(self, user_id: str, forget: bool) -> bool:
        """Remove a user. Nothing here keeps a copy, so the next answer is without it."""
        return await self.call(lambda: self.require_store().delete(user_id, forget=forget))

    def put_many(self, vectors: Sequence[StoredVector]) -> PutCounts:
        """Put a batch, whole or not at all. Blocks. Raises DataError, StoreError."""
        return self.require_store().put_many(VectorBatch.of(vectors)) if vectors else PutCounts()

    async def call(self, work: Callable[[], T]) -> T:
        """Something that blocks, in a thread. Raises ApiError 503 where the store is away, 400 for what it refuses."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_WRITERS)
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        except StoreError as error:
            self.trouble(error)
            raise store_away() from None
        except DataError as error:
            raise ApiError(400, "invalid_value", self.plain(error)) from None

    def plain(self, error: DataError) -> str:
        """What a store refuses, without the folder or host that it says first."""
        return str(error) if self.store is None else str(error).removeprefix(f"{self.store.address}: ")


def store_away() -> ApiError:
    """Error 503. The store's own words name hosts and folders, which are for the operator."""
    said = "the store of user vectors cannot be used now; try again"
    return ApiError(503, "store_unavailable", said, headers={"Retry-After": "1"})


def told(vector: StoredVector, now: datetime, numbers: bool) -> dict[str, Any]:
    """A stored vector as GET tells it."""
    return {
        "object": "user.embedding",
        "user_id": vector.user_id,
        "timestamp": iso(vector.timestamp),
        "version": vector.version,
        "dimension": len(vector.embedding),
        "age_seconds": round((now - vector.timestamp).total_seconds(), 3),
        **({"embedding": vector.embedding.tolist()} if numbers else {}),
    }
