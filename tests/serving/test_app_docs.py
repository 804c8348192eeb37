"""What docs/serving.md and README.md say, run as it is written there."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs_lines import CURL, PAGE, blocks, run_curl
from e2p.config_serving import LimitsConfig, PoliciesConfig, load_serving
from e2p.serving.http.auth import SCOPES, parse_keys
from served import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        running.put("u123")
        yield running


@pytest.mark.parametrize("block", CURL.values(), ids=CURL)
def test_curl_lines(block: str, server: Server) -> None:
    run_curl(block, server.base)


def test_the_client(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python openai")
    server.put("u123")
    names: dict[str, object] = {}
    exec(code.replace("http://localhost:8000", server.base), names)
    names["client"].close()  # type: ignore[attr-defined]
    said, told = capsys.readouterr().out.splitlines()
    assert said == "taste user 1 [1 2 3] What shall I listen to?"
    assert told.startswith("e2p {'source': 'store', 'version': 'v1'")


def test_the_fake_engine() -> None:
    (code,) = blocks("python fake")
    exec(code, {"asyncio": asyncio})


def test_the_yamls(tmp_path: Path) -> None:
    settings, keys = blocks("yaml")
    path = tmp_path / "serving.yaml"
    path.write_text(settings, encoding="utf-8")
    config = load_serving(path)
    assert (config.policies.unknown_user, config.policies.max_age_seconds, config.limits.running) == ("null", 86400, 16)
    assert [key.user_prefix for key in parse_keys(keys, "keys.yaml")] == ["", "shop-"]
    assert all(f"| `{scope}` |" in PAGE for scope in SCOPES)


def test_what_a_response_says(server: Server) -> None:
    (shown,) = (json.loads(block) for block in blocks("json"))
    told = server.chat(user="u123").json()["e2p"]
    assert list(told) == list(shown)
    assert list(told["vector"]) == list(shown["vector"])


def test_policies_and_limits_named_there_are_what_there_is() -> None:
    defaults = PoliciesConfig()
    rows = re.findall(r"^\| `policies\.(\w+)` \|.*\| `(\w+)` \| (\d+) \|$", PAGE, re.M)
    assert {name: default for name, default, _ in rows} == {
        name: getattr(defaults, name) for name in vars(defaults) if name != "max_age_seconds"
    }
    for name in re.findall(r"`limits\.(\w+)`", PAGE):
        assert hasattr(LimitsConfig(), name)


def test_metrics_named_there_are_what_there_is(server: Server) -> None:
    server.chat()
    text = server.http.get("/metrics").text
    part = PAGE.partition("## Metrics")[2].partition("```")[0]
    named = set(re.findall(r"`(e2p_\w+)`", part))
    ours = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE e2p") and "_created" not in line}
    assert named == ours
