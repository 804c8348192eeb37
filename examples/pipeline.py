"""The whole pipeline in one script: two tables in, a judged adapter and a personal answer out.

    python examples/pipeline.py ../shared/backbone runs/pipeline

The first argument is any causal language model of transformers, by folder or hub id. Your own two tables go where the
simulated service's are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from e2p import E2PModel
from e2p.config import BackboneConfig, DataConfig, ProjectorConfig, RunConfig, TrainingConfig
from e2p.data.tables import write_frame
from e2p.evaluation.judge import judge
from e2p.evaluation.report import report
from e2p.tasks.simulate import SimulationConfig, simulate
from e2p.training.run import train


def main(backbone: str, output: str, users: int = 400, epochs: int = 2) -> str:
    """Run it; returns the personal answer."""
    # 1. Tables. Who was asked what and answered how, and a vector a user, one for each week: an example gets the newest
    #    one at or before its own time.
    tables = Path(f"{output}-tables")
    world = simulate(SimulationConfig(users=users, dimension=32))
    write_frame(tables / "examples.parquet", world.examples)
    write_frame(tables / "embeddings.parquet", world.embeddings)

    # 2. Training. The language model is frozen; phi alone learns, by the likelihood of the completions.
    config = RunConfig(
        backbone=BackboneConfig(model=backbone),
        data=DataConfig(examples=str(tables / "examples.parquet"), embeddings=str(tables / "embeddings.parquet")),
        projector=ProjectorConfig(hidden_dim=64, user_scale=0.5),
        training=TrainingConfig(epochs=epochs, batch_size=32, learning_rate=1e-2),
        output=output,
    )
    train(config)

    # 3. The honest part: the controls are trained with the same budget, and all arms judged on users never seen.
    results = judge(output)
    report(output)
    for comparison in results["comparisons"][:2]:
        print(f"{comparison['name']}: {comparison['difference']:+.3f} nats per token, p {comparison['p_holm']:.3g}")

    # 4. An answer. Tomorrow's vector changes it without any training.
    model = E2PModel.from_pretrained(f"{output}/adapter")
    newest = pl.read_parquet(tables / "embeddings.parquet").sort("timestamp").group_by("user_id").last().sort("user_id")
    (answer,) = model.generate("play some synthwave", [newest["embedding"][0]], max_new_tokens=40)
    print(f"{newest['user_id'][0]}: {answer}")
    return answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
