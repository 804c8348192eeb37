"""What yes/no objectives need beside the examples: labels, mismatched completions, and the frozen model's likelihoods.

The reference model of Kahneman-Tversky optimisation is the frozen backbone without prefix, so its log-likelihoods never
change: they are computed once and kept beside the tokens.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from e2p.config import ObjectiveConfig
from e2p.data.batches import Ints
from e2p.data.splits import SPLITS
from e2p.errors import DataError
from e2p.model.e2p import E2PModel
from e2p.training.inputs import JoinedTables, RunInputs
from e2p.training.scoring import loglikelihoods

JUDGED = ("train", "validation")
_TRIES = 20
_CHECKED = 16  # rows that are computed again before kept likelihoods are believed


@dataclass(frozen=True, eq=False)
class Preferences:
    """Per row of the example table [N]; what lies outside training and validation is 0 (``other``: -1).

    Args:
        engaged: the labels.
        other: row whose completion makes the mismatched pair: another text, another user's where there is one.
        reference: log-likelihood of the row's completion under the frozen model without prefix, in nats.
        reference_other: of the mismatched one after the row's prompt.
        weights: what engaged rows and others count, before the settings' own weights.
    """

    engaged: npt.NDArray[np.bool_]
    other: Ints
    reference: npt.NDArray[np.float32]
    reference_other: npt.NDArray[np.float32]
    weights: tuple[float, float] = (1.0, 1.0)


def check_labels(tables: JoinedTables, objective: ObjectiveConfig, source: str) -> None:
    """Make sure, before a model is loaded, that a yes/no objective has what it learns from.

    Raises:
        DataError: no labels, a row of training or validation without one, or only one kind of them in either.
    """
    if not objective.labelled:
        return
    for part in JUDGED:
        rows = np.flatnonzero(tables.split == SPLITS.index(part))
        missing = rows[tables.labels[rows] < 0]
        if len(missing):
            row, user = tables.keys["row"][int(missing[0])], tables.keys["user_id"][int(missing[0])]
            raise DataError(
                f"{source}: row {row} (user {user}): label: expected true or false in every example of training and "
                f"validation for objective.name {objective.name}, got none in {len(missing):,} of the {part} part's "
                f"{len(rows):,}; fill the column, or train with objective.name lm"
            )
        if len(set(tables.labels[rows].tolist())) < 2:
            kind = "true" if tables.labels[rows[0]] else "false"
            raise DataError(
                f"{source}: the {part} part: expected examples of both kinds for objective.name {objective.name}, got "
                f"label {kind} in all {len(rows):,}; add the others, change data.split, or train with objective.name lm"
            )


def load_preferences(
    inputs: RunInputs, model: E2PModel, objective: ObjectiveConfig, seed: int, budget: int, console: Console | None
) -> Preferences:
    """Labels, mismatched pairs (for ``kto``) and reference likelihoods of a run; what is known is read back.

    Args:
        inputs: the run's inputs, with labels.
        model: any E2P model on the run's backbone; its prefix is not used.
        objective: the settings.
        seed: of the mismatched pairs; they are part of the data and the same in every training.
        budget: padded tokens in a forward pass.
        console: where progress is shown.

    Raises:
        DataError: all completions of a part are one and the same text.
    """
    other = mismatched_rows(inputs, seed) if objective.name == "kto" else np.full(len(inputs.tokens), -1, np.int64)
    reference, reference_other = _reference(inputs, model, other, budget, console)
    train = inputs.labels[inputs.all_rows("train")]
    engaged, others = int((train == 1).sum()), int((train == 0).sum())
    balance = objective.name == "kto" and objective.balance == "auto"
    weights = balanced_weights(engaged, others) if balance else (1.0, 1.0)
    return Preferences(inputs.labels == 1, other, reference, reference_other, weights)


def mismatched_rows(inputs: RunInputs, seed: int) -> Ints:
    """For every row of training and validation one of the same part whose completion makes the mismatched pair [N].

    Raises:
        DataError: all completions of a part are one and the same text.
    """
    other = np.full(len(inputs.tokens), -1, np.int64)
    users = inputs.keys["user_id"].rank("dense").cast(pl.Int64).to_numpy()
    for code, part in enumerate(JUDGED):
        rows = inputs.all_rows(part)
        try:
            texts = np.array([_hash(inputs.tokens[int(row)].completion) for row in rows], np.uint64)
            other[rows] = rows[mismatched(users[rows], texts, [seed, 6, code])]
        except DataError as error:
            raise DataError(f"the {part} part: {error}") from None
    return other


def mismatched(users: Ints, texts: npt.NDArray[np.uint64], seed: list[int]) -> Ints:
    """For each of n rows another one with another completion, of another user if at all possible; seeded.

    Args:
        users: a number for each row's user [n].
        texts: a number for each row's completion [n].
        seed: numpy seed.

    Returns:
        Indices of rows, 0 to n - 1 [n].

    Raises:
        DataError: all these rows share one completion: the baseline z0 would be made of the completions themselves.
    """
    if len(np.unique(texts)) < 2:
        raise DataError(
            f"expected at least two different completions, got one in all {len(texts):,} rows: no mismatched pair can "
            "be made for the KL baseline of kto; add other answers, or train with objective.name engagement or lm"
        )
    if len(np.unique(users)) < 2:
        users = texts.astype(np.int64)  # nobody else is there
    random = np.random.default_rng(seed)
    found = np.full(len(texts), -1, np.int64)
    for attempt in range(_TRIES):
        open_ = np.flatnonzero(found < 0)
        # In turn: whatever one kind of value is shared by nearly all rows, the other draw meets few of them.
        drawn = _of_other_value(texts if attempt % 2 else users, open_, random)
        fits = (texts[drawn] != texts[open_]) & (users[drawn] != users[open_])
        found[open_[fits]] = drawn[fits]
    for at in np.flatnonzero(found < 0):  # nobody else has another text, or hardly anybody
        if found[at] < 0:
            same = (found < 0) & (texts == texts[at]) & (users == users[at])
            pool = np.flatnonzero(texts != texts[at])
            strangers = pool[users[pool] != users[at]]
            found[same] = random.choice(strangers if len(strangers) else pool, int(same.sum()))
    return found


def _of_other_value(values: npt.NDArray[Any], rows: Ints, random: np.random.Generator) -> Ints:
    """For each of some rows an index drawn evenly from those with another value; there must be two values."""
    order = np.argsort(values, kind="stable")
    first, last = (np.searchsorted(values[order], values[rows], side=side) for side in ("left", "right"))
    at = random.integers(0, len(values) - (last - first))
    return order[np.where(at >= first, at + last - first, at)]


def _hash(ids: npt.NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def balanced_weights(engaged: int, others: int) -> tuple[float, float]:
    """Weights under which both kinds of rows count alike, while the mean weight over rows is 1.

    Their ratio is the lower end of the range that the authors of KTO advise (Ethayarajh et al. 2024).
    """
    return (engaged + others) / (2 * engaged), (engaged + others) / (2 * others)


def _reference(
    inputs: RunInputs, model: E2PModel, other: Ints, budget: int, console: Console | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Log-likelihoods under the frozen model, of own and, where there are pairs, of mismatched completions, kept beside
    the tokens.

    What was kept is believed after some rows have been computed again: the key cannot hold every weight.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save

    backbone = model.backbone
    made_by = [backbone.fingerprint(), str(backbone.autocast_dtype), str(backbone.model.dtype), backbone.quantization]
    rows = np.concatenate([inputs.all_rows(part) for part in JUDGED])
    which = json.dumps(made_by).encode() + other.tobytes() + rows.tobytes()
    path = inputs.tokens.folder / f"reference-{hashlib.blake2b(which, digest_size=16).hexdigest()}.safetensors"
    paired = rows[other[rows] >= 0]

    def frozen(of: Ints, answers: Ints | None = None, bar: Progress | None = None, task: Any = None) -> Any:
        examples = inputs.examples("train")
        return loglikelihoods(
            model, examples, of, budget, completions=answers, use_prefix=False, progress=bar, task=task
        )

    try:
        kept = load_file(path)
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _CHECKED)).astype(np.int64)]
        if kept["own"].shape == kept["other"].shape == other.shape and np.allclose(
            kept["own"][some], frozen(some), rtol=1e-2, atol=0.1
        ):
            return kept["own"], kept["other"]
    except (OSError, SafetensorError, KeyError):
        pass  # not there yet, or cut short: made again
    own, mixed = np.zeros(len(other), np.float32), np.zeros(len(other), np.float32)
    bars = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*bars, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=console is None) as bar:
        task = bar.add_task("frozen model's likelihoods", total=len(rows) + len(paired))
        own[rows] = frozen(rows, None, bar, task)
        mixed[paired] = frozen(paired, other[paired], bar, task)
    for name, values in (("own", own), ("mismatched", mixed)):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"row {row}: the frozen model gives its {name} completion a log-likelihood of {values[row]}; expected "
                "a finite number: load the backbone with dtype float32, or drop the row"
            )
    try:  # kept for the next time; if it cannot be, this time goes on
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="reference-") as half:
            (Path(half) / path.name).write_bytes(save({"own": own, "other": mixed}))
            (Path(half) / path.name).replace(path)
    except OSError:
        pass
    return own, mixed
