"""The ways to condition the model, each judged on the same test examples.

none        the bare backbone
prompt      the profile as text in the system turn
static      soft tokens that do not depend on the user, trained with the same budget
random      phi, but every test user is given another test user's vector, nobody his own
shuffled    phi trained (and judged) on vectors dealt out anew among the users
null        phi's learned null user for everybody
e2p         phi on the user's own vector ("true")
e2p+prompt  both, with the phi of e2p
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.progress import Progress

from e2p.data.batches import Examples, Ints
from e2p.data.tokenised import TokenisedExamples
from e2p.errors import DataError
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs, deal
from e2p.training.run import shuffled_rows
from e2p.training.scoring import loglikelihoods, score_batches


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to condition the model.

    Args:
        name: as in the table above.
        model: the model that scores; its own projector for the trained controls.
        examples: test examples with this arm's vectors and prompts.
        use_prefix: whether soft tokens stand in the input.
        context_tokens: tokens that the conditioning adds, per row of the table [N].
    """

    name: str
    model: E2PModel
    examples: Examples
    use_prefix: bool
    context_tokens: Ints


def build_arms(
    names: tuple[str, ...],
    models: dict[str, E2PModel],
    inputs: RunInputs,
    profiled: TokenisedExamples | None,
    seed: int,
    shuffle_seed: int,
) -> list[Arm]:
    """Arms in the order of ``names``.

    Args:
        names: arms to build.
        models: trained models by name: ``e2p`` and, where asked for, ``static`` and ``shuffled``.
        inputs: the run's inputs.
        profiled: the same examples tokenised with the profile text, for the prompt arms.
        seed: seed of the random arm.
        shuffle_seed: the seed that the shuffled control was trained with.
    """
    k = models["e2p"].projector.config.prefix_tokens
    size = len(inputs.tokens)
    nobody = np.full(size, -1, np.int64)
    vectors = {
        "random": lambda: random_rows(inputs, seed),
        "shuffled": lambda: shuffled_rows(inputs, shuffle_seed),
        "null": lambda: nobody,
    }
    arms = []
    for name in names:
        with_profile = name in ("prompt", "e2p+prompt")
        if with_profile and profiled is None:
            raise DataError(f"arm {name}: expected examples with profile texts, got none")
        use_prefix = name not in ("none", "prompt")
        examples = inputs.examples(
            "test",
            vector_rows=vectors[name]() if name in vectors else None,
            tokens=profiled if with_profile else None,
        )
        context = np.full(size, k if use_prefix else 0, np.int64)
        if with_profile and profiled is not None:
            context = context + profiled.column("profile_tokens")
        arms.append(Arm(name, models.get(name, models["e2p"]), examples, use_prefix, context))
    return arms


def random_rows(inputs: RunInputs, seed: int) -> Ints:
    """Vector rows in which every test user has a vector of another test user, seeded, nobody his own.

    Raises:
        DataError: fewer than two test users have a vector.
    """
    return deal(inputs, inputs.all_rows("test"), [seed, 3])


def score_arm(arm: Arm, inputs: RunInputs, budget: int, progress: Progress | None = None) -> pl.DataFrame:
    """Per-example scores of an arm in long form: example_id, user_id, arm, metric, value.

    Metrics: nll (nats, summed over the completion's tokens, its end token included), tokens, bytes (UTF-8, of the
    completion's text), context_tokens; where the table has labels, auc: for each engaged example the share of its
    user's other test examples, those not engaged, that are less likely per token (ties count half).
    """
    rows = arm.examples.rows
    nll = np.zeros(len(inputs.tokens))
    task: Any = progress.add_task(f"judging {arm.name}", total=len(rows)) if progress else None
    for batch, logprobs in score_batches(arm.model, arm.examples, budget, arm.use_prefix):
        parts = logprobs.double().cpu().split(batch.completion_lengths.tolist())
        nll[batch.index.numpy()] = [-float(part.sum()) for part in parts]
        if progress:
            progress.update(task, advance=len(batch))
    tokens = inputs.tokens.completion_lengths
    values = {
        "nll": nll,
        "tokens": tokens,
        "bytes": inputs.tokens.column("bytes"),
        "context_tokens": arm.context_tokens,
    }
    parts = list(_long(inputs, rows, arm.name, values))
    if (others := np.setdiff1d(inputs.all_rows("test"), inputs.rows("test"))).size:
        per_token = np.zeros(len(nll))
        per_token[rows] = -nll[rows] / tokens[rows]
        found = loglikelihoods(arm.model, arm.examples, others, budget, use_prefix=arm.use_prefix)
        per_token[others] = found / tokens[others]
        faced, auc = _faced(inputs, rows, others, per_token)
        parts += _long(inputs, faced, arm.name, {"auc": auc})
    return pl.concat(parts)


def _faced(inputs: RunInputs, engaged: Ints, others: Ints, score: npt.NDArray[np.float64]) -> tuple[Ints, Any]:
    """Engaged rows whose user has others too, and for every row of the table the share of these that score less."""
    users = inputs.keys["user_id"].rank("dense").cast(pl.Int64).to_numpy()
    auc, faced = np.zeros(len(score)), []
    order = others[np.lexsort((score[others], users[others]))]
    first, last = (np.searchsorted(users[order], users[engaged], side=side) for side in ("left", "right"))
    for row, start, end in zip(engaged, first, last, strict=True):
        if end > start:
            own = score[order[start:end]]
            below, upto = (np.searchsorted(own, score[row], side=side) for side in ("left", "right"))
            auc[row] = (below + upto) / (2 * len(own))
            faced.append(row)
    return np.array(faced, np.int64), auc


def _long(inputs: RunInputs, rows: Ints, arm: str, values: dict[str, Any]) -> Iterator[pl.DataFrame]:
    ids = inputs.keys.select("example_id", "user_id")[rows]
    for metric, value in values.items():
        yield ids.with_columns(
            arm=pl.lit(arm), metric=pl.lit(metric), value=pl.Series(np.asarray(value)[rows].astype(np.float64))
        )


def without_prompt_arms(names: tuple[str, ...]) -> tuple[str, ...]:
    """The arms that need no profile text."""
    return tuple(name for name in names if name not in ("prompt", "e2p+prompt"))
