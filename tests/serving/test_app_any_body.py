"""Bodies that nobody meant: whatever comes, no 5xx, no hang, and errors in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from e2p.config_serving import LimitsConfig
from e2p.serving.fake_engine import Failure, FakeEngine
from e2p.serving.http.app import create_app
from e2p.serving.http.openapi import document
from e2p.serving.http.uploads import NDJSON, PARQUET
from served import HELLO, Server, error_of, serving

CALM = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WORDS = [
    *(
        "model",
        "messages",
        "prompt",
        "user",
        "e2p",
        "n",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
    ),
    *("max_tokens", "seed", "temperature", "top_p", "tools", "response_format", "prompt_embeds", "embedding", "arm"),
    *("timestamp", "version", "vector", "strength", "role", "content", "type", "text", "user_id"),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["taste", "backbone", "user", "text", "null", "2024-05-01T12:00:00Z", "1e400", "\x00"])
)
KEYS = st.sampled_from(WORDS) | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=20
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(limits=LimitsConfig(seconds=10)) as running:
        yield running


def check(response: Any) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error_of(response)
    elif response.headers["content-type"].startswith("application/json"):
        json.loads(response.content, parse_constant=pytest.fail)  # no NaN


@settings(max_examples=60, **CALM)
@given(path=st.sampled_from(["chat/completions", "completions"]), body=st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_json_asks_for_an_answer(path: str, body: dict[str, Any], server: Server) -> None:
    good = {"model": "taste", **({"messages": HELLO} if "chat" in path else {"prompt": "x"})}
    for given_ in (body, good | body, good | {"e2p": body}):
        content = json.dumps(given_)
        check(server.http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"}))


@settings(max_examples=30, **CALM)
@given(body=VALUES, user=st.text(min_size=1, max_size=12))
def test_any_json_is_put(body: Any, user: str, server: Server) -> None:
    path = f"/v1/users/{quote(user, safe='').replace('.', '%2E')}/embedding"
    for given_ in (body, {"embedding": body}, {"embedding": [1, 2, 3], "timestamp": body}):
        content = json.dumps(given_)
        check(server.http.put(path, content=content, headers={"content-type": "application/json"}))
    check(server.http.get(path))
    check(server.http.delete(path))


@settings(max_examples=100, **CALM)
@given(
    body=st.binary(max_size=200) | st.lists(VALUES, max_size=5).map(lambda v: "\n".join(map(json.dumps, v)).encode()),
    kind=st.sampled_from(["application/json", "application/x-ndjson", "application/vnd.apache.parquet", "text/plain"]),
    path=st.sampled_from(["chat/completions", "completions", "users/embeddings", "models/taste/reload"]),
)
def test_any_bytes_of_any_kind(body: bytes, kind: str, path: str, server: Server) -> None:
    check(server.http.post(f"/v1/{path}", content=body, headers={"content-type": kind}))


@settings(max_examples=40, **CALM)
@given(method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "X"]), path=st.text(max_size=30))
def test_any_path(method: str, path: str, server: Server) -> None:
    for start in ("/", "/v1/", "/v1/users/", "/v1/models/"):
        check(server.http.request(method, start + quote(path, safe="/:@").replace(".", "%2E")))


def test_the_check_can_fail(server: Server) -> None:
    server.engine.queue(Failure(ZeroDivisionError()))
    with pytest.raises(AssertionError):
        check(server.chat())


# ---------------------------------------------------------------- by the OpenAPI document


@schemathesis.serializer(*NDJSON, *PARQUET)
def as_bytes(_: Any, value: Any) -> Any:
    """Of the bulk upload, whose kinds schemathesis does not know."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "replace")


OPERATIONS = [
    found.ok() for found in schemathesis.openapi.from_dict(document(create_app(FakeEngine()))).get_all_operations()
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_the_document_says(operation: Any, mode: Any, server: Server) -> None:
    """By schemathesis: every operation, with what fits its schema and with what does not."""
    strategy = operation.as_strategy(generation_mode=mode)
    if strategy.is_empty:
        pytest.skip("nothing that such a request could say wrongly")
    answered = 0

    @settings(max_examples=25, phases=[Phase.explicit, Phase.generate], **CALM)
    @given(case=strategy)
    def ask(case: Any) -> None:
        nonlocal answered
        response = case.call(base_url=server.base, timeout=15)
        case.validate_response(response, checks=CHECKS)
        answered += 1
        if response.status_code >= 400:
            error_of(response)  # type: ignore[arg-type]

    ask()
    assert answered


def test_the_document_tells_every_body_and_error(server: Server) -> None:
    found = server.http.get("/openapi.json").json()
    assert len(found["paths"]) == 10
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method in ("post", "put") and "reload" not in path)
            assert "default" in operation["responses"]
    names = set(found["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "PutEmbedding", "Error", "Personalisation"} <= names
    for ref in set(_refs(found)):
        assert ref.removeprefix("#/components/schemas/") in names


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _refs(item)
