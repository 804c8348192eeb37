"""The training of `e2p adapt`: transformers' Trainer on rows of codes, all weights or LoRA."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from e2p.config import Precision
from e2p.errors import ConfigError, MissingExtraError, RunError
from e2p.items.semantic_ids import SemanticIds


@dataclass(frozen=True)
class AdaptSettings:
    """How a backbone learns codes; what each setting does stands at :func:`adapt`.

    Raises:
        ConfigError: a setting is out of range.
    """

    method: Literal["full", "lora"] = "full"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_ratio: float = 0.05
    patience: int = 2
    history: bool = True
    profile_share: float = 0.5
    lora_rank: int = 16
    max_prompt_tokens: int = 512
    long_prompt: Literal["error", "truncate"] = "error"
    chat: Literal["auto", "always", "never"] = "auto"
    profile_template: str = "About the user: {profile}"
    precision: Precision = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("epochs", self.epochs >= 1, "a whole number >= 1"),
            ("batch_size", self.batch_size >= 1, "a whole number >= 1"),
            ("learning_rate", self.learning_rate > 0, "a number > 0"),
            ("weight_decay", self.weight_decay >= 0, "a number >= 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "a number in [0, 1)"),
            ("patience", self.patience >= 0, "a whole number >= 0"),
            ("profile_share", 0 <= self.profile_share <= 1, "a number in [0, 1]"),
            ("lora_rank", self.lora_rank >= 1, "a whole number >= 1"),
            ("max_prompt_tokens", self.max_prompt_tokens >= 1, "a whole number >= 1"),
            ("profile_template", "{profile}" in self.profile_template, "a text that contains {profile}"),
        ):
            if not ok:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class CodeRow:
    """One example: ids of prompt and completion, which of them are labels (-100: none), whether the prompt was cut."""

    ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def labelled(self) -> int:
        return sum(label >= 0 for label in self.labels)


def train(
    model: Any,
    tokenizer: Any,
    ids: SemanticIds,
    rows: dict[str, list[CodeRow]],
    settings: AdaptSettings,
    checkpoints: Path,
    console: Console | None,
    resume: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The adapted model, LoRA merged, and the record of its training. Resume and the rest are transformers' Trainer's.

    Checkpoints hold transformers' own files (see :class:`e2p.training.trainer.E2PTrainer`); they are read only to
    resume an adaptation from its own folder, and deleted at its end.
    """
    import torch
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    from e2p.device import resolve_device
    from e2p.model.precision import autocast_dtype
    from e2p.training.progress import ProgressBar
    from e2p.training.run import newest_checkpoint

    if settings.method == "lora":
        model = _with_lora(model, tokenizer, ids, settings)
    steps = -(-len(rows["train"]) // settings.batch_size) * settings.epochs
    device = resolve_device("auto", "device")
    cast = autocast_dtype(settings.precision, torch.device(device), torch.float32)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=round(steps * settings.warmup_ratio),
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, steps // settings.epochs // 10),
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        prediction_loss_only=True,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        use_cpu=device == "cpu",
        bf16=cast is not None,
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows["train"]),
        eval_dataset=_Rows(rows["validation"]),
        data_collator=_Padded(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
    )
    for callback in list(trainer.callback_handler.callbacks):  # they would print dictionaries into the bar
        if type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
            trainer.remove_callback(callback)
    if console is not None:
        trainer.add_callback(ProgressBar("adapt", console))
    if settings.patience:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    started = newest_checkpoint(checkpoints) if resume else None
    before = None if started else trainer.evaluate()["eval_loss"]
    if before is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / "before.json").write_text(json.dumps(before), encoding="utf-8")
    trainer.train(resume_from_checkpoint=started)
    after = trainer.evaluate()["eval_loss"]
    if not math.isfinite(after):
        raise RunError(
            f"{checkpoints.parent}: the training diverged: validation loss {after}; no checkpoint was written. Lower "
            "learning_rate and adapt again with --overwrite"
        )
    history = [
        {key: entry[key] for key in ("epoch", "step", "loss", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    best = next((e["epoch"] for e in history if e["step"] == trainer.state.best_global_step and "eval_loss" in e), 0)
    record = {
        "steps": trainer.state.global_step,
        "best_epoch": best,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation": {"before": json.loads((checkpoints / "before.json").read_text("utf-8")), "after": after},
        "history": history,
    }
    return (model.merge_and_unload() if settings.method == "lora" else model).eval(), record


def _with_lora(model: Any, tokenizer: Any, ids: SemanticIds, settings: AdaptSettings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("peft", "peft", "adapt with method lora") from None
    import torch

    codes = sorted(tokenizer.convert_tokens_to_ids(ids.token_names()))
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    head = [] if output.weight is embeddings.weight else [output]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank,
                target_modules="all-linear",
                # Of the embeddings, those of the codes alone, and of the head; where it is tied to them it follows.
                trainable_token_indices={_name(model, table): codes for table in (embeddings, *head)},
            ),
        )


def _name(model: Any, module: Any) -> str:
    return next(name for name, other in model.named_modules() if other is module)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what tells a user nothing: bars for each file that is written, that a tied head is not stored twice, that
    PEFT stores resized embeddings whole."""
    from transformers.utils import logging as theirs

    def keep(record: logging.LogRecord) -> bool:
        return "missing keys" not in record.getMessage()

    logger, shown = logging.getLogger("transformers.trainer"), theirs.is_progress_bar_enabled()
    logger.addFilter(keep)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
            yield
    finally:
        logger.removeFilter(keep)
        if shown:
            theirs.enable_progress_bar()


class _Rows:
    """Examples as transformers' Trainer takes them."""

    def __init__(self, rows: Sequence[CodeRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row.ids, "labels": row.labels, "length": len(row.ids)}


class _Padded:
    """A batch, padded on the right."""

    def __init__(self, filler: int) -> None:
        self.filler = filler

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)

        def column(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*value, *[filler] * (width - len(value))] for value in values])

        return {
            "input_ids": column([row["input_ids"] for row in rows], self.filler),
            "attention_mask": column([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": column([row["labels"] for row in rows], -100),
        }
