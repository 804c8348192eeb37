"""Embedding-to-Prefix: one soft token makes a frozen language model personal.

Names are loaded on first use, so that ``import e2p`` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from e2p.config import RunConfig as RunConfig
    from e2p.errors import E2PError as E2PError
    from e2p.model.backbone import FrozenBackbone as FrozenBackbone
    from e2p.model.e2p import E2PModel as E2PModel
    from e2p.model.projector import PrefixProjector as PrefixProjector
    from e2p.training.trainer import E2PTrainer as E2PTrainer

_DOORS = {
    "RunConfig": "e2p.config",
    "E2PError": "e2p.errors",
    "FrozenBackbone": "e2p.model.backbone",
    "E2PModel": "e2p.model.e2p",
    "PrefixProjector": "e2p.model.projector",
    "E2PTrainer": "e2p.training.trainer",
}

__all__ = [
    "E2PError",
    "E2PModel",
    "E2PTrainer",
    "FrozenBackbone",
    "PrefixProjector",
    "RunConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'e2p' has no attribute '{name}'; it offers {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
    return __all__
