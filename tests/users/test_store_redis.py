"""The store in Redis: shared with others, taken away and coming back, and set so that nothing is thrown away."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import redis

from e2p.errors import ConfigError, DataError, MissingExtraError, StoreError
from e2p.users import store_redis
from e2p.users.store import PutCounts, StoredVector, VectorBatch, open_store
from redis_process import RedisProcess

DAY = datetime(2024, 5, 1, tzinfo=UTC)


def vector(user: str = "u1", day: float = 0, dim: int = 3) -> StoredVector:
    return StoredVector(user, np.full(dim, day, np.float32), DAY + timedelta(days=day), "v1")


@pytest.fixture
def client(redis_process: RedisProcess) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_process.port) as opened:
        yield opened


def test_prefixes_keep_stores_apart_and_name_all_keys(redis_process: RedisProcess, client: redis.Redis) -> None:
    with (
        open_store(redis_process.address("here")) as one,
        open_store(redis_process.address("there")) as other,
    ):
        one.put(vector("u1", day=1))
        one.delete("u9")
        other.put(vector("u1", day=2, dim=5))
        assert (one.dim, other.dim) == (3, 5)
        assert (one.count(), other.stats().deletions) == (1, 0)
    names = {f"{{here}}:{name}".encode() for name in ("about", "vectors", "users", "deleted", "versions")}
    assert set(client.scan_iter("{here}*")) == names


def test_a_deleted_id_is_nowhere_in_it(redis_process: RedisProcess, client: redis.Redis) -> None:
    with open_store(redis_process.address("private")) as store:
        store.put(vector("somebody@example.com"))
        store.delete("somebody@example.com")
        held = [client.dump(key) or b"" for key in client.scan_iter("{private}*")]
        assert held
        assert not any(b"somebody" in dump for dump in held)


def test_scripts_are_loaded_again_when_redis_has_lost_them(redis_process: RedisProcess, client: redis.Redis) -> None:
    with open_store(redis_process.address("scripts")) as store:
        store.put(vector(day=1))
        client.script_flush()
        assert store.put(vector(day=0)) == "older"
        client.script_flush()
        assert store.delete("u1")
        client.script_flush()
        assert store.put_many(VectorBatch.of([vector("u2")])) == PutCounts(stored=1)


def test_a_unix_socket_does_as_well(redis_process: RedisProcess) -> None:
    with open_store(f"unix://{redis_process.folder}/redis.sock?prefix=socket") as store:
        assert store.put(vector()) == "stored"
        assert store.address == f"unix://{redis_process.folder}/redis.sock?prefix=socket"
    with open_store(redis_process.address("socket"), create=False) as store:
        assert store.count() == 1


def test_passwords_are_never_shown(redis_process: RedisProcess) -> None:
    address = f"redis://someone:secret@127.0.0.1:{redis_process.port}/0?password=secret"
    with pytest.raises(StoreError) as caught:
        open_store(address)
    assert "secret" not in str(caught.value)
    assert f"redis://127.0.0.1:{redis_process.port}/0: " in str(caught.value)


def test_what_is_no_store_is_one_clear_line(redis_process: RedisProcess, client: redis.Redis) -> None:
    client.set("{text}:about", "x")
    client.rpush("{list}:vectors", "x")
    client.hset("{newer}:about", mapping={"format": 2, "dim": 3})
    for prefix, message in (
        ("text", "expected a store of user vectors, found other keys of this prefix; choose another prefix"),
        ("list", "found other keys of this prefix"),
        ("newer", "expected format 1, found 2: written by a newer e2p; pip install -U e2p"),
    ):
        with pytest.raises(StoreError, match=message):
            open_store(redis_process.address(prefix))
    for prefix in ("", "a{b"):
        with pytest.raises(ConfigError, match="expected a prefix without braces"):
            open_store(redis_process.address(prefix))
    with pytest.raises(ConfigError, match="expected redis://host:6379"):
        open_store("redis://127.0.0.1:no/0")


def test_a_redis_that_would_throw_users_away_is_refused(redis_process: RedisProcess, client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        open_store(redis_process.address("evict")).close()  # without a limit, nothing is thrown away
        client.config_set("maxmemory", "1gb")
        with pytest.raises(StoreError, match="evicts nothing, got maxmemory-policy allkeys-lru"):
            open_store(redis_process.address("evict"))
        client.config_set("maxmemory-policy", "noeviction")
        with open_store(redis_process.address("evict")) as store:
            store.put(vector())
            client.config_set("maxmemory", "1")
            with pytest.raises(StoreError, match=r"Redis refuses: .*check its rights, its memory"):
                store.put(vector(day=1))
            client.config_set("maxmemory", "0")
            assert store.put(vector(day=1)) == "stored"
    finally:
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")


def test_it_is_taken_away_and_comes_back(redis_process: RedisProcess, tmp_path: Path) -> None:
    server = RedisProcess(tmp_path, persistent=True)
    try:
        with open_store(server.address("e2p")) as store:
            store.put_many(VectorBatch.of([vector(f"u{n}", day=1) for n in range(600)]))
            store.delete("u7")
            for kill in (False, True):
                server.stop(kill=kill)
                start = time.monotonic()
                for call in (lambda: store.get("u1"), lambda: store.put(vector()), store.stats):
                    with pytest.raises(StoreError, match=rf"127.0.0.1:{server.port}/0: Redis cannot be reached: "):
                        call()
                assert time.monotonic() - start < 10
                server.start()
                found = store.get("u1")
                assert found is not None
                assert found.timestamp == DAY + timedelta(days=1)
                assert (store.put(vector("u1")), store.put(vector("u7"))) == ("older", "deleted")
                assert store.count() == 599
        server.stop()
        with pytest.raises(StoreError, match="check that it runs there"):
            open_store(server.address("e2p"))
    finally:
        server.stop()


def test_a_silent_redis_holds_up_one_call_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its machine is gone: nobody refuses a connection, and nobody answers."""
    monkeypatch.setattr(store_redis, "_SECONDS", 0.4)
    server = RedisProcess(tmp_path)
    assert server.process is not None

    def fails(_: int) -> bool:
        try:
            return store.get("u1") is None
        except StoreError as error:
            return "Redis cannot be reached: " in str(error)

    try:
        with open_store(server.address("e2p")) as store, ThreadPoolExecutor(8) as threads:
            store.put(vector())
            server.process.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            assert fails(0)
            assert 0.3 < time.monotonic() - start < 1, "and it is not waited for again and again"
            assert all(threads.map(fails, range(160)))
            assert time.monotonic() - start < 4, "and not 8 seconds"
            server.process.send_signal(signal.SIGCONT)
            assert store.get("u1") is not None, "the first who asks finds it"
            assert not any(threads.map(fails, range(160)))
    finally:
        server.stop(kill=True)


def test_a_redis_that_was_emptied_is_an_empty_store(redis_process: RedisProcess, tmp_path: Path) -> None:
    server = RedisProcess(tmp_path)
    try:
        with open_store(server.address("e2p")) as store:
            store.put(vector())
            server.stop()
            server.start()
            assert (store.get("u1"), store.dim, store.count()) == (None, None, 0)
            assert store.put(vector(dim=5)) == "stored"
            with pytest.raises(DataError, match="expected an embedding of 5 numbers, got 3"):
                store.put(vector("u2"))
        with open_store(server.address("e2p"), create=False) as store:
            assert store.count() == 1
    finally:
        server.stop()


def test_without_its_package_the_line_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'e2p\[redis\]'"):
        open_store("redis://127.0.0.1:1/0")
