"""`e2p bench sample`: n items for each query from a frozen model, by our decoding and by transformers' ``generate``.

Sides, in alternating rounds, on the same prompts with a soft token each: ``generate``: sampling with
``num_return_sequences`` and no constraint, so most answers are no items; it reads each prompt n times.
``generate_trie``: the same with a processor that lets only items through. ``generate_cached``: the first once more, as
a careful user would call it: each prompt is read once, and its cache repeated n times for ``generate``.
``sample_items``: ours, n independent draws. ``best_items``: ours, a beam of width n.

The catalogue is random, and so are the embeddings of its codes. Then nearly all codes are equally likely, draws share
few partial codes, and ours has more to run than on a model that knows its items.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from e2p.bench.memory import peak_memory, start_memory
from e2p.bench.quiet import quiet
from e2p.bench.rounds import now, ratios_of
from e2p.config import BackboneConfig
from e2p.data.templates import EncodedPrompt
from e2p.errors import ConfigError
from e2p.items.decoding import best_items, sample_items
from e2p.items.residual import separate
from e2p.items.semantic_ids import SemanticIds
from e2p.items.vocabulary import CodeVocabulary, add_code_tokens
from e2p.model.backbone import FrozenBackbone
from e2p.model.loading import load_causal_lm
from e2p.model.prefill import prefill
from e2p.model.splice import Spliced
from e2p.provenance import hide_paths, provenance

THEIRS, OURS = ("generate", "generate_trie", "generate_cached"), ("sample_items", "best_items")
SIDES = (*THEIRS, *OURS)


@dataclass(frozen=True)
class _Setting:
    """Plain values, since memory is measured in other processes."""

    backbone: str
    items: int
    queries: int
    n: int
    prompt_tokens: int
    codes: int
    precision: Literal["float32", "bfloat16"]
    attn: str
    seed: int


def bench(
    backbone: str,
    items: int = 10_000,
    queries: int = 8,
    n: int = 30,
    prompt_tokens: int = 200,
    codes: int = 256,
    rounds: int = 5,
    output: str = "bench_sample.json",
    precision: Literal["float32", "bfloat16"] = "float32",
    attn: str = "sdpa",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure queries per second and peak memory of item generation against transformers' generate; asserts no time.

    Args:
        backbone: folder or hub id of a causal LM; the codes' tokens are added in memory.
        items: of the random catalogue.
        queries: prompts of a batch; a round is one batch, the same in every round.
        n: items for each query.
        prompt_tokens: random tokens of each prompt.
        codes: of each of the three levels, and of the separating one.
        rounds: measured rounds, after one that is not.
        output: JSON file to write. It is also the last line of stdout.
        precision: float32, or bfloat16 autocast.
        attn: attention implementation, on all sides.
        seed: seed of catalogue, prompts, soft tokens, new embeddings and draws.

    Returns:
        What is written as JSON.

    Raises:
        ConfigError: a number is out of range.
        BackboneError: the backbone cannot be loaded, or its window is too short.
    """
    sizes = {"items": items, "queries": queries, "n": n, "prompt_tokens": prompt_tokens, "codes": codes}
    for name, value in {**sizes, "rounds": rounds}.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    setting = _Setting(backbone, **sizes, precision=precision, attn=attn, seed=seed)
    console = Console(stderr=True)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with quiet():
        memory = {side: _in_new_process(setting, side) for side in SIDES}
        many = _Sides(setting)
        rows: dict[str, Tensor] = {}
        for number in range(rounds + 1):
            for side in SIDES:
                gc.collect()
                start = now()
                rows[side] = many.run(side)
                end = now()
                if number:
                    seconds[side].append((end[0] - start[0], end[1] - start[1]))
            console.print(f"round {number} of {rounds}")
    sides = {}
    for side in SIDES:
        wall, cpu = ([round(took[which], 4) for took in seconds[side]] for which in (0, 1))
        sides[side] = {
            "queries_per_second": round(queries / statistics.median(wall), 3),
            "queries_per_cpu_second": round(queries / statistics.median(cpu), 3),
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_mib": memory[side],
            "items_share": round(float((rows[side] >= 0).float().mean()), 4),
            "different_items": statistics.mean(len(set(row) - {-1}) for row in rows[side].tolist()),
        }
    ratios = ratios_of(seconds, memory, [(side, base) for side in OURS for base in THEIRS])
    console.print(ratios)
    result = {
        "bench": "sample",
        "provenance": provenance(),
        **asdict(setting),
        "backbone": hide_paths(backbone),
        "vocabulary": int(many.backbone.head.linear.weight.shape[0]),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "sides": sides,
        "ratios": ratios,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def _in_new_process(setting: _Setting, side: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory_rise, setting, side).result()


def _memory_rise(setting: _Setting, side: str) -> float:
    """MiB by which memory rises while a side answers a batch, over what the loaded model holds. Once a process."""
    with quiet():
        many = _Sides(setting)
        before = start_memory()
        many.run(side)
        return round((peak_memory() - before) / 2**20, 1)


class _Sides:
    """The model that knows a random catalogue's codes, the prompts, and what each side does with them."""

    def __init__(self, setting: _Setting) -> None:
        self.setting = setting
        random = np.random.default_rng(setting.seed)
        names = [f"item {row}" for row in range(setting.items)]
        drawn = random.integers(0, setting.codes, (setting.items, 3))
        last = separate(drawn, names, setting.codes, "items")
        ids = SemanticIds(names, np.column_stack([drawn, last]), (setting.codes,) * 4, separated=True)
        model, tokenizer = load_causal_lm(BackboneConfig(setting.backbone, dtype="float32", attn=setting.attn))
        known = len(tokenizer)
        add_code_tokens(tokenizer, ids)
        torch.manual_seed(setting.seed)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.backbone = FrozenBackbone(model, tokenizer, precision=setting.precision)
        self.vocabulary = CodeVocabulary.of(ids, tokenizer)
        tokens = random.integers(0, known, (setting.queries, setting.prompt_tokens)).tolist()
        self.prompts = [EncodedPrompt(prompt, 0, 0) for prompt in tokens]
        self.at = [0] * setting.queries
        self.prefix = self.backbone.embed(torch.arange(setting.queries, device=self.backbone.device) % known)[:, None]
        self.only_items = _OnlyItems(self.vocabulary, self.backbone, setting.prompt_tokens + 1)

    def run(self, side: str) -> Tensor:
        """Catalogue rows [queries, n] of a side's items, on the CPU; -1 where an answer is no item."""
        if side in THEIRS:
            answers = (
                self.cached() if side == "generate_cached" else self.generated(constrained=side == "generate_trie")
            )
            rows = self.only_items.trie.leaf(self.only_items.walk(answers))
            return rows.view(self.setting.queries, self.setting.n).cpu()
        read = prefill(self.backbone, self.prompts, self.at, self.prefix)
        decode = sample_items if side == "sample_items" else best_items
        return decode(read, self.vocabulary, self.setting.n).rows.cpu()

    @property
    def sampling(self) -> dict[str, Any]:
        """What generate is told: plain sampling of as many tokens as an item has codes."""
        plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        return {**plain, "max_new_tokens": self.vocabulary.levels}

    def generated(self, constrained: bool) -> Tensor:
        """Token ids [queries * n, levels] that transformers' generate answers prompts with."""
        answers = self.backbone.generate(
            self.prompts,
            self.at,
            self.prefix,
            **self.sampling,
            num_return_sequences=self.setting.n,
            eos_token_id=[],  # an item ends after its last code
            logits_processor=[self.only_items] if constrained else [],
        )
        return torch.tensor(answers, device=self.backbone.device)

    @torch.no_grad()
    def cached(self) -> Tensor:
        """The same after a cache of the prompts. All but the last token is in it, since generate reads one itself."""
        ids = torch.tensor([prompt.ids for prompt in self.prompts], device=self.backbone.device)
        embeds = torch.cat([self.prefix, self.backbone.embed(ids[:, :-1])], dim=1)
        cache: Any = DynamicCache(config=self.backbone.config)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        known = torch.cat([ids[:, :1], ids], dim=1).repeat_interleave(self.setting.n, 0)  # any id for the soft token
        with self.backbone.autocast():
            self.backbone.hidden_states(Spliced(embeds, torch.ones_like(ids), place), cache)
            cache.batch_repeat_interleave(self.setting.n)
            out = self.backbone.model.generate(
                known,
                attention_mask=torch.ones_like(known),
                pad_token_id=0,
                eos_token_id=None,
                **{self.backbone.cache_name: cache},
                **self.sampling,
            )
        return out[:, known.shape[1] :]


class _OnlyItems(LogitsProcessor):
    """Lets through what some item goes on with, for all rows at once; answers begin at ``start``."""

    def __init__(self, vocabulary: CodeVocabulary, backbone: FrozenBackbone, start: int) -> None:
        device, size = backbone.device, backbone.head.linear.weight.shape[0]
        self.trie = vocabulary.trie.to(device)
        self.tokens = [tokens.to(device) for tokens in vocabulary.tokens]
        self.codes = torch.full((len(self.tokens), size), -1, device=device)  # of each token at each level
        for codes, tokens in zip(self.codes, self.tokens, strict=True):
            codes[tokens] = torch.arange(len(tokens), device=device)
        self.start = start

    def walk(self, answers: Tensor) -> Tensor:
        """Nodes [N] that answers [N, levels so far] lead to."""
        nodes = self.trie.root(len(answers))
        for level, tokens in enumerate(answers.T):
            nodes = self.trie.step(nodes, self.codes[level, tokens])
        return nodes

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        level = input_ids.shape[1] - self.start
        tokens = self.tokens[level]
        allowed = self.trie.allowed(self.walk(input_ids[:, self.start :]), level)
        kept = torch.full_like(scores, -torch.inf)
        kept[:, tokens] = scores[:, tokens].masked_fill(~allowed, -torch.inf)
        return kept
