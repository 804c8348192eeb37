"""The contrastive and the distilling term in training: a step by hand, resumption, and what each is for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2p.config import ObjectiveConfig, RunConfig
from e2p.config_io import to_dict
from e2p.data.batches import epoch_steps
from e2p.data.sources import cache_root
from e2p.data.tokenised import ProfiledInPart, TokenisedExamples, tokenise
from e2p.errors import ConfigError, DataError
from e2p.model.e2p import E2PModel, text_encoder
from e2p.training.criteria import Likelihood
from e2p.training.inputs import RunInputs, strangers
from e2p.training.run import train, train_arm
from e2p.training.trainer import E2PTrainer
from tiny_run import assert_resumes, inputs_of, tiny_run, with_training

CONTRAST = ObjectiveConfig(contrast=0.7, contrast_margin=0.2)
DISTILL = ObjectiveConfig(distill=0.7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_run(tmp_path_factory.mktemp("beyond"))


@pytest.fixture(scope="module")
def loaded(base: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(base)


def one_step(base: RunConfig, loaded: tuple[Any, RunInputs], objective: ObjectiveConfig, folder: Path) -> float:
    """The loss of the first step of a training with this objective, in small passes."""
    config = replace(with_training(base, max_steps=1, tokens_per_pass=40), objective=objective, output=str(folder))
    _, record = train_arm(config, *loaded, "e2p", folder, None)
    return next(entry["loss"] for entry in record["history"] if "loss" in entry)


def first_step(
    base: RunConfig, loaded: tuple[Any, RunInputs], tokens: TokenisedExamples | None = None, batch_size: int = 8
) -> tuple[E2PModel, list[tuple[int, bool]], int]:
    """The untrained model, the first step's rows with whether their vector is dropped, and its labelled tokens."""
    backbone, inputs = loaded
    model = E2PModel.from_backbone(
        backbone, inputs.embeddings.dim, base.projector, data=base.data, seed=base.training.seed
    )
    model.projector.fit_input(torch.from_numpy(inputs.train_vectors()))
    planned = inputs.examples("train", tokens=tokens)
    plan = epoch_steps(
        planned, batch_size=batch_size, budget=10**6, null_prob=base.projector.null_prob, seed=42, epoch=0
    )
    step = next(plan)
    rows = [(int(r), bool(d)) for part, drop in zip(step.passes, step.dropped, strict=True)
            for r, d in zip(part, drop, strict=True)]  # fmt: skip
    return model, rows, step.label_tokens


def test_the_contrastive_step_is_what_a_loop_over_examples_gives(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    _, inputs = loaded
    model, rows, tokens = first_step(base, loaded)
    others = strangers(inputs, inputs.rows("train"), [42, 5, 0])
    examples, loss = inputs.examples("train"), 0.0
    assert any(dropped for _, dropped in rows)
    with torch.no_grad():
        for row, dropped in rows:
            own = model(examples.batch(np.array([row]), np.array([dropped])))
            loss -= float(own.sum())
            if not dropped:  # the null user has no strangers
                other = model(examples.batch(np.array([row]), None, others[[row]]))
                loss += CONTRAST.contrast * max(0.0, 0.2 * len(own) - float(own.sum() - other.sum()))
    assert one_step(base, loaded, CONTRAST, tmp_path / "run") == pytest.approx(loss / tokens, abs=1e-5)


def test_the_distilling_step_is_what_a_loop_over_examples_gives(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    backbone, inputs = loaded
    encoder = text_encoder(backbone, base.data, 1)
    profiled = tokenise(base.data.examples, encoder, cache_root(base.data.cache_dir), with_profile=True)
    model, rows, tokens = first_step(base, loaded, profiled)
    examples, loss = inputs.examples("train"), 0.0
    with torch.no_grad():
        for row, dropped in rows:
            batch = examples.batch(np.array([row]), np.array([dropped]))
            prefix = model.projector(batch.embeddings, batch.present)
            item = inputs.tokens[row]
            prompt, completion = backbone.embed(batch.prompt), torch.tensor(item.completion.tolist())
            tail = backbone.embed(completion[None, :-1])
            student = backbone.model(inputs_embeds=torch.cat([prompt, prefix, tail], 1)).logits[0, prompt.shape[1] :]
            known = [*profiled[row].prompt.tolist(), *completion[:-1].tolist()]
            teacher = backbone.model(torch.tensor([known])).logits[0, len(profiled[row].prompt) - 1 :]
            p, q = teacher.log_softmax(-1), student.log_softmax(-1)
            loss -= float(q.gather(1, completion[:, None]).sum())
            loss += DISTILL.distill * float((p.exp() * (p - q)).sum())
    assert one_step(base, loaded, DISTILL, tmp_path / "run") == pytest.approx(loss / tokens, abs=1e-4)


def test_a_share_of_the_rows_is_read_with_the_profile(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    backbone, inputs = loaded
    config = with_training(base, max_steps=1, tokens_per_pass=40, batch_size=24, profile_share=0.5)
    profiled = tokenise(
        base.data.examples, text_encoder(backbone, base.data, 1), cache_root(base.data.cache_dir), with_profile=True
    )
    shown = np.random.default_rng([42, 12]).random(len(inputs.tokens)) < 0.5
    mixed = ProfiledInPart(inputs.tokens, profiled, shown)
    model, rows, tokens = first_step(base, loaded, mixed, batch_size=24)
    seen, loss = {bool(shown[row]) for row, _ in rows}, 0.0
    with torch.no_grad():
        for row, dropped in rows:
            examples = inputs.examples("train", tokens=profiled if shown[row] else None)
            loss -= float(model(examples.batch(np.array([row]), np.array([dropped]))).sum())
    assert seen == {False, True}
    _, record = train_arm(replace(config, output=str(tmp_path / "run")), *loaded, "e2p", tmp_path / "run", None)
    assert next(entry["loss"] for entry in record["history"] if "loss" in entry) == pytest.approx(
        loss / tokens, abs=1e-5
    )


@pytest.mark.parametrize("objective", [ObjectiveConfig(name="kto"), DISTILL])
def test_a_share_with_profiles_is_for_likelihood_alone(base: RunConfig, objective: ObjectiveConfig) -> None:
    with pytest.raises(ConfigError, match=r"training\.profile_share.*expected 0 unless objective\.name is lm"):
        replace(with_training(base, profile_share=0.5), objective=objective)


@pytest.mark.parametrize("objective", [CONTRAST, DISTILL])
def test_a_resumed_training_draws_the_same_strangers(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, objective: ObjectiveConfig
) -> None:
    assert_resumes(replace(base, objective=objective), loaded, tmp_path)


def test_contrast_widens_the_gap_between_own_and_another_users_vector(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    _, inputs = loaded
    gaps = []
    for name, objective in (
        ("plain", ObjectiveConfig()),
        ("contrast", ObjectiveConfig(contrast=1.0, contrast_margin=3.0)),
    ):
        config = replace(with_training(base, epochs=8), objective=objective)
        model, _ = train_arm(config, *loaded, "e2p", tmp_path / name, None)
        rows = inputs.rows("validation")
        others = strangers(inputs, rows, [1])
        with torch.no_grad():
            own = model(inputs.examples("validation").batch(rows))
            other = model(inputs.examples("validation").batch(rows, None, others[rows]))
        gaps.append(float((own - other).mean()))
    assert gaps[1] > 1.1 * gaps[0] > 0


def test_the_static_control_gets_no_contrast_and_the_adapter_knows_its_objective(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    plain, _ = train_arm(base, *loaded, "static", tmp_path / "plain", None)
    config = replace(base, objective=CONTRAST)
    contrasted, _ = train_arm(config, *loaded, "static", tmp_path / "contrast", None)
    for name, value in plain.projector.state_dict().items():
        assert torch.equal(contrasted.projector.state_dict()[name], value)
    path = tmp_path / "contrast" / "controls" / "static" / "adapter" / "adapter_config.json"
    assert json.loads(path.read_text())["objective"] == to_dict(CONTRAST)


def test_distilling_needs_profiles_and_says_so_before_there_is_a_run(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path, profile=False)
    for config in (replace(plain, objective=DISTILL), with_training(plain, profile_share=0.1)):
        with pytest.raises(DataError, match="expected a text in column 'profile', got none; prompt arms"):
            train(config)
        assert not Path(config.output).exists()


def test_passes_hold_the_teachers_rows_within_the_budget(base: RunConfig, loaded: tuple[Any, RunInputs]) -> None:
    backbone, inputs = loaded
    encoder = text_encoder(backbone, base.data, 1)
    profiled = tokenise(base.data.examples, encoder, cache_root(base.data.cache_dir), with_profile=True)
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data)
    trainer = E2PTrainer(
        model,
        replace(base.training, tokens_per_pass=60),
        inputs.examples("train"),
        inputs.examples("validation"),
        "unused",
        criterion=Likelihood(DISTILL, inputs.examples("train"), teacher=profiled),
    )
    widths = profiled.prompt_lengths + profiled.completion_lengths
    passes = [rows for (step,) in trainer.get_train_dataloader() for rows in step.passes]
    assert max(len(rows) for rows in passes) > 1
    assert all(len(rows) == 1 or len(rows) * widths[rows].max() <= 60 for rows in passes)


def test_the_two_terms_are_not_for_one_run() -> None:
    with pytest.raises(ConfigError, match="expected one of contrast and distill"):
        ObjectiveConfig(contrast=1, distill=1)
