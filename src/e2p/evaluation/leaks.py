"""Leak checks: is there anything in a run's inputs that would make it look personal without being so?

Texts are compared by their words: Unicode-normalised (NFKC), lower case, without punctuation. Large tables are
sampled, seeded, so that a million examples take bounded memory; `found` then says so. Nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import polars as pl

from e2p.data.batches import Ints
from e2p.data.tables import example_batches
from e2p.errors import DataError
from e2p.evaluation.probe import Floats, codes, normalised, probe_auc, rivals, statistics
from e2p.training.inputs import RunInputs

PARTS = {"test": "test", "train": "training"}
SAMPLE = 20_000  # examples of a part whose texts are kept
NEIGHBOURS = (2_000, 100_000)  # vectors of the test part, and of training to look among
HELD = 1 << 26  # numbers of training vectors held at once: 256 MB
NGRAM = 5  # words in a row that two texts share by quotation rather than by chance
SHARE, CASES = 0.01, 3  # a check of texts fires above this share of what it judged, and from this many examples
PHRASES = 0.5  # share of a completion's n-grams from which the profile holds it
# The same of a list's items, and of all shorter completions: a favourite is asked for again, but not nearly always.
ITEMS = 0.9
IDENTIFYING, COPIED = 5, 8  # words of a completion that a near-copy and a stranger do not both write by chance
FAR_MORE, MORE = 10, 2  # how many times as often as a random training user
NEAR = 1e-3  # of the median distance of two training users: a near-copy
PAIRS = 2_000  # pairs of training vectors whose distance is taken
TOLD_APART = 0.99  # AUC that no vector reaches which was made without the completion
PROBED = (100, 20)  # test examples and users that an AUC needs to be judged
SHORT = f"completions of fewer than {NGRAM} words"
LONGEST = 100  # characters of a text that is shown
DRAWS = 5  # random training users that each twin is compared with


@dataclass(frozen=True)
class LeakCheck:
    """What one check found.

    Args:
        name: what would be wrong.
        fired: it is wrong: the run is not valid.
        found: one line with figures.
        examples: up to three cases, by example id where there is one.
        told: whether it could be told at all; ``found`` says why not.
    """

    name: str
    fired: bool
    found: str
    examples: tuple[str, ...] = ()
    told: bool = True


def check_leaks(inputs: RunInputs, source: str, seed: int = 42) -> list[LeakCheck]:
    """Look for leaks in what a run is trained and judged on.

    Args:
        inputs: the run's inputs.
        source: the example table that they were made of.
        seed: seed of samples and exchanges.

    Returns:
        One result per check, fired or not: test users in training; vectors from the future; profile holds the
        completion; vector holds the completion; completions in training.

    Raises:
        DataError: the table is not the one of ``inputs``.
    """
    texts, near = _read(inputs, source, seed), _nearest(inputs, seed)
    return [
        _users(inputs),
        _future(inputs),
        _profile(texts, seed),
        _vector(inputs, texts, near, seed),
        _copied(texts, near, seed),
    ]


def _users(inputs: RunInputs) -> LeakCheck:
    """A split by time may have a user in two parts, if all that he is judged on is later than what was learned."""
    name = "Test users in training"
    keys = inputs.keys.with_columns(split=pl.Series(inputs.split)).filter(pl.col("split") >= 0)
    test, time = pl.col("split") == 2, pl.col("timestamp")
    users = keys.group_by("user_id", maintain_order=True).agg(
        tested=test.sum(),
        learned=(~test).sum(),
        later=(time.filter(test).min() > time.filter(~test).max()) & (time.null_count() == 0),
    )
    users = users.filter(pl.col("tested") > 0)
    both = users.filter(pl.col("learned") > 0)
    bad = both.filter(~pl.col("later").fill_null(False))
    if users.is_empty():
        return LeakCheck(name, False, "nothing to judge: no test examples", told=False)
    if both.is_empty():
        return LeakCheck(name, False, f"none of {users.height:,} test users has examples in training or validation")
    if bad.is_empty():
        return LeakCheck(name, False, f"split by time: {both.height:,} users in both, all test examples later")
    examples = tuple(
        f"user {row['user_id']}: {row['tested']:,} examples in test, {row['learned']:,} in training or validation"
        for row in bad.head(3).iter_rows(named=True)
    )
    found = f"{bad.height:,} of {users.height:,} test users have examples in training or validation, not all earlier"
    return LeakCheck(name, True, found, examples)


def _future(inputs: RunInputs) -> LeakCheck:
    """The join makes this impossible; here it is looked at without the join."""
    name = "Vectors from the future"
    rows = np.flatnonzero((inputs.vector_rows >= 0) & (inputs.split >= 0))
    asked = inputs.keys[rows]
    dated = int(asked["timestamp"].count())
    if asked.is_empty():
        return LeakCheck(name, False, "nothing to judge: no example has a vector", told=False)
    if "timestamp" not in inputs.embeddings.keys.columns or not dated:
        which = "the examples have timestamps, the vectors have none" if dated else "the examples have no timestamps"
        return LeakCheck(name, False, f"cannot be told: {which}", told=False)
    made = inputs.embeddings.keys["timestamp"].gather(inputs.vector_rows[rows])
    late = asked.with_columns(made=made).filter(pl.col("made") > pl.col("timestamp"))
    found = f"{late.height:,} of {dated:,} examples have a vector that is later than they are"
    examples = tuple(
        f"{row['example_id']}: of {row['timestamp'].isoformat()}, its vector of {row['made'].isoformat()}"
        for row in late.head(3).iter_rows(named=True)
    )
    return LeakCheck(name, not late.is_empty(), found, examples)


@dataclass(frozen=True, eq=False)
class _Texts:
    """Words of sampled examples, and a hash of every training example's completion.

    The frames' columns: row, example_id, user_id, group, vector, prompt, completion, words and profile (both
    normalised), length (in words), hash (of the words).
    """

    train: pl.DataFrame
    test: pl.DataFrame
    learned: pl.DataFrame  # user_id, hash
    note: str


def _read(inputs: RunInputs, source: str, seed: int) -> _Texts:
    count, start = inputs.keys.height, 0
    wanted = np.zeros(count, bool)
    for part in PARTS:
        wanted[_some(inputs.rows(part), SAMPLE, seed)] = True
    hashes, kept = [], []
    for batch in example_batches(source):
        start += batch.height
        if start > count:
            break
        turns = pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n")
        batch = batch.with_columns(words=normalised(pl.col("completion")), prompt=pl.coalesce("prompt", turns))
        hashes.append(batch["words"].hash())
        kept.append(batch.drop("messages", "label", "item_id").filter(pl.Series(wanted[start - batch.height : start])))
    if start != count:
        raise DataError(f"{source}: expected the {count:,} examples of the run, got other ones; name the run's table")
    sample = pl.concat(kept).with_columns(
        vector=pl.Series(inputs.vector_rows[wanted]),
        part=pl.Series(inputs.split[wanted]),
        profile=normalised(pl.col("profile")),
        length=pl.col("words").str.count_matches(r"\S+"),
        hash=pl.concat(hashes).filter(pl.Series(wanted)),
    )
    learned = inputs.keys.select("user_id").with_columns(hash=pl.concat(hashes)).filter(pl.Series(inputs.split == 0))
    sampled = [name for part, name in PARTS.items() if len(inputs.rows(part)) > SAMPLE]
    return _Texts(
        sample.filter(pl.col("part") == 0),
        sample.filter(pl.col("part") == 2),
        learned.unique(),
        f" (a sample of {SAMPLE:,} examples of {' and '.join(sampled)})" if sampled else "",
    )


def ngrams(words: str, n: int = NGRAM) -> list[str]:
    """All runs of ``n`` words; the whole of a shorter text; none of no words."""
    split = words.split()
    return [" ".join(split[i : i + n]) for i in range(max(len(split) - n, 0) + 1)] if split else []


def standing(phrases: Sequence[str], words: str) -> list[str]:
    """The phrases that stand in a text as a sequence of whole words; both normalised."""
    text = f" {words} "
    return [phrase for phrase in phrases if f" {phrase} " in text]


def _items(completions: pl.Series) -> pl.Series:
    """Distinct items of completions that are lists: most of them have three items or more; else none."""
    for separator in ("\n", ";", ","):
        item = pl.element().str.replace(r"^\s*\d+[.)]\s+", "")
        cut = completions.str.split(separator).list.eval(normalised(item))
        cut = cut.list.eval(pl.element().filter(pl.element() != "")).list.unique(maintain_order=True)
        if 2 * (cut.list.len() >= 3).sum() > len(cut):
            return cut
    return pl.Series([[]] * len(completions), dtype=pl.List(pl.String))


def _profile(texts: _Texts, seed: int) -> LeakCheck:
    """Own profile against another user's, so that what everybody says does not count."""
    fired, told, found, examples = False, True, [], []
    for part, frame in zip(PARTS.values(), (texts.test, texts.train), strict=True):
        frame = frame.filter(pl.col("profile") != "", pl.col("length") > 0)  # and no null
        other = rivals(frame["user_id"], frame["group"], None, 1, seed)[:, 0]
        why = "too few to compare with another user's" if frame.height else "no completion with a profile"
        frame = frame.with_columns(other=frame["profile"].gather(np.maximum(other, 0))).filter(pl.Series(other >= 0))
        if frame.height < CASES:
            told = False
            found.append(f"{part}: nothing to judge: {why}")
            continue
        phrases, length = [ngrams(words) for words in frame["words"]], pl.col("length")
        for kind, parts, which_ones, enough in (
            ("completions", phrases, length >= NGRAM, PHRASES),
            ("lists", _items(frame["completion"]).to_list(), pl.col("parts").list.len() >= 3, ITEMS),
            (SHORT, phrases, length < NGRAM, 1),
        ):
            judged = frame.with_columns(parts=pl.Series(parts, dtype=pl.List(pl.String))).filter(which_ones)
            if judged.is_empty():
                continue
            own, others = (
                np.array([len(standing(*pair)) / len(pair[0]) for pair in judged.select("parts", which).iter_rows()])
                for which in ("profile", "other")
            )
            held, chance = int((own >= enough).sum()), int((others >= enough).sum())
            if kind == SHORT:
                leaks = held >= ITEMS * judged.height and _beyond(held, chance, frame.height, MORE)
            else:
                leaks = _beyond(held, chance, judged.height)
            fired |= leaks
            items = kind == "lists"
            found.append(
                f"{part}: {held:,} of {judged.height:,} {kind} stand in the own profile, {chance:,} in another's"
                + (f" (of a list's items {own.mean():.1%} and {others.mean():.1%})" if items else "")
            )
            if kind == SHORT and not leaks:  # a favourite, asked for again
                continue
            for row in judged.filter(pl.Series(own >= enough)).head(3).iter_rows(named=True):
                shared = standing(row["parts"], row["profile"])
                text = ", ".join(shared) if items else _common(row["words"], row["profile"])
                examples.append(f"{row['example_id']}: {text[:LONGEST]}")
    name, cases = "Profile holds the completion", tuple(examples[:3])
    return LeakCheck(name, fired, "; ".join(found) + texts.note, cases, fired or told)


def _common(first: str, second: str) -> str:
    """The longest run of words that two texts share."""
    a, b = first.split(), second.split()
    match = SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return " ".join(a[match.a : match.a + match.size])


def _beyond(cases: float, chance: float, judged: int, times: float = 1) -> bool:
    """Whether there are more cases than by chance: by a share of what was judged, by number, and by ratio."""
    excess = cases - chance
    return excess >= CASES and excess > SHARE * judged and cases >= times * chance


def _some(rows: Ints, most: int, seed: int) -> Ints:
    return rows if len(rows) <= most else np.sort(np.random.default_rng([seed, 1]).choice(rows, most, replace=False))


@dataclass(frozen=True, eq=False)
class _Near:
    """Test vectors (vector, twin: the nearest other training user, distance) and whom they were compared with."""

    found: pl.DataFrame
    trained: pl.Series  # user of every training vector
    limit: float  # a distance of this or less is a near-copy
    note: str


def _nearest(inputs: RunInputs, seed: int) -> _Near:
    table = inputs.embeddings
    asked, among = (np.unique(inputs.vector_rows[inputs.rows(part)]) for part in ("test", "train"))
    asked, among = asked[asked >= 0], among[among >= 0]
    most = (NEIGHBOURS[0], min(NEIGHBOURS[1], HELD // table.dim))
    sampled = len(asked) > most[0] or len(among) > most[1]
    note = f" (a sample of {most[0]:,} test and {most[1]:,} training vectors at most)" if sampled else ""
    asked, among = _some(asked, most[0], seed), _some(among, most[1], seed)
    trained = table.keys["user_id"].gather(among)
    nearest, distance, limit = np.full(len(asked), -1), np.full(len(asked), np.inf), 0.0
    if len(among):
        owner, own = np.split(codes(table.keys["user_id"].gather(np.concatenate([among, asked]))), [len(among)])
        vectors = np.asarray(table.vectors[among], np.float32)
        mean, scale = statistics(vectors)
        vectors = (vectors - mean) / scale
        # Not of test vectors' distances, among which may be any number of copies; nor of nearest ones in training,
        # where everybody may have two accounts.
        first, second = np.random.default_rng([seed, 5]).integers(len(among), size=(2, PAIRS))
        apart = np.linalg.norm(vectors[first] - vectors[second], axis=1)[owner[first] != owner[second]]
        limit = NEAR * float(np.median(apart[apart > 0])) if (apart > 0).any() else 0.0
        squares = np.einsum("nd,nd->n", vectors, vectors)
        for start in range(0, len(asked), 256):
            rows = slice(start, start + 256)
            block = (np.asarray(table.vectors[asked[rows]], np.float32) - mean) / scale
            apart = squares - 2 * (block @ vectors.T)  # less the block's own squares, which do not change the order
            apart[own[rows, None] == owner] = np.inf
            best = apart.argmin(1)
            distance[rows] = np.linalg.norm(block - vectors[best], axis=1)
            nearest[rows] = np.where(np.isinf(apart.min(1)), -1, best)
    found = pl.DataFrame({"vector": asked, "distance": distance}).with_columns(
        twin=trained.gather(np.maximum(nearest, 0)) if len(trained) else pl.lit(None, pl.String)
    )
    return _Near(found.filter(pl.Series(nearest >= 0)), trained, limit, note)


def _compared(texts: _Texts, near: _Near, least: int, seed: int) -> pl.DataFrame:
    """Test examples of so many words; whether the twin wrote the same in training, and how often a random user did."""
    frame = texts.test.filter(pl.col("length") >= least).join(near.found, on="vector", maintain_order="left")
    learned = texts.learned.with_columns(same=pl.lit(1.0))

    def same(users: pl.Series) -> pl.Series:
        asked = frame.select("hash", user_id=users)
        return asked.join(learned, on=["user_id", "hash"], how="left", maintain_order="left")["same"].fill_null(0.0)

    random = np.random.default_rng([seed, 4])
    drawn = random.integers(max(len(near.trained), 1), size=(DRAWS, frame.height))
    chance = [same(near.trained.gather(who)).to_numpy() for who in drawn]
    return frame.with_columns(same=same(frame["twin"]), chance=pl.Series(np.mean(chance, axis=0)))


def _vector(inputs: RunInputs, texts: _Texts, near: _Near, seed: int) -> LeakCheck:
    """Vectors that are copies of a training user's who wrote the same, or that tell completions apart too well."""
    compared = _compared(texts, near, IDENTIFYING, seed)
    twins = compared.filter(pl.col("distance") <= near.limit)
    same, chance = float(twins["same"].sum()), float(twins["chance"].sum())
    copies = near.found.filter(pl.col("distance") <= near.limit).height
    found = f"{copies:,} of {near.found.height:,} test vectors are near-copies of another training user's{near.note}"
    if copies:
        found += (
            f", who wrote {same:,.0f} of their {twins.height:,} completions of at least {IDENTIFYING} words (a random "
            f"training user {chance:,.1f})"
        )
    (x, train), (y, test) = (_with_vectors(inputs, frame) for frame in (texts.train, texts.test))
    wrote, users = test["completion"], test["user_id"]
    probe = probe_auc(x, train["completion"], y, wrote, users, test["group"], test["prompt"], seed)
    length = float(np.mean(test["length"].to_numpy())) if test.height else 0.0
    few, short = probe.examples < PROBED[0] or probe.users < PROBED[1], length < IDENTIFYING
    if probe.examples:
        found += (
            f"; the vector tells a test user's completion from another's with AUC {probe.auc:.3f} ({probe.examples:,} "
            f"examples, {probe.users:,} users{': too few to judge' if few else ''}){texts.note}"
        )
        found += f"; too short to judge: completions of {length:.1f} words on average" if short else ""
    else:
        found += "; nothing for the probe to judge: it needs training vectors and two test users with vectors"
    apart = not few and not short and probe.auc >= TOLD_APART
    examples = tuple(
        f"{row['example_id']}: {row['user_id']} and training user {row['twin']}: {row['completion'][:LONGEST]}"
        for row in twins.filter(pl.col("same") > 0).head(3).iter_rows(named=True)
    )
    copied = _beyond(same, chance, compared.height, FAR_MORE)
    fired = bool(copied or apart)
    return LeakCheck("Vector holds the completion", fired, found, examples, fired or not (few or short))


def _with_vectors(inputs: RunInputs, frame: pl.DataFrame) -> tuple[Floats, pl.DataFrame]:
    frame = frame.filter(pl.col("vector") >= 0)
    return np.asarray(inputs.embeddings.vectors[frame["vector"].to_numpy()], np.float32), frame


def _copied(texts: _Texts, near: _Near, seed: int) -> LeakCheck:
    """A test completion that stands in training can be recited, once the vector has told who wrote it there."""
    long = texts.test.filter(pl.col("length") >= COPIED)
    known = long.filter(pl.col("hash").is_in(texts.learned["hash"].implode()))
    compared = _compared(texts, near, COPIED, seed)
    same, chance = float(compared["same"].sum()), float(compared["chance"].sum())
    share = f" ({known.height / long.height:.1%})" if long.height else ""
    found = (
        f"{known.height:,} of {long.height:,} test completions of at least {COPIED} words{share} stand word for word "
        f"in training{texts.note}; of {compared.height:,} the nearest training user by vector wrote {same:,.0f}, a "
        f"random one {chance:,.1f}{near.note}"
    )
    cases = [*compared.filter(pl.col("same") > 0).iter_rows(named=True), *known.iter_rows(named=True)]
    examples = dict.fromkeys(f"{row['example_id']}: {row['completion'][:LONGEST]}" for row in cases)
    fired, told = _beyond(same, chance, compared.height, MORE), compared.height >= CASES
    return LeakCheck(
        "Completions in training", fired, found + ("" if told else ": too few to judge"), tuple(examples)[:3], told
    )
