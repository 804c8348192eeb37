"""Who played, clicked or bought what -> user vectors and item vectors in one space, refreshed as time goes on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.checks import check_users
from e2p.data.sources import first_true, is_id, locator, open_table, to_utc
from e2p.data.tables import require_folder, write_embeddings, write_frame
from e2p.errors import ConfigError, DataError, MissingExtraError, RunError

Method = Literal["als", "bpr", "lightgcn"]
Refresh = Literal["never", "day", "week", "month"]
Floats = npt.NDArray[np.float32]
_EVERY = {"day": "1d", "week": "1w", "month": "1mo"}
_ROWS = 262_144
# What a setting is where none is given: regularization and iterations.
_OWN = {"als": (0.01, 15), "bpr": (0.01, 100), "lightgcn": (1e-4, 100)}


@dataclass(frozen=True)
class FactorSettings:
    """How interactions become vectors; what each setting does stands at :func:`behaviour`.

    Raises:
        ConfigError: a setting is out of range.
    """

    method: Method = "als"
    dimension: int = 120
    refresh: Refresh = "never"
    space_share: float = 0.5
    regularization: float | None = None
    alpha: float = 1.0
    iterations: int | None = None
    layers: int = 3
    learning_rate: float = 0.01
    seed: int = 42

    def __post_init__(self) -> None:
        least = 2 if self.method == "bpr" else 1
        for name, ok, expected in (
            ("method", self.method in get_args(Method), f"one of {', '.join(get_args(Method))}"),
            ("dimension", self.dimension >= least, "a whole number >= 1 (bpr: 2)"),
            ("refresh", self.refresh in get_args(Refresh), f"one of {', '.join(get_args(Refresh))}"),
            ("space_share", 0 < self.space_share <= 1, "a number in (0, 1]"),
            ("regularization", self.regularization is None or self.regularization > 0, "a number > 0"),
            ("alpha", self.alpha > 0, "a number > 0"),
            ("iterations", self.iterations is None or self.iterations >= 1, "a whole number >= 1"),
            ("layers", self.layers >= 1, "a whole number >= 1"),
            ("learning_rate", self.learning_rate > 0, "a number > 0"),
        ):
            if not ok:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.refresh != "never" and self.method != "als":
            raise ConfigError(f"refresh: expected method als, which can fold new interactions in, got {self.method!r}")


@dataclass(frozen=True, eq=False)
class Factors:
    """User and item vectors of one space; their dot product is the affinity.

    Args:
        users: user id of each row of ``user_vectors``.
        user_vectors: float32 [rows, D]; a user may have several, each as of a time.
        timestamps: when each of these was known, or None where interactions have no times.
        items: item id of each row of ``item_vectors``.
        item_vectors: float32 [items, D].
        version: names the space: two of the same name are the same item vectors.
        left_out: interactions with items that came after the space was made.
    """

    users: pl.Series
    user_vectors: Floats
    timestamps: pl.Series | None
    items: pl.Series
    item_vectors: Floats
    version: str
    left_out: int


def behaviour(
    interactions: str,
    output: str,
    items: str = "",
    method: Method = "als",
    dimension: int = 120,
    refresh: Refresh = "never",
    space_share: float = 0.5,
    regularization: float | None = None,
    alpha: float = 1.0,
    iterations: int | None = None,
    layers: int = 3,
    learning_rate: float = 0.01,
    seed: int = 42,
    overwrite: bool = False,
) -> None:
    """Make an embedding table out of interactions: plays, clicks, ratings, purchases.

    Args:
        interactions: table with user_id, item_id and optionally weight (> 0; default 1) and timestamp.
        output: Parquet file for the users' vectors.
        items: Parquet file for the items' vectors; empty: not written.
        method: als: implicit-feedback alternating least squares; bpr: Bayesian personalised ranking;
            lightgcn: a graph network, which takes an interaction as there or not, whatever its weight.
        dimension: numbers in a vector.
        refresh: a new vector for whoever did something in a day, week or month, at its end; needs timestamps and als.
        space_share: with refresh, the share of the periods that item vectors are learned from. The first user vectors
            are of its end; later ones are folded into the same space, so that what was trained on it stays valid.
        regularization: of the factors; not given: 0.01, lightgcn 0.0001.
        alpha: als: how much an interaction of weight 1 counts beyond none.
        iterations: passes over the interactions; not given: als 15, else 100.
        layers: lightgcn: a vector takes in those of users and items up to this many links away.
        learning_rate: lightgcn: of Adam.
        seed: seed of the start.
        overwrite: replace the outputs if they are there.

    Raises:
        DataError: the table cannot be used; the message has file, row and user.
        ConfigError: a setting is out of range.
        RunError: an output is there already.
        MissingExtraError: implicit, or for lightgcn torch-geometric, is not installed.
    """
    settings = FactorSettings(
        method, dimension, refresh, space_share, regularization, alpha, iterations, layers, learning_rate, seed
    )
    wanted = [Path(path) for path in (output, items) if path]
    for path in wanted:
        if path.suffix != ".parquet":
            raise ConfigError(f"output, items: expected names that end in .parquet, got {str(path)!r}")
        if path.exists() and (not overwrite or (Path(interactions).exists() and path.samefile(interactions))):
            raise RunError(f"{path}: is there already; choose another name or pass --overwrite")
        require_folder(path.parent)
    if len({path.resolve() for path in wanted}) < len(wanted):
        raise ConfigError(f"items: expected another file than output, got {items!r}")
    frame = read_interactions(interactions)
    try:
        found = factorise(frame, settings)
    except DataError as error:
        raise DataError(f"{interactions}: {error}") from None
    if items:
        vectors = pl.Series("embedding", found.item_vectors, dtype=pl.Array(pl.Float32, dimension))
        write_frame(
            items, pl.DataFrame([found.items.alias("item_id"), vectors]).with_columns(version=pl.lit(found.version))
        )
    write_embeddings(output, found.users, found.user_vectors, found.timestamps, found.version)
    print(
        f"{output}: {len(found.users):,} vectors of {dimension} numbers for {found.users.n_unique():,} users, version "
        f"{found.version}"
    )
    if found.left_out:
        print(f"left out: {found.left_out:,} interactions with items that came after the space was made")


def read_interactions(source: str) -> pl.DataFrame:
    """user_id, item_id (texts), weight (float64) and, where the table has them, timestamp (UTC).

    Raises DataError with file, row and user for what cannot be used.
    """
    table = open_table(source)
    table.require("user_id", "item_id")
    for column in ("user_id", "item_id"):
        table.require_type(column, is_id, "texts or whole numbers")
    parts = []
    names = [name for name in ("user_id", "item_id", "weight", "timestamp") if name in table.schema]
    for start, batch in table.batches(names, _ROWS):
        where = locator(source, start, batch["user_id"])
        users = check_users(batch["user_id"], where)
        item = batch["item_id"].cast(pl.String)
        missing = first_true(item.is_null() | (item == ""))
        if missing is not None:
            raise DataError(f"{where(missing)}: item_id: expected an item, got none; fill it or drop the row")
        given = batch["weight"] if "weight" in names else pl.repeat(1.0, len(batch), eager=True)
        weight = given.cast(pl.Float64, strict=False).alias("weight")
        wrong = first_true(~(weight.is_finite() & (weight > 0)).fill_null(False))
        if wrong is not None:
            raise DataError(f"{where(wrong)}: weight: expected a number > 0, got {given[wrong]!r}; drop the row")
        columns = [users, item.alias("item_id"), weight]
        if "timestamp" in names:
            times = to_utc(batch["timestamp"], where)
            none = first_true(times.is_null())
            if none is not None:
                raise DataError(
                    f"{where(none)}: timestamp: expected one in every row, got none; fill or drop the column"
                )
            columns.append(times)
        parts.append(pl.DataFrame(columns))
    if not parts:
        raise table.empty()
    return pl.concat(parts)


def factorise(interactions: pl.DataFrame, settings: FactorSettings) -> Factors:
    """Factorise a table as of :func:`read_interactions`.

    A vector with a timestamp sees no interaction at or after it, and the space no interaction after the first of them.

    Raises:
        DataError: no interactions in the part that the space is made of; fewer users or items than dimensions.
        MissingExtraError: implicit, or for lightgcn torch-geometric, is not installed.
    """
    timed = "timestamp" in interactions.columns
    if settings.refresh == "never":
        users, items, matrix = matrix_of(interactions)
        check_size(settings.dimension, users, items)
        model = _fit(matrix, settings)
        # Known just after the last interaction: an example of the same instant may be that interaction itself.
        last = interactions["timestamp"].dt.offset_by("1us").max() if timed else None
        times = None if last is None else pl.repeat(last, len(users), dtype=interactions["timestamp"].dtype, eager=True)
        item_vectors = np.asarray(model.item_factors, np.float32)
        version = space_version(settings.method, item_vectors)
        return Factors(users, np.asarray(model.user_factors, np.float32), times, items, item_vectors, version, 0)
    if not timed:
        raise DataError("refresh: expected a column timestamp, got none; add it, or refresh never")
    every = _EVERY[settings.refresh]
    dated = interactions.with_columns(end=pl.col("timestamp").dt.truncate(every).dt.offset_by(every))
    ends = dated["end"].unique().sort()
    first = ends[max(0, round(settings.space_share * len(ends)) - 1)]
    users, items, matrix = matrix_of(dated.filter(pl.col("end") <= first))
    check_size(settings.dimension, users, items)
    model = _fit(matrix, settings)
    known = dated.filter(pl.col("item_id").is_in(items.implode()))
    parts: list[tuple[pl.Series, Floats, datetime]] = []
    for end in ends.filter(ends >= first):
        active = known.filter(pl.col("end") == end) if end > first else known.filter(pl.col("end") <= end)
        if active.is_empty():
            continue
        before = known.filter((pl.col("end") <= end) & pl.col("user_id").is_in(active["user_id"].unique().implode()))
        who, _, rows = matrix_of(before, items)
        parts.append((who, np.asarray(model.recalculate_user(np.arange(len(who)), rows), np.float32), end))
    item_vectors = np.asarray(model.item_factors, np.float32)
    times = pl.concat(pl.repeat(end, len(who), dtype=dated["end"].dtype, eager=True) for who, _, end in parts)
    return Factors(
        pl.concat(who for who, _, _ in parts),
        np.concatenate([vectors for _, vectors, _ in parts]),
        times,
        items,
        item_vectors,
        space_version(settings.method, item_vectors),
        dated.height - known.height,
    )


def als(counts: Any, dimension: int, regularization: float, alpha: float, iterations: int, seed: int) -> Any:
    """implicit's ALS, fitted on a sparse table [users, items]; it has ``user_factors`` and ``item_factors``."""
    settings = FactorSettings(
        dimension=dimension, regularization=regularization, alpha=alpha, iterations=iterations, seed=seed
    )
    return _fit(counts, settings)


def _fit(counts: Any, settings: FactorSettings) -> Any:
    """A model of a sparse table [users, items], with ``user_factors`` and ``item_factors``."""
    own_regularization, own_iterations = _OWN[settings.method]
    regularization, iterations = settings.regularization or own_regularization, settings.iterations or own_iterations
    if settings.method == "lightgcn":
        from e2p.users.graph import lightgcn

        layers, rate = settings.layers, settings.learning_rate
        return lightgcn(counts, settings.dimension, layers, iterations, rate, regularization, settings.seed)
    try:
        from implicit.als import AlternatingLeastSquares
        from implicit.bpr import BayesianPersonalizedRanking
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise MissingExtraError("implicit", "recsys", "vectors from interactions") from None
    # BPR adds a bias to each side as one more number.
    factors = settings.dimension - (settings.method == "bpr")
    # One thread: with more, a seed does not repeat.
    shared = {"factors": factors, "regularization": regularization, "iterations": iterations, "use_gpu": False,
              "random_state": settings.seed, "num_threads": 1}  # fmt: skip
    with threadpool_limits(1, "blas"):
        model: Any
        if settings.method == "als":
            model = AlternatingLeastSquares(alpha=settings.alpha, **shared)
        else:
            model = BayesianPersonalizedRanking(**shared)
        model.fit(counts.astype(np.float32), show_progress=False)
    return model


def matrix_of(frame: pl.DataFrame, items: pl.Series | None = None) -> tuple[pl.Series, pl.Series, Any]:
    """Users and items, sorted, and the table of their summed weights [users, items]."""
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        raise MissingExtraError("scipy", "recsys", "vectors from interactions") from None
    users = frame["user_id"].unique().sort()
    items = frame["item_id"].unique().sort() if items is None else items
    rows = np.searchsorted(users.to_numpy(), frame["user_id"].to_numpy())
    columns = np.searchsorted(items.to_numpy(), frame["item_id"].to_numpy())
    return users, items, csr_matrix((frame["weight"].to_numpy(), (rows, columns)), shape=(len(users), len(items)))


def space_version(method: str, item_vectors: Floats) -> str:
    """Name of a space: two of the same name are the same item vectors."""
    digest = hashlib.blake2b(np.ascontiguousarray(item_vectors).tobytes(), digest_size=4).hexdigest()
    return f"{method}-{item_vectors.shape[1]}-{digest}"


def check_size(dimension: int, users: pl.Series, items: pl.Series) -> None:
    """Raise DataError unless there are more users and more items than dimensions."""
    if min(len(users), len(items)) <= dimension:
        raise DataError(
            f"expected more than {dimension} users and items for vectors of {dimension} numbers, got {len(users)} and "
            f"{len(items)}; lower the dimension"
        )
