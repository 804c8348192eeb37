"""`e2p bench train`: our training step beside PEFT prompt tuning with one virtual token, on the same examples.

All sides go through the same examples in batches of the same size, one epoch a round, one side after the other,
round after round (A B C D A B C D ...): a ratio is taken within a round, so that whatever else the machine does falls
on all sides alike. Both wall-clock and processor time of a round are kept; on a CPU that others use too, the ratios of
processor time are the steadier ones. The first, unmeasured round warms up.

Sides: ``peft``: prompt tuning under ``transformers.Trainer`` with a padding collator; ``before_bos``: ours at the same
place; ``before_completion_whole``: ours right before the answer, everything in one pass; ``before_completion``: the
same with the prompt run without gradient, once for all rows that share it (the default of the library).

That all do the same work is measured too: with PEFT's virtual token as our static one, the mean losses must agree.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from e2p.bench.arithmetic import arithmetic
from e2p.bench.memory import peak_memory, start_memory
from e2p.bench.quiet import quiet
from e2p.config import BackboneConfig, DataConfig, Position, Precision, ProjectorConfig, TrainingConfig
from e2p.data.batches import Examples
from e2p.data.tables import write_frame
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import hide_paths, provenance
from e2p.training.inputs import load_inputs
from e2p.training.trainer import E2PTrainer

OURS: dict[str, tuple[Position, bool]] = {
    "before_bos": ("before_bos", True),
    "before_completion_whole": ("before_completion", False),
    "before_completion": ("before_completion", True),
}
SIDES = ("peft", *OURS)
_MEMORY_STEPS = 8


@dataclass(frozen=True)
class Setting:
    """What one table is measured with; plain values, since memory is measured in other processes."""

    backbone: str
    examples: str
    embeddings: str
    vocabulary: int
    batch_size: int
    steps: int
    precision: Precision
    seed: int
    attn: str


def bench(
    backbone: str,
    examples: str = "",
    embeddings: str = "",
    output: str = "bench_train.json",
    batch_size: int = 32,
    steps: int = 32,
    rounds: int = 5,
    vocabulary: int = 128_256,
    precision: Literal["both", "float32", "bfloat16"] = "both",
    attn: str = "sdpa",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure examples per second and peak memory of training against PEFT prompt tuning; asserts no time.

    Args:
        backbone: folder or hub id of a causal LM.
        examples: example table; empty: requests to a small simulated service.
        embeddings: embedding table; goes with ``examples``.
        output: JSON file to write. It is also the last line of stdout.
        batch_size: examples per optimiser step, on all sides.
        steps: optimiser steps in a round; a round's examples are the same in every round.
        rounds: measured rounds, after one that is not.
        vocabulary: measure a second, random model of the same sizes with this vocabulary too; 0: only the backbone.
        precision: float32, bfloat16 autocast, or one after the other.
        attn: attention implementation, on all sides.
        seed: seed of the choice of examples, of their order and of the weights.

    Returns:
        What is written as JSON.

    Raises:
        ConfigError: a number is out of range, or one of the two tables is missing.
        MissingExtraError: PEFT is not installed.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    if bool(examples) != bool(embeddings):
        raise ConfigError("examples and embeddings: expected both tables or neither, got one")
    _require_peft()
    console = Console(stderr=True)
    kinds: list[Precision] = ["float32", "bfloat16"] if precision == "both" else [precision]
    with tempfile.TemporaryDirectory() as folder, quiet():
        if not examples:
            examples, embeddings = _simulated(Path(folder), steps * batch_size)
        setting = Setting(backbone, examples, embeddings, 0, batch_size, steps, "float32", seed, attn)
        tables = [
            _table(replace(setting, vocabulary=size, precision=kind), rounds, Path(folder), console)
            for size in ([0, vocabulary] if vocabulary else [0])
            for kind in kinds
        ]
    result = {
        "bench": "train",
        "provenance": provenance(),
        "backbone": hide_paths(backbone),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "rounds": rounds,
        "attn": attn,
        "tables": tables,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingExtraError("peft", "peft", "e2p bench train") from None


def _simulated(folder: Path, count: int) -> tuple[str, str]:
    """Tables of a simulated service whose training part has at least ``count`` examples."""
    from e2p.tasks.simulate import SimulationConfig, simulate

    world = simulate(SimulationConfig(users=max(150, count // 3 + 20), artists=150))
    write_frame(folder / "examples.parquet", world.examples)
    write_frame(folder / "embeddings.parquet", world.embeddings)
    return str(folder / "examples.parquet"), str(folder / "embeddings.parquet")


class _Bench:
    """Models and data of one table; a trainer made here trains one epoch over the round's examples."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.backbone = FrozenBackbone(*_causal_lm(setting), precision=setting.precision)
        data = DataConfig(
            setting.examples,
            setting.embeddings,
            long_prompt="truncate",
            missing_vector="null",
            cache_dir=str(folder / "cache"),
        )
        self.inputs = load_inputs(data, text_encoder(self.backbone, data, 1), "before_bos")
        rows = self.inputs.rows("train")
        rows = rows[np.random.default_rng(setting.seed).permutation(len(rows))]
        self.rows = rows[: min(setting.steps, len(rows) // setting.batch_size) * setting.batch_size]
        if not len(self.rows):
            raise DataError(f"{setting.examples}: expected at least {setting.batch_size} training examples; add more")

    @cached_property
    def peft_model(self) -> Any:
        """PEFT's prompt tuning with one virtual token, on weights of its own."""
        from peft import PromptTuningConfig, get_peft_model

        torch.manual_seed(self.setting.seed)
        model = get_peft_model(
            _causal_lm(self.setting)[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
        )
        return model.to(self.backbone.device)

    @cached_property
    def whole_rows(self) -> list[dict[str, list[int]]]:
        """The round's examples as transformers' Trainer takes them: prompt and completion, prompt not labelled."""
        rows = []
        for index in self.rows:
            row = self.inputs.tokens[int(index)]
            prompt, completion = row.prompt.tolist(), row.completion.tolist()
            rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        return rows

    def examples(self, position: Position) -> Examples:
        """The round's examples as ours takes them."""
        return replace(self.inputs.examples("train"), rows=self.rows, position=position)

    def trainer(self, side: str, static: bool = False) -> Trainer:
        """A fresh trainer of a side."""
        setting = self.setting
        output = self.folder / f"{setting.precision}-{setting.vocabulary}-{side}"
        if side == "peft":
            arguments = TrainingArguments(
                output_dir=str(output),
                num_train_epochs=1,
                per_device_train_batch_size=setting.batch_size,
                learning_rate=1e-3,
                logging_steps=max(1, len(self.rows) // setting.batch_size // 10),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=self.backbone.device.type == "cpu",
                bf16=setting.precision == "bfloat16",
                seed=setting.seed,
            )
            trainer = Trainer(
                model=self.peft_model, args=arguments, train_dataset=self.whole_rows, data_collator=_padded
            )
            trainer.pop_callback(PrinterCallback)
            return trainer
        position, self.backbone.share_prompts = OURS[side]
        projector = ProjectorConfig(position=position)
        model = E2PModel.from_backbone(
            self.backbone, self.inputs.embeddings.dim, projector, static=static, seed=setting.seed
        )
        examples = self.examples(position)
        few = replace(examples, rows=examples.rows[: setting.batch_size])
        budget = TrainingConfig(epochs=1, batch_size=setting.batch_size, evals_per_epoch=1, seed=setting.seed)
        return E2PTrainer(model, budget, examples, few, output)

    def epoch(self, side: str) -> tuple[float, float]:
        """Wall-clock and processor seconds of one epoch of a side."""
        trainer, clock = self.trainer(side), _Clock()
        trainer.add_callback(clock)
        gc.collect()
        trainer.train()
        return clock.end[0] - clock.start[0], clock.end[1] - clock.start[1]

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Nats per labelled token on both sides, PEFT's virtual token being our static soft token."""
        count = min(len(self.rows), 4 * self.setting.batch_size)
        trainer = self.trainer("before_bos", static=True)
        phi = trainer.model.projector
        phi.w2.weight.zero_()
        phi.w2.bias.copy_(self.peft_model.prompt_encoder["default"].embedding.weight[0])
        ours = trainer.mean_loss(replace(self.examples("before_bos"), rows=self.rows[:count]))
        total, labels = 0.0, 0
        device = self.backbone.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.setting.precision == "bfloat16"):
            for start in range(0, count, self.setting.batch_size):
                rows = self.whole_rows[start : min(start + self.setting.batch_size, count)]
                batch = {key: value.to(device) for key, value in _padded(rows).items()}
                here = int((batch["labels"] >= 0).sum())
                total += float(self.peft_model.eval()(**batch).loss) * here
                labels += here
        return {"peft": total / labels, "e2p": ours, "difference": abs(ours - total / labels)}

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
        self.start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end = _now()


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _table(setting: Setting, rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    """All sides, in turns, then each side's memory in a process of its own."""
    many = _Bench(setting, folder)
    title = f"vocabulary {many.backbone.head.linear.weight.shape[0]:,}, {setting.precision}"
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        took = {side: many.epoch(side) for side in SIDES}
        for side in SIDES if number else ():
            seconds[side].append(took[side])
        console.print(f"{title}: round {number} of {rounds}")
    memory = {side: _in_new_process(setting, side) for side in SIDES}
    sides = {}
    for side in SIDES:
        wall, cpu = ([round(took[kind], 3) for took in seconds[side]] for kind in (0, 1))
        sides[side] = {
            "examples_per_second": round(len(many.rows) / statistics.median(wall), 1),
            "examples_per_cpu_second": round(len(many.rows) / statistics.median(cpu), 1),
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_mib": memory[side],
        }
    ratios = {
        f"{side} to {base}": {
            "speed": _spread([b[0] / a[0] for a, b in zip(seconds[side], seconds[base], strict=True)]),
            "speed_cpu_time": _spread([b[1] / a[1] for a, b in zip(seconds[side], seconds[base], strict=True)]),
            "memory": round(memory[side] / memory[base], 3),
        }
        for side, base in [*((side, "peft") for side in OURS), ("before_completion", "before_completion_whole")]
    }
    console.print(ratios)
    return {
        "vocabulary": int(many.backbone.head.linear.weight.shape[0]),
        "random_weights": bool(setting.vocabulary),
        "precision": setting.precision,
        "data": many.describe(),
        "arithmetic": arithmetic(
            many.backbone,
            [len(row["input_ids"]) for row in many.whole_rows],
            {side: (many.examples(position), shared) for side, (position, shared) in OURS.items()},
            setting.batch_size,
            setting.seed,
        ),
        "sides": sides,
        "ratios": ratios,
        "loss": many.losses(),
    }


def _spread(values: list[float]) -> dict[str, float]:
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def _in_new_process(setting: Setting, side: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_rise, replace(setting, steps=min(setting.steps, _MEMORY_STEPS)), side).result()


def memory_rise(setting: Setting, side: str) -> float:
    """MiB by which memory rises while a side trains, over what the loaded model holds. Once a process."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = _Bench(setting, Path(folder)).trainer(side)
        before = start_memory()
        trainer.train()
        return round((peak_memory() - before) / 2**20, 1)


def _causal_lm(setting: Setting) -> tuple[Any, Any]:
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


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What an ordinary collator makes of a batch: padded on the right, padding masked and not labelled."""

    def column(values: list[list[int]], filler: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=filler)

    return {
        "input_ids": column([row["input_ids"] for row in rows], 0),
        "attention_mask": column([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": column([row["labels"] for row in rows], -100),
    }
