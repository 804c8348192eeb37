"""The words of the simulated service: tags, artists' names, requests, playlists and profiles as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_TAG_NAMES = (
    "shoegaze,dub,bossa nova,synthwave,bluegrass,techno,soul,black metal,ambient,hip hop,flamenco,post-punk,"
    "house,folk,jazz,ska,drum and bass,grime,afrobeat,krautrock,country,gospel,trip hop,math rock"
)
TAGS = tuple(_TAG_NAMES.split(","))
SOUNDS = (("dark", "warm"), ("slow", "fast"), ("dreamy", "raw"), ("lush", "sparse"))  # axes, from -1 to +1
TAG_REQUESTS = (
    "make a playlist of {tag} music",
    "play some {tag}",
    "I want to hear {tag} tonight",
    "five {tag} artists for me",
    "put on {tag} while I cook",
)
OPEN_REQUESTS = ("play something for me", "make me a playlist", "what should I listen to?")
SEPARATOR = " ; "

_FIRST = (
    "Velvet Paper Hollow Silver Winter Copper Distant Midnight Crimson Gentle Broken Electric Salt Golden "
    "Quiet Northern Glass Wandering Feral Lunar Burning Second Ivory Static Neon Wooden Honey Iron Pale"
)
_SECOND = (
    "Harbour Lanterns Foxes Orchard Machine Rivers Cathedral Moths Avenue Choir Engine Garden Parade "
    "Wolves Kingdom Letters Mirror Station Tides Sparrows Museum Canyon Ghosts Bakery Meadow Thieves"
)
_SYLLABLES = "ka lo mi ren ta vor su ne zi bel do ra hu fen jo mar ti pau wen gri sha lu ko dre"


def draw_names(rng: np.random.Generator, number: int) -> list[str]:
    """Unique, pronounceable names of invented artists, of one to three words."""
    first, second, syllables = _FIRST.split(), _SECOND.split(), _SYLLABLES.split()
    names: dict[str, None] = {}  # a dict keeps the order of the draws
    while len(names) < number:
        one, two = str(rng.choice(first)), str(rng.choice(second))
        invented = "".join(rng.choice(syllables, int(rng.integers(2, 4))).tolist()).capitalize()
        forms = (f"The {one} {two}", f"{one} {two}", invented, f"{invented} {two}")
        names[forms[int(rng.integers(len(forms)))]] = None
    return list(names)


def request_text(rng: np.random.Generator, tag: str | None) -> str:
    """A request for a playlist, in one of several wordings; without a tag: for anything."""
    wordings = OPEN_REQUESTS if tag is None else TAG_REQUESTS
    return wordings[int(rng.integers(len(wordings)))].format(tag=tag)


def playlist_text(names: Sequence[str]) -> str:
    """A playlist as a completion: ``name ; name ; name``."""
    return SEPARATOR.join(names)


def playlist_names(text: str) -> list[str]:
    """The artists' names in a playlist's text, in order."""
    return [name for part in text.split(SEPARATOR.strip()) if (name := part.strip())]


def profile_text(tags: Sequence[str], sound: Sequence[str], artists: Sequence[str]) -> str:
    """A listener in words, as a company would put it into a prompt."""
    return f"Likes {', '.join(tags)}. Prefers a {' and '.join(sound)} sound. Plays {', '.join(artists)}."


def sound_words(axes: np.ndarray, count: int = 2) -> list[str]:
    """The words for the `count` strongest of the axes of `SOUNDS`, [4]."""
    return [SOUNDS[axis][int(axes[axis] > 0)] for axis in np.argsort(-np.abs(axes))[:count]]
