"""Shared by the benchmark scripts: one experiment over several training seeds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from e2p.config import BackboneConfig, ProjectorConfig, RunConfig
from e2p.evaluation.aggregate import aggregate
from e2p.evaluation.judge import judge
from e2p.evaluation.report import load_results, write_report
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import text_encoder
from e2p.provenance import provenance
from e2p.training.inputs import load_inputs
from e2p.training.run import TRAINED_ARMS, arm_folder, prepare_folder, train_arm, with_seed


def placed(config: RunConfig, tables: Path, backbone: str, embeddings: Path | None = None) -> RunConfig:
    """What the benchmarks share: the backbone, the tables' places and a wide phi.

    Places are relative, so that the committed results name no folder of the machine that made them.
    """
    embeddings = embeddings or tables / "embeddings.parquet"
    return replace(
        config,
        # On a CPU the plain attention of short sequences is faster than the fused one, above all backwards.
        backbone=BackboneConfig(model=backbone, attn="eager"),
        data=replace(config.data, examples=str(tables / "examples.parquet"), embeddings=str(embeddings)),
        projector=ProjectorConfig(hidden_dim=512, user_scale=0.5),
    )


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


def folders(run: Path) -> list[Path]:
    """A run and its other seeds."""
    return [run, *sorted((run / "seeds").glob("*"))]


def shown(results: dict[str, Any]) -> dict[str, Any]:
    """What of an audit the committed file keeps."""
    parts = ("config", "seeds", "metric", "arms", "comparisons", "verdict", "other_metrics", "leaks", "warnings",
             "samples", "playlists", "next_item", "texts", "data")  # fmt: skip
    training = {
        arm: {key: value for key, value in record.items() if key not in ("history", "provenance")}
        for arm, record in results["training"].items()
    }
    found = {name: results[name] for name in parts if results.get(name) is not None}
    return found | {"training": training, "provenance": results["provenance"]}
