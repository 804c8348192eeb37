"""`e2p serve`: adapters on one backbone behind OpenAI's API, personal by the vectors of a store."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2p.config import BackboneConfig
from e2p.config_io import load_yaml
from e2p.config_serving import ServingConfig, is_loopback
from e2p.errors import ConfigError
from e2p.serving.engine import Engine
from e2p.users.store import VectorStore, open_store

if TYPE_CHECKING:
    from e2p.serving.http.auth import Key


def serve(config: ServingConfig, run: str = "", playground: bool = False) -> None:
    """Serve adapters by OpenAI's API: ``user`` in a request picks the vector that makes the answer personal.

    It listens on this machine alone unless --host says otherwise, which needs keys. SIGTERM and ctrl-c finish what
    runs.

    Args:
        config: every setting.
        run: run folder, or folder of an adapter alone; requests call it by the folder's name.
        playground: also a page under /playground, to ask the same question for different users side by side.

    Raises:
        ConfigError: a setting is wrong, the port is taken, or keys are missing where they are needed.
        E2PError: backbone, adapter or store cannot be opened.
        MissingExtraError: the extra serve, or playground, is not installed.
    """
    folders = config.folders(run)
    make = vllm_engine if config.engine == "vllm" else hf_engine
    serve_engine(lambda: make(config, folders), config, folders if playground else None)


def serve_engine(
    make: Callable[[], Engine], config: ServingConfig, playground: Mapping[str, str] | None = None
) -> None:
    """The same for any engine, made when keys, port and store have been found good. Returns on SIGTERM.

    With ``playground``, a mapping of adapters to their runs' folders, there is also the page.
    """
    from e2p.serving.http.auth import read_keys
    from e2p.serving.playground import require_playground

    keys = read_keys(config)
    if playground is not None:
        require_playground(config, keys)
    listener = listen(config.host, config.port)
    try:
        store = open_store(config.store) if config.store else None
        try:
            with _terminated():
                asyncio.run(_run(config, make(), store, keys, listener, playground))
        finally:
            if store is not None:
                store.close()
    finally:
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that has the port, though nobody is answered yet. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows that it may switch Nagle's algorithm off, which would cost 40 ms an answer.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host.strip("[]"), port))
    except OSError as error:
        found.close()
        raise ConfigError(f"port: {host}:{port} cannot be had: {error.strerror or error}; choose another") from None
    return found


def hf_engine(config: ServingConfig, folders: dict[str, str]) -> Engine:
    """The engine in this process."""
    from e2p.serving.calls import Limits
    from e2p.serving.hf_engine import HFEngine

    limits = Limits(config.hf.rows, config.hf.cache_tokens, config.hf.prefill_tokens)
    backbone = backbone_of(next(iter(folders.values())), config.backbone)
    return HFEngine(backbone, folders, limits=limits, precision=config.hf.precision)


def vllm_engine(config: ServingConfig, folders: dict[str, str]) -> Engine:
    """vLLM servers that hold the backbone."""
    from e2p.serving.vllm_engine import VLLMEngine

    backbone = backbone_of(next(iter(folders.values())), config.backbone)
    key = os.environ.get("E2P_VLLM_KEY", "")
    return VLLMEngine(backbone, folders, config.upstreams, config.vllm, key=key)


def backbone_of(folder: str, asked: BackboneConfig) -> BackboneConfig:
    """The backbone of a run or adapter, with what was asked for in place of what it says.

    Raises:
        AdapterError: the folder holds no adapter.
    """
    from e2p.model.adapter import CONFIG, read_adapter

    path = Path(folder).expanduser()
    inner = path / "adapter" if (path / "adapter" / CONFIG).is_file() else path
    record, _, _ = read_adapter(inner)
    source, trained = record["backbone"]["source"], ("revision", "lora", "quantization")
    base = BackboneConfig(model=source, **{key: record["backbone"][key] for key in trained})
    for config in (path / "config.yaml", path.parent / "config.yaml"):
        if config.is_file() and inner.parent == config.parent:
            base = load_yaml(config).backbone
    if asked.model:
        base = dataclasses.replace(base, revision=None)
    default = BackboneConfig()
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    return dataclasses.replace(base, **{k: v for k, v in values.items() if v != getattr(default, k)})


async def _run(
    config: ServingConfig,
    engine: Engine,
    store: VectorStore | None,
    keys: tuple[Key, ...],
    listener: socket.socket,
    playground: Mapping[str, str] | None,
) -> None:
    import uvicorn

    from e2p.serving.http.app import create_app
    from e2p.serving.playground import add_playground

    await engine.start()
    _require_dimension(engine, store)
    app = create_app(engine, store, config, keys)
    if playground is not None:
        add_playground(app, playground)
    options: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False, "lifespan": "on"}
    options |= {"ws": "none", "http": "h11"}  # httptools, taken where it is installed, has no bound on headers
    # uvicorn waits for running requests first; only then does the application stop the engine.
    grace = max(1, round(config.grace_seconds))
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
    # What is loaded by now stays: to look all through it for garbage would hold up everyone for a quarter of a second.
    gc.collect()
    gc.freeze()
    listener.listen(2048)  # as uvicorn will; who reads the line may connect at once
    _say(config, engine, store, bool(keys), listener.getsockname()[1], playground is not None)
    await server.serve(sockets=[listener])


def _require_dimension(engine: Engine, store: VectorStore | None) -> None:
    held = None if store is None else store.dim
    taken = sorted({info.dimension for info in engine.adapters() if info.dimension})
    if store is not None and held is not None and held not in taken:
        expected = " or ".join(map(str, taken)) or "no"
        raise ConfigError(
            f"store: expected vectors of {expected} numbers, which the adapters take, got {held} in {store.address}"
        )


def _say(
    config: ServingConfig, engine: Engine, store: VectorStore | None, keys: bool, port: int, playground: bool
) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    names = ", ".join(info.name for info in engine.adapters())
    users = "no store" if store is None else f"{store.address}: {store.count():,} users"
    open_to = "everyone on this machine" if is_loopback(config.host) else "everyone who reaches it"
    print(f"http://{host}:{port}/v1 serves {names}; {users}; for {'keys' if keys else open_to}", flush=True)
    if playground:
        print(f"http://{host}:{port}/playground/ asks for several users side by side", flush=True)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the process in order; and the log goes to stderr, one line of JSON for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("e2p")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def stop(*_: object) -> None:
        raise SystemExit(0)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        log.removeHandler(handler)
        log.setLevel(level)
