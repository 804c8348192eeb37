"""Items in texts, and texts with items back as people read them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import history_text, items_text, naming

IDS = SemanticIds(["i0", "i1", "i2"], np.array([[0, 0], [0, 11], [1, 0]]), (2, 12), False)
NAMES = ["heat (1995)", "a <b> film", "<a_0><b_0>"]  # a name may look like anything


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 6))
def test_a_history_reads_as_names(rows: list[int], window: int) -> None:
    read = naming(IDS, NAMES)
    assert read(history_text(IDS, rows, window)) == "next after: " + " ".join(f'"{NAMES[r]}"' for r in rows[-window:])


PIECES = ["so", "<a_1><b_11>", "<a_0>", "<b_0>", "<c_0><b_0>", "a<b", *(items_text(IDS, [row]) for row in range(3))]


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=8))
def test_what_is_no_items_codes_stays(pieces: list[int]) -> None:
    told = [f'"{NAMES[at - len(PIECES) + 3]}"' if at >= len(PIECES) - 3 else PIECES[at] for at in pieces]
    assert naming(IDS, NAMES)(" ".join(PIECES[at] for at in pieces)) == " ".join(told)


def test_codes_of_no_item_and_items_without_a_space() -> None:
    read = naming(IDS, NAMES)
    assert read("<a_1><b_11>") == "<a_1><b_11>"
    assert read("<a_0><b_11><a_1><b_0>") == "<a_0><b_11><a_1><b_0>"
    assert read("so <a_0><b_11>, then <a_0>") == 'so "a <b> film", then <a_0>'
