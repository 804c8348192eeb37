"""The backbone against rows run alone, without padding, cache or sharing: every family, every position."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2p.config import BackboneConfig, ProjectorConfig
from e2p.data.batches import Batch
from e2p.data.templates import EncodedPrompt
from e2p.errors import BackboneError
from e2p.model.backbone import FrozenBackbone
from e2p.model.projector import PrefixProjector
from tiny import EOS, VOCABULARY, greedy_alone, logits_alone, logprobs_alone, make_batch, tiny_backbone, tiny_model
from tiny import tiny_tokenizer as build_tokenizer

# Longer and shorter than the sliding window of 5, repeated and distinct.
_RANDOM = torch.Generator().manual_seed(5)


def ids(count: int) -> list[int]:
    return torch.randint(6, VOCABULARY, (count,), generator=_RANDOM).tolist()


_TWICE = [0, *ids(8)]
PROMPTS = [_TWICE, [0, *ids(2)], _TWICE, [0, *ids(12)], [0]]
COMPLETIONS = [[*ids(3), EOS], [*ids(9), EOS], ids(1), [*ids(6), EOS], [EOS]]
POSITIONS: dict[str, Callable[[list[int]], int]] = {
    "before_bos": lambda prompt: 0,
    "after_bos": lambda prompt: 1,
    "after_system": lambda prompt: min(3, len(prompt)),
    "before_completion": len,
}
positions = pytest.mark.parametrize("position", POSITIONS)


def batch_at(position: str) -> Batch:
    return make_batch(PROMPTS, COMPLETIONS, [POSITIONS[position](p) for p in PROMPTS])


def soft(backbone: FrozenBackbone, k: int) -> Tensor:
    torch.manual_seed(11)
    return torch.randn(len(PROMPTS), k, backbone.hidden_size) * backbone.token_norm() / math.sqrt(backbone.hidden_size)


def alone(backbone: FrozenBackbone, position: str, prefix: Tensor | None) -> Tensor:
    return torch.cat(
        [
            logprobs_alone(backbone.model, p, c, None if prefix is None else prefix[row], POSITIONS[position](p))
            for row, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
        ]
    )


@pytest.mark.parametrize("k", [1, 3])
@positions
def test_log_probabilities_equal_those_of_each_row_alone(backbone: FrozenBackbone, position: str, k: int) -> None:
    prefix = soft(backbone, k)
    with torch.no_grad():
        ours, expected = backbone.completion_logprobs(batch_at(position), prefix), alone(backbone, position, prefix)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_without_a_prefix_they_are_the_plain_models(backbone: FrozenBackbone) -> None:
    with torch.no_grad():
        ours = backbone.completion_logprobs(batch_at("after_bos"), None)
        expected = alone(backbone, "before_bos", None)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        # Not even embeddings are needed to say what the plain model thinks.
        logits = backbone.model(input_ids=torch.tensor([PROMPTS[3] + COMPLETIONS[3]])).logits[0].log_softmax(-1)
    first = sum(map(len, COMPLETIONS[:3]))
    for j, token in enumerate(COMPLETIONS[3]):
        assert float(ours[first + j]) == pytest.approx(
            float(logits[len(PROMPTS[3]) + j - 1, token]), rel=1e-4, abs=1e-4
        )


def test_the_position_and_the_prefix_matter(backbone: FrozenBackbone) -> None:
    """These comparisons could fail: another position, another prefix or none give clearly other values."""
    prefix = soft(backbone, 1)
    with torch.no_grad():
        values = [backbone.completion_logprobs(batch_at(position), prefix) for position in POSITIONS]
        values += [backbone.completion_logprobs(batch_at("before_bos"), p) for p in (None, prefix.flip(0))]
    for one, two in pairwise(values):
        assert float((one - two).abs().max()) > 1e-2


@pytest.mark.parametrize("k", [1, 3])
def test_sharing_prompts_changes_neither_values_nor_gradients(backbone: FrozenBackbone, k: int) -> None:
    backbone = copy.copy(backbone)
    assert backbone.share_prompts
    prefix, batch = soft(backbone, k), batch_at("before_completion")
    upstream = torch.randn(int(batch.completion_lengths.sum()))
    results = []
    for share in (True, False):
        backbone.share_prompts = share
        leaf = prefix.clone().requires_grad_()
        out = backbone.completion_logprobs(batch, leaf)
        (out * upstream).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert results[0][1] is not None
    assert float(results[0][1].abs().max()) > 1e-3
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


def test_shared_prompts_run_once(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = llama.base.forward

    def watched(**kwargs: Any) -> Any:
        rows.append(len(kwargs["inputs_embeds"]))
        return inner(**kwargs)

    monkeypatch.setattr(llama.base, "forward", watched)
    llama.completion_logprobs(batch_at("before_completion"), soft(llama, 1))
    assert rows == [4, 5]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_mixed_batch_equals_its_rows(llama: FrozenBackbone, data: st.DataObject) -> None:
    token = st.integers(0, VOCABULARY - 1)
    pool = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=3))
    prompts = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=5))
    completions = [data.draw(st.lists(token, min_size=1, max_size=6)) for _ in prompts]
    late = data.draw(st.booleans())
    at = [len(p) if late else data.draw(st.integers(0, len(p))) for p in prompts]
    prefix = torch.randn(len(prompts), data.draw(st.integers(1, 3)), 32)
    with torch.no_grad():
        ours = llama.completion_logprobs(make_batch(prompts, completions, at), prefix)
        expected = torch.cat(
            [logprobs_alone(llama.model, *row) for row in zip(prompts, completions, prefix, at, strict=True)]
        )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)


def test_a_pass_is_as_wide_as_its_longest_row(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt with a short completion beside the opposite: the token budget counts rows, not columns' maxima."""
    widths: list[int] = []
    inner = llama.base.forward

    def watched(**kwargs: Any) -> Any:
        widths.append(kwargs["inputs_embeds"].shape[1])
        return inner(**kwargs)

    monkeypatch.setattr(llama.base, "forward", watched)
    prompts, completions = [ids(20), ids(2)], [ids(2), ids(20)]
    llama.completion_logprobs(make_batch(prompts, completions, [0, 0]), soft(llama, 1)[:2])
    assert widths == [22]


def test_perplexity_is_that_of_transformers_own_loss(backbone: FrozenBackbone) -> None:
    prefix = soft(backbone, 2)
    for position, at in POSITIONS.items():
        row = 3
        prompt, completion = PROMPTS[row], COMPLETIONS[row]
        table = backbone.model.get_input_embeddings()
        cut = at(prompt)
        tokens = table(torch.tensor(prompt + completion))
        embeds = torch.cat([tokens[:cut], prefix[row], tokens[cut:]])
        labels = torch.tensor([[-100] * (len(prompt) + 2) + completion])
        with torch.no_grad():
            loss = backbone.model(inputs_embeds=embeds[None], labels=labels, use_cache=False).loss
            ours = backbone.completion_logprobs(make_batch([prompt], [completion], [cut]), prefix[row : row + 1])
        assert math.exp(-float(ours.mean())) == pytest.approx(math.exp(float(loss)), rel=1e-4), position


# Gradients


def phi_for(backbone: FrozenBackbone, seed: int = 1) -> PrefixProjector:
    torch.manual_seed(seed)
    config = ProjectorConfig(hidden_dim=6, prefix_tokens=2, user_scale=0.5)
    phi = PrefixProjector(
        4, backbone.hidden_size, config, anchor=backbone.anchor("user", 2), token_norm=backbone.token_norm()
    )
    with torch.no_grad():
        phi.norm.bias.normal_(std=0.3)
        phi.null_vector.normal_(std=0.3)
    return phi


VECTORS = torch.randn(len(PROMPTS), 4, generator=torch.Generator().manual_seed(3))
PRESENT = torch.tensor([True, True, False, True, False])


@positions
def test_gradients_equal_those_of_rows_alone_and_reach_phi_alone(backbone: FrozenBackbone, position: str) -> None:
    one, two = phi_for(backbone), phi_for(backbone)
    backbone.completion_logprobs(batch_at(position), one(VECTORS, PRESENT)).sum().backward()
    alone(backbone, position, two(VECTORS, PRESENT)).sum().backward()
    for (name, ours), expected in zip(one.named_parameters(), two.parameters(), strict=True):
        assert ours.grad is not None, name
        assert expected.grad is not None
        assert float(ours.grad.abs().max()) > 1e-4, name
        torch.testing.assert_close(ours.grad, expected.grad, rtol=2e-3, atol=2e-3 * float(expected.grad.abs().max()))
    assert all(not p.requires_grad and p.grad is None for p in backbone.model.parameters())


@pytest.mark.parametrize("position", ["after_bos", "before_completion"])
def test_gradients_equal_finite_differences(position: str) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.double()
    phi, batch = phi_for(backbone), batch_at(position)

    def value() -> Tensor:
        return backbone.completion_logprobs(batch, phi(VECTORS, PRESENT)).double().sum()

    value().backward()
    step = 1e-3
    for name, parameter in phi.named_parameters():
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for at in {int(gradient.abs().argmax()), 0, len(flat) // 2}:
            old = float(flat[at])
            with torch.no_grad():
                flat[at] = old + step
                above = value()
                flat[at] = old - step
                below = value()
                flat[at] = old
            measured = float(above - below) / (2 * step)
            assert float(gradient[at]) == pytest.approx(measured, rel=2e-2, abs=1e-2), f"{name}[{at}]"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "opt"])
@pytest.mark.parametrize("position", ["after_bos", "before_completion"])
def test_gradient_checkpointing_changes_no_gradient(family: str, position: str) -> None:
    plain, checkpointed = tiny_backbone(family), tiny_backbone(family)
    checkpointed.enable_gradient_checkpointing()
    checkpointed.train()
    phis = [phi_for(plain), phi_for(plain)]
    runs: list[int] = []
    layers = next(m for m in checkpointed.model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:
        next(layer.children()).register_forward_hook(lambda *_: runs.append(1))
    for backbone, phi in zip([plain, checkpointed], phis, strict=True):
        backbone.completion_logprobs(batch_at(position), phi(VECTORS, PRESENT)).sum().backward()
    assert len(runs) == 2 * len(layers), "each layer runs once more in the backward pass"
    for ours, expected in zip(phis[1].parameters(), phis[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_a_frozen_model_stays_in_evaluation_mode() -> None:
    backbone = tiny_backbone("gpt2")
    backbone.train()
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.model.modules())
    with torch.no_grad():
        values = [backbone.completion_logprobs(batch_at("after_bos"), soft(backbone, 1)) for _ in range(2)]
    assert torch.equal(*values)


# Generation


def encoded() -> list[EncodedPrompt]:
    return [EncodedPrompt(p, 1, min(3, len(p))) for p in PROMPTS]


def generated(backbone: FrozenBackbone, position: str, prefix: Tensor | None, **settings_: Any) -> list[list[int]]:
    at = [POSITIONS[position](p) for p in PROMPTS]
    return backbone.generate(encoded(), at, prefix, **{"max_new_tokens": 10, "do_sample": False, **settings_})


@positions
def test_greedy_answers_equal_a_plain_loop(backbone: FrozenBackbone, position: str) -> None:
    prefix = soft(backbone, 2)
    expected = [
        greedy_alone(backbone.model, p, prefix[row], POSITIONS[position](p), 6) for row, p in enumerate(PROMPTS)
    ]
    assert generated(backbone, position, prefix, max_new_tokens=6) == expected
    assert len({tuple(row) for row in expected}) > 2


def test_greedy_answers_without_a_prefix(backbone: FrozenBackbone) -> None:
    expected = [greedy_alone(backbone.model, p, None, 0, 6) for p in PROMPTS]
    assert generated(backbone, "after_bos", None, max_new_tokens=6) == expected


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_the_repetition_penalty_reads_the_prompts_ids(backbone: FrozenBackbone, penalty: float) -> None:
    prefix, new = soft(backbone, 2), 4
    for position in ("after_bos", "before_completion"):
        at = POSITIONS[position]
        expected = [greedy_alone(backbone.model, p, prefix[row], at(p), new, penalty) for row, p in enumerate(PROMPTS)]
        assert generated(backbone, position, prefix, repetition_penalty=penalty, max_new_tokens=new) == expected
    assert penalty > 1 or generated(backbone, position, prefix, max_new_tokens=new) != expected


@pytest.mark.parametrize("name", ["pad", "eos"])
def test_the_penalty_does_not_fall_on_fillers(name: str) -> None:
    """Where no token stands, the ids that processors read are one of the row's own: a filler may be a real choice."""
    backbone = tiny_backbone("llama")
    if name == "eos":
        backbone.tokenizer.pad_token = None
    seen: list[Tensor] = []

    def watch(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids.clone())
        return scores

    generated(backbone, "after_bos", soft(backbone, 2), logits_processor=[watch], max_new_tokens=1)
    for row, prompt in zip(seen[0].tolist(), PROMPTS, strict=True):
        assert set(row) == set(prompt)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "opt"])
def test_beam_search_of_a_row_alone_equals_the_row_in_a_batch(family: str) -> None:
    backbone = tiny_backbone(family)
    prefix = soft(backbone, 2)
    for position in ("after_bos", "before_completion"):
        at = POSITIONS[position]
        together = generated(backbone, position, prefix, num_beams=3, max_new_tokens=5)
        for row in (0, 1, 3):
            single = backbone.generate(
                encoded()[row : row + 1],
                [at(PROMPTS[row])],
                prefix[row : row + 1],
                max_new_tokens=5,
                num_beams=3,
                do_sample=False,
            )
            assert single == [together[row]], (position, row)


@positions
def test_generation_and_training_see_the_same_logits(backbone: FrozenBackbone, position: str) -> None:
    """Each step's scores of generation hold the log-probability that the training path gives the chosen token."""
    prefix, steps = soft(backbone, 2), []

    def watch(input_ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores.float().log_softmax(-1))
        return scores

    out = generated(backbone, position, prefix, logits_processor=[watch], max_new_tokens=6)
    for row, new in enumerate(out):
        if not new:
            continue
        batch = make_batch([PROMPTS[row]], [new], [POSITIONS[position](PROMPTS[row])])
        with torch.no_grad():
            ours = backbone.completion_logprobs(batch, prefix[row : row + 1])
        theirs = torch.stack([steps[j][row, token] for j, token in enumerate(new)])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_end_of_sequence_ends_an_answer(llama: FrozenBackbone) -> None:
    prefix = soft(llama, 1)
    full = generated(llama, "after_bos", prefix, eos_token_id=VOCABULARY - 1)
    row = max(full, key=lambda r: len(set(r)))
    stop = row[3]
    cut = generated(llama, "after_bos", prefix, eos_token_id=[stop, VOCABULARY - 1])
    assert cut == [r[: r.index(stop)] if stop in r else r for r in full]
    assert cut != full


def test_token_0_may_be_the_end_of_sequence(llama: FrozenBackbone) -> None:
    def always_0(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[1]) == 0, 1e9, scores)

    assert generated(llama, "after_bos", None, eos_token_id=0, logits_processor=[always_0]) == [[]] * len(PROMPTS)


def test_every_end_that_the_checkpoint_names_ends_an_answer() -> None:
    """Gemma's turns end with a token that its tokenizer does not call the end of sequence."""
    backbone = tiny_backbone("llama")
    full = generated(backbone, "after_bos", soft(backbone, 1))
    stop = max(full, key=lambda r: len(set(r)))[2]
    backbone.model.generation_config.eos_token_id = [EOS, stop]
    cut = generated(backbone, "after_bos", soft(backbone, 1))
    assert cut == [r[: r.index(stop)] if stop in r else r for r in full]


def test_sampling_is_seeded(llama: FrozenBackbone) -> None:
    outs, prefix = [], soft(llama, 1)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(generated(llama, "after_bos", prefix, do_sample=True, temperature=1.0))
    assert outs[0] == outs[1] != outs[2]


# Loading, precision, records


def test_bfloat16_autocast_stays_near_float32_and_phi_float32() -> None:
    exact = tiny_backbone("llama")
    rounded = FrozenBackbone(tiny_model("llama"), build_tokenizer(), precision="bfloat16")
    assert rounded.autocast_dtype == torch.bfloat16
    for position in ("after_bos", "before_completion"):
        phi = phi_for(exact)
        out = rounded.completion_logprobs(batch_at(position), phi(VECTORS, PRESENT))
        assert out.dtype == torch.float32
        expected = exact.completion_logprobs(batch_at(position), phi(VECTORS, PRESENT))
        assert float((out - expected).detach().abs().mean()) < 0.1 * float(expected.detach().abs().mean())
        out.sum().backward()
        assert phi.w1.weight.grad is not None
        assert phi.w1.weight.grad.dtype == torch.float32
    half = FrozenBackbone(tiny_model("llama").bfloat16(), build_tokenizer(), precision="bfloat16")
    assert half.autocast_dtype is None
    assert half.completion_logprobs(batch_at("after_bos"), soft(half, 1)).dtype == torch.float32


def test_the_anchor_and_the_norm_are_those_of_the_embedding_table(llama: FrozenBackbone) -> None:
    table = llama.model.get_input_embeddings().weight.detach()
    assert llama.token_norm() == pytest.approx(float(table.norm(dim=1).mean()), rel=1e-5)
    tokens = llama.tokenizer("he", add_special_tokens=False)["input_ids"]
    wanted = (tokens * 5)[:5]
    assert torch.equal(llama.anchor("he", 5), table[wanted])
    assert torch.equal(llama.anchor("", 1), table[[EOS]])


def test_load_reads_what_was_saved(tmp_path: Path) -> None:
    saved = tiny_backbone("llama")
    saved.model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    loaded = FrozenBackbone.load(BackboneConfig(model=str(tmp_path), device="cpu"), "float32")
    assert loaded.fingerprint() == saved.fingerprint()
    assert loaded.source == str(tmp_path)
    with torch.no_grad():
        ours = loaded.completion_logprobs(batch_at("after_bos"), soft(saved, 1))
        expected = saved.completion_logprobs(batch_at("after_bos"), soft(saved, 1))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_load_says_in_one_line_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    for model in ("", str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(BackboneError, match=r"^backbone\.model: expected") as caught:
            FrozenBackbone.load(BackboneConfig(model=model))
        assert "\n" not in str(caught.value)


def test_logits_alone_is_the_models_own_forward(backbone: FrozenBackbone) -> None:
    """The reference of this file is right where transformers can say so itself."""
    with torch.no_grad():
        theirs = backbone.model(input_ids=torch.tensor([PROMPTS[3]])).logits[0]
        torch.testing.assert_close(logits_alone(backbone.model, PROMPTS[3], None, 0), theirs, rtol=1e-4, atol=1e-4)
