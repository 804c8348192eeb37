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

import polars as pl
from rich.console import Console
from seeds import folders, placed, shown

from e2p.config import EvaluationConfig, ObjectiveConfig, RunConfig, TrainingConfig
from e2p.config_io import load_yaml
from e2p.evaluation.audit import ANSWERS, Scored, audit, load_scored
from e2p.evaluation.evaluate import evaluate
from e2p.evaluation.generated import open_judges
from e2p.evaluation.playlists import METRICS, judge_playlists
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import text_encoder
from e2p.provenance import provenance
from e2p.tasks.music import prepare
from e2p.training.inputs import load_inputs
from e2p.training.run import train, with_seed

# What does not depend on the objective is judged once.
ARMS = {
    "kto": ("none", "random", "e2p", "rerank"),
    "lm": ("static", "shuffled", "random", "e2p"),
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


LIKELIHOODS = ["nll", "tokens", "bytes", "context_tokens", "auc"]


def settings(tables: Path, backbone: str, objective: str, output: Path) -> RunConfig:
    """One objective's run."""
    config = load_yaml(tables / "config.yaml")
    chosen, budget = OBJECTIVES[objective]
    at = {name: str(tables / Path(getattr(config.evaluation.playlists, name)).name)
          for name in ("items", "queries", "plays", "known")}  # fmt: skip
    return replace(
        placed(config, tables, backbone),
        objective=chosen,
        training=replace(budget, tokens_per_pass=2048),
        evaluation=EvaluationConfig(
            arms=ARMS[objective], max_new_tokens=32, playlists=replace(config.evaluation.playlists, **at)
        ),
        output=str(output),
    )


def judged_again(run: Path) -> list[Scored]:
    """A run's seeds with their playlists judged by this commit, from the answers that were kept."""
    config = load_yaml(run / "config.yaml")
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    encoder = text_encoder(backbone, config.data, config.projector.prefix_tokens)
    inputs = load_inputs(config.data, encoder, config.projector.position)
    shelf = open_judges(config, inputs, backbone).playlists
    assert shelf is not None
    found = []
    for folder in folders(run):
        (one,) = load_scored(folder)
        scores, about = judge_playlists(pl.read_parquet(folder / ANSWERS), shelf, inputs)
        others = one.scores.filter(pl.col("metric").is_in(LIKELIHOODS))
        again = dict(one.about) | {"playlists": about, "headline": METRICS[0]}
        found.append(replace(one, scores=pl.concat([others, scores.select(others.columns)]), about=again))
    return found


def together(runs: dict[str, list[Scored]]) -> list[Scored]:
    """The scores of the kto run with the other objectives' own users beside them, seed by seed.

    The static and the shuffled control are lm's: labels that are balanced text by text teach nothing to what knows no
    user, or the wrong one.
    """
    by_seed = {name: {one.seed: one for one in scored} for name, scored in runs.items()}
    found = []
    for seed, one in by_seed["kto"].items():
        parts = [one.scores]
        for name in ("lm", "engagement"):
            own = by_seed[name][seed].scores.filter(pl.col("arm").is_in(["e2p", "static", "shuffled"]))
            parts.append(own.with_columns(arm=pl.col("arm").replace({"e2p": f"e2p {name}"})))
        found.append(Scored("music", pl.concat(parts), seed, one.covariates, one.about))
    return found


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
        if sum((folder / ANSWERS).is_file() for folder in folders(runs[name])) < len(options.seeds):
            evaluate([str(runs[name])], tuple(options.seeds))
    if options.only:
        return
    for name, run in runs.items():
        for folder in folders(run):
            own, wanted = load_yaml(folder / "config.yaml"), settings(tables, options.backbone, name, folder)
            if own != with_seed(wanted, own.training.seed, str(folder)):
                raise SystemExit(f"{folder}: was run with other settings; delete it and run again")
    scored = {name: judged_again(run) for name, run in runs.items()}
    changed = [one.source for found in scored.values() for one in found if one.about["provenance"]["dirty"]]
    if changed:
        raise SystemExit(f"expected runs of commits without changes, got {', '.join(changed)}; run them again")
    content = {
        "about": "Playlists by request; engaged: held-out plays; not engaged: another listener's; split by listener.",
        "provenance": provenance(),
        "commits": sorted({one.about["provenance"]["commit"] for found in scored.values() for one in found}),
        "together": shown(audit(together(scored))),
        "experiments": {name: shown(audit(found)) for name, found in scored.items()},
        "readings": {
            name: {one.seed: one.about["playlists"]["readings"] for one in found} for name, found in scored.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(f"{options.out}: {content['together']['verdict']}")


if __name__ == "__main__":
    main()
