"""Tables and vectors of the sweeps: both tasks' official files, and Persona-Chat's profiles by the backbone.

python benchmarks/sweeps/prepare.py --data ../shared/data --backbone ../shared/backbone --work scratch
"""

from __future__ import annotations

import argparse
from pathlib import Path

from e2p.tasks import music, personachat
from e2p.users.extract import Pooling, embed


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data", type=Path)
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch", type=Path)
    options = parser.parse_args()
    lastfm, dialogues = options.work / "lastfm", options.work / "personachat"
    if not (lastfm / "tables").exists():
        music.prepare(str(options.data / "lastfm_2k"), str(lastfm / "tables"))
    if not (dialogues / "tables").exists():
        source = options.data / "persona_chat" / "train_self_original_no_cands.txt"
        personachat.prepare(str(source), str(dialogues / "tables"), encoder="minilm")
    poolings: tuple[Pooling, ...] = ("mean", "last")
    for pooling in poolings:
        out = dialogues / f"profiles_hidden_{pooling}.parquet"
        if not out.exists():
            embed(str(dialogues / "tables" / "profiles.parquet"), options.backbone, str(out), pooling=pooling)


if __name__ == "__main__":
    main()
