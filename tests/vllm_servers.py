"""Real vLLM servers on this machine's processors, on free ports of it; they end with the tests, or by themselves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Real servers take a while to start, so they run where they are asked for.
ASKED = bool(os.environ.get("E2P_TEST_VLLM")) and PYTHON.exists()
MARKS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.real_data,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not ASKED, reason="needs real vLLM servers: make test-vllm"),
]
_SECONDS = 900  # to be there, on a machine that has much else to do
_MOST = 3000  # seconds that a server may live


@dataclass
class VLLMServer:
    """A server that can be killed and started again at the same address."""

    folder: Path
    log: Path
    flags: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, without waiting."""
        self.port = self.port or free_port()
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_COMPILE_DISABLE": "1",  # a compiler's minute at the first request
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        words = ["timeout", str(_MOST), str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", str(self.folder), "--served-model-name", "backbone", "--host", "127.0.0.1"]
        words += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--enable-prompt-embeds"]
        words += ["--block-size", "32", "--max-num-seqs", "64", *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        """kill -9, all its processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def metric(self, name: str) -> float:
        """A counter's sum."""
        lines = httpx.get(f"{self.address}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Relay:
    """A way to a server that can be cut and mended: to its clients, it is gone, though it need not start again."""

    def __init__(self, to: int) -> None:
        self.to, self.port, self.taken = to, free_port(), 0
        self._open: list[socket.socket] = []
        self.mend()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """Take connections."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self._open.append(listener)
        threading.Thread(target=self._take, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _take(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                try:
                    there = socket.create_connection(("127.0.0.1", self.to))
                except OSError:  # it is not there itself
                    here.close()
                    continue
                self.taken += 1
                self._open += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                target.sendall(part)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running(*servers: VLLMServer) -> Iterator[None]:
    """Servers that come up side by side, and are gone in the end."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.kill()


def with_template(source: Path, folder: Path, template: str) -> Path:
    """A copy of a checkpoint with another chat template."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in ("chat_template.jinja", "README.md"):
            (folder / file.name).write_bytes(file.read_bytes())
    settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
