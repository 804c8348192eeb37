"""`e2p bench scale`: what must stay small when a catalogue and a store of vectors grow: the trie, and the join by time.

The trie of what may follow is built for random codes of a catalogue; the point-in-time join finds for every example
its user's newest vector among all versions. No language model takes part.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from e2p.bench.memory import peak_memory, start_memory
from e2p.bench.quiet import quiet
from e2p.bench.rounds import now
from e2p.data.asof import asof_rows
from e2p.data.tables import EmbeddingTable
from e2p.errors import ConfigError
from e2p.items.trie import Trie
from e2p.provenance import provenance

LEVELS, SIZE = 4, 256
_DAY = 86_400_000_000  # microseconds


def bench(
    items: int = 1_000_000,
    versions: int = 10_000_000,
    examples: int = 1_000_000,
    users: int = 1_000_000,
    rounds: int = 3,
    output: str = "bench_scale.json",
    seed: int = 42,
) -> dict[str, Any]:
    """Measure how long the trie of a catalogue and the point-in-time join take, and their memory; asserts no time.

    Args:
        items: in the catalogue, with random codes of four levels of 256.
        versions: vectors, each of one user at one time.
        examples: to be joined with their users' newest vectors.
        users: they are drawn from.
        rounds: measured rounds.
        output: JSON file to write. It is also the last line of stdout.
        seed: of codes, users and times.

    Returns:
        What is written as JSON.

    Raises:
        ConfigError: a number is out of range.
    """
    given = {"items": items, "versions": versions, "examples": examples, "users": users, "rounds": rounds}
    for name, value in given.items():
        if value < 1 or (name == "items" and value > SIZE**LEVELS // 4):
            raise ConfigError(f"{name}: expected a whole number from 1 to {SIZE**LEVELS // 4:,}, got {value}")
    console = Console(stderr=True)
    with quiet(), console.status("making codes and vectors"):
        codes = random_codes(items, seed)
        table, asked = random_versions(versions, examples, users, seed)
    found: dict[str, list[float]] = {"trie": [], "join": []}
    held: dict[str, list[int]] = {"trie": [], "join": []}
    size = 0
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}", highlight=False)
        for name in found:
            before, start = start_memory(), now()
            made = Trie.build(codes, (SIZE,) * LEVELS) if name == "trie" else asof_rows(asked, table)
            found[name].append(now()[0] - start[0])
            held[name].append(max(0, peak_memory() - before))
            size = made.nbytes if isinstance(made, Trie) else size
    result = {
        "bench": "scale",
        **given,
        "trie": {"seconds": _spread(found["trie"]), "peak_bytes": max(held["trie"]), "bytes": size},
        "join": {"seconds": _spread(found["join"]), "peak_bytes": max(held["join"])},
        "provenance": provenance(),
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


def random_codes(items: int, seed: int) -> np.ndarray:
    """Different codes: int64 [items, LEVELS], each below SIZE."""
    rng = np.random.default_rng([seed, 1])
    numbers = np.unique(rng.integers(0, SIZE**LEVELS, items + items // 8 + 64))
    while len(numbers) < items:
        numbers = np.unique(np.concatenate([numbers, rng.integers(0, SIZE**LEVELS, items)]))
    numbers = rng.permutation(numbers)[:items]
    return np.stack([numbers // SIZE**level % SIZE for level in reversed(range(LEVELS))], axis=1)


def random_versions(versions: int, examples: int, users: int, seed: int) -> tuple[EmbeddingTable, pl.DataFrame]:
    """Versions of users' vectors over a year, and examples of the same year. The join never looks into a vector."""
    rng = np.random.default_rng([seed, 2])

    def keys(count: int) -> pl.DataFrame:
        who = pl.Series("user_id", rng.integers(0, users, count)).cast(pl.String)
        when = pl.Series("timestamp", rng.integers(0, 365 * _DAY, count)).cast(pl.Datetime("us", "UTC"))
        return pl.DataFrame([who, when])

    table = EmbeddingTable(keys(versions), np.broadcast_to(np.float32(0), (versions, 1)), "random")
    return table, keys(examples)


def _spread(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}
