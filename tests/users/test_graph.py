"""LightGCN: the propagation and a step of training by hand, fair draws, held-out items found, one seed one result."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from e2p.cli import main
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.users.graph import GraphFactors, lightgcn, unseen


def learn(counts: Any, **change: Any) -> GraphFactors:
    usual = {"dimension": 4, "layers": 3, "iterations": 60, "learning_rate": 0.01, "regularization": 1e-3, "seed": 0}
    return lightgcn(csr_matrix(counts), **(usual | change))


def world(users: int, items: int, share: float = 0.4, seed: int = 0) -> np.ndarray:
    """Who has what, at random; every user and every item has at least one link."""
    links = np.random.default_rng(seed).random((users, items)) < share
    links[np.arange(users), np.arange(users) % items] = True
    links[np.arange(items) % users, np.arange(items)] = True
    return links.astype(float)


def blocks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """120 users of four kinds, 8 of their kind's 20 items each and 2 of any; and what is held out, 2 of the kind's."""
    random = np.random.default_rng(seed)
    links, held = np.zeros((120, 80)), np.zeros((120, 80), bool)
    for user in range(120):
        own = 20 * (user % 4) + random.permutation(20)
        links[user, own[:8]] = links[user, random.integers(0, 80, 2)] = 1
        held[user, own[8:10]] = True
    return links, held & (links == 0)


def recall(affinity: np.ndarray, links: np.ndarray, held: np.ndarray, k: int) -> float:
    ranks = np.argsort(np.argsort(np.where(links > 0, np.inf, -affinity), axis=1), axis=1)
    return float((ranks < k)[held].mean())


def propagation(links: np.ndarray, layers: int) -> np.ndarray:
    """He et al. 2020, Eq. 7 and 8: the mean over 0 to L of powers of D^-1/2 A D^-1/2, A with users before items."""
    users, items = links.shape
    linked = np.zeros((users + items, users + items))
    linked[:users, users:] = links > 0
    linked[users:, :users] = linked[:users, users:].T
    degree = linked.sum(1)
    step = linked / np.sqrt(np.outer(degree, degree))
    return np.mean([np.linalg.matrix_power(step, layer) for layer in range(layers + 1)], axis=0)


def start(nodes: int, dimension: int, seed: int) -> np.ndarray:
    bound = (6 / (nodes + dimension)) ** 0.5  # Glorot and Bengio 2010
    drawn = torch.empty(nodes, dimension).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return drawn.double().numpy()


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_vectors_are_the_mean_over_layers_of_normalised_propagation(layers: int) -> None:
    links = world(9, 7) * np.random.default_rng(1).uniform(0.5, 90, (9, 7))  # weights, which must not count
    found = np.concatenate(learn(links, layers=layers, iterations=0, seed=3))
    np.testing.assert_allclose(found, propagation(links, layers) @ start(16, 4, 3), rtol=1e-4, atol=1e-6)


def test_a_step_is_that_of_bayesian_personalised_ranking_by_hand() -> None:
    """Every user lacks one item, so that the draws are known; Adam's first step is the rate times the slope's sign."""
    users, items, rate, strength = 6, 5, 0.01, 0.7
    lacks = np.arange(users) % items
    links = np.ones((users, items))
    links[np.arange(users), lacks] = 0
    weights, spread = start(users + items, 4, 5), propagation(links, 2)
    vectors, slope = spread @ weights, np.zeros_like(weights)
    user, liked = links.nonzero()
    for u, i, j in zip(user, users + liked, users + lacks[user], strict=True):
        # Of -ln sigmoid(x_u (x_i - x_j)), the mean over interactions.
        push = -1 / (1 + np.exp(vectors[u] @ (vectors[i] - vectors[j]))) / len(user)
        slope[u] += push * (vectors[i] - vectors[j])
        slope[i] += push * vectors[u]
        slope[j] -= push * vectors[u]
    slope = spread.T @ slope + 2 * strength * weights / len(user)
    assert np.abs(slope).min() > 1e-5
    found = np.concatenate(learn(links, layers=2, iterations=1, learning_rate=rate, regularization=strength, seed=5))
    np.testing.assert_allclose(found, spread @ (weights - rate * np.sign(slope)), rtol=1e-3, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 9), st.floats(0, 1), st.integers(0, 99))
def test_a_drawn_item_is_one_that_the_user_has_no_link_with(users: int, items: int, share: float, seed: int) -> None:
    links = world(users, items, share, seed)
    open_users = np.flatnonzero(links.sum(1) < items)
    drawn = unseen(csr_matrix(links), np.repeat(open_users, 200), np.random.default_rng(seed)).reshape(-1, 200)
    for user, found in zip(open_users, drawn, strict=True):
        assert set(found) == set(np.flatnonzero(links[user] == 0))


def test_items_are_drawn_uniformly() -> None:
    links = csr_matrix([[0, 1, 1, 0, 0, 1, 0, 1.0], [1, 1, 1, 1, 1, 1, 0, 0]])
    drawn = unseen(links, np.repeat([0, 1], 40_000), np.random.default_rng(0)).reshape(2, -1)
    for found, others in zip(drawn, ([0, 3, 4, 6], [6, 7]), strict=True):
        shares = np.bincount(found, minlength=8)[others] / 40_000
        np.testing.assert_allclose(shares, 1 / len(others), atol=0.012)


def test_held_out_items_are_found_far_better_than_by_popularity() -> None:
    links, held = blocks()
    users, items = learn(links, dimension=8, iterations=100)
    popular = np.broadcast_to(links.sum(0), links.shape)
    # 12 items of a kind are left to a user, of which 10 fit: 5/6 is the most that a ranking by kind can reach.
    assert recall(users @ items.T, links, held, 10) > 0.7
    assert recall(popular, links, held, 10) < 0.25


def test_a_seed_repeats_bit_for_bit_and_leaves_the_global_generator_and_threads_alone() -> None:
    links = blocks()[0]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, again, other = (learn(links, iterations=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    for one, same, different in zip(first, again, other, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, same)
        assert not np.allclose(one, different)


def test_who_has_everything_is_learned_from_nothing_but_has_a_vector() -> None:
    links = world(6, 5)
    links[2] = 1
    assert learn(links, iterations=3).user_factors.shape == (6, 4)
    with pytest.raises(DataError, match="expected a user who has no interaction with some item"):
        learn(np.ones((6, 5)))


def test_a_learning_rate_that_breaks_the_vectors_is_named() -> None:
    with pytest.raises(ConfigError, match="learning_rate: expected one that keeps vectors finite, got 1e\\+30"):
        learn(world(6, 5), iterations=5, learning_rate=1e30)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learn(world(6, 5), iterations=0)  # loads the package, and whatever goes with it, once
    importlib.import_module("torch_geometric.nn.models")
    monkeypatch.setitem(sys.modules, "torch_geometric.nn.models", None)
    with pytest.raises(MissingExtraError, match=r"'torch-geometric': pip install 'e2p\[graph\]'"):
        learn(world(6, 5))


def test_the_command_takes_the_method_and_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user, item = blocks()[0].nonzero()
    pl.DataFrame({"user_id": user, "item_id": item}).write_csv(tmp_path / "plays.csv")
    command = ["behaviour", str(tmp_path / "plays.csv"), str(tmp_path / "vectors.parquet"), "--method", "lightgcn"]
    assert main([*command, "--dimension", "6", "--layers", "2", "--learning_rate", "0.02", "--iterations", "3"]) == 0
    shown = capsys.readouterr()
    assert "120 vectors of 6 numbers for 120 users, version lightgcn-6-" in shown.out
    assert shown.err == ""
    assert main([*command, "--overwrite", "--layers", "0"]) == 2
    assert "layers: expected a whole number >= 1, got 0" in capsys.readouterr().err
