"""Tables of docs/next_item.md from results/nextitem_*.json, results/sasrec_*.json and the benches."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2p.evaluation.aggregate import interval, p_value, signed

ROOT = Path(__file__).parents[1]
DATA = {
    "movielens": ("MovieLens small, by time", ()),
    "beauty": (
        "Amazon Beauty, leave-one-out",
        # Recall@5 and @10 as their authors report them, on all 22,363 users.
        (("TIGER, published", 0.0454, 0.0648), ("SASRec with full cross-entropy, published", 0.0543, 0.0821)),
    ),
    "industrial": ("Amazon Industrial, MiniOneRec's codes, phi trained for hits", ()),
    "industrial_lm": ("The same, phi trained for likelihood", ()),
}
ARMS = {
    "none": "none (the adapted model)",
    "prompt": "text profile",
    "static": "static",
    "random": "random",
    "shuffled": "shuffled",
    "e2p": "**E2P**",
    "e2p+prompt": "**E2P + text profile**",
    "retrieval": "retrieval by the vectors",
    "popularity": "popularity",
}
SHOWN = ("hit_rate@30", "expected_hit_rate@30", "recall@30", "recall@10", "recall@5", "ndcg@10")
TESTED = ("true minus random", "true minus static", "true minus shuffled", "true minus none",
          "e2p+prompt minus prompt", "true minus retrieval")  # fmt: skip


def next_item_table(hardware: Callable[[dict[str, Any]], str]) -> str:
    """Of every data set that was run: arms, other systems on the same queries, differences."""
    parts = []
    for name, (title, published) in DATA.items():
        content, other = _read(f"nextitem_{name}"), _read(f"sasrec_{name}")
        if content is None and other is None:
            continue
        headings = (
            "arm",
            "HitRate@30",
            "expected",
            "Recall@30",
            "Recall@10",
            "Recall@5",
            "NDCG@10",
            "coverage",
            "popularity",
        )
        lines = [f"### {title}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        lines += [] if content is None else _arms(content["results"])
        lines += [] if other is None else _sasrec(other)
        lines += [f"| {label} |  |  |  | {ten:.4f} | {five:.4f} |  |  |  |" for label, five, ten in published]
        if content is None:
            lines += ["", "e2p's own arms have not been run on it yet."]
        else:
            lines += ["", *_differences(content["results"]), "", _about(content)]
        sources = [] if content is None else [
            f"`python {content['provenance']['command']}`, commit {', '.join(c[:10] for c in content['commits'])}, "
            f"{hardware(content['results']['provenance'])}: "
            f"[results/nextitem_{name}.json](../results/nextitem_{name}.json)."
        ]  # fmt: skip
        if other is not None:
            run = other["provenance"]
            sources.append(
                f"`python {run['command']}`, commit {str(run['commit'])[:10]}, {hardware(run)}, seeds "
                f"{', '.join(map(str, other['seeds']))}: [results/sasrec_{name}.json](../results/sasrec_{name}.json)."
            )
        parts.append("\n".join([*lines, "", " ".join(sources), ""]))
    return "\n".join(parts)


def _arms(whole: dict[str, Any]) -> list[str]:
    metrics, about = _by_name(whole), whole["next_item"]["arms"]
    lines = []
    for arm, label in ARMS.items():
        if arm in metrics["recall@10"]["arms"]:
            # Judged before there was an expected hit rate: none.
            cells = [_number(metrics[metric]["arms"][arm], metric) if metric in metrics else "" for metric in SHOWN]
            cells += [f"{about[arm]['coverage']['30']:.2f}", f"{metrics['popularity']['arms'][arm]['popularity']:.2f}"]
            lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def _sasrec(other: dict[str, Any]) -> list[str]:
    lines = []
    for reading, label in (
        ("unseen", "SASRec, full cross-entropy (ours)"),  # without what the user had, as in all arms
        ("all", "the same, nothing dropped"),
    ):
        found = other["test"]["sasrec"][reading]
        shown = [
            f"{found[metric]['mean']:.4f} {interval(found[metric]['ci'], '{:.4f}'.format)}" for metric in SHOWN[2:]
        ]
        lines.append(f"| {label} |  |  | {' | '.join(shown)} |  |  |")
    return lines


def _differences(whole: dict[str, Any]) -> list[str]:
    metrics = _by_name(whole)
    headings = ("difference", "HitRate@30", "expected", "Recall@30", "nats per token")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in TESTED:
        names = ("hit_rate@30", "expected_hit_rate@30", "recall@30", "nats_per_token")
        cells = [_difference(metrics[name], row) if name in metrics else "" for name in names]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _about(content: dict[str, Any]) -> str:
    whole, adapted = content["results"], content["adapt"]["validation"]
    first = whole["comparisons"][0]
    return (
        f"{first['examples']:,} test queries of {first['users']:,} users, seeds {', '.join(map(str, whole['seeds']))}; "
        f"{whole['next_item']['unseen_targets']:,} of the items nobody had in training. Adapted backbone: "
        f"{adapted['before']:.2f} nats a token before, {adapted['after']:.2f} after epoch "
        f"{content['adapt']['best_epoch']:g}. Verdict: {whole['verdict']}."
    )


def _by_name(whole: dict[str, Any]) -> dict[str, Any]:
    return {one["metric"]["name"]: one for one in (whole, *whole["other_metrics"])}


def sample_speed_table(hardware: Callable[[dict[str, Any]], str]) -> str:
    """docs/speed.md: items by our decoding against transformers' generate."""
    content = _read("bench_sample")
    if content is None:
        return ""
    sides = content["sides"]
    bases = ("generate", "generate_cached")
    lines = [
        f"| side | queries/s | {' | '.join(f'against `{base}`' for base in bases)} | peak memory |",
        "|---" * 5 + "|",
    ]
    for side, found in sides.items():
        cells = []
        for base in bases:
            ratios = sorted(a / b for a, b in zip(sides[base]["seconds"], found["seconds"], strict=True))
            spread = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells.append("1" if side == base else spread)
        lines.append(
            f"| `{side}` | {found['queries_per_second']:.1f} | {' | '.join(cells)} | {found['peak_mib']:,.0f} MiB |"
        )
    made = content["provenance"]
    lines += ["", f"`{made['command']}`, commit {str(made['commit'])[:10]}, {hardware(made)}, {content['threads']} "
              f"thread(s), {content['precision']}, {content['rounds']} rounds: "
              "[results/bench_sample.json](../results/bench_sample.json).", ""]  # fmt: skip
    return "\n".join(lines)


def scale_table(hardware: Callable[[dict[str, Any]], str]) -> str:
    """docs/speed.md: the trie and the join by time."""
    content = _read("bench_scale")
    if content is None:
        return ""
    lines = ["| | seconds (median; least, most) | aim | peak memory |", "|---|---|---|---|"]
    for name, what, aim in (
        ("trie", f"trie of {content['items']:,} items", "10"),
        ("join", f"{content['examples']:,} examples with {content['versions']:,} vectors by time", "5"),
    ):
        found = content[name]
        seconds = found["seconds"]
        missed = "" if seconds["median"] <= float(aim) else ", missed"
        lines.append(
            f"| {what} | {seconds['median']:.2f} ({seconds['least']:.2f}, {seconds['most']:.2f}) | {aim}{missed} | "
            f"{found['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    made = content["provenance"]
    lines += ["", f"The trie itself holds {content['trie']['bytes'] / 2**20:.0f} MiB. `{made['command']}`, commit "
              f"{str(made['commit'])[:10]}, {hardware(made)}: "
              "[results/bench_scale.json](../results/bench_scale.json).", ""]  # fmt: skip
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any] | None:
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _number(found: dict[str, Any], metric: str) -> str:
    return f"{found[metric]:.4f} {interval(found[f'{metric}_ci'], '{:.4f}'.format)}"


def _difference(tested: dict[str, Any], name: str) -> str:
    row = next((row for row in tested["comparisons"] if row["name"] == name), None)
    if row is None:
        return ""
    p = p_value(row["p_holm"])
    shown = "{:+.4f}".format if tested["metric"]["better"] == "higher" else signed
    return f"{shown(row['difference'])} {interval(row['ci'], shown)}, p {p if p.startswith('<') else f'= {p}'}"
