"""What an engine is asked and what it says, as dataclasses. Knows no HTTP and no tensors.

An engine generates for one backbone and the adapters on it. The application finds the user's vector and makes a
:class:`Request` of it; the engine gives events back as they happen, and stops when nobody listens any more.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from e2p.data.templates import Prompt
from e2p.errors import E2PError

Vector = npt.NDArray[np.float32]
Reason = Literal["stop", "length"]
Mode = Literal["user", "null", "none"]
_PART = "bytes:"


class TokenIds(tuple[int, ...]):
    """A prompt as the backbone's token ids, which is continued as it stands: nothing is added or cut."""

    __slots__ = ()


class EngineError(E2PError):
    """An engine cannot answer now: it is starting, stopping, or its upstream is away."""


class EngineBusyError(EngineError):
    """As many requests wait as may; the same one may be answered a little later."""


class RequestError(E2PError):
    """A request that this engine can never answer: no such adapter, a prompt that is too long, a wrong vector."""


@dataclass(frozen=True, eq=False)
class Personal:
    """Whose answer it is to be.

    Args:
        mode: ``user``: soft tokens of ``vector``; ``null``: of the learned null user; ``none``: the bare backbone.
        vector: float32 [D], with ``user``.
        strength: of the user's soft tokens p and the null user's p0, p0 + strength (p - p0) is used: 0 is the null
            user, 1 the user. Other than 1 it needs an adapter with a null user.
    """

    mode: Mode = "none"
    vector: Vector | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_tokens: longest answer.
        temperature: 0: the likeliest token each time.
        top_p: tokens are drawn from the smallest set of the likeliest ones whose probabilities sum to this.
        seed: the same seed, prompt and user give the same answer, whoever else is served; None: drawn.
        stop: texts at which an answer ends; they are not part of it.
        n: answers.
        logprobs: log-probabilities of this many likeliest tokens beside each token's own; None: none at all. They are
            the model's, before temperature and top_p.
        shorten: where prompt and longest answer exceed the window, answer as long as there is room for; else such a
            request is refused. For who has not said how long an answer may be.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    shorten: bool = False


@dataclass(frozen=True)
class Request:
    """One thing to be answered.

    Args:
        adapter: name of the adapter, or of the backbone for a bare one.
        prompt: a text or messages, as training had them; or token ids, with ``raw``.
        personal: whose answer it is to be.
        sampling: how.
        raw: a text is continued as it stands, without the chat template, and the continuation keeps its white space;
            else that at both ends of an answer is left out.
        revision: of the adapter that the vector was chosen for. Where it has been loaded anew since, the earlier
            weights answer, as long as they are kept: until it is loaded anew again. Empty: what is served now.
    """

    adapter: str
    prompt: Prompt | TokenIds
    personal: Personal = field(default_factory=Personal)
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    revision: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text, its log-probability in nats, and the likeliest ones at its place.

    Part of a character is written as OpenAI's API does, ``bytes:\\xf0\\x9f``.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


def part_of_character(raw: bytes) -> str:
    """A token whose bytes alone are no text."""
    return _PART + "".join(f"\\x{byte:02x}" for byte in raw)


def token_bytes(token: str) -> bytes:
    """The bytes of a token's text, parts of characters as :func:`part_of_character` has written them."""
    if re.fullmatch(rf"{_PART}(\\x[0-9a-f]{{2}})+", token):
        return bytes.fromhex(token.removeprefix(_PART).replace("\\x", ""))
    return token.encode()


@dataclass(frozen=True)
class Started:
    """The prompt has been read.

    Args:
        prompt_tokens: its tokens, soft tokens not counted.
        prefix_tokens: soft tokens.
        revision: of the adapter that answers: it may have been loaded anew twice since the request was made. Empty: as
            ``adapters()`` said when it was asked for.
    """

    prompt_tokens: int
    prefix_tokens: int
    revision: str = ""


@dataclass(frozen=True)
class Delta:
    """More of an answer.

    Args:
        index: which of the n answers.
        text: what is new; may be empty where a character is not whole yet, or a stop text may be beginning.
        tokens: tokens that it took; the end token is none of them.
        logprobs: of these tokens, where they were asked for.
    """

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """An answer is at its end.

    Args:
        index: which of the n answers.
        reason: ``stop``: an end token or a stop text; ``length``: as long as was allowed.
        tokens: tokens of the whole answer: the sum over its deltas.
    """

    index: int
    reason: Reason
    tokens: int


Event = Started | Delta | Finished


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is being served.

    Args:
        name: as requests call it.
        dimension: numbers in a user's vector; 0: a bare backbone.
        versions: of the vectors that it was trained with; empty: not named.
        has_null: whether there is a learned null user.
        revision: changes whenever the adapter is loaded anew with other weights.
        prefix_tokens: soft tokens of a user.
        position: where they stand.
    """

    name: str
    dimension: int
    versions: tuple[str, ...]
    has_null: bool
    revision: str
    prefix_tokens: int
    position: str


def prompt_size(prompt: Prompt | TokenIds, around: int = 0) -> int:
    """Characters of a prompt, all messages together and so many ``around`` each, or tokens where it is token ids."""
    if isinstance(prompt, str | TokenIds):
        return len(prompt)
    return sum(len(message["content"]) + around for message in prompt)


class Engine(Protocol):
    """Generates for users. All methods but ``generate`` may be called from any task of one event loop."""

    async def start(self) -> None:
        """Load and be ready. Raises E2PError."""
        ...

    async def stop(self, grace: float) -> None:
        """Finish what runs, for at most so many seconds; new requests get EngineError from now on."""
        ...

    def adapters(self) -> Sequence[AdapterInfo]:
        """What is served, bare backbone included."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer: :class:`Started`, then :class:`Delta` and one :class:`Finished` for each of the n answers.

        Closing the generator ends the work at once.

        Raises:
            RequestError: before any event; the request can never be answered.
            EngineBusyError: before any event; too many wait.
            EngineError: the engine is not ready, or fails.
        """
        ...

    async def reload(self, name: str) -> AdapterInfo:
        """Load an adapter's folder anew; requests made for the old one keep it. Raises E2PError, and keeps it."""
        ...

    async def health(self) -> dict[str, Any]:
        """What there is to know for operators: ``ready``, and figures such as requests that run and wait."""
        ...
