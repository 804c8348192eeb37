"""Which examples go through the model together: steps, passes, padding. Plain numpy in, torch tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from e2p.config import Position
from e2p.data.tokenised import TokenisedExamples

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass; everything is padded on the right.

    Args:
        prompt: ids [B, P].
        prompt_lengths: [B].
        completion: ids [B, C]; these are the labels.
        completion_lengths: [B].
        splice: index in the prompt before which the soft tokens stand [B], 0 to prompt length.
        shared: row of ``unique`` that holds this row's prompt [B].
        unique: rows of ``prompt`` of which each stands for all rows with the same prompt [U].
        embeddings: user vectors [B, D], zeros where absent; float32.
        present: whether the row has a vector; where not, the null user stands in [B].
        index: row in the tokenised table [B].
    """

    prompt: torch.Tensor
    prompt_lengths: torch.Tensor
    completion: torch.Tensor
    completion_lengths: torch.Tensor
    splice: torch.Tensor
    shared: torch.Tensor
    unique: torch.Tensor
    embeddings: torch.Tensor
    present: torch.Tensor
    index: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Examples:
    """Rows of a tokenised table together with their users' vectors.

    Args:
        tokens: tokenised table.
        rows: which of its rows belong to this set [n].
        vector_rows: for each row of the whole table its row in ``vectors``, -1 without one [N].
        vectors: user vectors [V, D], possibly memory-mapped.
        position: where the soft tokens stand.
    """

    tokens: TokenisedExamples
    rows: Ints
    vector_rows: Ints
    vectors: npt.NDArray[np.float32]
    position: Position

    def __len__(self) -> int:
        return len(self.rows)

    def label_tokens(self, rows: Ints) -> int:
        """Labelled tokens in these rows of the table."""
        return int(self.tokens.completion_lengths[rows].sum())

    def widths(self, rows: Ints, completions: Ints | None = None) -> Ints:
        """Tokens of prompt and completion together [n]; of the completions of other rows, if these are given."""
        behind = self.tokens.completion_lengths[rows if completions is None else completions]
        return (self.tokens.prompt_lengths[rows] + behind).astype(np.int64)

    def by_length(self, rows: Ints) -> Ints:
        """Order in which neighbours need little padding [n].

        Soft tokens right before the completion cut a row in two parts that are padded apart: there, rows of about the
        same completion, to within three tokens, are ordered by their prompts.
        """
        if self.position != "before_completion":
            return np.argsort(self.widths(rows), kind="stable")
        lengths = self.tokens.prompt_lengths[rows], self.tokens.completion_lengths[rows]
        return np.lexsort((lengths[0], lengths[1] // 3))

    def batch(
        self,
        rows: Ints,
        drop: npt.NDArray[np.bool_] | None = None,
        vector_rows: Ints | None = None,
        completions: Ints | None = None,
    ) -> Batch:
        """Fetch and pad rows of the table.

        Args:
            rows: rows of the table [n]; the same one may stand there twice.
            drop: marks those whose vector is replaced by the null user [n].
            vector_rows: rows of ``vectors`` in the place of the examples' own [n].
            completions: rows of the table whose completions stand in the place of the examples' own [n].
        """
        items = [self.tokens[int(row)] for row in rows]
        answers = items if completions is None else [self.tokens[int(row)] for row in completions]
        places = {
            "before_bos": lambda item: 0,
            "after_bos": lambda item: item.after_bos,
            "after_system": lambda item: item.after_system,
            "before_completion": lambda item: len(item.prompt),
        }
        which = self.vector_rows[rows] if vector_rows is None else vector_rows
        present = which >= 0 if drop is None else (which >= 0) & ~drop
        return make_batch(
            [item.prompt for item in items],
            [item.completion for item in answers],
            [places[self.position](item) for item in items],
            np.where(present[:, None], self.vectors[np.maximum(which, 0)], 0).astype(np.float32),
            present,
            rows,
        )


def make_batch(
    prompts: Sequence[npt.NDArray[np.int32]],
    completions: Sequence[npt.NDArray[np.int32]],
    splice: Sequence[int],
    embeddings: npt.NDArray[np.float32],
    present: npt.NDArray[np.bool_],
    index: Ints,
) -> Batch:
    """Pad rows into a batch and find the prompts that they share; arguments as in :class:`Batch`."""
    import torch

    seen: dict[bytes, int] = {}
    shared: list[int] = []
    unique: list[int] = []
    for at, prompt in enumerate(prompts):
        key = prompt.tobytes()
        if key not in seen:
            seen[key] = len(unique)
            unique.append(at)
        shared.append(seen[key])
    return Batch(
        prompt=torch.from_numpy(_padded(prompts)),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        completion=torch.from_numpy(_padded(completions)),
        completion_lengths=torch.tensor([len(completion) for completion in completions]),
        splice=torch.tensor(list(splice)),
        shared=torch.tensor(shared),
        unique=torch.tensor(unique),
        embeddings=torch.from_numpy(embeddings),
        present=torch.from_numpy(present),
        index=torch.from_numpy(index.astype(np.int64)),
    )


def _padded(sequences: Sequence[npt.NDArray[np.int32]]) -> Ints:
    """Right-pad with 0; what is padded is masked by the lengths, so the id does not matter."""
    out = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out


def token_passes(widths: Ints, budget: int) -> list[Ints]:
    """Cut positions 0..n-1 into passes of similar length whose padded size stays within a token budget.

    A single row longer than the budget gets a pass of its own. Longest first, so that memory runs out at once or never.
    """
    passes, start = [], 0
    order = np.argsort(-widths, kind="stable")
    while start < len(order):
        take = max(1, budget // max(1, int(widths[order[start]])))
        passes.append(order[start : start + take])
        start += take
    return passes


@dataclass(frozen=True)
class Step:
    """One optimiser step of one process.

    Args:
        passes: rows of the table for each forward pass.
        dropped: for each pass, rows whose vector is replaced by the null user.
        label_tokens: labelled tokens of the step over all processes: what the loss is divided by.
        examples: rows of the step over all processes: what a loss of whole completions is divided by.
        epoch: the epoch that it belongs to.
    """

    passes: list[Ints]
    dropped: list[npt.NDArray[np.bool_]]
    label_tokens: int
    examples: int
    epoch: int


def epoch_steps(
    examples: Examples,
    *,
    batch_size: int,
    budget: int,
    null_prob: float,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Step]:
    """The steps of one epoch, a pure function of its arguments: resuming or adding processes changes nothing.

    Rows are shuffled, then sorted by length inside windows of 64 steps, cut into steps, and the steps are shuffled.
    Every process computes the same plan and takes each ``world``-th row of a step. Which vectors are dropped depends
    on seed, epoch and row alone.
    """
    random = np.random.default_rng([seed, epoch])
    rows = examples.rows[random.permutation(len(examples))]
    drop = np.zeros(len(examples.tokens), bool)
    drop[examples.rows] = np.random.default_rng([seed, epoch, 1]).random(len(examples)) < null_prob
    window = batch_size * 64
    order = np.concatenate(
        [start + examples.by_length(rows[start : start + window]) for start in range(0, len(rows), window)]
    )
    starts = np.arange(0, len(rows), batch_size)
    for start in random.permutation(starts):
        step = rows[order[start : start + batch_size]]
        mine = step[rank::world]
        if not len(mine):
            # A last step smaller than the number of processes: take part in the gradient exchange with no examples.
            yield Step([], [], examples.label_tokens(step), len(step), epoch)
            continue
        passes = [mine[part] for part in token_passes(examples.widths(mine), budget)]
        yield Step(passes, [drop[part] for part in passes], examples.label_tokens(step), len(step), epoch)


def steps_per_epoch(examples: Examples, batch_size: int) -> int:
    """Optimiser steps in an epoch."""
    return -(-len(examples) // batch_size)
