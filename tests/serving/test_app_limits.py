"""Size, queue, time, clients that go away, and a server that stops."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from e2p.config_serving import LimitsConfig
from e2p.serving.fake_engine import FakeEngine
from e2p.serving.http.limits import Queue
from served import HELLO, Server, error_of, serving, wait_until

LONG = " ".join(map(str, range(400)))


def slow(delay: float = 0.05, text: str = LONG) -> FakeEngine:
    return FakeEngine(answer=lambda _: text, delay=delay)


def raw(server: Server, text: bytes) -> socket.socket:
    """A connection of our own making."""
    host, port = server.base.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=10)
    line.sendall(text)
    return line


def head(path: str, length: int | None, kind: str = "application/json") -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n{size}\r\n\r\n".encode()


def status_of(line: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of a response that ends the connection."""
    text = b""
    while part := line.recv(65536):
        text += part
    top, _, body = text.partition(b"\r\n\r\n")
    assert b"connection: close" in top.lower()
    return int(top.split()[1]), json.loads(body)


# ---------------------------------------------------------------- bodies


def test_a_body_that_says_that_it_is_too_large_is_not_read() -> None:
    with serving(limits=LimitsConfig(body_bytes=1000)) as server:
        with raw(server, head("/v1/chat/completions", 1001)) as line:  # and nothing follows
            status, body = status_of(line)
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        large = [{"role": "user", "content": "x" * 1000}]
        assert error_of(server.chat(messages=large))[:2] == (413, "body_too_large")
        assert server.chat().status_code == 200


def test_a_body_that_does_not_say_is_cut_off() -> None:
    with serving(limits=LimitsConfig(body_bytes=1000)) as server:
        with raw(server, head("/v1/chat/completions", None)) as line:
            for _ in range(3):
                line.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
            status, body = status_of(line)
        assert (status, body["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_pauses_is_not_waited_for() -> None:
    with serving(limits=LimitsConfig(read_seconds=0.2)) as server:
        with raw(server, head("/v1/chat/completions", 100) + b'{"model":') as line:
            start = time.monotonic()
            status, body = status_of(line)
        assert (status, body["error"]["code"]) == (408, "body_timeout")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("limits", [{"read_seconds": 0.3}, {"seconds": 0.3}])
def test_a_body_that_trickles_is_not_waited_for(limits: dict[str, float]) -> None:
    """A byte now and then is no pause, and would else hold a connection, or a place of the uploads, for ever."""
    with serving(limits=LimitsConfig(**limits)) as server:
        with raw(server, head("/v1/chat/completions", 100_000) + b'{"model":') as line:
            stop = threading.Event()

            def trickle() -> None:
                with contextlib.suppress(OSError):
                    while not stop.wait(0.05):
                        line.sendall(b" ")

            sending = threading.Thread(target=trickle)
            sending.start()
            start = time.monotonic()
            line.settimeout(60)
            top = line.recv(1000)
            assert time.monotonic() - start < 60  # all of it would take more than an hour
            stop.set()
            sending.join()
            while not top.endswith(b"}"):
                more = line.recv(1000)
                assert more
                top += more
        assert top.startswith(b"HTTP/1.1 408 ")
        assert b'"body_timeout"' in top


def test_a_client_that_leaves_within_its_body() -> None:
    with serving() as server:
        raw(server, head("/v1/chat/completions", 100) + b"{").close()
        wait_until(lambda: 'status="499"' in server.http.get("/metrics").text)
        assert server.engine.requests == []


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        (b",".join([b"{}"] * 300_000), "missing_required_parameter"),
        (b'{"role": "user", "content": [%s]}' % b",".join([b"0"] * 450_000), "invalid_value"),
        (b'{"role": "user", "content": "x", %s}' % b",".join(b'"%d": 0' % at for at in range(80_000)), "invalid_value"),
    ],
    ids=["messages", "parts", "fields"],
)
def test_a_body_made_of_mistakes_holds_up_nobody(messages: bytes, code: str) -> None:
    """If each were told, such a body would take 14 seconds and half a GiB, and everyone would wait."""
    with serving() as server:
        body = b'{"model": "taste", "messages": [%s]}' % messages
        start = time.monotonic()
        response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert error_of(response)[:2] == (400, code)
        assert time.monotonic() - start < 5
        assert len(response.content) < 500


# ---------------------------------------------------------------- the queue


def test_who_comes_too_late_is_told_when_to_come_again() -> None:
    engine = slow()
    with serving(engine, limits=LimitsConfig(running=1, waiting=1)) as server:
        service = server.service()
        with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)) as first:
            assert first.status_code == 200
            waiting = threading.Thread(target=lambda: server.chat(max_tokens=1))
            waiting.start()
            wait_until(lambda: service.queue.waits == 1)
            refused = server.chat()
            assert error_of(refused) == (429, "queue_full", None)
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            metrics = server.http.get("/metrics").text
            assert "e2p_running 1.0" in metrics
            assert "e2p_waiting 1.0" in metrics
        waiting.join(10)
        assert not waiting.is_alive()
        assert len(engine.requests) == 2
        assert server.chat(max_tokens=1).status_code == 200
        assert (service.queue.held, service.queue.waits) == (0, 0)


def test_a_waiting_request_is_answered_for_the_vector_that_is_there_when_its_turn_comes() -> None:
    with serving(FakeEngine(delay=0.02), limits=LimitsConfig(running=1, waiting=1)) as server:
        server.put("u1", (1, 1, 1))
        answers: list[str] = []

        def ask() -> None:
            answers.append(server.chat(user="u1").json()["choices"][0]["message"]["content"])

        server.engine.queue(LONG)
        with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)):
            waiting = threading.Thread(target=ask)
            waiting.start()
            wait_until(lambda: server.service().queue.waits == 1)
            server.put("u1", (2, 2, 2))
        waiting.join(10)
        assert answers == ["taste user 1 [2 2 2] hello"]


def test_one_who_waits_and_leaves_frees_the_place_in_the_queue() -> None:
    with serving(slow(), limits=LimitsConfig(running=1, waiting=1)) as server:
        queue = server.service().queue
        with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)):
            body = json.dumps(_body()).encode()
            line = raw(server, head("/v1/chat/completions", len(body)) + body)
            wait_until(lambda: queue.waits == 1)
            line.close()
            wait_until(lambda: queue.waits == 0)
            assert queue.held == 1
        assert len(server.engine.requests) == 1


def test_uploads_have_a_queue_of_their_own() -> None:
    with serving(limits=LimitsConfig(uploads=1)) as server:
        with raw(server, head("/v1/users/embeddings", 100, "application/x-ndjson")):
            wait_until(lambda: server.service().uploads.held == 1)
            headers = {"content-type": "application/x-ndjson"}
            refused = server.http.post("/v1/users/embeddings", content=b"", headers=headers)
            assert error_of(refused)[:2] == (429, "queue_full")
            assert server.chat().status_code == 200
        wait_until(lambda: server.service().uploads.held == 0)


@pytest.mark.parametrize("places", [1, 3])
def test_several_prompts_of_a_request_take_a_place_each(places: int) -> None:
    """And wait for it, though nobody else may wait; what the engine is given at once stays bounded."""
    most = 0

    class Counting(FakeEngine):
        async def generate(self, request: Any) -> Any:
            nonlocal most
            async with contextlib.aclosing(super().generate(request)) as events:
                async for event in events:
                    most = max(most, self.running)
                    yield event

    with serving(Counting(delay=0.005), limits=LimitsConfig(running=places, waiting=0)) as server:
        body = {"model": "taste", "prompt": [str(number) for number in range(8)]}
        choices = server.http.post("/v1/completions", json=body).json()["choices"]
        assert [choice["text"].split()[-1] for choice in choices] == body["prompt"]
        assert most == places
        queue = server.service().queue
        assert (queue.held, queue.waits) == (0, 0)
        assert server.chat().status_code == 200


def test_several_prompts_of_one_who_leaves_are_all_given_up() -> None:
    with serving(FakeEngine(delay=0.05), limits=LimitsConfig(running=2)) as server:
        body = {"model": "taste", "prompt": ["a", "b", "c", "d"], "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_bytes())
        queue = server.service().queue
        wait_until(lambda: (server.engine.running, queue.held, queue.waits) == (0, 0, 0))
        assert len(server.engine.requests) == server.engine.cancelled == 2


def test_when_to_come_again_grows_with_the_queue() -> None:
    queue = Queue(2, 10)
    queue._seconds = 4.0
    assert queue.retry_after() == 2
    queue.waits = 9
    assert queue.retry_after() == 20
    queue.waits = 900
    assert queue.retry_after() == 60
    queue._seconds = 0.0
    assert queue.retry_after() == 1


# ---------------------------------------------------------------- time


def test_an_answer_that_takes_too_long_is_ended() -> None:
    with serving(slow(), limits=LimitsConfig(seconds=0.4)) as server:
        assert error_of(server.chat())[:2] == (504, "deadline")
        wait_until(lambda: server.engine.running == 0)
        assert server.engine.cancelled == 1
        events = server.chat(stream=True).text.split("\n\n")
        assert json.loads(events[0][6:])["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(events[-2][6:])["error"]["code"] == "deadline"
        assert server.engine.cancelled == 2
        assert server.service().queue.held == 0


def test_waiting_counts_as_time() -> None:
    with serving(slow(), limits=LimitsConfig(seconds=0.4, running=1)) as server:
        with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)):
            assert error_of(server.chat())[:2] == (504, "deadline")
        assert len(server.engine.requests) <= 2


def test_an_answer_does_not_wait_for_the_clients_acknowledgement() -> None:
    """Where Nagle's algorithm is on, every answer takes 40 ms and more."""
    with serving() as server:
        server.chat()
        took = []
        for _ in range(30):
            start = time.monotonic()
            server.http.get("/healthz")
            took.append(time.monotonic() - start)
        assert min(took) < 0.03


# ---------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_work(stream: bool) -> None:
    with serving(slow(delay=0.02)) as server:
        body = json.dumps(_body(stream=stream)).encode()
        line = raw(server, head("/v1/chat/completions", len(body)) + body)
        wait_until(lambda: server.engine.running == 1)
        if stream:
            assert line.recv(100).startswith(b"HTTP/1.1 200 OK")
        line.close()
        wait_until(lambda: server.engine.running == 0)
        assert server.engine.cancelled == 1
        wait_until(lambda: server.service().queue.held == 0)
        assert server.http.get("/healthz").status_code == 200


def test_openais_client_can_close_a_stream() -> None:
    with serving(slow(delay=0.02)) as server:
        stream = server.openai().chat.completions.create(model="taste", messages=HELLO, stream=True)
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        wait_until(lambda: server.engine.cancelled == 1)


def test_an_engine_far_ahead_of_its_client_is_held_back() -> None:
    """A client that does not read makes neither memory nor work without bound."""
    engine = FakeEngine(answer=lambda _: "word " * 200_000)
    with serving(engine, limits=LimitsConfig(max_tokens=1_000_000, seconds=1.5)) as server:
        body = json.dumps(_body(stream=True, max_tokens=1_000_000)).encode()
        line = raw(server, head("/v1/chat/completions", len(body)) + body)
        wait_until(lambda: engine.running == 1)
        wait_until(lambda: engine.running == 0)
        assert engine.cancelled == 1
        assert server.service().queue.held == 0
        line.close()


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("stream", [True, False])
def test_what_runs_is_finished_before_the_server_ends(stream: bool) -> None:
    engine = slow(delay=0.1, text="one two three four five")
    with serving(engine) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(server.chat(stream=stream)))
        asking.start()
        wait_until(lambda: engine.running == 1)
        server.uvicorn.should_exit = True
        asking.join(10)
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert answers[0].status_code == 200
        assert answers[0].text.endswith("data: [DONE]\n\n") == stream
        assert "five" in answers[0].text
        assert engine.cancelled == 0
        assert engine.ready is False
        with pytest.raises(httpx.ConnectError):
            server.chat()


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "taste", "messages": HELLO, **fields}
