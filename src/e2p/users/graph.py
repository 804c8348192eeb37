"""Who interacted with what, as a graph -> user vectors and item vectors in one space, by LightGCN (He et al. 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from e2p.errors import ConfigError, DataError, MissingExtraError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
# Interactions in a step. Each step passes through the whole graph, whatever their number.
_BATCH = 8192


class GraphFactors(NamedTuple):
    """User vectors [users, D] and item vectors [items, D], named as implicit's models name theirs."""

    user_factors: Floats
    item_factors: Floats


def lightgcn(
    counts: Any,
    dimension: int,
    layers: int,
    iterations: int,
    learning_rate: float,
    regularization: float,
    seed: int,
) -> GraphFactors:
    """Learn a vector for every user and item from their graph: torch_geometric's LightGCN and its BPR loss.

    An interaction is a link or none: its weight does not count. A step draws for each of its interactions one item
    uniformly among those that the user has no link with. It runs on one thread of the CPU, where a seed repeats bit
    for bit, and shows a bar on standard error if that is a terminal.

    Args:
        counts: sparse table [users, items]; what is > 0 is a link.
        dimension: numbers in a vector.
        layers: a vector takes in those of nodes up to this many links away.
        iterations: passes over the interactions; 0: the start, passed through the graph.
        learning_rate: of Adam.
        regularization: lambda of the loss, on what a step's users and items have before the graph.
        seed: seed of the start, the order and the drawn items.

    Raises:
        DataError: every user has all items, so that there is nothing to rank below.
        ConfigError: the learning rate is so high that vectors are not finite.
        MissingExtraError: torch-geometric or scipy is not installed.
    """
    links, adjacency = _graph(counts)
    model = _model(sum(links.shape), dimension, layers, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    random = np.random.default_rng(seed)
    with _one_thread():
        for users, liked, others in _batches(links, iterations, random):
            vectors = model.get_embedding(adjacency)
            near, far = ((vectors[users] * vectors[items]).sum(-1) for items in (liked, others))
            nodes = torch.cat([users, liked, others]).unique()
            optimizer.zero_grad()
            model.recommendation_loss(near, far, nodes, regularization).backward()
            optimizer.step()
        with torch.no_grad():
            found = model.get_embedding(adjacency).numpy()
    if not np.isfinite(found).all():
        raise ConfigError(f"learning_rate: expected one that keeps vectors finite, got {learning_rate}; lower it")
    return GraphFactors(found[: links.shape[0]], found[links.shape[0] :])


def unseen(links: Any, users: Rows, random: np.random.Generator) -> Rows:
    """For each of ``users`` an item, uniformly among those that the user has no link with; there must be one.

    Args:
        links: CSR table [users, items], its columns in order.
        users: rows of it, any number of times.
        random: where the draws come from.
    """
    starts, degrees = links.indptr.astype(np.int64), np.diff(links.indptr)
    owners = np.repeat(np.arange(len(degrees)), degrees)
    # Below a user's k-th item lie as many other items as its number less k. So the r-th other item is r and as many
    # more as there are k of which that is <= r; all users are searched at once, each in a stretch of its own.
    below = links.indices - (np.arange(links.nnz) - starts[owners])
    stretch = links.shape[1] + 1
    drawn = random.integers(0, links.shape[1] - degrees[users])
    return drawn + np.searchsorted(owners * stretch + below, users * stretch + drawn, "right") - starts[users]


def _graph(counts: Any) -> tuple[Any, torch.Tensor]:
    """Links [users, items] and the graph's symmetrically normalised adjacency, users before items."""
    try:
        from scipy.sparse import bmat, csr_matrix, diags
    except ImportError:
        raise MissingExtraError("scipy", "recsys", "vectors from interactions") from None
    links = csr_matrix(counts > 0, dtype=np.float32)
    links.sort_indices()
    both = bmat([[None, links], [links.T, None]], "csr")
    scale = diags(np.maximum(np.asarray(both.sum(1)).ravel(), 1) ** -0.5)
    normal = csr_matrix(scale @ both @ scale, dtype=np.float32)
    starts, columns, values = (torch.from_numpy(array) for array in (normal.indptr, normal.indices, normal.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return links, torch.sparse_csr_tensor(starts, columns, values, size=normal.shape, check_invariants=True)


def _model(nodes: int, dimension: int, layers: int, seed: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
            from torch_geometric.nn.models import LightGCN
    except ImportError:
        raise MissingExtraError("torch-geometric", "graph", "method lightgcn") from None
    with torch.random.fork_rng(devices=[]):  # the start is drawn again below, without touching the global generator
        model = LightGCN(nodes, dimension, layers, normalize=False)
    torch.nn.init.xavier_uniform_(model.embedding.weight, generator=torch.Generator().manual_seed(seed))
    return model


def _batches(links: Any, iterations: int, random: np.random.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
    """Users, items they have a link with, and items they have none with, as nodes; in a new order every pass."""
    from rich.console import Console
    from rich.progress import track

    degrees = np.diff(links.indptr)
    users = np.repeat(np.arange(len(degrees)), degrees)
    ranked = degrees[users] < links.shape[1]
    users, liked = users[ranked], links.indices[ranked].astype(np.int64)
    if not len(users):
        raise DataError("expected a user who has no interaction with some item, got none; method als can do without")
    steps = [(turn, start) for turn in range(iterations) for start in range(0, len(users), _BATCH)]
    console = Console(stderr=True)
    bar = track(steps, "Training", console=console, transient=True, disable=not console.is_terminal)
    for _, start in bar:
        if start == 0:
            order = random.permutation(len(users))
        rows = order[start : start + _BATCH]
        items = liked[rows], unseen(links, users[rows], random)
        yield tuple(torch.from_numpy(nodes) for nodes in (users[rows], *(item + len(degrees) for item in items)))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
