"""Playlists on HetRec Last.fm 2k, LM objective: prepare, train, judge, over three seeds.

    python benchmarks/lastfm.py --data ../shared/data/lastfm_2k --backbone ../shared/backbone --work scratch/lastfm

Writes results/lastfm.json. Finished runs are not run again; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from seeds import placed, run_seeds, write_results

from e2p.config import ObjectiveConfig, RunConfig, TrainingConfig
from e2p.config_io import load_yaml
from e2p.tasks.music import prepare


def settings(tables: Path, backbone: str, output: Path) -> RunConfig:
    """The settings that the search on validation data chose."""
    return replace(
        placed(load_yaml(tables / "config.yaml"), tables, backbone),
        training=TrainingConfig(epochs=2, batch_size=32, learning_rate=1e-2, weight_decay=0.3),
        output=str(output),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/lastfm_2k")
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/lastfm", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", default="results/lastfm.json", type=Path)
    parser.add_argument("--position", default="before_completion", help="another place for the soft token")
    parser.add_argument("--arms", nargs="+", help="fewer arms than all")
    parser.add_argument("--tokens", default=1, type=int, help="soft tokens")
    parser.add_argument("--contrast", default=0.0, type=float, help="weight of the contrastive term")
    options = parser.parse_args()
    console = Console(stderr=True)
    tables = options.work / "tables"
    if not tables.exists():
        prepare(options.data, str(tables))
    config = settings(tables, options.backbone, options.work / "run")
    if options.position != config.projector.position:
        config = replace(config, projector=replace(config.projector, position=options.position))
        config = replace(config, output=f"{config.output}-{options.position.replace('_', '-')}")
    if options.tokens != 1:
        config = replace(config, projector=replace(config.projector, prefix_tokens=options.tokens))
        config = replace(config, output=f"{config.output}-{options.tokens}-tokens")
    if options.contrast:
        config = replace(config, objective=ObjectiveConfig(contrast=options.contrast))
        config = replace(config, output=f"{config.output}-contrast-{options.contrast:g}")
    if options.arms:
        config = replace(config, evaluation=replace(config.evaluation, arms=tuple(options.arms)))
    results = run_seeds(config, options.seeds, console)
    write_results(options.out, {"lastfm": results}, "Playlists of held-out artists, split by user; LM objective.")


if __name__ == "__main__":
    main()
