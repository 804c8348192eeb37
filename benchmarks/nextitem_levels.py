"""Where a soft token's likelihood comes from: the next item's nats code by code, and the mass on the sure ones.

    python benchmarks/nextitem_levels.py beauty

Reads a run of benchmarks/nextitem.py, scores validation queries, and writes results/nextitem_levels_<name>.json. The
hit rate is the expected one of independent draws, E[1 - (1 - p)^30], p being the probability of the true item's codes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from e2p.config_io import load_yaml
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.provenance import provenance
from e2p.training.inputs import deal, load_inputs
from e2p.training.run import arm_folder
from e2p.training.scoring import score_batches

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["beauty", "movielens", "industrial"])
    parser.add_argument("--work", default="scratch/nextitem", type=Path)
    parser.add_argument("--most", default=6000, type=int, help="validation queries")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = options.work / options.name / "run"
    config = load_yaml(run / "config.yaml")
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    e2p = E2PModel.from_pretrained(run / "adapter", backbone)
    static = E2PModel.from_pretrained(arm_folder(run, "static") / "adapter", backbone)
    inputs = load_inputs(config.data, e2p.encoder, config.projector.position)
    rows = np.random.default_rng(0).permutation(inputs.rows("validation"))[: options.most]
    rows = np.sort(rows)
    found = {}
    for arm, model, prefix, vectors in (
        ("none", e2p, False, None),
        ("static", static, True, None),
        ("random", e2p, True, deal(inputs, rows, [config.evaluation.seed, 3])),
        ("e2p", e2p, True, None),
    ):
        examples = inputs.examples("validation", rows=rows, vector_rows=vectors)
        nats = {}
        for batch, logprobs in score_batches(model, examples, config.training.tokens_per_pass, prefix):
            parts = logprobs.double().cpu().split(batch.completion_lengths.tolist())
            nats |= {int(row): -part.numpy() for row, part in zip(batch.index, parts, strict=True)}
        table = np.array([nats[int(row)] for row in rows])
        item = table[:, :-1].sum(1)  # without the end token
        found[arm] = {
            "nats_by_code": table.mean(0).tolist(),
            "nats_of_an_item": {str(q): float(np.quantile(item, q)) for q in QUANTILES} | {"mean": float(item.mean())},
            "expected_hit_rate@30": float((1 - (1 - np.exp(-item)) ** 30).mean()),
        }
    made = provenance()
    if made["dirty"]:
        raise SystemExit("expected a commit without changes; commit them and run again")
    content = {"about": __doc__.split("\n")[0], "provenance": made, "queries": len(rows), "arms": found}
    out = options.out or Path("results") / f"nextitem_levels_{options.name}.json"
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
