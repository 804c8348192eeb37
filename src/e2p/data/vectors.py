"""Vectors on their way from a table to one float32 array: checked, and on disk as soon as they are many."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.sources import Where, first_true, parse_json
from e2p.errors import DataError

IN_MEMORY_BYTES = 1 << 28  # larger embedding tables go to a memory-mapped file
Vectors = npt.NDArray[np.float32]


def to_vectors(values: pl.Series, dim: int | None, where: Where) -> Vectors:
    """float32 [batch, D] of lists, arrays or JSON texts of numbers; D is ``dim``, or the first row's length.

    Raises:
        DataError: with row and user: another length, null, a number that is not finite in float32.
    """
    if values.dtype == pl.String:
        values = parse_json(values, pl.List(pl.Float64), where, "an embedding such as [0.1, 0.2]")
    if values.dtype == pl.Null:
        values = values.cast(pl.List(pl.Float32))
    lengths = values.arr.len() if isinstance(values.dtype, pl.Array) else values.list.len()
    first = lengths[0] if len(lengths) else None
    want = dim or first or 1
    bad = first_true((lengths != want) | values.is_null())
    if bad is not None:
        got = "none" if values[bad] is None else lengths[bad]
        raise DataError(
            f"{where(bad)}: expected an embedding of {want} numbers, got {got}; all users need one dimension"
        )
    block = values.explode().cast(pl.Float32).to_numpy().reshape(len(values), want)
    require_finite(block, where)
    return block


def require_finite(block: Vectors, where: Where) -> None:
    if not np.isfinite(block).all():
        row, column = np.argwhere(~np.isfinite(block))[0]
        raise DataError(
            f"{where(int(row))}: expected finite float32 numbers, got {block[row, column]} at {column}; "
            "mend or drop the vector"
        )


class VectorSink:
    """Collects blocks [n, D]: in RAM while they are few, then in a .npy file that is named by its content.

    Args:
        folder: where that file goes; made when it is needed.

    Raises:
        DataError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blocks: list[Vectors] = []
        self._rows = self._dim = 0
        self._file: IO[bytes] | None = None
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, block: Vectors) -> None:
        self._rows += len(block)
        self._dim = block.shape[1]
        self._blocks.append(block)
        if self._rows * self._dim * 4 > IN_MEMORY_BYTES:
            self._spill()

    def finish(self) -> Vectors:
        """All blocks as one array [N, D]; read-only and memory-mapped if they went to disk."""
        if self._file is None:
            return np.concatenate(self._blocks)
        self._file.seek(0)
        self._write_header(self._file)
        self._file.close()
        target = self._folder / f"{self._digest.hexdigest()}-{self._dim}.npy"
        os.replace(self._file.name, target)
        return cast(Vectors, np.load(target, mmap_mode="r"))

    def close(self) -> None:
        """Remove what an interrupted reading has left."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False)  # noqa: SIM115
                self._write_header(self._file)
            for block in self._blocks:
                self._digest.update(data := block.tobytes())
                self._file.write(data)
        except OSError as error:
            raise DataError(f"{self._folder}: vectors do not fit there: {error}; set data.cache_dir") from None
        self._blocks.clear()

    def _write_header(self, file: IO[bytes]) -> None:
        # numpy pads the header so that the first axis can grow: the final row count fits over the first.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(cast(Any, file), header)
