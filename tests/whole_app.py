"""A world for whole servers: a tiny backbone on disk, adapters, users, and what training's own model says to them.

Every number of it comes from seeds, so that servers in different processes, vLLM's among them, hold the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e2p.config import BackboneConfig, DataConfig
from e2p.data.tables import write_embeddings
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from engines import build
from serve_process import ServeProcess
from tiny import tiny_backbone
from vllm_servers import VLLMServer

DIMENSION = 3  # of the vectors in the docs' lines
# Soft tokens at different places: what precedes them is shared by users, behind them nothing is.
ADAPTERS: dict[str, dict[str, Any]] = {
    "taste": {"prefix_tokens": 4},
    "early": {"position": "before_bos", "prefix_tokens": 3},
    "middle": {"position": "after_system", "prefix_tokens": 4},
}
_LONG = "the train home and old soul music, the user likes it; " * 6  # several blocks of vLLM's cache
PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": _LONG}],
    [{"role": "system", "content": _LONG}, {"role": "user", "content": "hello"}],
    [{"role": "user", "content": "make a playlist"}],
]
NUMBERS = np.random.default_rng(11).normal(size=(40, DIMENSION)).astype(np.float32)
STABLE = {f"s{number:02d}": vector for number, vector in enumerate(NUMBERS[:28])}
CHANGING = {f"c{number}": NUMBERS[28 + 3 * number : 31 + 3 * number] for number in range(4)}  # three vectors each


@dataclass
class App:
    """A whole server, and the vLLM server behind it, if there is one."""

    process: ServeProcess
    upstream: VLLMServer | None = None

    @property
    def base(self) -> str:
        return self.process.base


def write_checkpoint(folder: Path) -> Path:
    """The backbone; its heads are of a size that vLLM has kernels for."""
    backbone = tiny_backbone(
        "llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512
    )
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


class World:
    """Folders as in the docs (``runs/taste``, ``embeddings.parquet``), and answers by training's own model."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.backbone = FrozenBackbone.load(BackboneConfig(str(checkpoint)), "float32")
        data = DataConfig(max_prompt_tokens=400, max_completion_tokens=16)
        self.models: dict[str, E2PModel] = {}
        for name, values in ADAPTERS.items():
            self.models[name] = build(self.backbone, data=data, users=NUMBERS, hidden_dim=64, **values)
            self.models[name].save_pretrained(folder / "runs" / name)
        vectors = np.stack([*STABLE.values(), NUMBERS[0]])
        write_embeddings(folder / "embeddings.parquet", [*STABLE, "u123"], vectors, version="v1")
        self._said: dict[tuple[str, str, bytes, int], str] = {}

    @property
    def words(self) -> list[str]:
        """Of the command line, but for store and engine."""
        return ["runs/taste", *self.settings]

    @property
    def settings(self) -> list[str]:
        """The same without the run."""
        more = [word for name in ADAPTERS if name != "taste" for word in ("--adapters", f"{name}=runs/{name}")]
        limits = ["--limits.running", "64", "--limits.waiting", "2000"]
        return [*more, *limits, "--hf.precision", "float32"]

    def store(self, name: str) -> str:
        """A new store of the users that do not change."""
        from e2p.cli import main

        address = name if "://" in name else str(self.folder / name)
        assert main(["users", "import", str(self.folder / "embeddings.parquet"), address, "--timestamp", "now"]) == 0
        return address

    def said(self, name: str, prompt: Any, vectors: Iterable[np.ndarray | None], max_tokens: int) -> list[str]:
        """Greedy answers of the model as training and evaluation have it, None for the null user."""
        model, asked = self.models[name], list(vectors)
        keys = [(name, repr(prompt), b"" if each is None else each.tobytes(), max_tokens) for each in asked]
        left = {key: vector for key, vector in zip(keys, asked, strict=True) if key not in self._said}
        if left:
            settings = {"max_new_tokens": max_tokens, "do_sample": False}
            texts = model.generate([prompt] * len(left), list(left.values()), **settings)
            self._said |= dict(zip(left, texts, strict=True))
        return [self._said[key] for key in keys]
