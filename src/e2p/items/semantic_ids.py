"""Items as short sequences of codes, so that a language model can name one by writing a few tokens.

Residual quantisation: the first code stands for the nearest of K vectors, the next for what the first has left over,
and so on; items that are alike begin alike. A last level tells apart those that end up with the same codes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from e2p.data.vectors import Vectors
from e2p.errors import ConfigError, DataError
from e2p.items.residual import Codes, balance, checked, decode, groups, quantise, require_new, separate, spread, train

FORMAT = 1
RECORD = "semantic_ids.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the levels
LARGEST = 65_536  # codes of a level
_TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,8})>")


@dataclass(frozen=True)
class SemanticIdSettings:
    """How item vectors become codes.

    Args:
        sizes: codes of each level, powers of two; as many levels as there are numbers. The separating level comes on
            top.
        beam: partial codes that are kept while an item's codes are sought, fewer than the first level has; 1 takes the
            nearest on every level.
        separate: codes of the separating level: most items that may share all other codes, those that come later
            included.
        training_items: items that the codebooks are made of; of more, so many are drawn.
        seed: of that draw and of k-means.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    beam: int = 5
    separate: int = 256
    training_items: int = 65_536
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not 1 <= len(self.sizes) < len(LETTERS) or any(k < 2 or k & (k - 1) or k > LARGEST for k in self.sizes):
            raise ConfigError(
                f"sizes: expected 1 to {len(LETTERS) - 1} powers of two from 2 to {LARGEST}, got {list(self.sizes)}; "
                "256 for each level is usual"
            )
        least = {"beam": 1, "separate": 1, "training_items": max(self.sizes), "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: expected a whole number >= {low}, got {getattr(self, name)}; raise it")


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The codes of a catalogue's items: made by :meth:`fit`, read by :meth:`load` or :func:`read_codes`.

    Args:
        ids: N different item ids.
        codes: int64 [N, L], each row different from all others.
        sizes: codes of each of the L levels. The separating level's is what it may hold, not what it holds, so the
            vocabulary stays as it is when items are added.
        separated: whether the last level is the separating one.
        codebooks: float32 [size, D] for every other level; none if the codes were ready.
        errors: float32 [N]: squared distance of each item's vector from what its codes stand for, by ``spread``; empty
            without codebooks.
        spread: mean squared distance of the fitted items from their mean.
        settings: what the codebooks were made with.
        source: where it comes from, for messages.

    Raises:
        DataError: lengths that differ, an id that comes twice, a code outside its level, two items with equal codes.
    """

    ids: list[str]
    codes: Codes
    sizes: tuple[int, ...]
    separated: bool
    codebooks: tuple[Vectors, ...] = ()
    errors: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    spread: float = 0.0
    settings: SemanticIdSettings | None = None
    source: str = "semantic ids"

    def __post_init__(self) -> None:
        count, depth = len(self.ids), len(self.sizes)
        if not count or self.codes.shape != (count, depth):
            raise DataError(
                f"{self.source}: expected codes [{count}, {depth}] for at least one item, one code for each level, got "
                f"{list(self.codes.shape)}; give every item all codes"
            )
        require_new(self.ids, (), self.source)
        wrong = (self.codes < 0) | (self.codes >= np.array(self.sizes))
        if wrong.any():
            row, level = map(int, np.argwhere(wrong)[0])
            raise DataError(
                f"{self.where(row)}: expected codes 0 to {self.sizes[level] - 1} at {LETTERS[level]}, got "
                f"{self.codes[row, level]}; it belongs to another codebook: encode it again"
            )
        group, counts = groups(self.codes)
        if counts.max() > 1:
            first, second = np.flatnonzero(group == counts.argmax())[:2].tolist()
            raise DataError(
                f"{self.where(second)}: expected codes of its own, got {''.join(self.tokens(second))} of item "
                f"{self.ids[first]!r} too; add a level that separates them"
            )

    @classmethod
    def fit(cls, vectors: Vectors, ids: Sequence[str], settings: SemanticIdSettings | None = None) -> SemanticIds:
        """Make codebooks from a catalogue's vectors, and give its items codes.

        Args:
            vectors: float32 [N, D].
            ids: N ids. Among items with equal codes the last level counts from 0 in their order, as texts.
            settings: the default if None.

        Raises:
            DataError: fewer items than codes in a level, lengths that differ, an id that comes twice, a number that is
                not finite or too large, more items with equal codes than the last level separates.
            MissingExtraError: faiss is not installed.
        """
        settings = settings or SemanticIdSettings()
        values = checked(vectors, ids, None, "fit")
        require_new(ids, (), "fit")
        if len(ids) < max(settings.sizes):
            raise DataError(
                f"fit: expected at least {max(settings.sizes)} items, as many as a level has codes, got {len(ids)}; "
                "choose smaller sizes"
            )
        codebooks = train(values, settings.sizes, settings.beam, settings.training_items, settings.seed)
        scale = spread(values)
        codes, errors = quantise(values, codebooks, settings.beam, scale)
        last = separate(codes, ids, settings.separate, "fit")
        sizes = (*settings.sizes, settings.separate)
        return cls(list(ids), np.column_stack([codes, last]), sizes, True, codebooks, errors, scale, settings)

    def encode(self, ids: Sequence[str], vectors: Vectors) -> SemanticIds:
        """These items and M new ones behind them. Nothing is trained, and no old code changes.

        Where a new item's codes are taken, its last one is the next number after those in use.

        Args:
            ids: M new ids.
            vectors: float32 [M, D], made as those of :meth:`fit` were.

        Raises:
            DataError: an item has codes already, more items with equal codes than the last level separates, vectors
                that do not fit, or these are ready codes without codebooks.
            MissingExtraError: faiss is not installed.
        """
        require_new(ids, self.rows, self.source)
        codes, errors = self._quantised(vectors, ids)
        last = separate(codes, ids, self.sizes[-1], self.source, self.codes)
        return replace(
            self,
            ids=[*self.ids, *ids],
            codes=np.concatenate([self.codes, np.column_stack([codes, last])]),
            errors=np.concatenate([self.errors, errors]),
        )

    def quantise(self, vectors: Vectors) -> Codes:
        """The codes nearest to vectors [M, D], without the separating level: int64 [M, L - 1].

        Raises:
            DataError: vectors that do not fit, or these are ready codes without codebooks.
            MissingExtraError: faiss is not installed.
        """
        return self._quantised(vectors, [f"row {row}" for row in range(len(vectors))])[0]

    def _quantised(self, vectors: Vectors, ids: Sequence[str]) -> tuple[Codes, npt.NDArray[np.float32]]:
        if self.settings is None:
            raise DataError(
                f"{self.source}: expected codebooks to make codes with, got ready codes; add the items' codes to their "
                "file, or fit codes of your own"
            )
        values = checked(vectors, ids, self.codebooks[0].shape[1], self.source)
        return quantise(values, self.codebooks, self.settings.beam, self.spread)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of every id."""
        return {item: row for row, item in enumerate(self.ids)}

    @cached_property
    def version(self) -> str:
        """Hash of the codebooks (of ids and codes, if these were ready): equal codes mean the same only where it is."""
        digest = hashlib.blake2b(json.dumps([FORMAT, self.sizes, self.separated]).encode(), digest_size=8)
        for codebook in self.codebooks:
            digest.update(codebook.tobytes())
        if not self.codebooks:
            digest.update(json.dumps(self.ids).encode() + self.codes.tobytes())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        return f"{self.source}: row {row} (item {self.ids[row]!r})"

    def rows_of(self, ids: Sequence[str]) -> Codes:
        """Rows of items: int64 [M].

        Raises:
            DataError: an item has no codes.
        """
        for item in ids:
            if item not in self.rows:
                raise DataError(f"{self.source}: item {item!r}: expected codes, got none; encode it or leave it out")
        return np.array([self.rows[item] for item in ids], dtype=np.int64)

    def tokens(self, row: int) -> list[str]:
        """The codes of a row as L texts, such as ``<a_12>``, ``<b_200>``, ``<c_3>``, ``<d_0>``."""
        return [f"<{letter}_{code}>" for letter, code in zip(LETTERS, self.codes[row].tolist(), strict=False)]

    def token_names(self) -> list[str]:
        """All texts that a code can have: level by level, each from 0 to its size - 1.

        Items that are added later need no others.
        """
        return [f"<{letter}_{c}>" for letter, size in zip(LETTERS, self.sizes, strict=False) for c in range(size)]

    def reconstruct(self) -> Vectors:
        """The vectors that the codes stand for: float32 [N, D].

        Raises:
            DataError: these are ready codes without codebooks.
        """
        if not self.codebooks:
            raise DataError(f"{self.source}: expected codebooks, got ready codes; fit codes of your own")
        return decode(self.codes, self.codebooks)

    def report(self) -> dict[str, Any]:
        """How good the codes are, for a report.

        Returns:
            ``items`` and ``version``; ``collisions``: ``items`` that share all codes but the last with another, their
            ``groups`` and the ``largest`` group; ``separating``: ``size`` of the last level and how much of it is
            ``used``, None if there is none; ``levels``: by level the ``size``, the codes ``used``, the ``entropy`` of
            the items' codes in bits, their ``perplexity`` (the size, if all are used alike), the most used code
            (``top_code``) and its ``top_share`` of the items; ``reconstruction_error``: mean squared distance of the
            vectors from what the codes stand for, by that of the fitted ones from their mean; None for ready codes.
        """
        counts = groups(self.codes[:, :-1] if self.separated else self.codes)[1]
        shared = counts[counts > 1]
        last = {"size": self.sizes[-1], "used": int(self.codes[:, -1].max()) + 1} if self.separated else None
        return {
            "items": len(self),
            "version": self.version,
            "collisions": {"items": int(shared.sum()), "groups": len(shared), "largest": int(counts.max())},
            "separating": last,
            "levels": [balance(codes, size) for codes, size in zip(self.codes.T, self.sizes, strict=True)],
            "reconstruction_error": float(self.errors.mean(dtype=np.float64)) if len(self.errors) else None,
        }

    def save(self, folder: str | Path) -> None:
        """Write the codes into a folder, beside whatever else is there: a JSON file, and a safetensors file it names.

        The JSON file is replaced last and in one step, so a write that is cut short leaves the old codes.

        Raises:
            DataError: the folder cannot be written to.
        """
        from safetensors.numpy import save

        target = Path(folder)
        arrays = {"codes": self.codes, "errors": self.errors}
        arrays |= {f"codebook_{level}": codebook for level, codebook in enumerate(self.codebooks)}
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        digest = hashlib.sha256(data).hexdigest()
        name = f"semantic_ids-{digest[:16]}.safetensors"
        record = {
            "format": FORMAT,
            "version": self.version,
            "tensors": name,
            "sha256": digest,
            "sizes": self.sizes,
            "separated": self.separated,
            "spread": self.spread,
            "settings": None if self.settings is None else asdict(self.settings),
            "ids": self.ids,
        }
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".semantic_ids-") as half:
                Path(half, name).write_bytes(data)
                Path(half, RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                os.replace(Path(half, name), target / name)
                os.replace(Path(half, RECORD), target / RECORD)
            for old in target.glob("semantic_ids-*.safetensors"):
                if old.name != name:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{target}: cannot be written: {error}; choose another folder or make room") from None

    @classmethod
    def load(cls, folder: str | Path) -> SemanticIds:
        """What :meth:`save` has written, checked.

        Raises:
            DataError: a file is missing, corrupt, or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(folder, RECORD)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise DataError(f"{path}: expected format {FORMAT}, got {record['format']!r}; install the e2p of then")
            data = Path(folder, record["tensors"]).read_bytes()
            if (digest := hashlib.sha256(data).hexdigest()) != record["sha256"]:
                raise DataError(f"{path}: expected tensors of sha256 {record['sha256']}, got {digest}; copy both again")
            arrays = load(data)
            settings = None if record["settings"] is None else SemanticIdSettings(**record["settings"])
            books = tuple(arrays[f"codebook_{level}"] for level in range(len(arrays) - 2))
            layout = (tuple(record["sizes"]), bool(record["separated"]), books, arrays["errors"])
            loaded = cls(record["ids"], arrays["codes"], *layout, float(record["spread"]), settings, str(path))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: expected codes that were saved by e2p, got {what}; save them again") from None
        if loaded.version != record["version"]:
            raise DataError(f"{path}: expected version {record['version']}, got {loaded.version}; save them again")
        return loaded


def read_codes(path: str | Path, sizes: Sequence[int] | None = None, separating: int = 256) -> SemanticIds:
    """Ready codes: a JSON object ``{"item": ["<a_1>", "<b_2>", "<c_3>"], ...}``.

    Args:
        path: the file.
        sizes: codes of each level; None: as many as the file's greatest code needs.
        separating: codes of the separating level, which is added only if items share all codes.

    Raises:
        DataError: with file and item: no codes, more or fewer than another item has, a text that is no code of its
            level, a code beyond ``sizes``, an id that comes twice; more items with equal codes than can be separated.
    """
    read = _read_object(Path(path))
    depth = next((len(codes) for codes in read.values() if isinstance(codes, list)), 0)
    rows = [_parsed(item, codes, depth, str(path)) for item, codes in read.items()]
    if not rows:
        raise DataError(f"{path}: expected at least one item, got none; check what wrote it")
    ids, codes = list(read), np.array(rows, dtype=np.int64)
    limits = tuple((codes.max(axis=0) + 1).tolist() if sizes is None else sizes)
    if len(limits) != depth:
        raise DataError(f"{path}: expected {len(limits)} codes for each item, got {depth}; name the size of each level")
    separated = bool(groups(codes)[1].max() > 1)
    if separated:
        codes = np.column_stack([codes, separate(codes, ids, separating, str(path))])
        limits = (*limits, separating)
    return SemanticIds(ids, codes, limits, separated, source=str(path))


def _read_object(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require_new([item for item, _ in pairs], (), str(path))
        return dict(pairs)

    try:
        read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON object of codes by item, got: {error}; check the file") from None
    if not isinstance(read, dict):
        raise DataError(f"{path}: expected a JSON object of codes by item, got {type(read).__name__}; check the file")
    return read


def _parsed(item: str, codes: Any, depth: int, source: str) -> list[int]:
    if not isinstance(codes, list) or not codes:
        raise DataError(f"{source}: item {item!r}: expected a list of codes, got {codes!r}; give it codes or drop it")
    if len(codes) != depth or depth >= len(LETTERS):
        raise DataError(
            f"{source}: item {item!r}: expected {min(depth, len(LETTERS) - 1)} codes, as the first item has, got "
            f"{len(codes)}; all items need the same levels"
        )
    found = []
    for letter, text in zip(LETTERS, codes, strict=False):
        match = _TOKEN.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] != letter or int(match[2]) >= LARGEST:
            raise DataError(
                f"{source}: item {item!r}: expected <{letter}_0> to <{letter}_{LARGEST - 1}>, got {text!r}; write the "
                "levels in order, with letters from a"
            )
        found.append(int(match[2]))
    return found
