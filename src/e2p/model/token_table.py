"""The backbone as a gateway needs it: tokenizer and token embeddings, mapped from the checkpoint; no layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2p.config import BackboneConfig
from e2p.errors import BackboneError
from e2p.model.backbone import FrozenBackbone
from e2p.model.loading import reason_of

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class TokenTable(FrozenBackbone):
    """A backbone without its layers: it tokenises, embeds tokens as the model does, and holds phi's place.

    Where a checkpoint is served by others, this is all that has to be known of it here. What needs the layers
    (log-probabilities, generation) is not there. The table is read page by page from the file as tokens are asked for.

    Args:
        rows: the table [V, H] as the checkpoint has it.
        scale: what the family multiplies its rows by.
        config: the model's configuration.
        ends: tokens that end an answer.
        tokenizer: its fast tokenizer.
        source: path or hub id, for records.
        revision: hub revision, for records.
        lora: PEFT adapter that the served model has merged in; it leaves the table as it is.
    """

    def __init__(
        self,
        rows: Tensor,
        scale: float,
        config: Any,
        ends: list[int],
        tokenizer: Any,
        *,
        source: str = "",
        revision: str | None = None,
        lora: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.rows, self.scale, self._ends = rows, scale, ends
        # The few things that are asked of the model are those of its embedding layer.
        self.model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=self.rows))
        self.config = config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.source, self.revision, self.lora = source, revision, lora
        self.autocast_dtype = None

    @classmethod
    def load(cls, config: BackboneConfig, precision: Any = "float32") -> TokenTable:
        """Tokenizer, configuration and the embedding table of a folder or a hub's model.

        Raises:
            BackboneError: one line on what could not be loaded.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoTokenizer

        if not config.model:
            raise BackboneError("backbone.model: expected a folder or a hub id, got nothing; set it")
        common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model, **common)
            settings = AutoConfig.from_pretrained(config.model, **common)
            name, layer = _layer(settings, config.trust_remote_code)
            rows = _mapped(config, name)
            ends = _ends(config, settings, tokenizer)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise BackboneError(
                f"backbone.model: expected a causal language model's tokenizer, config.json and safetensors at "
                f"'{config.model}', got: {reason_of(config, error)}"
            ) from None
        if not getattr(tokenizer, "is_fast", False):
            raise BackboneError(f"backbone.model: '{config.model}' has no fast tokenizer; add a tokenizer.json")
        if list(rows.shape) != list(layer.weight.shape):
            raise BackboneError(
                f"backbone.model: expected token embeddings {list(layer.weight.shape)} by config.json, got "
                f"{list(rows.shape)} in the checkpoint; copy it again"
            )
        revision = getattr(settings, "_commit_hash", None) or config.revision
        scale, source = _scale(layer), config.model
        return cls(rows, scale, settings, ends, tokenizer, source=source, revision=revision, lora=config.lora)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... h"]:
        """Token embeddings in float32, as the model makes them (some families scale them)."""
        rows = self.rows[ids].float()
        return rows if self.scale == 1 else rows * self.scale

    @torch.no_grad()
    def fingerprint(self) -> dict[str, Any]:
        """As far as it goes without layers: ``hidden_state`` is None, which says that it was not looked at."""
        rows = torch.linspace(0, self.rows.shape[0] - 1, 8).long()
        return {
            "model_type": str(self.config.model_type),
            "layers": int(self.config.num_hidden_layers),
            "vocabulary": int(self.rows.shape[0]),
            "hidden_size": int(self.rows.shape[1]),
            "embedding_norms": [round(float(norm), 4) for norm in self.embed(rows).norm(dim=-1)],
            "hidden_state": None,
        }

    def ends(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's, and those that the checkpoint names for generation."""
        return self._ends


def _layer(settings: Any, trust: bool) -> tuple[str, Any]:
    """Name and module of the input embeddings, of a model made of shapes alone."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # a family's scale is a buffer
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    layer = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is layer) + ".weight", layer


@torch.no_grad()
def _scale(layer: Any) -> float:
    """What a family multiplies its rows by: what its layer makes of a row of ones.

    Raises:
        BackboneError: it does something else to them.
    """
    probe = copy.copy(layer)
    rows = torch.tensor([[1.0], [0.0]]).expand(2, int(layer.weight.shape[1])).contiguous()
    probe._parameters = {**layer._parameters, "weight": nn.Parameter(rows)}
    probe.padding_idx = None  # matters to gradients alone, and lies outside of two rows
    ones, zeros = probe(torch.tensor([0, 1])).float()
    scale = float(ones[0])
    if not (bool((ones == scale).all()) and bool((zeros == 0).all())):
        raise BackboneError(
            f"backbone.model: the embedding layer {type(layer).__name__} does more than scale its rows, which is not "
            "known here; serve it with the engine in this process"
        )
    return scale


def _mapped(config: BackboneConfig, name: str) -> Tensor:
    """The table, mapped from the checkpoint's file; families of checkpoints leave out the front of a name."""
    from safetensors import safe_open

    index = _file(config, _INDEX, missing=True)
    if index is None:
        file = _file(config, _SINGLE)
        with safe_open(file, "pt") as tensors:
            keys = dict.fromkeys(tensors.keys(), file)
    else:
        keys = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    found = [key for key in keys if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) != 1:
        raise ValueError(f"expected one tensor {name} in the checkpoint, got {', '.join(found) or 'none'}")
    (key,) = found
    file = keys[key] if index is None else _file(config, keys[key])
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def _file(config: BackboneConfig, name: str, missing: bool = False) -> Any:
    from transformers.utils import cached_file

    return cached_file(config.model, name, revision=config.revision, _raise_exceptions_for_missing_entries=not missing)


def _ends(config: BackboneConfig, settings: Any, tokenizer: Any) -> list[int]:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(config.model, revision=config.revision)
    except OSError:  # the checkpoint has none
        generation = GenerationConfig.from_model_config(settings)
    named = generation.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(end for end in ends if end is not None)
