"""Examples out of a stranger's table: which column becomes what, and the rows that are sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from e2p.data.checks import SPLIT_NAMES, check_types
from e2p.data.sources import UTC, Table
from e2p.data.tables import EMBEDDING_COLUMNS, KEY_COLUMNS, TEXT_COLUMNS
from e2p.errors import ConfigError, DataError
from e2p.tasks.table_fields import Field, field_of, labels_of
from e2p.tasks.table_rows import BadRows, Fault, ParquetSink, blank, messages_of
from e2p.tasks.table_times import Clock

BATCH_ROWS = 16_384
OURS = frozenset(KEY_COLUMNS + TEXT_COLUMNS + EMBEDDING_COLUMNS)
TEXTS = ("example_id", "user_id", "group", "split", "prompt", "completion", "profile", "item_id")


@dataclass
class Plan:
    """What is made of which column.

    Args:
        table: the source.
        texts: fields that are text, by our names.
        messages: the column of messages, if there is one.
        label: the column of labels, if there is one.
        engaged: values that mean engaged.
        not_engaged: values that mean not engaged.
        clock: the column of times, if there is one.
        others: columns that are kept as they are.
        left: columns that are not kept, though nothing is made of them: our tables use these names.
    """

    table: Table
    texts: dict[str, Field]
    messages: Field | None
    label: Field | None
    engaged: Sequence[str]
    not_engaged: Sequence[str]
    clock: Clock | None
    others: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Field]:
        """All fields but the time, by our names."""
        more = {"messages": self.messages, "label": self.label}
        return self.texts | {name: f for name, f in more.items() if f is not None}

    def keep_others(self, used: Sequence[str], drop_others: bool) -> None:
        """Decide about the columns that no field, and nothing else (``used``), is wholly made of."""
        whole = {f.column for f in self.fields.values()} | set(used) | ({self.clock.column} if self.clock else set())
        free = [name for name in self.table.schema if name not in whole]
        self.left = [name for name in free if name in OURS]
        self.others = [] if drop_others else [name for name in free if name not in OURS]

    @property
    def read(self) -> list[str]:
        """All columns that examples are made of."""
        names = [column for f in self.fields.values() for column in f.columns]
        return list(dict.fromkeys([*names, *([self.clock.column] if self.clock else []), *self.others]))

    def in_its_words(self) -> str:
        """Our fields by the source's columns, behind a complaint about our whole table."""
        said = {name: f.said for name, f in self.fields.items() if f.column != name}
        if self.clock is not None and self.clock.column != "timestamp":
            said["timestamp"] = self.clock.said
        return f" (in {self.table.name}: {'; '.join(f'{name} is {words}' for name, words in said.items())})" * bool(
            said
        )


def plan_examples(
    table: Table, wanted: Mapping[str, str], engaged: Sequence[str], not_engaged: Sequence[str], clock: Clock | None
) -> Plan:
    """Read what the options say about examples.

    Args:
        table: the source.
        wanted: the options by our fields' names; empty where not given.
        engaged: values that mean engaged.
        not_engaged: values that mean not engaged.
        clock: the times.

    Raises:
        ConfigError: an option names no column, or options do not fit each other.
        DataError: a column that must be there is not, or is of a wrong type.
    """
    # Naming one of prompt and messages says that a column of the other's name is not meant.
    unmeant = {"messages"} if wanted["prompt"] and not wanted["messages"] else set()
    unmeant |= {"prompt"} if wanted["messages"] and not wanted["prompt"] else set()
    found = {name: field_of(name, wanted[name], table) for name in (*TEXTS, "messages", "label") if name not in unmeant}
    texts = {name: f for name in TEXTS if (f := found.get(name)) is not None}
    turns, label = found.get("messages"), found.get("label")
    if turns is not None and turns.column is None:
        raise ConfigError(f"messages: expected a column, got {wanted['messages']!r}; write templates as --prompt")
    if turns is not None:
        _require_messages(table, turns)
    columns = ", ".join(table.schema)
    for name in ("user_id", "completion"):
        if name not in texts:
            raise table.fault(f"expected a column '{name}', found: {columns}; name it by --{name}")
    if "prompt" not in texts and turns is None:
        raise table.fault(f"expected a column 'prompt' or 'messages', found: {columns}; name one by --prompt")
    if label is None and (engaged or not_engaged):
        raise ConfigError("engaged: expected a label that it is about, got none; name its column by --label")
    both = sorted({word.strip().lower() for word in engaged} & {word.strip().lower() for word in not_engaged})
    if both:
        raise ConfigError(f"engaged: expected other values than in not_engaged, got {both[0]!r} in both; drop one")
    return Plan(table, texts, turns, label, engaged, not_engaged, clock)


def _require_messages(table: Table, turns: Field) -> None:
    try:
        check_types(Table(table.name, table.kind, table.files, {"messages": table.schema[turns.column or ""]}))
    except DataError as error:
        raise DataError(str(error).replace("column 'messages'", turns.said)) from None


def write_examples(plan: Plan, path: Path, bad: BadRows, timed: bool) -> list[str]:
    """Write the example table, a batch at a time, and say what is in it; of all rows only example ids are held.

    Args:
        plan: what is made of which column.
        path: the file.
        bad: what happens to rows that cannot be used.
        timed: the vectors have times, so every example needs one.

    Raises:
        DataError: a row cannot be used, unless ``bad`` counts it; or none is left.
    """
    rows = written = 0
    labels: Counter[bool | None] = Counter()
    span = pl.Series([], dtype=UTC)
    seen: set[str] = set()
    with ParquetSink(path) as sink:
        for start, batch in plan.table.batches(plan.read, BATCH_ROWS):
            frame, faults = _examples(plan, batch, timed)
            if "example_id" in frame.columns:
                faults.append(_repeated(plan.texts["example_id"], frame["example_id"], seen))
            frame = frame.filter(bad.sift(faults, start, batch.height, plan.table.name))
            rows += batch.height
            written += frame.height
            if "example_id" in frame.columns:
                seen.update(frame["example_id"])
            if "label" in frame.columns:
                labels.update(frame["label"])
            if "timestamp" in frame.columns:
                every = pl.concat([span, frame["timestamp"]])
                span = pl.Series([every.min(), every.max()], dtype=UTC).drop_nulls()
            sink.write(frame)
    if not rows:
        raise plan.table.empty()
    if not written:
        raise plan.table.fault(f"no row can be used: {' '.join(bad.report('examples', rows))}")
    report = [f"{written:,} examples from {rows:,} rows of {plan.table.name}"]
    if plan.label is not None:
        report.append(f"labels: {labels[True]:,} engaged, {labels[False]:,} not, {labels[None]:,} without one")
    if len(span):
        report.append(f"times: {span[0]:%Y-%m-%d %H:%M} to {span[1]:%Y-%m-%d %H:%M} UTC")
    if plan.left:
        report.append(f"left out: {', '.join(plan.left)} (names of fields that other columns were given for)")
    return report + bad.report("examples", rows)


def _examples(plan: Plan, batch: pl.DataFrame, timed: bool) -> tuple[pl.DataFrame, list[Fault]]:
    """Our columns of a batch, and everything that may be wrong with its rows."""
    texts = batch.with_columns(**{f"\0{name}": f.text() for name, f in plan.texts.items()})
    columns = [texts[f"\0{name}"].alias(name) for name in plan.texts]
    frame, faults = pl.DataFrame(columns), []
    for name, what in (("user_id", "a user id"), ("completion", "a completion with text")):
        faults.append(Fault(f"{plan.texts[name].said}: expected {what}", blank(frame[name]), frame[name]))
    prompt = (
        frame["prompt"] if "prompt" in frame.columns else pl.repeat(None, batch.height, dtype=pl.String, eager=True)
    )
    if plan.messages is not None:
        messages, wrong = messages_of(batch[plan.messages.column or ""], plan.messages.said)
        faults += wrong
        frame = frame.with_columns(messages)
        stated = batch[plan.messages.column or ""].is_not_null()
        if "prompt" in plan.texts:
            said = f"{plan.texts['prompt'].said}, {plan.messages.said}: expected one of the two"
            faults.append(Fault(f"{said}, not both", stated & prompt.is_not_null(), prompt))
            faults.append(Fault(said, ~stated & prompt.is_null()))
        else:
            faults.append(Fault(f"{plan.messages.said}: expected messages", ~stated))
    else:
        faults.append(Fault(f"{plan.texts['prompt'].said}: expected a prompt", prompt.is_null()))
    if "split" in frame.columns:
        split = frame["split"]
        said = f"{plan.texts['split'].said}: expected one of {', '.join(SPLIT_NAMES)}"
        faults.append(Fault(said, ~split.is_in(SPLIT_NAMES).fill_null(False), split))
    if plan.clock is not None:
        moments, fault = plan.clock.utc(batch[plan.clock.column])
        frame = frame.with_columns(moments)
        faults.append(fault)
        if timed:
            faults.append(Fault(f"{plan.clock.said}: expected a time, as the vectors have times", moments.is_null()))
    if plan.label is not None:
        column = plan.label.column
        values = batch[column] if column else batch.with_columns(label=plan.label.text())["label"]
        labels, fault = labels_of(values, plan.label.said, plan.engaged, plan.not_engaged)
        frame = frame.with_columns(labels)
        faults.append(fault)
    if "group" in frame.columns:  # a blank one is none, and our tables take the user then
        frame = frame.with_columns(pl.when(pl.col("group").str.strip_chars() != "").then("group").alias("group"))
    return frame.hstack(batch.select(plan.others)), faults


def _repeated(said: Field, ids: pl.Series, seen: set[str]) -> Fault:
    again = pl.Series([name in seen for name in ids], dtype=pl.Boolean) | ~ids.is_first_distinct() | ids.is_null()
    return Fault(f"{said.said}: expected an id that no earlier row has", again, ids)
