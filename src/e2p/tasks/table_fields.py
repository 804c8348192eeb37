"""How a stranger's columns become the fields of our tables: a column, a template over columns, or a fixed text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from e2p.data.sources import Table, is_id
from e2p.errors import ConfigError
from e2p.tasks.table_rows import Fault

IDS = ("example_id", "user_id", "group", "item_id", "version")
BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Field:
    """Where one field of a table comes from.

    Args:
        option: what it was named by.
        parts: (a fixed text, then a column's name or nothing), as often as needed.
        column: the column's name where the field is one whole column.
    """

    option: str
    parts: tuple[tuple[str, str | None], ...]
    column: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that it is made of, each once."""
        return list(dict.fromkeys(column for _, column in self.parts if column is not None))

    @property
    def said(self) -> str:
        """How a message names it: by the user's own columns."""
        if self.column is not None:
            return f"column {self.column!r}" + (f" (--{self.option})" if self.column != self.option else "")
        columns = self.columns
        return f"--{self.option} of column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns)) or '(none)'}"

    def text(self) -> pl.Expr:
        """The field as text; null where one of its columns is."""
        pieces = []
        for fixed, column in self.parts:
            pieces += [pl.lit(fixed)] * bool(fixed or column is None)
            pieces += [pl.col(column).cast(pl.String)] if column is not None else []
        return pl.concat_str(pieces)


def field_of(name: str, wanted: str, table: Table, option: str = "") -> Field | None:
    """Read an option: a column's name, a template with {column}, or a fixed text after =.

    Args:
        name: the field of our table.
        wanted: what the option says; empty: the column of the field's own name, if there is one.
        table: the source.
        option: the option's name where it is not the field's.

    Raises:
        ConfigError: a lone brace, or no such column; the message lists the columns.
        DataError: a column cannot be written as text, or cannot be an id.
    """
    option = option or name
    if not wanted or wanted in table.schema:
        column = wanted or name
        found = Field(option, (("", column),), column) if column in table.schema else None
    elif wanted.startswith("="):
        found = Field(option, ((wanted[1:], None),))
    elif "{" in wanted or "}" in wanted:
        found = Field(option, tuple(_template(option, wanted, table)))
    else:
        raise ConfigError(
            f"{option}: expected a column, a template such as 'About {{{next(iter(table.schema), 'column')}}}' or a "
            f"fixed text after =, got {wanted!r}; {table.name} has {', '.join(table.schema)}"
        )
    if found is not None and name not in ("messages", "timestamp"):
        for column in found.columns:
            _require_scalar(table, column, name in IDS)
    return found


def _template(option: str, text: str, table: Table) -> list[tuple[str, str | None]]:
    parts: list[tuple[str, str | None]] = []
    fixed, end = "", 0
    for match in BRACES.finditer(text):
        fixed += text[end : match.start()]
        end = match.end()
        column = match.group(1)
        if match.group() in ("{{", "}}"):
            fixed += match.group()[0]
        elif column is not None and column in table.schema:
            parts.append((fixed, column))
            fixed = ""
        else:
            raise ConfigError(
                f"{option}: expected a column in {match.group()!r} at {match.start()} of {text!r}; "
                f"{table.name} has {', '.join(table.schema)}; a brace that stays is doubled: {{{{ or }}}}"
            )
    fixed += text[end:]
    return [*parts, (fixed, None)] if fixed else parts


def _require_scalar(table: Table, column: str, as_id: bool) -> None:
    if as_id:
        table.require_type(column, is_id, "text or whole numbers")
    elif table.kind == "parquet":  # of JSON Lines and CSV every column is read as text
        table.require_type(column, lambda d: not d.is_nested() and d != pl.Binary, "text or one number a row")
    else:
        table.require_type(column, lambda d: not isinstance(d, pl.List) or d.inner == pl.String, "text or numbers")


def labels_of(
    values: pl.Series, said: str, engaged: Sequence[str], not_engaged: Sequence[str]
) -> tuple[pl.Series, Fault]:
    """Labels as Boolean and what is neither: words without regard to case, or numbers of the same value.

    Args:
        values: the column; nulls stay null.
        said: names the column.
        engaged: what means engaged; empty: true and 1.
        not_engaged: what means not engaged; empty: whatever else there is, or false and 0 without ``engaged``.
    """
    yes = _among(values, engaged or ("true", "1"))
    no = _among(values, not_engaged or ("false", "0"))
    if engaged and not not_engaged:
        no = ~yes
    labels = pl.select(pl.when(yes).then(True).when(no).then(False).alias("label")).to_series()
    wanted = f"{', '.join(engaged or ('true', '1'))} or {', '.join(not_engaged or ('false', '0'))}"
    unknown = labels.is_null() & values.is_not_null()
    return labels.set(values.is_null(), None), Fault(
        f"{said}: expected {wanted} (--engaged, --not_engaged)", unknown, values
    )


def _among(values: pl.Series, words: Sequence[str]) -> pl.Series:
    texts = values.cast(pl.String).str.strip_chars().str.to_lowercase()
    numbers = pl.Series(words, dtype=pl.String).str.strip_chars().cast(pl.Float64, strict=False).drop_nulls()
    plain = texts.is_in([word.strip().lower() for word in words])
    return plain.fill_null(False) | texts.cast(pl.Float64, strict=False).is_in(numbers.implode()).fill_null(False)
