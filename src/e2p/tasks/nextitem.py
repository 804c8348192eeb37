"""Next item by semantic ids: public stand-ins for the paper's podcast task.

The paper (Appendix F) predicts a listener's next podcast, written as semantic ids, from 2,000,000 pairs of a streaming
service with vectors that were current at each pair's time; those are not public. Here a language model is taught the
codes of a catalogue on an early stage of the interactions, frozen, and phi is trained on a later one.

What decides about leakage:

- Four stages follow each other, for all or within each user: backbone, phi, validation, test. Item vectors, codes made
  of them, and what the backbone is adapted to come of the first one alone. No later interaction changes a bit of them.
- A user's vector is of an example's own time and sees what that user did strictly before it, folded into the space of
  the first stage. So do prompt and profile.
- Popularity counts the first two stages.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl

from e2p.config import DataConfig, RunConfig
from e2p.config_evaluation import EvaluationConfig, NextItemConfig
from e2p.config_io import save_yaml
from e2p.data.splits import SPLITS
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError
from e2p.items.semantic_ids import SemanticIds
from e2p.tasks.nextitem_files import Histories, read
from e2p.tasks.nextitem_items import CodeVectors, Floats, in_space, make_codes, ready_codes
from e2p.tasks.nextitem_stages import STAGES, Split, adapt_targets, staged, targets
from e2p.tasks.nextitem_texts import Writer
from e2p.tasks.output import staged_folder
from e2p.users.asof_vectors import als_space, vectors_before

# Chosen by recall of validation targets by the dot product, 64 numbers, of 1 to 200 and regularization 0.1 to 1000.
# Beauty, recall@10 (popularity 0.015): alpha 1 0.050, 5 0.055, 20 0.059, 50 0.060, 100 0.060; 128 numbers 0.068.
# Industrial (0.040): 1 0.063, 5 0.073, 20 0.083, 50 0.085. MovieLens, recall@30 (0.108): 1 0.116, 10 0.112, 50 0.095.
# Cosine finds less everywhere: a factor's length is part of the affinity.
ALPHA = {"movielens": 1.0, "sequences": 50.0, "minionerec": 50.0}


def prepare(
    source: str,
    output: str,
    split: Split = "auto",
    shares: tuple[float, ...] = (0.55, 0.2, 0.05, 0.2),
    phi_targets: int = 1,
    code_vectors: CodeVectors = "auto",
    encoder: str = "minilm",
    sizes: tuple[int, ...] = (),
    separating: int = 256,
    codes: str = "",
    window: int = 20,
    stride: int = 0,
    min_history: int = 1,
    most_per_user: int = 0,
    most_tested_per_user: int = 0,
    most_test_users: int = 0,
    dimension: int = 64,
    regularization: float = 10.0,
    alpha: float | None = None,
    iterations: int = 15,
    seed: int = 42,
    overwrite: bool = False,
) -> Path:
    """Make next-item examples, item codes and behavioural vectors from MovieLens, TIGER's sequences or MiniOneRec.

    Writes adapt.parquet (what e2p adapt teaches a backbone the codes with), codes/, examples.parquet and
    embeddings.parquet (for phi: a vector for each example), items.parquet (item vectors in the users' space: the dot
    product is the affinity), interactions.parquet, and a config to train with. An interaction counts 1, whatever stars
    a rating has.

    Args:
        source: folder with ratings.csv and movies.csv (MovieLens), with sequential.txt (TIGER, P5), or with
            valid_*.csv, test_*.csv, *.item.json and *.index.json (MiniOneRec).
        output: folder for the tables.
        split: time: stages by shares of all interactions; leave_one_out: of each user the last interaction is for test,
            the one before for validation; auto: time where the files have times, MiniOneRec's own parts, else
            leave_one_out.
        shares: by time, of the stages backbone, phi, validation and test.
        phi_targets: leave_one_out: a user's interactions before the validation one that phi is trained on.
        code_vectors: what codes are made of: text (titles and the like), behaviour (item vectors of the backbone's
            stage), or both; auto: ready codes if they came along, else text, else behaviour.
        encoder: of the texts: minilm, a sentence-transformers model, or a causal LM.
        sizes: codes of each level, the separating one not counted; none: 256,256, or what ready codes need.
        separating: codes of the level that tells items with equal codes apart.
        codes: JSON file of ready codes, for any files.
        window: most items in a prompt.
        stride: items from one of a user's rows in adapt.parquet to the next; 0: half the window.
        min_history: earlier interactions that a target must have.
        most_per_user: most training examples of a user, evenly spread; 0: all.
        most_tested_per_user: the same of validation and test examples.
        most_test_users: most users in test, drawn; 0: all.
        dimension: numbers in a vector.
        regularization: of the factors.
        alpha: how much an interaction counts, where none counts 1; not given: 1 for MovieLens, 50 for the others, whose
            users have done little.
        iterations: passes of ALS.
        seed: of all that is drawn, and of the factors and codes.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a file is missing or not as documented; the message has file and line or row. Or too little data.
        RunError: the output exists.
        MissingExtraError: implicit, faiss or the encoder's package is not installed.
    """
    for name, value, least in (
        ("phi_targets", phi_targets, 1),
        ("window", window, 1),
        ("stride", stride, 0),
        ("min_history", min_history, 1),
        ("most_per_user", most_per_user, 0),
        ("most_tested_per_user", most_tested_per_user, 0),
        ("most_test_users", most_test_users, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value}; raise it")
    if len(shares) != len(STAGES) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares: expected four numbers > 0 that sum to 1, got {list(shares)}; one a stage")
    if codes and code_vectors != "auto":
        raise ConfigError(f"code_vectors: expected auto where codes come from {codes}, got {code_vectors!r}; drop one")
    with staged_folder(output, overwrite) as folder:
        data = read(source)
        log = staged(data, split, tuple(shares), phi_targets, seed).with_columns(weight=pl.lit(1.0))
        first = log.filter(pl.col("stage") == "backbone")
        strength = ALPHA[data.kind] if alpha is None else alpha
        space = als_space(first, dimension, regularization, strength, iterations, seed)
        ready = codes or (data.codes if code_vectors == "auto" else None)
        if ready:
            ids, items = ready_codes(ready, data, tuple(sizes), separating)
        else:
            ids, items = make_codes(data, space, code_vectors, encoder, tuple(sizes), separating, seed)
        rows = pl.DataFrame({"item_id": ids.ids}).with_row_index("row").cast({"row": pl.Int64})
        log = log.join(rows, on="item_id", how="left", maintain_order="left")
        writer = Writer.of(log, items, ids, data.kind)
        asked, lost = targets(log, min_history, most_per_user, most_tested_per_user, most_test_users, seed)
        adapting = adapt_targets(log, stride or max(1, window // 2), seed)
        examples = _examples(asked, writer, window)
        named = pl.concat_str("user_id", "place", separator="-")
        grouped = pl.concat_str("user_id", "split", separator=":")
        vectors, seen = vectors_before(log, asked, space)
        some = seen > 0
        version = f"{data.kind}-{space.version}"
        write_frame(folder / "adapt.parquet", _examples(adapting, writer, window).drop("place"))
        write_frame(folder / "examples.parquet", examples.with_columns(example_id=named, group=grouped).drop("place"))
        kept = asked.filter(pl.Series(some))
        write_embeddings(folder / "embeddings.parquet", kept["user_id"], vectors[some], kept["timestamp"], version)
        write_frame(folder / "items.parquet", _catalogue(items, log, in_space(items["item_id"], space)))
        write_frame(folder / "interactions.parquet", log.select("user_id", "item_id", "timestamp", "stage"))
        ids.save(folder / "codes")
        save_yaml(recommended(output, window), folder / "config.yaml")
    blind = Counter(asked.filter(pl.Series(~some))["split"].to_list())
    for line in _told(data, log, space.items, examples, adapting, lost, blind, window):
        print(line)
    print(_codes_told(ids))
    return Path(output)


def recommended(output: str | Path, window: int = 20) -> RunConfig:
    """Settings to train on the prepared tables with; the backbone, adapted to the codes, is for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet"),
        missing_vector="null",
        max_completion_tokens=16,
        profile_template="persona: {profile}",
    )
    judged = NextItemConfig(
        items=str(folder / "items.parquet"),
        codes=str(folder / "codes"),
        interactions=str(folder / "interactions.parquet"),
        window=window,
    )
    return RunConfig(data=data, evaluation=EvaluationConfig(next_item=judged), output="runs/nextitem")


def _examples(asked: pl.DataFrame, writer: Writer, window: int) -> pl.DataFrame:
    """Example table of targets, with the place of each among its user's interactions."""
    at = asked["at"].to_numpy().astype("int64")
    columns = [writer.prompts(at, window), writer.completions(at).alias("completion")]
    profile = writer.profiles(at)
    columns += [] if profile is None else [profile]
    return asked.select("user_id", "timestamp", "item_id", "split", "place").with_columns(columns)


def _catalogue(items: pl.DataFrame, log: pl.DataFrame, vectors: Floats) -> pl.DataFrame:
    """item_id, item, embedding and popularity, in the order of the codes."""
    early = log.filter(pl.col("stage").is_in(["backbone", "phi"]))
    counts = early.group_by("item_id").agg(popularity=pl.len().cast(pl.Int64))
    table = items.select("item_id", "item").with_columns(embedding=pl.Series(vectors))
    return table.join(counts, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col("popularity").fill_null(0)
    )


def _told(
    data: Histories,
    log: pl.DataFrame,
    known: pl.Series,
    examples: pl.DataFrame,
    adapting: pl.DataFrame,
    lost: Counter[tuple[str, str]],
    blind: Counter[str],
    window: int,
) -> list[str]:
    """What was made and what was not, line by line."""
    lines = [
        f"{data.kind}: {log.height:,} interactions of {log['user_id'].n_unique():,} users with "
        f"{log['item_id'].n_unique():,} items, {data.items.height:,} in the catalogue"
    ]
    lines += [f"left out: {count:,} {reason}" for reason, count in data.left_out.items() if count]
    for stage in STAGES:
        rows = log.filter(pl.col("stage") == stage)
        new = rows.filter(~pl.col("item_id").is_in(known.implode())).height
        seen = f", {new:,} with items that the backbone's stage has not" if stage != "backbone" else ""
        lines.append(f"stage {stage}: {rows.height:,} interactions of {rows['user_id'].n_unique():,} users{seen}")
    users, adapted = (frame["user_id"].n_unique() for frame in (log.filter(pl.col("stage") == "backbone"), adapting))
    validating = adapting.filter(pl.col("split") == "validation").height
    lines.append(
        f"adapt: {adapting.height:,} rows of {adapted:,} users, {validating:,} of them for validation (left out: "
        f"{users - adapted:,} users with one interaction)"
    )
    for part in SPLITS:
        rows = examples.filter(pl.col("split") == part)
        gone = [f"{count:,} {reason}" for (where, reason), count in lost.items() if where == part]
        cut = rows.filter(pl.col("place") > window).height
        lines.append(
            f"examples {part}: {rows.height:,} of {rows['user_id'].n_unique():,} users (left out: "
            f"{', '.join(gone) or 'none'}; history cut to {window} items: {cut:,}; no vector, for nothing before is in "
            f"the space: {blind[part]:,})"
        )
    return lines


def _codes_told(ids: SemanticIds) -> str:
    report = ids.report()
    shared, error = report["collisions"], report["reconstruction_error"]
    levels = ", ".join(
        f"{level['used']}/{level['size']} (perplexity {level['perplexity']:.0f})" for level in report["levels"]
    )
    left = "ready" if error is None else f"{error:.3f} of the variance left over"
    return (
        f"codes: {report['items']:,} items, used by level {levels}; {shared['items']:,} items share all but the last "
        f"code, at most {shared['largest']}; {left}"
    )
