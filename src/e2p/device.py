"""Which device a model is put on."""

from __future__ import annotations

import os

from e2p.errors import BackboneError


def resolve_device(name: str, key: str) -> str:
    """A device that is there: ``auto`` becomes a GPU if there is one (under torchrun each process's own), else cpu.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        key: what the setting is called, for the message.

    Raises:
        BackboneError: torch knows no such device, or it is not there.
    """
    import torch

    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that is built without that device
        reason = str(error).splitlines()[0]
        raise BackboneError(f"{key}: expected auto, cpu or a GPU that is there, got {name!r}: {reason}") from None
    return name
