"""A store of user vectors in a folder, by LMDB: read by many threads and processes, written by one at a time.

Four databases: ``about`` (format, dim), ``vectors`` (key of the user -> record), ``deleted`` (hash of the key -> time)
and ``versions`` (version -> users). Each write is one transaction over all of them, so that after a crash the store is
as after the last one that was acknowledged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from e2p.errors import DataError, StoreError
from e2p.users.lmdb_environment import Environment, Txn, acquire, release
from e2p.users.records import (
    FORMAT,
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
    newer_format,
    version_of,
    wrong_dim,
)
from e2p.users.store import StoreStats, VectorStore

_PAGE = 512  # vectors read in one transaction while all are gone through


class LmdbStore(VectorStore):
    """Opened by :func:`e2p.users.store.open_store`, where the arguments and errors are."""

    def __init__(self, folder: str, *, create: bool = True, durable: bool = True) -> None:
        self._folder = Path(folder).expanduser()
        self._environment: Environment | None = acquire(self._folder, create=create, durable=durable)
        try:
            self._require_format()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return str(self._folder)

    @property
    def dim(self) -> int | None:
        env = self._open()
        found = env.read(lambda txn: txn.get(b"dim", db=env.databases["about"]))
        return None if found is None else int(found)

    def get(self, user_id: str) -> StoredVector | None:
        env, key = self._open(), key_of(user_id)
        record = env.read(lambda txn: txn.get(key, db=env.databases["vectors"]))
        return None if record is None else decode(record, key, self.address)

    def get_many(self, user_ids: Sequence[str]) -> list[StoredVector | None]:
        env, keys = self._open(), [key_of(user_id) for user_id in user_ids]
        found = env.read(lambda txn: [txn.get(key, db=env.databases["vectors"]) for key in keys])
        return decode_all(keys, found, self.address)

    def put(self, vector: StoredVector) -> Outcome:
        counts = self.put_many(VectorBatch.of([vector]))
        return next(name for name in OUTCOMES if getattr(counts, name))

    def put_many(self, batch: VectorBatch) -> PutCounts:
        # In the order of keys, each page of the tree is written once. Rows of one user stay in their order.
        keys, records = encode(batch)
        order = sorted(range(len(keys)), key=keys.__getitem__)
        rows = [(keys[at], records[at]) for at in order]
        return self._open().write(lambda txn: self._put(txn, rows, batch.dim)) if rows else PutCounts()

    def delete(self, user_id: str, *, forget: bool = False) -> bool:
        key, now = key_of(user_id), mark_time(datetime.now(UTC))
        return self._open().write(lambda txn: self._delete(txn, key, now, forget))

    def count(self) -> int:
        env = self._open()
        return env.read(lambda txn: txn.stat(env.databases["vectors"])["entries"])

    def iterate(self) -> Iterator[StoredVector]:
        page = self._page(None)
        while page:
            for key, record in page:
                yield decode(record, key, self.address)
            page = self._page(page[-1][0])

    def stats(self) -> StoreStats:
        env = self._open()

        def look(txn: Txn) -> tuple[int, dict[str, int], int]:
            versions = {bytes(k)[1:].decode(): int(v) for k, v in txn.cursor(env.databases["versions"])}
            vectors, deleted = (txn.stat(env.databases[name])["entries"] for name in ("vectors", "deleted"))
            return vectors, versions, deleted

        users, versions, deletions = env.read(look)
        size = (self._folder / "data.mdb").stat().st_size
        return StoreStats(self.address, users, self.dim, versions, deletions, size)

    def release_pages(self) -> None:
        """Give back the memory that pages of the file take up in this process."""
        self._open().release_pages()

    def close(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            release(environment)

    def _put(self, txn: Txn, rows: Sequence[tuple[bytes, bytes]], dim: int) -> PutCounts:
        names = self._open().databases
        held = txn.get(b"dim", db=names["about"])
        if held is not None and int(held) != dim:
            raise DataError(f"{self.address}: {wrong_dim(int(held), dim)}")
        old: dict[bytes, bytes] = dict(txn.cursor(names["vectors"]).getmulti([key for key, _ in rows]))
        marked = txn.stat(names["deleted"])["entries"] > 0
        counts: Counter[Outcome] = Counter()
        new: dict[bytes, bytes] = {}
        for key, record in rows:
            before = new.get(key) or old.get(key)
            mark = txn.get(mark_of(key), db=names["deleted"]) if marked and before is None else None
            outcome = decide(before, record, mark)
            counts[outcome] += 1
            if outcome == "stored":
                new[key] = record
                if mark is not None:
                    txn.delete(mark_of(key), db=names["deleted"])
        if new:
            txn.cursor(names["vectors"]).putmulti(new.items())
            versions = Counter(map(version_of, new.values()))
            versions.subtract(version_of(old[key]) for key in old.keys() & new)
            self._count_versions(txn, versions)
            if held is None:
                txn.put(b"dim", b"%d" % dim, db=names["about"])
        return PutCounts(*(counts[name] for name in OUTCOMES))

    def _delete(self, txn: Txn, key: bytes, now: bytes, forget: bool) -> bool:
        names, mark = self._open().databases, mark_of(key)
        record = txn.pop(key, db=names["vectors"])
        if record is not None:
            self._count_versions(txn, {version_of(record): -1})
        if forget:
            txn.delete(mark, db=names["deleted"])
        else:
            times = [now, txn.get(mark, b"", db=names["deleted"]), b"" if record is None else record[TIMESTAMP]]
            txn.put(mark, max(times), db=names["deleted"])
        return record is not None

    def _count_versions(self, txn: Txn, changes: dict[bytes, int] | Counter[bytes]) -> None:
        db = self._open().databases["versions"]
        for version, change in changes.items():
            key = b"=" + version  # LMDB has no empty key
            count = int(txn.get(key, b"0", db=db)) + change
            if count:
                txn.put(key, b"%d" % count, db=db)
            else:
                txn.delete(key, db=db)

    def _page(self, after: bytes | None) -> list[tuple[bytes, bytes]]:
        """A transaction for each page: a long one would keep LMDB from using again what is deleted meanwhile."""
        env = self._open()

        def look(txn: Txn) -> list[tuple[bytes, bytes]]:
            found: list[tuple[bytes, bytes]] = []
            cursor = txn.cursor(env.databases["vectors"])
            there = cursor.first() if after is None else cursor.set_range(after)
            if there and cursor.key() == after:
                there = cursor.next()
            while there and len(found) < _PAGE:
                found.append(cursor.item())
                there = cursor.next()
            return found

        return env.read(look)

    def _require_format(self) -> None:
        env = self._open()
        found = env.read(lambda txn: txn.get(b"format", db=env.databases["about"])) or b"none"
        if not found.isdigit():
            raise StoreError(
                f"{self.address}: expected a store of user vectors, found format {found!r}; check the folder"
            )
        if int(found) > FORMAT:
            raise newer_format(self.address, int(found))

    def _open(self) -> Environment:
        if self._environment is None:
            raise StoreError(f"{self.address}: this store was closed; open it again")
        return self._environment
