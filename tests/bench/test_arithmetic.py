"""The multiply-adds that explain a ratio of times, against a count by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from e2p.bench.arithmetic import arithmetic, layer_weights
from tiny import VOCABULARY, tiny_backbone
from tiny_run import inputs_of, tiny_run


def test_weights_are_those_of_the_matrices() -> None:
    attention, mlp = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48
    assert layer_weights(tiny_backbone("llama")) == 2 * (attention + mlp)


def test_products_of_one_batch_by_hand(tmp_path: Path) -> None:
    backbone, inputs = inputs_of(tiny_run(tmp_path))
    examples = inputs.examples("test")
    rows, tokens, weights = examples.rows, inputs.tokens, layer_weights(backbone)
    prompts, answers = tokens.prompt_lengths[rows], tokens.completion_lengths[rows]
    sides = {
        "start": (dataclasses.replace(examples, position="before_bos"), True),
        "whole": (examples, False),
        "apart": (examples, True),
    }
    found = arithmetic(backbone, (prompts + answers).tolist(), sides, len(rows), 1)
    longest, head = int((prompts + answers).max()), 32 * VOCABULARY
    peft = 2 * len(rows) * (longest + 1) * (weights + head)
    # The last token of an answer predicts nothing; the soft token takes its place.
    whole = 2 * len(rows) * longest * weights + 2 * int(answers.sum()) * head
    distinct = len({tokens[int(row)].prompt.tobytes() for row in rows})
    apart = distinct * int(prompts.max()) * weights + 2 * len(rows) * int(answers.max()) * weights
    apart += 2 * int(answers.sum()) * head
    assert found["peft"]["multiply_adds"] == peft
    assert found["start"]["multiply_adds"] == found["whole"]["multiply_adds"] == whole
    assert found["apart"]["multiply_adds"] == apart
    assert found["apart"]["peft_to_this"] == pytest.approx(peft / apart, abs=1e-3)
    assert sum(found["apart"][f"{name}_share"] for name in ("layers", "prompt", "head")) == pytest.approx(1, abs=0.01)
