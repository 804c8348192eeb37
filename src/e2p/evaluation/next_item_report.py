"""Ranked next items in a report: the table of arms, how much of the catalogue they reach, and what the codes are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e2p.evaluation.metrics import arm_order
from e2p.evaluation.tables import Metric, Section, Table

_NOTES = {
    "retrieval": "no text is generated: the items whose vectors have the greatest dot product with the user's",
    "popularity": "no text is generated: the items with the most training interactions",
}


def next_items_of(results: Mapping[str, Any]) -> Section | None:
    """What there is to say; None where no next items were judged."""
    found = results.get("next_item")
    if not found:
        return None
    settings = results["config"]["evaluation"]["next_item"]
    ks = settings["cutoffs"]
    legend = (
        "Means over examples; intervals and tests stand below, metric by metric. Each query has one true item. "
        f"{'What its user had before is dropped from every ranking. ' if settings['seen'] == 'drop' else ''}"
        f"HitRate: it is among {settings['samples']} draws at temperature {settings['temperature']:g}, of which the "
        "different ones are ranked by log-probability; expected HitRate: the mean over all such draws that there might "
        "have been, from the true item's probability. Recall, NDCG and MRR: the ranking of a beam search over "
        f"{settings['beam']} partial codes; of arms without a language model, their one ranking. Coverage: share of "
        f"the catalogue that is among anybody's first {ks[-1]}. Popularity: mean percentile of the popularity of the "
        f"first {ks[-1]}; items drawn evenly have 0.5. Drawn: different items among the draws. Exact: share of the "
        "queries in which no likelier item can have been missed by the beam search. Coverage, drawn and exact are of "
        "the first training seed."
    )
    table = next_item_table(results)
    caption = f"Next items, {results['run']}."
    return Section("Next items", "next-items", caption, table, legend, [_counts(found), _codes(found["codes"])])


def next_item_table(results: Mapping[str, Any]) -> Table:
    """Every arm by HitRate of the draws and by Recall, NDCG and MRR of the beams."""
    means: dict[str, dict[str, float]] = {}
    labels: dict[str, str] = {}
    for section in (results, *(results.get("other_metrics") or ())):
        metric = Metric.of(section)
        labels[metric.name] = metric.label
        means[metric.name] = {
            arm: float(figures[metric.name]) for arm, figures in section["arms"].items() if metric.name in figures
        }
    found = results["next_item"]
    settings = results["config"]["evaluation"]["next_item"]
    ks, draws = settings["cutoffs"], [settings["samples"]]
    shown = (("hit_rate", ks[-1:]), ("expected_hit_rate", draws), ("recall", ks), ("ndcg", ks), ("mrr", ks[-1:]))
    # Runs judged before there was an expected hit rate have none.
    ranked = [name for name in (f"{name}@{k}" for name, own in shown for k in own) if name in labels]
    arms = arm_order(found["arms"])
    columns: dict[str, list[str]] = {"arm": arms}
    for name in (*ranked, "popularity"):
        heading = "popularity" if name == "popularity" else labels[name]
        columns[heading] = [_number(means[name].get(arm)) for arm in arms]
    columns["coverage"] = [_number(found["arms"][arm]["coverage"][str(ks[-1])]) for arm in arms]
    columns["drawn"] = [_number(found["arms"][arm]["distinct"], ".1f") for arm in arms]
    columns["exact"] = [_number(found["arms"][arm]["certain"], ".0%") for arm in arms]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return Table(list(columns), rows, notes=[_NOTES.get(arm, "") for arm in arms])


def _counts(found: Mapping[str, Any]) -> str:
    text = f"{found['items']:,} items have codes"
    if found["items_without_codes"]:
        text += f"; {found['items_without_codes']:,} of the table have none and cannot be recommended"
    text += f". Test examples whose item nobody had in training: {found['unseen_targets']:,}"
    return f"{text}; whose user had it before: {found['seen_targets']:,}."


def _codes(report: Mapping[str, Any]) -> str:
    sizes = " × ".join(f"{level['size']:,}" for level in report["levels"])
    used = ", ".join(f"{level['used']:,} (perplexity {level['perplexity']:.0f})" for level in report["levels"])
    shared = report["collisions"]
    text = (
        f"Codes of {len(report['levels'])} levels, {sizes}; in use {used}. Items that share all codes before the last: "
        f"{shared['items']:,} in {shared['groups']:,} groups, the largest of {shared['largest']:,}."
    )
    if (error := report["reconstruction_error"]) is not None:
        text += f" Of the vectors' variance, {error:.0%} is not told by the codes."
    return text


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else f"{value:{form}}"
