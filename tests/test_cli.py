"""The command line as a user meets it: help, mistakes, settings from files and options, whole runs of every preset."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from e2p.cli import COMMANDS, _parse, main, usage
from e2p.config import RunConfig, TrainingConfig
from e2p.config_io import PRESETS, load_yaml, preset_path
from e2p.evaluation.evaluate import evaluate
from e2p.model.answer import generate
from e2p.training.run import train
from tiny_run import tiny_run, with_training, write_backbone, write_config, write_tables

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as exit_:  # --help
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def settings(*words: str) -> RunConfig:
    """What `e2p train` would be given."""
    return _parse("e2p train", train, list(words))["config"]


def installed(name: str) -> bool:
    return importlib.util.find_spec(COMMANDS[name].module) is not None


# ---------------------------------------------------------------- help and mistakes


def test_the_help_page_lists_every_command(run: Run) -> None:
    for words in ((), ("--help",), ("-h",)):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert out.strip() == usage()
        assert all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_from_its_docstring(name: str, run: Run) -> None:
    if not installed(name):
        pytest.skip(f"{COMMANDS[name].module} is not written yet")
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    function = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].function)
    assert function.__doc__
    assert f"usage: e2p {name}" in out
    words = " ".join(out.split())
    arguments = [
        line.strip()
        for line in function.__doc__.partition("Args:")[2].partition("Raises:")[0].splitlines()
        if ": " in line
    ]
    said = [line.partition(": ")[2].split(" ", 4)[:4] for line in arguments if not line.startswith("config:")]
    assert said
    assert all(" ".join(start) in words for start in said[:3])


def test_the_help_of_train_names_every_setting(run: Run) -> None:
    _, out, _ = run("train", "--help")
    for key in ("backbone.model", "data.split.fractions", "projector.null_prob", "training.learning_rate", "overwrite"):
        assert f"--{key}" in out
    assert "peak learning rate of AdamW" in " ".join(out.split())


def test_the_version_is_said(run: Run) -> None:
    import e2p

    assert run("--version") == (0, f"e2p {e2p.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "expected a command (demo, prepare table"),
        (["prepare"], "expected a command (prepare table, prepare personachat, prepare music, prepare nextitem, "),
        (["prepare", "nonsense"], "got 'prepare nonsense'"),
        (["evaluate"], "required: runs"),
        (["evaluate", "a", "b", "--seed", "1"], "unrecognized arguments: --seed=1"),
        (["evaluate", "a", "--seeds", "42,x"], "Expected a <class 'int'>. Got value: x"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["report", "nowhere"], "nowhere/results.json: not found; evaluate the run first"),
        (["evaluate", "nowhere"], "run e2p train first"),
        (["generate", "nowhere-at-all", "hello"], "nowhere-at-all"),
        (["demo", "--seed", "x"], "\"seed\": Expected a <class 'int'>. Got value: x"),
        (["train"], "data.examples: expected a table, got nothing"),
        (["train", "--training.learning_rat", "3"], "unrecognized arguments: --training.learning_rat=3"),
        (["generate", "x", "y", "--user", "007"], "unrecognized arguments: --user=007"),
        (["generate", "x", ""], "prompt: expected a text"),
        (["generate", "x", "y", "--users", "[]"], "users: expected at least one id"),
        (["generate", "x", "y", "--max_new_tokens", "0"], "max_new_tokens: expected a whole number >= 1"),
        (["generate", "x", "y", "--temperature", "-1"], "temperature: expected a number >= 0"),
        (["train", "nowhere.yaml"], "nowhere.yaml: expected a YAML with a run's settings, found no such file"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: expected a YAML"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--evaluation.arms", "[]"], "evaluation.arms: expected some of none, prompt"),
        (["train", "--evaluation.arms", "[e2p,none,e2p]"], "evaluation.arms: expected every arm once"),
        (["train", "--evaluation.samples", "-1"], "evaluation.samples: expected a whole number >= 0, got -1"),
        (["train", "--evaluation.max_new_tokens", "0"], "evaluation.max_new_tokens: expected a whole number >= 1"),
        (["train", "--preset", "nonsense"], "--preset: expected one of recommended, paper-full, paper-workshop"),
        (["train", "--preset"], "--preset: expected one of recommended"),
        (["train", "--training.nonsense", "1"], "unrecognized arguments: --training.nonsense=1"),
        (["train", "--training.learning_rate", "fast"], "training.learning_rate"),
        (["train", "--training.learning_rate", "-1"], "training.learning_rate: expected a number > 0, got -1.0"),
        (["train", "--training.epochs=0"], "training.epochs: expected a whole number >= 1, got 0"),
        (["train", "--data.split.fractions", "[0.5,0.5,0.5]"], "data.split.fractions: expected three shares"),
        (["train", "--projector.position", "middle"], "projector.position"),
        (["train", "--data.profile_template", "none"], "data.profile_template: expected a text that contains"),
        (["train", "--evaluation.arms", "[e2p,magic]"], "evaluation.arms: expected some of none, prompt"),
        (["train", "--resume", "--overwrite"], "choose one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("e2p: error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_an_interruption_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("e2p.evaluation.report.load_results", interrupted)
    assert run("report", "x") == (130, "", "\ninterrupted\n")


def test_a_programming_error_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("e2p.evaluation.report.load_results", broken)
    with pytest.raises(ZeroDivisionError):
        run("report", "x")


def test_the_installed_command_and_the_module_are_the_same() -> None:
    for command in ([sys.executable, "-m", "e2p.cli"], [str(Path(sys.executable).with_name("e2p"))]):
        done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith("e2p: error: expected a command")


# ---------------------------------------------------------------- settings from everywhere


def test_options_beat_yaml_beats_preset_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"training": {"epochs": 7, "batch_size": 3}, "output": "x"}), encoding="utf-8")
    orders = [
        ["--preset", "paper-full", str(file), "--training.batch_size", "9"],
        [str(file), "--training.batch_size", "9", "--preset", "paper-full"],
        ["--training.batch_size=9", "--preset=paper-full", f"--config={file}"],
        ["--overwrite", "--training.batch_size", "9", "--config", str(file), "--preset", "paper-full"],
        ["--training.batch_size", "9", "--preset", "paper-full", "--overwrite", str(file)],
    ]
    for words in orders:
        config = settings(*words)
        assert config.training.batch_size == 9
        assert config.training.epochs == 7
        assert config.training.learning_rate == 5e-6
        assert config.projector.norm == "paper"
        assert config.training.seed == TrainingConfig().seed
        assert config.output == "x"


def test_of_two_yamls_the_second_wins(tmp_path: Path) -> None:
    for name, epochs in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"training: {{epochs: {epochs}}}\n", encoding="utf-8")
    assert settings(str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")).training.epochs == 4


def test_switches_stand_bare_or_with_a_value() -> None:
    def overwrite(*words: str) -> Any:
        return _parse("e2p train", train, list(words))["overwrite"]

    assert overwrite("--overwrite") is True
    assert overwrite("--overwrite", "true") is True
    assert overwrite("--overwrite=false") is False
    assert overwrite("--overwrite", "--training.epochs", "2") is True
    assert overwrite() is False
    assert settings("--training.gradient_checkpointing").training.gradient_checkpointing is True
    assert settings("--training.gradient_checkpointing", "false").training.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("words", "users"),
    [
        (["--users", "u1"], ["u1"]),
        (["--users", "[u1,u2]"], ["u1", "u2"]),
        (["--users=[007, 8]"], ["007", "8"]),
        (["--users", "007"], ["007"]),
        (["--users", "null"], ["null"]),
        (["--users", "true", "--users=1e3"], ["true", "1e3"]),
        (["--users", "a,b"], ["a,b"]),
        (["--users", "u1", "--users", "u2"], ["u1", "u2"]),
        (["--users", '["a,b"]'], ["a,b"]),
        ([], None),
    ],
    ids=str,
)
def test_items_of_a_list_are_texts(words: list[str], users: list[str] | None) -> None:
    assert _parse("e2p generate", generate, ["run", "hello", *words])["users"] == users


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], (["a"], (), False)),
        (["a", "007", "--seeds", "42,43"], (["a", "007"], (42, 43), False)),
        (["--seeds=[42]", "a", "--allow_leaks", "b"], (["a", "b"], (42,), True)),
    ],
)
def test_several_runs_and_seeds(words: list[str], expected: tuple[list[str], tuple[int, ...], bool]) -> None:
    given = _parse("e2p evaluate", evaluate, words)
    assert (given["runs"], given["seeds"], given["allow_leaks"]) == expected


def test_the_arm_null_is_not_nothing() -> None:
    assert settings("--evaluation.arms", "[none, null,e2p]").evaluation.arms == ("none", "null", "e2p")
    assert settings("--evaluation.arms=['null']").evaluation.arms == ("null",)
    assert settings("--evaluation.arms", "null").evaluation.arms == ("null",)
    assert settings("--evaluation.arms", "none,e2p").evaluation.arms == ("none", "e2p")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rat: 1}", "does not accept option 'learning_rat'"),
        ("training: [", "cannot be read as YAML"),
        ("- a", "expected a mapping of settings, got list"),
        ("training: {epochs: many}", "training.epochs"),
        ("projector: {null_prob: 2}", "projector.null_prob: expected a number in [0, 1), got 2"),
    ],
)
def test_a_bad_yaml_is_named(text: str, message: str, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    code, _, err = run("train", str(file))
    assert code == 2
    assert err.startswith(f"e2p: error: {file}: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_resolved_settings_are_written_and_read_back(tmp_path: Path) -> None:
    config = settings("--preset", "recommended", "--data.split.fractions", "[0.6,0.2,0.2]", "--output", "y")
    path = Path(write_config(config, tmp_path / "c.yaml"))
    assert load_yaml(path) == config
    assert settings(str(path)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_nothing_that_does_not_exist(name: str) -> None:
    assert load_yaml(preset_path(name)) == settings("--preset", name)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables, a backbone and a cache for the runs below."""
    folder = tmp_path_factory.mktemp("runs")
    write_tables(folder / "tables")
    write_backbone(folder / "backbone")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_from_training_to_an_answer(preset: str, place: Path, run: Run) -> None:
    folder = place / preset
    words = [
        *("train", "--preset", preset, "--backbone.model", str(place / "backbone"), "--backbone.device", "cpu"),
        *("--data.examples", str(place / "tables/examples.parquet")),
        *("--data.embeddings", str(place / "tables/embeddings.parquet")),
        *("--data.cache_dir", str(place / "cache"), "--data.max_completion_tokens", "16"),
        *("--training.epochs", "2", "--evaluation.resamples", "100", "--evaluation.max_new_tokens", "4"),
        *("--output", str(folder)),
    ]
    code, out, err = run(*words)
    assert (code, out) == (0, "")
    assert f"next: e2p evaluate {folder}".replace(" ", "") in "".join(err.split())  # wrapped anywhere
    assert load_yaml(folder / "config.yaml").projector == load_yaml(preset_path(preset)).projector
    record = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert record["projector"]["norm"] == ("matched" if preset == "recommended" else "paper")

    code, out, _ = run("evaluate", str(folder))
    assert code == 0
    assert "true minus random" in out
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(results["arms"]) == (8 if preset == "recommended" else 7)  # the paper has no null user
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    code, out, _ = run("report", str(folder))
    assert (code, (folder / "report.html").read_bytes()) == (0, before)
    assert {p.name for p in folder.iterdir()} >= {"report.md", "figures", "scores.parquet", "controls"}

    code, out, _ = run("generate", str(folder), "make a playlist", "--users", "[u01,u02]", "--max_new_tokens", "4")
    assert code == 0
    assert all(name in out for name in ("no prefix", "u01", "u02"))
    code, out, _ = run("generate", str(folder / "adapter"), "make a playlist", "--max_new_tokens", "4")
    assert (code, "null user" in out) == (0, True)
    assert ("No null user was trained" in out) == (preset != "recommended")


@pytest.mark.slow
def test_a_run_is_kept_overwritten_or_resumed_as_asked(tmp_path: Path, run: Run) -> None:
    config = tiny_run(tmp_path, max_steps=2)
    file = write_config(config, tmp_path / "run.yaml")
    folder = Path(config.output)
    assert run("train", file)[0] == 0
    (folder / "report.md").write_text("mine", encoding="utf-8")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = run("train", file)
    assert code == 2
    assert f"{folder}: expected a new run folder, found one; pass --overwrite or another --output" in err
    code, _, err = run("train", file, "--resume", "--training.max_steps", "3")
    assert (code, "the settings differ" in err, "(training.max_steps)" in err) == (2, True, True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert run("train", file, "--resume")[0] == 0
    assert (folder / "report.md").exists()
    (folder / "note").write_text("mine", encoding="utf-8")
    code, _, err = run("train", file, "--overwrite")
    assert (code, "holds 'note', so it is no run folder" in err) == (2, True)
    (folder / "note").unlink()
    assert run("train", file, "--overwrite", "--training.max_steps", "3")[0] == 0
    assert not (folder / "report.md").exists()
    assert load_yaml(folder / "config.yaml") == with_training(config, max_steps=3)


@pytest.mark.slow
def test_generate_draws_by_seed_and_names_an_unknown_user(place: Path, tmp_path: Path, run: Run) -> None:
    config = tiny_run(tmp_path, max_steps=1)
    assert run("train", write_config(config, tmp_path / "run.yaml"))[0] == 0
    words = ["generate", config.output, "hello", "--users", "u01", "--temperature", "1.5", "--max_new_tokens", "8"]
    first, again, other = run(*words), run(*words), run(*words, "--seed", "7")
    assert first[0] == 0
    assert first[1] == again[1] != other[1]
    code, _, err = run("generate", config.output, "hello", "--users", "u99")
    assert (code, "expected a vector of user 'u99', found none" in err) == (2, True)
    code, _, err = run("generate", str(Path(config.output, "adapter")), "hello", "--users", "u01")
    assert (code, "name its --embeddings" in err) == (2, True)
    moved = place / "elsewhere.parquet"
    pl.read_parquet(config.data.embeddings).write_parquet(moved)
    words = ["generate", str(Path(config.output, "adapter")), "hello", "--users", "u01", "--embeddings", str(moved)]
    assert run(*words, "--max_new_tokens", "2")[0] == 0


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("task", ["music", "personachat"])
def test_a_public_data_set_from_its_files_to_results(task: str, shared: Path, tmp_path: Path, run: Run) -> None:
    source, limits = {
        "music": ("lastfm_2k", ["--per_user", "1"]),
        "personachat": ("persona_chat/train_self_original_no_cands.txt", ["--limit", "200"]),
    }[task]
    tables, folder = tmp_path / "tables", tmp_path / "run"
    assert run("prepare", task, str(shared / "data" / source), str(tables), *limits)[0] == 0
    code, _, err = run("prepare", task, str(shared / "data" / source), str(tables), *limits)
    assert (code, "add --overwrite or name another" in err) == (2, True)
    words = [
        *("train", str(tables / "config.yaml"), "--backbone.model", str(shared / "backbone")),
        *("--data.split.fractions", "[0.94,0.03,0.03]", "--data.cache_dir", str(tmp_path / "cache")),
        *("--training.max_steps", "6", "--training.batch_size", "16", "--training.learning_rate", "1e-2"),
        *("--evaluation.arms", "[none,prompt,static,random,null,e2p]", "--evaluation.max_new_tokens", "8"),
        *("--evaluation.resamples", "500", "--output", str(folder)),
    ]
    assert run(*words)[0] == 0
    assert run("evaluate", str(folder))[0] == 0
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    history = results["training"]["e2p"]["history"]
    assert len([entry for entry in history if "loss" in entry]) == 6
    validated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert validated[-1] < validated[0]  # six steps learn something; to beat no prefix takes more
    assert all(1 < arm["perplexity"] < 1000 for arm in results["arms"].values())
    assert results["arms"]["prompt"]["context_tokens"] > 10
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_what_users_and_models_say_is_no_markup(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, max_steps=1)
    vectors = pl.read_parquet(config.data.embeddings)
    odd = vectors.with_columns(user_id=pl.col("user_id").replace("u01", "[/b]null"))
    odd.write_parquet(config.data.embeddings)
    frame = pl.read_parquet(config.data.examples)
    frame.with_columns(user_id=pl.col("user_id").replace("u01", "[/b]null")).write_parquet(config.data.examples)
    assert run("train", write_config(config, tmp_path / "run.yaml"))[0] == 0
    monkeypatch.setattr("e2p.model.e2p.E2PModel.generate", lambda *_, **__: ["[red]jazz[/i]", ""])
    code, out, _ = run("generate", config.output, "say [/b] hi", "--users", '["[/b]null", "u02"]')
    assert code == 0
    assert all(text in out for text in ("say [/b] hi", "[/b]null", "[red]jazz[/i]", "(an empty answer)"))


def test_a_group_of_commands_explains_itself(run: Run) -> None:
    code, out, err = run("prepare", "--help")
    assert (code, err) == (0, "")
    tasks = [f"e2p prepare {task}" for task in ("table", "personachat", "music", "nextitem", "lamp", "news")]
    assert [line.split(":")[0] for line in out.splitlines()] == tasks
