"""Items that a language model writes code by code, under the trie of valid codes: drawn at random, or the likeliest.

Whole batches at once, without a loop over rows. Partial codes that several draws or beams of a prompt share are run
through the model once, prompts are read once, and only the logits of a level's codes are ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2p.errors import ConfigError
from e2p.items.trie import Trie
from e2p.items.vocabulary import CodeVocabulary
from e2p.model.prefill import Prefilled


@dataclass(frozen=True, eq=False)
class Candidates:
    """Items drawn for each prompt.

    Args:
        rows: int64 [B, n]: catalogue rows; one may come several times.
        logprobs: float32 [B, n]: log-probability of each at temperature 1, all valid codes of a level summing to 1.
    """

    rows: Int[Tensor, "b n"]
    logprobs: Float[Tensor, "b n"]


@dataclass(frozen=True, eq=False)
class Ranked:
    """The likeliest items found for each prompt, best first, equally likely ones by row.

    Args:
        rows: int64 [B, k]: catalogue rows, all different; -1 at the end where no more were found.
        logprobs: float32 [B, k]: as in :class:`Candidates`; -inf where the row is -1.
        certain: [B]: whether these are the k likeliest of all items, as an exhaustive search would rank them.
    """

    rows: Int[Tensor, "b k"]
    logprobs: Float[Tensor, "b k"]
    certain: Bool[Tensor, "b"]


@torch.no_grad()
def sample_items(
    prefilled: Prefilled,
    vocabulary: CodeVocabulary,
    n: int = 30,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    tokens_per_pass: int = 8192,
) -> Candidates:
    """Independent draws of items for each of B prompts, every code drawn among the valid ones.

    Args:
        prefilled: the prompts, as :func:`e2p.model.prefill.prefill` has read them; it may be used again.
        vocabulary: codes and their tokens.
        n: draws for each prompt.
        temperature: divides the logits before a code is drawn; the log-probabilities returned are those at 1.
        generator: of the draws, on the device of the model; None: torch's own.
        tokens_per_pass: bounds memory: so many tokens are run, and so many kept behind the prompts, at a time.

    Raises:
        ConfigError: a number is out of range.
        BackboneError: prompt and codes have more tokens than the backbone's window.
    """
    _require_whole(n=n, tokens_per_pass=tokens_per_pass)
    _require_temperature(temperature)
    prefilled.require_room(vocabulary.levels)
    tokens, trie = vocabulary.on(prefilled.hidden.device)
    found = [
        _sampled(part, tokens, trie, n, temperature, generator, tokens_per_pass)
        for part in _parts(prefilled, n * len(tokens), tokens_per_pass)
    ]
    return Candidates(torch.cat([part.rows for part in found]), torch.cat([part.logprobs for part in found]))


def _sampled(
    prefilled: Prefilled,
    tokens: Sequence[Tensor],
    trie: Trie,
    n: int,
    temperature: float,
    generator: torch.Generator | None,
    tokens_per_pass: int,
) -> Candidates:
    batch, every = len(prefilled), trie.offsets[-1]
    nodes = trie.root(batch)  # of the rows that are run
    at = query = torch.arange(batch, device=trie.device).repeat_interleave(n)  # row, and prompt, of each draw
    total = torch.zeros(batch * n, device=trie.device)
    for level, names in enumerate(tokens):
        logits = prefilled.logits(names).masked_fill(~trie.allowed(nodes, level), -torch.inf)
        # From the greatest one down, that no temperature is too small to divide by.
        heated = (logits - logits.amax(-1, keepdim=True)) / temperature
        codes = torch.multinomial(heated.softmax(-1)[at], 1, generator=generator).squeeze(-1)
        total += logits.log_softmax(-1)[at, codes]
        drawn = trie.step(nodes[at], codes)
        if level + 1 < len(tokens):
            # Draws with the same prompt and node have the same past: one row for all of them, that of any of them.
            pairs, row = torch.unique(query * every + drawn, return_inverse=True)
            one = torch.empty_like(pairs).scatter_(0, row, torch.arange(len(row), device=row.device))
            prefilled = prefilled.extend(at[one], names[codes[one]], tokens_per_pass)
            nodes, at = pairs % every, row
    return Candidates(trie.leaf(drawn).view(batch, n), total.view(batch, n))


@torch.no_grad()
def score_items(
    prefilled: Prefilled,
    vocabulary: CodeVocabulary,
    rows: Int[Tensor, "b"],
    temperature: float = 1.0,
    tokens_per_pass: int = 8192,
) -> Float[Tensor, "b"]:
    """Log-probability of one item for each of B prompts, as :func:`sample_items` would draw it: float32 [B].

    Args:
        prefilled: the prompts, as :func:`e2p.model.prefill.prefill` has read them; it may be used again.
        vocabulary: codes and their tokens.
        rows: int64 [B]: catalogue rows.
        temperature: divides the logits.
        tokens_per_pass: so many tokens are run at a time.

    Raises:
        ConfigError: a number is out of range.
        BackboneError: prompt and codes have more tokens than the backbone's window.
    """
    _require_whole(tokens_per_pass=tokens_per_pass)
    _require_temperature(temperature)
    prefilled.require_room(vocabulary.levels)
    tokens, trie = vocabulary.on(prefilled.hidden.device)
    codes = torch.from_numpy(vocabulary.ids.codes[rows.cpu().numpy()]).to(trie.device)
    nodes, every = trie.root(len(prefilled)), torch.arange(len(prefilled), device=trie.device)
    total = torch.zeros(len(prefilled), device=trie.device)
    for level, names in enumerate(tokens):
        code = codes[:, level]
        logits = (prefilled.logits(names) / temperature).masked_fill(~trie.allowed(nodes, level), -torch.inf)
        total += logits.log_softmax(-1)[every, code]
        nodes = trie.step(nodes, code)
        if level + 1 < len(tokens):
            prefilled = prefilled.extend(every, names[code], tokens_per_pass)
    return total


@torch.no_grad()
def best_items(
    prefilled: Prefilled,
    vocabulary: CodeVocabulary,
    k: int,
    width: int | None = None,
    exact: bool = False,
    tokens_per_pass: int = 8192,
) -> Ranked:
    """The k likeliest items for each of B prompts, by beam search among the valid codes.

    Log-probabilities only fall as codes are added. So where the k-th item is likelier than every partial code that was
    ever discarded, no better item has been missed, and the result is certain.

    Args:
        prefilled: the prompts, as :func:`e2p.model.prefill.prefill` has read them; it may be used again.
        vocabulary: codes and their tokens.
        k: items for each prompt.
        width: partial codes that are kept for each prompt; None: k.
        exact: search again with twice the width where the result is not certain, until all are; at the latest, when
            the width is that of the trie.
        tokens_per_pass: bounds memory: so many tokens are run, and so many kept behind the prompts, at a time; with a
            width beyond it, as many as one prompt needs.

    Raises:
        ConfigError: a number is out of range.
        BackboneError: prompt and codes have more tokens than the backbone's window.
    """
    width = k if width is None else width
    _require_whole(k=k, width=width, tokens_per_pass=tokens_per_pass)
    prefilled.require_room(vocabulary.levels)
    tokens, trie = vocabulary.on(prefilled.hidden.device)

    def searched(some: Prefilled, width: int) -> Ranked:
        parts = _parts(some, width * len(tokens), tokens_per_pass)
        found = [_beams(part, tokens, trie, k, width, tokens_per_pass) for part in parts]
        return Ranked(*(torch.cat([getattr(f, name) for f in found]) for name in ("rows", "logprobs", "certain")))

    best = searched(prefilled, width)
    most = max(high - low for low, high in zip(trie.offsets[:-1], trie.offsets[1:], strict=True))
    while exact and width < most and not best.certain.all():
        width = min(2 * width, most)
        open_ = (~best.certain).nonzero().squeeze(-1)
        again = searched(prefilled.select(open_), width)
        for name in ("rows", "logprobs", "certain"):
            getattr(best, name)[open_] = getattr(again, name)
    return best


def _beams(
    prefilled: Prefilled, tokens: Sequence[Tensor], trie: Trie, k: int, width: int, tokens_per_pass: int
) -> Ranked:
    batch = len(prefilled)
    nodes, scores = trie.root(batch)[:, None], torch.zeros(batch, 1, device=trie.device)
    lost = torch.full((batch,), -torch.inf, device=trie.device)  # the best partial code that was discarded
    for level, names in enumerate(tokens):
        last = level + 1 == len(tokens)
        alive = nodes >= 0
        logits = prefilled.logits(names).masked_fill(~trie.allowed(nodes[alive], level), -torch.inf)
        spread = scores.new_full((*nodes.shape, len(names)), -torch.inf)
        spread[alive] = scores[alive][:, None] + logits.log_softmax(-1)
        count = min(k if last else width, spread[0].numel())
        scores, at = _with_ties(spread.flatten(1), count + 1)
        parent, codes = at // len(names), at % len(names)
        nodes = torch.where(scores > -torch.inf, trie.step(nodes.gather(1, parent), codes), -1)
        # Likeliest first, and equals by row (partial ones by node).
        order = (trie.leaf(nodes) if last else nodes).argsort(1)
        order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        if not last and order.shape[1] > count:
            lost = torch.maximum(lost, scores.gather(1, order)[:, count])
        order = order[:, :count]
        scores, nodes = scores.gather(1, order), nodes.gather(1, order)
        if not last:
            row = alive.flatten().cumsum(0).view_as(alive) - 1
            parent, codes, alive = row.gather(1, parent.gather(1, order)), codes.gather(1, order), nodes >= 0
            prefilled = prefilled.extend(parent[alive], names[codes[alive]], tokens_per_pass)
    rows = scores.new_full((batch, k), -1, dtype=torch.int64)
    logprobs = scores.new_full((batch, k), -torch.inf)
    rows[:, :count], logprobs[:, :count] = trie.leaf(nodes), scores
    # Not where they are equal: an equal item of a lower row may have been lost with the partial code.
    return Ranked(rows, logprobs, (logprobs[:, -1] > lost) | (lost == -torch.inf))


def _with_ties(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest ``count`` of each row, and whatever equals the last of them: values and places, [B, count or more].

    Which of some equals ``topk`` takes is not told, so all are taken before they are put in order.
    """
    count = min(count, scores.shape[1])
    edge = scores.topk(count).values[:, -1:]
    ties = (scores >= edge) & (scores > -torch.inf)
    found = scores.topk(max(count, int(ties.sum(1).max())))
    return found.values, found.indices


def _parts(prefilled: Prefilled, tokens: int, tokens_per_pass: int) -> Iterator[Prefilled]:
    """Prompts, so many at a time that what is kept behind them, ``tokens`` for each, stays within bounds."""
    size = max(1, tokens_per_pass // tokens)
    if len(prefilled) <= size:
        yield prefilled
        return
    for some in torch.arange(len(prefilled), device=prefilled.hidden.device).split(size):
        yield prefilled.select(some)


def _require_whole(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}; raise it")


def _require_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: expected a number > 0, got {temperature}; best_items takes the likeliest")
