"""A report of judged playlists against figures worked out by hand, and of results that have none or half of them."""

from __future__ import annotations

import copy
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from e2p.errors import RunError
from e2p.evaluation.audit import Scored, audit, write_results
from e2p.evaluation.figures import costed, draw_gains
from e2p.evaluation.look import GREY, TONES
from e2p.evaluation.playlist_report import GAIN, draw_calibration, markdown, playlist_table, playlists_of
from e2p.evaluation.report import load_results, write_report
from e2p.evaluation.tables import Metric, latex

# Of each arm: hit rate, engagement, affinity, on request, invented.
MEANS = {
    "none": (0.04, 0.4, 0.1, 0.05, 0.2),
    "static": (0.05, 0.38, 0.1, 0.06, 0.2),
    "random": (0.045, 0.41, 0.15, 0.05, 0.1),
    "e2p": (0.08, 0.5, 0.35, 0.1, 0.1),
    "rerank": (0.1, 0.6, 0.4, 0.1, 0.0),
}
NAMES = ("playlist_hits", "engagement", "affinity", "on_request", "invented")
JUDGED: dict[str, Any] = {
    "predictor": {
        **{"kind": "boosting", "setting": 30.0, "auc": 0.7, "auc_ci": [0.65, 0.75], "auc_user": 0.55, "share": 0.25},
        **{"brier": 0.21, "engaged": 0.4, "examples": 1240, "users": 186},
        "calibration": [
            {"predicted": 0.1, "engaged": 0.125, "count": 413},
            {"predicted": 0.4, "engaged": 0.3, "count": 413},
            {"predicted": 0.9, "engaged": 0.8, "count": 414},
        ],
    },
    "readings": {
        arm: {"entries": 1000, "found": 790, "inventions": 200, "duplicates": 10, "empty": 2 * (arm == "none"),
              "miss_rate": miss}
        for arm, miss in zip(MEANS, (0.25, 0.2, None, 0.125, 0.0), strict=True)
    },
    "longest": 10,
    "agreement": {"spearman": 0.9, "kendall": 0.8, "arms": 5, "pairs": 10, "in_order": 9, "tied": 0},
}  # fmt: skip


def results_of(judged: dict[str, Any] | None = JUDGED, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A run of four users with two examples each, whose every example scores its arm's mean; reranking tells no
    likelihood."""
    rows = []
    for user in range(4):
        for k in range(2):
            for arm, values in MEANS.items():
                found = dict(zip(NAMES, values, strict=True))
                found = {name: found[name] + 0.001 * (user - 1.5) for name in names}
                if arm != "rerank":
                    found |= {"nll": 20.0 + user + (arm == "none"), "tokens": 10.0, "bytes": 40.0}
                    found |= {"context_tokens": float(arm != "none")}
                rows += [(f"{user}.{k}", f"u{user}", arm, metric, value) for metric, value in found.items()]
    scores = pl.DataFrame(rows, schema=["example_id", "user_id", "arm", "metric", "value"], orient="row")
    about = {"headline": names[0] if names else "", "playlists": judged}
    return audit([Scored("music", scores, 42, None, about)], resamples=50)


def written(folder: Path, results: dict[str, Any]) -> tuple[str, str]:
    write_results(folder, results)
    write_report(folder)
    html, text = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    return html, text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("music")
    return folder, *written(folder, results_of())


def test_the_table_by_hand() -> None:
    table = playlist_table(results_of())
    assert table.headings == [
        *("arm", "hit rate", "predicted engagement", GAIN, "affinity", GAIN),
        *("on request", "share invented", "miss rate"),
    ]
    assert table.rows == [
        ["none", "0.040", "0.400", "0.0", "0.100", "0.0", "0.050", "0.200", "0.250"],
        ["static", "0.050", "0.380", "−5.0", "0.100", "0.0", "0.060", "0.200", "0.200"],
        ["random", "0.045", "0.410", "+2.5", "0.150", "+50.0", "0.050", "0.100", "–"],
        ["e2p", "0.080", "0.500", "+25.0", "0.350", "+250.0", "0.100", "0.100", "0.125"],
        ["rerank", "0.100", "0.600", "+50.0", "0.400", "+300.0", "0.100", "0.000", "0.000"],
    ]
    assert [bool(note) for note in table.notes] == [False] * 4 + [True]


def test_a_gain_needs_something_to_gain_over() -> None:
    results = results_of()
    engagement, affinity = (results["other_metrics"][at]["arms"] for at in (1, 2))
    engagement["none"]["engagement"] = 0.0
    affinity["none"]["affinity"] = -0.1  # of a ratio to what is negative, the sign would say the contrary
    table = playlist_table(results)
    assert [row[3] for row in table.rows] == [row[5] for row in table.rows] == ["–"] * 5
    for arms in (engagement, affinity):
        del arms["none"], arms["rerank"]
    table = playlist_table(results)
    assert table.rows[0][2:6] == table.rows[4][2:6] == ["–"] * 4
    assert table.rows[3][2:6] == ["0.500", "–", "0.350", "–"]


def test_without_labels_there_is_no_engagement(tmp_path: Path) -> None:
    results = results_of(JUDGED | {"predictor": None, "agreement": None}, ("playlist_hits", "affinity"))
    html, text = written(tmp_path, results)
    assert playlist_table(results).headings == ["arm", "hit rate", "affinity", GAIN, "miss rate"]
    for page in (html, text):
        assert "Engagement is not predicted: that takes examples of both labels" in page
        assert "probability by a classifier" not in page
        assert "Kendall" not in page
    assert not (tmp_path / "figures" / "calibration.png").exists()


def test_another_headline_has_the_same_table() -> None:
    results = results_of(names=("affinity", "playlist_hits", "engagement", "on_request", "invented"))
    assert results["metric"]["name"] == "affinity"
    assert playlist_table(results) == playlist_table(results_of())


def texts(**changes: Any) -> str:
    results = results_of()
    judged = copy.deepcopy(JUDGED)
    for part, values in changes.items():
        judged[part] = judged[part] | values
    results["playlists"] = judged
    found = playlists_of(results)
    assert found is not None
    return "\n".join(found.texts)


def test_sentences() -> None:
    assert texts().splitlines() == [
        "Engagement is predicted by 30 boosted trees, fitted on the training users. On 1,240 playlists of 186 test "
        "users, 40% of them engaged with, its AUC is 0.700, 95% interval [0.650, 0.750]. The user's vector alone "
        "reaches 0.550, which explains 25% of the skill above chance.",
        "Predicted engagement ranks 9 of 10 pairs of arms as held-out plays do; Kendall's tau 0.80, Spearman's rho "
        "0.90 over 5 arms.",
        "Of an answer, the first 10 entries count, as many as the longest training playlist has; a last one that was "
        "cut off does not. In all arms, 5,000 entries were read: 3,950 items, 50 repetitions, 1,000 inventions. "
        "Answers without an entry: none 2.",
    ]
    assert "by a logistic regression (C 0.0001), fitted" in texts(predictor={"kind": "logistic", "setting": 1e-4})
    assert "explains none of the skill" in texts(predictor={"share": -0.1})
    none = {"share": None, "auc": 0.48, "auc_ci": None}
    assert "interval –. The user's vector alone reaches 0.550. Better than chance it is not" in texts(predictor=none)
    assert "is not for sure" in texts(predictor={"auc_ci": [0.499, 0.8]})
    assert "is not for sure" not in texts()
    tied = texts(agreement={"tied": 3, "in_order": 6, "kendall": -0.5})
    assert "ranks 6 of 10 pairs of arms as held-out plays do (3 are tied); Kendall's tau −0.50" in tied
    assert "(1 is tied)" in texts(agreement={"tied": 1})
    flat = {"tied": 10, "in_order": 0, "kendall": None, "spearman": None}
    assert "(10 are tied); one of the two is the same for all arms." in texts(agreement=flat)
    assert "Predicted engagement ranks" not in texts(agreement={"pairs": 0, "arms": 1, "kendall": None})


def test_what_several_seeds_share_is_said() -> None:
    results = results_of() | {"seeds": [42, 43], "runs": ["music", "music/seeds/43"]}
    found = playlists_of(results)
    assert found is not None
    assert found.texts[-1].endswith("agreement, readings and miss rates are those of music.")


def test_calibration_is_drawn_as_it_is(tmp_path: Path) -> None:
    one = draw_calibration(JUDGED, tmp_path)
    assert one is not None
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert 'role="img" aria-label="Predicted and real engagement"' in one.svg
    assert "Lowest group: 10% predicted, 12% engaged; highest: 90% and 80%. Brier score 0.210." in one.caption
    # Lines by their ends: the diagonal of the unit square, and the groups in it.
    lines = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)" clip', one.svg)]
    (left, bottom), (right, top) = next(
        [(float(x), float(y)) for x, y in line]
        for line in lines
        if len(line) == 2 and line[0][0] != line[1][0] and line[0][1] != line[1][1]
    )
    curve = next(
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        for path in re.findall(r'<path d="([^"]*)" style="fill: none; stroke: #0f8b6d', one.svg)
    )
    placed = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y in curve]
    expected = [(bin["predicted"], bin["engaged"]) for bin in JUDGED["predictor"]["calibration"]]
    assert [value for point in placed for value in point] == pytest.approx([v for p in expected for v in p], abs=1e-3)
    for nothing in (None, {}, {"predictor": None}, {"predictor": {"calibration": []}}):
        assert draw_calibration(nothing, tmp_path) is None


def test_the_page_reads_as_one_of_playlists(run: tuple[Path, str, str]) -> None:
    _, html, text = run
    for page in (html, text):
        assert "judged by playlist hit rate, higher is better" in page
        assert "higher is better)" in page or "with the user&#39;s vector; higher is better" in page
        assert page.count("engagement ranks 8 of 10 pairs") == 1  # counted from MEANS
        marks = ["Playlists", "Predicted and real engagement", "Comparisons", "Arms", "Nats per token", "More pictures"]
        headings = re.findall(r"(?:<h[23]>|## |!\[)([^]<\n]+)", page)
        assert "Gain against context" in headings[: headings.index("Playlists")]
        places = [[heading.lower() for heading in headings].index(mark.lower()) for mark in marks]
        assert places == sorted(places)
        head = page[: page.index("Comparisons")]
        assert "erplexity" not in head
        assert "nats" not in head
    assert html.count('aria-label="Predicted and real engagement"') == 1
    assert text.count("(figures/calibration.png)") == 1
    assert "<h2>Nats per token</h2>" in html
    assert "gain over none, playlist hit rate" in html  # the axis of the picture of the costs
    assert "| e2p | 0.080 | 0.500 | +25.0 | 0.350 | +250.0 | 0.100 | 0.100 | 0.125 |" in text
    assert re.search(r"<td>e2p</td><td>0.080</td><td>0.500</td><td>\+25.0</td>", html)


def bars(svg: str) -> list[tuple[str, float]]:
    """Colour and height of the bars, in the order in which they are drawn."""
    found = []
    for corners, colour in re.findall(r'<path d="([^"]*z[^"]*)" clip-path="[^"]*" style="fill: (#\w+)', svg):
        heights = [float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", corners)]
        found.append((colour, max(heights) - min(heights)))
    return [(colour, height) for colour, height in found if height]


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ([0.0, 0.0, 0.0, 0.1, 0.1, -0.1], {"better": 2, "worse": 1, "all at zero": 3}),
        ([0.0, 0.0, -0.1], {"worse": 1, "all at zero": 2}),
        ([0.0, 0.0], {"all at zero": 2}),
        ([0.2, 0.2, -0.1], {"better": 2, "worse": 1}),
    ],
)
def test_users_without_a_difference_are_grey(values: list[float], shares: dict[str, int], tmp_path: Path) -> None:
    metric = Metric("playlist_hits", "playlist hit rate", "higher")
    one = draw_gains({"by_user": values, "against": "random"}, metric, tmp_path)
    assert one is not None
    same = shares.get("all at zero", 0)
    assert (f"Grey: no difference for {same}." in one.caption) == (same > 0)
    drawn = bars(one.svg)
    unit = max(height for _, height in drawn) / max(shares.values())
    seen = [(colour, round(height / unit)) for colour, height in drawn]
    assert [count for colour, count in seen if colour == GREY] == [same] * (same > 0)
    if same:  # the last one drawn hides as many as it counts
        under = next(place for place, (colour, count) in enumerate(seen) if count == same and colour != GREY)
        del seen[under], seen[-1]
    for name in ("better", "worse"):
        assert sum(count for colour, count in seen if colour == TONES[name]) == shares.get(name, 0)


def test_costs_are_found_beside_the_likelihoods() -> None:
    results = results_of()
    assert "context_tokens" not in results["arms"]["e2p"]
    arms = costed(results)
    assert {arm: figures.get("context_tokens") for arm, figures in arms.items()} == {
        **{"none": 0.0, "static": 1.0, "random": 1.0, "e2p": 1.0, "rerank": None}
    }
    own = results | {"arms": {"e2p": {"context_tokens": 7.0}}}
    assert costed(own)["e2p"]["context_tokens"] == 7.0


def test_latex_and_csv_have_it_too(run: tuple[Path, str, str]) -> None:
    folder, *_ = run
    text = (folder / "tables.tex").read_text()
    assert (
        r"arm & hit rate & engagement & gain, \% & affinity & gain, \% & on request & invented & miss rate \\" in text
    )
    assert r"static & 0.050 & 0.380 & $-$5.0 & 0.100 & 0.0 & 0.060 & 0.200 & 0.200 \\" in text
    assert text.count(r"\begin{table}") == 3
    table = playlist_table(results_of())
    assert latex(table, table, "x").count(r"\begin{table}") == 2
    with (folder / "arms.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "miss_rate"]
    assert [(row["arm"], row["miss_rate"], row["found"]) for row in rows] == [
        *(("none", "0.25", "790"), ("static", "0.2", "790"), ("random", "", "790")),
        *(("e2p", "0.125", "790"), ("rerank", "0.0", "790")),
    ]


def test_losses_are_in_their_own_unit(tmp_path: Path) -> None:
    results = results_of()
    results["training"] = {"e2p": {"steps": 3, "validation": {"prefix": 0.4, "none": 0.5, "unit": "kto loss"}}}
    assert "Validation: kto loss on held-out users" in written(tmp_path, results)[0]
    del results["training"]["e2p"]["validation"]["unit"]
    assert "Validation: nats per token on held-out users" in written(tmp_path, results)[0]


def test_results_without_playlists_still_load(tmp_path: Path) -> None:
    results = results_of(None, ())
    assert playlists_of(results) is None
    del results["playlists"]
    html, text = written(tmp_path, results)
    assert load_results(tmp_path)["arms"].keys() == {"none", "static", "random", "e2p"}
    for page in (html, text):
        assert "Playlists" not in page
        assert "judged by" not in page


@pytest.mark.parametrize(
    "change",
    [
        lambda judged: judged.pop("longest"),
        lambda judged: judged["predictor"].pop("auc"),
        lambda judged: judged["predictor"]["calibration"][0].pop("engaged"),
        lambda judged: judged["agreement"].pop("pairs"),
        lambda judged: judged["readings"].update(e2p=3),
    ],
)
def test_broken_playlists_are_one_line(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    results = json.loads(json.dumps(results_of()))
    change(results["playlists"])
    write_results(tmp_path, results)
    with pytest.raises(RunError, match=r"results\.json: playlists: ") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_markdown_cells_cannot_break_out() -> None:
    found = playlists_of(results_of())
    assert found is not None
    text = markdown(found._replace(texts=["a\n# b"]), None, lambda value: str(value).replace("\n", " "))
    assert "a # b" in text
    assert "calibration.png" not in text
