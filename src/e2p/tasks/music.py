"""Playlists by request: public stand-ins for the paper's playlist task.

The paper (Appendix F, "Music Playlist Generation") has 300,000 requests of a streaming service, saved or not, with
behavioural vectors of 120 numbers; those are not public. Here, on Last.fm (HetRec 2011), a listener's artists are
halved: one half alone makes the vector, the other half alone makes the playlists, to imitate (``lm``) or to tell from
another listener's (``kto``, ``engagement``; see ``music_labels``). The Spotify Million Playlist Dataset is read too,
a playlist standing for its listener.

What decides about leakage:

- Which half a play belongs to follows from seed, user and artist only, never from the other plays. Removing
  or changing a held-out play therefore leaves every vector bit for bit the same.
- Item factors are fitted on the vector halves of *all* users, test users included, without any playlist: what
  a recommender does that serves the people it was fitted on. phi never sees a test user's playlists.
- An artist carries a tag *for this user* only if enough other users say so: nobody's own tagging shows what
  they hear. Profiles use the vector half only. A Spotify title is told by the playlist's own tracks, and which
  tracks answer it is learnt from the vector halves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from e2p.config import DataConfig, ObjectiveConfig, RunConfig
from e2p.config_evaluation import EvaluationConfig, PlaylistsConfig
from e2p.config_io import save_yaml
from e2p.data.splits import SPLITS
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.tasks.music_files import Listening, read
from e2p.tasks.music_labels import WORDINGS, labelled
from e2p.tasks.output import staged_folder
from e2p.users.behaviour import als

SEPARATOR = " ; "  # between the artists of a playlist
SHORTEST = 3  # artists; a shorter list is no playlist
Objective = Literal["lm", "kto", "engagement"]


def prepare(
    source: str,
    output: str,
    objective: Objective = "lm",
    dimension: int = 64,
    vectors: Literal["svd", "als"] = "svd",
    playlist_length: int = 5,
    per_user: int = 18,
    min_tag_users: int = 2,
    min_tag_artists: int = 20,
    min_query_listeners: int = 5,
    most_playlists: int = 0,
    seed: int = 42,
    overwrite: bool = False,
) -> Path:
    """Make playlist examples and behavioural vectors from HetRec Last.fm 2k or the Spotify Million Playlist Dataset.

    Writes examples, embeddings, profiles, items (their factors: the dot product with a user's vector is the
    affinity), queries (what answers them, and the mean of its factors), the plays of both halves, and a config to
    train with.

    Args:
        source: folder with artists.dat, tags.dat, user_artists.dat and user_taggedartists.dat, or with
            mpd.slice.*.json.
        output: folder for the tables.
        objective: what the examples are for; ``lm``: playlists to imitate; ``kto`` and ``engagement``: each playlist
            with label true for its listener, and with label false for another of the same part.
        dimension: numbers in a vector.
        vectors: ``svd``: truncated SVD of the user-artist table; ``als``: implicit-feedback ALS.
        playlist_length: artists in a playlist; fewer (at least 3) where the listener has no more of a tag.
        per_user: most playlists of one listener, each for another tag. With 18 rather than 6 the same number of
            steps gained 0.03 nats a token more over no prefix on the validation listeners.
        min_tag_users: other listeners who must have given an artist a tag before it counts; of Spotify, playlists
            with that title that hold the track before it answers the title.
        min_tag_artists: artists that must carry a tag before it is asked for.
        min_query_listeners: with labels: listeners of a part who must have a playlist of a query before it is asked
            there.
        most_playlists: Spotify: read so many playlists at most; 0: all.
        seed: seed of the halves, the playlists, the factors and the labels.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a number is out of range.
        DataError: a file is missing or a line is not as documented; the message has file and line. Or too few
            listeners for what is asked.
        RunError: the output exists.
        MissingExtraError: scikit-learn or implicit is not installed.
    """
    for name, value, least in (
        ("dimension", dimension, 1),
        ("playlist_length", playlist_length, SHORTEST),
        ("per_user", per_user, 1),
        ("min_tag_users", min_tag_users, 1),
        ("min_tag_artists", min_tag_artists, 1),
        ("min_query_listeners", min_query_listeners, 2),
        ("most_playlists", most_playlists, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value}; raise it")
    with staged_folder(output, overwrite) as folder:
        data = read(source, most_playlists)
        vector_half, heldout_half = halves(data.plays, seed)
        users, user_vectors, artists, item_vectors = factorise(vector_half, dimension, vectors, seed)
        items = _items(artists, item_vectors, data.names)
        carried = carriers(data, vector_half, min_tag_users, min_tag_artists)
        queries = answers(carried, artists, items)
        tags = tags_for_users(data, carried, min_tag_users).filter(pl.col("tag").is_in(queries["query"].implode()))
        known = heldout_half.filter(pl.col("user").is_in(users))
        examples = playlists(known, tags, data.names, playlist_length, per_user, seed)
        if examples.is_empty():
            raise DataError(
                f"{source}: expected listeners with {SHORTEST} held-out artists of one tag, got none; "
                "lower min_tag_users or min_tag_artists"
            )
        made, with_playlists = examples.height, examples["user_id"].n_unique()
        dropped: Counter[tuple[str, str]] = Counter()
        if objective != "lm":
            listeners = [str(user) for user in users]
            examples, dropped = labelled(examples, data.plays, data.names, listeners, seed, min_query_listeners)
        texts = profiles(vector_half, tags, data.names)
        examples = examples.join(texts, on="user_id", how="left", maintain_order="left")
        version = f"{data.kind}-{vectors}-{dimension}-seed{seed}"
        write_frame(folder / "examples.parquet", examples)
        write_frame(folder / "profiles.parquet", texts)
        write_embeddings(folder / "embeddings.parquet", [str(u) for u in users], user_vectors, version=version)
        write_frame(folder / "items.parquet", items)
        write_frame(folder / "queries.parquet", queries)
        write_frame(folder / "vector_plays.parquet", _plays(vector_half, data.names))
        write_frame(folder / "heldout_plays.parquet", _plays(heldout_half, data.names))
        save_yaml(recommended(output, objective), folder / "config.yaml")
    everyone = data.plays["user"].n_unique()
    print(f"{output}: {made:,} playlists of {with_playlists:,} listeners, vectors of {dimension} numbers")
    for reason, count in data.left_out.items():
        if count:
            print(f"left out: {count:,} {reason}")
    print(
        f"dropped: {everyone - with_playlists} of {everyone:,} listeners (no tag with {SHORTEST} held-out artists; "
        f"{everyone - len(users)} of them without a vector)"
    )
    if objective != "lm":
        print(_labels_told(examples, dropped))
    return Path(output)


def _labels_told(examples: pl.DataFrame, dropped: Counter[tuple[str, str]]) -> str:
    """One line: what each part has, and the playlists that it lost, by reason."""
    told = []
    for part in SPLITS:
        rows = examples.filter(pl.col("split") == part)
        lost = [f"{count:,} {reason}" for (where, reason), count in dropped.items() if where == part]
        told.append(
            f"{part} {rows.height:,} rows of {rows['user_id'].n_unique():,} listeners and "
            f"{rows['query'].n_unique():,} queries (playlists dropped: {', '.join(lost) or 'none'})"
        )
    return f"labels, half of them true: {'; '.join(told)}"


def recommended(output: str | Path, objective: Objective = "lm") -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet"),
        profile_template="persona: {profile}",
    )
    if objective == "lm":
        return RunConfig(data=data, output="runs/music")
    judged = PlaylistsConfig(
        items=str(folder / "items.parquet"),
        queries=str(folder / "queries.parquet"),
        plays=str(folder / "heldout_plays.parquet"),
        known=str(folder / "vector_plays.parquet"),
    )
    return RunConfig(
        data=data,
        objective=ObjectiveConfig(name=objective),
        evaluation=EvaluationConfig(playlists=judged),
        output=f"runs/music-{objective}",
    )


def halves(plays: pl.DataFrame, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The plays that make vectors and the plays that make playlists.

    A hash of seed, user and artist decides, so a play's half does not depend on any other play; halves are
    equal in expectation, not exactly.
    """
    key = pl.concat_str(pl.lit(str(seed)), "user", "artist", separator=" ")
    bit = key.map_elements(
        lambda text: hashlib.blake2b(text.encode(), digest_size=1).digest()[0] & 1, return_dtype=pl.Int64
    )
    marked = plays.sort("user", "artist").with_columns(bit.alias("half"))
    first, second = (marked.filter(pl.col("half") == value).drop("half") for value in (0, 1))
    return first, second


def factorise(
    plays: pl.DataFrame, dimension: int, method: Literal["svd", "als"] = "svd", seed: int = 42
) -> tuple[list[int], np.ndarray, list[int], np.ndarray]:
    """Users, their vectors [users, dimension], artists, their vectors [artists, dimension], both float32.

    ``svd`` factorises the table of who played what, artists weighted by their inverse document frequency to the
    power 1.5, with the singular values on the users' side. Chosen without a language model, by how well ridge
    regression from vectors finds held-out artists of users that it was not fitted on (mean recall@50, two
    seeds, three folds of the training and validation users): popularity 0.173; log play counts times idf
    0.320; played or not 0.295, times idf 0.327, squared 0.339, to the power 1.5 0.341 (64 numbers; 32: 0.341,
    120: 0.334); ALS 0.340.

    Raises DataError where there are not more users and artists than dimensions.
    """
    users, artists = plays["user"].unique().sort(), plays["artist"].unique().sort()
    if min(len(users), len(artists)) <= dimension:
        raise DataError(
            f"plays: expected more than {dimension} users and items for that dimension, "
            f"got {len(users)} and {len(artists)}; lower the dimension"
        )
    try:
        from scipy.sparse import csr_matrix
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        raise MissingExtraError("scikit-learn", "recsys", "making vectors from plays") from None
    rows = np.searchsorted(users.to_numpy(), plays["user"].to_numpy())
    columns = np.searchsorted(artists.to_numpy(), plays["artist"].to_numpy())
    listeners = np.bincount(columns)
    shape = (len(users), len(artists))
    if method == "svd":
        rarity = (np.log((1 + len(users)) / (1 + listeners)) + 1) ** 1.5
        left, scale, right = randomized_svd(
            csr_matrix((rarity[columns], (rows, columns)), shape=shape),
            dimension,
            n_iter=7,
            random_state=seed,
        )
        user_vectors, item_vectors = left * scale, right.T
    else:
        played = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
        # The two strengths were the best of those tried as above.
        model = als(played, dimension, regularization=30.0, alpha=10.0, iterations=10, seed=seed)
        user_vectors, item_vectors = model.user_factors, model.item_factors
    return (
        users.to_list(),
        user_vectors.astype(np.float32),
        artists.to_list(),
        item_vectors.astype(np.float32),
    )


def carriers(data: Listening, vector_half: pl.DataFrame, min_users: int, min_artists: int) -> pl.DataFrame:
    """artist, tag, support: the tags that artists carry by the word of at least ``min_users`` users.

    A playlist's title is the word of its vector half alone: its other half is to be foretold.
    """
    said = data.tagged if data.titles is None else vector_half.join(data.titles, on="user")
    relations = said.group_by("artist", "tag").len("support").filter(pl.col("support") >= min_users)
    return relations.filter(pl.len().over("tag") >= min_artists)


def answers(carried: pl.DataFrame, artists: list[int], items: pl.DataFrame) -> pl.DataFrame:
    """query, embedding (Array(Float32, D), the mean of its items' vectors), items (ids); of items with vectors.

    Args:
        carried: artist, tag: what answers which query.
        artists: the artist of each row of ``items``.
        items: item_id, item, embedding [D].
    """
    places = pl.DataFrame({"artist": artists, "place": range(len(artists))}, schema_overrides={"artist": pl.Int64})
    found = carried.join(places, on="artist").sort("tag", "place")
    grouped = found.group_by("tag", maintain_order=True).agg("place")
    vectors = items["embedding"].to_numpy()
    means = np.array([vectors[place].mean(axis=0, dtype=np.float64) for place in grouped["place"]], dtype=np.float32)
    means = means.reshape(-1, vectors.shape[1])
    return pl.DataFrame(
        [
            grouped["tag"].alias("query"),
            pl.Series("embedding", means, dtype=pl.Array(pl.Float32, vectors.shape[1])),
            pl.Series(
                "items", [items["item_id"].gather(place) for place in grouped["place"]], dtype=pl.List(pl.String)
            ),
        ]
    )


def tags_for_users(data: Listening, carried: pl.DataFrame, min_users: int) -> pl.DataFrame:
    """user, artist, tag, support: the tags that a played artist carries by the word of *other* users.

    A playlist has one tag, its own title, if that is carried by any artist at all.
    """
    plays = data.plays.select("user", "artist")
    if data.titles is not None:
        asked = data.titles.join(carried, on="tag", how="semi")
        own_title = plays.join(asked, on="user").with_columns(support=pl.lit(1, pl.Int64))
        return own_title.select("user", "artist", "tag", "support").sort("user", "tag", "artist")
    own = data.tagged.select("user", "artist", "tag", own=pl.lit(1, pl.Int64))
    return (
        plays.join(carried, on="artist")
        .join(own, on=["user", "artist", "tag"], how="left")
        .with_columns(support=pl.col("support").cast(pl.Int64) - pl.col("own").fill_null(0))
        .filter(pl.col("support") >= min_users)
        .select("user", "artist", "tag", "support")
        .sort("user", "tag", "artist")
    )


def playlists(
    plays: pl.DataFrame, tags: pl.DataFrame, names: pl.DataFrame, length: int, per_user: int, seed: int
) -> pl.DataFrame:
    """Example table: a request by tag, and artists of that tag that the listener really played.

    Artists are drawn without replacement in proportion to their plays, the first drawn first; tags are drawn
    evenly among those with enough artists. A listener has an own generator: the others' plays change nothing.
    """
    heard = names.join(plays, on="artist", how="semi")
    name = {artist: (item, text) for artist, item, text in heard.select("artist", "item_id", "name").iter_rows()}
    candidates = (
        plays.join(tags, on=["user", "artist"])
        .sort("user", "tag", "artist")
        .group_by("user", "tag", maintain_order=True)
        .agg("artist", "plays")
        .filter(pl.col("artist").list.len() >= SHORTEST)
    )
    rows: list[dict[str, Any]] = []
    for (user,), group in candidates.group_by("user", maintain_order=True):
        rng = np.random.default_rng([seed, int(str(user))])
        chosen = sorted(rng.permutation(group.height)[:per_user].tolist())
        requests = group[chosen].select("tag", "artist", "plays").iter_rows()
        for number, (tag, artists, counts) in enumerate(requests):
            # The Gumbel trick: the largest keys are a draw in proportion to plays, without replacement.
            order = np.argsort(-(np.log(counts) + rng.gumbel(size=len(counts))))[:length]
            drawn = [artists[i] for i in order]
            rows.append(
                {
                    "example_id": f"{user}-{number}",
                    "user_id": str(user),
                    "messages": [{"role": "user", "content": WORDINGS[0].format(tag)}],
                    "completion": SEPARATOR.join(name[artist][1] for artist in drawn),
                    "group": str(user),
                    "query": tag,
                    "items": [name[artist][0] for artist in drawn],
                }
            )
    return pl.DataFrame(rows)


def profiles(plays: pl.DataFrame, tags: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """user_id, profile: the most played artists and the most heard tags of the vector half, as text."""
    artists = (
        plays.join(names, on="artist")
        .sort(["user", "plays", "artist"], descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .agg(artists=pl.col("name").head(5).str.join(", "))
    )
    heard = (
        plays.join(tags, on=["user", "artist"])
        .group_by("user", "tag")
        .agg(weight=pl.col("plays").log1p().sum())
        .sort(["user", "weight", "tag"], descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .agg(tags=pl.col("tag").head(5).str.join(", "))
    )
    text = pl.concat_str(
        pl.lit("i like "),
        "artists",
        pl.lit("."),
        (" i often listen to " + pl.col("tags") + ".").fill_null(""),
    )
    joined = artists.join(heard, on="user", how="left", maintain_order="left")
    return joined.select(user_id=pl.col("user").cast(pl.String), profile=text)


def _plays(plays: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    named = plays.join(names, on="artist", how="left", maintain_order="left")
    return named.select("item_id", user_id=pl.col("user").cast(pl.String), item="name", plays="plays").select(
        "user_id", "item_id", "item", "plays"
    )


def _items(artists: list[int], vectors: np.ndarray, names: pl.DataFrame) -> pl.DataFrame:
    table = pl.DataFrame({"artist": artists}).join(names, on="artist", how="left", maintain_order="left")
    embedding = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
    return table.select("item_id", item="name").with_columns(embedding)
