"""`e2p adapt`: what is labelled, what is learned, what the checkpoint holds, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from e2p.cli import main
from e2p.errors import BackboneError, ConfigError, DataError, RunError
from e2p.items.adapt import adapt, read_rows, speaking
from e2p.items.adapt_training import AdaptSettings
from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import items_text
from e2p.items.vocabulary import ADAPTED, CODES, CodeVocabulary
from tiny import EOS, tiny_model, tiny_tokenizer

ITEMS = 8
LEVELS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    tiny_model("llama", initializer_range=0.05).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ids() -> SemanticIds:
    codes = np.array([[item // 4, item % 4] for item in range(ITEMS)])
    return SemanticIds([f"i{item}" for item in range(ITEMS)], codes, (2, 4), False)


def table(path: Path, ids: SemanticIds, users: int = 60, **columns: Any) -> str:
    """Everybody goes round in steps of three, from anywhere."""
    rows = []
    for user in range(users):
        seen = [(user + 3 * step) % ITEMS for step in range(4)]
        split = "train" if user < users * 0.8 else "validation"
        rows.append({"user_id": f"u{user}", "prompt": f"next after: {items_text(ids, seen[:-1])}",
                     "completion": items_text(ids, seen[-1:]), "split": split})  # fmt: skip
    pl.DataFrame(rows).with_columns(**columns).write_parquet(path)
    return str(path)


@pytest.fixture
def place(tmp_path: Path, ids: SemanticIds) -> Path:
    ids.save(tmp_path / "codes")
    table(tmp_path / "adapt.parquet", ids)
    return tmp_path


def run(base: str, place: Path, output: str = "out", **settings: Any) -> Path:
    given = {"epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", **settings}
    adapt(base, str(place / "codes"), str(place / "adapt.parquet"), str(place / output), **given)
    return place / output


def test_labels_are_the_completion_and_the_items_in_the_prompt_but_for_the_first(
    base: str, place: Path, ids: SemanticIds
) -> None:
    _, tokenizer, fresh = speaking(base, ids, 0)
    assert fresh == 6
    rows = read_rows(str(place / "adapt.parquet"), tokenizer, ids, AdaptSettings(), 192)
    assert (len(rows["train"]), len(rows["validation"])) == (48, 12)
    for start, row in enumerate(rows["train"]):
        seen = [(start + 3 * step) % ITEMS for step in range(4)]
        codes = [tokenizer.convert_tokens_to_ids(name) for item in seen for name in ids.tokens(item)]
        labelled = [token for token in row.labels if token >= 0]
        assert labelled == [*codes[LEVELS:], EOS]
        assert [token for token in row.ids if token in codes] == codes  # a code is one token, with no space beside it
        assert all(label in (-100, token) for token, label in zip(row.ids, row.labels, strict=True))
    alone = read_rows(str(place / "adapt.parquet"), tokenizer, ids, AdaptSettings(history=False), 192)
    assert {row.labelled for row in alone["train"]} == {LEVELS + 1}


def test_a_share_of_the_rows_is_shown_with_the_profile_and_learns_the_completion_alone(
    base: str, place: Path, ids: SemanticIds
) -> None:
    """The profile tells of the items in the prompt: to learn them behind it would be to learn to read them off."""
    source = table(place / "profiled.parquet", ids, 400, profile=pl.lit("slow jazz <a_0><b_1>"))
    _, tokenizer, _ = speaking(base, ids, 0)
    word = tokenizer("About", add_special_tokens=False)["input_ids"]
    for share, low, high in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)):
        rows = read_rows(source, tokenizer, ids, AdaptSettings(profile_share=share), 192)["train"]
        told = [" ".join(map(str, word)) in " ".join(map(str, row.ids)) for row in rows]
        assert low <= np.mean(told) <= high
        for row, profiled in zip(rows, told, strict=True):
            assert row.labelled == (LEVELS + 1 if profiled else 3 * LEVELS + 1)


def test_a_cut_prompt_leaves_whole_items_to_learn_and_is_counted(base: str, place: Path, ids: SemanticIds) -> None:
    _, tokenizer, _ = speaking(base, ids, 0)
    source = str(place / "adapt.parquet")
    whole = read_rows(source, tokenizer, ids, AdaptSettings(), 192)["train"]
    longest = max(len(row.ids) - LEVELS - 1 for row in whole)
    with pytest.raises(DataError, match=r"row \d+ .*expected a prompt of at most"):
        read_rows(source, tokenizer, ids, AdaptSettings(max_prompt_tokens=longest - 1), 192)
    short = AdaptSettings(max_prompt_tokens=longest - 1, long_prompt="truncate")
    level = {
        token: at for at, tokens in enumerate(CodeVocabulary.of(ids, tokenizer).tokens) for token in tokens.tolist()
    }
    for row in read_rows(source, tokenizer, ids, short, 192)["train"]:
        assert row.cut
        labels = [level[label] for label in row.labels if label in level]
        assert labels == [0, 1] * (len(labels) // LEVELS)


def test_rows_that_nobody_engaged_with_are_not_learned(base: str, place: Path, ids: SemanticIds) -> None:
    source = table(place / "labelled.parquet", ids, label=pl.int_range(pl.len()) % 3 != 0)
    _, tokenizer, _ = speaking(base, ids, 0)
    rows = read_rows(source, tokenizer, ids, AdaptSettings(), 192)
    assert (len(rows["train"]), len(rows["validation"])) == (32, 8)


def test_a_template_that_writes_before_the_answer_is_named(base: str, place: Path, ids: SemanticIds) -> None:
    _, tokenizer, _ = speaking(base, ids, 0)
    source = str(place / "adapt.parquet")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + ('hm ' if m['role'] == 'assistant' else ' ') "
        "+ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"the chat template puts 'hm.*before them; adapt, and later train, with chat never"
    ):
        read_rows(source, tokenizer, ids, AdaptSettings(), 192)
    plain = read_rows(source, tokenizer, ids, AdaptSettings(chat="never"), 192)["train"][0]
    assert plain.labelled == 3 * LEVELS + 1


def test_codes_that_fall_on_a_tables_padding_are_drawn_too(place: Path, ids: SemanticIds) -> None:
    tokenizer = tiny_tokenizer()
    padded = tiny_model("llama", vocab_size=len(tokenizer) + 64)
    with torch.no_grad():
        padded.get_input_embeddings().weight[len(tokenizer) :] = 0
    padded.save_pretrained(place / "padded")
    tokenizer.save_pretrained(place / "padded")
    model, tokenizer, fresh = speaking(str(place / "padded"), ids, 0)
    rows = tokenizer.convert_tokens_to_ids(ids.token_names())
    assert fresh == len(rows) == 6
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert len(torch.unique(weight[rows].detach(), dim=0)) == 6
        assert float(weight[rows].detach().std()) > 0.1


@pytest.mark.parametrize(("method", "tied"), [("full", False), ("full", True), ("lora", False), ("lora", True)])
def test_it_learns_what_comes_next_and_is_an_ordinary_checkpoint(
    place: Path, ids: SemanticIds, method: str, tied: bool
) -> None:
    base = str(place / "base")
    tiny_model("llama", initializer_range=0.1, tie_word_embeddings=tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    # Low ranks at twice this rate end in a poor minimum on some processors.
    how: dict[str, Any] = {"full": {"epochs": 25, "learning_rate": 2e-2}, "lora": {"epochs": 50, "learning_rate": 1e-2}}
    out = run(base, place, method=method, patience=0, **how[method])
    record = json.loads((out / ADAPTED).read_text())
    # A tied head leaves a model of 32 numbers less room.
    assert record["validation"]["after"] < record["validation"]["before"] / (2 if tied else 10)
    assert record["settings"]["codes"] == record["codes"]["version"] == SemanticIds.load(out / CODES).version
    assert not (out / "checkpoints").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    vocabulary = CodeVocabulary.of(ids, tokenizer)
    right = 0
    for start in range(ITEMS):
        seen = [(start + 3 * step) % ITEMS for step in range(4)]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"next after: {items_text(ids, seen[:-1])}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer = model.generate(prompt, max_new_tokens=LEVELS, do_sample=False, pad_token_id=2)[0, -LEVELS:]
        wanted = [int(vocabulary.tokens[level][code]) for level, code in enumerate(ids.codes[seen[-1]])]
        right += answer.tolist() == wanted
    assert tied or right == ITEMS
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    if method == "lora":  # of the embeddings, those of the codes alone have moved
        before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
        after = model.get_input_embeddings().weight
        assert torch.equal(before, after[: len(before)])


class _Break(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt


def test_an_interrupted_adaptation_goes_on_to_the_same_weights(
    base: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(base, place, "whole", epochs=4)
    from transformers import Trainer

    plain = Trainer.__init__

    def breaking(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.add_callback(_Break())

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", breaking)
        with pytest.raises(KeyboardInterrupt):
            run(base, place, "broken", epochs=4)
    with pytest.raises(RunError, match="go on with --resume"):
        run(base, place, "broken", epochs=4)
    with pytest.raises(RunError, match=r"settings differ.*epochs"):
        run(base, place, "broken", epochs=5, resume=True)
    broken = run(base, place, "broken", epochs=4, resume=True)
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = [json.loads((folder / ADAPTED).read_text()) for folder in (whole, broken)]
    assert records[0]["validation"] == records[1]["validation"]


def test_the_seed_decides_the_new_embeddings_and_leaves_the_old_ones(base: str, ids: SemanticIds) -> None:
    one, again, other = (speaking(base, ids, seed)[0].get_input_embeddings().weight for seed in (1, 1, 2))
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[: len(old)], old)
    assert float(one[len(old) :].detach().std()) == pytest.approx(
        float(old.detach().std()), rel=0.3
    )  # as far from each other as words are


def test_bad_input_is_one_line_and_leaves_nothing(
    base: str, place: Path, ids: SemanticIds, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pl.read_parquet(place / "adapt.parquet")

    def refused(expected: str, error: type[Exception], **settings: Any) -> None:
        with pytest.raises(error, match=expected):
            run(base, place, **settings)
        assert not (place / "out").exists()

    def with_completion(text: str) -> None:
        rows = frame.with_row_index("row").with_columns(
            completion=pl.when(pl.col("row") == 7).then(pl.lit(text)).otherwise("completion")
        )
        rows.drop("row").write_parquet(place / "adapt.parquet")

    for text in ("<a_0>", "<b_0><a_0>", "jazz", "<a_0><b_0> <a_0><b_1>", "<a_0><b_9>"):
        with_completion(text)
        refused(r"row 7 \(user u7\): expected a completion of 2 codes", DataError)
    frame.drop("split").write_parquet(place / "adapt.parquet")
    refused("expected a column split with train and validation, got none", DataError)
    frame.with_columns(split=pl.lit("train")).write_parquet(place / "adapt.parquet")
    refused("the validation part is empty", DataError)
    refused("epochs: expected", ConfigError, epochs=0)
    frame.write_parquet(place / "adapt.parquet")
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="it is no adapted backbone"):
        run(base, place, overwrite=True)
    assert (place / "out" / "thesis.tex").read_text() == "mine"
    code = main(["adapt", base, str(place / "none"), str(place / "adapt.parquet"), str(place / "new")])
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_item_that_the_codes_do_not_hold_is_refused(base: str, place: Path) -> None:
    fewer = SemanticIds(["x", "y"], np.array([[0, 0], [1, 3]]), (2, 4), False)
    fewer.save(place / "codes")
    with pytest.raises(DataError, match=r"expected a completion of 2 codes of one item in .*semantic_ids"):
        run(base, place)


def test_overwriting_costs_nothing_before_the_new_one_can_be_made(base: str, place: Path) -> None:
    old = run(base, place, epochs=1)
    weights = (old / "model.safetensors").read_bytes()
    with pytest.raises(BackboneError):
        run("nowhere", place, overwrite=True)
    with pytest.raises(RunError, match="expected a new folder, found one; pass --overwrite"):
        run(base, place)
    with pytest.raises(RunError, match="expected an output beside what it is made of"):
        run(str(old), place, overwrite=True)
    (old / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'notes\.md', so it will not be overwritten"):
        run(base, place, overwrite=True)
    (old / "notes.md").unlink()
    assert (old / "model.safetensors").read_bytes() == weights
    run(base, place, epochs=1, overwrite=True, seed=7)
    assert (old / "model.safetensors").read_bytes() != weights
    assert not old.with_name("out.replaced").exists()
