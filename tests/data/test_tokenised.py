"""The tokenised table equals encoding row by row, is made once, and needs no more memory for more rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.data import tokenised
from e2p.data.templates import TextEncoder
from e2p.data.tokenised import TokenisedExamples, tokenise
from e2p.errors import DataError
from tiny import TEMPLATE, tiny_tokenizer

ROWS = 50


def write(path: Path, rows: int = ROWS, **columns: Any) -> str:
    frame = pl.DataFrame(
        {
            "user_id": [f"u{i % 7}" for i in range(rows)],
            "prompt": [f"make a playlist {i}" for i in range(rows)],
            "completion": ["soul " * (i % 9 + 1) for i in range(rows)],
            "profile": [f"likes jazz {i % 4}" for i in range(rows)],
        }
    )
    frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()}).write_parquet(path)
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "examples.parquet")


@pytest.fixture
def encoder(tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer, max_prompt_tokens=60, max_completion_tokens=6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that were encoded."""
    seen: list[str] = []
    original = TextEncoder.prompt

    def prompt(self: TextEncoder, text: Any, profile: str | None = None) -> Any:
        seen.append(text)
        return original(self, text, profile)

    monkeypatch.setattr(TextEncoder, "prompt", prompt)
    return seen


def compare(table: TokenisedExamples, source: str, encoder: TextEncoder, with_profile: bool = False) -> None:
    frame = pl.read_parquet(source)
    assert len(table) == len(frame)
    for index, row in enumerate(frame.iter_rows(named=True)):
        profile = row["profile"] if with_profile else None
        prompt = encoder.prompt(row["prompt"], profile)
        completion = encoder.completion(row["prompt"], prompt, row["completion"])
        got = table[index]
        assert got.prompt.tolist() == prompt.ids
        assert got.completion.tolist() == completion
        assert (got.after_bos, got.after_system) == (prompt.after_bos, prompt.after_system)
        assert table.prompt_lengths[index] == len(prompt.ids)
        assert table.completion_lengths[index] == len(completion)
        # Of a cut completion only the labelled text counts: bits per byte has the same text above and below.
        labelled = row["completion"] if completion[-1] == 1 else encoder.tokenizer.decode(completion)
        assert table.column("bytes")[index] == len(labelled.encode())
        assert table.column("cut_completion")[index] == (completion[-1] != 1)
        assert table.column("cut_prompt")[index] == 0
        added = len(prompt.ids) - len(encoder.prompt(row["prompt"]).ids)
        assert table.column("profile_tokens")[index] == added
        assert (added > 0) == with_profile


@pytest.mark.parametrize("with_profile", [False, True])
def test_equals_encoding_row_by_row(source: str, encoder: TextEncoder, tmp_path: Path, with_profile: bool) -> None:
    compare(tokenise(source, encoder, tmp_path, with_profile=with_profile), source, encoder, with_profile)


def test_equals_it_over_several_chunks_too(
    source: str, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = tokenised.example_batches
    monkeypatch.setattr(tokenised, "example_batches", lambda path: batches(path, rows=7))
    table = tokenise(source, encoder, tmp_path)
    assert len(table._prompt._values) == -(-ROWS // 7)
    compare(table, source, encoder)
    for index in (-1, ROWS, ROWS + 5):
        with pytest.raises(IndexError):
            table[index]


def test_rows_are_views_into_the_file(source: str, encoder: TextEncoder, tmp_path: Path) -> None:
    row = tokenise(source, encoder, tmp_path)[3]
    assert not row.prompt.flags.owndata
    assert not row.prompt.flags.writeable
    assert row.prompt.dtype == np.int32


def test_messages_are_tokenised_as_prompts_are(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"user_id": "u", "messages": turns, "completion": "soul"}) + "\n")
    encoder = TextEncoder(tokenizer)
    row = tokenise(str(path), encoder, tmp_path)[0]
    assert row.prompt.tolist() == encoder.prompt(turns).ids
    assert row.after_system == encoder.prompt(turns).after_system > 1


def test_the_second_call_tokenises_nothing(source: str, encoder: TextEncoder, tmp_path: Path, calls: list[str]) -> None:
    first = tokenise(source, encoder, tmp_path)
    assert len(calls) == ROWS
    encoder.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)  # what another caller may leave behind
    same = tiny_tokenizer()
    for again in (encoder, TextEncoder(same, max_prompt_tokens=60, max_completion_tokens=6)):
        assert tokenise(source, again, tmp_path).folder == first.folder
    moved = Path(source).rename(tmp_path / "elsewhere.parquet")
    assert tokenise(str(moved), encoder, tmp_path).folder == first.folder
    assert len(calls) == ROWS


def test_any_other_content_or_setting_is_another_entry(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.parquet")
    other_text = write(tmp_path / "b.parquet", completion=["x"] * ROWS)
    other_prompt = write(tmp_path / "c.parquet", prompt=["x"] * ROWS)
    base = {"max_prompt_tokens": 60, "max_completion_tokens": 6}
    merged = tiny_tokenizer(TEMPLATE)
    merged.add_tokens(["playlist"])
    folders = [
        tokenise(path, TextEncoder(chosen, **{**base, **changes}), tmp_path, with_profile=profile).folder
        for path, chosen, changes, profile in [
            (source, tokenizer, {}, False),
            (source, tokenizer, {}, True),
            (source, tokenizer, {"profile_template": "P: {profile}"}, True),
            (other_text, tokenizer, {}, False),
            (other_prompt, tokenizer, {}, False),
            (source, tokenizer, {"max_prompt_tokens": 61}, False),
            (source, tokenizer, {"max_completion_tokens": 7}, False),
            (source, tokenizer, {"long_prompt": "truncate"}, False),
            (source, tokenizer, {"chat": "never"}, False),
            (source, tiny_tokenizer(TEMPLATE + " "), {}, False),
            (source, merged, {}, False),
        ]
    ]
    assert len(set(folders)) == len(folders)


def test_what_an_interrupted_run_has_left_is_not_read(
    source: str, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "_encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenise(source, encoder, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []
    killed = tmp_path / "tokens" / "half-killed"  # a process that could not even tidy up
    killed.mkdir()
    (killed / "tokens.arrow").write_bytes(b"half")
    compare(tokenise(source, encoder, tmp_path), source, encoder)


def test_two_processes_at_once_agree(
    source: str, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds the folder there when it comes to rename its own."""
    original, folders = tokenised._write, []

    def slow(*arguments: Any) -> None:
        original(*arguments)
        if not folders:
            folders.append(None)
            folders[0] = tokenise(source, encoder, tmp_path).folder

    monkeypatch.setattr(tokenised, "_write", slow)
    table = tokenise(source, encoder, tmp_path)
    assert table.folder == folders[0]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [table.folder.name]


@pytest.mark.parametrize(
    ("columns", "with_profile", "message"),
    [
        ({"prompt": ["hello"] * 4 + ["long " * 99] + ["hello"] * 45}, False, "expected a prompt of at most 60 tokens"),
        ({"profile": ["x"] * 4 + [None] + ["x"] * 45}, True, "expected a text in column 'profile'"),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named(
    tmp_path: Path, encoder: TextEncoder, columns: dict[str, Any], with_profile: bool, message: str
) -> None:
    source = write(tmp_path / "examples.parquet", **columns)
    with pytest.raises(DataError, match=message) as caught:
        tokenise(source, encoder, tmp_path, with_profile=with_profile)
    assert str(caught.value).startswith(f"{source}: row 4 (user u4): ")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(source: str, encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        tokenise(source, encoder, tmp_path / "file")


_MEASURE = """
import re, sys
from pathlib import Path
from tiny import tiny_tokenizer
from e2p.data.templates import EncodedPrompt, TextEncoder
from e2p.data.tokenised import tokenise

class Characters(TextEncoder):
    # Encodes at once, so that the test measures tables and not the tokenizer's speed.
    def prompt(self, prompt, profile=None):
        return EncodedPrompt([1000 + ord(c) for c in prompt], 1, 1)
    def completion(self, prompt, encoded, text):
        return [1000 + ord(c) for c in text]

source, cache = sys.argv[1:]
table = tokenise(source, Characters(tiny_tokenizer(), chat="never"), Path(cache))
assert sum(len(table[i].prompt) for i in range(0, len(table), 997)) > 0
# Not ru_maxrss: a child inherits its parent's.
print(len(table), re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_ten_times_the_rows_need_no_more_memory(tmp_path: Path) -> None:
    peaks = {}
    for rows in (20_000, 200_000):
        source = write(tmp_path / f"{rows}.parquet", rows)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        out = subprocess.run(
            [sys.executable, "-c", _MEASURE, source, str(tmp_path)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert out.returncode == 0, out.stderr
        count, peak = map(int, out.stdout.split())
        assert count == rows
        peaks[rows] = peak / 1024
    assert peaks[200_000] - peaks[20_000] < 60, f"peak MB: {peaks}"
