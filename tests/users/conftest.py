"""Stores of every kind for the tests of this folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2p.users.store import VectorStore, open_store
from redis_process import BINARY, RedisProcess

KINDS = ("memory", "lmdb", "redis")
_NUMBER = itertools.count()


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One redis-server for all tests, each of which has a prefix of its own."""
    if BINARY is None:
        pytest.skip("no redis-server is installed: apt-get install redis-server")
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def address(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Where a new store of this kind may be made."""
    if kind == "redis":
        return request.getfixturevalue("redis_process").address(f"t{next(_NUMBER)}")
    return str(tmp_path / "store") if kind == "lmdb" else "memory://"


@pytest.fixture
def store(address: str) -> Iterator[VectorStore]:
    """A new store of each kind, for tests with ``kind``."""
    with open_store(address) as opened:
        yield opened


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a store runs with every kind, unless it names the kinds itself."""
    named = any("kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "kind" in metafunc.fixturenames and not named:
        metafunc.parametrize("kind", KINDS)
