"""Many vectors in one body: lines or Parquet, bad rows by number, bounded memory, no tricks."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e2p.config_serving import LimitsConfig
from e2p.errors import StoreError
from e2p.serving.http import uploads
from e2p.users.store import open_store
from e2p.users.store_memory import MemoryStore
from served import Server, error_of, key, secret, serving, stored, wait_until

LINES, PARQUET = "application/x-ndjson", "application/vnd.apache.parquet"
TIME = pa.timestamp("us", tz="UTC")


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving(limits=LimitsConfig(body_bytes=2000)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """One server for all tests here, with an empty store."""
    for vector in list(running.store.iterate()):
        running.store.delete(vector.user_id, forget=True)
    return running


def upload(server: Server, content: Any, kind: str = LINES, **headers: str) -> Any:
    return server.http.post("/v1/users/embeddings", content=content, headers={"content-type": kind, **headers})


def line(user: Any, vector: Any = (1, 2, 3), **fields: Any) -> bytes:
    return json.dumps({"user_id": user, "embedding": vector, "version": "v1", **fields}).encode() + b"\n"


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def vectors_of(*rows: Any, kind: Any = None) -> Any:
    return pa.array(rows, kind or pa.list_(pa.float32()))


def users(server: Server) -> list[str]:
    return [vector.user_id for vector in server.store.iterate()]


# ---------------------------------------------------------------- lines


def test_lines_are_put(server: Server) -> None:
    body = b"".join(line(f"u{number:04}", (number, 0, 0)) for number in range(1000))
    assert upload(server, body).json() == {
        "object": "users.embeddings",
        "read": 1000,
        "stored": 1000,
        "unchanged": 0,
        "older": 0,
        "deleted": 0,
        "failed": 0,
        "errors": [],
    }
    assert server.store.count() == 1000
    found = server.store.get("u0999")
    assert (found.embedding.tolist(), found.version) == ([999, 0, 0], "v1")
    assert (datetime.now(UTC) - found.timestamp).total_seconds() < 60


def test_lines_split_anywhere_with_and_without_an_end(server: Server) -> None:
    body = line("a", timestamp="2024-05-01T12:00:00Z") + b"\n  \n" + line("é").strip()
    pieces = [body[at : at + 1] for at in range(len(body))]
    assert upload(server, iter(pieces)).json()["stored"] == 2
    assert users(server) == ["a", "é"]
    assert upload(server, b"").json()["read"] == 0


def test_bad_lines_are_told_and_the_others_are_put(server: Server) -> None:
    body = b"".join(
        [
            line("a"),
            b"{nonsense\n",
            line("b", (1, 2)),
            line("", (1, 2, 3)),
            b"\n",
            line("c", (1, 2, "x")),
            line("d", timestamp="2024-05-01T12:00:00"),
            line("e", timestamp="2999-05-01T12:00:00Z"),
            line("f", extra=1),
            line("g" * 3000),
            line("h", [1, 2, 1e39]),
            b"[]\n",
            line("i"),
        ]
    )
    response = upload(server, body)
    assert error_of_upload(response) == (422, "rows_failed")
    report = response.json()["e2p"]
    assert (report["read"], report["stored"], report["failed"]) == (12, 2, 10)
    assert [(e["line"], e["code"]) for e in report["errors"]] == [
        (2, "invalid_json"),
        (3, "wrong_dimension"),
        (4, "invalid_value"),
        (6, "invalid_value"),
        (7, "invalid_value"),
        (8, "timestamp_ahead"),
        (9, "unknown_parameter"),
        (10, "row_too_large"),
        (11, "invalid_value"),
        (12, "invalid_value"),
    ] or sorted(e["line"] for e in report["errors"]) == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert users(server) == ["a", "i"]


def error_of_upload(response: Any) -> tuple[int, str]:
    body = response.json()
    assert set(body) == {"error", "e2p"}
    return response.status_code, body["error"]["code"]


def test_a_hundred_errors_are_told_and_all_are_counted(server: Server) -> None:
    report = upload(server, b"x\n" * 500).json()["e2p"]
    assert (report["failed"], len(report["errors"]), report["errors"][-1]["line"]) == (500, 100, 100)


def test_older_and_deleted_rows_are_counted(server: Server) -> None:
    server.put("a", timestamp="2024-05-02T00:00:00Z")
    server.put("b")
    server.http.delete("/v1/users/b/embedding")
    old = {"timestamp": "2024-05-01T00:00:00Z"}
    body = line("a", **old) + line("b", **old) + line("c", **old) + line("c", **old)
    report = upload(server, body).json()
    assert (report["older"], report["deleted"], report["stored"], report["unchanged"]) == (1, 1, 1, 1)


def test_an_endless_line_takes_no_memory(server: Server) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 10_000
        yield b"\n" + line("a")
        yield b"y" * 3000

    report = upload(server, body()).json()["e2p"]
    assert [(e["line"], e["code"]) for e in report["errors"]] == [(1, "row_too_large"), (3, "row_too_large")]
    assert users(server) == ["a"]


def test_an_upload_that_is_too_large_says_how_far_it_came() -> None:
    with serving(limits=LimitsConfig(upload_bytes=100_000)) as server:

        def body() -> Iterator[bytes]:
            for number in range(3000):
                yield line(f"u{number}")

        response = upload(server, body())
        assert error_of_upload(response) == (413, "body_too_large")
        assert 0 < response.json()["e2p"]["stored"] == server.store.count() < 3000


class Fails(MemoryStore):
    """A store that goes away after two batches."""

    batches = 0

    def put_many(self, batch: Any) -> Any:
        self.batches += 1
        if self.batches > 2:
            raise StoreError("away")
        return super().put_many(batch)


@pytest.mark.parametrize("kind", [LINES, PARQUET])
def test_a_batch_is_in_the_store_or_not(kind: str) -> None:
    names = [f"u{number:04}" for number in range(1000)]
    with serving(store=Fails()) as server:
        if kind == LINES:
            content = b"".join(line(name) for name in names)
        else:
            content = parquet(user_id=names, embedding=vectors_of(*[[1, 2, 3]] * 1000))
        response = upload(server, content, kind)
        assert error_of_upload(response) == (503, "store_unavailable")
        assert response.json()["e2p"]["stored"] == server.store.count() == 512


@pytest.mark.parametrize("kind", [LINES, PARQUET])
def test_a_key_with_a_prefix_puts_its_own_users_alone(kind: str) -> None:
    with serving(keys=[key("shop", "users:write", prefix="shop-")]) as server:
        if kind == LINES:
            content = line("shop-1") + line("other") + line("shop-2")
        else:
            content = parquet(user_id=["shop-1", "other", "shop-2"], embedding=vectors_of(*[[1, 2, 3]] * 3))
        response = upload(server, content, kind, authorization=f"Bearer {secret('shop')}")
        (error,) = response.json()["e2p"]["errors"]
        assert error.pop("message")
        assert error == {"line" if kind == LINES else "row": 2, "code": "user_not_allowed"}
        assert users(server) == ["shop-1", "shop-2"]


@pytest.mark.parametrize("kind", [LINES, PARQUET])
def test_who_is_deleted_during_an_upload_stays_deleted(kind: str, server: Server) -> None:
    """Rows that name no time are as old as the upload, however late in it they come."""
    go = threading.Event()

    def body() -> Iterator[bytes]:
        whole = line("a") + line("b") if kind == LINES else parquet(user_id=["a", "b"], embedding=vectors_of(*PAIR))
        yield whole[: len(whole) // 2 + 1]
        go.wait(10)
        yield whole[len(whole) // 2 + 1 :]

    server.put("b")
    reports: list[Any] = []
    sending = threading.Thread(target=lambda: reports.append(upload(server, body(), kind).json()))
    sending.start()
    wait_until(lambda: server.service().uploads.held == 1)
    server.http.delete("/v1/users/b/embedding")
    go.set()
    sending.join(10)
    assert (reports[0]["stored"], reports[0]["deleted"]) == (1, 1)
    assert users(server) == ["a"]


@pytest.mark.parametrize("kind", [LINES, PARQUET])
def test_a_hopeless_table_is_not_read_to_its_end(kind: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_HOPELESS", 500)
    rows = 2000
    content = b"x\n" * rows
    if kind == PARQUET:
        content = parquet(user_id=[f"u{n}" for n in range(rows)], embedding=vectors_of(*[[1, n] for n in range(rows)]))
    response = upload(server, content, kind)
    assert error_of_upload(response) == (422, "rows_failed")
    assert "the others were not read" in response.json()["error"]["message"]
    assert response.json()["e2p"]["read"] == response.json()["e2p"]["failed"] == 512


def test_what_a_store_refuses_is_told_without_its_folder(tmp_path: Any) -> None:
    """Another server on the same store has put the first vector meanwhile, of another dimension."""
    with open_store(str(tmp_path / "s")) as store, serving(store=store) as server:
        store.put(stored("other", 1, 2))
        server.service().vectors.allowed_dimensions = lambda: (3,)
        refused = server.put("a")
        assert error_of(refused)[:2] == (400, "invalid_value")
        report = upload(server, line("a")).json()
        for text in (refused.json()["error"]["message"], report["e2p"]["errors"][0]["message"]):
            assert text.startswith("expected an embedding of 2 numbers, got 3")


# ---------------------------------------------------------------- Parquet

PAIR = ([1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 3), pa.large_list(pa.int32())]
)
def test_parquet_is_put(kind: Any, server: Server) -> None:
    rows = 600
    content = parquet(
        user_id=[f"u{number:04}" for number in range(rows)],
        embedding=vectors_of(*([number, 1, 2] for number in range(rows)), kind=kind),
        timestamp=pa.array([datetime(2024, 5, 1, tzinfo=UTC)] * rows, TIME),
        version=["v1"] * rows,
        other=[{"x": 1}] * rows,
    )
    report = upload(server, content, PARQUET).json()
    assert (report["read"], report["stored"], report["failed"]) == (rows, rows, 0)
    found = server.store.get("u0599")
    assert (found.embedding.tolist(), found.version) == ([599, 1, 2], "v1")
    assert found.timestamp == datetime(2024, 5, 1, tzinfo=UTC)


def test_bad_rows_of_parquet_are_told_and_the_others_are_put(server: Server) -> None:
    content = parquet(
        user_id=["a", None, "c", "d", "e", " ", "g", "h"],
        embedding=vectors_of([1, 2, 3], [1, 2, 3], [1, 2], None, [1, None, 3], [1, 2, 3], [1, 2, np.nan], [1, 2, 3]),
        timestamp=pa.array([None] * 7 + [datetime(2999, 1, 1, tzinfo=UTC)], TIME),
    )
    response = upload(server, content, PARQUET)
    assert error_of_upload(response) == (422, "rows_failed")
    report = response.json()["e2p"]
    assert [e["row"] for e in report["errors"]] == [2, 3, 4, 5, 6, 7, 8]
    assert report["errors"][-1]["code"] == "timestamp_ahead"
    assert all("expected" in e["message"] or "ahead" in e["message"] for e in report["errors"])
    assert users(server) == ["a"]


class Secret(pa.ExtensionType):
    """A type of one's own, as a file may name it."""

    def __init__(self) -> None:
        super().__init__(pa.list_(pa.float32()), "tests.secret")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Secret:
        return cls()


@pytest.fixture
def extension() -> Iterator[Secret]:
    kind = Secret()
    pa.register_extension_type(kind)
    yield kind
    pa.unregister_extension_type("tests.secret")


def test_a_type_of_ones_own_is_refused(extension: Secret, server: Server) -> None:
    storage = vectors_of([1, 2, 3])
    content = parquet(user_id=["a"], embedding=pa.ExtensionArray.from_storage(extension, storage))
    response = upload(server, content, PARQUET)
    assert error_of_upload(response) == (400, "invalid_parquet")
    assert "column embedding: expected lists of numbers" in response.json()["error"]["message"]


def test_times_that_no_calendar_has(server: Server) -> None:
    times = pa.array([2**62, -(2**62), 1_714_564_800_000_000], TIME)
    content = parquet(user_id=["a", "b", "c"], embedding=vectors_of(*[[1, 2, 3]] * 3), timestamp=times)
    response = upload(server, content, PARQUET)
    assert error_of_upload(response) == (422, "rows_failed")
    errors = response.json()["e2p"]["errors"]
    assert [(e["row"], e["code"]) for e in errors] == [(1, "invalid_value"), (2, "invalid_value")]
    assert all("expected a time in the years 1 to 9999" in e["message"] for e in errors)
    assert users(server) == ["c"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user_id": ["a" * 70_000_000], "embedding": [[1.0, 2.0, 3.0]]},
            "column user_id: expected at most 67,108,864",
        ),
        (
            {"user_id": ["a"], "embedding": [[1.0, 2, 3]], "version": ["v" * 70_000_000]},
            "column version: expected at m",
        ),
        ({"user_id": pa.nulls(100_000, pa.string()), "embedding": pa.nulls(100_000, pa.list_(pa.float32()))}, "a byte"),
    ],
    ids=["id", "version", "rows"],
)
def test_a_small_file_that_unpacks_to_a_huge_one(columns: dict[str, Any], message: str, server: Server) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    assert len(file.getvalue()) < 20_000
    response = upload(server, file.getvalue(), PARQUET)
    assert error_of_upload(response) == (400, "invalid_parquet")
    assert message in response.json()["error"]["message"]
    assert response.json()["e2p"]["read"] == 0


def test_large_row_groups_of_many_users_are_taken() -> None:
    """As pyarrow writes them where nothing is said: the bounds above are not for these."""
    rows, dim = 50_000, 512
    block = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    content = parquet(
        user_id=[f"user-{number:08}" for number in range(rows)],
        embedding=pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), dim),
    )
    assert pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(1).total_uncompressed_size > 1 << 26
    start, frame = next(uploads._batches(io.BytesIO(content), (dim,)))
    assert (start, len(frame), frame["user_id"][0]) == (0, 256, "user-00000000")


GOOD = {"user_id": ["a"], "embedding": vectors_of([1, 2, 3])}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["a"]}, "expected one column embedding"),
        ({"embedding": GOOD["embedding"]}, "expected one column user_id"),
        (GOOD | {"embedding": ["[1, 2, 3]"]}, "column embedding: expected lists of numbers, got string"),
        (GOOD | {"embedding": pa.array([b"\x80\x04"])}, "column embedding: expected lists of numbers, got binary"),
        (GOOD | {"embedding": pa.array([[["1"]]])}, "column embedding: expected lists of numbers"),
        (GOOD | {"user_id": [1.5]}, "column user_id: expected texts or whole numbers, got double"),
        (GOOD | {"timestamp": pa.array([datetime(2024, 5, 1)])}, "column timestamp: expected times with a zone"),
        (GOOD | {"timestamp": ["2024-05-01T12:00:00Z"]}, "column timestamp: expected times with a zone"),
        (GOOD | {"version": [5]}, "column version: expected texts"),
        (GOOD | {"user_id": ["a" * 2000]}, "column user_id: expected at most 1024 bytes, got 2000"),
        (GOOD | {"embedding": vectors_of([0.0] * 100_000)}, "expected 3 numbers in every row, got 100000"),
    ],
)
def test_parquet_that_is_no_table_of_vectors(columns: dict[str, Any], message: str, server: Server) -> None:
    response = upload(server, parquet(**columns), PARQUET)
    assert error_of_upload(response)[0] == 400
    assert message in response.json()["error"]["message"]
    assert users(server) == []


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1", b"nonsense" * 50])
def test_what_is_no_parquet(content: bytes, server: Server) -> None:
    assert error_of_upload(upload(server, content, PARQUET)) == (400, "invalid_parquet")


def test_a_damaged_file_is_no_accident() -> None:
    whole = parquet(user_id=[f"u{n}" for n in range(500)], embedding=vectors_of(*[[1.5, n, 3] for n in range(500)]))
    random = np.random.default_rng(0)
    with serving() as server:
        for _ in range(150):
            broken = bytearray(whole)
            for at in random.integers(0, len(whole), 8):
                broken[at] = random.integers(0, 256)
            assert upload(server, bytes(broken), PARQUET).status_code in (200, 400, 422)
        assert server.http.get("/healthz").status_code == 200


def test_numbers_as_ids_and_no_rows(server: Server) -> None:
    content = parquet(user_id=[7, 8], embedding=vectors_of([1, 2, 3], [4, 5, 6]))
    assert upload(server, content, PARQUET).json()["stored"] == 2
    assert users(server) == ["7", "8"]
    empty = parquet(user_id=pa.array([], pa.string()), embedding=pa.array([], pa.list_(pa.float32())))
    assert upload(server, empty, PARQUET).json()["read"] == 0


def test_the_answer_after_an_upload_has_its_vector(server: Server) -> None:
    upload(server, line("u1", (7, 8, 9)))
    content = server.chat(user="u1").json()["choices"][0]["message"]["content"]
    assert content == "taste user 1 [7 8 9] hello"


def test_an_upload_needs_a_known_kind(server: Server) -> None:
    assert error_of(upload(server, b"", "text/csv"))[:2] == (415, "unsupported_media_type")
    assert error_of(upload(server, b"", "application/octet-stream"))[:2] == (415, "unsupported_media_type")
