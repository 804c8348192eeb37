"""Shared by the benchmark scripts: one experiment over several training seeds, and a search on validation data."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from e2p.config import RunConfig
from e2p.evaluation.aggregate import aggregate
from e2p.evaluation.judge import judge
from e2p.evaluation.report import load_results, write_report
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import text_encoder
from e2p.provenance import provenance
from e2p.training.inputs import deal, load_inputs
from e2p.training.run import TRAINED_ARMS, arm_folder, prepare_folder, train_arm, with_seed


def run_seeds(
    config: RunConfig, seeds: list[int], console: Console, static_from: str | None = None
) -> list[dict[str, Any]]:
    """Train, judge and report a run per seed, in ``<output>-<seed>``; finished ones are read, not run again.

    ``static_from`` names an experiment that differs in its vectors alone: the static token sees none, so it would
    come out the same, and is copied from there.
    """
    found = []
    for seed in seeds:
        folder = Path(f"{config.output}-{seed}")
        if not (folder / "results.json").is_file():
            one = with_seed(config, seed, str(folder))
            started = (folder / "config.yaml").is_file()
            prepare_folder(one, overwrite=False, resume=started)
            backbone = FrozenBackbone.load(one.backbone, one.training.precision)
            encoder = text_encoder(backbone, one.data, one.projector.prefix_tokens)
            inputs = load_inputs(one.data, encoder, one.projector.position)
            if static_from and not arm_folder(folder, "static").exists():
                shutil.copytree(arm_folder(Path(f"{static_from}-{seed}"), "static"), arm_folder(folder, "static"))
            for arm in (arm for arm in TRAINED_ARMS if arm in one.evaluation.arms):
                if not (arm_folder(folder, arm) / "adapter").is_dir():
                    train_arm(one, backbone, inputs, arm, folder, console, resume=started)
            judge(folder, console)
            write_report(folder)
        found.append(load_results(folder))
    return found


def write_results(path: Path, experiment: dict[str, list[dict[str, Any]]], about: str) -> None:
    """Write a committed results file: every experiment aggregated over its seeds, with each seed's figures."""
    made = {(run["provenance"]["commit"], run["provenance"]["dirty"]) for runs in experiment.values() for run in runs}
    if len(made) > 1 or any(dirty for _, dirty in made):
        raise SystemExit(
            f"{path}: expected runs of one commit without changes, got {made}; delete the older and run again"
        )
    content = {
        "about": about,
        "provenance": provenance(),
        "experiments": {name: aggregate(results) for name, results in experiment.items()},
        "verdicts": {name: [r["verdict"] for r in results] for name, results in experiment.items()},
        "samples": {name: results[0]["samples"] for name, results in experiment.items()},
        "training": {
            name: [
                {arm: {k: v for k, v in record.items() if k != "history"} for arm, record in r["training"].items()}
                for r in results
            ]
            for name, results in experiment.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def search(config: RunConfig, variants: dict[str, dict[str, Any]], log: Path, console: Console) -> None:
    """Train each variant once and write validation losses as JSON lines; no test example is looked at.

    A variant changes ``projector.*`` and ``training.*`` by key; ``arm`` picks another trained arm. ``random`` is the
    loss with the validation users' vectors exchanged among them, so ``true - random`` is the effect of the user.
    """
    done = {json.loads(line)["variant"] for line in log.read_text().splitlines()} if log.exists() else set()
    log.parent.mkdir(parents=True, exist_ok=True)
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    for name, changes in variants.items():
        if name in done:
            continue
        arm = changes.pop("arm", "e2p")
        one = config
        for part in ("projector", "training"):
            own = {k.split(".")[1]: v for k, v in changes.items() if k.startswith(f"{part}.")}
            one = replace(one, **{part: replace(getattr(one, part), **own)})
        one = replace(one, output=f"{config.output}-{name}")
        encoder = text_encoder(backbone, one.data, one.projector.prefix_tokens)
        inputs = load_inputs(one.data, encoder, one.projector.position)
        shutil.rmtree(one.output, ignore_errors=True)
        folder = prepare_folder(one, overwrite=False, resume=False)
        model, record = train_arm(one, backbone, inputs, arm, folder, console)
        entry = {"variant": name, "arm": arm, "changes": changes, "steps": record["steps"], **record["validation"]}
        if arm == "e2p":
            exchanged = deal(inputs, inputs.rows("validation"), [42, 3])
            entry["random"] = mean_loss(model, inputs.examples("validation", vector_rows=exchanged))
            entry["true_minus_random"] = entry["prefix"] - entry["random"]
        entry["training"] = asdict(one.training) | {"history": record["history"][-1]}
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        console.print(entry)


@torch.no_grad()
def mean_loss(model: Any, examples: Any) -> float:
    """Nats per labelled token."""
    from e2p.training.trainer import score_batches

    nats, tokens = 0.0, 0
    for _, logprobs in score_batches(model, examples, 8192):
        nats, tokens = nats - float(logprobs.double().sum()), tokens + len(logprobs)
    return nats / tokens
