"""The engine within this process: transformers on one machine, many users and several adapters in one batch.

Requests are answered together as they come (:mod:`e2p.serving.batching`), each as ``E2PModel.generate`` answers it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2p.config import BackboneConfig, Precision
from e2p.errors import ConfigError
from e2p.model.backbone import FrozenBackbone
from e2p.serving.batching import Told, Worker
from e2p.serving.calls import Call, Limits
from e2p.serving.engine import AdapterInfo, EngineError, Event, Finished, Request, RequestError
from e2p.serving.hf_requests import Served, Shelf

_FAILURES = 3  # requests that fail, and none that succeeds, before the engine says that it is not ready
_REST = 30.0  # seconds after the last of them: who is given nothing while he is not ready could never show that he is


class HFEngine:
    """Implements :class:`e2p.serving.engine.Engine`.

    Args:
        backbone: the language model's settings, or one that is loaded already; nobody else may use it meanwhile.
        adapters: folders of adapters, or of runs, by the names that requests call them.
        bare: name of the backbone without an adapter.
        limits: how much is done at once.
        precision: of the forward pass of a backbone that is loaded here.
    """

    def __init__(
        self,
        backbone: BackboneConfig | FrozenBackbone,
        adapters: Mapping[str, str | Path],
        *,
        bare: str = "backbone",
        limits: Limits | None = None,
        precision: Precision = "auto",
    ) -> None:
        if bare in adapters:
            raise ConfigError(f"adapters: expected names other than '{bare}', the bare backbone's; rename one of them")
        self.folders = dict(adapters)
        self.limits = limits or Limits()
        self._source, self._bare, self._precision = backbone, bare, precision
        self._served = Shelf()
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop
        # Prompts are tokenised one after the other, beside the model and beside the event loop.
        self._encoding = ThreadPoolExecutor(1, "e2p-encode")

    async def start(self) -> None:
        """Load backbone and adapters, and be ready.

        Raises:
            BackboneError: the backbone cannot be loaded.
            AdapterError: an adapter is broken, or of another backbone.
        """
        if self._worker is not None:
            raise EngineError("expected an engine that was never started, got one that was; make another")
        self._loop = asyncio.get_running_loop()
        worker = self._worker = Worker(self.limits, self._tell)

        def load() -> None:
            backbone = self._source
            if isinstance(backbone, BackboneConfig):
                backbone = FrozenBackbone.load(backbone, self._precision)
            served = Shelf()
            served[self._bare] = Served.bare(self._bare, backbone)
            for name, folder in self.folders.items():
                served[name] = Served.load(name, folder, backbone)
            self._served = served
            worker.own(backbone)

        try:
            await asyncio.wrap_future(worker.do(load))
        except BaseException:
            worker.give_up()
            raise

    async def stop(self, grace: float) -> None:
        """Finish what runs and what waits, for at most so many seconds; new requests get EngineError from now on."""
        self._encoding.shutdown(wait=False)
        worker = self._worker
        if worker is None:
            return
        worker.close()
        if not await asyncio.to_thread(worker.join, max(0.0, grace)):
            worker.give_up()
            await asyncio.to_thread(worker.join)

    def adapters(self) -> Sequence[AdapterInfo]:
        """What is served, the bare backbone first."""
        return [served.info for served in self._served.values()]

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer; see :meth:`e2p.serving.engine.Engine.generate`."""
        worker = self._ready()
        served = self._served.pick(request)
        call = await self._aside(lambda: served.call(request, self.limits))
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        call.listener = events
        worker.submit(call)
        left = request.sampling.n
        try:
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, Finished)
                yield event
        finally:
            worker.cancel(call)

    async def reload(self, name: str) -> AdapterInfo:
        """Load an adapter's folder anew, between two steps; requests that were made keep the old one.

        Raises:
            RequestError: there is no adapter of that name.
            AdapterError: it is broken; the old one stays.
        """
        worker = self._ready()
        if name not in self.folders:
            names = ", ".join(self.folders) or "none"
            raise RequestError(f"adapter: expected one that can be loaded anew ({names}), got '{name}'")
        old = self._served[name]
        new = await asyncio.wrap_future(worker.do(lambda: Served.load(name, self.folders[name], old.backbone)))
        self._served.renew(name, new)
        return new.info

    async def health(self) -> dict[str, Any]:
        """``ready``; what runs and waits; how much is and may be; counts since the start.

        ``batching``: ``joined`` where keys and values are kept, ``reread`` where every token reads its row anew.
        """
        worker = self._worker
        if worker is None or not self._served:
            return {"ready": False}
        rows = worker.running
        failing = worker.failures >= _FAILURES and time.monotonic() - worker.failed < _REST
        return {
            "ready": worker.alive and not failing,
            "batching": "joined" if worker.joined else "reread",
            "running": rows,
            "waiting": worker.waiting,
            "cache_tokens": rows * worker.longest,
            "most_running": self.limits.rows,
            "most_waiting": self.limits.waiting,
            "most_cache_tokens": self.limits.cache_tokens,
            **{name: worker.counts[name] for name in ("requests", "prompt_tokens", "completion_tokens", "steps")},
            "failures": worker.counts["failures"],
        }

    def _ready(self) -> Worker:
        if self._worker is None or not self._served:
            raise EngineError("expected an engine that has started, got one that has not; wait until it is ready")
        if not self._worker.alive:
            raise EngineError("expected an engine that runs, got one that is stopping or has stopped; ask another")
        return self._worker

    async def _aside(self, job: Callable[[], Call]) -> Call:
        try:
            future = self._loop.run_in_executor(self._encoding, job)
        except RuntimeError:  # it was shut down meanwhile
            raise EngineError("expected an engine that runs, got one that is stopping; ask another") from None
        return await future

    def _tell(self, told: Told) -> None:
        """From the worker's thread to the event loop, once for all that a step has to say."""
        try:
            self._loop.call_soon_threadsafe(_deliver, told)
        except RuntimeError:  # the loop is closed: nobody listens any more
            if self._worker is not None:
                self._worker.give_up()


def _deliver(told: Told) -> None:
    for call, event in told:
        call.listener.put_nowait(event)
