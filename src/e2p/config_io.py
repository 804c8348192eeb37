"""A run's settings in and out: YAML, plain values, the command line's parser. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from e2p.config import RunConfig
from e2p.errors import ConfigError

PRESETS = ("recommended", "paper-full", "paper-workshop")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary of a config dataclass, tuples as lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def config_parser(prog: str | None = None) -> Any:
    """jsonargparse parser whose keys are those of :class:`RunConfig`; the CLI adds its own arguments to it."""
    from jsonargparse import ArgumentParser  # here: half of the start-up time of `e2p --help`

    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML with any of the settings below")
    parser.add_class_arguments(RunConfig)
    return parser


def from_namespace(parser: Any, namespace: Any) -> RunConfig:
    """The frozen settings out of what :func:`config_parser`'s parser has read."""
    built = parser.instantiate(namespace)
    return RunConfig(**{f.name: built[f.name] for f in dataclasses.fields(RunConfig)})


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a run's settings from plain values; unknown keys and wrong types raise ConfigError with their name."""
    refuse_nothing(RunConfig, values)
    parser = config_parser()
    try:
        return from_namespace(parser, parser.parse_object(dict(values)))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError and its own kinds for a bad value
        raise ConfigError(" ".join(str(error).split())) from None


def refuse_nothing(kind: type, values: Mapping[str, Any], above: str = "") -> None:
    """A setting that is named and left empty is a slip, where nothing is no value: the parser lets it pass."""
    for name, hint in get_type_hints(kind).items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(values[name], Mapping):
            refuse_nothing(hint, values[name], f"{above}{name}.")
        elif values[name] is None and type(None) not in get_args(hint):
            raise ConfigError(f"{above}{name}: expected a value, got nothing; fill it or leave the line out")


def preset_path(name: str) -> Path:
    """The YAML of a shipped preset. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return Path(__file__).parent / "presets" / f"{name}.yaml"


def load_yaml(path: str | Path) -> RunConfig:
    """Read a run's YAML. Raises ConfigError, with the file, for what is unreadable or unknown."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_yaml(config: RunConfig, path: str | Path) -> None:
    """Write the resolved settings of a run."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
