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
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from e2p.config import RunConfig, to_dict
from e2p.errors import DataError, MissingExtraError, RunError
from e2p.evaluation.metrics import per_example, summarise
from e2p.evaluation.report import comparisons_of, console_tables, load_results, report
from e2p.evaluation.significance import compare
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
        "extra": {"oracle share": EVIL},
        "warnings": [EVIL],
    }
    return json.loads(json.dumps(results, allow_nan=False)), scores


def write(folder: Path, results: dict[str, Any], scores: pl.DataFrame | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    if scores is not None:
        scores.write_parquet(folder / "scores.parquet")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("runs") / "a", *make_results())
    report(str(folder))
    return folder


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
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "iframe" not in page.tags
    assert all(address.startswith("#") for address in page.addresses), "nothing may be fetched"
    assert "@import" not in text
    assert page.tags.count("svg") == 4
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert sum("<script>alert('x')</script> | a" in piece for piece in page.texts) >= 7
    assert "worse than no prefix" in page.texts  # the static arm lost on validation data


def test_verdict_leads_and_the_two_controls_stand_first(run: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (run / name).read_text(encoding="utf-8")
        order = [
            text.lower().index("personalised"),
            text.index("Comparisons"),
            text.index("true minus random", text.index("Comparisons")),
            text.index("true minus static", text.index("Comparisons")),
            text.index("true minus none", text.index("Comparisons")),
            text.index("Arms"),
            text.index("ample", text.index("Figures")),
        ]
        assert order == sorted(order)


def test_markdown_cells_hold_one_line(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for line in rows:
        assert line.endswith("|")
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in rows if line.startswith(("| comparison", "| true"))]
    assert set(bars) == {12}
    assert "\\*c\\*" in text
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(pictures) == 4
    for picture in pictures:
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


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
    assert "Figures" in page.texts
    assert "Training" not in page.texts
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["perplexity.png"]
    report(str(write(tmp_path, {"format": 1, "run": "empty", "arms": {}, "comparisons": []})))


def test_gains_that_are_all_equal_can_be_drawn(tmp_path: Path) -> None:
    results, scores = make_results()
    e2p = scores.filter(pl.col("arm") == "e2p")
    scores = pl.concat([e2p, e2p.with_columns(pl.lit("random").alias("arm"))])
    report(str(write(tmp_path, results, scores)))
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


def break_figure(results: dict[str, Any]) -> None:
    results["comparisons"][0]["difference"] = "small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=2), "expected results of format 1, got 2"),
        (lambda r: r.pop("arms"), "arms: expected dict, got NoneType"),
        (lambda r: r.update(samples="x"), "samples: expected list, got str"),
        (lambda r: r.update(samples=["x"]), "samples: expected mappings"),
        (lambda r: r.update(training={"e2p": 3}), "training: expected mappings"),
        (break_arm, "arms.e2p: no number for perplexity"),
        (break_comparison, "comparison: missing p_holm"),
        (break_figure, "comparisons: "),
    ],
)
def test_broken_results_are_one_line(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    results = make_results()[0]
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


def test_broken_scores_are_named(tmp_path: Path) -> None:
    results, scores = make_results()
    write(tmp_path, results)
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(RunError, match=r"scores\.parquet: cannot be read"):
        report(str(tmp_path))
    with pytest.raises(DataError, match="nothing was evaluated"):
        report(str(write(tmp_path, results, scores.clear())))


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
