"""bfloat16 autocast around a frozen model: what autocast would do anew in every pass is done once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from e2p.config import Precision

_ATTENTION = "e2p_sdpa_float32"


def autocast_dtype(precision: Precision, device: torch.device, weights: torch.dtype) -> torch.dtype | None:
    """What the forward pass is cast to, or None where the weights' own precision is used."""
    if precision == "float32" or weights != torch.float32:
        return None  # weights in half precision need no autocast
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    capable = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if capable else None


def prepare_autocast(model: Any, base: nn.Module, dtype: torch.dtype) -> None:
    """Make a frozen float32 model fast under autocast; the results are autocast's, bit for bit, but for attention.

    Autocast keeps a cast weight only if the weight trains, so a frozen one would be cast at every call: the linear
    layers of ``base`` are cast here, once. (Not the head: its table may be that of the token embeddings.) On a CPU
    the fused attention has a fast backward pass in float32 alone, so it is computed in that.
    """
    from transformers.pytorch_utils import Conv1D

    tables = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
    for module in base.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in tables:
            module.to(dtype)
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(_ATTENTION)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _float32_attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return out.to(query.dtype), None
