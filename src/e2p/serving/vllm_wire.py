"""What is said to vLLM by HTTP, and what its streams say: bodies and chunks. Knows no connections.

Prompts go as token ids where there are no soft tokens, else as embeddings (a tensor as torch saves it, in base64: the
only form that vLLM reads). Answers come back as token ids and are made into text here, as those of the engine
in this process.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from e2p.serving.detokenise import Vocabulary
from e2p.serving.engine import EngineError, RequestError, Sampling, TokenLogprob

PLACEHOLDER = "<prompt_embeds>"  # the text that vLLM puts into a chat where embeddings stand; it refuses it in texts
GREEDY = 1e-5  # temperatures below it are 0 to vLLM
_CHARS = 300  # of what a server says of a failure


def packed(tensor: Float[Tensor, "t h"]) -> bytes:
    """A tensor as vLLM takes it."""
    file = io.BytesIO()
    torch.save(tensor.detach().contiguous().clone(), file)  # a view would take its whole storage along
    return base64.b64encode(file.getbuffer())


def how(sampling: Sampling, model: str, ends: Sequence[int], salt: str, chat: bool) -> dict[str, Any]:
    """What both routes are told beside the prompt.

    What a server would otherwise take from the checkpoint's ``generation_config.json`` is named, since the engine in
    this process does not take it either.
    """
    greedy = sampling.temperature < GREEDY
    fields: dict[str, Any] = {
        "model": model,
        "stream": True,
        "max_tokens": sampling.max_tokens,
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1 if greedy else sampling.n,  # vLLM refuses several of what would be the same answer
        "stop_token_ids": list(ends),
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        fields["seed"] = (sampling.seed + 2**63) % 2**64 - 2**63
    if salt:
        fields["cache_salt"] = salt
    if sampling.logprobs is not None:
        fields |= {"logprobs": sampling.logprobs} if not chat else {"logprobs": True, "top_logprobs": sampling.logprobs}
        fields["return_tokens_as_token_ids"] = True
    return fields


def ids_body(ids: Sequence[int], fields: dict[str, Any]) -> bytes:
    """For /v1/completions: token ids."""
    return json.dumps({**fields, "prompt": list(ids)}).encode()


def embeds_body(embeds: Float[Tensor, "t h"], fields: dict[str, Any]) -> bytes:
    """For /v1/completions: a whole prompt as embeddings. Megabytes, so they are not looked through for quotes."""
    return b"".join((b'{"prompt_embeds": "', packed(embeds), b'", ', json.dumps(fields).encode()[1:]))


class Piece(NamedTuple):
    """Of one of the n answers.

    Args:
        answer: which.
        tokens: new ones, the end token included.
        logprobs: of these, where they were asked for.
        reason: why it ended; empty: it goes on.
    """

    answer: int
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    reason: str


class Chunk(NamedTuple):
    """One event of a stream.

    Args:
        pieces: what is new.
        prompt: ids of the prompt, in the first one of a chat.
    """

    pieces: Sequence[Piece]
    prompt: Sequence[int] | None


def chunk_of(data: bytes, chat: bool, vocabulary: Vocabulary, top: int) -> Chunk:
    """What an event's data say.

    Args:
        data: JSON.
        chat: whether it is a chat's.
        vocabulary: for the texts of log-probabilities.
        top: how many likeliest tokens were asked for.

    Raises:
        EngineError: the server has failed, or says what is not known here.
    """
    try:
        value = json.loads(data)
        if "error" in value:
            raise EngineError(f"expected a vLLM server to go on, got: {message_of(value)}")
        pieces = []
        prompt = value.get("prompt_token_ids")
        for choice in value["choices"]:
            prompt = prompt or choice.get("prompt_token_ids")
            tokens = choice.get("token_ids") or ()
            told = choice.get("logprobs")
            logprobs = (_chat_logprobs if chat else _text_logprobs)(told, vocabulary, top) if told else ()
            pieces.append(Piece(choice["index"], tokens, logprobs, choice.get("finish_reason") or ""))
        return Chunk(pieces, prompt)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EngineError(
            f"expected a vLLM server's stream with token ids, got {data[:80]!r} ({type(error).__name__}); "
            "vLLM 0.32 says them so"
        ) from None


def _chat_logprobs(told: Any, vocabulary: Vocabulary, top: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            vocabulary.text(_id(entry["token"])),
            entry["logprob"],
            _likeliest(((_id(t["token"]), t["logprob"]) for t in entry.get("top_logprobs") or ()), vocabulary, top),
        )
        for entry in told.get("content") or ()
    ]


def _text_logprobs(told: Any, vocabulary: Vocabulary, top: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            vocabulary.text(_id(token)),
            value,
            _likeliest(((_id(t), v) for t, v in (best or {}).items()), vocabulary, top),
        )
        for token, value, best in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    ]


def _likeliest(pairs: Any, vocabulary: Vocabulary, top: int) -> tuple[tuple[str, float], ...]:
    """The likeliest ones in their order; the token that was chosen comes as one more where it is none of them."""
    ranked = sorted(pairs, key=lambda pair: -pair[1])[:top]
    return tuple((vocabulary.text(token), value) for token, value in ranked)


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def message_of(value: Any) -> str:
    """What an error's JSON says, in one short line."""
    error = value.get("error", value) if isinstance(value, dict) else value
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:_CHARS]


def refusal(status: int, body: bytes) -> Exception:
    """What an answer without a stream means: whose fault it is.

    Returns:
        RequestError: this request can never be answered.
        EngineError: the server cannot answer now, or is set up in another way than expected.
    """
    try:
        said = message_of(json.loads(body))
    except ValueError:
        said = " ".join(body[:_CHARS].decode(errors="replace").split())
    if status in (400, 413, 422):
        return RequestError(f"expected a request that the vLLM server takes, got its error {status}: {said}")
    return EngineError(f"expected a stream from the vLLM server, got status {status}: {said or 'nothing'}")
