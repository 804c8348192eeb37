"""Prompts that are read once and continued in many ways: what decoding under constraints starts from.

The continuations of a prompt run side by side behind its keys and values, as tokens of one sequence whose attention
mask shows each the prompt and its own past alone. So a prompt's cache is held once, whatever many continuations it has,
and is not copied for them. Where a model has something else than such a cache (a recurrent state, attention in chunks
or with linear biases), whole sequences are run again: slow, but right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2p.data.templates import EncodedPrompt
from e2p.model.backbone import FrozenBackbone
from e2p.model.splice import Spliced, splice

_IMPLEMENTATIONS = ("sdpa", "eager", "e2p_sdpa_float32")  # of attention, that take any mask


@dataclass(frozen=True, eq=False)
class Prefilled:
    """R rows of tokens that a backbone has read; made by :func:`prefill`.

    Nothing in it ever changes, so it may be continued again and again.

    Args:
        backbone: what has read them.
        hidden: last hidden state of each row, in the precision of the forward pass.
        query: the prompt, 0 to B - 1, that each row begins with.
        lengths: tokens of each row, soft tokens included.
    """

    backbone: FrozenBackbone
    hidden: Float[Tensor, "r h"]
    query: Int[Tensor, "r"]
    lengths: Int[Tensor, "r"]

    def __len__(self) -> int:
        """R, the rows."""
        return len(self.hidden)

    def require_room(self, new: int) -> None:
        """Refuse to add what the window does not hold.

        Raises:
            BackboneError: prompt and new tokens together have more tokens than the window.
        """
        self.backbone.require_room(int(self.lengths.max()) + new)

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "m"]) -> Float[Tensor, "r m"]:
        """Logits of some tokens as the next of each row, float32; those of no others are computed."""
        with self.backbone.autocast():
            return self.backbone.head.some(self.hidden, tokens.to(self.hidden.device))

    def extend(self, rows: Int[Tensor, "n"], tokens: Int[Tensor, "n"], tokens_per_pass: int = 8192) -> Prefilled:
        """Rows with one more token each.

        Args:
            rows: rows of this; any number of times each, in any order, at least one in all.
            tokens: the tokens that follow.
            tokens_per_pass: so many are run at a time, or one of each prompt where that is more.

        Returns:
            The n new rows. This one stays as it is.
        """
        raise NotImplementedError

    def select(self, queries: Int[Tensor, "q"]) -> Prefilled:
        """Some of the prompts as if they alone had been read; only of what :func:`prefill` has returned."""
        raise NotImplementedError


@torch.no_grad()
def prefill(
    backbone: FrozenBackbone,
    prompts: Sequence[EncodedPrompt],
    at: Sequence[int],
    prefix: Float[Tensor, "b k h"] | None,
) -> Prefilled:
    """Read prompts, all in one pass.

    Args:
        backbone: the model.
        prompts: B encoded prompts, at least one.
        at: index in each prompt that the soft tokens precede.
        prefix: soft tokens, or None.

    Returns:
        One row for each prompt, in their order.

    Raises:
        BackboneError: a prompt has more tokens than the window.
    """
    ids, lengths, _ = backbone.padded(prompts)
    k = 0 if prefix is None else prefix.shape[1]
    backbone.require_room(ids.shape[1] + k)
    inputs = splice(backbone.embed(ids), lengths, prefix, torch.tensor(list(at), device=ids.device))
    if backbone.branches is None:
        backbone.branches = _can_branch(backbone)
    return (_Branches if backbone.branches else _Sequences).read(backbone, inputs, lengths + k)


@dataclass(frozen=True, eq=False)
class _Branches(Prefilled):
    """Rows of one prompt share its cache, in which each sees its own tokens.

    Args:
        cache: keys and values of S tokens of each of the B prompts, padding included.
        places: position of each cached token in its row.
        sees: which of its prompt's cached tokens a row consists of.
    """

    cache: Any
    places: Int[Tensor, "b s"]
    sees: Bool[Tensor, "r s"]

    @classmethod
    def read(cls, backbone: FrozenBackbone, inputs: Spliced, lengths: Tensor) -> Prefilled:
        from transformers import DynamicCache

        cache = DynamicCache()  # not as the configuration has it: the mask does what a sliding window would
        with backbone.autocast():
            hidden = backbone.hidden_states(inputs, cache)
        query = torch.arange(len(lengths), device=lengths.device)
        # Padded on the right: no real token ever looks at padding.
        last = hidden[query, lengths - 1]
        return cls(backbone, last, query, lengths, cache, inputs.positions, inputs.mask.bool())

    @torch.no_grad()
    def extend(self, rows: Int[Tensor, "n"], tokens: Int[Tensor, "n"], tokens_per_pass: int = 8192) -> Prefilled:
        query, (batch, old) = self.query[rows], self.places.shape
        at = _rank(query)
        width = int(at.max()) + 1

        # What is new of each prompt side by side. Where a prompt has less than another, a filler sees but itself.
        def packed(values: Tensor) -> Tensor:
            return values.new_zeros(batch, width, *values.shape[1:]).index_put_((query, at), values)

        ids, places = packed(tokens), packed(self.lengths[rows])
        itself = torch.eye(width, dtype=torch.bool, device=ids.device).expand(batch, width, width)
        sees = torch.cat([packed(self.sees[rows]), itself], dim=2)
        every = torch.cat([self.places, places], dim=1)
        cache, parts, step = _copied(self.cache), [], max(1, tokens_per_pass // batch)
        for start in range(0, width, step):
            part, seen = slice(start, start + step), slice(0, old + start + step)
            distance = places[:, part, None] - every[:, None, seen]
            embeds = self.backbone.embed(ids[:, part])
            mask = _mask(self.backbone, sees[:, part, seen], distance, embeds.dtype)
            with self.backbone.autocast():
                inputs = Spliced(embeds, torch.ones_like(ids[:, part]), places[:, part])
                parts.append(self.backbone.hidden_states(inputs, cache, mask))
        hidden = torch.cat(parts, dim=1)[query, at]
        return _Branches(self.backbone, hidden, query, self.lengths[rows] + 1, cache, every, sees[query, at])

    def select(self, queries: Int[Tensor, "q"]) -> Prefilled:
        cache = _copied(self.cache)
        cache.batch_select_indices(queries)
        chosen = {name: getattr(self, name)[queries] for name in ("hidden", "lengths", "places", "sees")}
        return replace(self, cache=cache, query=torch.arange(len(queries), device=queries.device), **chosen)


@dataclass(frozen=True, eq=False)
class _Sequences(Prefilled):
    """Rows as whole sequences of input embeddings, padded on the right, which are run again for every token."""

    embeds: Float[Tensor, "r s h"]

    @classmethod
    def read(
        cls, backbone: FrozenBackbone, inputs: Spliced, lengths: Tensor, query: Tensor | None = None, step: int = 0
    ) -> Prefilled:
        query = torch.arange(len(lengths), device=lengths.device) if query is None else query
        parts = []
        with backbone.autocast():
            for some in torch.arange(len(lengths), device=lengths.device).split(step or len(lengths)):
                hidden = backbone.hidden_states(Spliced(*(values[some] for values in inputs)))
                parts.append(hidden[torch.arange(len(some)), lengths[some] - 1])
        return cls(backbone, torch.cat(parts), query, lengths, inputs.embeds)

    @torch.no_grad()
    def extend(self, rows: Int[Tensor, "n"], tokens: Int[Tensor, "n"], tokens_per_pass: int = 8192) -> Prefilled:
        embeds = torch.nn.functional.pad(self.embeds[rows], (0, 0, 0, 1))
        lengths = self.lengths[rows]
        embeds[torch.arange(len(rows)), lengths] = self.backbone.embed(tokens)
        place = torch.arange(embeds.shape[1], device=rows.device).expand(embeds.shape[:2])
        real = place <= lengths[:, None]
        inputs = Spliced(embeds, real.long(), place * real)
        step = max(1, tokens_per_pass // embeds.shape[1])
        return _Sequences.read(self.backbone, inputs, lengths + 1, self.query[rows], step)

    def select(self, queries: Int[Tensor, "q"]) -> Prefilled:
        chosen = {name: getattr(self, name)[queries] for name in ("hidden", "lengths", "embeds")}
        return replace(self, query=torch.arange(len(queries), device=queries.device), **chosen)


def _rank(query: Tensor) -> Tensor:
    """For each row, how many before it belong to the same prompt."""
    order, counts = query.argsort(stable=True), torch.bincount(query)
    before = counts.cumsum(0) - counts
    places = torch.arange(len(query), device=query.device)
    return torch.empty_like(query).index_copy_(0, order, places - before[query[order]])


def _copied(cache: Any) -> Any:
    """A cache of its own with the same tensors: a layer puts others in their place as it grows and writes into none."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _mask(backbone: FrozenBackbone, sees: Tensor, distance: Tensor, dtype: torch.dtype) -> Any:
    """As the layers take it: what a token [B, T, S] sees, within the sliding window where a layer has one."""

    def shaped(mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if backbone.config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    windows = _windows(backbone)
    near = next((window for window in windows if window is not None), None)
    if near is None:
        return shaped(sees)
    sliding = shaped(sees & (distance < near))
    return {"full_attention": shaped(sees), "sliding_attention": sliding} if None in windows else sliding


def _windows(backbone: FrozenBackbone) -> set[int | None]:
    """Sliding windows that layers have; None stands for layers without one."""
    from transformers import DynamicCache

    return {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=backbone.config).layers}


@torch.no_grad()
def _can_branch(backbone: FrozenBackbone) -> bool:
    """Whether every layer is attention over all or the nearest tokens that takes any mask. Tried out too, since a
    family might do more with its mask: rows that ran side by side must be what they are alone."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=backbone.config).layers
    known = (
        all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and set(getattr(backbone.config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and len(_windows(backbone) - {None}) <= 1
        and getattr(backbone.config, "attention_chunk_size", None) is None
        and getattr(backbone.base, "_supports_attention_backend", False)
        and backbone.config._attn_implementation in _IMPLEMENTATIONS
        and backbone.takes_positions
    )
    if not known:
        return False
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 12, device=backbone.device).long()
    lengths = torch.tensor([2, 1], device=ids.device)
    inputs = splice(backbone.embed(ids[:4].view(2, 2)), lengths, None, torch.zeros_like(lengths))
    rows, after = torch.tensor([0] * 4 + [1] * 4, device=ids.device), torch.tensor([3, 6, 7], device=ids.device)

    def read(kind: type[_Branches] | type[_Sequences]) -> Tensor:
        return kind.read(backbone, inputs, lengths).extend(rows, ids[4:]).extend(after, ids[:3]).hidden.float()

    alone = read(_Sequences)
    try:
        beside = read(_Branches)
    except Exception:  # whatever a family has against such a mask, there is another way
        return False
    return float((beside - alone).norm()) < 0.05 * float(alone.norm())
