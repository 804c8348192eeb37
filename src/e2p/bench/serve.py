"""`e2p bench serve`: the engine within this process, with many users at once and one after the other.

Sides, in alternating rounds, on the same engine, always the likeliest token and always as many of them, since no token
ends an answer here. Every user has a vector and a prompt of his own. ``alone``: one after the other, with the soft
token right before the answer. ``together``: all at once. ``no_prefix``: all at once, the bare backbone. ``profile``:
the same with as many more tokens as a text about the user has. ``same_prompt``: all at once with one long prompt, the
soft token right before the answer, so that the prompt is read once. ``same_prompt_start``: the same with the soft token
at the start, so that it is read for every user.

phi is untrained: it costs the same.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from e2p.bench.quiet import quiet
from e2p.bench.rounds import now, spread
from e2p.config import BackboneConfig, DataConfig, Position, ProjectorConfig
from e2p.data.templates import TextEncoder
from e2p.errors import BackboneError, ConfigError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.provenance import hide_paths, provenance
from e2p.serving.calls import Limits
from e2p.serving.engine import Delta, Personal, Request, Sampling
from e2p.serving.hf_engine import HFEngine

SIDES = ("alone", "together", "no_prefix", "profile", "same_prompt", "same_prompt_start")
PAIRS = (
    ("together", "alone"),
    ("together", "no_prefix"),
    ("together", "profile"),
    ("same_prompt", "same_prompt_start"),
)
_POSITIONS: dict[str, Position] = {"answer": "before_completion", "start": "after_bos"}
_DIMENSION = 384


@dataclass(frozen=True)
class _Setting:
    backbone: str
    users: int
    prompt_tokens: int
    profile_tokens: int
    same_prompt_tokens: int
    new_tokens: int
    precision: Literal["float32", "bfloat16"]
    attn: str
    seed: int


def bench(
    backbone: str,
    users: int = 16,
    prompt_tokens: int = 128,
    profile_tokens: int = 47,
    same_prompt_tokens: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    output: str = "bench_serve.json",
    precision: Literal["float32", "bfloat16"] = "float32",
    attn: str = "sdpa",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure tokens per second of answering users together and one by one, and what a soft token costs beside none
    and beside a text; asserts no time.

    Args:
        backbone: folder or hub id of a causal LM.
        users: each with a vector and a prompt of his own; a round is one answer for each on every side.
        prompt_tokens: of each prompt, the chat template's included.
        profile_tokens: of a text about the user, on the side that reads one.
        same_prompt_tokens: of the prompt that all users have, on the sides where they have one.
        new_tokens: of each answer.
        rounds: measured rounds, after one that is not.
        output: JSON file to write. It is also the last line of stdout.
        precision: float32, or bfloat16 autocast.
        attn: attention implementation.
        seed: seed of prompts, vectors and phi.

    Returns:
        What is written as JSON. ``first_token_seconds``: from the request to the first text of an answer, the median
        over users. The ratios say how many times as fast the first of two sides is, within each round.

    Raises:
        ConfigError: a number is out of range.
        BackboneError: the backbone cannot be loaded, or its window is too short.
    """
    sizes = {"users": users, "prompt_tokens": prompt_tokens, "profile_tokens": profile_tokens}
    sizes |= {"same_prompt_tokens": same_prompt_tokens, "new_tokens": new_tokens}
    for name, value in {**sizes, "rounds": rounds}.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    setting = _Setting(backbone, **sizes, precision=precision, attn=attn, seed=seed)
    console = Console(stderr=True)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    firsts: dict[str, list[float]] = {side: [] for side in SIDES}  # of a round, the median over users
    with tempfile.TemporaryDirectory() as folder, quiet(), asyncio.Runner() as runner:
        many = _Sides(setting, Path(folder))
        runner.run(many.engine.start())
        for number in range(rounds + 1):
            # Back and forth: what a side leaves behind falls on its neighbours alike.
            for side in SIDES if number % 2 else reversed(SIDES):
                gc.collect()
                start = now()
                first = runner.run(many.run(side))
                end = now()
                if number:
                    seconds[side].append((end[0] - start[0], end[1] - start[1]))
                    firsts[side].append(statistics.median(first))
            console.print(f"round {number} of {rounds}")
        runner.run(many.engine.stop(0))
    sides = {}
    for side in SIDES:
        wall, cpu = ([round(took[which], 4) for took in seconds[side]] for which in (0, 1))
        sides[side] = {
            "tokens_per_second": round(users * new_tokens / statistics.median(wall), 1),
            "tokens_per_cpu_second": round(users * new_tokens / statistics.median(cpu), 1),
            "first_token_seconds": [round(first, 4) for first in firsts[side]],
            "seconds": wall,
            "cpu_seconds": cpu,
        }
    ratios = {
        f"{side} to {base}": {
            name: spread([b[which] / a[which] for a, b in zip(seconds[side], seconds[base], strict=True)])
            for which, name in enumerate(("speed", "speed_cpu_time"))
        }
        | {"first_token": spread([b / a for a, b in zip(firsts[side], firsts[base], strict=True)])}
        for side, base in PAIRS
    }
    console.print(ratios)
    result = {
        "bench": "serve",
        "engine": "in process",
        "provenance": provenance(),
        "backbone": hide_paths(backbone),
        **sizes,
        "precision": precision,
        "attn": attn,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "sides": sides,
        "ratios": ratios,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


class _Endless(FrozenBackbone):
    """No token ends an answer, so that all sides make as many."""

    def ends(self) -> list[int]:
        return []


class _Sides:
    """The engine, and what each side asks of it."""

    def __init__(self, setting: _Setting, folder: Path) -> None:
        self.setting = setting
        backbone = _Endless.load(
            BackboneConfig(setting.backbone, dtype="float32", attn=setting.attn), setting.precision
        )
        longest = max(setting.prompt_tokens + setting.profile_tokens, setting.same_prompt_tokens)
        if backbone.window is not None and longest + 1 + setting.new_tokens > backbone.window:
            raise BackboneError(
                f"expected a backbone's window of at least {longest + 1 + setting.new_tokens} tokens, got "
                f"{backbone.window}; ask for shorter prompts"
            )
        data = DataConfig(max_prompt_tokens=longest, max_completion_tokens=setting.new_tokens)
        for name, position in _POSITIONS.items():
            projector = ProjectorConfig(position=position)
            model = E2PModel.from_backbone(backbone, _DIMENSION, projector, data=data, seed=setting.seed)
            model.save_pretrained(folder / name)
        rows = setting.users * (longest + 1 + setting.new_tokens)
        limits = Limits(rows=setting.users, cache_tokens=rows, prefill_tokens=rows, waiting=setting.users)
        self.engine = HFEngine(backbone, {name: folder / name for name in _POSITIONS}, limits=limits)
        rng = np.random.default_rng(setting.seed)
        self.vectors = rng.normal(size=(setting.users, _DIMENSION)).astype(np.float32)
        encoder, words = model.encoder, _words(backbone.tokenizer)
        wanted = [setting.prompt_tokens, setting.prompt_tokens + setting.profile_tokens]
        self.prompts, self.longer = (
            [_text(encoder, rng.choice(words, tokens).tolist(), tokens) for _ in range(setting.users)]
            for tokens in wanted
        )
        tokens = setting.same_prompt_tokens
        self.same = [_text(encoder, rng.choice(words, tokens).tolist(), tokens)] * setting.users

    async def run(self, side: str) -> list[float]:
        """All of a side's answers; seconds until the first text of each."""
        prompts = {"profile": self.longer, "same_prompt": self.same, "same_prompt_start": self.same}
        sampling = Sampling(max_tokens=self.setting.new_tokens, temperature=0)
        adapter = "start" if side == "same_prompt_start" else "answer"
        bare = side in ("no_prefix", "profile")
        asked = [
            Request(adapter, prompt, Personal() if bare else Personal("user", vector), sampling)
            for prompt, vector in zip(prompts.get(side, self.prompts), self.vectors, strict=True)
        ]
        if side == "alone":
            return [await self._answered(request) for request in asked]
        return list(await asyncio.gather(*(self._answered(request) for request in asked)))

    async def _answered(self, request: Request) -> float:
        start, first, tokens = now()[0], None, 0
        async for event in self.engine.generate(request):
            if isinstance(event, Delta):
                first = now()[0] - start if first is None else first
                tokens += event.tokens
        if tokens != self.setting.new_tokens or first is None:
            raise BackboneError(f"expected an answer of {self.setting.new_tokens} tokens, got {tokens}")
        return first


def _words(tokenizer: Any) -> list[str]:
    """Words with a space before them that are one token each."""
    found = []
    for token in range(min(len(tokenizer), 20_000)):
        text = tokenizer.decode([token])
        if text.startswith(" ") and text[1:].isalpha():
            found += [text] * (tokenizer(text, add_special_tokens=False)["input_ids"] == [token])
    return found or [" a", " b"]


def _text(encoder: TextEncoder, words: Sequence[str], tokens: int) -> str:
    """So many of the words that they make a prompt of so many tokens, or nearly, where a tokenizer joins words."""
    count = len(words)
    free = TextEncoder(encoder.tokenizer, chat="always" if encoder.plain_as_chat else "never")
    while count > 1 and (over := len(free.prompt("".join(words[:count]).strip()).ids) - tokens) > 0:
        count = max(1, count - over)
    return "".join(words[:count]).strip()
