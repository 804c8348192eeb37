"""Servers that a bench starts as processes of their own, and what such a process takes: processor, memory, files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from e2p.errors import E2PError

_PROC = Path("/proc")
_LONGEST = 7200  # seconds that a server may live


class Started(NamedTuple):
    """A server's address, and the process that it began as."""

    address: str
    pid: int


class Held(NamedTuple):
    """What a process holds: memory in MiB, all and without pages of files, open file descriptors, threads."""

    resident_mib: float
    anonymous_mib: float
    descriptors: int
    threads: int


def held(pid: int | str) -> Held | None:
    """Of one process, or None where the system does not tell, or there is no such process."""
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        whole, anonymous = (round(int(values[name].split()[0]) / 1024, 1) for name in ("VmRSS", "RssAnon"))
        return Held(whole, anonymous, len(os.listdir(_PROC / str(pid) / "fd")), int(values["Threads"]))
    except (OSError, KeyError, ValueError):
        return None


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and of all that descend from it, so far; None where the system does not tell."""
    parents: dict[int, int] = {}
    took: dict[int, float] = {}
    try:
        for folder in _PROC.iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # it has just ended
                    values = (folder / "stat").read_text().rpartition(")")[2].split()
                    parents[int(folder.name)] = int(values[1])
                    took[int(folder.name)] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
    family = {pid}
    while more := {each for each, parent in parents.items() if parent in family} - family:
        family |= more
    return round(sum(took.get(each, 0.0) for each in family), 3) if pid in took else None


@contextmanager
def e2p_serve(*options: str) -> Iterator[Started]:
    """An `e2p serve` process on a free port of this machine; its address ends in /v1.

    Raises:
        E2PError: it ends before it serves.
    """
    words = [sys.executable, "-m", "e2p.cli", "serve", "--port", "0", *options]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
        _ended(process),
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise E2PError(f"expected a server from e2p serve {' '.join(options)}, got exit code {process.wait()}")
        yield Started(line.split(" ")[0], process.pid)


@contextmanager
def vllm_serve(
    python: str, folder: str | Path, dtype: str, log: Path, threads: int = 1, seconds: float = 900
) -> Iterator[Started]:
    """A vLLM server on a free port of this machine, with prompt embeddings.

    Args:
        python: interpreter of the environment that vLLM is installed in.
        folder: checkpoint.
        dtype: that it computes in.
        log: file for what it says.
        threads: that it computes with, where it runs on processors; those beyond them are the gateway's.
        seconds: to be there.

    Raises:
        E2PError: there is no such interpreter, or no server comes.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = shutil.which(python)
    if found is None:
        raise E2PError(f"expected a Python interpreter at {python}, got none; name the one that vLLM is installed for")
    model = os.path.abspath(folder) if os.path.isdir(folder) else str(folder)
    words = [os.path.abspath(found), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager", "--enable-prompt-embeds"]
    words += ["--served-model-name", "backbone", "--block-size", "32", "--max-num-seqs", "64"]
    more = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",  # a compiler's minute at the first request
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("ab") as file, _process(words, {**os.environ, **more}, file, log.parent) as process:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > end:
                said = " ".join(log.read_text(errors="replace").split())[-600:]
                raise E2PError(f"expected a vLLM server from {python}, got none; it said: {said}")
            time.sleep(0.5)
        yield Started(address, process.pid)


@contextmanager
def _process(
    words: Sequence[str], environment: Mapping[str, str], log: object, folder: Path
) -> Iterator[subprocess.Popen[str]]:
    with (
        subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,
            text=True,  # type: ignore[call-overload]
        ) as process,
        _ended(process, group=True),
    ):
        yield process


@contextmanager
def _ended(process: subprocess.Popen[str], group: bool = False) -> Iterator[None]:
    """It ends with the block, or when it has lived too long; with all that it has started, where it leads a group."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()

    guard = threading.Timer(_LONGEST, kill)
    guard.daemon = True
    guard.start()
    try:
        yield
    finally:
        guard.cancel()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            kill()
        if group:
            kill()  # what it had started and has outlived it
        process.wait()


def _answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
