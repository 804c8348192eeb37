"""What arms generate, beyond likelihoods: playlists, next items or texts, made for test prompts, kept and judged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress

from e2p.config import RunConfig
from e2p.data.tables import write_frame
from e2p.evaluation.answers import answer
from e2p.evaluation.arms import Arm
from e2p.evaluation.audit import ANSWERS, RECOMMENDED
from e2p.evaluation.next_item import NextItems, judge_next_items, load_next_items, metrics_of, recommend, without_model
from e2p.evaluation.playlists import METRICS, Shelf, judge_playlists, load_shelf, rerank_answers
from e2p.evaluation.texts import Texts, answer_texts, judge_texts, load_texts, text_metrics
from e2p.model.backbone import FrozenBackbone
from e2p.training.inputs import RunInputs

WITHOUT_MODEL = {"rerank": "playlists", "retrieval": "next_item", "popularity": "next_item"}  # arm: what it needs


@dataclass(frozen=True, eq=False)
class Judges:
    """What generated answers are judged with; at most one of them is there."""

    playlists: Shelf | None = None
    next_item: NextItems | None = None
    texts: Texts | None = None

    def metrics(self) -> list[str]:
        """What they measure, the one that a verdict rests on first."""
        if self.next_item is not None:
            return metrics_of(self.next_item.settings)
        if self.playlists is not None:
            return [name for name in METRICS if name != "engagement" or self.playlists.predictor]
        return []

    def beside(self) -> list[str]:
        """What they measure that a verdict rests on only where the settings say so."""
        return text_metrics(self.texts.settings) if self.texts is not None else []


def open_judges(
    config: RunConfig, inputs: RunInputs, backbone: FrozenBackbone, console: Console | None = None
) -> Judges:
    """Read the tables that the settings name.

    Raises:
        DataError, BackboneError, MissingExtraError: as :func:`load_shelf`, :func:`load_next_items` and
            :func:`load_texts`.
    """
    judged = config.evaluation
    if judged.texts.generate:
        return Judges(texts=load_texts(judged.texts, config.data.examples, inputs, judged.seed))
    if judged.next_item.items:
        return Judges(next_item=load_next_items(judged.next_item, config.data, inputs, backbone))
    if not judged.playlists.items:
        return Judges()
    with console.status("fitting the engagement predictor") if console else nullcontext():
        found = load_shelf(judged.playlists, config.data.examples, inputs, judged.seed, judged.resamples)
    return Judges(playlists=found)


def judge_generated(
    config: RunConfig, judges: Judges, arms: Sequence[Arm], inputs: RunInputs, folder: Path, bars: Progress
) -> tuple[list[pl.DataFrame], dict[str, Any]]:
    """Generate with all arms, keep it in the run folder, and judge it.

    Returns:
        Scores in long form, and for JSON what there is to know about them, as ``playlists``, ``next_item`` and
        ``texts``.
    """
    scores: list[pl.DataFrame] = []
    about: dict[str, Any] = {"playlists": None, "next_item": None, "texts": None}
    budget, seed = config.training.tokens_per_pass, config.evaluation.seed
    extra = [arm for arm in config.evaluation.arms if arm in WITHOUT_MODEL]
    if judges.playlists is not None:
        wanted = config.evaluation.playlists
        lists = [
            answer(
                arm,
                inputs,
                budget,
                draws=wanted.answers,
                temperature=wanted.temperature,
                max_new_tokens=config.evaluation.max_new_tokens,
                seed=seed,
                progress=bars,
            )
            for arm in arms
        ]
        if "rerank" in extra:
            lists.append(rerank_answers(judges.playlists, inputs))
        answers = pl.concat(lists)
        write_frame(folder / ANSWERS, answers)
        judged, about["playlists"] = judge_playlists(answers, judges.playlists, inputs)
        scores.append(judged)
    if judges.next_item is not None:
        certain: dict[str, float] = {}
        found = []
        longest = np.max([arm.examples.tokens.prompt_lengths for arm in arms], axis=0)
        for arm in arms:
            one, certain[arm.name] = recommend(arm, inputs, judges.next_item, longest, budget, seed, bars)
            found.append(one)
        found += [without_model(arm, inputs, judges.next_item) for arm in extra if WITHOUT_MODEL[arm] == "next_item"]
        recommended = pl.concat(found)
        write_frame(folder / RECOMMENDED, recommended)
        judged, about["next_item"] = judge_next_items(recommended, certain, judges.next_item, inputs)
        scores.append(judged)
    if judges.texts is not None:
        length = config.evaluation.max_new_tokens
        answers = pl.concat(answer_texts(arm, inputs, judges.texts, budget, length, seed, bars) for arm in arms)
        write_frame(folder / ANSWERS, answers)
        judged, about["texts"] = judge_texts(answers, judges.texts, config.evaluation.samples, seed)
        scores.append(judged)
    return scores, about
