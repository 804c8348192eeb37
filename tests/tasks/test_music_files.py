from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p.config_io import load_yaml
from e2p.errors import ConfigError, DataError
from e2p.tasks import music
from e2p.tasks.music_files import clean, find_slices, query_text, read, track_number

ARTISTS = "id\tname\turl\tpictureURL\n"
TAGS = "tagID\ttagValue\n"
PLAYS = "userID\tartistID\tweight\n"
EVENTS = "userID\tartistID\ttagID\tday\tmonth\tyear\n"


def lastfm(folder: Path, artists: str, tags: str = "", plays: str = "", events: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artists.dat").write_text(ARTISTS + artists, encoding="utf-8")
    (folder / "tags.dat").write_bytes((TAGS + tags).encode("latin-1"))
    (folder / "user_artists.dat").write_text(PLAYS + plays)
    (folder / "user_taggedartists.dat").write_text(EVENTS + events)
    return folder


def track(uri: str, name: str | None = None, artist: str | None = "Someone") -> dict[str, Any]:
    return {
        "pos": 0,
        "artist_name": artist,
        "track_uri": uri,
        "artist_uri": "spotify:artist:x",
        "track_name": f"Song {uri}" if name is None else name,
        "album_uri": "spotify:album:x",
        "duration_ms": 1000,
        "album_name": "An album",
    }


def playlist(pid: int, name: str, tracks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "pid": pid, "num_followers": 1, "modified_at": 0, "tracks": tracks}


def slice_file(folder: Path, first: int, playlists: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mpd.slice.{first}-{first + 999}.json"
    path.write_text(json.dumps({"info": {"slice": "x"}, "playlists": playlists}), encoding="utf-8")
    return path


def spotify(folder: Path, drop: set[tuple[int, int]] | None = None) -> Path:
    """120 playlists in two slices: two titles, each spelled in two ways, of 60 tracks each; 14 tracks a playlist."""
    made = []
    for pid in range(120):
        rng = random.Random(pid)
        first = 60 * (pid % 2)
        tracks = [n for n in rng.sample(range(first, first + 60), 14) if (pid, n) not in (drop or set())]
        title = ("WorkOut!", "workout")[pid // 2 % 2] if pid % 2 else ("CHILL", " chill :) ")[pid // 2 % 2]
        made.append(playlist(pid, title, [track(f"spotify:track:{n}") for n in tracks]))
    slice_file(folder, 0, made[:60])
    slice_file(folder, 1000, made[60:])
    return folder


def test_lastfm_names_are_cleaned_and_encodings_respected(tmp_path: Path) -> None:
    artists = '1\t The "One";  Two \tu\tp\n2\tBj\xf6rk\tu\tp\n'
    source = lastfm(tmp_path, artists, "3\tcaf\xe9", "1\t1\t5\n1\t2\t6\n2\t2\t0\n", "1\t1\t3\t1\t4\t2009\n")
    data = read(source)
    assert data.names.rows() == [(1, "1", 'The "One", Two'), (2, "2", "Bj\xf6rk")]
    assert data.tagged.rows() == [(1, 1, "caf\xe9")]
    assert data.plays.rows() == [(1, 1, 5), (1, 2, 6)]  # never played is not an interaction
    assert data.left_out["plays counted 0 or fewer times"] == 1


def test_artists_without_a_name_appear_nowhere_and_are_counted(tmp_path: Path) -> None:
    artists = "1\tOne\tu\tp\n2\t;;\tu\tp\n"
    data = read(lastfm(tmp_path, artists, "3\trock\n4\t ;\n", "1\t1\t5\n1\t2\t6\n1\t9\t7\n", "1\t1\t4\t1\t4\t2009\n"))
    assert data.names["artist"].to_list() == [1]
    assert data.plays.rows() == [(1, 1, 5)]
    assert data.left_out["plays of artists without a name"] == 2  # one of an empty name, one of no name at all
    assert data.left_out["taggings with a tag without a name"] == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"artists": "1\tOne\n1\tTwo\n"}, r"artists\.dat: expected each id once, got 1 twice"),
        ({"artists": "1\tOne\n", "tags": "1\ta\n1\tb\n"}, r"tags\.dat: expected each id once, got 1 twice"),
        ({"artists": "1\tOne\n", "plays": "-3\t1\t5\n"}, r"user_artists\.dat:2: .*got '-3"),
        ({"artists": "1\tOne\n", "plays": f"3\t1\t{10**30}\n"}, r"user_artists\.dat:2: "),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(lastfm(tmp_path, **files))


@given(st.text())
def test_clean_names_can_stand_in_a_playlist(name: str) -> None:
    cleaned = clean(name)
    assert ";" not in cleaned
    assert cleaned == clean(cleaned) or "&" in name
    assert cleaned == " ".join(cleaned.split())


@given(st.text())
def test_query_texts_are_letters_and_digits(title: str) -> None:
    query = query_text(title)
    assert all(c.isalnum() or c == " " for c in query)
    assert query == " ".join(query.split())
    assert query_text(f"  {title}!! ") == query or "&" in title


def test_titles_that_differ_in_dress_are_one_query() -> None:
    assert query_text("  Rock & ROLL!! ") == query_text("rock   roll") == "rock roll"
    assert query_text("\U0001f525\U0001f525") == ""


def test_playlists_are_read_as_listening(tmp_path: Path) -> None:
    """By hand: 4 of 6 playlists stay, with 2, 1, 1 and 2 tracks."""
    a, b, c = track("u:a", "A"), track("u:b", "B; side"), track("u:c", "A")  # c is a's new issue: the same name
    slice_file(tmp_path / "data", 1000, [playlist(1000, "Chill", [b])])
    slice_file(
        tmp_path / "data",
        0,
        [
            playlist(0, "Chill!", [a, b]),
            playlist(1, "chill", [a, a, c]),
            playlist(2, "!!!", [a]),
            playlist(3, "rock", []),
            playlist(4, "rock", [track("u:d", ""), b, track("u:e", "E", None), c]),
        ],
    )
    data = read(tmp_path)
    ids = {artist: item for artist, item, _ in data.names.iter_rows()}
    assert [(user, ids[artist], plays) for user, artist, plays in data.plays.iter_rows()] == [
        (0, "u:a", 1),
        (0, "u:b", 1),
        (1, "u:a", 3),
        (4, "u:b", 1),
        (4, "u:c", 1),
        (1000, "u:b", 1),
    ]
    assert sorted(data.names.select("item_id", "name").rows()) == [
        ("u:a", "A by Someone"),
        ("u:b", "B, side by Someone"),
        ("u:c", "A by Someone"),
    ]
    assert data.titles is not None
    assert data.titles.rows() == [(0, "chill"), (1, "chill"), (4, "rock"), (1000, "chill")]
    assert data.left_out == {
        "tracks without a name": 2,
        "playlists without tracks": 1,
        "playlists without letters or digits in their title": 1,
    }
    assert data.kind == "mpd"


def test_slices_come_in_the_order_of_their_playlists_and_may_be_cut_short(tmp_path: Path) -> None:
    for first in (10000, 2000, 0):
        slice_file(tmp_path, first, [playlist(first + n, "chill", [track("u:a")]) for n in range(2)])
    (tmp_path / "mpd.slice.notes.json").write_text("no slice")
    assert [path.name for path in find_slices(tmp_path)] == [
        "mpd.slice.0-999.json",
        "mpd.slice.2000-2999.json",
        "mpd.slice.10000-10999.json",
    ]
    assert read(tmp_path).plays["user"].to_list() == [0, 1, 2000, 2001, 10000, 10001]
    assert read(tmp_path, most_playlists=3).plays["user"].to_list() == [0, 1, 2000]


def test_a_tracks_number_follows_from_its_uri_alone(tmp_path: Path) -> None:
    slice_file(tmp_path / "one", 0, [playlist(0, "x", [track("u:a"), track("u:b")])])
    slice_file(tmp_path / "two", 0, [playlist(0, "x", [track("u:b")])])
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert set(two.plays["artist"]) == {track_number("u:b")} < set(one.plays["artist"])
    assert 0 <= track_number("u:b") < 2**63


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"mpd\.slice\.0-999\.json: expected JSON"),
        ("[" * 100_000, r"mpd\.slice\.0-999\.json: expected JSON"),
        ([], r"expected an object with 'playlists', got \[\]"),
        ({"info": {}}, "expected key 'playlists', got 'info'"),
        ({"playlists": [{"name": "x", "tracks": []}]}, "playlist at place 0: expected key 'pid'"),
        ({"playlists": [playlist(1, "x", [track("u")]), {"name": "y", "pid": 7}]}, "playlist 7: expected key 'tracks'"),
        ({"playlists": [{"pid": 7, "name": None, "tracks": []}]}, "playlist 7: name: expected str, got None"),
        ({"playlists": [{"pid": True, "name": "x", "tracks": []}]}, "playlist at place 0: pid: expected int"),
        ({"playlists": [playlist(-1, "x", [])]}, "playlist -1: expected a pid >= 0"),
        ({"playlists": [playlist(7, "x", [track("u"), track("")])]}, "playlist 7: track 1: expected a track_uri"),
        ({"playlists": [playlist(7, "x", [{"track_uri": "u"}])]}, "playlist 7: track 0: expected key 'track_name'"),
        ({"playlists": [playlist(7, "x", [track("u")])] * 2}, "playlist 7: expected each pid once"),
        ({"playlists": [playlist(7, "x", [])]}, "expected playlists with a title and tracks, got none"),
    ],
)
def test_bad_slices_are_named_with_their_playlist(tmp_path: Path, content: Any, said: str) -> None:
    path = slice_file(tmp_path / "in", 0, [])
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=said) as caught:
        music.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_limit_of_playlists_is_for_playlists(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="most_playlists: expected 0"):
        read(lastfm(tmp_path, "1\tOne\n"), most_playlists=5)


def test_spotify_becomes_tables_for_both_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(spotify(tmp_path / "in"))
    lm = pl.read_parquet(music.prepare(source, str(tmp_path / "lm"), dimension=4) / "examples.parquet")
    assert set(lm["query"]) == {"chill", "workout"}
    assert 110 < lm.height == lm["user_id"].n_unique()  # a playlist is asked for by its title alone
    for pid, items, completion in lm.select("user_id", "items", "completion").iter_rows():
        assert all((int(item.removeprefix("spotify:track:")) >= 60) == (int(pid) % 2 == 1) for item in items)
        assert completion == " ; ".join(f"Song {item} by Someone" for item in items)
    folder = music.prepare(source, str(tmp_path / "kto"), "kto", dimension=4, min_query_listeners=2)
    kto = pl.read_parquet(folder / "examples.parquet")
    assert set(kto["split"]) == {"train", "validation", "test"}
    assert kto["label"].sum() * 2 == kto.height > 150
    queries = pl.read_parquet(folder / "queries.parquet")
    assert queries["query"].to_list() == ["chill", "workout"]
    assert load_yaml(folder / "config.yaml").evaluation.playlists.queries == str(folder / "queries.parquet")
    assert pl.read_parquet(folder / "embeddings.parquet")["version"][0] == "mpd-svd-4-seed42"
    assert "labels, half of them true: train" in capsys.readouterr().out


def test_heldout_tracks_reach_no_vector_query_or_profile(tmp_path: Path) -> None:
    first = music.prepare(str(spotify(tmp_path / "in")), str(tmp_path / "first"), dimension=4)
    held = pl.read_parquet(first / "heldout_plays.parquet").select("user_id", "item_id")
    drop = {(int(user), int(item.removeprefix("spotify:track:"))) for user, item in held.iter_rows() if int(user) < 30}
    second = music.prepare(str(spotify(tmp_path / "altered", drop)), str(tmp_path / "second"), dimension=4)
    for name in ("embeddings", "items", "queries", "profiles", "vector_plays"):
        assert pl.read_parquet(first / f"{name}.parquet").equals(pl.read_parquet(second / f"{name}.parquet")), name
    ids = pl.read_parquet(second / "examples.parquet")["user_id"]
    before = pl.read_parquet(first / "examples.parquet")["user_id"]
    assert ids.to_list() == [user for user in before if int(user) >= 30]
