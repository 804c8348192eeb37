"""LaMP (Salemi et al. 2023), where the personalisation community compares: its generation tasks 4 to 7 -> tables.

What decides about leakage:

- LaMP's train is train and validation, its dev is test (golds of its test are not published). Validation is drawn by
  person from train, and without dates no person of dev is trained on. In the time-based split the same people stand in
  train and dev on purpose, earlier and later.
- A profile may hold the very text that is asked for. Such items are in no vector and no text profile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from e2p.config import DataConfig, RunConfig, SplitConfig
from e2p.config_io import save_yaml
from e2p.data.splits import split_by_group
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError, DataError
from e2p.tasks.lamp_files import PARTS, TASKS, Form, Item, find, normalised, questions, read_golds, task_number
from e2p.tasks.lamp_users import Keys, User, Vectors, keys_of, mean_vectors, persons, render, shown, user_of
from e2p.tasks.output import staged_folder

Pooling = Literal["mean", "last"]
PROFILES = {"user_id": pl.String, "profile": pl.String}
COLUMNS = ("example_id", "user_id", "prompt", "completion", "split")
CHUNK = 16_384  # item texts that are encoded together


def prepare(
    source: str,
    output: str,
    task: str = "",
    split: Literal["auto", "user", "time"] = "auto",
    encoder: str = "minilm",
    pooling: Pooling = "mean",
    vectors: Literal["items", "profile"] = "items",
    max_items: int = 0,
    max_profile_chars: int = 1000,
    max_item_chars: int = 200,
    max_prompt_chars: int = 2000,
    validation_share: float = 0.1,
    limit: int = 0,
    seed: int = 42,
    overwrite: bool = False,
) -> Path:
    """Make examples and user vectors from a LaMP folder: headlines (4), paper titles (5), subjects (6), tweets (7).

    LaMP names no users: a user is the texts of a profile, whatever their order. Profiles that share more than half of
    the smaller one's items are taken for one person's.

    Args:
        source: folder with train_questions.json, train_outputs.json, dev_questions.json and dev_outputs.json, or with
            these in train/ and dev/.
        output: folder for the tables.
        task: LaMP-4, LaMP-5, LaMP-6 or LaMP-7; not given: what the outputs name.
        split: user: nobody of dev is trained on, his questions in train are dropped; time: he is, as in LaMP's
            time-based split; auto: time where profile items have dates.
        encoder: makes vectors: minilm, a sentence-transformers model, a causal LM, or empty for no vectors.
        pooling: of a causal LM: the mean over a text's tokens, or the last token's state.
        vectors: items: the mean of the vectors of a profile's items; profile: the vector of the text profile in one
            piece, as in the E2P paper.
        max_items: most items in a vector, of those that come first in the profile; 0: all.
        max_profile_chars: a text profile ends before the item that would be beyond. It begins with the newest item
            where all have dates; else it keeps the file's order, which says nothing about time.
        max_item_chars: an item's text is cut there in a text profile.
        max_prompt_chars: a question is cut there, at its end: it begins with the instruction.
        validation_share: share of train's people for validation.
        limit: read so many questions of train and of dev only; 0: all.
        seed: of the choice of people for validation.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a setting is out of range, or the task is none of the four.
        DataError: a file is missing or not as published; the message has file and question.
        RunError: the output exists.
        MissingExtraError: the encoder's package is not installed.
    """
    for name, value, least in (
        ("max_items", max_items, 0),
        ("max_profile_chars", max_profile_chars, 1),
        ("max_item_chars", max_item_chars, 1),
        ("max_prompt_chars", max_prompt_chars, 1),
        ("limit", limit, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value}; raise it")
    if not 0 < validation_share < 1:
        raise ConfigError(f"validation_share: expected a number between 0 and 1, got {validation_share}")
    wanted = task_number(task) if task else 0
    with staged_folder(output, overwrite) as folder:
        world = _read(source, wanted, limit)
        rows, groups = _placed(world, split, validation_share, seed)
        texts, keys = _profiles(world, set(rows["user_id"]), max_profile_chars, max_item_chars)
        profiles = pl.DataFrame({"user_id": list(texts), "profile": list(texts.values())}, schema=PROFILES)
        prompts = rows["prompt"].str.slice(0, max_prompt_chars)
        cut = int((prompts != rows["prompt"]).sum())
        table = rows.with_columns(prompt=prompts).join(profiles, on="user_id", how="left", maintain_order="left")
        write_frame(folder / "examples.parquet", table)
        write_frame(folder / "profiles.parquet", profiles)
        if encoder and profiles.is_empty():
            raise DataError(f"{source}: expected profiles to make vectors of, got none; pass --encoder ''")
        if encoder:
            if vectors == "items":
                chosen = {user: own[:max_items] if max_items else own for user, own in keys.items()}
                users, block = _item_vectors(world, chosen, encoder, pooling)
            else:
                users = profiles["user_id"].to_list()
                block = _encode(profiles["profile"].to_list(), encoder, pooling)
            version = f"{encoder}-{pooling}-{vectors}" + (f"-{max_items}" if max_items and vectors == "items" else "")
            write_embeddings(folder / "embeddings.parquet", users, block, version=version)
        missing = table["profile"].null_count()
        save_yaml(recommended(output, world.form, bool(encoder), missing > 0), folder / "config.yaml")
    sizes = ", ".join(f"{count:,} {part}" for part, count in _ordered(Counter(table["split"])))
    print(f"{output}: {table.height:,} examples of {world.form.name} ({sizes}), {table['user_id'].n_unique():,} users")
    print(f"people in train and dev: {groups['both']:,}; questions in train dropped for that: {groups['dropped']:,}")
    print(f"examples without a profile, for the null user: {missing:,}; questions cut: {cut:,}")
    for what, count in sorted(world.counts.items()):
        print(f"left out: {count:,} {what}")
    return Path(output)


def recommended(
    output: str | Path, form: Form = TASKS[4], with_vectors: bool = True, missing: bool = False
) -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet") if with_vectors else "",
        max_prompt_tokens=1024,
        long_prompt="truncate",
        missing_vector="null" if missing else "error",
        profile_template=form.about,
    )
    return RunConfig(data=data, output=f"runs/{form.name.lower()}")


@dataclass
class World:
    """What the files say, but for the profiles' texts, which are read again when they are needed.

    Args:
        form: the task.
        files: the question files of train and dev.
        limit: questions of each that are read; 0: all.
        rows: a row for each question that can be used.
        users: by id.
        dated: some profile item has a date.
        counts: what was left out, by reason.
    """

    form: Form
    files: dict[str, Path]
    limit: int
    rows: list[dict[str, str]] = field(default_factory=list)
    users: dict[str, User] = field(default_factory=dict)
    dated: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    # Of each part and question id; a profile of a thousand items need not be hashed a second time.
    user_of: dict[tuple[str, str], str] = field(default_factory=dict)


def _read(source: str, wanted: int, limit: int) -> World:
    files = find(source)
    golds = {part: read_golds(files[f"{part}_outputs"]) for part in PARTS}
    for part, (name, _) in golds.items():
        path = files[f"{part}_outputs"]
        if not name and not wanted:
            raise DataError(f"{path}: expected a task, got none; name it by --task")
        named = task_number(name) if name else wanted
        if wanted and named != wanted:
            raise DataError(f"{path}: expected outputs of LaMP-{wanted}, got {name}; name the task of the files")
        wanted = named
    form = TASKS[wanted]
    world = World(form, {part: files[f"{part}_questions"] for part in PARTS}, limit)
    for part, path in world.files.items():
        outputs = dict(golds[part][1])
        for number, question in enumerate(questions(path, form)):
            if question.id not in outputs:
                raise DataError(
                    f"{path}: question {number} (id {question.id}): expected a gold in {files[f'{part}_outputs']}, got "
                    "none; take both files of one split"
                )
            if limit and number >= limit:
                break
            gold = outputs.pop(question.id)
            if not gold.strip() or not question.prompt.strip():
                world.counts[f"questions of {part} with an empty input or gold"] += 1
                continue
            name = user_of(part, question)
            user = world.users.setdefault(name, User())
            user.targets.add(normalised(gold))
            user.asked.add(normalised(question.prompt))
            user.parts.add(part)
            user.items = keys_of(question.profile)
            world.user_of[part, question.id] = name
            world.dated = world.dated or any(item.date for item in question.profile)
            row = {
                "example_id": f"{part}-{question.id}",
                "user_id": name,
                "prompt": question.prompt,
                "completion": gold,
            }
            world.rows.append(row | {"split": part})
        if outputs and not limit:
            raise DataError(
                f"{files[f'{part}_outputs']}: gold of id {next(iter(outputs))}: expected a question in {path}, got "
                "none; take both files of one split"
            )
    if "test_questions" in files:
        unasked = sum(1 for _ in questions(files["test_questions"], form))
        world.counts["questions of test, whose golds are not published"] += unasked
    for user in world.users.values():
        user.targets.discard("")
    return world


def _placed(world: World, split: str, share: float, seed: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """Rows with group and split, and how many people stand in train and dev."""
    person = persons(world.users)
    rows = pl.DataFrame(world.rows, schema=dict.fromkeys(COLUMNS, pl.String))
    rows = rows.with_columns(group=pl.Series([person[user] for user in rows["user_id"]], dtype=pl.String))
    train, dev = (rows.filter(pl.col("split") == part) for part in PARTS)
    both = set(train["group"]) & set(dev["group"])
    dropped, twofold = 0, both
    if split == "user" or (split == "auto" and not world.dated):
        stays = ~train["group"].is_in(list(both))
        dropped = train.height - int(stays.sum())
        train = train.filter(stays)
        twofold = set()
    for part, frame in (("train", train), ("dev", dev)):
        if frame.is_empty():
            raise DataError(f"{world.files[part]}: expected questions that can be used, got none; check the file")
    # A group stands in one part of the split: who is in both parts by design is two groups, an earlier and a later one.
    train, dev = (
        frame.with_columns(
            group=pl.when(pl.col("group").is_in(list(twofold))).then(pl.col("group") + f":{part}").otherwise("group")
        )
        for part, frame in (("train", train), ("dev", dev))
    )
    parts = split_by_group(train["group"], SplitConfig((1 - share, share, 0.0), seed))
    named = pl.Series("split", ["validation" if code else "train" for code in parts], dtype=pl.String)
    dev = dev.with_columns(split=pl.lit("test"))
    return pl.concat([train.with_columns(named), dev]), {"both": len(both), "dropped": dropped}


def _ordered(counts: Counter[str]) -> list[tuple[str, int]]:
    return [(part, counts[part]) for part in ("train", "validation", "test")]


def _profiles(
    world: World, needed: set[str], max_chars: int, max_item_chars: int
) -> tuple[dict[str, str], dict[str, Keys]]:
    """Text profile, and keys of the items that may be shown, of each user that has any; one text a user."""
    texts: dict[str, str] = {}
    keys: dict[str, Keys] = {}
    for name, profile in _first_profiles(world, needed):
        items = shown(world.users[name], profile, world.form, world.counts)
        if items:
            texts[name] = render(items, world.form, max_item_chars, max_chars)
            keys[name] = np.array([item.key for item in items], np.uint64)
    return texts, keys


def _first_profiles(world: World, needed: set[str]) -> Iterator[tuple[str, tuple[Item, ...]]]:
    """Every needed user's profile, once, as it stands at the first of his questions. Reads the files again."""
    left = set(needed)
    for part, path in world.files.items():
        for question in questions(path, world.form):
            name = world.user_of.get((part, question.id))
            if name in left:
                left.discard(name)
                yield name, question.profile
            if not left:
                return


def _item_vectors(world: World, chosen: dict[str, Keys], encoder: str, pooling: Pooling) -> tuple[list[str], Vectors]:
    items = (
        (item.key, f"{item.title}\n{item.text}".strip())
        for _, profile in _first_profiles(world, set(chosen))
        for item in profile
    )
    return mean_vectors(chosen, items, lambda texts: _encode(texts, encoder, pooling), CHUNK)


def _encode(texts: list[str], encoder: str, pooling: Pooling) -> Vectors:
    from e2p.users.extract import encode_texts  # here: it brings torch

    return encode_texts(texts, encoder, pooling=pooling)
