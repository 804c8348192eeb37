"""Every setting of how a run is judged, as frozen dataclasses; :mod:`e2p.config` offers them too. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from e2p.errors import ConfigError

MODEL_ARMS = ("none", "prompt", "static", "random", "shuffled", "null", "e2p", "e2p+prompt")
ARMS = (*MODEL_ARMS, "rerank", "retrieval", "popularity")


def require(condition: bool, key: str, expected: str, got: object) -> None:
    """Refuse a setting. Raises ConfigError with its key, what was expected and what came."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class PlaylistsConfig:
    """Generated playlists, read back and judged against what the listener played (`e2p prepare music` writes all four).

    Args:
        items: table of item_id, item (the name) and embedding; empty: no playlists are generated.
        queries: table of query, embedding and items (ids that answer it).
        plays: table of user_id and item_id: plays that the users' vectors have not seen.
        known: table of user_id and item_id: plays that they were made of.
        answers: playlists for each test prompt and arm; their scores are averaged.
        temperature: that they are drawn with; 0: the likeliest token, always.
    """

    items: str = ""
    queries: str = ""
    plays: str = ""
    known: str = ""
    answers: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        tables = [bool(getattr(self, name)) for name in ("items", "queries", "plays", "known")]
        require(len(set(tables)) == 1, "evaluation.playlists", "items, queries, plays and known, or none", self)
        require(self.answers >= 1, "evaluation.playlists.answers", "a whole number >= 1", self.answers)
        require(self.temperature >= 0, "evaluation.playlists.temperature", "a number >= 0", self.temperature)


@dataclass(frozen=True)
class NextItemConfig:
    """Next items, generated as semantic ids and ranked (`e2p prepare nextitem` writes all three).

    Args:
        items: table of item_id, item (the name), embedding and popularity; empty: no items are ranked.
        codes: folder with the items' codes, or a JSON file of ready ones. The backbone must speak them (`e2p adapt`).
        interactions: table of user_id, item_id and timestamp: what a user had, and when.
        seen: what he had before an example is dropped from its rankings, in all arms alike, or kept.
        window: most items of a history in a prompt, as the examples were prepared; for ``e2p recommend``.
        samples: draws for each query; the different ones of them are ranked by log-probability (paper, Section 4.3).
        temperature: of the draws.
        beam: partial codes that are kept in the beam search; also the most items that it finds, seen ones included.
        cutoffs: lengths k of the lists that are judged.
    """

    items: str = ""
    codes: str = ""
    interactions: str = ""
    seen: Literal["drop", "keep"] = "drop"
    window: int = 20
    samples: int = 30
    temperature: float = 1.0
    beam: int = 50
    cutoffs: tuple[int, ...] = (5, 10, 30)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        tables = [bool(getattr(self, name)) for name in ("items", "codes", "interactions")]
        require(len(set(tables)) == 1, "evaluation.next_item", "items, codes and interactions, or none", self)
        for name in ("window", "samples", "beam"):
            require(getattr(self, name) >= 1, f"evaluation.next_item.{name}", "a number >= 1", getattr(self, name))
        require(self.temperature > 0, "evaluation.next_item.temperature", "a number > 0", self.temperature)
        ks = self.cutoffs
        ok = bool(ks) and min(ks) >= 1 and list(ks) == sorted(set(ks)) and ks[-1] <= min(self.beam, self.samples)
        expected = "growing whole numbers from 1 to beam and samples"
        require(ok, "evaluation.next_item.cutoffs", expected, self.cutoffs)


@dataclass(frozen=True)
class TextsConfig:
    """Generated texts, such as headlines or messages, judged against the test examples' own completions.

    Args:
        generate: which answers: ``greedy``, the likeliest token each time, ``sampled``, or both; empty: none are made.
        draws: sampled answers for each test prompt; their scores are averaged.
        temperature: of the draws.
        most: most test examples that are answered, each as likely as any other, drawn with ``evaluation.seed``; 0: all.
        stemming: ROUGE compares words by their stems (Porter's, for English). The rouge-score package itself does not
            unless told to, so compare figures only with those that were made alike.
        tokenizer: what ROUGE calls a word. ``rouge``: the package's own, runs of a-z and 0-9; of other scripts nothing
            is seen, and an accented letter cuts its word in two. ``unicode``: runs of letters and digits of any script,
            single characters where no spaces are written; of ASCII texts it gives the same.
    """

    generate: tuple[Literal["greedy", "sampled"], ...] = ()
    draws: int = 1
    temperature: float = 1.0
    most: int = 0
    stemming: bool = True
    tokenizer: Literal["rouge", "unicode"] = "rouge"

    def __post_init__(self) -> None:
        object.__setattr__(self, "generate", tuple(self.generate))
        known = set(self.generate) <= {"greedy", "sampled"} and len(set(self.generate)) == len(self.generate)
        require(known, "evaluation.texts.generate", "greedy, sampled, or both, each once", self.generate)
        require(self.draws >= 1, "evaluation.texts.draws", "a whole number >= 1", self.draws)
        require(self.temperature > 0, "evaluation.texts.temperature", "a number > 0", self.temperature)
        require(self.most >= 0, "evaluation.texts.most", "a whole number >= 0", self.most)
        kinds = ("rouge", "unicode")
        require(self.tokenizer in kinds, "evaluation.texts.tokenizer", " or ".join(kinds), self.tokenizer)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is judged.

    Args:
        arms: the ways to condition the model; the two with ``prompt`` need a column ``profile``, ``rerank`` is there
            where playlists are judged, ``retrieval`` and ``popularity`` where next items are.
        resamples: bootstrap resamples of the users.
        samples: users for whom one and the same prompt is answered in the report.
        max_new_tokens: length of those answers, and of whatever is generated to be judged.
        attribute: column of the example table, such as country or genre, that colours the map of the users by each
            one's commonest value; empty: clusters of their vectors.
        headline: metric that the verdict rests on; empty: ``playlist_hits`` where playlists are judged,
            ``hit_rate@k`` of the longest list where next items are, else ``auc`` with ``kto`` and ``engagement``, else
            ``nats_per_token``.
        playlists: what generated playlists are judged with.
        next_item: what generated next items are judged with.
        texts: which texts are generated and how they are judged; one of the three at most. Texts do not make the
            verdict unless ``headline`` names one of their metrics, such as ``rougeL``.
        seed: seed of the random arm, of the bootstrap, of the samples and of what is generated.
    """

    arms: tuple[str, ...] = ARMS
    resamples: int = 10_000
    samples: int = 3
    max_new_tokens: int = 48
    attribute: str = ""
    headline: str = ""
    playlists: PlaylistsConfig = field(default_factory=PlaylistsConfig)
    next_item: NextItemConfig = field(default_factory=NextItemConfig)
    texts: TextsConfig = field(default_factory=TextsConfig)
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(self.arms))
        unknown = [arm for arm in self.arms if arm not in ARMS]
        require(not unknown, "evaluation.arms", f"some of {', '.join(ARMS)}", ", ".join(unknown))
        speaking = not self.arms or bool(set(self.arms) & set(MODEL_ARMS))
        require(speaking, "evaluation.arms", "an arm with a language model too", self.arms)
        judged = {"playlists": self.playlists.items, "next_item": self.next_item.items, "texts": self.texts.generate}
        found = [name for name, asked in judged.items() if asked]
        require(len(found) < 2, "evaluation", "one of playlists, next_item and texts", " and ".join(found))
        require(bool(self.arms), "evaluation.arms", f"some of {', '.join(ARMS)}", self.arms)
        twice = sorted({arm for arm in self.arms if self.arms.count(arm) > 1})
        require(not twice, "evaluation.arms", "every arm once", ", ".join(self.arms))
        require(self.resamples >= 100, "evaluation.resamples", "a whole number >= 100", self.resamples)
        require(self.samples >= 0, "evaluation.samples", "a whole number >= 0", self.samples)
        require(self.max_new_tokens >= 1, "evaluation.max_new_tokens", "a whole number >= 1", self.max_new_tokens)
