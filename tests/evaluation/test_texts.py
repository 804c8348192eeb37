"""Generated texts: ROUGE against its package, copying and variety by hand, and a run in miniature to its report."""

from __future__ import annotations

import builtins
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from e2p.cli import _kinds, _options
from e2p.config import EvaluationConfig, NextItemConfig, PlaylistsConfig, RunConfig, TextsConfig
from e2p.config_io import config_parser, from_dict, from_namespace, save_yaml, to_dict
from e2p.errors import ConfigError, DataError, MissingExtraError, RunError
from e2p.evaluation.audit import Scored, audit
from e2p.evaluation.judge import is_scored, judge, judged_keys, score_seeds, table_keys
from e2p.evaluation.metrics import metric_of
from e2p.evaluation.probe import normalised
from e2p.evaluation.report import load_results, write_report
from e2p.evaluation.texts import ROUGE, Texts, distinct, judge_texts, load_texts, open_rouge, unseen
from e2p.evaluation.texts_report import text_table, texts_of
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from e2p.training.run import train
from tiny_run import PROMPTS, inputs_of, tiny_run

KINDS = dict(_kinds(get_type_hints(RunConfig)))
ARMS = ("none", "prompt", "static", "random", "shuffled", "null", "e2p", "e2p+prompt")
WORDS = st.text(st.sampled_from("ab fishing é ß 7 _-. \n東京 дом running"), max_size=40)


def texts_run(folder: Path) -> RunConfig:
    """Users whose completions are a word that the bare model answers with, and a word of their own."""
    config = tiny_run(folder, users=40, max_steps=4)
    model = E2PModel.from_backbone(inputs_of(config)[0], 4, data=config.data)
    bare = model.generate(list(PROMPTS), use_prefix=False, max_new_tokens=5, do_sample=False)
    words = {prompt: re.findall("[a-z]+", text.lower())[0] for prompt, text in zip(PROMPTS, bare, strict=True)}
    own = pl.col("completion").str.split(" ").list.first()
    table = pl.read_parquet(config.data.examples)
    table = table.with_columns(completion=pl.col("prompt").replace(words) + " " + own)
    table.write_parquet(config.data.examples)
    judged = TextsConfig(generate=("greedy", "sampled"), draws=2)
    return replace(config, evaluation=replace(config.evaluation, texts=judged, max_new_tokens=5))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return texts_run(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def results(config: RunConfig) -> dict[str, Any]:
    train(config)
    return judge(config.output)


@pytest.fixture(scope="module")
def loaded(config: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(config)


def by_name(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["metric"]["name"]: one["arms"] for one in (results, *results["other_metrics"])}


@settings(deadline=None)
@given(st.one_of(WORDS, st.text()), st.one_of(WORDS, st.text()), st.booleans())
def test_rouge_is_the_packages_own(reference: str, text: str, stemming: bool) -> None:
    theirs = RougeScorer(list(ROUGE), use_stemmer=stemming).score(reference, text)
    ours = open_rouge(TextsConfig(stemming=stemming))(reference, text)
    assert ours == {name: theirs[name].fmeasure for name in ROUGE}


ASCII = st.text(st.characters(min_codepoint=9, max_codepoint=126, exclude_characters="<"), max_size=60)


@settings(deadline=None)
@given(st.one_of(ASCII, st.sampled_from(["The cats ran, running!", ""])), ASCII, st.booleans())
def test_words_of_any_script_are_the_same_for_ascii(reference: str, text: str, stemming: bool) -> None:
    theirs = RougeScorer(list(ROUGE), use_stemmer=stemming).score(reference, text)
    spaced = pl.DataFrame({"text": [reference, text]}).select(normalised(pl.col("text")))["text"].to_list()
    ours = open_rouge(TextsConfig(stemming=stemming, tokenizer="unicode"))(*spaced)
    assert ours == {name: theirs[name].fmeasure for name in ROUGE}


def judged(pairs: list[tuple[str, str]], prompts: list[str], settings: TextsConfig, **columns: Any) -> Any:
    """Texts against references of as many users, by one arm unless columns say otherwise."""
    ids = [f"x{at}" for at in range(len(prompts))]
    references = pl.DataFrame(
        {"example_id": ids, "reference": [one for one, _ in pairs[: len(ids)]], "prompt": prompts}
    )
    references = references.with_columns(
        reference_words=normalised(pl.col("reference")), prompt_words=normalised(pl.col("prompt"))
    )
    texts = Texts(settings, np.arange(len(ids)), references, len(ids), open_rouge(settings))
    usual = {"arm": ["e2p"], "way": ["greedy"], "draw": [0], "cut": [False]}
    answers = pl.DataFrame(
        {"example_id": (ids * len(pairs))[: len(pairs)], "text": [text for _, text in pairs]}
    ).with_columns(
        pl.col("example_id").alias("user_id"),
        *(pl.Series(name, (columns.get(name, value) * len(pairs))[: len(pairs)]) for name, value in usual.items()),
    )
    scores, about = judge_texts(answers, texts, 2, 1)
    found: dict[str, dict[str, float]] = {}
    for name, example, value in scores.select("metric", "example_id", "value").iter_rows():
        found.setdefault(name, {})[example] = value
    return found, about


@pytest.mark.parametrize(
    ("text", "copied", "words"),
    [
        ("the old mayor resigns", 1 / 2, 4),  # "the old mayor" stands there, "old mayor resigns" does not
        ("The OLD, mayor!", 1.0, 3),
        ("old mayor", 1.0, 2),  # of less than three words: whether it stands there as a whole
        ("mayor old", 0.0, 2),
        ("may", 0.0, 1),  # a part of a word is no copy
        ("he was tired he was tired", 2 / 4, 6),  # every run counts, as often as it is there
        ("", 0.0, 0),
        (" ?! ", 0.0, 0),
        ("naïve größe", 1.0, 2),
        ("東京", 1.0, 2),
    ],
)
def test_copying_by_hand(text: str, copied: float, words: int) -> None:
    prompt = "Yesterday the old mayor left; he was tired. naïve GRÖßE 東京都"
    found, about = judged([("the mayor goes", text)], [prompt], TextsConfig(("greedy",)))
    assert found["copied"] == {"x0": pytest.approx(copied)}
    assert found["words"] == {"x0": words}
    assert about["arms"]["e2p"]["empty"] == (words == 0)


def test_variety_by_hand() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b", "c"], 2) == 2 / 3  # a b, b a; over the texts' ends no pair is made
    assert distinct(["", "a"], 2) == distinct([], 1) == 0
    pairs = [("a b c", "a b a"), ("d", "a b"), ("", "a b c"), ("", "")]
    found, about = judged(
        pairs,
        ["p q", "a b"],
        TextsConfig(("sampled",), draws=2),
        way=["sampled"],
        draw=[0, 0, 1, 1],
        cut=[True, False, False, False],
    )
    arm = about["arms"]["e2p"]
    assert arm["distinct1_sampled"] == pytest.approx((2 / 5 + 3 / 3) / 2)  # of each draw, then their mean
    assert arm["distinct2_sampled"] == pytest.approx((2 / 3 + 2 / 2) / 2)
    assert (arm["cut_sampled"], arm["empty_sampled"]) == (0.25, 0.25)
    assert found["words_sampled"] == {"x0": 3, "x1": 1}
    assert found["copied_sampled"] == {"x0": 0, "x1": 0.5}
    assert about["references"] == {"copied": 0, "words": 2, "distinct1": 1, "distinct2": 1}


def test_draws_are_averaged_and_other_scripts_are_seen_if_asked() -> None:
    pairs = [("дом и сад", "дом"), ("дом и сад", "сад")]
    for tokenizer, expected in (("rouge", 0.0), ("unicode", 0.5)):
        settings = TextsConfig(("sampled",), draws=2, tokenizer=tokenizer)  # type: ignore[arg-type]
        found, about = judged(pairs, ["-"], settings, way=["sampled"], draw=[0, 1])
        assert found["rouge1_sampled"] == {"x0": pytest.approx(expected)}
        assert about["unseen"] == 1
    assert unseen(["abc 1", "é!"]) == pytest.approx(1 / 5)
    assert unseen(["?!", ""]) == 0


def test_stems_are_compared_unless_told_otherwise() -> None:
    for stemming, expected in ((True, 1.0), (False, 0.0)):
        found, _ = judged([("running", "runs")], ["-"], TextsConfig(("greedy",), stemming=stemming))
        assert found["rougeL"] == {"x0": expected}


def test_metrics_of_draws_are_known() -> None:
    assert metric_of("rougeL_sampled").label == "ROUGE-L of draws"
    assert metric_of("rougeL_sampled").better == "higher"
    assert metric_of("copied_sampled").better == metric_of("copied").better == "lower"
    with pytest.raises(DataError, match="is a lower or a higher auc_sampled better"):
        metric_of("auc_sampled")


def test_all_arms_are_judged_and_the_verdict_rests_on_what_it_did(results: dict[str, Any], config: RunConfig) -> None:
    assert results["metric"]["name"] == "nats_per_token"
    names = [f"{name}{end}" for end in ("", "_sampled") for name in (*ROUGE, "copied", "words")]
    found = by_name(results)
    assert list(found) == ["nats_per_token", *names]
    for name in names:
        assert tuple(found[name]) == ARMS
        assert found[name]["e2p"]["examples"] == 16
    assert tuple(results["texts"]["arms"]) == ARMS
    assert (results["texts"]["examples"], results["texts"]["of"]) == (16, 16)
    answers = pl.read_parquet(Path(config.output) / "answers.parquet")
    counted = dict(answers.group_by("way").len().iter_rows())
    assert counted == {"greedy": 16 * len(ARMS), "sampled": 2 * 16 * len(ARMS)}


def test_scores_are_what_the_kept_answers_say(results: dict[str, Any], config: RunConfig) -> None:
    table = pl.read_parquet(config.data.examples)
    reference = dict(table.select("example_id", "completion").iter_rows())
    answers = pl.read_parquet(Path(config.output) / "answers.parquet")
    scores = pl.read_parquet(Path(config.output) / "scores.parquet")
    got = {(row["example_id"], row["arm"], row["metric"]): row["value"] for row in scores.iter_rows(named=True)}
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    expected: dict[tuple[str, str, str], list[float]] = {}
    for row in answers.iter_rows(named=True):
        for name, score in scorer.score(reference[row["example_id"]], row["text"]).items():
            key = row["example_id"], row["arm"], name + "_sampled" * (row["way"] == "sampled")
            expected.setdefault(key, []).append(score.fmeasure)
    assert len(expected) == 16 * len(ARMS) * 6
    for key, values in expected.items():
        assert got[key] == pytest.approx(np.mean(values)), key
    arms = by_name(results)["rouge1"]
    assert arms["none"]["rouge1"] == pytest.approx(2 / 3)  # half of every completion, and nothing else
    assert arms["e2p"]["rouge1"] < 2 / 3


def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    results: dict[str, Any], config: RunConfig, loaded: tuple[Any, RunInputs]
) -> None:
    backbone, inputs = loaded
    model = E2PModel.from_pretrained(Path(config.output) / "adapter", backbone)
    table = pl.read_parquet(config.data.examples)
    kept = pl.read_parquet(Path(config.output) / "answers.parquet").filter(pl.col("way") == "greedy")
    text = {(row["arm"], row["example_id"]): row["text"] for row in kept.iter_rows(named=True)}
    for row in inputs.rows("test").tolist():
        one, vector = table.row(row, named=True), inputs.embeddings.vectors[inputs.vector_rows[row]]
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        for arm, (profile, prefix) in {
            "none": (None, False),
            "e2p": (None, True),
            "e2p+prompt": (one["profile"], True),
        }.items():
            (alone,) = model.generate([one["prompt"]], [vector], profiles=[profile], use_prefix=prefix, **settings)
            assert text[arm, one["example_id"]] == alone


def test_a_batch_ends_with_its_longest_answer(
    config: RunConfig, loaded: tuple[Any, RunInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every row ends at once, the model is asked once and not until the most tokens are there."""
    backbone = loaded[0]
    prompts = [
        E2PModel.from_backbone(backbone, 4, config.projector, data=config.data).encoder.prompt("hello there")
    ] * 3
    calls = []
    inner = backbone.model.forward

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return inner(*given, **named)

    monkeypatch.setattr(backbone.model, "forward", counted)
    plain = backbone.generate(prompts, [0] * 3, None, max_new_tokens=6, do_sample=False)
    assert len(calls) == len(plain[0]) == 6
    calls.clear()
    stopped = backbone.generate(prompts, [0] * 3, None, max_new_tokens=6, do_sample=False, eos_token_id=plain[0][0])
    assert (len(calls), stopped) == (1, [[], [], []])
    calls.clear()
    backbone.generate(prompts, [0] * 3, None, max_new_tokens=6, do_sample=False, eos_token_id=[])
    assert len(calls) == 6


def test_some_examples_are_drawn_and_fewer_are_part_of_more(config: RunConfig, loaded: tuple[Any, RunInputs]) -> None:
    inputs, found = loaded[1], []
    for most in (0, 12, 5, 100):
        texts = load_texts(TextsConfig(("greedy",), most=most), config.data.examples, inputs, 7)
        assert texts.references["example_id"].to_list() == inputs.keys["example_id"][texts.rows].to_list()
        found.append(set(texts.rows.tolist()))
    assert [len(rows) for rows in found] == [16, 12, 5, 16]
    assert found[2] < found[1] < found[0] == found[3]
    other = load_texts(TextsConfig(("greedy",), most=5), config.data.examples, inputs, 8)
    assert set(other.rows.tolist()) != found[2]


def test_another_metric_can_be_asked_for_and_fewer_examples_answered(
    results: Any, config: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    judged = replace(
        config.evaluation, texts=TextsConfig(("greedy",), most=6), arms=("none", "e2p", "random", "static")
    )
    save_yaml(replace(config, evaluation=replace(judged, headline="rougeL")), run / "config.yaml")
    again = judge(run)
    assert again["metric"] == {"name": "rougeL", "label": "ROUGE-L", "better": "higher"}
    assert again["arms"]["e2p"]["examples"] == 6
    assert by_name(again)["nats_per_token"]["e2p"]["examples"] == 16
    assert write_report(run)
    for wrong in ("rougeL_sampled", "rouge"):
        save_yaml(replace(config, evaluation=replace(judged, headline=wrong)), run / "config.yaml")
        with pytest.raises(DataError, match=r"headline: expected one of nats_per_token, rouge1, .*, words, got"):
            judge(run)


def test_runs_that_were_scored_before_are_not_judged_anew(results: Any, config: RunConfig, tmp_path: Path) -> None:
    """Neither their settings nor their scores know of texts; with texts asked for, they are scored again."""
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    older = replace(config, output=str(run), evaluation=replace(config.evaluation, texts=TextsConfig()))
    plain = to_dict(older)
    del plain["evaluation"]["texts"]
    about = json.loads((run / "scored.json").read_text())
    del about["texts"]
    (run / "scored.json").write_text(json.dumps(about | {"config": plain}))
    (run / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    assert judged_keys(older).keys() == set()
    before = (run / "scores.parquet").stat().st_mtime_ns
    assert is_scored(run, table_keys(older))
    assert score_seeds(run, [config.training.seed]) == [run]
    assert (run / "scores.parquet").stat().st_mtime_ns == before
    save_yaml(replace(config, output=str(run)), run / "config.yaml")
    assert not is_scored(run, table_keys(config))


def test_a_seed_scored_before_is_one_experiment_with_one_scored_now() -> None:
    rows = [(f"{u}", f"u{u}", arm, "rougeL", float(u + (arm == "e2p"))) for u in range(4) for arm in ("none", "e2p")]
    scores = pl.DataFrame(rows, schema=["example_id", "user_id", "arm", "metric", "value"], orient="row")
    now = to_dict(RunConfig())
    before = json.loads(json.dumps(now))
    del before["evaluation"]["texts"]
    seeds = [Scored(f"r{seed}", scores, seed, None, {"config": one}) for seed, one in ((1, before), (2, now))]
    assert audit(seeds, resamples=100)["seeds"] == [1, 2]
    now["evaluation"]["texts"]["draws"] = 3
    with pytest.raises(DataError, match=r"they differ in evaluation\.texts\.draws"):
        audit(seeds, resamples=100)


def test_the_report_shows_arms_beside_references_and_real_answers(results: Any, config: RunConfig) -> None:
    folder = Path(config.output)
    write_report(folder)
    table = text_table(results)
    assert table.headings[:6] == ["arm", "answers", "ROUGE-1", "ROUGE-2", "ROUGE-L", "copied"]
    assert [row[:2] for row in table.rows] == [
        *([arm, way] for way in ("greedy", "drawn") for arm in ARMS),
        ["reference", ""],
    ]
    means = by_name(results)
    e2p = table.rows[ARMS.index("e2p")]
    assert e2p[4] == f"{means['rougeL']['e2p']['rougeL']:.3f}"
    assert table.rows[-1][2:8] == ["–", "–", "–", "0.0%", "2.0", "0.250"]  # 16 times two words: 8 of 32
    answers = pl.read_parquet(folder / "answers.parquet")
    own = {(row["example_id"], row["arm"], row["way"]): row["text"] for row in answers.iter_rows(named=True)}
    examples = pl.read_parquet(config.data.examples)
    assert len(results["texts"]["samples"]) == 2
    pages = {name: (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")}
    for sample in results["texts"]["samples"]:
        row = examples.row(by_predicate=pl.col("example_id") == sample["example_id"], named=True)
        assert (sample["prompt"], sample["reference"]) == (row["prompt"], row["completion"])
        assert [one["arm"] for one in sample["answers"]] == list(ARMS)
        for one in sample["answers"]:
            assert one["text"] == own[sample["example_id"], one["arm"], "greedy"]
        for page in pages.values():
            assert sample["reference"] in page
        assert f"**Prompt:** {sample['prompt']}" in pages["report.md"]
        assert f'<p class="prompt">{sample["prompt"]}</p>' in pages["report.html"]
    for page in pages.values():
        for words in ("distinct-2", "Answered: 16 of 16 test examples", "means over 2 draws", "by their stems"):
            assert words in page
        assert page.index("Texts") < page.index("Comparisons")
        assert "not ASCII" not in page
    assert "tab:texts" in (folder / "tables.tex").read_text()
    with (folder / "arms.csv").open(newline="") as file:
        rows = {(row["metric"], row["arm"]): row for row in csv.DictReader(file)}
    got = float(rows["distinct2_sampled", "e2p"]["distinct2_sampled"])
    assert got == results["texts"]["arms"]["e2p"]["distinct2_sampled"]


def test_what_rouge_cannot_see_is_said(results: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(results))
    changed["texts"]["unseen"] = 0.25
    found = texts_of(changed)
    assert found is not None
    assert any("25.0% are not ASCII" in text for text in found.texts)
    changed["config"]["evaluation"]["texts"]["tokenizer"] = "unicode"
    changed["seeds"], changed["runs"] = [42, 43], ["run", "run/seeds/43"]
    changed["texts"]["samples"][0]["answers"][0]["text"] = ""
    found = texts_of(changed)
    assert found is not None
    assert not any("not ASCII" in text for text in found.texts)
    assert found.texts[-1].endswith("the answers below are of run.")
    assert found.samples[0][1].rows[1] == ["none", "(an empty answer)"]
    assert texts_of(results | {"texts": None}) is None


@pytest.mark.parametrize("broken", ["arms", "references", "samples", "unseen"])
def test_broken_texts_are_one_line(results: dict[str, Any], broken: str, tmp_path: Path) -> None:
    changed = json.loads(json.dumps(results))
    del changed["texts"][broken]
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(RunError, match=r"results\.json: texts: .*evaluate the run again"):
        load_results(tmp_path)


def test_long_prompts_are_shown_in_part() -> None:
    _, about = judged([("a", "b"), ("a", "b")], ["w " * 300, "short"], TextsConfig(("greedy",)))
    assert sorted(len(one["prompt"]) for one in about["samples"]) == [5, 401]
    assert about["samples"][0]["prompt"].endswith("w …")


def test_without_the_package_the_extra_is_named(
    config: RunConfig, loaded: tuple[Any, RunInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "rouge_score":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"judging generated texts needs .*pip install 'e2p\[eval\]'"):
        load_texts(TextsConfig(("greedy",)), config.data.examples, loaded[1], 1)


@pytest.mark.parametrize("words", [["greedy,sampled"], ["[greedy, sampled]"]], ids=str)
def test_the_command_line_and_yaml_take_both_ways(words: list[str]) -> None:
    parser = config_parser()
    read = from_namespace(parser, parser.parse_args(_options(["--evaluation.texts.generate", *words], KINDS)[0]))
    assert read.evaluation.texts == TextsConfig(generate=("greedy", "sampled"))
    assert from_dict(to_dict(read)) == read


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong, key in (
        ({"generate": ("greedily",)}, "generate: expected greedy, sampled, or both"),
        ({"generate": ("greedy", "greedy")}, "generate"),
        ({"draws": 0}, "draws"),
        ({"temperature": 0.0}, "temperature"),
        ({"most": -1}, "most"),
        ({"tokenizer": "words"}, "tokenizer: expected rouge or unicode, got 'words'"),
    ):
        with pytest.raises(ConfigError, match=rf"evaluation\.texts\.{key}"):
            TextsConfig(**wrong)  # type: ignore[arg-type]
    texts = TextsConfig(generate=("greedy",))
    with pytest.raises(ConfigError, match=r"expected one of playlists, next_item and texts, got 'playlists and texts'"):
        EvaluationConfig(texts=texts, playlists=PlaylistsConfig("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match=r"got 'next_item and texts'"):
        EvaluationConfig(texts=texts, next_item=NextItemConfig("a", "b", "c"))
