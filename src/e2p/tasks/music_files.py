"""Official files of the music task as tables: Last.fm (HetRec 2011) and the Spotify Million Playlist Dataset."""

from __future__ import annotations

import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from e2p.errors import ConfigError, DataError

FILES = {
    "artists.dat": ("id", "name"),
    "tags.dat": ("tagID", "tagValue"),
    "user_artists.dat": ("userID", "artistID", "weight"),
    "user_taggedartists.dat": ("userID", "artistID", "tagID"),
}
SLICE = re.compile(r"mpd\.slice\.(\d+)-\d+\.json")
PLAYS = {"user": pl.Int64, "artist": pl.Int64, "plays": pl.Int64}
NAMES = {"artist": pl.Int64, "item_id": pl.String, "name": pl.String}


@dataclass(frozen=True)
class Listening:
    """What the official files say. An item is an artist of Last.fm or a track of a Spotify playlist.

    Attributes:
        plays: user (int), artist (int), plays (int), one row a pair; every artist has a name.
        names: artist (int), item_id (str, as in the files), name (str, cleaned, not empty), one row an artist.
        tagged: user, artist (int), tag (str, cleaned), one row a triple. Empty where there are titles.
        titles: user (int), tag (str): the title of each playlist, where a playlist stands for its listener.
        kind: name of the data set.
        left_out: how many rows were not taken, by reason.
    """

    plays: pl.DataFrame
    names: pl.DataFrame
    tagged: pl.DataFrame
    titles: pl.DataFrame | None = None
    kind: str = "lastfm"
    left_out: Counter[str] = field(default_factory=Counter)


def read(source: str | Path, most_playlists: int = 0) -> Listening:
    """Read what lies in a folder: the four files of Last.fm, or the slices of the Million Playlist Dataset.

    Args:
        source: the folder; slices may lie in its folder ``data`` too.
        most_playlists: read so many Spotify playlists at most; 0: all.

    Raises:
        ConfigError: ``most_playlists`` is set for Last.fm.
        DataError: neither is there, or a file is not as documented; the message has file and line or playlist.
    """
    slices = find_slices(source)
    if slices:
        return read_playlists(slices, most_playlists)
    if most_playlists:
        raise ConfigError(f"most_playlists: expected 0 where {source} holds no mpd.slice.*.json, got {most_playlists}")
    return read_lastfm(source)


def read_lastfm(source: str | Path) -> Listening:
    """Read the four files. Raises DataError with file and line for what is not as their readme says."""
    folder = Path(source)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{source}: expected the unpacked folder of hetrec2011-lastfm-2k or slices mpd.slice.*.json, "
            f"got no {missing[0]}; download the former from grouplens.org/datasets/hetrec-2011"
        )
    named = _table(folder / "artists.dat", ("artist", "name"), 1, "utf-8").with_columns(_cleaned("name"))
    tags = _table(folder / "tags.dat", ("tag_id", "tag"), 1, "latin-1").with_columns(_cleaned("tag"))
    played = _table(folder / "user_artists.dat", ("user", "artist", "plays"), 3, "utf-8")
    events = _table(folder / "user_taggedartists.dat", ("user", "artist", "tag_id"), 3, "utf-8")
    for table, key, name in ((named, "artist", "artists.dat"), (tags, "tag_id", "tags.dat")):
        twice = table.filter(~pl.col(key).is_first_distinct())
        if twice.height:
            raise DataError(f"{folder / name}: expected each id once, got {twice[key][0]} twice; remove one")
    # Names and tags of which cleaning leaves nothing cannot be asked for.
    names, tags = named.filter(pl.col("name") != ""), tags.filter(pl.col("tag") != "")
    heard = played.filter(pl.col("plays") > 0)
    plays = heard.join(names, on="artist", how="semi")
    said = events.join(tags, on="tag_id")
    left_out = Counter(
        {
            "plays of artists without a name": heard.height - plays.height,
            "plays counted 0 or fewer times": played.height - heard.height,
            "taggings with a tag without a name": events.height - said.height,
        }
    )
    return Listening(
        plays=plays.group_by("user", "artist", maintain_order=True).agg(pl.col("plays").sum()),
        names=names.select("artist", pl.col("artist").cast(pl.String).alias("item_id"), "name"),
        tagged=said.select("user", "artist", "tag").unique(maintain_order=True),
        left_out=left_out,
    )


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
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not lines[0].rstrip("\r").startswith(expected):
        raise DataError(f"{path}:1: expected header {expected!r}, got {lines[0][:60]!r}; take the official file")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        try:
            row = [int(field) for field in fields[:numbers]] + fields[numbers : len(names)]
            if len(row) < len(names) or int(row[0]) < 0 or max(abs(int(n)) for n in row[:numbers]) >= 2**63:
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


def find_slices(source: str | Path) -> list[Path]:
    """The files ``mpd.slice.<first>-<last>.json`` of a folder or of its folder ``data``, by their first playlist."""
    for folder in (Path(source), Path(source) / "data"):
        found = [(int(m[1]), path) for path in folder.glob("mpd.slice.*.json") if (m := SLICE.fullmatch(path.name))]
        if found:
            return [path for _, path in sorted(found)]
    return []


def read_playlists(slices: list[Path], most: int = 0) -> Listening:
    """Spotify's playlists as listening: pid is the listener, a track the item, the normalised title the tag.

    One slice is held as JSON at a time; of all of them three numbers a track of a playlist remain, and each track's
    URI and name once.

    A track's number is a hash of its URI, so that no other playlist changes it. (That two of the 2.3 million tracks
    share one has a probability of 3e-7.) Tracks of one playlist with the same name, as a song and its new issue, are
    one.

    Args:
        slices: the files, in the order of reading.
        most: read so many playlists at most; 0: all.

    Raises:
        DataError: no JSON, a key that is missing or of another type, a pid that comes twice; with file and playlist.
    """
    left_out: Counter[str] = Counter()
    plays: list[pl.DataFrame] = []
    titles: dict[int, str] = {}
    names = pl.DataFrame(schema=NAMES)
    seen: set[int] = set()
    for path in slices:
        users, artists, uris, tracks = [], [], [], []
        for pid, title, listed in _playlists(path):
            if most and len(seen) >= most:
                break
            if pid in seen:
                raise DataError(f"{path}: playlist {pid}: expected each pid once, got it twice; remove a file or copy")
            seen.add(pid)
            named = [(uri, name) for uri, name in listed if name]
            left_out["tracks without a name"] += len(listed) - len(named)
            left_out["playlists without tracks"] += not named
            left_out["playlists without letters or digits in their title"] += bool(named) and not title
            if not named or not title:
                continue
            titles[pid] = title
            users += [pid] * len(named)
            artists += [track_number(uri) for uri, _ in named]
            uris += [uri for uri, _ in named]
            tracks += [name for _, name in named]
        columns = [*NAMES, "user"]
        part = pl.DataFrame(
            dict(zip(columns, (artists, uris, tracks, users), strict=True)), schema=NAMES | {"user": pl.Int64}
        )
        one = part.group_by("user", "name", maintain_order=True).agg(pl.col("artist").first(), plays=pl.len())
        plays.append(one.select(pl.col(name).cast(kind) for name, kind in PLAYS.items()))
        fresh = part.select(*NAMES).unique("artist", keep="first", maintain_order=True)
        names = pl.concat([names, fresh.join(names, on="artist", how="anti", maintain_order="left")])
        if most and len(seen) >= most:
            break
    heard = pl.concat(plays).group_by("user", "artist", maintain_order=True).agg(pl.col("plays").sum())
    if heard.is_empty():
        raise DataError(f"{slices[0]}: expected playlists with a title and tracks, got none; take the official files")
    return Listening(
        plays=heard,
        names=names,
        tagged=pl.DataFrame(schema={"user": pl.Int64, "artist": pl.Int64, "tag": pl.String}),
        titles=pl.DataFrame({"user": list(titles), "tag": list(titles.values())}),
        kind="mpd",
        left_out=left_out,
    )


def _playlists(path: Path) -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """pid, normalised title, and (URI, cleaned name) of each track, of one slice."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path}: expected JSON, got {' '.join(str(error).split())}; take the official file") from None
    for number, playlist in enumerate(_value(document, "playlists", list, str(path))):
        pid = _value(playlist, "pid", int, f"{path}: playlist at place {number}")
        if not 0 <= pid < 2**63:
            raise DataError(f"{path}: playlist {pid}: expected a pid >= 0 below 2**63; take the official file")
        where = f"{path}: playlist {pid}"
        title = query_text(_value(playlist, "name", str, where))
        tracks = []
        for place, track in enumerate(_value(playlist, "tracks", list, where)):
            uri = _value(track, "track_uri", str, f"{where}: track {place}")
            song, artist = (
                clean(_value(track, key, (str, type(None)), f"{where}: track {place}") or "")
                for key in ("track_name", "artist_name")
            )
            if not uri:
                raise DataError(f"{where}: track {place}: expected a track_uri, got ''; take the official file")
            tracks.append((uri, f"{song} by {artist}" if song and artist else ""))
        yield pid, title, tracks


def _value(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {key!r}, got {record!r:.60}; take the official file")
    if key not in record:
        raise DataError(f"{where}: expected key {key!r}, got {', '.join(record)[:60]!r}; take the official file")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {key}: expected {wanted}, got {value!r:.60}; take the official file")
    return value


def query_text(title: str) -> str:
    """A title as a query: lower case, letters and digits alone, single spaces; empty if nothing is left."""
    text = unicodedata.normalize("NFKC", html.unescape(title)).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def track_number(uri: str) -> int:
    """A number >= 0 below 2**63 for a track, from its URI alone."""
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "big") >> 1
