"""The bench against TRL runs, its sides do the same work, and bad input is refused. No time is asserted."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from e2p.bench.kto import OURS, SIDES, TRL, _Bench, bench
from e2p.bench.quiet import quiet
from e2p.bench.rounds import Setting
from e2p.data.batches import Examples
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.tasks.simulate import SimulationConfig, simulate
from e2p.training.trainer import E2PTrainer
from tiny import TEMPLATE, tiny_model, tiny_tokenizer
from tiny_run import write_tables


@pytest.fixture
def silence() -> Iterator[None]:
    """TRL warns of settings of its own."""
    with quiet():
        yield


AFTER_EOS = TEMPLATE.replace("eos_token }}", "eos_token + ' ' }}")  # TRL's completions go on behind the end of the turn


def checkpoint(folder: Path, template: str | None = TEMPLATE) -> str:
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return str(folder)


def labelled_tables(folder: Path) -> tuple[str, str]:
    """Plain prompts, 24 training examples, every second one not engaged."""
    examples, embeddings = write_tables(folder)
    table = pl.read_parquet(examples)
    table.with_columns(label=pl.int_range(pl.len()) % 2 == 0).write_parquet(examples)
    return examples, embeddings


@pytest.mark.slow
def test_all_sides_agree_and_the_last_line_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    result = bench(checkpoint(tmp_path / "lm"), output=str(output), batch_size=4, steps=2, rounds=1)
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert str(tmp_path) not in output.read_text()
    assert result["bench"] == "kto"
    assert {"commit", "command"} <= set(result["provenance"])
    assert {"trl", "peft", "torch"} <= set(result["provenance"]["versions"])
    (table,) = result["tables"]
    assert table["precision"] == "float32"
    assert table["loss"]["difference"] < 1e-4
    assert table["loss"]["baseline"] > 1e-3  # or the losses would agree without it too
    assert abs(table["loss"]["trl"] - 0.5) > 1e-3
    data = table["data"]
    assert (data["examples"], data["rendered_otherwise_by_trl"]) == (8, 0)
    assert 0 < data["engaged"] < 8
    assert set(table["sides"]) == set(SIDES)
    for name, side in table["sides"].items():
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == 1
        assert side["peak_mib"] >= 0
        assert len(side["reference_seconds"]) == len(side["reference_cpu_seconds"]) == (name != "trl")
    assert set(table["ratios"]) == {f"{side} to {base}" for side in OURS for base in TRL}
    assert {"min", "median", "max"} == set(table["ratios"]["before_bos to trl"]["speed"])


@pytest.mark.usefixtures("silence")
def test_all_sides_train_on_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and labels of what an epoch puts through the model, and ids of the mismatched pairs."""
    many = _Bench(Setting(checkpoint(tmp_path), *labelled_tables(tmp_path), 4, 3, 0, "sdpa"), tmp_path)
    trainers: dict[str, Any] = {side: many.trainer(side) for side in SIDES}
    assert many.rendered_otherwise == 0
    assert not any(trainers[side].args.gradient_checkpointing for side in TRL)
    seen: dict[str, Counter[Any]] = {side: Counter() for side in SIDES}
    for side in TRL:
        collate = trainers[side].data_collator

        def collated(items: list[dict[str, Any]], rows: Any = seen[side], collate: Any = collate) -> Any:
            for item in items:
                rows[*item["prompt_ids"], "own", *item["completion_ids"], item["label"]] += 1
                rows[*item["prompt_ids"], "other", *item["KL_completion_ids"]] += 1
            return collate(items)

        trainers[side].data_collator = collated
        trainers[side].train()
    real = Examples.batch
    monkeypatch.setattr(E2PTrainer, "mean_loss", lambda *_: 1.0)  # validation is no part of it
    for side in OURS:

        def batch(self: Examples, rows: Any, *drop: Any, completions: Any = None, side: str = side) -> Any:
            for at, row in enumerate(rows):
                prompt = self.tokens[int(row)].prompt.tolist()
                if completions is None:
                    completion = self.tokens[int(row)].completion.tolist()
                    seen[side][*prompt, "own", *completion, bool(many.inputs.labels[row])] += 1
                else:
                    seen[side][*prompt, "other", *self.tokens[int(completions[at])].completion.tolist()] += 1
            return real(self, rows, *drop, completions=completions)

        monkeypatch.setattr(Examples, "batch", batch)
        many.backbone.share_prompts = OURS[side][1]
        trainers[side].train()
    assert all(rows == seen["trl"] for rows in seen.values())
    assert sum(seen["trl"].values()) == 2 * 12
    assert len(seen["trl"]) > 12


@pytest.mark.usefixtures("silence")
def test_where_trl_renders_otherwise_it_trains_on_our_ids(tmp_path: Path) -> None:
    many = _Bench(Setting(checkpoint(tmp_path, AFTER_EOS), *labelled_tables(tmp_path), 4, 2, 0, "sdpa"), tmp_path)
    trainer: Any = many.trl_trainer("trl")
    assert many.describe()["rendered_otherwise_by_trl"] == 8
    for at, row in enumerate(many.rows):
        own, other = (many.inputs.tokens[int(which)] for which in (row, many.other[row]))
        item = trainer.train_dataset[at]
        assert (item["prompt_ids"], item["completion_ids"]) == (own.prompt.tolist(), own.completion.tolist())
        assert item["KL_completion_ids"] == other.completion.tolist()
        assert item["completion_ids"][-1] == many.encoder.tokenizer.eos_token_id


@pytest.mark.usefixtures("silence")
def test_plain_texts_go_to_trl_as_plain_texts(tmp_path: Path) -> None:
    tables = labelled_tables(tmp_path)
    many = _Bench(Setting(checkpoint(tmp_path, template=None), *tables, 4, 2, 0, "sdpa"), tmp_path)
    many.trl_trainer("trl")
    assert isinstance(many.texts[0]["prompt"], str)
    assert many.rendered_otherwise == 0


def test_the_simulated_table_answers_a_request_with_the_users_own_playlist_and_with_anothers() -> None:
    world = simulate(SimulationConfig(users=150, artists=150)).examples
    found = _Bench.simulated(world)
    assert found["example_id"].is_unique().all()
    assert found.filter("label").drop("label").equals(world)
    passed_over = found.filter(~pl.col("label"))
    assert 10 < len(passed_over) < len(world)
    for row in passed_over.iter_rows(named=True):
        (own,) = world.filter(pl.col("example_id") == row["example_id"].removesuffix("-no")).iter_rows(named=True)
        assert (own["messages"], own["user_id"]) == (row["messages"], row["user_id"])
        givers = world.filter((pl.col("completion") == row["completion"]) & (pl.col("user_id") != row["user_id"]))
        assert own["messages"] in givers["messages"].to_list()


def test_without_labels_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label: expected true or false in every example"):
        bench("nowhere", *write_tables(tmp_path), output=str(tmp_path / "bench.json"))
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize("name", ["batch_size", "steps", "rounds"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number >= 1, got 0"):
        bench("nowhere", **{name: 0})  # type: ignore[arg-type]


def test_a_batch_of_one_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="batch_size: expected at least 2, since kto's baseline z0"):
        bench("nowhere", batch_size=1)


@pytest.mark.parametrize("package", ["trl", "peft"])
def test_without_trl_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"e2p bench kto needs the package '{package}': .*e2p\[bench\]"):
        bench("nowhere")
