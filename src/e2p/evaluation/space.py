"""Where users lie before and after phi, and what their soft tokens resemble: written once, beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from e2p.data.sources import open_table
from e2p.data.tables import write_frame
from e2p.errors import MissingExtraError
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs

Array = npt.NDArray[np.float64]

NEIGHBOURS = 10
_CLUSTERS = 6
_FEWEST = 10  # users below which neither map nor neighbours say anything
_SHOWN = 8  # values of a known attribute that get a colour of their own
_VOCABULARY_CHUNK = 16_384


def describe_space(
    model: E2PModel,
    inputs: RunInputs,
    folder: Path,
    seed: int,
    attribute: Mapping[str, str] | None = None,
    named: str = "a known attribute",
    limit: int = 1000,
) -> dict[str, Any] | None:
    """Map users by t-SNE before and after phi (the paper's Figure 2), and measure how far phi keeps neighbours.

    Embedding space is what phi sees: the vectors after its input normalisation [D]. Prefix space is what it makes of
    them: the soft tokens, flattened [K * H]. Users who share a vector are one point.

    Args:
        model: the trained model.
        inputs: the run's inputs.
        folder: where ``space.parquet`` is written: user_id, cluster, embedding_x, embedding_y, prefix_x, prefix_y.
        seed: seed of the choice of users, of k-means and of t-SNE.
        attribute: a known attribute of users, by which they are coloured; None: clusters of the embedding space.
        named: what the attribute is called.
        limit: at most so many users: test users first, then training users.

    Returns:
        ``space`` of results.json; None, and no file, with fewer than ten different vectors.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise MissingExtraError("scikit-learn", "eval", "a map of the users") from None
    users, vectors = _newest_vectors(inputs, ("test", "train"), seed, limit)
    _, first = np.unique(vectors, axis=0, return_index=True)
    users, vectors = users[np.sort(first)], vectors[np.sort(first)]
    if len(users) < _FEWEST:
        return None
    before, after = _both_spaces(model, vectors)
    k = min(NEIGHBOURS, (len(users) - 1) // 2)
    cluster = _clusters(before, seed) if attribute is None else _values(users, attribute)
    places = []
    for points in (before, after):
        if not points.std(0).any():  # phi maps everybody to one place, and so does the map
            places.append(np.zeros((len(points), 2)))
            continue
        padded = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
        perplexity = min(30.0, (len(points) - 1) / 3)
        places.append(TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(padded).astype(float))
    names = ("embedding_x", "embedding_y", "prefix_x", "prefix_y")
    columns = dict(zip(names, np.concatenate(places, axis=1).T, strict=True))
    write_frame(folder / "space.parquet", pl.DataFrame({"user_id": users, "cluster": cluster, **columns}))
    counts = pl.Series("name", cluster).value_counts().sort(["count", "name"], descending=[True, False])
    return {
        "users": len(users),
        "neighbours": k,
        "preservation": preservation(before, after, k, seed),
        "chance": k / (len(users) - 1),
        "clusters": [{"name": name, "users": count} for name, count in counts.iter_rows()],
        "coloured_by": "clusters of the embedding space (k-means)" if attribute is None else named,
    }


def preservation(before: Array, after: Array, k: int, seed: int = 0) -> float:
    """Mean share of each point's k nearest neighbours in one space that are among its k nearest in the other.

    Neighbours are Euclidean. 1 for an isometry; k / (n - 1) where the spaces have nothing in common.

    Args:
        before: [n, D].
        after: the same n points in another space [n, E].
        k: neighbours, fewer than n.
        seed: of what breaks ties, in each space by itself, so that they do not look like agreement.
    """
    from sklearn.neighbors import NearestNeighbors

    random, found = np.random.default_rng([seed, 1]), []
    for points in (before, after):
        moved = points + random.normal(scale=1e-7 * (float(points.std()) or 1.0), size=points.shape)
        found.append(NearestNeighbors(n_neighbors=k).fit(moved).kneighbors(return_distance=False))  # itself left out
    shared = [len(np.intersect1d(one, other)) for one, other in zip(*found, strict=True)]
    return float(np.mean(shared) / k)


@torch.no_grad()
def describe_prefix(
    model: E2PModel, inputs: RunInputs, seed: int, limit: int = 1000, tokens: int = 8
) -> dict[str, Any] | None:
    """Size of the test users' soft tokens, how much of them is the user's own, and which tokens they resemble.

    Args:
        model: the trained model.
        inputs: the run's inputs.
        seed: seed of the choice of users.
        limit: at most so many test users.
        tokens: nearest tokens that are named, per soft token.

    Returns:
        ``prefix`` of results.json, or None without two test users with a vector: ``norm`` (mean and std over users of a
        soft token's norm), ``token_norm`` (of the backbone's own tokens), ``user_share`` (of the mean squared prefix,
        what differs between users), ``nearest`` (tokens nearest to the mean prefix, by cosine; with several soft tokens
        each entry has its ``soft_token``, from 1), ``chance`` (the cosine of a direction drawn at random with its
        nearest token: what is not above it resembles nothing), and ``users``: for three of them, the tokens nearest to
        what makes their prefix differ from the mean.
    """
    users, vectors = _newest_vectors(inputs, ("test",), seed, limit)
    if len(users) < 2:
        return None
    prefixes = model.prefix(vectors, len(vectors))  # [n, K, H]
    mean = prefixes.mean(0)
    norms = prefixes.norm(dim=-1).mean(-1)
    whole = float(prefixes.square().sum((1, 2)).mean())
    own = float((prefixes - mean).square().sum((1, 2)).mean())
    shown = prefixes[:3] - mean
    count = len(mean)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(32, mean.shape[-1], generator=generator).to(mean)
    cosines, ids = _nearest_tokens(model, torch.cat([mean, shown.flatten(0, 1), drawn]), tokens)

    def named(first: int, last: int) -> list[dict[str, Any]]:
        """The best tokens of each of some directions; of several, which soft token it is stands with them."""
        return [
            {"token": _readable(model, int(i)), "cosine": round(float(c), 4)}
            | ({"soft_token": (row - first) % count + 1} if count > 1 else {})
            for row in range(first, last)
            for c, i in zip(cosines[row], ids[row], strict=True)
        ]

    described = []
    for number, user in enumerate(users[:3]):
        nearest = named(count * (number + 1), count * (number + 2))
        described.append({"user_id": user, "nearest": sorted(nearest, key=lambda n: -n["cosine"])[:tokens]})
    return {
        "norm": {"mean": float(norms.mean()), "std": float(norms.std())},
        "token_norm": model.backbone.token_norm(),
        "user_share": own / whole if whole else 0.0,
        "nearest": named(0, count),
        "chance": float(cosines[-len(drawn) :, 0].mean()),
        "users": described,
    }


def _newest_vectors(
    inputs: RunInputs, parts: tuple[str, ...], seed: int, limit: int
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.float32]]:
    """Users of some parts in a seeded order within each part, and the newest vector of each [n, D]."""
    table = inputs.embeddings.keys.with_row_index("row")
    newest = (table.sort("timestamp") if "timestamp" in table.columns else table).unique("user_id", keep="last")
    random, chosen = np.random.default_rng([seed, 6]), []
    for part in parts:
        names = inputs.keys[inputs.rows(part)].select("user_id").unique().sort("user_id")
        known = names.join(newest, on="user_id", how="inner", maintain_order="left").select("user_id", "row")
        chosen.append(known[random.permutation(len(known))])
    # A user may stand in two parts where the split is not by user.
    found = pl.concat(chosen).unique("user_id", keep="first", maintain_order=True).head(limit)
    vectors = np.asarray(inputs.embeddings.vectors[found["row"].to_numpy()], np.float32)
    return found["user_id"].to_numpy(), vectors


@torch.no_grad()
def _both_spaces(model: E2PModel, vectors: npt.NDArray[np.float32]) -> tuple[Array, Array]:
    before = model.projector.normalise(torch.from_numpy(vectors).to(model.backbone.device))
    after = model.prefix(vectors, len(vectors)).flatten(1)
    return before.double().cpu().numpy(), after.double().cpu().numpy()


def _clusters(points: Array, seed: int) -> list[str]:
    """k-means clusters, named by their size, the largest first."""
    from sklearn.cluster import KMeans

    labels = KMeans(min(_CLUSTERS, len(points)), n_init=10, random_state=seed).fit_predict(points)
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = {int(label): place for place, label in enumerate(order, 1)}
    return [f"cluster {rank[int(label)]}" for label in labels]


def known_attribute(source: str, column: str) -> dict[str, str]:
    """user -> his commonest value of a column of the example table (the first by name of several).

    Raises DataError where the table has no such column.
    """
    table = open_table(source)
    table.require("user_id", column)
    parts = [
        batch.select(user=pl.col("user_id").cast(pl.String), value=pl.col(column).cast(pl.String))
        for _, batch in table.batches(["user_id", column], 65_536)
    ]
    counts = pl.concat(parts).drop_nulls().group_by("user", "value").len()
    first = counts.sort("user", "len", "value", descending=[False, True, False]).unique("user", keep="first")
    return dict(first.select("user", "value").iter_rows())


def _values(users: npt.NDArray[np.object_], attribute: Mapping[str, str]) -> list[str]:
    """Each user's value; those beyond the most frequent ones share a name."""
    values = pl.Series("value", [str(attribute.get(user) or "unknown") for user in users])
    frequent = values.value_counts().sort(["count", "value"], descending=[True, False])["value"]
    kept = set(frequent if len(frequent) <= _SHOWN else frequent[: _SHOWN - 1])
    return [value if value in kept else "other" for value in values]


def _nearest_tokens(model: E2PModel, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and ids [n, count] of the tokens nearest to each of the directions [n, H]; the vocabulary in chunks."""
    tokenizer, weight = model.backbone.tokenizer, model.backbone.model.get_input_embeddings().weight
    size = min(len(tokenizer), weight.shape[0])  # rows beyond the tokenizer's are padding
    directions = torch.nn.functional.normalize(directions.float(), dim=-1)
    cosines, ids = torch.empty(len(directions), 0), torch.empty(len(directions), 0, dtype=torch.long)
    for start in range(0, size, _VOCABULARY_CHUNK):
        chunk = torch.arange(start, min(start + _VOCABULARY_CHUNK, size), device=weight.device)
        rows = torch.nn.functional.normalize(model.backbone.embed(chunk).float(), dim=-1)
        cosines = torch.cat([cosines, (directions @ rows.T).cpu()], dim=1)
        ids = torch.cat([ids, chunk.cpu().expand(len(directions), -1)], dim=1)
        best = cosines.topk(min(count, cosines.shape[1]), dim=1)
        cosines, ids = best.values, ids.gather(1, best.indices)
    return cosines, ids


def _readable(model: E2PModel, token: int) -> str:
    """A token's text, or its name in the vocabulary where it is a part of a letter or nothing to see."""
    text = str(model.backbone.tokenizer.decode([token]))
    if not text.strip() or "\ufffd" in text:
        return str(model.backbone.tokenizer.convert_ids_to_tokens(token))
    return text
