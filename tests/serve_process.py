"""`e2p serve` as a process of its own, on a free port, by the words of its command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MOST = 600  # seconds that it may live


class ServeProcess:
    """A server that can be killed and started again. It works in ``folder`` and writes its log there."""

    def __init__(self, folder: Path, *words: str, name: str = "serve") -> None:
        self.folder, self.words, self.log = folder, words, folder / f"{name}.log"
        self.base = ""
        self.process: subprocess.Popen[str] | None = None
        self._guard: threading.Timer | None = None

    def start(self) -> None:
        """Start, without waiting."""
        environment = {**os.environ, "E2P_KEYS": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "e2p.cli", "serve", *self.words, "--port", "0"]
        # A file, since hundreds of lines would fill a pipe that nobody reads, and hold the server up.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=self.folder
            )
        self._guard = threading.Timer(_MOST, self.process.kill)
        self._guard.daemon = True
        self._guard.start()

    def wait(self) -> str:
        """Until it answers; where it is."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()[-3000:]
        self.base = line.split("/v1 ")[0]
        return self.base

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """kill -9."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int | None:
        """Its exit code, if it was there."""
        process, self.process = self.process, None
        if process is None:
            return None
        assert self._guard is not None
        with process:
            process.send_signal(how)
            code = process.wait(60)
        self._guard.cancel()
        return code


@contextmanager
def serving_processes(*servers: ServeProcess) -> Iterator[None]:
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
