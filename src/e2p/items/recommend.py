"""`e2p recommend`: what a user may want next, by an adapted backbone with phi in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from e2p.config import BackboneConfig
from e2p.config_io import load_yaml
from e2p.data.sources import cache_root
from e2p.data.tables import open_embeddings
from e2p.data.vectors import Vectors as ItemVectors
from e2p.errors import ConfigError, DataError, RunError
from e2p.items.catalogue import load_catalogue
from e2p.items.decoding import best_items, sample_items
from e2p.items.semantic_ids import SemanticIds
from e2p.items.texts import history_text
from e2p.items.vocabulary import CodeVocabulary, open_codes
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
        """For codes that the backbone speaks. Raises BackboneError where it does not."""
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
        use_prefix: bool = True,
        k: int = 10,
        by: Literal["beam", "sample"] = "beam",
        samples: int = 30,
        temperature: float = 1.0,
        exact: bool = False,
        seed: int = 42,
    ) -> list[list[Recommendation]]:
        """The k likeliest items for each of B users, or the likeliest of some draws.

        Args:
            histories: item ids of each user, oldest first, at least one.
            embeddings: a vector per user [B, D]; None, or None in a row: the null user.
            profiles: texts that go into the system turn.
            use_prefix: False: the adapted backbone alone.
            k: items for each user; fewer where there are not so many, or fewer different ones were drawn.
            by: beam search, or draws at a temperature (the paper's protocol).
            samples: draws for each user.
            temperature: of the draws.
            exact: by beam: go on until no likelier item can have been missed.
            seed: of the draws.

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
        read = prefill(self.model.backbone, prompts, [self.model.splice_at(prompt) for prompt in prompts], prefix)
        if by == "beam":
            best = best_items(read, self.vocabulary, k, exact=exact)
            found = zip(best.rows.tolist(), best.logprobs.tolist(), strict=True)
        else:
            generator = torch.Generator(self.model.backbone.device).manual_seed(seed)
            drawn = sample_items(read, self.vocabulary, samples, temperature, generator)
            found = zip(drawn.rows.tolist(), drawn.logprobs.tolist(), strict=True)
        lists = []
        for items, logprobs in found:
            one = sorted({(-logprob, row) for row, logprob in zip(items, logprobs, strict=True) if row >= 0})
            lists.append([Recommendation(ids.ids[row], -loss) for loss, row in one[:k]])
        return lists


def recommend(
    run: str,
    users: list[str] | None = None,
    k: int = 10,
    backbone: str | None = None,
    window: int = 20,
    exact: bool = False,
) -> None:
    """Show what users of a run's tables may want next, beside what the backbone alone would say.

    Args:
        run: run folder of a next-item task.
        users: user ids, as u1 or [u1,u2]; each with all that he has had, and his newest vector.
        k: items for each.
        backbone: where the adapted backbone lies now, if not where the run says.
        window: most items of a history that are shown to the model; as in training.
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
    recommender = ItemRecommender.of(model, open_codes(tables.codes), window)
    catalogue = load_catalogue(tables.items)
    names = dict(zip(catalogue.ids, catalogue.names, strict=True))
    had = read_interactions(tables.interactions)
    embeddings = open_embeddings(config.data.embeddings, cache_root(config.data.cache_dir))
    histories, vectors = [], []
    for user in users:
        own = had.filter((had["user_id"] == user) & had["item_id"].is_in(list(recommender.vocabulary.ids.rows)))
        if own.is_empty():
            raise DataError(f"{tables.interactions}: expected interactions of user {user!r}, got none; check the id")
        histories.append(own.sort("timestamp", maintain_order=True)["item_id"].to_list())
        vectors.append(newest_vector(embeddings, user))
    personal = recommender.recommend(histories, vectors, k=k, exact=exact)
    plain = recommender.recommend(histories, use_prefix=False, k=k, exact=exact)
    shown = Table("user", "had last", "next", "without the vector", show_lines=True)
    for user, history, *lists in zip(users, histories, personal, plain, strict=True):
        told = ["\n".join(f"{names[one.item]}  {one.logprob:.2f}" for one in found) for found in lists]
        shown.add_row(Text(user), Text("\n".join(names[item] for item in history[-5:])), *map(Text, told))
    Console().print(shown)
