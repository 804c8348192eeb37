"""Next answers on Persona-Chat, with two kinds of user vectors: prepare, train, judge, over three seeds.

    python benchmarks/personachat.py --data ../shared/data/persona_chat/train_self_original_no_cands.txt \
        --backbone ../shared/backbone --work scratch/personachat

Writes results/personachat.json. Finished runs are not run again; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from seeds import placed, run_seeds, write_results

from e2p.config import RunConfig, TrainingConfig
from e2p.config_io import load_yaml
from e2p.tasks.personachat import prepare
from e2p.users.extract import embed


def settings(tables: Path, embeddings: Path, backbone: str, output: Path) -> RunConfig:
    """The settings that the search on validation data chose."""
    return replace(
        placed(load_yaml(tables / "config.yaml"), tables, backbone, embeddings),
        training=TrainingConfig(epochs=2, batch_size=32, learning_rate=1e-2, weight_decay=1.0),
        output=str(output),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/persona_chat/train_self_original_no_cands.txt")
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/personachat", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", default="results/personachat.json", type=Path)
    parser.add_argument("--tokens", default=1, type=int, help="soft tokens")
    parser.add_argument(
        "--vectors", nargs="+", choices=["minilm", "hidden states"], default=["minilm", "hidden states"]
    )
    parser.add_argument("--arms", nargs="+", help="fewer arms than all")
    options = parser.parse_args()
    console = Console(stderr=True)
    tables = options.work / "tables"
    if not tables.exists():
        prepare(options.data, str(tables), encoder="minilm")
    vectors = {"minilm": tables / "embeddings.parquet", "hidden states": options.work / "hidden_states.parquet"}
    if "hidden states" in options.vectors and not vectors["hidden states"].exists():
        embed(str(tables / "profiles.parquet"), options.backbone, str(vectors["hidden states"]), pooling="mean")
    # The static token sees no vectors, so the second experiment's is copied from the first.
    static_from = {"hidden states": str(options.work / "run-minilm")}
    experiments = {}
    for name in options.vectors:
        table = vectors[name]
        output = options.work / f"run-{name.replace(' ', '-')}"
        config = settings(tables, table, options.backbone, output)
        if options.tokens != 1:
            projector = replace(config.projector, prefix_tokens=options.tokens)
            config = replace(config, projector=projector, output=f"{config.output}-{options.tokens}-tokens")
        if options.arms:
            config = replace(config, evaluation=replace(config.evaluation, arms=tuple(options.arms)))
        copied = static_from.get(name) if "minilm" in experiments else None
        experiments[name] = run_seeds(config, options.seeds, console, static_from=copied)
    write_results(options.out, experiments, "Next answers of the second speaker, split by groups of twin personas.")


if __name__ == "__main__":
    main()
