"""Make docs/playground.png again: a short run on Last.fm, served with its users, asked in headless Chromium.

    python docs/playground.py --data ../shared/data/lastfm_2k --backbone ../shared/backbone

Ten minutes on two cores; what the work folder has already is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from chromium import chromium, text, until  # the browser that tests drive

E2P = [sys.executable, "-m", "e2p.cli"]
PAGE = "docs/playground.png"


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/lastfm_2k")
    parser.add_argument("--backbone", default="../shared/backbone")
    parser.add_argument("--work", default="scratch/playground", type=Path)
    options = parser.parse_args()
    tables, run, store = options.work / "tables", options.work / "lastfm", options.work / "store"
    if not tables.exists():
        subprocess.run([*E2P, "prepare", "music", options.data, str(tables)], check=True)
    if not (run / "space.parquet").exists():
        words = {
            "data.examples": tables / "examples.parquet",
            "data.embeddings": tables / "embeddings.parquet",
            "backbone.model": options.backbone,
            "training.max_steps": 400,
            "training.batch_size": 32,
            "training.learning_rate": 1e-2,
            "training.weight_decay": 0.3,
            "evaluation.arms": "none,static,null,e2p",
            "output": run,
        }
        settings = [f"--{name}={value}" for name, value in words.items()]
        subprocess.run([*E2P, "train", str(tables / "config.yaml"), *settings], check=True)
        subprocess.run([*E2P, "evaluate", str(run)], check=True)
    if not store.exists():
        vectors = str(tables / "embeddings.parquet")
        subprocess.run([*E2P, "users", "import", vectors, str(store), "--timestamp", "now"], check=True)
    serve = [*E2P, "serve", str(run), "--store", str(store), "--playground", "--port", "0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            picture(server.stdout.readline().split()[0])
        finally:
            server.terminate()


def picture(address: str) -> None:
    """Ask as a visitor does, and take the picture."""
    with chromium(1280, 1180) as driver:
        driver.get(address)
        until(lambda: "A" in text(driver, "e2p-places"))
        driver.find_element("id", "e2p-ask").click()
        until(lambda: all("tokens" in text(driver, f"e2p-answer-{label}") for label in "ABC"))
        driver.save_screenshot(PAGE)
    print(f"{PAGE}: {Path(PAGE).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
