"""The demo's backbone: text that knows no user, a tokenizer that round-trips, a cache that is whole."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from e2p.errors import ConfigError
from e2p.tasks import pretrain
from e2p.tasks.pretrain import PretrainConfig, answer_targets, build_tokenizer, catalogue_text, pretrained_backbone
from e2p.tasks.simulate import SimulationConfig, World, simulate

TINY = PretrainConfig(documents=400, vocabulary=400, layers=1, width=32, heads=2, batch_tokens=512, learning_rate=1e-2)


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(SimulationConfig(users=30, artists=40, tags=4, dimension=8, queries_per_user=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(world: World, cache: Path) -> Path:
    return pretrained_backbone(world, cache, config=TINY, progress=False)


def test_text_is_seeded_and_depends_on_no_user(world: World) -> None:
    texts = catalogue_text(world, seed=1, documents=200)
    assert len(texts) == 200
    assert texts == catalogue_text(world, seed=1, documents=200)
    assert texts != catalogue_text(world, seed=2, documents=200)
    empty = world.logs.clear()
    stripped = dataclasses.replace(
        world,
        tastes=np.zeros_like(world.tastes),
        logs=empty,
        examples=world.examples.clear(),
        embeddings=world.embeddings.clear(),
        oracle_nll=np.zeros(0),
        popular_nll=np.zeros(0),
    )
    assert texts == catalogue_text(stripped, seed=1, documents=200)


def test_text_has_facts_plain_playlists_and_described_listeners(world: World) -> None:
    texts = catalogue_text(world, seed=1, documents=800)
    kinds = Counter("fact" if turns[0]["content"].startswith("who is") else turns[0]["role"] for turns in texts)
    assert kinds["fact"] == 800 // 12
    assert 480 < kinds["system"] < 620
    profiles = [turns[0]["content"] for turns in texts if turns[0]["role"] == "system"]
    assert all(profile.startswith("About the user: Likes ") for profile in profiles)


def test_plain_playlists_follow_popularity(world: World) -> None:
    texts = catalogue_text(world, seed=1, documents=4000)
    first = Counter(
        turns[1]["content"].split(" ; ")[0]
        for turns in texts
        if turns[0]["role"] == "user" and not turns[0]["content"].startswith("who is")
    )
    counts = [first[name] for name in world.artists["name"]]
    assert np.corrcoef(counts, world.artists["popularity"])[0, 1] > 0.7


def test_tokenizer_round_trips_and_lays_out_chats(world: World) -> None:
    tokenizer = build_tokenizer(catalogue_text(world, seed=1, documents=300), vocabulary=400)
    assert len(tokenizer) <= 400
    for text in [*world.examples["completion"], "Ünknown, name! ; 99"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [
        {"role": "system", "content": "About the user: Likes dub."},
        {"role": "user", "content": "play some dub"},
        {"role": "assistant", "content": "Tado"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|bos|><|system|> About the user: Likes dub.<|eos|><|user|> play some dub<|eos|><|assistant|> Tado<|eos|>"
    )
    opened = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=False)
    full = tokenizer.apply_chat_template(turns, return_dict=False)
    assert full[: len(opened)] == opened
    assert opened[0] == tokenizer.bos_token_id
    assert full[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(opened[-1]) == "<|assistant|>"


def test_trained_model_loads_and_beats_the_unigram(world: World, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen = tokenizer.apply_chat_template(catalogue_text(world, 42, 300), return_dict=False)
    new = tokenizer.apply_chat_template(catalogue_text(world, 43, 50), return_dict=False)
    counts = Counter(token for ids in seen for token in _answers(ids, tokenizer) if token != -100)
    total = sum(counts.values()) + len(tokenizer)
    targets = [_answers(ids, tokenizer) for ids in new]
    unigram = -np.mean([math.log((counts[token] + 1) / total) for row in targets for token in row if token != -100])
    logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1].detach() for ids in new]
    wanted = torch.tensor([token for row in targets for token in row[1:]])
    loss = float(torch.nn.functional.cross_entropy(torch.cat(logits), wanted))
    assert loss < unigram - 0.5


def _answers(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    import torch

    return answer_targets(torch.tensor([ids]), tokenizer)[0].tolist()


def test_targets_are_the_answers_with_their_end(world: World) -> None:
    import torch

    tokenizer = build_tokenizer(catalogue_text(world, seed=1, documents=300), vocabulary=400)
    bos, eos, pad, system, user, answer = range(6)
    ids = [
        [bos, system, 9, eos, user, 8, eos, answer, 7, 6, eos, user, 8, eos, answer, 6, eos],
        [bos, user, 8, eos, answer, 7, eos, *[pad] * 10],
    ]
    no = -100
    assert answer_targets(torch.tensor(ids), tokenizer).tolist() == [
        [no, no, no, no, no, no, no, no, 7, 6, eos, no, no, no, no, 6, eos],
        [no, no, no, no, no, 7, eos, *[no] * 10],
    ]


def test_second_call_trains_nothing(world: World, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(pretrain, "train_backbone", fail)
    assert pretrained_backbone(world, cache, config=TINY, progress=False) == folder
    with pytest.raises(AssertionError, match="trained again"):
        pretrained_backbone(world, cache, config=dataclasses.replace(TINY, seed=1), progress=False)


def test_training_is_deterministic_and_a_half_written_cache_is_not_used(
    world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def break_off(self: LlamaForCausalLM, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", break_off)
        with pytest.raises(KeyboardInterrupt):
            pretrained_backbone(world, tmp_path, config=TINY, progress=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".backbone-left-by-a-crash").mkdir()
    again = pretrained_backbone(world, tmp_path, config=TINY, progress=False)
    assert again.name == folder.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"documents": 0}, {"width": 30, "heads": 4}])
def test_bad_sizes_are_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="pretrain\\."):
        dataclasses.replace(TINY, **change)
