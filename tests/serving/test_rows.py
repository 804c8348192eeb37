"""Rows that come and go: each is, at every step, what it is alone without padding and without a cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from e2p.data.templates import EncodedPrompt
from e2p.model.backbone import FrozenBackbone
from e2p.serving.rows import CachedRows, Reading, RereadRows, can_join, spliced
from tiny import VOCABULARY, tiny_backbone


def hidden_alone(backbone: FrozenBackbone, reading: Reading, tokens: list[int]) -> Tensor:
    """Last hidden state of one row, put together by hand."""
    table = backbone.model.get_input_embeddings()
    ids, k = [*reading.prompt.ids, *tokens], 0 if reading.prefix is None else len(reading.prefix)
    embeds = [table(torch.tensor([token])) for token in ids]
    if reading.prefix is not None:
        embeds.insert(reading.at, reading.prefix)
    with torch.no_grad():
        places = torch.arange(len(ids) + k)[None]
        output = backbone.base(inputs_embeds=torch.cat(embeds)[None], position_ids=places, use_cache=False)
    return output.last_hidden_state[0, -1]


def some_reading(chance: random.Random, backbone: FrozenBackbone) -> Reading:
    ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 20))]
    k = chance.choice([0, 1, 1, 3])
    generator = torch.Generator().manual_seed(chance.randrange(1000))
    prefix = torch.randn(k, backbone.hidden_size, generator=generator) if k else None
    at = chance.randint(0, len(ids))
    if chance.random() < 0.5:  # one of a few prompts that others have too, the soft tokens mostly behind it
        ids = list(range(20, 20 + 7 * chance.randint(1, 2)))
        at = chance.choice([len(ids), len(ids), 3])
    return Reading(EncodedPrompt(ids, 0, 0), at, prefix, chance.choice([1, 1, 2]))


@pytest.mark.parametrize("kind", [CachedRows, RereadRows])
def test_rows_are_what_they_are_alone(backbone: FrozenBackbone, kind: type[Any]) -> None:
    chance = random.Random(3)
    rows = kind(backbone)
    alone: list[tuple[Reading, list[int]]] = []

    def check(hidden: Tensor, start: int = 0) -> None:
        expected = torch.stack([hidden_alone(backbone, *one) for one in alone[start:]])
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)
        assert rows.lengths == [reading.tokens + len(tokens) for reading, tokens in alone]

    for turn in range(14 if kind is CachedRows else 6):
        if chance.random() < 0.6 or not alone:
            readings = [some_reading(chance, backbone) for _ in range(chance.randint(1, 6))]
            start = len(alone)
            alone += [(reading, []) for reading in readings for _ in range(reading.copies)]
            check(rows.read(readings), start)
        tokens = [chance.randrange(3, VOCABULARY) for _ in alone]
        for (_, own), token in zip(alone, tokens, strict=True):
            own.append(token)
        check(rows.step(tokens))
        # All of them now and then, and the longest one too.
        gone = list(range(len(alone))) if turn == 7 else chance.sample(range(len(alone)), chance.randrange(len(alone)))
        order = rows.drop(gone)
        assert sorted(order) == sorted(set(range(len(alone))) - set(gone))
        alone = [alone[old] for old in order]
        assert len(rows.lengths) == len(alone)


def test_rows_go_on_beyond_the_room_that_they_had(llama: FrozenBackbone) -> None:
    chance = random.Random(4)
    rows, readings = CachedRows(llama), [some_reading(chance, llama) for _ in range(2)]
    readings = [Reading(reading.prompt, reading.at, reading.prefix) for reading in readings]
    rows.read(readings)
    tokens: list[list[int]] = [[], []]
    for _ in range(150):
        new = [chance.randrange(3, VOCABULARY) for _ in readings]
        for own, token in zip(tokens, new, strict=True):
            own.append(token)
        hidden = rows.step(new)
    expected = torch.stack([hidden_alone(llama, *one) for one in zip(readings, tokens, strict=True)])
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)
    # What the longest row alone needed is seen no more when it is gone.
    long = max(range(2), key=lambda row: rows.lengths[row])
    rows.drop([long])
    assert rows._cache.layers[0].keys.shape[-2] == rows.lengths[0]


def test_a_prompt_that_cannot_be_read_harms_nobody(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    first, second = (Reading(r.prompt, r.at, r.prefix) for r in (some_reading(chance, llama) for _ in range(2)))
    rows = CachedRows(llama)
    rows.read([first])

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(llama, "hidden_states", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            rows.read([second])
    assert rows.lengths == [first.tokens]
    torch.testing.assert_close(rows.step([7])[0], hidden_alone(llama, first, [7]), rtol=1e-3, atol=1e-3)


def test_prompts_with_soft_tokens_of_several_numbers_are_padded_on_the_left(llama: FrozenBackbone) -> None:
    chance = random.Random(6)
    readings = [some_reading(chance, llama) for _ in range(12)]
    assert len({0 if reading.prefix is None else len(reading.prefix) for reading in readings}) == 3
    inputs = spliced(llama, readings)
    width = inputs.mask.shape[1]
    assert width == max(reading.tokens for reading in readings)
    for row, reading in enumerate(readings):
        start = width - reading.tokens
        table = llama.model.get_input_embeddings()
        pieces = [table(torch.tensor([token])) for token in reading.prompt.ids]
        if reading.prefix is not None:
            pieces.insert(reading.at, reading.prefix)
        assert torch.equal(inputs.embeds[row, start:], torch.cat(pieces))
        assert not inputs.embeds[row, :start].any()
        assert inputs.mask[row].tolist() == [0] * start + [1] * reading.tokens
        assert inputs.positions[row].tolist() == [0] * start + list(range(reading.tokens))


def test_a_family_that_looks_at_more_than_its_mask_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    assert can_join(backbone)
    plain = backbone.hidden_states

    def peeping(inputs: Any, cache: Any = None, mask: Any = None) -> Tensor:
        return plain(inputs, cache, mask) + (inputs.embeds.shape[1] == 1)

    monkeypatch.setattr(backbone, "hidden_states", peeping)
    assert not can_join(backbone)

    def refusing(inputs: Any, cache: Any = None, mask: Any = None) -> Tensor:
        if cache is not None:
            raise ValueError("no cache")
        return plain(inputs, cache, mask)

    monkeypatch.setattr(backbone, "hidden_states", refusing)
    assert not can_join(backbone)


def test_a_prompt_that_several_share_is_read_once(llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = EncodedPrompt(list(range(10, 40)), 0, 0)
    other = EncodedPrompt(list(range(50, 70)), 0, 0)
    soft = torch.randn(6, 2, llama.hidden_size, generator=torch.Generator().manual_seed(1))
    late = [Reading(prompt, 30, prefix, 2) for prefix in soft[:4]]
    readings = [
        *late[:2],
        Reading(other, 3, soft[4]),
        *late[2:],
        Reading(prompt, 30, None),
        Reading(prompt, 4, soft[5]),
    ]
    seen: list[tuple[int, ...]] = []
    plain = llama.hidden_states

    def watched(inputs: Any, cache: Any = None, mask: Any = None) -> Tensor:
        seen.append(tuple(inputs.embeds.shape[:2]))
        return plain(inputs, cache, mask)

    rows = CachedRows(llama)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "hidden_states", watched)
        hidden = rows.read(readings)
    assert seen == [(2, 32), (1, 30), (4, 2)]
    owners = [reading for reading in readings for _ in range(reading.copies)]
    torch.testing.assert_close(
        hidden, torch.stack([hidden_alone(llama, reading, []) for reading in owners]), rtol=1e-3, atol=1e-3
    )
    tokens = list(range(3, 3 + len(owners)))
    expected = torch.stack([hidden_alone(llama, one, [token]) for one, token in zip(owners, tokens, strict=True)])
    torch.testing.assert_close(rows.step(tokens), expected, rtol=1e-3, atol=1e-3)
