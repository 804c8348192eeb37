"""`e2p bench vllm`: a gateway over vLLM beside vLLM asked directly, and one long prompt of many users.

Sides, in alternating rounds, against the same server, always the likeliest token. ``direct``: prompts as embeddings,
made beforehand, sent to the server by this process. ``gateway``: the same users and prompts by OpenAI's API, sent to an
`e2p serve` process of its own, which sends the server the same embeddings. ``direct_alone``, ``gateway_alone``: one
after the other, with an answer of one token. ``same_prompt``: through the gateway, every user with the same long
prompt and a short answer, the soft token right before it. ``same_prompt_start``: the same with the soft token at the
start, so that the server reads the prompt for every user. Each round has prompts and users of its own, which the server
has never seen.

phi is untrained: it costs the same. Where all processes share a machine's processors, the gateway takes from the
server's; on machines of their own it would not.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from e2p.bench.rounds import now, spread
from e2p.bench.serve import _text, _words
from e2p.config import BackboneConfig, DataConfig, Position, ProjectorConfig
from e2p.errors import ConfigError, E2PError, MissingExtraError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.provenance import hide_paths, provenance
from e2p.serving.engine import Sampling
from e2p.serving.vllm_wire import embeds_body, how

SIDES = ("direct", "gateway", "direct_alone", "gateway_alone", "same_prompt", "same_prompt_start")
_ALONE = ("direct_alone", "gateway_alone")  # one after the other
PAIRS = (("gateway", "direct"), ("gateway_alone", "direct_alone"), ("same_prompt", "same_prompt_start"))
_POSITIONS: dict[str, Position] = {"answer": "before_completion", "start": "after_bos"}
_DIMENSION = 64


class _Asked(NamedTuple):
    address: str
    body: bytes
    ends: frozenset[int] = frozenset()  # tokens that are no part of an answer


class _Told(NamedTuple):
    first: float
    tokens: int


def bench(
    backbone: str,
    upstream: str,
    users: int = 32,
    prompt_tokens: int = 128,
    same_prompt_tokens: int = 512,
    new_tokens: int = 64,
    same_prompt_new_tokens: int = 1,
    rounds: int = 5,
    output: str = "bench_vllm.json",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure what a gateway over vLLM costs, and what a prompt that users share is worth there; asserts no time.

    Args:
        backbone: folder of a causal LM, which the server serves.
        upstream: address of a vLLM server, started with --enable-prompt-embeds, which nobody else asks meanwhile.
        users: each with a vector and a prompt of his own, all at once.
        prompt_tokens: of each prompt, the chat template's included.
        same_prompt_tokens: of the prompt that all users have, on the sides where they have one.
        new_tokens: of the longest answer.
        same_prompt_new_tokens: the same where the prompt is the same.
        rounds: measured rounds, after one that is not.
        output: JSON file.
        seed: seed of prompts, vectors and phi.

    Returns:
        What is written as JSON. ``first_token_seconds``: from the request to the first event with a token, the median
        over users. The ratios say how many times as fast the first of two sides is, within each round.

    Raises:
        ConfigError: a number is out of range.
        E2PError: the server, or the gateway over it, cannot be asked.
    """
    sizes = {"users": users, "prompt_tokens": prompt_tokens, "same_prompt_tokens": same_prompt_tokens}
    sizes |= {"new_tokens": new_tokens, "same_prompt_new_tokens": same_prompt_new_tokens}
    for name, value in {**sizes, "rounds": rounds}.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    console = Console(stderr=True)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    firsts: dict[str, list[float]] = {side: [] for side in SIDES}
    tokens: dict[str, list[int]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        world = _World(backbone, sizes, Path(folder), seed)
        with _gateway(world.folders, backbone, upstream) as address:
            for number in range(rounds + 1):
                sides = world.round(upstream, address)
                for side in SIDES:
                    start = now()[0]
                    told = asyncio.run(_all(sides[side], side in _ALONE))
                    took = now()[0] - start
                    if number:
                        seconds[side].append(took)
                        firsts[side].append(statistics.median(each.first for each in told))
                        tokens[side].append(sum(each.tokens for each in told))
                console.print(f"round {number} of {rounds}")
    if tokens["direct"] != tokens["gateway"]:
        raise E2PError(f"expected the same answers both ways, got {tokens['direct']} and {tokens['gateway']} tokens")
    result = {
        "bench": "vllm",
        "provenance": provenance(),
        "backbone": hide_paths(backbone),
        **sizes,
        "seed": seed,
        "rounds": rounds,
        "sides": {
            side: {
                "requests_per_second": round(users / statistics.median(seconds[side]), 2),
                "tokens_per_second": round(statistics.median(np.divide(tokens[side], seconds[side]).tolist()), 1),
                "first_token_seconds": [round(first, 5) for first in firsts[side]],
                "seconds": [round(took, 4) for took in seconds[side]],
                "tokens": tokens[side],
            }
            for side in SIDES
        },
        "ratios": {
            f"{side} to {base}": {
                "speed": spread([b / a for a, b in zip(seconds[side], seconds[base], strict=True)]),
                "first_token": spread([b / a for a, b in zip(firsts[side], firsts[base], strict=True)]),
            }
            for side, base in PAIRS
        },
        "gateway_adds_to_first_token_seconds": spread(
            [a - b for a, b in zip(firsts["gateway_alone"], firsts["direct_alone"], strict=True)]
        ),
    }
    console.print(result["ratios"], result["gateway_adds_to_first_token_seconds"])
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


class _World:
    """Adapters on disk, and what each side asks in a round."""

    def __init__(self, backbone: str, sizes: dict[str, int], folder: Path, seed: int) -> None:
        self.sizes = sizes
        self._backbone = FrozenBackbone.load(BackboneConfig(backbone, dtype="float32"), "float32")
        longest = max(sizes["prompt_tokens"], sizes["same_prompt_tokens"])
        data = DataConfig(max_prompt_tokens=longest, max_completion_tokens=sizes["new_tokens"])
        self.folders, self._models = {}, {}
        for name, position in _POSITIONS.items():
            projector = ProjectorConfig(position=position, user_scale=1.0)
            model = E2PModel.from_backbone(self._backbone, _DIMENSION, projector, data=data, seed=seed)
            model.save_pretrained(folder / name)
            self.folders[name], self._models[name] = folder / name, model
        self._rng = np.random.default_rng(seed)
        self._kinds = _words(self._backbone.tokenizer)

    def round(self, upstream: str, gateway: str) -> dict[str, list[_Asked]]:
        """Requests of all sides; those of the two that are compared have the same prompts and users."""
        users, sizes = self.sizes["users"], self.sizes
        own = [self._prompt(sizes["prompt_tokens"]) for _ in range(users)]
        vectors = self._rng.normal(size=(users, _DIMENSION)).astype(np.float32)
        # Other prompts of the same lengths for the second of two sides: the server keeps what it has read.
        same = [self._prompt(sizes["same_prompt_tokens"]) for _ in range(2)]
        few, many = sizes["same_prompt_new_tokens"], sizes["new_tokens"]
        alone = [self._prompt(sizes["prompt_tokens"]) for _ in range(users)]
        return {
            "direct": [self._direct(upstream, p, v, many) for p, v in zip(own, vectors, strict=True)],
            "gateway": [self._by_gateway(gateway, "answer", p, v, many) for p, v in zip(own, vectors, strict=True)],
            "direct_alone": [self._direct(upstream, p, v, 1) for p, v in zip(alone, vectors, strict=True)],
            "gateway_alone": [
                self._by_gateway(gateway, "answer", p, v, 1) for p, v in zip(alone, vectors, strict=True)
            ],
            "same_prompt": [self._by_gateway(gateway, "answer", same[0], v, few) for v in vectors],
            "same_prompt_start": [self._by_gateway(gateway, "start", same[1], v, few) for v in vectors],
        }

    def _prompt(self, tokens: int) -> str:
        words: Sequence[str] = self._rng.choice(self._kinds, tokens).tolist()
        return _text(self._models["answer"].encoder, words, tokens)

    @torch.no_grad()
    def _direct(self, upstream: str, prompt: str, vector: np.ndarray[Any, Any], tokens: int) -> _Asked:
        model = self._models["answer"]
        ids = model.encoder.prompt(prompt).ids
        embeds = torch.cat([self._backbone.embed(torch.tensor(ids)), model.prefix([vector], 1)[0]])
        # What the server keeps of it must not serve the gateway, and the other way round.
        fields = how(Sampling(tokens, 0.0), "", self._backbone.ends(), "direct", chat=False)
        del fields["model"]
        return _Asked(f"{upstream}/v1/completions", embeds_body(embeds, fields), frozenset(self._backbone.ends()))

    def _by_gateway(self, gateway: str, adapter: str, prompt: str, vector: Any, tokens: int) -> _Asked:
        body = {
            "model": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "e2p": {"vector": [float(number) for number in vector]},
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return _Asked(f"{gateway}/chat/completions", json.dumps(body).encode())


async def _all(asked: Sequence[_Asked], alone: bool) -> list[_Told]:
    try:
        import httpx
    except ImportError:
        raise MissingExtraError("httpx", "vllm", "the bench of vLLM") from None
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None), trust_env=False) as client:
        if alone:
            return [await _one(client, each) for each in asked]
        return list(await asyncio.gather(*(_one(client, each) for each in asked)))


async def _one(client: Any, asked: _Asked) -> _Told:
    """One answer: seconds to its first token, and its tokens."""
    start, first, tokens = now()[0], 0.0, 0
    headers = {"content-type": "application/json"}
    async with client.stream("POST", asked.address, content=asked.body, headers=headers) as response:
        if response.status_code != 200:
            raise E2PError(f"expected an answer, got status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            choices = event.get("choices") or [{}]
            said = choices[0].get("token_ids") or choices[0].get("delta", {}).get("content")
            if "error" in event:
                raise E2PError(f"expected an answer, got {event['error']}")
            if said and not first:
                first = now()[0] - start
            tokens += sum(token not in asked.ends for token in choices[0].get("token_ids") or ())
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return _Told(first or now()[0] - start, tokens)


@contextmanager
def _gateway(folders: dict[str, Path], backbone: str, upstream: str) -> Iterator[str]:
    """An `e2p serve` process over the server; its address."""
    words = [sys.executable, "-m", "e2p.cli", "serve", "--port", "0", "--engine", "vllm", "--upstreams", upstream]
    for name, folder in folders.items():
        words += ["--adapters", f"{name}={folder}"]
    words += ["--backbone.model", backbone, "--vllm.transport", "embeddings", "--limits.running", "1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        guard = threading.Timer(3600, process.kill)
        guard.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise E2PError(f"expected a gateway over {upstream}, got one that ended with {process.wait()}")
            yield line.split(" ")[0]
        finally:
            guard.cancel()
            process.terminate()
            process.wait(60)
