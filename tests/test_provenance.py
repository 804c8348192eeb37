"""Provenance is complete, holds no path of the machine, loads nothing and never fails."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from e2p.provenance import hide_paths, provenance


def test_everything_is_there_and_is_json() -> None:
    found = json.loads(json.dumps(provenance("e2p evaluate runs/a")))
    assert found["command"] == "e2p evaluate runs/a"
    assert datetime.fromisoformat(found["created"]).utcoffset().total_seconds() == 0
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "numpy", "polars"} <= found["versions"].keys()
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["ram_gib"] > 0
    assert found["hardware"]["cpu"]


def test_running_command_is_shown_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/e2p", "train", "--output", "a run"])
    assert provenance()["command"] == "e2p train --output 'a run'"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/al/x/y.parquet", "x/y.parquet"),
        ("/home/al/My Stuff/q.csv", "My Stuff/q.csv"),
        ("/home/al", "~"),
        ("--data=/srv/deep/down/e.parquet", "--data=down/e.parquet"),
        ('["/Users/al/a/b","/x/y/z"]', '["a/b","y/z"]'),
        ("--set={x: /srv/q/w/e}", "--set={x: w/e}"),
        ("file:///home/al/q/w/e.csv", "file://w/e.csv"),
        ("s3://bucket/a/b.parquet", "s3://bucket/a/b.parquet"),
        ("http://localhost:80/v1", "http://localhost:80/v1"),
        ("../beside/x", "../beside/x"),
        ("runs/a", "runs/a"),
        ("12/3", "12/3"),
    ],
)
def test_paths_lose_the_machine(argument: str, shown: str) -> None:
    assert hide_paths(argument) == shown


def test_paths_become_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hide_paths(str(tmp_path / "data" / "e.parquet")) == "data/e.parquet"
    assert hide_paths(str(tmp_path)) == "."
    assert hide_paths("~/a/b/c") == "home/a/b/c"  # the home directory lies inside the working directory here
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert hide_paths("--a=~/x/y/z").endswith("/x/y/z")


def test_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    assert (provenance()["commit"], provenance()["dirty"]) == (None, False)  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").write_text("1")
    assert (provenance()["commit"], provenance()["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    assert provenance()["dirty"] is True


def test_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no such thing")

    monkeypatch.setattr("subprocess.run", broken)
    monkeypatch.setattr("e2p.provenance._cpu", broken)
    monkeypatch.setattr("e2p.provenance.metadata.version", broken)
    monkeypatch.setattr("e2p.provenance.os.sysconf", broken)
    found = provenance("an 'unbalanced quote")
    assert found["command"] is None
    assert found["commit"] is None
    assert found["hardware"]["cpu"] is None
    assert set(found["versions"]) == {"python"}


def test_loads_no_torch() -> None:
    code = "import sys; from e2p.provenance import provenance; provenance(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
