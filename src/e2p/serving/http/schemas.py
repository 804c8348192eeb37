"""Requests in OpenAI's form, checked. What would be silently wrong is refused; what changes nothing is ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from e2p.config_serving import LimitsConfig
from e2p.data.templates import Prompt
from e2p.serving.engine import Sampling, TokenIds
from e2p.serving.http.errors import ApiError

MAX_DIM, MAX_ID = 65_536, 1024
MAX_MESSAGES = 2048  # and parts of a message: empty ones cost time as well, which prompt_chars does not bound
_MANY = 100  # mistakes that are not told one by one, since a body may be made of them
UserId = Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"\S")]
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_DIM, fail_fast=True)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Version = Annotated[str, Field(max_length=255)]

# They change nothing about an answer, or say what is so anyway.
IGNORED = {
    *("metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Known to OpenAI and not offered here; these values mean that they are not used.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Model):
    """A part of a message; only texts can be read."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    name: str | None = None
    # What OpenAI's client sends with an assistant's message that it was given.
    refusal: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """As the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content}


class StreamOptions(_Model):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Personalisation(_Model):
    """``extra_body={"e2p": {...}}``: more than a user id can say."""

    vector: Vector | None = Field(None, description="a user's vector in place of a stored one: plain numbers")
    version: Version | None = Field(None, description="name of the space that this vector lives in")
    strength: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = Field(
        None, description="0: the null user, 1: the user, which is what is meant where nothing is said; 2: exaggerated"
    )
    arm: Literal["e2p", "null", "none"] = Field("e2p", description="null: the learned null user; none: not personal")


class _Asked(_Model):
    """What chat and completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    user: UserId | None = None
    e2p: Personalisation | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def prompts(self) -> Sequence[Prompt | TokenIds]:
        """What the engine is given, one after the other."""
        raise NotImplementedError

    def top(self) -> int | None:
        """How many likeliest tokens are told; None: no log-probabilities."""
        raise NotImplementedError

    def longest(self) -> int | None:
        """How many tokens were asked for."""
        return self.max_tokens

    def sampling(self, limits: LimitsConfig) -> Sampling:
        """How tokens are chosen. Raises ApiError 400 for more than is allowed."""
        longest, n = self.longest() or limits.default_max_tokens, self.n or 1
        if longest > limits.max_tokens:
            raise too_much("max_tokens", limits.max_tokens, longest)
        if n > limits.n:
            raise too_much("n", limits.n, n)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "invalid_value", "stream_options: expected stream: true beside it", "stream_options")
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not top_p:  # the smallest set of tokens is the likeliest alone
            temperature, top_p = 0.0, 1.0
        unsaid = self.longest() is None
        return Sampling(longest, temperature, top_p, self.seed, stop, n, self.top(), shorten=unsaid)


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> Sequence[Prompt | TokenIds]:
        return [[message.plain() for message in self.messages]]

    def top(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "invalid_value", "top_logprobs: expected logprobs: true beside it", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    """POST /v1/completions: texts, or their token ids, are continued as they stand."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> Sequence[Prompt | TokenIds]:
        given: Any = [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        return [each if isinstance(each, str) else TokenIds(each) for each in given]

    def top(self) -> int | None:
        return self.logprobs


class PutEmbedding(_Model):
    """PUT /v1/users/{user_id}/embedding."""

    embedding: Vector
    # A JSON text, so not strict; with a zone, since a wrong guess is wrong by hours.
    timestamp: Annotated[AwareDatetime, Field(strict=False)] | None = None
    version: Version = ""


class UploadRow(PutEmbedding):
    """A line of POST /v1/users/embeddings."""

    user_id: UserId


Model = TypeVar("Model", bound=BaseModel)
_NUMBER = re.compile(r"\s*[+-]?\d[\d._]*(e[+-]?\d+)?\s*", re.IGNORECASE)
_MISTAKES = {
    "missing": ("missing_required_parameter", "expected this field, got none"),
    "extra_forbidden": ("unknown_parameter", "this field is not known here; leave it out"),
    "none_required": ("unsupported_parameter", "not supported here; leave it out"),
}


def parse(kind: type[Model], body: bytes) -> Model:
    """A request out of a body.

    Raises:
        ApiError: 400 with the field; no message repeats what was sent, other than names of fields.
    """
    return check(kind, decode(body))


def decode(body: bytes) -> Any:
    """Strict JSON: no NaN, no half characters. Raises ApiError 400."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, "invalid_json", f"expected JSON, got something else at byte {error.pos}: {error.msg}"
        ) from None


def check(kind: type[Model], value: Any) -> Model:
    """A model out of plain values. Raises ApiError 400 with the field."""
    if isinstance(value, Mapping):
        if issubclass(kind, _Asked):
            value = supported(kind, value)
        time = value.get("timestamp")  # a number may be seconds, milliseconds or a date: not guessed
        if isinstance(time, int | float) or (isinstance(time, str) and _NUMBER.fullmatch(time)):
            raise ApiError(400, "invalid_type", "timestamp: expected a text such as 2024-05-01T12:00:00Z", "timestamp")
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        if error.error_count() > _MANY:
            said = f"body: expected the fields of /openapi.json, got {error.error_count()} others; send what they say"
            raise ApiError(400, "invalid_value", said) from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])[:200] or None
        code, said = _MISTAKES.get(first["type"], ("invalid_value", first["msg"]))
        raise ApiError(400, code, f"{param or 'body'}: {said}", param) from None


def supported(kind: type[_Asked], value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that change nothing. Raises ApiError 400 for one that cannot be honoured."""
    kept = {}
    for name, given in value.items():
        if name in kind.model_fields:
            kept[name] = given
        elif name in NEUTRAL:
            neutral = given is None or any(type(given) is type(v) and given == v for v in NEUTRAL[name])
            if not neutral and not (NEUTRAL[name] == (0,) and given == 0):
                raise ApiError(400, "unsupported_parameter", f"{name}: not supported here; leave it out", name)
        elif name == "prompt_embeds":
            raise ApiError(
                400,
                "unsupported_parameter",
                "prompt_embeds: raw prompt embeddings are never taken; pass a user's vector as e2p.vector",
                name,
            )
        elif name not in IGNORED:
            shown = name[:80]
            raise ApiError(400, "unknown_parameter", f"{shown}: this field is not known here; leave it out", shown)
    return kept


def too_much(name: str, limit: float, got: float) -> ApiError:
    """Error 400 for a number beyond a limit."""
    return ApiError(400, "limit_exceeded", f"{name}: expected at most {limit}, got {got}; ask for less", name)
