"""Where soft tokens go: pure functions on tensors, shared by training, scoring and generation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Spliced(NamedTuple):
    """Input of the backbone.

    Args:
        embeds: input embeddings [B, T + K, H]; padding holds zeros.
        mask: 1 where a real token stands [B, T + K].
        positions: position ids, counted from each row's first real token [B, T + K].
    """

    embeds: Float[Tensor, "b t h"]
    mask: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]


def splice(
    tokens: Float[Tensor, "b t h"],
    lengths: Int[Tensor, "b"],
    prefix: Float[Tensor, "b k h"] | None,
    at: Int[Tensor, "b"],
    pad_left: bool = False,
) -> Spliced:
    """Put each row's soft tokens before its token ``at``, then pad: never the other way round.

    Args:
        tokens: token embeddings, padded on the right.
        lengths: real tokens in each row.
        prefix: soft tokens; cast here, once, to the backbone's precision. None: no soft tokens.
        at: index of the token that the soft tokens precede, 0 to length.
        pad_left: padding on the left, as generation needs it.
    """
    batch, width, _ = tokens.shape
    k = 0 if prefix is None else prefix.shape[1]
    total = width + k
    both = tokens if prefix is None else torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
    place = torch.arange(total, device=tokens.device).expand(batch, total)
    if pad_left:
        place = place - (width - lengths)[:, None]
    real = (place >= 0) & (place < (lengths + k)[:, None])
    before, inside = place < at[:, None], place < (at + k)[:, None]
    source = torch.where(before, place + k, torch.where(inside, place - at[:, None], place))
    source = source.clamp(0, total - 1)
    embeds = both.gather(1, source[..., None].expand(-1, -1, both.shape[-1]))
    embeds = embeds.masked_fill(~real[..., None], 0)  # a product with 0 would keep NaN
    return Spliced(embeds, real.long(), place.clamp(min=0) * real)
