"""The bench of item generation runs, and its sides see the same prompts. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from e2p.bench.quiet import quiet
from e2p.bench.sample import OURS, SIDES, THEIRS, _Setting, _Sides, bench
from e2p.errors import BackboneError, ConfigError
from e2p.model.prefill import prefill
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def silence() -> Iterator[None]:
    """transformers warns of a catalogue's own end of an answer."""
    with quiet():
        yield


@pytest.mark.slow
def test_the_last_line_is_the_file(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    sizes = {"items": 40, "queries": 2, "n": 5, "prompt_tokens": 12, "codes": 8}
    result = bench(checkpoint, **sizes, rounds=2, output=str(output))
    assert json.loads(output.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert str(tmp_path) not in output.read_text()
    assert result["bench"] == "sample"
    assert {name: result[name] for name in sizes} == sizes
    assert {"commit", "command", "hardware"} <= set(result["provenance"])
    assert set(result["sides"]) == set(SIDES)
    for name, side in result["sides"].items():
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == 2
        assert side["peak_mib"] >= 0
        assert (side["items_share"] == 1) == (name in (*OURS, "generate_trie"))
    assert result["sides"]["best_items"]["different_items"] == 5
    assert set(result["ratios"]) == {f"{side} to {base}" for side in OURS for base in THEIRS}
    assert {"min", "median", "max"} == set(result["ratios"]["sample_items to generate"]["speed"])


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_sides_of_a_round_see_the_same(checkpoint: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next-token distributions of transformers' sides, and of what ours starts from, after the whole prompt."""
    many = _Sides(_Setting(checkpoint, 30, 3, 4, 10, 8, precision, "sdpa", 0))
    seen: dict[str, torch.Tensor] = {}
    inner = many.backbone.model.forward

    def watched(*given: Any, side: list[str], **named: Any) -> Any:
        out = inner(*given, **named)
        seen.setdefault(side[0], out.logits[::4, -1].float().log_softmax(-1))
        return out

    for side in THEIRS:
        monkeypatch.setattr(many.backbone.model, "forward", lambda *g, s=side, **k: watched(*g, side=[s], **k))
        rows = many.run(side)
        assert rows.shape == (3, 4)
        assert (rows >= 0).all() or side != "generate_trie"
    monkeypatch.undo()
    ours = prefill(many.backbone, many.prompts, many.at, many.prefix).logits(torch.arange(300)).log_softmax(-1)
    close = {"float32": 1e-4, "bfloat16": 0.2}[precision]
    for side in THEIRS:
        torch.testing.assert_close(seen[side][:, :300].log_softmax(-1), ours, rtol=0, atol=close)
    assert float((ours[0] - ours[1]).abs().max()) > 1
    for side in OURS:
        assert (many.run(side) >= 0).all()


@pytest.mark.parametrize("name", ["items", "queries", "n", "prompt_tokens", "codes", "rounds"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number >= 1, got 0"):
        bench("nowhere", **{name: 0})  # type: ignore[arg-type]


@pytest.mark.usefixtures("silence")
def test_a_prompt_beyond_the_window_is_refused(checkpoint: str) -> None:
    many = _Sides(_Setting(checkpoint, 30, 2, 4, 189, 8, "float32", "sdpa", 0))
    for side in ("generate", *OURS):
        with pytest.raises(BackboneError, match="window of 192 tokens, got 194"):
            many.run(side)
