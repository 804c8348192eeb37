from __future__ import annotations

from pathlib import Path

import pytest

from e2p.errors import RunError
from e2p.tasks.output import staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_folder(target) as folder:
        (folder / "config.yaml").write_text("new")
        assert not target.exists()
    assert names(target) == ["config.yaml"]
    assert names(target.parent) == ["out"]


def test_a_failure_leaves_the_earlier_tables(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as folder:
        (folder / "config.yaml").write_text("old")
    with pytest.raises(FileNotFoundError), staged_folder(target, overwrite=True) as folder:
        (folder / "no such folder" / "config.yaml").write_text("new")
    assert (target / "config.yaml").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_overwriting_leaves_no_file_of_the_earlier_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("embeddings.parquet", "config.yaml"):
        with staged_folder(target, overwrite=True) as folder:
            (folder / name).write_text("x")
    assert names(target) == ["config.yaml"]


def test_only_prepared_tasks_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as folder:
        (folder / "config.yaml").write_text("old")
    with pytest.raises(RunError, match="add --overwrite"), staged_folder(target):
        pass
    (target / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"got 'thesis\.tex'"), staged_folder(target, overwrite=True):
        pass
    with pytest.raises(RunError, match="got a file"), staged_folder(target / "config.yaml", overwrite=True):
        pass
    assert names(target) == ["config.yaml", "thesis.tex"]
