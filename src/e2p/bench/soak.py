"""`e2p bench soak`: a server under steady load for minutes: does its memory stay, do its slowest answers stay as slow?

An `e2p serve` process of its own, with a store of many users. A fixed number of clients ask for answers of users drawn
from the store, one after the other: streams, whole answers, and streams that the client leaves in the middle; some
users are not in the store. Beside them vectors are put, read and deleted all the time, and many are uploaded at once
now and then. phi is untrained: it costs the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from e2p.bench.processes import Held, e2p_serve, held
from e2p.bench.serve import _text, _words
from e2p.bench.store import in_new_process, name, write_table
from e2p.config import BackboneConfig, DataConfig, ProjectorConfig
from e2p.errors import ConfigError, MissingExtraError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.provenance import hide_paths, provenance

ADAPTER = "soak"
_KINDS, _SHARES = ("stream", "whole", "left"), (0.6, 0.3, 0.1)  # of clients' requests
_WRITES, _WRITE_SHARES = ("put", "get", "delete"), (0.6, 0.25, 0.15)
_UNKNOWN = 0.05  # of requests: users that the store does not know
_LEFT_AFTER = 4  # events of a stream, before its client leaves
_PROMPTS = 200
_LOOK = 0.5  # seconds between two looks at the server's process


class _Done(NamedTuple):
    """A request at its end: when, what it was, its status (0: no answer), and of an answer seconds and tokens."""

    at: float
    kind: str
    status: int
    first: float | None = None
    whole: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class _Load:
    """How much is asked for."""

    users: int
    dimension: int
    clients: int
    new_tokens: int
    writes_per_second: float
    upload_rows: int
    upload_seconds: float
    seed: int


@dataclass(eq=False)
class _World:
    """A run: where the server is, and what has been done and seen."""

    base: str
    prompts: Sequence[str]
    load: _Load
    seconds: float
    start: float = 0.0
    done: list[_Done] = field(default_factory=list)
    seen: list[tuple[float, Held]] = field(default_factory=list)

    def now(self) -> float:
        return time.perf_counter() - self.start


def bench(
    backbone: str,
    upstreams: list[str] = [],  # noqa: B006  a command line's list; nobody changes it
    minutes: float = 10.0,
    parts: int = 20,
    users: int = 100_000,
    dimension: int = 64,
    clients: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    writes_per_second: float = 10.0,
    upload_rows: int = 2000,
    upload_seconds: float = 15.0,
    output: str = "bench_soak.json",
    seed: int = 42,
) -> dict[str, Any]:
    """Hold a steady load on a server for minutes and watch its memory, files and latencies; asserts no time.

    Args:
        backbone: folder of a causal LM.
        upstreams: addresses of vLLM servers that hold it; none: the engine within the server's process.
        minutes: how long.
        parts: equal parts of that time, each told by itself.
        users: in the store before.
        dimension: of their vectors.
        clients: that ask for answers, each one after the other.
        prompt_tokens: of each prompt, the chat template's included.
        new_tokens: of the longest answer.
        writes_per_second: vectors put, read or deleted, one by one.
        upload_rows: vectors in an upload.
        upload_seconds: from one upload to the next.
        output: JSON file to write. It is also the last line of stdout.
        seed: of vectors, prompts and what is asked.

    Returns:
        What is written as JSON. ``memory_mib_per_minute``: the slope of the process's memory without pages of files,
        over what comes after the first quarter. ``p99_ratio``: of the last third to the second one.

    Raises:
        ConfigError: a number is out of range.
        E2PError: the server does not start.
    """
    given = {"users": users, "dimension": dimension, "clients": clients, "prompt_tokens": prompt_tokens}
    given |= {"new_tokens": new_tokens, "parts": parts, "upload_rows": upload_rows}
    for key, value in given.items():
        if value < 1:
            raise ConfigError(f"{key}: expected a whole number >= 1, got {value}")
    rates = {"minutes": minutes, "writes_per_second": writes_per_second, "upload_seconds": upload_seconds}
    for key, rate in rates.items():
        if not 0 < rate < 10_000:
            raise ConfigError(f"{key}: expected a number above 0, got {rate}")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="e2p-bench-") as folder:
        adapter, store = Path(folder, ADAPTER), str(Path(folder, "store"))
        with console.status("filling the store"):
            prompts = _prepare(backbone, adapter, dimension, prompt_tokens, new_tokens, seed)
            write_table(Path(folder, "embeddings.parquet"), users, dimension, seed)
            in_new_process(str(Path(folder, "embeddings.parquet")), store)
        options = ["--adapters", f"{ADAPTER}={adapter}", "--store", store, "--backbone.model", backbone]
        if upstreams:
            options += ["--engine", "vllm", *(word for each in upstreams for word in ("--upstreams", each))]
        with e2p_serve(*options) as (address, pid):
            load = _Load(users, dimension, clients, new_tokens, writes_per_second, upload_rows, upload_seconds, seed)
            world = _World(address, prompts, load, 60 * minutes)
            with console.status(f"{minutes:g} minutes of load"):
                asyncio.run(_run(world, pid))
    result = {
        "bench": "soak",
        "engine": "vllm" if upstreams else "in process",
        "backbone": hide_paths(backbone),
        **given,
        **rates,
        "seed": seed,
        "summary": _summary(world),
        "by_part": [_part(world, number, parts) for number in range(parts)],
        "provenance": provenance(),
    }
    console.print(result["summary"], highlight=False)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def _prepare(backbone: str, folder: Path, dimension: int, prompt_tokens: int, new_tokens: int, seed: int) -> list[str]:
    """An adapter in a folder; prompts."""
    frozen = FrozenBackbone.load(BackboneConfig(backbone, dtype="float32"), "float32")
    data = DataConfig(max_prompt_tokens=prompt_tokens, max_completion_tokens=new_tokens)
    model = E2PModel.from_backbone(frozen, dimension, ProjectorConfig(user_scale=1.0), data=data, seed=seed)
    model.save_pretrained(folder)
    rng, words = np.random.default_rng(seed), _words(frozen.tokenizer)
    return [_text(model.encoder, rng.choice(words, prompt_tokens).tolist(), prompt_tokens) for _ in range(_PROMPTS)]


async def _run(world: _World, pid: int) -> None:
    """All of the load, for as long as it shall last."""
    try:
        import aiohttp
    except ImportError:
        raise MissingExtraError("aiohttp", "vllm", "e2p bench soak") from None
    connector, timeout = aiohttp.TCPConnector(limit=0, keepalive_timeout=2), aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        world.start = time.perf_counter()
        work = [_client(world, session, number) for number in range(world.load.clients)]
        await asyncio.gather(*work, _writer(world, session), _uploader(world, session), _watch(world, pid))


async def _watch(world: _World, pid: int) -> None:
    while (at := world.now()) < world.seconds:
        holds = held(pid)
        if holds is not None:
            world.seen.append((at, holds))
        await asyncio.sleep(_LOOK)


async def _client(world: _World, session: Any, number: int) -> None:
    load, rng = world.load, np.random.default_rng([world.load.seed, 1, number])
    while world.now() < world.seconds:
        kind = str(rng.choice(_KINDS, p=_SHARES))
        user = name(int(rng.integers(load.users)) + load.users * int(rng.random() < _UNKNOWN))
        body: dict[str, Any] = {"model": ADAPTER, "user": user, "max_tokens": load.new_tokens, "temperature": 0.7}
        body["messages"] = [{"role": "user", "content": world.prompts[int(rng.integers(len(world.prompts)))]}]
        if kind != "whole":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        await _noted(world, kind, _answered(world, session, kind, body))


async def _answered(world: _World, session: Any, kind: str, body: dict[str, Any]) -> _Done:
    start, first, tokens, events, rest = time.perf_counter(), None, 0, 0, b""
    async with session.post(f"{world.base}/chat/completions", json=body) as response:
        if response.status != 200 or kind == "whole":
            content = await response.read()
            tokens = json.loads(content)["usage"]["completion_tokens"] if response.status == 200 else 0
            return _Done(world.now(), kind, response.status, None, time.perf_counter() - start, tokens)
        status = 0  # until the stream has come to its end
        async for part in response.content.iter_any():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: "):
                    continue
                events += 1
                if line == b"data: [DONE]":
                    status = 200
                    continue
                event = json.loads(line[6:])
                choices = event.get("choices") or [{}]
                if first is None and choices[0].get("delta", {}).get("content"):
                    first = time.perf_counter() - start
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if kind == "left" and events >= _LEFT_AFTER:
                return _Done(world.now(), kind, 200, first)
        return _Done(world.now(), kind, status, first, time.perf_counter() - start, tokens)


async def _writer(world: _World, session: Any) -> None:
    load, rng = world.load, np.random.default_rng([world.load.seed, 2])
    turn = 0
    while world.now() < world.seconds:
        kind, user = str(rng.choice(_WRITES, p=_WRITE_SHARES)), name(int(rng.integers(load.users)))
        body = (
            {"embedding": rng.normal(size=load.dimension).round(5).tolist(), "version": "v1"} if kind == "put" else None
        )
        await _noted(world, kind, _asked(world, session, kind, f"/users/{user}/embedding", json=body))
        turn += 1
        await asyncio.sleep(max(0.0, turn / load.writes_per_second - world.now()))


async def _uploader(world: _World, session: Any) -> None:
    load, rng = world.load, np.random.default_rng([world.load.seed, 3])
    turn = 0
    while world.now() < world.seconds:
        turn += 1
        await asyncio.sleep(max(0.0, min(turn * load.upload_seconds, world.seconds) - world.now()))
        rows = rng.normal(size=(load.upload_rows, load.dimension)).round(4).tolist()
        who = rng.integers(load.users, size=load.upload_rows).tolist()
        lines = [
            json.dumps({"user_id": name(user), "embedding": row, "version": "v1"})
            for user, row in zip(who, rows, strict=True)
        ]
        data, headers = io.BytesIO("\n".join(lines).encode()), {"content-type": "application/x-ndjson"}
        await _noted(world, "upload", _asked(world, session, "post", "/users/embeddings", data=data, headers=headers))


async def _asked(world: _World, session: Any, method: str, route: str, **options: Any) -> _Done:
    start = time.perf_counter()
    async with session.request(method.upper(), world.base + route, **options) as response:
        await response.read()
        kind = "upload" if method == "post" else method
        # A user who was deleted before has no vector: an answer like any other.
        status = 200 if kind == "get" and response.status == 404 else response.status
        return _Done(world.now(), kind, status, None, time.perf_counter() - start)


async def _noted(world: _World, kind: str, work: Awaitable[_Done]) -> None:
    """The request's end, also where it is none; after a failure there is a pause, so that nobody asks in a frenzy."""
    import aiohttp

    done = _Done(world.now(), kind, 0)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        done = await work
    world.done.append(done)
    if done.status != 200:
        await asyncio.sleep(0.2)


# ---------------------------------------------------------------- what is told


def _part(world: _World, number: int, parts: int) -> dict[str, Any]:
    """One of the equal parts of the time."""
    length = world.seconds / parts
    begin, end = number * length, (number + 1) * length
    last = number == parts - 1  # what was running at the end counts too
    done = [each for each in world.done if begin <= each.at and (each.at < end or last)]
    holds = [each for at, each in world.seen if begin <= at < end]
    return {
        "from_seconds": round(begin, 2),
        **_figures(done, length),
        "resident_mib": max((each.resident_mib for each in holds), default=None),
        "anonymous_mib": round(float(np.median([each.anonymous_mib for each in holds])), 1) if holds else None,
        "descriptors": max((each.descriptors for each in holds), default=None),
        "threads": max((each.threads for each in holds), default=None),
    }


def _figures(done: Sequence[_Done], seconds: float) -> dict[str, Any]:
    counts = Counter(each.kind for each in done)
    bad = Counter(str(each.status or "none") for each in done if each.status != 200)
    return {
        "requests": dict(sorted(counts.items())),
        "errors": dict(sorted(bad.items())),
        "tokens_per_second": round(sum(each.tokens for each in done) / seconds, 1),
        "first_token_seconds": _percentiles([each.first for each in done if each.status == 200]),
        "answer_seconds": _percentiles([each.whole for each in done if _is_answer(each)]),
        "write_seconds": _percentiles([each.whole for each in done if each.status == 200 and each.kind == "put"]),
    }


def _is_answer(done: _Done) -> bool:
    return done.status == 200 and done.kind in ("stream", "whole")


def _percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    p50, p99 = np.percentile(there, [50, 99])
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}


def _summary(world: _World) -> dict[str, Any]:
    settled = [(at, each) for at, each in world.seen if at >= world.seconds / 4]
    slope = None
    if len(settled) >= 2:
        at, memory = [at / 60 for at, _ in settled], [each.anonymous_mib for _, each in settled]
        slope = round(float(np.polyfit(at, memory, 1)[0]), 3)
    thirds = []
    for number in (1, 2):
        begin, end = number * world.seconds / 3, (number + 1) * world.seconds / 3
        thirds.append(_figures([each for each in world.done if begin <= each.at < end], world.seconds / 3))
    ratios: dict[str, float | None] = {}
    for what in ("first_token_seconds", "answer_seconds"):
        second, third = (part[what] for part in thirds)
        ratios[what] = round(third["p99"] / second["p99"], 3) if second and third else None
    return {
        **_figures(world.done, world.seconds),
        "memory_mib_per_minute": slope,
        "descriptors": [min((h.descriptors for _, h in settled), default=None),
                        max((h.descriptors for _, h in settled), default=None)],
        "p99_ratio": ratios,
    }  # fmt: skip
