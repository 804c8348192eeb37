"""A small Llama, trained from scratch on the catalogue of a simulated service: the demo's frozen backbone.

It learns what a language model may know of a service in advance: which artists there are, their tags and
sound, how a chat goes, and how a listener described in the system turn would choose. It learns nothing of the
service's own users: the listeners in its text are fresh random draws, and playlists without a listener follow
overall popularity alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e2p.config import DataConfig
from e2p.errors import ConfigError
from e2p.tasks.simulate import World, draw_playlists, utilities
from e2p.tasks.simulated_text import SOUNDS, playlist_text, profile_text, request_text, sound_words

Messages = list[dict[str, str]]
SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
RECIPE = 1  # part of the cache's key: raise it when `train_backbone` or `build_tokenizer` changes
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class PretrainConfig:
    """Size and budget of the demo's backbone.

    The documents fix the number of steps, never the clock: every machine trains the same model.

    Args:
        documents: conversations in the training text; each is read once.
        vocabulary: entries of the tokenizer, at most.
        layers: transformer layers.
        width: hidden size.
        heads: attention heads.
        batch_tokens: tokens, with padding, in an optimiser step.
        learning_rate: AdamW's peak.
        seed: seed of the text, the weights and the order.
    """

    documents: int = 14_000
    vocabulary: int = 2048
    layers: int = 3
    width: int = 128
    heads: int = 4
    batch_tokens: int = 768
    learning_rate: float = 2e-3
    seed: int = 42

    def __post_init__(self) -> None:
        for key in ("documents", "vocabulary", "layers", "width", "heads", "batch_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"pretrain.{key}: expected a whole number >= 1, got {getattr(self, key)!r}")
        if self.width % (2 * self.heads):
            raise ConfigError(f"pretrain.width: expected a multiple of 2 * heads, got {self.width!r}")


def catalogue_text(world: World, seed: int, documents: int) -> list[Messages]:
    """Conversations about the catalogue, none of which depends on `world`'s users, tastes or logs.

    One in twelve states an artist's tags and sound. The rest are up to three requests with their playlists:
    one in four of these conversations follows popularity alone, in the others the system turn describes a
    listener, and the playlists follow that listener's taste. Such listeners are fresh draws from one broad
    normal distribution, which has none of the clusters of the world's users.
    """
    rng = np.random.default_rng([seed, 1])
    artists, names = world.artists, world.artists["name"].to_list()
    tags = sorted({tag for own in artists["tags"].to_list() for tag in own})
    everyone = np.ones(len(names), dtype=bool)
    has_tag = np.stack([*(artists["tags"].list.contains(tag).to_numpy() for tag in tags), everyone])
    facts = documents // 12
    texts: list[Messages] = []
    for artist in rng.integers(0, len(names), facts).tolist():
        own, sound = artists["tags"][artist].to_list(), artists["sound"][artist].to_list()
        fact = f"{names[artist]} plays {' and '.join(own)} with a {' and '.join(sound)} sound."
        texts.append(_turns(("user", f"who is {names[artist]}?"), ("assistant", fact)))

    lists = documents - facts
    described = rng.random(lists) < 3 / 4
    tastes = rng.normal(0.0, 1.2, (lists, world.features.shape[1])) * described[:, None]
    utility = utilities(artists, world.features, tastes)
    # What a listener plays most, as a profile sees it: the most wanted artists, with some luck.
    played = draw_playlists(rng, 2.0 * utility, np.broadcast_to(everyone, utility.shape), 5)
    asked = np.where(rng.random((lists, 3)) < 0.2, len(tags), rng.integers(0, len(tags), (lists, 3)))
    playlists = [draw_playlists(rng, utility, has_tag[asked[:, turn]], world.choices.shape[1]) for turn in range(3)]
    for row, rounds in enumerate(rng.integers(1, 4, lists)):
        turns: list[tuple[str, str]] = []
        if described[row]:
            weight = has_tag[:-1] @ np.exp(utility[row] - utility[row].max())
            liked = [tags[tag] for tag in np.argsort(-weight)[:3]]
            sound = sound_words(tastes[row, -len(SOUNDS) :])
            profile = profile_text(liked, sound, [names[artist] for artist in played[row]])
            turns.append(("system", DataConfig().profile_template.format(profile=profile)))
        for turn in range(rounds):
            tag = int(asked[row, turn])
            turns.append(("user", request_text(rng, tags[tag] if tag < len(tags) else None)))
            turns.append(("assistant", playlist_text([names[artist] for artist in playlists[turn][row]])))
        texts.append(_turns(*turns))
    return [texts[place] for place in rng.permutation(len(texts))]


def _turns(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]


def build_tokenizer(texts: Sequence[Messages], vocabulary: int = 2048) -> Any:
    """A byte-level BPE tokenizer (`PreTrainedTokenizerFast`) with the chat template, learned from the texts.

    Layout: ``<|bos|><|system|> text<|eos|><|user|> text<|eos|><|assistant|> text<|eos|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" " + turn["content"] for turns in texts for turn in turns), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIALS[3:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretrained_backbone(
    world: World, cache_dir: Path, *, config: PretrainConfig | None = None, progress: bool = True
) -> Path:
    """Folder of the backbone and its tokenizer, as transformers loads them; trained at the first call.

    The folder's name holds a hash of the training text and of the config, so a changed world trains a new
    model. It is written under another name and renamed when complete: a folder with the right name is always
    whole.
    """
    config = config or PretrainConfig()
    texts = catalogue_text(world, config.seed, config.documents)
    content = json.dumps([RECIPE, dataclasses.asdict(config), texts]).encode()
    folder = Path(cache_dir) / f"backbone-{hashlib.sha256(content).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    tokenizer = build_tokenizer(texts, config.vocabulary)
    model = train_backbone(texts, tokenizer, config, progress=progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".backbone-", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has finished the same model first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def train_backbone(texts: Sequence[Messages], tokenizer: Any, config: PretrainConfig, *, progress: bool = True) -> Any:
    """Train a `LlamaForCausalLM` from scratch, one pass over the texts; returns it in eval mode.

    Targets are the answers alone: a model this small has nothing to spare for guessing requests and profiles.
    Batches hold texts of like length, padded on the right: each text starts at position 0, as it will when the
    model is used, and next to nothing is spent on padding. They are small on purpose: with the tokens the
    same, batches of 768 made a profile worth twice as many nats as batches of 1,536 at either learning rate tried.
    """
    import torch
    from rich.progress import track
    from transformers import LlamaConfig, LlamaForCausalLM

    encoded = tokenizer.apply_chat_template(list(texts), return_dict=False)
    batches = _batches([len(ids) for ids in encoded], config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.width,
                intermediate_size=round(config.width * 8 / 3 / 32) * 32 or 32,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=len(batches), pct_start=0.05, cycle_momentum=False
    )
    for batch in track(batches, "Training the backbone", disable=not progress):
        rows = [torch.tensor(encoded[text]) for text in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        targets = answer_targets(ids, tokenizer)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def answer_targets(ids: Any, tokenizer: Any) -> Any:
    """Targets of a batch, [B, T]: the ids of the assistant's turns, each with its <|eos|>; -100 elsewhere."""
    import torch

    roles = torch.tensor(tokenizer.convert_tokens_to_ids(list(SPECIALS[3:])))
    opens = torch.isin(ids, roles)
    latest = torch.where(opens, torch.arange(ids.shape[1]), 0).cummax(dim=1).values
    answering = ids.gather(1, latest) == roles[2]
    return torch.where(answering & ~opens & (ids != tokenizer.pad_token_id), ids, -100)


def _batches(lengths: Sequence[int], config: PretrainConfig) -> list[list[int]]:
    """Row numbers of each batch: like lengths together, at most `batch_tokens` a batch, in random order."""
    batches: list[list[int]] = []
    current: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if current and (len(current) + 1) * lengths[row] > config.batch_tokens:
            batches.append(current)
            current = []
        current.append(row)
    batches.append(current)
    return [batches[place] for place in np.random.default_rng(config.seed).permutation(len(batches))]
