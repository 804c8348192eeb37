"""The adapter on disk: whole or not at all, and every broken one is a single line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from e2p.config import DataConfig, ProjectorConfig
from e2p.errors import AdapterError
from e2p.model import adapter
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from tiny import tiny_backbone

TEXT = DataConfig(max_prompt_tokens=40, max_completion_tokens=16)


@pytest.fixture(scope="module")
def model(llama: FrozenBackbone) -> E2PModel:
    return E2PModel.from_backbone(llama, 4, ProjectorConfig(hidden_dim=5), data=TEXT)


@pytest.fixture(scope="module")
def saved(model: E2PModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def refused(folder: Path, llama: FrozenBackbone) -> str:
    with pytest.raises(AdapterError) as caught:
        E2PModel.from_pretrained(folder, llama)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) > 20
    return text


def change(folder: Path, **values: Any) -> None:
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_four_files_and_nothing_else(saved: Path) -> None:
    assert set(contents(saved)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "embedding_stats.safetensors",
        "README.md",
    }
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
    assert set(load_file(saved / adapter.WEIGHTS)) == {
        "w1.weight",
        "norm.weight",
        "norm.bias",
        "w2.weight",
        "w2.bias",
        "null_vector",
    }
    assert set(load_file(saved / adapter.STATS)) == {"mean", "scale"}


def test_the_files_are_for_all_who_may_read_the_others(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_the_record_names_what_it_was_trained_with(saved: Path) -> None:
    record = json.loads((saved / adapter.CONFIG).read_text())
    assert record["backbone"]["source"] == "tiny-llama"
    assert record["backbone"]["fingerprint"]["model_type"] == "llama"
    assert record["embedding_dim"] == 4
    assert record["projector"]["hidden_dim"] == 5
    assert set(record["versions"]) == {"e2p", "torch", "transformers", "safetensors"}
    card = (saved / adapter.CARD).read_text()
    assert card.startswith("---\n")
    assert "tiny-llama" in card


@pytest.mark.parametrize("name", [adapter.CONFIG, adapter.WEIGHTS, adapter.STATS])
def test_a_missing_file_is_named(folder: Path, llama: FrozenBackbone, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder, llama)


@pytest.mark.parametrize("name", [adapter.WEIGHTS, adapter.STATS])
@pytest.mark.parametrize("keep", [0, 7, 50, -1])
def test_a_half_copied_file_is_named(folder: Path, llama: FrozenBackbone, name: str, keep: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    text = refused(folder, llama)
    assert name in text
    # Even where somebody has mended the checksum.
    record = json.loads((folder / adapter.CONFIG).read_text())
    change(folder, sha256={**record["sha256"], name: adapter._sha256(folder / name)})
    assert name in refused(folder, llama)


def test_one_flipped_bit_is_found(folder: Path, llama: FrozenBackbone) -> None:
    raw = bytearray((folder / adapter.WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (folder / adapter.WEIGHTS).write_bytes(bytes(raw))
    assert "corrupt" in refused(folder, llama)


def test_nothing_is_unpickled(folder: Path, llama: FrozenBackbone, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in (adapter.WEIGHTS, adapter.STATS):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    torch.save({"w1.weight": Bomb()}, folder / "pytorch_model.bin")
    change(folder, sha256={n: adapter._sha256(folder / n) for n in (adapter.WEIGHTS, adapter.STATS)})
    assert adapter.WEIGHTS in refused(folder, llama)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": 1}', "\udcff"])
def test_a_record_that_is_no_record(folder: Path, llama: FrozenBackbone, text: str) -> None:
    (folder / adapter.CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert adapter.CONFIG in refused(folder, llama)


@pytest.mark.parametrize("key", sorted(adapter._KEYS))
def test_a_missing_key_is_named(folder: Path, llama: FrozenBackbone, key: str) -> None:
    record = json.loads((folder / adapter.CONFIG).read_text())
    del record[key]
    (folder / adapter.CONFIG).write_text(json.dumps(record))
    assert key in refused(folder, llama)


def test_an_unknown_key_and_another_format_are_named(folder: Path, llama: FrozenBackbone) -> None:
    change(folder, flavour="sweet")
    assert "flavour" in refused(folder, llama)
    change(folder, format=2)
    assert "format 1, got 2" in refused(folder, llama)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_value_is_refused_in_one_line_or_does_no_harm(
    saved: Path, llama: FrozenBackbone, tmp_path: Path, data: st.DataObject
) -> None:
    """Every key, and every key one level down, with any JSON value."""
    folder = tmp_path / "fuzzed"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    record = json.loads((saved / adapter.CONFIG).read_text())
    key = data.draw(st.sampled_from(sorted(record)))
    inner = record[key] if isinstance(record[key], dict) and data.draw(st.booleans()) else None
    if inner:
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(_JSON)
    else:
        record[key] = data.draw(_JSON)
    (folder / adapter.CONFIG).write_text(json.dumps(record))
    message = ""
    try:
        E2PModel.from_pretrained(folder, llama)
    except AdapterError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [{"hidden_dim": 6}, {"hidden_dim": 10**12}, {"hidden_dim": 5.0}, {"prefix_tokens": 2}, {"prefix_tokens": True},
     {"null_prob": "0.1"}, {"user_scale": None}, {"position": "nowhere"}, {"norm": ["matched"]}],
)  # fmt: skip
def test_other_projector_settings_are_refused(folder: Path, llama: FrozenBackbone, changes: dict[str, Any]) -> None:
    record = json.loads((folder / adapter.CONFIG).read_text())
    change(folder, projector={**record["projector"], **changes})
    refused(folder, llama)


def test_other_tensors_are_refused(folder: Path, llama: FrozenBackbone) -> None:
    good = load_file(folder / adapter.WEIGHTS)
    for weights, named in [
        ({**good, "extra": torch.zeros(1)}, "extra"),
        ({k: v for k, v in good.items() if k != "w2.bias"}, "w2.bias"),
        ({**good, "null_vector": torch.zeros(2, 32)}, "null_vector"),
    ]:
        save_file(weights, folder / adapter.WEIGHTS)
        sums = {name: adapter._sha256(folder / name) for name in (adapter.WEIGHTS, adapter.STATS)}
        change(folder, sha256=sums)
        assert named in refused(folder, llama)


def test_no_folder_and_a_file_in_its_place(tmp_path: Path, llama: FrozenBackbone) -> None:
    assert "no such folder" in refused(tmp_path / "missing", llama)
    (tmp_path / "file").write_text("")
    assert "expected an adapter folder" in refused(tmp_path / "file", llama)


# Writing


def test_an_adapter_is_replaced_only_when_asked(model: E2PModel, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(AdapterError, match="overwrite=True"):
        model.save_pretrained(folder)
    assert contents(folder) == before
    model.metrics["x"] = 1.0
    try:
        model.save_pretrained(folder, overwrite=True)
    finally:
        model.metrics.clear()
    assert contents(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_an_empty_folder_and_missing_parents_will_do(model: E2PModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "a" / "b")
    assert len(contents(tmp_path / "empty")) == len(contents(tmp_path / "a" / "b")) == 4


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["notes", "peft", "adapter with notes", "file"])
def test_what_is_not_ours_is_never_overwritten(
    model: E2PModel, folder: Path, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    target = tmp_path / "other"
    if kind == "file":
        target.write_text("precious")
    else:
        target = folder if kind == "adapter with notes" else target
        target.mkdir(exist_ok=True)
        if kind == "peft":  # its files bear the names of ours
            (target / adapter.CONFIG).write_text('{"peft_type": "LORA"}')
            (target / adapter.WEIGHTS).write_bytes(b"weights")
        else:
            (target / "notes.txt").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(AdapterError):
        model.save_pretrained(target, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", ["save", "write_text", "replace 1", "replace 2"])
def test_a_failed_save_leaves_the_old_adapter(
    model: E2PModel, folder: Path, llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before, calls = contents(folder), [0]
    original = os.replace

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def replace(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == int(failing[-1]):
            full()
        original(source, target)

    with monkeypatch.context() as patch:
        if failing == "save":
            patch.setattr("safetensors.torch.save", full)
        elif failing == "write_text":
            patch.setattr(Path, "write_text", full)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(AdapterError, match="No space left"):
            model.save_pretrained(folder, overwrite=True)
    assert contents(folder.parent) == {f"adapter/{name}": raw for name, raw in before.items()}
    E2PModel.from_pretrained(folder, llama)


def test_a_parent_that_is_a_file_is_one_line(model: E2PModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "adapter")


def test_differences_name_what_differs_and_forgive_rounding() -> None:
    one = {"model_type": "llama", "layers": 2, "embedding_norms": [1.0, 2.0], "hidden_state": [1.0, -1.0]}
    assert adapter.differences(one, {**one, "hidden_state": [1.05, -0.95]}) == []
    assert "hidden states differ by 2" in adapter.differences(one, {**one, "hidden_state": [1.2, -0.7]})[0]
    assert adapter.differences(one, {**one, "embedding_norms": [1.01, 1.99]}) == []
    assert adapter.differences(one, {**one, "layers": 3}) == ["layers 2 there, 3 here"]
    assert "other weights" in adapter.differences(one, {**one, "embedding_norms": [1.0, 2.2]})[0]
    assert adapter.differences(one, {"model_type": "llama", "layers": 2})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_backbone_with_one_other_layer_is_refused(folder: Path, layer: int) -> None:
    """Two fine-tunes of one model have the same sizes and almost the same token embeddings."""
    other = tiny_backbone("llama")
    with torch.no_grad():
        other.model.model.layers[layer].mlp.down_proj.weight.normal_(std=0.25)
    assert "other weights (the hidden states differ" in refused(folder, other)


def test_half_precision_is_the_same_backbone(folder: Path) -> None:
    other = tiny_backbone("llama")
    E2PModel.from_pretrained(folder, FrozenBackbone(other.model.bfloat16(), other.tokenizer))


def test_other_library_versions_are_said_beside_what_differs(
    folder: Path, llama: FrozenBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((folder / adapter.CONFIG).read_text(encoding="utf-8"))
    change(folder, versions={**record["versions"], "transformers": "5.0.0"})
    with caplog.at_level("INFO", logger="e2p"):
        E2PModel.from_pretrained(folder, llama)
    assert "transformers 5.0.0 there" in caplog.text
    assert "transformers 5.0.0 there" in refused(folder, tiny_backbone("llama", seed=1))
