"""The next item by semantic ids: MovieLens by time, Amazon Beauty leave-one-out, Amazon Industrial with ready codes.

    python benchmarks/nextitem.py beauty --data ../shared/data/amazon_beauty_sequences

Prepares the tables, adapts the backbone to the codes, trains phi in front of it with three seeds, judges all arms, and
writes results/nextitem_<name>.json. Finished steps are not run again; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from seeds import folders, placed, shown

from e2p.config import EvaluationConfig, ObjectiveConfig, ProjectorConfig, RunConfig, TrainingConfig
from e2p.config_io import load_yaml
from e2p.evaluation.audit import ABOUT, audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.items.adapt import adapt
from e2p.items.vocabulary import ADAPTED
from e2p.provenance import provenance
from e2p.tasks.nextitem import prepare
from e2p.training.run import train, with_seed

ARMS = ("none", "prompt", "static", "random", "shuffled", "e2p", "e2p+prompt", "retrieval", "popularity")


class Plan(NamedTuple):
    """What is done with a data set. phi's settings are those that were best on other tasks, but for
    Industrial's, which were tried on its validation examples."""

    prepare: dict[str, Any]
    adapt: dict[str, Any]
    training: TrainingConfig
    projector: ProjectorConfig
    about: str
    objective: ObjectiveConfig = ObjectiveConfig()


PHI = ProjectorConfig(hidden_dim=512, user_scale=0.5)
PLANS = {
    "beauty": Plan(
        {"dimension": 128, "window": 20, "most_test_users": 3000},
        {"epochs": 8, "batch_size": 32, "learning_rate": 2e-3},
        TrainingConfig(epochs=2, batch_size=32, learning_rate=5e-3, weight_decay=0.1),
        PHI,
        "Amazon Beauty 5-core, leave-one-out; codes and vectors of the interactions before phi's.",
    ),
    "movielens": Plan(
        {"window": 10, "stride": 5, "most_per_user": 100, "most_tested_per_user": 15},
        {"epochs": 5, "batch_size": 32, "learning_rate": 2e-3},
        TrainingConfig(epochs=3, batch_size=32, learning_rate=5e-3, weight_decay=0.1),
        PHI,
        "MovieLens small by time: the backbone learns codes first, phi from what came next, test last.",
    ),
    "industrial": Plan(
        {"dimension": 64, "window": 10},
        {"epochs": 20, "batch_size": 32, "learning_rate": 2e-3},
        TrainingConfig(epochs=4, batch_size=32, learning_rate=5e-3, weight_decay=1.0, profile_share=0.5),
        ProjectorConfig(hidden_dim=512, form="static+user", user_scale=0.03),
        "Amazon Industrial & Scientific with MiniOneRec's codes and parts; phi is trained for what HitRate rewards.",
        ObjectiveConfig(name="hits"),
    ),
}
# What the objective brings: everything else alike.
PLANS["industrial_lm"] = PLANS["industrial"]._replace(
    about="The same, but phi is trained for likelihood.", objective=ObjectiveConfig()
)


def settings(plan: Plan, tables: Path, backbone: Path, output: Path) -> RunConfig:
    """The run of a data set."""
    config = load_yaml(tables / "config.yaml")
    at = {name: str(tables / Path(getattr(config.evaluation.next_item, name)).name)
          for name in ("items", "codes", "interactions")}  # fmt: skip
    return replace(
        placed(config, tables, str(backbone)),
        projector=plan.projector,
        objective=plan.objective,
        training=replace(plan.training, tokens_per_pass=4096),
        evaluation=EvaluationConfig(arms=ARMS, samples=2, next_item=replace(config.evaluation.next_item, **at)),
        output=str(output),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(PLANS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/nextitem", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plan, work = PLANS[options.name], options.work / options.name
    tables, adapted, run = work / "tables", work / "backbone", work / "run"
    work.mkdir(parents=True, exist_ok=True)
    kept, made = work / "plan.json", json.dumps([plan.prepare, plan.adapt], indent=1)
    if kept.exists() and kept.read_text(encoding="utf-8") != made:
        raise SystemExit(f"{work}: was made by another plan; delete it and run again")
    kept.write_text(made, encoding="utf-8")
    if not tables.exists():
        prepare(options.data, str(tables), **plan.prepare)
    if not (adapted / ADAPTED).is_file():
        adapt(
            options.backbone,
            str(tables / "codes"),
            str(tables / "adapt.parquet"),
            str(adapted),
            profile_template="persona: {profile}",
            resume=(adapted / ".settings.json").is_file(),
            **plan.adapt,
        )
    config = settings(plan, tables, adapted, run)
    if not (run / "adapter").is_dir():
        train(config, resume=(run / "config.yaml").is_file())
    if sum((folder / ABOUT).is_file() for folder in folders(run)) < len(options.seeds):
        evaluate([str(run)], tuple(options.seeds))
    for folder in folders(run):
        own = load_yaml(folder / "config.yaml")
        if own != with_seed(config, own.training.seed, str(folder)):
            raise SystemExit(f"{folder}: was run with other settings; delete it and run again")
    scored = [one for folder in folders(run) for one in load_scored(folder)]
    changed = [one.source for one in scored if one.about["provenance"]["dirty"]]
    if changed:
        raise SystemExit(f"expected runs of commits without changes, got {', '.join(changed)}; run them again")
    results = audit(scored)
    content = {
        "about": plan.about,
        "provenance": provenance(),
        "commits": sorted({one.about["provenance"]["commit"] for one in scored}),
        "prepare": plan.prepare,
        "adapt": {
            key: value
            for key, value in json.loads((adapted / ADAPTED).read_text(encoding="utf-8")).items()
            if key not in ("history", "provenance")
        },
        "results": shown(results),
    }
    out = options.out or Path("results") / f"nextitem_{options.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(f"{out}: {results['verdict']}")


if __name__ == "__main__":
    main()
