"""`e2p demo`: a simulated streaming service, a small frozen model, one soft token per listener, honest controls."""

from __future__ import annotations

import time
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from e2p.config import BackboneConfig, DataConfig, ProjectorConfig, RunConfig, TrainingConfig
from e2p.config_evaluation import EvaluationConfig
from e2p.data.sources import cache_root
from e2p.data.tables import require_folder, write_frame
from e2p.errors import RunError
from e2p.evaluation.audit import write_results
from e2p.evaluation.judge import judge
from e2p.evaluation.metrics import per_example
from e2p.evaluation.report import console_tables, write_report
from e2p.model.e2p import E2PModel
from e2p.tasks.pretrain import PretrainConfig, pretrained_backbone
from e2p.tasks.simulate import SimulationConfig, World, simulate
from e2p.training.run import check_folder, train


def demo(output: str = "", seed: int = 42, overwrite: bool = False) -> None:
    """Simulate a streaming service, train a small backbone on its catalogue, then phi, and judge all arms.

    Needs no network. The backbone is cached, so a second demo is faster.

    Args:
        output: run folder; default is the first free one of runs/demo, runs/demo-2, ...
        seed: seed of the simulation and of the training.
        overwrite: replace a run folder that exists.
    """
    folder = Path(output) if output else _free(Path("runs/demo"))
    run_demo(folder, SimulationConfig(seed=seed), PretrainConfig(), _settings(seed), overwrite)


def run_demo(
    folder: Path,
    world_config: SimulationConfig,
    pretrain_config: PretrainConfig,
    settings: RunConfig,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The demo with any sizes; returns the results. Simulated tables go beside the run, to ``<folder>-data``."""
    console, started = Console(), time.monotonic()
    tables = _tables(folder)
    check_folder(_with_paths(settings, "", tables, folder), overwrite, resume=False)  # before tables are replaced
    held = sorted(entry.name for entry in tables.iterdir()) if tables.is_dir() else []
    if tables.exists() and (not overwrite or set(held) - {"examples.parquet", "embeddings.parquet"}):
        raise RunError(f"{tables}: expected no such folder, since the demo's tables go there; name another --output")
    require_folder(tables)
    console.rule("[bold]1  a streaming service with known tastes")
    world = simulate(world_config)
    write_frame(tables / "examples.parquet", world.examples)
    write_frame(tables / "embeddings.parquet", world.embeddings)
    console.print(
        f"{world.tastes.shape[0]:,} listeners, {len(world.artists)} artists, {world.logs.height:,} log lines over "
        f"{world_config.weeks} weeks; {len(world.examples):,} requests; vectors of {world_config.dimension} numbers "
        "learned from the logs, one a week"
    )
    console.rule("[bold]2  a small language model reads the catalogue, then it is frozen")
    backbone = pretrained_backbone(world, cache_root(settings.data.cache_dir) / "demo", config=pretrain_config)
    console.rule("[bold]3  phi learns: vector -> one soft token")
    config = _with_paths(settings, str(backbone), tables, folder)
    train(config, overwrite=overwrite)
    console.rule("[bold]4  controls, and every arm on listeners never seen")
    results = judge(folder, Console(stderr=True))
    results["extra"] |= reached_share(world, pl.read_parquet(folder / "scores.parquet"))
    results["samples"] = _three_listeners(world, E2PModel.from_pretrained(folder / "adapter"), folder)
    write_results(folder, results)
    write_report(folder)
    _show(console, results)
    console.print(f"report: {folder / 'report.html'}   took {time.monotonic() - started:.0f} s")
    return results


def reached_share(world: World, scores: pl.DataFrame) -> dict[str, str]:
    """How much of the gain that knowing the tastes could bring has been reached on the test examples.

    The simulator knows the probability of each playlist given the true tastes, and its mean over listeners drawn
    anew: their difference is the most that personalisation can win. E2P's win is over the static token, which has
    learned all that does not depend on the listener.
    """
    wide = per_example(scores, "nll")
    if not {"static", "e2p"} <= set(wide.columns):
        return {}
    truth = world.examples.select("example_id").with_columns(
        oracle=pl.Series(world.oracle_nll), popular=pl.Series(world.popular_nll)
    )
    joined = wide.join(truth, on="example_id")
    possible = float((joined["popular"] - joined["oracle"]).mean())  # type: ignore[arg-type]
    won = float((joined["static"] - joined["e2p"]).mean())  # type: ignore[arg-type]
    return {
        "possible gain (simulator's own likelihood)": f"{possible:.2f} nats per playlist",
        "gain of E2P over a static token": f"{won:.2f} nats per playlist, {won / possible:.0%} of what is possible",
    }


def _settings(seed: int) -> RunConfig:
    return RunConfig(
        data=DataConfig(max_completion_tokens=64),
        # This backbone has only ever met a listener at the start of a conversation, so the soft token goes there.
        projector=ProjectorConfig(hidden_dim=64, position="after_bos", user_scale=0.5),
        training=TrainingConfig(epochs=3, batch_size=32, learning_rate=1e-2, seed=seed, evals_per_epoch=1),
        evaluation=EvaluationConfig(max_new_tokens=40),
    )


def _with_paths(settings: RunConfig, backbone: str, tables: Path, folder: Path) -> RunConfig:
    from dataclasses import replace

    data = replace(
        settings.data, examples=str(tables / "examples.parquet"), embeddings=str(tables / "embeddings.parquet")
    )
    return replace(settings, backbone=BackboneConfig(model=backbone), data=data, output=str(folder))


def _three_listeners(world: World, model: E2PModel, folder: Path) -> list[dict[str, Any]]:
    """One request answered for the three test listeners whose tastes differ most (of 12 candidates)."""
    test = pl.read_parquet(folder / "scores.parquet")["user_id"].unique(maintain_order=True).head(12).to_list()
    users = world.examples["user_id"].unique(maintain_order=True).to_list()
    tastes = {user: world.tastes[users.index(user)] for user in test}
    chosen = max(
        combinations(test, min(3, len(test))),
        key=lambda trio: min(
            (float(np.linalg.norm(tastes[a] - tastes[b])) for a, b in combinations(trio, 2)), default=0.0
        ),
    )
    newest = world.embeddings.sort("timestamp").group_by("user_id").last()
    vectors = [newest.filter(pl.col("user_id") == user)["embedding"].to_numpy()[0] for user in chosen]
    prompt = world.examples["messages"][0].to_list()
    plain = model.generate([prompt], use_prefix=False, max_new_tokens=40, do_sample=False)[0]
    personal = model.generate([prompt] * len(chosen), vectors, max_new_tokens=40, do_sample=False)
    truth = dict(world.examples.select("user_id", "true_profile").iter_rows())
    answers = [{"user_id": "", "profile": None, "arm": "none", "text": plain}] + [
        {"user_id": user, "profile": truth[user], "arm": "e2p", "text": text}
        for user, text in zip(chosen, personal, strict=True)
    ]
    return [{"prompt": prompt[-1]["content"], "answers": answers}]


def _show(console: Console, results: dict[str, Any]) -> None:
    for table in console_tables(results):
        console.print(table)
    for sample in results["samples"]:
        shown = Table("listener", "true tastes (hidden from the model)", "answer", show_lines=True)
        shown.title = f"the same request: {sample['prompt']}"
        for answer in sample["answers"]:
            shown.add_row(answer["user_id"] or "no prefix", answer["profile"] or "", answer["text"])
        console.print(shown)
    for name, text in results["extra"].items():
        console.print(f"{name}: [bold]{text}")
    console.print(results["verdict"])


def _free(wanted: Path) -> Path:
    others = (wanted.with_name(f"{wanted.name}-{n}") for n in count(2))
    return next(path for path in chain([wanted], others) if not path.exists() and not _tables(path).exists())


def _tables(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-data")
