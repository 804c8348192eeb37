"""Tables of docs/news.md from results/news.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2p.evaluation.aggregate import interval, p_value, signed

FILE = Path(__file__).parents[1] / "results" / "news.json"
ARMS = {
    "none": "none",
    "prompt": "text profile",
    "static": "static",
    "random": "random",
    "shuffled": "shuffled",
    "null": "null user",
    "e2p": "**E2P**",
    "e2p+prompt": "**E2P + text profile**",
}
SHOWN = {"auc": "AUC", "nats_per_token": "nats per token", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2",
         "rougeL": "ROUGE-L", "rougeL_sampled": "ROUGE-L of draws"}  # fmt: skip
TESTED = ("true minus random", "true minus static", "true minus shuffled", "true minus none", "e2p+prompt minus prompt")


def news_table(hardware: Callable[[dict[str, Any]], str]) -> str:
    """Of every vector and objective: arms and differences; what the slice holds; a few answers as they came."""
    if not FILE.exists():
        return ""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    parts = [_counts(content["counts"]["both"])]
    for name, whole in content["experiments"].items():
        metrics = {one["metric"]["name"]: one for one in (whole, *whole["other_metrics"])}
        asked = {what: metrics[what]["comparisons"][0] for what in ("auc", "rougeL")}
        lines = [
            f"### `{name.split('-')[1]}`",
            "",
            f"| arm | {' | '.join(SHOWN.values())} | copied | words |",
        ]
        lines.append("|---" * (len(SHOWN) + 3) + "|")
        for arm, label in ARMS.items():
            cells = [_mean(metrics[what]["arms"][arm], what) for what in SHOWN]
            cells += [
                f"{metrics['copied']['arms'][arm]['copied']:.2f}",
                f"{metrics['words']['arms'][arm]['words']:.1f}",
            ]
            lines.append(f"| {' | '.join([label, *cells])} |")
        lines += ["", "| difference | AUC | nats per token | ROUGE-L |", "|---|---|---|---|"]
        for row in TESTED:
            cells = [_difference(metrics[what], row) for what in ("auc", "nats_per_token", "rougeL")]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines += [
            "",
            f"AUC: {asked['auc']['examples']:,} clicked headlines of {asked['auc']['users']:,} users who passed others "
            f"over; ROUGE and likelihood: {asked['rougeL']['examples']:,} clicked ones. Verdict: {whole['verdict']}.",
            "",
        ]
        parts.append("\n".join(lines))
    first = next(iter(content["experiments"].values()))
    seeds = ", ".join(map(str, first["seeds"]))
    parts.append(
        f"`python {content['provenance']['command']}`, commit {', '.join(c[:10] for c in content['commits'])}, "
        f"{hardware(first['provenance'])}, seeds {seeds}: [results/news.json](../results/news.json).\n"
    )
    parts.append(_samples(first["texts"]["samples"]))
    return "\n".join(parts)


def _counts(counts: dict[str, Any]) -> str:
    lines = [
        "| | clicked, from histories | clicked, in impressions | passed over | users | articles |",
        "|---" * 6 + "|",
    ]
    for part, found in counts.items():
        clicked = found["clicked"]
        cells = [
            clicked.get("history", 0),
            clicked.get("impression", 0),
            *(found[k] for k in ("passed", "users", "articles")),
        ]
        lines.append(f"| {part} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join([*lines, ""])


def _samples(samples: list[dict[str, Any]]) -> str:
    sample = samples[0]
    lines = ["An article and its headlines as they came, flaws included:", "", f"> {sample['prompt']}", ""]
    lines += ["| | headline |", "|---|---|", f"| the editor's | {sample['reference']} |"]
    lines += [f"| {ARMS[one['arm']]} | {one['text'].replace('|', ' ')} |" for one in sample["answers"]]
    return "\n".join([*lines, ""])


def _mean(found: dict[str, Any], metric: str) -> str:
    shown = "{:.3f}".format
    return (
        f"{shown(found[metric])} {interval(found[f'{metric}_ci'], shown)}"
        if f"{metric}_ci" in found
        else shown(found[metric])
    )


def _difference(tested: dict[str, Any], name: str) -> str:
    row = next((row for row in tested["comparisons"] if row["name"] == name), None)
    if row is None:
        return ""
    p = p_value(row["p_holm"])
    return f"{signed(row['difference'])} {interval(row['ci'], signed)}, p {p if p.startswith('<') else f'= {p}'}"
