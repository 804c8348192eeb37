"""LaMP's published files (Salemi et al. 2023): questions with profiles, and golds, read one question at a time."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2p.errors import ConfigError, DataError

CLASSIFICATION = {1: "citation identification", 2: "movie tagging", 3: "product rating"}
PARTS = {"train": "train", "dev": "test"}  # LaMP's part -> ours; validation is drawn from train
CHUNK = 1 << 20  # characters read at once; the files of one task take gigabytes
OTHER = re.compile(r"[\W_]+")
SPACE = re.compile(r"\s*")
DATE = re.compile(r"\s*\d+(?:[-/T:. ]\d+)*Z?\s*")


@dataclass(frozen=True)
class Form:
    """How a task is laid out and said.

    Args:
        name: LaMP's name of it.
        fields: of a profile item, what it was made for last: (text, title), or (text,) alone.
        item: an item in the text profile, as in LaMP's prompts.
        about: the prompt arm's template.
    """

    name: str
    fields: tuple[str, ...]
    item: str
    about: str


TASKS = {
    4: Form("LaMP-4", ("text", "title"), '"{title}" is the title for "{text}"', "Headlines by this author: {profile}"),
    5: Form("LaMP-5", ("abstract", "title"), '"{title}" is a title for "{text}"', "Titles by this author: {profile}"),
    6: Form("LaMP-6", ("text", "title"), '"{title}" is the title for "{text}"', "Subjects by this author: {profile}"),
    7: Form("LaMP-7", ("text",), '"{text}"', "{profile} are written by this person."),
}


@dataclass(frozen=True)
class Item:
    """One thing that a user wrote before. The title is empty where the task has none, and the date if unknown."""

    title: str
    text: str
    date: tuple[int, ...] = ()

    @property
    def key(self) -> int:
        """What two equal items share, whatever their ids: 64 bits of a hash of title and text."""
        return int.from_bytes(hashlib.blake2b(f"{self.title}\n\0{self.text}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Question:
    """A question of a part (train, dev, test), as it stands in the file."""

    id: str
    prompt: str
    profile: tuple[Item, ...]


def find(source: str | Path) -> dict[str, Path]:
    """The files of a LaMP folder by their names without ending, in the folder itself or in train/, dev/ and test/.

    Raises:
        DataError: questions or outputs of train or dev are missing.
    """
    folder, found = Path(source), {}
    for part in (*PARTS, "test"):
        for kind in ("questions", "outputs"):
            name = f"{part}_{kind}.json"
            places = [place for place in (folder / name, folder / part / name) if place.is_file()]
            if places:
                found[f"{part}_{kind}"] = places[0]
            elif part in PARTS:
                raise DataError(
                    f"{source}: expected {name} there or in {part}/, found none; a LaMP folder holds questions and "
                    "outputs of train and dev"
                )
    return found


def task_number(text: str) -> int:
    """4 of LaMP-4, LaMP_4 or 4. Raises ConfigError for a task that is not generation, or unknown."""
    match = re.fullmatch(r"(?:lamp)?[-_ ]?(\d)", text.strip(), re.IGNORECASE)
    number = int(match.group(1)) if match else 0
    known = ", ".join(form.name for form in TASKS.values())
    if number in CLASSIFICATION:
        raise ConfigError(
            f"task: expected a generation task ({known}), got LaMP-{number} ({CLASSIFICATION[number]}), a "
            "classification task; its answers are classes and not texts"
        )
    if number not in TASKS:
        raise ConfigError(f"task: expected one of {known}, got {text!r}")
    return number


def read_golds(path: Path) -> tuple[str, dict[str, str]]:
    """The task's name (empty if the file has none) and the gold of each question id.

    Raises:
        DataError: the file is not as published; the message has file and gold.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: expected JSON of golds: {' '.join(str(error).split())}; take the official file"
        ) from None
    golds = content.get("golds") if isinstance(content, dict) else None
    if not isinstance(golds, list):
        raise DataError(f"{path}: expected {{'task', 'golds': [...]}}, got {type(content).__name__} without such golds")
    found: dict[str, str] = {}
    for index, gold in enumerate(golds):
        where = f"{path}: golds[{index}]"
        name = _id(gold, where)
        output = gold.get("output")
        if not isinstance(output, str):
            raise DataError(
                f"{where} (id {name}): expected output as text, got {_kind(output)}; take the official file"
            )
        if name in found:
            raise DataError(f"{where}: expected each id once, got {name} twice; keep one")
        found[name] = output
    return str(content.get("task") or ""), found


def questions(path: Path, form: Form) -> Iterator[Question]:
    """The questions of a file, one at a time.

    Raises:
        DataError: the file is not as published; the message has file, question and profile item.
    """
    seen: set[str] = set()
    for index, entry in enumerate(_entries(path)):
        where = f"{path}: question {index}"
        name = _id(entry, where)
        where = f"{where} (id {name})"
        if name in seen:
            raise DataError(f"{where}: expected each id once, got {name} twice; keep one")
        seen.add(name)
        prompt, profile = entry.get("input"), entry.get("profile")
        if not isinstance(prompt, str):
            raise DataError(f"{where}: expected input as text, got {_kind(prompt)}; take the official file")
        if not isinstance(profile, list):
            raise DataError(
                f"{where}: expected profile as a list of items, got {_kind(profile)}; take the official file"
            )
        yield Question(
            name, prompt, tuple(_item(item, form, f"{where}: profile[{i}]") for i, item in enumerate(profile))
        )


def _item(item: Any, form: Form, where: str) -> Item:
    values = [item.get(name) if isinstance(item, dict) else None for name in form.fields]
    if not all(isinstance(value, str) for value in values):
        lacking = [f"{name} {_kind(value)}" for name, value in zip(form.fields, values, strict=True)]
        got = ", ".join(lacking) if isinstance(item, dict) else _kind(item)
        raise DataError(f"{where}: expected {' and '.join(form.fields)} as text, as {form.name} has, got {got}")
    date = item.get("date")
    if date is not None and (isinstance(date, bool) or not DATE.fullmatch(str(date))):
        raise DataError(f"{where}: expected a date like 2016-05-26 or 2016, got {str(date)[:40]!r}; mend or drop it")
    numbers = () if date is None else tuple(int(number) for number in re.findall(r"\d+", str(date)))
    texts = [str(value).strip() for value in values]
    return Item(texts[1] if len(texts) > 1 else "", texts[0], numbers)


def _id(entry: Any, where: str) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise DataError(
            f"{where}: expected an object with an id, got {_kind(name if isinstance(entry, dict) else entry)}"
        )
    return str(name)


def _kind(value: Any) -> str:
    return "none" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time: what is held is one entry and a piece of the file."""
    decoder, text, at, piece, ended, before = json.JSONDecoder(), "", 0, CHUNK, False, "["
    try:
        with path.open(encoding="utf-8-sig") as file:
            while True:
                at = _solid(text, at)
                inside = _solid(text, at + 1)
                if text[at : at + 1] == "[" == before and text[inside : inside + 1] == "]":
                    at, before = inside, ","
                if text[at : at + 1] == "]" and before == ",":
                    if rest := (text[at + 1 :] + file.read()).strip():
                        raise DataError(f"{path}: expected the end behind the list, got {rest[:40]!r}; mend the file")
                    return
                if text[at : at + 1] == before:
                    try:
                        value, at = decoder.raw_decode(text, inside)
                        before, piece = ",", CHUNK
                        yield value
                        continue
                    except json.JSONDecodeError as error:
                        if ended:
                            got = text[error.pos : error.pos + 40]
                            raise DataError(
                                f"{path}: expected JSON, got: {error.msg} at {got!r}; mend the file"
                            ) from None
                elif at < len(text) or ended:
                    got = repr(text[at : at + 40]) if at < len(text) else "the end"
                    raise DataError(
                        f"{path}: expected a list of questions, with '{before}' here, got {got}; mend the file"
                    )
                # An entry that is longer than the piece is tried again with twice as much: so it is tried few times.
                more = file.read(piece)
                text, at, piece, ended = text[at:] + more, 0, 2 * piece, not more
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a file of questions, got: {error}; check the path") from None


def _solid(text: str, start: int) -> int:
    """Where the white space that begins at ``start`` ends."""
    match = SPACE.match(text, start)
    return match.end() if match else start


def normalised(text: str) -> str:
    """What two spellings of a text share: letters and digits, without case."""
    return OTHER.sub("", unicodedata.normalize("NFKC", text).casefold())
