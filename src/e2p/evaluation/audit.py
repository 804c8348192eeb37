"""`e2p evaluate`: a trained run, its controls and the bare backbone on the same test examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e2p.config import RunConfig, load_yaml, to_dict
from e2p.data.sources import cache_root
from e2p.data.tables import example_batches, write_frame
from e2p.data.templates import Prompt
from e2p.data.tokenised import TokenisedExamples, tokenise
from e2p.errors import DataError, E2PError, RunError
from e2p.evaluation.arms import build_arms, score_arm, without_prompt_arms
from e2p.evaluation.metrics import per_example, summarise
from e2p.evaluation.report import console_tables, write_report
from e2p.evaluation.significance import compare, require_tests, verdict
from e2p.model.adapter import CONFIG
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.provenance import provenance
from e2p.training.inputs import RunInputs, load_inputs
from e2p.training.run import arm_folder, check_inputs, is_useless, train_arm, warn_useless


def evaluate(run: str) -> None:
    """Judge a run: train the controls that are missing, score all arms, test the differences, write the report.

    Args:
        run: run folder that `e2p train` has written.
    """
    console = Console(stderr=True)
    results = judge(run, console)
    write_report(Path(run))
    out = Console()
    for table in console_tables(results):
        out.print(table)
    out.print(results["verdict"])
    out.print(f"report: {Path(run) / 'report.html'}")


def judge(run: str | Path, console: Console | None = None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Score all arms of a run on its test examples; writes ``scores.parquet`` and ``results.json``.

    Args:
        run: run folder with ``config.yaml`` and ``adapter/``.
        console: where progress is shown; None: nowhere.
        extra: texts that go into the report as they are.

    Raises:
        RunError: the folder holds no finished training.
        DataError: the embedding table's version is not the one trained with.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file() or not (folder / "adapter" / CONFIG).is_file():
        raise RunError(f"{folder}: expected a run with config.yaml and adapter/, found none; run e2p train first")
    config = load_yaml(folder / "config.yaml")
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    e2p = E2PModel.from_pretrained(folder / "adapter", backbone)
    inputs = load_inputs(config.data, e2p.encoder, e2p.projector.config.position)
    if inputs.embeddings.versions != e2p.embedding_versions:
        trained, here = (", ".join(v) or "(not named)" for v in (e2p.embedding_versions, inputs.embeddings.versions))
        raise DataError(
            f"{config.data.embeddings}: expected vectors of version {trained}, which the adapter was trained with, "
            f"got {here}"
        )
    if inputs.embeddings.dim != e2p.projector.embedding_dim:
        raise DataError(
            f"{config.data.embeddings}: expected vectors of {e2p.projector.embedding_dim} numbers, got "
            f"{inputs.embeddings.dim}; name the table that the adapter was trained with"
        )
    check_inputs(folder, "e2p", inputs)
    require_tests(inputs.keys["user_id"].to_numpy()[inputs.rows("test")])  # before controls are trained
    names, profiled, warnings = _possible_arms(config, e2p, inputs)
    models = {"e2p": e2p}
    for arm in ("static", "shuffled"):
        if arm in names:
            models[arm] = _control(config, backbone, inputs, arm, folder, console)
    arms = build_arms(names, models, inputs, profiled, config.evaluation.seed, config.training.seed)
    with _bars(console) as bars:
        scores = pl.concat([score_arm(arm, inputs, config.training.tokens_per_pass, bars) for arm in arms])
    write_frame(folder / "scores.parquet", scores)
    training = {arm: _training_record(folder, arm) for arm in models}
    judged = training["e2p"]["validation"]
    if is_useless(judged):
        warnings.append("On validation data the prefix is worse than no prefix. Do not serve this adapter.")
        if console:
            warn_useless(console, judged)
    comparisons = compare(per_example(scores), config.evaluation.resamples, config.evaluation.seed)
    results = {
        "format": 1,
        "run": folder.name,
        "task": Path(config.data.examples).parent.name,
        "provenance": provenance(),
        "seed": config.training.seed,
        "config": to_dict(config),
        "data": dict(inputs.counts),
        "arms": summarise(scores, config.evaluation.resamples, config.evaluation.seed),
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
        "verdict": verdict(comparisons),
        "training": training,
        "samples": [],
        "extra": dict(extra or {}),
        "warnings": warnings,
    }
    write_results(folder, results)
    try:
        results["samples"] = _samples(config, e2p, inputs)
    except E2PError as error:  # an illustration must not cost what has been judged
        warnings.append(f"No sample answers: {error}")
    write_results(folder, results)
    return results


def _possible_arms(
    config: RunConfig, e2p: E2PModel, inputs: RunInputs
) -> tuple[tuple[str, ...], TokenisedExamples | None, list[str]]:
    """The arms asked for that these tables and this adapter allow, examples with profiles, and what is left out why."""
    names, warnings = config.evaluation.arms, []
    if "null" in names and not e2p.projector.config.null_prob and not inputs.counts["null_user_without_vector"]:
        names = tuple(name for name in names if name != "null")
        warnings.append("The arm null is left out: with projector.null_prob 0 the null user has not been trained.")
    profiled, why = None, ""
    if names != without_prompt_arms(names):
        if _has_profiles(config.data.examples):
            try:
                cache = cache_root(config.data.cache_dir)
                profiled = tokenise(config.data.examples, e2p.encoder, cache, with_profile=True)
            except DataError as error:
                why = str(error)
        else:
            why = "not every example has a profile text"
    if why:
        names = without_prompt_arms(names)
        warnings.append(f"The arms prompt and e2p+prompt are left out: {why}.")
    if profiled is not None:
        test = inputs.rows("test")
        cut = int((profiled.column("cut_prompt")[test] > inputs.tokens.column("cut_prompt")[test]).sum())
        if cut:
            warnings.append(
                f"In the arms with a profile text, {cut:,} of {len(test):,} prompts lost older turns to make room "
                "for it (data.max_prompt_tokens)."
            )
    return names, profiled, warnings


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json`` in one step."""
    half = folder / ".results.json"
    try:
        half.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        half.replace(folder / "results.json")
    except OSError as error:
        raise RunError(f"{folder / 'results.json'}: cannot be written: {error}; make room") from None


def _control(
    config: RunConfig, backbone: FrozenBackbone, inputs: RunInputs, arm: str, folder: Path, console: Console | None
) -> E2PModel:
    if (arm_folder(folder, arm) / "adapter" / CONFIG).is_file():
        check_inputs(folder, arm, inputs)
        return E2PModel.from_pretrained(arm_folder(folder, arm) / "adapter", backbone)
    return train_arm(config, backbone, inputs, arm, folder, console, resume=True)[0]  # an interrupted one goes on


def _training_record(folder: Path, arm: str) -> dict[str, Any]:
    path = arm_folder(folder, arm) / "training.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected the record of a training, got: {error}; train again") from None


def _has_profiles(source: str) -> bool:
    return all(
        frame["profile"].null_count() == 0 and (frame["profile"] != "").all() for frame in example_batches(source)
    )


def _samples(config: RunConfig, model: E2PModel, inputs: RunInputs) -> list[dict[str, Any]]:
    """The first test example's prompt, answered by the bare backbone and for a few test users."""
    rows = inputs.rows("test")
    random = np.random.default_rng([config.evaluation.seed, 4])
    users = inputs.keys["user_id"].to_numpy()
    _, firsts = np.unique(users[rows], return_index=True)
    count = min(config.evaluation.samples, len(firsts))
    if not count:
        return []
    chosen = rows[np.sort(random.choice(firsts, count, replace=False))]
    wanted = _texts(config.data.examples, {int(row) for row in (rows[0], *chosen)})
    first = wanted[int(rows[0])]
    prompt = first["messages"] or first["prompt"]
    which = inputs.vector_rows[chosen]
    vectors = [inputs.embeddings.vectors[row] if row >= 0 else None for row in which]
    length = _room(config, model, prompt)
    plain = model.generate([prompt], use_prefix=False, max_new_tokens=length, do_sample=False)[0]
    personal = model.generate([prompt] * count, vectors, max_new_tokens=length, do_sample=False)
    answers = [{"user_id": "", "profile": None, "arm": "none", "text": plain}] + [
        {"user_id": str(users[row]), "profile": wanted[int(row)]["profile"], "arm": "e2p", "text": text}
        for row, text in zip(chosen, personal, strict=True)
    ]
    shown = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return [{"prompt": shown, "answers": answers}]


def _room(config: RunConfig, model: E2PModel, prompt: Prompt) -> int:
    """New tokens that are asked for, or that still fit in the backbone's window."""
    asked, window = config.evaluation.max_new_tokens, model.backbone.window
    taken = len(model.encoder.prompt(prompt).ids) + model.projector.config.prefix_tokens
    return asked if window is None else max(1, min(asked, window - taken))


def _texts(source: str, rows: set[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for frame in example_batches(source):
        for row in frame.filter(pl.col("row").is_in(list(rows))).iter_rows(named=True):
            found[row["row"]] = row
        if len(found) == len(rows):
            break
    return found


def _bars(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )
