"""Prompts that are continued many times, against every continuation run alone, without padding, cache or mask."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from e2p.data.templates import EncodedPrompt
from e2p.errors import BackboneError
from e2p.model.backbone import FrozenBackbone
from e2p.model.logprobs import Head
from e2p.model.prefill import Prefilled, prefill
from tiny import VOCABULARY, logits_alone, tiny_backbone, tiny_model, tiny_tokenizer

_RANDOM = torch.Generator().manual_seed(3)


def ids(count: int) -> list[int]:
    return torch.randint(6, VOCABULARY, (count,), generator=_RANDOM).tolist()


# Longer and shorter than the sliding window of 5.
PROMPTS = [ids(3), ids(9), ids(1), ids(14)]
AT = [0, 4, 1, 14]
EVERY = torch.arange(VOCABULARY)
# Rows in any order, of one prompt many, of another none.
ROWS, TOKENS = torch.tensor([3, 0, 0, 0, 1, 3, 3, 0]), torch.tensor(ids(8))
AGAIN, AFTER = torch.tensor([7, 0, 1, 1, 4, 5]), torch.tensor(ids(6))


def soft(backbone: FrozenBackbone, k: int = 2) -> Tensor:
    torch.manual_seed(11)
    return torch.randn(len(PROMPTS), k, backbone.hidden_size) * backbone.token_norm() / math.sqrt(backbone.hidden_size)


def read(backbone: FrozenBackbone, prefix: Tensor | None) -> Prefilled:
    return prefill(backbone, [EncodedPrompt(prompt, 1, 1) for prompt in PROMPTS], AT, prefix)


@torch.no_grad()
def alone(backbone: FrozenBackbone, prefix: Tensor | None, query: int, *new: int) -> Tensor:
    """Logits [V] of what follows a prompt and some tokens."""
    soft_tokens = None if prefix is None else prefix[query]
    return logits_alone(backbone.model, [*PROMPTS[query], *new], soft_tokens, AT[query])[-1]


def check(backbone: FrozenBackbone, prefix: Tensor | None, tokens_per_pass: int = 8192) -> None:
    """Every row of a prompt, of its continuations, and of theirs."""
    close = {"rtol": 1e-4, "atol": 1e-4}
    start = read(backbone, prefix)
    expected = torch.stack([alone(backbone, prefix, query) for query in range(len(PROMPTS))])
    torch.testing.assert_close(start.logits(EVERY), expected, **close)
    one = start.extend(ROWS, TOKENS, tokens_per_pass)
    pairs = list(zip(ROWS.tolist(), TOKENS.tolist(), strict=True))
    expected = torch.stack([alone(backbone, prefix, *pair) for pair in pairs])
    torch.testing.assert_close(one.logits(EVERY), expected, **close)
    assert one.query.tolist() == ROWS.tolist()
    two = one.extend(AGAIN, AFTER, tokens_per_pass)
    triples = [(*pairs[row], token) for row, token in zip(AGAIN.tolist(), AFTER.tolist(), strict=True)]
    expected = torch.stack([alone(backbone, prefix, *triple) for triple in triples])
    torch.testing.assert_close(two.logits(EVERY), expected, **close)
    k = 0 if prefix is None else prefix.shape[1]
    assert two.lengths.tolist() == [len(PROMPTS[query]) + k + 2 for query, *_ in triples]
    assert float((expected[0] - expected[1]).abs().max()) > 0.1


@pytest.mark.parametrize("tokens_per_pass", [1, 9, 8192])
def test_continuations_equal_rows_alone(backbone: FrozenBackbone, tokens_per_pass: int) -> None:
    check(backbone, soft(backbone), tokens_per_pass)
    assert backbone.branches


def test_continuations_without_soft_tokens(backbone: FrozenBackbone) -> None:
    check(backbone, None)


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_scaled_logits(family: str) -> None:
    backbone = tiny_backbone(family)
    check(backbone, soft(backbone))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_eager_attention_takes_the_mask_too(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    backbone = FrozenBackbone(model, tiny_tokenizer())
    check(backbone, soft(backbone))
    assert backbone.branches


def of(config: Any) -> FrozenBackbone:
    torch.manual_seed(0)
    return FrozenBackbone(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mamba", {"num_hidden_layers": 2, "state_size": 8}),  # a recurrent state
        ("bloom", {"n_head": 4, "n_layer": 2}),  # linear biases, made of the mask
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5}),
    ],
)
def test_other_families_are_run_again_and_right(family: str, settings: dict[str, Any]) -> None:
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.25}
    backbone = of(CONFIG_MAPPING[family](**common, **settings))
    check(backbone, soft(backbone), 40)
    assert backbone.branches is False


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_running_again_is_right_for_families_with_a_cache_too(family: str) -> None:
    backbone = tiny_backbone(family)
    backbone.branches = False
    check(backbone, soft(backbone), 40)


@pytest.mark.parametrize("fault", ["ignores", "refuses"])
def test_a_family_with_another_idea_of_a_mask_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    inner = backbone.base.forward

    def other(attention_mask: Tensor | None, **named: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            if fault == "refuses":
                raise ValueError("two dimensions, please")
            attention_mask = None
        return inner(attention_mask=attention_mask, **named)

    monkeypatch.setattr(backbone.base, "forward", other)
    check(backbone, soft(backbone))
    assert backbone.branches is False


@pytest.mark.parametrize("branches", [True, False])
def test_a_prefill_may_be_used_again(llama: FrozenBackbone, branches: bool) -> None:
    backbone = copy.copy(llama)
    backbone.branches = branches
    start = read(backbone, soft(backbone))
    before = start.logits(EVERY)
    one = start.extend(ROWS, TOKENS)
    expected = one.extend(AGAIN, AFTER).logits(EVERY)
    other = start.extend(ROWS.flip(0), TOKENS)  # neither this nor what comes of it gets in the way of the rest
    other.extend(AGAIN, AFTER.flip(0))
    assert torch.equal(start.logits(EVERY), before)
    assert torch.equal(one.extend(AGAIN, AFTER).logits(EVERY), expected)
    assert torch.equal(start.extend(ROWS, TOKENS).extend(AGAIN, AFTER).logits(EVERY), expected)
    assert not torch.equal(other.logits(EVERY), one.logits(EVERY))


@pytest.mark.parametrize("branches", [True, False])
def test_selected_prompts_go_on_as_if_alone(llama: FrozenBackbone, branches: bool) -> None:
    backbone = copy.copy(llama)
    backbone.branches = branches
    prefix, queries = soft(backbone), torch.tensor([3, 1])
    some = read(backbone, prefix).select(queries)
    one = some.extend(torch.tensor([1, 0, 1]), TOKENS[:3])
    assert len(some) == 2
    assert one.query.tolist() == [1, 0, 1]
    rows = zip([1, 3, 1], TOKENS[:3].tolist(), strict=True)
    expected = torch.stack([alone(backbone, prefix, *row) for row in rows])
    torch.testing.assert_close(one.logits(EVERY), expected, rtol=1e-4, atol=1e-4)


def test_prompts_run_once_and_passes_are_bounded(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    read(llama, None)
    shapes: list[tuple[int, ...]] = []
    inner = llama.base.forward

    def watched(**named: Any) -> Any:
        shapes.append(tuple(named["inputs_embeds"].shape[:2]))
        return inner(**named)

    monkeypatch.setattr(llama.base, "forward", watched)
    read(llama, soft(llama)).extend(ROWS, TOKENS, 8).extend(AGAIN, AFTER)
    assert shapes == [(4, 16), (4, 2), (4, 2), (4, 3)]
    again = copy.copy(llama)
    again.branches = False
    shapes.clear()
    read(again, None).extend(ROWS, TOKENS, 45)
    assert shapes == [(4, 14), (3, 15), (3, 15), (2, 15)]


def test_bfloat16_autocast_stays_near_float32() -> None:
    exact, rounded = (
        FrozenBackbone(tiny_model("llama"), tiny_tokenizer(), precision=p) for p in ("float32", "bfloat16")
    )
    found = [read(b, soft(exact)).extend(ROWS, TOKENS).extend(AGAIN, AFTER).logits(EVERY) for b in (exact, rounded)]
    assert rounded.branches
    assert found[1].dtype == torch.float32
    error = float((found[0] - found[1]).abs().mean())
    assert 1e-6 < error < 0.1 * float(found[0].abs().mean())


@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_some_logits_are_those_of_the_whole_head(scale: float, softcap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    linear, hidden, tokens = nn.Linear(8, 20, bias=bias), torch.randn(5, 8), torch.tensor([19, 0, 7])

    class Other(nn.Linear):
        """Such as a quantised layer, whose weight is not for others to read."""

    other = Other(8, 20, bias=bias)
    other.load_state_dict(linear.state_dict())
    expected = Head(linear, scale, softcap)(hidden)[:, tokens]
    for layer in (linear, other):
        torch.testing.assert_close(Head(layer, scale, softcap).some(hidden, tokens), expected)


def test_what_the_window_does_not_hold_is_refused(llama: FrozenBackbone) -> None:
    long = [EncodedPrompt(ids(191), 1, 1)]
    with pytest.raises(BackboneError, match=r"window of 192 tokens, got 193; shorten the prompt"):
        prefill(llama, long, [0], torch.zeros(1, 2, 32))
    start = prefill(llama, long, [0], None)
    start.require_room(1)
    with pytest.raises(BackboneError, match="got 193"):
        start.require_room(2)
