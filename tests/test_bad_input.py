"""Whatever a user hands in wrongly: one line that names the place, exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.cli import main
from e2p.config import RunConfig
from e2p.data.tables import write_embeddings
from tiny_run import examples_frame, tiny_run, write_backbone, write_config

USERS = [f"u{user:02d}" for user in range(20)]
Change = Callable[[RunConfig], Any]


def embeddings(config: RunConfig) -> pl.DataFrame:
    return pl.read_parquet(config.data.embeddings).with_columns(pl.col("embedding").arr.to_list())


def set_vector(config: RunConfig, user: str, vector: Any) -> None:
    rows = [vector if name == user else old for name, old in embeddings(config).select("user_id", "embedding").rows()]
    pl.DataFrame({"user_id": USERS, "embedding": rows}).write_parquet(config.data.embeddings)


def set_examples(config: RunConfig, **columns: Any) -> None:
    examples_frame().with_columns(**columns).write_parquet(config.data.examples)


def at_row(row: int, value: Any, column: str) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == row).then(pl.lit(value)).otherwise(pl.col(column))


def too_early(config: RunConfig) -> None:
    """Vectors from May, examples from June, one of them from April."""
    may = [datetime(2024, 5, 1, tzinfo=UTC)] * 20
    write_embeddings(config.data.embeddings, USERS, np.eye(4)[np.arange(20) % 4], may)
    times = pl.Series(["2024-06-01T00:00:00Z"] * 6 + ["2024-04-01T00:00:00Z"] + ["2024-06-01T00:00:00Z"] * 33)
    set_examples(config, timestamp=times)


CASES: dict[str, tuple[Change, list[str]]] = {
    "a vector of another length": (
        lambda c: set_vector(c, "u07", [1.0, 2.0]),
        ["embeddings.parquet: row 7 (user 'u07')", "expected an embedding of 4 numbers, got 2", "one dimension"],
    ),
    "NaN in a vector": (
        lambda c: set_vector(c, "u03", [0.0, float("nan"), 0.0, 0.0]),
        ["embeddings.parquet: row 3 (user 'u03')", "expected finite float32 numbers, got nan at 1", "mend or drop"],
    ),
    "infinity in a vector": (
        lambda c: set_vector(c, "u03", [0.0, 0.0, float("-inf"), 0.0]),
        ["row 3 (user 'u03')", "expected finite float32 numbers, got -inf at 2"],
    ),
    "no vector at all": (
        lambda c: set_vector(c, "u05", None),
        ["row 5 (user 'u05')", "expected an embedding of 4 numbers, got none"],
    ),
    "a user twice": (
        lambda c: pl.concat([embeddings(c), embeddings(c).slice(4, 1)]).write_parquet(c.data.embeddings),
        ["embeddings.parquet", "expected one row for user 'u04'", "got rows 4 and 20; keep one"],
    ),
    "an example twice": (
        lambda c: set_examples(c, example_id=at_row(9, "e0-0", "example_id")),
        ["examples.parquet", "expected one row for example 'e0-0'", "rows 0 and 9; keep one"],
    ),
    "a user without a vector": (
        lambda c: embeddings(c).filter(pl.col("user_id") != "u02").write_parquet(c.data.embeddings),
        ["examples.parquet: 2 of 40 examples", "row 4 (user 'u02'): the user has no vector", "data.missing_vector"],
    ),
    "a user without a name": (
        lambda c: set_examples(c, user_id=at_row(8, None, "user_id")),
        ["examples.parquet: row 8", "expected a user id, got none; fill user_id or drop the row"],
    ),
    "a vector that is newer than the example": (
        too_early,
        ["1 of 40 examples", "row 6 (user 'u03', 2024-04-01T00:00:00+00:00): the user's first vector is newer"],
    ),
    "an empty completion": (
        lambda c: set_examples(c, completion=at_row(11, "  ", "completion")),
        ["examples.parquet: row 11 (user 'u05')", "expected a completion with text, got", "drop the row"],
    ),
    "a prompt longer than the limit": (
        lambda c: set_examples(c, prompt=at_row(13, "the train home " * 40, "prompt")),
        ["examples.parquet: row 13 (user u06)", "expected a prompt of at most 64 tokens, got", "data.long_prompt"],
    ),
    "times without a zone": (
        lambda c: set_examples(c, timestamp=pl.lit("2024-06-01T00:00:00")),
        ["examples.parquet: row 0 (user 'u00')", "expected UTC, got no time zone", "with Z or an offset"],
    ),
    "naive times as a type": (
        lambda c: set_examples(c, timestamp=pl.datetime(2024, 6, 1)),
        ["examples.parquet: row 0", "expected UTC, got Datetime", "replace_time_zone('UTC')"],
    ),
    "an example without a time": (
        lambda c: [too_early(c), set_examples(c, timestamp=pl.lit(None, pl.Datetime("us", "UTC")))],
        ["row 0 (user 'u00')", "expected a timestamp for the point-in-time join, got none"],
    ),
    "a missing column": (
        lambda c: examples_frame().drop("completion").write_parquet(c.data.examples),
        ["examples.parquet", "expected a column 'completion', found: example_id, user_id", "add or rename it"],
    ),
    "no prompt": (
        lambda c: examples_frame().drop("prompt").write_parquet(c.data.examples),
        ["examples.parquet", "expected a column 'prompt' or 'messages'"],
    ),
    "no embedding column": (
        lambda c: embeddings(c).rename({"embedding": "vector"}).write_parquet(c.data.embeddings),
        ["embeddings.parquet", "expected a column 'embedding'", "vector"],
    ),
    "an empty table": (
        lambda c: examples_frame().clear().write_parquet(c.data.examples),
        ["examples.parquet", "the table is empty"],
    ),
    "a file that is no Parquet": (
        lambda c: Path(c.data.examples).write_bytes(b"not a table"),
        ["examples.parquet: cannot be read as Parquet", "check the file"],
    ),
    "a half-written table": (
        lambda c: Path(c.data.embeddings).write_bytes(Path(c.data.embeddings).read_bytes()[:200]),
        ["embeddings.parquet: cannot be read as Parquet", "check the file"],
    ),
    "no file": (
        lambda c: Path(c.data.embeddings).unlink(),
        ["embeddings.parquet: no file matches", "check the path"],
    ),
    "two versions": (
        lambda c: embeddings(c).with_columns(version=at_row(3, "v9", "version")).write_parquet(c.data.embeddings),
        ["embeddings.parquet: expected vectors of one version, got v1, v9"],
    ),
    "an unknown split": (
        lambda c: set_examples(c, split=at_row(2, "dev", "split")),
        ["row 2 (user 'u01')", "split: expected one of train, validation, test, got 'dev'"],
    ),
    "a user in two splits": (
        lambda c: set_examples(c, split=at_row(0, "test", "split")),
        ["group 'u00': expected one split, got test and train"],
    ),
    "no backbone": (
        lambda c: shutil.rmtree(c.backbone.model),
        ["backbone.model: expected a causal language model at"],
    ),
    "a half-written backbone": (
        lambda c: Path(c.backbone.model, "model.safetensors").write_bytes(b"\x08"),
        ["backbone.model: expected a causal language model at"],
    ),
    "no such device": (
        lambda c: None,
        ["backbone.device: expected auto, cpu or a GPU that is there, got 'abacus'"],
    ),
    "no tokenizer": (
        lambda c: [Path(c.backbone.model, f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")],
        ["backbone.model"],
    ),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line on stderr that says all of it."""
    capsys.readouterr()
    code = main(words)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("e2p: error: ")
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize("name", CASES)
def test_a_bad_table_stops_the_training_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, max_steps=1)
    change, expected = CASES[name]
    change(config)
    if name == "no such device":
        config = replace(config, backbone=replace(config.backbone, device="abacus"))
    yaml = write_config(config, tmp_path / "run.yaml")
    refused(["train", yaml], expected, capsys)
    assert not Path(config.output).exists()
    # An earlier run in its place survives, even where it was to be overwritten.
    Path(config.output).mkdir()
    shutil.copy(yaml, Path(config.output, "config.yaml"))
    Path(config.output, "scores.parquet").write_bytes(b"precious")
    before = tree(Path(config.output))
    refused(["train", yaml, "--overwrite"], expected, capsys)
    assert tree(Path(config.output)) == before


def test_a_completion_that_fills_the_window_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path)
    words = ["train", write_config(config, tmp_path / "run.yaml"), "--data.max_completion_tokens", "191"]
    refused(words, ["data.max_completion_tokens: 191 leaves no room for a prompt", "window of 192 tokens"], capsys)


def test_a_long_prompt_may_be_cut(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, max_steps=1)
    turns = [{"role": "user", "content": "the train home " * 30}, {"role": "user", "content": "hello"}]
    frame = examples_frame().drop("prompt").with_columns(messages=pl.Series([turns] * 40))
    frame.write_parquet(config.data.examples)
    words = ["train", write_config(config, tmp_path / "run.yaml"), "--data.long_prompt", "truncate"]
    assert main(words) == 0


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_run(tmp_path_factory.mktemp("trained"), max_steps=1)
    assert main(["train", write_config(config, Path(config.output + ".yaml"))]) == 0
    return config


@pytest.fixture
def run_folder(trained: RunConfig, tmp_path: Path) -> Path:
    """A copy of a trained run, to be spoilt."""
    return shutil.copytree(trained.output, tmp_path / "run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change_record(path: Path, **values: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | values), encoding="utf-8")


SPOILT: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut weights": (
        lambda a: cut(a / "adapter_model.safetensors"),
        ["adapter_model.safetensors: expected sha256", "the file is corrupt"],
    ),
    "cut statistics": (
        lambda a: cut(a / "embedding_stats.safetensors"),
        ["embedding_stats.safetensors: expected sha256", "the file is corrupt"],
    ),
    "weights not there": (
        lambda a: (a / "adapter_model.safetensors").unlink(),
        ["the adapter lacks adapter_model.safetensors", "not fully written or copied"],
    ),
    "a cut record": (lambda a: cut(a / "adapter_config.json"), ["adapter_config.json: expected JSON"]),
    "a later format": (
        lambda a: change_record(a / "adapter_config.json", format=9),
        ["adapter_config.json: expected adapter format 1, got 9"],
    ),
    "a record with a foreign key": (
        lambda a: change_record(a / "adapter_config.json", magic=1),
        ["adapter_config.json: has unknown magic"],
    ),
}


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_adapter_is_refused(
    name: str, command: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = SPOILT[name]
    spoil(run_folder / "adapter")
    before = tree(run_folder)
    refused([command, str(run_folder), *(["hello"] if command == "generate" else [])], expected, capsys)
    assert tree(run_folder) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 16}, "hidden_size 32 there, 16 here"),
        ({"seed": 5}, "other weights (the embedding tables differ by"),
    ],
)
def test_another_backbone_is_refused(
    changes: dict[str, int], expected: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_backbone(tmp_path / "other", **changes)
    refused(
        ["generate", str(run_folder), "hello", "--backbone", other], ["trained with the backbone", expected], capsys
    )


def test_vectors_of_another_length_are_refused_in_evaluation(
    trained: RunConfig, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two numbers where the adapter was trained with four."""
    write_embeddings(tmp_path / "short.parquet", USERS, np.ones((20, 2)), version="v1")
    data = replace(trained.data, embeddings=str(tmp_path / "short.parquet"))
    write_config(replace(trained, data=data, output=str(run_folder)), run_folder / "config.yaml")
    refused(["evaluate", str(run_folder)], ["expected", "4 numbers, got"], capsys)


@pytest.mark.parametrize("text", ["", "{", '{"format": 7}', "[1]"])
def test_results_that_cannot_be_read_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    refused(["report", str(tmp_path)], [f"{tmp_path / 'results.json'}: "], capsys)
    assert tree(tmp_path) == {"results.json": text.encode()}


@pytest.mark.parametrize("command", ["embed", "demo", "train"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    place = str(tmp_path / "file" / "out")
    if command == "embed":
        pl.DataFrame({"user_id": ["a"], "profile": ["likes jazz"]}).write_parquet(tmp_path / "texts.parquet")
        words = ["embed", str(tmp_path / "texts.parquet"), "an-encoder-that-is-never-loaded", f"{place}.parquet"]
    elif command == "demo":
        words = ["demo", "--output", place]
    else:
        words = ["train", write_config(replace(tiny_run(tmp_path), output=place), tmp_path / "run.yaml")]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Not a directory" in said or "File exists" in said
    assert "another" in said
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
