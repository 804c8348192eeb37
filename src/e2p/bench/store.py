"""`e2p bench store`: the online store at many users: import, point reads, reads of many, writes. No model takes part,
but for phi: a read of one user, and his soft token made of what was read, is what an answer waits for.

LMDB in a temporary folder, and Redis where a redis-server is installed: one is started for this on a free port of this
machine, with nothing kept on disk.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from e2p.bench.processes import held
from e2p.config import ProjectorConfig
from e2p.errors import ConfigError, StoreError
from e2p.model.projector import PrefixProjector, user_vectors
from e2p.provenance import provenance
from e2p.users.commands import import_table
from e2p.users.store import StoredVector, VectorStore, open_store

T = TypeVar("T")
MANY = 32  # users read at once
_ROWS = 65_536
_BEGAN = datetime(2024, 1, 1, tzinfo=UTC)


def bench(
    users: int = 1_000_000,
    dimension: int = 120,
    reads: int = 50_000,
    puts: int = 500,
    hidden_size: int = 2048,
    output: str = "bench_store.json",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure how fast the online store imports, reads and writes, and what memory an import takes; asserts no time.

    The table is imported in a random order of users, which is the dear one, and once more; into a folder also in order.

    Args:
        users: in the store, each with one vector.
        dimension: numbers in a vector.
        reads: of one random user each; a tenth as many of 32 users at once.
        puts: writes of one vector each.
        hidden_size: of the backbone whose soft tokens phi makes, in float32, on one thread.
        output: JSON file to write. It is also the last line of stdout.
        seed: of vectors and of the users read.

    Returns:
        What is written as JSON.

    Raises:
        ConfigError: a number is out of range.
        StoreError: a store cannot be opened, written or read.
    """
    given = {"users": users, "dimension": dimension, "reads": reads, "puts": puts, "hidden_size": hidden_size}
    for key, value in given.items():
        if value < 1:
            raise ConfigError(f"{key}: expected a whole number >= 1, got {value}")
    console = Console(stderr=True)
    stores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="e2p-bench-") as folder, contextlib.ExitStack() as stack:
        table, in_order = Path(folder, "embeddings.parquet"), Path(folder, "in_order.parquet")
        with console.status("writing the tables"):
            write_table(table, users, dimension, seed)
            write_table(in_order, users, dimension, seed, shuffled=False)
        addresses = {"lmdb": str(Path(folder, "store"))}
        if shutil.which("redis-server"):
            addresses["redis"] = stack.enter_context(redis_server())
        for kind, address in addresses.items():
            with console.status(f"{kind}: import"):
                found: dict[str, Any] = {"import": in_new_process(str(table), address)}
            with console.status(f"{kind}: reads and writes"), open_store(address) as store:
                found["again"] = in_new_process(str(table), address)
                found |= latencies(store, users, dimension, reads, puts, seed)
                found["get_and_project"] = soft_tokens(store, users, dimension, reads, hidden_size, seed)
                found["bytes"] = store.stats().nbytes
            if kind == "lmdb":
                with (
                    console.status("lmdb: writes that a power cut may lose"),
                    open_store(address, durable=False) as store,
                ):
                    found["put_not_durable"] = writes(store, users, dimension, puts)
                found["import_in_order"] = in_new_process(str(in_order), str(Path(folder, "second")))
            stores[kind] = found
            console.print(f"{kind}: {found['import']['seconds']:.1f} s, get {found['get']}", highlight=False)
    result = {"bench": "store", **given, "seed": seed, "stores": stores, "provenance": provenance()}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def write_table(path: Path, users: int, dimension: int, seed: int, shuffled: bool = True) -> None:
    """An embedding table of users u0000000, u0000001, ... in random order or in theirs, in row groups of 65,536."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(users) if shuffled else np.arange(users)
    kinds = [("user_id", pa.string()), ("embedding", pa.list_(pa.float32(), dimension))]
    schema = pa.schema([*kinds, ("timestamp", pa.timestamp("us", tz="UTC")), ("version", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, users, _ROWS):
            who = order[start : start + _ROWS]
            numbers = rng.standard_normal(len(who) * dimension, dtype=np.float32)
            columns = [
                pa.array([name(user) for user in who]),
                pa.FixedSizeListArray.from_arrays(pa.array(numbers), dimension),
                pa.array([_BEGAN] * len(who), schema.field("timestamp").type),
                pa.array(["v1"] * len(who)),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def name(user: int) -> str:
    """As long for every user, so that the order of names is the order of numbers."""
    return f"u{user:07d}"


def in_new_process(table: str, address: str) -> dict[str, Any]:
    """An import in a process of its own, for its memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured_import, table, address).result()


def measured_import(table: str, address: str) -> dict[str, Any]:
    """Seconds of an import, and memory of this process in MiB: before, and at most in each tenth of the time."""
    seen: list[tuple[float, float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append((time.perf_counter(), *resident()))

    with contextlib.redirect_stdout(None):
        before, watcher = resident(), threading.Thread(target=watch)
        watcher.start()
        start, cpu = time.perf_counter(), time.process_time()
        try:
            counts = import_table(table, address)
        finally:
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            done.set()
            watcher.join()
    tenths: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for at, resident_mib, anonymous in seen:
        tenths[min(9, max(0, int((at - start) / took * 10)))].append((resident_mib, anonymous))
    return {
        "seconds": round(took, 3),
        "cpu_seconds": round(cpu, 3),
        "stored": counts.stored,
        "unchanged": counts.unchanged,
        "before_mib": before[0],
        "resident_mib": [max((mib for mib, _ in part), default=None) for part in tenths],
        "anonymous_mib": [max((mib for _, mib in part), default=None) for part in tenths],
    }


def resident() -> tuple[float, float]:
    """MiB of this process in memory: all, and without pages of files, which the system can take back."""
    holds = held("self")
    return (0.0, 0.0) if holds is None else (holds.resident_mib, holds.anonymous_mib)


def latencies(store: VectorStore, users: int, dimension: int, reads: int, puts: int, seed: int) -> dict[str, Any]:
    """Of single reads, of reads of 32 and of single writes, one after the other."""
    rng = np.random.default_rng([seed, 1])
    ones = [name(user) for user in rng.integers(0, users, reads)]
    many = [[name(user) for user in rng.integers(0, users, MANY)] for _ in range(max(1, reads // 10))]
    return {
        "get": timed(lambda user: _there(store.get(user)), ones),
        "get_many": timed(lambda some: _there(*store.get_many(some)), many),
        "put": writes(store, users, dimension, puts),
    }


def soft_tokens(
    store: VectorStore, users: int, dimension: int, reads: int, hidden_size: int, seed: int
) -> dict[str, Any]:
    """Of a read of one user and phi on what was read, with the checks that serving makes of a vector."""
    phi = PrefixProjector(dimension, hidden_size, ProjectorConfig())
    ones = [name(user) for user in np.random.default_rng([seed, 2]).integers(0, users, reads)]

    def both(user: str) -> None:
        found = store.get(user)
        _there(found)
        assert found is not None
        phi(*user_vectors([found.embedding], 1, dimension))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return timed(both, ones)
    finally:
        torch.set_num_threads(threads)


def writes(store: VectorStore, users: int, dimension: int, puts: int) -> dict[str, Any]:
    """Of single writes, each of a newer vector."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((puts, dimension), dtype=np.float32)
    who = rng.integers(0, users, puts)
    vectors = [StoredVector(name(user), row, datetime.now(UTC), "v1") for user, row in zip(who, numbers, strict=True)]
    return timed(store.put, vectors)


def timed(call: Callable[[T], Any], arguments: Sequence[T]) -> dict[str, Any]:
    """Microseconds of a call, over all arguments: median, 99th percentile, most."""
    took = np.empty(len(arguments))
    for at, argument in enumerate(arguments):
        start = time.perf_counter()
        call(argument)
        took[at] = time.perf_counter() - start
    p50, p99 = np.percentile(took, [50, 99])
    named = {"p50_us": p50, "p99_us": p99, "most_us": took.max()}
    return {"calls": len(arguments)} | {name: round(1e6 * float(value), 1) for name, value in named.items()}


@contextlib.contextmanager
def redis_server(binary: str = "redis-server") -> Iterator[str]:
    """Address of a Redis of our own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="e2p-redis-") as folder:
        words = [
            binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"redis://127.0.0.1:{port}/0"
        try:
            for _ in range(100):
                with contextlib.suppress(StoreError):
                    open_store(address).close()
                    break
                time.sleep(0.05)
            yield address
        finally:
            server.terminate()
            server.wait()


def _there(*vectors: StoredVector | None) -> None:
    if None in vectors:
        raise StoreError("expected a vector for every user that was imported, found none; this is a mistake of e2p")
