"""What the benches share: sides that train on the same examples in turns, and the file that comes of it.

All sides go through the same examples in batches of the same size, one epoch a round, one side after the other,
round after round (A B C D A B C D ...): a ratio is taken within a round, so that whatever else the machine does falls
on all sides alike. Both wall-clock and processor time of a round are kept; on a CPU that others use too, the ratios of
processor time are the steadier ones. The first, unmeasured round warms up.

Peak memory is taken in a process of its own for each side.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainerCallback

from e2p.bench.memory import peak_memory, start_memory
from e2p.bench.quiet import quiet
from e2p.config import BackboneConfig, DataConfig, Position, Precision, ProjectorConfig, TrainingConfig
from e2p.data.batches import Examples, Ints
from e2p.data.tables import write_frame
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import hide_paths, provenance
from e2p.training.criteria import Criterion
from e2p.training.inputs import JoinedTables, join_tables, load_inputs
from e2p.training.trainer import E2PTrainer

_MEMORY_STEPS = 8


@dataclass(frozen=True)
class Setting:
    """What one table is measured with; plain values, since memory is measured in other processes.

    Args:
        vocabulary: entries of a random model of the backbone's sizes; 0: the backbone itself.
    """

    backbone: str
    examples: str
    embeddings: str
    batch_size: int
    steps: int
    seed: int
    attn: str
    precision: Precision = "float32"
    vocabulary: int = 0


class Bench:
    """Models and data of one table; a trainer made here trains one epoch over the round's examples.

    A bench names itself, its sides and the pairs (ours, theirs) whose ratios are taken, and makes the trainers.
    """

    name: ClassVar[str]
    needs: ClassVar[dict[str, str]]  # packages, and the extras that bring them
    sides: ClassVar[tuple[str, ...]]
    ours: ClassVar[dict[str, tuple[Position, bool]]]  # our sides: place of the soft token, whether prompts are shared
    pairs: ClassVar[tuple[tuple[str, str], ...]]

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        data = DataConfig(
            setting.examples,
            setting.embeddings,
            long_prompt="truncate",
            missing_vector="null",
            cache_dir=str(folder / "cache"),
        )
        tables = join_tables(data)
        rows = self.usable(tables)
        self.backbone = FrozenBackbone(*causal_lm(setting), precision=setting.precision)
        self.encoder = text_encoder(self.backbone, data, 1)
        self.inputs = load_inputs(data, self.encoder, "before_bos", tables)
        rows = rows[np.random.default_rng(setting.seed).permutation(len(rows))]
        self.rows = rows[: min(setting.steps, len(rows) // setting.batch_size) * setting.batch_size]
        if not len(self.rows):
            raise DataError(f"{setting.examples}: expected at least {setting.batch_size} training examples; add more")

    @staticmethod
    def simulated(examples: pl.DataFrame) -> pl.DataFrame:
        """What the bench takes of a simulated service's examples."""
        return examples

    def usable(self, tables: JoinedTables) -> Ints:
        """Training rows that the round's are drawn from."""
        return np.flatnonzero((tables.split == 0) & (tables.labels != 0))

    def trainer(self, side: str) -> Trainer:
        """A fresh trainer of a side."""
        raise NotImplementedError

    def criterion(self, side: str, model: E2PModel, examples: Examples) -> Criterion | None:
        """What our trainer of a side minimises; None: its own default."""
        return None

    def side_details(self, side: str, rounds: int) -> dict[str, Any]:
        """What is written of a side beside its times."""
        return {}

    def details(self) -> dict[str, Any]:
        """What is written of the table beside its sides."""
        raise NotImplementedError

    def examples(self, position: Position) -> Examples:
        """The round's examples as ours takes them."""
        return replace(self.inputs.examples("train"), rows=self.rows, position=position)

    def our_trainer(self, side: str, static: bool = False) -> E2PTrainer:
        """A fresh trainer of one of our sides."""
        setting = self.setting
        position, self.backbone.share_prompts = self.ours[side]
        projector = ProjectorConfig(position=position)
        model = E2PModel.from_backbone(
            self.backbone, self.inputs.embeddings.dim, projector, static=static, seed=setting.seed
        )
        examples = self.examples(position)
        few = replace(examples, rows=examples.rows[: setting.batch_size])
        budget = TrainingConfig(epochs=1, batch_size=setting.batch_size, evals_per_epoch=1, seed=setting.seed)
        criterion = self.criterion(side, model, examples)
        return E2PTrainer(model, budget, examples, few, self.output(side), criterion=criterion)

    @torch.no_grad()
    def put_token(self, trainer: E2PTrainer, token: Tensor) -> None:
        """Make this vector [H] the soft token of a static trainer."""
        phi = trainer.model.projector
        phi.w2.weight.zero_()
        phi.w2.bias.copy_(token)

    def output(self, side: str) -> Path:
        """Folder of a side's trainer."""
        return self.folder / f"{self.setting.precision}-{self.setting.vocabulary}-{side}"

    def their_arguments(self, side: str) -> dict[str, Any]:
        """What transformers' trainers are told: the same budget, and nothing beside training."""
        return {
            "output_dir": str(self.output(side)),
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.setting.batch_size,
            "learning_rate": 1e-3,
            "logging_steps": max(1, len(self.rows) // self.setting.batch_size // 10),
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": self.backbone.device.type == "cpu",
            "bf16": self.setting.precision == "bfloat16",
            "seed": self.setting.seed,
        }

    def epoch(self, side: str) -> tuple[float, float]:
        """Wall-clock and processor seconds of one epoch of a side."""
        trainer, clock = self.trainer(side), _Clock()
        trainer.add_callback(clock)
        gc.collect()
        trainer.train()
        return clock.end[0] - clock.start[0], clock.end[1] - clock.start[1]

    def describe(self) -> dict[str, Any]:
        """The round's data in numbers."""
        tokens = self.inputs.tokens
        return {
            "examples": len(self.rows),
            "distinct_prompts": len({tokens[int(row)].prompt.tobytes() for row in self.rows}),
            "mean_prompt_tokens": round(float(tokens.prompt_lengths[self.rows].mean()), 1),
            "mean_completion_tokens": round(float(tokens.completion_lengths[self.rows].mean()), 1),
        }


class _Clock(TrainerCallback):
    """From the start of training to the end of its last step; saving and validation come after that."""

    start = end = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end = now()


def now() -> tuple[float, float]:
    """Wall-clock and processor time in seconds, with nothing left to do on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def run(
    kind: type[Bench],
    setting: Setting,
    *,
    rounds: int,
    vocabulary: int,
    precision: Literal["both", "float32", "bfloat16"],
    output: str,
) -> dict[str, Any]:
    """Measure all tables of a bench; write what is found as JSON, and print it as the last line of stdout.

    Args:
        kind: the bench.
        setting: with what; precision and vocabulary are set here.
        rounds: measured rounds, after one that is not.
        vocabulary: of the second, random model; 0: only the backbone.
        precision: one, or one after the other.
        output: the file.

    Raises:
        ConfigError: a number is out of range, or one of the two tables is missing.
        MissingExtraError: a package that the bench needs is not installed.
    """
    for name, value in (("batch_size", setting.batch_size), ("steps", setting.steps), ("rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    if bool(setting.examples) != bool(setting.embeddings):
        raise ConfigError("examples and embeddings: expected both tables or neither, got one")
    for package, extra in kind.needs.items():
        try:
            import_module(package)
        except ImportError:
            raise MissingExtraError(package, extra, f"e2p bench {kind.name}") from None
    console = Console(stderr=True)
    kinds: list[Precision] = ["float32", "bfloat16"] if precision == "both" else [precision]
    with tempfile.TemporaryDirectory() as folder, quiet():
        if not setting.examples:
            setting = _simulated(kind, setting, Path(folder))
        tables = [
            _table(kind, replace(setting, vocabulary=size, precision=one), rounds, Path(folder), console)
            for size in ([0, vocabulary] if vocabulary else [0])
            for one in kinds
        ]
    made = provenance()
    made["versions"] |= {package: metadata.version(package) for package in kind.needs}
    result = {
        "bench": kind.name,
        "provenance": made,
        "backbone": hide_paths(setting.backbone),
        "threads": torch.get_num_threads(),
        "batch_size": setting.batch_size,
        "rounds": rounds,
        "attn": setting.attn,
        "tables": tables,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def _simulated(kind: type[Bench], setting: Setting, folder: Path) -> Setting:
    """Tables of a simulated service whose training part has enough examples for a round."""
    from e2p.tasks.simulate import SimulationConfig, simulate

    world = simulate(SimulationConfig(users=max(150, setting.steps * setting.batch_size // 3 + 20), artists=150))
    examples, embeddings = folder / "examples.parquet", folder / "embeddings.parquet"
    write_frame(examples, kind.simulated(world.examples))
    write_frame(embeddings, world.embeddings)
    return replace(setting, examples=str(examples), embeddings=str(embeddings))


def _table(kind: type[Bench], setting: Setting, rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    """Each side's memory in a process of its own, then all sides in turns: what can fail at once comes first."""
    memory = {side: _in_new_process(kind, setting, side) for side in kind.sides}
    many = kind(setting, folder)
    title = f"vocabulary {many.backbone.head.linear.weight.shape[0]:,}, {setting.precision}"
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in kind.sides}
    for number in range(rounds + 1):
        took = {side: many.epoch(side) for side in kind.sides}
        for side in kind.sides if number else ():
            seconds[side].append(took[side])
        console.print(f"{title}: round {number} of {rounds}")
    sides = {}
    for side in kind.sides:
        wall, cpu = ([round(took[which], 3) for took in seconds[side]] for which in (0, 1))
        sides[side] = {
            "examples_per_second": round(len(many.rows) / statistics.median(wall), 1),
            "examples_per_cpu_second": round(len(many.rows) / statistics.median(cpu), 1),
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_mib": memory[side],
            **many.side_details(side, rounds),
        }
    ratios = ratios_of(seconds, memory, kind.pairs)
    console.print(ratios)
    return {
        "vocabulary": int(many.backbone.head.linear.weight.shape[0]),
        "random_weights": bool(setting.vocabulary),
        "precision": setting.precision,
        "data": many.describe(),
        "sides": sides,
        "ratios": ratios,
        **many.details(),
    }


def ratios_of(
    seconds: Mapping[str, Sequence[tuple[float, float]]],
    memory: Mapping[str, float],
    pairs: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """How many times as fast the first of two sides is as the second, within each round, and its share of the memory.

    Args:
        seconds: wall-clock and processor time of each side's rounds.
        memory: each side's peak.
        pairs: sides to compare.
    """
    return {
        f"{side} to {base}": {
            "speed": spread([b[0] / a[0] for a, b in zip(seconds[side], seconds[base], strict=True)]),
            "speed_cpu_time": spread([b[1] / a[1] for a, b in zip(seconds[side], seconds[base], strict=True)]),
            "memory": round(memory[side] / memory[base], 3) if memory[base] else None,
        }
        for side, base in pairs
    }


def spread(values: list[float], places: int = 3) -> dict[str, float]:
    """Smallest, middle and greatest, to so many decimal places."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, places) for name, value in found.items()}


def _in_new_process(kind: type[Bench], setting: Setting, side: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_rise, kind, replace(setting, steps=min(setting.steps, _MEMORY_STEPS)), side).result()


def memory_rise(kind: type[Bench], setting: Setting, side: str) -> float:
    """MiB by which memory rises while a side trains, over what the loaded model holds. Once a process."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = kind(setting, Path(folder)).trainer(side)
        before = start_memory()
        trainer.train()
        return round((peak_memory() - before) / 2**20, 1)


def causal_lm(setting: Setting) -> tuple[Any, Any]:
    """The backbone in float32 with its tokenizer; with a vocabulary, random weights of the same sizes otherwise."""
    backbone = FrozenBackbone.load(
        BackboneConfig(model=setting.backbone, dtype="float32", attn=setting.attn), precision="float32"
    )
    if not setting.vocabulary:
        return backbone.model, backbone.tokenizer
    config = copy.deepcopy(backbone.model.config)
    config.get_text_config(decoder=True).vocab_size = setting.vocabulary
    torch.manual_seed(setting.seed)
    model = type(backbone.model)._from_config(config, dtype=torch.float32, attn_implementation=setting.attn)
    return model.to(backbone.device), backbone.tokenizer
