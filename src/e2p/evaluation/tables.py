"""The report's tables as rows of texts, which page, Markdown, terminal and LaTeX share; and CSV with every digit."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from e2p.evaluation import metrics
from e2p.evaluation.aggregate import interval, p_value, signed
from e2p.evaluation.metrics import arm_order
from e2p.evaluation.significance import Comparison, Direction

# What each comparison asks, for a reader who has never heard of an arm.
QUESTIONS = {
    "true minus random": "the user's own vector against another user's",
    "true minus static": "the user's own vector against one token for everybody",
    "true minus shuffled": "against training on vectors that belong to others",
    "true minus null": "the user's own vector against that of an unknown user",
    "true minus none": "the user's own vector against the bare model",
    "true minus prompt": "one soft token against the profile as text",
    "e2p+prompt minus prompt": "what the vector adds to the profile as text",
    "static minus none": "one token for everybody against the bare model",
    "prompt minus none": "the profile as text against the bare model",
}
_TONES = {"better": "good", "worse": "bad"}
_FIGURES = {"perplexity": "perplexity", "nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
_SHORT = {"predicted engagement": "engagement", "gain over none, %": "gain, %"} | {
    "share invented": "invented"
}  # in LaTeX, where a page is narrow
_NOT_IN_LATEX = ("verdict", "perplexity", "p bootstrap", "effect size")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": "$<$", ">": "$>$", "−": "$-$", "±": r"$\pm$", "–": "--", "…": r"\dots{}", "→": r"$\rightarrow$"},
    **{"[": "{[}", "]": "{]}", '"': "''", "×": r"$\times$", "“": "``", "”": "''", "’": "'"},
}


@dataclass(frozen=True)
class Metric(metrics.Metric):
    """A metric as a report needs it: read from the results, with the direction of a gain and an arm's mean of it.

    Args:
        tokens: whether the tokens are known that nats are per, without which there is no perplexity.
    """

    tokens: bool = True

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Metric:
        """The metric that results (or an entry of their ``other_metrics``) are in; nats per token if none is named."""
        given = results.get("metric") or {}
        better: Direction = "higher" if given.get("better") == "higher" else "lower"
        name = str(given.get("name", "nats_per_token"))
        arms = [figures for figures in (results.get("arms") or {}).values() if isinstance(figures, Mapping)]
        tokens = name != "nats_per_token" or not arms or any("perplexity" in figures for figures in arms)
        return cls(name, str(given.get("label", name.replace("_", " "))), better, tokens)

    @property
    def perplexity(self) -> bool:
        """Whether the arms have a perplexity, which is then shown first."""
        return self.name == "nats_per_token" and self.tokens

    @property
    def sign(self) -> int:
        """1 or -1: ``sign * (control - arm)`` is the arm's gain."""
        return -1 if self.better == "higher" else 1

    def mean(self, figures: Mapping[str, Any]) -> tuple[float, Sequence[float] | None] | None:
        """An arm's mean and its 95% interval, which for nats per token follows from that of the perplexity."""
        if (value := figures.get(self.name)) is None:
            return None
        bounds = figures.get(f"{self.name}_ci")
        if self.name == "nats_per_token" and figures.get("perplexity_ci") is not None:
            bounds = [math.log(bound) for bound in figures["perplexity_ci"]]
        return float(value), bounds


class Table(NamedTuple):
    """A table of texts. ``marked`` is the column whose text says how it went, ``tones`` how, row by row.

    The first ``lead`` rows are those that count.
    """

    headings: list[str]
    rows: list[list[str]]
    marked: int | None = None
    tones: Sequence[str] = ()
    lead: int = 0
    notes: Sequence[str] = ()


class Section(NamedTuple):
    """What a report says of judged answers.

    Args:
        title: its heading.
        label: of the LaTeX float.
        caption: of the same.
        table: one row an arm.
        legend: what its columns are.
        texts: sentences below.
        samples: what was asked, and a table of what was answered.
    """

    title: str
    label: str
    caption: str
    table: Table
    legend: str
    texts: list[str]
    samples: Sequence[tuple[str, Table]] = ()


def comparison_table(comparisons: Sequence[Comparison], metric: Metric) -> Table:
    """Every comparison with its tests; with several seeds, their spread."""
    several = any(len(c.by_seed) > 1 for c in comparisons)
    headings = ["comparison", "verdict", metric.label, "95% interval", *(["over seeds"] if several else [])]
    headings += [*(["perplexity"] if metric.perplexity else []), "p (Holm)", "p bootstrap", "p paired t", "effect size"]
    table = []
    for c in comparisons:
        cells = [c.name, c.verdict, signed(c.difference), interval(c.ci)]
        cells += [f"± {c.seed_std:.3f}"] if several else []
        cells += [_times(c.corpus_difference)] if metric.perplexity else []
        cells += [p_value(c.p_holm), p_value(c.p_bootstrap), p_value(c.p_ttest), _real(f"{c.effect_size:+.2f}")]
        table.append(cells)
    lead = sum(c.name in ("true minus random", "true minus static") for c in comparisons[:2])
    questions = [QUESTIONS.get(c.name, "") for c in comparisons]
    return Table(headings, table, 1, [_TONES.get(c.verdict, "none") for c in comparisons], lead, questions)


def arm_table(arms: Mapping[str, Any], metric: Metric) -> Table:
    """Every arm: the headline figure with its interval first, then what else is known, then what it costs."""
    known = [name for name in (*_FIGURES, metric.name) if arms and all(name in figures for figures in arms.values())]
    first, *others = dict.fromkeys(known) or [metric.name]
    cost = any("context_tokens" in figures for figures in arms.values())
    labels = _FIGURES | {metric.name: metric.label}
    headings = ["arm", labels[first], "95% interval", *(labels[name] for name in others)]
    headings += [*(["added tokens"] if cost else []), "examples / users"]
    table = []
    for arm in arm_order(arms):
        figures = arms[arm]
        digits = perplexity if first == "perplexity" else "{:.3f}".format
        cells = [arm, _or_dash(figures.get(first), digits), interval(figures.get(f"{first}_ci"), digits)]
        cells += [_or_dash(figures[name], "{:.3f}".format) for name in others]
        cells += [_or_dash(figures.get("context_tokens"), "{:.1f}".format)] if cost else []
        table.append([*cells, f"{figures['examples']:,} / {figures['users']:,}"])
    return Table(headings, table)


def breakdown_table(breakdown: Mapping[str, Any], metric: Metric) -> Table:
    """One comparison, bin by bin."""
    table = [
        [str(b["label"]), signed(b["difference"]), interval(b["ci"]), f"{b['examples']:,}", f"{b['users']:,}"]
        for b in breakdown["bins"]
    ]
    return Table([str(breakdown["by"]), metric.label, "95% interval", "examples", "users"], table)


def leak_table(leaks: Sequence[Mapping[str, Any]]) -> Table:
    """Every leak check, whether it fired and what it found."""
    words = ["fired" if leak["fired"] else "not fired" if leak.get("told", True) else "not known" for leak in leaks]
    table = [
        [str(leak["name"]), word, str(leak["found"]), "; ".join(leak["examples"])]
        for leak, word in zip(leaks, words, strict=True)
    ]
    tones = [{"fired": "bad", "not fired": "good"}.get(word, "none") for word in words]
    return Table(["leak check", "result", "found", "cases"], table, 1, tones)


def training_table(training: Mapping[str, Any]) -> Table:
    """What was trained, for how long, and its validation loss beside that without prefix."""
    headings = ["arm", "parameters", "steps", "best step", "seconds", "validation", "without prefix", ""]
    table = []
    for arm in arm_order(training):
        part = training[arm]
        held_out = part.get("validation") or {}
        prefix, none = held_out.get("prefix"), held_out.get("none")
        worse = prefix is not None and none is not None and not prefix < none  # NaN: diverged
        cells = [arm, *(plain(part.get(key)) for key in ("parameters", "steps", "best_step", "seconds"))]
        cells += [_or_dash(prefix, "{:.3f}".format), _or_dash(none, "{:.3f}".format)]
        table.append([*cells, "worse than no prefix" if worse else ""])
    return Table(headings, table, len(headings) - 1, ["bad"] * len(table))


def likeness_table(prefix: Mapping[str, Any]) -> Table:
    """The tokens nearest to what makes a few users' prefixes differ from the mean one."""
    table = [
        [str(user["user_id"]), ", ".join(f"{token(n['token'])} {n['cosine']:.2f}" for n in user["nearest"])]
        for user in prefix.get("users") or []
    ]
    return Table(["user", "nearest tokens, with cosine"], table)


def token(text: str) -> str:
    """A token as a reader can see it: a space in front becomes a dot, a line's end an arrow."""
    return ("·" + text[1:] if text[:1] == " " else text).replace("\n", "↵").replace("\t", "→")


def plain(value: Any) -> str:
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
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def latex(comparisons: Table, arms: Table, run: str, section: Section | None = None) -> str:
    """The tables as LaTeX floats, without the columns that would make them too wide; they need booktabs alone."""
    parts = ["% \\usepackage{booktabs}"]
    floats: list[tuple[Table, str, str, Sequence[str]]] = [
        (comparisons, "comparisons", f"Differences between arms, {run}.", _NOT_IN_LATEX),
        (arms, "arms", f"Arms, {run}.", ("examples / users",)),
    ]
    if section is not None:
        shown = section.table._replace(headings=[_SHORT.get(heading, heading) for heading in section.table.headings])
        floats.append((shown, section.label, section.caption, ()))
    for table, label, caption, left_out in floats:
        kept = [at for at, heading in enumerate(table.headings) if heading not in left_out]
        lines = [" & ".join(escape_latex(cells[at]) for at in kept) + r" \\" for cells in (table.headings, *table.rows)]
        parts += [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}"]
        parts += [f"\\caption{{{escape_latex(caption)}}}", f"\\label{{tab:{label}}}"]
        parts += [f"\\begin{{tabular}}{{l{'r' * (len(kept) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
        parts += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """Any text for LaTeX: on one line, no command in it, and no letter that the standard fonts lack."""
    return "".join(_LATEX.get(c) or _letter(c) for c in " ".join(text.split()))


def _letter(character: str) -> str:
    if character.isascii() or ("À" <= character <= "ÿ" and character not in "ÐðÞþ÷"):
        return character if character.isprintable() else "?"
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def write_csv(folder: Path, sections: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """Write ``comparisons.csv`` and ``arms.csv``: the numbers of ``results.json``, none of them rounded.

    Args:
        folder: the run's.
        sections: one for each metric, with ``arms`` and ``comparisons``: the results, and their ``other_metrics``.
        seeds: training seeds; a comparison's mean of each goes to a column of its own.
    """
    compared, arms = [], []
    for section in sections:
        for values in section["comparisons"]:
            by_seed = values.get("by_seed") or ()
            own = {f"seed_{seed}": value for seed, value in zip(seeds, by_seed, strict=False)}
            compared.append(_flat(values) | (own if len(by_seed) > 1 else {}))
        name = Metric.of(section).name
        arms += [{"arm": arm, "metric": name} | _flat(section["arms"][arm]) for arm in arm_order(section["arms"])]
    for file, rows, names in (("comparisons", compared, ["name", "arm", "against"]), ("arms", arms, ["arm", "metric"])):
        frame = pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame(schema=names)
        frame.write_csv(folder / f"{file}.csv")


def perplexity(value: float) -> str:
    """Two decimals; a broken model's, short."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def _times(nats: float) -> str:
    """What a difference in nats does to the perplexity: per cent; from a hundredfold on, how many times."""
    ratio = math.exp(min(nats, 700.0))
    return _real(f"{ratio - 1:+.1%}") if ratio < 100 else f"×{ratio:.3g}"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and texts as they are, an interval ``x_ci`` as ``x_ci_low`` and ``x_ci_high``; nothing else."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == "ci" or key.endswith("_ci"):
            found[f"{key}_low"], found[f"{key}_high"] = (None, None) if value is None else value
        elif value is None or isinstance(value, str | int | float):
            found[key] = value
    return found


def _or_dash(value: float | None, show: Any) -> str:
    return "–" if value is None else str(show(value))


def _real(text: str) -> str:
    return text.replace("-", "−")
