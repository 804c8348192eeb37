"""What a sweep has found, as JSON, CSV, Markdown and curves. Loads no model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from e2p.evaluation.aggregate import interval, p_value, signed
from e2p.evaluation.curves import draw_sweep
from e2p.provenance import provenance

FORMAT = 1
_MEANS = ("prefix", "none", "random", "true_minus_random", "seconds")
_HEADINGS = (
    "value", "nats per token", "static", "true minus static", "another user's vector", "true minus random",
    "95% interval", "p", "seeds",
)  # fmt: skip


class Entry(NamedTuple):
    """One point's place in the tables (see ``e2p.evaluation.sweep.Point``) and what came of it."""

    key: str
    value: Any
    arm: str
    seed: int
    result: Mapping[str, Any]


def write_summary(folder: Path, base: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """Put a sweep's points together over their seeds; writes ``sweep.json``, ``.csv``, ``.md`` and ``figures/``.

    Args:
        folder: the sweep's folder.
        base: the settings that all points share.
        entries: every point.

    Returns:
        ``tables``: setting -> rows of ``value``, means over seeds of ``prefix``, ``none``, ``random``,
        ``true_minus_random`` (nats per token) and, where the static control was trained, ``static`` and
        ``true_minus_static``; ``ci``: hull of the seeds' intervals; ``p``: the largest; ``base``: whether it is the
        value that all other tables have; ``failed``: messages of the points that failed.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    base_row = _row(_value_of(base, ""), [e for e in entries if e.key == "base"])
    for key in dict.fromkeys(entry.key for entry in entries if entry.key != "base"):
        own = [entry for entry in entries if entry.key == key]
        values = list(dict.fromkeys(json.dumps(entry.value) for entry in own))
        rows = [_row(json.loads(value), [e for e in own if json.dumps(e.value) == value]) for value in values]
        usual = _value_of(base, key)
        if key in ("variants", "grid"):
            rows.insert(0, {**base_row, "value": "base", "base": True})
        elif usual not in [row["value"] for row in rows]:
            rows.append({**base_row, "value": usual, "base": True})
        for row in rows:
            row.setdefault("base", row["value"] == usual)
        if all(isinstance(row["value"], int | float) for row in rows):
            rows.sort(key=lambda row: float(row["value"]))
        tables[key] = rows
    commits = {(made.get("commit"), made.get("dirty")) for made in (e.result["provenance"] for e in entries)}
    summary = {
        "format": FORMAT,
        "provenance": provenance() | {"points_made_at": sorted(map(list, commits), key=str)},
        "seeds": sorted({entry.seed for entry in entries}),
        "base": dict(base),
        "tables": tables,
        "points": [entry._asdict() for entry in entries],
    }
    (folder / "sweep.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    flat = [{"setting": key, **_flat(row)} for key, rows in tables.items() for row in rows]
    pl.DataFrame(flat, infer_schema_length=None).write_csv(folder / "sweep.csv")
    pictures = {}
    for key, rows in tables.items():
        drawn = [row for row in rows if row["prefix"] is not None]
        if len(drawn) > 1:
            pictures[key] = draw_sweep(key, drawn, folder / "figures")
    parts = []
    for key, rows in tables.items():
        picture = f"![{key}](figures/{pictures[key].name}.png)\n\n" if key in pictures else ""
        parts.append(f"## {key}\n\n{picture}{table(rows)}")
    made = ", ".join(
        f"{str(commit)[:10]}{' with changes' if dirty else ''}" for commit, dirty in sorted(commits, key=str)
    )
    about = f"Nats per token on the validation part; made at {made}."
    (folder / "sweep.md").write_text(f"# Sweep\n\n{about}\n\n" + "\n".join(parts), encoding="utf-8")
    return summary


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A setting's rows as a Markdown table; the base's value is in bold. Columns that hold nothing are left out."""
    cells = [_cells(row) for row in rows]
    shown = [at for at in range(len(_HEADINGS)) if any(row[at] != "–" for row in cells)]
    lines = [[_HEADINGS[at] for at in shown], ["---"] * len(shown), *([row[at] for at in shown] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = _name(row["value"])
    if row["prefix"] is None:
        return [name, f"failed: {_cell(row['failed'][0])}" if row.get("failed") else "failed", *["–"] * 7]
    static = row.get("static")
    return [
        f"**{name}**" if row["base"] else name,
        f"{row['prefix']:.3f}",
        "–" if static is None else f"{static:.3f}",
        "–" if static is None else signed(row["true_minus_static"]),
        f"{row['random']:.3f}",
        signed(row["true_minus_random"]),
        interval(row["ci"]),
        p_value(row["p"]),
        str(row["seeds"]) if row["seeds"] > 1 else "–",
    ]


def _name(value: Any) -> str:
    """Short and without markup: of a path, its name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return _cell(Path(text).stem if "/" in text else text)


def _cell(text: str) -> str:
    """On one line, no new column of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _row(value: Any, entries: Sequence[Entry]) -> dict[str, Any]:
    """One value's figures over its seeds."""
    failed = [entry.result["failed"] for entry in entries if "failed" in entry.result]
    good = [entry.result for entry in entries if entry.arm == "e2p" and "failed" not in entry.result]
    own = {e.seed: e.result["prefix"] for e in entries if e.arm == "e2p" and "failed" not in e.result}
    static = {e.seed: e.result["prefix"] for e in entries if e.arm == "static" and "failed" not in e.result}
    pairs = [(own[seed], static[seed]) for seed in own if seed in static]
    row: dict[str, Any] = {"value": value, "seeds": len(good), "failed": failed}
    for name in _MEANS:
        known = [result[name] for result in good if result.get(name) is not None]
        row[name] = statistics.fmean(known) if known else None
    row["ci"] = [min(r["ci"][0] for r in good), max(r["ci"][1] for r in good)] if good else None
    row["p"] = max((result["p"] for result in good), default=None)
    row["by_seed"] = [result["true_minus_random"] for result in good]
    for name in ("parameters", "steps"):
        row[name] = good[0][name] if good else None
    row["train_examples"] = good[0]["examples"]["train"] if good else None
    if pairs:  # of the seeds that both have
        row["static"] = statistics.fmean(other for _, other in pairs)
        row["true_minus_static"] = statistics.fmean(mine - other for mine, other in pairs)
    return row


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["ci"] or (None, None)
    named = {k: v for k, v in row.items() if k not in ("ci", "by_seed", "failed", "value")}
    return {"value": _name(row["value"]), **named, "ci_low": low, "ci_high": high, "failed": "; ".join(row["failed"])}


def _value_of(base: Mapping[str, Any], key: str) -> Any:
    """What the base has for a setting, or None."""
    found: Any = base
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
