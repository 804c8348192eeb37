"""Persona-Chat (Zhang et al. 2018), the paper's dialogue task: official files -> tables.

The vector is that of the answering speaker's persona; this speaker is the assistant, the partner the user.

The same persona comes back in the files with its sentences in another order, with contractions spelled out,
or with one sentence changed. Splitting by the exact text would put such twins into train and test. So a user
is the *set* of a persona's normalised sentences, and the unit of the split (``group``) joins all personas
that share more than half of their sentences.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from e2p.config import DataConfig, RunConfig
from e2p.config_io import save_yaml
from e2p.data.tables import write_embeddings, write_frame
from e2p.errors import ConfigError, DataError
from e2p.tasks.output import staged_folder

# Where the answering speaker opens the dialogue, the partner's silence is this turn: strict chat templates
# want alternating turns that begin with the user, and a greeting asks for nothing.
OPENING = "hello"
SILENCE = re.compile(r"_+\s*silence\s*_+", re.IGNORECASE)
PERSONA, PARTNER = "your persona:", "partner's persona:"
CONTRACTIONS = tuple(
    (re.compile(pattern), full)
    for pattern, full in (
        (r"\b(?:can't|cant|can not)\b", "cannot"),
        (r"\b(?:won't|wont)\b", "will not"),
        (r"\b(do|does|did|is|are|was|have|has|had|could|would|should)n'?t\b", r"\1 not"),
        (r"\bi'?m\b", "i am"),
        (r"'re\b", " are"),
        (r"'ve\b", " have"),
        (r"'ll\b", " will"),
        (r"'d\b", " would"),
        (r"'s\b", " is"),
    )
)


@dataclass(frozen=True)
class Dialogue:
    """One conversation: the persona's sentences, and (what the partner says, its answer) in order.

    The partner's side of the first exchange is empty where the persona opens.
    """

    persona: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...]


def prepare(
    source: str,
    output: str,
    encoder: str = "minilm",
    pooling: Literal["mean", "last"] = "mean",
    history: int = 3,
    form: Literal["next_utterance", "three_exchanges"] = "next_utterance",
    lowercase: bool = False,
    squeeze_whitespace: bool = False,
    max_persona_chars: int = 1000,
    limit: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Make dialogue examples and persona vectors from a Persona-Chat file.

    The paper (Appendix F) lower-cases, squeezes white space, keeps three-exchange triples, and embeds a
    persona by the last hidden state of Llama-3.2-1B: ``--lowercase true --squeeze_whitespace true --form
    three_exchanges --encoder meta-llama/Llama-3.2-1B --pooling last``.

    Args:
        source: ParlAI text file (train_self_original.txt, with or without candidates) or Hugging Face JSON
            (personachat_self_original.json; its parts are read one after the other).
        output: folder for the tables.
        encoder: what turns a persona into a vector: ``minilm``, a sentence-transformers model, a causal LM,
            or empty for no vectors.
        pooling: a persona's vector is the mean over its tokens or the last token's, of a causal LM.
        history: utterances before the answer, odd, for ``next_utterance``.
        form: ``next_utterance``: each answer; ``three_exchanges``: each run of three exchanges, answering the
            third.
        lowercase: lower-case all text.
        squeeze_whitespace: runs of white space become one space.
        max_persona_chars: a persona's text is cut here.
        limit: read this many dialogues only.
        overwrite: replace an earlier output.

    Returns:
        The output folder.

    Raises:
        ConfigError: a number is out of range.
        DataError: the file is missing or a line is not as documented; the message has file and line.
        RunError: the output exists.
    """
    if history < 1 or history % 2 == 0:
        raise ConfigError(f"history: expected an odd number >= 1, so that the user speaks first, got {history}")
    for name, value in (("max_persona_chars", max_persona_chars), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number >= 1, got {value}; raise it")
    with staged_folder(output, overwrite) as folder:
        dialogues = read(source)[:limit]
        dialogues = [_tidy(dialogue, lowercase, squeeze_whitespace) for dialogue in dialogues]
        table = examples(dialogues, history, form, max_persona_chars)
        if table.is_empty():
            raise DataError(f"{source}: expected a dialogue of three exchanges, got none; use form next_utterance")
        personas = table.select("user_id", "profile").unique("user_id", keep="first", maintain_order=True)
        write_frame(folder / "examples.parquet", table)
        write_frame(folder / "profiles.parquet", personas)
        if encoder:
            from e2p.users.extract import encode_texts  # here: it brings torch

            vectors = encode_texts(personas["profile"].to_list(), encoder, pooling=pooling)
            version = f"{encoder}-{pooling}"
            write_embeddings(folder / "embeddings.parquet", personas["user_id"], vectors, version=version)
        save_yaml(recommended(output, with_vectors=bool(encoder)), folder / "config.yaml")
    answers = sum(len(dialogue.exchanges) for dialogue in dialogues)
    openings = sum(not dialogue.exchanges[0][0] for dialogue in dialogues)
    print(
        f"{output}: {table.height:,} examples, {personas.height:,} personas in {table['group'].n_unique():,} "
        f"groups, from {len(dialogues):,} dialogues"
    )
    if form == "three_exchanges":
        print(f"dropped: {answers - table.height:,} of {answers:,} answers (not the third of three exchanges)")
    print(f"silent first turns: {openings:,}")
    return Path(output)


def recommended(output: str | Path, with_vectors: bool = True) -> RunConfig:
    """Settings to train on the prepared tables with; the backbone is left for the user to name."""
    folder = Path(output).absolute()
    data = DataConfig(
        examples=str(folder / "examples.parquet"),
        embeddings=str(folder / "embeddings.parquet") if with_vectors else "",
        profile_template="persona: {profile}",
    )
    return RunConfig(data=data, output="runs/personachat")


def read(source: str | Path) -> list[Dialogue]:
    """Read a ParlAI text file or the Hugging Face JSON. Raises DataError with file and line (JSON: key)."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"
        raise DataError(f"{source}: expected a Persona-Chat file, got: {reason}; check the path") from None
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
    dialogues = list(_from_json(path, text) if is_json else _from_parlai(path, text))
    if not dialogues:
        raise DataError(f"{source}: expected at least one dialogue, got none; check the path")
    return dialogues


def _from_parlai(path: Path, text: str) -> Iterator[Dialogue]:
    persona: list[str] = []
    exchanges: list[tuple[str, str]] = []
    previous, where = 0, str(path)
    # Only newlines: str.splitlines would also break at characters that occur inside utterances.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        count, _, rest = line.strip("\r").partition(" ")
        if count == "1" and previous:
            yield _dialogue(persona, exchanges, where)
            persona, exchanges, previous = [], [], 0
        where = f"{path}:{line_number}"
        if count != str(previous + 1):
            raise DataError(f"{where}: expected line number {previous + 1} (or 1), got {line[:60]!r}; mend the line")
        previous += 1
        if rest.startswith((PERSONA, PARTNER)):
            if exchanges:
                raise DataError(f"{where}: expected an exchange, got a persona line; start the dialogue with 1")
            if rest.startswith(PERSONA):
                persona.append(rest.removeprefix(PERSONA).strip())
        else:
            said, _, answer = rest.partition("\t")
            exchanges.append(_exchange(said, answer.partition("\t")[0], not exchanges, where))
    if previous:
        yield _dialogue(persona, exchanges, where)


def _from_json(path: Path, text: str) -> Iterator[Dialogue]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: expected JSON, got: {error.msg}; take the official file") from None
    parts = content if isinstance(content, dict) else {"": content}
    for part, entries in parts.items():
        if not isinstance(entries, list):
            raise DataError(f"{path}: {part}: expected a list of dialogues, got {type(entries).__name__}")
        for row, entry in enumerate(entries):
            where = f"{path}: {part}[{row}]"
            try:
                # The last entry holds the whole conversation: all turns before, and (last candidate) its
                # answer.
                last = entry["utterances"][-1]
                persona = [str(sentence) for sentence in entry["personality"]]
                turns = [str(turn) for turn in (*last["history"], last["candidates"][-1])]
            except (KeyError, IndexError, TypeError) as error:
                raise DataError(
                    f"{where}: expected personality and utterances of history and candidates, got no "
                    f"{error}; take the official file"
                ) from None
            if len(turns) % 2:
                raise DataError(f"{where}: expected a history that ends with the partner, got {len(turns) - 1} turns")
            pairs = zip(turns[::2], turns[1::2], strict=True)
            yield _dialogue(
                persona,
                [_exchange(said, answer, not i, where) for i, (said, answer) in enumerate(pairs)],
                where,
            )


def _exchange(said: str, answer: str, opens: bool, where: str) -> tuple[str, str]:
    said, answer = said.strip(), answer.strip()
    if opens and SILENCE.fullmatch(said):
        said = ""
    elif not said or SILENCE.fullmatch(said):
        raise DataError(f"{where}: expected what the partner says, got {said!r}; only a first turn can be silent")
    if not answer:
        raise DataError(f"{where}: expected 'text<TAB>answer', got {said[:60]!r} without an answer; mend the line")
    return said, answer


def _dialogue(persona: list[str], exchanges: list[tuple[str, str]], where: str) -> Dialogue:
    sentences = tuple(sentence for sentence in persona if sentence.strip())
    if not sentences or not exchanges:
        raise DataError(
            f"{where}: expected a persona and exchanges in the dialogue that ends here, got "
            f"{len(sentences)} and {len(exchanges)}; use a 'self_original' or 'both_original' file"
        )
    return Dialogue(sentences, tuple(exchanges))


def _tidy(dialogue: Dialogue, lowercase: bool, squeeze: bool) -> Dialogue:
    def tidy(text: str) -> str:
        text = text.lower() if lowercase else text
        return " ".join(text.split()) if squeeze else text

    pairs = tuple((tidy(said), tidy(answer)) for said, answer in dialogue.exchanges)
    return Dialogue(tuple(tidy(sentence) for sentence in dialogue.persona), pairs)


def normalise(sentence: str) -> str:
    """What two spellings of a persona sentence share: letters and digits, contractions written out."""
    text = sentence.lower().replace("\u2019", "'")
    for pattern, full in CONTRACTIONS:
        text = pattern.sub(full, text)
    return "".join(character for character in text if character.isalnum())


def persona_id(persona: Iterable[str]) -> str:
    """Stable id of a persona, whatever the order and the spelling of its sentences."""
    key = "\n".join(sorted({normalise(sentence) for sentence in persona}))
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def persona_groups(personas: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Persona -> group, as ids. Sharing more than half of the shorter one's sentences links personas."""
    sentences = {persona_id(p): frozenset(normalise(sentence) for sentence in p) for p in personas}
    parent = {key: key for key in sentences}

    def root(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    holders: defaultdict[str, list[str]] = defaultdict(list)
    for key in sorted(sentences):  # sorted: a group's name must not depend on the order of the dialogues
        own = sentences[key]
        shared = Counter(other for sentence in own for other in holders[sentence])
        for other, count in shared.items():
            if 2 * count > min(len(own), len(sentences[other])):
                first, second = sorted((root(key), root(other)))
                parent[second] = first
        for sentence in own:
            holders[sentence].append(key)
    return {key: root(key) for key in sentences}


def examples(
    dialogues: list[Dialogue],
    history: int = 3,
    form: Literal["next_utterance", "three_exchanges"] = "next_utterance",
    max_persona_chars: int = 1000,
) -> pl.DataFrame:
    """Example table of both forms; see :func:`prepare`.

    The paper's "triple that contains exactly 3 exchanges" is read as a run of three consecutive exchanges in
    which both sides speak: five utterances of context, and the persona's third answer as completion.
    """
    groups = persona_groups(dialogue.persona for dialogue in dialogues)
    rows: list[dict[str, Any]] = []
    profiles: dict[str, str] = {}
    for number, dialogue in enumerate(dialogues):
        user = persona_id(dialogue.persona)
        # One text a persona, also where it comes back in another order: it is what its one vector is made of.
        profile = profiles.setdefault(user, " ".join(dialogue.persona)[:max_persona_chars])
        turns = [turn for said, answer in dialogue.exchanges for turn in (said or OPENING, answer)]
        for index in range(len(dialogue.exchanges)):
            end = 2 * index + 1
            start = max(0, end - (history if form == "next_utterance" else 5))
            if form == "three_exchanges" and (index < 2 or not dialogue.exchanges[index - 2][0]):
                continue
            context = [{"role": "assistant" if i % 2 else "user", "content": turns[i]} for i in range(start, end)]
            rows.append(
                {
                    "example_id": f"{number}-{index}",
                    "user_id": user,
                    "messages": context,
                    "completion": turns[end],
                    "profile": profile,
                    "group": groups[user],
                }
            )
    return pl.DataFrame(rows)
