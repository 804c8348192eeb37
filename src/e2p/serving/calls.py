"""Requests that have been found good, and their answers as rows: how a step's logits become tokens, text and events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from e2p.config_serving import EngineConfig
from e2p.data.templates import EncodedPrompt
from e2p.errors import ConfigError
from e2p.serving.detokenise import AnswerText, Vocabulary
from e2p.serving.engine import Delta, Finished, Reason, Sampling, TokenLogprob
from e2p.serving.sampling import draw, logprobs_of, row_numbers


@dataclass(frozen=True)
class Limits:
    """How much is done at once.

    Args:
        rows: answers that are continued together.
        cache_tokens: rows times the longest of them, prompt and the longest answer allowed: what keys and values are
            kept for, at most. While rows come, up to twice as much is held for a moment.
        prefill_tokens: of prompts that are read between two steps, padding included, unless one alone has more.
        waiting: requests that wait for room.
    """

    rows: int = EngineConfig.rows
    cache_tokens: int = EngineConfig.cache_tokens
    prefill_tokens: int = EngineConfig.prefill_tokens
    waiting: int = 256

    def __post_init__(self) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if value < 1:
                raise ConfigError(f"{field_.name}: expected a whole number >= 1, got {value}; raise it")


@dataclass(eq=False)
class Call:
    """A request that has been found good.

    Args:
        prompt: its ids.
        at: index in it that the soft tokens precede.
        prefix_tokens: how many soft tokens.
        prefix: makes them, [K, H], in the thread that owns the model.
        sampling: how tokens are chosen.
        strip: leave out white space at both ends of an answer.
        revision: of the adapter that it was made for.
        listener: what the events are for.
        cancelled: nobody listens any more, or it has failed.
    """

    prompt: EncodedPrompt
    at: int
    prefix_tokens: int
    prefix: Callable[[], Tensor | None]
    sampling: Sampling
    strip: bool
    revision: str = ""
    listener: Any = None
    cancelled: bool = False

    @property
    def longest(self) -> int:
        """Tokens of a row when its answer is as long as it may be."""
        return len(self.prompt.ids) + self.prefix_tokens + self.sampling.max_tokens


@dataclass(eq=False)
class Answer:
    """A row: one answer of a call."""

    call: Call
    index: int
    text: AnswerText
    last: int = 0  # its newest token
    tokens: int = 0
    unsaid: int = 0  # tokens that no delta has told of yet
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @classmethod
    def of(cls, call: Call, index: int, vocabulary: Vocabulary) -> Answer:
        """An answer without any token."""
        text = AnswerText(vocabulary, call.sampling.stop, call.strip)
        return cls(call, index, text)

    @cached_property
    def numbers(self) -> np.random.Generator:
        """What its tokens are drawn by, where they are drawn here."""
        return row_numbers(self.call.sampling.seed, self.index)

    def grow(self, token: int, logprob: TokenLogprob | None, ends: frozenset[int]) -> list[Delta | Finished]:
        """One more token; what there is to say, with :class:`Finished` at the end of the answer."""
        piece = ""
        reason: Reason | None = None
        self.last = token
        if token in ends:
            reason = "stop"
        else:
            self.tokens += 1
            self.unsaid += 1
            if logprob is not None:
                self.logprobs.append(logprob)
            piece = self.text.push(token)
            if self.text.stopped:
                reason = "stop"
            elif self.tokens >= self.call.sampling.max_tokens:
                reason = "length"
        return self._said(piece, reason)

    def end(self, reason: Reason) -> list[Delta | Finished]:
        """No more tokens; what there is still to say."""
        return self._said("", reason)

    def _said(self, piece: str, reason: Reason | None) -> list[Delta | Finished]:
        if reason is not None:
            piece += self.text.finish()
        said: list[Delta | Finished] = []
        if piece or (reason is not None and self.unsaid):
            said.append(Delta(self.index, piece, self.unsaid, tuple(self.logprobs)))
            self.unsaid, self.logprobs = 0, []
        if reason is not None:
            said.append(Finished(self.index, reason, self.tokens))
        return said


class RowSettings(NamedTuple):
    """Of some rows, for all steps in which they stay the same."""

    temperature: Tensor
    top_p: Tensor
    warm: list[bool]
    asking: list[int]  # places of rows that ask for log-probabilities
    top: int  # most of them that a row asks for

    @classmethod
    def of(cls, answers: Sequence[Answer], device: torch.device) -> RowSettings:
        """Those of the answers' requests."""
        samplings = [answer.call.sampling for answer in answers]
        asking = [place for place, sampling in enumerate(samplings) if sampling.logprobs is not None]
        return cls(
            torch.tensor([float(s.temperature) for s in samplings], dtype=torch.float64, device=device),
            torch.tensor([float(s.top_p) for s in samplings], dtype=torch.float64, device=device),
            [sampling.temperature > 0 for sampling in samplings],
            asking,
            max((samplings[place].logprobs or 0 for place in asking), default=0),
        )


class Chosen(NamedTuple):
    """What came of a step's logits.

    Args:
        tokens: of each row.
        logprobs: by place, of the rows that ask for them.
        broken: places of rows whose logits are no numbers.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]
    broken: list[int]


def choose(
    answers: Sequence[Answer], logits: Float[Tensor, "r v"], settings: RowSettings, vocabulary: Vocabulary
) -> Chosen:
    """The next token of each answer."""
    best = logits.max(-1)
    chosen = best.indices
    if any(settings.warm):
        numbers = [a.numbers.random() if warm else 0.0 for a, warm in zip(answers, settings.warm, strict=True)]
        uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        chosen = draw(logits, settings.temperature, settings.top_p, uniforms)
    finite = torch.isfinite(best.values)
    broken = [] if bool(finite.all()) else (~finite).nonzero().squeeze(-1).tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if settings.asking:
        rows = torch.tensor(settings.asking, device=logits.device)
        told = logprobs_of(logits[rows], chosen[rows], settings.top)
        for place, token, own, ids, values in zip(settings.asking, chosen[rows].tolist(), *told, strict=True):
            count = answers[place].call.sampling.logprobs or 0
            top = tuple((vocabulary.text(i), value) for i, value in zip(ids[:count], values[:count], strict=True))
            logprobs[place] = TokenLogprob(vocabulary.text(token), own, top)
    return Chosen(chosen.tolist(), logprobs, broken)
