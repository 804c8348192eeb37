"""What every store of user vectors promises, run against all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from e2p.errors import ConfigError, DataError, StoreError
from e2p.users.records import OUTCOMES, decode, encode, key_of, microseconds
from e2p.users.store import PutCounts, StoredVector, VectorBatch, VectorStore, open_store

DAY = datetime(2024, 5, 1, tzinfo=UTC)
IDS = [
    "u1",
    "007",
    "null",
    " spaced ",
    "a" * 478,
    "a" * 479,
    "a" * 5000,
    "é" * 300,
    "ü😀中",
    "x\x00y",
    "-1",
    "\U0010ffff",
]


def vector(user: str = "u1", day: float = 0, first: float = 1.0, version: str = "v1", dim: int = 3) -> StoredVector:
    return StoredVector(user, np.arange(dim, dtype=np.float32) + first, DAY + timedelta(days=day), version)


def plain(found: StoredVector | None) -> Any:
    """All that is in a vector, to compare: numbers by their bits."""
    return found and (found.user_id, found.embedding.tobytes(), found.timestamp, found.version)


# ---------------------------------------------------------------- one vector


def test_a_vector_comes_back_bit_for_bit(store: VectorStore) -> None:
    odd = np.array([-0.0, 1e-45, 3.4e38, 1 / 3], dtype=np.float32)
    put = StoredVector("u1", odd, datetime(2024, 5, 1, 12, 0, 0, 123457, tzinfo=UTC), "räume/v1")
    assert (store.get("u1"), store.dim, store.count()) == (None, None, 0)
    assert store.put(put) == "stored"
    found = store.get("u1")
    assert plain(found) == plain(put)
    assert found is not None
    assert found.embedding.dtype == np.float32
    assert not found.embedding.flags.writeable
    assert (store.dim, store.count()) == (4, 1)


def test_a_vector_is_a_copy_of_what_was_given() -> None:
    given = np.ones(3, dtype=np.float32)
    made = StoredVector("u1", given, DAY)
    given[0] = 9
    assert made.embedding.tolist() == [1, 1, 1]


@pytest.mark.parametrize("user", IDS, ids=range(len(IDS)))
def test_ids_are_any_text(store: VectorStore, user: str) -> None:
    others = [user + "a", user[:-1] + "b", user * 2]
    for number, other in enumerate([user, *others]):
        assert store.put(vector(other, first=number)) == "stored"
    for number, other in enumerate([user, *others]):
        assert plain(store.get(other)) == plain(vector(other, first=number))
    assert sorted(v.user_id for v in store.iterate()) == sorted([user, *others])
    assert store.delete(user)
    assert store.get(user) is None
    assert store.count() == 3


@pytest.mark.parametrize("time", [datetime.min.replace(tzinfo=UTC), DAY, datetime.max.replace(tzinfo=UTC)])
def test_times_of_all_years_compare(store: VectorStore, time: datetime) -> None:
    middle = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert store.put(StoredVector("u1", np.ones(2), middle)) == "stored"
    assert store.put(StoredVector("u1", np.ones(2), time)) == ("stored" if time > middle else "older")
    found = store.get("u1")
    assert found is not None
    assert found.timestamp == max(time, middle)


def test_times_are_kept_in_utc(store: VectorStore) -> None:
    store.put(StoredVector("u1", np.ones(2), datetime(2024, 5, 1, 2, tzinfo=timezone(timedelta(hours=2)))))
    found = store.get("u1")
    assert found is not None
    assert found.timestamp.isoformat() == "2024-05-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vector(""), "expected a user id, a text that is not blank, got ''"),
        (lambda: vector("  "), "expected a user id, a text that is not blank"),
        (lambda: vector(7), "expected a user id, a text that is not blank, got 7"),  # type: ignore[arg-type]
        (lambda: vector("\ud800"), "half a surrogate pair"),
        (
            lambda: StoredVector("u", np.ones((2, 2), np.float32), DAY),
            r"expected an embedding \[D\], got shape \[2, 2\]",
        ),
        (lambda: StoredVector("u", np.ones(0, np.float32), DAY), r"expected an embedding \[D\], got shape \[0\]"),
        (
            lambda: StoredVector("u", np.array([1, np.nan]), DAY),
            "user 'u': expected finite float32 numbers, got nan at 1",
        ),
        (lambda: StoredVector("u", np.array([1e39]), DAY), "expected finite float32 numbers, got inf at 0"),
        (lambda: StoredVector("u", np.ones(2), datetime(2024, 1, 1)), "a datetime with a time zone, got no time zone"),
        (lambda: StoredVector("u", np.ones(2), "2024-01-01"), "with a time zone, got '2024-01-01'"),  # type: ignore[arg-type]
        (lambda: vector(version="v" * 256), "expected a version of at most 255 bytes"),
        (lambda: vector(version="\udcff"), "expected a version of at most 255 bytes"),
        (
            lambda: VectorBatch.of([vector(), vector("u2", dim=4)]),
            "user 'u2': expected an embedding of 3 numbers, got 4",
        ),
        (lambda: batch(["u1", ""]), "not blank"),
        (
            lambda: batch(["a", "b"], rows=[[1, 2], [3, np.inf]]),
            "user 'b': expected finite float32 numbers, got inf at 1",
        ),
        (lambda: batch(["a"], times=[2**62]), "user 'a': expected a timestamp in the years 1 to 9999"),
        (lambda: batch(["a"], versions=["v" * 300]), "user 'a': expected a version of at most 255 bytes"),
        (lambda: batch(["a", "b"], times=[1]), "expected as many users as embeddings"),
        (lambda: batch(["a"], rows=[[]]), "expected embeddings float32"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def batch(users: list[str], rows: Any = None, times: Any = None, versions: Any = None) -> VectorBatch:
    block = np.array(rows if rows is not None else [[1, 2]] * len(users), dtype=np.float32)
    moments = np.array(times if times is not None else [0] * len(users), dtype=np.int64)
    return VectorBatch(users, block, moments, versions or [""] * len(users))


def test_blank_ids_are_refused_when_asked_for_too(store: VectorStore) -> None:
    for ask in (store.get, store.delete, lambda user: store.get_many(["u1", user])):
        with pytest.raises(DataError, match="not blank"):
            ask(" ")


# ---------------------------------------------------------------- the rules


def test_an_older_vector_never_replaces_a_newer_one(store: VectorStore) -> None:
    assert store.put(vector(day=1)) == "stored"
    assert store.put(vector(day=0, first=5)) == "older"
    assert store.put(StoredVector("u1", np.zeros(3), DAY + timedelta(days=1, microseconds=-1))) == "older"
    assert plain(store.get("u1")) == plain(vector(day=1))
    assert store.put(StoredVector("u1", np.zeros(3), DAY + timedelta(days=1, microseconds=1))) == "stored"


def test_of_two_vectors_of_a_time_the_last_written_stays(store: VectorStore) -> None:
    assert store.put(vector()) == "stored"
    assert store.put(vector()) == "unchanged"
    assert store.put(vector(first=2)) == "stored"
    assert store.put(vector(first=2, version="v2")) == "stored"
    assert store.put(vector(first=2, version="v2")) == "unchanged"
    assert plain(store.get("u1")) == plain(vector(first=2, version="v2"))


def test_a_store_holds_one_dimension(store: VectorStore, address: str) -> None:
    store.put(vector())
    for put in (lambda: store.put(vector("u2", dim=4)), lambda: store.put_many(batch(["u3"]))):
        with pytest.raises(
            DataError, match=r"expected an embedding of 3 numbers, got [24]; a store holds one dimension"
        ):
            put()
    assert (store.count(), store.dim) == (1, 3)
    store.delete("u1")
    with pytest.raises(DataError, match="holds one dimension"):
        store.put(vector("u2", dim=4))


def test_a_batch_counts_what_became_of_it(store: VectorStore) -> None:
    store.put(vector("gone", day=1))
    store.delete("gone")
    store.put(vector("new", day=2))
    store.put(vector("same"))
    given = [
        *(vector("new", day=1), vector("same"), vector("gone", day=1), vector("a")),
        *(vector("b", day=1), vector("b", day=0, first=3), vector("c", day=0), vector("c", day=3)),
    ]
    counts = store.put_many(VectorBatch.of(given))
    assert counts == PutCounts(stored=4, unchanged=1, older=2, deleted=1)
    assert store.put_many(VectorBatch.of(given)) == PutCounts(stored=0, unchanged=4, older=3, deleted=1)
    found = store.get_many(["c", "nobody", "b", "c", "gone"])
    assert [v and plain(v) for v in found] == [
        plain(vector("c", day=3)), None, plain(vector("b", day=1)), plain(vector("c", day=3)), None
    ]  # fmt: skip
    assert store.put_many(VectorBatch.of([])) == PutCounts()
    assert store.get_many([]) == []


def test_many_rows_at_once(store: VectorStore) -> None:
    """More than a page of a walk and than a piece of a write to Redis."""
    users = [f"u{number:05d}" for number in np.random.default_rng(0).permutation(3000)]
    rows = np.random.default_rng(1).standard_normal((3000, 5)).astype(np.float32)
    given = VectorBatch(users, rows, np.arange(3000), ["v1", "v2", "v2"] * 1000)
    assert store.put_many(given) == PutCounts(stored=3000)
    assert store.count() == 3000
    assert [v.user_id for v in store.iterate()] == sorted(users)
    found = store.get_many(users)
    assert np.array_equal(np.stack([v.embedding for v in found if v is not None]), rows)
    assert [microseconds(v.timestamp) for v in found if v is not None] == list(range(3000))
    stats = store.stats()
    assert (stats.users, stats.dim, stats.deletions) == (3000, 5, 0)
    assert stats.versions == {"v1": 1000, "v2": 2000}
    assert stats.nbytes is not None
    assert stats.nbytes > 3000 * 5 * 4


def test_versions_stand_side_by_side_and_are_counted(store: VectorStore) -> None:
    for user in ("u1", "u2", "u3"):
        store.put(vector(user, version=""))
    store.put(vector("u1", day=1, version="v2"))
    assert store.stats().versions == {"": 2, "v2": 1}
    store.delete("u2")
    store.delete("u3")
    assert store.stats().versions == {"v2": 1}


def test_a_deleted_user_does_not_come_back_by_an_old_table(store: VectorStore) -> None:
    store.put(vector("u1"))
    assert store.delete("u1") is True
    assert store.delete("u1") is False
    assert store.get("u1") is None
    assert store.put(vector("u1")) == "deleted"
    assert store.put_many(VectorBatch.of([vector("u1"), vector("u2")])) == PutCounts(stored=1, deleted=1)
    assert [v.user_id for v in store.iterate()] == ["u2"]
    assert store.stats().deletions == 1
    now = StoredVector("u1", np.ones(3), datetime.now(UTC) + timedelta(seconds=1))
    assert store.put(now) == "stored"
    assert store.stats().deletions == 0
    assert store.put(vector("u1")) == "older"


def test_who_never_was_there_stays_away_too(store: VectorStore) -> None:
    assert store.delete("u1") is False
    assert store.put(vector("u1")) == "deleted"
    assert (store.count(), store.stats().deletions, store.dim) == (0, 1, None)


def test_a_vector_of_the_future_is_deleted_for_good(store: VectorStore) -> None:
    future = StoredVector("u1", np.ones(3), datetime(2300, 1, 1, tzinfo=UTC))
    store.put(future)
    assert store.delete("u1")
    assert not store.delete("u1")
    assert store.put(future) == "deleted"


def test_forgetting_leaves_no_trace(store: VectorStore) -> None:
    store.put(vector("u1"))
    assert store.delete("u1", forget=True)
    assert store.stats().deletions == 0
    assert store.put(vector("u1")) == "stored"
    store.delete("u1")
    assert store.delete("u1", forget=True) is False
    assert store.stats().deletions == 0
    assert store.put(vector("u1")) == "stored"


def test_all_are_gone_through_while_writing_goes_on(store: VectorStore) -> None:
    users = [f"u{number:04d}" for number in range(0, 2000, 2)]
    store.put_many(VectorBatch.of([vector(user) for user in users]))
    seen = []
    for number, found in enumerate(store.iterate()):
        seen.append(found.user_id)
        if number % 50 == 0:
            store.put(vector(f"u{number * 2 + 1:04d}", first=number))
            store.delete(f"u{number * 2 - 20:04d}")
    assert seen == sorted(set(seen))
    assert set(users) <= set(seen) | {f"u{number * 2 - 20:04d}" for number in range(0, 1100, 50)}
    assert list(store.iterate())[-1].user_id == "u1998"


def test_a_closed_store_says_so(store: VectorStore) -> None:
    store.put(vector())
    store.close()
    store.close()
    calls: list[Callable[[], Any]] = [
        *(lambda: store.get("u1"), lambda: store.put(vector()), store.count, lambda: next(iter(store.iterate()))),
        *(store.stats, lambda: store.delete("u1"), lambda: store.get_many(["u1"])),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="was closed; open it again"):
            call()


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_a_store_is_there_when_it_is_opened_again(kind: str, address: str) -> None:
    with pytest.raises(StoreError, match="no store of user vectors is there"):
        open_store(address, create=False)
    with open_store(address) as first:
        first.put(vector())
        first.delete("u2")
    with open_store(address, create=False) as second, open_store(address) as third:
        assert plain(second.get("u1")) == plain(vector())
        assert (second.dim, second.count(), second.put(vector("u2"))) == (3, 1, "deleted")
        third.put(vector("u3"))
        third.close()
        assert second.count() == 2


@pytest.mark.parametrize("address", ["", " ", "http://x", "s3://bucket/x"])
def test_an_address_of_no_kind_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected a folder, redis://"):
        open_store(address)


# ---------------------------------------------------------------- at the same time


def test_threads_agree_on_the_newest(store: VectorStore) -> None:
    """Whatever the order in which threads come, the newest stays; nobody sees time go backwards."""
    users, days, faults = [f"u{number}" for number in range(6)], 40, []

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for day in rng.permutation(days):
            made = [vector(user, day=int(day), first=float(day)) for user in rng.permutation(users)]
            if seed % 2:
                store.put_many(VectorBatch.of(made))
            else:
                for one in made:
                    store.put(one)

    def read() -> None:
        last = dict.fromkeys(users, DAY)
        while not done.is_set():
            for found in store.get_many(users):
                if found is None:
                    continue
                if found.timestamp < last[found.user_id] or plain(found) != plain(
                    vector(found.user_id, (found.timestamp - DAY).days, (found.timestamp - DAY).days)
                ):
                    faults.append(found)
                last[found.user_id] = found.timestamp

    done = threading.Event()
    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not faults
    assert [plain(v) for v in store.get_many(users)] == [plain(vector(u, days - 1, days - 1)) for u in users]


# ---------------------------------------------------------------- any order of everything

PEOPLE = ["u1", "u2", "ü", "l" * 600]
TIMES = [datetime(1, 1, 1, tzinfo=UTC), DAY, DAY + timedelta(microseconds=1), DAY + timedelta(days=400)]
TIMES += [datetime(2500, 1, 1, tzinfo=UTC), datetime(2500, 1, 1, 0, 0, 1, tzinfo=UTC)]
some_vectors = st.builds(
    lambda user, time, number, version: StoredVector(user, np.array([number, 1]), time, version),
    st.sampled_from(PEOPLE),
    st.sampled_from(TIMES),
    st.integers(0, 2),
    st.sampled_from(["", "v1", "v2"]),
)


class Machine(RuleBasedStateMachine):
    """A store beside two dicts that follow the same rules in the plainest way."""

    def __init__(self, opened: VectorStore) -> None:
        super().__init__()
        self.store = opened
        for user in PEOPLE:
            opened.delete(user, forget=True)
        self.vectors: dict[str, StoredVector] = {}
        self.deleted: dict[str, datetime] = {}

    def expect(self, given: StoredVector) -> str:
        old, gone = self.vectors.get(given.user_id), self.deleted.get(given.user_id)
        if old is not None and old.timestamp > given.timestamp:
            return "older"
        if old is not None and plain(old) == plain(given):
            return "unchanged"
        if gone is not None and gone >= given.timestamp:
            return "deleted"
        self.vectors[given.user_id] = given
        self.deleted.pop(given.user_id, None)
        return "stored"

    @rule(given=some_vectors)
    def put(self, given: StoredVector) -> None:
        assert self.store.put(given) == self.expect(given)

    @rule(given=st.lists(some_vectors, max_size=6))
    def put_many(self, given: list[StoredVector]) -> None:
        outcomes = [self.expect(one) for one in given]
        counts = self.store.put_many(VectorBatch.of(given))
        assert counts == PutCounts(*(outcomes.count(name) for name in OUTCOMES))

    @rule(user=st.sampled_from(PEOPLE), forget=st.booleans())
    def delete(self, user: str, forget: bool) -> None:
        old = self.vectors.pop(user, None)
        assert self.store.delete(user, forget=forget) == (old is not None)
        times = [datetime.now(UTC), self.deleted.get(user, DAY), old.timestamp if old else DAY]
        self.deleted.pop(user, None)
        if not forget:
            self.deleted[user] = max(times)

    @invariant()
    def same(self) -> None:
        assert [plain(v) for v in self.store.get_many(PEOPLE)] == [plain(self.vectors.get(user)) for user in PEOPLE]
        walked = list(self.store.iterate())
        assert [v.user_id for v in walked] == sorted(self.vectors, key=key_of)
        assert all(plain(v) == plain(self.vectors[v.user_id]) for v in walked)
        stats, versions = self.store.stats(), [v.version for v in self.vectors.values()]
        assert stats.users == self.store.count() == len(self.vectors)
        assert stats.versions == {version: versions.count(version) for version in set(versions)}
        assert stats.deletions == len(self.deleted)


def test_any_order_of_writes_and_deletions_ends_as_the_rules_say(store: VectorStore) -> None:
    run_state_machine_as_test(
        lambda: Machine(store),
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---------------------------------------------------------------- the bytes


def test_a_record_is_as_documented() -> None:
    """By hand, from the table in e2p.users.records: other programs may read a store."""
    import struct
    import zlib

    time = datetime(2024, 5, 1, tzinfo=UTC)
    given = StoredVector("ü" * 300, np.array([1.5, -2.0]), time, "v1")
    _, (record,) = encode(VectorBatch.of([given]))
    micros = int(time.timestamp()) * 1_000_000
    head = struct.pack(">BBHIQ", 1, 1, 2, 2, micros + 2**63)
    body = struct.pack("<ff", 1.5, -2.0) + b"v1" + ("ü" * 300).encode()
    assert record == head + struct.pack(">I", zlib.crc32(head + body)) + body
    assert plain(decode(record, key_of(given.user_id), "here")) == plain(given)
    assert len(key_of(given.user_id)) == 511
    assert key_of("u1") == b"u1"


@pytest.mark.parametrize("at", [0, 3, 5, 10, 17, 21, -1])
def test_a_damaged_record_is_never_read_as_a_vector(at: int) -> None:
    _, (record,) = encode(VectorBatch.of([vector()]))
    broken = bytearray(record)
    broken[at] ^= 0x41
    with pytest.raises(StoreError, match=r"here: .*(is damaged|newer e2p)"):
        decode(bytes(broken), b"u1", "here")
    for cut in (0, 5, 19, len(record) - 1):
        with pytest.raises(StoreError, match="is damaged"):
            decode(record[:cut], b"u1", "here")


def test_a_record_of_a_newer_format_is_refused() -> None:
    _, (record,) = encode(VectorBatch.of([vector()]))
    with pytest.raises(
        StoreError, match="here: expected format 1, found 2: written by a newer e2p; pip install -U e2p"
    ):
        decode(b"\x02" + record[1:], b"u1", "here")
