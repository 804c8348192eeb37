"""A store of user vectors in this process's memory, for tests and demos; it ends with the process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from e2p.errors import DataError, StoreError
from e2p.users.records import (
    OUTCOMES,
    TIMESTAMP,
    Outcome,
    PutCounts,
    StoredVector,
    VectorBatch,
    decide,
    decode,
    decode_all,
    encode,
    key_of,
    mark_of,
    mark_time,
    version_of,
    wrong_dim,
)
from e2p.users.store import StoreStats, VectorStore


class MemoryStore(VectorStore):
    """Vectors in a dict, as the records that the other stores keep."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[bytes, bytes] = {}
        self._deleted: dict[bytes, bytes] = {}
        self._dim: int | None = None
        self._closed = False

    @property
    def address(self) -> str:
        return "memory://"

    @property
    def dim(self) -> int | None:
        return self._dim

    def get(self, user_id: str) -> StoredVector | None:
        return self.get_many([user_id])[0]

    def get_many(self, user_ids: Sequence[str]) -> list[StoredVector | None]:
        keys = [key_of(user_id) for user_id in user_ids]
        self._require_open()
        with self._lock:
            found = [self._records.get(key) for key in keys]
        return decode_all(keys, found, self.address)

    def put(self, vector: StoredVector) -> Outcome:
        counts = self.put_many(VectorBatch.of([vector]))
        return next(name for name in OUTCOMES if getattr(counts, name))

    def put_many(self, batch: VectorBatch) -> PutCounts:
        rows = list(zip(*encode(batch), strict=True))
        self._require_open()
        counts: Counter[Outcome] = Counter()
        with self._lock:
            if rows and self._dim not in (None, batch.dim):
                raise DataError(f"{self.address}: {wrong_dim(self._dim or 0, batch.dim)}")
            for key, record in rows:
                outcome = decide(self._records.get(key), record, self._deleted.get(mark_of(key)))
                counts[outcome] += 1
                if outcome == "stored":
                    self._dim = batch.dim
                    self._records[key] = record
                    self._deleted.pop(mark_of(key), None)
        return PutCounts(*(counts[name] for name in OUTCOMES))

    def delete(self, user_id: str, *, forget: bool = False) -> bool:
        key = key_of(user_id)
        self._require_open()
        with self._lock:
            record = self._records.pop(key, None)
            if forget:
                self._deleted.pop(mark_of(key), None)
            else:
                times = [mark_time(datetime.now(UTC)), self._deleted.get(mark_of(key), b"")]
                self._deleted[mark_of(key)] = max(*times, b"" if record is None else record[TIMESTAMP])
        return record is not None

    def count(self) -> int:
        self._require_open()
        return len(self._records)

    def iterate(self) -> Iterator[StoredVector]:
        self._require_open()
        with self._lock:
            keys = sorted(self._records)
        for key in keys:
            record = self._records.get(key)
            if record is not None:
                yield decode(record, key, self.address)

    def stats(self) -> StoreStats:
        self._require_open()
        with self._lock:
            versions = Counter(version_of(record).decode() for record in self._records.values())
            size = sum(map(len, self._records.values()))
            return StoreStats(
                self.address, len(self._records), self._dim, dict(sorted(versions.items())), len(self._deleted), size
            )

    def close(self) -> None:
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.address}: this store was closed; open it again")
