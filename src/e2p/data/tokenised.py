"""Examples tokenised once into memory-mapped Arrow, keyed by content: two million need no more memory than twenty
thousand, and a second run starts at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from e2p.data.tables import content_key, example_batches
from e2p.data.templates import TextEncoder
from e2p.errors import DataError

_FORMAT = "tokenised-3"
_CHUNK_ROWS = 1024  # as Python lists, ids take ten times their size on disk
_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("completion", pa.list_(pa.int32())),
        ("after_bos", pa.int32()),
        ("after_system", pa.int32()),
        ("bytes", pa.int32()),
        ("profile_tokens", pa.int32()),
        ("cut_prompt", pa.int32()),
        ("cut_completion", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One tokenised example: ids, and the indices in the prompt behind BOS and behind the system turn."""

    prompt: npt.NDArray[np.int32]
    completion: npt.NDArray[np.int32]
    after_bos: int
    after_system: int


class TokenisedExamples:
    """Read-only view of a tokenised table on disk. Rows are views into the memory map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow"))).read_all()
        self._prompt = _Lists(table["prompt"])
        self._completion = _Lists(table["completion"])
        self._small = {
            name: table[name].to_numpy()
            for name in (
                "after_bos",
                "after_system",
                "bytes",
                "profile_tokens",
                "cut_prompt",
                "cut_completion",
            )
        }

    def __len__(self) -> int:
        return len(self._prompt)

    def __getitem__(self, index: int) -> Row:
        small = self._small
        return Row(
            self._prompt[index],
            self._completion[index],
            int(small["after_bos"][index]),
            int(small["after_system"][index]),
        )

    @cached_property
    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens in each prompt [N]."""
        return self._prompt.lengths

    @cached_property
    def completion_lengths(self) -> npt.NDArray[np.int32]:
        """Labelled tokens in each completion [N]."""
        return self._completion.lengths

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of the per-example numbers: bytes, profile_tokens, cut_prompt, cut_completion."""
        return self._small[name]


class ProfiledInPart(TokenisedExamples):
    """Some rows of a table with their profile in the prompt, the others without.

    Args:
        plain: the table without profiles.
        profiled: the same table with them.
        shown: which rows are taken from the latter [N].
    """

    def __init__(self, plain: TokenisedExamples, profiled: TokenisedExamples, shown: npt.NDArray[np.bool_]) -> None:
        self.folder, self._completion, self._small = plain.folder, plain._completion, plain._small
        self._plain, self._profiled, self._shown = plain, profiled, shown

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, index: int) -> Row:
        return (self._profiled if self._shown[index] else self._plain)[index]

    @cached_property
    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens in each prompt [N]."""
        return np.where(self._shown, self._profiled.prompt_lengths, self._plain.prompt_lengths)


class _Lists:
    """Random access to a chunked list column without copying: offsets and values of each chunk as numpy views."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        sizes = [len(offsets) - 1 for offsets in self._offsets]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - int(self._starts[chunk])
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[at] : offsets[at + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        if not self._offsets:
            return np.zeros(0, np.int32)
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int32)


def tokenise(source: str, encoder: TextEncoder, cache_dir: Path, *, with_profile: bool = False) -> TokenisedExamples:
    """Tokenise an example table, or open what an earlier call has left for the same content and settings.

    Args:
        source: example table, as in :func:`e2p.data.tables.example_batches`.
        encoder: tokenizer and settings.
        cache_dir: tokens go to ``cache_dir/tokens/<key>``.
        with_profile: put each row's profile into its prompt (the ``prompt`` arms).

    Raises:
        DataError: with source and row, for a row that cannot be encoded, or for a table without profiles if they
            are asked for.
    """
    folder = cache_dir / "tokens" / content_key(source, _FORMAT, str(with_profile), _fingerprint(encoder))
    if not (folder / "tokens.arrow").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="half-"))
        except OSError as error:
            raise DataError(f"{folder.parent}: tokens cannot be kept there: {error}; set data.cache_dir") from None
        try:
            _write(source, encoder, temporary / "tokens.arrow", with_profile)
            try:
                os.replace(temporary, folder)
            except OSError:  # another process was faster; its tokens are the same
                if not (folder / "tokens.arrow").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return TokenisedExamples(folder)


def _write(source: str, encoder: TextEncoder, path: Path, with_profile: bool) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for frame in example_batches(source):
            for part in frame.iter_slices(_CHUNK_ROWS):
                rows = list(_encoded(source, part, encoder, with_profile))
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))


def _encoded(source: str, frame: Any, encoder: TextEncoder, with_profile: bool) -> Iterator[dict[str, Any]]:
    for row in frame.iter_rows(named=True):
        where = f"{source}: row {row['row']} (user {row['user_id']})"
        prompt = row["messages"] if row["messages"] is not None else row["prompt"]
        profile = row["profile"] if with_profile else None
        if with_profile and not profile:
            raise DataError(
                f"{where}: expected a text in column 'profile', got none; prompt arms, objective.distill and "
                "training.profile_share need it"
            )
        try:
            encoded = encoder.prompt(prompt, profile)
            completion = encoder.completion(prompt, encoded, row["completion"])
            added = encoded.full - encoder.prompt(prompt).full if profile else 0
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        end = encoder.tokenizer.eos_token_id
        was_cut = len(completion) == encoder.max_completion_tokens and completion[-1] != end
        # Bits per byte compares like with like: of a cut completion only the text that is labelled counts.
        text = encoder.tokenizer.decode(completion) if was_cut else row["completion"]
        yield {
            "prompt": encoded.ids,
            "completion": completion,
            "after_bos": encoded.after_bos,
            "after_system": encoded.after_system,
            "bytes": len(text.encode()),
            "profile_tokens": added,
            "cut_prompt": encoded.cut,
            "cut_completion": was_cut,
        }


def _fingerprint(encoder: TextEncoder) -> str:
    """Everything about the tokenizer and the settings that changes ids."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    parts = [
        # Truncation and padding are not used here, but another caller of the tokenizer may have left them set.
        {key: value for key, value in state.items() if key not in ("truncation", "padding")},
        getattr(tokenizer, "chat_template", None),
        encoder.plain_as_chat,
        encoder.profile_template,
        encoder.max_prompt_tokens,
        encoder.max_completion_tokens,
        encoder.long_prompt,
        tokenizer.eos_token,
        tokenizer.bos_token,
    ]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()
