"""vLLM servers that all tests of this folder share, and whole servers of ours on each engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from docs_lines import words_of
from serve_process import ServeProcess, serving_processes
from tiny import TEMPLATE
from vllm_servers import SHARED, VLLMServer, running, with_template
from whole_app import App, World, write_checkpoint

# As the small backbone's own, but for an answer's turn, which begins as it does where one is to be written.
ALIKE = TEMPLATE.replace("'|> ' + m['content']", "('|>' if m['role'] == 'assistant' else '|> ') + m['content']")
FLAGS = ("--trust-request-chat-template",)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[dict[str, VLLMServer]]:
    """Of the small backbone and of the tiny one."""
    folder = tmp_path_factory.mktemp("servers")
    small = with_template(SHARED / "backbone", folder / "small", ALIKE)
    found = {
        name: VLLMServer(each, folder / f"{name}.log", FLAGS)
        for name, each in {"small": small, "tiny": checkpoint}.items()
    }
    with running(*found.values()):
        yield found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), checkpoint)


@pytest.fixture(scope="session")
def hf_app(world: World) -> Iterator[App]:
    """`e2p serve` with the engine in its process, started as the README says."""
    world.store("store")
    process = ServeProcess(world.folder, *words_of("e2p serve"), *world.settings, name="hf")
    with serving_processes(process):
        yield App(process)


@pytest.fixture(scope="session")
def vllm_app(world: World, servers: dict[str, VLLMServer]) -> Iterator[App]:
    """`e2p serve` before a vLLM server."""
    words = [*world.words, "--engine", "vllm", "--upstreams", servers["tiny"].address, "--vllm.connect_seconds", "30"]
    process = ServeProcess(world.folder, *words, "--store", world.store("vllm-store"), name="gateway")
    with serving_processes(process):
        yield App(process, servers["tiny"])
