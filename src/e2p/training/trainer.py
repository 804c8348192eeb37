"""E2PTrainer: transformers' Trainer, told what trains (phi), what a step is, and what is saved."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from e2p.config import ObjectiveConfig, TrainingConfig
from e2p.data.batches import Examples, Step, epoch_steps, steps_per_epoch
from e2p.errors import ConfigError, RunError
from e2p.model.e2p import E2PModel
from e2p.training.criteria import Criterion, Likelihood
from e2p.training.progress import ProgressBar

_PHI = "phi.safetensors"


def trainable(model: E2PModel) -> dict[str, nn.Parameter]:
    """The one predicate of what trains and what a checkpoint holds: phi's parameters and nothing else."""
    return dict(model.projector.named_parameters())


class E2PTrainer(Trainer):
    """Trains phi on a frozen backbone; resume, several processes, callbacks and logging are transformers' own.

    A step's loss is a mean over all its labelled tokens, or over all its rows, however it is cut into passes or spread
    over processes.

    Of a checkpoint we read safetensors and JSON alone. Optimiser, schedule and random state are transformers' files:
    it writes them with ``torch.save`` and reads them with ``torch.load(weights_only=True)`` (5.23), which builds
    tensors and plain values and runs no code. They are read only to resume a run from its own folder.

    Args:
        model: the model; only its projector trains.
        config: the budget.
        train: training examples.
        validation: examples for early stopping and for choosing the best weights.
        output: folder for checkpoints and TensorBoard logs.
        criterion: what is minimised; None: the completions' negative log-likelihood.
        title: what the progress bar is called.
        console: where progress is shown; None shows none.
    """

    def __init__(
        self,
        model: E2PModel,
        config: TrainingConfig,
        train: Examples,
        validation: Examples,
        output: str | Path,
        *,
        criterion: Criterion | None = None,
        title: str = "phi",
        console: Console | None = None,
    ) -> None:
        self.budget, self.train_examples, self.validation_examples = config, train, validation
        self.criterion = criterion or Likelihood(ObjectiveConfig(), train)
        if config.gradient_checkpointing:
            model.backbone.enable_gradient_checkpointing()
        in_epoch = steps_per_epoch(train, config.batch_size)
        total = min(config.max_steps or math.inf, in_epoch * config.epochs)
        # With few steps in all, still as many validations as were asked for.
        every = max(1, min(in_epoch, int(total)) // config.evals_per_epoch)
        arguments = TrainingArguments(
            output_dir=str(output),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=math.ceil(total * config.warmup_ratio),
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
            max_grad_norm=config.max_grad_norm,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=max(1, every // 10),
            logging_nan_inf_filter=False,
            report_to=["tensorboard"] if _has_tensorboard() else [],
            use_cpu=model.backbone.device.type == "cpu",
            seed=config.seed,
            restore_callback_states_from_checkpoint=True,  # a resumed run keeps counting towards its patience
            disable_tqdm=True,
            remove_unused_columns=False,
            # Every phi weight takes part in every pass, and phi has no buffers that change.
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        )
        if arguments.device.type == "cuda" and arguments.device != model.backbone.device:
            raise ConfigError(
                f"backbone.device: training runs on {arguments.device}, got {model.backbone.device}; leave it on auto "
                "and choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for torchrun, not for nn.DataParallel
        self.control: Any = None  # transformers' own, declared for the type checker
        super().__init__(model=model, args=arguments, train_dataset=train, eval_dataset=validation)
        # transformers' own two would print dictionaries into the progress bar.
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
                self.remove_callback(callback)
        self.add_callback(_LogAtCheckpoints())
        if console is not None:
            self.add_callback(ProgressBar(title, console))
        if config.patience:
            self.add_callback(EarlyStoppingCallback(config.patience))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers, except that a run which had come to its end is not trained one step further."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            control: Any = state.stateful_callbacks.get("TrainerControl", {})
            if control.get("args", {}).get("should_training_stop"):
                self.state = state
                best = Path(resume_from_checkpoint).with_name(f"checkpoint-{state.best_global_step}")
                self._load_from_checkpoint(str(best if best.is_dir() else resume_from_checkpoint))
                return TrainOutput(state.global_step, math.nan, {})
        with _without(logging.getLogger("transformers.trainer_utils"), "mtime may not be reliable"):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps of this process; every process computes the same plan, so nothing is dispatched."""
        null_prob = self.model.projector.config.null_prob
        tokens = max(1, self.budget.tokens_per_pass // self.criterion.rows_in_pass)
        budget = replace(self.budget, tokens_per_pass=tokens)
        plans = _Plans(self.criterion.planned, budget, null_prob, self.args.process_index, self.args.world_size)
        return _StepLoader(plans)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on phi alone, weight decay on its matrices alone."""
        parameters = list(trainable(self.model).values())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.budget.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.budget.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimiser step, pass by pass; returns the step's loss."""
        (step,) = inputs
        model.train()
        world = self.args.world_size
        self.criterion.begin(self.model, step, self.budget.tokens_per_pass, self._over_processes)
        total = torch.zeros((), device=self.args.device)
        passes = list(zip(step.passes, step.dropped, strict=True))
        for at, (rows, drop) in enumerate(passes):
            # Gradients are exchanged between processes once a step, not once a pass.
            last = at == len(passes) - 1
            wait = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with wait:
                # DDP averages over processes; the loss is a share of the step's sum, so it is scaled back.
                loss = self.criterion.loss(model, rows, drop, step) * world
                self.accelerator.backward(loss)
            total += loss.detach()
        if not passes:  # fewer examples than processes: exchange zeros so that the others do not wait for ever
            idle = self.train_examples.batch(self.train_examples.rows[:1]).to(self.args.device)
            self.accelerator.backward(model(idle).sum() * 0)
        return total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss, over all processes."""
        metrics = {f"{metric_key_prefix}_loss": self.mean_loss(self.validation_examples)}
        self.log(metrics)
        control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control = control
        return metrics

    def mean_loss(self, examples: Examples, use_prefix: bool = True) -> float:
        """The objective over other examples and all processes; ``use_prefix=False`` is the bare backbone's."""
        rank, world = self.args.process_index, self.args.world_size
        budget = self.budget.tokens_per_pass
        return self.criterion.mean_loss(self.model, examples, budget, use_prefix, rank, world, self._over_processes)

    def _over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in trainable(self.model).items()}
        (folder / _PHI).write_bytes(save(weights))  # save_file's files only their owner may read

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(resume_from_checkpoint) / _PHI
        try:
            self.model.projector.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RunError(
                f"{path}: expected a checkpoint of this run, got: {' '.join(str(error).split())}; "
                "delete its folder to resume from an earlier one"
            ) from None

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


@contextlib.contextmanager
def _without(logger: logging.Logger, words: str) -> Iterator[None]:
    """Hide a message that tells a user nothing: checkpoints are found by their numbers, as they should be."""

    def keep(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _LogAtCheckpoints(TrainerCallback):
    """The mean loss since the last entry is not in a checkpoint, so it is logged before one is written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % state.eval_steps == 0:
            control.should_log = True


class _Plans:
    """The steps of the present epoch; what transformers calls a batch sampler. A batch is one Step."""

    def __init__(self, examples: Examples, config: TrainingConfig, null_prob: float, rank: int, world: int) -> None:
        if config.batch_size < world:
            raise ConfigError(f"training.batch_size: expected at least {world}, the processes, got {config.batch_size}")
        self.examples, self.config, self.null_prob, self.rank, self.world = examples, config, null_prob, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return steps_per_epoch(self.examples, self.config.batch_size)

    def __iter__(self) -> Iterator[list[Step]]:
        config = self.config
        steps: Iterable[Step] = epoch_steps(
            self.examples,
            batch_size=config.batch_size,
            budget=config.tokens_per_pass,
            null_prob=self.null_prob,
            seed=config.seed,
            epoch=self.epoch,
            rank=self.rank,
            world=self.world,
        )
        return ([step] for step in steps)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _Same(Dataset[Step]):
    """Hands a plan through: the data are fetched in the training step, pass by pass."""

    def __getitem__(self, index: Any) -> Step:
        return index


class _StepLoader(DataLoader[Any]):
    def __init__(self, plans: _Plans) -> None:
        self.plans = plans
        super().__init__(_Same(), batch_sampler=plans, collate_fn=_only)

    def set_epoch(self, epoch: int) -> None:
        self.plans.set_epoch(epoch)


def _only(steps: list[Step]) -> list[Step]:
    return steps  # a list, since transformers asks whether "labels" is in a batch


def _has_tensorboard() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
