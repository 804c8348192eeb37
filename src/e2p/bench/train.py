"""`e2p bench train`: our training step beside PEFT prompt tuning with one virtual token, on the same examples.

Sides, in alternating rounds (see :mod:`e2p.bench.rounds`): ``peft``: prompt tuning under ``transformers.Trainer`` with
a padding collator; ``before_bos``: ours at the same place; ``before_completion_whole``: ours right before the answer,
everything in one pass; ``before_completion``: the same with the prompt run without gradient, once for all rows that
share it (the default of the library).

That all do the same work is measured too: with PEFT's virtual token as our static one, the mean losses must agree.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from e2p.bench.arithmetic import arithmetic
from e2p.bench.rounds import Bench, Setting, causal_lm, run
from e2p.config import Position

OURS: dict[str, tuple[Position, bool]] = {
    "before_bos": ("before_bos", True),
    "before_completion_whole": ("before_completion", False),
    "before_completion": ("before_completion", True),
}
SIDES = ("peft", *OURS)


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
    setting = Setting(backbone, examples, embeddings, batch_size, steps, seed, attn)
    return run(_Bench, setting, rounds=rounds, vocabulary=vocabulary, precision=precision, output=output)


class _Bench(Bench):
    """Ours beside PEFT's prompt tuning."""

    name, needs = "train", {"peft": "peft"}
    sides = SIDES
    ours: ClassVar[dict[str, tuple[Position, bool]]] = OURS
    pairs = (*((side, "peft") for side in OURS), ("before_completion", "before_completion_whole"))

    @cached_property
    def peft_model(self) -> Any:
        """PEFT's prompt tuning with one virtual token, on weights of its own."""
        from peft import PromptTuningConfig, get_peft_model

        torch.manual_seed(self.setting.seed)
        model = get_peft_model(
            causal_lm(self.setting)[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
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

    def trainer(self, side: str) -> Trainer:
        """A fresh trainer of a side."""
        if side != "peft":
            return self.our_trainer(side)
        arguments = TrainingArguments(**self.their_arguments(side), remove_unused_columns=False)
        trainer = Trainer(model=self.peft_model, args=arguments, train_dataset=self.whole_rows, data_collator=_padded)
        trainer.pop_callback(PrinterCallback)
        return trainer

    def details(self) -> dict[str, Any]:
        """How much arithmetic each side needs, and whether their losses agree."""
        ours = {side: (self.examples(position), shared) for side, (position, shared) in OURS.items()}
        lengths = [len(row["input_ids"]) for row in self.whole_rows]
        return {
            "arithmetic": arithmetic(self.backbone, lengths, ours, self.setting.batch_size, self.setting.seed),
            "loss": self.losses(),
        }

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Nats per labelled token on both sides, PEFT's virtual token being our static soft token."""
        count = min(len(self.rows), 4 * self.setting.batch_size)
        trainer = self.our_trainer("before_bos", static=True)
        self.put_token(trainer, self.peft_model.prompt_encoder["default"].embedding.weight[0])
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


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What an ordinary collator makes of a batch: padded on the right, padding masked and not labelled."""

    def column(values: list[list[int]], filler: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=filler)

    return {
        "input_ids": column([row["input_ids"] for row in rows], 0),
        "attention_mask": column([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": column([row["labels"] for row in rows], -100),
    }
