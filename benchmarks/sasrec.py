"""Next item without a language model: SASRec with cross-entropy over the whole catalogue, beside popularity.

    python benchmarks/sasrec.py --sequences ../shared/data/amazon_beauty_sequences/sequential.txt --name beauty
    python benchmarks/sasrec.py --tables scratch/movielens --name movielens

Writes results/sasrec_<name>.json, and every query's rank to <work>/<name>-<seed>.parquet, so that other systems can be
compared on the same queries. Seeds that are finished are not run again; with --only, some are run and nothing is put
together: two processes can share the work. --tune trains and shows validation figures; the test rows stay shut.

The model is that of Kang and McAuley (2018): a causal transformer over the ids of a user's items with learned positions
and the items' embeddings as output. Its loss is not theirs: the softmax is over all items, at every position. Training
stops by NDCG@10 on the validation rows. Every query is ranked against all items; "unseen" leaves out those that the
user had before.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from sasrec_data import Data, Ints, Queries, from_sequences, from_tables, load
from torch import Tensor, nn
from torch.nn import functional as F

from e2p.evaluation.significance import bootstrap_totals, cluster_totals, percentile_interval
from e2p.provenance import provenance

CUTS = (5, 10, 30)
READINGS = ("all", "unseen")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Of model and training; the defaults are the best that were tried on Beauty's validation rows."""

    hidden: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    norm: str = "post"
    max_length: int = 50
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 200
    patience: int = 5


class Block(nn.Module):
    """Causal attention and a feed-forward part, each with a residual."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        d = settings.hidden
        self.heads, self.rate, self.pre = settings.heads, settings.dropout, settings.norm == "pre"
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.wide, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.drop = nn.Dropout(settings.dropout)

    def attend(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0)
        return self.drop(self.out(mixed.transpose(1, 2).reshape(b, n, d)))

    def feed(self, x: Tensor) -> Tensor:
        return self.drop(self.narrow(F.gelu(self.wide(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.first(x))
            return x + self.feed(self.second(x))
        x = self.first(x + self.attend(x))
        return self.second(x + self.feed(x))


class SASRec(nn.Module):
    """Hidden states [B, N, hidden] of item codes [B, N], padded on the right: what is later is never seen."""

    def __init__(self, items: int, settings: Settings) -> None:
        super().__init__()
        self.items = nn.Embedding(items, settings.hidden)
        self.positions = nn.Embedding(settings.max_length, settings.hidden)
        self.start, self.end = nn.LayerNorm(settings.hidden), nn.LayerNorm(settings.hidden)
        self.drop = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.pre = settings.norm == "pre"
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.drop(self.start(self.items(codes) + self.positions.weight[: codes.shape[1]]))
        for block in self.blocks:
            x = block(x)
        return self.end(x) if self.pre else x


class FullCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(hidden @ items.T)[target], with the gradients made on the way: logits stay in the cache."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, items: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
        total, by_hidden, by_items = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(items)
        for start in range(0, len(hidden), rows):
            h, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            p = h @ items.T
            p -= p.amax(1, keepdim=True)
            own = p.gather(1, wanted)
            mass = p.exp_().sum(1, keepdim=True)
            total += (mass.log() - own).sum()
            p /= mass
            p.scatter_add_(1, wanted, torch.full_like(own, -1.0))
            torch.mm(p, items, out=by_hidden[start : start + rows])
            by_items.addmm_(p.T, h)
        ctx.save_for_backward(by_hidden, by_items)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_items = ctx.saved_tensors
        share = above[0] / len(by_hidden)
        return by_hidden * share, by_items * share, None, None


def windows(train: list[Ints], length: int, rng: np.random.Generator) -> list[Ints]:
    """Sequences of at most ``length`` targets; longer ones are cut at places that differ from epoch to epoch."""
    found = []
    for sequence in train:
        end = len(sequence)
        if end > length + 1:
            end -= int(rng.integers(length))
            found.append(sequence[end - 1 :])
        while end > 1:
            found.append(sequence[max(0, end - length - 1) : end])
            end -= length
    return [window for window in found if len(window) > 1]


def batches(sequences: list[Ints], size: int, rng: np.random.Generator) -> Iterator[list[Ints]]:
    """Batches of sequences of about one length, in random order."""
    order = rng.permutation(len(sequences))
    pools = np.split(order, range(64 * size, len(order), 64 * size))
    rows = [pool[np.argsort([len(sequences[i]) for i in pool], kind="stable")] for pool in pools]
    parts = [part for pool in rows for part in np.split(pool, range(size, len(pool), size))]
    for index in rng.permutation(len(parts)):
        yield [sequences[i] for i in parts[index]]


def padded(sequences: list[Ints]) -> tuple[Tensor, Tensor]:
    """Codes [B, N], zero on the right, and which of them are real."""
    lengths = np.array([len(sequence) for sequence in sequences])
    real = np.arange(lengths.max()) < lengths[:, None]
    codes = np.zeros(real.shape, np.int64)
    codes[real] = np.concatenate(sequences)
    return torch.from_numpy(codes), torch.from_numpy(real)


def ranks(
    scores: Tensor, targets: Ints, histories: list[Ints], readings: tuple[str, ...] = READINGS
) -> dict[str, Ints]:
    """Rank of each target among all items [B, items], and with the user's earlier items put last; ties: the middle."""
    wanted = torch.from_numpy(targets)[:, None]
    found = {}
    for reading in readings:
        if reading == "unseen":
            rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
            scores = scores.clone()
            scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(histories))] = -torch.inf
        own = scores.gather(1, wanted)
        # Counted from below, so that a score that is not a number stands last and not first.
        worse, equal = (scores < own).sum(1), (scores == own).sum(1)
        found[reading] = (1 + scores.shape[1] - worse - equal + equal // 2).numpy()
    return found


@torch.no_grad()
def rank_all(
    data: Data, queries: Queries, model: SASRec | None, length: int, readings: tuple[str, ...] = READINGS
) -> dict[str, Ints]:
    """Ranks of all queries by a model, or by popularity: for no model, and for queries without history."""
    popular = torch.from_numpy(np.bincount(np.concatenate(data.train), minlength=data.items)).float()
    found = {reading: np.zeros(len(queries.targets), np.int64) for reading in readings}
    # Like lengths together; those without a history come first.
    order = np.argsort([min(len(history), length) for history in queries.histories], kind="stable")
    for chosen in np.split(order, range(256, len(order), 256)):
        histories = [queries.histories[i] for i in chosen]
        scores = popular.expand(len(chosen), -1).clone()
        some = [row for row, history in enumerate(histories) if len(history)]
        if model is not None and some:
            model.eval()
            codes, real = padded([histories[row][-length:] for row in some])
            last = model(codes)[torch.arange(len(some)), real.sum(1) - 1]
            scores[some] = last @ model.items.weight.T
        for reading, values in ranks(scores, queries.targets[chosen], histories, readings).items():
            found[reading][chosen] = values
    return found


def per_query(found: Ints) -> dict[str, Floats]:
    """Metrics of each query with one right item, by its rank."""
    metrics: dict[str, Floats] = {}
    for cut in CUTS:
        metrics[f"recall@{cut}"] = (found <= cut).astype(float)
        metrics[f"ndcg@{cut}"] = np.where(found <= cut, 1 / np.log2(found + 1), 0.0)
    return metrics | {"mrr": 1 / found}


def summary(found: list[Ints], users: pl.Series) -> dict[str, dict[str, Any]]:
    """Mean over queries and seeds of each metric, with a 95% interval from a bootstrap over users."""
    by_seed = [per_query(one) for one in found]
    names = list(by_seed[0])
    means = np.column_stack([np.mean([one[name] for one in by_seed], axis=0) for name in names])
    totals = cluster_totals(np.column_stack([means, np.ones(len(means))]), users.to_numpy())
    resampled = bootstrap_totals(totals, 2000, 42)
    return {
        name: {
            "mean": float(means[:, column].mean()),
            "ci": list(percentile_interval(resampled[:, column] / resampled[:, -1])),
        }
        for column, name in enumerate(names)
    }


def fit(data: Data, settings: Settings, seed: int) -> tuple[SASRec, dict[str, Any]]:
    """Train until validation NDCG@10 has not risen for ``patience`` epochs; the best epoch's model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SASRec(data.items, settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best, kept, history = -math.inf, model.state_dict(), []
    began = time.perf_counter()
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses, started = [], time.perf_counter()
        for batch in batches(windows(data.train, settings.max_length, rng), settings.batch, rng):
            codes, _ = padded([sequence[:-1] for sequence in batch])
            targets, real = padded([sequence[1:] for sequence in batch])
            loss = FullCrossEntropy.apply(model(codes)[real], model.items.weight, targets[real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found = per_query(rank_all(data, data.validation, model, settings.max_length, ("all",))["all"])
        figures = {name: round(float(found[name].mean()), 5) for name in ("recall@5", "recall@10", "ndcg@10")}
        history.append({"epoch": epoch, "loss": round(float(np.mean(losses)), 4), **figures})
        print(f"seed {seed}: {history[-1]}, {time.perf_counter() - started:.1f} s", flush=True)
        if found["ndcg@10"].mean() > best:
            best, kept = found["ndcg@10"].mean(), copy.deepcopy(model.state_dict())
            chosen = epoch
        elif epoch - chosen >= settings.patience:
            break
    model.load_state_dict(kept)
    seconds = time.perf_counter() - began
    record = {"seed": seed, "epochs": len(history), "best_epoch": chosen, "seconds": round(seconds, 1)}
    return model, record | {"threads": torch.get_num_threads(), "history": history}


def run_seed(data: Data, settings: Settings, seed: int, place: Path) -> dict[str, Any]:
    """Train and judge one seed, or read it where it was finished by this commit; ranks are written beside it."""
    made = provenance()
    same = {"settings": asdict(settings), "data": data.about, "commit": made["commit"], "dirty": made["dirty"]}
    record = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    if {name: record.get(name) for name in same} == same and not made["dirty"]:
        return record
    model, record = fit(data, settings, seed)
    for part, queries in (("validation", data.validation), ("test", data.test)):
        found = rank_all(data, queries, model, settings.max_length)
        record[part] = {reading: summary([found[reading]], queries.rows["user_id"]) for reading in READINGS}
    place.parent.mkdir(parents=True, exist_ok=True)
    table = data.test.rows.with_columns(rank=pl.Series(found["all"]), rank_unseen=pl.Series(found["unseen"]))
    table.write_parquet(place.with_suffix(".parquet"))
    record |= same
    place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def together(data: Data, places: list[Path], length: int) -> dict[str, Any]:
    """Test figures over the seeds, and of popularity, on the same queries."""
    tables = [pl.read_parquet(place.with_suffix(".parquet")) for place in places]
    users = data.test.rows["user_id"]
    floor = rank_all(data, data.test, None, length)
    columns = {"all": "rank", "unseen": "rank_unseen"}
    return {
        "sasrec": {
            reading: summary([table[column].to_numpy() for table in tables], users)
            for reading, column in columns.items()
        },
        "popularity": {reading: summary([floor[reading]], users) for reading in columns},
    }


def read(options: argparse.Namespace) -> Data:
    """The data that were asked for."""
    return load(*(from_sequences(options.sequences) if options.sequences else from_tables(options.tables)))


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sequences", type=Path, help="file of `user item item ...`: the last item is the test")
    source.add_argument("--tables", type=Path, help="folder of `e2p prepare nextitem`")
    parser.add_argument("--name", required=True)
    parser.add_argument("--work", default="scratch/sasrec", type=Path)
    parser.add_argument("--seeds", default=[42, 43, 44], type=int, nargs="+")
    parser.add_argument("--out", type=Path, help="default: results/sasrec_<name>.json")
    parser.add_argument("--only", type=int, nargs="+", help="run these seeds alone")
    parser.add_argument("--tune", action="store_true", help="show validation figures, judge nothing")
    for name, value in asdict(Settings()).items():
        choices = ("pre", "post") if name == "norm" else None
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value), choices=choices)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    data = read(options)
    if options.tune:
        for seed in options.seeds:
            fit(data, settings, seed)
        return
    places = {seed: options.work / f"{options.name}-{seed}.json" for seed in options.only or options.seeds}
    records = [run_seed(data, settings, seed, place) for seed, place in places.items()]
    if options.only:
        return
    content = {
        "about": "Next item: SASRec with cross-entropy over all items; ranks among all items; means over the seeds.",
        "provenance": provenance(),
        "data": data.about,
        "settings": asdict(settings),
        "seeds": options.seeds,
        "test": together(data, list(places.values()), settings.max_length),
        "runs": [
            {key: value for key, value in record.items() if key not in ("settings", "data")} for record in records
        ],
    }
    out = options.out or Path(f"results/sasrec_{options.name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = content["test"]["sasrec"]["all"]
    print(f"{out}: " + ", ".join(f"{name} {shown[name]['mean']:.4f}" for name in ("recall@5", "recall@10", "ndcg@10")))


if __name__ == "__main__":
    main()
