from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from e2p.data.tables import example_batches, open_embeddings
from e2p.errors import ConfigError, DataError
from e2p.tasks import personachat

PARLAI = """\
1 your persona: i like to ski.
2 your persona: I'm a vegan.
3 partner's persona: i sell cars.
4 hi  there\thello , how are you ?
5 fine .\tgood . i just skied .\t\tfine .|no .|good . i just skied .
6 where ?\tin the alps .
7 nice .\tdo you ski ?
1 your persona: i am a vegan
2 your persona: i like to ski .
3 __SILENCE__\tHey !
4 hey .\ti eat no meat .
5 why ?\tfor the animals .
6 ok\tyes
1 your persona: i have a cat.
2 your persona: i live in rome.
3 your persona: i paint.
4 good evening\tciao !
"""


def write(tmp_path: Path, text: str = PARLAI, name: str = "train.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def prepared(tmp_path: Path, source: Path | None = None, **settings: object) -> pl.DataFrame:
    chosen: dict[str, object] = {"encoder": "", "overwrite": True} | settings
    source = source or write(tmp_path)
    folder = personachat.prepare(str(source), str(tmp_path / "out"), **chosen)  # type: ignore[arg-type]
    return pl.read_parquet(folder / "examples.parquet")


def turns(row: dict[str, object]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row["messages"]]  # type: ignore[attr-defined]


def test_next_utterance_by_hand(tmp_path: Path) -> None:
    rows = prepared(tmp_path).to_dicts()
    assert [row["completion"] for row in rows[:4]] == [
        "hello , how are you ?", "good . i just skied .", "in the alps .", "do you ski ?",
    ]  # fmt: skip
    assert turns(rows[0]) == [("user", "hi  there")]
    assert turns(rows[2]) == [("user", "fine ."), ("assistant", "good . i just skied ."), ("user", "where ?")]
    # The persona opens: its partner's silence is a greeting, so that the turns alternate from the user on.
    assert turns(rows[4]) == [("user", "hello")]
    assert turns(rows[5]) == [("user", "hello"), ("assistant", "Hey !"), ("user", "hey .")]
    assert "SILENCE" not in str(rows)
    assert len(rows) == 9
    assert len({row["example_id"] for row in rows}) == 9
    assert rows[0]["profile"] == "i like to ski. I'm a vegan."


def test_one_user_whatever_order_and_spelling(tmp_path: Path) -> None:
    table = prepared(tmp_path)
    first, second, third = table["user_id"].gather([0, 4, 8]).to_list()
    assert first == second != third
    assert table.select("user_id", "profile").unique().height == 2  # one text, so one vector, a persona
    profiles = pl.read_parquet(tmp_path / "out" / "profiles.parquet")
    assert profiles.rows() == [
        (first, "i like to ski. I'm a vegan."),
        (third, "i have a cat. i live in rome. i paint."),
    ]


def test_history_length(tmp_path: Path) -> None:
    assert {row["messages"][0]["role"] for row in prepared(tmp_path, history=5).to_dicts()} == {"user"}
    assert max(prepared(tmp_path, history=5)["messages"].list.len()) == 5
    assert set(prepared(tmp_path, history=1)["messages"].list.len()) == {1}
    for wrong in (0, 2):
        with pytest.raises(ConfigError, match="history: expected an odd number"):
            prepared(tmp_path, history=wrong)


def test_three_exchanges_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = prepared(tmp_path, form="three_exchanges").to_dicts()
    # Dialogue 1 has four exchanges: two runs of three. Dialogue 2 has three spoken ones: one run.
    assert [row["completion"] for row in rows] == ["in the alps .", "do you ski ?", "yes"]
    assert turns(rows[1]) == [
        ("user", "fine ."), ("assistant", "good . i just skied ."), ("user", "where ?"),
        ("assistant", "in the alps ."), ("user", "nice ."),
    ]  # fmt: skip
    assert turns(rows[2])[0] == ("user", "hey .")
    assert "dropped: 6 of 9 answers" in capsys.readouterr().out


def test_text_options(tmp_path: Path) -> None:
    row = prepared(tmp_path, lowercase=True, squeeze_whitespace=True, max_persona_chars=20).to_dicts()[0]
    assert turns(row) == [("user", "hi there")]
    assert row["profile"] == "i like to ski. i'm a vegan."[:20]
    assert prepared(tmp_path, limit=1).height == 4


def hugging_face() -> list[dict[str, object]]:
    """The three dialogues as the Hugging Face file has them: one entry an answer, gold candidate last."""
    entries = []
    for dialogue in personachat._from_parlai(Path("x"), PARLAI):
        spoken = [turn for said, answer in dialogue.exchanges for turn in (said or "__ SILENCE __", answer)]
        utterances = [
            {"history": spoken[:end], "candidates": ["no .", "wrong", spoken[end]]} for end in range(1, len(spoken), 2)
        ]
        entries.append({"personality": list(dialogue.persona), "utterances": utterances})
    return entries


def test_both_layouts_give_the_same_tables(tmp_path: Path) -> None:
    expected = prepared(tmp_path)
    entries = hugging_face()
    for name, content in (("a.json", entries), ("b.txt", {"train": entries[:1], "valid": entries[1:]})):
        table = prepared(tmp_path, write(tmp_path, json.dumps(content), name))
        assert table.equals(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 your persona: a.\n3 hi\tho\n", r"train\.txt:2: expected line number 2 \(or 1\), got '3 hi"),
        ("1 your persona: a.\nhi\tho\n", r"train\.txt:2: expected line number"),
        ("1 your persona: a.\n2 hi\n", r"train\.txt:2: expected 'text<TAB>answer', got 'hi'"),
        ("1 your persona: a.\n2 hi\tho\n3 \tho\n", r"train\.txt:3: expected what the partner says, got ''"),
        (
            "1 your persona: a.\n2 hi\tho\n3 __SILENCE__\tho\n",
            r"train\.txt:3: .*only a first turn can be silent",
        ),
        (
            "1 your persona: a.\n2 hi\tho\n3 your persona: b.\n",
            r"train\.txt:3: expected an exchange, got a persona",
        ),
        (
            "1 hi\tho\n",
            r"train\.txt:1: expected a persona and exchanges .* got 0 and 1; use a 'self_original'",
        ),
        ("1 your persona: a.\n1 your persona: b.\n2 hi\tho\n", r"train\.txt:1: .* got 1 and 0"),
        ("\n", "expected at least one dialogue, got none"),
        (
            '[{"personality": ["a"]}]',
            r"train\.txt: \[0\]: expected personality and utterances .*got no",
        ),
        ('[{"personality": ["a"],\n "utterances": }]', r"train\.txt:2: expected JSON"),
        ('{"train": 3}', "train: expected a list of dialogues, got int"),
        (
            '[{"personality": ["a"], "utterances": [{"history": ["a", "b"], "candidates": ["c"]}]}]',
            "expected a history that ends with the partner, got 2 turns",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        prepared(tmp_path, write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected a Persona-Chat file, got: No such file"):
        prepared(tmp_path, tmp_path / "nowhere")


def test_vectors_are_of_the_personas_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def encode_texts(texts: list[str], encoder: str, *, pooling: str = "mean") -> np.ndarray:
        asked.append((texts, encoder, pooling))
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    fake = ModuleType("e2p.users.extract")
    fake.encode_texts = encode_texts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "e2p.users.extract", fake)
    table = prepared(tmp_path, encoder="some-lm", pooling="last")
    texts = pl.read_parquet(tmp_path / "out" / "profiles.parquet")["profile"].to_list()
    assert asked == [(texts, "some-lm", "last")]
    vectors = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    assert vectors.vectors[:, 0].tolist() == [len(text) for text in texts]
    assert set(vectors.keys["user_id"]) == set(table["user_id"])
    assert vectors.versions == ["some-lm-last"]
    data = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["data"]
    assert data["embeddings"] == str(tmp_path / "out" / "embeddings.parquet")
    assert data["profile_template"] == "persona: {profile}"


@given(st.lists(st.text(alphabet="ab '.,", min_size=1), min_size=1), st.randoms())
def test_ids_do_not_depend_on_order_or_punctuation(persona: list[str], random: object) -> None:
    shuffled = [f" {sentence.upper()} ." for sentence in persona]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert personachat.persona_id(shuffled) == personachat.persona_id(persona)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I'm short.", "i am short"),
        ("i don't ski", "i do not ski ."),
        ("i can't", "i cannot"),
        ("im up", "i am up"),
        ("she's tall", "she is tall"),
        ("won\u2019t go", "will not go"),
    ],
)
def test_spellings_of_one_sentence(one: str, other: str) -> None:
    assert personachat.normalise(one) == personachat.normalise(other)


SENTENCES = st.sets(st.sampled_from([f"sentence {i}" for i in range(12)]), min_size=1, max_size=5)


def personas(*chosen: str) -> list[tuple[str, ...]]:
    return [tuple(f"sentence {i}" for i in numbers.split()) for numbers in chosen]


@example(personas("0", "8", "0 1 10 7 8", "1 10", "0 1 2"))
@example(personas("0", "7", "8", "0 1 3 8", "0 7"))
@given(st.lists(SENTENCES.map(lambda chosen: tuple(sorted(chosen))), min_size=1, max_size=12))
def test_groups_are_the_connected_personas(personas: list[tuple[str, ...]]) -> None:
    groups = personachat.persona_groups(personas)
    assert groups == personachat.persona_groups(reversed(personas))
    # By hand: spread the smallest id along every link until nothing changes.
    ids = {personachat.persona_id(p): set(p) for p in personas}
    label = {key: key for key in ids}
    for _ in ids:
        for a in ids:
            for b in ids:
                if 2 * len(ids[a] & ids[b]) > min(len(ids[a]), len(ids[b])):
                    label[a] = label[b] = min(label[a], label[b])
    assert groups == label


@pytest.mark.real_data
def test_the_real_file(tmp_path: Path, shared: Path) -> None:
    source = shared / "data" / "persona_chat" / "train_self_original_no_cands.txt"
    table = prepared(tmp_path, source)
    checked = pl.concat(example_batches(str(tmp_path / "out" / "examples.parquet")))
    assert table.height == checked.height == 15_231
    assert table["user_id"].n_unique() < 1_700 < 2_000  # the rest are re-ordered or re-spelled twins
    assert 800 < table["group"].n_unique() < 950  # the original collection has 955 training personas
    # No sentence-for-sentence twin in another group.
    sentences = table.unique("user_id").select("group", pl.col("profile").str.split(". ")).rows()
    by_set: dict[frozenset[str], str] = {}
    for group, profile in sentences:
        key = frozenset(sentence.strip(" .") for sentence in profile)
        assert by_set.setdefault(key, group) == group
    three = prepared(tmp_path, source, form="three_exchanges", limit=300)
    assert set(three["messages"].list.len()) == {5}


@pytest.mark.real_data
def test_real_vectors(tmp_path: Path, shared: Path) -> None:
    source = shared / "data" / "persona_chat" / "train_self_original_no_cands.txt"
    table = prepared(tmp_path, source, encoder="minilm", limit=20)
    vectors = open_embeddings(str(tmp_path / "out" / "embeddings.parquet"))
    assert vectors.vectors.shape == (table["user_id"].n_unique(), 384)
