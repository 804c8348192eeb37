"""Playlists by request on Last.fm (HetRec 2011): the public stand-in for the paper's playlist task.

The paper (Appendix F, "Music Playlist Generation") has 300,000 requests of a streaming service with
behavioural vectors of 120 numbers; those are not public. Here a listener's artists are halved: one half alone
makes the vector, the other half alone makes the playlists that the language model learns to write.

What decides about leakage:

- Which half a play belongs to follows from seed, user and artist only, never from the other plays. Removing
  or changing a held-out play therefore leaves every vector bit for bit the same.
- Item factors are fitted on the vector halves of *all* users, test users included, without any playlist: what
  a recommender does that serves the people it was fitted on. phi never sees a test user's playlists.
- An artist carries a tag *for this user* only if enough other users say so: nobody's own tagging shows what
  they hear. Profiles use the vector half only.
"""

from __future__ import annotations

import hashlib
import html
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from e2p.config import DataConfig, RunConfig, save_yaml
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError, DataError, MissingExtraError
from e2p.tasks.output import staged_folder
from e2p.users.behaviour import als

FILES = {
    "artists.dat": ("id", "name"),
    "tags.dat": ("tagID", "tagValue"),
    "user_artists.dat": ("userID", "artistID", "weight"),
    "user_taggedartists.dat": ("userID", "artistID", "tagID"),
}
SEPARATOR = " ; "  # between the artists of a playlist
SHORTEST = 3  # artists; a shorter list is no playlist


@dataclass(frozen=True)
class LastFM:
    """The official files as tables.

    Attributes:
        plays: user (int), artist (int), plays (int), one row a pair.
        names: artist (int), name (str, cleaned).
        tagged: user, artist (int), tag (str, cleaned), one row a triple.
    """

    plays: pl.DataFrame
    names: pl.DataFrame
    tagged: pl.DataFrame


def prepare(
    source: str,
    output: str,
    objective: Literal["lm"] = "lm",
    dimension: int = 64,
    vectors: Literal["svd", "als"] = "svd",
    playlist_length: int = 5,
    per_user: int = 18,
    min_tag_users: int = 2,
    min_tag_artists: int = 20,
    seed: int = 42,
    overwrite: bool = False,
) -> Path:
    """Make playlist examples and behavioural vectors from HetRec Last.fm 2k.

    Writes examples, embeddings, profiles, items (their factors: the dot product with a user's vector is the
    affinity), the plays of both halves, and a config to train with.

    Args:
        source: folder with artists.dat, tags.dat, user_artists.dat and user_taggedartists.dat.
        output: folder for the tables.
        objective: what the examples are for; ``lm``: playlists to imitate.
        dimension: numbers in a vector.
        vectors: ``svd``: truncated SVD of the user-artist table; ``als``: implicit-feedback ALS.
        playlist_length: artists in a playlist; fewer (at least 3) where the listener has no more of a tag.
        per_user: most playlists of one listener, each for another tag. With 18 rather than 6 the same number of
            steps gained 0.03 nats a token more over no prefix on the validation listeners.
        min_tag_users: other listeners who must have given an artist a tag before it counts.
        min_tag_artists: artists that must carry a tag before it is asked for.
        seed: seed of the halves, the playlists and the factors.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a number is out of range.
        DataError: a file is missing or a line is not as documented; the message has file and line.
        RunError: the output exists.
        MissingExtraError: scikit-learn or implicit is not installed.
    """
    for name, value, least in (
        ("dimension", dimension, 1),
        ("playlist_length", playlist_length, SHORTEST),
        ("per_user", per_user, 1),
        ("min_tag_users", min_tag_users, 1),
        ("min_tag_artists", min_tag_artists, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value}; raise it")
    with staged_folder(output, overwrite) as folder:
        data = read(source)
        vector_half, heldout_half = halves(data.plays, seed)
        users, user_vectors, artists, item_vectors = factorise(vector_half, dimension, vectors, seed)
        tags = tags_for_users(data, min_tag_users, min_tag_artists)
        known = heldout_half.filter(pl.col("user").is_in(users))
        examples = playlists(known, tags, data.names, playlist_length, per_user, seed)
        if examples.is_empty():
            raise DataError(
                f"{source}: expected listeners with {SHORTEST} held-out artists of one tag, got none; "
                "lower min_tag_users or min_tag_artists"
            )
        texts = profiles(vector_half, tags, data.names)
        examples = examples.join(texts, on="user_id", how="left", maintain_order="left")
        version = f"lastfm-{vectors}-{dimension}-seed{seed}"
        write_frame(folder / "examples.parquet", examples)
        write_frame(folder / "profiles.parquet", texts)
        write_embeddings(folder / "embeddings.parquet", [str(u) for u in users], user_vectors, version=version)
        write_frame(folder / "items.parquet", _items(artists, item_vectors, data.names))
        write_frame(folder / "vector_plays.parquet", _plays(vector_half, data.names))
        write_frame(folder / "heldout_plays.parquet", _plays(heldout_half, data.names))
        save_yaml(recommended(output), folder / "config.yaml")
    kept, everyone = examples["user_id"].n_unique(), data.plays["user"].n_unique()
    print(f"{output}: {examples.height:,} playlists of {kept:,} listeners, vectors of {dimension} numbers")
    print(f"dropped: {everyone - kept} of {everyone:,} listeners (no tag with {SHORTEST} held-out artists)")
    return Path(output)


def recommended(output: str | Path) -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet"),
        profile_template="persona: {profile}",
    )
    return RunConfig(data=data, output="runs/music")


def read(source: str | Path) -> LastFM:
    """Read the four files. Raises DataError with file and line for what is not as their readme says."""
    folder = Path(source)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{source}: expected the unpacked folder of hetrec2011-lastfm-2k, got no {missing[0]}; "
            "download it from grouplens.org/datasets/hetrec-2011"
        )
    # Names and tags of which cleaning leaves nothing cannot be asked for.
    names = _table(folder / "artists.dat", ("artist", "name"), 1, "utf-8").with_columns(_cleaned("name"))
    tags = _table(folder / "tags.dat", ("tag_id", "tag"), 1, "latin-1").with_columns(_cleaned("tag"))
    plays = _table(folder / "user_artists.dat", ("user", "artist", "plays"), 3, "utf-8")
    events = _table(folder / "user_taggedartists.dat", ("user", "artist", "tag_id"), 3, "utf-8")
    names, tags = names.filter(pl.col("name") != ""), tags.filter(pl.col("tag") != "")
    plays = plays.filter(pl.col("plays") > 0).join(names, on="artist", how="semi")
    tagged = events.join(tags, on="tag_id").select("user", "artist", "tag").unique(maintain_order=True)
    return LastFM(plays.group_by("user", "artist", maintain_order=True).agg(pl.col("plays").sum()), names, tagged)


def _table(path: Path, names: tuple[str, ...], numbers: int, encoding: str) -> pl.DataFrame:
    """Leading columns of a tab-separated file, the first ``numbers`` of them whole numbers.

    Read line by line: names hold lone quotation marks, and an error must have its line.
    """
    expected = "\t".join(FILES[path.name])
    columns: list[list[Any]] = [[] for _ in names]
    try:
        lines = path.read_bytes().decode(encoding).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected {encoding} text, got byte {error.start}; take the official file") from None
    if not lines[0].rstrip("\r").startswith(expected):
        raise DataError(f"{path}:1: expected header {expected!r}, got {lines[0][:60]!r}; take the official file")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        try:
            row = [int(field) for field in fields[:numbers]] + fields[numbers : len(names)]
            if len(row) < len(names):
                raise ValueError
        except ValueError:
            raise DataError(f"{path}:{number}: expected {expected!r}, got {line[:60]!r}; mend the line") from None
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    types = [pl.Int64 if i < numbers else pl.String for i in range(len(names))]
    return pl.DataFrame(dict(zip(names, columns, strict=True)), schema=dict(zip(names, types, strict=True)))


def clean(name: str) -> str:
    """Plain text that can stand in a playlist: no separator, no control characters, single spaces."""
    text = unicodedata.normalize("NFC", html.unescape(name)).replace(";", ",")
    return " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in text).split()).strip(" ,")


def _cleaned(column: str) -> pl.Expr:
    return pl.col(column).map_elements(clean, return_dtype=pl.String)


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
            f"user_artists.dat: expected more than {dimension} users and artists for that dimension, "
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


def tags_for_users(data: LastFM, min_users: int, min_artists: int) -> pl.DataFrame:
    """user, artist, tag, support: the tags that a played artist carries by the word of *other* users."""
    relations = data.tagged.group_by("artist", "tag").len("support").filter(pl.col("support") >= min_users)
    relations = relations.filter(pl.len().over("tag") >= min_artists)
    own = data.tagged.select("user", "artist", "tag", own=pl.lit(1, pl.Int64))
    return (
        data.plays.select("user", "artist")
        .join(relations, on="artist")
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
    name = dict(names.iter_rows())
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
                    "messages": [{"role": "user", "content": f"make a playlist of {tag} music"}],
                    "completion": SEPARATOR.join(name[artist] for artist in drawn),
                    "group": str(user),
                    "tag": tag,
                    "items": [str(artist) for artist in drawn],
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
    return named.select(
        user_id=pl.col("user").cast(pl.String),
        item_id=pl.col("artist").cast(pl.String),
        item="name",
        plays="plays",
    )


def _items(artists: list[int], vectors: np.ndarray, names: pl.DataFrame) -> pl.DataFrame:
    table = pl.DataFrame({"artist": artists}).join(names, on="artist", how="left", maintain_order="left")
    embedding = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
    return table.select(item_id=pl.col("artist").cast(pl.String), item="name").with_columns(embedding)
