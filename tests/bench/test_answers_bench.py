"""The bench of answers runs, and its sides answer alike. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2p.bench.answers import PAIRS, SIDES, _Setting, _Sides, bench
from e2p.bench.quiet import quiet
from e2p.errors import ConfigError, DataError
from tiny import EOS, tiny_model, tiny_tokenizer
from tiny_run import write_tables


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose answers end now and then, and tables of twenty users."""
    folder = tmp_path_factory.mktemp("answers")
    model = tiny_model("llama")
    with torch.no_grad():  # a long row of the output layer: often the least likely token, and often the likeliest
        model.get_output_embeddings().weight[EOS] *= 4
    model.save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    write_tables(folder / "tables")
    return folder


def setting_of(place: Path, **changes: Any) -> _Setting:
    tables = [str(place / "tables" / f"{name}.parquet") for name in ("examples", "embeddings")]
    usual = {"prompts": 24, "max_new_tokens": 12, "tokens_per_pass": 100, "precision": "float32", "attn": "sdpa"}
    return _Setting(str(place / "backbone"), *tables, **{**usual, "seed": 3, **changes})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_last_line_is_the_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    sizes = {"prompts": 6, "max_new_tokens": 5, "tokens_per_pass": 500}
    result = bench(str(place / "backbone"), **sizes, rounds=2, output=str(output))
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert str(tmp_path) not in output.read_text()
    assert result["bench"] == "answers"
    assert result["tables"] == "simulated"
    assert {name: result[name] for name in sizes} == sizes
    assert {"commit", "command", "hardware"} <= set(result["provenance"])
    assert tuple(result["sides"]) == SIDES
    for side in result["sides"].values():
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == 2
        assert side["peak_mib"] >= 0
        assert side["same_answers"] == 1
    assert set(result["ratios"]) == {f"{side} to {base}" for side, base in PAIRS}
    assert result["data"]["users"] <= 6


def test_all_sides_answer_alike_and_with_the_calls_that_they_should_take(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        many = _Sides(setting_of(place), tmp_path)
        about = many.describe()
        calls: list[int] = []
        inner = many.backbone.model.forward

        def counted(*given: Any, **named: Any) -> Any:
            calls.append(len(named["inputs_embeds"] if named.get("inputs_embeds") is not None else named["input_ids"]))
            return inner(*given, **named)

        monkeypatch.setattr(many.backbone.model, "forward", counted)
        texts, seen = {}, {}
        for side in SIDES:
            calls.clear()
            texts[side], seen[side] = many.run(side), list(calls)
    assert texts["generate"] == texts["answer_to_the_end"] == texts["answer"]
    assert len(set(texts["answer"])) > 4
    assert 0 < about["cut_share"] < 1  # some end early, some do not
    assert about["mean_answer_tokens"] < about["longest_answer_tokens"] == 12
    assert set(seen["generate"]) == {1}
    assert len(seen["answer_to_the_end"]) == 12 * about["batches"]
    assert about["batches"] > 1
    assert len(seen["answer"]) < len(seen["answer_to_the_end"]) < len(seen["generate"])
    assert max(seen["answer"]) > 2


@pytest.mark.parametrize("name", ["prompts", "max_new_tokens", "tokens_per_pass", "rounds"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number >= 1, got 0"):
        bench("nowhere", **{name: 0})  # type: ignore[arg-type]


def test_one_table_alone_and_too_few_examples_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected both tables or neither, got one"):
        bench("nowhere", examples="examples.parquet")
    with quiet(), pytest.raises(DataError, match="expected 41 examples, got 40; ask for fewer"):
        _Sides(setting_of(place, prompts=41), tmp_path)
