"""The adapter on disk: safetensors and JSON, written whole or not at all, checked key by key when read."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from e2p.config import BackboneConfig, DataConfig, ProjectorConfig
from e2p.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
CONFIG, WEIGHTS, STATS, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "embedding_stats.safetensors",
    "README.md",
)
_KEYS = {
    "format", "kind", "backbone", "embedding_dim", "embedding_versions", "projector", "objective", "text",
    "versions", "metrics", "sha256",
}  # fmt: skip
_SAMPLES = {"embedding_norms": ("embedding tables", 0.02), "hidden_state": ("hidden states", 0.1)}
_TEXT_KEYS = {"chat", "profile_template", "max_prompt_tokens", "max_completion_tokens", "long_prompt"}


_TYPES: dict[str, type] = {
    "embedding_dim": int, "backbone": dict, "embedding_versions": list, "projector": dict, "objective": dict,
    "text": dict, "versions": dict, "metrics": dict, "sha256": dict,
}  # fmt: skip
_NAMES = {int: "a whole number", dict: "an object", list: "a list"}


def library_versions() -> dict[str, str]:
    """Versions of what the adapter was made with."""
    return {name: importlib.metadata.version(name) for name in ("e2p", "torch", "transformers", "safetensors")}


def other_versions(recorded: Mapping[str, Any]) -> str:
    """Libraries that are not of the versions recorded: no fault, but what to look at first where there is one."""
    here = library_versions()
    other = [name for name in here if recorded.get(name) != here[name]]
    return ", ".join(f"{name} {recorded.get(name)} there, {here[name]} here" for name in other)


def write_adapter(
    folder: str | Path,
    record: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    card: str,
    overwrite: bool = False,
) -> None:
    """Write an adapter folder in one step: a reader finds the old one, the new one, or none, never half of one.

    Args:
        folder: the adapter's folder.
        record: what :func:`read_adapter` returns, without format, versions and checksums, which are added here.
        weights: phi's weights.
        stats: statistics of the input normalisation.
        card: the model card, Markdown.
        overwrite: replace an adapter that is there. A folder that is no adapter is never replaced.

    Raises:
        AdapterError: the folder holds something already, or cannot be written.
    """
    from safetensors import SafetensorError

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise AdapterError(f"{target}: expected a new folder, got one that is not empty; pass overwrite=True")
        _require_own(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        _write_whole(half, target, record, weights, stats, card)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{target}: cannot be written: {error}; choose another folder or make room") from None


def _require_own(target: Path) -> None:
    """Refuse to replace what this module has not written; PEFT's adapters bear the same file names."""
    others = (
        sorted({path.name for path in target.iterdir()} - {CONFIG, WEIGHTS, STATS, CARD}) if target.is_dir() else []
    )
    if others:
        raise AdapterError(f"{target}: holds {', '.join(others[:3])} too, so it will not be overwritten; move it away")
    try:
        record = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"format", "kind", "backbone", "sha256"}:
        raise AdapterError(f"{target}: holds no {CONFIG} of e2p, so it is not an adapter and will not be overwritten")


def _write_whole(
    half: Path,
    target: Path,
    record: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    card: str,
) -> None:
    from safetensors.torch import save

    try:
        for name, tensors in ((WEIGHTS, weights), (STATS, stats)):
            # Not save_file, whose files only their owner may read.
            (half / name).write_bytes(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
        (half / CARD).write_text(card, encoding="utf-8")
        sums = {name: _sha256(half / name) for name in (WEIGHTS, STATS)}
        full = {"format": FORMAT, **record, "versions": library_versions(), "sha256": sums}
        (half / CONFIG).write_text(json.dumps(full, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.chmod(half, 0o755)
        if target.exists():
            old = half.with_name(half.name + "-old")
            os.replace(target, old)
            try:
                os.replace(half, target)
            except OSError:
                os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(half, target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Record, weights and statistics of an adapter folder, every key and file checked.

    Raises:
        AdapterError: one line on what is missing, corrupt or unknown.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected an adapter folder, found none")
    missing = [name for name in (CONFIG, WEIGHTS, STATS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder}: the adapter lacks {', '.join(missing)}; it was not fully written or copied")
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: expected JSON, got: {error}; copy the adapter again") from None
    _check_record(folder / CONFIG, record)
    tensors = []
    for name in (WEIGHTS, STATS):
        expected, got = record["sha256"].get(name), _sha256(folder / name)
        if got != expected:
            raise AdapterError(
                f"{folder / name}: expected sha256 {str(expected)[:12]}…, got {got[:12]}…; the file is corrupt or "
                "from another adapter: copy the adapter again"
            )
        try:
            tensors.append(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder / name}: not readable as safetensors: {error}") from None
    return record, tensors[0], tensors[1]


def _check_record(path: Path, record: Any) -> None:
    if not isinstance(record, dict):
        raise AdapterError(f"{path}: expected an object, got {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise AdapterError(
            f"{path}: expected adapter format {FORMAT}, got {record.get('format')!r}; install the e2p that wrote it"
        )
    lacking, unknown = _KEYS - record.keys(), record.keys() - _KEYS
    if lacking or unknown:
        what = [f"lacks {', '.join(sorted(lacking))}"] if lacking else []
        what += [f"has unknown {', '.join(sorted(unknown))}"] if unknown else []
        raise AdapterError(f"{path}: {' and '.join(what)}; copy the adapter again")
    if record["kind"] not in ("projector", "static"):
        raise AdapterError(f"{path}: kind: expected projector or static, got {record['kind']!r}")
    for key, kind in _TYPES.items():
        if not isinstance(record[key], kind):
            raise AdapterError(f"{path}: {key}: expected {_NAMES[kind]}, got {record[key]!r}; copy the adapter again")
    if isinstance(record["embedding_dim"], bool) or record["embedding_dim"] < 1:
        raise AdapterError(f"{path}: embedding_dim: expected a whole number >= 1, got {record['embedding_dim']!r}")
    backbone = record["backbone"]
    texts = all(backbone.get(k, 0) is None or isinstance(backbone.get(k), str) for k in ("source", "revision", "lora"))
    kinds = get_args(get_type_hints(BackboneConfig)["quantization"])
    if not texts or backbone.get("quantization") not in kinds or not isinstance(backbone.get("fingerprint"), dict):
        raise AdapterError(
            f"{path}: backbone: expected source, revision, lora, quantization and fingerprint, got {backbone!r}"
        )
    if not all(isinstance(version, str) for version in record["embedding_versions"]):
        raise AdapterError(f"{path}: embedding_versions: expected texts, got {record['embedding_versions']!r}")
    if set(record["text"]) != _TEXT_KEYS:
        raise AdapterError(f"{path}: text: expected the keys {', '.join(sorted(_TEXT_KEYS))}, got {record['text']}")


def projector_config(path: str | Path, values: Mapping[str, Any]) -> ProjectorConfig:
    """Projector settings out of an adapter's record, with types and choices checked.

    Raises:
        AdapterError: a setting is unknown, missing or out of range.
    """
    names = {field.name for field in dataclasses.fields(ProjectorConfig)}
    values = {"form": "phi", **values}  # the only form there was, before it was written down
    if set(values) != names:
        differs = ", ".join(sorted(set(values) ^ names))
        raise AdapterError(
            f"{path}: projector: expected exactly this version's settings; missing or unknown: {differs}"
        )
    _check_values(path, "projector", ProjectorConfig, values)
    try:
        return ProjectorConfig(**values)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


def text_config(path: str | Path, values: Mapping[str, Any]) -> DataConfig:
    """Text settings out of an adapter's record, with types and choices checked.

    Raises:
        AdapterError: a setting has the wrong type or is out of range.
    """
    _check_values(path, "text", DataConfig, values)
    try:
        return DataConfig(**values)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


def _check_values(path: str | Path, part: str, config: type, values: Mapping[str, Any]) -> None:
    for name, hint in get_type_hints(config).items():
        if name not in values:
            continue
        value, choices = values[name], get_args(hint)
        if choices and value not in choices:
            raise AdapterError(f"{path}: {part}.{name}: expected one of {choices}, got {value!r}")
        numbers = (int, float) if hint is float else hint
        if not choices and (not isinstance(value, numbers) or isinstance(value, bool)):
            raise AdapterError(f"{path}: {part}.{name}: expected {hint.__name__}, got {value!r}")


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What tells the backbone that is here from the one trained with, as readable parts; empty if nothing does.

    Samples of numbers are compared as vectors, within a share of their length that half precision and quantisation
    stay below.
    """
    out = []
    for key in sorted(set(recorded) | set(found)):
        a, b = recorded.get(key), found.get(key)
        if key in _SAMPLES and key in found and b is None:  # not looked at: there are no layers here
            continue
        if key in _SAMPLES and (pair := _numbers(a, b)):
            a, b = pair
            what, share = _SAMPLES[key]
            distance = math.dist(a, b) / max(math.hypot(*a), math.hypot(*b), 1e-12)
            if not distance <= share:
                out.append(f"other weights (the {what} differ by {distance:.0%})")
        elif a != b:
            out.append(f"{key} {a} there, {b} here")
    return out


def _numbers(a: Any, b: Any) -> tuple[list[float], list[float]] | None:
    """Both, if both are lists of as many numbers."""
    lists = isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
    return (a, b) if lists and all(type(value) in (int, float) for value in (*a, *b)) else None


def model_card(record: Mapping[str, Any]) -> str:
    """A model card with front matter as model hubs read it, from what the adapter records."""
    backbone, projector, metrics = record["backbone"], record["projector"], record["metrics"]
    versions = ", ".join(record["embedding_versions"]) or "not named"
    rows = "\n".join(f"| {name} | {value} |" for name, value in metrics.items()) or "| none recorded | |"
    return f"""---
library_name: e2p
base_model: {backbone["source"] or "unknown"}
tags: [e2p, soft-prompt, personalization]
---
# Embedding-to-Prefix adapter

Maps a user's vector of {record["embedding_dim"]} numbers to {projector["prefix_tokens"]} soft token(s) of the frozen
language model `{backbone["source"]}` ({backbone["fingerprint"]["model_type"]}, hidden size
{backbone["fingerprint"]["hidden_size"]}). The language model is unchanged.

```python
from e2p import E2PModel

model = E2PModel.from_pretrained("path/to/this/folder")
print(model.generate(["make a playlist"], embeddings=[vector]))  # vector: {record["embedding_dim"]} numbers
```

| | |
|---|---|
| kind | {record["kind"]} |
| position of the soft tokens | `{projector["position"]}` |
| hidden width, norm, input | {projector["hidden_dim"]}, {projector["norm"]}, {projector["input_norm"]} |
| version of the user vectors | {versions} |
| objective | {record["objective"].get("name", "unknown")} |

**Use only with vectors of the same version**: after a retraining of the recommender the same user has an unrelated
vector.

| metric | value |
|---|---|
{rows}
"""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
