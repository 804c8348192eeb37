"""Who is who in LaMP, and what of a profile may be shown: LaMP names no users, and profiles can hold the answer.

A user is the set of texts of a profile. Profiles that share more than half of the smaller one's items are taken for one
person's at different times (in the time-based split a profile grows), and no person stands in train and validation.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.tasks.lamp_files import Form, Item, Question, normalised

# Shared by so many profiles, a text ("good morning") says nothing about who wrote it.
MOST_HOLDERS = 50
Keys = npt.NDArray[np.uint64]
Vectors = npt.NDArray[np.float32]
LEAST_COPY = 20  # letters and digits of an item's text that stand in the question: fewer may do so by chance


def keys_of(items: Iterable[Item]) -> Keys:
    """The items' keys, sorted, each once."""
    return np.unique(np.array([item.key for item in items], dtype="<u8"))


def user_of(part: str, question: Question) -> str:
    """Stable id of the user, of the profile's texts in any order; a question without profile is a user of its own."""
    keys = keys_of(question.profile)
    return hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest() if len(keys) else f"{part}-{question.id}"


@dataclass
class User:
    """What is known of one user.

    Args:
        targets: normalised golds of all his questions: nothing equal may stand in his profile.
        asked: normalised inputs of all his questions.
        parts: of LaMP's files in which he stands.
        items: keys of his items.
    """

    targets: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    items: Keys = field(default_factory=lambda: np.empty(0, np.uint64))


def shown(user: User, profile: Iterable[Item], form: Form, counts: Counter[str]) -> list[Item]:
    """The items of a profile that vector and text may be made of: newest first where all have dates, each once.

    Left out and counted: repeated and empty items, items that are what a question of this user asks for, and items
    whose text is what a question gives.
    """
    kept: dict[int, Item] = {}
    for item in profile:
        made = normalised(item.title if len(form.fields) > 1 else item.text)
        text = normalised(item.text)
        if not made and not text:
            counts["empty profile items"] += 1
        elif made and made in user.targets:
            counts["profile items that are the target of a question of their user"] += 1
        elif len(form.fields) > 1 and len(text) >= LEAST_COPY and any(text in asked for asked in user.asked):
            counts["profile items whose text a question of their user asks about"] += 1
        elif item.key in kept:
            counts["repeated profile items"] += 1
        else:
            kept[item.key] = item
    items = list(kept.values())
    if items and all(item.date for item in items):
        items.sort(key=lambda item: item.date, reverse=True)  # stable: of one day as in the file
    return items


def persons(users: dict[str, User]) -> dict[str, str]:
    """User -> person, named by the smallest user id: users who share more than half of the smaller profile."""
    names = sorted(users)  # sorted: a person's name must not depend on the order of the files
    sizes = np.array([len(users[name].items) for name in names], dtype=np.int64)
    rows = np.repeat(np.arange(len(names)), sizes)
    keys = np.concatenate([np.empty(0, np.uint64), *(users[name].items for name in names)])
    held = pl.DataFrame({"user": rows, "item": keys})
    holders = held.group_by("item").len().filter(pl.col("len").is_between(2, MOST_HOLDERS))
    shared = held.join(holders.select("item"), on="item", how="semi")
    pairs = (
        shared.join(shared, on="item", suffix="_other")
        .filter(pl.col("user") < pl.col("user_other"))
        .group_by("user", "user_other")
        .len()
        .sort("user", "user_other")
    )
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other, count in pairs.iter_rows():
        if 2 * count > min(sizes[one], sizes[other]):
            first, second = sorted((root(one), root(other)))
            parent[second] = first
    return {name: names[root(index)] for index, name in enumerate(names)}


def render(items: Sequence[Item], form: Form, max_item_chars: int, max_chars: int) -> str:
    """The text profile, in the order given: whole items until ``max_chars`` are full, at least a piece of the first."""
    pieces: list[str] = []
    length = 0
    for item in items:
        text = item.text if len(item.text) <= max_item_chars else item.text[:max_item_chars].rstrip() + "..."
        piece = form.item.format(title=item.title, text=text)
        length += len(piece) + 2 * bool(pieces)
        if length > max_chars:
            break
        pieces.append(piece)
    if items and not pieces:
        pieces = [piece[:max_chars]]
    return ", ".join(pieces)


def mean_vectors(
    profiles: dict[str, Keys], items: Iterable[tuple[int, str]], encode: Callable[[list[str]], Vectors], chunk: int
) -> tuple[list[str], Vectors]:
    """Mean over each user's items; an item of many users is encoded once, and no more than a chunk of texts is held.

    Args:
        profiles: the keys of each user's items, none twice.
        items: key and text of all items, repeated or not.
        encode: texts to vectors [n, D].
        chunk: texts that are encoded together.

    Returns:
        The users who have items, and their vectors [U, D].
    """
    users = [user for user, keys in profiles.items() if len(keys)]
    sizes = np.array([len(profiles[user]) for user in users], dtype=np.int64)
    flat = np.concatenate([profiles[user] for user in users]) if users else np.empty(0, np.uint64)
    order = np.argsort(flat, kind="stable")
    owners = np.repeat(np.arange(len(users)), sizes)[order]
    keys, starts = np.unique(flat[order], return_index=True)
    ends = np.append(starts[1:], len(owners))
    waiting, done, sums = np.ones(len(keys), bool), 0, np.zeros((len(users), 0))
    batch: list[tuple[int, str]] = []

    def flush() -> None:
        nonlocal sums, done
        print(f"Encoding items {done + 1:,} to {done + len(batch):,} of {len(keys):,}", file=sys.stderr)
        for (place, _), vector in zip(batch, encode([text for _, text in batch]), strict=True):
            if not sums.shape[1]:
                sums = np.zeros((len(users), len(vector)))
            sums[owners[starts[place] : ends[place]]] += vector
        done += len(batch)
        batch.clear()

    for key, text in items:
        place = int(np.searchsorted(keys, np.uint64(key)))
        if place < len(keys) and keys[place] == key and waiting[place]:
            waiting[place] = False
            batch.append((place, text))
            if len(batch) == chunk:
                flush()
    if batch:
        flush()
    return users, (sums / sizes[:, None]).astype(np.float32)
