"""Loading backbones as users have them: LoRA adapters, quantised weights, hubs; sharing an adapter on a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2p.config import BackboneConfig, DataConfig, ProjectorConfig
from e2p.errors import AdapterError, BackboneError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "backbone"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_lora_adapter_is_merged_into_the_frozen_weights(checkpoint: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    backbone = FrozenBackbone.load(BackboneConfig(model=checkpoint, lora=str(tmp_path / "lora")), "float32")
    ids = torch.tensor([[0, 9, 8, 7]])
    with torch.no_grad():
        expected = lora.eval()(input_ids=ids).logits
        plain = tiny_model("llama").eval()(input_ids=ids).logits
        got = backbone.model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_a_missing_lora_adapter_is_one_line(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.lora: expected a PEFT adapter at") as error:
        FrozenBackbone.load(BackboneConfig(model=checkpoint, lora=str(tmp_path / "none")))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_without_their_package_name_it(checkpoint: str, kind: Any) -> None:
    with pytest.raises(BackboneError, match="pip install bitsandbytes"):
        FrozenBackbone.load(BackboneConfig(model=checkpoint, quantization=kind))


def test_soft_capped_attention_is_not_left_to_the_fused_kernel(tmp_path: Path) -> None:
    """Gemma 2 caps its attention scores, which the fused kernel cannot: by default it must get its own logits."""
    folder = tmp_path / "gemma2"
    reference = tiny_model("gemma2").eval()
    reference.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    backbone = FrozenBackbone.load(BackboneConfig(model=str(folder)), "float32")
    ids = torch.tensor([[0, 9, 8, 7, 12, 40]])
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.model(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_an_adapter_goes_to_a_hub_whole_and_private(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = E2PModel.from_backbone(checkpoint, 4, ProjectorConfig(hidden_dim=5), data=DataConfig(max_prompt_tokens=40))
    sent: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> str:
            sent.update(repo=repo_id, **options)
            return f"hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> None:
            for file in Path(folder_path).iterdir():
                (tmp_path / "hub").mkdir(exist_ok=True)
                (tmp_path / "hub" / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert model.push_to_hub("me/mine", token="t") == "hub/me/mine"
    assert (sent["repo"], sent["private"], sent["token"]) == ("me/mine", True, "t")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    back = E2PModel.from_pretrained("me/mine")
    vectors = np.ones((1, 4), np.float32)
    assert back.score(["hi"], ["soul"], vectors) == model.score(["hi"], ["soul"], vectors)


def test_an_adapter_that_no_hub_has_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("404\nnot found\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(AdapterError, match="me/none: no such folder here, and the hub says: 404") as error:
        E2PModel.from_pretrained("me/none")
    assert "\n" not in str(error.value)
