"""Your own data without code: a table whose columns have other names -> example and embedding tables, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from e2p.config import DataConfig, RunConfig, SplitConfig
from e2p.config_io import save_yaml
from e2p.data.asof import asof_rows
from e2p.data.sources import Table, open_table
from e2p.data.splits import resolve_splits
from e2p.data.tables import example_batches, example_keys, open_embeddings
from e2p.errors import ConfigError, DataError
from e2p.tasks.output import staged_folder
from e2p.tasks.table_examples import Plan, plan_examples, write_examples
from e2p.tasks.table_rows import BadRows
from e2p.tasks.table_times import clock_of
from e2p.tasks.table_vectors import VectorOptions, encode_profiles, write_vectors


def prepare(
    source: str,
    output: str,
    embeddings: str = "",
    user_id: str = "",
    prompt: str = "",
    completion: str = "",
    messages: str = "",
    profile: str = "",
    label: str = "",
    timestamp: str = "",
    group: str = "",
    item_id: str = "",
    example_id: str = "",
    split: str = "",
    engaged: tuple[str, ...] = (),
    not_engaged: tuple[str, ...] = (),
    time_format: str = "",
    time_zone: str = "",
    vector_columns: tuple[str, ...] = (),
    vector_user_id: str = "",
    vector_timestamp: str = "",
    vector_time_format: str = "",
    vector_time_zone: str = "",
    version: str = "",
    encoder: str = "",
    pooling: Literal["mean", "last"] = "mean",
    bad_rows: Literal["stop", "skip"] = "stop",
    drop: tuple[str, ...] = (),
    drop_others: bool = False,
    overwrite: bool = False,
) -> Path:
    """Make example and embedding tables out of any table, whatever its columns are called.

    Each of the fields from --user_id to --split is a column's name, a template over columns such as "Write a headline
    for: {body}", or a fixed text after an equals sign such as "=What shall I play?". Not given, it is the column of the
    field's own name, if there is one. In a template {{ and }} are braces; where one of its columns is empty, so is the
    field.

    Args:
        source: CSV, JSON Lines or Parquet: a path, a folder, a glob, or an s3://, gs:// or hf:// address.
        output: folder for the tables.
        embeddings: the table with the users' vectors; not given: they stand in the source, or an encoder makes them.
        user_id: whose example it is.
        prompt: what is asked.
        completion: what is answered.
        messages: a column of lists of {role, content}, or of JSON of them, instead of a prompt.
        profile: what is known of the user, as text, for the prompt arms and for an encoder.
        label: a column that says engaged or not.
        timestamp: a column with the time of the example.
        group: what must not stand in two parts of the split; the user if not given.
        item_id: what the example is about.
        example_id: the example's id; the row's number if not given.
        split: train, validation or test.
        engaged: values of the label that mean engaged, with commas; not given: true, 1.
        not_engaged: values that mean not engaged; not given: false, 0, or all others where engaged is given.
        time_format: how times are written: seconds, milliseconds or microseconds since 1970, or a strptime format such
            as '%m/%d/%Y %I:%M:%S %p'; not given: ISO 8601.
        time_zone: zone of the times that name none, such as UTC. Without it such times are refused.
        vector_columns: one column with lists, or texts of numbers; or a column for each number, named one by one with
            commas or by a pattern such as 'f*', which is read in the order f2, f10; not given: embedding.
        vector_user_id: of the table of vectors; not given: the column that user_id names, or user_id.
        vector_timestamp: since when there was that vector; a user may have several then.
        vector_time_format: as time_format, of the vectors.
        vector_time_zone: as time_zone, of the vectors.
        version: name of the vectors' space: as the fields above.
        encoder: makes vectors of the profiles: minilm, a sentence-transformers model, or a causal LM.
        pooling: of a causal LM: the mean over a text's tokens, or the last token's state.
        bad_rows: stop at the first row that cannot be used, or skip such rows and count them by reason.
        drop: columns of the source to do without, as if they were not there.
        drop_others: leave out the columns that no field is made of; else they are kept under their names.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: an option names no column, or options do not fit each other.
        DataError: a table or a row cannot be used; the message has file, row and the source's column.
        RunError: the output exists.
    """
    if encoder and (embeddings or vector_columns):
        raise ConfigError("encoder: expected no --embeddings and --vector_columns beside it, got both; drop one")
    wanted = {
        "user_id": user_id,
        "prompt": prompt,
        "completion": completion,
        "messages": messages,
        "profile": profile,
        "label": label,
        "group": group,
        "item_id": item_id,
        "example_id": example_id,
        "split": split,
    }
    skip = bad_rows == "skip"
    with staged_folder(output, overwrite) as folder:
        table = _without(open_table(source), drop)
        clock = clock_of(timestamp, table, time_format, time_zone)
        plan = plan_examples(table, wanted, engaged, not_engaged, clock)
        options = VectorOptions(
            vector_columns, vector_user_id, vector_timestamp, vector_time_format, vector_time_zone, version
        )
        vectors = None if encoder else options.source(open_table(embeddings) if embeddings else None, plan)
        if encoder and options != VectorOptions():
            raise ConfigError("vector_*, version: expected none beside --encoder, got some; drop them")
        plan.keep_others(() if vectors is None or embeddings else vectors.own, drop_others)
        timed = vectors is not None and vectors.clock is not None
        report = write_examples(plan, folder / "examples.parquet", BadRows(skip), timed)
        if vectors is not None:
            bad = BadRows(skip)
            rows, written, merged, dim = write_vectors(vectors, folder / "embeddings.parquet", bad)
            equal = f", {merged:,} equal ones of a user merged" if merged else ""
            report += [f"vectors: {written:,} of {dim} numbers{equal}", *bad.report("vectors", rows)]
        elif encoder:
            if "profile" not in plan.texts:
                raise table.fault("expected a profile to encode; name its column by --profile")
            said = f"{table.name}: {plan.texts['profile'].said}"
            written, dim = encode_profiles(folder, encoder, pooling, said)
            report.append(f"vectors: {written:,} of {dim} numbers, made of profiles")
        else:
            report.append("vectors: none; pass --embeddings, --vector_columns or --encoder before you train")
        with_vectors = vectors is not None or bool(encoder)
        found, missing = _validate(folder, with_vectors, plan)
        config = recommended(output, with_vectors, missing)
        save_yaml(config, folder / "config.yaml")
    print("\n".join([f"{output}: {report[0]}", *report[1:], *found]))
    return Path(output)


def recommended(output: str | Path, with_vectors: bool = True, missing: bool = False) -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet") if with_vectors else "",
        missing_vector="null" if missing else "error",
    )
    return RunConfig(data=data, output=f"runs/{folder.name}")


def _without(table: Table, drop: Sequence[str]) -> Table:
    unknown = [name for name in drop if name not in table.schema]
    if unknown:
        columns = ", ".join(table.schema)
        raise ConfigError(f"drop: expected columns of {table.name}, got {unknown[0]!r}; it has {columns}")
    kept = {name: dtype for name, dtype in table.schema.items() if name not in drop}
    return Table(table.name, table.kind, table.files, kept)


def _validate(folder: Path, with_vectors: bool, plan: Plan) -> tuple[list[str], bool]:
    """What `e2p train` will check of these tables, checked now; and whether some examples have no vector."""
    examples, embeddings = str(folder / "examples.parquet"), str(folder / "embeddings.parquet")
    try:
        for _ in example_batches(examples):
            pass
        keys = example_keys(examples)
        resolve_splits(keys, SplitConfig())
        report = [f"users: {keys['user_id'].n_unique():,} in {keys['group'].n_unique():,} groups"]
        if not with_vectors:
            return report, False
        held = open_embeddings(embeddings, folder.parent / "cache")
        if len(held.versions) > 1:
            raise DataError(
                f"version: expected vectors of one version, got {', '.join(held.versions)}; two versions are two "
                "unrelated spaces: keep the rows of one"
            )
        joined = asof_rows(keys, held)
    except DataError as error:
        text = str(error).replace(examples, "examples").replace(embeddings, "embeddings")
        raise DataError(f"{plan.table.name}: {text}{plan.in_its_words()}") from None
    missing = int((joined.rows < 0).sum())
    if missing:
        report.append(
            f"examples without a vector: {missing:,}, {joined.unknown_user:,} by users who have none, "
            f"{joined.too_early:,} older than it; the first in examples.parquet is {joined.first_missing}. "
            "They get the null user (data.missing_vector)"
        )
    return report, missing > 0
