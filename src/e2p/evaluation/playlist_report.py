"""Judged playlists in a report: the paper's table of arms, what the judge is worth, and how answers were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2p.evaluation.aggregate import interval
from e2p.evaluation.look import ARM_TONES, GREY, Picture, picture
from e2p.evaluation.metrics import arm_order
from e2p.evaluation.tables import Metric, Section, Table

GAIN = "gain over none, %"
# Metrics in the order of the columns; of those marked, the gain over the bare model follows.
_COLUMNS = (
    ("playlist_hits", "hit rate", False),
    ("engagement", "predicted engagement", True),
    ("affinity", "affinity", True),
    ("on_request", "on request", False),
    ("known", "known", False),
    ("invented", "share invented", False),
)
_KINDS = {"logistic": "a logistic regression (C {:g})", "boosting": "{:g} boosted trees"}
_LEGEND = (
    "Means over examples, higher is better but for known, share invented and miss rate; intervals and tests stand "
    "below, metric by metric. Entries that the user's vector was made of are no news: they are set aside in all "
    "arms and counted (known). Of the others, hit rate: share that are among the user's held-out plays; affinity: "
    "mean cosine of the user's vector with the items'; on request: share that answer the query. Share invented: "
    "entries that are neither an item nor near to one; miss rate: the same of all different entries together."
)
_ENGAGEMENT = " Predicted engagement: probability by a classifier that was trained on past playlists."


def playlists_of(results: Mapping[str, Any]) -> Section | None:
    """What there is to say; None where no playlists were judged."""
    found = results.get("playlists")
    if not found:
        return None
    if predictor := found.get("predictor"):
        calibration_caption(predictor)  # broken results show here, before anything is drawn
    texts = [_predictor(predictor), _agreement(found.get("agreement")), *_reading(found)]
    if len(results.get("seeds") or ()) > 1:
        run = (results.get("runs") or [results["run"]])[0]
        texts.append(f"Means are over the training seeds; agreement, readings and miss rates are those of {run}.")
    table = playlist_table(results)
    legend = _LEGEND + (_ENGAGEMENT if "predicted engagement" in table.headings else "")
    caption = f"Playlists, with gains over the arm none, {results['run']}."
    return Section("Playlists", "playlists", caption, table, legend, [text for text in texts if text])


def playlist_table(results: Mapping[str, Any]) -> Table:
    """Every arm's playlists by every measure, with the gain over the bare model as in the paper's table.

    Gain: 100 (mean / mean of none - 1), a dash unless that of none is above 0. A measure that no arm has is left out.
    """
    means: dict[str, dict[str, float]] = {}
    for section in (results, *(results.get("other_metrics") or ())):
        name = Metric.of(section).name
        means[name] = {arm: float(figures[name]) for arm, figures in section["arms"].items() if name in figures}
    readings = results["playlists"].get("readings") or {}
    arms = arm_order([*readings, *means.get("playlist_hits", {})])
    columns: dict[str, list[list[str]]] = {"arm": [arms]}
    for name, heading, gained in _COLUMNS:
        if found := means.get(name):
            columns[heading] = [[_number(found.get(arm)) for arm in arms]]
            if gained:
                columns[heading].append([_gain(found.get(arm), found.get("none")) for arm in arms])
    if any("entries_an_answer" in one for one in readings.values()):
        columns["entries"] = [[_number((readings.get(arm) or {}).get("entries_an_answer")) for arm in arms]]
    columns["miss rate"] = [[_number((readings.get(arm) or {}).get("miss_rate")) for arm in arms]]
    headings = [name for heading, cells in columns.items() for name in (heading, GAIN)[: len(cells)]]
    rows = zip(*(column for cells in columns.values() for column in cells), strict=True)
    notes = [
        "no text is generated: of the query's items, those nearest to the vector" * (arm == "rerank") for arm in arms
    ]
    return Table(headings, [list(row) for row in rows], notes=notes)


def calibration_caption(predictor: Mapping[str, Any]) -> str:
    """What the picture of the predictor's calibration shows, with its ends in figures."""
    bins = predictor["calibration"]
    low, high = ([float(bins[at][name]) for name in ("predicted", "engaged")] for at in (0, -1))
    return (
        f"Playlists of the test users in {len(bins)} groups by predicted engagement: mean of the prediction against "
        f"the share engaged with. Dashed: both alike. Lowest group: {low[0]:.0%} predicted, {low[1]:.0%} engaged; "
        f"highest: {high[0]:.0%} and {high[1]:.0%}. Brier score {predictor['brier']:.3f}."
    )


def draw_calibration(found: Mapping[str, Any] | None, folder: Path) -> Picture | None:
    """Predicted engagement against the share that engaged, group by group; None without a predictor."""
    predictor = (found or {}).get("predictor") or {}
    if not (bins := predictor.get("calibration")):
        return None
    predicted, engaged = ([float(one[name]) for one in bins] for name in ("predicted", "engaged"))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        axes.plot(predicted, engaged, "o-", color=ARM_TONES["e2p"], linewidth=1.4, markersize=5.5, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="mean predicted engagement", ylabel="share engaged")

    caption = calibration_caption(predictor)
    return picture(folder, "calibration", "Predicted and real engagement", caption, 3.5, paint)


def markdown(found: Section, shown: Picture | None, cell: Callable[[object], str]) -> str:
    """The section in Markdown; ``cell`` makes any text one line without markup."""

    def grid(table: Table) -> str:
        lines = [table.headings, ["---"] * len(table.headings), *table.rows]
        return "\n".join(f"| {' | '.join(map(cell, cells))} |" for cells in lines)

    parts = ["", f"## {found.title}", grid(found.table), cell(found.legend), *map(cell, found.texts)]
    for asked, answers in found.samples:
        parts += [f"**Prompt:** {cell(asked)}", grid(answers)]
    if shown:
        parts += [f"![{cell(shown.title)}](figures/{shown.name}.png)", cell(shown.caption)]
    return "\n\n".join(parts) + "\n"


def _predictor(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "Engagement is not predicted: that takes examples of both labels in training, validation and test."
    kind = _KINDS.get(one["kind"], str(one["kind"])).format(one["setting"])
    bounds = interval(one["auc_ci"], "{:.3f}".format)
    text = (
        f"Engagement is predicted by {kind}, fitted on the training users. On {one['examples']:,} playlists of "
        f"{one['users']:,} test users, {one['engaged']:.0%} of them engaged with, its AUC is {one['auc']:.3f}, 95% "
        f"interval {bounds}. The user's vector alone reaches {one['auc_user']:.3f}"
    )
    if (share := one["share"]) is not None:
        text += f", which explains {f'{share:.0%}' if share > 0 else 'none'} of the skill above chance"
    low = one["auc"] if one["auc_ci"] is None else one["auc_ci"][0]
    doubt = " Better than chance it is not for sure: what it says of the arms counts for little." if low <= 0.5 else ""
    return f"{text}.{doubt}"


def _agreement(one: Mapping[str, Any] | None) -> str:
    if one is None or not one["pairs"]:
        return ""
    text = f"Predicted engagement ranks {one['in_order']} of {one['pairs']} pairs of arms as held-out plays do"
    if one["tied"]:
        text += f" ({one['tied']} {'is' if one['tied'] == 1 else 'are'} tied)"
    if one["kendall"] is None:
        return f"{text}; one of the two is the same for all arms."
    kendall, spearman = (f"{one[name]:.2f}".replace("-", "−") for name in ("kendall", "spearman"))
    return f"{text}; Kendall's tau {kendall}, Spearman's rho {spearman} over {one['arms']} arms."


def _reading(found: Mapping[str, Any]) -> Sequence[str]:
    longest, readings = found["longest"], found.get("readings") or {}
    total = {
        name: sum(int(one[name]) for one in readings.values())
        for name in ("entries", "found", "duplicates", "inventions")
    }
    text = (
        f"Of an answer, the first {longest:,} entries count, as many as the longest training playlist has; a last "
        f"one that was cut off does not. In all arms, {total['entries']:,} entries were read: {total['found']:,} "
        f"items, {total['duplicates']:,} repetitions, {total['inventions']:,} inventions."
    )
    empty = [f"{arm} {readings[arm]['empty']:,}" for arm in arm_order(readings) if readings[arm]["empty"]]
    texts = [text + (f" Answers without an entry: {', '.join(empty)}." if empty else "")]
    if unknown := found.get("users_without_plays"):
        texts.append(f"Test users without held-out plays, whose hit rate is 0 in every arm: {unknown:,}.")
    return texts


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _gain(value: float | None, none: float | None) -> str:
    if value is None or none is None or none <= 0:
        return "–"
    text = f"{100 * (value / none - 1):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
