"""What must stand in no log and no metric: prompts, answers, vectors, user ids, keys."""

from __future__ import annotations

import json
import logging
import time

import pytest

from e2p.serving.engine import EngineError, RequestError
from e2p.serving.fake_engine import Failure
from served import Server, key, secret, serving

PROMPT, ANSWER, USER, VECTOR = "sentinel-prompt", "sentinel-answer", "sentinel-user", 7.654321e-5
NAMES = ("generate", "users:read", "users:write", "metrics", "admin")


def everything(server: Server) -> str:
    """Ask in every way, also wrongly and of an engine that breaks; what metrics say."""
    server.http.headers["authorization"] = f"Bearer {secret('all')}"
    vector = [VECTOR, 1, 2]
    server.put(USER, vector, version="v1")
    server.http.put(f"/v1/users/{USER}/embedding", json={"embedding": [*vector, 4]})
    server.http.get(f"/v1/users/{USER}/embedding?vector=true")
    server.http.get(f"/v1/users/{USER}-other/embedding")
    server.http.get(f"/v1/users/{USER}/nowhere")
    server.http.request(USER, f"/{USER}")
    server.http.request("PATCH", f"/v1/users/{USER}/embedding")
    rows = b"".join(json.dumps({"user_id": f"{USER}{n}", "embedding": vector}).encode() + b"\n" for n in range(3))
    for content in (rows, rows + b'{"user_id": "' + USER.encode() + b'"}'):
        server.http.post("/v1/users/embeddings", content=content, headers={"content-type": "application/x-ndjson"})
    messages = [{"role": "user", "content": PROMPT}]
    broken = [Failure(kind(PROMPT), after) for kind in (EngineError, RequestError, ValueError) for after in (0, 2)]
    for stream in (False, True):
        for queued in (ANSWER, *broken):
            server.engine.queue(queued)
            server.chat(messages=messages, user=USER, stream=stream)
        server.chat(messages=messages, user=USER, stream=stream, e2p={"vector": vector})
        server.chat(messages=messages, user=USER, stream=stream, temperature=PROMPT)
        server.chat(messages=messages, user=USER, stream=stream, model=PROMPT)
        server.chat(messages=messages, user=USER, stream=stream, **{PROMPT: PROMPT})
    server.http.post("/v1/completions", json={"model": "taste", "prompt": PROMPT, "user": USER})
    server.http.post("/v1/completions", content=PROMPT, headers={"content-type": "application/json"})
    server.http.get("/v1/models", headers={"authorization": "Bearer sentinel-key", "x-request-id": USER})
    server.http.post("/v1/models/taste/reload")
    server.http.delete(f"/v1/users/{USER}/embedding")
    return server.http.get("/metrics").text


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(f"{r.name} {r.getMessage()} {r.args} {r.exc_text or ''}" for r in caplog.records)


def test_logs_and_metrics_hold_nobodys_words(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(keys=[key("all", *NAMES)]) as server:
        metrics = everything(server)
    printed = "".join(capfd.readouterr())
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("e2p", "uvicorn", "asyncio")))
    for text in (ours, metrics, printed):
        for secret_ in ("sentinel", "7.654", "7654", secret("all"), key("all").digest.hex()):
            assert secret_ not in text, text[max(0, text.find(secret_) - 200) :][:400]
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "e2p.serving"]
    assert len([line for line in lines if "route" in line]) > 30
    assert "Traceback" not in logged(caplog)


def test_a_line_tells_what_operators_need(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "e2p.serving")
    with serving(keys=[key("app", "generate")]) as server:
        server.engine.queue("one two")
        response = server.chat(secret("app"), user="u1")
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if r.name == "e2p.serving"]
    assert line.pop("request_id") == response.headers["x-request-id"]
    assert 0 < line.pop("seconds") < 10
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "route": "/v1/chat/completions",
        "method": "POST",
        "status": 200,
        "key": "app",
        "adapter": "taste",
        "arm": "null",
        "reason": "unknown_user",
        "prompt_tokens": 1,
        "completion_tokens": 2,
    }


def test_users_are_logged_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "e2p.serving")
    with serving(log_users=True) as server:
        server.put("u1")
        server.chat(user="u2")
        metrics = server.http.get("/metrics").text
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "e2p.serving"]
    assert [line.get("user") for line in lines] == ["u1", "u2", None]
    assert "u1" not in metrics


def test_what_broke_is_told_by_kind_and_place(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.engine.queue(Failure(ZeroDivisionError("sentinel")), Failure(ZeroDivisionError("sentinel"), after=1))
        assert server.chat().status_code == 500
        assert "internal_error" in server.chat(stream=True).text
    broken = [json.loads(r.getMessage()) for r in caplog.records if r.levelno == logging.ERROR]
    assert [line["error"] for line in broken] == ["ZeroDivisionError"] * 2
    assert all("fake_engine.py" in " ".join(line["at"]) for line in broken)


def test_metrics_count_what_happens() -> None:
    with serving() as server:
        server.put("u1")
        server.engine.queue("one two three")
        server.chat(user="u1")
        server.chat(user="u9", stream=True)
        server.chat(e2p={"arm": "none"})
        server.chat(model="other")
        server.http.get("/nowhere")
        server.engine.queue(Failure(EngineError("away"), after=2))
        server.chat(stream=True)  # two more tokens, though the answer has no end
        done = 'e2p_requests_total{method="POST",route="/v1/chat/completions",status="200"} 4.0'
        until = time.monotonic() + 10  # a request counts once it is over, which its client may see a moment earlier
        while done not in (text := server.http.get("/metrics").text) and time.monotonic() < until:
            time.sleep(0.05)
    assert server.http.headers["accept"]
    for line in (
        'e2p_requests_total{method="POST",route="/v1/chat/completions",status="200"} 4.0',
        'e2p_requests_total{method="POST",route="/v1/chat/completions",status="404"} 1.0',
        'e2p_requests_total{method="PUT",route="/v1/users/{user_id}/embedding",status="200"} 1.0',
        'e2p_requests_total{method="GET",route="none",status="404"} 1.0',
        'e2p_answers_total{adapter="taste",arm="e2p",reason=""} 1.0',
        'e2p_answers_total{adapter="taste",arm="null",reason="unknown_user"} 1.0',
        'e2p_answers_total{adapter="taste",arm="null",reason="no_user"} 1.0',
        'e2p_answers_total{adapter="taste",arm="none",reason="asked"} 1.0',
        'e2p_tokens_total{adapter="taste",kind="prompt"} 4.0',
        'e2p_tokens_total{adapter="taste",kind="completion"} 15.0',
        'e2p_lookups_total{outcome="found"} 1.0',
        'e2p_lookups_total{outcome="unknown"} 1.0',
        'e2p_vectors_total{outcome="stored"} 1.0',
        "e2p_vector_age_seconds_count 1.0",
        'e2p_first_token_seconds_count{adapter="taste"} 4.0',
        'e2p_engine{figure="ready"} 1.0',
        "e2p_running 0.0",
        "e2p_waiting 0.0",
    ):
        assert line in text, line
