"""Tiny random backbones and tokenizers, and references: one row at a time, no padding, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from e2p.data.batches import Batch
from e2p.model.backbone import FrozenBackbone
from e2p.model.projector import PrefixProjector

SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS, PAD = 0, 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CORPUS = ["the user likes slow jazz and old soul music", "make a playlist for the train home", "hello there world"] * 4
VOCABULARY = 300
WINDOW = 5

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 192,
    # Wide enough that positions and neighbours change the logits: at the usual 0.02 every mistake would be invisible.
    "initializer_range": 0.25,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_inner": 48, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0, **_SLIDING},
    "gemma3_text": {"head_dim": 8, **_SLIDING},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.5, "init_std": 0.25},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of a family, float32: hidden size 32, two layers."""
    config = CONFIG_MAPPING[family](**{**_COMMON, **_OWN[family], **changes})
    torch.manual_seed(seed)
    # Gemma 2 caps its attention scores in the eager implementation alone.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")


def tiny_tokenizer(template: str | None = TEMPLATE, bos: bool = True) -> Any:
    """Byte-level BPE with a few merges; plain text gets a <|bos|> in front unless ``bos`` is false."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIALS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    names = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"} | ({"bos_token": "<|bos|>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def tiny_backbone(family: str, seed: int = 0, template: str | None = TEMPLATE, **changes: Any) -> FrozenBackbone:
    """A tiny random backbone with its tokenizer."""
    return FrozenBackbone(tiny_model(family, seed, **changes), tiny_tokenizer(template), source=f"tiny-{family}")


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    at: Sequence[int],
    embeddings: Tensor | None = None,
    present: Sequence[bool] | None = None,
) -> Batch:
    """A batch by plain loops; repeated prompts are shared."""
    distinct: list[list[int]] = []
    for prompt in prompts:
        if list(prompt) not in distinct:
            distinct.append(list(prompt))

    def padded(rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([list(row) + [PAD] * (width - len(row)) for row in rows])

    return Batch(
        prompt=padded(prompts),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        completion=padded(completions),
        completion_lengths=torch.tensor([len(c) for c in completions]),
        splice=torch.tensor(list(at)),
        shared=torch.tensor([distinct.index(list(p)) for p in prompts]),
        unique=torch.tensor([[list(p) for p in prompts].index(p) for p in distinct]),
        embeddings=torch.zeros(len(prompts), 4) if embeddings is None else embeddings,
        present=torch.tensor([True] * len(prompts) if present is None else list(present)),
        index=torch.arange(len(prompts)),
    )


def logits_alone(model: Any, ids: Sequence[int], prefix: Tensor | None, at: int) -> Tensor:
    """Logits [T + K, V] of one row: soft tokens among the token embeddings by hand, positions counted by hand."""
    table = model.get_input_embeddings()
    pieces = [table(torch.tensor([token])) for token in ids]
    if prefix is not None:
        pieces.insert(at, prefix.to(pieces[0].dtype))
    embeds = torch.cat(pieces)[None]
    positions = torch.arange(embeds.shape[1])[None]
    return model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0].float()


def logprobs_alone(
    model: Any, prompt: Sequence[int], completion: Sequence[int], prefix: Tensor | None, at: int
) -> Tensor:
    """log p of each completion token of one row."""
    logits = logits_alone(model, [*prompt, *completion], prefix, at)
    first = len(prompt) + (0 if prefix is None else len(prefix))
    return torch.stack([torch.log_softmax(logits[first + j - 1], -1)[token] for j, token in enumerate(completion)])


@torch.no_grad()
def greedy_alone(
    model: Any, prompt: Sequence[int], prefix: Tensor | None, at: int, new: int, penalty: float = 1.0
) -> list[int]:
    """Greedy decoding of one row without a cache; the penalty looks at the prompt's and the new ids alone."""
    out: list[int] = []
    while len(out) < new:
        scores = logits_alone(model, [*prompt, *out], prefix, at)[-1].clone()
        for token in {*prompt, *out}:
            scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
        token = int(scores.argmax())
        if token == EOS:
            break
        out.append(token)
    return out


def equation_2(phi: PrefixProjector, c: np.ndarray) -> np.ndarray:
    """phi(c) = LayerNorm(ReLU(W1 c)) W2 + b."""
    w = {name: value.detach().double().numpy() for name, value in phi.state_dict().items()}
    hidden = np.maximum(c @ w["w1.weight"].T, 0)
    centred = hidden - hidden.mean(-1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    return (hidden @ w["w2.weight"].T + w["w2.bias"]).reshape(len(c), -1, phi.hidden_size)
