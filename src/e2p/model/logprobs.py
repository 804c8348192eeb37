"""Log-probabilities of labels from hidden states: logits exist for a chunk of labelled positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Logits held at a time: rows, and entries of the vocabulary. On a CPU a tile of logits and the weights that it is made
# of stay in the cache, so that the weights are read once for both products; a GPU wants few large products.
_CPU_ROWS, _CPU_TILE = 512, 2048
_DEVICE_BYTES = 256 * 2**20


class Head(nn.Module):
    """A causal LM's output layer with what some families add to it (scaling, soft cap).

    Args:
        linear: the output embedding, a frozen ``nn.Linear``.
        scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``, or None.
    """

    def __init__(self, linear: Any, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.linear: Any = linear
        self.scale, self.softcap = scale, softcap

    def forward(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """Logits in float32."""
        return self._finished(self.linear(hidden))

    def some(self, hidden: Float[Tensor, "n h"], tokens: Int[Tensor, "m"]) -> Float[Tensor, "n m"]:
        """Logits of some tokens alone, in float32."""
        if type(self.linear) is not nn.Linear:  # a quantised one has no rows to take
            return self(hidden)[:, tokens]
        bias = None if self.linear.bias is None else self.linear.bias[tokens]
        return self._finished(nn.functional.linear(hidden, self.linear.weight[tokens], bias))

    def _finished(self, logits: Tensor) -> Tensor:
        logits = logits.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def plain(self) -> bool:
        """Whether logits are hidden @ W.T and nothing else, so that the gradient has a closed form."""
        bare = isinstance(self.linear, nn.Linear) and getattr(self.linear, "bias", None) is None
        return bare and self.scale == 1 and self.softcap is None


def label_logprobs(
    hidden: Float[Tensor, "n h"],
    labels: Int[Tensor, "n"],
    head: Head,
    chunk: int | None = None,
    tile: int | None = None,
) -> Float[Tensor, "n"]:
    """log p(label | hidden) for each labelled position, float32.

    The gradient with respect to ``hidden`` is computed in the forward pass, chunk by chunk, and kept ([n, H] instead
    of logits [n, V]); the head is frozen, so nothing else needs one. This is exact, since every row's log-probability
    depends on its own hidden state alone.

    Args:
        hidden: hidden states of the labelled positions.
        labels: their token ids.
        head: the output layer.
        chunk: rows whose logits exist at a time; None: what suits the device.
        tile: entries of the vocabulary whose logits exist at a time, for a plain head; None: what suits the device.
    """
    vocabulary = int(head.linear.weight.shape[0])
    cpu = hidden.device.type == "cpu"
    if tile is None:
        tile = _CPU_TILE if cpu else vocabulary
    if chunk is None:
        # Without a closed form autograd keeps some copies of all logits of a chunk.
        wide = tile if head.plain else 4 * vocabulary
        chunk = max(64, _CPU_ROWS * _CPU_TILE // wide if cpu else _DEVICE_BYTES // (4 * wide))
    return _LabelLogProbs.apply(hidden, labels, head, chunk, tile)


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, chunk: int, tile: int) -> Tensor:
        needs_gradient = hidden.requires_grad
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            if head.plain:
                value, part = _closed_form(hidden[rows], labels[rows], head, needs_gradient, tile)
            else:
                value, part = _by_autograd(hidden[rows], labels[rows], head, needs_gradient)
            out[rows] = value
            if gradient is not None and part is not None:
                gradient[rows] = part
        ctx.save_for_backward(gradient)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * grad[:, None].to(gradient.dtype)), None, None, None, None


def _closed_form(
    hidden: Tensor, labels: Tensor, head: Head, with_gradient: bool, tile: int
) -> tuple[Tensor, Tensor | None]:
    """Softmax over the vocabulary tile by tile, with a running maximum that earlier sums are rescaled to.

    d log p(label) / d hidden = W[label] - sum_v p(v) W[v]
    """
    weight = head.linear.weight
    device = hidden.device.type
    # As autocast would do it, but each tile of weights is cast once for both products.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    inputs = hidden.to(dtype)
    own = torch.empty(len(hidden), device=hidden.device)
    total = torch.zeros_like(own)
    top = torch.full_like(own, -torch.inf)
    expected = torch.zeros(hidden.shape, device=hidden.device)
    with torch.autocast(device, enabled=False):
        for start in range(0, weight.shape[0], tile):
            part = weight[start : start + tile].to(dtype)
            logits = nn.functional.linear(inputs, part).float()
            at = labels - start
            inside = (at >= 0) & (at < len(part))
            own = torch.where(inside, logits.gather(1, at.clamp(0, len(part) - 1)[:, None])[:, 0], own)
            higher = torch.maximum(top, logits.amax(1))
            shrink = (top - higher).exp_()
            top = higher
            scaled = logits.sub_(top[:, None]).exp_()
            total.mul_(shrink).add_(scaled.sum(1))
            if with_gradient:
                expected.mul_(shrink[:, None]).add_(torch.matmul(scaled.to(dtype), part))
    value = own - top - total.log()
    if not with_gradient:
        return value, None
    return value, weight[labels].to(hidden.dtype) - (expected / total[:, None]).to(hidden.dtype)


def _by_autograd(hidden: Tensor, labels: Tensor, head: Head, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    with torch.enable_grad():
        inputs = hidden.detach().requires_grad_(with_gradient)
        logits = head(inputs)
        value = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
        part = torch.autograd.grad(value.sum(), inputs)[0] if with_gradient else None
    return value.detach(), part


def divergence(
    student: Float[Tensor, "n h"], teacher: Float[Tensor, "n h"], head: Head, chunk: int | None = None
) -> Float[Tensor, "n"]:
    """KL(teacher || student) of the next token's distributions at each position, in nats, float32.

    As in :func:`label_logprobs`, the gradient with respect to ``student`` is made in the forward pass, so that logits
    exist for a chunk of positions at a time. The teacher gets none.
    """
    vocabulary = int(head.linear.weight.shape[0])
    if chunk is None:
        chunk = max(64, (_CPU_ROWS * _CPU_TILE if student.device.type == "cpu" else _DEVICE_BYTES // 4) // vocabulary)
    return _Divergence.apply(student, teacher.detach(), head, chunk)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Head, chunk: int) -> Tensor:
        values, gradients = [], []
        for start in range(0, len(student), chunk):
            with torch.enable_grad():
                inputs = student[start : start + chunk].detach().requires_grad_(student.requires_grad)
                log_p = head(teacher[start : start + chunk]).log_softmax(-1)
                ratio = log_p - head(inputs).log_softmax(-1)
                value = (log_p.exp() * torch.where(log_p > -torch.inf, ratio, 0)).sum(-1)  # 0 log 0 is 0
                if student.requires_grad:
                    gradients.append(torch.autograd.grad(value.sum(), inputs)[0])
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * grad[:, None].to(gradient.dtype)), None, None, None
