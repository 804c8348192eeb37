"""A server's settings: defaults, YAML, the command line, and mistakes told by their key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2p.cli import _parse, main
from e2p.config_io import to_dict
from e2p.config_serving import (
    EngineConfig,
    LimitsConfig,
    PoliciesConfig,
    ServingConfig,
    is_loopback,
    load_serving,
    name_of,
    serving_from_dict,
)
from e2p.errors import ConfigError
from e2p.serving.serve import serve


def settings(*words: str) -> tuple[ServingConfig, str]:
    """What `e2p serve` would be given."""
    found = _parse("e2p serve", serve, list(words))
    return found["config"], found["run"]


def test_settings_go_out_and_come_back(tmp_path: Path) -> None:
    config = ServingConfig(
        adapters=["a=runs/a", "b=runs/b"],
        store="redis://localhost/0",
        port=9,
        limits=LimitsConfig(n=3, seconds=1.5),
        policies=PoliciesConfig(unknown_user="none", max_age_seconds=60, old_vector="error"),
        hf=EngineConfig(rows=2),
    )
    path = tmp_path / "serving.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert load_serving(path) == config
    assert settings(str(path)) == (config, "")


def test_vllms_servers_are_named_one_by_one() -> None:
    config, run = settings(
        *("runs/taste", "--engine", "vllm", "--upstreams", "http://a:1", "--upstreams", "https://b/x"),
        *("--vllm.cache", "users"),
    )
    assert (run, config.engine, config.upstreams) == ("runs/taste", "vllm", ["http://a:1", "https://b/x"])
    assert config.vllm.cache == "users"
    yaml_text = "engine: vllm\nupstreams: [http://a:1]\nvllm: {fallbacks: [http://c:1], attempts: 3}\n"
    read = serving_from_dict(yaml.safe_load(yaml_text))
    assert (read.vllm.fallbacks, read.vllm.attempts) == (["http://c:1"], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: vllm", "upstreams: expected the address of a vLLM server with --engine vllm, got []"),
        ("upstreams: [http://a:1]", "upstreams: expected none without --engine vllm, got ['http://a:1']"),
        ("{engine: vllm, upstreams: [a:1]}", "upstreams: expected an address such as http://10.0.0.5:8000, got 'a:1'"),
        ("{engine: vllm, upstreams: ['http://u:p@a']}", "upstreams: expected an address"),
        ("vllm: {attempts: 0}", "vllm.attempts: expected a whole number >= 1, got 0"),
        ("vllm: {fallbacks: [x]}", "vllm.fallbacks: expected an address"),
        ("vllm: {pause_seconds: 0}", "vllm.pause_seconds: expected a number > 0, got 0"),
    ],
)
def test_mistakes_about_vllm_are_told(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serving_from_dict(yaml.safe_load(text))
    assert message in str(caught.value)


def test_a_yaml_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text(
        "adapters: {taste: runs/taste, mood: runs/mood}\nstore: store/\nbackbone: {dtype: bfloat16}\n"
        "policies: {unknown_user: null, no_user: none, max_age_seconds: null, old_vector: null}\nlimits: {n: 2}\n",
        encoding="utf-8",
    )
    config = load_serving(path)
    assert config.folders() == {"taste": "runs/taste", "mood": "runs/mood"}
    assert (config.policies.unknown_user, config.policies.old_vector) == ("null", "null")
    assert (config.policies.no_user, config.policies.max_age_seconds) == ("none", None)
    assert (config.limits.n, config.backbone.dtype, config.backbone.model) == (2, "bfloat16", "")


def test_options_come_after_a_yaml(tmp_path: Path) -> None:
    path = tmp_path / "serving.yml"
    path.write_text("store: a/\nport: 1\nlimits: {n: 2, running: 3}\n", encoding="utf-8")
    for words in ((str(path), "--port", "5", "--limits.n=7"), ("--port=5", "--limits.n", "7", str(path))):
        config, _ = settings("runs/taste", *words)
        assert (config.store, config.port, config.limits.n, config.limits.running) == ("a/", 5, 7, 3)
    config, run = settings("runs/taste", "--adapters", "[a=x,b=y]", "--insecure", "--policies.unknown_user", "null")
    assert config.folders(run) == {"taste": "runs/taste", "a": "x", "b": "y"}
    assert (config.insecure, config.policies.unknown_user) == (True, "null")
    assert settings("--adapters", "a=x", "--adapters=b=y")[0].folders() == {"a": "x", "b": "y"}


def test_a_run_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run, name in (
        ("runs/taste", "taste"),
        ("runs/taste/", "taste"),
        ("runs/taste/adapter", "taste"),
        ("runs/taste/adapter/", "taste"),
        ("my run é", "my-run--"),
        ("/", "adapter"),
    ):
        assert name_of(run) == name
    with pytest.raises(ConfigError, match="another name than the run's 'a'"):
        ServingConfig(adapters=["a=x"]).folders("runs/a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: 1", "nonsense"),
        ("limits: {nonsense: 1}", "nonsense"),
        ("limits: {n: many}", "limits.n"),
        ("limits: {n: 0}", "limits.n: expected a number >= 1, got 0"),
        ("limits: {seconds: 0}", "limits.seconds: expected a number > 0, got 0"),
        ("limits: {waiting: -1}", "limits.waiting: expected a number >= 0, got -1"),
        ("limits: {default_max_tokens: 5000}", "limits.default_max_tokens: expected at most limits.max_tokens 2048"),
        ("limits: {n: null}", "limits.n: expected a value, got nothing"),
        ("policies: {unknown_user: use}", "policies.unknown_user"),
        ("policies: {max_age_seconds: 0}", "policies.max_age_seconds: expected a number > 0, got 0"),
        ("hf: {rows: 0}", "hf.rows: expected a whole number >= 1, got 0"),
        ("port: 70000", "port: expected a number from 0 to 65535, got 70000"),
        ("host: ''", "host: expected an address such as 127.0.0.1"),
        ("grace_seconds: -1", "grace_seconds: expected a number >= 0"),
        ("adapters: [runs/a]", "adapters: expected name=folder"),
        ("adapters: {'a b': runs/a}", "adapters: expected name=folder"),
        ("adapters: [a=x, a=y]", "adapters: expected every name once"),
        ("backbone: {dtype: int3}", "backbone.dtype"),
        ("- a", "expected a mapping of settings, got list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_setting_is_told_with_its_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_serving(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run: expected a run folder, an adapter's folder or --adapters name=folder, got nothing"),
        (["nowhere"], "nowhere: expected an adapter folder, found none"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read as YAML"),
        (["x", "--host", "0.0.0.0"], "host: expected keys for 0.0.0.0"),
        (["x", "--keys", "nowhere"], "keys: nowhere: cannot be read"),
        (["x", "--port", "1", "--host", "203.0.113.1", "--insecure"], "port: 203.0.113.1:1 cannot be had"),
        (["x", "--policies.no_user", "use"], "policies.no_user"),
        (["x", "--nonsense", "1"], "unrecognized arguments: --nonsense=1"),
        (["x", "--store", "ftp://x"], "store: expected a folder, redis://host:6379/0 or memory://"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_at_e2p_serve_is_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2P_KEYS", raising=False)
    assert main(["serve", "--port", "0", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out

    def names(kind: Any, above: str = "") -> list[str]:
        fields = dataclasses.fields(kind)
        inner = [
            n for f in fields if dataclasses.is_dataclass(f.default_factory) for n in names(f.default_factory, f.name)
        ]
        return inner + [f"--{above + '.' if above else ''}{f.name} " for f in fields]

    for name in names(ServingConfig):
        assert name in said.replace("\n", " ")
    assert "would keep out all later ones" in " ".join(said.split())


def test_what_is_this_machine() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST")] == [True] * 6
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "", "1")] == [False] * 6


def test_unknown_values_are_told_without_a_file() -> None:
    with pytest.raises(ConfigError, match="Expected a <class 'int'>"):
        serving_from_dict({"port": "x"})
