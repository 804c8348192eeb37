"""What the trainer minimises: how a step's loss comes about, pass by pass, and what validation measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from e2p.config import ObjectiveConfig
from e2p.data.batches import Examples, Ints, Step
from e2p.data.tokenised import TokenisedExamples
from e2p.model.e2p import E2PModel
from e2p.training.objectives import (
    contrastive_loss,
    distillation_loss,
    engagement_losses,
    kl_baseline,
    kto_losses,
    lm_loss,
    miss_losses,
)
from e2p.training.preferences import Preferences
from e2p.training.scoring import loglikelihoods, per_completion, score_batches

Sum = Callable[[Tensor], Tensor]  # over all processes


@runtime_checkable
class Criterion(Protocol):
    """One objective.

    Args:
        unit: what its loss is counted in.
        planned: the examples that passes are cut by.
        rows_in_pass: how often every row of a pass stands in it.
    """

    unit: str
    planned: Examples
    rows_in_pass: int

    def begin(self, model: E2PModel, step: Step, budget: int, over_processes: Sum) -> None:
        """What a step needs to know before its first pass."""

    def loss(self, model: nn.Module, rows: Ints, drop: npt.NDArray[np.bool_], step: Step) -> Tensor:
        """A pass's share of the step's loss, with its gradient."""

    def mean_loss(
        self, model: E2PModel, examples: Examples, budget: int, use_prefix: bool, rank: int, world: int, sums: Sum
    ) -> float:
        """The loss over other examples, without gradient; ``use_prefix=False`` is the bare backbone's."""


class Likelihood:
    """The completion's log-likelihood (paper, Eq. 4), with the contrastive or the distilling term.

    Args:
        settings: weights of the two terms.
        examples: what is trained on.
        strangers: epoch -> row of another user's vector for every example of the table [N], -1 without one; for the
            contrastive term.
        teacher: the same table with the profile texts in the prompts, for the distilling term.
    """

    unit = "nats per token"

    def __init__(
        self,
        settings: ObjectiveConfig,
        examples: Examples,
        strangers: Callable[[int], Ints] | None = None,
        teacher: TokenisedExamples | None = None,
    ) -> None:
        self.settings, self.examples, self.strangers = settings, examples, strangers
        self.teacher = None if teacher is None else replace(examples, tokens=teacher)
        self.planned = self.teacher or examples  # a teacher's rows hold the profile too
        self.rows_in_pass = 2 if settings.contrast else 1
        self._drawn: tuple[int, Ints] | None = None

    def begin(self, model: E2PModel, step: Step, budget: int, over_processes: Sum) -> None:
        """Nothing."""

    def loss(self, model: nn.Module, rows: Ints, drop: npt.NDArray[np.bool_], step: Step) -> Tensor:
        """Nats per token of the whole step."""
        weights, device, own = self.settings, _device(model), self.examples.vector_rows[rows]
        if weights.distill:
            assert self.teacher is not None
            batch, teacher = self.examples.batch(rows, drop), self.teacher.batch(rows)
            logprobs, divergence = model(batch.to(device), teacher=teacher.to(device))
            distilled = weights.distill * distillation_loss(divergence, step.label_tokens)
            return lm_loss(logprobs, step.label_tokens) + distilled
        if not weights.contrast:
            return lm_loss(model(self.examples.batch(rows, drop).to(device)), step.label_tokens)
        others = self._strangers_of(step.epoch)[rows]
        facing = ~drop & (own >= 0) & (others >= 0)  # the null user has no strangers
        batch = self.examples.batch(
            np.concatenate([rows, rows[facing]]),
            np.concatenate([drop, drop[facing]]),
            np.concatenate([own, others[facing]]),
        ).to(device)
        lengths, marked = batch.completion_lengths, torch.from_numpy(facing).to(device)
        first, second = model(batch).tensor_split([int(lengths[: len(rows)].sum())])
        faced = first[marked.repeat_interleave(lengths[: len(rows)])]
        contrast = contrastive_loss(faced, second, lengths[len(rows) :], weights.contrast_margin, step.label_tokens)
        return lm_loss(first, step.label_tokens) + weights.contrast * contrast

    def _strangers_of(self, epoch: int) -> Ints:
        """Drawn once an epoch, and again by a resumed run."""
        if self._drawn is None or self._drawn[0] != epoch:
            assert self.strangers is not None
            self._drawn = epoch, self.strangers(epoch)
        return self._drawn[1]

    def mean_loss(
        self, model: E2PModel, examples: Examples, budget: int, use_prefix: bool, rank: int, world: int, sums: Sum
    ) -> float:
        """Mean negative log-likelihood per labelled token."""
        total = torch.zeros(2, dtype=torch.float64, device=model.backbone.device)
        for _, logprobs in score_batches(model, examples, budget, use_prefix, rank, world):
            total += torch.tensor([-float(logprobs.double().sum()), len(logprobs)], device=total.device)
        nats, tokens = sums(total).tolist()
        return nats / tokens


class Hits:
    """How often draws hold the completion; what is minimised is how often none does. Validation measures that alone.

    Args:
        settings: the number of draws, and the weight of the negative log-likelihood beside it.
        examples: what is trained on.
    """

    rows_in_pass = 1

    def __init__(self, settings: ObjectiveConfig, examples: Examples) -> None:
        self.settings, self.examples, self.planned = settings, examples, examples
        self.unit = f"misses in {settings.draws} draws"

    def begin(self, model: E2PModel, step: Step, budget: int, over_processes: Sum) -> None:
        """Nothing."""

    def loss(self, model: nn.Module, rows: Ints, drop: npt.NDArray[np.bool_], step: Step) -> Tensor:
        """Mean over the rows of the whole step."""
        batch = self.examples.batch(rows, drop).to(_device(model))
        found = per_completion(model(batch), batch.completion_lengths)
        losses = miss_losses(found, self.settings.draws)
        if self.settings.likelihood:
            losses = losses - self.settings.likelihood * found / batch.completion_lengths
        return losses.sum() / step.examples

    def mean_loss(
        self, model: E2PModel, examples: Examples, budget: int, use_prefix: bool, rank: int, world: int, sums: Sum
    ) -> float:
        """Mean over the rows."""
        rows = examples.rows[rank::world]
        found = torch.from_numpy(loglikelihoods(model, examples, rows, budget, use_prefix=use_prefix)).double()
        total = torch.tensor([float(miss_losses(found, self.settings.draws).sum()), len(rows)], dtype=torch.float64)
        misses, count = sums(total.to(model.backbone.device)).tolist()
        return misses / count


class Engagement:
    """Yes/no labels: Kahneman-Tversky optimisation, or the paper's Eq. 5.

    Args:
        settings: which of the two, and its weights.
        examples: what is trained on; engaged rows and others.
        preferences: labels, mismatched pairs and the frozen model's likelihoods.
    """

    rows_in_pass = 1

    def __init__(self, settings: ObjectiveConfig, examples: Examples, preferences: Preferences) -> None:
        self.settings, self.examples, self.planned, self.known = settings, examples, examples, preferences
        self.unit = f"{settings.name} loss"
        own, others = preferences.weights
        self.weights = own * settings.desirable_weight, others * settings.undesirable_weight
        self.baseline = torch.zeros(())

    def begin(self, model: E2PModel, step: Step, budget: int, over_processes: Sum) -> None:
        """z0 over all mismatched pairs of the step: one number for all its passes and processes."""
        if self.settings.name == "kto":
            rows, drop = np.concatenate([*step.passes, []]).astype(np.int64), np.concatenate([*step.dropped, []])
            self.baseline = self._kl(model, self.examples, rows, drop.astype(bool), budget, over_processes)

    def _kl(
        self,
        model: E2PModel,
        examples: Examples,
        rows: Ints,
        drop: npt.NDArray[np.bool_] | None,
        budget: int,
        over_processes: Sum,
    ) -> Tensor:
        other = self.known.other[rows]
        policy = loglikelihoods(model, examples, rows, budget, completions=other, drop=drop)
        ratios = (policy - self.known.reference_other[rows]) / self._lengths(examples, other)
        device = model.backbone.device
        total, pairs = over_processes(torch.tensor([ratios.sum(), len(rows)], dtype=torch.float32, device=device))
        return kl_baseline(total, pairs)

    def _lengths(self, examples: Examples, rows: Ints) -> npt.NDArray[np.float32]:
        """What log-likelihoods are divided by: tokens, where they are taken per token."""
        lengths = examples.tokens.completion_lengths[rows].astype(np.float32)
        return lengths if self.settings.per_token else np.ones_like(lengths)

    def loss(self, model: nn.Module, rows: Ints, drop: npt.NDArray[np.bool_], step: Step) -> Tensor:
        """Mean over the rows of the whole step."""
        batch = self.examples.batch(rows, drop).to(_device(model))
        found = per_completion(model(batch), batch.completion_lengths)
        return self._losses(found, self.examples, rows, self.baseline).sum() / step.examples

    def _losses(self, found: Tensor, examples: Examples, rows: Ints, baseline: Tensor) -> Tensor:
        """Loss of each row [n], of the log-likelihoods of their completions in nats [n]."""
        lengths = torch.from_numpy(self._lengths(examples, rows)).to(found.device)
        engaged = torch.from_numpy(self.known.engaged[rows]).to(found.device)
        if self.settings.name == "engagement":
            return engagement_losses(found / lengths, engaged, self.settings.alpha)
        reference = torch.from_numpy(self.known.reference[rows]).to(found.device)
        beta, weight = self.settings.beta, self.settings.likelihood
        gain = found / lengths, reference / lengths
        losses = kto_losses(*gain, engaged, baseline.to(found.device), beta, self.weights)
        if weight:
            tokens = torch.from_numpy(examples.tokens.completion_lengths[rows]).to(found.device)
            losses = losses - weight * torch.where(engaged, found / tokens, 0)
        return losses

    def mean_loss(
        self, model: E2PModel, examples: Examples, budget: int, use_prefix: bool, rank: int, world: int, sums: Sum
    ) -> float:
        """Mean over the rows; z0 over all of them. Without prefix it follows from the reference alone."""
        rows = examples.rows[rank::world]
        if use_prefix:
            found = loglikelihoods(model, examples, rows, budget)
            kto = self.settings.name == "kto"
            baseline = self._kl(model, examples, rows, None, budget, sums) if kto else torch.zeros(())
        else:
            found, baseline = self.known.reference[rows], torch.zeros(())
        losses = self._losses(torch.from_numpy(found), examples, rows, baseline.cpu()).double()
        device = model.backbone.device
        total, count = sums(torch.tensor([float(losses.sum()), len(rows)], dtype=torch.float64, device=device)).tolist()
        return total / count


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
