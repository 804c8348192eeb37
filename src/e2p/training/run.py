"""`e2p train`: from tables to an adapter in a run folder. The same function trains the controls."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from e2p.config import RunConfig, load_yaml, save_yaml
from e2p.data.batches import Ints
from e2p.errors import ConfigError, RunError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import provenance
from e2p.training.inputs import RunInputs, deal, load_inputs
from e2p.training.trainer import E2PTrainer, trainable

TRAINED_ARMS = ("e2p", "static", "shuffled")


def train(config: RunConfig, overwrite: bool = False, resume: bool = False) -> None:
    """Train phi on your tables and write the adapter into the run folder.

    Args:
        config: the run's settings.
        overwrite: replace a run folder that exists.
        resume: go on from the newest checkpoint of an interrupted run; losses are those of a run without a break.
    """
    folder, first = Path(config.output), is_first_process()
    console = Console(stderr=True) if first else None
    if first:
        check_folder(config, overwrite, resume)
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    inputs = load_inputs(
        config.data, text_encoder(backbone, config.data, config.projector.prefix_tokens), config.projector.position
    )
    if first:  # only now: a bad input must not cost an earlier run, nor leave an empty one
        prepare_folder(config, overwrite, resume)
    # The other processes meet the first one in the trainer, before any of them looks for a checkpoint.
    _, record = train_arm(config, backbone, inputs, "e2p", folder, console, resume)
    if console is not None:
        console.print(f"adapter: {folder / 'adapter'}   next: e2p evaluate {folder}")
        if is_useless(record["validation"]):
            warn_useless(console, record["validation"])


def is_first_process() -> bool:
    """Whether this process writes and speaks; true unless torchrun has started several."""
    return int(os.environ.get("RANK", "0")) == 0


def is_useless(validation: dict[str, float]) -> bool:
    """Whether the prefix is no better than none on validation data; a loss that is not a number is not better."""
    return not validation["prefix"] < validation["none"]


def warn_useless(console: Console, validation: dict[str, float]) -> None:
    """Say loudly that the prefix does not help: a projector can hurt."""
    console.rule("[bold red]THE PREFIX IS WORSE THAN NO PREFIX[/]", style="red")
    console.print(
        f"[bold red]Validation loss is {validation['prefix']:.4f} nats per token with the prefix and "
        f"{validation['none']:.4f} without it.[/] Do not serve this adapter. Try a higher or lower "
        "training.learning_rate, more epochs, or another projector.position."
    )
    console.rule(style="red")


def check_folder(config: RunConfig, overwrite: bool, resume: bool) -> Path:
    """The run folder, if this run may have it; nothing is touched.

    Raises:
        RunError: the folder holds something and neither ``overwrite`` nor ``resume`` is set, or there is nothing to
            resume, or the settings are not those of the run to resume.
    """
    folder = Path(config.output)
    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite deletes it; choose one")
    if resume:
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: expected an interrupted run to resume, found none; leave out --resume")
        if load_yaml(folder / "config.yaml") != config:
            raise RunError(f"{folder}: the settings differ from those in its config.yaml; resume with the same ones")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise RunError(f"{folder}: expected a new run folder, found one; pass --overwrite or another --output")
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: holds no config.yaml, so it is no run folder and will not be overwritten")
    return folder


def prepare_folder(config: RunConfig, overwrite: bool, resume: bool) -> Path:
    """Make the run folder, in place of an earlier one if asked to, and write the resolved settings into it.

    Raises:
        RunError: as :func:`check_folder`, or the folder cannot be written.
    """
    folder = check_folder(config, overwrite, resume)
    if resume:
        return folder
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        save_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; name another --output") from None
    return folder


def arm_folder(folder: Path, arm: str) -> Path:
    """Where a trained arm lives: the run folder itself for e2p, ``controls/<arm>`` for the controls."""
    return folder if arm == "e2p" else folder / "controls" / arm


def train_arm(
    config: RunConfig,
    backbone: FrozenBackbone,
    inputs: RunInputs,
    arm: str,
    folder: Path,
    console: Console | None,
    resume: bool = False,
) -> tuple[E2PModel, dict[str, Any]]:
    """Train one arm with the run's budget; returns the model with its best weights, and the record of the training.

    ``e2p`` is phi on the users' own vectors, ``static`` soft tokens that do not depend on the user, ``shuffled`` phi on
    vectors that were dealt out anew among the users. Adapter and record are written to the arm's folder.
    """
    if arm not in TRAINED_ARMS:
        raise ConfigError(f"arm: expected one of {', '.join(TRAINED_ARMS)}, got {arm!r}")
    target = arm_folder(folder, arm)
    budget = config.training
    model = E2PModel.from_backbone(
        backbone, inputs.embeddings.dim, config.projector, data=config.data, static=arm == "static", seed=budget.seed
    )
    model.embedding_versions = inputs.embeddings.versions
    model.projector.fit_input(torch.from_numpy(inputs.train_vectors()).to(backbone.device))
    vectors = shuffled_rows(inputs, budget.seed) if arm == "shuffled" else None
    trainer = E2PTrainer(
        model,
        budget,
        inputs.examples("train", vector_rows=vectors),
        inputs.examples("validation", vector_rows=vectors),
        target / "checkpoints",
        title=arm,
        console=console,
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=newest_checkpoint(target / "checkpoints") if resume else None)
    seconds = time.monotonic() - started
    prefix = trainer.mean_loss(trainer.validation_examples)
    if not math.isfinite(prefix):
        raise RunError(
            f"{target}: the training diverged: validation loss {prefix}; no adapter was written. Lower "
            "training.learning_rate and train again with --overwrite"
        )
    none = trainer.mean_loss(trainer.validation_examples, use_prefix=False)
    best = trainer.state.best_global_step
    record = {
        "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in trainable(model).values()),
        "seconds": round(seconds, 1),
        "examples_per_second": round(_examples_seen(trainer, inputs) / max(seconds, 1e-9), 1),
        "best_step": best,
        "history": _history(trainer.state.log_history),
        "validation": {"prefix": prefix, "none": none},
        "provenance": provenance(),
    }
    model.metrics = {"validation nats per token": round(prefix, 4), "the same without prefix": round(none, 4)}
    if trainer.is_world_process_zero():
        model.save_pretrained(target / "adapter", overwrite=True)
        (target / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return model, record


def shuffled_rows(inputs: RunInputs, seed: int) -> Ints:
    """Vector rows dealt out anew among the users: each user gets one other user's vectors, nobody his own.

    A control trained on these shows what phi can learn without any user signal. A user's examples share one vector
    of the other user, whatever their times.
    """
    return deal(inputs.keys["user_id"].to_numpy(), inputs.vector_rows, [seed, 2])


def newest_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill has cut short is passed over."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the last file of a checkpoint
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _examples_seen(trainer: E2PTrainer, inputs: RunInputs) -> int:
    return min(
        trainer.state.global_step * trainer.budget.batch_size,
        math.ceil((trainer.state.epoch or 0) * len(trainer.train_examples)),
    )


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keep = ("step", "loss", "learning_rate", "eval_loss")
    return [{k: entry[k] for k in keep if k in entry} for entry in log if "loss" in entry or "eval_loss" in entry]


def with_seed(config: RunConfig, seed: int, output: str) -> RunConfig:
    """The same run with another training seed and folder; the split stays."""
    return replace(config, training=replace(config.training, seed=seed), output=output)
