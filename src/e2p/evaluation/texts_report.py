"""Judged texts in a report: the table of arms beside the references, and a few answers as they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e2p.evaluation.metrics import TEXTS, arm_order, text_metric
from e2p.evaluation.tables import Metric, Section, Table

REFERENCE = "reference"
_HEADINGS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "copied": "copied", "words": "words"}
_VARIETY = {"distinct1": "distinct-1", "distinct2": "distinct-2", "cut": "cut off", "empty": "empty"}
_WORDS = {"greedy": "greedy", "sampled": "drawn"}
_LEGEND = (
    "ROUGE: mean F-measure against the test example's own completion, {stems}. Copied: share of an answer's runs of "
    "three words that stand in its prompt. Words: mean length; where tests below call fewer words better, they are "
    "fewer and no more. Distinct-1, -2: share of different ones among all words, and pairs of neighbours, of an arm's "
    "answers, one to each prompt; it falls as answers get longer. Cut off: share that reached {most} tokens; empty: "
    "share without a word. The last row holds the completions themselves. Intervals and tests stand below, metric by "
    "metric; distinct, cut off and empty are of whole arms and have none."
)


def texts_of(results: Mapping[str, Any]) -> Section | None:
    """What there is to say; None where no texts were judged."""
    found = results.get("texts")
    if not found:
        return None
    judged = results["config"]["evaluation"]
    settings = judged["texts"]
    stems = "words by their stems (Porter)" if settings["stemming"] else "words as they are"
    texts = [f"Answered: {found['examples']:,} of {found['of']:,} test examples."]
    if "sampled" in settings["generate"]:
        each = "1 draw" if settings["draws"] == 1 else f"means over {settings['draws']} draws"
        texts.append(f"Drawn answers: {each} for each prompt at temperature {settings['temperature']:g}.")
    if found["unseen"] > 0 and settings["tokenizer"] == "rouge":
        texts.append(
            f"Of the references' letters and digits, {_share(found['unseen'])} are not ASCII, and ROUGE as it is set "
            "sees nothing of them: evaluation.texts.tokenizer: unicode does."
        )
    if len(results.get("seeds") or ()) > 1:
        run = (results.get("runs") or [results["run"]])[0]
        texts.append(f"Means are over the training seeds; distinct, cut off, empty and the answers below are of {run}.")
    samples = [(str(one["prompt"]), _answers(one)) for one in found["samples"]]
    legend = _LEGEND.format(stems=stems, most=judged["max_new_tokens"])
    return Section("Texts", "texts", f"Texts, {results['run']}.", text_table(results), legend, texts, samples)


def text_table(results: Mapping[str, Any]) -> Table:
    """Every arm's texts by every measure, greedy answers and then drawn ones, and the completions below."""
    means: dict[str, dict[str, float]] = {}
    for section in (results, *(results.get("other_metrics") or ())):
        name = Metric.of(section).name
        means[name] = {arm: float(figures[name]) for arm, figures in section["arms"].items() if name in figures}
    found = results["texts"]
    ways = [way for way in _WORDS if way in results["config"]["evaluation"]["texts"]["generate"]]
    rows = []
    for way in ways:
        for arm in arm_order(found["arms"]):
            cells = [_number(name, means[text_metric(name, way)].get(arm)) for name in TEXTS]
            cells += [_number(name, found["arms"][arm][text_metric(name, way)]) for name in _VARIETY]
            rows.append([arm, _WORDS[way], *cells])
    rows.append([REFERENCE, "", *(_number(name, found["references"].get(name)) for name in (*TEXTS, *_VARIETY))])
    headings = ["arm", "answers", *_HEADINGS.values(), *_VARIETY.values()]
    if len(ways) == 1:
        del headings[1]
        for row in rows:
            del row[1]
    return Table(headings, rows)


def variety_sections(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is known of whole arms, as the CSV takes it."""
    arms = (results.get("texts") or {}).get("arms") or {}
    return [
        {
            "metric": {"name": name, "better": "higher" if name.startswith("distinct") else "lower"},
            "arms": {arm: {name: float(own[name])} for arm, own in arms.items()},
            "comparisons": [],
        }
        for name in dict.fromkeys(name for figures in arms.values() for name in figures)
    ]


def _answers(sample: Mapping[str, Any]) -> Table:
    rows = [[REFERENCE, str(sample["reference"])]]
    rows += [[str(one["arm"]), str(one["text"]) or "(an empty answer)"] for one in sample["answers"]]
    return Table(["answer of", "text"], rows)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return _share(value) if name in ("copied", "cut", "empty") else f"{value:{'.1f' if name == 'words' else '.3f'}}"


def _share(value: float) -> str:
    return f"{value:.1%}"
