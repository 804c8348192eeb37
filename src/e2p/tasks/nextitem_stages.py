"""Who learns what from which interactions: four stages, one after the other, and the targets within them.

The backbone learns the codes from the first stage, and so do the item vectors; phi is trained, validated and tested on
targets of the three later ones. In front of a target stands everything that its user did before it.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.errors import ConfigError, DataError
from e2p.tasks.nextitem_files import Histories

STAGES = ("backbone", "phi", "validation", "test")
SPLIT_OF = {"phi": "train", "validation": "validation", "test": "test"}
VALIDATING = 0.1  # of the users in MiniOneRec's validation file, those who validate phi; the others train it
ADAPT_VALIDATING = 0.05  # of the users, those whose rows validate the backbone
Split = Literal["auto", "time", "leave_one_out"]
Ints = npt.NDArray[np.int64]
_NAMES = dict(enumerate(STAGES))


def staged(data: Histories, split: Split, shares: tuple[float, ...], phi_targets: int, seed: int) -> pl.DataFrame:
    """The log with a stage for every interaction, and its place among those of its user, from 0.

    Args:
        data: what was read.
        split: ``time``: at the moments by which shares of all interactions have happened. ``leave_one_out``: of each
            user the last interaction is for test, the one before for validation, ``phi_targets`` before that for phi.
            ``auto``: time where times are real; MiniOneRec's own files: histories and training rows are the backbone's,
            validation rows phi's or, of one user in ten, validation's, test rows are test; else leave_one_out.
        shares: of the four stages, by time.
        phi_targets: as above.
        seed: of the users who validate, in MiniOneRec's files.

    Raises:
        ConfigError: time without times.
        DataError: fewer than two users in MiniOneRec's validation file.
    """
    log = data.log.with_columns(place=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id"))
    if split == "time" and not data.timed:
        raise ConfigError(
            f"split: expected leave_one_out or auto for {data.kind} files, which have no times, got 'time'"
        )
    if data.timed and split != "leave_one_out":
        return log.with_columns(stage=_by_time(log["timestamp"], shares))
    if "part" in log.columns and split == "auto":
        return log.with_columns(stage=_given(log, seed)).drop("part")
    back = pl.len().over("user_id") - 1 - pl.col("place")
    stage = pl.when(back == 0).then(3).when(back == 1).then(2).when(back < 2 + phi_targets).then(1).otherwise(0)
    return log.with_columns(stage=stage.replace_strict(_NAMES)).drop("part", strict=False)


def _by_time(times: pl.Series, shares: tuple[float, ...]) -> pl.Expr:
    ordered = times.sort()
    ends = [round(share * len(times)) for share in np.cumsum(shares)[:-1]]
    # Whole seconds, as the files have them: what is of one second was put into an order by us and stays in one stage.
    cuts = [ordered[min(end, len(times) - 1)] for end in ends]
    whole = pl.Series(cuts, dtype=times.dtype).dt.truncate("1s")
    return pl.sum_horizontal(pl.col("timestamp") >= cut for cut in whole).replace_strict(_NAMES)


def _given(log: pl.DataFrame, seed: int) -> pl.Expr:
    users = log.filter(pl.col("part") == "valid")["user_id"].unique().sort()
    if len(users) < 2:
        raise DataError(f"valid_*.csv: expected at least 2 users, to train and to validate phi, got {len(users)}")
    chosen = drawn(users, max(1, round(VALIDATING * len(users))), seed, 21)
    validates = pl.col("user_id").is_in(chosen.implode())
    later = pl.when(pl.col("part") == "test").then(3).when(validates).then(2).otherwise(1)
    return pl.when(pl.col("part").is_in(["history", "train"])).then(0).otherwise(later).replace_strict(_NAMES)


def drawn(users: pl.Series, count: int, seed: int, purpose: int) -> pl.Series:
    """So many of the users, sorted; the seed and the purpose decide which."""
    order = np.random.default_rng([seed, purpose]).permutation(len(users))
    return users.gather(np.sort(order[:count]))


def targets(
    log: pl.DataFrame, min_history: int, most_per_user: int, most_tested: int, most_test_users: int, seed: int
) -> tuple[pl.DataFrame, Counter[tuple[str, str]]]:
    """What phi is asked: the log's rows of the later stages, with ``at``, each one's number in the log, and ``split``.

    Args:
        log: as of :func:`staged`.
        min_history: earlier interactions that a target must have, at least 1.
        most_per_user: most targets of a user in training, evenly spread over his own, from a seeded start; 0: all.
        most_tested: the same in validation and in test.
        most_test_users: most users in test, drawn; 0: all.
        seed: of both.

    Returns:
        The targets, and how many were left out, by part and reason.

    Raises:
        DataError: a part is left without any.
    """
    lost: Counter[tuple[str, str]] = Counter()
    asked = log.with_row_index("at").filter(pl.col("stage") != "backbone")
    asked = asked.with_columns(split=pl.col("stage").cast(pl.String).replace_strict(SPLIT_OF))

    def keep(kept: pl.DataFrame, reason: str) -> pl.DataFrame:
        gone = asked.join(kept, on="at", how="anti")
        lost.update({(part, reason): count for part, count in gone.group_by("split").len().iter_rows()})
        return kept

    few = "after fewer than one interaction" if min_history == 1 else f"after fewer than {min_history} interactions"
    asked = keep(asked.filter(pl.col("place") >= min_history), few)
    if most_test_users:
        tested = asked.filter(pl.col("split") == "test")["user_id"].unique().sort()
        chosen = drawn(tested, most_test_users, seed, 22)
        of_them = (pl.col("split") != "test") | pl.col("user_id").is_in(chosen.implode())
        asked = keep(asked.filter(of_them), f"of test users beyond the {len(chosen):,} drawn")
    if most_per_user or most_tested:
        most = pl.when(pl.col("split") == "train").then(most_per_user).otherwise(most_tested)
        users = asked["user_id"].unique().sort()
        starts = pl.DataFrame({"user_id": users, "start": np.random.default_rng([seed, 23]).random(len(users))})
        group = ["user_id", "split"]
        number, size = pl.int_range(pl.len(), dtype=pl.Int64).over(group), pl.len().over(group).cast(pl.Int64)
        step = number + (pl.col("start") * size).cast(pl.Int64)
        # A step is taken where it passes a multiple of size / most: exactly `most` of `size` steps do.
        passes = (step + 1) * most // size > step * most // size
        marked = asked.join(starts, on="user_id", maintain_order="left", how="left")
        marked = marked.filter((most == 0) | (size <= most) | passes).drop("start")
        asked = keep(marked, "of users with more than are taken of one")
    for part in SPLIT_OF.values():
        if not asked.filter(pl.col("split") == part).height:
            why = ", ".join(f"{count:,} {reason}" for (where, reason), count in lost.items() if where == part)
            raise DataError(
                f"{part}: expected examples, got none ({why or 'the stage has no interactions'}); take more "
                "data, other shares or a smaller min_history"
            )
    return asked, lost


def adapt_targets(log: pl.DataFrame, stride: int, seed: int) -> pl.DataFrame:
    """What the backbone is asked: rows of its stage, every ``stride``-th of a user from the last backwards.

    As in :func:`targets`, with ``at`` and ``split``: a few users validate, drawn by the seed.

    Raises:
        DataError: fewer than two users have two interactions in the stage.
    """
    own = log.with_row_index("at").filter(pl.col("stage") == "backbone")
    back = pl.len().over("user_id").cast(pl.Int64) - 1 - pl.col("place")
    asked = own.filter((pl.col("place") >= 1) & (back % stride == 0))
    users = asked["user_id"].unique().sort()
    if len(users) < 2:
        raise DataError(
            f"backbone: expected at least 2 users with 2 interactions each in its stage, got {len(users)}; take more "
            "data or a larger first share"
        )
    chosen = drawn(users, max(1, round(ADAPT_VALIDATING * len(users))), seed, 24)
    validates = pl.col("user_id").is_in(chosen.implode())
    return asked.with_columns(split=pl.when(validates).then(pl.lit("validation")).otherwise(pl.lit("train")))
