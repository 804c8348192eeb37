"""What the columns of a table must be, and the messages when they are not. Raw columns in, checked ones out.

Every function raises DataError with file, row and user. Optional columns may be null throughout.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from e2p.data.sources import Table, Where, first_true, is_id, is_text, is_vector, parse_json, to_utc
from e2p.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SPLIT_NAMES = ("train", "validation", "test")
MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def check_types(table: Table) -> None:
    """Refuse columns whose type cannot be what their name says, before any row is read."""
    for column in ("example_id", "user_id", "group", "item_id", "version"):
        table.require_type(column, is_id, "text or whole numbers")
    for column in ("prompt", "completion", "profile", "split"):
        table.require_type(column, is_text, "text")
    table.require_type("label", lambda d: d == pl.Boolean or d.is_numeric() or is_text(d), "true or false")
    table.require_type("messages", _is_messages, "a list of {role, content} with text in both")
    table.require_type("embedding", lambda d: is_vector(d) or is_text(d) or _is_empty(d), "a list of numbers")


def _is_messages(dtype: pl.DataType) -> bool:
    inner = dtype.inner if isinstance(dtype, pl.List) else None
    fields = {f.name: f.dtype for f in inner.fields} if isinstance(inner, pl.Struct) else {}
    texts = all(name in fields and fields[name] in (pl.String, pl.Null) for name in ("role", "content"))
    return dtype == pl.String or inner == pl.Null or texts


def _is_empty(dtype: pl.DataType) -> bool:
    return isinstance(dtype, pl.List) and dtype.inner == pl.Null


def check_users(values: pl.Series, where: Where) -> pl.Series:
    """User ids as String, none missing."""
    users = values.cast(pl.String)
    bad = first_true(users.is_null() | (users.str.strip_chars() == ""))
    if bad is not None:
        raise DataError(f"{where(bad)}: expected a user id, got none; fill user_id or drop the row")
    return users


def check_keys(batch: pl.DataFrame, start: int, where: Where) -> pl.DataFrame:
    """Row, example_id, user_id, timestamp, group and split of a batch, defaults filled in."""
    users = check_users(batch["user_id"], where)
    split = batch["split"].cast(pl.String)
    bad = first_true(~split.is_in(SPLIT_NAMES))
    if bad is not None:
        expected = ", ".join(SPLIT_NAMES)
        raise DataError(f"{where(bad)}: split: expected one of {expected}, got {split[bad]!r}; rename it")
    rows = pl.Series("row", np.arange(start, start + batch.height, dtype=np.int64))
    return pl.DataFrame(
        [
            rows,
            batch["example_id"].cast(pl.String).fill_null(rows.cast(pl.String)),
            users,
            to_utc(batch["timestamp"], where),
            batch["group"].cast(pl.String).fill_null(users),
            split,
        ]
    )


def check_texts(batch: pl.DataFrame, where: Where) -> pl.DataFrame:
    """Prompt, messages, completion, profile, label and item_id of a batch."""
    completion, prompt = batch["completion"].cast(pl.String), batch["prompt"].cast(pl.String)
    blank = first_true(completion.is_null() | (completion.str.strip_chars() == ""))
    if blank is not None:
        got = repr(completion[blank])
        raise DataError(f"{where(blank)}: expected a completion with text, got {got}; drop the row")
    messages = check_messages(batch["messages"], where)
    bad = first_true(prompt.is_null() == messages.is_null())
    if bad is not None:
        got = "neither" if prompt[bad] is None else "both"
        raise DataError(f"{where(bad)}: expected exactly one of prompt and messages, got {got}; set one")
    profile, item = batch["profile"].cast(pl.String), batch["item_id"].cast(pl.String)
    return pl.DataFrame([prompt, messages, completion, profile, check_labels(batch["label"], where), item])


def check_labels(values: pl.Series, where: Where) -> pl.Series:
    """Labels as Boolean; true/false in any case and 1/0 are understood."""
    if values.dtype in (pl.Boolean, pl.Null):
        return values.cast(pl.Boolean)
    words = values.cast(pl.String).str.to_lowercase()
    bad = first_true(~words.is_in(["true", "false", "1", "0", "1.0", "0.0"]))
    if bad is not None:
        raise DataError(f"{where(bad)}: label: expected true or false, got {values[bad]!r}; convert it")
    return words.is_in(["true", "1", "1.0"])


def check_messages(values: pl.Series, where: Where) -> pl.Series:
    """Lists of {role, content}: not empty, known roles, texts, and a last turn that awaits the completion."""
    if values.dtype == pl.String:
        values = parse_json(values, MESSAGES, where, "messages as a JSON list of {role, content}")
    if values.null_count() == len(values):
        return pl.Series(values.name, [None] * len(values), dtype=MESSAGES)
    empty = first_true(values.list.len() == 0)
    if empty is not None:
        raise DataError(f"{where(empty)}: messages: expected at least one message, got none; drop the row")
    turn = pl.element().struct
    frame = values.to_frame("messages").select(  # other fields than these two are left behind
        pl.col("messages").list.eval(pl.struct(turn.field("role"), turn.field("content")))
    )
    lists = pl.col("messages").list
    rules = {
        f"roles out of {', '.join(ROLES)}": lists.eval(turn.field("role").is_in(ROLES).fill_null(False)).list.all(),
        "a text as every content": lists.eval(turn.field("content").is_not_null()).list.all(),
        "a last turn that is not the assistant's": lists.last().struct.field("role") != "assistant",
    }
    for expected, holds in rules.items():
        bad = first_true(~frame.select(holds).to_series())
        if bad is not None:
            got = str(values[bad].to_list())[:120]
            raise DataError(f"{where(bad)}: messages: expected {expected}, got {got}; mend or drop the row")
    return frame["messages"].cast(MESSAGES)


def check_embedding_keys(keys: pl.DataFrame, source: str) -> pl.DataFrame:
    """Keys of a whole embedding table: drops all-null columns, refuses half-filled ones and duplicates."""
    for column in ("timestamp", "version"):
        nulls = keys[column].null_count()
        if nulls == keys.height:
            keys = keys.drop(column)
        elif nulls:
            row = keys[column].is_null().arg_true()[0]
            raise DataError(
                f"{source}: row {row} (user {keys['user_id'][row]!r}): expected a {column}, as other rows "
                "have one, got none; fill it or drop the column"
            )
    check_unique(keys.drop("version", strict=False), "user", source)
    return keys


def check_unique(keys: pl.DataFrame, what: str, source: str) -> None:
    """Refuse two equal rows of a frame of keys (id, and time if there is one); the message names both."""
    first = first_true(keys.is_duplicated())
    if first is not None:
        row = keys.row(first)
        equal = [pl.col(column) == pl.lit(value) for column, value in zip(keys.columns, row, strict=True)]
        second = keys.select(pl.all_horizontal(equal)).to_series().arg_true()[1]
        at = f" at {row[1].isoformat()}" if len(row) > 1 else ""
        raise DataError(
            f"{source}: expected one row for {what} {row[0]!r}{at}, got rows {first} and {second}; keep one"
        )
