"""Items in a text: codes side by side, items by spaces. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from e2p.items.semantic_ids import SemanticIds

PROMPT = "next after: "  # before a history; a backbone is adapted to the same words as phi is trained with


def items_text(ids: SemanticIds, rows: Sequence[int]) -> str:
    """Items as a text, codes side by side and a space between items: ``<a_1><b_2> <a_3><b_4>``."""
    return " ".join("".join(ids.tokens(row)) for row in rows)


def history_text(ids: SemanticIds, rows: Sequence[int], window: int) -> str:
    """The prompt of a history: its last ``window`` items as codes, oldest first."""
    return PROMPT + items_text(ids, rows[-window:])
