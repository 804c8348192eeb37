"""Playlists with yes/no engagement on HetRec Last.fm 2k: lm, kto and the paper's Eq. 5 beside their controls.

    python benchmarks/music.py --data ../shared/data/lastfm_2k --backbone ../shared/backbone --work scratch/music

Writes results/music.json. Finished runs are not run again; an interrupted one is resumed. With --only, some of the
objectives are trained and judged and nothing is put together: two processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from e2p.config import BackboneConfig, EvaluationConfig, ObjectiveConfig, ProjectorConfig, RunConfig, TrainingConfig
from e2p.config_io import load_yaml
from e2p.evaluation.audit import Scored, audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.provenance import provenance
from e2p.tasks.music import prepare
from e2p.training.run import train

# What does not depend on the objective is judged once.
ARMS = {
    "kto": ("none", "random", "shuffled", "e2p", "rerank"),
    "lm": ("static", "random", "e2p"),
    "engagement": ("random", "e2p"),
}
# The best of a few that were tried on the validation listeners (docs/findings.md).
OBJECTIVES = {
    "lm": (ObjectiveConfig(), TrainingConfig(epochs=2, batch_size=32, learning_rate=1e-2, weight_decay=0.3)),
    "kto": (
        ObjectiveConfig(name="kto"),
        TrainingConfig(epochs=1, batch_size=64, learning_rate=1e-2, weight_decay=0.1),
    ),
    "engagement": (
        ObjectiveConfig(name="engagement", per_token=True),
        TrainingConfig(epochs=1, batch_size=32, learning_rate=1e-2, weight_decay=0.1),
    ),
}


def settings(tables: Path, backbone: str, objective: str, output: Path) -> RunConfig:
    """One objective's run; paths are relative, so that the committed results name no folder of the machine."""
    config = load_yaml(tables / "config.yaml")
    chosen, budget = OBJECTIVES[objective]
    at = {name: str(tables / Path(getattr(config.evaluation.playlists, name)).name)
          for name in ("items", "queries", "plays", "known")}  # fmt: skip
    return replace(
        config,
        # On a CPU the plain attention of short sequences is faster than the fused one, above all backwards.
        backbone=BackboneConfig(model=backbone, attn="eager"),
        data=replace(
            config.data,
            examples=str(tables / "examples.parquet"),
            embeddings=str(tables / "embeddings.parquet"),
        ),
        projector=ProjectorConfig(hidden_dim=512, user_scale=0.5),
        objective=chosen,
        training=replace(budget, tokens_per_pass=2048),
        evaluation=EvaluationConfig(
            arms=ARMS[objective], max_new_tokens=32, playlists=replace(config.evaluation.playlists, **at)
        ),
        output=str(output),
    )


def together(runs: dict[str, Path]) -> list[Scored]:
    """The scores of the kto run with the other objectives' own users beside them, seed by seed."""
    scored = {name: {one.seed: one for path in seeds(run) for one in load_scored(path)} for name, run in runs.items()}
    found = []
    for seed, one in scored["kto"].items():
        parts = [one.scores]
        for name in ("lm", "engagement"):
            own = scored[name][seed].scores.filter(pl.col("arm").is_in(["e2p", "static"]))
            parts.append(own.with_columns(arm=pl.col("arm") + f" {name}"))
        found.append(Scored("music", pl.concat(parts), seed, one.covariates, one.about))
    return found


def seeds(run: Path) -> list[Path]:
    """A run and its other seeds."""
    return [run, *sorted((run / "seeds").glob("*"))]


def shown(results: dict[str, Any]) -> dict[str, Any]:
    """What of an audit the committed file keeps."""
    parts = ("seeds", "metric", "arms", "comparisons", "verdict", "other_metrics", "leaks", "warnings", "samples",
             "playlists", "data")  # fmt: skip
    training = {
        arm: {key: value for key, value in record.items() if key not in ("history", "provenance")}
        for arm, record in results["training"].items()
    }
    return {name: results[name] for name in parts} | {"training": training, "provenance": results["provenance"]}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/lastfm_2k")
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/music", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", default="results/music.json", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), help="train and judge these alone")
    options = parser.parse_args()
    tables = options.work / "tables"
    if not tables.exists():
        prepare(options.data, str(tables), "kto", per_user=6)
    runs = {name: options.work / name for name in ARMS}
    for name in options.only or ARMS:
        config = settings(tables, options.backbone, name, runs[name])
        if not (runs[name] / "adapter").is_dir():
            train(config, resume=(runs[name] / "config.yaml").is_file())
        evaluate([str(runs[name])], tuple(options.seeds))
    if options.only:
        return
    scored = together(runs)
    made = {(one.about["provenance"]["commit"], one.about["provenance"]["dirty"]) for one in scored}
    if len(made) > 1 or any(dirty for _, dirty in made):
        raise SystemExit(f"expected runs of one commit without changes, got {made}; delete the older and run again")
    content = {
        "about": "Playlists by request; engaged: held-out plays; not engaged: another listener's; split by listener.",
        "provenance": provenance(),
        "together": shown(audit(scored)),
        "experiments": {
            name: shown(json.loads((run / "results.json").read_text(encoding="utf-8"))) for name, run in runs.items()
        },
        "playlists": {
            name: [one.about["playlists"] for path in seeds(run) for one in load_scored(path)]
            for name, run in runs.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(f"{options.out}: {content['together']['verdict']}")


if __name__ == "__main__":
    main()
