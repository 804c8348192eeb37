from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from e2p.config_io import load_yaml
from e2p.data.tables import example_batches, open_embeddings
from e2p.errors import ConfigError, DataError, RunError
from e2p.tasks import music
from e2p.tasks.music_files import Listening

TAGS = {1: "rock", 2: "jazz", 3: "caf\xe9"}


def write(folder: Path, plays: list[tuple[int, int, int]], tagged: list[tuple[int, int, int]]) -> Path:
    """The four official files, as the data set's readme describes them; artists 1 to 40."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {i: f"Artist {i}" for i in range(1, 41)} | {1: ' The "One";  Two ', 2: "Bj\xf6rk"}
    artists = ["id\tname\turl\tpictureURL"] + [f"{i}\t{name}\thttp://x\thttp://y" for i, name in names.items()]
    (folder / "artists.dat").write_text("\n".join(artists) + "\n", encoding="utf-8")
    tags = ["tagID\ttagValue"] + [f"{i}\t{tag}" for i, tag in TAGS.items()]
    (folder / "tags.dat").write_bytes("\r\n".join(tags).encode("latin-1"))
    rows = "".join(f"{u}\t{a}\t{w}\n" for u, a, w in plays)
    (folder / "user_artists.dat").write_text("userID\tartistID\tweight\n" + rows)
    events = "".join(f"{u}\t{a}\t{t}\t1\t4\t2009\n" for u, a, t in tagged)
    (folder / "user_taggedartists.dat").write_text("userID\tartistID\ttagID\tday\tmonth\tyear\n" + events)
    return folder


def world(seed: int = 0) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """20 listeners of 16 artists each; four users call artists up to 20 rock and the others jazz."""
    rng = np.random.default_rng(seed)
    plays = [
        (user, int(artist), int(rng.integers(1, 500)))
        for user in range(1, 21)
        for artist in rng.choice(np.arange(1, 41), 16, replace=False)
    ]
    tagged = [(user, artist, 1 if artist <= 20 else 2) for user in (1, 2, 3, 4) for artist in range(1, 41)]
    return plays, tagged


def prepared(tmp_path: Path, name: str = "out", source: Path | None = None, **settings: object) -> Path:
    source = source or write(tmp_path / "source", *world())
    chosen: dict[str, object] = {"dimension": 4, "min_tag_artists": 5, "per_user": 3} | settings
    return music.prepare(str(source), str(tmp_path / name), **chosen)  # type: ignore[arg-type]


def vectors(folder: Path) -> dict[str, list[float]]:
    table = open_embeddings(str(folder / "embeddings.parquet"))
    return dict(zip(table.keys["user_id"].to_list(), table.vectors.tolist(), strict=True))


def test_tables_follow_the_contract_and_agree_with_each_other(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    examples = pl.concat(example_batches(str(folder / "examples.parquet")))
    raw = pl.read_parquet(folder / "examples.parquet")
    assert examples.height == raw.height > 20
    assert examples["example_id"].is_unique().all()
    assert (examples["group"] == examples["user_id"]).all()
    assert set(examples["user_id"]) <= set(vectors(folder))
    assert examples["profile"].null_count() == 0
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    assert data["examples"] == str(folder / "examples.parquet")
    assert data["embeddings"] == str(folder / "embeddings.parquet")
    plays = pl.read_parquet(folder / "heldout_plays.parquet").select("user_id", "item_id", "item")
    held = {(user, item): name for user, item, name in plays.iter_rows()}
    for row in raw.iter_rows(named=True):
        assert row["messages"] == [{"role": "user", "content": f"make a playlist of {row['query']} music"}]
        assert 3 <= len(row["items"]) <= 5
        assert len(set(row["items"])) == len(row["items"])
        # Every artist was really played in the held-out half and carries the tag that was asked for.
        assert row["completion"] == " ; ".join(held[row["user_id"], item] for item in row["items"])
        assert all((int(item) <= 20) == (row["query"] == "rock") for item in row["items"])


@pytest.mark.parametrize("method", ["svd", "als"])
def test_nothing_of_the_heldout_half_reaches_vectors_or_profiles(tmp_path: Path, method: str) -> None:
    plays, tagged = world()
    first = prepared(tmp_path, "first", vectors=method)
    rows = pl.read_parquet(first / "heldout_plays.parquet").select("user_id", "item_id").iter_rows()
    held = {(int(user), int(artist)) for user, artist in rows}
    # Held-out plays of ten listeners vanish, those of the others get other counts.
    altered = [(u, a, w * 7 + 1 if (u, a) in held else w) for u, a, w in plays if (u, a) not in held or u > 10]
    assert len(altered) < len(plays)
    source = write(tmp_path / "altered", altered, tagged)
    second = prepared(tmp_path, "second", source=source, vectors=method)
    for name in ("embeddings", "items", "queries", "profiles", "vector_plays"):
        assert pl.read_parquet(first / f"{name}.parquet").equals(pl.read_parquet(second / f"{name}.parquet")), name
    assert not pl.read_parquet(first / "examples.parquet").equals(pl.read_parquet(second / "examples.parquet"))


def test_a_changed_vector_half_changes_the_vector(tmp_path: Path) -> None:
    """The test above could not fail if vectors ignored all plays."""
    plays, tagged = world()
    first = prepared(tmp_path, "first")
    mine = pl.read_parquet(first / "vector_plays.parquet").filter(pl.col("user_id") == "7")["item_id"].to_list()
    source = write(tmp_path / "altered", [p for p in plays if (p[0], str(p[1])) != (7, mine[0])], tagged)
    assert vectors(first)["7"] != vectors(prepared(tmp_path, "second", source=source))["7"]


@given(st.sets(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=60), st.integers(0, 9))
def test_halves_part_the_plays_and_each_play_alone_decides(pairs: set[tuple[int, int]], seed: int) -> None:
    users, artists = [user for user, _ in pairs], [artist for _, artist in pairs]
    schema = dict.fromkeys(("user", "artist", "plays"), pl.Int64)
    table = pl.DataFrame({"user": users, "artist": artists, "plays": [1] * len(pairs)}, schema=schema)
    first, second = (set(half.select("user", "artist").iter_rows()) for half in music.halves(table, seed))
    assert first | second == pairs
    assert not first & second
    for pair in sorted(pairs)[:5]:
        alone, _ = music.halves(table.filter((pl.col("user") == pair[0]) & (pl.col("artist") == pair[1])), seed)
        assert (alone.height == 1) == (pair in first)


def test_own_tagging_does_not_count_for_oneself() -> None:
    plays = pl.DataFrame({"user": [1, 5], "artist": [9, 9], "plays": [3, 3]})
    tagged = pl.DataFrame({"user": [1, 2], "artist": [9, 9], "tag": ["rock", "rock"]})
    names = pl.DataFrame({"artist": [9], "item_id": ["9"], "name": ["Nine"]})
    data = Listening(plays, names, tagged)
    relations = music.carriers(data, plays, min_users=2, min_artists=1)
    carried = music.tags_for_users(data, relations, min_users=2)
    # Two users call it rock; for user 1 only one other does, for user 5 both.
    assert carried.rows() == [(5, 9, "rock", 2)]


def test_svd_vectors_are_the_best_rank_d_reading_of_the_weighted_table() -> None:
    plays, _ = world()
    table = pl.DataFrame(plays, schema=["user", "artist", "plays"], orient="row")
    users, mine, artists, items = music.factorise(table, 4)
    dense = np.zeros((len(users), len(artists)))
    for user, artist, _ in plays:
        dense[users.index(user), artists.index(artist)] = 1
    dense *= (np.log((1 + len(users)) / (1 + dense.sum(axis=0))) + 1) ** 1.5
    left, scale, right = np.linalg.svd(dense, full_matrices=False)
    best = np.linalg.norm(dense - (left[:, :4] * scale[:4]) @ right[:4])
    assert np.linalg.norm(dense - mine @ items.T) == pytest.approx(best, rel=1e-3)
    np.testing.assert_allclose(np.linalg.norm(mine, axis=0), scale[:4], rtol=1e-2)
    assert mine.dtype == items.dtype == np.float32


def test_queries_are_the_mean_of_what_answers_them(tmp_path: Path) -> None:
    plays, tagged = world()
    # Two more users call artist 10 jazz, one calls artist 11 so: that is too few.
    source = write(tmp_path / "source", plays, [*tagged, (7, 10, 2), (8, 10, 2), (9, 11, 2)])
    folder = prepared(tmp_path, source=source)
    items = pl.read_parquet(folder / "items.parquet")
    queries = pl.read_parquet(folder / "queries.parquet")
    assert queries["query"].to_list() == ["jazz", "rock"]
    assert queries.schema["embedding"] == pl.Array(pl.Float32, 4)
    answered = dict(queries.select("query", "items").iter_rows())
    assert set(answered["rock"]) == {i for i in items["item_id"] if int(i) <= 20}
    assert set(answered["jazz"]) == {i for i in items["item_id"] if int(i) > 20} | {"10"}
    for query, embedding, ids in queries.iter_rows():
        mine = items.filter(pl.col("item_id").is_in(ids))["embedding"].to_numpy()
        np.testing.assert_allclose(embedding, mine.mean(axis=0), rtol=1e-5, atol=1e-6, err_msg=query)


def test_settings_to_imitate_judge_no_playlists(tmp_path: Path) -> None:
    config = load_yaml(prepared(tmp_path) / "config.yaml")
    assert config.objective.name == "lm"
    assert config.output == "runs/music"
    assert config.evaluation.playlists.items == ""


def test_playlists_favour_what_is_played_most() -> None:
    artists = list(range(1, 13))
    plays = pl.DataFrame({"user": [u for u in range(300) for _ in artists], "artist": artists * 300,
                          "plays": ([1000] * 3 + [1] * 9) * 300})  # fmt: skip
    tags = plays.select("user", "artist", tag=pl.lit("rock"), support=pl.lit(5))
    names = pl.DataFrame({"artist": artists, "item_id": map(str, artists), "name": [f"A{a}" for a in artists]})
    drawn = music.playlists(plays, tags, names, length=3, per_user=2, seed=1)
    counts = drawn["items"].explode().value_counts()
    often = counts.filter(pl.col("items").is_in(["1", "2", "3"]))["count"].sum()
    assert drawn.height == 300
    assert often > 0.97 * 900
    # A listener's playlists do not depend on who else is in the table.
    alone = music.playlists(plays.filter(pl.col("user") == 7), tags, names, length=3, per_user=2, seed=1)
    assert alone.rows() == drawn.filter(pl.col("user_id") == "7").rows()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "user_artists.dat",
            "userID\tartistID\tweight\n1\t2\t3\n1\tx\t3\n",
            r"user_artists\.dat:3: expected .*got '1",
        ),
        ("user_artists.dat", "userID\tartistID\tweight\n1\t2\n", r"user_artists\.dat:2: "),
        ("artists.dat", "id;name\n", r"artists\.dat:1: expected header"),
        ("user_taggedartists.dat", None, "got no user_taggedartists.dat"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    source = write(tmp_path / "source", *world())
    (source / name).unlink()
    if text is not None:
        (source / name).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        music.prepare(str(source), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_settings_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="playlist_length: expected a whole number >= 3, got 2"):
        prepared(tmp_path, playlist_length=2)
    with pytest.raises(DataError, match="expected more than 30 users"):
        prepared(tmp_path, dimension=30)
    with pytest.raises(DataError, match="lower min_tag_users"):
        prepared(tmp_path, min_tag_users=9)


def test_an_earlier_output_is_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path, seed=1)
    before = (folder / "examples.parquet").read_bytes()
    with pytest.raises(RunError, match="--overwrite"):
        prepared(tmp_path, seed=2)
    assert (folder / "examples.parquet").read_bytes() == before
    prepared(tmp_path, seed=2, overwrite=True)
    assert (folder / "examples.parquet").read_bytes() != before
    assert "dropped: 0 of 20 listeners" in capsys.readouterr().out


@pytest.mark.real_data
def test_real_listeners_are_predictable_from_their_vectors(tmp_path: Path, shared: Path) -> None:
    folder = music.prepare(str(shared / "data" / "lastfm_2k"), str(tmp_path / "out"))
    examples = pl.read_parquet(folder / "examples.parquet")
    assert examples.height > 8000
    assert examples["user_id"].n_unique() > 1800
    # Without any language model: the nearest vectors' held-out artists against the most popular ones.
    table = open_embeddings(str(folder / "embeddings.parquet"))
    row = {user: i for i, user in enumerate(table.keys["user_id"])}
    held = pl.read_parquet(folder / "heldout_plays.parquet").filter(pl.col("user_id").is_in(list(row)))
    items = {item: i for i, item in enumerate(held["item_id"].unique(maintain_order=True))}
    plays = np.zeros((len(row), len(items)), dtype=np.float32)
    plays[[row[u] for u in held["user_id"]], [items[i] for i in held["item_id"]]] = 1
    unit = table.vectors / np.linalg.norm(table.vectors, axis=1, keepdims=True)
    asked, others = np.arange(0, len(row), 10), np.setdiff1d(np.arange(len(row)), np.arange(0, len(row), 10))
    similarity = unit[asked] @ unit[others].T
    weight = np.where(similarity >= np.sort(similarity, axis=1)[:, [-50]], similarity, 0)

    def recall(scores: np.ndarray) -> float:
        best = np.argsort(-scores, axis=1)[:, :50]
        hits = np.take_along_axis(plays[asked], best, axis=1).sum(axis=1)
        return float(np.mean(hits / np.maximum(plays[asked].sum(axis=1), 1)))

    popular = np.broadcast_to(plays[others].sum(axis=0), (len(asked), len(items)))
    assert recall(weight @ plays[others]) > 1.4 * recall(popular)
