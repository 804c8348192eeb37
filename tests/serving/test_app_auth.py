"""Keys: where they come from, what they open, and that no route forgets to ask for one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from e2p.config_serving import ServingConfig
from e2p.errors import ConfigError
from e2p.serving.fake_engine import FakeEngine
from e2p.serving.http import auth
from e2p.serving.http.app import create_app
from e2p.serving.http.auth import ANYONE, SCOPES, authenticate, parse_keys, read_keys
from e2p.serving.http.errors import ApiError
from served import Server, error_of, key, secret, serving

OPEN = {"/healthz", "/readyz"}
ANY_KEY = {"/openapi.json"}
KEYS = (
    *(key(scope, scope) for scope in SCOPES),
    key("all", *SCOPES),
    key("shop", *SCOPES, prefix="shop-"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(keys=KEYS) as running:
        yield running


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of everything that the application answers, whatever kind of route it is."""
    found = []
    for route in flat(app.routes):
        methods = getattr(route, "methods", None)
        assert methods, f"{route}: what this answers is not known to this test"
        found += [(method, route.path) for method in sorted(methods)]
    return found


def flat(routes_: Any) -> Iterator[Any]:
    for route in routes_:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            yield from flat(inner)
        else:
            yield route


ROUTES = routes(create_app(FakeEngine()))


def ask(server: Server, method: str, path: str, headers: dict[str, str]) -> Any:
    real = path.replace("{user_id:text}", "u1").replace("{name:path}", "taste")
    return server.http.request(method, real, headers=headers)


def test_the_route_table_is_whole() -> None:
    paths = {path for _, path in ROUTES}
    assert {"/v1/chat/completions", "/v1/users/embeddings", "/metrics", "/openapi.json", "/healthz"} <= paths
    assert len(ROUTES) == 15


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ,", "Bearer wrong", f"Bearer {secret('all')}x", f"Basic {secret('all')}", secret("all")],
)
def test_no_route_answers_a_wrong_key(header: str, method: str, path: str, server: Server) -> None:
    response = ask(server, method, path, {"authorization": header} if header else {})
    if path in OPEN:
        assert response.status_code == 200
        return
    assert error_of(response) == (401, "invalid_api_key", None)
    assert response.headers["www-authenticate"] == "Bearer"
    assert secret("all") not in response.text


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] not in OPEN | ANY_KEY])
def test_every_route_needs_exactly_one_scope(method: str, path: str, server: Server) -> None:
    opened = []
    for scope in SCOPES:
        response = ask(server, method, path, {"authorization": f"Bearer {secret(scope)}"})
        if response.status_code == 403:
            assert error_of(response)[1] == "missing_scope"
        else:
            opened.append(scope)
    assert len(opened) == 1
    writes = "users:read" if method == "GET" else "users:write"
    expected = {"/v1/users": writes, "/metrics": "metrics", "/v1": "admin" if "reload" in path else "generate"}
    assert opened == [next(scope for start, scope in expected.items() if path.startswith(start))]


def test_the_walk_finds_a_route_without_a_check() -> None:
    """That the tests above can fail."""
    app = create_app(FakeEngine(), keys=KEYS)

    @app.get("/forgotten")
    async def forgotten() -> dict[str, str]:
        return {}

    assert ("GET", "/forgotten") in routes(app)
    assert [r for r in routes(app) if r not in ROUTES] == [("GET", "/forgotten")]
    assert isinstance(app.routes[-1], APIRoute)


def test_the_schema_opens_for_any_key(server: Server) -> None:
    for name in ("metrics", "shop"):
        assert ask(server, "GET", "/openapi.json", {"authorization": f"bearer {secret(name)}"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if "{user_id" in r[1]], ids=lambda value: value if "/" not in value else ""
)
def test_a_key_with_a_prefix_sees_its_own_users_alone(method: str, path: str, server: Server) -> None:
    headers = {"authorization": f"Bearer {secret('shop')}"}
    for user in ("u1", "shop", "Shop-1", "x/shop-1"):
        response = server.http.request(method, path.replace("{user_id:text}", user), headers=headers)
        assert error_of(response) == (403, "user_not_allowed", None)
    response = server.http.request(method, path.replace("{user_id:text}", "shop-1"), headers=headers)
    assert response.status_code in (200, 404, 415)


def test_a_key_with_a_prefix_generates_for_its_own_users_alone(server: Server) -> None:
    assert error_of(server.chat(secret("shop"), user="u1")) == (403, "user_not_allowed", None)
    assert server.chat(secret("shop"), user="shop-1").status_code == 200
    assert server.chat(secret("shop")).status_code == 200
    assert server.chat(secret("all"), user="u1").status_code == 200


def test_openais_client_carries_the_key(server: Server) -> None:
    assert [m.id for m in server.openai(secret("generate")).models.list()] == ["taste", "backbone"]


def test_a_key_is_asked_for_before_a_body_is_read(server: Server) -> None:
    """A body that never comes, from somebody without a key, is not waited for."""
    import socket

    host, port = server.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(
            b"PUT /v1/users/u1/embedding HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        assert line.recv(100).startswith(b"HTTP/1.1 401 ")


# ---------------------------------------------------------------- without keys


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
    ],
)
def test_without_keys_a_page_that_points_here_by_its_own_name_is_refused(host: str, status: int) -> None:
    with serving() as server:
        response = server.http.get("/v1/models", headers={"host": host})
        assert response.status_code == status
        if status == 403:
            assert error_of(response)[1] == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        ("http://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("http://evil.example:80#localhost", 403),
        ("null", 403),
    ],
)
def test_without_keys_a_page_from_elsewhere_sets_nothing_off(origin: str, status: int) -> None:
    """A browser asks nobody before it sends such a request, though it keeps the answer from the page."""
    with serving() as server:
        response = server.http.post(
            "/v1/models/taste/reload", headers={"origin": origin, "content-type": "text/plain"}, content=b""
        )
        assert response.status_code == status
        assert server.http.get("/v1/models/taste").json()["e2p"]["revision"] == ("r2" if status == 200 else "r1")
        if status == 403:
            assert error_of(response)[1] == "origin_not_allowed"
    with serving(keys=KEYS) as server:
        headers = {"origin": origin, "authorization": f"Bearer {secret('all')}"}
        assert server.http.post("/v1/models/taste/reload", headers=headers).status_code == 200


def test_of_two_keys_neither_counts(server: Server) -> None:
    both = [("authorization", f"Bearer {secret('all')}"), ("authorization", f"Bearer {secret('shop')}")]
    for headers in (both, both[::-1]):
        assert error_of(server.http.get("/v1/models", headers=headers)) == (401, "invalid_api_key", None)


def test_any_host_will_do_with_keys_or_where_told() -> None:
    with serving(keys=KEYS) as server:
        headers = {"host": "models.example", "authorization": f"Bearer {secret('all')}"}
        assert server.http.get("/v1/models", headers=headers).status_code == 200
    with serving(insecure=True) as server:
        assert server.http.get("/v1/models", headers={"host": "models.example"}).status_code == 200


# ---------------------------------------------------------------- where keys come from

GOOD = f"""
- {{name: app, key: "{secret("app")}", scopes: [generate]}}
- name: pipeline
  sha256: "{hashlib.sha256(secret("pipeline").encode()).hexdigest()}"
  scopes: [users:write, "users:read"]
  user_prefix: shop-
"""


def test_keys_come_from_a_file_or_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD, encoding="utf-8")
    monkeypatch.setenv("E2P_KEYS", '[{"name": "env", "key": "sk-environment-01", "scopes": ["admin"]}]')
    found = read_keys(ServingConfig(keys=str(path), host="0.0.0.0"))
    assert [(k.name, k.scopes, k.user_prefix) for k in found] == [
        ("app", frozenset({"generate"}), ""),
        ("pipeline", frozenset({"users:write", "users:read"}), "shop-"),
    ]
    assert authenticate(found, f"Bearer {secret('app')}", "generate").name == "app"
    assert authenticate(found, f"Bearer {secret('pipeline')}", "users:read").name == "pipeline"
    assert [k.name for k in read_keys(ServingConfig(host="0.0.0.0"))] == ["env"]
    monkeypatch.delenv("E2P_KEYS")
    assert read_keys(ServingConfig()) == ()
    assert authenticate((), None, "admin") is ANYONE


def test_a_key_is_never_shown() -> None:
    shown = repr(parse_keys(GOOD, "keys"))
    assert secret("app") not in shown
    assert hashlib.sha256(secret("pipeline").encode()).hexdigest() not in shown
    assert "digest" not in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example", "127.0.0.1.example"])
def test_it_does_not_listen_beyond_this_machine_without_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2P_KEYS", raising=False)
    with pytest.raises(ConfigError, match="which is reached from other machines, got none"):
        read_keys(ServingConfig(host=host))
    assert read_keys(ServingConfig(host=host, insecure=True)) == ()
    for name in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        assert read_keys(ServingConfig(host=name)) == ()


S = "sk-sentinel-0123456789"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of keys"),
        ("[]", "expected a list of keys"),
        (f"{{key: {S}}}", "expected a list of keys"),
        (f"[{S}]", "key 1: expected .*, got no mapping"),
        (f"- {{name: a, key: {S}, scopes: [generate]", "expected YAML, got something else in line"),
        (f"- {{name: a, key: {S}, scopes: [generate], user: x}}", "key 1: expected .*, got user"),
        (f"- {{key: {S}, scopes: [generate]}}", "name: expected a text"),
        (f"- {{name: a, key: {S}}}", "scopes: expected some of generate, users:read"),
        (f"- {{name: a, key: {S}, scopes: [everything]}}", "scopes: expected some of generate"),
        (f"- {{name: a, key: {S}, scopes: generate}}", "scopes: expected some of generate"),
        ("- {name: a, scopes: [generate]}", "expected one of key and sha256, got neither"),
        (f"- {{name: a, key: {S}, sha256: {'0' * 64}, scopes: [generate]}}", "got both"),
        ("- {name: a, key: short, scopes: [generate]}", "at least 16 characters"),
        ("- {name: a, key: 12345678901234567, scopes: [generate]}", "at least 16 characters"),
        (f"- {{name: a, key: '{S} x', scopes: [generate]}}", "without spaces"),
        ("- {name: a, sha256: abc, scopes: [generate]}", "64 hex digits"),
        (f"- {{name: a, key: {S}, scopes: [generate], user_prefix: 5}}", "user_prefix: expected a text"),
        (f"- {{name: a, key: {S}, scopes: [admin]}}\n- {{name: a, key: {S}2, scopes: [admin]}}", "every name once"),
        (f"- {{name: a, key: {S}, scopes: [admin]}}\n- {{name: b, key: {S}, scopes: [admin]}}", "every key once"),
    ],
)
def test_wrong_keys_are_told_and_never_quoted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_keys(text, "keys.yaml")
    assert str(error.value).startswith("keys.yaml: ")
    assert "sentinel" not in str(error.value)
    assert error.value.__cause__ is None


def test_an_unreadable_file_of_keys(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(ServingConfig(keys=str(tmp_path / "nowhere")))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append(a)
        return real(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for name in ("generate", "shop"):
        seen.clear()
        assert authenticate(KEYS, f"Bearer {secret(name)}", None).name == name
        assert seen == [k.digest for k in KEYS]
    seen.clear()
    with pytest.raises(ApiError):
        authenticate(KEYS, "Bearer \udce9", None)
    assert len(seen) == len(KEYS)
