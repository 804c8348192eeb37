"""Which codes may follow: all items' codes as a trie in two arrays, asked for whole batches without a loop over rows.

A model that writes an item code by code may only write codes that some item has. Nodes are numbered breadth first and
in order of their prefixes, so the children of a node are neighbours and ``parent * width + code`` grows with the node's
number: one binary search in it finds a child, one gather finds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from e2p.errors import DataError

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trie:
    """Codes of N items, L levels each; made by :meth:`build`.

    A node is a partial code. It is -1 where no item begins like that, and stays so; all questions may be asked of it.

    Args:
        sizes: L numbers of codes, by level.
        offsets: L + 2 numbers: nodes of depth d are ``offsets[d]`` to ``offsets[d + 1] - 1``; the root has depth 0.
        keys: [nodes], growing: the parent's number times the largest size, plus the node's own code; -1 for the root.
            int32 where that is enough, otherwise int64.
        first: int32 or int64 [nodes + 1]: the children of node n are ``first[n]`` to ``first[n + 1] - 1``.
        items: int32 or int64 [N], in order of the codes: the item's row.
        widest: L numbers: most children of a node, by the node's depth.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    keys: Tensor
    first: Tensor
    items: Tensor
    widest: tuple[int, ...]

    @classmethod
    def build(cls, codes: npt.NDArray[Any] | Tensor, sizes: Sequence[int]) -> Trie:
        """The trie of all items' codes.

        Args:
            codes: whole numbers [N, L], by item row; each row differs from all others.
            sizes: L numbers of codes, by level.

        Raises:
            DataError: no items, another shape, a code outside its level, two rows with the same codes.
        """
        table = _checked(codes, sizes)
        if not len(table):
            raise DataError("codes: expected at least one item, got none; give items codes first")
        order = np.lexsort(table.T[::-1])
        return cls._from_sorted(table[order], order, sizes)

    @classmethod
    def _from_sorted(cls, table: Codes, order: npt.NDArray[np.int64], sizes: Sequence[int]) -> Trie:
        """From codes in their order; ``order`` has the item row of each."""
        count, depth = table.shape
        fresh = np.zeros(count, dtype=bool)
        fresh[0] = True  # whether the prefix of a row differs from that of the row before
        parents = np.zeros(count, dtype=np.int64)
        keys, offsets, width = [np.array([-1])], [0, 1], max(sizes)
        for level in range(depth):
            fresh[1:] |= table[1:, level] != table[:-1, level]
            keys.append(parents[fresh] * width + table[fresh, level])
            parents = np.cumsum(fresh) + (offsets[-1] - 1)
            offsets.append(offsets[-1] + len(keys[-1]))
        if offsets[-1] - offsets[-2] < count:
            same = int(np.flatnonzero(~fresh)[0])
            rows = sorted((int(order[same - 1]), int(order[same])))
            raise _duplicate(rows[1], rows[0], table[same])
        joined = np.concatenate(keys)
        children = np.bincount(joined[1:] // width, minlength=len(joined))
        widest = tuple(int(children[low:high].max()) for low, high in pairwise(offsets[:-1]))
        first = _smallest(np.concatenate([[1], 1 + np.cumsum(children)]), len(joined))
        keyed = _smallest(joined, offsets[-2] * width)  # that the greatest question fits too
        return cls(tuple(map(int, sizes)), tuple(offsets), keyed, first, _smallest(order, count), widest)

    def __len__(self) -> int:
        """N, the items."""
        return len(self.items)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Memory of the trie's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.first, self.items))

    def to(self, device: str | torch.device) -> Trie:
        """The same trie with its tensors elsewhere."""
        return replace(self, keys=self.keys.to(device), first=self.first.to(device), items=self.items.to(device))

    def root(self, batch: int) -> Int[Tensor, "b"]:
        """The empty code, ``batch`` times."""
        return torch.zeros(batch, dtype=torch.int64, device=self.device)

    def step(self, nodes: Int[Tensor, "..."], codes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The nodes that one more code leads to; -1 where no item goes on like that.

        Args:
            nodes: nodes, any shape.
            codes: the codes that follow, the same shape; numbers that are no codes lead to -1.

        Returns:
            int64, the same shape.
        """
        width = max(self.sizes)
        valid = (nodes >= 0) & (nodes < self.offsets[-2]) & (codes >= 0) & (codes < width)
        wanted = torch.where(valid, nodes.long() * width + codes.long(), 0).to(self.keys.dtype).contiguous()
        found = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where(valid & (self.keys[found] == wanted), found, -1)

    def allowed(self, nodes: Int[Tensor, "..."], level: int) -> Bool[Tensor, "... codes"]:
        """Which codes of a level may follow.

        Memory is that of the answer and of 16 bytes for each node and child, with as many children as the widest node
        of the level has.

        Args:
            nodes: nodes of depth ``level``, any shape; to others nothing may be added.
            level: 0 to L - 1.

        Returns:
            True where some item goes on like that: [..., size of the level].

        Raises:
            DataError: there is no such level.
        """
        if not 0 <= level < len(self.sizes):
            raise DataError(f"level: expected 0 to {len(self.sizes) - 1}, got {level}; a finished code has no next")
        low, high = self.offsets[level], self.offsets[level + 1]
        valid = ((nodes >= low) & (nodes < high)).unsqueeze(-1)
        at = nodes.long().clamp(low, high - 1)
        start, end = self.first[at].long().unsqueeze(-1), self.first[at + 1].long().unsqueeze(-1)
        # Nodes with fewer children name their last one again: writing it twice does no harm.
        children = torch.minimum(start + torch.arange(self.widest[level], device=self.device), end - 1)
        codes = (self.keys[children] % max(self.sizes)).long()
        mask = torch.zeros((*nodes.shape, self.sizes[level]), dtype=torch.bool, device=self.device)
        return mask.scatter_(-1, codes, valid.expand_as(codes))

    def leaf(self, nodes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The rows of the items whose codes end in these nodes, int64; -1 where a code is not complete."""
        start = self.offsets[-2]
        rows = self.items[(nodes.long() - start).clamp(min=0)].long()
        return torch.where(nodes >= start, rows, -1)

    def insert(self, codes: npt.NDArray[Any] | Tensor) -> Trie:
        """The trie with M more items, in rows N to N + M - 1; this one stays as it is.

        The new codes are merged into the old ones, which are in order already: a pass over the items, no sorting.

        Args:
            codes: whole numbers [M, L].

        Raises:
            DataError: another shape, a code outside its level, codes that an item has already.
        """
        table, here = _checked(codes, self.sizes, len(self)), self.to("cpu")
        order = np.lexsort(table.T[::-1])
        table = table[order]
        at = here._places(table, order)
        rows = np.insert(here.items.numpy().astype(np.int64), at, order + len(self))
        merged = np.insert(here._table(), at, table, axis=0)
        return Trie._from_sorted(merged, rows, self.sizes).to(self.device)

    def _places(self, table: Codes, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many items stand before each of M codes, which none of them has."""
        keys, first, width = self.keys.numpy(), self.first.numpy(), max(self.sizes)
        at = np.zeros(len(table), dtype=np.int64)
        known = np.ones(len(table), dtype=bool)
        for level in range(len(self.sizes)):
            wanted = at * width + table[:, level]
            after = np.searchsorted(keys, wanted.astype(np.int64)).astype(np.int64)
            # Once a prefix is new, the whole code stands before what is under the first node that is greater.
            at = np.where(known, after, first[at])
            known &= keys[np.minimum(at, len(keys) - 1)] == wanted
        if known.any():
            row = int(np.flatnonzero(known)[0])
            old = int(self.items[int(at[row]) - self.offsets[-2]])
            raise _duplicate(len(self) + int(order[row]), old, table[row])
        return at - self.offsets[-2]

    def _table(self) -> Codes:
        """int64 [N, L]: all codes in their order."""
        keys, width = self.keys.numpy(), max(self.sizes)
        nodes = np.arange(self.offsets[-2], self.offsets[-1])
        table = np.empty((len(self), len(self.sizes)), dtype=np.int64)
        for level in reversed(range(len(self.sizes))):
            nodes, table[:, level] = np.divmod(keys[nodes], width)
        return table


def _checked(codes: npt.NDArray[Any] | Tensor, sizes: Sequence[int], start: int = 0) -> Codes:
    table = codes.cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if not len(sizes) or min(sizes) < 1:
        raise DataError(f"sizes: expected a number of codes >= 1 for each level, got {list(sizes)}; name every level")
    if table.ndim != 2 or table.shape[1] != len(sizes) or not np.issubdtype(table.dtype, np.integer):
        raise DataError(
            f"codes: expected whole numbers [N, {len(sizes)}], one for each level, got {table.dtype} "
            f"{list(table.shape)}; give every item a code on every level"
        )
    wrong = (table < 0) | (table >= np.array(sizes))
    if wrong.any():
        row, level = map(int, np.argwhere(wrong)[0])
        raise DataError(
            f"codes: row {start + row}, level {level}: expected 0 to {sizes[level] - 1}, got {table[row, level]}; the "
            "item's code belongs to another codebook: encode it again"
        )
    return table.astype(np.int64, copy=False)


def _duplicate(row: int, other: int, codes: Codes) -> DataError:
    return DataError(
        f"codes: row {row}: expected codes that no other item has, got {codes.tolist()} of row {other} too; add a "
        "level that separates them"
    )


def _smallest(values: npt.NDArray[np.int64], greatest: int) -> Tensor:
    """As int32 if the greatest number fits, otherwise int64."""
    return torch.from_numpy(values.astype(np.int32 if greatest <= np.iinfo(np.int32).max else np.int64))
