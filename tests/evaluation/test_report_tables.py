"""Tables for every reader: LaTeX that cannot break out, CSV with every digit, metrics of either direction."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from e2p.evaluation.metrics import means
from e2p.evaluation.significance import Comparison, compare
from e2p.evaluation.tables import (
    Metric,
    Table,
    arm_table,
    breakdown_table,
    comparison_table,
    escape_latex,
    latex,
    leak_table,
    likeness_table,
    plain,
    token,
    write_csv,
)

NATS = Metric("nats_per_token", "nats per token", "lower")
ROUGE = Metric("rougeL", "ROUGE-L", "higher")


def scores() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    users = [f"u{i // 3}" for i in range(30)]
    arms = {arm: mean + rng.normal(0, 0.05, 30) for arm, mean in (("random", 0.3), ("static", 0.31), ("e2p", 0.5))}
    return pl.DataFrame({"example_id": [f"{i}" for i in range(30)], "user_id": users, **arms})


def section(metric: Metric, seeds: int = 1) -> dict[str, Any]:
    """Arms and comparisons as they come back from JSON."""
    wide = scores()
    tables = [wide.with_columns(e2p=pl.col("e2p") + seed / 7) for seed in range(seeds)] if seeds > 1 else []
    compared = compare(wide, 200, 1, metric.name, metric.better, tables)
    found = {
        "metric": dataclasses.asdict(metric),
        "arms": means(wide, metric.name, 200, 1),
        "comparisons": [dataclasses.asdict(c) for c in compared],
    }
    return json.loads(json.dumps(found))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_metric_of_results() -> None:
    assert Metric.of({}) == NATS
    assert Metric.of({"metric": None}).sign == 1
    assert Metric.of(section(ROUGE)) == ROUGE
    assert ROUGE.sign == -1
    assert Metric.of({"metric": {"name": "dwell_time"}}).label == "dwell time"


def test_an_arm_s_interval_in_nats_is_that_of_its_perplexity() -> None:
    figures = {"nats_per_token": 2.0, "perplexity": np.exp(2.0), "perplexity_ci": [np.exp(1.5), np.exp(2.5)]}
    assert NATS.mean(figures) == (2.0, pytest.approx([1.5, 2.5]))
    assert ROUGE.mean({"rougeL": 0.5, "rougeL_ci": [0.4, 0.6]}) == (0.5, [0.4, 0.6])
    assert ROUGE.mean({"rougeL": 0.5}) == (0.5, None)
    assert ROUGE.mean(figures) is None


def test_csv_holds_the_numbers_of_the_json(tmp_path: Path) -> None:
    sections = [section(NATS, seeds=3), section(ROUGE)]
    write_csv(tmp_path, sections, [42, 43, 44])
    compared, arms = read(tmp_path / "comparisons.csv"), read(tmp_path / "arms.csv")
    wanted = [values for one in sections for values in one["comparisons"]]
    assert len(compared) == len(wanted)
    for row, values in zip(compared, wanted, strict=True):
        low, high = values.pop("ci")
        by_seed = values.pop("by_seed")
        assert (float(row["ci_low"]), float(row["ci_high"])) == (low, high)
        for key, value in values.items():
            assert type(value)(row[key]) == value, key
        seeds = [row[f"seed_{seed}"] for seed in (42, 43, 44)]
        assert [float(value) for value in seeds if value] == (by_seed if len(by_seed) > 1 else [])
    assert [(row["arm"], row["metric"]) for row in arms] == [
        (arm, metric) for metric in ("nats_per_token", "rougeL") for arm in ("static", "random", "e2p")
    ]
    for row in arms:
        figures = sections[row["metric"] == "rougeL"]["arms"][row["arm"]]
        assert float(row[row["metric"]]) == figures[row["metric"]]
        assert float(row[f"{row['metric']}_ci_low"]) == figures[f"{row['metric']}_ci"][0]
        assert int(row["users"]) == 10


def test_csv_of_nothing(tmp_path: Path) -> None:
    write_csv(tmp_path, [{"arms": {}, "comparisons": []}], [])
    assert read(tmp_path / "comparisons.csv") == read(tmp_path / "arms.csv") == []
    single = section(NATS)
    single["comparisons"][0] |= {"ci": None}
    del single["comparisons"][0]["by_seed"]  # as format 1 has it
    write_csv(tmp_path, [single], [42])
    row = read(tmp_path / "comparisons.csv")[0]
    assert (row["ci_low"], row["ci_high"]) == ("", "")
    assert "seed_42" not in row


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50% & $x_1^2$ #3 {a}", r"50\% \& \$x\_1\textasciicircum{}2\$ \#3 \{a\}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a~b|c", r"a\textasciitilde{}b\textbar{}c"),
        ("[−0.1, 0.2]", "{[}$-$0.1, 0.2{]}"),
        ("< 0.001 ± 2 – …", r"$<$ 0.001 $\pm$ 2 -- \dots{}"),
        ("two\n\nlines", "two lines"),
        ("é ö Ž 東 😀 Þ \x07", "é ö Z ? ? ? ?"),
        ("half \ud83d", "half ?"),
    ],
)
def test_latex_escapes(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped
    assert re.sub(r"[À-ÿ]", "", escape_latex(text)).isascii()


def test_latex_of_a_run() -> None:
    one = section(NATS, seeds=2)
    compared = [Comparison.from_dict(values) for values in one["comparisons"]]
    comparisons, arms = comparison_table(compared, NATS), arm_table(one["arms"], NATS)
    text = latex(comparisons, arms, "run_1 & co")
    assert set(re.findall(r"\\begin\{(\w+)\}", text)) == {"table", "tabular"}
    assert "run\\_1 \\& co" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(rule) == 2
    for form, body in re.findall(r"\\begin\{tabular\}\{(l?r+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) in (1 + len(compared), 1 + len(one["arms"]))
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(form) - 1
    assert f"true minus random & {escape_latex(comparisons.rows[0][2])}" in text


def test_comparisons_of_several_seeds_show_their_spread() -> None:
    one = [Comparison.from_dict(values) for values in section(NATS)["comparisons"]]
    more = [Comparison.from_dict(values) for values in section(ROUGE, seeds=3)["comparisons"]]
    assert "over seeds" not in comparison_table(one, NATS).headings
    table = comparison_table(more, ROUGE)
    at = table.headings.index("over seeds")
    assert [row[at] for row in table.rows] == [f"± {c.seed_std:.3f}" for c in more]
    assert more[0].seed_std == pytest.approx(np.std([0, 1 / 7, 2 / 7], ddof=1))
    assert "perplexity" in comparison_table(one, NATS).headings
    assert "perplexity" not in table.headings
    assert table.headings[2] == "ROUGE-L"
    assert (table.lead, table.tones[0], table.marked) == (2, "good", 1)
    for row in (*table.rows, *comparison_table(one, NATS).rows):
        assert len(row) in (len(table.headings), len(comparison_table(one, NATS).headings))


def test_arms_with_little_known() -> None:
    arms: dict[str, Any] = {
        "none": {"examples": 1000, "users": 10, "perplexity": 8.0, "perplexity_ci": None, "nats_per_token": 2.079},
        "e2p": {"examples": 1000, "users": 10, "perplexity": 4.0, "perplexity_ci": [3, 5], "nats_per_token": 1.386},
    }
    table = arm_table(arms, NATS)
    assert table.headings == ["arm", "perplexity", "95% interval", "nats per token", "examples / users"]
    assert table.rows == [
        ["none", "8.00", "–", "2.079", "1,000 / 10"],
        ["e2p", "4.00", "[3.00, 5.00]", "1.386", "1,000 / 10"],
    ]
    arms["e2p"] |= {"context_tokens": 1.0}
    assert arm_table(arms, NATS).rows[0][-2:] == ["–", "1,000 / 10"]
    assert arm_table(means(scores(), "rougeL", 100, 1), ROUGE).headings[:2] == ["arm", "ROUGE-L"]
    assert arm_table({}, NATS).rows == []


def test_breakdown_leaks_and_likeness() -> None:
    bins = [{"label": "1-3", "difference": -0.25, "ci": None, "examples": 1200, "users": 1}]
    table = breakdown_table({"by": "activity", "label": "examples", "bins": bins}, NATS)
    assert table.rows == [["1-3", "−0.250", "–", "1,200", "1"]]
    leaks = [
        {"name": "overlap", "fired": True, "found": "3 of 9", "examples": ["a", "b"]},
        {"name": "time", "fired": False, "found": "none", "examples": []},
        {"name": "future", "fired": False, "found": "no timestamps", "examples": [], "told": False},
    ]
    found = leak_table(leaks)
    assert found.rows == [["overlap", "fired", "3 of 9", "a; b"], ["time", "not fired", "none", ""],
                          ["future", "not known", "no timestamps", ""]]  # fmt: skip
    assert found.tones == ["bad", "good", "none"]
    users = [{"user_id": "u1", "nearest": [{"token": " jazz", "cosine": 0.251}, {"token": "\n", "cosine": -0.1}]}]
    assert likeness_table({"users": users}).rows == [["u1", "·jazz 0.25, ↵ -0.10"]]
    assert isinstance(likeness_table({}), Table)


def test_plain_texts() -> None:
    assert [plain(value) for value in (None, True, 12000, 0.5, 123.456, [1, 2], {"a": 1}, [])] == [
        *("–", "yes", "12,000", "0.5", "123.5", "1, 2", "a 1", "–")
    ]
    assert [token(text) for text in (" a b", "x", " ", "\t")] == ["·a b", "x", "·", "→"]


def test_a_broken_model_s_numbers_stay_short() -> None:
    table = pl.DataFrame({"example_id": ["1", "2"], "user_id": ["a", "b"], "tokens": [1.0, 1.0]})
    for shift, shown in ((900.0, "×1.01e+304"), (5.0, "×148"), (0.5, "+64.9%"), (-900.0, "−100.0%")):
        wide = table.with_columns(none=pl.lit(1.0), e2p=pl.lit(1.0 + shift))
        compared = comparison_table(compare(wide, 50), NATS)
        assert compared.rows[0][compared.headings.index("perplexity")] == shown
    arms = {"e2p": {"examples": 2, "users": 2, "perplexity": 1e304, "perplexity_ci": [9e303, 2e304]}}
    assert arm_table(arms, NATS).rows[0][1:3] == ["1.00e+304", "[9.00e+303, 2.00e+304]"]


def test_nats_without_tokens_have_no_perplexity() -> None:
    named = {"metric": {"name": "nats_per_token"}}
    assert Metric.of(named | {"arms": {"e2p": {"perplexity": 2.0}, "none": {}}}).perplexity
    assert not Metric.of(named | {"arms": {"e2p": {"nats_per_token": 2.0}}}).perplexity
    assert not ROUGE.perplexity
