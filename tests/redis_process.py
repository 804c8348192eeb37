"""A real redis-server for tests, on a free port of this machine, started and ended by its process."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

BINARY = shutil.which("redis-server")


class RedisProcess:
    """A server in a folder. With ``persistent`` it writes every change to disk before it answers."""

    def __init__(self, folder: Path, persistent: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.persistent = folder, persistent
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def address(self, prefix: str) -> str:
        return f"redis://127.0.0.1:{self.port}/0?prefix={prefix}"

    def start(self) -> None:
        words = [str(BINARY), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        words += ["--appendonly", "yes" if self.persistent else "no", "--appendfsync", "always"]
        words += ["--unixsocket", str(self.folder / "redis.sock")]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as there:
                there.sendall(b"PING\r\n")
                if there.recv(16).startswith(b"+PONG"):
                    return
            time.sleep(0.025)
        raise AssertionError("redis-server did not start")

    def stop(self, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait()
            self.process = None
