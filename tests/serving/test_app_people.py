"""Whose answer it is: stored vectors, vectors in requests, policies, and what the response says of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import numpy as np
import openai
import pytest

from e2p.config_serving import PoliciesConfig
from e2p.errors import StoreError
from e2p.serving.engine import AdapterInfo
from e2p.serving.fake_engine import ADAPTERS, FakeEngine
from e2p.users.store_memory import MemoryStore
from served import HELLO, Server, error_of, serving, stored

PLAIN = AdapterInfo("plain", 3, (), False, "p1", 1, "before_completion")  # no null user, no versions


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving(FakeEngine((*ADAPTERS, PLAIN))) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """One server for all tests here, as new for each."""
    running.engine.reset()
    for user in ("u1", *(vector.user_id for vector in running.store.iterate())):
        running.store.delete(user, forget=True)
    return running


def said(answer: Any) -> str:
    return answer.json()["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- vectors by HTTP


def test_the_very_next_answer_follows_a_new_vector(server: Server) -> None:
    for round_ in range(20):
        server.put("u1", (round_, 0, 1))
        assert said(server.chat(user="u1")) == f"taste user 1 [{round_} 0 1] hello"


def test_put_get_and_delete(server: Server) -> None:
    at = "2024-05-01T12:00:00Z"
    body = server.put("u1", (1, 0.5, -2), timestamp=at).json()
    assert body["age_seconds"] > 0
    assert body | {"age_seconds": 0} == {
        "object": "user.embedding",
        "user_id": "u1",
        "timestamp": at,
        "version": "v1",
        "dimension": 3,
        "age_seconds": 0,
        "stored": True,
        "outcome": "stored",
    }
    found = server.http.get("/v1/users/u1/embedding").json()
    assert (found["timestamp"], found["version"], found["dimension"], "embedding" in found) == (at, "v1", 3, False)
    assert server.http.get("/v1/users/u1/embedding?vector=true").json()["embedding"] == [1, 0.5, -2]
    assert server.http.delete("/v1/users/u1/embedding").json() == {
        "object": "user.embedding.deleted",
        "user_id": "u1",
        "deleted": True,
    }
    assert error_of(server.http.get("/v1/users/u1/embedding")) == (404, "user_not_found", "user_id")
    assert server.http.delete("/v1/users/u1/embedding").json()["deleted"] is False
    assert said(server.chat(user="u1")) == "taste null 1 [] hello"


def test_an_older_vector_replaces_nothing_and_a_deleted_user_stays_away(server: Server) -> None:
    new, old = "2024-05-02T00:00:00+02:00", "2024-05-01T00:00:00Z"
    assert server.put("u1", (1, 1, 1), timestamp=new).json()["outcome"] == "stored"
    assert server.put("u1", (1, 1, 1), timestamp=new).json()["outcome"] == "unchanged"
    answer = server.put("u1", (2, 2, 2), timestamp=old)
    assert (answer.status_code, answer.json()["stored"], answer.json()["outcome"]) == (200, False, "older")
    assert said(server.chat(user="u1")) == "taste user 1 [1 1 1] hello"
    server.http.delete("/v1/users/u1/embedding")
    assert error_of(server.put("u1", timestamp=new)) == (409, "user_deleted", "timestamp")
    assert said(server.chat(user="u1")) == "taste null 1 [] hello"
    assert server.put("u1").json()["stored"] is True
    server.http.delete("/v1/users/u1/embedding?forget=true")
    assert server.put("u1", timestamp=new).json()["stored"] is True


@pytest.mark.parametrize(
    "user", ["a/b", "a b", "ü", "a?b#c", "..", "x/embedding", "%2F", "a" * 600, "embeddings", "a\nb", "\r\nb\n"]
)
def test_any_user_id_can_stand_in_a_path(user: str, server: Server) -> None:
    path = quote(user, safe="").replace("..", "%2E%2E")
    assert server.put(path, (3, 2, 1)).json()["user_id"] == user
    assert server.store.get(user).embedding.tolist() == [3, 2, 1]
    assert said(server.chat(user=user)) == "taste user 1 [3 2 1] hello"
    assert server.http.delete(f"/v1/users/{path}/embedding").json()["deleted"] is True


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"embedding": [1, 2]}, (400, "wrong_dimension", "embedding")),
        ({"embedding": []}, (400, "invalid_value", "embedding")),
        ({"embedding": None}, (400, "invalid_value", "embedding")),
        ({"embedding": [1, 2, "3"]}, (400, "invalid_value", "embedding.2")),
        ({"embedding": [1, 2, True]}, (400, "invalid_value", "embedding.2")),
        ({"embedding": [1, 2, None]}, (400, "invalid_value", "embedding.2")),
        ({"embedding": [1, 2, 1e39]}, (400, "invalid_value", "embedding")),
        ({"embedding": [[1, 2, 3]]}, (400, "invalid_value", "embedding.0")),
        ({"embedding": "AAAAAAAAAAAAAAAA"}, (400, "invalid_value", "embedding")),
        ({"embedding": {"indices": [0], "values": [1]}}, (400, "invalid_value", "embedding")),
        ({"version": 5}, (400, "invalid_value", "version")),
        ({"version": "x" * 256}, (400, "invalid_value", "version")),
        ({"version": "é" * 200}, (400, "invalid_value", "embedding")),
        ({"timestamp": "2024-05-01T12:00:00"}, (400, "invalid_value", "timestamp")),
        ({"timestamp": 1714564800}, (400, "invalid_type", "timestamp")),
        ({"timestamp": "1714564800"}, (400, "invalid_type", "timestamp")),
        ({"timestamp": "1714564800000.5"}, (400, "invalid_type", "timestamp")),
        ({"timestamp": "20240501"}, (400, "invalid_type", "timestamp")),
        ({"timestamp": True}, (400, "invalid_type", "timestamp")),
        ({"timestamp": "soon"}, (400, "invalid_value", "timestamp")),
        ({"timestamp": "2999-01-01T00:00:00Z"}, (400, "timestamp_ahead", "timestamp")),
        ({"user_id": "u2"}, (400, "unknown_parameter", "user_id")),
    ],
)
def test_what_is_no_vector_is_refused(fields: dict[str, Any], expected: tuple[int, str, str], server: Server) -> None:
    body = {"embedding": [1, 2, 3], "version": "v1", **fields}
    assert error_of(server.http.put("/v1/users/u1/embedding", json=body)) == expected
    assert server.store.get("u1") is None


def test_a_blank_user_is_none(server: Server) -> None:
    for path in ("", "%20"):
        assert error_of(server.put(path))[:2] == (400, "invalid_value")
        assert error_of(server.http.get(f"/v1/users/{path}/embedding"))[:2] == (400, "invalid_value")
        assert error_of(server.http.delete(f"/v1/users/{path}/embedding"))[:2] == (400, "invalid_value")


@pytest.mark.parametrize("user", ["caf%E9", "%FF", "a%C3", "%ED%A0%80", "a" * 1025])
def test_an_id_that_no_request_could_name(user: str, server: Server) -> None:
    """Bytes that are no UTF-8 would all be one and the same character, and so different users one user."""
    expected = (400, "invalid_value", "user_id")
    assert error_of(server.put(user)) == expected
    assert error_of(server.http.get(f"/v1/users/{user}/embedding")) == expected
    assert error_of(server.http.delete(f"/v1/users/{user}/embedding")) == expected
    assert server.store.count() == 0


def test_what_only_a_store_calls_blank(server: Server) -> None:
    assert error_of(server.chat(user="\x1c")) == (400, "invalid_value", "user")
    assert error_of(server.put("%1C"))[:2] == (400, "invalid_value")


def test_the_first_vector_cannot_give_the_store_a_dimension_that_no_adapter_takes() -> None:
    with serving() as server:
        assert error_of(server.put("u1", (1, 2))) == (400, "wrong_dimension", "embedding")
        assert server.put("u1", (1, 2, 3)).status_code == 200


def test_without_a_store_vectors_come_with_requests() -> None:
    with serving(store=None) as server:
        assert error_of(server.put("u1"))[:2] == (404, "no_store")
        assert error_of(server.http.get("/v1/users/u1/embedding"))[:2] == (404, "no_store")
        headers = {"content-type": "application/x-ndjson"}
        assert error_of(server.http.post("/v1/users/embeddings", headers=headers))[:2] == (404, "no_store")
        assert server.chat(user="u1").json()["e2p"]["reason"] == "unknown_user"
        assert said(server.chat(e2p={"vector": [1, 2, 3]})) == "taste user 1 [1 2 3] hello"
        assert server.http.get("/readyz").status_code == 200


def test_openais_client_does_not_ask_again_where_the_answer_would_be_the_same(server: Server) -> None:
    server.put("u1", version="v2")
    before = server.http.get("/metrics").text
    with pytest.raises(openai.ConflictError) as refused:
        server.openai(max_retries=2).chat.completions.create(model="taste", messages=HELLO, user="u1")
    assert refused.value.code == "other_version"
    line = 'e2p_requests_total{method="POST",route="/v1/chat/completions",status="409"} '
    counts = [float((text.partition(line)[2] or "0").split()[0]) for text in (before, server.http.get("/metrics").text)]
    assert counts[1] - counts[0] == 1


# ---------------------------------------------------------------- what is told


def test_a_response_says_what_served_it(server: Server) -> None:
    at = datetime.now(UTC) - timedelta(hours=2)
    server.store.put(stored("u1", 1, 2, 3, at=at))
    response = server.chat(user="u1")
    told = response.json()["e2p"]
    assert told["vector"].pop("age_seconds") == pytest.approx(7200, abs=30)
    assert told == {
        "arm": "e2p",
        "adapter": "taste",
        "adapter_revision": "r1",
        "vector": {"source": "store", "version": "v1", "timestamp": at.isoformat().replace("+00:00", "Z")},
        "strength": 1.0,
        "reason": None,
    }
    headers = {name: value for name, value in response.headers.items() if name.startswith("x-e2p")}
    assert 7170 < float(headers.pop("x-e2p-vector-age")) < 7230
    assert headers == {
        "x-e2p-arm": "e2p",
        "x-e2p-adapter": "taste",
        "x-e2p-adapter-revision": "r1",
        "x-e2p-vector-version": "v1",
    }
    assert "u1" not in str(response.headers)


def test_a_version_of_any_characters_can_be_a_header(server: Server) -> None:
    server.put("u1", version="é\r\nx: y")
    response = server.chat(user="u1", model="plain")
    assert response.headers["x-e2p-vector-version"] == "%C3%A9%0D%0Ax:%20y"
    assert response.json()["e2p"]["vector"]["version"] == "é\r\nx: y"


def test_a_vector_with_the_request(server: Server) -> None:
    server.put("u1", (9, 9, 9))
    answer = server.chat(user="u1", e2p={"vector": [1, 2.5, -3], "version": "v1", "strength": 0.25})
    assert said(answer) == "taste user 0.25 [1 2.5 -3] hello"
    vector = server.engine.requests[-1].personal.vector
    assert vector.dtype == np.float32
    told = answer.json()["e2p"]
    assert told["vector"] == {"source": "request", "version": "v1", "timestamp": None, "age_seconds": None}
    assert told["strength"] == 0.25
    assert server.chat(e2p={"strength": 0}, user="u1").json()["e2p"]["strength"] == 0.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"arm": "none"}, ("taste none 1 [] hello", "none", "asked")),
        ({"arm": "null"}, ("taste null 1 [] hello", "null", "asked")),
        ({"arm": "e2p"}, ("taste user 1 [1 2 3] hello", "e2p", None)),
        ({}, ("taste user 1 [1 2 3] hello", "e2p", None)),
    ],
)
def test_personalisation_can_be_switched_off(options: dict[str, Any], expected: Any, server: Server) -> None:
    server.put("u1")
    answer = server.chat(user="u1", e2p=options)
    told = answer.json()["e2p"]
    assert (said(answer), told["arm"], told["reason"]) == expected
    assert (told["vector"] is None) == (told["arm"] != "e2p")
    assert (told["strength"] is None) == (told["arm"] != "e2p")


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("taste", {"vector": [1, 2]}, (400, "wrong_dimension", "e2p.vector")),
        ("taste", {"vector": []}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"vector": ["1", 2, 3]}, (400, "invalid_value", "e2p.vector.0")),
        ("taste", {"vector": [True, 2, 3]}, (400, "invalid_value", "e2p.vector.0")),
        ("taste", {"vector": [1, 2, -1e39]}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"vector": "gASVKAAAAA=="}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"vector": {"size": [3], "indices": [0], "values": [1]}}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"vector": [1] * 65_537}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"vector": [1, 2, 3], "version": "v2"}, (400, "other_version", "e2p.version")),
        ("taste", {"version": "v1"}, (400, "invalid_value", "e2p.version")),
        ("taste", {"strength": 2.5}, (400, "invalid_value", "e2p.strength")),
        ("taste", {"strength": -0.1}, (400, "invalid_value", "e2p.strength")),
        ("taste", {"strength": "1"}, (400, "invalid_value", "e2p.strength")),
        ("taste", {"arm": "none", "strength": 0.5}, (400, "invalid_value", "e2p.strength")),
        ("taste", {"arm": "null", "vector": [1, 2, 3]}, (400, "invalid_value", "e2p.vector")),
        ("taste", {"arm": "user"}, (400, "invalid_value", "e2p.arm")),
        ("taste", {"prompt_embeds": [[1]]}, (400, "unknown_parameter", "e2p.prompt_embeds")),
        ("taste", [], (400, "invalid_value", "e2p")),
        ("taste", False, (400, "invalid_value", "e2p")),
        ("plain", {"arm": "null"}, (400, "no_null_user", "e2p.arm")),
        ("plain", {"vector": [1, 2, 3], "strength": 0.5}, (400, "no_null_user", "e2p.strength")),
        ("backbone", {"vector": [1, 2, 3]}, (400, "not_personal", "e2p.vector")),
    ],
)
def test_what_makes_no_sense_is_refused(model: str, options: Any, expected: Any, server: Server) -> None:
    assert error_of(server.chat(model=model, user="u1", e2p=options)) == expected
    assert server.engine.requests == []


def test_the_bare_backbone_is_nobodys(server: Server) -> None:
    server.put("u1")
    answer = server.chat(model="backbone", user="u1")
    assert said(answer) == "backbone none 1 [] hello"
    assert (answer.json()["e2p"]["arm"], answer.json()["e2p"]["reason"]) == ("none", "bare_model")


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("model", "policy", "expected"),
    [
        ("taste", "null", ("null", "unknown_user")),
        ("taste", "none", ("none", "unknown_user")),
        ("plain", "null", ("none", "unknown_user,no_null_user")),
        ("taste", "error", (404, "unknown_user", "user")),
    ],
)
def test_an_unknown_user(model: str, policy: Any, expected: Any, server: Server) -> None:
    with policies(server, unknown_user=policy):
        check(server.chat(model=model, user="u9"), expected)


@pytest.mark.parametrize(
    ("model", "policy", "expected"),
    [
        ("taste", "null", ("null", "no_user")),
        ("taste", "none", ("none", "no_user")),
        ("plain", "null", ("none", "no_user,no_null_user")),
        ("taste", "error", (400, "no_user", "user")),
    ],
)
def test_no_user(model: str, policy: Any, expected: Any, server: Server) -> None:
    with policies(server, no_user=policy):
        check(server.chat(model=model), expected)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("use", ("e2p", "old_vector")),
        ("null", ("null", "old_vector")),
        ("none", ("none", "old_vector")),
        ("error", (409, "old_vector", "user")),
    ],
)
def test_an_old_vector(policy: Any, expected: Any, server: Server) -> None:
    server.store.put(stored("u1", 1, 2, 3, at=datetime.now(UTC) - timedelta(seconds=3700)))
    server.store.put(stored("u2", 1, 2, 3, at=datetime.now(UTC) - timedelta(seconds=3500)))
    with policies(server, max_age_seconds=3600, old_vector=policy):
        check(server.chat(user="u1"), expected)
        check(server.chat(user="u2"), ("e2p", None))
        if isinstance(expected[0], str):
            assert server.chat(user="u1").json()["e2p"]["vector"]["age_seconds"] > 3600
    check(server.chat(user="u1"), ("e2p", None))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("use", ("e2p", "other_version")),
        ("null", ("null", "other_version")),
        ("none", ("none", "other_version")),
        ("error", (409, "other_version", "user")),
    ],
)
def test_a_vector_of_another_version(policy: Any, expected: Any, server: Server) -> None:
    server.put("u1", version="v2")
    server.put("u2", version="")
    with policies(server, other_version=policy):
        check(server.chat(user="u1"), expected)
        check(server.chat(user="u2"), expected)
        check(server.chat(user="u1", model="plain"), ("e2p", None))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("use", (409, "other_dimension", "user")),
        ("null", ("null", "other_dimension")),
        ("none", ("none", "other_dimension")),
        ("error", (409, "other_dimension", "user")),
    ],
)
def test_a_vector_of_another_dimension(policy: Any, expected: Any) -> None:
    wide = AdapterInfo("wide", 4, (), True, "w1", 1, "before_completion")
    rules = PoliciesConfig(other_version=policy)
    with serving(FakeEngine((*ADAPTERS, wide)), policies=rules) as server:
        server.put("u1")
        check(server.chat(user="u1", model="wide"), expected)
        check(server.chat(user="u1"), ("e2p", None))


class Away(MemoryStore):
    """A store that cannot be reached."""

    def get_many(self, user_ids: Any) -> Any:
        raise StoreError("redis://sentinel: cannot be reached")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("null", ("null", "store_unavailable")),
        ("none", ("none", "store_unavailable")),
        ("error", (503, "store_unavailable", "user")),
    ],
)
def test_a_store_that_is_away(policy: Any, expected: Any) -> None:
    with serving(store=Away(), policies=PoliciesConfig(store_unavailable=policy)) as server:
        answer = server.chat(user="u1")
        check(answer, expected)
        assert (answer.headers.get("retry-after") == "1") == (policy == "error")
        assert error_of(server.http.get("/v1/users/u1/embedding"))[:2] == (503, "store_unavailable")
        assert "sentinel" not in server.http.get("/v1/users/u1/embedding").text
        assert said(server.chat(e2p={"vector": [1, 2, 3]})) == "taste user 1 [1 2 3] hello"


def check(answer: Any, expected: Any) -> None:
    """Arm and reason of an answer, or status, code and param of an error."""
    if isinstance(expected[0], int):
        assert error_of(answer) == expected
    else:
        told = answer.json()["e2p"]
        assert (told["arm"], told["reason"]) == expected
        assert answer.headers.get("x-e2p-reason") == expected[1]


class policies:
    """Other policies for a while."""

    def __init__(self, server: Server, **rules: Any) -> None:
        self.people, self.rules = server.service().people, PoliciesConfig(**rules)

    def __enter__(self) -> None:
        self.before, self.people.policies = self.people.policies, self.rules

    def __exit__(self, *_: object) -> None:
        self.people.policies = self.before
