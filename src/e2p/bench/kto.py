"""`e2p bench kto`: our training on yes/no labels beside TRL's KTOTrainer with PEFT's prompt tuning (one virtual token).

Sides, in alternating rounds (see :mod:`e2p.bench.rounds`): ``trl``: as it comes, the frozen model's likelihoods within
the step; ``trl_precomputed``: with ``precompute_ref_log_probs``; ``before_bos``: ours at the same place;
``before_completion``: ours right before the answer, the prompt run once for all rows that share it (the default of the
library). Both of ours store the frozen model's likelihoods. What is done once, before the first epoch, is no part of an
epoch's time: tokenising, and these likelihoods, whose seconds are written apart.

All sides see the same ids, the same labels and the same mismatched pairs, those of TRL; where TRL would make other ids
of a text, it is given ours, and such rows are counted. That all do the same work is measured too: with PEFT's virtual
token as our static one, the losses of the first batches must agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer

from e2p.bench.rounds import Bench, Setting, causal_lm, now, run
from e2p.config import ObjectiveConfig, Position, TrainingConfig
from e2p.data.batches import Examples, Ints, Step
from e2p.data.tables import example_batches
from e2p.errors import ConfigError
from e2p.model.e2p import E2PModel
from e2p.training.criteria import Criterion, Engagement
from e2p.training.inputs import JoinedTables
from e2p.training.preferences import Preferences, check_labels
from e2p.training.scoring import loglikelihoods
from e2p.training.trainer import E2PTrainer

TRL = ("trl", "trl_precomputed")
OURS: dict[str, tuple[Position, bool]] = {
    "before_bos": ("before_bos", True),
    "before_completion": ("before_completion", True),
}
SIDES = (*TRL, *OURS)
_KTO = ObjectiveConfig(name="kto", balance="none")  # TRL weighs both kinds by 1
_BATCHES = 4  # whose losses are compared
_DRAWS = 16


def bench(
    backbone: str,
    examples: str = "",
    embeddings: str = "",
    precision: Literal["both", "float32", "bfloat16"] = "float32",
    steps: int = 32,
    batch_size: int = 32,
    rounds: int = 5,
    output: str = "bench_kto.json",
    vocabulary: int = 0,
    seed: int = 42,
    attn: str = "sdpa",
) -> dict[str, Any]:
    """Measure examples per second and peak memory of KTO training against TRL's KTOTrainer; asserts no time.

    Args:
        backbone: folder or hub id of a causal LM.
        examples: labelled example table; empty: requests to a small simulated service, each answered with the user's
            own playlist (engaged) or with another user's (not engaged).
        embeddings: embedding table; goes with ``examples``.
        precision: float32, bfloat16 autocast, or first the one and then the other.
        steps: optimiser steps in a round; all rounds see the same examples.
        batch_size: examples per optimiser step of every side, at least 2.
        rounds: measured rounds; one more warms up.
        output: JSON file, also printed as the last line of stdout.
        vocabulary: of a second, random model of the backbone's sizes; 0: measure no such model.
        seed: of the examples' choice and order, and of the weights.
        attn: attention implementation of all sides.

    Returns:
        What is written as JSON.

    Raises:
        ConfigError: a number is out of range, or one of the two tables is missing.
        DataError: the table has no labels, or only one kind of them.
        MissingExtraError: TRL or PEFT is not installed.
    """
    if batch_size == 1:
        raise ConfigError("batch_size: expected at least 2, since kto's baseline z0 needs the others' answers, got 1")
    setting = Setting(backbone, examples, embeddings, batch_size, steps, seed, attn)
    return run(_Bench, setting, rounds=rounds, vocabulary=vocabulary, precision=precision, output=output)


class _Bench(Bench):
    """Ours beside TRL's KTOTrainer."""

    name, needs = "kto", {"trl": "bench", "peft": "bench"}
    sides = SIDES
    ours: ClassVar[dict[str, tuple[Position, bool]]] = OURS
    pairs = tuple((side, base) for base in TRL for side in OURS)
    prepared: Any = None  # TRL's dataset of the round's examples
    rendered_otherwise = 0

    @staticmethod
    def simulated(examples: pl.DataFrame) -> pl.DataFrame:
        """Each user's own answer, engaged, and the one that the next user with the same request got, not engaged."""
        request = pl.col("messages").list.first().struct.field("content")
        others = examples.with_columns(
            completion=pl.col("completion").shift(-1).over(request),
            example_id=pl.col("example_id") + "-no",
            other=pl.col("user_id").shift(-1).over(request),
            label=pl.lit(False),
        ).filter(pl.col("other") != pl.col("user_id"))
        return pl.concat([examples.with_columns(label=pl.lit(True)), others.drop("other")])

    def usable(self, tables: JoinedTables) -> Ints:
        """Training rows of both kinds."""
        check_labels(tables, _KTO, self.setting.examples)
        return np.flatnonzero(tables.split == 0)

    @cached_property
    def seconds(self) -> dict[str, list[tuple[float, float]]]:
        """What the frozen model's likelihoods took, for each trainer made of a side."""
        return defaultdict(list)

    @cached_property
    def other(self) -> Ints:
        """Row whose completion makes the mismatched pair, -1 outside the round's [N]: the one before, as TRL has it."""
        other, size = np.full(len(self.inputs.tokens), -1, np.int64), self.setting.batch_size
        for start in range(0, len(self.rows), size):
            batch = self.rows[start : start + size]
            other[batch] = np.roll(batch, 1)
        return other

    def trainer(self, side: str) -> Trainer:
        """A fresh trainer of a side."""
        return self.trl_trainer(side) if side in TRL else self.our_trainer(side)

    def criterion(self, side: str, model: E2PModel, examples: Examples) -> Criterion:
        """KTO with the frozen model's likelihoods of the round's examples, taken here as TRL takes them in advance."""
        budget, pairs = TrainingConfig().tokens_per_pass, self.other[self.rows]
        own, mixed = (np.zeros(len(self.other), np.float32) for _ in range(2))
        with self.timed(side):
            own[self.rows] = loglikelihoods(model, examples, self.rows, budget, use_prefix=False)
            mixed[self.rows] = loglikelihoods(model, examples, self.rows, budget, completions=pairs, use_prefix=False)
        return Engagement(_KTO, examples, Preferences(self.inputs.labels == 1, self.other, own, mixed))

    @cached_property
    def bare(self) -> tuple[Any, Any]:
        """TRL's weights and tokenizer. Not wrapped: of a wrapped model it takes the adapter for the reference."""
        return causal_lm(self.setting)

    def trl_trainer(self, side: str) -> Any:
        """TRL's, with the bench's budget and the switches that make it fast here."""
        from datasets import Dataset, disable_progress_bars
        from peft import PromptTuningConfig
        from trl import KTOConfig, KTOTrainer

        many = self

        class OnOurIds(KTOTrainer):
            def _prepare_dataset(self, *given: Any) -> Any:
                if many.prepared is None:
                    many.prepared = many.with_our_ids(super()._prepare_dataset(*given))
                return many.prepared

            def _precompute_ref_logps(self, *given: Any) -> Any:
                with many.timed(side):
                    return super()._precompute_ref_logps(*given)

        disable_progress_bars()
        arguments = KTOConfig(
            **self.their_arguments(side),
            beta=_KTO.beta,
            gradient_checkpointing=False,
            max_length=None,  # our ids are cut already
            precompute_ref_log_probs=side == "trl_precomputed",
        )
        model, tokenizer = self.bare
        trainer = OnOurIds(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(self.texts),
            processing_class=tokenizer,
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        )
        trainer.pop_callback(PrinterCallback)
        return trainer

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        """The round's examples as TRL takes them: messages where the backbone reads messages, else plain texts."""
        found: dict[int, dict[str, Any]] = {}
        for frame in example_batches(self.setting.examples):
            for row in frame.filter(pl.col("row").is_in(self.rows.tolist())).iter_rows(named=True):
                prompt, completion = row["messages"] or row["prompt"], row["completion"]
                if isinstance(prompt, str) and self.encoder.plain_as_chat:
                    prompt = [{"role": "user", "content": prompt}]
                if not isinstance(prompt, str):
                    completion = [{"role": "assistant", "content": completion}]
                found[row["row"]] = {"prompt": prompt, "completion": completion, "label": row["label"]}
        return [found[int(row)] for row in self.rows]

    def with_our_ids(self, theirs: Any) -> Any:
        """What TRL has made of the round's texts; with our ids and pairs in their place if any of them differ."""
        ours = []
        for row in self.rows:
            own, mixed = self.inputs.tokens[int(row)], self.inputs.tokens[int(self.other[row])]
            prompt, completion, other = (ids.tolist() for ids in (own.prompt, own.completion, mixed.completion))
            ids = {"prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other}
            ours.append({**ids, "label": bool(self.inputs.labels[row])})
        differ = [any(row[key] != wanted[key] for key in wanted) for row, wanted in zip(theirs, ours, strict=True)]
        self.rendered_otherwise = sum(differ)
        return type(theirs).from_list(ours) if any(differ) else theirs

    @contextmanager
    def timed(self, side: str) -> Iterator[None]:
        """Add what is done here to the seconds of a side."""
        start = now()
        yield
        end = now()
        self.seconds[side].append((end[0] - start[0], end[1] - start[1]))

    def side_details(self, side: str, rounds: int) -> dict[str, Any]:
        """Seconds of the frozen model's likelihoods in each measured round, where they are taken in advance."""
        took = self.seconds[side][1 : rounds + 1]
        wall, cpu = ([round(each[which], 3) for each in took] for which in (0, 1))
        return {"reference_seconds": wall, "reference_cpu_seconds": cpu}

    def describe(self) -> dict[str, Any]:
        """With the labels, and the rows (their own ids or their pair's) that TRL would have rendered otherwise."""
        engaged = int((self.inputs.labels[self.rows] == 1).sum())
        return super().describe() | {"engaged": engaged, "rendered_otherwise_by_trl": self.rendered_otherwise}

    def details(self) -> dict[str, Any]:
        """Whether the losses agree."""
        return {"loss": self.losses()}

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean KTO loss of some batches on both sides, PEFT's virtual token being our static soft token.

        ``difference`` is the largest of a batch; ``baseline`` is our mean z0, which is part of both losses.
        """
        size, budget = self.setting.batch_size, TrainingConfig().tokens_per_pass
        theirs, ours = self.trl_trainer("trl"), self.our_trainer("before_bos", static=True)
        criterion = ours.criterion
        assert isinstance(criterion, Engagement)
        theirs.model.eval()
        virtual = theirs.model.prompt_encoder["default"].embedding.weight
        virtual.copy_(self.telling_token(ours)[None])
        found = []
        for start in range(0, min(len(self.rows), _BATCHES * size), size):
            rows, drop = self.rows[start : start + size], np.zeros(size, bool)
            batch = theirs.data_collator([theirs.train_dataset[start + at] for at in range(size)])
            with theirs.accelerator.autocast():
                expected = float(theirs.compute_loss(theirs.model, batch))
            step = Step([rows], [drop], ours.train_examples.label_tokens(rows), size, 0)
            criterion.begin(ours.model, step, budget, lambda values: values)
            loss = float(criterion.loss(ours.model, rows, drop, step))
            found.append((expected, loss, abs(expected - loss), float(criterion.baseline)))
        trl, e2p, difference, baseline = zip(*found, strict=True)
        return {
            "trl": float(np.mean(trl)),
            "e2p": float(np.mean(e2p)),
            "difference": max(difference),
            "baseline": float(np.mean(baseline)),
        }

    def telling_token(self, trainer: E2PTrainer) -> Tensor:
        """Of some random tokens [H] the one under which the first batch's mismatched answers gain most, put in place.

        Under most tokens they get less likely, the baseline z0 is 0, and losses without it would agree as well.
        """
        model, examples, rows = trainer.model, trainer.train_examples, self.rows[: self.setting.batch_size]
        budget, pairs = TrainingConfig().tokens_per_pass, self.other[rows]

        def gain(token: Tensor) -> float:
            self.put_token(trainer, token)
            return float(loglikelihoods(model, examples, rows, budget, completions=pairs).mean())

        random = torch.Generator().manual_seed(self.setting.seed)
        token = max(torch.randn(_DRAWS, self.backbone.hidden_size, generator=random), key=gain)
        self.put_token(trainer, token)
        return token
