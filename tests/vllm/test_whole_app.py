"""`e2p serve` as OpenAI's own client and curl see it, on the engine in its process and on vLLM: the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from docs_lines import CURL, run_curl
from engines import written
from tiny import make_batch
from vllm_servers import MARKS
from whole_app import ADAPTERS, PROMPTS, STABLE, App, World

pytestmark = [pytest.mark.slow]
HELLO = PROMPTS[2]


@pytest.fixture(params=["hf", pytest.param("vllm", marks=MARKS)])
def app(request: pytest.FixtureRequest) -> App:
    found: App = request.getfixturevalue(f"{request.param}_app")
    return found


@pytest.fixture
def client(app: App) -> Iterator[openai.OpenAI]:
    """The official client; it does not try again."""
    with openai.OpenAI(base_url=f"{app.base}/v1", api_key="none-needed", max_retries=0, timeout=60) as opened:
        yield opened


def ask(client: openai.OpenAI, user: str | None = "s01", model: str = "taste", **fields: Any) -> Any:
    """A greedy chat request."""
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(model=model, **({"user": user} if user else {}), **asked)


def words_within(world: World, least: int = 4) -> tuple[str, str, str]:
    """A user, the answer, and plain characters that first stand some way into it."""
    for user, text in zip(STABLE, world.said("taste", HELLO, STABLE.values(), 12), strict=True):
        for start in range(least, len(text) - 2):
            stop = text[start : start + 2]
            if stop.isascii() and stop.isalpha() and text.find(stop) == start and text[start - 1] != "\ufffd":
                return user, text, stop
    raise AssertionError("no answer has plain characters within")


# ---------------------------------------------------------------- the official client


@pytest.mark.parametrize("model", ADAPTERS)
def test_chat_is_what_trainings_model_says(app: App, client: openai.OpenAI, world: World, model: str) -> None:
    for user in ("s01", "s02"):
        answer = ask(client, user, model)
        (choice,) = answer.choices
        assert choice.message.content == world.said(model, HELLO, [STABLE[user]], 12)[0]
        assert (choice.message.role, answer.object, answer.model) == ("assistant", "chat.completion", model)
        assert choice.finish_reason in ("stop", "length")
        prompt = world.models[model].encoder.prompt(HELLO)
        assert answer.usage.prompt_tokens == len(prompt.ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert (answer.e2p["arm"], answer.e2p["vector"]["version"]) == ("e2p", "v1")
    for user, reason in ((None, "no_user"), ("nobody", "unknown_user")):
        answer = ask(client, user, model)
        assert answer.choices[0].message.content == world.said(model, HELLO, [None], 12)[0]
        assert (answer.e2p["arm"], answer.e2p["reason"]) == ("null", reason)
    own = ask(client, None, model, extra_body={"e2p": {"vector": STABLE["s03"].tolist()}})
    assert own.choices[0].message.content == world.said(model, HELLO, [STABLE["s03"]], 12)[0]


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].e2p["arm"] == "e2p"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "taste", "prompt": "make a playlist", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(**asked, user="s01")
    chunks = list(client.completions.create(**asked, user="s01", stream=True))
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage.completion_tokens <= 10
    assert whole.choices[0].text != client.completions.create(**asked, user="s02").choices[0].text


def test_several_answers_and_seeds(client: openai.OpenAI, world: World) -> None:
    greedy = ask(client, n=3)
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert {c.message.content for c in greedy.choices} == {*world.said("taste", HELLO, [STABLE["s01"]], 12)}
    assert greedy.usage.completion_tokens % 3 == 0
    drawn = [ask(client, n=3, temperature=1.0, top_p=0.9, seed=7) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    streamed: dict[int, str] = dict.fromkeys(range(3), "")
    for chunk in ask(client, n=3, temperature=1.0, top_p=0.9, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [*streamed.values()] == texts[0]


def test_stop_texts(client: openai.OpenAI, world: World) -> None:
    user, text, stop = words_within(world)
    for stops in (stop, ["never said", stop]):
        answer = ask(client, user, stop=stops)
        assert answer.choices[0].message.content == text[: text.index(stop)].rstrip()
        assert answer.choices[0].finish_reason == "stop"
    chunks = list(ask(client, user, stop=[stop], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks).rstrip() == text[: text.index(stop)].rstrip()


def test_logprobs(client: openai.OpenAI, world: World) -> None:
    tokens, values = trainings(world, "taste", "s01", 8)
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=8)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == tokens
    assert [entry.logprob for entry in content] == pytest.approx(values, abs=1e-3)
    for entry in content:
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert len(entry.top_logprobs) == 2
    # Parts of characters have bytes that are text only together; special tokens are no text.
    added = world.models["taste"].backbone.tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    joined = b"".join(bytes(entry.bytes) for entry in content if entry.token not in special)
    assert joined.decode(errors="replace").strip() == answer.choices[0].message.content
    streamed = [
        e
        for c in ask(client, logprobs=True, max_tokens=8, stream=True)
        if c.choices[0].logprobs
        for e in c.choices[0].logprobs.content
    ]
    assert [e.logprob for e in streamed] == pytest.approx(values, abs=1e-3)
    told = (
        client.completions.create(
            model="taste", prompt="make a playlist", user="s01", temperature=0, max_tokens=5, logprobs=2
        )
        .choices[0]
        .logprobs
    )
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(
        max(top.values()) == pytest.approx(own, abs=1e-4)
        for top, own in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"backbone", *ADAPTERS}
    assert client.models.retrieve("early").e2p["position"] == "before_bos"
    revision = ask(client).e2p["adapter_revision"]
    assert client.models.retrieve("taste").e2p["revision"] == revision


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    cases: list[tuple[type[openai.APIStatusError], str | None, dict[str, Any]]] = [
        (openai.NotFoundError, "model_not_found", {"model": "other"}),
        (openai.BadRequestError, "limit_exceeded", {"n": 99}),
        (openai.BadRequestError, "unsupported_parameter", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, "invalid_request", {"messages": long}),
        (openai.BadRequestError, "invalid_value", {"temperature": 9}),
        (openai.BadRequestError, "wrong_dimension", {"extra_body": {"e2p": {"vector": [1.0]}}}),
        (openai.BadRequestError, "unsupported_parameter", {"extra_body": {"prompt_embeds": "gASVKAAAAA=="}}),
    ]
    for kind, code, fields in cases:
        for stream in (False, True):
            with pytest.raises(kind) as refused:
                ask(client, **fields, stream=stream)
            assert refused.value.code == code
            assert refused.value.type.endswith("_error")


# ---------------------------------------------------------------- the lines of the docs


def test_curl_lines(app: App) -> None:
    said = {name: run_curl(block, app.base) for name, block in CURL.items()}
    asked, streamed, models = said["ask"]
    assert json.loads(asked)["e2p"]["arm"] == "e2p"
    assert streamed.endswith("data: [DONE]\n\n")
    assert {model["id"] for model in json.loads(models)["data"]} == {"backbone", *ADAPTERS}
    assert json.loads(said["readme"][1])["outcome"] == "stored"
    assert json.loads(said["readme"][0])["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- greedy tokens


def trainings(world: World, name: str, user: str, new: int, prompt: Any = HELLO) -> tuple[list[str], list[float]]:
    """Tokens and their log-probabilities: generated, and then found to be the likeliest of training's forward pass."""
    model = world.models[name]
    encoded, vector = model.encoder.prompt(prompt), STABLE[user][None]
    at = model.splice_at(encoded)
    with torch.no_grad():
        prefix = model.prefix(vector, 1)
        (ids,) = model.backbone.generate([encoded], [at], prefix, max_new_tokens=new, do_sample=False)
        batch = make_batch([encoded.ids], [ids], [at], torch.tensor(vector))
        hidden, labels = model.backbone.completion_states(batch, prefix)
        assert model.backbone.head(hidden).argmax(-1).tolist() == labels.tolist() == ids
        logprobs = model(batch)
    return [written(model.backbone.tokenizer, each) for each in ids], logprobs.tolist()


@pytest.mark.parametrize("vllm", [pytest.param("vllm", marks=MARKS)])
def test_both_engines_and_trainings_forward_pass_choose_the_same_tokens(
    hf_app: App, world: World, request: pytest.FixtureRequest, vllm: str
) -> None:
    gateway: App = request.getfixturevalue(f"{vllm}_app")
    found: dict[str, list[Any]] = {}
    cases = [(name, user, prompt) for name in ADAPTERS for user in ("s04", "s05", "s06") for prompt in PROMPTS]
    for app in (hf_app, gateway):
        with openai.OpenAI(base_url=f"{app.base}/v1", api_key="none-needed", max_retries=0) as client:
            found[app.base] = [
                ask(client, user, name, messages=prompt, logprobs=True).choices[0] for name, user, prompt in cases
            ]
    for case, here, there in zip(cases, *found.values(), strict=True):
        tokens, values = trainings(world, case[0], case[1], 12, case[2])
        assert [entry.token for entry in here.logprobs.content] == tokens, case
        assert [entry.token for entry in there.logprobs.content] == tokens, case
        assert here.message.content == there.message.content
        for choice in (here, there):
            assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(values, abs=1e-3)
