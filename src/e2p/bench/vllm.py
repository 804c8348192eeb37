"""`e2p bench vllm`: a gateway over vLLM beside vLLM asked directly, and one long prompt of many users.

Sides, in alternating rounds, against the same server, always the likeliest token. ``direct``: prompts as embeddings,
made beforehand, sent to the server by this process. ``gateway``: the same users and prompts by OpenAI's API, sent to an
`e2p serve` process of its own, which sends the server the same embeddings. ``direct_alone``, ``gateway_alone``: one
after the other, with an answer of one token. ``same_prompt``: through the gateway, every user with the same long
prompt and a short answer, the soft token right before it. ``same_prompt_start``: the same with the soft token at the
start, so that the server reads the prompt for every user. Each round has prompts and users of its own, which the server
has never seen.

phi is untrained: it costs the same. Where all processes share a machine's processors, the gateway takes from the
server's; on machines of their own it would not. What each takes of the processors is therefore told too. With a small
model, that is most of what is measured; ``shape`` puts one of a realistic size with random weights in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console

from e2p.bench.processes import cpu_seconds, e2p_serve, vllm_serve
from e2p.bench.rounds import now, spread
from e2p.bench.serve import _text, _words
from e2p.bench.shapes import write_checkpoint
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
    upstream: str = "",
    python: str = "",
    shape: str = "",
    dtype: Literal["float32", "bfloat16"] = "float32",
    server_threads: int = 1,
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
        python: in place of that, the interpreter of an environment with vLLM; a server is started with it.
        shape: with ``python``, serve random weights in bfloat16 of this shape (llama-260m, llama-3.2-1b) with the
            backbone's tokenizer.
        dtype: of the prompts' embeddings, and of the server that is started.
        server_threads: that such a server computes with.
        users: each with a vector and a prompt of his own, all at once.
        prompt_tokens: of each prompt, the chat template's included.
        same_prompt_tokens: of the prompt that all users have, on the sides where they have one.
        new_tokens: of the longest answer.
        same_prompt_new_tokens: the same where the prompt is the same.
        rounds: measured rounds, after one that is not.
        output: JSON file.
        seed: seed of prompts, vectors, phi and random weights.

    Returns:
        What is written as JSON. ``first_token_seconds``: from the request to the first event with a token, the median
        over users. ``cpu_seconds``: processor time of this process, of the gateway, and of the server where it was
        started here, whose own processes wait by looking again and again. The ratios say how many times as fast the
        first of two sides is, within each round.

    Raises:
        ConfigError: a number is out of range, or there is no server, or more than one.
        E2PError: the server, or the gateway over it, cannot be asked.
    """
    sizes = {"users": users, "prompt_tokens": prompt_tokens, "same_prompt_tokens": same_prompt_tokens}
    sizes |= {"new_tokens": new_tokens, "same_prompt_new_tokens": same_prompt_new_tokens}
    for name, value in {**sizes, "rounds": rounds, "server_threads": server_threads}.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    if bool(upstream) == bool(python) or (shape and not python):
        raise ConfigError("upstream: expected it or --python, which starts a server (and which --shape needs)")
    console = Console(stderr=True)
    marks: dict[str, list[_Mark]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, model = Path(name), {"shape": "", "random_weights": bool(shape)}
        served, server = backbone, None
        if shape:
            served = str(folder / "checkpoint")
            model |= write_checkpoint(backbone, shape, Path(served), seed)
        if python:
            log = folder / "vllm.log"
            upstream, server = stack.enter_context(vllm_serve(python, served, dtype, log, server_threads))
            console.print("the vLLM server answers")
        world = _World(served, sizes, dtype, folder, seed)
        options = ["--engine", "vllm", "--upstreams", upstream, "--backbone.model", served]
        options += ["--vllm.transport", "embeddings", "--vllm.dtype", dtype, "--limits.running", "1000"]
        for name, adapter in world.folders.items():
            options += ["--adapters", f"{name}={adapter}"]
        address, gateway = stack.enter_context(e2p_serve(*options))
        for number in range(rounds + 1):
            sides = world.round(upstream, address)
            # Back and forth: what a side leaves behind falls on its neighbours alike.
            for side in SIDES if number % 2 else reversed(SIDES):
                mark = _measured(sides[side], side in _ALONE, gateway, server)
                if number:
                    marks[side].append(mark)
            console.print(f"round {number} of {rounds}")
    tokens = {side: [mark.tokens for mark in found] for side, found in marks.items()}
    if tokens["direct"] != tokens["gateway"]:
        raise E2PError(f"expected the same answers both ways, got {tokens['direct']} and {tokens['gateway']} tokens")
    result = {
        "bench": "vllm",
        "provenance": provenance(),
        "backbone": hide_paths(backbone),
        **model,
        "dtype": dtype,
        "server_threads": server_threads if python else None,
        **sizes,
        "seed": seed,
        "rounds": rounds,
        "sides": {side: _told(found, users) for side, found in marks.items()},
        "ratios": {
            f"{side} to {base}": {
                "speed": spread([b.seconds / a.seconds for a, b in zip(marks[side], marks[base], strict=True)]),
                "first_token": spread([b.first / a.first for a, b in zip(marks[side], marks[base], strict=True)]),
            }
            for side, base in PAIRS
        },
        "gateway_adds_to_first_token_seconds": spread(
            [a.first - b.first for a, b in zip(marks["gateway_alone"], marks["direct_alone"], strict=True)], 5
        ),
    }
    console.print(result["ratios"], result["gateway_adds_to_first_token_seconds"])
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


class _Mark(NamedTuple):
    """A side's round: seconds, the median first token's, tokens, and seconds of processors."""

    seconds: float
    first: float
    tokens: int
    cpu: dict[str, float | None]


def _measured(asked: Sequence[_Asked], alone: bool, gateway: int, server: int | None) -> _Mark:
    def took() -> dict[str, float | None]:
        others = {"gateway": cpu_seconds(gateway), "server": None if server is None else cpu_seconds(server)}
        return {"client": time.process_time(), **others}

    before, start = took(), now()[0]
    told = asyncio.run(_all(asked, alone))
    seconds, after = now()[0] - start, took()
    cpu = {who: None if (a := after[who]) is None or b is None else round(a - b, 3) for who, b in before.items()}
    return _Mark(seconds, statistics.median(each.first for each in told), sum(each.tokens for each in told), cpu)


def _told(marks: Sequence[_Mark], users: int) -> dict[str, Any]:
    cpu = {who: [mark.cpu[who] for mark in marks] for who in marks[0].cpu}
    tokens = sum(mark.tokens for mark in marks)
    return {
        "requests_per_second": round(users / statistics.median(mark.seconds for mark in marks), 2),
        "tokens_per_second": round(statistics.median(mark.tokens / mark.seconds for mark in marks), 1),
        "first_token_seconds": [round(mark.first, 5) for mark in marks],
        "seconds": [round(mark.seconds, 4) for mark in marks],
        "tokens": [mark.tokens for mark in marks],
        "cpu_seconds": cpu,
        "cpu_seconds_per_1000_tokens": {
            who: round(1000 * sum(each or 0.0 for each in took) / max(1, tokens), 4)
            for who, took in cpu.items()
            if None not in took
        },
    }


class _World:
    """Adapters on disk, and what each side asks in a round."""

    def __init__(self, backbone: str, sizes: dict[str, int], dtype: str, folder: Path, seed: int) -> None:
        self.sizes, self._dtype = sizes, dtype
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
        embeds = embeds.bfloat16() if self._dtype == "bfloat16" else embeds
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
        import aiohttp
    except ImportError:
        raise MissingExtraError("aiohttp", "vllm", "the bench of vLLM") from None
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as client:
        if alone:
            return [await _one(client, each) for each in asked]
        return list(await asyncio.gather(*(_one(client, each) for each in asked)))


async def _one(client: Any, asked: _Asked) -> _Told:
    """One answer: seconds to its first token, and its tokens."""
    start, first, tokens, rest = now()[0], 0.0, 0, b""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    async with client.post(asked.address, data=io.BytesIO(asked.body), headers=headers) as response:
        if response.status != 200:
            raise E2PError(f"expected an answer, got status {response.status}: {(await response.read())[:300]!r}")
        async for part in response.content.iter_any():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
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
