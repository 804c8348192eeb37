"""`e2p evaluate`: runs, other seeds of them, or scores from anywhere, judged and laid side by side."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from e2p.data.tables import require_folder
from e2p.errors import ConfigError, DataError, RunError
from e2p.evaluation.aggregate import p_value, signed
from e2p.evaluation.audit import (
    FORMAT,
    SCORES,
    Scored,
    audit,
    differing,
    experiments,
    load_scored,
    write_json,
    write_results,
    write_text,
)
from e2p.evaluation.metrics import audited_metrics
from e2p.evaluation.report import console_tables, write_report
from e2p.evaluation.significance import COMPARISONS, RULE, Comparison, Direction
from e2p.evaluation.tables import Metric, arm_table, comparison_table
from e2p.provenance import hide_paths, provenance

_HEADLINES = tuple(name for name, *_ in COMPARISONS[:5])


def evaluate(
    runs: list[str],
    seeds: tuple[int, ...] = (),
    allow_leaks: bool = False,
    output: str = "",
    better: dict[str, Direction] | None = None,
) -> None:
    """Judge runs: train the controls that are missing, score all arms, test the differences, write the report.

    Several runs are judged one by one; then those that differ in nothing but their training seed are put together as
    one experiment, and the experiments are shown side by side. What has been scored already, with the same settings
    on the same tables, is not scored again, except where a single run is named without seeds.

    Args:
        runs: run folders that `e2p train` has written, or folders with a scores.parquet from anywhere
            (example_id, user_id, arm, metric, value).
        seeds: training seeds, such as 42,43,44: each run is trained and judged with those too, in RUN/seeds/SEED,
            and the run's report is about all of them together. Can be interrupted and started again.
        allow_leaks: go on where a leak check fires; the report will say so.
        output: folder for audit.json and audit.md: every experiment, and a table to compare them.
        better: lower or higher, for a metric that e2p does not know: --better.dwell_time higher.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise ConfigError("runs: expected at least one folder, got none")
    twice = next((run for run in folders if [f.resolve() for f in folders].count(run.resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"runs: expected every folder once, got {twice} more than once")
    for folder in folders:  # all of this before long work
        if not (folder / "adapter").is_dir() and not (folder / SCORES).is_file():
            raise RunError(
                f"{folder}: expected a run with config.yaml and adapter/, or a {SCORES}, found neither; "
                "run e2p train first"
            )
        if seeds and not (folder / "adapter").is_dir():
            raise ConfigError(f"{folder}: --seeds trains a run again, but this folder holds scores alone; leave it out")
    outside = {folder: load_scored(folder) for folder in folders if not (folder / "adapter").is_dir()}
    _check_better(better or {}, outside.values(), len(outside) < len(folders))
    if output:
        require_folder(Path(output))
    console, out = Console(stderr=True), Console()
    again = len(folders) == 1 and not seeds
    scored: list[Scored] = []
    for folder, shown in zip(folders, _shown(folders), strict=True):
        own = outside.get(folder) or _scores(folder, seeds, allow_leaks, again, console)
        results = audit(own, better)
        write_results(folder, results)
        write_report(folder)
        for one in own:
            source, whole = Path(one.source), folder.resolve()
            below = source.relative_to(whole) if source.is_relative_to(whole) else source.name  # a linked seed
            scored.append(dataclasses.replace(one, name=str(shown / below)))
    if len(folders) == 1:
        for table in console_tables(results):
            out.print(table)
        out.print(results["verdict"])
        out.print(f"report: {folders[0] / 'report.html'}")
    if len(folders) == 1 and not output:
        return
    groups = experiments(scored)
    found, differs = [audit(group, better) for group in groups], differing(groups)
    if len(folders) > 1:
        _show(out, found, differs)
    if output:
        write_audit(Path(output), found, differs)
        out.print(f"audit: {Path(output) / 'audit.md'}")


def _check_better(better: Mapping[str, Direction], outside: Iterable[Sequence[Scored]], trained: bool) -> None:
    """Refuse a direction for what nobody has measured: a slip of the pen must not leave the metric as it was."""
    known = {name for scored in outside for name in audited_metrics([one.scores for one in scored])}
    known |= {"nats_per_token"} if trained else set()
    for name in better:
        if name not in known:
            raise DataError(f"--better.{name}: expected a metric of the scores ({', '.join(sorted(known))})")


def _shown(folders: Sequence[Path]) -> list[Path]:
    """What the user has typed, without paths of the machine; as much of them as tells apart what bears one name."""
    names = [hide_paths(str(folder.parent / folder.resolve().name)) for folder in folders]
    size = 2
    while len(set(names)) < len(names):
        size += 1
        tails = ["/".join(folder.resolve().parts[1:][-size:]) for folder in folders]
        names = [tail if names.count(name) > 1 else name for name, tail in zip(names, tails, strict=True)]
    return [Path(name) for name in names]


def _scores(folder: Path, seeds: Sequence[int], allow_leaks: bool, again: bool, console: Console) -> list[Scored]:
    """The scores of a run and of its other seeds; what is missing is trained and scored first."""
    from e2p.evaluation.judge import score, score_seeds  # here: scores alone are judged without torch

    if again:
        score(folder, console, allow_leaks=allow_leaks)
        return load_scored(folder)
    found = []
    for one in score_seeds(folder, seeds, console, allow_leaks):
        own = load_scored(one)
        if one != folder:  # a run like any other
            write_results(one, audit(own))
            write_report(one)
        found += own
    return found


def _show(out: Console, found: Sequence[Mapping[str, Any]], differs: Sequence[Mapping[str, Any]]) -> None:
    """The experiments in one table, then what tells them apart and each one's verdict."""
    from rich.table import Table
    from rich.text import Text

    headings, *rows = side_by_side(found)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(Text(heading))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    for results, settings in zip(found, differs, strict=True):
        out.print(Text(f"{results['run']}{_described(settings)}: {results['verdict']}"), soft_wrap=True)


def side_by_side(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row for each experiment, headings first: seeds, metric, and the headlines that any of them has.

    Args:
        found: results of :func:`e2p.evaluation.audit.audit`.
    """
    by_name = [{row["name"]: row for row in results["comparisons"]} for results in found]
    names = [name for name in _HEADLINES if any(name in rows for rows in by_name)]
    table = [["experiment", "seeds", "metric", *names]]
    for results, rows in zip(found, by_name, strict=True):
        cells = [results["run"], ", ".join(map(str, results["seeds"])) or "–", results["metric"]["label"]]
        for name in names:
            row = rows.get(name)
            p = "" if row is None else p_value(row["p_holm"])
            cells.append("–" if row is None else f"{signed(row['difference'])} (p {p if p[0] == '<' else f'= {p}'})")
        table.append(cells)
    return table


def write_audit(folder: Path, found: Sequence[Mapping[str, Any]], differs: Sequence[Mapping[str, Any]]) -> None:
    """Write ``audit.json`` and ``audit.md``: the experiments side by side, then a section for each.

    Args:
        folder: where to.
        found: results of :func:`e2p.evaluation.audit.audit`.
        differs: of :func:`e2p.evaluation.audit.differing`, for the same experiments.
    """
    sections = [{"differs": dict(one), **results} for results, one in zip(found, differs, strict=True)]
    write_json(folder / "audit.json", {"format": FORMAT, "provenance": provenance(), "experiments": sections})
    parts = ["# Audit", "", *_markdown(side_by_side(found)), "", RULE, ""]
    for results, settings in zip(found, differs, strict=True):
        parts += [f"## {_cell(results['run'] + _described(settings))}", "", f"**{_cell(results['verdict'])}**", ""]
        parts += [line for warning in results["warnings"] for line in (f"- {_cell(warning)}", "")]
        for one in (results, *results["other_metrics"]):
            metric = Metric.of(one)
            compared = comparison_table([Comparison.from_dict(row) for row in one["comparisons"]], metric)
            parts += [f"In {_cell(metric.label)}; {metric.better} is better.", ""]
            for table in (compared, arm_table(one["arms"], metric)):
                parts += [*_markdown([table.headings, *table.rows]), ""]
    write_text(folder / "audit.md", "\n".join(parts).rstrip() + "\n")


def _described(settings: Mapping[str, Any]) -> str:
    """What tells an experiment apart, in brackets; a table's hash by its first characters."""
    shown = [f"{name} {str(value)[:8] if name.startswith('table of') else value}" for name, value in settings.items()]
    return f" ({', '.join(shown)})" if shown else ""


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _cell(text: str) -> str:
    """A text in Markdown: on one line, no new column, no markup."""
    return re.sub(r"([\\`*_\[\]<|])", r"\\\1", " ".join(text.split()))
