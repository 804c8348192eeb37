"""Generated texts, such as headlines, judged against the test examples' own completions: ROUGE, copying, variety.

ROUGE (Lin 2004) counts the words that answer and reference share; it comes from the package rouge-score. That package
takes for words what stands between characters other than a-z and 0-9: of a text in another script nothing is left, and
its ROUGE is 0 whatever the answer. How much of the references it cannot see is counted, and the setting
``tokenizer: unicode`` sees all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress

from e2p.config_evaluation import TextsConfig
from e2p.data.batches import Ints
from e2p.data.tables import example_batches
from e2p.errors import MissingExtraError
from e2p.evaluation.answers import answer
from e2p.evaluation.arms import Arm
from e2p.evaluation.leaks import ngrams, standing
from e2p.evaluation.metrics import TEXTS, text_metric
from e2p.evaluation.probe import normalised
from e2p.training.inputs import RunInputs

ROUGE = ("rouge1", "rouge2", "rougeL")
_RUN = 3  # words that make a copy
_SHOWN = 400  # characters of a prompt in the samples
Rouge = Callable[[str, str], dict[str, float]]


@dataclass(frozen=True, eq=False)
class Texts:
    """What generated texts are judged against.

    Args:
        settings: how.
        rows: rows of the example table whose prompts are answered [n].
        references: ``example_id``, ``reference`` (the whole completion, not only what training sees), ``prompt``
            (without a profile), and both as words, ``reference_words`` and ``prompt_words``; row by row [n].
        examples: test examples that there are.
        rouge: F-measures of a reference and an answer.
    """

    settings: TextsConfig
    rows: Ints
    references: pl.DataFrame
    examples: int
    rouge: Rouge


def load_texts(settings: TextsConfig, source: str, inputs: RunInputs, seed: int) -> Texts:
    """Choose the test examples to be answered, and read their prompts and completions.

    Args:
        settings: how many, and how they are judged.
        source: the example table.
        inputs: the run's inputs.
        seed: of the choice. Every example is as likely as any other, and a smaller choice is part of a larger one.

    Raises:
        MissingExtraError: the package rouge-score is not installed.
    """
    rouge = open_rouge(settings)
    rows = inputs.rows("test")
    chosen = rows
    if 0 < settings.most < len(rows):
        chosen = np.sort(np.random.default_rng([seed, 8]).permutation(rows)[: settings.most])
    wanted = pl.DataFrame({"row": chosen})
    turns = pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n")
    parts = [
        frame.join(wanted, "row", "semi").select(
            "row", "example_id", reference="completion", prompt=pl.coalesce("prompt", turns)
        )
        for frame in example_batches(source)
    ]
    references = pl.concat(parts).sort("row").drop("row")
    references = references.with_columns(
        reference_words=normalised(pl.col("reference")), prompt_words=normalised(pl.col("prompt"))
    )
    return Texts(settings, chosen, references, len(rows), rouge)


def text_metrics(settings: TextsConfig) -> list[str]:
    """What is measured on each example, greedy answers first."""
    ways = [way for way in ("greedy", "sampled") if way in settings.generate]
    return [text_metric(name, way) for way in ways for name in TEXTS]


def answer_texts(
    arm: Arm, inputs: RunInputs, texts: Texts, budget: int, max_new_tokens: int, seed: int, progress: Progress
) -> pl.DataFrame:
    """One arm's answers to the chosen prompts, as of :func:`answer`, with the column ``way``: greedy or sampled."""
    few = dataclasses.replace(arm, examples=dataclasses.replace(arm.examples, rows=texts.rows))
    settings = texts.settings
    made = {"greedy": (1, 0.0), "sampled": (settings.draws, settings.temperature)}
    return pl.concat(
        answer(
            few,
            inputs,
            budget,
            draws=draws,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        ).with_columns(way=pl.lit(way))
        for way, (draws, temperature) in made.items()
        if way in settings.generate
    )


def judge_texts(answers: pl.DataFrame, texts: Texts, samples: int, seed: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Scores of generated texts in long form, and what there is to know about them.

    Metrics of the greedy answer, and with ``_sampled`` behind the name those of the draws, averaged over an example's
    draws: ``rouge1``, ``rouge2``, ``rougeL``: F-measure of shared words, pairs of words, and the longest common
    subsequence; ``copied``: share of the answer's runs of three words that stand in the example's prompt, of a shorter
    answer whether it stands there as a whole, 0 for an empty one; ``words``: its length. Words are, but for ROUGE, runs
    of letters and digits of any script in lower case, single characters where no spaces are written.

    Args:
        answers: of :func:`answer_texts`, all arms.
        texts: what they are judged against.
        samples: examples whose answers are shown.
        seed: of these examples.

    Returns:
        example_id, user_id, arm, metric, value; and for JSON: ``examples`` answered and ``of`` how many; ``arms``, with
        ``distinct1``, ``distinct2``, ``cut`` and ``empty`` (shares of the answers) of each arm, draws again with
        ``_sampled``; ``references``: the same of the completions, as far as it applies, with their means of ``copied``
        and ``words``; ``unseen``: share of the references' letters and digits that are not ASCII; ``samples``.
    """
    judged = answers.join(texts.references, "example_id", maintain_order="left").with_columns(
        answer_words=normalised(pl.col("text"))
    )
    pairs = [
        texts.rouge(*pair)
        for pair in (
            judged.select("reference", "text").iter_rows()
            if texts.settings.tokenizer == "rouge"
            else judged.select("reference_words", "answer_words").iter_rows()
        )
    ]
    judged = judged.with_columns(
        *(pl.Series(name, [pair[name] for pair in pairs], dtype=pl.Float64) for name in ROUGE),
        pl.Series("copied", _copied(judged, "answer_words"), dtype=pl.Float64),
        pl.Series("words", _lengths(judged["answer_words"]), dtype=pl.Float64),
    )
    keys = ["example_id", "user_id", "arm"]
    scores: list[pl.DataFrame] = []
    arms: dict[str, dict[str, float]] = {arm: {} for arm in judged["arm"].unique(maintain_order=True)}
    for (way,), part in judged.partition_by("way", as_dict=True, maintain_order=True).items():
        means = part.group_by(keys, maintain_order=True).agg(pl.col(TEXTS).mean())
        means = means.rename({name: text_metric(name, str(way)) for name in TEXTS})
        scores.append(means.unpivot(index=keys, variable_name="metric"))
        for (arm,), own in part.partition_by("arm", as_dict=True, maintain_order=True).items():
            found = _variety([one["answer_words"] for one in own.partition_by("draw")])
            found |= {"cut": _share(own["cut"]), "empty": _share(own["answer_words"] == "")}
            arms[str(arm)] |= {text_metric(name, str(way)): value for name, value in found.items()}
    references = texts.references
    return pl.concat(scores), {
        "examples": references.height,
        "of": texts.examples,
        "arms": arms,
        "references": {
            "copied": float(np.mean(_copied(references, "reference_words"))),
            "words": float(np.mean(_lengths(references["reference_words"]))),
            **_variety([references["reference_words"]]),
        },
        "unseen": unseen(references["reference"].to_list()),
        "samples": _samples(judged, references, samples, seed),
    }


def open_rouge(settings: TextsConfig) -> Rouge:
    """ROUGE-1, -2 and -L (F-measure) of a reference and an answer, by the package rouge-score.

    With ``tokenizer: rouge`` the figures are the package's own. With ``unicode`` both texts must be words already, with
    spaces between them; Porter's stemmer then takes the longer ASCII words, as the package's tokenizer does.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError("rouge-score", "eval", "judging generated texts") from None
    stem = PorterStemmer().stem if settings.stemming else None
    own = None if settings.tokenizer == "rouge" else _Spaced(stem)
    scorer = RougeScorer(list(ROUGE), use_stemmer=settings.stemming, tokenizer=own)

    def rouge(reference: str, text: str) -> dict[str, float]:
        return {name: float(score.fmeasure) for name, score in scorer.score(reference, text).items()}

    return rouge


class _Spaced:
    """Tokenizer, as rouge-score takes it, of words with spaces between them."""

    def __init__(self, stem: Callable[[str], str] | None) -> None:
        self.stem = stem

    def tokenize(self, text: str) -> list[str]:
        """The words, the longer ASCII ones by their stems."""
        stem = self.stem
        if stem is None:
            return text.split()
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in text.split()]


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of n words of some texts (distinct-n, Li et al. 2016); 0 without any.

    It falls the more words there are, so compare only what answers the same prompts at about the same length.

    Args:
        texts: their words, with spaces between them.
        n: words of a run.
    """
    seen, total = set(), 0
    for text in texts:
        words = text.split()
        runs = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        seen.update(runs)
        total += len(runs)
    return len(seen) / total if total else 0.0


def unseen(texts: Sequence[str]) -> float:
    """Share of the letters and digits of some texts that are not ASCII: what rouge-score's own tokenizer drops."""
    letters = [character for text in texts for character in text if character.isalnum()]
    return sum(not character.isascii() for character in letters) / max(len(letters), 1)


def _variety(draws: Sequence[pl.Series]) -> dict[str, float]:
    """distinct-1 and -2, a mean over draws, so that more draws do not look like less variety."""
    return {f"distinct{n}": float(np.mean([distinct(texts.to_list(), n) for texts in draws])) for n in (1, 2)}


def _copied(frame: pl.DataFrame, column: str) -> list[float]:
    """Share of each text's runs of words that stand in its prompt."""
    found = []
    for text, prompt in frame.select(column, "prompt_words").iter_rows():
        runs = ngrams(text, _RUN)
        found.append(len(standing(runs, prompt)) / max(len(runs), 1))
    return found


def _lengths(words: pl.Series) -> list[int]:
    return words.str.count_matches(r"\S+").to_list()


def _share(marks: pl.Series) -> float:
    return float(marks.cast(pl.Float64).to_numpy().mean())


def _samples(judged: pl.DataFrame, references: pl.DataFrame, count: int, seed: int) -> list[dict[str, Any]]:
    """A few examples with their references and the arms' first answers, as they came."""
    random = np.random.default_rng([seed, 9])
    chosen = np.sort(random.choice(references.height, min(count, references.height), replace=False))
    first = judged.filter(pl.col("way") == judged["way"][0], pl.col("draw") == 0)
    found = []
    for example, reference, prompt in references[chosen].select("example_id", "reference", "prompt").iter_rows():
        own = first.filter(pl.col("example_id") == example)
        found.append(
            {
                "example_id": example,
                "prompt": prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN].rstrip()} …",
                "reference": reference,
                "answers": own.select("arm", "way", "text").to_dicts(),
            }
        )
    return found
