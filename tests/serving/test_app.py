"""The server as OpenAI's own client sees it: answers, streams, models, and errors in its form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from e2p.config_serving import LimitsConfig
from e2p.errors import BackboneError
from e2p.serving.engine import (
    AdapterInfo,
    Delta,
    EngineBusyError,
    EngineError,
    Finished,
    Request,
    RequestError,
    Started,
    TokenLogprob,
)
from e2p.serving.fake_engine import ADAPTERS, Failure, FakeEngine
from e2p.serving.http import streams
from served import HELLO, Server, error_of, serving


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """One server for all tests here, as new for each."""
    running.engine.reset()
    return running


# ---------------------------------------------------------------- chat


def test_chat_answers_for_the_user_named(server: Server) -> None:
    server.put("u1", (1, 2, 3))
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO, user="u1", seed=7)
    assert answer.choices[0].message.content == "taste user 1 [1 2 3] hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 7, 8)
    assert answer.e2p["arm"] == "e2p"
    asked = server.engine.requests[-1]
    assert (asked.prompt, asked.raw, asked.sampling.seed) == (HELLO, False, 7)


def test_sampling_reaches_the_engine(server: Server) -> None:
    server.openai().chat.completions.create(
        model="taste", messages=HELLO, max_completion_tokens=3, temperature=0.3, top_p=0.7, n=2, stop=["x", "y"]
    )
    found = server.engine.requests[-1].sampling
    assert (found.max_tokens, found.temperature, found.top_p, found.n, found.stop) == (3, 0.3, 0.7, 2, ("x", "y"))
    server.chat(max_tokens=5, stop="z", top_p=0, temperature=1)
    found = server.engine.requests[-1].sampling
    assert (found.max_tokens, found.temperature, found.top_p, found.stop) == (5, 0.0, 1.0, ("z",))
    server.chat()
    found = server.engine.requests[-1].sampling
    assert (found.max_tokens, found.temperature, found.top_p, found.n) == (256, 1.0, 1.0, 1)
    assert (found.seed, found.stop, found.logprobs) == (None, (), None)


def test_n_answers_and_their_ends(server: Server) -> None:
    server.engine.queue(["one two three", "four"])
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO, n=2, max_tokens=2)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "one two", "length"),
        (1, "four", "stop"),
    ]
    assert answer.usage.completion_tokens == 3


def test_a_stop_text_ends_an_answer(server: Server) -> None:
    server.engine.queue("one two three")
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO, stop=" two")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "stop")


def test_logprobs_of_chat(server: Server) -> None:
    server.engine.queue("é two")
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO, logprobs=True, top_logprobs=2)
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("é", -0.1, [195, 169])
    assert [(t.token, round(t.logprob, 6)) for t in second.top_logprobs] == [(" two", -0.2), (" other1", -1.2)]
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    answer = server.openai().chat.completions.create(model="taste", messages=HELLO)
    assert answer.choices[0].logprobs is None


def test_logprobs_of_a_long_answer_are_made_as_they_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 16,384 tokens, all at once at the end, would hold up everyone else for seconds."""
    seen: list[int] = []
    real = streams._chat_rows

    def rows(tokens: Any) -> Any:
        seen.append(len(tokens))
        return real(tokens)

    monkeypatch.setattr(streams, "_chat_rows", rows)
    server.engine.queue("one two three four")
    body = server.chat(logprobs=True, top_logprobs=1).json()
    assert [row["token"] for row in body["choices"][0]["logprobs"]["content"]] == ["one", " two", " three", " four"]
    assert seen == [1, 1, 1, 1]


def test_messages_in_parts_and_a_developers_turn(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "name": "ana", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert server.chat(messages=messages).status_code == 200
    assert server.engine.requests[-1].prompt == [
        {"role": "system", "content": "be short"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "ab"},
    ]


# ---------------------------------------------------------------- streams


def test_a_stream_of_chat_in_order(server: Server) -> None:
    server.put("u1")
    server.engine.queue("one two three")
    chunks = list(server.openai().chat.completions.create(model="taste", messages=HELLO, user="u1", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].e2p["vector"]["version"] == "v1"
    assert [getattr(c, "e2p", None) for c in chunks[1:]] == [None] * 4
    assert [c.choices[0].delta.content for c in chunks] == ["", "one", " two", " three", None]
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 4 + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_a_stream_of_several_answers_with_usage_and_logprobs(server: Server) -> None:
    server.engine.queue(["a b", "c"])
    chunks = list(
        server.openai().chat.completions.create(
            model="taste", messages=HELLO, n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
        )
    )
    assert [(c.choices[0].index, c.choices[0].delta.role) for c in chunks[:2]] == [(0, "assistant"), (1, "assistant")]
    said = [(c.choices[0].index, c.choices[0].delta.content) for c in chunks[2:-3]]
    assert said == [(0, "a"), (1, "c"), (0, " b")]
    assert [c.choices[0].logprobs.content[0].token for c in chunks[2:-3]] == ["a", "c", " b"]
    assert sorted(c.choices[0].index for c in chunks[-3:-1]) == [0, 1]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stream_is_server_sent_events(server: Server) -> None:
    server.engine.queue("one")
    with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-e2p-arm"] == "null"
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert [json.loads(e[6:])["object"] for e in events[:-2]] == ["chat.completion.chunk"] * 3


def test_completions_whole_and_streamed(server: Server) -> None:
    client = server.openai()
    server.engine.queue("one two")
    answer = client.completions.create(model="taste", prompt="say", logprobs=2, max_tokens=9)
    assert (answer.choices[0].text, answer.object, answer.id[:5]) == ("one two", "text_completion", "cmpl-")
    found = answer.choices[0].logprobs
    assert (found.tokens, found.token_logprobs, found.text_offset) == (["one", " two"], [-0.1, -0.2], [0, 3])
    assert found.top_logprobs == [{"one": -0.1, " other1": -1.1}, {" two": -0.2, " other1": -1.2}]
    assert (server.engine.requests[-1].prompt, server.engine.requests[-1].raw) == ("say", True)
    server.engine.queue("one two")
    chunks = list(client.completions.create(model="taste", prompt=["say"], logprobs=0, stream=True))
    assert [c.choices[0].text for c in chunks] == ["", "one", " two", ""]
    assert [c.choices[0].logprobs.text_offset for c in chunks[1:3]] == [[0], [3]]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].e2p["arm"] == "null"


def test_completions_of_several_prompts(server: Server) -> None:
    """Each for the same user; answers are counted on from prompt to prompt."""
    server.put("u1", (1, 2, 3))
    client = server.openai()
    prompts = ["a", "b b", "c c c"]
    answer = client.completions.create(model="taste", prompt=prompts, user="u1", n=2, logprobs=1)
    texts = [f"taste user 1 [1 2 3] {prompt}" for prompt in prompts for _ in range(2)]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 2 * (7 + 8 + 9))
    assert answer.choices[5].logprobs.text_offset[-1] == len(texts[5]) - 2
    assert sorted((each.prompt, each.raw, each.sampling.n) for each in server.engine.requests) == [
        (prompt, True, 2) for prompt in prompts
    ]
    chunks = list(
        client.completions.create(model="taste", prompt=prompts, stream=True, stream_options={"include_usage": True})
    )
    found = dict.fromkeys(range(3), "")
    for chunk in chunks[:-1]:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert list(found.values()) == [f"taste null 1 [] {prompt}" for prompt in prompts]
    assert sorted(chunk.choices[0].index for chunk in chunks[:-1] if chunk.choices[0].finish_reason) == [0, 1, 2]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (6, 5 + 6 + 7)


def test_completions_of_token_ids(server: Server) -> None:
    client = server.openai()
    for given, texts in (([5, 6], ["5 6"]), ([[5, 6], [7]], ["5 6", "7"])):
        answer = client.completions.create(model="backbone", prompt=given)
        assert [choice.text for choice in answer.choices] == [f"backbone none 1 [] {text}" for text in texts]


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_prompts_one_that_fails_ends_all(stream: bool, server: Server) -> None:
    server.engine.queue("fine", Failure(RequestError("too long")), Failure(EngineError("away"), after=99))
    body = {"model": "taste", "prompt": ["a", "b", "c"], "stream": stream}
    response = server.http.post("/v1/completions", json=body)
    if stream:
        assert '"too long"' in response.text
        assert "[DONE]" not in response.text
    else:
        assert error_of(response)[:2] == (400, "invalid_request")
    assert server.engine.running == 0


def test_openais_client_goes_on_with_what_was_answered(server: Server) -> None:
    """Its message has fields that say nothing, such as refusal: null, and more of them where it is made a dict."""
    client = server.openai()
    said = client.chat.completions.create(model="taste", messages=HELLO).choices[0].message
    for turn in (said, said.model_dump(), {**said.model_dump(), "annotations": []}):
        client.chat.completions.create(model="taste", messages=[*HELLO, turn, *HELLO])
        assert [list(message) for message in server.engine.requests[-1].prompt] == [["role", "content"]] * 3


class Odd(FakeEngine):
    """Says what a fake of words cannot."""

    async def generate(self, request: Request) -> Any:
        if request.revision != "r1+":  # what is served now was loaded after the request had been made
            self._adapters["taste"] = replace(ADAPTERS[0], revision="r1+")
        yield Started(1, 1, "r1+")
        yield Delta(0, "", 1, (TokenLogprob("\ufffd", -math.inf, (("\ufffd", -math.inf),)),))
        yield Delta(0, "é", 1)
        yield Finished(0, "length", 2)


def test_what_json_cannot_say_and_a_revision_loaded_meanwhile() -> None:
    with serving(Odd()) as server:
        body = server.chat(logprobs=True).json()
        assert body["choices"][0]["message"]["content"] == "é"
        assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
        assert body["e2p"]["adapter_revision"] == "r1+"
        text = server.chat(logprobs=True, stream=True).text
        assert [json.loads(line[6:])["choices"][0]["delta"] for line in text.split("\n\n")[:-2]] == [
            {"role": "assistant", "content": ""},
            {"content": ""},
            {"content": "é"},
            {},
        ]


class InParts(FakeEngine):
    """A character of three tokens, as byte-level vocabularies make them."""

    async def generate(self, request: Request) -> Any:
        parts = [r"bytes:\xf0\x9f", r"bytes:\x98", r"bytes:\x80", " ok"]
        yield Started(1, 1)
        for number, part in enumerate(parts):
            text = ("", "", "😀", " ok")[number]
            yield Delta(0, text, 1, (TokenLogprob(part, -0.5, ((part, -0.5), ("\ufffd", -1), ("\ufffd", -2))),))
        yield Finished(0, "stop", 4)


def test_parts_of_a_character_are_its_bytes() -> None:
    with serving(InParts()) as server:
        client = server.openai()
        chat = client.chat.completions.create(model="taste", messages=HELLO, logprobs=True, top_logprobs=3)
        rows = chat.choices[0].logprobs.content
        assert bytes(byte for row in rows for byte in row.bytes) == chat.choices[0].message.content.encode()
        assert rows[0].token == rows[0].top_logprobs[0].token == r"bytes:\xf0\x9f"
        text = client.completions.create(model="taste", prompt="hello", logprobs=3).choices[0].logprobs
        assert text.text_offset == [0, 1, 1, 1]
        assert text.top_logprobs[0] == {r"bytes:\xf0\x9f": -0.5, "\ufffd": -1}  # of two that read alike the likelier


# ---------------------------------------------------------------- models


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may leave in another state."""
    with serving() as server:
        yield server


def test_models_are_listed_found_and_loaded_anew(own: Server) -> None:
    server, client = own, own.openai()
    assert [m.id for m in client.models.list()] == ["taste", "backbone"]
    found = client.models.retrieve("taste")
    assert (found.e2p["dimension"], found.e2p["versions"], found.e2p["revision"]) == (3, ["v1"], "r1")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert server.http.post("/v1/models/taste/reload").json()["e2p"]["revision"] == "r2"
    assert server.chat().json()["e2p"]["adapter_revision"] == "r2"
    assert error_of(server.http.post("/v1/models/other/reload")) == (404, "model_not_found", "model")


class Broken(FakeEngine):
    async def reload(self, name: str) -> AdapterInfo:
        raise RequestError("the folder is empty")


def test_an_adapter_that_cannot_be_loaded_is_served_on() -> None:
    with serving(Broken()) as server:
        assert error_of(server.http.post("/v1/models/taste/reload")) == (409, "not_reloaded", "name")
        assert server.chat().status_code == 200


def test_a_reload_drops_no_request() -> None:
    with serving(FakeEngine(delay=0.05)) as server:
        server.engine.queue("one two three four")
        with server.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)) as response:
            parts = response.iter_text()
            head = next(parts)
            assert server.http.post("/v1/models/taste/reload").status_code == 200
            text = head + "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert '"r1"' in text
        assert server.chat().json()["e2p"]["adapter_revision"] == "r2"


def test_two_adapters_are_picked_by_model() -> None:
    other = AdapterInfo("mood", 2, (), False, "r1", 2, "before_completion")
    with serving(FakeEngine((*ADAPTERS, other))) as server:
        answer = server.chat(model="mood", e2p={"vector": [4, 5]}).json()
        assert answer["choices"][0]["message"]["content"] == "mood user 1 [4 5] hello"
        assert answer["model"] == answer["e2p"]["adapter"] == "mood"


# ---------------------------------------------------------------- errors


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "taste", "messages": HELLO, **fields}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "other"}, (404, "model_not_found", "model")),
        ({"model": None}, (400, "invalid_value", "model")),
        ({"messages": []}, (400, "invalid_value", "messages")),
        ({"messages": None}, (400, "invalid_value", "messages")),
        ({"messages": [{"role": "user"}]}, (400, "missing_required_parameter", "messages.0.content")),
        ({"messages": [{"role": "tool", "content": "x"}]}, (400, "invalid_value", "messages.0.role")),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, (400, "unsupported_parameter", None)),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, (400, "invalid_value", None)),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, (400, "unsupported_parameter", None)),
        ({"messages": [{"role": "user", "content": ""}] * 2049}, (400, "invalid_value", "messages")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 2049}]},
            (400, "invalid_value", None),
        ),
        ({"temperature": 3}, (400, "invalid_value", "temperature")),
        ({"temperature": "1"}, (400, "invalid_value", "temperature")),
        ({"top_p": -1}, (400, "invalid_value", "top_p")),
        ({"n": 0}, (400, "invalid_value", "n")),
        ({"n": 9}, (400, "limit_exceeded", "n")),
        ({"n": True}, (400, "invalid_value", "n")),
        ({"max_tokens": 2049}, (400, "limit_exceeded", "max_tokens")),
        ({"max_completion_tokens": 2049}, (400, "limit_exceeded", "max_tokens")),
        ({"stop": [""]}, (400, "invalid_value", None)),
        ({"stop": list("abcde")}, (400, "invalid_value", None)),
        ({"seed": 2**63}, (400, "invalid_value", "seed")),
        ({"top_logprobs": 2}, (400, "invalid_value", "top_logprobs")),
        ({"logprobs": True, "top_logprobs": 21}, (400, "invalid_value", "top_logprobs")),
        ({"stream_options": {"include_usage": True}}, (400, "invalid_value", "stream_options")),
        ({"user": ""}, (400, "invalid_value", "user")),
        ({"user": "  "}, (400, "invalid_value", "user")),
        ({"user": 5}, (400, "invalid_value", "user")),
        ({"tools": [{"type": "function"}]}, (400, "unsupported_parameter", "tools")),
        ({"tool_choice": "auto"}, (400, "unsupported_parameter", "tool_choice")),
        ({"response_format": {"type": "json_object"}}, (400, "unsupported_parameter", "response_format")),
        ({"logit_bias": {"5": 1}}, (400, "unsupported_parameter", "logit_bias")),
        ({"presence_penalty": 0.5}, (400, "unsupported_parameter", "presence_penalty")),
        ({"frequency_penalty": True}, (400, "unsupported_parameter", "frequency_penalty")),
        ({"reasoning_effort": "low"}, (400, "unsupported_parameter", "reasoning_effort")),
        ({"prompt_embeds": "gASVKAAAAA=="}, (400, "unsupported_parameter", "prompt_embeds")),
        ({"top_k": 5}, (400, "unknown_parameter", "top_k")),
        ({"prompt": "x"}, (400, "unknown_parameter", "prompt")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(
    fields: dict[str, Any], expected: tuple[int, str, str | None], server: Server
) -> None:
    status, code, param = error_of(server.chat(**fields))
    assert (status, code) == expected[:2]
    assert expected[2] is None or param == expected[2]
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "modalities": ["text"], "functions": None},
        {"temperature": None, "n": None, "stop": None, "user": None, "stream": None, "e2p": None, "seed": None},
    ],
)
def test_what_changes_nothing_is_taken(fields: dict[str, Any], server: Server) -> None:
    assert server.chat(**fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": []}, (400, "invalid_value")),
        ({"prompt": [[]]}, (400, "invalid_value")),
        ({"prompt": ["a", 1]}, (400, "invalid_value")),
        ({"prompt": [1, [2]]}, (400, "invalid_value")),
        ({"prompt": [-1]}, (400, "invalid_value")),
        ({"prompt": [True]}, (400, "invalid_value")),
        ({"prompt": ["a"] * 65}, (400, "limit_exceeded")),
        ({"prompt": ["a" * 60_000] * 2}, (400, "limit_exceeded")),
        ({"prompt": [[5] * 60_000] * 2}, (400, "limit_exceeded")),
        ({}, (400, "missing_required_parameter")),
        ({"prompt": "a", "echo": True}, (400, "unsupported_parameter")),
        ({"prompt": "a", "best_of": 2}, (400, "unsupported_parameter")),
        ({"prompt": "a", "suffix": "b"}, (400, "unsupported_parameter")),
        ({"prompt": "a", "logprobs": 6}, (400, "invalid_value")),
        ({"prompt": "a", "prompt_embeds": []}, (400, "unsupported_parameter")),
        ({"prompt": "a", "messages": HELLO}, (400, "unknown_parameter")),
    ],
)
def test_completions_refuse_the_same(fields: dict[str, Any], expected: tuple[int, str], server: Server) -> None:
    response = server.http.post("/v1/completions", json={"model": "taste", **fields})
    assert error_of(response)[:2] == expected


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "expected"),
    [
        ("GET", "/nowhere", b"", "", (404, "not_found")),
        ("GET", "/v1/chat/completions/", b"", "", (404, "not_found")),
        ("GET", "/v1/chat/completions", b"", "", (405, "method_not_allowed")),
        ("DELETE", "/healthz", b"", "", (405, "method_not_allowed")),
        ("POST", "/v1/chat/completions", b"{", "application/json", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", b"", "application/json", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", b"[]", "application/json", (400, "invalid_value")),
        ("POST", "/v1/chat/completions", b"\xff", "application/json", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", b"NaN", "application/json", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", b"[" * 5000, "application/json", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", b"{}", "text/plain", (415, "unsupported_media_type")),
        ("POST", "/v1/chat/completions", b"{}", "", (415, "unsupported_media_type")),
        ("POST", "/v1/users/embeddings", b"{}", "application/json", (415, "unsupported_media_type")),
        ("GET", "/v1/users/u1/embedding?vector=perhaps", b"", "", (400, "invalid_value")),
    ],
)
def test_every_error_is_in_openais_form(
    method: str, path: str, content: bytes, kind: str, expected: tuple[int, str], server: Server
) -> None:
    headers = {"content-type": kind} if kind else {}
    response = server.http.request(method, path, content=content, headers=headers)
    assert error_of(response)[:2] == expected
    assert response.headers["x-request-id"].startswith("req_")


def test_a_wrong_value_is_not_repeated(server: Server) -> None:
    for fields in ({"temperature": "sentinel-1"}, {"user": ["sentinel-1"]}, {"stop": [["sentinel-1"]]}):
        response = server.chat(**fields)
        assert response.status_code == 400
        assert "sentinel" not in response.text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RequestError("a prompt of 9 tokens is too long"), (400, "invalid_request")),
        (EngineBusyError("too many wait"), (429, "queue_full")),
        (EngineError("the model is away"), (503, "engine_unavailable")),
        (ZeroDivisionError("sentinel-1"), (500, "internal_error")),
        (BackboneError("sentinel-1"), (500, "internal_error")),
    ],
)
def test_what_an_engine_raises(error: Exception, expected: tuple[int, str], server: Server) -> None:
    server.engine.queue(Failure(error), Failure(error, after=2), Failure(error, after=2))
    response = server.chat()
    assert error_of(response)[:2] == expected
    assert ("retry-after" in response.headers) == (expected[0] in (429, 503))
    assert error_of(server.chat())[:2] == expected
    assert "sentinel" not in response.text
    text = server.chat(stream=True).text  # 200 has been sent, so the last event tells it
    *_, last, end = text.split("\n\n")
    assert (json.loads(last[6:])["error"]["code"], end) == (expected[1], "")
    assert "[DONE]" not in text
    assert server.chat().status_code == 200


def test_openais_client_raises_its_own_errors(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="taste", messages=HELLO, n=9)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    server.engine.queue(Failure(EngineError("away"), after=1))
    with pytest.raises(openai.APIError, match="away"):
        list(client.chat.completions.create(model="taste", messages=HELLO, stream=True))


def test_openais_client_tries_again_where_that_helps(server: Server) -> None:
    server.engine.queue(Failure(EngineError("away")), "back")
    answer = server.openai(max_retries=2).chat.completions.create(model="taste", messages=HELLO)
    assert answer.choices[0].message.content == "back"


def test_health_and_readiness(own: Server) -> None:
    server = own
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"status": "ready"}
    server.engine.ready = False
    assert error_of(server.http.get("/readyz"))[:2] == (503, "not_ready")
    assert server.http.get("/healthz").status_code == 200
    server.engine.ready = True
    server.store.close()
    assert error_of(server.http.get("/readyz"))[:2] == (503, "store_unavailable")


def test_whoever_looks_at_a_server_may_ask_for_the_head_alone(own: Server) -> None:
    for path in ("/healthz", "/readyz"):
        response = own.http.head(path)
        assert (response.status_code, response.content) == (200, b"")
    own.engine.ready = False
    assert own.http.head("/readyz").status_code == 503
    own.engine.ready = True


def test_a_prompt_may_be_too_long() -> None:
    with serving(limits=LimitsConfig(prompt_chars=10)) as server:
        long = [{"role": "user", "content": "x" * 6}, {"role": "user", "content": "x" * 5}]
        assert error_of(server.chat(messages=long)) == (400, "limit_exceeded", "messages")
        assert server.chat(messages=long[:1]).status_code == 200
        answer = server.http.post("/v1/completions", json={"model": "taste", "prompt": "x" * 11})
        assert error_of(answer) == (400, "limit_exceeded", "prompt")


def test_no_websockets_and_no_cross_origin(server: Server) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = server.http.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert isinstance(response, httpx.Response)
