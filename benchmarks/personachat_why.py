"""Why does a persona's vector help so little on Persona-Chat? Four questions, four experiments, on validation data.

1. Does the frozen model use a persona that it is given as text? Own persona against none and against another's.
2. Do the vectors carry the persona? A probe without a language model, for each kind of vectors and for the text itself.
3. Is phi undertrained? Longer trainings, judged on training users as well as on held-out ones.
4. What would the vectors bring, if the frozen model did not stand between? Late fusion: a small network adds a term of
   the user's vector to the last hidden state, behind the frozen layers and before the frozen output layer.

    python benchmarks/sweeps/prepare.py
    python benchmarks/personachat_why.py --backbone ../shared/backbone --work scratch

Writes results/personachat_why.json; --questions picks some of them, the rest is kept from the file that is there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import nn

from e2p.config import RunConfig
from e2p.config_io import load_yaml
from e2p.data.sources import cache_root
from e2p.data.tables import open_embeddings
from e2p.data.tokenised import tokenise
from e2p.evaluation.probe import probe_auc
from e2p.evaluation.significance import cluster_bootstrap, clustered_t
from e2p.evaluation.sweep import changed_settings, example_nats
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel, text_encoder
from e2p.model.logprobs import label_logprobs
from e2p.provenance import provenance
from e2p.training.inputs import RunInputs, deal, load_inputs
from e2p.training.run import prepare_folder, train_arm

OUT = Path("results/personachat_why.json")
# Steps (one and four passes over the training answers) and weight decay.
TRAININGS = ((380, 1.0), (1520, 1.0), (1520, 0.0))


class Room:
    """What all questions share: settings, backbone, inputs, texts."""

    def __init__(self, backbone: str, work: Path) -> None:
        base = load_yaml("benchmarks/sweeps/base_personachat.yaml")
        self.work = work / "personachat"
        self.config: RunConfig = replace(base, backbone=replace(base.backbone, model=backbone))
        self.backbone = FrozenBackbone.load(self.config.backbone, self.config.training.precision)
        self.encoder = text_encoder(self.backbone, self.config.data, 1)
        self.inputs: RunInputs = load_inputs(self.config.data, self.encoder, self.config.projector.position)
        self.table = pl.read_parquet(self.config.data.examples)
        self.rows = self.inputs.rows("validation")
        self.users = self.inputs.keys["user_id"].to_numpy()
        self.budget = self.config.training.tokens_per_pass

    def vectors(self) -> dict[str, str]:
        """The three kinds of vectors by name."""
        hidden = {f"hidden states, {p}": str(self.work / f"profiles_hidden_{p}.parquet") for p in ("mean", "last")}
        return {"sentence encoder": self.config.data.embeddings, **hidden}

    def difference(self, own: Any, other: Any, tokens: Any, which: Any = None) -> dict[str, Any]:
        """Mean per-example difference in nats per token, clustered by user; ``which`` marks examples."""
        keep = np.ones(len(self.rows), bool) if which is None else which
        values, users = ((own - other) / tokens)[keep], self.users[self.rows][keep]
        found = cluster_bootstrap(values, users)
        p = clustered_t(values, users).p
        return {"difference": found.mean, "ci": [found.low, found.high], "p": p, "examples": int(keep.sum())}

    def persona_shows(self) -> Any:
        """Validation answers that share a word with their own persona which is none of the 200 commonest of all."""
        words = [set(re.findall(r"[a-z]{3,}", text.lower())) for text in self.table["completion"]]
        common = {word for word, _ in Counter(word for seen in words for word in seen).most_common(200)}
        own = [set(re.findall(r"[a-z]{3,}", text.lower())) - common for text in self.table["profile"]]
        return np.array([bool(words[row] & own[row]) for row in self.rows])


def text(room: Room) -> dict[str, Any]:
    """Question 1."""
    config, inputs, rows = room.config, room.inputs, room.rows
    model = E2PModel.from_backbone(room.backbone, inputs.embeddings.dim, config.projector, data=config.data)
    # Another's persona: the same exchange of users as everywhere, by the profile of the one who got the vector.
    dealt = deal(inputs, rows, [config.evaluation.seed, 3])
    owner = inputs.embeddings.keys["user_id"].to_numpy()
    profile = dict(zip(room.table["user_id"], room.table["profile"], strict=True))
    exchanged = room.table.with_columns(
        profile=pl.Series([profile[owner[at]] if at >= 0 else "" for at in dealt], dtype=pl.String)
    )
    path = room.work / "exchanged_profiles.parquet"
    exchanged.write_parquet(path)
    cache = cache_root(config.data.cache_dir)
    arms = {
        "none": inputs.tokens,
        "own persona": tokenise(config.data.examples, room.encoder, cache, with_profile=True),
        "another's persona": tokenise(str(path), room.encoder, cache, with_profile=True),
    }
    nats, tokens = {}, np.zeros(0)
    for name, tokenised in arms.items():
        nats[name], tokens = example_nats(
            model, inputs.examples("validation", tokens=tokenised), room.budget, use_prefix=False
        )
    shows = room.persona_shows()
    found: dict[str, Any] = {
        "nats_per_token": {name: float(values.sum() / tokens.sum()) for name, values in nats.items()},
        "persona_shows": float(shows.mean()),
    }
    for name, which in (("all", None), ("persona shows", shows), ("it does not", ~shows)):
        found[name] = {
            f"own minus {other}": room.difference(nats["own persona"], nats[other], tokens, which)
            for other in ("none", "another's persona")
        }
    return found


def vectors(room: Room) -> dict[str, Any]:
    """Question 2."""
    train, held_out = room.inputs.rows("train"), room.rows
    completions = room.table["completion"]
    users, groups = room.table["user_id"], room.table["group"]
    found = {}
    for name, path in room.vectors().items():
        table = open_embeddings(path, cache_root(None))
        place = {user: at for at, user in enumerate(table.keys["user_id"])}
        rows = np.array([place[user] for user in room.users])
        probe = probe_auc(
            np.asarray(table.vectors[rows[train]]),
            completions.gather(train),
            np.asarray(table.vectors[rows[held_out]]),
            completions.gather(held_out),
            users.gather(held_out),
            groups.gather(held_out),
        )
        found[name] = probe._asdict()
    return found


def longer(room: Room) -> dict[str, Any]:
    """Question 3."""
    inputs, random = room.inputs, np.random.default_rng(0)
    some = np.sort(random.choice(inputs.rows("train"), len(room.rows), replace=False))
    found = []
    for steps, decay in TRAININGS:
        config = changed_settings(
            room.config,
            {"training.max_steps": steps, "training.weight_decay": decay, "training.evals_per_epoch": 1},
        )
        folder = room.work / "why" / f"{steps}-{decay}"
        config = replace(config, output=str(folder))
        if not (folder / "adapter").exists():
            prepare_folder(config, overwrite=folder.exists(), resume=False)
            train_arm(config, room.backbone, inputs, "e2p", folder, Console(stderr=True))
        model = E2PModel.from_pretrained(folder / "adapter", room.backbone)
        best = json.loads((folder / "training.json").read_text())["best_step"]
        entry: dict[str, Any] = {"steps": steps, "weight_decay": decay, "best_step": best}
        for part, rows in (("training users", some), ("validation users", room.rows)):
            dealt = deal(inputs, rows, [config.evaluation.seed, 3])
            examples = replace(inputs.examples("train"), rows=rows)
            own, tokens = example_nats(model, examples, room.budget)
            other, _ = example_nats(model, replace(examples, vector_rows=dealt), room.budget)
            values, users = (own - other) / tokens, room.users[rows]
            entry[part] = {
                "nats_per_token": float(own.sum() / tokens.sum()),
                "true_minus_random": float(values.mean()),
                "p": clustered_t(values, users).p,
            }
        found.append(entry)
        print(entry)
    return {"trainings": found}


class Fusion(nn.Module):
    """What a vector adds to the last hidden state: a bias that all share, and with ``dim`` a network of the vector."""

    def __init__(self, dim: int, hidden_size: int, width: int = 256) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, hidden_size)) if dim else None
        if self.net is not None:
            nn.init.zeros_(self.net[2].weight)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, H]."""
        return self.bias.expand(len(vectors), -1) if self.net is None else self.bias + self.net(vectors)


def fusion(room: Room) -> dict[str, Any]:
    """Question 4: on top of the frozen model without any soft token."""
    found = {}
    parts = {part: _states(room, room.inputs.rows(part)) for part in ("train", "validation")}
    for name, path in (("no vector", None), *room.vectors().items()):
        table = None if path is None else open_embeddings(path, cache_root(None))
        dim = 0 if table is None else table.dim
        lookup = torch.zeros(len(room.users), max(dim, 1))
        if table is not None:
            place = {user: at for at, user in enumerate(table.keys["user_id"])}
            lookup = torch.from_numpy(np.asarray(table.vectors)[[place[user] for user in room.users]])
            used = lookup[room.inputs.rows("train")]
            lookup = (lookup - used.mean(0)) / used.std(0).clamp(min=1e-6)
        dealt = _owners_exchanged(room)
        torch.manual_seed(0)
        net = Fusion(dim, room.backbone.hidden_size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.3)
        states, labels, rows = parts["train"]
        best: dict[str, Any] = {"nats_per_token": float("inf")}
        for epoch in range(3):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
            for at in order.split(2048):
                hidden = states[at].float() + net(lookup[rows[at]])
                loss = -label_logprobs(hidden, labels[at], room.backbone.head).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            judged = _judged(room, net, parts["validation"], lookup, dealt)
            if judged["nats_per_token"] < best["nats_per_token"]:
                best = judged | {"epoch": epoch + 1}
            print(name, epoch, judged)
        found[name] = best
    return found


@torch.no_grad()
def _states(room: Room, rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The frozen model's last hidden state before every label, the labels, and the row of each."""
    from e2p.data.batches import token_passes

    examples = replace(room.inputs.examples("train"), rows=rows)
    states, labels, index = [], [], []
    for part in token_passes(examples.widths(rows), room.budget):
        batch = examples.batch(rows[part])
        hidden, tokens = room.backbone.completion_states(batch, None)
        states.append(hidden.half())
        labels.append(tokens)
        index.append(batch.index.repeat_interleave(batch.completion_lengths))
    return torch.cat(states), torch.cat(labels), torch.cat(index)


def _owners_exchanged(room: Room) -> torch.Tensor:
    """For every row, a row whose user has the vector that this one is dealt."""
    dealt = deal(room.inputs, room.rows, [room.config.evaluation.seed, 3])
    owner = room.inputs.embeddings.keys["user_id"].to_numpy()
    first = {user: row for row, user in reversed(list(enumerate(room.users)))}
    return torch.tensor([first[owner[at]] for at in dealt])


@torch.no_grad()
def _judged(room: Room, net: Fusion, part: Any, lookup: torch.Tensor, dealt: torch.Tensor) -> dict[str, Any]:
    states, labels, rows = part
    place = torch.full((len(room.users),), -1)
    place[torch.from_numpy(room.rows)] = torch.arange(len(room.rows))
    sums = []
    for which in (rows, dealt[rows]):
        nats = torch.zeros(len(room.rows), dtype=torch.float64)
        for at in torch.arange(len(labels)).split(4096):
            logprobs = label_logprobs(states[at].float() + net(lookup[which[at]]), labels[at], room.backbone.head)
            nats.index_add_(0, place[rows[at]], -logprobs.double())
        sums.append(nats.numpy())
    tokens = room.inputs.tokens.completion_lengths[room.rows].astype(float)
    return {
        "nats_per_token": float(sums[0].sum() / tokens.sum()),
        "true_minus_random": room.difference(sums[0], sums[1], tokens),
        "where the persona shows": room.difference(sums[0], sums[1], tokens, room.persona_shows()),
    }


def main() -> None:
    """Run the questions asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch", type=Path)
    questions = {"text": text, "vectors": vectors, "longer": longer, "fusion": fusion}
    parser.add_argument("--questions", nargs="+", choices=list(questions), default=list(questions))
    options = parser.parse_args()
    content = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    room = Room(options.backbone, options.work)
    for name in options.questions:
        content[name] = questions[name](room) | {"provenance": provenance()}
        print(json.dumps(content[name], indent=1))
        OUT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
