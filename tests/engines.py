"""Adapters on tiny backbones, an engine around them, and answers put together from events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2p.config import DataConfig, ProjectorConfig
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.serving.calls import Limits
from e2p.serving.engine import Delta, Engine, Finished, Personal, Request, Sampling, Started, TokenLogprob
from e2p.serving.hf_engine import HFEngine

TEXT = DataConfig(max_prompt_tokens=60, max_completion_tokens=16)
USERS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
PROMPTS: list[Any] = [
    "make a playlist",
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
    "hi",
    "the train home and old soul music, the user likes it",
]
# Different places, numbers of soft tokens, and settings of text.
ADAPTERS: dict[str, dict[str, Any]] = {
    "late": {},
    "early": {"position": "before_bos", "prefix_tokens": 3},
    "middle": {"position": "after_system", "prefix_tokens": 2, "input_norm": "l2"},
    "static": {"position": "after_bos", "static": True},
}


def build(
    backbone: FrozenBackbone,
    seed: int = 9,
    static: bool = False,
    data: DataConfig = TEXT,
    users: np.ndarray = USERS,
    **values: Any,
) -> Any:
    """An adapter whose soft tokens differ much between users."""
    config = ProjectorConfig(**{"hidden_dim": 5, "user_scale": 1.0, **values})
    model = E2PModel.from_backbone(backbone, users.shape[1], config, data=data, static=static)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    model.projector.fit_input(torch.tensor(users))
    return model


def saved(models: Mapping[str, E2PModel], folder: Path) -> dict[str, Path]:
    """Their folders by name."""
    for name, model in models.items():
        model.save_pretrained(folder / name, overwrite=True)
    return {name: folder / name for name in models}


@contextlib.asynccontextmanager
async def engine_on(backbone: Any, adapters: Mapping[str, Any], **limits: int) -> AsyncIterator[HFEngine]:
    """An engine that has started, and is stopped at once in the end."""
    engine = HFEngine(backbone, adapters, limits=Limits(**limits), precision="float32")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0)


def asked(adapter: str, prompt: Any, user: Any = None, raw: bool = False, strength: float = 1.0, **how: Any) -> Request:
    """A request: of a user's vector, of the null user ("null"), or of the bare backbone (None)."""
    vector = user if isinstance(user, np.ndarray) else None
    personal = Personal("none" if user is None else "user" if vector is not None else "null", vector, strength)
    return Request(adapter, prompt, personal, Sampling(**{"temperature": 0, "max_tokens": 8, **how}), raw)


@dataclass
class Answered:
    """What came of a request, by answer."""

    started: Started
    pieces: dict[int, list[str]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Of the only answer."""
        (text,) = self.texts
        return text

    @property
    def texts(self) -> list[str]:
        """Of all answers in their order."""
        return ["".join(self.pieces[index]) for index in sorted(self.reasons)]


async def answered(engine: Engine, request: Request) -> Answered:
    """All events of a request, found to be in order."""
    events = engine.generate(request)
    started = await anext(events)
    assert isinstance(started, Started)
    found = Answered(started)
    told: dict[int, int] = {}
    async for event in events:
        assert not isinstance(event, Started)
        assert event.index not in found.reasons, "nothing comes behind the end"
        pieces = found.pieces.setdefault(event.index, [])
        if isinstance(event, Delta):
            pieces.append(event.text)
            told[event.index] = told.get(event.index, 0) + event.tokens
            found.logprobs.setdefault(event.index, []).extend(event.logprobs)
        elif isinstance(event, Finished):
            found.reasons[event.index], found.tokens[event.index] = event.reason, event.tokens
    assert sorted(found.reasons) == list(range(request.sampling.n))
    assert {index: tokens for index, tokens in found.tokens.items() if tokens} == told
    return found


async def all_answered(engine: Engine, requests: list[Request]) -> list[Answered]:
    """Requests that are made at once."""
    return await asyncio.gather(*(answered(engine, request) for request in requests))


def written(tokenizer: Any, token: int) -> str:
    """A token as OpenAI writes it, by the byte-level alphabet as GPT-2's authors published it."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return str(text)
    bs = [*range(33, 127), *range(161, 173), *range(174, 256)]
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    byte_of = dict(zip(map(chr, cs), bs, strict=True))
    return "bytes:" + "".join(f"\\x{byte_of[letter]:02x}" for letter in tokenizer.convert_ids_to_tokens(token))
