"""Small worlds in the three layouts that `e2p prepare nextitem` reads, written as the official files are."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GENRES = ("Comedy", "Drama", "Horror", "War")
Rating = tuple[int, int, int]  # user, film, seconds


def films(count: int = 40) -> list[tuple[int, str, str]]:
    """Film 1 has no genre, film 2 a title with commas, quotation marks and a semicolon."""
    made = []
    for number in range(1, count + 1):
        genres = "|".join(sorted({GENRES[number % 4], GENRES[number * 7 // 5 % 4]}))
        made.append((number, f"Film {number} ({1950 + number})", genres))
    made[0] = (1, "Film 1 (1951)", "(no genres listed)")
    made[1] = (2, 'Second, The; "Two" (1952)', "Drama")
    return made


def ratings(users: int = 30, seed: int = 0, length: int = 16) -> list[Rating]:
    """Users of two tastes, each active for a while; every third rating is of the same second as the one before."""
    random = np.random.default_rng(seed)
    made = []
    for user in range(1, users + 1):
        when = int(random.integers(1_000_000_000, 1_000_800_000))
        half = 1 + 20 * (user % 2)
        for place, film in enumerate(random.permutation(np.arange(half, half + 20))[:length]):
            when += 0 if place % 3 == 2 else int(random.integers(1, 20_000))
            made.append((user, int(film), when))
    return sorted(made, key=lambda rating: (rating[0], rating[1]))  # as MovieLens has them: by film, not by time


def movielens(
    folder: Path, rated: Sequence[Sequence[Any]], named: Sequence[Sequence[Any]] | None = None, stars: float = 3.5
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "movies.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("movieId", "title", "genres"), *(films() if named is None else named)])
    lines = ["userId,movieId,rating,timestamp", *(f"{user},{film},{stars},{when}" for user, film, when in rated)]
    (folder / "ratings.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder


def histories(users: int = 40, items: int = 30, seed: int = 0, least: int = 3, most: int = 14) -> dict[int, list[int]]:
    """What each user bought, in order: items of his own half, some of them again."""
    random = np.random.default_rng(seed)
    made = {}
    for user in range(1, users + 1):
        first = 1 + (user % 2) * items // 2
        made[user] = random.integers(first, first + items // 2, size=int(random.integers(least, most + 1))).tolist()
    return made


def sequences(folder: Path, bought: Mapping[int, Sequence[int]], names: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(str, [user, *items])) for user, items in bought.items()]
    (folder / "sequential.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if names is not None:
        maps = {"id2user": {"1": "A1"}, "id2item": dict(names)}
        (folder / "datamaps.json").write_text(json.dumps(maps), encoding="utf-8")
    return folder


def codes(items: Sequence[int], size: int = 8) -> dict[str, list[str]]:
    """Three levels; items 1 and 2 share all codes."""
    made = {str(item): [f"<a_{item % size}>", f"<b_{item // size}>", f"<c_{item % 3}>"] for item in items}
    return made | ({"2": made["1"]} if "1" in made and "2" in made else {})


def parts_of(user: int, items: Sequence[int]) -> list[str]:
    """Of each of a user's items, whether it is history, or the target of a row of the valid or test file."""
    held = min(1 + user % 3, len(items) - 2)
    if user % 4 == 0:  # a user of the validation file alone
        return ["history"] * (len(items) - held) + ["valid"] * held
    return ["history"] * (len(items) - held - 1) + ["valid"] + ["test"] * held


def minionerec(
    folder: Path,
    bought: Mapping[int, Sequence[int]],
    parts: Mapping[int, Sequence[str]] | None = None,
    coded: Mapping[str, Any] | None = None,
    described: Mapping[str, Any] | None = None,
) -> Path:
    """Rows of at most ten earlier items, a file for each part that has any; texts and codes of all items to 30."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {"valid": [], "test": []}
    for user, items in bought.items():
        for place, part in enumerate(parts_of(user, items) if parts is None else parts[user]):
            if part != "history":
                history = list(items[max(0, place - 10) : place])
                titles = [f"Item {item}" for item in history]
                rows.setdefault(part, []).append((f"A{user}", titles, f"Item {items[place]}", history, items[place]))
    for part, found in rows.items():
        with (folder / f"{part}_Shop.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "history_item_title", "item_title", "history_item_id", "item_id"])
            writer.writerows(found)
    everything = range(31)
    texts = {
        str(item): {
            "title": f"Item {item}, of a name; that has rather more words than are shown",
            "description": "['x']",
        }
        for item in everything
    }
    (folder / "index_Shop.item.json").write_text(json.dumps(texts if described is None else described))
    (folder / "index_Shop.index.json").write_text(json.dumps(codes(everything) if coded is None else coded))
    return folder
