"""The texts of next-item prediction: a history as codes, and a profile in words; each of what came before a target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import PROMPT, items_text
from e2p.tasks.nextitem_files import Kind

BEST_GENRES, LAST_TITLES, TITLE_WORDS = 3, 3, 8
_ENTRIES = 2_000_000  # items of histories that are written at once
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes what stands before any place of a log.

    Args:
        rows: int64 [n], the item (its row in the codes) of each interaction, by user and time.
        starts: int64 [n], where the interactions of the same user begin.
        codes: the codes of each item as a text.
        names: what each item is called in a profile: its title, or its id; None where the files have no titles.
        genres: the genres of each item, List[String].
        kind: of which files, for the words.
    """

    rows: Ints
    starts: Ints
    codes: pl.Series
    names: pl.Series | None
    genres: pl.Series
    kind: Kind

    @classmethod
    def of(cls, log: pl.DataFrame, items: pl.DataFrame, ids: SemanticIds, kind: Kind) -> Writer:
        """From a log with ``row`` and ``place``, and the items in the order of their codes (item, text, genres)."""
        codes = pl.Series("codes", [items_text(ids, [row]) for row in range(len(ids))])
        names = None if items["text"].null_count() == items.height else items["item"].str.to_lowercase()
        starts = np.arange(log.height) - log["place"].to_numpy()
        return cls(log["row"].to_numpy(), starts, codes, names, items["genres"], kind)

    def completions(self, at: Ints) -> pl.Series:
        """The items at n places, as codes."""
        return self.codes.gather(self.rows[at])

    def prompts(self, at: Ints, window: int) -> pl.Series:
        """What came before n places, none of them a user's first: the last ``window`` items as codes, in order."""
        first = np.maximum(self.starts[at], at - window)
        ends = np.cumsum(at - first)
        parts, begin = [], 0
        while begin < len(at):
            done = ends[begin - 1] if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, done + _ENTRIES, side="right")))
            spans = pl.DataFrame({"first": first[begin:stop], "last": at[begin:stop]}).with_row_index("example")
            items = spans.select("example", place=pl.int_ranges("first", "last")).explode("place")
            items = items.with_columns(text=self.codes.gather(self.rows[items["place"].to_numpy()]))
            joined = items.group_by("example", maintain_order=True).agg(pl.col("text").str.join(" "))
            parts.append(PROMPT + joined["text"])
            begin = stop
        return pl.concat(parts).alias("prompt")

    def profiles(self, at: Ints) -> pl.Series | None:
        """What is known of the user before n places: favourite genres (all of his history counts), last titles.

        The newest title comes first. None where the files have no titles.
        """
        if self.names is None:
            return None
        liked = self._liked(at)
        words = {"movielens": "last watched "}.get(self.kind, "last bought ")
        titles = []
        for back in range(1, LAST_TITLES + 1):
            there = at - back >= self.starts[at]
            rows = pl.Series(np.where(there, self.rows[at - back], 0))
            title = pl.select(pl.when(pl.Series(there)).then(self.names.gather(rows))).to_series()
            if self.kind == "minionerec":  # a shop's titles go on for lines
                title = title.str.split(" ").list.head(TITLE_WORDS).list.join(" ")
            titles.append(title.alias(str(back)))
        last = pl.concat_str(titles, separator=" ; ", ignore_nulls=True)
        told = pl.select(pl.concat_str(liked, words + last, separator=" ; ", ignore_nulls=True)).to_series()
        return told.alias("profile")

    def _liked(self, at: Ints) -> pl.Series:
        """``likes drama, comedy`` for each place; null where no earlier item has a genre."""
        names = self.genres.explode().drop_nulls().unique().sort()
        counts = np.zeros((len(at), len(names)), dtype=np.int64)
        for column, name in enumerate(names):
            has = self.genres.list.contains(name).to_numpy()[self.rows]
            total = np.concatenate([[0], np.cumsum(has)])
            counts[:, column] = total[at] - total[self.starts[at]]
        best = np.argsort(-counts, axis=1, kind="stable")[:, :BEST_GENRES]
        parts = []
        for rank in range(best.shape[1]):
            some = pl.Series(np.take_along_axis(counts, best[:, rank : rank + 1], 1)[:, 0] > 0)
            parts.append(pl.select(pl.when(some).then(names.gather(best[:, rank]))).to_series().alias(str(rank)))
        if not parts:
            return pl.Series("liked", [None] * len(at), dtype=pl.String)
        joined = pl.select(pl.concat_str(parts, separator=", ", ignore_nulls=True).replace("", None)).to_series()
        return "likes " + joined
