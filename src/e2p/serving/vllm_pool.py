"""vLLM servers: who is there, who has least to do, and a look at each of them from time to time."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from e2p.config_serving import VLLMConfig
from e2p.errors import MissingExtraError
from e2p.model.token_table import TokenTable
from e2p.serving.engine import EngineBusyError, EngineError
from e2p.serving.vllm_probe import probe
from e2p.serving.vllm_wire import refusal

if TYPE_CHECKING:
    import aiohttp

_LOG = logging.getLogger("e2p")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds between two looks at a server that is away
_KEPT = 2.0  # seconds that a connection is kept for another request: vLLM ends those that were idle for 5
_LOOKS_AT_END = 100  # of 10 ms, that requests have to hear that their connections are gone
_START = 20.0  # seconds that a server which is silent is waited for in the beginning
FORMS = ("template", "turn")  # how soft tokens may travel in a chat; see vllm_chat


class Unreachable(EngineError):
    """No connection came about: the server has not been given the request."""


@dataclass(eq=False)
class Upstream:
    """A server.

    Args:
        address: where it is.
        reserve: asked only while no other can be.
        ready: whether it is given requests.
        reason: why not; for whoever asks, so without its address.
        model: the backbone's name there.
        window: longest prompt and answer there.
        tells: it tells embeddings apart in what it keeps of prompts.
        forms: ways of a chat that have not been found wrong there.
        running: requests that it is working on.
    """

    address: str
    reserve: bool
    ready: bool = False
    reason: str = "not looked at yet"
    model: str = ""
    window: int = 0
    tells: bool = False
    forms: set[str] = field(default_factory=set)
    running: int = 0
    turn: int = 0
    failures: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    looked: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While it works on a request."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Pool:
    """All servers. One event loop's.

    Args:
        addresses: of the servers.
        config: how they are asked.
        table: what a server must hold.
        key: for their API, or empty.
    """

    def __init__(self, addresses: Sequence[str], config: VLLMConfig, table: TokenTable, key: str = "") -> None:
        try:
            import aiohttp
        except ImportError:
            raise MissingExtraError("aiohttp", "vllm", "the engine vllm") from None
        self.config, self._table = config, table
        self.upstreams = [Upstream(address.rstrip("/"), False) for address in addresses]
        self.upstreams += [Upstream(address.rstrip("/"), True) for address in config.fallbacks]
        self._turn = 0
        self._watchers: list[asyncio.Task[None]] = []
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._timeouts = aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_seconds, sock_read=config.pause_seconds
        )
        self._client: aiohttp.ClientSession

    async def start(self) -> None:
        """Look at all servers, now and from then on. Returns when each has been looked at, or some time has passed."""
        import aiohttp

        # Proxies of the environment are for the world outside and not for servers next door.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT, socket_factory=self._socket),
            timeout=self._timeouts,
            headers=self._headers,
            trust_env=False,
        )
        self._watchers = [asyncio.create_task(self._watch(upstream)) for upstream in self.upstreams]
        looks = [asyncio.create_task(upstream.looked.wait()) for upstream in self.upstreams]
        if looks:
            _, late = await asyncio.wait(looks, timeout=_START)
            for look in late:
                look.cancel()

    async def stop(self) -> None:
        """Look no more, and close all connections: requests that still wait for a server fail."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for upstream in self.upstreams:
            upstream.ready, upstream.reason = False, "the engine stops"
        # The client's own close would leave who waits for more of an answer waiting for ever.
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for _ in range(_LOOKS_AT_END):
            if not self.running:
                break
            await asyncio.sleep(0.01)
        await self._client.close()

    def _socket(self, address: Any) -> socket.socket:
        family, kind, protocol, *_ = address
        made = socket.socket(family, kind, protocol)
        self._sockets.add(made)
        return made

    @property
    def running(self) -> int:
        """Requests that the servers are working on."""
        return sum(upstream.running for upstream in self.upstreams)

    def pick(self, without: Sequence[Upstream] = ()) -> Upstream:
        """The ready server that has least to do, in turn among equals.

        Raises:
            EngineError: none is ready.
        """
        ready = [upstream for upstream in self.upstreams if upstream.ready and upstream not in without]
        if not ready:
            reasons = sorted({upstream.reason for upstream in self.upstreams if upstream.reason})
            raise EngineError(
                f"expected a vLLM server that answers, got none of {len(self.upstreams)} "
                f"({'; '.join(reasons)}); try again, they are looked at by themselves"
            )
        found = min(ready, key=lambda upstream: (upstream.reserve, upstream.running, upstream.turn))
        self._turn += 1
        found.turn = self._turn
        return found

    def suspect(self, upstream: Upstream, reason: str) -> None:
        """It has failed: it is looked at now, and gets no requests before it is found good."""
        upstream.failures += 1
        self._away(upstream, reason)
        upstream.wake.set()

    @asynccontextmanager
    async def post(self, upstream: Upstream, route: str, body: bytes) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Events of a stream: their data, without the last one. Leaving it early ends the server's work too.

        Raises:
            Unreachable: there is no connection.
            RequestError: the server refuses this request.
            EngineBusyError: the server has too much to do.
            EngineError: it has failed, or is silent.
        """
        import aiohttp

        # As a file, since megabytes in one piece would hold up everyone else.
        content, headers = io.BytesIO(body), {"content-type": "application/json"}
        # So the loop hears of kept connections that the server has ended, and none of them is taken.
        for _ in range(2):
            await asyncio.sleep(0)
        try:
            async with self._client.post(upstream.address + route, data=content, headers=headers) as response:
                if response.status == 429:
                    raise EngineBusyError("the vLLM server has as many requests as it takes; try again later")
                if response.status != 200:
                    error = refusal(response.status, await response.read())
                    if isinstance(error, EngineError):
                        upstream.wake.set()
                    raise error
                yield _events(response.content)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.suspect(upstream, _reason(error))
            raise Unreachable(f"expected a vLLM server, got no connection ({_reason(error)})") from None
        except aiohttp.SocketTimeoutError:
            # Too much to do is no reason to be given nothing any more: its health decides.
            upstream.failures += 1
            upstream.wake.set()
            raise EngineError("expected a vLLM server to go on, got: silence; try again") from None
        except aiohttp.ClientError as error:
            self.suspect(upstream, _reason(error))
            raise EngineError(f"expected a vLLM server to go on, got: {_reason(error)}; try again") from None

    async def _watch(self, upstream: Upstream) -> None:
        pause = _FIRST_PAUSE
        while True:
            upstream.wake.clear()
            try:
                await self._look(upstream)
                pause = _FIRST_PAUSE
            except EngineError as error:
                self._away(upstream, str(error))
                pause = min(2 * pause, _LONGEST_PAUSE)
            except Exception as error:  # whatever it says, it is looked at again
                self._away(upstream, f"expected a vLLM server, got what is none ({type(error).__name__})")
                pause = min(2 * pause, _LONGEST_PAUSE)
            upstream.looked.set()
            # Not all gateways at the same moment.
            seconds = (self.config.check_seconds if upstream.ready else pause) * random.uniform(0.8, 1.2)
            try:
                async with asyncio.timeout(seconds):
                    await upstream.wake.wait()
            except TimeoutError:
                continue
            if not upstream.ready:  # what has just failed fails at once again
                await asyncio.sleep(_FIRST_PAUSE)

    async def _look(self, upstream: Upstream) -> None:
        await self._get(upstream, "/health")
        if upstream.ready:
            return
        try:
            models = json.loads(await self._get(upstream, "/v1/models"))["data"]
            names = {str(each["id"]): int(each.get("max_model_len") or 0) for each in models}
        except (ValueError, KeyError, TypeError):
            raise EngineError("expected a list of models from the vLLM server, got something else") from None
        name = self.config.model or (next(iter(names)) if len(names) == 1 else "")
        if name not in names:
            raise EngineError(
                f"vllm.model: expected the name of a model that the server serves ({', '.join(names)}), got "
                f"'{self.config.model}'; set it"
            )
        window = names[name] or self._table.window or 1024
        found = await probe(lambda body: self._ask(upstream, body), name, self._table, window)
        if not found.tells and self.config.cache == "prompts":
            _LOG.warning(
                "%s does not tell embeddings apart in what it keeps of prompts; users share nothing there",
                upstream.address,
            )
        upstream.model, upstream.window, upstream.tells = name, window, found.tells
        upstream.forms = set(FORMS)
        upstream.ready, upstream.reason = True, ""
        _LOG.info("%s: ready", upstream.address)

    async def _get(self, upstream: Upstream, route: str) -> bytes:
        import aiohttp

        seconds = self.config.connect_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return await self._whole("GET", upstream, route, timeout=timeout)

    async def _ask(self, upstream: Upstream, body: bytes) -> bytes:
        headers = {"content-type": "application/json"}
        return await self._whole("POST", upstream, "/v1/completions", data=io.BytesIO(body), headers=headers)

    async def _whole(self, method: str, upstream: Upstream, route: str, **options: Any) -> bytes:
        import aiohttp

        try:
            async with self._client.request(method, upstream.address + route, **options) as response:
                content = await response.read()
        except aiohttp.ClientError as error:
            raise EngineError(_reason(error)) from None
        if response.status != 200:
            refused = refusal(response.status, content)
            raise refused if isinstance(refused, EngineError) else EngineError(str(refused))
        return content

    def _away(self, upstream: Upstream, reason: str) -> None:
        if upstream.ready or upstream.reason != reason:
            _LOG.warning("%s: not asked for now: %s", upstream.address, reason)
        upstream.ready, upstream.reason = False, reason


def _reason(error: Exception) -> str:
    """A transport's complaint in a few words, without addresses."""
    names = {
        "ClientConnectorError": "connection refused",
        "ClientConnectorDNSError": "no such host",
        "ConnectionTimeoutError": "no connection in time",
        "SocketTimeoutError": "silence",
        "ClientOSError": "connection lost",
        "ClientPayloadError": "connection lost",
        "ServerDisconnectedError": "connection lost",
    }
    return names.get(type(error).__name__, type(error).__name__)


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """Data of server-sent events up to [DONE].

    Raises:
        EngineError: the stream ends before that.
    """
    rest, whole = b"", False
    async for part in content.iter_any():
        rest += part
        if b"\n\n" not in rest:
            continue
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                data = event[6:]
                if data == b"[DONE]":
                    whole = True  # and on to the end of the body, so that the connection can be used again
                else:
                    yield data
    if not whole:
        raise EngineError("expected a whole stream from the vLLM server, got one that was cut off; try again")
