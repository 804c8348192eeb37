"""What the pictures show, computed by hand; their texts, which must neither overlap nor leave the picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import polars as pl
import pytest
from matplotlib.text import Text

from e2p.evaluation.breakdowns import gains
from e2p.evaluation.curves import draw_learning
from e2p.evaluation.figures import (
    Gain,
    draw,
    draw_arms,
    draw_breakdowns,
    draw_context,
    draw_differences,
    draw_gains,
    draw_sweep,
    gains_over_none,
    spread,
)
from e2p.evaluation.figures_space import draw_likeness, draw_space
from e2p.evaluation.look import TONES, Picture, short
from e2p.evaluation.significance import Comparison, compare
from e2p.evaluation.tables import Metric

NATS = Metric("nats_per_token", "nats per token", "lower")
ROUGE = Metric("rougeL", "ROUGE-L", "higher")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every figure that is made. Of every text that is drawn, its place is kept and checked in the end."""
    figures: list[Any] = []
    texts: dict[Any, dict[Text, tuple[str, Any, Any]]] = {}  # by renderer: a figure is drawn as PNG and as SVG
    draw_text = Text.draw

    class Kept(matplotlib.figure.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    def kept(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip() and not self.get_rotation() % 90:
            place, page = self.get_window_extent(renderer), self.get_figure(root=True).bbox
            texts.setdefault(renderer, {})[self] = self.get_text(), place.frozen(), page.frozen()
        draw_text(self, renderer)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    monkeypatch.setattr(Text, "draw", kept)
    yield figures
    assert figures
    assert len(texts) >= 2
    for found in texts.values():
        check_texts(list(found.values()))


def check_texts(texts: list[tuple[str, Any, Any]]) -> None:
    """No text covers another one or leaves the picture."""
    for text, box, page in texts:
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1, text
    for (one, box, _), (other, its, _) in itertools.combinations(texts, 2):
        width = min(box.x1, its.x1) - max(box.x0, its.x0)
        height = min(box.y1, its.y1) - max(box.y0, its.y0)
        assert not (width > 1 and height > 2), (one, other)


def wide(metric: Metric = NATS, **means: float) -> pl.DataFrame:
    """Three users with 1, 2 and 3 examples, whose scores differ."""
    rng = np.random.default_rng(0)
    users = ["a", "b", "b", "c", "c", "c"]
    noise = {arm: rng.normal(0, 0.02, 6) for arm in means}
    return pl.DataFrame(
        {"example_id": [f"{i}" for i in range(6)], "user_id": users, "tokens": [1.0, 2, 3, 4, 5, 6]}
        | {arm: mean + noise[arm] for arm, mean in means.items()}
    )


def words(picture: Picture) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg)


def places(picture: Picture, names: Sequence[str]) -> list[float]:
    """Where some texts stand, from left to right."""
    found = {}
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", picture.svg):
        at = re.search(r'(?:translate\(| x=")([-\d.]+)', attributes)
        assert at is not None
        found[text] = float(at[1])
    return [found[name] for name in names]


def test_gains_over_none_are_the_results_own() -> None:
    table = wide(none=4.0, prompt=3.5, random=3.2, e2p=3.0)
    arms = {arm: {"nats_per_token": 0.0, "context_tokens": 40.0} for arm in ("none", "prompt", "random", "e2p")}
    arms["random"]["context_tokens"] = 1.0
    told = gains(table, "lower", 500, 1)
    found = gains_over_none(arms | {"outside": {"nats_per_token": 0.0}}, told, NATS)
    assert [(gain.arm, gain.tokens) for gain in found] == [("prompt", 40.0), ("random", 1.0), ("e2p", 40.0)]
    for gain in found:
        one = told["over_none"][gain.arm]
        assert (gain.gain, [*(gain.ci or ())]) == (one["gain"], one["ci"])
        assert gain.gain == pytest.approx(float((table["none"] - table[gain.arm]).mean()))  # type: ignore[arg-type]


def test_gains_over_none_of_older_results() -> None:
    arms: dict[str, Any] = {
        "none": {"nats_per_token": 2.0, "perplexity_ci": None, "context_tokens": 0.0},
        "e2p": {"nats_per_token": 1.5, "perplexity_ci": [np.exp(1.4), np.exp(1.7)], "context_tokens": 1.0},
        "outside": {"nats_per_token": 1.0},
    }
    (gain,) = gains_over_none(arms, {}, NATS)
    assert (gain.arm, gain.tokens, gain.gain) == ("e2p", 1.0, 0.5)
    assert gain.ci == pytest.approx((0.3, 0.6))
    rouge = {arm: {"rougeL": figures["nats_per_token"], "rougeL_ci": [1.0, 3.0], "context_tokens": 1.0}
             for arm, figures in arms.items()}  # fmt: skip
    found = {gain.arm: gain for gain in gains_over_none(rouge, {}, ROUGE)}
    assert found["e2p"] == Gain("e2p", 1.0, -0.5, (-1.0, 1.0))
    assert gains_over_none({"e2p": arms["e2p"]}, {}, NATS) == []


def test_names_are_spread_as_little_as_needed() -> None:
    assert spread([50, 30, 10], 11) == [50, 30, 10]
    assert spread([20, 20, 20], 10) == pytest.approx([30, 20, 10])
    assert spread([100, 21, 20], 10) == pytest.approx([100, 25.5, 15.5])
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = sorted(rng.uniform(0, 60, 6), reverse=True)
        given = spread(asked, 11)
        assert (np.diff(given) <= -11 + 1e-9).all()
        assert np.mean(given) == pytest.approx(np.mean(asked))


@pytest.mark.parametrize("metric", [NATS, ROUGE])
def test_every_picture_of_the_arms(metric: Metric, drawn: list[Any], tmp_path: Path) -> None:
    arms = ("none", "prompt", "static", "random", "shuffled", "null", "e2p", "e2p+prompt")
    table = wide(**{arm: 2.0 - 0.01 * at for at, arm in enumerate(arms)})
    cost = {arm: 40.0 * ("prompt" in arm) + ("e2p" in arm or arm in arms[2:6]) for arm in arms}
    figures: dict[str, Any] = {arm: {"context_tokens": cost[arm], metric.name: 2.0} for arm in arms}
    for at, arm in enumerate(arms):
        name = "perplexity" if metric is NATS else metric.name
        figures[arm] |= {name: 28.0 - at, f"{name}_ci": [27.0 - at, 29.0 - at]}
    comparisons = compare(table, 200, 1, metric.name, metric.better, [table, table.with_columns(e2p=pl.col("none"))])
    made = [
        draw_differences(comparisons, metric, tmp_path),
        draw_gains(gains(table, metric.better, 200), metric, tmp_path, 2),
        draw_context(figures, gains(table, metric.better, 200), metric, tmp_path),
        draw_arms(figures, metric, tmp_path),
    ]
    for picture in made:
        assert picture is not None
        assert (tmp_path / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
        assert ("perplexity" if "Perplexity" in picture.title else metric.label) in " ".join(words(picture))
    side = "Left of zero: better" if metric.better == "lower" else "Right of zero: better"
    assert made[0] is not None
    assert side in made[0].caption
    assert "training seeds" in made[0].caption
    assert made[1] is not None
    assert "over 2 training seeds" in made[1].caption
    assert made[2] is not None
    assert {*arms} - {"none"} <= set(words(made[2]))


def dots(figure: Any) -> int:
    """Small dots of the training seeds."""
    return sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_markersize() < 4)


def test_a_dot_for_every_seed(drawn: list[Any], tmp_path: Path) -> None:
    table = wide(random=3.0, static=2.9, e2p=2.8)
    draw_differences(compare(table, 200, 1), NATS, tmp_path)
    draw_differences(compare(table, 200, 1, seeds=[table] * 3), NATS, tmp_path)
    assert [dots(figure) for figure in drawn] == [0, 6]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_differences([], NATS, tmp_path) is None
    assert draw_gains({}, NATS, tmp_path) is None
    assert draw_context({}, {}, NATS, tmp_path) is None
    assert draw_arms({}, NATS, tmp_path) is None
    assert draw_breakdowns([], NATS, tmp_path) is None
    assert draw_space(None, None, tmp_path) is None
    assert draw_likeness(None, tmp_path) is None
    assert draw_learning({"e2p": {"history": []}}, tmp_path) is None
    assert draw({"arms": {}, "training": {}}, [], None, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def breakdown(by: str, label: str, *bins: tuple[str, float, list[float] | None]) -> dict[str, Any]:
    named = [{"label": name, "difference": mean, "ci": ci, "examples": 5, "users": 3} for name, mean, ci in bins]
    return {"by": by, "label": label, "comparison": "true minus random", "bins": named}


@pytest.mark.parametrize(("metric", "gained"), [(NATS, "better"), (ROUGE, "worse")])
def test_breakdowns(metric: Metric, gained: str, drawn: list[Any], tmp_path: Path) -> None:
    far = "distance of the user's vector from the nearest training user, with a very long explanation that goes on"
    one = breakdown("activity", "examples of the user", ("1-3", -0.2, [-0.3, -0.1]), ("4+", -0.1, [-0.2, 0.1]))
    other = breakdown("distance", far, ("near", 0.1, [0.05, 0.2]), ("far", 0.0, None))
    picture = draw_breakdowns([one, other], metric, tmp_path)
    assert picture is not None
    assert {"1-3", "4+", "near", "far", "examples of the user"} <= set(words(picture))
    assert f"true minus random, {metric.label}" in words(picture)
    (figure,) = drawn
    tones = [[line.get_color() for line in axes.lines if line.get_marker() == "o"] for axes in figure.axes]
    lost = {"better": "worse", "worse": "better"}[gained]
    grey = TONES["no difference"]
    assert tones == [[TONES[gained], grey], [TONES[lost], grey]]


def test_map_of_the_users(drawn: list[Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=30) for name in ("embedding_x", "embedding_y", "prefix_x", "prefix_y")}
    names = ["rock & roll <b>", "日本", "x" * 60]
    points = pl.DataFrame({"user_id": [f"{i}" for i in range(30)], "cluster": names * 10, **columns})
    space = {
        **{"users": 30, "neighbours": 10, "preservation": 0.62, "chance": 0.34, "coloured_by": "taste"},
        "clusters": [{"name": name, "users": 10} for name in names],
    }
    picture = draw_space(space, points, tmp_path)
    assert picture is not None
    assert "62% are also among" in picture.caption
    assert "34%" in picture.caption
    assert "taste" in picture.caption
    assert "rock &amp; roll &lt;b&gt;" in words(picture)
    (figure,) = drawn
    for axes, part in zip(figure.axes, ("embedding", "prefix"), strict=True):
        for line, name in zip(axes.lines, names, strict=True):
            own = points.filter(pl.col("cluster") == name)
            assert list(line.get_xdata()) == list(own[f"{part}_x"])
            assert list(line.get_ydata()) == list(own[f"{part}_y"])


def test_what_the_prefix_resembles(drawn: list[Any], tmp_path: Path) -> None:
    prefix: dict[str, Any] = {
        **{"norm": {"mean": 5.0, "std": 0.5}, "token_norm": 1.25, "user_share": 0.4, "chance": 0.3},
        "nearest": [{"token": " jazz", "cosine": 0.5}, {"token": "\n", "cosine": 0.2}],
    }
    picture = draw_likeness(prefix, tmp_path)
    assert picture is not None
    assert {"·jazz", "↵", "0.50", "0.20"} <= set(words(picture))
    assert "5 ± 0.5 over users, a token's 1.25" in picture.caption
    assert "40%" in picture.caption
    bars = [(patch.get_width(), patch.get_facecolor()) for patch in drawn[0].axes[0].patches]
    assert [width for width, _ in bars] == [0.5, 0.2]
    assert bars[0][1] != bars[1][1], "what is below chance is grey"
    several = [near | {"soft_token": which} for which in (1, 2) for near in prefix["nearest"]]
    picture = draw_likeness(prefix | {"nearest": several, "chance": None}, tmp_path)
    assert picture is not None
    assert {"1 ·jazz", "2 ·jazz"} <= set(words(picture))


def point(value: Any, prefix: float, user: float | None = -0.1, **more: Any) -> dict[str, Any]:
    found = {"value": value, "prefix": prefix, "none": 2.5, **more}
    return found if user is None else found | {"true_minus_random": user, "ci": [user - 0.05, user + 0.05]}


def test_sweep_over_a_wide_range_is_logarithmic(drawn: list[Any], tmp_path: Path) -> None:
    points = [point(1e-2, 2.2, static=2.3), point(1e-4, 2.4), point(1e-3, 2.1, base=True, by_seed=[-0.2, 0.0])]
    picture = draw_sweep("training.learning_rate", points, tmp_path)
    assert picture.name == "sweep_training_learning_rate"
    assert (tmp_path / f"{picture.name}.png").exists()
    assert {"static", "e2p", "no prefix", "training.learning_rate", "true minus random"} <= set(words(picture))
    upper, lower = drawn[0].axes
    assert upper.get_xscale() == lower.get_xscale() == "log"
    line = next(line for line in upper.lines if line.get_label() == "e2p")
    assert list(line.get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert list(line.get_ydata()) == [2.4, 2.1, 2.2]
    intervals = [list(line.get_ydata()) for line in lower.lines if list(line.get_xdata()) == [1e-4, 1e-4]]
    assert intervals == [pytest.approx([-0.15, -0.05])]
    assert "Ringed" in picture.caption


def test_sweep_over_near_values_and_names(drawn: list[Any], tmp_path: Path) -> None:
    picture = draw_sweep("projector.prefix_tokens", [point(n, 2.0) for n in (8, 1, 2, 4)], tmp_path)
    assert np.diff(places(picture, ["1", "2", "4", "8"])) == pytest.approx([places(picture, ["2"])[0] - places(
        picture, ["1"])[0]] * 3, abs=0.1)  # fmt: skip
    names = ["paper", "matched", True, None, "vectors/mini.parquet", "a name that is far too long for an axis"]
    picture = draw_sweep("variants", [point(name, 2.0, None) for name in names], tmp_path)
    assert {"paper", "matched", "True", "None", "mini"} <= set(words(picture))
    (axes,) = drawn[1].axes
    assert [line.get_linestyle() for line in axes.lines if line.get_label() == "e2p"] == ["None"]
    assert "the user matters" not in picture.caption


def test_sweep_that_diverged(tmp_path: Path) -> None:
    points = [point(1.0, float("nan"), float("nan")), point(2.0, 2.0, None, true_minus_random=None, ci=None)]
    assert draw_sweep("training.weight_decay", points, tmp_path).svg.startswith("<svg")


def test_learning_curves_of_all_arms_have_room(drawn: list[Any], tmp_path: Path) -> None:
    """Beside numbers with many digits, too: a warning, which is an error here, tells that they have none."""
    history = [{"step": 10 * n, "loss": 0.99 - n / 500, "eval_loss": 0.93 - n / 1000} for n in range(9)]
    one = {"history": history, "validation": {"none": 0.93, "unit": "misses in 30 draws"}}
    draw_learning(dict.fromkeys(("e2p", "static", "shuffled"), one), tmp_path)
    (axes,) = drawn[-1].axes
    assert axes.get_position().width > 0.7


def test_learning_curves(drawn: list[Any], tmp_path: Path) -> None:
    history = [{"step": 5, "loss": 4.5}, {"step": 10, "eval_loss": 3.8}, {"step": 20, "eval_loss": float("nan")}]
    picture = draw_learning({"e2p": {"history": history, "validation": {"none": 4.0}}}, tmp_path)
    assert picture is not None
    assert {"e2p", "no prefix", "optimiser step"} <= set(words(picture))
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "e2p"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10], [3.8])


def test_pictures_take_the_page_s_colour_and_fetch_nothing(tmp_path: Path) -> None:
    table = wide(random=3.0, static=2.9, e2p=2.8)
    picture = draw_differences(compare(table, 200, 1), NATS, tmp_path)
    assert picture is not None
    assert "currentColor" in picture.svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", picture.svg)


def test_short_labels() -> None:
    assert short("a\n b  c") == "a b c"
    assert short("x" * 40, 10) == "x" * 9 + "…"
    short("half of a pair \ud83d").encode("utf-8")


def test_comparison_without_interval(tmp_path: Path) -> None:
    table = wide(random=3.0, e2p=2.8)[:1]
    found: list[Comparison] = compare(table, 200, 1)
    assert found[0].ci is None
    assert draw_differences(found, NATS, tmp_path) is not None
