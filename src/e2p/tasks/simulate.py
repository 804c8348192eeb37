"""A simulated streaming service whose listeners' tastes are known: for the demo and for tests.

The story, in the order of the code: artists have tags and a sound; listeners have hidden tastes over both;
they listen for some weeks (the logs); a recommender learns a vector of each listener from the logs alone,
once a week; and they ask for playlists, whose artists are drawn from the hidden tastes and never from the
logs. As the tastes are known, the best possible answer is known too: `World.oracle_nll` against
`World.popular_nll` is the most that any personalisation can gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

from e2p.errors import ConfigError
from e2p.tasks.simulated_text import (
    SOUNDS,
    TAGS,
    draw_names,
    playlist_text,
    profile_text,
    request_text,
    sound_words,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
WEEK = timedelta(weeks=1)
SEPARATOR = " ; "
SPACE_VERSION = "plays-svd-1"


@dataclass(frozen=True)
class SimulationConfig:
    """Size and nature of the simulated service.

    Args:
        users: listeners.
        artists: artists of the catalogue.
        tags: genres in use, at most as many as `TAGS` has.
        weeks: simulated weeks. The first half is history that the item factors are learned from; in the
            second half playlists are asked for.
        plays_per_week: mean plays of a listener in a week; activity differs between listeners.
        dimension: length of a behavioural vector.
        playlist_length: artists in a playlist.
        queries_per_user: requests, and thus examples, of a listener.
        open_share: share of the requests that name no tag.
        clusters: groups of listeners with similar tastes.
        taste_strength: how far taste moves a choice, in nats per standard deviation of an artist's sound.
        decay: weight of a play, per week of age, in the behavioural vectors.
        seed: seed of everything.
    """

    users: int = 1500
    artists: int = 200
    tags: int = 12
    weeks: int = 8
    plays_per_week: float = 40.0
    dimension: int = 120
    playlist_length: int = 5
    queries_per_user: int = 4
    open_share: float = 0.2
    clusters: int = 12
    taste_strength: float = 1.2
    decay: float = 0.95
    seed: int = 42

    def __post_init__(self) -> None:
        room = min(self.users, self.artists)
        need = self.tags * (self.playlist_length + 1)
        for key, ok, expected in (
            ("users", self.users >= 3, "a whole number >= 3"),
            ("tags", 2 <= self.tags <= len(TAGS), f"a whole number from 2 to {len(TAGS)}"),
            ("artists", self.artists >= need, f"at least tags * (playlist_length + 1) = {need}"),
            ("weeks", self.weeks >= 2, "a whole number >= 2"),
            ("plays_per_week", self.plays_per_week > 0, "a number > 0"),
            ("dimension", 1 <= self.dimension <= room, f"a whole number from 1 to {room} (users, artists)"),
            ("playlist_length", self.playlist_length >= 1, "a whole number >= 1"),
            ("queries_per_user", self.queries_per_user >= 1, "a whole number >= 1"),
            ("open_share", 0 <= self.open_share <= 1, "a number from 0 to 1"),
            ("clusters", self.clusters >= 1, "a whole number >= 1"),
            ("decay", 0 < self.decay <= 1, "a number in (0, 1]"),
        ):
            if not ok:
                raise ConfigError(f"simulation.{key}: expected {expected}, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class World:
    """Everything the service knows, and what only the simulator knows: tastes and likelihoods.

    Args:
        artists: artist_id, name, tags (list, main tag first), sound (list of two words), popularity (share;
            sums to 1).
        features: [artists, latent], what tastes weigh: tags first, then the axes of `SOUNDS`.
        tastes: [users, latent], hidden; see `utilities`.
        logs: user_id, artist_id, week (0, 1, ...), timestamp (UTC, of the week's last play), plays.
        examples: e2p example table, plus `true_profile`, the true tastes as text.
        embeddings: e2p embedding table: one vector a user at the end of each week of the second half (and at
            its start), learned from the logs up to then.
        choices: [examples, playlist_length], the artists' row numbers, in order.
        oracle_nll: [examples], nats: -log P(the playlist's artists | request, the user's true tastes).
        popular_nll: [examples], nats: -log P(the playlist's artists | request), P averaged over the
            population's tastes: the best that can be done without knowing who asks.
    """

    artists: pl.DataFrame
    features: np.ndarray
    tastes: np.ndarray
    logs: pl.DataFrame
    examples: pl.DataFrame
    embeddings: pl.DataFrame
    choices: np.ndarray
    oracle_nll: np.ndarray
    popular_nll: np.ndarray


def simulate(config: SimulationConfig | None = None) -> World:
    """Build a world; the same config gives the same world.

    Each part has its own generator, so that no draw of one part can tell of another.
    """
    config = config or SimulationConfig()
    catalogue, tasting, listening, asking, crowd = (np.random.default_rng([config.seed, part]) for part in range(5))
    artists, features = _draw_artists(config, catalogue)
    centres = tasting.normal(0.0, 0.8, (config.clusters, features.shape[1]))
    tastes = _draw_tastes(tasting, config.users, centres)
    utility = utilities(artists, features, tastes)
    users = [f"u{number:04d}" for number in range(config.users)]
    logs = _listen(config, users, artists, utility, listening)
    embeddings = learn_vectors(logs, users, artists["artist_id"].to_list(), config)

    strangers = utilities(artists, features, _draw_tastes(crowd, 2000, centres))
    owner, week, tag = _requests(config, asking)
    candidates = np.stack([*_has_tag(artists, TAGS[: config.tags]), np.ones(config.artists, dtype=bool)])
    choices = draw_playlists(asking, utility[owner], candidates[tag], config.playlist_length)
    oracle = playlist_nll(utility[owner], candidates[tag], choices)
    popular = np.empty(len(owner))
    for one in np.unique(tag):
        rows = tag == one
        popular[rows] = _population_nll(strangers, candidates[one], choices[rows])
    truth = _true_profiles(artists, features, tastes, utility)
    examples = _example_table(config, artists, features, users, (owner, week, tag), choices, logs, truth, asking)
    return World(artists, features, tastes, logs, examples, embeddings, choices, oracle, popular)


def utilities(artists: pl.DataFrame, features: np.ndarray, tastes: np.ndarray) -> np.ndarray:
    """[users, artists], nats up to a constant per user: log popularity + taste . features."""
    return np.asarray(tastes @ features.T + np.log(artists["popularity"].to_numpy()))


def draw_playlists(rng: np.random.Generator, utility: np.ndarray, candidates: np.ndarray, length: int) -> np.ndarray:
    """Draw ordered playlists without repetition; each next artist has probability ~ exp(utility).

    Args:
        utility: [rows, artists].
        candidates: [rows, artists], true where the artist may be chosen; at least `length` a row.

    Returns: [rows, length], row numbers of artists. The k best of utility plus Gumbel noise are exactly such
    a draw.
    """
    noisy = np.where(candidates, utility + rng.gumbel(size=utility.shape), -np.inf)
    return np.argsort(-noisy, axis=1)[:, :length]


def playlist_nll(utility: np.ndarray, candidates: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """-log P(choices), in nats, [rows], under `draw_playlists` (a Plackett-Luce ranking)."""
    picked = np.take_along_axis(utility, choices, axis=1)
    top = np.where(candidates, utility, -np.inf).max(axis=1, keepdims=True)
    total = (np.exp(utility - top) * candidates).sum(axis=1, keepdims=True)
    gone = np.cumsum(np.exp(picked - top), axis=1) - np.exp(picked - top)
    return np.asarray((np.log(total - gone) + top - picked).sum(axis=1))


def play_counts(logs: pl.DataFrame, users: Sequence[str], artist_ids: Sequence[str], weeks: int) -> np.ndarray:
    """Plays per week, user and artist: [weeks, users, artists] float32."""
    counts = np.zeros((weeks, len(users), len(artist_ids)), dtype=np.float32)
    user = logs["user_id"].replace_strict({name: row for row, name in enumerate(users)}).to_numpy()
    artist = logs["artist_id"].replace_strict({name: row for row, name in enumerate(artist_ids)}).to_numpy()
    np.add.at(counts, (logs["week"].to_numpy(), user, artist), logs["plays"].to_numpy())
    return counts


def learn_vectors(
    logs: pl.DataFrame, users: Sequence[str], artist_ids: Sequence[str], config: SimulationConfig
) -> pl.DataFrame:
    """Behavioural vectors from listening logs: truncated SVD of damped play counts.

    The item factors are learned once, from the first half of the weeks, and every later week's users are
    folded into that one space. A fresh SVD each week would rotate the space, and last week's phi would read
    this week's vectors as those of strangers. A vector of a week's end sees no play after it.

    Returns an embedding table: user_id, timestamp (UTC), embedding (`config.dimension` float32), version.
    """
    half = config.weeks // 2
    weekly = play_counts(logs, users, artist_ids, config.weeks)
    counts = np.zeros_like(weekly[0])
    mean = factors = np.zeros(0)
    tables = []
    for week in range(config.weeks):
        counts = counts * config.decay + weekly[week]
        if week + 1 < half:
            continue
        taste = np.log1p(counts)
        # Unit length takes out how much a user listens; what is left is what the user listens to.
        taste /= np.maximum(np.linalg.norm(taste, axis=1, keepdims=True), 1e-9)
        if week + 1 == half:
            mean = taste.mean(axis=0)
            factors = np.linalg.svd(taste - mean, full_matrices=False)[2][: config.dimension]
        vectors = np.ascontiguousarray((taste - mean) @ factors.T, dtype=np.float32)
        tables.append(
            pl.DataFrame({"user_id": users}).with_columns(
                pl.lit(START + (week + 1) * WEEK).cast(pl.Datetime("us", "UTC")).alias("timestamp"),
                pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, config.dimension)),
                pl.lit(SPACE_VERSION).alias("version"),
            )
        )
    return pl.concat(tables)


def _draw_artists(config: SimulationConfig, rng: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
    """Catalogue and features. Main tags go round, so each has enough artists; a third have a second."""
    tag_part = np.zeros((config.artists, config.tags))
    sound_part = np.zeros((config.artists, len(SOUNDS)))
    tags = []
    for artist in range(config.artists):
        chosen = [artist % config.tags]
        if rng.random() < 1 / 3:
            chosen.append(int((chosen[0] + rng.integers(1, config.tags)) % config.tags))
        tag_part[artist, chosen] = 1 / len(chosen)
        sound_part[artist, rng.choice(len(SOUNDS), 2, replace=False)] = rng.choice([-1.0, 1.0], 2)
        tags.append([TAGS[tag] for tag in chosen])
    popularity = np.exp(rng.normal(0.0, 0.7, config.artists))
    table = pl.DataFrame(
        {
            "artist_id": [f"a{number:04d}" for number in range(config.artists)],
            "name": draw_names(rng, config.artists),
            "tags": tags,
            "sound": [sound_words(axes) for axes in sound_part],
            "popularity": popularity / popularity.sum(),
        }
    )
    return table, np.concatenate([tag_part, config.taste_strength * sound_part], axis=1)


def _draw_tastes(rng: np.random.Generator, number: int, centres: np.ndarray) -> np.ndarray:
    """[number, latent]: the centre of a random cluster plus a part of one's own."""
    own = rng.normal(0.0, 0.8, (number, centres.shape[1]))
    return np.asarray(centres[rng.integers(len(centres), size=number)] + own)


def _listen(
    config: SimulationConfig,
    users: list[str],
    artists: pl.DataFrame,
    utility: np.ndarray,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Plays per user, artist and week. One play in five is a chance hit from the charts, as on a radio."""
    taste = np.exp(utility - utility.max(axis=1, keepdims=True))
    taste = 0.8 * taste / taste.sum(axis=1, keepdims=True) + 0.2 * artists["popularity"].to_numpy()
    activity = config.plays_per_week * np.exp(rng.normal(-0.125, 0.5, len(users)))
    parts = []
    for week in range(config.weeks):
        plays = rng.multinomial(rng.poisson(activity), taste / taste.sum(axis=1, keepdims=True))
        user, artist = np.nonzero(plays)
        seconds = rng.integers(0, int(WEEK.total_seconds()), len(user))
        parts.append(
            pl.DataFrame(
                {
                    "user_id": np.array(users)[user],
                    "artist_id": artists["artist_id"].to_numpy()[artist],
                    "week": np.full(len(user), week),
                    "timestamp": _moments(week, seconds),
                    "plays": plays[user, artist],
                }
            )
        )
    return pl.concat(parts)


def _moments(week: int | np.ndarray, seconds: np.ndarray) -> pl.Series:
    """UTC timestamps, `seconds` into the given simulated weeks."""
    micros = (int(START.timestamp()) + week * int(WEEK.total_seconds()) + seconds) * 1_000_000
    return pl.Series(micros, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))


def _requests(config: SimulationConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who asks, in which week, for which tag (the number of tags: for none). Independent of taste on purpose:
    what is asked tells nothing of who asks, and `popular_nll` is exact."""
    owner = np.repeat(np.arange(config.users), config.queries_per_user)
    week = rng.integers(config.weeks // 2, config.weeks, len(owner))
    tag = rng.integers(0, config.tags, len(owner))
    return owner, week, np.where(rng.random(len(owner)) < config.open_share, config.tags, tag)


def _population_nll(strangers: np.ndarray, candidates: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """-log of the mean, over the strangers' [draws, artists] utilities, of P(choices): [rows], nats."""
    weight = np.exp(strangers - strangers.max(axis=1, keepdims=True)) * candidates
    left = weight.sum(axis=1, keepdims=True)
    probability = np.ones((len(strangers), len(choices)))
    for artist in choices.T:
        picked = weight[:, artist]
        probability *= picked / left
        left = left - picked
    return np.asarray(-np.log(probability.mean(axis=0)))


def _has_tag(artists: pl.DataFrame, tags: Sequence[str]) -> list[np.ndarray]:
    """For each tag, a mask over the artists."""
    return [artists["tags"].list.contains(tag).to_numpy() for tag in tags]


def _true_profiles(artists: pl.DataFrame, features: np.ndarray, tastes: np.ndarray, utility: np.ndarray) -> list[str]:
    """The true tastes as text: three tags, two words of sound, five artists."""
    names = artists["name"].to_list()
    count = features.shape[1] - len(SOUNDS)
    return [
        profile_text(
            [TAGS[tag] for tag in np.argsort(-taste[:count])[:3]],
            sound_words(taste[count:]),
            [names[artist] for artist in np.argsort(-liking)[:5]],
        )
        for taste, liking in zip(tastes, utility, strict=True)
    ]


def _logged_profiles(
    config: SimulationConfig,
    artists: pl.DataFrame,
    features: np.ndarray,
    users: list[str],
    logs: pl.DataFrame,
) -> dict[tuple[int, int], str]:
    """(user's row, week) -> profile from the plays before that week: the three most played tags, the sound
    that stands out against the charts, the five most played artists."""
    names = artists["name"].to_list()
    has_tag = np.stack(_has_tag(artists, TAGS[: config.tags]))
    sound = features[:, -len(SOUNDS) :] - artists["popularity"].to_numpy() @ features[:, -len(SOUNDS) :]
    weekly = play_counts(logs, users, artists["artist_id"].to_list(), config.weeks)
    # Popularity breaks ties, and stands in for a user without plays.
    plays = 1e-3 * artists["popularity"].to_numpy() + weekly[: config.weeks // 2].sum(axis=0)
    profiles: dict[tuple[int, int], str] = {}
    for week in range(config.weeks // 2, config.weeks):
        for user, played in enumerate(plays):
            profiles[user, week] = profile_text(
                [TAGS[tag] for tag in np.argsort(-(has_tag @ played))[:3]],
                sound_words(played @ sound),
                [names[artist] for artist in np.argsort(-played)[:5]],
            )
        plays = plays + weekly[week]
    return profiles


def _example_table(
    config: SimulationConfig,
    artists: pl.DataFrame,
    features: np.ndarray,
    users: list[str],
    requests: tuple[np.ndarray, np.ndarray, np.ndarray],
    choices: np.ndarray,
    logs: pl.DataFrame,
    truth: list[str],
    rng: np.random.Generator,
) -> pl.DataFrame:
    owner, week, tag = requests
    names = artists["name"].to_list()
    profiles = _logged_profiles(config, artists, features, users, logs)
    tags = TAGS[: config.tags]
    texts = [request_text(rng, tags[one] if one < len(tags) else None) for one in tag]
    seconds = rng.integers(0, int(WEEK.total_seconds()), len(owner))
    return pl.DataFrame(
        {
            "example_id": [f"e{number:05d}" for number in range(len(owner))],
            "user_id": [users[user] for user in owner],
            "messages": [[{"role": "user", "content": text}] for text in texts],
            "completion": [playlist_text([names[artist] for artist in row]) for row in choices],
            "timestamp": _moments(week, seconds),
            "profile": [profiles[key] for key in zip(owner.tolist(), week.tolist(), strict=True)],
            "true_profile": [truth[user] for user in owner],
            "group": [users[user] for user in owner],
        }
    )
