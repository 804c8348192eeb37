"""Tables of docs/speed.md from results/bench_answers.json, bench_serve*.json, bench_vllm*.json, bench_soak*.json and
bench_store.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Hardware = Callable[[dict[str, Any]], str]
SERVED = {  # what is compared, and what was aimed at
    "together to alone": ("16 users together, to one after the other", 6.0),
    "together to no_prefix": ("with a soft token, to none", 0.98),
    "together to profile": ("with a soft token, to a 47-token text profile", 1.0),
    "same_prompt to same_prompt_start": ("one 512-token prompt of all: soft token last, to first", None),
}


def answers_table(hardware: Hardware) -> str:
    """Answers in batches against one at a time, and against batches that go on to the end."""
    content = _read("bench_answers")
    if content is None:
        return ""
    lines = ["| side | examples/s | against `generate` |", "|---|---|---|"]
    for side, found in content["sides"].items():
        ratios = sorted(a / b for a, b in zip(content["sides"]["generate"]["seconds"], found["seconds"], strict=True))
        middle = ratios[len(ratios) // 2]
        shown = "1" if side == "generate" else f"**{middle:.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| `{side}` | {found['examples_per_second']:.1f} | {shown} |")
    data = content["data"]
    told = (
        f"{content['prompts']} prompts of {data['mean_prompt_tokens']:.0f} tokens, answers of "
        f"{data['mean_answer_tokens']:.0f} on average and at most {data['longest_answer_tokens']}."
    )
    return "\n".join([*lines, "", f"{told} {_made(content, 'bench_answers', hardware)}", ""])


def serve_table(hardware: Hardware) -> str:
    """The engine within the process, on each kind of processor that it was measured on."""
    parts: list[str] = []
    for file in ("bench_serve", "bench_serve_epyc"):
        content = _read(file)
        if content is None:
            continue
        lines = ["| | tokens/s, how many times as many | first token, how many times as soon | aim |"]
        lines.append("|---|---|---|---|")
        for name, (label, aim) in SERVED.items():
            ratio = content["ratios"][name]
            cells = [_spread(ratio["speed"]), _spread(ratio["first_token"])]
            missed = aim is not None and ratio["speed"]["median"] < aim
            cells.append("" if aim is None else f"{aim:g}{', missed' if missed else ''}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        sides = content["sides"]
        told = (
            f"{sides['together']['tokens_per_second']:,.0f} tokens/s of {content['users']} users, "
            f"{sides['alone']['tokens_per_second']:,.0f} of one; prompts of {content['prompt_tokens']} tokens, answers "
            f"of {content['new_tokens']}."
        )
        parts += [*lines, "", f"{told} {_made(content, file, hardware)}", ""]
    return "\n".join(parts)


def store_table(hardware: Hardware) -> str:
    """The online store."""
    content = _read("bench_store")
    if content is None:
        return ""
    stores = content["stores"]
    lines = [f"| {content['users']:,} users × {content['dimension']} | {' | '.join(stores)} | aim |"]
    lines.append("|---" * (len(stores) + 2) + "|")
    rows: list[tuple[str, Callable[[dict[str, Any]], str], str]] = [
        ("import, users in no order, seconds", lambda one: f"{one['import']['seconds']:.1f}", "20"),
        ("most anonymous memory in it, MiB", lambda one: f"{max(one['import']['anonymous_mib']):,.0f}", "flat"),
        ("import in order, seconds", lambda one: f"{one['import_in_order']['seconds']:.1f}" if "import_in_order" in one
         else "", ""),
        ("the same again, seconds", lambda one: f"{one['again']['seconds']:.1f}", ""),
        ("get, µs, median and p99", lambda one: _two(one["get"]), "1,000"),
        ("get of 32, µs, median and p99", lambda one: _two(one["get_many"]), "1,000"),
        ("get and phi, µs, median and p99", lambda one: _two(one["get_and_project"]) if "get_and_project" in one
         else "", "1,000"),
        ("put, on disk, µs, median and p99", lambda one: _two(one["put"]), ""),
    ]  # fmt: skip
    for label, shown, aim in rows:
        lines.append(f"| {label} | {' | '.join(shown(one) for one in stores.values())} | {aim} |")
    return "\n".join([*lines, "", f"Redis: its own settings decide what is on disk; here nothing was. "
                      f"{_made(content, 'bench_store', hardware)}", ""])  # fmt: skip


GATEWAY = {  # what is compared, and what was aimed at
    "gateway to direct": ("all at once: tokens/s, gateway to direct", 0.97),
    "gateway_alone to direct_alone": ("one after the other: gateway to direct", None),
    "same_prompt to same_prompt_start": ("one long prompt of all: soft token last, to first", 5.0),
}
_FIRST_AIM = 0.003  # seconds that the gateway may add to the first token


def vllm_table(hardware: Hardware) -> str:
    """A gateway over vLLM, on the small backbone and on a model of a realistic shape."""
    parts = []
    for file in ("bench_vllm", "bench_vllm_shape"):
        content = _read(file)
        if content is None:
            continue
        lines = ["| | speed, how many times as many | first token, how many times as soon | aim |", "|---|---|---|---|"]
        for name, (label, aim) in GATEWAY.items():
            ratio = content["ratios"][name]
            missed = aim is not None and ratio["speed"]["median"] < aim
            cells = [_spread(ratio["speed"]), _spread(ratio["first_token"])]
            cells.append("" if aim is None else f"{aim:g}{', missed' if missed else ''}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        added = content["gateway_adds_to_first_token_seconds"]
        low, middle, high = (f"{1000 * added[name]:.1f}" for name in ("min", "median", "max"))
        missed = added["median"] >= _FIRST_AIM
        lines.append(
            f"| the gateway adds to the first token, alone, ms | | **{middle}** ({low} to {high}) | "
            f"{1000 * _FIRST_AIM:g}{', missed' if missed else ''} |"
        )
        model = (
            f"`{content['shape']}` ({content['parameters'] / 1e6:,.0f}M parameters, random weights)"
            if content.get("shape")
            else "The shared small backbone"
        )
        took = content["sides"]["gateway"].get("cpu_seconds_per_1000_tokens", {})
        spent = ", ".join(f"{who} {seconds:.2f}" for who, seconds in took.items())
        sides = content["sides"]
        told = (
            f"{model}, {content['users']} users, prompts of {content['prompt_tokens']} tokens (the long one "
            f"{content['same_prompt_tokens']}): {sides['gateway']['tokens_per_second']:,.0f} tokens/s by the gateway, "
            f"{sides['direct']['tokens_per_second']:,.0f} directly."
        )
        told += f" Processor seconds for 1,000 tokens: {spent}." if spent else ""
        parts.append("\n".join([*lines, "", f"{told} {_made(content, file, hardware)}", ""]))
    return "\n".join(parts)


def soak_table(hardware: Hardware) -> str:
    """A server under steady load, part by part."""
    parts = []
    for file in ("bench_soak", "bench_soak_vllm"):
        content = _read(file)
        if content is None:
            continue
        lines = [
            "| minute | answers | errors | tokens/s | first token, p50 and p99, ms | answer, p50 and p99, ms | "
            "anonymous memory, MiB | files | threads |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for part in content["by_part"]:
            answers = sum(count for kind, count in part["requests"].items() if kind in ("stream", "whole", "left"))
            cells = [f"{part['from_seconds'] / 60:.1f}", f"{answers:,}", f"{sum(part['errors'].values())}"]
            cells.append(f"{part['tokens_per_second']:,.0f}")
            cells += [_milliseconds(part[name]) for name in ("first_token_seconds", "answer_seconds")]
            cells += [f"{part['anonymous_mib']:,.0f}", f"{part['descriptors']}", f"{part['threads']}"]
            lines.append(f"| {' | '.join(cells)} |")
        found = content["summary"]
        ratio = found["p99_ratio"]
        told = (
            f"{content['minutes']:g} minutes, {content['clients']} clients, {content['users']:,} users, engine "
            f"{content['engine']}. Memory after the first quarter: {found['memory_mib_per_minute']:+.2f} MiB a minute. "
            f"p99 of the last third to the second: first token {ratio['first_token_seconds']:.2f}, answer "
            f"{ratio['answer_seconds']:.2f}."
        )
        parts.append("\n".join([*lines, "", f"{told} {_made(content, file, hardware)}", ""]))
    return "\n".join(parts)


def _milliseconds(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{1000 * found['p50']:,.0f}, {1000 * found['p99']:,.0f}"


def _read(name: str) -> dict[str, Any] | None:
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _made(content: dict[str, Any], name: str, hardware: Hardware) -> str:
    made = content["provenance"]
    rounds = f", {content['rounds']} rounds" if "rounds" in content else ""
    rounds += f", {content['threads']} thread(s)" if "threads" in content else ""
    return (
        f"`{made['command']}`, commit {str(made['commit'])[:10]}, {hardware(made)}{rounds}: "
        f"[results/{name}.json](../results/{name}.json)."
    )


def _spread(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _two(found: dict[str, float]) -> str:
    return f"{found['p50_us']:,.0f}, {found['p99_us']:,.0f}"
