"""Text to ids: the boundary between prompt and completion, the system turn, what is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from e2p.data.templates import TextEncoder
from e2p.errors import ConfigError, DataError
from tiny import BOS, EOS, TEMPLATE, tiny_tokenizer

SYSTEM, USER = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "soul"}

# In the manner of published templates.
CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>You are a helpful assistant.<|eos|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% if not turns %}{{ raise_exception('a system turn alone') }}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + (first if loop.first else '') + m['content'] | trim + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SILENT_ALONE = STRICT.replace("{{ raise_exception('a system turn alone') }}", "")
REFUSES_SYSTEM = TEMPLATE.replace(
    "{{ bos_token }}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}",
)


def encoder(tokenizer: Any, **settings_: Any) -> TextEncoder:
    return TextEncoder(tokenizer, **settings_)


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# Prompts


def test_a_chat_prompt_is_the_template_as_transformers_renders_it(tokenizer: Any) -> None:
    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encoder(tokenizer).prompt(messages).ids == expected
    assert encoder(tokenizer).prompt("hello") == encoder(tokenizer).prompt([USER])


def test_a_plain_prompt_is_a_text_where_chat_is_off_or_there_is_no_template(
    tokenizer: Any, plain_tokenizer: Any
) -> None:
    for one in (encoder(tokenizer, chat="never"), encoder(plain_tokenizer)):
        encoded = one.prompt("hello there")
        assert encoded.ids == [BOS, *tokenizer("hello there", add_special_tokens=False)["input_ids"]]
        assert (encoded.after_bos, encoded.after_system, encoded.cut) == (1, 1, 0)


def test_without_a_bos_nothing_is_behind_it() -> None:
    encoded = encoder(tiny_tokenizer(template=None, bos=False)).prompt("hello")
    assert (encoded.after_bos, encoded.after_system) == (0, 0)


def test_what_cannot_be_a_prompt(tokenizer: Any, plain_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="messages need a tokenizer with a chat template"):
        encoder(plain_tokenizer).prompt([USER])
    with pytest.raises(DataError, match="empty text"):
        encoder(tiny_tokenizer(template=None, bos=False)).prompt("")
    for broken in ([], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}]):
        with pytest.raises(DataError, match="messages with a role and a content"):
            encoder(tokenizer).prompt(broken)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.chat"):
        encoder(plain_tokenizer, chat="always")
    with pytest.raises(DataError, match="refuses these turns: System role not supported"):
        encoder(tiny_tokenizer(REFUSES_SYSTEM)).prompt([SYSTEM, USER])


# The system turn


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "<|bos|><|system|> be kind<|eos|>"),
        (CHATML_WITH_DEFAULT, "<|system|>be kind<|eos|>\n"),
        (STRICT, "<|bos|><|user|>be kind\n\n"),
        (SILENT_ALONE, "<|bos|><|user|>be kind\n\n"),
    ],
)
def test_after_system_is_right_behind_the_system_turn(template: str, expected: str) -> None:
    tokenizer = tiny_tokenizer(template)
    for user in ("hello", "there world", "be kind"):
        encoded = encoder(tokenizer).prompt([SYSTEM, {"role": "user", "content": user}])
        head = text(tokenizer, encoded.ids[: encoded.after_system])
        # The line break between system text and user text may fall on either side.
        assert head.rstrip("\n") == expected.rstrip("\n")
        assert expected.startswith(head)
        assert encoded.after_bos == int(expected.startswith("<|bos|>"))


@pytest.mark.parametrize("template", [TEMPLATE, STRICT, REFUSES_SYSTEM])
def test_without_a_system_turn_it_is_behind_bos(template: str) -> None:
    for messages in ([USER], [USER, ANSWER, USER]):
        encoded = encoder(tiny_tokenizer(template)).prompt(messages)
        assert encoded.after_system == encoded.after_bos == 1


def test_a_system_turn_that_the_template_inserts_counts_as_one() -> None:
    tokenizer = tiny_tokenizer(CHATML_WITH_DEFAULT)
    for messages in ([USER], [USER, ANSWER, USER]):
        encoded = encoder(tokenizer).prompt(messages)
        assert encoded.after_bos == 0
        inserted = text(tokenizer, encoded.ids[: encoded.after_system])
        assert inserted == "<|system|>You are a helpful assistant.<|eos|>\n"


def test_all_users_share_the_ids_before_after_system(tokenizer: Any) -> None:
    encodings = [
        encoder(tokenizer).prompt([SYSTEM, {"role": "user", "content": user}]) for user in ("a", "kind", "<x> be kind")
    ]
    heads = {tuple(e.ids[: e.after_system]) for e in encodings}
    assert len(heads) == 1


def test_a_system_turn_alone_and_an_empty_one(tokenizer: Any) -> None:
    alone = encoder(tokenizer).prompt([SYSTEM])
    assert 1 < alone.after_system <= len(alone.ids)
    empty = encoder(tokenizer).prompt([{"role": "system", "content": ""}, USER])
    assert text(tokenizer, empty.ids[: empty.after_system]) == "<|bos|><|system|> <|eos|>"


# Profiles


def test_a_profile_becomes_the_system_turn_or_joins_it(tokenizer: Any) -> None:
    one = encoder(tokenizer, profile_template="About: {profile}")
    alone = one.prompt("hello", "likes jazz")
    assert text(tokenizer, alone.ids) == (
        "<|bos|><|system|> About: likes jazz<|eos|><|user|> hello<|eos|><|assistant|>"
    )
    assert text(tokenizer, alone.ids[: alone.after_system]) == "<|bos|><|system|> About: likes jazz<|eos|>"
    joined = one.prompt([SYSTEM, USER], "likes jazz")
    assert "<|system|> be kind\nAbout: likes jazz<|eos|>" in text(tokenizer, joined.ids)
    assert one.prompt([SYSTEM, USER], "") == one.prompt([SYSTEM, USER]) == one.prompt([SYSTEM, USER], None)


def test_a_profile_leads_a_plain_text(plain_tokenizer: Any) -> None:
    encoded = encoder(plain_tokenizer).prompt("hello", "likes jazz")
    assert text(plain_tokenizer, encoded.ids) == "<|bos|>About the user: likes jazz\n\nhello"
    assert text(plain_tokenizer, encoded.ids[: encoded.after_system]) == "<|bos|>About the user: likes jazz\n\n"


def test_braces_are_text(tokenizer: Any) -> None:
    one = encoder(tokenizer, profile_template='{"user": "{profile}"}')
    assert '{"user": "a {b} {0}"}' in text(tokenizer, one.prompt("hello", "a {b} {0}").ids)


# Completions


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12),
)
def test_prompt_and_completion_read_as_one_text_and_end_once(tokenizer: Any, prompt: str, completion: str) -> None:
    for chat in ("never", "auto"):
        one = encoder(tokenizer, chat=chat, max_completion_tokens=200)
        encoded = one.prompt(prompt)
        ids = one.completion(prompt, encoded, completion)
        assert ids.count(EOS) == 1
        assert ids[-1] == EOS
        if chat == "auto":
            whole = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            expected = tokenizer.apply_chat_template(whole, tokenize=False)
        else:
            expected = "<|bos|>" + prompt + completion + "<|eos|>"
        assert text(tokenizer, encoded.ids + ids) == expected


def test_a_merge_across_the_boundary_leaves_the_prompts_ids_alone(plain_tokenizer: Any) -> None:
    """' train' is one token; generation starts from the ids of ' tra', so the completion is told from there."""
    one = encoder(plain_tokenizer)
    whole = plain_tokenizer("the train")["input_ids"]
    prompt = one.prompt("the tra")
    ids = one.completion("the tra", prompt, "in")
    assert whole[: len(prompt.ids)] != prompt.ids, "the tokenizer merges here, or this test shows nothing"
    assert ids == [*plain_tokenizer("in", add_special_tokens=False)["input_ids"], EOS]
    assert text(plain_tokenizer, prompt.ids + ids) == "<|bos|>the train<|eos|>"


def test_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    """As SentencePiece does: tokenised alone, 'world' would be '▁world', and the answer would gain a space."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "▁hello": 3, "wor": 4, "ld": 5, "▁wor": 6, "<unk>": 7}
    vocabulary |= {c: 8 + i for i, c in enumerate("helowrd")} | {"▁world": 20, "world": 21}
    model = Tokenizer(models.Unigram([(token, -1.0 if len(token) > 3 else -5.0) for token in vocabulary], unk_id=7))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    one = encoder(tokenizer)
    for prompt, completion in (("hello", " world"), ("hello", "world")):
        encoded = one.prompt(prompt)
        ids = one.completion(prompt, encoded, completion)
        assert tokenizer.decode(encoded.ids + ids[:-1]) == prompt + completion
        assert encoded.ids + ids[:-1] == tokenizer(prompt + completion)["input_ids"]


def test_the_completion_does_not_depend_on_what_is_before_the_last_turn(tokenizer: Any) -> None:
    one = encoder(tokenizer)
    prompts: list[Any] = ["hello", [SYSTEM, USER], [USER, ANSWER, USER]]
    assert len({tuple(one.completion(p, one.prompt(p), "soul")) for p in prompts}) == 1
    strict = encoder(tiny_tokenizer(STRICT))
    assert strict.completion([SYSTEM, USER], strict.prompt([SYSTEM, USER]), "soul")[-1] == EOS


def test_a_long_completion_is_cut_and_has_no_end(tokenizer: Any) -> None:
    one = encoder(tokenizer, max_completion_tokens=4)
    ids = one.completion("hello", one.prompt("hello"), "slow jazz and old soul music")
    full = encoder(tokenizer).completion("hello", one.prompt("hello"), "slow jazz and old soul music")
    assert ids == full[:4]
    assert EOS not in ids


def test_an_end_token_written_in_the_text_ends_it(tokenizer: Any) -> None:
    one = encoder(tokenizer)
    assert one.completion("a", one.prompt("a"), "soul<|eos|> and more") == one.completion("a", one.prompt("a"), "soul")


def test_a_template_that_writes_answers_in_another_way() -> None:
    other = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><|system|>' }}")
    tokenizer = tiny_tokenizer(other)
    one = encoder(tokenizer)
    ids = one.completion("hello", one.prompt("hello"), "soul")
    assert ids == [*tokenizer("soul", add_special_tokens=False)["input_ids"], EOS]


# Limits


def test_a_prompt_of_just_the_limit_fits_and_one_more_does_not(tokenizer: Any) -> None:
    size = len(encoder(tokenizer).prompt("hello there").ids)
    assert encoder(tokenizer, max_prompt_tokens=size).prompt("hello there").cut == 0
    with pytest.raises(DataError, match=rf"at most {size - 1} tokens, got {size}"):
        encoder(tokenizer, max_prompt_tokens=size - 1).prompt("hello there")


@pytest.mark.parametrize("template", [TEMPLATE, STRICT])
def test_truncation_drops_the_oldest_turns_and_keeps_the_system_turn(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(7)]
    full = encoder(tokenizer).prompt([SYSTEM, *turns])
    kept_counts = set()
    for limit in range(len(full.ids), 0, -1):
        one = encoder(tokenizer, max_prompt_tokens=limit, long_prompt="truncate")
        try:
            cut = one.prompt([SYSTEM, *turns])
        except DataError as error:
            assert "around the last turn's text" in str(error)  # noqa: PT017
            break
        assert len(cut.ids) <= limit
        assert cut.cut == len(full.ids) - len(cut.ids)
        shown = text(tokenizer, cut.ids)
        kept = [i for i in range(7) if f"turn {i}" in shown]
        if not kept:  # of the last turn only the end is left: see the test below
            continue
        assert kept == list(range(kept[0], 7))
        assert "be kind" in shown
        assert text(tokenizer, cut.ids[: cut.after_system]) == text(tokenizer, full.ids[: full.after_system])
        kept_counts.add(len(kept))
    assert kept_counts == ({1, 3, 5, 7} if template is STRICT else set(range(1, 8)))


@pytest.mark.parametrize("template", [TEMPLATE, STRICT])
def test_of_thousands_of_turns_a_few_lengths_are_tried(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each means to write and tokenise everything anew, and anyone may send so many."""
    tokenizer, tried = tiny_tokenizer(template), list[int]()
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(2001)]
    encode = TextEncoder._encode

    def counted(self: TextEncoder, prompt: Any, messages: Any, profile: Any) -> Any:
        tried.append(len(messages))
        return encode(self, prompt, messages, profile)

    monkeypatch.setattr(TextEncoder, "_encode", counted)
    cut = encoder(tokenizer, max_prompt_tokens=100, long_prompt="truncate").prompt([SYSTEM, *turns])
    assert len(tried) < 40
    step = 2 if template is STRICT else 1
    kept = sum(f"turn {i}" in text(tokenizer, cut.ids) for i in range(1001, 2001))
    assert len(cut.ids) <= 100 < len(encoder(tokenizer).prompt([SYSTEM, *turns[-kept - step :]]).ids)


def test_truncation_keeps_the_newest_tokens_of_a_plain_text(plain_tokenizer: Any) -> None:
    full = encoder(plain_tokenizer).prompt("the user likes slow jazz")
    cut = encoder(plain_tokenizer, max_prompt_tokens=4, long_prompt="truncate").prompt("the user likes slow jazz")
    assert cut.ids == [BOS, *full.ids[-3:]]
    assert cut.cut == len(full.ids) - 4
    one = encoder(plain_tokenizer, max_prompt_tokens=20, long_prompt="truncate", profile_template="{profile}")
    told = one.prompt("the user likes slow jazz " * 9, "old soul")
    assert len(told.ids) == 20
    assert text(plain_tokenizer, told.ids).startswith("<|bos|>old soul\n\n")
    assert text(plain_tokenizer, told.ids).endswith("slow jazz ")
    with pytest.raises(DataError, match="profile alone"):
        one.prompt("hello", "the user likes slow jazz and old soul music " * 9)


def test_of_a_last_turn_that_is_too_long_the_oldest_tokens_go(tokenizer: Any) -> None:
    long = "the user likes slow jazz and old soul music"
    full = encoder(tokenizer).prompt(long)
    frame = len(encoder(tokenizer).prompt("x").ids) - 1
    for limit in range(frame + 1, len(full.ids)):
        cut = encoder(tokenizer, max_prompt_tokens=limit, long_prompt="truncate").prompt(long)
        assert len(cut.ids) <= limit
        assert cut.cut == len(full.ids) - len(cut.ids)
        shown = text(tokenizer, cut.ids).removeprefix("<|bos|><|user|> ").removesuffix("<|eos|><|assistant|>")
        assert long.endswith(shown.strip())
        assert shown.strip() or limit == frame + 1
    with pytest.raises(DataError, match=r"around the last turn's text has 5 tokens"):
        encoder(tokenizer, max_prompt_tokens=frame, long_prompt="truncate").prompt(long)
