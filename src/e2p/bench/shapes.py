"""Checkpoints of a realistic shape with random weights: a server's work depends on sizes, not on what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from e2p.config import BackboneConfig
from e2p.errors import ConfigError
from e2p.model.token_table import TokenTable

# As of Llama: hidden size, layers, intermediate size, heads, heads of keys and values, each of 64 numbers.
SHAPES = {
    "llama-260m": (1024, 16, 4096, 16, 8),
    "llama-3.2-1b": (2048, 16, 8192, 32, 8),
}
_WINDOW = 2048


def write_checkpoint(backbone: str, shape: str, folder: Path, seed: int) -> dict[str, Any]:
    """A Llama of a shape in bfloat16 with random weights, under the tokenizer of a backbone, whose vocabulary it has.

    No answer of it ends by itself, so that all have the same length: rows of tokens that end an answer are zero, and
    some other token's logit is always above zero.

    Args:
        backbone: folder or hub id that the tokenizer is taken from.
        shape: one of :data:`SHAPES`.
        folder: written.
        seed: of the weights.

    Returns:
        Sizes, for the record.

    Raises:
        ConfigError: there is no such shape.
        BackboneError: the tokenizer cannot be loaded.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape not in SHAPES:
        raise ConfigError(f"shape: expected one of {', '.join(SHAPES)}, got '{shape}'")
    table = TokenTable.load(BackboneConfig(backbone))
    hidden, layers, inner, heads, groups = SHAPES[shape]
    vocabulary = int(table.rows.shape[0])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=table.tokenizer.bos_token_id,
        eos_token_id=table.ends(),
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[table.ends()] = 0
    model.save_pretrained(folder)
    table.tokenizer.save_pretrained(folder)
    return {"shape": shape, "vocabulary": vocabulary, "parameters": sum(p.numel() for p in model.parameters())}
