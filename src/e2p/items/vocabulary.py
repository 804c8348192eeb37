"""The codes of a catalogue as tokens of a language model: what it reads as a history and writes as an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from e2p.errors import BackboneError
from e2p.items.semantic_ids import SemanticIds, read_codes
from e2p.items.trie import Trie

# In an adapted checkpoint: the record of its adaptation, and the codes that it speaks.
ADAPTED, CODES = "adapt.json", "codes"


@dataclass(frozen=True, eq=False)
class CodeVocabulary:
    """Codes, the trie of the valid ones, and the token that stands for each.

    Args:
        ids: the catalogue's codes.
        tokens: for each of the L levels the token ids of its codes, int64 [size].
    """

    ids: SemanticIds
    tokens: tuple[Int[Tensor, "size"], ...]

    @classmethod
    def of(cls, ids: SemanticIds, tokenizer: Any) -> CodeVocabulary:
        """The codes as a tokenizer knows them.

        Raises:
            BackboneError: a code is not one token of its own: the backbone has not been adapted to these codes.
        """
        names = ids.token_names()
        known = tokenizer.get_vocab()
        missing = [name for name in names if name not in known]
        if missing:
            raise BackboneError(
                f"{ids.source}: expected a backbone with a token for each of {len(names):,} codes, got none for "
                f"{missing[0]} and {len(missing) - 1:,} others; run e2p adapt with these codes first"
            )
        bounds = pairwise(accumulate(ids.sizes, initial=0))
        return cls(ids, tuple(torch.tensor([known[name] for name in names[low:high]]) for low, high in bounds))

    @cached_property
    def trie(self) -> Trie:
        """What may follow what, by the items' rows in :attr:`ids`."""
        return Trie.build(self.ids.codes, self.ids.sizes)

    def on(self, device: torch.device) -> tuple[Sequence[Tensor], Trie]:
        """Tokens and trie on a device; brought there once, since a large catalogue's trie takes its time."""
        kept: dict[torch.device, tuple[Sequence[Tensor], Trie]] = self.__dict__.setdefault("_on", {})
        if device not in kept:
            kept[device] = [tokens.to(device) for tokens in self.tokens], self.trie.to(device)
        return kept[device]

    @property
    def levels(self) -> int:
        """L, the codes of an item."""
        return len(self.tokens)


def open_codes(source: str | Path) -> SemanticIds:
    """Codes from a folder that :meth:`SemanticIds.save` has written, or ready ones from a JSON file.

    Raises:
        DataError: they are not there, or unfit; with the file.
    """
    return SemanticIds.load(source) if Path(source).is_dir() else read_codes(source)


def add_code_tokens(tokenizer: Any, ids: SemanticIds) -> int:
    """Let a tokenizer read every code as one token, white space before it included; returns how many are new.

    Such a token swallows the spaces before it, so that codes cost nothing but themselves wherever they stand.
    """
    from tokenizers import AddedToken

    tokens = [AddedToken(name, lstrip=True, normalized=False, special=False) for name in ids.token_names()]
    return int(tokenizer.add_tokens(tokens))


def require_spoken(backbone: str, ids: SemanticIds) -> None:
    """Make sure that an adapted backbone speaks these codes: those of another version bear the same names.

    The checkpoint carries its codes; the catalogue may have grown since. A backbone without codes is not asked.

    Raises:
        BackboneError: its codes are others.
    """
    folder = Path(backbone) / CODES
    if not folder.is_dir():
        return
    spoken = SemanticIds.load(folder)
    if spoken.version == ids.version:
        return
    # Ready codes have no codebooks to know them by.
    known = [ids.rows.get(item, -1) for item in spoken.ids]
    same = spoken.sizes == ids.sizes and min(known) >= 0 and bool((ids.codes[known] == spoken.codes).all())
    if spoken.codebooks or not same:
        raise BackboneError(
            f"{backbone}: expected a backbone that was adapted to the codes of {ids.source} (version {ids.version}), "
            f"got one of version {spoken.version}; adapt it to these, or name its own codes"
        )
