"""Tokens to text: in sum what decoding all at once says, never half a character, nothing of a stop text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e2p.serving.detokenise import AnswerText, Vocabulary
from e2p.serving.engine import token_bytes
from tiny import BOS, CORPUS, EOS, tiny_tokenizer


def sentencepiece_like() -> Any:
    """Words with a leading-space marker, and bytes for what is not in the vocabulary, as Llama 2 and Gemma have."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special[:3], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(special[3:])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def wordpiece_like() -> Any:
    """A decoder that joins pieces and takes spaces back, so that more tokens change the text that was there."""
    words = ["[UNK]", "do", "n", "'", "t", "##ing", "##s", ".", "hello", "there", ","]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


VOCABULARIES = {
    "bytes": Vocabulary(tiny_tokenizer()),
    "spaces": Vocabulary(sentencepiece_like()),
}
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["né à Łódź", "日本語 のテキスト", "👩‍👩‍👧 family", "  spaced  out  ", "\n\nlines\n"]
)


def ids_of(vocabulary: Vocabulary, data: Any) -> list[int]:
    """A text's tokens, or any tokens at all."""
    if data.draw(st.booleans()):
        return vocabulary.tokenizer(data.draw(TEXTS), add_special_tokens=False)["input_ids"]
    # Of a run of bytes that is no text, a byte-fallback decoder takes back what was there before.
    single = [] if vocabulary is VOCABULARIES["bytes"] else range(len(vocabulary.tokenizer) - 256, 10**6)
    tokens = st.integers(0, len(vocabulary.tokenizer) - 1).filter(lambda token: token not in single)
    return data.draw(st.lists(tokens, max_size=25))


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("strip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_are_in_sum_what_decoding_all_at_once_says(name: str, strip: bool, data: Any) -> None:
    vocabulary = VOCABULARIES[name]
    ids = ids_of(vocabulary, data)
    whole = vocabulary.tokenizer.decode(ids, skip_special_tokens=True)
    answer = AnswerText(vocabulary, strip=strip)
    said = ""
    for token in ids:
        said += answer.push(token)
        assert (whole.strip() if strip else whole).startswith(said)
        assert said == said.rstrip() or not strip
    assert said + answer.finish() == (whole.strip() if strip else whole)
    assert not answer.stopped


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_nothing_of_a_stop_text_is_said(name: str, data: Any) -> None:
    vocabulary = VOCABULARIES[name]
    ids = ids_of(vocabulary, data)
    whole = vocabulary.tokenizer.decode(ids, skip_special_tokens=True)
    stops = data.draw(st.lists(st.text("aeo \n", min_size=1, max_size=3), max_size=2))
    if len(whole) > 1:
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 5))])
    stops = [stop for stop in stops if "�" not in stop]
    # By what is whole after each token: the first one that completes a stop text cuts there.
    expected, used = whole, len(ids)
    for count in range(1, len(ids) + 1):
        there = vocabulary.tokenizer.decode(ids[:count], skip_special_tokens=True)
        if there.endswith("�") or not whole.startswith(there):
            continue
        found = [there.find(stop) for stop in stops if stop in there]
        if found:
            expected, used = there[: min(found)], count
            break
    answer = AnswerText(vocabulary, stops, strip=False)
    said, taken = "", 0
    for token in ids:
        said += answer.push(token)
        taken += 1
        assert not any(stop in said for stop in stops)
        if answer.stopped:
            break
    said += answer.finish()
    if answer.stopped or "�" not in whole:
        assert (said, taken) == (expected, used)


def test_half_a_character_is_not_said() -> None:
    vocabulary = VOCABULARIES["bytes"]
    ids = vocabulary.tokenizer("é👩", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    answer = AnswerText(vocabulary)
    assert [answer.push(token) for token in ids] == ["", "é", "", "", "", "👩"]
    cut = AnswerText(vocabulary)
    assert [cut.push(token) for token in ids[:4]] == ["", "é", "", ""]
    assert cut.finish() == "�", "as decoding all at once says"


def test_a_space_belongs_to_what_follows_it() -> None:
    for vocabulary in VOCABULARIES.values():
        ids = vocabulary.tokenizer(" hello there world", add_special_tokens=False)["input_ids"]
        answer = AnswerText(vocabulary)
        assert "".join(answer.push(token) for token in ids) == "hello there world"


def test_what_may_be_a_stop_text_is_held_back_and_said_if_it_is_none() -> None:
    vocabulary = VOCABULARIES["bytes"]
    (a, b, c, d) = (vocabulary.tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    answer = AnswerText(vocabulary, ["abc", "bd"])
    assert [answer.push(token) for token in (d, a, b, a, b)] == ["d", "", "", "ab", ""]
    assert answer.push(d) == "a"
    assert (answer.stopped, answer.finish()) == (True, "")
    ended = AnswerText(vocabulary, ["abc"])
    assert [ended.push(token) for token in (c, a, b)] == ["c", "", ""]
    assert (ended.finish(), ended.stopped) == ("ab", False)


def test_special_tokens_are_no_text() -> None:
    vocabulary = VOCABULARIES["bytes"]
    (a,) = vocabulary.tokenizer("a", add_special_tokens=False)["input_ids"]
    answer = AnswerText(vocabulary)
    assert [answer.push(token) for token in (BOS, a, EOS, a)] == ["", "a", "", "a"]


def test_a_decoder_that_takes_text_back_loses_nothing_that_was_said() -> None:
    vocabulary = Vocabulary(wordpiece_like())
    ids = [8, 9, 10, 1, 2, 3, 4, 5, 7, 8, 5]
    answer = AnswerText(vocabulary)
    said = "".join([answer.push(token) for token in ids]) + answer.finish()
    assert said.startswith("hello there")
    assert said.endswith(" helloing")
    assert "".join(said.split()) == "".join(vocabulary.decode(ids).split())


def test_bytes_that_are_no_text_after_all_do_not_swallow_what_follows() -> None:
    vocabulary = VOCABULARIES["spaces"]
    ids = [vocabulary.tokenizer.convert_tokens_to_ids(token) for token in ("<0x41>", "<0xFF>", "▁the", "▁user")]
    answer = AnswerText(vocabulary)
    said = "".join([answer.push(token) for token in ids]) + answer.finish()
    assert said.startswith("A")
    assert said.endswith("the user")


def test_single_tokens_keep_their_space() -> None:
    for vocabulary in VOCABULARIES.values():
        ids = vocabulary.tokenizer(" hello there", add_special_tokens=False)["input_ids"]
        assert "".join(vocabulary.text(token) for token in ids) == " hello there"
        assert vocabulary.text(ids[-1]) == vocabulary.text(ids[-1])
    assert VOCABULARIES["bytes"].text(EOS) == "<|eos|>"


@pytest.mark.parametrize("kind", list(VOCABULARIES))
@given(TEXTS)
def test_tokens_one_by_one_have_the_texts_bytes(kind: str, text: str) -> None:
    """Also where a character takes several tokens, none of which is a text."""
    vocabulary = VOCABULARIES[kind]
    ids = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(token_bytes(vocabulary.text(token)) for token in ids).decode()
    assert joined.strip() == vocabulary.decode(ids, skip_special=False).strip()  # some drop a space at the beginning
