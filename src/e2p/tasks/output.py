"""Where a prepared task is put: written beside its place, renamed at the end, so a failure loses nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2p.data.tables import require_folder
from e2p.errors import RunError

# What a prepared task may hold. A folder with anything else in it is not ours to replace.
FILES = frozenset(
    {
        "adapt.parquet",
        "codes",
        "config.yaml",
        "embeddings.parquet",
        "examples.parquet",
        "heldout_plays.parquet",
        "interactions.parquet",
        "items.parquet",
        "profiles.parquet",
        "queries.parquet",
        "vector_plays.parquet",
    }
)


@contextmanager
def staged_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to write to; when the block ends well it becomes ``output``, all files at once.

    Args:
        output: the folder that will stand there afterwards.
        overwrite: replace an earlier prepared task.

    Raises:
        RunError: ``output`` exists and ``overwrite`` is off, or it is not a prepared task, or cannot be written to.
    """
    target = Path(output).absolute()
    if target.exists() and not target.is_dir():
        raise RunError(f"{output}: expected a folder, got a file; name another output")
    held = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    foreign = [name for name in held if name not in FILES]
    if foreign:
        raise RunError(f"{output}: expected a prepared task or nothing, got '{foreign[0]}'; name another output")
    if held and not overwrite:
        raise RunError(f"{output}: expected no such folder, got {len(held)} files; add --overwrite or name another")
    require_folder(target.parent)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh = workplace / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(workplace / "old")
        fresh.rename(target)
    finally:
        # An interruption between the two renames leaves the earlier tables set aside: put them back.
        if (workplace / "old").exists() and not target.exists():
            (workplace / "old").rename(target)
        shutil.rmtree(workplace, ignore_errors=True)
