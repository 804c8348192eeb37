"""Generated playlists, judged: read back to items, then hits among held-out plays, affinity and predicted engagement.

The paper judges by an engagement predictor alone (Appendix A). A predictor rates what it was taught to like, so it
stands here beside what the listener really played, and whether the two rank the arms alike is part of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.config_evaluation import PlaylistsConfig
from e2p.data.batches import Ints
from e2p.data.sources import open_table
from e2p.data.vectors import to_vectors
from e2p.errors import DataError
from e2p.evaluation.engagement import EngagementPredictor, affinity, features, judge_predictor
from e2p.items.catalogue import Catalogue, ReadBack, entries_of, load_catalogue, playlist_text, read_back, reading
from e2p.items.retrieval import rerank
from e2p.training.inputs import RunInputs

METRICS = ("playlist_hits", "engagement", "affinity", "on_request", "known", "invented")
_ROWS = 65_536
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Shelf:
    """What playlists are judged with.

    Args:
        catalogue: the items; those of the held-out plays that no vector is known of have a zero vector.
        queries: vector and candidate rows of each query.
        plays: rows that each user played and his vector has not seen.
        known: rows that his vector was made of.
        asked: query of each example, or None.
        lists: rows of each example's playlist, empty where the table does not say.
        longest: items of the longest playlist in training; of a longer answer, the first so many count.
        predictor: of engagement, fitted on the training users, and what there is to know about it; None without
            labels.
    """

    catalogue: Catalogue
    queries: Mapping[str, tuple[Floats, Ints]]
    plays: Mapping[str, frozenset[int]]
    known: Mapping[str, frozenset[int]]
    asked: Sequence[str | None]
    lists: Sequence[Ints]
    longest: int
    predictor: tuple[EngagementPredictor, dict[str, Any]] | None = None


def load_shelf(settings: PlaylistsConfig, source: str, inputs: RunInputs, seed: int, resamples: int) -> Shelf:
    """Read and check the tables that playlists are judged with, and fit the engagement predictor on the training users.

    Args:
        settings: where they are.
        source: the example table, with the columns query (text) and items (list of item ids).
        inputs: the run's inputs.
        seed: of the predictor and of the bootstrap.
        resamples: bootstrap resamples of the users, for the predictor's AUC.

    Raises:
        DataError: a table lacks a column, a query has no vector, vectors are of another length than the users', or no
            test user has held-out plays.
    """
    catalogue = load_catalogue(settings.items)
    if catalogue.dim != inputs.embeddings.dim:
        raise DataError(
            f"{settings.items}: expected vectors of {inputs.embeddings.dim} numbers, in the users' space, got "
            f"{catalogue.dim}; take the table that was prepared with the users' vectors"
        )
    held = _column(settings.plays, "user_id", "item_id", "item").with_columns(pl.col("item_id").cast(pl.String))
    new = held.filter(~pl.col("item_id").is_in(catalogue.ids) & pl.col("item").is_not_null())
    new = new.unique("item_id", keep="first", maintain_order=True)
    _check_names(settings.items, catalogue.names)
    _check_names(settings.plays, new["item"].to_list())
    catalogue = dataclasses.replace(
        catalogue,
        ids=catalogue.ids + new["item_id"].to_list(),
        names=catalogue.names + new["item"].to_list(),
        vectors=np.concatenate([catalogue.vectors, np.zeros((new.height, catalogue.dim), np.float32)]),
    )
    plays = _by_user(held, catalogue)
    users = inputs.keys["user_id"].to_numpy()[inputs.rows("test")]
    if not any(plays.get(user) for user in np.unique(users)):
        raise DataError(f"{settings.plays}: expected held-out plays of the test users, got none of any; check user_id")
    examples = _column(source, "query", "items")
    lists = [_rows_of(ids or [], catalogue) for ids in examples["items"].to_list()]
    train = inputs.rows("train")
    queries = _queries(settings.queries, catalogue)
    asked = examples["query"].cast(pl.String).to_list()
    lost = [row for row in train if not len(lists[row])]
    if lost:
        raise DataError(
            f"{source}: row {lost[0]}: items: expected ids that are in {settings.items} or {settings.plays}, got none, "
            f"as in {len(lost):,} of {len(train):,} training playlists; add these items, or drop the rows"
        )
    unknown = next((row for row in np.flatnonzero(inputs.split >= 0) if asked[row] not in queries), None)
    if unknown is not None:
        raise DataError(f"{source}: row {unknown}: query {asked[unknown]!r} is not in {settings.queries}; add it there")
    known = _by_user(_column(settings.known, "user_id", "item_id"), catalogue)
    longest = max(len(lists[row]) for row in train)
    shelf = Shelf(catalogue, queries, plays, known, asked, lists, longest)
    return dataclasses.replace(shelf, predictor=_predictor(shelf, inputs, seed, resamples))


def _check_names(source: str, names: Sequence[str]) -> None:
    """A name that would be read as two cannot be read back."""
    for row, name in enumerate(names):
        if not name.strip() or len(entries_of(name)) != 1:
            raise DataError(
                f"{source}: item {name!r} (number {row}): expected a name in one line without ';'; rename the item"
            )


def _column(source: str, *names: str) -> pl.DataFrame:
    table = open_table(source)
    table.require(*(name for name in names if name != "item"))
    return pl.concat(batch for _, batch in table.batches(names, _ROWS))


def _rows_of(ids: Sequence[Any], catalogue: Catalogue) -> Ints:
    """Rows of items by id, as their names are read back; ids that are not in the catalogue are left out."""
    rows = [catalogue.rows[str(item)] for item in ids if str(item) in catalogue.rows]
    return catalogue.read_as[rows] if rows else np.zeros(0, np.int64)


def _by_user(plays: pl.DataFrame, catalogue: Catalogue) -> dict[str, frozenset[int]]:
    grouped = plays.group_by(pl.col("user_id").cast(pl.String)).agg("item_id")
    return {user: frozenset(_rows_of(items, catalogue).tolist()) for user, items in grouped.iter_rows()}


def _queries(source: str, catalogue: Catalogue) -> dict[str, tuple[Floats, Ints]]:
    table = open_table(source)
    table.require("query", "embedding", "items")
    found: dict[str, tuple[Floats, Ints]] = {}
    for start, batch in table.batches(("query", "embedding", "items"), _ROWS):

        def where(index: int, start: int = start) -> str:
            return f"{source}: row {start + index}"

        vectors = to_vectors(batch["embedding"], catalogue.dim, where)
        for query, vector, items in zip(batch["query"].to_list(), vectors, batch["items"].to_list(), strict=True):
            found[str(query)] = vector, _rows_of(items or [], catalogue)
    return found


def rerank_answers(shelf: Shelf, inputs: RunInputs) -> pl.DataFrame:
    """The arm without generation: of the items that answer the query and that the user does not know yet, those whose
    vectors suit his best; in the form of :func:`e2p.evaluation.answers.answer`."""
    rows = inputs.rows("test")
    users = inputs.keys["user_id"].to_numpy()[rows]
    known = [np.array(sorted(shelf.known.get(user, ())), np.int64) for user in users]
    candidates = [shelf.queries[str(shelf.asked[row])][1] for row in rows]
    found = rerank(_user_vectors(inputs, rows), shelf.catalogue, candidates, None, known, shelf.longest)
    texts = [playlist_text([shelf.catalogue.names[item] for item in items]) for items in found]
    return inputs.keys.select("example_id", "user_id")[rows].with_columns(
        arm=pl.lit("rerank"),
        draw=pl.lit(0, pl.Int64),
        text=pl.Series(texts, dtype=pl.String),
        cut=pl.lit(False),
    )


def judge_playlists(answers: pl.DataFrame, shelf: Shelf, inputs: RunInputs) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Scores of generated playlists in long form, and what there is to know about the judging.

    An item that the user's vector was made of is no news to him: naming it back would look like affinity and like
    engagement, so such entries are set aside, in all arms, and counted (``known``). Metrics, each a mean over an
    example's draws: ``playlist_hits``: share of the new entries that are held-out plays of the user, each counted once;
    ``engagement``: probability by a classifier that was trained on the training users' labels (only where there are
    labels), 0 for a list that names nothing new; ``affinity``: mean cosine of the user's vector with the new items';
    ``on_request``: share of the new entries that answer the query; ``known``: share of the entries that the vector was
    made of; ``invented``: share that is neither an item nor near to one. Of an answer, as many entries count as the
    longest training playlist has; a last entry that was cut off does not.

    Args:
        answers: of :func:`e2p.evaluation.answers.answer` and :func:`rerank_answers`, all arms.
        shelf: what they are judged with.
        inputs: the run's inputs.

    Returns:
        example_id, user_id, arm, metric, value; and for JSON: ``predictor`` (None without labels), ``readings`` of
        each arm, ``longest``, ``users_without_plays``: test users whose every hit rate is 0. How engagement and hits
        agree over the arms, the audit adds.
    """
    texts = [_shown(text, cut, shelf.longest) for text, cut in answers.select("text", "cut").iter_rows()]
    read = read_back(texts, shelf.catalogue)
    row_of = dict(zip(inputs.keys["example_id"].to_list(), range(len(inputs.keys)), strict=True))
    rows = np.array([row_of[name] for name in answers["example_id"].to_list()], np.int64)
    predictor, about = shelf.predictor or (None, None)
    frame = answers.select("example_id", "user_id", "arm").with_columns(
        pl.Series(name, values) for name, values in _measured(read, rows, shelf, inputs, predictor).items()
    )
    means = frame.group_by("example_id", "user_id", "arm", maintain_order=True).agg(pl.col(frame.columns[3:]).mean())
    names = [name for name in METRICS if name in means.columns]
    scores = means.unpivot(names, index=["example_id", "user_id", "arm"], variable_name="metric")
    arms = answers["arm"].to_numpy()
    readings = {}
    for arm in dict.fromkeys(arms.tolist()):
        own = [one for one, mine in zip(read, arms == arm, strict=True) if mine]
        readings[str(arm)] = reading(own) | {"entries_an_answer": sum(one.entries for one in own) / len(own)}
    return scores, {
        "predictor": about,
        "readings": readings,
        "longest": shelf.longest,
        "users_without_plays": sum(not shelf.plays.get(user) for user in set(answers["user_id"].to_list())),
    }


def _shown(text: str, cut: bool, longest: int) -> str:
    """The entries that count, one a line."""
    entries = entries_of(text)
    if cut and entries and text.rstrip()[-1:] not in (";", "\uff1b"):
        entries = entries[:-1]  # half a name
    return "\n".join(entries[:longest])


def _measured(
    read: Sequence[ReadBack], rows: Ints, shelf: Shelf, inputs: RunInputs, predictor: EngagementPredictor | None
) -> dict[str, npt.NDArray[np.float64]]:
    """Metrics of each answer [n]."""
    users = inputs.keys["user_id"].to_numpy()[rows]
    vectors = _user_vectors(inputs, rows)
    found = {name: np.zeros(len(read)) for name in METRICS}
    offered = {query: frozenset(items.tolist()) for query, (_, items) in shelf.queries.items()}
    new: list[Ints] = []
    for at, (one, user) in enumerate(zip(read, users, strict=True)):
        known, held = shelf.known.get(user, frozenset()), shelf.plays.get(user, frozenset())
        fresh = [item for item in one.items if item not in known]
        count = max(one.entries - (len(one.items) - len(fresh)), 1)
        answers = offered[str(shelf.asked[rows[at]])]
        new.append(np.array(fresh, np.int64))
        found["playlist_hits"][at] = sum(item in held for item in fresh) / count
        found["on_request"][at] = sum(item in answers for item in fresh) / count
        found["known"][at] = (len(one.items) - len(fresh)) / max(one.entries, 1)
        found["invented"][at] = one.inventions / max(one.entries, 1)
        found["affinity"][at] = affinity(vectors[at], shelf.catalogue.vectors[fresh])
    if predictor is None:
        return {name: values for name, values in found.items() if name != "engagement"}
    named = np.array([at for at, fresh in enumerate(new) if len(fresh)], np.int64)
    if len(named):
        lists = [new[at] for at in named]
        found["engagement"][named] = predictor.predict(_features(shelf, inputs, rows[named], lists))
    return found


def _predictor(
    shelf: Shelf, inputs: RunInputs, seed: int, resamples: int
) -> tuple[EngagementPredictor, dict[str, Any]] | None:
    """The classifier, fitted on the training users; its kind chosen on the validation users, judged on the test ones.

    None where the table has no labels, or only one kind of them in a part.
    """
    parts = {part: _labelled(shelf, inputs, part) for part in ("train", "validation", "test")}
    if any(len(set(inputs.labels[rows].tolist())) < 2 for rows in parts.values()):
        return None
    users = inputs.keys["user_id"].to_list()
    tables = {
        part: (
            _features(shelf, inputs, rows, [shelf.lists[row] for row in rows]),
            inputs.labels[rows],
            [users[row] for row in rows],
        )
        for part, rows in parts.items()
    }
    fitted = [EngagementPredictor.fit(*tables["train"], kind, seed) for kind in ("logistic", "boosting")]
    chosen = max(fitted, key=lambda one: judge_predictor(one, *tables["validation"], resamples=100, seed=seed)["auc"])
    judged = judge_predictor(chosen, *tables["test"], resamples=resamples, seed=seed)
    return chosen, {"kind": chosen.kind, "setting": chosen.setting, **judged}


def _labelled(shelf: Shelf, inputs: RunInputs, part: str) -> Ints:
    """Rows with a label and a playlist that names items."""
    rows = inputs.all_rows(part)
    return rows[[inputs.labels[row] >= 0 and len(shelf.lists[row]) > 0 for row in rows]]


def _features(shelf: Shelf, inputs: RunInputs, rows: Ints, lists: Sequence[Ints]) -> Floats:
    """Of the rows' users and queries with these playlists."""
    queries = np.stack([shelf.queries[str(shelf.asked[row])][0] for row in rows])
    return features(_user_vectors(inputs, rows), queries, [shelf.catalogue.vectors[items] for items in lists])


def _user_vectors(inputs: RunInputs, rows: Ints) -> Floats:
    """Each example's own user's vector as of its time [n, D]; zeros without one."""
    which = inputs.vector_rows[rows]
    vectors = np.asarray(inputs.embeddings.vectors[np.maximum(which, 0)], np.float32)
    return np.where(which[:, None] >= 0, vectors, np.float32(0))
