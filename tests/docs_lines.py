"""Lines of docs/serving.md and README.md, run as they are written there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.M | re.S)


_NAMES = ("ask", "vector", "users", "metrics", "readme")
CURL = dict(zip(_NAMES, [*blocks("bash curl"), *blocks("bash curl", README)], strict=True))


def words_of(start: str, page: str = README) -> list[str]:
    """Words of the command that begins so, behind that beginning."""
    (line,) = re.findall(rf"^{start} (.*)$", page, re.M)
    return shlex.split(line)


def run_curl(block: str, base: str) -> list[str]:
    """A block's commands, asking the server that is at ``base``; what each said."""
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    said = []
    for command in re.sub(r"\\\n\s*", "", block).strip().splitlines():
        here = command.replace("http://localhost:8000", base).replace("curl ", "curl --fail-with-body ", 1)
        assert base in here
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert '"error"' not in done.stdout
        assert done.stdout.startswith(("{", "data: ", "# HELP"))
        said.append(done.stdout)
    return said
