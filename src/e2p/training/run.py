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

import numpy as np
import torch
from rich.console import Console

from e2p.config import RunConfig
from e2p.config_io import load_yaml, save_yaml, to_dict
from e2p.data.batches import Examples, Ints, steps_per_epoch
from e2p.data.sources import cache_root
from e2p.data.splits import SPLITS
from e2p.data.templates import TextEncoder
from e2p.data.tokenised import ProfiledInPart, TokenisedExamples, tokenise
from e2p.errors import ConfigError, RunError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import provenance
from e2p.training.criteria import Criterion, Engagement, Hits, Likelihood
from e2p.training.inputs import RunInputs, deal, join_tables, load_inputs, strangers
from e2p.training.preferences import check_labels, load_preferences, mismatched_rows
from e2p.training.trainer import E2PTrainer, trainable

TRAINED_ARMS = ("e2p", "static", "shuffled")
INPUTS = "inputs.json"
# What a run folder may hold. A folder with anything else in it is not ours to replace.
RUN_FILES = frozenset(
    {
        *("config.yaml", INPUTS, "training.json", ".training.json", "adapter", "checkpoints", "controls"),
        *("scores.parquet", "answers.parquet", "recommended.parquet", "scored.json", ".scored.json", "seeds"),
        *("results.json", ".results.json", "report.html", "report.md", "figures"),
        *("space.parquet", "covariates.parquet", "tables.tex", "comparisons.csv", "arms.csv"),
    }
)


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
    tables = join_tables(config.data)  # before the backbone, which may take minutes
    check_labels(tables, config.objective, config.data.examples)
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    encoder = text_encoder(backbone, config.data, config.projector.prefix_tokens)
    inputs = load_inputs(config.data, encoder, config.projector.position, tables)
    if config.objective.distill or config.training.profile_share:
        _profiled(config, encoder)
    if config.objective.name == "kto":
        mismatched_rows(inputs, config.data.split.seed)
    if first:  # only now: a bad input must not leave an empty run
        prepare_folder(config, overwrite, resume)
    if console is not None:
        _say_counts(console, inputs)
    try:
        # The other processes meet the first one in the trainer, before any of them looks for a checkpoint.
        _, record = train_arm(config, backbone, inputs, "e2p", folder, console, resume)
    except Exception:
        if console is not None and overwrite:
            restore_replaced(folder)
            if replaced(folder).exists():
                console.print(f"the run that was to be overwritten is kept in {replaced(folder)}")
        raise
    if first and overwrite:
        shutil.rmtree(replaced(folder), ignore_errors=True)
    if console is not None:
        console.print(f"adapter: {folder / 'adapter'}   next: e2p evaluate {folder}")
        if is_useless(record["validation"]):
            warn_useless(console, record["validation"])


def _say_counts(console: Console, inputs: RunInputs) -> None:
    """What was read, and what of it was dropped, cut, or cannot be judged later."""
    counts = inputs.counts
    parts = ", ".join(f"{part} {counts[part]:,} ({counts[f'{part}_users']:,} users)" for part in SPLITS)
    other = [
        f"{name.replace('_', ' ')}: {n:,}" for name, n in counts.items() if "_" in name and "users" not in name and n
    ]
    console.print(f"examples: {'; '.join([parts, *other])}", highlight=False)
    if counts["test_users"] < 2:
        console.print("[yellow]One test user: e2p evaluate needs two at least. Change data.split or add users.[/]")


def is_first_process() -> bool:
    """Whether this process writes and speaks; true unless torchrun has started several."""
    return int(os.environ.get("RANK", "0")) == 0


def is_useless(validation: dict[str, Any]) -> bool:
    """Whether the prefix is no better than none on validation data; a loss that is not a number is not better."""
    return not float(validation["prefix"]) < float(validation["none"])


def warn_useless(console: Console, validation: dict[str, Any]) -> None:
    """Say loudly that the prefix does not help: a projector can hurt."""
    console.rule("[bold red]THE PREFIX IS WORSE THAN NO PREFIX[/]", style="red")
    console.print(
        f"[bold red]Validation loss is {validation['prefix']:.4f} {validation.get('unit', '')} with the prefix and "
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
            names = ", ".join(_other_settings(to_dict(load_yaml(folder / "config.yaml")), to_dict(config)))
            raise RunError(
                f"{folder}: the settings differ from those in its config.yaml ({names}); resume with the same"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            unfinished = (folder / INPUTS).is_file() and not (folder / "adapter").is_dir()
            go_on = "go on with --resume, or " if unfinished else ""
            raise RunError(
                f"{folder}: expected a new run folder, found one; {go_on}pass --overwrite or another --output"
            )
        _require_run(folder)
        if replaced(folder).exists():  # from an overwriting that failed, or it bears that name by chance
            _require_run(replaced(folder))
    return folder


def _require_run(folder: Path) -> None:
    """Refuse to overwrite what holds anything that a run does not."""
    if not folder.is_dir():
        raise RunError(f"{folder}: is a file and will not be overwritten; name another --output")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES)
    if foreign or not (folder / "config.yaml").is_file():
        what = f"holds '{foreign[0]}'" if foreign else "holds no config.yaml"
        raise RunError(f"{folder}: {what}, so it is no run folder and will not be overwritten; name another --output")


def _other_settings(one: dict[str, Any], other: dict[str, Any], above: str = "") -> list[str]:
    """Dotted names of the settings in which two runs differ."""
    found: list[str] = []
    for key, value in one.items():
        if isinstance(value, dict):
            found += _other_settings(value, other[key], f"{above}{key}.")
        elif value != other[key]:
            found.append(above + key)
    return found


def prepare_folder(config: RunConfig, overwrite: bool, resume: bool) -> Path:
    """Make the run folder, in place of an earlier one if asked to, and write the resolved settings into it.

    The earlier run is set aside (see :func:`replaced`) until the new one is trained.

    Raises:
        RunError: as :func:`check_folder`, or the folder cannot be written.
    """
    folder = check_folder(config, overwrite, resume)
    if resume:
        return folder
    try:
        if folder.exists() and any(folder.iterdir()):
            if (folder / "adapter").is_dir() or not replaced(folder).exists():
                shutil.rmtree(replaced(folder), ignore_errors=True)
                folder.rename(replaced(folder))
            else:  # a run that came to nothing, in the place of the one that is set aside already
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; name another --output") from None
    return folder


def replaced(folder: Path) -> Path:
    """Where an overwritten run is kept until the one in its place has an adapter."""
    return folder.with_name(f"{folder.name}.replaced")


def restore_replaced(folder: Path) -> None:
    """Put an overwritten run back, if the one in its place failed before its first checkpoint."""
    if replaced(folder).exists() and not list(folder.glob("checkpoints/checkpoint-*")):
        shutil.rmtree(folder)
        replaced(folder).rename(folder)


def check_inputs(folder: Path, arm: str, inputs: RunInputs) -> None:
    """Make sure that the inputs are those that an arm was trained on.

    Raises:
        RunError: the tables have changed, so that a training user may have become a test user, or vectors differ.
    """
    path = arm_folder(folder, arm) / INPUTS
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected the hashes of the run's inputs, got: {error}; train again") from None
    parts = ("examples", "split") if arm == "static" else ("examples", "split", "vectors")  # static sees no vectors
    here = inputs.identity()
    differs = [part for part in parts if trained.get(part) != here[part]]
    if differs:
        raise RunError(
            f"{arm_folder(folder, arm)}: expected the tables that it was trained on, got other "
            f"{' and '.join(differs)}; put the tables back, or train again with --overwrite"
        )


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
    model.objective = to_dict(config.objective)
    vectors = shuffled_rows(inputs, budget.seed) if arm == "shuffled" else None
    both = config.objective.labelled
    rows = {part: inputs.all_rows(part) if both else inputs.rows(part) for part in ("train", "validation")}
    tokens = _tokens(config, inputs, model.encoder)
    examples = inputs.examples("train", vector_rows=vectors, rows=rows["train"], tokens=tokens)
    trainer = E2PTrainer(
        model,
        budget,
        examples,
        inputs.examples("validation", vector_rows=vectors, rows=rows["validation"], tokens=tokens),
        target / "checkpoints",
        criterion=_criterion(config, inputs, arm, model, examples, console),
        title=arm,
        console=console,
    )
    checkpoint = newest_checkpoint(target / "checkpoints") if resume else None
    if checkpoint:
        check_inputs(folder, arm, inputs)
    elif trainer.is_world_process_zero():
        target.mkdir(parents=True, exist_ok=True)
        (target / INPUTS).write_text(json.dumps(inputs.identity(), indent=1) + "\n", encoding="utf-8")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    prefix = trainer.mean_loss(trainer.validation_examples)
    if not math.isfinite(prefix):
        raise RunError(
            f"{target}: the training diverged: validation loss {prefix}; no adapter was written. Lower "
            "training.learning_rate and train again with --overwrite"
        )
    none = trainer.mean_loss(trainer.validation_examples, use_prefix=False)
    best = trainer.state.best_global_step
    # Of the shorter last step of an epoch as well.
    rows_a_step = len(trainer.train_examples) / steps_per_epoch(trainer.train_examples, budget.batch_size)
    record = {
        "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in trainable(model).values()),
        # Of a resumed run: since then.
        "seconds": round(seconds, 1),
        "examples_per_second": round(
            (trainer.state.global_step - _step_of(checkpoint)) * rows_a_step / max(seconds, 1e-9), 1
        ),
        "best_step": best,
        "history": _history(trainer.state.log_history),
        "validation": {"prefix": prefix, "none": none, "unit": trainer.criterion.unit},
        "provenance": provenance(),
    }
    model.metrics = {
        f"validation {trainer.criterion.unit}": round(prefix, 4),
        "the same without prefix": round(none, 4),
    }
    if trainer.is_world_process_zero():
        # The adapter last: where it is, the run is finished.
        half = target / ".training.json"
        half.write_text(json.dumps(record, indent=1), encoding="utf-8")
        half.replace(target / "training.json")
        model.save_pretrained(target / "adapter", overwrite=True)
    trainer.accelerator.wait_for_everyone()
    return model, record


def _criterion(
    config: RunConfig, inputs: RunInputs, arm: str, model: E2PModel, examples: Examples, console: Console | None
) -> Criterion:
    settings, seed = config.objective, config.training.seed
    if settings.name == "hits":
        return Hits(settings, examples)
    if settings.labelled:
        pairs, budget = config.data.split.seed, config.training.tokens_per_pass
        return Engagement(settings, examples, load_preferences(inputs, model, settings, pairs, budget, console))
    return Likelihood(
        # Nobody is a stranger to soft tokens that do not depend on the user.
        replace(settings, contrast=0.0) if arm == "static" else settings,
        examples,
        strangers=lambda epoch: strangers(inputs, inputs.rows("train"), [seed, 5, epoch]),
        teacher=_profiled(config, model.encoder) if settings.distill else None,
    )


def _tokens(config: RunConfig, inputs: RunInputs, encoder: TextEncoder) -> TokenisedExamples:
    """What is trained and validated on: the run's examples, some of them with the profile text."""
    share = config.training.profile_share
    if not share:
        return inputs.tokens
    shown = np.random.default_rng([config.training.seed, 12]).random(len(inputs.tokens)) < share
    return ProfiledInPart(inputs.tokens, _profiled(config, encoder), shown)


def _profiled(config: RunConfig, encoder: TextEncoder) -> TokenisedExamples:
    """The run's examples with the profile text in the prompt."""
    return tokenise(config.data.examples, encoder, cache_root(config.data.cache_dir), with_profile=True)


def shuffled_rows(inputs: RunInputs, seed: int) -> Ints:
    """Vector rows dealt out anew among the users: each user gets one other user's vectors, nobody his own.

    A control trained on these shows what phi can learn without any user signal. Test users are dealt among themselves:
    whoever stands in training too must not be known again by the stranger's vector that he had there.

    Raises:
        DataError: fewer than two users have a vector, in test or outside.
    """
    rows, test = inputs.vector_rows.copy(), inputs.all_rows("test")
    for part in (np.setdiff1d(np.arange(len(rows)), test), test):
        rows[part] = deal(inputs, part, [seed, 2])[part]
    return rows


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


def _step_of(checkpoint: str | None) -> int:
    return int(Path(checkpoint).name.removeprefix("checkpoint-")) if checkpoint else 0


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keep = ("step", "loss", "learning_rate", "eval_loss")
    return [{k: entry[k] for k in keep if k in entry} for entry in log if "loss" in entry or "eval_loss" in entry]


def with_seed(config: RunConfig, seed: int, output: str) -> RunConfig:
    """The same run with another training seed and folder; the split stays."""
    return replace(config, training=replace(config.training, seed=seed), output=output)
