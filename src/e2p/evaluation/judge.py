"""A run's arms scored on its test examples: the part of the audit that needs the model. Trains what is missing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e2p.config import RunConfig
from e2p.config_evaluation import ARMS
from e2p.config_io import from_dict, load_yaml, save_yaml, to_dict
from e2p.data.sources import cache_root
from e2p.data.tables import content_key, example_batches, write_frame
from e2p.data.tokenised import TokenisedExamples, tokenise
from e2p.errors import ConfigError, DataError, E2PError, RunError
from e2p.evaluation.arms import build_arms, score_arm, without_prompt_arms
from e2p.evaluation.audit import (
    ABOUT,
    COVARIATES,
    FORMAT,
    JUDGED_WITH,
    SCORES,
    audit,
    flat,
    load_scored,
    read_about,
    write_json,
    write_results,
)
from e2p.evaluation.breakdowns import covariates
from e2p.evaluation.generated import WITHOUT_MODEL, Judges, judge_generated, open_judges
from e2p.evaluation.leaks import check_leaks
from e2p.evaluation.samples import samples
from e2p.evaluation.significance import require_tests
from e2p.evaluation.space import describe_prefix, describe_space, known_attribute
from e2p.items.vocabulary import ADAPTED
from e2p.model.adapter import CONFIG
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import provenance
from e2p.training.inputs import RunInputs, load_inputs
from e2p.training.run import (
    arm_folder,
    check_inputs,
    is_useless,
    prepare_folder,
    train_arm,
    warn_useless,
    with_seed,
)


def judge(
    run: str | Path,
    console: Console | None = None,
    extra: Mapping[str, Any] | None = None,
    allow_leaks: bool = False,
) -> dict[str, Any]:
    """Score all arms of a run on its test examples and audit them; writes scores and ``results.json``.

    Args:
        run: run folder with ``config.yaml`` and ``adapter/``.
        console: where progress is shown; None: nowhere.
        extra: texts that go into the report as they are.
        allow_leaks: go on where a leak check fires; the verdict then says so.

    Raises:
        RunError, DataError: as :func:`score`.
    """
    folder = Path(run)
    score(folder, console, extra, allow_leaks)
    results = audit(load_scored(folder))
    write_results(folder, results)
    return results


def score(
    folder: Path,
    console: Console | None = None,
    extra: Mapping[str, Any] | None = None,
    allow_leaks: bool = False,
    backbone: FrozenBackbone | None = None,
    judges: Judges | None = None,
) -> None:
    """Train a run's missing controls and score its arms; writes ``scores.parquet``, ``covariates.parquet`` and, last,
    ``scored.json``: training records, samples, leak checks and warnings. Arguments as of :func:`judge`; ``backbone``
    and ``judges`` are the run's, if they are loaded already.

    Raises:
        RunError: the folder holds no finished training, or was trained on other tables.
        DataError: the embedding table's version is not the one trained with, or a leak check fires.
    """
    config = run_config(folder)
    backbone = backbone or FrozenBackbone.load(config.backbone, config.training.precision)
    e2p = E2PModel.from_pretrained(folder / "adapter", backbone)
    tables = table_keys(config)  # now: they may change while this is at work
    inputs = load_inputs(config.data, e2p.encoder, e2p.projector.config.position)
    _check_vectors(config, e2p, inputs)
    check_inputs(folder, "e2p", inputs)
    # Before controls are trained: what cannot be tested, and what would not be worth anything.
    require_tests(inputs.keys["user_id"].to_numpy()[inputs.rows("test")])
    leaks = [dataclasses.asdict(check) for check in check_leaks(inputs, config.data.examples)]
    refuse_leaks(folder, leaks, allow_leaks)
    judges = judges or open_judges(config, inputs, backbone, console)
    headline = _headline(config, inputs, judges)
    names, profiled, warnings = _possible_arms(config, e2p, inputs)
    models = {"e2p": e2p}
    for arm in ("static", "shuffled"):
        if arm in names:
            models[arm] = _control(config, backbone, inputs, arm, folder, console)
    arms = build_arms(names, models, inputs, profiled, config.evaluation.seed, config.training.seed)
    with _bars(console) as bars:
        scores = pl.concat([score_arm(arm, inputs, config.training.tokens_per_pass, bars) for arm in arms])
        generated, known = judge_generated(config, judges, arms, inputs, folder, bars)
        scores = pl.concat([scores, *generated])
    training = {arm: _training_record(folder, arm) for arm in models}
    judged = training["e2p"]["validation"]
    if is_useless(judged):
        warnings.append("On validation data the prefix is worse than no prefix. Do not serve this adapter.")
        if console:
            warn_useless(console, judged)
    (folder / ABOUT).unlink(missing_ok=True)  # older scores' must not stand beside new ones
    write_frame(folder / SCORES, scores)
    write_frame(folder / COVARIATES, covariates(inputs))
    seed = config.evaluation.seed
    drawn: dict[str, Any] = {}
    for part, title, draw in (
        ("samples", "sample answers", lambda: samples(config, e2p, inputs, judges.next_item)),
        ("space", "map of the users", lambda: _space(config, e2p, inputs, folder)),
        ("prefix", "description of the prefix", lambda: describe_prefix(e2p, inputs, seed)),
    ):
        try:
            drawn[part] = draw()
        except Exception as error:  # whatever it is: an illustration must not cost what has been judged
            warnings.append(f"No {title}: {' '.join(str(error).split()) or type(error).__name__}")
    about = {
        "format": FORMAT,
        "task": Path(config.data.examples).parent.name,
        "provenance": provenance(),
        "seed": config.training.seed,
        "config": to_dict(config),
        "inputs": inputs.identity() | judged_keys(config),
        "tables": tables,
        "data": dict(inputs.counts),
        "training": training,
        "headline": headline,
        **known,
        "leaks": leaks,
        "extra": dict(extra or {}),
        "warnings": warnings,
        **drawn,
    }
    write_json(folder / ABOUT, about)


def _headline(config: RunConfig, inputs: RunInputs, judges: Judges) -> str:
    """The metric that the verdict rests on, as :class:`EvaluationConfig` says; before anything is scored."""
    measured = ["nats_per_token"]
    if (inputs.labels[inputs.all_rows("test")] == 0).any():
        measured.insert(0 if config.objective.labelled else 1, "auc")
    measured = [*judges.metrics(), *measured, *judges.beside()]
    asked = config.evaluation.headline
    if asked and asked not in measured:
        raise DataError(f"evaluation.headline: expected one of {', '.join(measured)}, got {asked!r}")
    return asked or measured[0]


def run_config(folder: Path) -> RunConfig:
    """The settings of a trained run. Raises RunError if the folder holds no finished training."""
    if not (folder / "config.yaml").is_file() or not _trained(folder):
        raise RunError(f"{folder}: expected a run with config.yaml and adapter/, found none; run e2p train first")
    return load_yaml(folder / "config.yaml")


def table_keys(config: RunConfig) -> dict[str, str] | None:
    """Hashes of what a run's tables say, which take no model; None if they cannot be read (any more)."""
    try:
        keys = {"examples": content_key(config.data.examples), "embeddings": content_key(config.data.embeddings)}
        return keys | judged_keys(config)
    except (E2PError, OSError):
        return None


def judged_keys(config: RunConfig) -> dict[str, str]:
    """Hashes of the files that generated answers are judged with, and of how the backbone was adapted; local ones."""
    named: dict[str, Path] = {}
    for kind, names in JUDGED_WITH.items():
        settings: Any = getattr(config.evaluation, kind)
        named |= {f"{kind}.{name}": Path(getattr(settings, name)) for name in names if settings.items}
    found = {}
    for name, path in {**named, "adaptation": Path(config.backbone.model) / ADAPTED}.items():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        there = [file for file in files if file.is_file()]
        if there:
            digest = hashlib.blake2b(digest_size=16)
            for file in there:
                digest.update(file.read_bytes())
            found[name] = digest.hexdigest()
    return found


def is_scored(folder: Path, tables: Mapping[str, str] | None = None) -> bool:
    """Whether a run has been scored to the end with the settings that it has now, and on these tables.

    Args:
        folder: the run's.
        tables: of :func:`table_keys`; None: the tables are gone, and the scores stand as they are.
    """
    about = read_about(folder)
    if about is None or about.get("format") != FORMAT or not (folder / SCORES).is_file():
        return False
    same = tables is None or about.get("tables") == tables
    try:  # settings that e2p did not know then stand at their defaults
        scored_with = from_dict(about.get("config") or {})
    except ConfigError:
        return False
    return bool(same and scored_with == run_config(folder))


def refuse_leaks(folder: Path, leaks: Iterable[Mapping[str, Any]], allowed: bool) -> None:
    """Stop where a leak check has fired, unless told to go on. Raises DataError with what was found."""
    fired = [f"{check['name']}: {check['found']}" for check in leaks if check["fired"]]
    if fired and not allowed:
        raise DataError(f"{folder}: {'; '.join(fired)}; pass --allow_leaks to go on; the report will say so")


def score_seeds(
    run: Path, seeds: Iterable[int], console: Console | None = None, allow_leaks: bool = False
) -> list[Path]:
    """Train and score a run with other training seeds too, each in ``<run>/seeds/<seed>``; resumable.

    Args:
        run: a trained run. It is scored as well, if that has not been done with its settings and tables.
        seeds: training seeds; the run's own one is always among them.
        console: where progress is shown; None: nowhere.
        allow_leaks: go on where a leak check fires.

    Returns:
        The run folders, the run itself first. What is finished is not done again.

    Raises:
        RunError, DataError: as :func:`score`; or a seed's folder holds a run with other settings. The settings of
            the evaluation are no reason: a seed's folder takes on the run's.
    """
    config = run_config(run)
    own = config.training.seed
    folders = {own: run} | {seed: run / "seeds" / str(seed) for seed in dict.fromkeys(seeds) if seed != own}
    for seed, folder in folders.items():
        if seed != own:
            _take_settings(folder, with_seed(config, seed, str(folder)))  # of all, before any long work
    tables = table_keys(config)
    left = {seed: folder for seed, folder in folders.items() if not (_trained(folder) and is_scored(folder, tables))}
    for seed, folder in folders.items():
        if seed not in left:
            refuse_leaks(folder, (read_about(folder) or {}).get("leaks") or (), allow_leaks)
    if not left:
        return list(folders.values())
    backbone = FrozenBackbone.load(config.backbone, config.training.precision)
    encoder = text_encoder(backbone, config.data, config.projector.prefix_tokens)
    inputs = load_inputs(config.data, encoder, config.projector.position)
    for folder in folders.values():
        for arm in ("e2p", "static", "shuffled"):
            if _trained(arm_folder(folder, arm)):
                check_inputs(folder, arm, inputs)
    judges = open_judges(config, inputs, backbone, console)
    for seed, folder in left.items():
        if not _trained(folder):
            one, started = with_seed(config, seed, str(folder)), (folder / "config.yaml").is_file()
            if not started:
                prepare_folder(one, overwrite=False, resume=False)
            train_arm(one, backbone, inputs, "e2p", folder, console, resume=started)
        score(folder, console, None, allow_leaks, backbone, judges)
    return list(folders.values())


def _trained(folder: Path) -> bool:
    return (folder / "adapter" / CONFIG).is_file()


def _take_settings(folder: Path, wanted: RunConfig) -> None:
    """Let a seed's folder be judged as the run is. Raises RunError if it holds a run with other settings."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    config = load_yaml(path)
    here, there = flat(to_dict(config)), flat(to_dict(wanted))
    free = ("output", "evaluation.")  # it may have been moved; how it is judged has no part in its training
    differs = [name for name in there if here.get(name) != there[name] and not name.startswith(free)]
    if differs:
        raise RunError(
            f"{folder}: expected the run's settings with another seed, got other {', '.join(differs)}; delete the "
            "folder, or put the settings back"
        )
    if config.evaluation != wanted.evaluation:
        save_yaml(dataclasses.replace(config, evaluation=wanted.evaluation), path)


def _check_vectors(config: RunConfig, e2p: E2PModel, inputs: RunInputs) -> None:
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


def _possible_arms(
    config: RunConfig, e2p: E2PModel, inputs: RunInputs
) -> tuple[tuple[str, ...], TokenisedExamples | None, list[str]]:
    """The arms asked for that these tables and this adapter allow, examples with profiles, and what is left out why."""
    asked, warnings = config.evaluation.arms, []
    names = tuple(arm for arm in asked if arm not in WITHOUT_MODEL)
    for arm, needs in WITHOUT_MODEL.items():
        # Among all arms, the default, it is there for those who have the tables.
        if arm in asked and asked != ARMS and not getattr(config.evaluation, needs).items:
            warnings.append(f"The arm {arm} is left out: it needs the tables of evaluation.{needs}.")
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


def _control(
    config: RunConfig, backbone: FrozenBackbone, inputs: RunInputs, arm: str, folder: Path, console: Console | None
) -> E2PModel:
    if _trained(arm_folder(folder, arm)):
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


def _space(config: RunConfig, model: E2PModel, inputs: RunInputs, folder: Path) -> dict[str, Any] | None:
    """The map of the users, coloured as the settings say."""
    name = config.evaluation.attribute
    attribute = known_attribute(config.data.examples, name) if name else None
    return describe_space(model, inputs, folder, config.evaluation.seed, attribute, name)


def _bars(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )
