"""Residual quantisation of item vectors by faiss, and what is counted of codes: functions on arrays."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from e2p.data.vectors import Vectors, require_finite
from e2p.errors import DataError, MissingExtraError

Codes = npt.NDArray[np.int64]
LONGEST = 1e15  # of a vector: squares of distances stay finite in float32; at infinite ones faiss ends the process
_ROWS = 16_384  # items quantised at once
_WORKSPACE = 1 << 28  # bytes that faiss may hold distances in


def require_new(ids: Sequence[str], old: Container[str], source: str) -> None:
    """Refuse with a DataError what is no id, is in ``old``, or comes twice."""
    seen: set[str] = set()
    for row, item in enumerate(ids):
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{source}: row {row}: expected an item id, got {item!r}; name it or drop it")
        if item in old or item in seen:
            raise DataError(f"{source}: row {row}: expected an id once, got item {item!r} again; drop one")
        seen.add(item)


def checked(vectors: Vectors, ids: Sequence[str], dim: int | None, source: str) -> Vectors:
    """Vectors [N, D], if there is one for each id, D is ``dim`` (None: any) and all numbers are finite.

    Raises:
        DataError: they are not, or a vector is longer than :data:`LONGEST`; with row and item.
    """
    values = np.asarray(vectors)
    if values.ndim != 2 or not values.size or values.shape != (len(ids), dim or values.shape[1]):
        raise DataError(
            f"{source}: expected vectors [{len(ids)}, {dim or 'D'}] for at least one item, one for each, got "
            f"{list(values.shape)}; make them as those of the other items"
        )
    for start, part in zip(range(0, len(values), _ROWS), _blocks(values), strict=True):

        def where(index: int, start: int = start) -> str:
            return f"{source}: row {start + index} (item {ids[start + index]!r})"

        require_finite(part, where)
        lengths = np.linalg.norm(part.astype(np.float64), axis=1)
        if lengths.max() > LONGEST:
            row = int(lengths.argmax())
            raise DataError(
                f"{where(row)}: expected a vector no longer than {LONGEST:g}, got {lengths[row]:g}; scale all down"
            )
    return values


def train(values: Vectors, sizes: Sequence[int], beam: int, most: int, seed: int) -> tuple[Vectors, ...]:
    """A codebook [size, D] for each size, from vectors [N, D]; of more than ``most`` so many are drawn.

    Each level is made by k-means of what the best codes so far leave over. Measured on 3,686 Amazon titles by MiniLM,
    three levels of 256, a quarter held out, beam 5: 0.359 of the variance is left over in the others and 0.549 in
    those, and 559 of 2,800 share their codes. To make levels of all that the beam holds, as faiss can, leaves 0.375 and
    0.547 (661 share). Its k-means in growing dimensions leaves 0.329 and 0.536 (521), for four times the time, and
    only works with as many items as dimensions.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    faiss = _faiss()
    made = _quantiser(faiss, values.shape[1], sizes, beam)
    made.cp.seed, made.cp.min_points_per_centroid = seed, 1  # faiss warns below, on the process's own stderr
    if len(values) > most:
        values = values[np.sort(np.random.default_rng(seed).choice(len(values), most, replace=False))]
    made.train(np.ascontiguousarray(values, dtype=np.float32))
    joined = faiss.vector_to_array(made.codebooks).reshape(-1, values.shape[1])
    return tuple(part.copy() for part in np.split(joined, np.cumsum(sizes)[:-1]))


def quantise(
    values: Vectors, codebooks: Sequence[Vectors], beam: int, scale: float
) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Codes of vectors [N, D], and how far they are off.

    Args:
        values: the vectors, checked.
        codebooks: [size, D], by level.
        beam: partial codes that are kept while a vector's codes are sought.
        scale: what squared distances are divided by, unless it is 0.

    Returns:
        Codes, int64 [N, levels], and errors, float32 [N]: squared distance of each vector from what its codes stand
        for. Of codes that are equally near within rounding, either may be taken.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    faiss = _faiss()
    sizes = [len(codebook) for codebook in codebooks]
    made = _quantiser(faiss, values.shape[1], sizes, beam)
    faiss.copy_array_to_vector(np.concatenate(codebooks).ravel(), made.codebooks)
    made.is_trained = True
    codes, errors = [], []
    for part in _blocks(values):
        packed = made.compute_codes(part)
        codes.append(faiss.unpack_bitstrings(packed, [size.bit_length() - 1 for size in sizes]).astype(np.int64))
        left = np.square(part - decode(codes[-1], codebooks), dtype=np.float64).sum(axis=1)
        errors.append((left / (scale or 1.0)).astype(np.float32))
    return np.concatenate(codes), np.concatenate(errors)


def decode(codes: Codes, codebooks: Sequence[Vectors]) -> Vectors:
    """The vectors [N, D] that codes stand for, by as many levels as there are codebooks."""
    total = codebooks[0][codes[:, 0]]
    for level, codebook in enumerate(codebooks[1:], 1):
        total += codebook[codes[:, level]]
    return total


def spread(values: Vectors) -> float:
    """Mean squared distance of vectors [N, D] from their mean."""
    mean = values.mean(axis=0, dtype=np.float64)
    return sum(float(np.square(part - mean).sum()) for part in _blocks(values)) / len(values)


def groups(codes: Codes) -> tuple[Codes, Codes]:
    """Rows of codes [N, L] with equal codes: int64 [N], a number for each, and how many rows have it."""
    found = np.zeros(len(codes), dtype=np.int64)
    for column in codes.T:
        found = np.unique(found * (int(column.max()) + 1) + column, return_inverse=True)[1]
    return found, np.bincount(found)


def separate(codes: Codes, ids: Sequence[str], size: int, source: str, old: Codes | None = None) -> Codes:
    """The last code of M items: among those with equal codes it counts from 0, in order of id.

    Args:
        codes: int64 [M, L - 1].
        ids: M ids.
        size: codes that the last level has.
        source: for messages.
        old: int64 [N, L]: codes of other items, last level included; those that share them go on after them.

    Returns:
        int64 [M].

    Raises:
        DataError: an item would need a code beyond ``size``.
    """
    taken = np.empty((0, codes.shape[1] + 1), dtype=np.int64) if old is None else old
    group, counts = groups(np.concatenate([taken[:, :-1], codes]))
    start = np.zeros(len(counts), dtype=np.int64)
    np.maximum.at(start, group[: len(taken)], taken[:, -1] + 1)
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    order = order[np.argsort(group[len(taken) :][order], kind="stable")]
    mine = group[len(taken) :][order]
    last = np.empty(len(ids), dtype=np.int64)
    last[order] = start[mine] + np.arange(len(mine)) - np.searchsorted(mine, mine)
    if last.max() >= size:
        row = int(last.argmax())
        raise DataError(
            f"{source}: item {ids[row]!r}: expected at most {size} items with equal codes before the separating level, "
            f"got {counts[group[len(taken) + row]]} with {codes[row].tolist()}; leave out items with equal vectors, "
            "or use larger codebooks or a larger separating level"
        )
    return last


def balance(codes: Codes, size: int) -> dict[str, Any]:
    """How evenly the codes [N] of a level are used: size, used, entropy (bits), perplexity, top_code, top_share."""
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    entropy = max(0.0, -float((shares * np.log2(shares)).sum()))
    return {
        "size": size,
        "used": len(shares),
        "entropy": entropy,
        "perplexity": 2.0**entropy,
        "top_code": int(counts.argmax()),
        "top_share": float(shares.max()),
    }


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu", "recsys", "Making semantic ids") from None
    return faiss


def _quantiser(faiss: Any, dim: int, sizes: Sequence[int], beam: int) -> Any:
    bits = faiss.UInt64Vector()
    for size in sizes:
        bits.push_back(size.bit_length() - 1)
    made = faiss.ResidualQuantizer(dim, bits)
    # A beam that holds all codes of the first level is not sorted there, and faiss then takes any for the best one.
    made.max_beam_size, made.max_mem_distances = min(beam, sizes[0] - 1), _WORKSPACE
    made.train_type = type(made).Train_top_beam | type(made).Skip_codebook_tables
    return made


def _blocks(values: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(values), _ROWS):
        yield np.ascontiguousarray(values[start : start + _ROWS], dtype=np.float32)
