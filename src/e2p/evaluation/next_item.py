"""Next items: what each arm writes as semantic ids, ranked, and where the true item stands among it.

Two rankings of every query. ``sampled`` is the paper's protocol (Section 4.3): thirty draws at temperature 1, the
different ones ranked by log-probability. ``beam`` is what a system would show: the likeliest items by beam search.
Retrieval and popularity have one ranking, which stands for both. What a user had before is dropped from all of them.
Thirty draws hit or miss by luck, too; what they would hit on average follows from the true item's probability.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from rich.progress import Progress

from e2p.config import DataConfig
from e2p.config_evaluation import NextItemConfig
from e2p.data.batches import Ints, token_passes
from e2p.data.sources import open_table
from e2p.data.templates import EncodedPrompt
from e2p.errors import ConfigError, DataError
from e2p.evaluation.arms import Arm
from e2p.items.catalogue import load_catalogue
from e2p.items.decoding import best_items, sample_items, score_items
from e2p.items.retrieval import nearest
from e2p.items.vocabulary import ADAPTED, CodeVocabulary, open_codes, require_spoken
from e2p.model.backbone import FrozenBackbone
from e2p.model.prefill import prefill
from e2p.training.inputs import RunInputs
from e2p.users.behaviour import read_interactions

SAMPLED, BEAM, TRUE = "sampled", "beam", "true"
COLUMNS = ("example_id", "user_id", "arm", "way", "items", "logprobs")
_ROWS = 65_536
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class NextItems:
    """What next items are judged with; items are rows of the codes.

    Args:
        settings: how they are generated and judged.
        vocabulary: codes and their tokens.
        names: what the items are called.
        vectors: float32 [N, D], in the users' space; zeros where nothing is known.
        popularity: int64 [N]: interactions that the training has seen.
        earlier: of each user, the times of what he had (int64 microseconds, growing) and the items.
        targets: the true item of each example, -1 where it is not a test example.
        about: counts, for the report.
    """

    settings: NextItemConfig
    vocabulary: CodeVocabulary
    names: Sequence[str]
    vectors: Floats
    popularity: Ints
    earlier: Mapping[str, tuple[Ints, Ints]]
    targets: Ints
    about: Mapping[str, Any]

    def had(self, keys: pl.DataFrame) -> list[Ints]:
        """What the users of some examples had before them; nothing, where seen items are kept."""
        none = np.zeros(0, np.int64), np.zeros(0, np.int64)
        found = []
        for user, time in zip(keys["user_id"].to_list(), keys["timestamp"].cast(pl.Int64).to_list(), strict=True):
            times, items = self.earlier.get(user, none) if self.settings.seen == "drop" else none
            found.append(items[: int(np.searchsorted(times, time, side="left"))])
        return found


def load_next_items(
    settings: NextItemConfig, data: DataConfig, inputs: RunInputs, backbone: FrozenBackbone
) -> NextItems:
    """Read and check the tables that next items are judged with.

    Args:
        settings: where they are.
        data: the run's; its example table has a column item_id.
        inputs: the run's inputs.
        backbone: must have a token for each code.

    Raises:
        BackboneError: the backbone does not speak these codes.
        ConfigError: texts are put together in another way than in its adaptation.
        DataError: a table lacks a column; a test example has no time, its item no codes, or its completion is not that
            item's.
    """
    source, ids = data.examples, open_codes(settings.codes)
    require_spoken(backbone.source, ids)
    _check_texts(backbone.source, data)
    vocabulary = CodeVocabulary.of(ids, backbone.tokenizer)
    catalogue = load_catalogue(settings.items)
    if catalogue.dim != inputs.embeddings.dim:
        raise DataError(
            f"{settings.items}: expected vectors of {inputs.embeddings.dim} numbers, in the users' space, got "
            f"{catalogue.dim}; take the table that was prepared with the users' vectors"
        )
    unknown = next((item for item in ids.ids if item not in catalogue.rows), None)
    if unknown is not None:
        raise DataError(f"{settings.items}: expected every item that has codes, got no {unknown!r}; add it")
    rows = np.array([catalogue.rows[item] for item in ids.ids], np.int64)
    counts = _columns(settings.items, "popularity")["popularity"].cast(pl.Int64).fill_null(0).to_numpy()
    history = read_interactions(settings.interactions)
    if "timestamp" not in history.columns:
        raise DataError(f"{settings.interactions}: expected a column timestamp, got none; add when each was")
    tested = inputs.keys[inputs.rows("test")]
    if tested["timestamp"].null_count():
        raise DataError(f"{source}: expected a timestamp for every test example, got none in some; add when each was")
    targets = _targets(source, inputs, vocabulary)
    about: dict[str, Any] = {
        "items": len(ids),
        "items_without_codes": len(catalogue) - len(ids),
        "unseen_targets": int((counts[rows][targets[targets >= 0]] == 0).sum()),
        "codes": ids.report(),
    }
    vectors, names = catalogue.vectors[rows], [catalogue.names[row] for row in rows]
    earlier = _earlier(history, ids.rows)
    shelf = NextItems(settings, vocabulary, names, vectors, counts[rows], earlier, targets, about)
    true = targets[inputs.rows("test")]
    about["seen_targets"] = sum(one in had for one, had in zip(true.tolist(), shelf.had(tested), strict=True))
    return shelf


def _check_texts(backbone: str, data: DataConfig) -> None:
    """An adapted backbone reads prompts as it was taught to; others are another language to it."""
    path = Path(backbone) / ADAPTED
    if not path.is_file():
        return
    taught = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
    for name in ("chat", "profile_template"):
        if taught.get(name, getattr(data, name)) != getattr(data, name):
            raise ConfigError(
                f"data.{name}: expected {taught[name]!r}, with which {backbone} was adapted, got "
                f"{getattr(data, name)!r}; set it to that"
            )


def _columns(source: str, *names: str) -> pl.DataFrame:
    table = open_table(source)
    table.require(*names)
    return pl.concat(batch for _, batch in table.batches(names, _ROWS))


def _earlier(history: pl.DataFrame, rows: Mapping[str, int]) -> dict[str, tuple[Ints, Ints]]:
    """By user; what has no codes cannot be named, so it is not kept from anybody."""
    table = pl.DataFrame({"item_id": list(rows), "row": list(rows.values())}, schema={"item_id": str, "row": int})
    known = history.join(table, on="item_id").sort("timestamp")
    parts = known.group_by("user_id", maintain_order=True).agg(pl.col("timestamp").cast(pl.Int64), "row")
    return {user: (np.array(when, np.int64), np.array(items, np.int64)) for user, when, items in parts.iter_rows()}


def _targets(source: str, inputs: RunInputs, vocabulary: CodeVocabulary) -> Ints:
    """Rows of the test examples' items, checked against the completions' tokens."""
    items = _columns(source, "item_id")["item_id"].cast(pl.String).to_list()
    targets = np.full(len(items), -1, np.int64)
    for row in inputs.rows("test"):
        found = vocabulary.ids.rows.get(items[row])
        if found is None:
            raise DataError(
                f"{source}: row {row}: item {items[row]!r} has no codes in {vocabulary.ids.source}; give it codes "
                "(SemanticIds.encode) or drop the row"
            )
        targets[row] = found
        tokens = [int(t[c]) for t, c in zip(vocabulary.tokens, vocabulary.ids.codes[found].tolist(), strict=True)]
        if inputs.tokens[int(row)].completion[: len(tokens)].tolist() != tokens:
            raise DataError(
                f"{source}: row {row}: expected the codes of item {items[row]!r} as completion, got others; prepare "
                "the examples again with these codes"
            )
    return targets


@torch.no_grad()
def recommend(
    arm: Arm,
    inputs: RunInputs,
    shelf: NextItems,
    lengths: Ints,
    budget: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[pl.DataFrame, float]:
    """What one arm of the model recommends for every test query, by both ways, and how likely it draws the true item.

    Every arm draws with the same random numbers in the same order, so that arms differ by what they are and less by
    luck.

    Args:
        arm: the arm.
        inputs: the run's inputs.
        shelf: codes and settings.
        lengths: tokens of each prompt of the table in the arm where it is longest [N], so that all arms make the same
            passes.
        budget: tokens of prompts and items held at a time.
        seed: of the draws.
        progress: where progress is shown.

    Returns:
        ``example_id``, ``user_id``, ``arm``, ``way``, ``items`` (ids, best first; of the way ``true`` the true one) and
        their ``logprobs`` (of the way ``true`` at the draws' temperature); and the share of the queries whose beam
        search has certainly found the likeliest items.
    """
    settings, rows, backbone = shelf.settings, arm.examples.rows, arm.model.backbone
    task: Any = progress.add_task(f"{arm.name} items", total=len(rows)) if progress else None
    kept = max(settings.samples, settings.beam) * shelf.vocabulary.levels
    parts, certain = [], 0
    for number, part in enumerate(token_passes(lengths[rows].astype(np.int64) + kept, budget)):
        chosen = rows[part]
        batch = arm.examples.batch(chosen).to(backbone.device)
        prefix = arm.model.projector(batch.embeddings, batch.present) if arm.use_prefix else None
        texts = [arm.examples.tokens[int(row)] for row in chosen]
        prompts = [EncodedPrompt(text.prompt.tolist(), text.after_bos, text.after_system, 0) for text in texts]
        read = prefill(backbone, prompts, [arm.model.splice_at(prompt) for prompt in prompts], prefix)
        generator = torch.Generator(backbone.device).manual_seed(
            int(np.random.SeedSequence([seed, 9, number]).generate_state(1)[0])
        )
        drawn = sample_items(read, shelf.vocabulary, settings.samples, settings.temperature, generator, budget)
        best = best_items(read, shelf.vocabulary, settings.beam, tokens_per_pass=budget)
        certain += int(best.certain.sum())
        true = torch.from_numpy(shelf.targets[chosen])
        likely = score_items(read, shelf.vocabulary, true, settings.temperature, budget)
        for way, found in (
            (SAMPLED, _ranked(drawn.rows, drawn.logprobs)),
            (BEAM, (best.rows, best.logprobs)),
            (TRUE, (true[:, None], likely[:, None])),
        ):
            parts.append(_frame(arm.name, way, inputs, shelf, chosen, *(tensor.cpu().numpy() for tensor in found)))
        if progress:
            progress.update(task, advance=len(part))
    return pl.concat(parts), certain / len(rows)


def _ranked(rows: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different items of each query's draws, likeliest first; -1 at the end where fewer were drawn."""
    rows, order = rows.sort(dim=1, stable=True)
    logprobs = logprobs.gather(1, order)
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[:, 1:] = rows[:, 1:] == rows[:, :-1]
    logprobs = logprobs.masked_fill(again, -torch.inf)
    logprobs, order = logprobs.sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order).masked_fill(logprobs == -torch.inf, -1), logprobs


def _frame(
    arm: str, way: str, inputs: RunInputs, shelf: NextItems, rows: Ints, items: Ints, logprobs: Floats | None
) -> pl.DataFrame:
    names = pl.Series(shelf.vocabulary.ids.ids, dtype=pl.String)
    kept = [(line >= 0) & ~np.isin(line, had) for line, had in zip(items, shelf.had(inputs.keys[rows]), strict=True)]
    found = [line[new] for line, new in zip(items, kept, strict=True)]
    likely: list[Any] = [None] * len(rows)
    if logprobs is not None:
        likely = [values[new].tolist() for values, new in zip(logprobs, kept, strict=True)]
    return (
        inputs.keys.select("example_id", "user_id")[rows]
        .with_columns(
            arm=pl.lit(arm),
            way=pl.lit(way),
            items=pl.Series([names.gather(line) for line in found], dtype=pl.List(pl.String)),
            logprobs=pl.Series(likely, dtype=pl.List(pl.Float32)),
        )
        .select(COLUMNS)
    )


def without_model(arm: str, inputs: RunInputs, shelf: NextItems) -> pl.DataFrame:
    """The arms ``retrieval``, the items whose vectors have the greatest dot product with the user's as of then, and
    ``popularity``, those with the most training interactions; to a user without a vector, retrieval is popularity."""
    rows = inputs.rows("test")
    had, length = shelf.had(inputs.keys[rows]), shelf.settings.beam
    order = np.argsort(-shelf.popularity, kind="stable")
    found = [order[: length + len(out)][~np.isin(order[: length + len(out)], out)][:length].tolist() for out in had]
    if arm == "retrieval":
        which = inputs.vector_rows[rows]
        asked = np.flatnonzero(which >= 0)
        users = np.asarray(inputs.embeddings.vectors[which[asked]], np.float32)
        near = nearest(users, shelf.vectors, length, "dot", [had[at] for at in asked])
        for at, chosen in zip(asked.tolist(), near, strict=True):
            found[at] = chosen
    items = np.full((len(rows), length), -1, np.int64)
    for line, chosen in zip(items, found, strict=True):
        line[: len(chosen)] = chosen
    return _frame(arm, BEAM, inputs, shelf, rows, items, None)


def judge_next_items(
    recommended: pl.DataFrame, certain: Mapping[str, float], shelf: NextItems, inputs: RunInputs
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Scores of rankings in long form, and what there is to know about them.

    With one true item a query: ``hit_rate@k`` (of the draws): whether it is among the k likeliest of them;
    ``expected_hit_rate@n`` of n independent draws: 1 - (1 - p)^n, p being the true item's probability: the mean of
    ``hit_rate@n`` over all draws that there might have been;
    ``recall@k`` (of the beams): whether it is among the first k; ``ndcg@k``: 1 / log2(1 + rank), ``mrr@k``: 1 / rank,
    both 0 beyond k. ``popularity``: mean percentile of the first items' popularity, 0 to 1, 0.5 on average over the
    catalogue. Arms without a model have the same ranking for both.

    Args:
        recommended: of :func:`recommend` and :func:`without_model`, all arms.
        certain: of :func:`recommend`, by arm.
        shelf: what they are judged with.
        inputs: the run's inputs.

    Returns:
        example_id, user_id, arm, metric, value; and for JSON ``arms``: by arm the ``coverage`` (share of the catalogue
        that is among anybody's first items, by k), ``distinct`` (mean different items among the draws), ``certain``;
        ``items``, ``unseen_targets`` and the ``codes``' report.
    """
    row_of = dict(zip(inputs.keys["example_id"].to_list(), range(len(inputs.keys)), strict=True))
    cutoffs, codes = shelf.settings.cutoffs, shelf.vocabulary.ids.rows
    share = (pl.Series(shelf.popularity).rank("average").to_numpy() - 0.5) / len(shelf.popularity)
    scores, arms = [], {}
    for arm in dict.fromkeys(recommended["arm"].to_list()):
        own = recommended.filter(pl.col("arm") == arm)
        ways = {way: own.filter(pl.col("way") == way) for way in (SAMPLED, BEAM)}
        lists = {way: [[codes[item] for item in items] for items in part["items"]] for way, part in ways.items()}
        if not lists[SAMPLED]:
            ways[SAMPLED], lists[SAMPLED] = ways[BEAM], lists[BEAM]
        for way, part in ways.items():
            rows = np.array([row_of[name] for name in part["example_id"].to_list()], np.int64)
            rank = rank_of(lists[way], shelf.targets[rows])
            values = {name: value for k in cutoffs for name, value in _at(rank, k, way).items()}
            if way == BEAM:
                values["popularity"] = np.array([_mean(share[found[: cutoffs[-1]]]) for found in lists[way]])
            keys = part.select("example_id", "user_id", "arm")
            scores += [keys.with_columns(metric=pl.lit(name), value=pl.Series(v)) for name, v in values.items()]
        scores.append(_expected(own, lists[BEAM], shelf, row_of))
        shown = {str(k): len({item for found in lists[BEAM] for item in found[:k]}) / len(codes) for k in cutoffs}
        arms[str(arm)] = {"coverage": shown, "certain": certain.get(arm)}
        arms[str(arm)]["distinct"] = (
            float(np.mean([len(found) for found in lists[SAMPLED]])) if arm in certain else None
        )
    return pl.concat(scores), {**shelf.about, "arms": arms}


def _expected(own: pl.DataFrame, beams: list[list[int]], shelf: NextItems, row_of: Mapping[str, int]) -> pl.DataFrame:
    """Expected hit rate of one arm's draws; where nothing is drawn, whether the true item is in the ranking."""
    count = shelf.settings.samples
    part = own.filter(pl.col("way") == TRUE)
    # What the user had is dropped and never hit: its list is empty.
    p = np.exp(part["logprobs"].list.first().cast(pl.Float64).fill_null(-np.inf).to_numpy())
    values = 1 - (1 - p) ** count
    if not part.height:
        part = own.filter(pl.col("way") == BEAM)
        rank = rank_of(beams, shelf.targets[[row_of[name] for name in part["example_id"].to_list()]])
        values = ((rank > 0) & (rank <= count)).astype(np.float64)
    keys = part.select("example_id", "user_id", "arm")
    return keys.with_columns(metric=pl.lit(f"expected_hit_rate@{count}"), value=pl.Series(values, dtype=pl.Float64))


def rank_of(lists: list[list[int]], targets: Ints) -> Ints:
    """Place of each true item in its list, from 1; 0 where it is not there."""
    places = ((found.index(true) + 1 if true in found else 0) for found, true in zip(lists, targets, strict=True))
    return np.fromiter(places, np.int64, len(lists))


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _at(rank: Ints, k: int, way: str) -> dict[str, npt.NDArray[np.float64]]:
    hit = (rank > 0) & (rank <= k)
    if way == SAMPLED:
        return {f"hit_rate@{k}": hit.astype(np.float64)}
    place = np.maximum(rank, 1)
    return {
        f"recall@{k}": hit.astype(np.float64),
        f"ndcg@{k}": hit / np.log2(1 + place),
        f"mrr@{k}": hit / place,
    }


def metrics_of(settings: NextItemConfig) -> list[str]:
    """The metrics, the one that a verdict rests on first: HitRate of the longest list, as in the paper."""
    ks = settings.cutoffs
    ranked = [f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in ks]
    drawn = [f"hit_rate@{ks[-1]}", f"expected_hit_rate@{settings.samples}", *(f"hit_rate@{k}" for k in ks[:-1])]
    return [*drawn, *ranked, "popularity"]
