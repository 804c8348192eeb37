"""Personal headlines on the slice of MIND: clicked against passed-over headlines, and ROUGE of written ones.

    python benchmarks/news.py --data ../shared/data/mind_slice --backbone ../shared/backbone --work scratch/news

Vectors of clicks and of headlines side by side, objectives lm and kto, three seeds each; writes results/news.json.
Finished runs are not run again; an interrupted one is resumed. With --only, some are trained and judged and nothing is
put together: two processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import polars as pl
from rich.console import Console
from seeds import folders, placed, shown

from e2p.config import (
    EvaluationConfig,
    ObjectiveConfig,
    ProjectorConfig,
    RunConfig,
    TextsConfig,
    TrainingConfig,
)
from e2p.config_io import load_yaml
from e2p.evaluation.audit import ABOUT, audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.provenance import provenance
from e2p.tasks.news import Objective, prepare
from e2p.training.run import train, with_seed

VECTORS = ("both",)
RUNS = [f"{vectors}-{objective}" for vectors in VECTORS for objective in get_args(Objective)[:2]]
ARMS = ("none", "prompt", "static", "random", "shuffled", "null", "e2p", "e2p+prompt")
# Half of a history is for the vector and half for examples; articles and users are dealt so that the test is large.
PREPARE: dict[str, Any] = {"history_share": 0.5, "shares": (0.5, 0.1, 0.4), "dimension": 32}
# lm: the best of seven that were tried on the validation articles; phi soon learns the training articles by heart. kto:
# the same, not tried.
BUDGETS = {
    "lm": TrainingConfig(epochs=12, batch_size=32, learning_rate=1e-2, weight_decay=1.0),
    "kto": TrainingConfig(epochs=4, batch_size=64, learning_rate=1e-2, weight_decay=1.0),
}


def settings(tables: Path, backbone: str, objective: Any, output: Path) -> RunConfig:
    """One run."""
    config = load_yaml(tables / "config.yaml")
    return replace(
        placed(config, tables, backbone),
        projector=ProjectorConfig(hidden_dim=512, user_scale=0.1),
        objective=ObjectiveConfig(name=objective),
        training=replace(BUDGETS[objective], tokens_per_pass=4096),
        evaluation=EvaluationConfig(
            arms=ARMS,
            max_new_tokens=32,
            attribute="category",
            headline="auc",
            texts=TextsConfig(generate=("greedy", "sampled")),
        ),
        output=str(output),
    )


def counted(tables: Path) -> dict[str, Any]:
    """What the tables hold, part by part."""
    examples = pl.read_parquet(tables / "examples.parquet")
    found = {}
    for part in ("train", "validation", "test"):
        rows = examples.filter(pl.col("split") == part)
        found[part] = {
            "clicked": dict(Counter(rows.filter("label")["source"].to_list())),
            "passed": rows.filter(~pl.col("label")).height,
            "users": rows["user_id"].n_unique(),
            "articles": rows["item_id"].n_unique(),
        }
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/mind_slice")
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/news", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", default="results/news.json", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, help="train and judge these alone")
    options = parser.parse_args()
    for name in options.only or RUNS:
        vectors, objective = name.split("-")
        tables, run = options.work / f"tables-{vectors}", options.work / name
        if not tables.exists():
            prepare(options.data, str(tables), vectors=vectors, **PREPARE)  # type: ignore[arg-type]
        config = settings(tables, options.backbone, objective, run)
        if not (run / "adapter").is_dir():
            train(config, resume=(run / "config.yaml").is_file())
        if sum((folder / ABOUT).is_file() for folder in folders(run)) < len(options.seeds):
            evaluate([str(run)], tuple(options.seeds))
        for folder in folders(run):
            own = load_yaml(folder / "config.yaml")
            if own != with_seed(config, own.training.seed, str(folder)):
                raise SystemExit(f"{folder}: was run with other settings; delete it and run again")
    if options.only:
        return
    scored = {name: [one for folder in folders(options.work / name) for one in load_scored(folder)] for name in RUNS}
    changed = [one.source for found in scored.values() for one in found if one.about["provenance"]["dirty"]]
    if changed:
        raise SystemExit(f"expected runs of commits without changes, got {', '.join(changed)}; run them again")
    content = {
        "about": "Clicked against passed-over headlines of a slice of MIND, and headlines written for its readers.",
        "provenance": provenance(),
        "commits": sorted({one.about["provenance"]["commit"] for found in scored.values() for one in found}),
        "prepare": PREPARE,
        "counts": {vectors: counted(options.work / f"tables-{vectors}") for vectors in VECTORS},
        "experiments": {name: shown(audit(found)) for name, found in scored.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, experiment in content["experiments"].items():
        Console(stderr=True).print(f"{name}: {experiment['verdict']}")


if __name__ == "__main__":
    main()
