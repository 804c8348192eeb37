"""The report of a small run whose every text tries to break out, and of runs that are broken."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from e2p.config import RunConfig
from e2p.config_io import to_dict
from e2p.errors import MissingExtraError, RunError
from e2p.evaluation.audit import Scored, audit, write_results
from e2p.evaluation.breakdowns import gains
from e2p.evaluation.metrics import means, per_example, summarise
from e2p.evaluation.report import comparisons_of, console_tables, load_results, report, write_report
from e2p.evaluation.significance import RULE, compare
from e2p.provenance import provenance

EVIL = "<script>alert('x')</script> | a\nb & *c* $d$ \ud83d"
NATS = {"none": 4.0, "static": 3.5, "random": 3.5, "e2p": 3.2}


def make_scores(nats: dict[str, float], users: int = 12) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        for k in range(3):
            tokens = float(rng.integers(4, 20))
            for arm, mean in nats.items():
                nll = tokens * (mean + rng.normal(0, 0.05))
                values = {
                    "nll": nll,
                    "tokens": tokens,
                    "bytes": 4 * tokens,
                    "context_tokens": float(arm != "none"),
                }
                rows += [(f"{user}.{k}", f"u{user}", arm, metric, value) for metric, value in values.items()]
    return pl.DataFrame(rows, schema=["example_id", "user_id", "arm", "metric", "value"], orient="row")


def make_results(nats: dict[str, float] | None = None) -> tuple[dict[str, Any], pl.DataFrame]:
    scores = make_scores(NATS if nats is None else nats)
    history = [{"step": 5, "loss": 4.5, "learning_rate": 1e-3}, {"step": 10, "loss": 3.9}]
    history += [{"step": 10, "eval_loss": 3.8}, {"step": 20, "eval_loss": 3.6}]
    part = {"steps": 20, "parameters": 31008, "seconds": 1.5, "best_step": 20, "history": history}
    results = {
        "format": 1,
        "run": EVIL,
        "task": EVIL,
        "provenance": provenance("e2p evaluate runs/a"),
        "seed": 42,
        "config": to_dict(RunConfig(output=EVIL)),
        "data": {"train": 100, "test": 36, "dropped": {"no_vector": 3}},
        "arms": summarise(scores, 200),
        "comparisons": [dataclasses.asdict(c) for c in compare(per_example(scores), 200)],
        "training": {
            "static": {**part, "validation": {"prefix": 4.2, "none": 4.0}},
            "e2p": {**part, "validation": {"prefix": 3.3, "none": 4.0}},
        },
        "samples": [
            {
                "prompt": EVIL,
                "answers": [
                    {"user_id": "u1", "profile": EVIL, "arm": "none", "text": "same"},
                    {"user_id": "u1", "arm": "e2p", "text": EVIL},
                    {"user_id": "u2", "arm": "e2p", "text": "other"},
                ],
            }
        ],
        "gains": gains(per_example(scores), "lower", 200) if len(scores["arm"].unique()) > 1 else {},
        "extra": {"oracle share": EVIL},
        "warnings": [EVIL],
    }
    return json.loads(json.dumps(results, allow_nan=False)), scores


def make_full_results() -> tuple[dict[str, Any], pl.DataFrame, pl.DataFrame]:
    """Results of format 2 with all there is: two seeds, another metric, breakdowns, leak checks, space, prefix."""
    results, scores = make_results()
    wide = per_example(scores)
    compared = compare(wide, 200, seeds=[wide, wide.with_columns(e2p=pl.col("e2p") * 1.01)])
    rouge = wide.drop("tokens")
    bins = [{"label": f"{EVIL} {n}", "low": n, "high": n + 1.0, "examples": 1200, "users": 7, "difference": -0.25,
             "ci": [-0.5, 0.1] if n else None} for n in range(3)]  # fmt: skip
    leaks = [{"name": EVIL, "fired": False, "found": EVIL, "examples": [EVIL]}]
    leaks += [{"name": "time", "fired": False, "found": "0 of 36", "examples": []}]
    points = np.random.default_rng(1).normal(size=(4, 12))
    names = ("embedding_x", "embedding_y", "prefix_x", "prefix_y")
    space = pl.DataFrame(
        {"user_id": [f"u{n}" for n in range(12)], "cluster": ["A", EVIL.replace("\ud83d", "")] * 6}
        | dict(zip(names, points, strict=True))
    )
    nearest = [{"token": " jazz", "cosine": 0.4}, {"token": EVIL, "cosine": 0.3}]
    results |= {
        "format": 2,
        "verdict": "personalised: better than a random user's vector and than one static token",
        "rule": RULE,
        "runs": ["a", "b"],
        "seeds": [42, 43],
        "metric": {"name": "nats_per_token", "label": "nats per token", "better": "lower"},
        "comparisons": [dataclasses.asdict(c) for c in compared],
        "other_metrics": [
            {
                "metric": {"name": "rougeL", "label": "ROUGE-L", "better": "higher"},
                "arms": means(rouge, "rougeL", 200),
                "comparisons": [dataclasses.asdict(c) for c in compare(rouge, 200, 42, "rougeL", "higher")],
            }
        ],
        "breakdowns": [{"by": "activity", "label": EVIL, "comparison": "true minus random", "bins": bins}],
        "leaks": leaks,
        "valid": True,
        "space": {
            **{"users": 12, "neighbours": 5, "preservation": 0.6, "chance": 5 / 11, "coloured_by": EVIL},
            "clusters": [{"name": name, "users": 6} for name in space["cluster"][:2]],
        },
        "prefix": {
            **{"norm": {"mean": 3.0, "std": 0.1}, "token_norm": 1.0, "user_share": 0.3, "chance": 0.2},
            **{"nearest": nearest, "users": [{"user_id": EVIL, "nearest": nearest}]},
        },
    }
    return json.loads(json.dumps(results, allow_nan=False)), scores, space


def write(folder: Path, results: dict[str, Any], scores: pl.DataFrame | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    if scores is not None:
        scores.write_parquet(folder / "scores.parquet")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results, scores, space = make_full_results()
    folder = write(tmp_path_factory.mktemp("runs") / "a", results, scores)
    space.write_parquet(folder / "space.parquet")
    report(str(folder))
    return folder


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of format 1, as the version before wrote them."""
    results = make_results()[0]
    del results["gains"]
    folder = write(tmp_path_factory.mktemp("runs") / "old", results)
    report(str(folder))
    return folder


PICTURES = ["differences", "gains", "context", "arms", "breakdowns", "space", "likeness", "learning"]


def text_of(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags, addresses and texts; complains when tags do not close in order."""

    VOID = ("meta", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_page_is_one_safe_file(run: Path) -> None:
    text = text_of(run, "report.html")
    page = Page(text)
    assert "script" not in page.tags
    assert "iframe" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses), "nothing may be fetched"
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert page.tags.count("svg") == len(PICTURES)
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert sum("<script>alert('x')</script> | a" in piece for piece in page.texts) >= 12
    assert "worse than no prefix" in page.texts  # the static arm lost on validation data


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_order_of_the_page(run: Path, name: str) -> None:
    """Verdict, its rule, warnings, tiles, three pictures, samples, tables, more pictures, training, provenance."""
    text = text_of(run, name)
    text = text[text.find("<main") :] if name.endswith("html") else text
    marks = ["personalised", "2 training seeds (42, 43)", "The verdict rests on three comparisons", "alert("]
    marks += ["→", "What makes the difference", "Gain by user", "Gain against context"]
    marks += ["The same prompt for different users", "Comparisons", "true minus random", "true minus static"]
    marks += ["true minus none", "over all tokens together", "Arms", "ROUGE-L", "For whom it works", "1,200"]
    marks += ["Leak checks", "0 of 36", "More pictures", "Perplexity by arm", "Users before and after phi"]
    marks += ["What the prefix resembles", "Learning curves", "Training", "31,008", "Data and provenance", "dropped"]
    at = 0
    for mark in marks:
        found = text.lower().find(mark.lower(), at)
        assert found >= 0, f"{mark!r} does not follow"
        at = found


def test_all_files_are_written(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("results.json", "scores.parquet", "space.parquet", "figures"),
        *("report.html", "report.md", "tables.tex", "comparisons.csv", "arms.csv"),
    }
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in PICTURES}
    results = json.loads(text_of(run, "results.json"))
    compared = pl.read_csv(run / "comparisons.csv")
    whole = results["comparisons"] + results["other_metrics"][0]["comparisons"]
    assert compared["difference"].to_list() == [values["difference"] for values in whole]
    assert compared["seed_43"].to_list()[: len(results["comparisons"])] == [
        values["by_seed"][1] for values in results["comparisons"]
    ]
    assert r"\toprule" in text_of(run, "tables.tex")
    assert "alert('x')" in text_of(run, "tables.tex")


def test_everything_a_run_holds_may_be_overwritten(run: Path) -> None:
    source = resources.files("e2p.training").joinpath("run.py").read_text(encoding="utf-8")  # not imported: it is heavy
    listed = re.findall(r'"([^"]+)"', source[source.index("RUN_FILES = ") : source.index("def train(")])
    assert {path.name for path in run.iterdir()} <= set(listed)


def test_markdown_cells_hold_one_line(run: Path) -> None:
    text = text_of(run, "report.md")
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for line in rows:
        assert line.endswith("|")
    tables = [block for block in re.split(r"\n\n+", text) if block.startswith("|")]
    assert len(tables) >= 9
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "\\*c\\*" in text
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert pictures == [f"figures/{name}.png" for name in PICTURES]
    for picture in pictures:
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_results_of_format_1_still_have_their_report(old_run: Path) -> None:
    page = Page(text_of(old_run, "report.html"))
    assert page.tags.count("svg") == 4
    assert "Over all tokens; intervals are each arm's own." in text_of(old_run, "report.md")
    assert {"Comparisons", "Arms", "Training"} <= set(page.texts)
    assert not {"Leak checks", "For whom it works"} & set(page.texts)
    assert any("training seed 42 · 12 users · 36 test examples" in text for text in page.texts)
    assert "over seeds" not in page.texts
    assert "better than a random user's vector and than one static token" in text_of(old_run, "report.md")


NEW = ["rule", "runs", "seeds", "metric", "other_metrics", "breakdowns", "gains", "leaks", "valid", "space", "prefix"]
NEW += ["verdict"]


PARTS = {
    **{"rule": "The verdict rests on three comparisons", "runs": "runs a, b", "seeds": "2 training seeds ("},
    **{"gains": "Gain by user"},
    **{"other_metrics": "ROUGE-L", "breakdowns": "For whom it works", "leaks": "Leak checks"},
    **{"space": "Users before and after phi", "prefix": "What the prefix resembles"},
}


@pytest.mark.parametrize("key", NEW)
def test_a_missing_key_leaves_its_part_out(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, scores, space = make_full_results()
    space.write_parquet(write(tmp_path, results | {key: None}, scores) / "space.parquet")
    parts = dict(PARTS)
    if key not in ("breakdowns", "gains", "space", "prefix"):  # a second for what has no picture of its own
        monkeypatch.setattr("e2p.evaluation.report.draw", lambda *_: [])
        del parts["space"], parts["prefix"], parts["gains"]
    assert write_report(tmp_path).startswith("personalised")
    text = text_of(tmp_path, "report.md")
    assert {name for name, part in parts.items() if part not in text} == {key} & parts.keys()


def test_a_run_without_all_that_format_2_has(tmp_path: Path) -> None:
    results, scores, space = make_full_results()
    bare = {key: value for key, value in results.items() if key not in NEW}
    space.write_parquet(write(tmp_path, bare, scores) / "space.parquet")
    assert write_report(tmp_path).startswith("personalised")
    assert not [part for part in PARTS.values() if part in text_of(tmp_path, "report.html")]


def test_a_leak_is_loud(tmp_path: Path) -> None:
    results, scores, _ = make_full_results()
    results["leaks"][1] |= {"fired": True, "found": "31 of 36 vectors are younger", "examples": ["0.1", "0.2"]}
    results |= {"valid": False, "verdict": "not valid: time (allowed); otherwise personalised: better than all"}
    report(str(write(tmp_path, results, scores)))
    text = text_of(tmp_path, "report.html")
    page = Page(text)
    assert 'class="verdict bad"' in text
    assert 'class="tile good"' not in text
    assert text.count('class="leak"') == 1
    for words in ("not valid", "31 of 36 vectors are younger", "0.1; 0.2", "fired"):
        assert words in page.texts
    assert text.index("not valid") < text.index("31 of 36") < text.index('class="tiles"')
    assert "> **LEAK: time.** 31 of 36 vectors are younger" in text_of(tmp_path, "report.md")
    del results["verdict"]  # then it is the comparisons' and the leak checks'
    assert write_report(write(tmp_path, results, scores)).startswith("not valid: time")


def test_the_pictures_of_several_seeds_are_of_their_mean(tmp_path: Path) -> None:
    """The run's own seed says that every user gains, the mean over both that none does; the scores are not asked."""
    good, bad = make_scores(NATS), make_scores(NATS | {"e2p": 4.2})
    write_results(tmp_path, audit([Scored("run", good, 42), Scored("run/seeds/43", bad, 43)], resamples=200))
    good.write_parquet(tmp_path / "scores.parquet")
    report(str(tmp_path))
    text = text_of(tmp_path, "report.md")
    assert "over 2 training seeds. Right of zero: the user gains; that is 0% of 12 users." in text
    results = load_results(tmp_path)
    wide = [per_example(one) for one in (good, bad)]
    by_hand = np.mean([(one["none"] - one["e2p"]).to_numpy() for one in wide])
    assert results["gains"]["over_none"]["e2p"]["gain"] == pytest.approx(by_hand)
    over_random = [one.select("user_id", gain=pl.col("random") - pl.col("e2p")) for one in wide]
    users = pl.concat(over_random).group_by("user_id").mean().sort("user_id")
    assert results["gains"]["by_user"] == pytest.approx(users["gain"].to_list(), rel=1e-5)


def test_nats_per_token_without_their_tokens_make_no_perplexity(tmp_path: Path) -> None:
    nll = make_scores(NATS).filter(pl.col("metric") == "nll")
    write_results(tmp_path, audit([Scored("theirs", nll.with_columns(metric=pl.lit("nats_per_token")))], resamples=200))
    report(str(tmp_path))
    text = text_of(tmp_path, "report.md")
    assert "nats per token" in text
    assert "erplexity" not in text


def test_a_broken_model_gets_its_report(tmp_path: Path) -> None:
    """A difference whose exponential no float can hold."""
    write_results(tmp_path, audit([Scored("broken", make_scores(NATS | {"e2p": 900.0}))], resamples=200))
    report(str(tmp_path))
    text = text_of(tmp_path, "report.md")
    assert text.startswith("# broken\n\n**harmful: worse than no prefix**")
    assert "| ×1.01e+304 |" in text
    assert not re.search(r"\d{30}", text)


def test_a_metric_of_which_more_is_better(tmp_path: Path) -> None:
    wide = per_example(make_scores({"none": 0.2, "static": 0.25, "random": 0.25, "e2p": 0.6}))
    compared = compare(wide, 200, 42, "rougeL", "higher")
    results: dict[str, Any] = {
        "gains": gains(wide, "higher", 200),
        **{"format": 2, "run": "ranked", "metric": {"name": "rougeL", "label": "ROUGE-L", "better": "higher"}},
        **{"arms": means(wide, "rougeL", 200), "comparisons": [dataclasses.asdict(c) for c in compared]},
    }
    report(str(write(tmp_path, results)))
    text = text_of(tmp_path, "report.md")
    assert text.splitlines()[2].startswith("**personalised")
    assert "Positive is better" in text
    assert "perplexity" not in text.lower()
    assert "100% of 12 users" in text
    assert re.search(r"Of e2p's gain over no prefix, 1\d% is also reached with one static token", text)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"differences.png", "gains.png", "arms.png"}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in console_tables(load_results(tmp_path)):
        console.print(table)
    console.file.close()
    assert "Comparisons (ROUGE-L, mean over examples; positive is better)" in console.export_text()


def test_figures_stand_in_their_texts(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    html, markdown = ((run / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for arm in results["arms"].values():
        assert f"{arm['perplexity']:.2f}" in html
        assert f"{arm['perplexity']:.2f}" in markdown
    difference = f"{results['comparisons'][0]['difference']:+.3f}".replace("-", "−")
    assert difference in html
    assert difference in markdown


def test_share_of_the_gain_that_needs_no_user(tmp_path: Path) -> None:
    results, _ = make_results()
    for arm, nats in (("none", 4.0), ("static", 3.5), ("random", 3.4), ("e2p", 3.0)):
        results["arms"][arm]["nats_per_token"] = nats
    report(str(write(tmp_path, results)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "50% is also reached with one static token and 60% is also reached with a random user" in text
    results["arms"]["random"]["nats_per_token"] = 4.5
    report(str(write(tmp_path, results)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "50% is also reached with one static token. A random user's vector is worse than no prefix." in text
    results["arms"]["static"]["nats_per_token"] = 2.5
    report(str(write(tmp_path, results)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "One static token gains 1.5 times as much as e2p." in text


@pytest.mark.parametrize(
    ("change", "tone"),
    [({}, "good"), ({"random": 3.2}, "fair"), ({"none": 3.0}, "bad"), ({"none": 3.2}, "fair")],
)
def test_tone_of_the_verdict(change: dict[str, float], tone: str, tmp_path: Path) -> None:
    nats = NATS | change
    scores = make_scores(nats)
    for arm in [arm for arm in change if nats[arm] == nats["e2p"]]:  # equal, not only alike
        scores = scores.filter(pl.col("arm") != arm)
        scores = pl.concat([scores, scores.filter(pl.col("arm") == "e2p").with_columns(pl.lit(arm).alias("arm"))])
    results = make_results()[0]
    results["arms"] = summarise(scores, 100)
    results["comparisons"] = [dataclasses.asdict(c) for c in compare(per_example(scores), 100)]
    report(str(write(tmp_path, results)))
    assert f'class="verdict {tone}"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_with_next_to_nothing(tmp_path: Path) -> None:
    scores = make_scores({"none": 4.0}, users=1)
    bare = {"format": 1, "run": "bare", "arms": summarise(scores, 100), "comparisons": []}
    report(str(write(tmp_path, bare, scores)))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Arms" in page.texts
    assert "Training" not in page.texts
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["arms.png"]
    report(str(write(tmp_path, {"format": 1, "run": "empty", "arms": {}, "comparisons": []})))


def test_gains_that_are_all_equal_can_be_drawn(tmp_path: Path) -> None:
    results = make_results()[0]
    results["gains"] = {"over_none": {}, "against": "random", "by_user": [0.0] * 12}
    report(str(write(tmp_path, results)))
    assert "0% of 12 users" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_run_that_diverged_gets_its_report(tmp_path: Path) -> None:
    results, scores = make_results()
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "eval_loss": math.nan}]
    results["training"] = {"e2p": {"history": history, "validation": {"prefix": math.nan, "none": math.nan}}}
    report(str(write(tmp_path, results, scores)))
    assert "| nan | nan | worse than no prefix |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def break_arm(results: dict[str, Any]) -> None:
    del results["arms"]["e2p"]["perplexity"]


def break_comparison(results: dict[str, Any]) -> None:
    del results["comparisons"][0]["p_holm"]


def break_gain(results: dict[str, Any]) -> None:
    results["gains"]["by_user"][3] = "much"


def break_bin(results: dict[str, Any]) -> None:
    del results["breakdowns"][0]["bins"][1]["difference"]


def break_prefix(results: dict[str, Any]) -> None:
    results["prefix"]["norm"] = 3.0


def break_figure(results: dict[str, Any]) -> None:
    results["comparisons"][0]["difference"] = "small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=3), "expected results of format 2, got 3"),
        (lambda r: r.pop("arms"), "arms: expected dict, got NoneType"),
        (lambda r: r.update(samples="x"), "samples: expected list, got str"),
        (lambda r: r.update(samples=["x"]), "samples: expected mappings"),
        (lambda r: r.update(training={"e2p": 3}), "training: expected mappings"),
        (break_arm, "arms.e2p: no number for perplexity"),
        (break_comparison, "comparison: missing p_holm"),
        (break_figure, "comparisons: "),
        (break_bin, "breakdowns: 'difference'"),
        (break_gain, "gains: could not convert"),
        (lambda r: r["gains"]["over_none"].update(e2p={}), "gains: 'gain'"),
        (break_prefix, "prefix: "),
        (lambda r: r.update(leaks=["time"]), "leaks: "),
        (lambda r: r.update(leaks={}), "leaks: expected list, got dict"),
        (lambda r: r.update(space={"users": 3}), "space: 'coloured_by'"),
        (lambda r: r["other_metrics"][0].pop("arms"), "other_metrics: 'arms'"),
        (lambda r: r.update(metric="nats"), "metric: expected dict, got str"),
    ],
)
def test_broken_results_are_one_line(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    results = make_full_results()[0]
    change(results)
    with pytest.raises(RunError, match=message) as caught:
        report(str(write(tmp_path, results)))
    assert "\n" not in str(caught.value)
    assert "results.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b""])
def test_what_is_not_json_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(RunError, match=r"results\.json") as caught:
        report(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not found; evaluate the run first: e2p evaluate"):
        load_results(tmp_path)


def test_a_broken_map_is_named(tmp_path: Path) -> None:
    results, scores, space = make_full_results()
    write(tmp_path, results)
    (tmp_path / "space.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(RunError, match=r"space\.parquet: cannot be read"):
        report(str(tmp_path))
    space.drop("prefix_x").write_parquet(write(tmp_path, results, scores) / "space.parquet")
    with pytest.raises(RunError, match=r"space\.parquet: expected the columns .*; missing: prefix_x"):
        report(str(tmp_path))


def test_comparisons_come_in_table_order() -> None:
    results = make_results()[0]
    results["comparisons"].reverse()
    names = [comparison.name for comparison in comparisons_of(results)]
    assert names == ["true minus random", "true minus static", "true minus none", "static minus none"]


def test_console_tables() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in console_tables(make_results()[0]):
        console.print(table)
    console.file.close()
    text = console.export_text()
    for word in ("true minus random", "better", "< 0.001", "e2p", "perplexity", "[−", "none"):
        assert word in text


def test_what_is_of_one_seed_alone_is_said_to_be(tmp_path: Path) -> None:
    results, scores = make_results()
    write(tmp_path, results | {"seeds": [42, 43], "runs": ["mine", "mine/seeds/43"]}, scores)
    write_report(tmp_path)
    said = "answers, map of the users, prefix and learning curves: mine"
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")
    write(tmp_path, results, scores)
    write_report(tmp_path)
    assert said not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_console_tables_fit_in_80_columns() -> None:
    results = make_results()[0]
    first = results["comparisons"][0]
    results["comparisons"].append(
        first | {"name": "e2p+prompt minus prompt", "verdict": "no difference", "p_holm": 0.5}
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in console_tables(results | {"seeds": [1, 2, 3]}):
        console.print(table)
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    assert "e2p+prompt minus prompt" in text
    assert "3 seeds; negative is better)" in text


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"e2p\[eval\]"):
        report(str(write(tmp_path, *make_results())))


def test_report_loads_no_model_and_imports_lightly(tmp_path: Path) -> None:
    write(tmp_path, *make_results())
    code = (
        "import sys; from e2p.evaluation.report import report\n"
        "early = {'scipy', 'matplotlib', 'sklearn', 'jinja2', 'rich', 'torch'} & sys.modules.keys()\n"
        f"report({str(tmp_path)!r})\n"
        "late = {'torch', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(f'{early} {late}' if early or late else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
