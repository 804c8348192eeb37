"""Run the README's first lines of Python on what `make demo` has left, and record their output.

python docs/snippet.py        writes results/snippet.json
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from e2p.provenance import provenance

CODE = """\
import polars as pl
from e2p import E2PModel

model = E2PModel.from_pretrained("runs/demo/adapter")  # left by make demo
vectors = dict(pl.read_parquet("runs/demo-data/embeddings.parquet")["user_id", "embedding"].iter_rows())
for user in ("u0042", "u0081"):
    print(user, model.generate("play some synthwave", [vectors[user]], max_new_tokens=40)[0])"""


def main() -> None:
    """Write code, output and where it was made."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(CODE, {})
    content = {"code": CODE, "output": printed.getvalue().strip(), "provenance": provenance("python docs/snippet.py")}
    Path("results/snippet.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
