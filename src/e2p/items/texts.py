"""Items in a text: codes side by side, items by spaces. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from e2p.items.semantic_ids import SemanticIds

PROMPT = "next after: "  # before a history; a backbone is adapted to the same words as phi is trained with


def items_text(ids: SemanticIds, rows: Sequence[int]) -> str:
    """Items as a text, codes side by side and a space between items: ``<a_1><b_2> <a_3><b_4>``."""
    return " ".join("".join(ids.tokens(row)) for row in rows)


def history_text(ids: SemanticIds, rows: Sequence[int], window: int) -> str:
    """The prompt of a history: its last ``window`` items as codes, oldest first."""
    return PROMPT + items_text(ids, rows[-window:])


def naming(ids: SemanticIds, names: Sequence[str]) -> Callable[[str], str]:
    """What makes of a text with codes one that people read: items by their names, in quotes; what is no item's stays.

    Args:
        ids: whose codes they are.
        names: what each item is called, by its row.
    """
    tokens = sorted(ids.token_names(), key=len, reverse=True)
    row_of = {tuple(ids.tokens(row)): row for row in range(len(ids))}
    one = re.compile("|".join(map(re.escape, tokens)))
    run = re.compile(f"(?:{one.pattern})+")

    def named(found: re.Match[str]) -> str:
        codes = tuple(one.findall(found[0]))
        return f'"{names[row_of[codes]]}"' if codes in row_of else found[0]

    return lambda text: run.sub(named, text)
