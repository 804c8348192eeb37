"""Rows of tokens that one backbone continues together: they come and go, and each sees itself alone.

Rows end at one place and begin where they begin, with padding on the left, so a step writes its keys and values into
one column. What is kept has room in both directions: a row that leaves is overwritten by the last one, and a row that
comes is written behind it, without copying the others. Of rows that come together, a prompt that several have, with
their soft tokens behind it, is read once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from e2p.data.templates import EncodedPrompt
from e2p.model.backbone import FrozenBackbone
from e2p.model.splice import Spliced, splice

_AHEAD = 64  # columns of room for tokens to come
_BESIDE = 8  # rows are made room for in steps of so many
_TOKENS_PER_PASS = 8192


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt to be read.

    Args:
        prompt: its ids.
        at: index in it that the soft tokens precede.
        prefix: soft tokens [K, H], or None.
        copies: rows that begin with it.
    """

    prompt: EncodedPrompt
    at: int
    prefix: Tensor | None
    copies: int = 1

    @property
    def prefix_tokens(self) -> int:
        """K, or 0."""
        return 0 if self.prefix is None else len(self.prefix)

    @property
    def tokens(self) -> int:
        """Tokens of a row, soft tokens included."""
        return len(self.prompt.ids) + self.prefix_tokens


class Rows(Protocol):
    """Rows that are continued together, in an order that only ``drop`` changes."""

    lengths: list[int]

    def read(self, readings: Sequence[Reading]) -> Float[Tensor, "n h"]:
        """Read prompts and put their rows behind those that are there; the last hidden state of each new row.

        What was there is unharmed if it raises.
        """
        ...

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "r h"]:
        """One more token for each row; the last hidden states."""
        ...

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Take rows out; of each row that stays, in its new order, the place that it had."""
        ...


def spliced(backbone: FrozenBackbone, readings: Sequence[Reading]) -> Spliced:
    """Prompts with their soft tokens, which may be of different numbers, padded on the left."""
    counts = [reading.prefix_tokens for reading in readings]
    width = max(reading.tokens for reading in readings)
    parts: dict[int, tuple[list[int], Spliced]] = {}
    for count in sorted(set(counts)):
        rows = [row for row, other in enumerate(counts) if other == count]
        ids, lengths, _ = backbone.padded([readings[row].prompt for row in rows])
        at = torch.tensor([readings[row].at for row in rows], device=ids.device)
        prefix = torch.stack([p for row in rows if (p := readings[row].prefix) is not None]) if count else None
        parts[count] = rows, splice(backbone.embed(ids), lengths, prefix, at, pad_left=True)
    if len(parts) == 1:
        return parts[counts[0]][1]
    rows, first = parts[counts[0]]
    embeds = first.embeds.new_zeros(len(readings), width, first.embeds.shape[-1])
    mask, positions = (first.mask.new_zeros(len(readings), width) for _ in range(2))
    for rows, part in parts.values():
        start = width - part.mask.shape[1]
        embeds[rows, start:], mask[rows, start:], positions[rows, start:] = part
    return Spliced(embeds, mask, positions)


class _Part(NamedTuple):
    """Readings by their places, their last hidden states, and the cache that has a row for each."""

    places: list[int]
    hidden: Tensor
    cache: Any


def _shared(readings: Sequence[Reading]) -> list[list[int]]:
    """Places of those with the same prompt as others and nothing of their own before its end."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, reading in enumerate(readings):
        if reading.prefix is None or reading.at == len(reading.prompt.ids):
            groups.setdefault(tuple(reading.prompt.ids), []).append(place)
    return [places for places in groups.values() if len(places) > 1]


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of its own with some of the rows."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.batch_select_indices(rows)
    return other


class _Layer(DynamicLayer):
    """Keys and values of one layer: the part in use of two tensors with room."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.room = (keys, values)
        self.device, self.dtype, self.is_initialized = keys.device, keys.dtype, True

    def use(self, rows: int, begin: int, end: int) -> None:
        self.used = (rows, begin, end)
        self.keys, self.values = (room[:rows, :, begin:end] for room in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, begin, old = self.used
        end = old + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:rows, :, old:end] = states
        self.use(rows, begin, end)
        return self.keys, self.values


class CachedRows:
    """Rows whose keys and values are kept.

    Args:
        backbone: what reads them; see :func:`can_join`.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.backbone = backbone
        self.lengths: list[int] = []
        self._end = 0
        self._cache: Any = None
        self._mask = self._places = torch.empty(0, 0, dtype=torch.long)

    @property
    def _begin(self) -> int:
        """Where the longest row begins: what is before it no row needs."""
        return self._end - max(self.lengths)

    @torch.no_grad()
    def read(self, readings: Sequence[Reading]) -> Float[Tensor, "n h"]:
        shared = _shared(readings)
        alone = [place for place in range(len(readings)) if not any(place in places for places in shared)]
        parts = []
        with self.backbone.autocast():
            if alone:
                parts.append(self._read_alone(readings, alone))
            if shared:
                parts += self._read_shared(readings, shared)
        first = [0, *itertools.accumulate(reading.copies for reading in readings)]
        lengths = [reading.tokens for reading in readings for _ in range(reading.copies)]
        old = len(self.lengths)
        self._make_room(old + len(lengths), max(lengths), 1, parts[0].cache)
        hidden = parts[0].hidden.new_empty(len(lengths), parts[0].hidden.shape[-1])
        for part in parts:
            rows = [row for place in part.places for row in range(first[place], first[place + 1])]
            source = [at for at, place in enumerate(part.places) for _ in range(readings[place].copies)]
            hidden[rows] = part.hidden[source]
            self._write([old + row for row in rows], part.cache, source)
        self.lengths += lengths
        self._arrange()
        return hidden

    def _read_alone(self, readings: Sequence[Reading], places: list[int]) -> _Part:
        cache: Any = DynamicCache()  # not as the configuration has it: the mask does what a sliding window would
        hidden = self.backbone.hidden_states(spliced(self.backbone, [readings[at] for at in places]), cache)
        return _Part(places, hidden[:, -1], cache)

    def _read_shared(self, readings: Sequence[Reading], shared: Sequence[list[int]]) -> Iterator[_Part]:
        """Each of these prompts once, and behind it the soft tokens of all its rows."""
        bare = [replace(readings[places[0]], prefix=None) for places in shared]
        prompts, cache = spliced(self.backbone, bare), DynamicCache()
        hidden = self.backbone.hidden_states(prompts, cache)[:, -1]
        which = {place: at for at, places in enumerate(shared) for place in places}
        for count in sorted({readings[place].prefix_tokens for place in which}):
            places = [place for place in which if readings[place].prefix_tokens == count]
            rows = torch.tensor([which[place] for place in places], device=hidden.device)
            own, last = _selected(cache, rows), hidden[rows]
            if count:
                prefix = torch.stack([p for place in places if (p := readings[place].prefix) is not None])
                none = torch.zeros_like(rows)
                behind = splice(prompts.embeds.new_zeros(len(rows), 0, prefix.shape[-1]), none, prefix, none)
                mask = torch.cat([prompts.mask[rows], behind.mask], dim=1)
                positions = behind.positions + prompts.positions[rows, -1:] + 1
                last = self.backbone.hidden_states(Spliced(behind.embeds, mask, positions), own)[:, -1]
            yield _Part(places, last, own)

    def _write(self, rows: list[int], cache: Any, source: list[int]) -> None:
        """Keys and values that were read, into the rooms of rows, up to the common end."""
        begin = self._end - cache.layers[0].keys.shape[-2]
        for layer, read in zip(self._cache.layers, cache.layers, strict=True):
            for room, states in zip(layer.room, (read.keys, read.values), strict=True):
                room[rows, :, max(0, begin) : self._end] = states[source, :, max(0, -begin) :]
                room[rows, :, : max(0, begin)] = 0  # of those who were here before, nothing stays

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "r h"]:
        rows = len(self.lengths)
        if self._end == self._mask.shape[1]:
            self._make_room(rows, 0, 1)
            self._arrange()
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        inputs = Spliced(self.backbone.embed(ids), self._mask[:rows, self._begin : self._end + 1], self._places)
        with self.backbone.autocast():
            hidden = self.backbone.hidden_states(inputs, self._cache)[:, -1]
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._places = self._places + 1
        return hidden

    @torch.no_grad()
    def drop(self, gone: Sequence[int]) -> list[int]:
        order = _without(len(self.lengths), gone)
        if not order:
            self.lengths, self._cache = [], None
            return order
        moved = [place for place, old in enumerate(order) if place != old]
        if moved:
            sources = [order[place] for place in moved]
            for layer in self._cache.layers:
                for room in layer.room:
                    room[moved] = room[sources]
        self.lengths = [self.lengths[old] for old in order]
        self._arrange()
        return order

    def _make_room(self, rows: int, width: int, ahead: int, like: Any = None) -> None:
        """Room for so many rows and, before and behind the end, so many tokens; all moves where there is none."""
        if self._cache is None:
            live, batch, length, self._end = 0, 0, 0, 0
        else:
            live, (batch, length) = max(self.lengths), self._mask.shape
            if rows <= batch and width <= self._end and self._end + ahead <= length:
                return
        old = [layer.room for layer in self._cache.layers] if live else [(x.keys, x.values) for x in like.layers]
        end = max(width, live)
        shape = (-(-rows // _BESIDE) * _BESIDE, end + max(ahead, _AHEAD))
        layers = []
        for pair in old:
            keys, values = (room.new_zeros(shape[0], room.shape[1], shape[1], room.shape[3]) for room in pair)
            if live:
                count = len(self.lengths)
                for room, before in zip((keys, values), pair, strict=True):
                    room[:count, :, end - live : end] = before[:count, :, self._end - live : self._end]
            layers.append(_Layer(keys, values))
        self._mask = torch.zeros(shape, dtype=torch.long, device=layers[0].device)
        self._cache, self._end = Cache(layers=layers), end

    def _arrange(self) -> None:
        """Mask, positions and the part in use, for the rows that there are."""
        count = len(self.lengths)
        lengths = torch.tensor(self.lengths, device=self._mask.device)[:, None]
        self._mask[:count] = torch.arange(self._mask.shape[1], device=lengths.device) >= self._end - lengths
        self._places = lengths
        for layer in self._cache.layers:
            layer.use(count, self._begin, self._end)


class RereadRows:
    """Rows that are read anew for every token, for backbones that keep something else than keys and values: slow, but
    right. Padded on the right, which no real token looks at.

    Args:
        backbone: what reads them.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.backbone = backbone
        self.lengths: list[int] = []
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def read(self, readings: Sequence[Reading]) -> Float[Tensor, "n h"]:
        inputs = spliced(self.backbone, readings)
        rows = [row[real.bool()] for row, real in zip(inputs.embeds, inputs.mask, strict=True)]
        hidden = self._read(rows)
        copies = [place for place, reading in enumerate(readings) for _ in range(reading.copies)]
        self._rows += [rows[place] for place in copies]
        self.lengths += [len(rows[place]) for place in copies]
        return hidden[copies]

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "r h"]:
        new = self.backbone.embed(torch.tensor(tokens, device=self.backbone.device)[:, None])
        self._rows = [torch.cat(pair) for pair in zip(self._rows, new, strict=True)]
        self.lengths = [len(row) for row in self._rows]
        return self._read(self._rows)

    def drop(self, gone: Sequence[int]) -> list[int]:
        order = _without(len(self._rows), gone)
        self._rows = [self._rows[old] for old in order]
        self.lengths = [len(row) for row in self._rows]
        return order

    def _read(self, rows: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows], device=self.backbone.device)
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place = torch.arange(embeds.shape[1], device=lengths.device).expand(embeds.shape[:2])
        real = place < lengths[:, None]
        inputs, parts = Spliced(embeds, real.long(), place * real), []
        with self.backbone.autocast():
            for some in torch.arange(len(rows), device=lengths.device).split(
                max(1, _TOKENS_PER_PASS // embeds.shape[1])
            ):
                hidden = self.backbone.hidden_states(Spliced(*(values[some] for values in inputs)))
                parts.append(hidden[torch.arange(len(some)), lengths[some] - 1])
        return torch.cat(parts)


def can_join(backbone: FrozenBackbone) -> bool:
    """Whether rows can come to others by their keys and values. Tried out too, since a family might do more than its
    configuration tells: rows that came and went must be what they are alone."""
    kinds = {type(layer) for layer in DynamicCache(config=backbone.config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return False
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 16).long().tolist()

    def played(rows: Rows) -> Tensor:
        some = [Reading(EncodedPrompt(part, 0, 0), 0, None) for part in (ids[:5], ids[5:7], ids[7:15])]
        rows.read(some[:2])
        rows.step(ids[:2])
        rows.drop([0])
        rows.step(ids[3:4])
        rows.read(some[2:])
        return torch.cat([rows.step(ids[4:6]), rows.step(ids[6:8])]).float()

    expected = played(RereadRows(backbone))
    try:
        got = played(CachedRows(backbone))
    except Exception:  # whatever a family has against it, there is another way
        return False
    return float((got - expected).norm()) < 0.05 * float(expected.norm())


def rows_of(backbone: FrozenBackbone, joined: bool) -> Rows:
    """No rows yet, of the kind that suits the backbone."""
    return CachedRows(backbone) if joined else RereadRows(backbone)


def _without(count: int, gone: Sequence[int]) -> list[int]:
    """Old places of the rows that stay: in the place of one that goes comes the last one."""
    order = list(range(count))
    for place in sorted(gone, reverse=True):
        order[place] = order[-1]
        order.pop()
    return order
