"""The store in a folder: several processes, growth, crashes, and files that are no store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import polars as pl
import pytest

from e2p.cli import main
from e2p.errors import StoreError
from e2p.users import lmdb_environment
from e2p.users.records import key_of
from e2p.users.store import PutCounts, StoredVector, VectorBatch, open_store
from e2p.users.store_lmdb import LmdbStore

DAY = datetime(2024, 5, 1, tzinfo=UTC)


def vector(user: str, day: float = 0, dim: int = 3) -> StoredVector:
    return StoredVector(user, np.full(dim, day, np.float32), DAY + timedelta(days=day), "v1")


def many(count: int, dim: int = 64, day: float = 0, start: int = 0) -> VectorBatch:
    return VectorBatch.of([vector(f"u{number:06d}", day, dim) for number in range(start, start + count)])


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs this code; its output is read by whoever started it."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    with process:
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return text


HEAD = """
import sys
from datetime import UTC, datetime, timedelta
import numpy as np
from e2p.users import lmdb_environment
from e2p.users.store import StoredVector, VectorBatch, open_store
DAY = datetime(2024, 5, 1, tzinfo=UTC)
def vector(user, day, dim):
    return StoredVector(user, np.full(dim, day, np.float32), DAY + timedelta(days=day), "v1")
"""


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[LmdbStore]:
    with LmdbStore(str(folder), **settings) as store:
        yield store


def map_size(store: LmdbStore) -> int:
    assert store._environment is not None
    return int(store._environment.env.info()["map_size"])


@pytest.fixture
def small_map(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lmdb_environment, "MAP_BYTES", 1 << 16)
    return 1 << 16


# ---------------------------------------------------------------- growth


def test_it_grows_by_itself_and_loses_nothing(tmp_path: Path, small_map: int) -> None:
    with opened(tmp_path / "s") as store:
        assert map_size(store) == small_map
        for start in range(0, 2000, 500):
            assert store.put_many(many(500, start=start)) == PutCounts(stored=500)
        assert store.put(vector("one", dim=64)) == "stored"
        assert map_size(store) > 8 * small_map
        assert store.count() == 2001
        assert store.stats().versions == {"v1": 2001}
    with opened(tmp_path / "s") as store:
        assert all(found is not None for found in store.get_many([f"u{n:06d}" for n in range(2000)]))


def test_it_grows_while_others_read_and_walk(tmp_path: Path, small_map: int) -> None:
    with opened(tmp_path / "s") as store:
        store.put_many(many(100))
        walk = store.iterate()
        next(walk)
        before = map_size(store)
        store.put_many(many(3000, day=1))
        assert map_size(store) > before
        assert len([*walk]) >= 99


def test_readers_without_a_pause_do_not_keep_it_from_growing(tmp_path: Path, small_map: int) -> None:
    with opened(tmp_path / "s") as store:
        store.put_many(many(100))
        before, over = map_size(store), threading.Event()
        environment = store._environment
        assert environment is not None

        def read() -> None:
            while not over.is_set():  # four of them: there is always one within a transaction
                environment.read(lambda txn: time.sleep(0.002))

        readers = [threading.Thread(target=read) for _ in range(4)]
        writer = threading.Thread(target=lambda: store.put_many(many(3000, day=1)))
        for thread in (*readers, writer):
            thread.start()
        writer.join(5)
        late = writer.is_alive()
        over.set()
        for thread in (*readers, writer):
            thread.join()
        assert not late
        assert map_size(store) > before


def test_what_another_process_has_made_larger_is_read(tmp_path: Path, small_map: int) -> None:
    code = HEAD + (
        "lmdb_environment.MAP_BYTES = 1 << 16\n"
        "with open_store(sys.argv[1]) as store:\n"
        "    store.put_many(VectorBatch.of([vector(f'u{n:06d}', 2, 64) for n in range(3000)]))\n"
    )
    with opened(tmp_path / "s") as store:
        store.put_many(many(10))
        before = map_size(store)
        output(python(code, str(tmp_path / "s")))
        found = store.get("u002999")
        assert found is not None
        assert found.timestamp == DAY + timedelta(days=2)
        assert map_size(store) > before
        output(python(code.replace("'u{n", "'w{n"), str(tmp_path / "s")))
        assert store.put(vector("z", dim=64)) == "stored"
        assert store.count() == 6001


def test_it_may_grow_while_another_process_opens_it(
    tmp_path: Path, small_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = HEAD + (
        "lmdb_environment.MAP_BYTES = 1 << 16\n"
        "with open_store(sys.argv[1]) as store:\n"
        "    store.put_many(VectorBatch.of([vector(f'u{n:06d}', 2, 64) for n in range(3000)]))\n"
    )
    with opened(tmp_path / "s") as store:
        store.put_many(many(10))
    plainly = lmdb.open

    def slowly(*arguments: Any, **settings: Any) -> Any:
        environment = plainly(*arguments, **settings)
        output(python(code, str(tmp_path / "s")))
        return environment

    monkeypatch.setattr(lmdb, "open", slowly)
    with opened(tmp_path / "s") as store:
        assert store.count() == 3000


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_processes_agree_on_the_newest(tmp_path: Path) -> None:
    """Each writes every day of every user in an order of its own, with a map that all of them outgrow."""
    code = HEAD + (
        "lmdb_environment.MAP_BYTES = 1 << 16\n"
        "rng = np.random.default_rng(int(sys.argv[2]))\n"
        "with open_store(sys.argv[1], durable=False) as store:\n"
        "    for day in rng.permutation(30):\n"
        "        users = [f'u{n:03d}' for n in rng.permutation(200)]\n"
        "        if day % 2:\n"
        "            store.put_many(VectorBatch.of([vector(user, int(day), 64) for user in users]))\n"
        "        else:\n"
        "            for user in users:\n"
        "                store.put(vector(user, int(day), 64))\n"
    )
    with ExitStack() as stack:  # all are ended and closed, also where one has failed
        processes = [stack.enter_context(python(code, str(tmp_path / "s"), str(seed))) for seed in range(3)]
        for process in processes:
            assert process.wait(120) == 0
    with opened(tmp_path / "s") as store:
        found = list(store.iterate())
        assert len(found) == store.count() == 200
        assert {v.timestamp for v in found} == {DAY + timedelta(days=29)}
        assert all((v.embedding == 29).all() for v in found)


def test_a_folder_is_opened_once_a_process_and_closed_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with opened(tmp_path / "s") as first, opened(tmp_path / "link") as second:
        assert first._environment is second._environment
        first.put(vector("u1"))
        first.close()
        assert second.get("u1") is not None
    assert not lmdb_environment._OPEN


def test_closing_waits_for_what_other_threads_are_writing(tmp_path: Path) -> None:
    """LMDB unmaps the file and gives its number back, whoever is writing to it: the process would end by a signal."""
    code = HEAD + (
        "import threading, time\n"
        "def write(store, thread, told):\n"
        "    try:\n"
        "        for day in range(10**6):\n"
        "            rows = [vector(f'{thread}-{day}-{row}', day, 512) for row in range(64)]\n"
        "            store.put_many(VectorBatch.of(rows))\n"
        "    except Exception as error:\n"
        "        told.append(f'{type(error).__name__} {error}')\n"
        "for number in range(5):\n"
        "    store, told = open_store(f'{sys.argv[1]}{number}'), []\n"
        "    threads = [threading.Thread(target=write, args=(store, thread, told)) for thread in range(3)]\n"
        "    [thread.start() for thread in threads]\n"
        "    time.sleep(0.2)\n"
        "    store.close()\n"
        "    [thread.join() for thread in threads]\n"
        "    assert len(told) == 3 and all('StoreError' in text and 'was closed' in text for text in told), told\n"
        "    with open_store(f'{sys.argv[1]}{number}') as store:\n"
        "        assert store.count() % 64 == 0 and sum(1 for _ in store.iterate()) == store.count()\n"
        "print('whole')\n"
    )
    assert output(python(code, str(tmp_path / "s"))) == "whole\n"


def test_a_folder_that_was_removed_and_made_again_is_another_store(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as first:
        first.put(vector("u1"))
        (tmp_path / "s").rename(tmp_path / "old")
        with opened(tmp_path / "s") as second:
            assert second.count() == 0
            assert first.count() == 1


def test_a_forked_process_must_open_it_anew(tmp_path: Path) -> None:
    code = HEAD + (
        "import os\n"
        "store = open_store(sys.argv[1])\n"
        "store.put(vector('u1', 0, 3))\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        store.get('u1')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error, flush=True)\n"
        "    with open_store(sys.argv[1]) as mine:\n"
        "        print(mine.get('u1').user_id, mine.put(vector('u2', 0, 3)), flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(store.count())\n"
        "store.close()\n"
    )
    lines = output(python(code, str(tmp_path / "s"))).splitlines()
    assert lines[0].startswith("StoreError")
    assert "was opened before the process forked; open it after that" in lines[0]
    assert lines[1:] == ["u1 stored", "2"]


def test_what_is_acknowledged_is_on_disk_unless_less_is_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        assert store._environment is not None
        assert store._environment.env.flags()["sync"]
        with opened(tmp_path / "s", durable=False) as second:  # the stricter one holds for both
            assert second._environment is store._environment
    with opened(tmp_path / "s", durable=False) as store:
        assert store._environment is not None
        assert not store._environment.env.flags()["sync"]
        store.put(vector("u1"))
        with pytest.raises(StoreError, match="durable=False; close it first"):
            open_store(str(tmp_path / "s"))
    with opened(tmp_path / "s") as store:
        assert store.count() == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc which folders were synced")
def test_a_new_stores_name_is_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may lose the whole folder, whose file was written so carefully."""
    synced: list[Path] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with opened(tmp_path / "a" / "b" / "s"):
        assert synced == [tmp_path / "a" / "b" / "s", tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    with opened(tmp_path / "a" / "b" / "s"), opened(tmp_path / "other", durable=False):
        assert len(synced) == 4


# ---------------------------------------------------------------- kill -9


def killed(process: subprocess.Popen[str], when: Callable[[], bool]) -> str:
    """End a process by SIGKILL as soon as it is time; returns what it had said."""
    with process:
        deadline = time.monotonic() + 100
        while not when():
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
        text, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return text


@pytest.mark.slow
@pytest.mark.parametrize("durable", [True, False])
def test_no_acknowledged_vector_is_lost_by_kill_9(tmp_path: Path, durable: bool) -> None:
    code = HEAD + (
        f"store = open_store(sys.argv[1], durable={durable})\n"
        "for number in range(10**9):\n"
        "    store.put(vector(f'u{number % 300}', number, 8))\n"
        "    print(number, flush=True)\n"
        "    if number % 7 == 0:\n"
        "        store.delete(f'gone{number}')\n"
    )
    for at in (50, 400, 1000):
        folder = tmp_path / str(at)

        def far_enough(folder: Path = folder, at: int = at) -> bool:
            return (folder / "data.mdb").exists() and _count(folder) >= min(at, 300) and time.sleep(at / 2000) is None

        said = killed(python(code, str(folder)), far_enough).split("\n")[:-1]  # the last line may be half of one
        acknowledged = {number % 300: number for number in map(int, said)}
        assert len(acknowledged) >= min(at, 300) - 1
        with opened(folder) as store:
            for user, number in acknowledged.items():
                found = store.get(f"u{user}")
                assert found is not None
                day = (found.timestamp - DAY).days
                assert day in (number, number + 300)  # the one after may have been written and not yet told
                assert (found.embedding == day).all()
                assert store.put(vector(f"u{user}", number - 1, 8)) == "older"
            assert store.count() == sum(store.stats().versions.values()) == len(list(store.iterate()))
            assert store.put(vector("after", dim=8)) == "stored"


def _count(folder: Path) -> int:
    """Users in a store that another process may be making."""
    try:
        with open_store(str(folder), create=False) as store:
            return store.count()
    except StoreError:
        return 0


@pytest.mark.slow
def test_an_import_ended_by_kill_9_is_whole_batches_and_goes_on(tmp_path: Path) -> None:
    rows, size = 60_000, 200
    rng = np.random.default_rng(0)
    order = [f"u{number:06d}" for number in rng.permutation(rows)]
    numbers = rng.standard_normal((rows, 16), dtype=np.float32)
    table = tmp_path / "table.parquet"
    pl.DataFrame({"user_id": order, "embedding": pl.Series(numbers, dtype=pl.Array(pl.Float32, 16))}).with_columns(
        timestamp=pl.lit(DAY)
    ).write_parquet(table)
    folder, newer = tmp_path / "s", {order[10]: 3.0, order[2000]: 4.0, order[-1]: 5.0}
    with opened(folder) as store:
        for user, day in newer.items():  # before the import, which is older
            store.put(vector(user, day, 16))
        words = ["users", "import", str(table), str(folder), "--batch_size", str(size)]
        process = subprocess.Popen(
            [sys.executable, "-m", "e2p.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        newer[order[0]] = 6.0
        assert killed(process, lambda: store.count() > 20 * size) == ""
        store.put(vector(order[0], 6, 16))  # goes on in the process that was not killed
    with opened(folder) as store:
        count = store.count() - 1  # the import had not reached the last row
        assert count % size == 0
        assert 20 * size <= count < rows
        assert {v.user_id for v in store.iterate()} == {*order[:count], order[-1]}
        assert store.stats().versions == {"": count - 3, "v1": 4}
    assert main(words) == 0
    with opened(folder) as store:
        assert store.count() == rows
        for row in rng.integers(0, rows, 500):
            found = store.get(order[row])
            assert found is not None
            if order[row] not in newer:
                assert found.embedding.tobytes() == numbers[row].tobytes()
        for user, day in newer.items():
            kept = store.get(user)
            assert kept is not None
            assert kept.timestamp == DAY + timedelta(days=day)


# ---------------------------------------------------------------- what is no store


def test_what_is_no_store_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("x")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/data.mdb").write_text("not a database" * 1000)
    with lmdb.open(str(tmp_path / "foreign")) as other, other.begin(write=True) as txn:
        txn.put(b"a", b"b")
    with lmdb.open(str(tmp_path / "named"), max_dbs=8) as other:
        for name in (*lmdb_environment.DATABASES, "more"):
            other.open_db(name.encode())
    with lmdb.open(str(tmp_path / "same"), max_dbs=8) as other:
        for name in lmdb_environment.DATABASES:
            other.open_db(name.encode())
    for name, message in (
        ("file", "expected a store or an empty folder, found a file; name another folder"),
        ("file/below", "no store can be made there: Not a directory; name another folder"),
        ("full", "expected a store or an empty folder, found notes.txt; name another folder"),
        ("text", "the store cannot be opened: .*not an LMDB file.*; check the folder"),
        ("foreign", "expected a store of user vectors, found another LMDB database; name another folder"),
        ("named", "expected a store of user vectors, found another LMDB database"),
        ("same", "expected a store of user vectors, found format b'none'"),
    ):
        for _ in range(2):  # the first failure must leave nothing open
            with pytest.raises(StoreError, match=message) as caught:
                open_store(str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
    with lmdb.open(str(tmp_path / "foreign")) as other, other.begin() as txn:
        assert dict(txn.cursor()) == {b"a": b"b"}  # and is left as it was
    assert (tmp_path / "text/data.mdb").read_text().startswith("not a database")
    assert not lmdb_environment._OPEN


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.put(vector("u1"))
        env = store._environment
        assert env is not None
        env.write(lambda txn: txn.put(b"format", b"2", db=env.databases["about"]))
    with pytest.raises(StoreError, match="expected format 1, found 2: written by a newer e2p; pip install -U e2p"):
        open_store(str(tmp_path / "s"))
    assert not lmdb_environment._OPEN


def test_a_damaged_record_names_its_user_and_can_be_put_again(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.put(vector("u1"))
        env = store._environment
        assert env is not None
        record = env.read(lambda txn: txn.get(key_of("u1"), db=env.databases["vectors"]))
        env.write(lambda txn: txn.put(b"u1", record[:-1] + b"?", db=env.databases["vectors"]))
        for call in (lambda: store.get("u1"), lambda: store.get_many(["u1"]), lambda: list(store.iterate())):
            with pytest.raises(StoreError, match="the record of b'u1' is damaged; put the user's vector again"):
                call()
        assert store.put(vector("u1", day=1)) == "stored"
        assert store.get("u1") is not None


def test_a_file_cut_short_ends_in_a_line_and_not_in_a_crash(tmp_path: Path) -> None:
    """In a process of its own: LMDB maps the file, and a page beyond its end would end the process."""
    with opened(tmp_path / "s") as store:
        store.put_many(many(3000))
    file = tmp_path / "s/data.mdb"
    whole = file.read_bytes()
    code = HEAD + (
        "from e2p.errors import StoreError\n"
        "try:\n"
        "    store = open_store(sys.argv[1])\n"
        "    print(len(list(store.iterate())))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    for share in (0.25, 0.5, 0.9):
        file.write_bytes(whole[: int(len(whole) * share) // 4096 * 4096])
        text = output(python(code, str(tmp_path / "s")))
        assert str(tmp_path / "s") in text
        assert "check the folder, or import into a new one" in text
    file.write_bytes(whole + bytes(4096))
    assert output(python(code, str(tmp_path / "s"))) == "3000\n"


def test_no_room_is_one_line(tmp_path: Path) -> None:
    """The limit of file sizes stands for a full disk."""
    code = HEAD + (
        "import resource, signal\n"
        "from e2p.errors import StoreError\n"
        "store = open_store(sys.argv[1])\n"
        "store.put_many(VectorBatch.of([vector(f'u{n}', 1, 64) for n in range(100)]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "try:\n"
        "    store.put_many(VectorBatch.of([vector(f'w{n}', 1, 64) for n in range(3000)]))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
        "print(store.count(), store.put(vector('u1', 2, 64)))\n"
    )
    first, second = output(python(code, str(tmp_path / "s"))).splitlines()
    assert f"{tmp_path / 's'}: the store cannot be written" in first
    assert second == "100 stored"
