"""The simulated service: what is drawn from what, and the likelihoods by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from e2p.errors import ConfigError
from e2p.tasks.simulate import START, WEEK, SimulationConfig, World, learn_vectors, simulate, utilities
from e2p.tasks.simulated_text import TAGS, draw_names, playlist_names, playlist_text, profile_text, sound_words

SMALL = SimulationConfig(users=150, artists=60, tags=4, dimension=24, queries_per_user=3, seed=7)


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(SMALL)


def test_same_seed_same_world_other_seed_other_world(world: World) -> None:
    again, other = simulate(SMALL), simulate(dataclasses.replace(SMALL, seed=8))
    for field in dataclasses.fields(World):
        first, second = getattr(world, field.name), getattr(again, field.name)
        same = first.equals(second) if isinstance(first, pl.DataFrame) else np.array_equal(first, second)
        assert same, field.name
    assert not world.examples.equals(other.examples)


def test_tables_have_the_contract_s_columns(world: World) -> None:
    assert world.examples.columns == [
        "example_id", "user_id", "messages", "completion", "timestamp", "profile", "true_profile", "group",
    ]  # fmt: skip
    assert world.embeddings.schema == {
        "user_id": pl.String,
        "timestamp": pl.Datetime("us", "UTC"),
        "embedding": pl.Array(pl.Float32, SMALL.dimension),
        "version": pl.String,
    }
    assert {"artist_id", "name", "tags", "popularity"} <= set(world.artists.columns)
    assert world.logs.columns == ["user_id", "artist_id", "week", "timestamp", "plays"]
    assert world.logs["timestamp"].dtype == pl.Datetime("us", "UTC")
    assert world.logs["plays"].min() > 0
    assert world.tastes.shape == (SMALL.users, world.features.shape[1])
    assert world.oracle_nll.shape == world.popular_nll.shape == (world.examples.height,)
    assert world.artists["popularity"].sum() == pytest.approx(1)


def test_playlists_hold_artists_of_the_requested_tag(world: World) -> None:
    tags = dict(zip(world.artists["name"], world.artists["tags"].to_list(), strict=True))
    names = world.artists["name"].to_list()
    named = 0
    for row, example in enumerate(world.examples.iter_rows(named=True)):
        playlist = playlist_names(example["completion"])
        assert playlist == [names[artist] for artist in world.choices[row]]
        assert len(set(playlist)) == SMALL.playlist_length
        asked = [tag for tag in TAGS[: SMALL.tags] if tag in example["messages"][0]["content"]]
        named += bool(asked)
        assert all(asked[0] in tags[name] for name in playlist) if asked else True
    assert 0.7 < named / world.examples.height < 0.9


def test_every_example_has_a_vector_at_or_before_it_and_some_have_newer_ones(world: World) -> None:
    weeks = sorted(world.embeddings["timestamp"].unique())
    assert len(weeks) == SMALL.weeks // 2 + 1
    at_or_before = [sum(week <= time for week in weeks) for time in world.examples["timestamp"]]
    assert min(at_or_before) == 1
    assert max(at_or_before) == len(weeks) - 1  # the last vector is for serving
    assert world.embeddings.height == SMALL.users * len(weeks)


def test_a_vector_sees_no_play_after_its_week(world: World) -> None:
    users, artists = world.embeddings["user_id"].unique().sort(), world.artists["artist_id"]
    last = SMALL.weeks - 2
    cut = world.logs.filter(pl.col("week") <= last)
    changed = learn_vectors(cut, users.to_list(), artists.to_list(), SMALL)
    known = world.embeddings["timestamp"] < world.embeddings["timestamp"].max()
    assert changed.filter(known).equals(world.embeddings.filter(known))
    assert not changed.filter(~known).equals(world.embeddings.filter(~known))


def test_logs_and_vectors_know_nothing_of_the_playlists(world: World) -> None:
    """Other requests, hence other playlists, leave the listening as it is."""
    other = simulate(dataclasses.replace(SMALL, queries_per_user=5, playlist_length=3))
    assert other.logs.equals(world.logs)
    assert other.embeddings.equals(world.embeddings)


def test_profiles_see_only_weeks_before_the_example(world: World) -> None:
    example = world.examples.sort("timestamp").row(0, named=True)
    assert example["timestamp"] < START + (SMALL.weeks // 2 + 1) * WEEK
    before = world.logs.filter(pl.col("user_id") == example["user_id"], pl.col("week") < SMALL.weeks // 2)
    plays = before.join(world.artists, on="artist_id").group_by("name", "popularity").agg(pl.col("plays").sum())
    top = plays.sort("plays", "popularity", descending=True)["name"].head(5).to_list()
    assert example["profile"].endswith(f"Plays {', '.join(top)}.")


def test_vectors_carry_taste(world: World) -> None:
    """A ridge regression from the last vectors finds most of the variance in held-out users' sound tastes."""
    newest = world.embeddings.filter(pl.col("timestamp") == pl.col("timestamp").max()).sort("user_id")
    x = newest["embedding"].to_numpy()
    x = np.concatenate([x / x.std(), np.ones((len(x), 1))], axis=1)
    y = world.tastes[:, -4:]
    train, test = slice(0, 100), slice(100, None)
    weights = np.linalg.solve(x[train].T @ x[train] + 3 * np.eye(x.shape[1]), x[train].T @ y[train])
    unexplained = ((x[test] @ weights - y[test]) ** 2).mean() / y[test].var(axis=0).mean()
    assert 1 - unexplained > 0.4


def test_oracle_and_popular_likelihood_equal_a_hand_written_loop(world: World) -> None:
    utility = utilities(world.artists, world.features, world.tastes)
    assert utility[3, 5] == pytest.approx(
        math.log(world.artists["popularity"][5])
        + sum(a * b for a, b in zip(world.tastes[3], world.features[5], strict=True))
    )
    tags = world.artists["tags"].to_list()
    for row in range(0, 60, 7):
        example = world.examples.row(row, named=True)
        asked = next((tag for tag in TAGS if tag in example["messages"][0]["content"]), None)
        left = [artist for artist in range(SMALL.artists) if asked is None or asked in tags[artist]]
        user, nll = int(example["user_id"][1:]), 0.0
        for artist in world.choices[row]:
            nll -= utility[user, artist] - math.log(sum(math.exp(utility[user, other]) for other in left))
            left.remove(artist)
        assert world.oracle_nll[row] == pytest.approx(nll)


def test_knowing_the_taste_is_worth_more_than_half_a_nat_per_artist(world: World) -> None:
    gain = world.popular_nll - world.oracle_nll
    # The population's average is over strangers; it can be no better, on average, than the truth.
    assert gain.mean() / SMALL.playlist_length > 0.5


def test_true_profile_states_the_tastes(world: World) -> None:
    user = 0
    best = int(np.argmax(utilities(world.artists, world.features, world.tastes)[user]))
    text = world.examples.filter(pl.col("user_id") == "u0000")["true_profile"][0]
    assert f"Plays {world.artists['name'][best]}," in text
    assert f"Likes {TAGS[int(np.argmax(world.tastes[user, : SMALL.tags]))]}," in text


def test_texts() -> None:
    names = draw_names(np.random.default_rng(0), 500)
    assert len(set(names)) == 500
    assert {len(name.split()) for name in names} == {1, 2, 3}
    assert playlist_names(playlist_text(names)) == names
    assert playlist_names(" Tado ;; The Pale Foxes ; ") == ["Tado", "The Pale Foxes"]
    assert profile_text(["dub"], ["slow", "dark"], ["Tado", "Lomi"]) == (
        "Likes dub. Prefers a slow and dark sound. Plays Tado, Lomi."
    )
    assert sound_words(np.array([0.1, -0.9, 0.8, 0.2])) == ["slow", "raw"]


@pytest.mark.parametrize(
    "change",
    [{"users": 2}, {"tags": 99}, {"artists": 10}, {"dimension": 61}, {"weeks": 1}, {"decay": 0.0}],
)
def test_bad_sizes_are_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"simulation.{next(iter(change))}: expected"):
        dataclasses.replace(SMALL, **change)
