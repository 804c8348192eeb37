"""Per-example scores -> ``results.json``: tests, breakdowns and a verdict, over one training seed or several.

Reads scores and what is known about them, never a model. Whoever has scores, from wherever, can have them judged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from e2p.config import RunConfig
from e2p.config_io import to_dict
from e2p.errors import DataError, RunError
from e2p.evaluation.breakdowns import breakdowns, check_covariates, gains
from e2p.evaluation.engagement import agreement
from e2p.evaluation.metrics import COLUMNS, audited_metrics, means, metric_of, per_example, summarise
from e2p.evaluation.significance import RULE, Direction, compare, verdict
from e2p.provenance import provenance

FORMAT = 2
SCORES, COVARIATES, ABOUT, RESULTS = "scores.parquet", "covariates.parquet", "scored.json", "results.json"
ANSWERS = "answers.parquet"
RECOMMENDED = "recommended.parquet"
# The tables that generated answers are judged with, by the settings that name them.
JUDGED_WITH = {"playlists": ("items", "queries", "plays", "known"), "next_item": ("items", "codes", "interactions")}
# Settings in which runs of one experiment may differ. The tables' contents are compared, not their places.
_FREE = frozenset(
    {"training.seed", "output", "data.examples", "data.embeddings", "data.cache_dir", "backbone.device"}
    | {f"evaluation.{kind}.{name}" for kind, names in JUDGED_WITH.items() for name in names}
)


@dataclass(frozen=True, eq=False)
class Scored:
    """Per-example scores of one training seed, and what is known about them.

    Args:
        name: for tables and messages.
        scores: ``example_id``, ``user_id``, ``arm``, ``metric``, ``value``. The arm ``e2p`` is the one in question.
        seed: of the training; None if it is not known.
        covariates: for the breakdowns, as of :func:`e2p.evaluation.breakdowns.covariates`.
        about: what the judge has written down beside the scores: ``config``, ``inputs`` (hashes), ``data``,
            ``training``, ``samples``, ``leaks``, ``warnings``, ``extra``, ``provenance``; all may be missing.
        source: the folder that they were read from, in full; names may be equal. Empty: no folder.
    """

    name: str
    scores: pl.DataFrame
    seed: int | None = None
    covariates: pl.DataFrame | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


def audit(
    seeds: Sequence[Scored],
    better: Mapping[str, Direction] | None = None,
    resamples: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Judge one experiment: any arms, any metrics, one training seed or several put together.

    With several seeds, the differences are averaged over them example by example; the tests then ask, with the user as
    the unit, whether that mean differs from zero. How far the seeds lie apart is given beside it.

    Args:
        seeds: the scores of each training seed.
        better: ``lower`` or ``higher`` for metrics that e2p does not know.
        resamples: bootstrap resamples; default is the run's setting, or 10,000.
        seed: seed of the resamples; default is the run's setting, or 42.

    Returns:
        What goes into ``results.json``. The first metric's comparisons make the verdict; further metrics stand in
        ``other_metrics``, each corrected by Holm by itself.

    Raises:
        DataError: no scores; runs of different experiments or with the same seed; scores that cannot be paired; a
            metric whose direction is not known.
    """
    if not seeds:
        raise DataError("audit: expected the scores of at least one run, got none")
    _check_one_experiment(seeds)
    first = seeds[0]
    settings = (first.about.get("config") or {}).get("evaluation") or {}
    resamples = resamples or settings.get("resamples", 10_000)
    seed = settings.get("seed", 42) if seed is None else seed
    scores = [one.scores for one in seeds]
    names = audited_metrics(scores, first.about.get("headline") or "")
    headline, *others = (_of_metric(name, scores, better, resamples, seed) for name in names)
    comparisons = headline.pop("compared")
    leaks = first.about.get("leaks")
    fired = [check["name"] for check in leaks or () if check["fired"]]
    bins: list[dict[str, Any]] = []
    if first.covariates is not None:
        bins = breakdowns(headline["wide"], first.covariates, resamples, seed)
    gained = gains(headline["wide"], headline["metric"]["better"], resamples, seed)
    known = [one.seed for one in seeds if one.seed is not None]
    return {
        "format": FORMAT,
        "run": first.name,
        "runs": [one.name for one in seeds],
        "task": first.about.get("task", ""),
        "provenance": first.about.get("provenance") or provenance(),
        "seed": first.seed,
        "seeds": known,
        "config": first.about.get("config") or {},
        "data": first.about.get("data") or {},
        "metric": headline["metric"],
        "arms": headline["arms"],
        "comparisons": headline["comparisons"],
        "verdict": verdict(comparisons, fired),
        "rule": RULE,
        "other_metrics": [{name: other[name] for name in ("metric", "arms", "comparisons")} for other in others],
        "breakdowns": bins,
        "gains": gained,
        "leaks": leaks,
        "valid": None if leaks is None else not fired,
        "training": first.about.get("training") or {},
        "samples": first.about.get("samples") or [],
        "extra": first.about.get("extra") or {},
        "space": first.about.get("space"),
        "prefix": first.about.get("prefix"),
        "playlists": _playlists(first.about.get("playlists"), [headline, *others]),
        "next_item": first.about.get("next_item"),
        "texts": first.about.get("texts"),
        "warnings": _warnings(seeds),
    }


def _playlists(about: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the judge of playlists has written down, with the arms' agreement over all training seeds."""
    if not about:
        return None
    means = {
        one["metric"]["name"]: {arm: found[one["metric"]["name"]] for arm, found in one["arms"].items()}
        for one in metrics
        if one["metric"]["name"] in ("engagement", "playlist_hits")
    }
    if len(means) < 2:
        return dict(about)
    return dict(about) | {"agreement": agreement(means["engagement"], means["playlist_hits"])}


def _of_metric(
    name: str,
    scores: Sequence[pl.DataFrame],
    better: Mapping[str, Direction] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    metric = metric_of(name, better)
    wide = per_example(scores, name)
    by_seed = [per_example(one, name) for one in scores] if len(scores) > 1 else [wide]
    compared = compare(wide, resamples, seed, name, metric.better, by_seed)
    likelihood = name == "nats_per_token" and "tokens" in wide.columns
    return {
        "wide": wide,
        "compared": compared,
        "metric": dataclasses.asdict(metric),
        "arms": summarise(scores, resamples, seed) if likelihood else means(wide, name, resamples, seed),
        "comparisons": [dataclasses.asdict(comparison) for comparison in compared],
    }


def _warnings(seeds: Sequence[Scored]) -> list[str]:
    """The first run's, and of the others' what it does not say already."""
    found = list(seeds[0].about.get("warnings") or ())
    for one in seeds[1:]:
        found += [f"Seed {one.seed}: {text}" for text in one.about.get("warnings") or () if text not in found]
    if seeds[0].about.get("leaks") is None:
        found.append("Leaks were not looked for: that takes the tables of a run.")
    return found


def experiments(scored: Sequence[Scored]) -> list[list[Scored]]:
    """Put the runs that differ in nothing but their training seed together, in the order given.

    Scores without settings are an experiment of their own, unless they come from one folder.
    """
    found: dict[str, list[Scored]] = {}
    for one in scored:
        settings = _settings(one)
        own = f"scores {one.source or one.name}"
        found.setdefault(json.dumps(settings, sort_keys=True) if settings else own, []).append(one)
    return list(found.values())


def differing(groups: Sequence[Sequence[Scored]]) -> list[dict[str, Any]]:
    """For each experiment, the settings in which those experiments differ whose settings are known."""
    found = [_settings(group[0]) for group in groups]
    known = [settings for settings in found if settings]
    names = sorted({name for settings in known for name in settings})
    kept = [name for name in names if len({json.dumps(settings.get(name)) for settings in known}) > 1]
    return [{name: settings[name] for name in kept if name in settings} for settings in found]


def _settings(one: Scored) -> dict[str, Any]:
    """What makes an experiment: settings by dotted names, and hashes of the tables.

    Settings that e2p did not know when the run was scored stand at their defaults: it is no other run for that."""
    given = flat(one.about.get("config") or {})
    given = flat(to_dict(RunConfig())) | given if given else given
    config = {name: value for name, value in given.items() if name not in _FREE}
    return config | {f"table of {name}": value for name, value in (one.about.get("inputs") or {}).items()}


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return found


def _check_one_experiment(seeds: Sequence[Scored]) -> None:
    """A mean over runs that differ in more than their seed would hide what differs."""
    first = seeds[0]
    for one in seeds[1:]:
        differs = sorted(set().union(*differing([[first], [one]])))
        if differs:
            raise DataError(
                f"audit: runs '{first.name}' and '{one.name}' are two experiments: they differ in {', '.join(differs)}"
            )
    named: dict[int | None, str] = {}
    for one in seeds:
        if one.seed in named:
            raise DataError(
                f"audit: runs '{named[one.seed]}' and '{one.name}' are one experiment with the same training seed, "
                f"{one.seed}; expected each seed once: leave one of them out"
            )
        named[one.seed] = one.name


def load_scored(folder: str | Path) -> list[Scored]:
    """Read the scores in a folder, one entry for each training seed.

    Args:
        folder: with ``scores.parquet``; it may have a column ``seed``. ``covariates.parquet`` (for the breakdowns) and
            ``scored.json`` (what the judge of a run writes down) may be missing.

    Raises:
        RunError: no scores there, or a file cannot be read.
        DataError: a column is missing, an id, arm or metric is null, a seed is no whole number, covariates are unfit.
    """
    folder = Path(folder)
    path = folder / SCORES
    if not path.is_file():
        raise RunError(f"{path}: not found; expected per-example scores with the columns {', '.join(COLUMNS)}")
    scores = _read(path)
    missing = [column for column in COLUMNS if column not in scores.columns]
    if missing:
        raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    try:
        scores = scores.with_columns(pl.col(COLUMNS[:4]).cast(pl.String), pl.col("value").cast(pl.Float64))
        seeds = scores.select(pl.col("^seed$").cast(pl.Float64, strict=False))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: expected texts and numbers: {str(error).splitlines()[0]}") from None
    for column in COLUMNS[:4]:
        if scores[column].null_count():
            raise DataError(
                f"{path}: {column}: expected a text in every row, got none in {scores[column].null_count()}"
            )
    for seed in seeds:
        if not (seed.is_finite() & (seed == seed.round())).fill_null(False).all():
            raise DataError(f"{path}: seed: expected a whole number in every row, or no such column")
        scores = scores.with_columns(seed.cast(pl.Int64))
    by = _read(folder / COVARIATES) if (folder / COVARIATES).is_file() else None
    if by is not None and "example_id" not in by.columns:
        raise DataError(f"{folder / COVARIATES}: expected a column example_id, got {', '.join(by.columns)}")
    if by is not None:
        by = by.with_columns(pl.col("example_id").cast(pl.String))
        check_covariates(by, str(folder / COVARIATES))
    about = read_about(folder) or {}
    whole = folder.resolve()
    name = (f"{whole.parent.parent.name}/seeds/" if whole.parent.name == "seeds" else "") + whole.name
    if "seed" not in scores.columns:
        return [Scored(name, scores.select(COLUMNS), about.get("seed"), by, about, str(whole))]
    return [
        Scored(name, part.select(COLUMNS), int(part["seed"][0]), by, about, str(whole))
        for part in scores.partition_by("seed", maintain_order=True)
    ]


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def read_about(folder: Path) -> dict[str, Any] | None:
    """What the judge has written down beside a run's scores; None if there is nothing."""
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {error}; evaluate the run again") from None
    if not isinstance(about, dict):
        raise RunError(f"{path}: expected a mapping, got {type(about).__name__}; evaluate the run again")
    return about


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json`` in one step."""
    write_json(folder / RESULTS, results)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one."""
    half = path.with_name(f".{path.name}")
    try:
        half.write_text(text, encoding="utf-8", errors="replace")  # an answer may hold half of a character pair
        half.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}; make room") from None
