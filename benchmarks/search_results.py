"""Collect the searches' JSON lines into results/search.json: every variant tried on validation data, kept or not.

python benchmarks/search_results.py scratch/personachat/search.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from e2p.provenance import provenance


def main(logs: list[str]) -> None:
    """Write the file."""
    variants = {
        Path(log).parent.name: [json.loads(line) for line in Path(log).read_text().splitlines()] for log in logs
    }
    about = "Validation losses in nats per token; 'random' exchanges the validation users' vectors among them."
    content = {"about": about, "provenance": provenance(), "searches": variants}
    Path("results/search.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
