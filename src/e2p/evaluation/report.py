"""A run's ``results.json`` -> a page, Markdown, LaTeX, CSV, figures, tables for the terminal. Loads no model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from e2p.errors import DataError, RunError
from e2p.evaluation.aggregate import p_value, signed
from e2p.evaluation.figures import LEAD, costed, draw, gains_over_none
from e2p.evaluation.figures_space import SPACE_COLUMNS, likeness_caption, space_caption
from e2p.evaluation.look import Picture
from e2p.evaluation.next_item_report import next_items_of
from e2p.evaluation.playlist_report import markdown, playlists_of
from e2p.evaluation.significance import COMPARISONS, Comparison, verdict
from e2p.evaluation.tables import (
    QUESTIONS,
    Metric,
    Table,
    arm_table,
    breakdown_table,
    comparison_table,
    latex,
    leak_table,
    likeness_table,
    perplexity,
    plain,
    training_table,
    write_csv,
)
from e2p.evaluation.texts_report import texts_of, variety_sections

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = (1, 2)
# Sections of results.json; the first three must be there, the others may be missing.
_SECTIONS: dict[str, type] = {
    "run": str,
    "arms": dict,
    "comparisons": list,
    "provenance": dict,
    "config": dict,
    "data": dict,
    "training": dict,
    "samples": list,
    "extra": dict,
    "warnings": list,
    # Since format 2.
    "seeds": list,
    "metric": dict,
    "rule": str,
    "other_metrics": list,
    "breakdowns": list,
    "gains": dict,
    "leaks": list,
}


def report(run: str) -> None:
    """Write the report of an evaluated run: report.html (one file), report.md, tables.tex, CSV and figures/*.png.

    Args:
        run: the run's folder, with results.json and, for the map of the users, space.parquet.
    """
    print(f"{write_report(Path(run))}\n{Path(run) / 'report.html'}")


def write_report(folder: Path) -> str:
    """As :func:`report`, for the code that says itself what there is; returns the verdict."""
    results = load_results(folder)
    metric, comparisons = Metric.of(results), comparisons_of(results)
    space = _parquet(folder / "space.parquet", SPACE_COLUMNS) if results.get("space") else None
    pictures = draw(results, comparisons, space, folder / "figures")
    view = _view(results, comparisons, pictures)
    texts = {name: _render(name, view) for name in ("report.html", "report.md")}
    sections = [results, *results["other_metrics"]]
    if judged := view["generated"]:
        # Of the tables, the first; the heading cannot stand in a cell, which is one line.
        head, mark, tail = texts["report.md"].partition("\n## Comparisons\n")
        texts["report.md"] = head + markdown(judged, view["calibration"], _cell) + mark + tail
    if results.get("playlists"):
        readings = results["playlists"].get("readings") or {}
        sections.append({"metric": {"name": "miss_rate", "better": "lower"}, "arms": readings, "comparisons": []})
    sections += variety_sections(results)
    texts["tables.tex"] = latex(
        comparison_table(comparisons, metric),
        arm_table(results["arms"], metric),
        view["title"],
        judged,
    )
    for name, text in texts.items():
        # A model's answer may hold half of a character pair, which has no UTF-8.
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
    write_csv(folder, sections, results["seeds"])
    return str(view["verdict"])


def load_results(folder: Path) -> dict[str, Any]:
    """Read and check ``folder/results.json``. Missing optional sections come back empty.

    Raises:
        RunError: the file is missing, is not JSON, or is not of a known format; the message says what to do.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: not found; evaluate the run first: e2p evaluate {folder}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(results, dict) or results.get("format") not in FORMATS:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise RunError(f"{path}: expected results of format {FORMATS[-1]}, got {found!r}; evaluate the run again")
    for position, (name, kind) in enumerate(_SECTIONS.items()):
        value = results.get(name)
        if value is None and position >= 3:
            results[name] = kind()
        elif not isinstance(value, kind):
            raise RunError(f"{path}: {name}: expected {kind.__name__}, got {type(value).__name__}")
    metric = Metric.of(results)
    needed = ["examples", "users", metric.name, *(["perplexity"] if metric.perplexity else [])]
    for arm, figures in results["arms"].items():
        bad = [name for name in needed if not isinstance(_get(figures, name), int | float)]
        if bad:
            raise RunError(f"{path}: arms.{arm}: no number for {', '.join(bad)}; evaluate the run again")
    for name, entries in (("training", results["training"].values()), ("samples", results["samples"])):
        if not all(isinstance(entry, dict) for entry in entries):
            raise RunError(f"{path}: {name}: expected mappings; evaluate the run again")
    # What a table or a caption cannot show is broken.
    shown: dict[str, Callable[[], object]] = {
        "comparisons": lambda: comparison_table(comparisons_of(results), metric),
        "arms": lambda: arm_table(results["arms"], metric),
        "other_metrics": lambda: [_other_metric(one) for one in results["other_metrics"]],
        "breakdowns": lambda: [_breakdown(one, metric) for one in results["breakdowns"]],
        "gains": lambda: (
            [float(gain) for gain in results["gains"].get("by_user") or ()],
            gains_over_none(costed(results), results["gains"], metric),
        ),
        "leaks": lambda: leak_table(results["leaks"]),
        "space": lambda: results.get("space") and space_caption(results["space"]),
        "playlists": lambda: playlists_of(results),
        "next_item": lambda: next_items_of(results),
        "texts": lambda: (texts_of(results), variety_sections(results)),
        "prefix": lambda: results.get("prefix") and likeness_caption(results["prefix"]),
    }
    for name, show in shown.items():
        try:
            show()
        except (DataError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RunError(f"{path}: {name}: {error}; evaluate the run again") from None
    return results


def comparisons_of(results: Mapping[str, Any]) -> list[Comparison]:
    """The comparisons of a run's results in table order: true minus random and true minus static first."""
    rank = {name: index for index, (name, *_) in enumerate(COMPARISONS)}
    found = [Comparison.from_dict(values) for values in results["comparisons"]]
    return sorted(found, key=lambda comparison: rank.get(comparison.name, len(rank)))


def console_tables(results: Mapping[str, Any]) -> list[RichTable]:
    """Comparisons and arms of a run's results, for the terminal."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable
    from rich.text import Text

    metric, tones = Metric.of(results), {"good": "green", "bad": "red"}
    seeds = f", {len(results['seeds'])} seeds" if len(results.get("seeds") or ()) > 1 else ""
    sign = "negative" if metric.better == "lower" else "positive"
    compared, arms = comparison_table(comparisons_of(results), metric), arm_table(results["arms"], metric)
    found = []
    for table, title, columns in (
        (
            compared,
            f"Comparisons ({metric.label}, mean over examples{seeds}; {sign} is better)",
            (0, 2, 3, "p (Holm)", 1),
        ),
        (arms, "Arms", (0, 1, 2, "bits per byte", "added tokens")),
    ):
        # Without lines between the columns, the first table fits in 80 of them.
        shown = RichTable(title=title, title_justify="left", box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        kept = [
            table.headings.index(c) if isinstance(c, str) else c for c in columns if c in (*range(4), *table.headings)
        ]
        for at in kept:
            left = at in (0, table.marked)
            heading = "difference" if table is compared and at == 2 else table.headings[at]
            shown.add_column("" if left else heading, justify="left" if left else "right", no_wrap=True)
        for row, cells in enumerate(table.rows):
            tone = tones.get(table.tones[row], "dim") if table.marked is not None else ""
            shown.add_row(*(Text(cells[at], style=tone if at == table.marked else "") for at in kept))
        found.append(shown)
    return found


def _get(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _parquet(path: Path, columns: Sequence[str] = ()) -> pl.DataFrame | None:
    if not path.exists():
        return None
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise RunError(f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    return frame


def _render(name: str, view: Mapping[str, Any]) -> str:
    import jinja2

    source = resources.files("e2p.evaluation").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    return environment.from_string(source).render(view)


def _cell(text: object) -> str:
    """Any text as one Markdown table cell: no new row or column, no markup."""
    words = " ".join(str(text).split())
    words = re.sub(r"([\\`*_\[\]|])", r"\\\1", words)
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _view(results: Mapping[str, Any], comparisons: list[Comparison], pictures: list[Picture]) -> dict[str, Any]:
    """Everything that the two templates show, as texts and tables."""
    metric, arms = Metric.of(results), results["arms"]
    fired = [leak for leak in results["leaks"] if leak["fired"]]
    line = str(results.get("verdict") or verdict(comparisons, [leak["name"] for leak in fired]))
    head, _, detail = line.partition(": ")
    tones = {"personalised": "good", "harmful": "bad", "conditioned but not personalised": "fair", "not valid": "bad"}
    # A doubt after `personalised` is a reason for caution, not for green.
    tone = "fair" if "but no better" in detail or "disagree" in detail else tones.get(head, "none")
    prefix = results.get("prefix") or {}
    return {
        "title": results["run"],
        "task": results.get("task") or "",
        "verdict": line,
        "head": head,
        "detail": detail,
        "tone": "bad" if fired else tone,
        "rule": results["rule"],
        "basis": _basis(results),
        "fired": fired,
        "warnings": results["warnings"],
        "tiles": _tiles(arms, comparisons, metric),
        "split": _split_of_the_gain(arms, metric),
        "metric": metric,
        "lead": [one for one in pictures if one.name in LEAD],
        "more": [one for one in pictures if one.name not in (*LEAD, "calibration")],
        "generated": playlists_of(results) or next_items_of(results) or texts_of(results),
        "calibration": next((one for one in pictures if one.name == "calibration"), None),
        "samples": [_sample(sample) for sample in results["samples"]],
        "comparisons": comparison_table(comparisons, metric),
        "counts": f"{comparisons[0].examples:,} examples of {comparisons[0].users:,} users" if comparisons else "",
        "arms": arm_table(arms, metric),
        "others": [_other_metric(one) for one in results["other_metrics"]],
        "breakdowns": [_breakdown(one, metric) for one in results["breakdowns"]],
        "leaks": leak_table(results["leaks"]) if results["leaks"] else None,
        "likeness": likeness_table(prefix) if prefix.get("users") else None,
        "training": training_table(results["training"]) if results["training"] else None,
        "units": " and ".join(_units(results["training"])),
        "facts": [
            (str(key).replace("_", " "), plain(value))
            for part in ("data", "extra", "provenance")
            for key, value in results[part].items()
        ],
        "config": yaml.safe_dump(results["config"], sort_keys=False) if results["config"] else "",
    }


def _units(training: Mapping[str, Any]) -> list[str]:
    """What the validation losses are counted in."""
    found = [(part.get("validation") or {}).get("unit") or "nats per token" for part in training.values()]
    return list(dict.fromkeys(found))


def _other_metric(one: Mapping[str, Any]) -> tuple[Metric, Table, Table]:
    metric = Metric.of(one)
    return metric, comparison_table(comparisons_of(one), metric), arm_table(one["arms"], metric)


def _breakdown(one: Mapping[str, Any], metric: Metric) -> tuple[str, str, str, Table]:
    return str(one["by"]), str(one["label"]), str(one["comparison"]), breakdown_table(one, metric)


def _basis(results: Mapping[str, Any]) -> str:
    """What was put together and how much was judged."""
    seeds = results["seeds"] or [seed for seed in [results.get("seed")] if seed is not None]
    runs, arms = results.get("runs") or [], results["arms"]
    parts = [f"{len(seeds)} training seeds ({plain(seeds)})" if len(seeds) > 1 else f"training seed {plain(seeds)}"]
    parts += [f"runs {plain(runs)}"] if len(runs) > 1 else []
    if arms:
        arm = arms.get("e2p") or next(iter(arms.values()))
        parts += [f"{arm['users']:,} users", f"{arm['examples']:,} test examples"]
    if (metric := Metric.of(results)).name != "nats_per_token":
        parts.append(f"judged by {metric.label}, {metric.better} is better")
    if len(seeds) > 1:  # what cannot be averaged is one training's
        parts.append(f"answers, map of the users, prefix and learning curves: {runs[0] if runs else results['run']}")
    return " · ".join(parts if seeds else parts[1:])


def _tiles(arms: Mapping[str, Any], comparisons: Sequence[Comparison], metric: Metric) -> list[dict[str, str]]:
    """The few figures that stand beside the verdict."""
    tiles = [
        {
            "label": c.name,
            "value": signed(c.difference),
            "note": f"{metric.label}, p {_equals(p_value(c.p_holm))}: {QUESTIONS[c.name]}",
            "tone": {"better": "good", "worse": "bad"}.get(c.verdict, "none"),
        }
        for c in comparisons
        if c.name in ("true minus random", "true minus static")
    ]
    if {"none", "e2p"} <= arms.keys():
        name, show = ("perplexity", perplexity) if metric.perplexity else (metric.name, "{:.3f}".format)
        value = f"{show(arms['none'][name])} → {show(arms['e2p'][name])}"
        label = "perplexity" if name == "perplexity" else metric.label
        note = f"bare model → with the user's vector; {metric.better} is better"
        tiles.append({"label": label, "value": value, "note": note, "tone": "none"})
    return tiles


def _split_of_the_gain(arms: Mapping[str, Any], metric: Metric) -> str:
    """How much of the gain over no prefix needs the right user: the question that the paper's table hides."""
    if not {"none", "e2p"} <= arms.keys():
        return ""
    gain = {arm: metric.sign * (arms["none"][metric.name] - figures[metric.name]) for arm, figures in arms.items()}
    if gain["e2p"] <= 0:
        return ""
    names = {"static": "one static token", "random": "a random user's vector"}
    shares = {text: gain[arm] / gain["e2p"] for arm, text in names.items() if arm in gain}
    reached = [f"{share:.0%} is also reached with {text}" for text, share in shares.items() if 0 <= share <= 1]
    texts = [f"Of e2p's gain over no prefix, {' and '.join(reached)}."] if reached else []
    for text, share in shares.items():
        subject = f"{text[0].upper()}{text[1:]}"
        texts += [f"{subject} gains {share:.1f} times as much as e2p."] if share > 1 else []
        texts += [f"{subject} is worse than no prefix."] if share < 0 else []
    return " ".join(texts)


def _equals(text: str) -> str:
    return text if text.startswith("<") else f"= {text}"


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One prompt: the answers that know no user, and those of every user in the order of his first answer."""
    users: dict[str, dict[str, Any]] = {}
    for answer in sample.get("answers") or []:
        name = str(answer.get("user_id") or "")
        user = users.setdefault(name, {"user": name, "profile": "", "answers": []})
        user["profile"] = user["profile"] or str(answer.get("profile") or "")
        text = str(answer.get("text") or "(an empty answer)")
        user["answers"].append({"arm": str(answer.get("arm", "")), "text": text})
    nobody = users.pop("", None)
    return {"prompt": str(sample.get("prompt", "")), "nobody": nobody, "users": list(users.values())}
