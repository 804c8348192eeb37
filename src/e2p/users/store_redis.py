"""A store of user vectors in Redis, for fleets: every write is decided in Redis, by one script.

Five keys, with the prefix in braces so that a proxy or a cluster keeps them together: ``{e2p}:about`` (hash: format,
dim), ``{e2p}:vectors`` (hash: key of the user -> record), ``{e2p}:users`` (sorted set of those keys, for their order),
``{e2p}:deleted`` (hash: hash of the key -> time) and ``{e2p}:versions`` (hash: version -> users). They lie in one slot:
Redis Cluster does not spread them, and its redirections are not followed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from e2p.errors import ConfigError, DataError, MissingExtraError, StoreError
from e2p.users.records import (
    FORMAT,
    OUTCOMES,
    Outcome,
    PutCounts,
    StoredVector,
    VectorBatch,
    decode_all,
    encode,
    key_of,
    mark_of,
    mark_time,
    newer_format,
    wrong_dim,
)
from e2p.users.store import StoreStats, VectorStore

_PIECE = 256  # rows that one call of the script writes at once: Redis serves nobody else meanwhile, about a millisecond
_PAGE = 512
_SECONDS = 5.0  # until it counts as silent
_CONNECT = 2.0  # the same where there is no connection yet
_FOREIGN = "expected a store of user vectors, found other keys of this prefix; choose another prefix"
_KEYS = ("about", "vectors", "users", "deleted", "versions")
# `later` compares bytes as numbers, since Lua compares texts by the server's language, and its numbers hold no 64 bits.
_COMMON = """
local about, vectors, users, deleted, versions = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local function later(a, b)
  for i = 1, 8 do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return false
end
local function time(record) return string.sub(record, 9, 16) end
local function count(record, change)
  local a, b, c, d = string.byte(record, 5, 8)
  local start = 20 + 4 * (((a * 256 + b) * 256 + c) * 256 + d)
  a, b = string.byte(record, 3, 4)
  local version = string.sub(record, start + 1, start + a * 256 + b)
  if redis.call('HINCRBY', versions, version, change) == 0 then redis.call('HDEL', versions, version) end
end
"""
_PUT = (
    _COMMON
    + """
local dim = redis.call('HGET', about, 'dim')
if dim and dim ~= ARGV[2] then return {-1, tonumber(dim)} end
local counts = {0, 0, 0, 0}
for i = 3, #ARGV, 3 do
  local key, mark, record = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local old = redis.call('HGET', vectors, key)
  local outcome = 1
  if old then
    if old == record then outcome = 2 elseif later(time(old), time(record)) then outcome = 3 end
  else
    local at = redis.call('HGET', deleted, mark)
    if at and not later(time(record), at) then outcome = 4 elseif at then redis.call('HDEL', deleted, mark) end
  end
  if outcome == 1 then
    if not dim then
      redis.call('HSET', about, 'format', ARGV[1], 'dim', ARGV[2])
      dim = ARGV[2]
    end
    if old then count(old, -1) else redis.call('ZADD', users, 0, key) end
    redis.call('HSET', vectors, key, record)
    count(record, 1)
  end
  counts[outcome] = counts[outcome] + 1
end
return counts
"""
)
_DELETE = (
    _COMMON
    + """
local key, mark, at, forget = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local old = redis.call('HGET', vectors, key)
if old then
  redis.call('HDEL', vectors, key)
  redis.call('ZREM', users, key)
  count(old, -1)
  if later(time(old), at) then at = time(old) end
end
if forget == '1' then
  redis.call('HDEL', deleted, mark)
else
  local before = redis.call('HGET', deleted, mark)
  if before and later(before, at) then at = before end
  redis.call('HSET', deleted, mark, at)
end
return old and 1 or 0
"""
)


class RedisStore(VectorStore):
    """Opened by :func:`e2p.users.store.open_store`, where the errors are.

    Args:
        address: redis://, rediss:// or unix://, with ``?prefix=`` if several stores share a Redis; default e2p.
        create: make the store if it is not there.
    """

    def __init__(self, address: str, *, create: bool = True) -> None:
        try:
            import redis
            from redis.backoff import ExponentialBackoff
            from redis.retry import Retry
        except ImportError:
            raise MissingExtraError("redis", "redis", "A store in Redis") from None
        url, prefix, self._address = _split(address)
        self._keys = [f"{{{prefix}}}:{name}" for name in _KEYS]
        self._about, self._vectors, self._users, self._deleted, self._versions = self._keys
        self._errors: Any = redis.exceptions
        self._silent, self._asking = False, threading.Lock()
        try:
            # Trying again is safe, since writing the same twice changes nothing. Silence is not waited for again.
            self._redis: Any = redis.Redis.from_url(
                url,
                decode_responses=False,
                socket_timeout=_SECONDS,
                socket_connect_timeout=min(_CONNECT, _SECONDS),
                retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 2, (redis.exceptions.ConnectionError,)),
            )
            self._put_script = self._redis.register_script(_PUT)
            self._delete_script = self._redis.register_script(_DELETE)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._address}: expected redis://host:6379/0?prefix=e2p: {error}") from None
        self._closed = False
        try:
            self._require_store(create)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._address

    @property
    def dim(self) -> int | None:
        with self._faults():
            found = self._redis.hget(self._about, "dim")
        return None if found is None else int(found)

    def get(self, user_id: str) -> StoredVector | None:
        return self.get_many([user_id])[0]

    def get_many(self, user_ids: Sequence[str]) -> list[StoredVector | None]:
        return self._records([key_of(user_id) for user_id in user_ids])

    def put(self, vector: StoredVector) -> Outcome:
        counts = self.put_many(VectorBatch.of([vector]))
        return next(name for name in OUTCOMES if getattr(counts, name))

    def put_many(self, batch: VectorBatch) -> PutCounts:
        """As the protocol says, except that the rows are kept or not in pieces of 256, and not all or none."""
        keys, records = encode(batch)
        rows = list(zip(keys, map(mark_of, keys), records, strict=True))
        pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        with self._faults(), self._redis.pipeline(transaction=False) as pipeline:
            for piece in pieces:
                arguments: list[Any] = [FORMAT, batch.dim, *(part for row in piece for part in row)]
                self._put_script(keys=self._keys, args=arguments, client=pipeline)
            replies = pipeline.execute()
        counts = PutCounts()
        for reply in replies:
            if reply[0] < 0:
                raise DataError(f"{self._address}: {wrong_dim(reply[1], batch.dim)}")
            counts += PutCounts(*reply)
        return counts

    def delete(self, user_id: str, *, forget: bool = False) -> bool:
        key = key_of(user_id)
        arguments: list[Any] = [key, mark_of(key), mark_time(datetime.now(UTC)), int(forget)]
        with self._faults():
            return bool(self._delete_script(keys=self._keys, args=arguments))

    def count(self) -> int:
        with self._faults():
            return int(self._redis.hlen(self._vectors))

    def iterate(self) -> Iterator[StoredVector]:
        after = b"-"
        while True:
            with self._faults():
                keys = self._redis.zrangebylex(self._users, after, b"+", 0, _PAGE)
            for vector in self._records(keys):
                if vector is not None:  # deleted since its key was read
                    yield vector
            if len(keys) < _PAGE:
                return
            after = b"(" + keys[-1]

    def stats(self) -> StoreStats:
        with self._faults():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.hlen(self._vectors).hget(self._about, "dim").hgetall(self._versions).hlen(self._deleted)
            users, dim, versions, deletions = pipeline.execute()
            size = sum(self._redis.memory_usage(key) or 0 for key in self._keys)
        counted = {version.decode(): int(count) for version, count in sorted(versions.items())}
        return StoreStats(self._address, users, None if dim is None else int(dim), counted, deletions, size)

    def close(self) -> None:
        self._closed = True
        self._redis.close()

    def _records(self, keys: list[bytes]) -> list[StoredVector | None]:
        found: list[bytes | None] = []
        with self._faults():
            for start in range(0, len(keys), _PAGE):
                found += self._redis.hmget(self._vectors, keys[start : start + _PAGE])
        return decode_all(keys, found, self._address)

    def _require_store(self, create: bool) -> None:
        with self._faults():
            found, kind = self._redis.hget(self._about, "format"), self._redis.type(self._vectors)
            memory = self._redis.info("memory")
        if found is None and kind != b"none":
            raise StoreError(
                f"{self._address}: expected a store, found other keys of this prefix; choose another prefix"
            )
        if found is not None and int(found) > FORMAT:
            raise newer_format(self._address, int(found))
        policy = str(memory.get("maxmemory_policy", ""))
        if memory.get("maxmemory") and policy.startswith("allkeys"):
            raise StoreError(
                f"{self._address}: expected a Redis that evicts nothing, got maxmemory-policy {policy}, which would "
                "throw away all users at once; set noeviction or volatile-lru"
            )
        if found is None:
            if not create:
                raise StoreError(
                    f"{self._address}: no store of user vectors is there; make one by e2p users import TABLE STORE"
                )
            with self._faults():
                self._redis.hsetnx(self._about, "format", FORMAT)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Redis's errors as a StoreError.

        While Redis is silent, as when its machine is gone, one call at a time waits for it, and all others fail at
        once: else everyone's answer would wait for seconds, and take the places of those who could be answered.
        """
        if self._closed:
            raise StoreError(f"{self._address}: this store was closed; open it again")
        asks = self._silent
        if asks and not self._asking.acquire(blocking=False):
            raise StoreError(f"{self._address}: Redis cannot be reached: it was silent; check that it runs there")
        try:
            yield
            self._silent = False
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            self._silent = isinstance(error, (self._errors.TimeoutError, TimeoutError))
            raise StoreError(f"{self._address}: Redis cannot be reached: {error}; check that it runs there") from None
        except self._errors.RedisError as error:
            if "WRONGTYPE" in str(error):
                text = _FOREIGN
            else:
                text = f"Redis refuses: {error}; check its rights, its memory and that it is no replica"
            raise StoreError(f"{self._address}: {text}") from None
        finally:
            if asks:
                self._asking.release()


def _split(address: str) -> tuple[str, str, str]:
    """The client's URL, the prefix, and the address as it may be shown."""
    parts = urlsplit(address)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = query.pop("prefix", "e2p")
    if not prefix or set(prefix) & set("{}"):
        raise ConfigError(f"store: expected a prefix without braces, got {prefix!r}")
    base = f"{parts.scheme}://{parts.netloc}{parts.path}"
    place = parts.netloc.rpartition("@")[2]
    shown = {name: value for name, value in query.items() if name not in ("username", "password")}
    shown |= {"prefix": prefix} if prefix != "e2p" else {}
    name = f"{parts.scheme}://{place}{parts.path}" + (f"?{urlencode(shown)}" if shown else "")
    return base + (f"?{urlencode(query)}" if query else ""), prefix, name
