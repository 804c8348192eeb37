"""`e2p sweep`: one setting after the other, each value trained and judged on validation data; resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console

from e2p.config import BackboneConfig, RunConfig
from e2p.config_io import from_dict, load_yaml, save_yaml, to_dict
from e2p.data.batches import Examples
from e2p.data.tables import content_key
from e2p.errors import ConfigError, E2PError, RunError
from e2p.evaluation.significance import cluster_bootstrap, clustered_t, require_tests
from e2p.evaluation.sweep_tables import Entry, write_summary
from e2p.model.adapter import CONFIG
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.provenance import provenance
from e2p.training.inputs import RunInputs, deal, join_tables, load_inputs
from e2p.training.preferences import check_labels
from e2p.training.run import arm_folder, prepare_folder, train_arm, with_seed
from e2p.training.scoring import score_batches

POINTS = "points.jsonl"
_JUDGED = ("seed", "resamples")  # what a sweep uses of the settings of evaluation


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep's YAML says.

    Args:
        base: the settings that all points share: a mapping as in a run's YAML, or the path of one.
        vary: setting (dotted name) -> values; one setting at a time is changed, all else stays as in ``base``.
        variants: name -> settings (dotted names) that are changed together.
        grid: settings of which every combination is run.
        static: settings for whose values the static control is trained as well; ``base``'s is, whenever this is given.
        seeds: training seeds; every point is run with each.
        output: folder of the sweep.
    """

    base: RunConfig
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    static: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (42,)
    output: str = "sweeps/sweep"


@dataclass(frozen=True)
class Point:
    """One training of a sweep: where it stands in the tables, what it changes, and its resolved settings."""

    key: str
    value: Any
    config: RunConfig
    arm: str

    def id(self, content: str) -> str:
        """The same for points that are the same run, whatever table they stand in; ``content`` stands for the data."""
        judged = {name: getattr(self.config.evaluation, name) for name in _JUDGED}
        settings = to_dict(self.config) | {"output": None, "evaluation": judged, "arm": self.arm, "content": content}
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def sweep(file: str) -> None:
    """Train and judge every point of a sweep on validation data, then write its tables and curves.

    What is finished is not run again, and an interrupted point is resumed: start the same command once more. A point
    that fails is noted and does not stop the others.

    Args:
        file: YAML with base, vary, variants, grid, static, seeds and output (docs/evaluation.md).
    """
    console = Console(stderr=True)
    config = load_sweep(file)
    summary = run_sweep(config, console)
    print(f"{len(summary['points'])} points: {Path(config.output) / 'sweep.md'}")


def load_sweep(file: str | Path) -> SweepConfig:
    """Read a sweep's YAML. Raises ConfigError, with the file, for what is unreadable, unknown or of the wrong kind."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    kinds = {"base": (dict, str), "vary": dict, "variants": dict, "grid": dict, "static": list, "seeds": list,
             "output": str}  # fmt: skip
    if not isinstance(values, dict) or "base" not in values:
        raise ConfigError(f"{file}: expected a mapping with base and any of {', '.join(kinds)[6:]}")
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{file}: unknown key {key!r}; expected some of {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):  # type: ignore[arg-type]
            raise ConfigError(f"{file}: {key}: got {type(value).__name__}; see docs/evaluation.md for a sweep's form")
    for part in ("vary", "grid"):
        for key, several in values.get(part, {}).items():
            if not isinstance(several, list) or not several:
                raise ConfigError(f"{file}: {part}.{key}: expected a list of values, got {several!r}")
    base = values["base"]
    try:
        run = load_yaml(Path(file).parent / base) if isinstance(base, str) else from_dict(base)
        config = SweepConfig(
            **values | {"base": run} | {k: tuple(values[k]) for k in ("static", "seeds") if k in values}
        )
        list(points(config))  # a wrong value in the last point must not come out after hours
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config


def points(config: SweepConfig) -> Iterator[Point]:
    """All points of a sweep, the same run under several names included.

    Raises:
        ConfigError: a setting is unknown or a value not allowed, two seeds are equal, or nothing is varied.
    """
    if len(set(config.seeds)) != len(config.seeds) or not config.seeds:
        raise ConfigError(f"seeds: expected different whole numbers, at least one, got {list(config.seeds)}")
    if not (config.vary or config.variants or config.grid):
        raise ConfigError("expected something to vary: vary, variants or grid")
    unknown = [key for key in config.static if key not in config.vary and key not in ("variants", "grid")]
    if unknown:
        raise ConfigError(f"static: expected settings of vary (or the word variants or grid), got {unknown[0]!r}")
    varied = [*config.vary, *config.grid, *(name for settings in config.variants.values() for name in settings)]
    for name in varied:
        if name.startswith("evaluation.") and name.partition(".")[2] not in _JUDGED:
            raise ConfigError(f"{name}: does not change what a sweep shows; leave it out")
    changes: list[tuple[str, Any, dict[str, Any]]] = [("base", None, {})]
    for key, values in config.vary.items():
        changes += [(key, value, {key: value}) for value in values]
    changes += [("variants", name, dict(settings)) for name, settings in config.variants.items()]
    combined: list[dict[str, Any]] = [{}] if config.grid else []
    for key, values in config.grid.items():
        combined = [{**one, key: value} for one in combined for value in values]
    changes += [("grid", ", ".join(f"{k} {v}" for k, v in one.items()), one) for one in combined]
    for key, value, settings in changes:
        changed = changed_settings(config.base, settings)
        arms = ("e2p", "static") if key in config.static or (key == "base" and config.static) else ("e2p",)
        for seed in config.seeds:
            for arm in arms:
                yield Point(key, value, with_seed(changed, seed, config.output), arm)


def changed_settings(base: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A run's settings with some of them, by dotted name, changed. Raises ConfigError for unknown names and values."""
    values = to_dict(base)
    for name, value in settings.items():
        *sections, last = name.split(".")
        where = values
        for section in sections:
            where = where.get(section, {}) if isinstance(where, dict) else {}
        if not isinstance(where, dict) or last not in where or isinstance(where[last], dict):
            raise ConfigError(f"{name}: expected a setting such as projector.hidden_dim, found no such one")
        where[last] = value
    return from_dict(values)


def run_sweep(config: SweepConfig, console: Console | None = None) -> dict[str, Any]:
    """Run what is missing and write ``sweep.json``, ``sweep.md``, ``sweep.csv`` and ``figures/``; returns the first.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(config.output)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; name another output") from None
    done = _finished(folder / POINTS)
    contents: dict[tuple[str, str], str] = {}
    wanted: list[tuple[str, Point]] = []
    for point in points(config):
        sources = point.config.data.examples, point.config.data.embeddings
        if sources not in contents:  # changed tables are another experiment
            contents[sources] = "".join(content_key(source) for source in sources)
        wanted.append((point.id(contents[sources]), point))
    missing: dict[str, Point] = {}
    for name, point in wanted:
        if name not in done:
            missing.setdefault(name, point)
    loaded: tuple[BackboneConfig, FrozenBackbone] | None = None
    for number, (name, point) in enumerate(missing.items(), 1):
        if console is not None:
            console.rule(f"{number} of {len(missing)}: {point.key} {'' if point.value is None else point.value}")
        try:
            if loaded is None or loaded[0] != point.config.backbone:
                loaded = (
                    point.config.backbone,
                    FrozenBackbone.load(point.config.backbone, point.config.training.precision),
                )
            result = run_point(point, loaded[1], folder / "runs" / name, console)
        except (E2PError, RuntimeError) as error:  # out of memory is a RuntimeError
            if console is not None:
                console.print(f"[red]failed:[/] {error}", highlight=False)
            result = {"failed": " ".join(str(error).split())}
        result = {"id": name, **result, "provenance": provenance()}
        _append(folder / POINTS, json.dumps(result))
        done[name] = result
    entries = [Entry(p.key, p.value, p.arm, p.config.training.seed, done[name]) for name, p in wanted]
    return write_summary(folder, to_dict(config.base), entries)


def run_point(point: Point, backbone: FrozenBackbone, folder: Path, console: Console | None) -> dict[str, Any]:
    """Train one point and judge it on the validation part; returns its figures, in nats per token of what shows how to
    answer, whatever the objective; the objective's own loss stands beside them (``validation``).

    ``prefix``, ``none`` and ``random`` (vectors exchanged among the validation users) are over all tokens together;
    ``true_minus_random`` is a mean over examples, as in the audit, with a bootstrap over users and a t-test clustered
    by user.
    """
    config = replace(point.config, output=str(folder))
    tables = join_tables(config.data)
    check_labels(tables, config.objective, config.data.examples)
    inputs = load_inputs(
        config.data,
        text_encoder(backbone, config.data, config.projector.prefix_tokens),
        config.projector.position,
        tables,
    )
    if point.arm != "static":
        require_tests(inputs.keys["user_id"].to_numpy()[inputs.rows("validation")], "validation")
    model, record = _trained(config, backbone, inputs, point.arm, folder, console)
    budget = config.training.tokens_per_pass
    held_out = inputs.examples("validation")
    own, tokens = example_nats(model, held_out, budget)
    result = {
        "steps": record["steps"],
        "best_step": record["best_step"],
        "parameters": record["parameters"],
        "seconds": record["seconds"],
        "examples": {part: inputs.counts[part] for part in ("train", "validation")},
        "users": {part: inputs.counts[f"{part}_users"] for part in ("train", "validation")},
        "prefix": float(own.sum() / tokens.sum()),
        "none": float(example_nats(model, held_out, budget, use_prefix=False)[0].sum() / tokens.sum()),
        "validation": record["validation"],  # of the objective itself, where it is not lm
    }
    if point.arm != "static":
        result |= _against_others(model, inputs, own, tokens, budget, config)
    shutil.rmtree(arm_folder(folder, point.arm) / "checkpoints", ignore_errors=True)
    return result


def _trained(
    config: RunConfig, backbone: FrozenBackbone, inputs: RunInputs, arm: str, folder: Path, console: Console | None
) -> tuple[E2PModel, dict[str, Any]]:
    """Train an arm, go on where a training was interrupted, or load what was trained but not judged."""
    trained = arm_folder(folder, arm)
    if (trained / "adapter" / CONFIG).is_file():
        record = json.loads((trained / "training.json").read_text(encoding="utf-8"))
        return E2PModel.from_pretrained(trained / "adapter", backbone), record
    started = (folder / "config.yaml").is_file()
    if started:  # the same run by its id, though the sweep's folder may have moved
        save_yaml(config, folder / "config.yaml")
    prepare_folder(config, overwrite=False, resume=started)
    return train_arm(config, backbone, inputs, arm, folder, console, resume=started)


def _against_others(
    model: E2PModel,
    inputs: RunInputs,
    own: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.float64],
    budget: int,
    config: RunConfig,
) -> dict[str, Any]:
    rows, users = inputs.rows("validation"), inputs.keys["user_id"].to_numpy()
    exchanged = deal(inputs, rows, [config.evaluation.seed, 3])
    other, _ = example_nats(model, inputs.examples("validation", vector_rows=exchanged), budget)
    difference = (own - other) / tokens
    interval = cluster_bootstrap(difference, users[rows], config.evaluation.resamples, config.evaluation.seed)
    return {
        "random": float(other.sum() / tokens.sum()),
        "true_minus_random": interval.mean,
        "ci": [interval.low, interval.high],
        "p": clustered_t(difference, users[rows]).p,
    }


def example_nats(
    model: E2PModel, examples: Examples, budget: int, use_prefix: bool = True
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Negative log-likelihood and labelled tokens of every example, in the order of its rows."""
    nats = np.zeros(len(examples.tokens))
    for batch, logprobs in score_batches(model, examples, budget, use_prefix):
        parts = logprobs.double().cpu().split(batch.completion_lengths.tolist())
        nats[batch.index.numpy()] = [-float(part.sum()) for part in parts]
    return nats[examples.rows], examples.tokens.completion_lengths[examples.rows].astype(np.float64)


def _append(log: Path, line: str) -> None:
    """Add a line; one that a kill has cut short must not swallow it."""
    with log.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write((line + "\n").encode())


def _finished(log: Path) -> dict[str, dict[str, Any]]:
    """Points that an earlier call has finished, without a line that a kill has cut short and without what failed."""
    found: dict[str, dict[str, Any]] = {}
    if not log.exists():
        return found
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if "failed" not in result:
            found[result["id"]] = result
    return found
