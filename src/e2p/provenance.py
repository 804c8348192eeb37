"""Where a number comes from: command, commit, hardware, versions, time. Written into every results file."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("e2p", "torch", "transformers", "accelerate", "safetensors", "polars", "numpy", "scipy")

# An absolute path inside an argument, after a start, a quote, a bracket, a comma, `=` or `file://`; not `s3://...`.
_PATH = re.compile(r"(?:(?<=file://)|(?<![\w.:/~-]))(?:~(?=/|$)|(?=/))(?:/[^\s,;:=\"'\[\]{}()]*)?")
_HOME = re.compile(r"^/(?:home|Users)/[^/]+|^/root(?=/|$)")


def provenance(command: str | None = None) -> dict[str, Any]:
    """What is needed to make a number again, as plain values for JSON. Never fails: what is unknown is None.

    No path of the machine is kept: absolute paths are shown relative to the working directory or, outside it,
    by their last two parts without the home directory.

    Args:
        command: the command to record; by default the one that is running.

    Returns:
        ``command``; ``commit`` and ``dirty`` (changes to tracked files) of the repository here;
        ``hardware`` (``system``, ``cpu``, ``cores``, ``ram_gib``, ``gpus``); ``versions`` by package;
        ``created`` (UTC, ISO 8601). GPUs are listed only if torch is loaded already: nothing is loaded here.
    """
    status = _or_none(lambda: _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no"))
    return {
        "command": _or_none(lambda: _command(command)),
        "commit": _or_none(lambda: _git("rev-parse", "HEAD")) or None,
        "dirty": None if status is None else bool(status),
        "hardware": {
            "system": _or_none(lambda: f"{platform.system()} {platform.machine()}"),
            "cpu": _or_none(_cpu),
            "cores": _or_none(_cores),
            "ram_gib": _or_none(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
            "gpus": _or_none(_gpus) or [],
        },
        "versions": {"python": platform.python_version()} | _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:  # a missing tool or file of the system must never cost a finished run its results
        return None


def _command(command: str | None) -> str:
    if command is not None:
        arguments = shlex.split(command)
    else:
        # A console script is known by its name; `python train.py` by the script's path.
        program = sys.argv[0] if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
        arguments = [program, *sys.argv[1:]]
    return shlex.join(hide_paths(argument) for argument in arguments)


def hide_paths(argument: str) -> str:
    """The argument with each absolute path in it made relative to the working directory or cut to its end."""
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={hide_paths(value)}"
    if argument.startswith(("/", "~/")) and not re.search(r"[,;:=]", argument):
        return _shorten(argument)  # as one path: it may hold spaces
    return _PATH.sub(lambda match: _shorten(match.group()), argument)


def _shorten(text: str) -> str:
    path = Path(os.path.normpath(os.path.expanduser(text)))
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    home = Path.home()
    inside = path.relative_to(home) if path.is_relative_to(home) and home != Path("/") else None
    rest = inside or Path(_HOME.sub("", str(path)))
    return "/".join([part for part in rest.parts if part != "/"][-2:]) or "~"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _versions() -> dict[str, str]:
    found = {package: _or_none(partial(metadata.version, package)) for package in PACKAGES}
    return {package: version for package, version in found.items() if version}
