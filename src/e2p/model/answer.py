"""`e2p generate`: a prompt answered for one user or for several, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e2p.config import BackboneConfig
from e2p.config_io import load_yaml
from e2p.data.sources import cache_root
from e2p.data.tables import EmbeddingTable, open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.model.adapter import CONFIG
from e2p.model.e2p import E2PModel

EMPTY = "(an empty answer)"


def generate(
    run: str,
    prompt: str,
    users: list[str] | None = None,
    embeddings: str = "",
    backbone: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 42,
) -> None:
    """Answer a prompt for users; without any, for the null user. The bare backbone's answer stands beside.

    Args:
        run: run folder, or a folder with an adapter alone.
        prompt: the request.
        users: user ids, as u1 or [u1,u2]; each gets the answer for his newest vector.
        embeddings: embedding table; default is the run's own.
        backbone: where the backbone lies now, if not where the adapter's record says.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: seed of the draw.
    """
    _require(max_new_tokens >= 1, f"max_new_tokens: expected a whole number >= 1, got {max_new_tokens}")
    _require(temperature >= 0, f"temperature: expected a number >= 0, got {temperature}")
    _require(bool(prompt.strip()), f"prompt: expected a text, got {prompt!r}")
    _require(users != [], "users: expected at least one id, got none; leave --users out for the null user")
    folder = Path(run)
    adapter = folder / "adapter" if (folder / "adapter" / CONFIG).is_file() else folder
    model = E2PModel.from_pretrained(adapter, _backbone(folder, backbone))
    wanted = users or []
    # Without users the null user answers, if there is one.
    vectors: list[Any] = [None] if model.projector.config.null_prob and not users else []
    if wanted:
        table = _table(folder, embeddings)
        if table.versions != model.embedding_versions:
            here, trained = ", ".join(table.versions) or "(not named)", ", ".join(model.embedding_versions)
            raise DataError(f"{table.source}: expected vectors of version {trained or '(not named)'}, got {here}")
        vectors = [newest_vector(table, user) for user in wanted]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if temperature > 0:
        from transformers import set_seed

        set_seed(seed)
        settings |= {"do_sample": True, "temperature": temperature}
    plain = model.generate([prompt], use_prefix=False, **settings)
    answers = model.generate([prompt] * len(vectors), vectors, **settings)
    shown = Table("user", "answer", title=Text(prompt), show_lines=True)
    shown.add_row("no prefix", Text(plain[0] or EMPTY))
    for name, text in zip(wanted or ["null user"] * len(vectors), answers, strict=True):
        shown.add_row(Text(name), Text(text or EMPTY))  # what a model says is no markup
    Console().print(shown)
    if not vectors:
        Console().print("No null user was trained (projector.null_prob 0): name users with --users.")


def _backbone(folder: Path, model: str | None) -> BackboneConfig | str | None:
    """The backbone with the run's own settings, where there is a run; else what was named, or nothing."""
    if not (folder / "config.yaml").is_file():
        return model
    config = load_yaml(folder / "config.yaml").backbone
    return replace(config, model=model, revision=None) if model else config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def newest_vector(table: EmbeddingTable, user: str) -> np.ndarray:
    """A user's newest vector [D]. Raises DataError for a user without one."""
    keys = table.keys.with_row_index("at").filter(table.keys["user_id"] == user)
    if not len(keys):
        raise DataError(f"{table.source}: expected a vector of user {user!r}, found none; check the id")
    if "timestamp" in keys.columns:
        keys = keys.sort("timestamp")
    return np.array(table.vectors[keys["at"][-1]], np.float32)


def _table(folder: Path, embeddings: str) -> EmbeddingTable:
    cache = None
    if not embeddings:
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: expected a run folder, got an adapter alone; name its --embeddings")
        data = load_yaml(folder / "config.yaml").data
        embeddings, cache = data.embeddings, data.cache_dir
    return open_embeddings(embeddings, cache_root(cache))
