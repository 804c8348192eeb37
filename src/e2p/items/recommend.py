"""`e2p recommend`: what a user may want next, by an adapted backbone with phi in front of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch

from e2p.config import BackboneConfig
from e2p.config_io import load_yaml
from e2p.data.batches import token_passes
from e2p.data.sources import cache_root
from e2p.data.tables import EmbeddingTable, open_embeddings
from e2p.data.vectors import Vectors as ItemVectors
from e2p.errors import ConfigError, DataError, RunError
from e2p.items.catalogue import load_catalogue
from e2p.items.decoding import Candidates, Ranked, best_items, sample_items
from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import history_text
from e2p.items.vocabulary import CodeVocabulary, open_codes, require_spoken
from e2p.model.answer import newest_vector
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.model.prefill import prefill
from e2p.model.projector import Vectors
from e2p.users.behaviour import read_interactions


class Recommendation(NamedTuple):
    """An item, and its log-probability among all items with codes."""

    item: str
    logprob: float


@dataclass(frozen=True, eq=False)
class ItemRecommender:
    """Next items for histories and user vectors.

    Args:
        model: an adapted backbone with phi.
        vocabulary: the codes that it speaks.
        window: most items of a history that are shown, the newest; as in training.
    """

    model: E2PModel
    vocabulary: CodeVocabulary
    window: int = 20

    @classmethod
    def of(cls, model: E2PModel, ids: SemanticIds, window: int = 20) -> ItemRecommender:
        """For codes that the backbone speaks. Raises BackboneError where it does not, or speaks others."""
        require_spoken(model.backbone.source, ids)
        return cls(model, CodeVocabulary.of(ids, model.backbone.tokenizer), window)

    def with_items(self, ids: Sequence[str], vectors: ItemVectors) -> ItemRecommender:
        """The same with M new items, which can be recommended at once; nothing is trained.

        Args:
            ids: M new ids.
            vectors: float32 [M, D], made as those were that the codes were made of.

        Raises:
            DataError: as :meth:`SemanticIds.encode`.
        """
        grown = self.vocabulary.ids.encode(ids, vectors)
        fresh = grown.codes[len(self.vocabulary.ids) :]
        vocabulary = CodeVocabulary(grown, self.vocabulary.tokens)
        vocabulary.__dict__["trie"] = self.vocabulary.trie.insert(fresh)  # merged, not built anew
        return replace(self, vocabulary=vocabulary)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        embeddings: Vectors | None = None,
        *,
        profiles: Sequence[str | None] | None = None,
        exclude: Sequence[Collection[str]] | None = None,
        use_prefix: bool = True,
        k: int = 10,
        by: Literal["beam", "sample"] = "beam",
        samples: int = 30,
        temperature: float = 1.0,
        exact: bool = False,
        seed: int = 42,
        tokens_per_pass: int = 8192,
    ) -> list[list[Recommendation]]:
        """The k likeliest items for each of B users, or the likeliest of some draws.

        Args:
            histories: item ids of each user, oldest first, at least one.
            embeddings: a vector per user [B, D]; None, or None in a row: the null user.
            profiles: texts that go into the system turn.
            exclude: items that each user is not offered, such as those that he has had.
            use_prefix: False: the adapted backbone alone.
            k: items for each user; fewer where there are not so many, or fewer different ones were drawn.
            by: beam search, or draws at a temperature (the paper's protocol).
            samples: draws for each user.
            temperature: of the draws.
            exact: by beam: go on until no likelier item can have been missed.
            seed: of the draws.
            tokens_per_pass: bounds memory: prompts of so many tokens are read together.

        Raises:
            DataError: an empty history, an item without codes, unequal numbers, or vectors that do not fit.
            ConfigError: a number is out of range.
        """
        ids, texts = self.vocabulary.ids, profiles if profiles is not None else [None] * len(histories)
        if len(texts) != len(histories):
            raise DataError(f"recommend: expected {len(histories)} profiles, one for each history, got {len(texts)}")
        if not histories:
            return []
        empty = next((row for row, history in enumerate(histories) if not len(history)), None)
        if empty is not None:
            raise DataError(f"recommend: row {empty}: expected a history of at least one item, got none")
        rows = [ids.rows_of(history).tolist() for history in histories]
        encoder = self.model.encoder
        prompts = [
            encoder.prompt(history_text(ids, history, self.window), text)
            for history, text in zip(rows, texts, strict=True)
        ]
        prefix = self.model.prefix(embeddings, len(prompts)) if use_prefix else None
        generator = torch.Generator(self.model.backbone.device).manual_seed(seed)
        lists: dict[int, list[Recommendation]] = {}
        for part in token_passes(np.array([len(prompt.ids) for prompt in prompts]), tokens_per_pass):
            some = [prompts[row] for row in part]
            own = None if prefix is None else prefix[torch.from_numpy(part).to(prefix.device)]
            read = prefill(self.model.backbone, some, [self.model.splice_at(prompt) for prompt in some], own)
            out = [{ids.rows[item] for item in exclude[row] if item in ids.rows} if exclude else set() for row in part]
            found: Ranked | Candidates
            if by == "sample":
                found = sample_items(read, self.vocabulary, samples, temperature, generator, tokens_per_pass)
                kept = _without(found, out)
            else:
                width = k + (max(map(len, out)) and self.window)  # of what was had, mostly what the prompt shows comes
                found = best_items(read, self.vocabulary, width, exact=exact, tokens_per_pass=tokens_per_pass)
                while min(map(len, kept := _without(found, out))) < k and width < len(ids):
                    width = min(2 * width, len(ids))
                    found = best_items(read, self.vocabulary, width, exact=exact, tokens_per_pass=tokens_per_pass)
            for row, one in zip(part.tolist(), kept, strict=True):
                lists[row] = [Recommendation(ids.ids[item], logprob) for item, logprob in one[:k]]
        return [lists[row] for row in range(len(prompts))]


def _without(found: Ranked | Candidates, out: Sequence[Collection[int]]) -> list[list[tuple[int, float]]]:
    """Items and log-probabilities of each user, each item once, likeliest first, without what is left out."""
    lists = []
    for items, logprobs, unwanted in zip(found.rows.tolist(), found.logprobs.tolist(), out, strict=True):
        pairs = {(-logprob, item) for item, logprob in zip(items, logprobs, strict=True) if item >= 0}
        lists.append([(item, -loss) for loss, item in sorted(pairs) if item not in unwanted])
    return lists


def recommend(
    run: str,
    users: list[str] | None = None,
    k: int = 10,
    backbone: str | None = None,
    exact: bool = False,
) -> None:
    """Show what users of a run's tables may want next, beside what the backbone alone would say.

    What they have had already is left out, if the run's settings say so (evaluation.next_item.seen).

    Args:
        run: run folder of a next-item task.
        users: user ids, as u1 or [u1,u2]; each with all that he has had and his newest vector, or as the null user.
        k: items for each.
        backbone: where the adapted backbone lies now, if not where the run says.
        exact: go on until no likelier item can have been missed.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not users or k < 1:
        raise ConfigError(
            f"users, k: expected at least one user and a whole number >= 1, got {users or 'none'} and {k}"
        )
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: expected a run with config.yaml and adapter/, found none; run e2p train first")
    config = load_yaml(folder / "config.yaml")
    tables = config.evaluation.next_item
    if not tables.items:
        raise RunError(f"{folder}: expected a run with evaluation.next_item, got none; see e2p prepare nextitem")
    place: BackboneConfig = replace(config.backbone, model=backbone, revision=None) if backbone else config.backbone
    model = E2PModel.from_pretrained(folder / "adapter", FrozenBackbone.load(place, config.training.precision))
    recommender = ItemRecommender.of(model, open_codes(tables.codes), tables.window)
    known = recommender.vocabulary.ids.rows
    catalogue = load_catalogue(tables.items)
    names = dict(zip(catalogue.ids, catalogue.names, strict=True))
    had = read_interactions(tables.interactions)
    if "timestamp" not in had.columns:
        raise DataError(f"{tables.interactions}: expected a column timestamp, got none; add when each was")
    embeddings = open_embeddings(config.data.embeddings, cache_root(config.data.cache_dir))
    if embeddings.versions != model.embedding_versions:
        here, trained = (", ".join(v) or "(not named)" for v in (embeddings.versions, model.embedding_versions))
        raise DataError(f"{embeddings.source}: expected vectors of version {trained}, got {here}")
    vectors = newest_vectors(embeddings, users)
    vectors_of = {user for user, vector in zip(users, vectors, strict=True) if vector is not None}
    histories = []
    for user in users:
        own = had.filter(pl.col("user_id") == user).sort("timestamp", maintain_order=True)["item_id"].to_list()
        histories.append([item for item in own if item in known])
        if not histories[-1]:
            raise DataError(f"{tables.interactions}: expected interactions of user {user!r}, got none; check the id")
    out = histories if tables.seen == "drop" else None
    personal = recommender.recommend(histories, vectors, exclude=out, k=k, exact=exact)
    plain = recommender.recommend(histories, exclude=out, use_prefix=False, k=k, exact=exact)
    shown = Table("user", "had last", "next", "without the vector", show_lines=True)
    for user, history, *lists in zip(users, histories, personal, plain, strict=True):
        told = ["\n".join(f"{names.get(one.item, one.item)}  {one.logprob:.2f}" for one in found) for found in lists]
        last = "\n".join(names.get(item, item) for item in history[-5:])
        shown.add_row(Text(user if user in vectors_of else f"{user} (no vector)"), Text(last), *map(Text, told))
    Console().print(shown)


def newest_vectors(table: EmbeddingTable, users: Sequence[str]) -> list[ItemVectors | None]:
    """Each user's newest vector [D], or None."""
    known = set(table.keys["user_id"].unique().to_list())
    return [newest_vector(table, user) if user in known else None for user in users]
