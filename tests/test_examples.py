"""The example script runs as it stands, on a tiny backbone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tiny_run import write_backbone

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pipeline.py"


def test_the_pipeline_from_tables_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("E2P_CACHE", str(tmp_path / "cache"))
    main = runpy.run_path(str(SCRIPT))["main"]
    answer = main(
        write_backbone(tmp_path / "backbone", max_position_embeddings=1024), str(tmp_path / "run"), users=72, epochs=1
    )
    said = capsys.readouterr().out
    assert isinstance(answer, str)
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("true minus")] == [
        "true minus random",
        "true minus static",
    ]
    assert (tmp_path / "run" / "report.html").is_file()
