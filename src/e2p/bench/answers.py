"""`e2p bench answers`: different users' prompts answered in batches, and one at a time by transformers' ``generate``.

Sides, in alternating rounds, on the same prompts with the same soft tokens, always the likeliest token:
``generate``: each prompt by itself, as ``inputs_embeds``, until its answer ends. ``answer_to_the_end``: what
``e2p evaluate`` does, but every batch goes on until the most tokens are there, whatever has ended. ``answer``: what
``e2p evaluate`` does: prompts of about one length together, each batch until all of its answers are at their end.

phi is untrained: it costs the same, and how long answers are is written beside the times, since all hangs on it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from e2p.bench.memory import peak_memory, start_memory
from e2p.bench.quiet import quiet
from e2p.bench.rounds import now, ratios_of
from e2p.config import BackboneConfig, DataConfig, ProjectorConfig
from e2p.data.batches import token_passes
from e2p.data.tables import write_frame
from e2p.errors import ConfigError, DataError
from e2p.evaluation.answers import answer, continued
from e2p.evaluation.arms import Arm
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import hide_paths, provenance
from e2p.training.inputs import load_inputs

SIDES = ("generate", "answer_to_the_end", "answer")
PAIRS = (("answer", "generate"), ("answer", "answer_to_the_end"))


@dataclass(frozen=True)
class _Setting:
    """Plain values, since memory is measured in other processes."""

    backbone: str
    examples: str
    embeddings: str
    prompts: int
    max_new_tokens: int
    tokens_per_pass: int
    precision: Literal["float32", "bfloat16"]
    attn: str
    seed: int


def bench(
    backbone: str,
    examples: str = "",
    embeddings: str = "",
    prompts: int = 64,
    max_new_tokens: int = 48,
    tokens_per_pass: int = 8192,
    rounds: int = 5,
    output: str = "bench_answers.json",
    precision: Literal["float32", "bfloat16"] = "float32",
    attn: str = "sdpa",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure examples per second and peak memory of answering prompts in batches and one by one; asserts no time.

    Args:
        backbone: folder or hub id of a causal LM.
        examples: example table; without one, that of a simulated service.
        embeddings: the users' vectors, with a table.
        prompts: examples that are answered, drawn from the table; a round is all of them on every side.
        max_new_tokens: longest answer.
        tokens_per_pass: of prompts and answers in a batch.
        rounds: measured rounds, after one that is not.
        output: JSON file to write. It is also the last line of stdout.
        precision: float32, or bfloat16 autocast.
        attn: attention implementation, on all sides.
        seed: seed of the choice of prompts and of phi.

    Returns:
        What is written as JSON. ``same_answers``: share of a side's answers that are those of ``generate``, letter by
        letter; in bfloat16 padding can change the likeliest token.

    Raises:
        ConfigError: a number is out of range, or one of the two tables is missing.
        DataError: the table has fewer examples.
        BackboneError: the backbone cannot be loaded.
    """
    sizes = {"prompts": prompts, "max_new_tokens": max_new_tokens, "tokens_per_pass": tokens_per_pass}
    for name, value in {**sizes, "rounds": rounds}.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    if bool(examples) != bool(embeddings):
        raise ConfigError("examples and embeddings: expected both tables or neither, got one")
    setting = _Setting(backbone, examples, embeddings, **sizes, precision=precision, attn=attn, seed=seed)
    console = Console(stderr=True)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place, quiet():
        if not examples:
            setting = _simulated(setting, Path(place))
        memory = {side: _in_new_process(setting, side) for side in SIDES}
        many = _Sides(setting, Path(place))
        for number in range(rounds + 1):
            for side in SIDES:
                gc.collect()
                start = now()
                texts[side] = many.run(side)
                end = now()
                if number:
                    seconds[side].append((end[0] - start[0], end[1] - start[1]))
            console.print(f"round {number} of {rounds}")
        about = many.describe()
    sides = {}
    for side in SIDES:
        wall, cpu = ([round(took[which], 4) for took in seconds[side]] for which in (0, 1))
        same = [mine == theirs for mine, theirs in zip(texts[side], texts["generate"], strict=True)]
        sides[side] = {
            "examples_per_second": round(prompts / statistics.median(wall), 3),
            "examples_per_cpu_second": round(prompts / statistics.median(cpu), 3),
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_mib": memory[side],
            "same_answers": round(statistics.mean(same), 4),
        }
    ratios = ratios_of(seconds, memory, PAIRS)
    console.print(ratios)
    result = {
        "bench": "answers",
        "provenance": provenance(),
        "backbone": hide_paths(backbone),
        "tables": "given" if examples else "simulated",
        **sizes,
        "precision": precision,
        "attn": attn,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "data": about,
        "sides": sides,
        "ratios": ratios,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def _simulated(setting: _Setting, folder: Path) -> _Setting:
    """Tables of a simulated service with enough requests."""
    from e2p.tasks.simulate import SimulationConfig, simulate

    world = simulate(SimulationConfig(users=max(150, setting.prompts), artists=150))
    examples, embeddings = folder / "examples.parquet", folder / "embeddings.parquet"
    write_frame(examples, world.examples)
    write_frame(embeddings, world.embeddings)
    return dataclasses.replace(setting, examples=str(examples), embeddings=str(embeddings))


def _in_new_process(setting: _Setting, side: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory_rise, setting, side).result()


def _memory_rise(setting: _Setting, side: str) -> float:
    """MiB by which memory rises while a side answers, over what the loaded model holds. Once a process."""
    with tempfile.TemporaryDirectory() as place, quiet():
        many = _Sides(setting, Path(place))
        before = start_memory()
        many.run(side)
        return round((peak_memory() - before) / 2**20, 1)


class _Sides:
    """The model, the prompts, and what each side does with them."""

    def __init__(self, setting: _Setting, folder: Path) -> None:
        self.setting = setting
        self.backbone = FrozenBackbone.load(
            BackboneConfig(setting.backbone, dtype="float32", attn=setting.attn), setting.precision
        )
        projector = ProjectorConfig()
        data = DataConfig(
            setting.examples,
            setting.embeddings,
            long_prompt="truncate",
            missing_vector="null",
            cache_dir=str(folder / "cache"),
        )
        encoder = text_encoder(self.backbone, data, projector.prefix_tokens)
        self.inputs = load_inputs(data, encoder, projector.position)
        rows = np.flatnonzero(self.inputs.split >= 0)
        if len(rows) < setting.prompts:
            raise DataError(f"{setting.examples}: expected {setting.prompts} examples, got {len(rows)}; ask for fewer")
        rows = np.sort(np.random.default_rng(setting.seed).permutation(rows)[: setting.prompts])
        model = E2PModel.from_backbone(
            self.backbone, self.inputs.embeddings.dim, projector, data=data, seed=setting.seed
        )
        examples = self.inputs.examples("test", rows=rows)
        self.arm = Arm("e2p", model, examples, True, np.zeros(len(self.inputs.tokens), np.int64))

    def run(self, side: str) -> list[str]:
        """A side's answers, in the order of the examples."""
        if side == "answer":
            found = answer(
                self.arm,
                self.inputs,
                self.setting.tokens_per_pass,
                draws=1,
                temperature=0,
                max_new_tokens=self.setting.max_new_tokens,
                seed=self.setting.seed,
            )
            return found["text"].to_list()
        return self.decoded(
            self.to_the_end() if side == "answer_to_the_end" else map(self.alone, self.arm.examples.rows)
        )

    def to_the_end(self) -> list[list[int]]:
        """New ids of each example, from the same batches, none of which stops before the most tokens are there."""
        rows, most = self.arm.examples.rows, self.setting.max_new_tokens
        lengths = self.arm.examples.tokens.prompt_lengths[rows].astype(np.int64)
        found: dict[int, list[int]] = {}
        for part in token_passes(lengths + most, self.setting.tokens_per_pass):
            ids, _ = continued(self.arm, rows[part], most, {"do_sample": False, "eos_token_id": []})
            found.update(zip(part.tolist(), ids, strict=True))
        return [found[at] for at in range(len(rows))]

    @torch.no_grad()
    def alone(self, row: int) -> list[int]:
        """New ids of one example, as transformers alone makes them of embeddings."""
        model, backbone = self.arm.model, self.backbone
        batch = self.arm.examples.batch(np.array([row])).to(backbone.device)
        prefix = model.projector(batch.embeddings, batch.present)
        at = int(batch.splice[0])
        tokens = backbone.embed(batch.prompt)
        inputs = torch.cat([tokens[:, :at], prefix.to(tokens.dtype), tokens[:, at:]], dim=1)
        room = self.setting.max_new_tokens
        if backbone.window is not None:
            room = max(1, min(room, backbone.window - inputs.shape[1]))
        with backbone.autocast():
            out = backbone.model.generate(
                inputs_embeds=inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=backbone.device),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=0,  # of one row, nothing is padded
                eos_token_id=backbone.ends() or None,
            )
        return out[0].tolist()

    def decoded(self, answers: Iterable[list[int]]) -> list[str]:
        """Texts, up to the first token that ends an answer."""
        ends = set(self.backbone.ends())
        decode = self.backbone.tokenizer.decode
        cut = [ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))] for ids in answers]
        return [decode(ids, skip_special_tokens=True).strip() for ids in cut]

    def describe(self) -> dict[str, Any]:
        """Prompts and answers in numbers."""
        rows, most = self.arm.examples.rows, self.setting.max_new_tokens
        lengths = self.arm.examples.tokens.prompt_lengths[rows].astype(np.int64)
        passes = token_passes(lengths + most, self.setting.tokens_per_pass)
        ends = set(self.backbone.ends())
        made = [sum(token not in ends for token in self.alone(row)) for row in rows]
        return {
            "users": self.inputs.keys["user_id"][rows].n_unique(),
            "batches": len(passes),
            "mean_prompt_tokens": round(float(lengths.mean()), 1),
            "mean_answer_tokens": round(statistics.mean(made), 1),
            "longest_answer_tokens": max(made),
            "cut_share": round(statistics.mean(count >= most for count in made), 4),
        }
