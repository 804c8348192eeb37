"""Seeded split by group: whatever shares a group (a user, a persona) stands in one part only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.config import SplitConfig
from e2p.errors import DataError

SPLITS = ("train", "validation", "test")
Codes = npt.NDArray[np.int8]
LEFT_OUT = -2  # training groups beyond data.train_share


def split_by_group(groups: pl.Series, config: SplitConfig) -> Codes:
    """Part of every example: 0 train, 1 validation, 2 test.

    The sorted distinct groups are permuted by the seed and cut at the rounded cumulative fractions: the
    result depends on which groups there are, not on the order of rows. A fraction above 0 gets at least one
    group.

    Args:
        groups: [n] group of each example, no nulls.
        config: fractions of the groups, and the seed.

    Raises:
        DataError: fewer groups than fractions above 0.
    """
    names = groups.unique().sort()
    wanted = sum(fraction > 0 for fraction in config.fractions)
    if len(names) < wanted:
        raise DataError(
            f"split: expected at least {wanted} groups, one for each fraction above 0 of {config.fractions}, "
            f"got {len(names)}; set a fraction to 0 or give more groups"
        )
    codes = np.empty(len(names), dtype=np.int8)
    codes[np.random.default_rng(config.seed).permutation(len(names))] = np.repeat(
        np.arange(3, dtype=np.int8), _counts(len(names), config.fractions)
    )
    table = pl.DataFrame({"group": names, "code": codes})
    joined = groups.to_frame("group").join(table, on="group", how="left", maintain_order="left")
    return joined["code"].to_numpy()


def drop_training_groups(groups: pl.Series, codes: Codes, share: float, seed: int) -> Codes:
    """Parts with -2 in the place of 0 for all but a share of the training groups, at least one.

    The training groups are permuted by the seed and the first ones stay, so a smaller share is part of a larger one.
    """
    names = groups.filter(pl.Series(codes == 0)).unique().sort()
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    kept = names.gather(np.sort(order[: max(1, round(share * len(names)))]))
    return np.where((codes == 0) & ~groups.is_in(kept.implode()).to_numpy(), LEFT_OUT, codes).astype(np.int8)


def _counts(groups: int, fractions: tuple[float, float, float]) -> npt.NDArray[np.int64]:
    bounds = np.rint(np.cumsum(fractions) * groups).astype(np.int64)
    counts = np.diff(bounds, prepend=0)
    for part in range(3):
        if fractions[part] > 0 and counts[part] == 0:
            counts[np.argmax(counts)] -= 1
            counts[part] += 1
    return counts


def resolve_splits(keys: pl.DataFrame, config: SplitConfig) -> Codes:
    """Part of every example: the table's own column ``split`` if it is filled, else :func:`split_by_group`.

    Args:
        keys: columns group and split (train, validation, test or null), as ``example_keys`` gives them.
        config: used only where the table has no split of its own.

    Raises:
        DataError: a split that is filled in some rows only or is none of the three, a group in two parts, or
            too few groups.
    """
    split = keys["split"]
    if split.null_count() == len(split):
        return split_by_group(keys["group"], config)
    unknown = (~split.is_in(SPLITS)).fill_null(True)
    if unknown.any():
        index = unknown.arg_true()[0]
        row = keys["row"][index] if "row" in keys.columns else index
        raise DataError(
            f"row {row}: split: expected one of {', '.join(SPLITS)}, as in other rows, got {split[index]!r}; "
            "fill the column in every row or drop it"
        )
    parts = keys.group_by("group", maintain_order=True).agg(pl.col("split").unique(maintain_order=True))
    torn = parts.filter(pl.col("split").list.len() > 1)
    if torn.height:
        raise DataError(
            f"group {torn['group'][0]!r}: expected one split, got {' and '.join(torn['split'][0])}; "
            "put all its examples into one part, or drop the column split"
        )
    codes = {name: code for code, name in enumerate(SPLITS)}
    return split.replace_strict(codes, return_dtype=pl.Int8).to_numpy()
