"""A run's ``results.json`` -> a page, a Markdown file, figures, tables for the terminal. Loads no model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from e2p.errors import DataError, RunError
from e2p.evaluation.aggregate import interval, p_value, signed
from e2p.evaluation.figures import Picture, draw
from e2p.evaluation.metrics import arm_order
from e2p.evaluation.significance import COMPARISONS, Comparison, verdict

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
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
}
_ARM_FIGURES = ("examples", "users", "perplexity", "nats_per_token", "bits_per_byte", "context_tokens")


def report(run: str) -> None:
    """Write the report of an evaluated run: report.html (one file), report.md and figures/*.png.

    Args:
        run: the run's folder, with results.json and, for the gains by user, scores.parquet.
    """
    print(f"{write_report(Path(run))}\n{Path(run) / 'report.html'}")


def write_report(folder: Path) -> str:
    """As :func:`report`, for the code that says itself what there is; returns the verdict."""
    results = load_results(folder)
    comparisons = comparisons_of(results)
    pictures = draw(results, comparisons, _scores(folder / "scores.parquet"), folder / "figures")
    view = _view(results, comparisons, pictures)
    for name in ("report.html", "report.md"):
        # A model's answer may hold half of a character pair, which has no UTF-8.
        (folder / name).write_text(_render(name, view), encoding="utf-8", errors="replace")
    return str(view["verdict"])


def load_results(folder: Path) -> dict[str, Any]:
    """Read and check ``folder/results.json``. Missing optional sections come back empty.

    Raises:
        RunError: the file is missing, is not JSON, or is not of this format; the message says what to do.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: not found; evaluate the run first: e2p evaluate {folder}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise RunError(f"{path}: expected results of format {FORMAT}, got {found!r}; evaluate the run again")
    for position, (name, kind) in enumerate(_SECTIONS.items()):
        value = results.get(name)
        if value is None and position >= 3:
            results[name] = kind()
        elif not isinstance(value, kind):
            raise RunError(f"{path}: {name}: expected {kind.__name__}, got {type(value).__name__}")
    for arm, figures in results["arms"].items():
        bad = [name for name in _ARM_FIGURES if not isinstance(_get(figures, name), int | float)]
        if bad:
            raise RunError(f"{path}: arms.{arm}: no number for {', '.join(bad)}; evaluate the run again")
    for name, entries in (("training", results["training"].values()), ("samples", results["samples"])):
        if not all(isinstance(entry, dict) for entry in entries):
            raise RunError(f"{path}: {name}: expected mappings; evaluate the run again")
    try:
        [_comparison_row(comparison) for comparison in comparisons_of(results)]
    except (DataError, TypeError, ValueError, LookupError) as error:
        raise RunError(f"{path}: comparisons: {error}; evaluate the run again") from None
    return results


def comparisons_of(results: Mapping[str, Any]) -> list[Comparison]:
    """The comparisons of a run's results in table order: true minus random and true minus static first."""
    rank = {name: index for index, (name, *_) in enumerate(COMPARISONS)}
    found = [Comparison.from_dict(values) for values in results["comparisons"]]
    return sorted(found, key=lambda comparison: rank.get(comparison.name, len(rank)))


def console_tables(results: Mapping[str, Any]) -> list[Table]:
    """Comparisons and arms of a run's results, for the terminal."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    # Without lines between the columns, the first table fits in 80 of them.
    look: dict[str, Any] = {"title_justify": "left", "box": SIMPLE, "show_edge": False, "padding": (0, 1, 0, 0)}
    tones = {"better": "green", "worse": "red"}
    first = Table(title="Comparisons (nats per token, mean over examples; negative is better)", **look)
    for heading in ("", "difference", "95% interval", "p (Holm)", ""):
        first.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for c in comparisons_of(results):
        word = Text(c.verdict, style=tones.get(c.verdict, "dim"))
        first.add_row(Text(c.name), signed(c.difference), Text(interval(c.ci)), p_value(c.p_holm), word)
    second = Table(title="Arms (perplexity over all tokens)", **look)
    for heading in ("", "perplexity", "95% interval", "bits per byte", "added tokens"):
        second.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in _arm_rows(results["arms"]):
        cells = (row["arm"], row["perplexity"], row["ci"], row["bits"], row["context"])
        second.add_row(*(Text(cell) for cell in cells))
    return [first, second]


def _get(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _scores(path: Path) -> pl.DataFrame | None:
    if not path.exists():
        return None
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


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
    """Everything that the two templates show, as texts."""
    line = verdict(comparisons)
    head, _, detail = line.partition(": ")
    tones = {"personalised": "good", "harmful": "bad", "conditioned but not personalised": "fair"}
    # `no better than no prefix` after `personalised` is a reason for caution, not for green.
    tone = "fair" if "but no better" in detail else tones.get(head, "none")
    return {
        "title": results["run"],
        "task": results.get("task") or "",
        "seed": results.get("seed"),
        "verdict": line,
        "head": head,
        "detail": detail,
        "tone": tone,
        "tiles": _tiles(results["arms"], comparisons),
        "split": _split_of_the_drop(results["arms"]),
        "warnings": results["warnings"],
        "comparisons": [_comparison_row(comparison) for comparison in comparisons],
        "arms": _arm_rows(results["arms"]),
        "pictures": pictures,
        "samples": [_sample(sample) for sample in results["samples"]],
        "training": _training_rows(results["training"]),
        "data": [(key.replace("_", " "), _plain(value)) for key, value in results["data"].items()],
        "extra": [(str(key), _plain(value)) for key, value in results["extra"].items()],
        "provenance": [(key, _plain(value)) for key, value in results["provenance"].items()],
        "config": yaml.safe_dump(results["config"], sort_keys=False) if results["config"] else "",
    }


def _tiles(arms: Mapping[str, Any], comparisons: list[Comparison]) -> list[dict[str, str]]:
    """The few figures that stand beside the verdict."""
    tiles = [
        {
            "label": c.name,
            "value": signed(c.difference),
            "note": f"nats per token, p {_equals(p_value(c.p_holm))}",
            "tone": {"better": "good", "worse": "bad"}.get(c.verdict, "none"),
        }
        for c in comparisons
        if c.name in ("true minus random", "true minus static")
    ]
    if "none" in arms and "e2p" in arms:
        value = f"{arms['none']['perplexity']:.2f} → {arms['e2p']['perplexity']:.2f}"
        tiles.append({"label": "perplexity", "value": value, "note": "no prefix → e2p", "tone": "none"})
    if arms:
        arm = arms.get("e2p") or next(iter(arms.values()))
        note = f"users, {arm['examples']:,} test examples"
        tiles.append({"label": "judged on", "value": f"{arm['users']:,}", "note": note, "tone": "none"})
    return tiles


def _split_of_the_drop(arms: Mapping[str, Any]) -> str:
    """How much of the gain over no prefix needs the right user: the question that the paper's table hides."""
    if not {"none", "e2p"} <= arms.keys():
        return ""
    none, e2p = arms["none"]["nats_per_token"], arms["e2p"]["nats_per_token"]
    if none - e2p <= 0:
        return ""
    names = {"static": "one static token", "random": "a random user's vector"}
    shares = {text: (none - arms[arm]["nats_per_token"]) / (none - e2p) for arm, text in names.items() if arm in arms}
    reached = [f"{share:.0%} is also reached with {text}" for text, share in shares.items() if share >= 0]
    lost = [f"{text[0].upper()}{text[1:]} is worse than no prefix." for text, share in shares.items() if share < 0]
    first = [f"Of e2p's gain over no prefix, {' and '.join(reached)}."] if reached else []
    return " ".join(first + lost)


def _equals(text: str) -> str:
    return text if text.startswith("<") else f"= {text}"


def _comparison_row(c: Comparison) -> dict[str, str]:
    return {
        "name": c.name,
        "difference": signed(c.difference),
        "ci": interval(c.ci),
        "perplexity": f"{math.expm1(c.corpus_difference):+.1%}".replace("-", "−"),
        "p": p_value(c.p_holm),
        "p_clustered": p_value(c.p_clustered),
        "p_bootstrap": p_value(c.p_bootstrap),
        "p_ttest": p_value(c.p_ttest),
        "effect": f"{c.effect_size:+.2f}".replace("-", "−"),
        "n": f"{c.examples:,} / {c.users:,}",
        "verdict": c.verdict,
        "tone": {"better": "good", "worse": "bad"}.get(c.verdict, "none"),
    }


def _arm_rows(arms: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "arm": arm,
            "perplexity": f"{arms[arm]['perplexity']:.2f}",
            "ci": interval(arms[arm].get("perplexity_ci"), "{:.2f}".format),
            "nats": f"{arms[arm]['nats_per_token']:.3f}",
            "bits": f"{arms[arm]['bits_per_byte']:.3f}",
            "context": f"{arms[arm]['context_tokens']:.1f}",
            "n": f"{arms[arm]['examples']:,} / {arms[arm]['users']:,}",
        }
        for arm in arm_order(arms)
    ]


def _training_rows(training: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for arm in arm_order(training):
        part = training[arm]
        held_out = part.get("validation") or {}
        prefix, none = held_out.get("prefix"), held_out.get("none")
        worse = prefix is not None and none is not None and not prefix < none  # NaN: diverged
        rows.append(
            {
                "arm": arm,
                "parameters": _plain(part.get("parameters")),
                "steps": _plain(part.get("steps")),
                "best": _plain(part.get("best_step")),
                "seconds": _plain(part.get("seconds")),
                "prefix": "–" if prefix is None else f"{prefix:.3f}",
                "none": "–" if none is None else f"{none:.3f}",
                "note": "worse than no prefix" if worse else "",
            }
        )
    return rows


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One prompt, its answers gathered by user in the order of their first answer."""
    users: dict[str, dict[str, Any]] = {}
    for answer in sample.get("answers") or []:
        name = str(answer.get("user_id") or "no user")
        user = users.setdefault(name, {"user": name, "profile": "", "answers": []})
        user["profile"] = user["profile"] or str(answer.get("profile") or "")
        user["answers"].append(
            {"arm": str(answer.get("arm", "")), "text": str(answer.get("text") or "(an empty answer)")}
        )
    return {"prompt": str(sample.get("prompt", "")), "users": list(users.values())}


def _plain(value: Any) -> str:
    """A value of the results as a reader wants it: thousands separated, lists and mappings on one line."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
