"""Log-probabilities of labels against log_softmax, gather and autograd over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from e2p.errors import BackboneError
from e2p.model.backbone import FrozenBackbone
from e2p.model.logprobs import Head, divergence, label_logprobs
from tiny import tiny_backbone, tiny_model

N, H, V = 7, 8, 37


def head(kind: str) -> Head:
    torch.manual_seed(3)
    linear = nn.Linear(H, V, bias=kind == "bias").requires_grad_(False)
    return {
        "plain": Head(linear),
        "bias": Head(linear),
        "scale": Head(linear, scale=0.3),
        "softcap": Head(linear, softcap=0.5),
        "both": Head(linear, scale=4.0, softcap=2.0),
    }[kind]


def expected(hidden: Tensor, labels: Tensor, h: Head) -> Tensor:
    logits = hidden @ h.linear.weight.T
    if h.linear.bias is not None:
        logits = logits + h.linear.bias
    logits = logits * h.scale
    if h.softcap is not None:
        logits = h.softcap * torch.tanh(logits / h.softcap)
    return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("tile", [1, 5, V, None])
@pytest.mark.parametrize("chunk", [1, 3, N, 100, None])
@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "softcap", "both"])
def test_values_and_gradients_equal_those_over_all_logits(kind: str, chunk: int | None, tile: int | None) -> None:
    h = head(kind)
    hidden, labels = torch.randn(N, H) * 3, torch.randint(V, (N,))
    upstream = torch.randn(N)
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours, theirs = label_logprobs(one, labels, h, chunk, tile), expected(two, labels, h)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    assert h.linear.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(
            label_logprobs(hidden, labels, h, chunk, tile), theirs.detach(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["plain", "both"])
def test_half_precision_hidden_states_give_float32_values_and_their_own_gradients(kind: str) -> None:
    h = head(kind)
    h.linear.to(torch.bfloat16)
    hidden, labels = torch.randn(N, H).bfloat16().requires_grad_(), torch.randint(V, (N,))
    out = label_logprobs(hidden, labels, h, 3)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = hidden.detach().float().requires_grad_()
    h.linear.float()
    expected(exact, labels, h).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=0.05, atol=0.03)


def test_the_number_of_rows_held_as_logits_is_the_chunk() -> None:
    h, seen = head("softcap"), []
    h.linear.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    label_logprobs(torch.randn(N, H).requires_grad_(), torch.randint(V, (N,)), h, 3)
    assert seen == [3, 3, 1]


def test_a_plain_head_holds_a_tile_of_the_vocabulary_for_a_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    h, seen, linear = head("plain"), [], nn.functional.linear

    def spy(inputs: Tensor, weight: Tensor) -> Tensor:
        seen.append((len(inputs), len(weight)))
        return linear(inputs, weight)

    monkeypatch.setattr(nn.functional, "linear", spy)
    label_logprobs(torch.randn(N, H).requires_grad_(), torch.randint(V, (N,)), h, 4, 20)
    assert seen == [(4, 20), (4, 17), (3, 20), (3, 17)]


def test_logits_far_beyond_what_exp_can_hold_overflow_in_no_tile() -> None:
    h = head("plain")
    hidden = (torch.randn(N, H) * 300).requires_grad_()
    labels = torch.randint(V, (N,))
    out = label_logprobs(hidden, labels, h, 3, 5)
    torch.testing.assert_close(out, expected(hidden, labels, h), rtol=1e-4, atol=1e-3)
    out.sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_no_labels_give_no_values() -> None:
    hidden = torch.zeros(0, H).requires_grad_()
    out = label_logprobs(hidden, torch.zeros(0, dtype=torch.long), head("plain"), 3)
    assert out.shape == (0,)
    out.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_the_head_of_a_real_family_gives_the_models_own_logits(family: str) -> None:
    backbone = tiny_backbone(family)
    ids = torch.tensor([[0, 9, 41, 77, 120]])
    with torch.no_grad():
        logits = backbone.model(input_ids=ids).logits[0]
        hidden = backbone.base(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(backbone.head(hidden), logits, rtol=1e-5, atol=1e-5)
        values = label_logprobs(hidden, torch.tensor([1, 2, 3, 4, 5]), backbone.head)
    torch.testing.assert_close(values, torch.log_softmax(logits, -1)[range(5), [1, 2, 3, 4, 5]], rtol=1e-5, atol=1e-5)
    assert backbone.head.plain == (family == "llama")


def test_an_output_layer_that_does_something_else_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    FrozenBackbone(model, None)  # a hook that changes nothing is nothing
    model.register_forward_hook(lambda module, inputs, output: _shifted(output))
    with pytest.raises(BackboneError, match="output layer of 'llama'"):
        FrozenBackbone(model, None)


def _shifted(output: object) -> object:
    output.logits = output.logits * 1.5  # type: ignore[attr-defined]
    return output


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("kind", ["plain", "bias", "both"])
def test_the_divergence_is_torchs_own_over_all_logits(kind: str, chunk: int | None) -> None:
    h = head(kind)
    student, teacher, upstream = torch.randn(N, H) * 3, torch.randn(N, H) * 3, torch.randn(N)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    target = teacher.clone().requires_grad_()
    ours = divergence(one, target, h, chunk)
    logs = [h(states).log_softmax(-1) for states in (two, teacher)]
    theirs = torch.nn.functional.kl_div(logs[0], logs[1], log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)
    assert target.grad is None  # the teacher is not taught
    with torch.no_grad():
        torch.testing.assert_close(divergence(student, teacher, h, chunk), ours.detach())
        assert divergence(student, student, h).abs().max() < 1e-6


def test_the_divergence_bears_logits_that_are_masked() -> None:
    """Some families set the logits of unused entries of the vocabulary to minus infinity."""
    h = head("bias")
    with torch.no_grad():
        h.linear.bias[3] = -torch.inf
    student = torch.randn(N, H, requires_grad=True)
    values = divergence(student, torch.randn(N, H), h)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
