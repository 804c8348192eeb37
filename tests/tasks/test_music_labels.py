from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_music import write

from e2p.config import SplitConfig
from e2p.config_io import load_yaml
from e2p.data.splits import resolve_splits
from e2p.data.tables import example_batches, example_keys, open_embeddings
from e2p.errors import ConfigError, DataError
from e2p.tasks import music, music_labels
from e2p.tasks.music_labels import WORDINGS, labelled, strangers, wording

Plays = list[tuple[int, int, int]]


def world(listeners: int = 160) -> tuple[Plays, Plays]:
    """Listeners of 12 of 40 artists; users 1 to 4 call the lower half rock and the upper half jazz."""
    rng = np.random.default_rng(3)
    plays = [
        (user, int(artist), int(rng.integers(1, 500)))
        for user in range(1, listeners + 1)
        for artist in rng.choice(np.arange(1, 41), 12, replace=False)
    ]
    return plays, [(user, artist, 1 if artist <= 20 else 2) for user in (1, 2, 3, 4) for artist in range(1, 41)]


def prepared(tmp_path: Path, name: str = "out", plays: Plays | None = None, **chosen: object) -> Path:
    own, tagged = world()
    source = write(tmp_path / f"source-{name}", own if plays is None else plays, tagged)
    given: dict[str, object] = {"objective": "kto", "dimension": 4, "min_tag_artists": 5, "min_query_listeners": 2}
    return music.prepare(str(source), str(tmp_path / name), **given | chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("labels"))


def table(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "examples.parquet")


def heard(folder: Path) -> dict[str, set[str]]:
    """Names that each listener played in either half."""
    found: dict[str, set[str]] = defaultdict(set)
    for half in ("vector_plays", "heldout_plays"):
        for user, item in pl.read_parquet(folder / f"{half}.parquet").select("user_id", "item").iter_rows():
            found[user].add(item)
    return found


def check(examples: pl.DataFrame, played: dict[str, set[str]]) -> None:
    """Everything that the table promises."""
    assert examples["example_id"].is_unique().all()
    pairs = examples.group_by("user_id", "query").agg("label", "messages", "completion", "split", "example_id")
    for row in pairs.iter_rows(named=True):
        assert sorted(row["label"]) == [False, True]
        assert row["messages"][0] == row["messages"][1]
        assert row["completion"][0] != row["completion"][1]
        assert row["split"][0] == row["split"][1]
        endings = [(i.rsplit("-", 1)[1], label) for i, label in zip(row["example_id"], row["label"], strict=True)]
        assert sorted(endings) == [("no", False), ("yes", True)]
    for _, group in examples.group_by("split", "query"):
        yes, no = (Counter(group.filter(pl.col("label") == kind)["completion"]) for kind in (True, False))
        assert yes == no
    for user, completion, label in examples.select("user_id", "completion", "label").iter_rows():
        names = set(completion.split(" ; "))
        assert names <= played[user] if label else not names & played[user]
    assert examples.group_by("completion").agg(pl.col("split").n_unique())["split"].max() == 1
    assert examples.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1


def test_the_table_keeps_its_promises(folder: Path) -> None:
    examples = table(folder)
    assert examples.columns == [
        *("example_id", "user_id", "messages", "completion", "group", "query", "items", "label", "split", "profile")
    ]
    check(examples, heard(folder))
    assert examples.height > 250
    assert examples["profile"].null_count() == 0
    names = dict(pl.read_parquet(folder / "heldout_plays.parquet").select("item_id", "item").iter_rows())
    for completion, items in examples.select("completion", "items").iter_rows():
        assert completion == " ; ".join(names[item] for item in items)
    # Rows come in pairs, the engaged one first.
    assert examples["label"].to_list() == [True, False] * (examples.height // 2)


def test_the_library_reads_the_table_and_its_split(folder: Path) -> None:
    source = str(folder / "examples.parquet")
    checked = pl.concat(example_batches(source))
    assert checked["label"].to_list() == table(folder)["label"].to_list()
    codes = resolve_splits(example_keys(source), SplitConfig())
    assert [("train", "validation", "test")[code] for code in codes] == table(folder)["split"].to_list()
    assert set(checked["user_id"]) <= set(open_embeddings(str(folder / "embeddings.parquet")).keys["user_id"])


@pytest.mark.parametrize("objective", ["kto", "engagement"])
def test_the_config_trains_and_judges_what_was_written(tmp_path: Path, objective: str) -> None:
    folder = prepared(tmp_path, objective=objective)
    config = load_yaml(folder / "config.yaml")
    assert config.objective.name == objective
    assert config.output == f"runs/music-{objective}"
    judged = config.evaluation.playlists
    for path in (judged.items, judged.queries, judged.plays, judged.known, config.data.examples):
        assert Path(path).is_absolute()
        assert Path(path).is_file()
    assert set(table(folder)["query"]) <= set(pl.read_parquet(judged.queries)["query"])


def test_the_completion_alone_says_nothing(folder: Path) -> None:
    """A classifier of the artists of a completion, fitted on training rows, is at chance on every part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    examples = table(folder)
    artists = sorted(set(examples["items"].explode()))
    bag = np.array([[artist in items for artist in artists] for items in examples["items"]], dtype=float)
    label, part = examples["label"].to_numpy(), examples["split"].to_numpy()
    model = LogisticRegression(C=100).fit(bag[part == "train"], label[part == "train"])
    scores = model.decision_function(bag).round(9)
    for name in ("train", "validation", "test"):
        assert roc_auc_score(label[part == name], scores[part == name]) == pytest.approx(0.5, abs=1e-9)
        assert (bag[(part == name) & label].sum(axis=0) == bag[(part == name) & ~label].sum(axis=0)).all()
    # The check can fail: with the listener's plays beside it, the label is plain.
    played = heard(folder)
    shared = [len(set(c.split(" ; ")) & played[u]) for u, c in examples.select("user_id", "completion").iter_rows()]
    assert roc_auc_score(label, shared) == 1


def test_what_later_parts_play_changes_no_earlier_row(tmp_path: Path, folder: Path) -> None:
    """Held-out plays of test listeners vanish or change: training and validation rows stay as they are."""
    plays, _ = world()
    examples = table(folder)
    tested = set(examples.filter(pl.col("split") == "test")["user_id"])
    rows = pl.read_parquet(folder / "heldout_plays.parquet").select("user_id", "item_id").iter_rows()
    held = {(int(user), int(item)) for user, item in rows if user in tested}
    gone = {pair for pair in held if pair[0] == min(int(user) for user in tested)}
    altered = [(u, a, w * 7 % 501 + 1 if (u, a) in held else w) for u, a, w in plays if (u, a) not in gone]
    other = prepared(tmp_path, plays=altered)
    for name in ("embeddings", "items", "queries", "profiles", "vector_plays"):
        assert pl.read_parquet(folder / f"{name}.parquet").equals(pl.read_parquet(other / f"{name}.parquet")), name
    before, after = examples, table(other)
    early = pl.col("split") != "test"
    assert before.filter(early).equals(after.filter(early))
    assert not before.filter(~early).equals(after.filter(~early))


def test_the_same_seed_gives_the_same_rows_in_whatever_order_plays_come(tmp_path: Path, folder: Path) -> None:
    plays, _ = world()
    assert table(prepared(tmp_path, "again", plays[::-1])).equals(table(folder))
    assert not table(prepared(tmp_path, "other", seed=7)).equals(table(folder))


def test_requests_are_worded_in_several_ways(folder: Path) -> None:
    rows = table(folder).select("user_id", "query", "messages")
    for user, query, messages in rows.iter_rows():
        assert messages == [{"role": "user", "content": wording(42, user, query)}]
    counts = Counter(wording(1, str(user), "x") for user in range(1000))
    assert set(counts) == {text.format("x") for text in WORDINGS}
    assert min(counts.values()) > 150
    assert wording(1, "3", "x") in {text.format("x") for text in WORDINGS}


@st.composite
def clashes(draw: st.DrawFn) -> np.ndarray:
    size = draw(st.integers(1, 6))
    return np.array(draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))).reshape(size, size)


@given(clashes(), st.integers(0, 3))
@settings(deadline=None)
def test_strangers_are_a_permutation_of_as_many_as_can_be(clash: np.ndarray, seed: int) -> None:
    chosen = strangers(clash, np.random.default_rng(seed))
    kept = np.flatnonzero(chosen >= 0)
    assert sorted(chosen[kept]) == kept.tolist()
    assert all(chosen[i] != i and not clash[i, chosen[i]] for i in kept)
    # Against every permutation whose moves are all allowed.
    size = len(clash)
    moves = (
        sum(i != j for i, j in enumerate(order))
        for order in itertools.permutations(range(size))
        if all(i == j or not clash[i, j] for i, j in enumerate(order))
    )
    assert len(kept) == max(moves)


def engaged(lists: dict[int, list[int]], query: str = "rock") -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "example_id": f"{user}-0",
                "user_id": str(user),
                "messages": [{"role": "user", "content": "x"}],
                "completion": " ; ".join(f"A{a}" for a in artists),
                "group": str(user),
                "query": query,
                "items": [str(a) for a in artists],
            }
            for user, artists in lists.items()
        ]
    )


def named(lists: dict[int, list[int]], names: dict[int, str] | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    pairs = [(user, a) for user, artists in lists.items() for a in artists]
    plays = pl.DataFrame(pairs, schema=["user", "artist"], orient="row")
    artists = sorted({a for _, a in pairs})
    texts = [(names or {}).get(a, f"A{a}") for a in artists]
    return plays, pl.DataFrame({"artist": artists, "item_id": map(str, artists), "name": texts})


def run(lists: dict[int, list[int]], plays: pl.DataFrame, names: pl.DataFrame, least: int = 2):  # type: ignore[no-untyped-def]
    """All listeners in one part would be easiest; a split needs three, so each has a third."""
    thirds = SplitConfig(fractions=(0.34, 0.33, 0.33))
    return labelled(engaged(lists), plays, names, [str(u) for u in lists], 1, least, thirds)


def test_large_queries_are_matched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music_labels, "BLOCK", 8)
    lists = {user: [3 * user, 3 * user + 1, 3 * user + 2] for user in range(90)}
    plays, names = named(lists)
    examples, dropped = run(lists, plays, names)
    assert examples.height == 180
    assert not dropped
    check(examples, {str(user): {f"A{a}" for a in artists} for user, artists in lists.items()})


def test_items_of_one_name_are_one_to_a_reader() -> None:
    """Each listener's playlist holds a song that all know, in an issue of its own: nobody can be given another's."""
    lists = {user: [3 * user, 3 * user + 1, 3 * user + 2] for user in range(12)}
    plays, names = named(lists, {3 * user: "The Song" for user in range(12)})
    with pytest.raises(DataError, match=r"train: expected queries .*4 for want of another's without artists"):
        run(lists, plays, names)


def test_what_is_dropped_is_counted() -> None:
    lists = {user: [3 * user, 3 * user + 1, 3 * user + 2] for user in range(30)}
    plays, names = named(lists)
    _, dropped = run(lists, plays, names)
    assert not dropped
    parts = dict(run(lists, plays, names)[0].select("user_id", "split").iter_rows())
    first = next(int(user) for user, part in parts.items() if part == "train")
    last = next(int(user) for user, part in parts.items() if part == "test")
    # The same words in two parts: the earlier part keeps them.
    same = lists | {last: lists[first]}
    examples, dropped = run(same, named(same)[0], names)
    assert dropped == {("test", music_labels.TWICE): 1}
    assert str(last) not in set(examples["user_id"])
    # One who has heard everything can be given nobody's.
    glutton = pl.concat([plays, pl.DataFrame({"user": [first] * 90, "artist": range(90)})])
    examples, dropped = run(lists, glutton, names)
    assert dropped == {("train", music_labels.CLASH): 1}
    assert str(first) not in set(examples["user_id"])
    with pytest.raises(DataError, match=r"train: expected queries that 11 listeners .*lower min_query_listeners"):
        run(lists, plays, names, least=11)


def test_too_few_listeners_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_query_listeners: expected a whole number >= 2, got 1"):
        prepared(tmp_path, min_query_listeners=1)
    plays, _ = world(listeners=6)
    with pytest.raises(DataError, match="expected queries that 2 listeners have playlists of, got none"):
        prepared(tmp_path, plays=plays)
    assert not (tmp_path / "out").exists()
    two = named({1: [1, 2, 3], 2: [4, 5, 6]})
    with pytest.raises(DataError, match="expected at least 3 groups"):
        run({1: [1, 2, 3], 2: [4, 5, 6]}, *two)


@pytest.mark.real_data
def test_real_playlists_are_told_apart_by_the_listener_alone(tmp_path: Path, shared: Path) -> None:
    from sklearn.metrics import roc_auc_score

    folder = music.prepare(str(shared / "data" / "lastfm_2k"), str(tmp_path / "out"), objective="kto")
    examples = table(folder)
    check(examples, heard(folder))
    rows = dict(examples["split"].value_counts().iter_rows())
    assert rows["train"] > 40_000
    assert min(rows["validation"], rows["test"]) > 4_000
    assert examples["user_id"].n_unique() > 1800
    assert examples["query"].n_unique() > 150
    users = open_embeddings(str(folder / "embeddings.parquet"))
    mine = dict(zip(users.keys["user_id"], users.vectors / np.linalg.norm(users.vectors, axis=1)[:, None], strict=True))
    items = pl.read_parquet(folder / "items.parquet")
    factors = dict(zip(items["item_id"], items["embedding"].to_numpy(), strict=True))
    tested = examples.filter(pl.col("split") == "test")
    nothing = np.zeros(64, dtype=np.float32)
    affinity = [
        mine[user] @ np.mean([factors.get(item, nothing) for item in listed], axis=0)
        for user, listed in tested.select("user_id", "items").iter_rows()
    ]
    # Without any language model, the recommender's own affinity; by the completion alone it would be 0.5.
    assert roc_auc_score(tested["label"].to_numpy(), affinity) > 0.6
