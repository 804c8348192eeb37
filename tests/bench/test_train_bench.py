"""The training bench runs, both sides do the same work, and its last line is its file. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from e2p.bench.train import OURS, SIDES, bench
from e2p.errors import ConfigError, MissingExtraError
from tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_both_sides_agree_and_the_last_line_is_the_file(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    result = bench(checkpoint, output=str(output), batch_size=4, steps=2, rounds=1, vocabulary=2 * VOCABULARY)
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert str(tmp_path) not in output.read_text()
    assert [(t["vocabulary"], t["precision"]) for t in result["tables"]] == [
        (size, kind) for size in (VOCABULARY, 2 * VOCABULARY) for kind in ("float32", "bfloat16")
    ]
    for table in result["tables"]:
        # bfloat16 rounds what the two sides add up in different orders.
        assert table["loss"]["difference"] < {"float32": 1e-3, "bfloat16": 2e-2}[table["precision"]]
        assert table["loss"]["peft"] > 1
        assert table["data"]["examples"] == 8
        assert set(table["sides"]) == set(table["arithmetic"]) == set(SIDES)
        for side in table["sides"].values():
            assert len(side["seconds"]) == len(side["cpu_seconds"]) == 1
            assert side["peak_mib"] >= 0
        assert {f"{side} to peft" for side in OURS} < set(table["ratios"])


@pytest.mark.parametrize("name", ["batch_size", "steps", "rounds"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number >= 1, got 0"):
        bench("nowhere", **{name: 0})


def test_one_table_without_the_other_is_refused() -> None:
    with pytest.raises(ConfigError, match="both tables or neither"):
        bench("nowhere", examples="examples.parquet")


def test_without_peft_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"e2p\[peft\]"):
        bench("nowhere")
