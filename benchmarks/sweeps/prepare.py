"""Tables and vectors of the sweeps: both tasks' official files, and profiles by a sentence encoder and a backbone.

python benchmarks/sweeps/prepare.py --data ../shared/data --backbone ../shared/backbone --work scratch
"""

from __future__ import annotations

import argparse
from pathlib import Path

from e2p.tasks import music, personachat
from e2p.users.extract import embed


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
    wanted = [(lastfm, "minilm", "minilm", "mean")]
    for task in (lastfm, dialogues):
        wanted += [(task, f"hidden_{pooling}", options.backbone, pooling) for pooling in ("mean", "last")]
    for task, name, encoder, pooling in wanted:
        out = task / f"profiles_{name}.parquet"
        if not out.exists():
            embed(str(task / "tables" / "profiles.parquet"), encoder, str(out), pooling=pooling)


if __name__ == "__main__":
    main()
