"""Shared fixtures. Shapes in signatures are checked while tests run; `real_data` skips where the data are not."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from e2p.model.backbone import FrozenBackbone

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
install_import_hook(["e2p.model", "e2p.training"], "beartype.beartype")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("real_data"):
            item.add_marker(pytest.mark.skip(reason="the public data sets are not beside the project"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As in the processes that tests start: sums in another order differ in their last bits, and some tests allow none.

    Tiny models gain nothing from threads.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def shared() -> Path:
    """Folder with the public data sets and the small backbone (tests marked real_data only)."""
    return SHARED


@cache
def _tiny_backbone(family: str) -> FrozenBackbone:
    from tiny import tiny_backbone

    return tiny_backbone(family)


@pytest.fixture(
    scope="session",
    params=["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "opt"],
)
def backbone(request: pytest.FixtureRequest) -> FrozenBackbone:
    """A tiny random backbone of each family, shared by all tests: leave it as it is."""
    return _tiny_backbone(request.param)


@pytest.fixture(scope="session")
def llama() -> FrozenBackbone:
    """The tiny random Llama, shared by all tests: leave it as it is."""
    return _tiny_backbone("llama")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with <|bos|>, <|eos|>, <|pad|>, turns and a chat template."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """The same without a chat template."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer(template=None)
