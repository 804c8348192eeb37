"""The items that a playlist may name: their names and vectors, and how a generated text is read back to them.

A language model writes "artist a ; artist b ; artist c". Whatever is measured of such a list (hits, affinity,
engagement) is measured of the items that it names, so the reading decides: too strict, and a slip of spelling counts
as an invention; too lax, and an invention counts as the artist that it resembles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.checks import check_types
from e2p.data.sources import is_text, open_table
from e2p.data.vectors import Vectors, require_finite, to_vectors
from e2p.errors import ConfigError, DataError, MissingExtraError

COLUMNS = ("item_id", "item", "embedding")
SEPARATOR = " ; "
# Least likeness (100: the same) at which a name that is in no catalogue is read as the nearest one that is: 200 times
# the letters in common, in order, by the letters of both. At 90 one wrong letter needs ten right ones beside it, one
# too many or too few needs five, so short names are never stretched. Measured on the 17,613 names of Last.fm
# (HetRec 2011), 4,000 of them drawn: with one random slip, 79.3% are read as what they were and 0.2% as another (85:
# 91.0% and 0.7%; 95: 38.5% and 0.1%), nearly all that are missed having under ten letters; 2.2% of the names are this
# near to another one (85: 5.3%; 95: 0.5%), at least a third of these being one artist in two spellings. An exact match
# goes first, so those are confused only where the catalogue lacks one of them. A ratio that forgives a missing half, as
# rapidfuzz's WRatio does, finds another artist within 90 for 73% of the names.
CUTOFF = 90.0
ROWS = 16_384  # rows read at once


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items that can be recommended, by row.

    Args:
        ids: N different ids.
        names: N names; several items may share one (:attr:`read_as`).
        vectors: float32 [N, D], finite. A zero vector is an item that nothing is known of.
        source: where it was read from, for messages.

    Raises:
        DataError: no items, lengths that differ, an id or a name that is missing, an id that comes twice, a number
            that is not finite; the message has the row.
    """

    ids: list[str]
    names: list[str]
    vectors: Vectors
    source: str = "catalogue"

    def __post_init__(self) -> None:
        count = len(self.ids)
        if not count:
            raise DataError(f"{self.source}: expected at least one item, got none; check what wrote it")
        if len(self.names) != count or self.vectors.ndim != 2 or len(self.vectors) != count or not self.dim:
            raise DataError(
                f"{self.source}: expected {count} names and vectors [{count}, D], one for each id, "
                f"got {len(self.names)} names and {list(self.vectors.shape)}; give every item one of each"
            )
        first: dict[str, int] = {}
        for row, (item, name) in enumerate(zip(self.ids, self.names, strict=True)):
            if item is None or not item.strip():
                raise DataError(f"{self.source}: row {row}: expected an item id, got none; fill item_id or drop it")
            if name is None or not normalise(name):
                raise DataError(f"{self.where(row)}: expected a name, got {name!r}; fill item or drop the row")
            if first.setdefault(item, row) != row:
                raise DataError(f"{self.where(row)}: expected an id once, got it in row {first[item]} too; drop one")
        require_finite(self.vectors, self.where)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """D, the numbers in a vector."""
        return int(self.vectors.shape[1])

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of every id."""
        return {item: row for row, item in enumerate(self.ids)}

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Row of every normalised name: the first of those that share it."""
        found: dict[str, int] = {}
        for row, name in enumerate(self.names):
            found.setdefault(normalise(name), row)
        return found

    @cached_property
    def read_as(self) -> npt.NDArray[np.int64]:
        """int64 [N]: the row that each row's name is read back as, the first of those that share it.

        A text cannot say which of them it means. Whoever compares read items with true ones maps the true ones first.
        """
        return np.array([self.by_name[normalise(name)] for name in self.names], dtype=np.int64)

    @property
    def shared_names(self) -> int:
        """Items that are never read back, for an earlier one has their name."""
        return len(self.ids) - len(self.by_name)

    def where(self, row: int) -> str:
        return f"{self.source}: row {row} (item {self.ids[row]!r})"


class ReadBack(NamedTuple):
    """What a text names: ``entries`` are the items, the duplicates and the inventions together.

    Args:
        entries: named in the text; empty ones are none.
        items: rows of the catalogue, each once, in the order of the text.
        duplicates: entries that name an item, or an invention, that was named before.
        inventions: different entries that no name of the catalogue is near to.
    """

    entries: int
    items: list[int]
    duplicates: int
    inventions: int


def load_catalogue(source: str) -> Catalogue:
    """Read and check a table of items: item_id, item (the name) and embedding, in Parquet, JSON Lines or CSV.

    Raises:
        DataError: with file and row: a column or a value is missing, an id comes twice, vectors differ in length or
            are not finite, the table is empty or cannot be read.
    """
    table = open_table(source)
    table.require(*COLUMNS)
    check_types(table)
    table.require_type("item", is_text, "text")
    ids: list[str] = []
    names: list[str] = []
    blocks: list[Vectors] = []
    for start, batch in table.batches(COLUMNS, ROWS):
        items = batch["item_id"].cast(pl.String)

        def where(index: int, start: int = start, items: pl.Series = items) -> str:
            return f"{source}: row {start + index} (item {items[index]!r})"

        blocks.append(to_vectors(batch["embedding"], blocks[0].shape[1] if blocks else None, where))
        ids += items.to_list()
        names += batch["item"].cast(pl.String).to_list()
    if not blocks:
        raise table.empty()
    return Catalogue(ids, names, np.concatenate(blocks), source)


def normalise(name: str) -> str:
    """A name as it is compared: without case, compatible characters as one (NFKC), single spaces.

    Language models may lower-case what they read and write.
    """
    for _ in range(2):  # folding can undo the composition, and composing the folding
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(name.split())


def playlist_text(names: Sequence[str], separator: str = SEPARATOR) -> str:
    """A playlist as a text, the names in their order; :func:`read_back` reads it.

    Raises:
        DataError: a name holds the separator's character, or a line break: it would be read as two.
    """
    mark = _mark(separator)
    for name in names:
        if mark in unicodedata.normalize("NFKC", name) or len(name.splitlines()) > 1:
            raise DataError(f"item {name!r}: expected a name in one line without {mark!r}; rename it or change both")
    return separator.join(names)


def entries_of(text: str, separator: str = SEPARATOR) -> list[str]:
    """What a text names, as names are compared: cut at the separator's character and at line breaks."""
    cut = f"{re.escape(_mark(separator))}|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
    return [entry for entry in map(normalise, re.split(cut, unicodedata.normalize("NFKC", text))) if entry]


def read_back(
    texts: Sequence[str], catalogue: Catalogue, separator: str = SEPARATOR, cutoff: float = CUTOFF
) -> list[ReadBack]:
    """The items that generated texts name.

    A text is cut at the separator's character and at line breaks; spaces do not count. An entry is read as the item
    whose name is the same after :func:`normalise`, otherwise as the one whose name is likest to it, if it is like
    enough and has the same digits ("volume 11" is not "volume 12"). Of names that are equally like, and of items that
    share a name, the first in the catalogue is taken. A list that was cut off while it was written ends in half a name:
    drop that before.

    Args:
        texts: N playlists.
        catalogue: the items.
        separator: what stands between names, spaces around it or not.
        cutoff: least likeness, 0 to 100; 100: the same letters only. See :data:`CUTOFF`.

    Returns:
        N readings.

    Raises:
        ConfigError: the separator or the cutoff is not usable.
        DataError: a name in the catalogue holds the separator's character: it could never be read.
        MissingExtraError: rapidfuzz is not installed and an entry has no exact match.
    """
    mark = _mark(separator)
    if not 0 < cutoff <= 100:
        raise ConfigError(f"cutoff: expected a number above 0, up to 100, got {cutoff}; 90 is the default")
    for name, row in catalogue.by_name.items():
        if mark in name:
            raise DataError(
                f"{catalogue.where(row)}: expected a name without the separator {mark!r}, got "
                f"{catalogue.names[row]!r}; rename it or separate by another character"
            )
    memory: dict[str, int | None] = {}
    known = list(catalogue.by_name)

    def row_of(entry: str) -> int | None:
        if entry not in memory:
            exact = catalogue.by_name.get(entry)
            memory[entry] = _likest(entry, known, catalogue.by_name, cutoff) if exact is None else exact
        return memory[entry]

    found = []
    for text in texts:
        entries = entries_of(text, separator)
        read: dict[int | str, None] = {}  # rows and inventions, each once, in order
        for entry in entries:
            item = row_of(entry)
            read[entry if item is None else item] = None
        items = [key for key in read if isinstance(key, int)]
        found.append(ReadBack(len(entries), items, len(entries) - len(read), len(read) - len(items)))
    return found


def reading(readbacks: Sequence[ReadBack]) -> dict[str, Any]:
    """Totals of many readings, for a report.

    Returns:
        ``entries``, ``found`` (items, each once a text), ``inventions`` and ``duplicates``; ``empty``: texts that name
        nothing; ``miss_rate``: inventions by different entries (found and inventions), None without any.
    """
    found = sum(len(one.items) for one in readbacks)
    inventions = sum(one.inventions for one in readbacks)
    return {
        "entries": sum(one.entries for one in readbacks),
        "found": found,
        "inventions": inventions,
        "duplicates": sum(one.duplicates for one in readbacks),
        "empty": sum(one.entries == 0 for one in readbacks),
        "miss_rate": inventions / (found + inventions) if found + inventions else None,
    }


def _likest(entry: str, known: list[str], by_name: dict[str, int], cutoff: float) -> int | None:
    try:
        from rapidfuzz import fuzz, process
    except ImportError:
        raise MissingExtraError("rapidfuzz", "recsys", "reading generated playlists") from None
    for name, _, _ in process.extract(entry, known, scorer=fuzz.ratio, score_cutoff=cutoff, limit=None):
        if _digits(name) == _digits(entry):
            return by_name[name]
    return None


def _digits(name: str) -> str:
    return "".join(character for character in name if character.isdigit())


def _mark(separator: str) -> str:
    mark = separator.strip()
    if not mark or mark != normalise(mark):
        raise ConfigError(f"separator: expected a mark such as {SEPARATOR!r} that is no upper case, got {separator!r}")
    return mark
