"""Personal headlines (the paper's PENS task): click histories of PENS and MIND to tables.

An example is an article's body as prompt and a headline as completion, for a user who clicked it (label true) or passed
it over (label false). In PENS' test it is the headline that the user wrote for himself.

What decides about leakage:

- No article is in two parts, and no test user in training. Where the files divide their impressions (PENS; MIND with
  train and dev), their parts hold, and an article of a later part is taken out of the earlier ones; MIND's dev users
  are in training too, but earlier. Else articles and users are dealt, and an example whose two parts differ is left
  out.
- A user's vector and profile are of the clicks before an impression. Histories can give examples as well
  (``history_share``): of a user, the later clicks; then vector and profile are of the earlier ones alone, in all of
  this user's examples alike, so that no vector tells by its length or age which example it stands before.
- An article that stands in the history that a vector is of is no example for it.
- Item factors are fitted on those histories: of the training impressions where the files divide them, else of all
  users, as a recommender does that serves them. No click that is an example is in them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from e2p.config import DataConfig, EvaluationConfig, ObjectiveConfig, RunConfig, TextsConfig
from e2p.config_io import save_yaml
from e2p.data.splits import SPLITS
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError, DataError
from e2p.tasks.news_files import News, read
from e2p.tasks.news_users import Vectors, profiles, user_vectors
from e2p.tasks.output import staged_folder

WORDING = "Write a headline for this article: {}"
NOTHING = "nothing read yet"
Objective = Literal["lm", "kto", "engagement"]


def prepare(
    source: str,
    output: str,
    objective: Objective = "lm",
    vectors: Vectors = "clicks",
    encoder: str = "minilm",
    dimension: int = 64,
    alpha: float = 20.0,
    regularization: float = 10.0,
    clicked: int = 3,
    passed: int = 3,
    history_share: float = 0.0,
    shares: tuple[float, ...] = (0.8, 0.1, 0.1),
    max_body_chars: int = 1000,
    max_profile_chars: int = 1000,
    seed: int = 42,
    overwrite: bool = False,
) -> Path:
    """Make headline examples and user vectors from PENS or MIND.

    Writes examples.parquet (with label, profile, item_id, category, and source: impression, history or rewritten),
    embeddings.parquet, and a config to train with. The paper (Appendix F) takes up to three clicked and three passed
    headlines of an impression and embeds the profile once: ``--vectors profile --encoder meta-llama/Llama-3.2-1B``.

    Args:
        source: folder with PENS' news.tsv, train.tsv, valid.tsv and personalized_test.tsv, with MIND's news.tsv and
            behaviors.tsv, or with folders of MIND's train and dev parts.
        output: folder for the tables.
        objective: what the config trains: ``lm`` on clicked headlines, ``kto`` and ``engagement`` on both kinds. The
            tables are the same.
        vectors: ``clicks``: factors of the articles clicked (ALS); ``headlines``: mean of the encoder's vectors of the
            headlines clicked; ``profile``: the encoder's vector of the profile text; ``both``: clicks and headlines
            side by side.
        encoder: of headlines and profiles: minilm, a sentence-transformers model, or a causal LM.
        dimension: numbers in a vector of clicks.
        alpha: how much a click counts, where none counts 1.
        regularization: of the factors.
        clicked: most clicked headlines of an impression that become examples, drawn.
        passed: most passed-over headlines of an impression that become examples, drawn.
        history_share: of each user's history before the first impression, the latest clicks of this share become
            examples too; vectors and profiles are then of the rest. 0: none.
        shares: of the articles, for train, validation and test where the files divide nothing; users are dealt for
            training and test in the same proportion.
        max_body_chars: a body is cut here, at a word.
        max_profile_chars: a profile ends before the headline that would go beyond; without any it says that nothing
            has been read yet.
        seed: of the parts, of what is drawn, and of the factors.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a number is out of range.
        DataError: a file is missing or not as documented, or no examples are left for a part.
        RunError: the output exists.
        MissingExtraError: implicit or the encoder's package is not installed.
    """
    for name, value, least in (
        ("dimension", dimension, 1),
        ("clicked", clicked, 1),
        ("passed", passed, 0),
        ("max_body_chars", max_body_chars, 1),
        ("max_profile_chars", max_profile_chars, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value}; raise it")
    if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares: expected three numbers > 0 that sum to 1, got {list(shares)}; one a part")
    if not 0 <= history_share < 1:
        raise ConfigError(f"history_share: expected a number in [0, 1), got {history_share}")
    with staged_folder(output, overwrite) as folder:
        news = read(source)
        left_out: Counter[str] = Counter()
        visits = numbered(news.visits, history_share)
        parts = dealt(news, visits, tuple(shares), seed)
        table = examples(news, visits, parts, clicked, passed, seed, left_out)
        for part in SPLITS:
            if table.filter((pl.col("split") == part) & pl.col("label")).is_empty():
                raise DataError(
                    f"{source}: expected clicked headlines with body for {part}, got none; other shares may help"
                    + _listed(news.faults.told(), left_out)
                )
        table = table.with_columns(prompt=pl.lit(WORDING.format("")) + _cut("body", max_body_chars))
        known = visits.filter(pl.col("visit").is_in(table["visit"].unique().implode()))
        texts = profiles(known, news.articles, max_profile_chars)
        table = table.join(texts, on="visit", how="left", maintain_order="left")
        # The prompt arms need a text for everybody; this is the same one for all of whom nothing is known.
        table = table.with_columns(pl.col("profile").fill_null(NOTHING))
        fit_on = visits.filter(pl.col("split").fill_null("train") == "train")
        found, version = user_vectors(
            known, fit_on, texts, news.articles, vectors, encoder, dimension, regularization, alpha, seed
        )
        timed = history_share == 0
        columns = ["example_id", "user_id", *(["timestamp"] if timed else []), "prompt", "completion", "label"]
        columns += ["profile", "item_id", "group", "split", "category", "source"]
        write_frame(folder / "examples.parquet", table.select(columns))
        whose = known.select("visit", "user_id", "timestamp").join(found, on="visit", maintain_order="left")
        whose = whose.unique(["user_id", *(["timestamp"] if timed else [])], keep="first", maintain_order=True)
        write_embeddings(
            folder / "embeddings.parquet",
            whose["user_id"],
            whose["embedding"].to_numpy(),
            whose["timestamp"] if timed else None,
            f"{news.kind}-{version}",
        )
        save_yaml(recommended(output, objective), folder / "config.yaml")
    for line in [*news.faults.told(), *_told(news, visits, table, whose, left_out)]:
        print(line)
    return Path(output)


def recommended(output: str | Path, objective: Objective = "lm") -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet"),
        missing_vector="null",
        long_prompt="truncate",
        max_completion_tokens=64,
        profile_template="persona: {profile}",
    )
    judged = EvaluationConfig(max_new_tokens=32, attribute="category", texts=TextsConfig(generate=("greedy",)))
    return RunConfig(data=data, objective=ObjectiveConfig(name=objective), evaluation=judged, output="runs/news")


def numbered(visits: pl.DataFrame, history_share: float) -> pl.DataFrame:
    """Visits with a number and the clicks to take examples of (``later``).

    With a share, a user's history is that before the first impression: its earlier clicks stay the history of all of
    the user's visits, and the first of these has its later clicks as ``later``.
    """
    visits = visits.with_row_index("visit").cast({"visit": pl.Int64})
    nothing = pl.lit([], dtype=pl.List(pl.String))
    if not history_share:
        return visits.with_columns(later=nothing)
    order = visits.sort("timestamp", "visit", nulls_last=True)
    first = order.unique("user_id", keep="first", maintain_order=True)
    size = pl.col("history").list.len().cast(pl.Int64)
    kept = size - (size * history_share).floor().cast(pl.Int64)
    first = first.select(
        "user_id",
        first="visit",
        later=pl.col("history").list.slice(kept),
        dwell=pl.col("dwell").list.head(kept),
        history=pl.col("history").list.head(kept),
    )
    visits = visits.drop("history", "dwell").join(first, on="user_id", maintain_order="left")
    is_first = pl.col("visit") == pl.col("first")
    return visits.with_columns(later=pl.when(is_first).then("later").otherwise(nothing)).drop("first")


def dealt(news: News, visits: pl.DataFrame, shares: tuple[float, ...], seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The part of every article, ``article_id`` and ``part``, and where the files divide nothing, of every user.

    A test user is no other part's; the other users serve training and validation, which differ in their articles.
    """
    random = np.random.default_rng([seed, 1])
    ids = news.articles["article_id"].sort()
    drawn = _dealt(len(ids), shares, random)
    if visits["split"].null_count():
        people = visits["user_id"].unique().sort()
        share = shares[2] / (shares[0] + shares[2])
        tested = _dealt(len(people), (1 - share, share), random) == 1
        users = pl.DataFrame({"user_id": people, "tested": tested})
        return pl.DataFrame({"article_id": ids, "part": [SPLITS[which] for which in drawn]}), users
    shown = visits.select("split", article_id=pl.concat_list("clicked", "passed")).explode("article_id")
    rank = pl.col("split").replace_strict({part: at for at, part in enumerate(SPLITS)}, return_dtype=pl.Int64)
    latest = shown.drop_nulls().with_columns(rank=rank).group_by("article_id").agg(pl.col("rank").max())
    parts = pl.DataFrame({"article_id": ids}).join(latest, on="article_id", how="left", maintain_order="left")
    if not visits["split"].eq("validation").any():  # MIND: some of the training articles
        held = _dealt(len(ids), (shares[0], shares[1]), random)
        parts = parts.with_columns(rank=pl.when(pl.col("rank") == 0).then(pl.Series(held)).otherwise("rank"))
    named = pl.col("rank").replace_strict(dict(enumerate(SPLITS)), return_dtype=pl.String, default=None)
    return parts.select("article_id", part=named), pl.DataFrame(schema={"user_id": pl.String, "tested": pl.Boolean})


def examples(
    news: News,
    visits: pl.DataFrame,
    parts: tuple[pl.DataFrame, pl.DataFrame],
    clicked: int,
    passed: int,
    seed: int,
    left_out: Counter[str],
) -> pl.DataFrame:
    """Example table without prompts and profiles: one row a user and article, of its first visit; clicks win.

    Args:
        news: what the files say.
        visits: of :func:`numbered`.
        parts: of :func:`dealt`.
        clicked: most clicked articles of a visit.
        passed: most passed-over articles of a visit.
        seed: of the draws.
        left_out: where reasons are counted.
    """
    shown = pl.concat(
        [
            _shown(visits, "clicked", True, "impression"),
            _shown(visits, "later", True, "history"),
            _shown(visits, "passed", False, "impression"),
        ]
    )
    shown = shown.with_columns(
        source=pl.when(pl.col("rewritten").is_not_null()).then(pl.lit("rewritten")).otherwise("source")
    )

    def keep(frame: pl.DataFrame, condition: pl.Expr, reason: str) -> pl.DataFrame:
        kept, gone = frame.filter(condition), frame.filter(~condition)["label"]
        for kind, count in (("clicked", gone.sum()), ("passed over", gone.len() - gone.sum())):
            left_out[f"{kind}: {reason}"] += int(count)
        return kept

    articles = news.articles.rename({"article_id": "item_id"})
    shown = shown.join(articles, on="item_id", how="left", maintain_order="left")
    shown = keep(shown, pl.col("headline").is_not_null(), "articles that news.tsv lacks")
    shown = keep(shown, pl.col("body") != "", "articles without a body")
    shown = shown.with_columns(completion=pl.coalesce("rewritten", "headline"))
    shown = keep(shown, pl.col("completion") != "", "articles without a headline")
    shown = keep(shown, ~pl.col("known"), "articles in the user's history already")
    once = ["user_id", "item_id"]
    own = pl.col("source") == "rewritten"  # a user may have written several headlines for one article
    first = own | (pl.int_range(pl.len()).over(*once, "label") == 0)
    shown = keep(shown.sort("visit", maintain_order=True), first, "articles shown to the user before")
    taken = shown.filter("label").select(once).unique().with_columns(taken=True)
    shown = shown.join(taken, on=once, how="left", maintain_order="left")
    shown = keep(shown, pl.col("label") | pl.col("taken").is_null(), "clicked another time")
    of_articles, of_users = parts
    shown = shown.join(of_articles.rename({"article_id": "item_id"}), on="item_id", how="left", maintain_order="left")
    if of_users.height:
        shown = shown.join(of_users, on="user_id", how="left", maintain_order="left")
        shown = keep(shown, (pl.col("part") == "test") == pl.col("tested"), "user and article of different parts")
    else:
        same = pl.col("split") == pl.col("part")
        held = (pl.col("split") == "train") & (pl.col("part") == "validation") & (news.kind == "mind")
        shown = keep(shown, same | held, "articles of a later part")
    draw = pl.Series("draw", np.random.default_rng([seed, 2]).random(shown.height))
    rank = pl.col("draw").rank("ordinal").over("visit", "label", "source")
    most = pl.when(pl.col("source") == "impression").then(pl.when("label").then(clicked).otherwise(passed))
    shown = keep(shown.with_columns(draw), (rank <= most).fill_null(True), "beyond the most of an impression")
    kind = pl.when(pl.col("label")).then(pl.lit("clicked")).otherwise(pl.lit("passed"))
    place = pl.int_range(pl.len()).over("visit", "item_id").cast(pl.String)  # of several own headlines
    name = pl.concat_str(pl.col("visit").cast(pl.String), "item_id", kind, separator="-")
    return shown.select(
        "visit",
        "user_id",
        "timestamp",
        "item_id",
        "label",
        "completion",
        "body",
        "category",
        "source",
        example_id=pl.when(place == "0").then(name).otherwise(name + "-" + place),
        group="item_id",
        split="part",
    )


def _shown(visits: pl.DataFrame, column: str, label: bool, source: str) -> pl.DataFrame:
    """One row for each article of a visit's list, with the user's own headline where there is one."""
    own = pl.col("rewritten") if column == "clicked" else pl.lit(None, pl.List(pl.String)).alias("rewritten")
    there = visits.filter(pl.col(column).list.len() > 0)
    some = there.select("visit", "user_id", "timestamp", "split", "history", own, item_id=column)
    none = pl.col("item_id").list.eval(pl.lit(None, pl.String))
    some = some.with_columns(rewritten=pl.coalesce("rewritten", none)).explode("item_id", "rewritten")
    known = pl.col("history").list.contains(pl.col("item_id"))
    return some.with_columns(known=known, label=pl.lit(label), source=pl.lit(source)).drop("history")


def _dealt(count: int, shares: tuple[float, ...], random: np.random.Generator) -> np.ndarray:
    """A part's number for each of ``count`` things, the parts' sizes as near to the shares as can be."""
    bounds = np.round(np.cumsum(shares) / sum(shares) * count).astype(np.int64)
    return np.searchsorted(bounds, random.permutation(count), side="right").astype(np.int64)


def _cut(column: str, most: int) -> pl.Expr:
    """A text of at most so many characters, whole words unless the first one is longer."""
    text = pl.col(column)
    head = text.str.slice(0, most + 1)
    short = head.str.replace(r"\s+\S*$", "")
    words = pl.when(short.str.len_chars() > most).then(text.str.slice(0, most)).otherwise(short)
    return pl.when(text.str.len_chars() <= most).then(text).otherwise(words)


def _listed(faults: list[str], left_out: Counter[str]) -> str:
    told = [*faults, *(f"{count:,} {reason}" for reason, count in left_out.items() if count)]
    return f" (left out: {'; '.join(told)})" if told else ""


def _told(
    news: News, visits: pl.DataFrame, table: pl.DataFrame, vectors: pl.DataFrame, left_out: Counter[str]
) -> list[str]:
    """What was made and what was not, line by line."""
    empty = news.visits.filter(pl.col("history").list.len() == 0).height
    clicks = news.visits.unique("user_id", keep="first")["history"].list.len().sum()
    lines = [
        f"{news.kind}: {news.articles.height:,} articles, {news.visits.height:,} impressions of "
        f"{news.visits['user_id'].n_unique():,} users, {clicks:,} clicks in their histories; impressions without a "
        f"history: {empty:,}"
    ]
    lines += [f"left out: {count:,} {reason}" for reason, count in left_out.items() if count]
    for part in SPLITS:
        rows = table.filter(pl.col("split") == part)
        yes, no = rows.filter("label").height, rows.filter(~pl.col("label")).height
        past = rows.filter(pl.col("source") == "history").height
        lines.append(
            f"examples {part}: {yes:,} clicked ({past:,} of them from histories), {no:,} passed over, of "
            f"{rows['user_id'].n_unique():,} users and {rows['item_id'].n_unique():,} articles"
        )
    blind = visits.filter(pl.col("visit").is_in(table["visit"].unique().implode()))["user_id"].n_unique()
    lines.append(f"vectors: {vectors.height:,} for {vectors['user_id'].n_unique():,} of {blind:,} users")
    return lines
