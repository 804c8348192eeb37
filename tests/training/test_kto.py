"""Yes/no objectives: the losses beside those of TRL, finite differences and closed forms; training on any balance."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2p.config import ObjectiveConfig, RunConfig
from e2p.data.batches import epoch_steps
from e2p.errors import ConfigError, DataError
from e2p.model.e2p import E2PModel
from e2p.training import preferences
from e2p.training.criteria import Engagement
from e2p.training.inputs import RunInputs
from e2p.training.objectives import engagement_losses, kl_baseline, kto_losses, log1mexp
from e2p.training.preferences import Preferences, load_preferences, mismatched
from e2p.training.run import train, train_arm
from e2p.training.scoring import loglikelihoods
from e2p.training.trainer import E2PTrainer
from tiny_run import PROMPTS, WORDS, assert_resumes, inputs_of, tiny_run, with_training

KTO = ObjectiveConfig(name="kto", beta=0.2)
EQ5 = ObjectiveConfig(name="engagement", alpha=0.5, per_token=True)


def labelled(config: RunConfig, each: int = 2, positive: float = 0.5) -> RunConfig:
    """The same users; in ``positive`` of the rows the word that the user likes, in the others the next user's."""
    path, rows = Path(config.data.examples), []
    old = pl.read_parquet(path).select("user_id", "split").unique(maintain_order=True)
    counts = {"train": 0, "validation": 0, "test": 0}
    for user, split in old.iter_rows():
        likes = int(user[1:]) % len(WORDS)
        for n in range(2 * each):
            nth, counts[split] = counts[split], counts[split] + 1
            yes = int((nth + 1) * positive + 1e-9) > int(nth * positive + 1e-9) if positive != 0.5 else n % 2 == 0
            word = WORDS[likes if yes else (likes + 1 + n % 3) % len(WORDS)]
            rows.append(
                {
                    "example_id": f"{user}-{n}",
                    "user_id": user,
                    "prompt": PROMPTS[(likes + n // 2) % len(PROMPTS)],
                    "completion": f"{word} {word}",
                    "split": split,
                    "label": yes,
                }
            )
    pl.DataFrame(rows).write_parquet(path)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return labelled(tiny_run(tmp_path_factory.mktemp("kto")))


@pytest.fixture(scope="module")
def loaded(base: RunConfig) -> tuple[Any, RunInputs]:
    return inputs_of(base)


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[True, False, True, False], [True, True, True, False], [False] * 3 + [True]])
def test_losses_and_gradients_are_trls(base: RunConfig, tmp_path: Path, labels: list[bool]) -> None:
    """Same tokens, PEFT's virtual token in the place of our static one, TRL's own mismatched pairs."""
    from datasets import Dataset, disable_progress_bars
    from peft import PromptTuningConfig
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer

    disable_progress_bars()
    backbone, inputs = inputs_of(base)
    rows = inputs.all_rows("train")[[0, 5, 10, 15]]
    frame = pl.read_parquet(base.data.examples)
    texts = [
        {
            "prompt": [{"role": "user", "content": frame["prompt"][int(row)]}],
            "completion": [{"role": "assistant", "content": frame["completion"][int(row)]}],
            "label": label,
        }
        for row, label in zip(rows, labels, strict=True)
    ]
    projector = replace(base.projector, position="before_bos")
    ours = E2PModel.from_backbone(backbone, inputs.embeddings.dim, projector, data=base.data, static=True)
    phi: Any = ours.projector
    examples = replace(inputs.examples("train", rows=rows), position="before_bos")
    other = np.full(len(inputs.tokens), -1)
    other[rows] = rows[[3, 0, 1, 2]]  # TRL turns the completions on by one place
    reference, mixed = (np.zeros(len(other), np.float32) for _ in range(2))
    reference[rows] = loglikelihoods(ours, examples, rows, 10_000, use_prefix=False)
    mixed[rows] = loglikelihoods(ours, examples, rows, 10_000, completions=other[rows], use_prefix=False)

    def mismatched_gain(token: torch.Tensor) -> float:
        with torch.no_grad():
            phi.w2.weight.zero_()
            phi.w2.bias.copy_(token)
        return float((loglikelihoods(ours, examples, rows, 10_000, completions=other[rows]) - mixed[rows]).mean())

    # Of some tokens the one with the largest divergence, or the baseline would be 0 on both sides.
    draws = torch.randn(40, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    token = max(draws, key=mismatched_gain)
    mismatched_gain(token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own making
        settings = KTOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=4,
            beta=0.3,
            desirable_weight=1.2,
            undesirable_weight=0.7,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
        )
        trainer = KTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base.backbone.model, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(texts),
            processing_class=backbone.tokenizer,
            # Not a wrapped model: TRL takes what that is at the start for the reference, not the bare backbone.
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        )
        virtual = trainer.model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            virtual.copy_(token[None])
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        expected = trainer.compute_loss(trainer.model, batch)
        expected.backward()
    for at, row in enumerate(rows):  # the same ids, or nothing is compared
        own = inputs.tokens[int(row)]
        assert trainer.train_dataset[at]["prompt_ids"] == own.prompt.tolist()
        assert trainer.train_dataset[at]["completion_ids"] == own.completion.tolist()

    engaged = np.zeros(len(other), bool)
    engaged[rows] = labels
    objective = ObjectiveConfig(name="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    criterion = Engagement(objective, examples, Preferences(engaged, other, reference, mixed))
    drop = np.zeros(4, bool)
    (step,) = epoch_steps(examples, batch_size=4, budget=10_000, null_prob=0, seed=0, epoch=0)
    criterion.begin(ours, step, 10_000, lambda values: values)
    loss = criterion.loss(ours, rows, drop, step)
    loss.backward()
    assert float(criterion.baseline) > 0.01
    assert float(criterion.baseline) == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    torch.testing.assert_close(phi.w2.bias.grad, virtual.grad[0], atol=1e-5, rtol=1e-5)
    assert float(virtual.grad.norm()) > 1e-3


@given(
    st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0), st.booleans()), min_size=2, max_size=8),
    st.floats(0.01, 1),
    st.floats(0, 20),
)
def test_kto_is_what_the_authors_wrote(rows: list[tuple[float, float, bool]], beta: float, z0: float) -> None:
    weights = (1.5, 0.5)
    policy, reference = (torch.tensor(values, dtype=torch.float64) for values in list(zip(*rows, strict=True))[:2])
    engaged = torch.tensor([row[2] for row in rows])
    found = kto_losses(policy, reference, engaged, torch.tensor(z0, dtype=torch.float64), beta, weights)
    for loss, (own, frozen, yes) in zip(found.tolist(), rows, strict=True):
        value = (1 if yes else -1) * beta * (own - frozen - z0)
        expected = weights[0 if yes else 1] * (1 - 1 / (1 + math.exp(-value)))  # lambda_y - v(x, y), Eq. 7
        assert loss == pytest.approx(expected, abs=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    policy = torch.tensor([-3.0, -9.0, -4.0, -0.01], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-5.0, -6.0, -4.5, -2.0], dtype=torch.float64)
    engaged = torch.tensor([True, False, False, False])
    z0 = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: kto_losses(p, reference, engaged, z0, 0.3, (1.2, 0.7)), policy)
    assert torch.autograd.gradcheck(lambda p: engagement_losses(p, engaged, 0.4), policy)


@pytest.mark.parametrize("objective", [KTO, EQ5, replace(KTO, per_token=True), replace(EQ5, per_token=False)])
def test_gradients_of_phi_are_those_of_finite_differences(
    base: RunConfig, tmp_path: Path, objective: ObjectiveConfig
) -> None:
    """Through projector, splice, frozen model and the step's loss, in float64; z0 is held, as it is in a step."""
    backbone, inputs = inputs_of(base)
    backbone.model.double()
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data, seed=1)
    model.projector.double()
    examples = inputs.examples("train", rows=inputs.all_rows("train")[:6])
    examples = replace(examples, vectors=examples.vectors.astype(np.float64))
    known = load_preferences(inputs, model, objective, 1, 10_000, None)
    criterion = Engagement(objective, examples, known)
    (step,) = epoch_steps(examples, batch_size=6, budget=10_000, null_prob=0, seed=0, epoch=0)
    criterion.begin(model, step, 10_000, lambda values: values)
    drop = np.zeros(6, bool)
    criterion.loss(model, examples.rows, drop, step).backward()
    bias: Any = model.projector.w2.bias
    for at in (0, 7, 31):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                bias[at] += sign * 5e-3
                values.append(float(criterion.loss(model, examples.rows, drop, step)))
                bias[at] -= sign * 5e-3
        # Token log-probabilities come out in float32.
        assert float(bias.grad[at]) == pytest.approx((values[0] - values[1]) / 1e-2, rel=5e-3, abs=3e-5)


@given(st.floats(-80, -1e-6))
def test_log_of_one_minus_p_keeps_its_digits(x: float) -> None:
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(math.log(-math.expm1(x)), rel=1e-12)
    narrow = np.float32(x)
    expected = math.log(-math.expm1(float(narrow)))
    assert float(log1mexp(torch.tensor(narrow))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("x", [0.0, -1e-30, -1e-9, -1e-3, -0.6931, -5.0, -100.0, -1e4])
def test_certainty_about_what_was_not_engaged_with_is_punished_and_finite(x: float) -> None:
    logp = torch.tensor([x], requires_grad=True)
    loss = engagement_losses(logp, torch.tensor([False]), 1.0)
    loss.backward()
    assert logp.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logp.grad).all()
    assert float(logp.grad) >= 0  # less likely is better
    if x > -0.1:
        assert float(loss.detach()) > 2
        assert float(logp.grad) > 1


def test_eq_5_by_hand() -> None:
    p = torch.tensor([0.3, 0.3, 0.9])
    losses = engagement_losses(p.log(), torch.tensor([True, False, False]), 0.5)
    assert losses.tolist() == pytest.approx([-math.log(0.3), -0.5 * math.log(0.7), -0.5 * math.log(0.1)], abs=1e-6)


def test_the_baseline_is_never_negative_and_has_no_gradient() -> None:
    total = torch.tensor(-3.0, requires_grad=True)
    assert float(kl_baseline(total, torch.tensor(2.0))) == 0
    baseline = kl_baseline(-total, torch.tensor(2.0))
    assert float(baseline) == 1.5
    assert not baseline.requires_grad


def test_half_precision_is_widened() -> None:
    logp = torch.tensor([-2.0, -3.0], dtype=torch.bfloat16)
    engaged = torch.tensor([True, False])
    assert kto_losses(logp, logp, engaged, torch.tensor(0.0), 0.1).dtype == torch.float32
    assert engagement_losses(logp, engaged, 1.0).dtype == torch.float32


# --- mismatched pairs and references ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40), st.integers(0, 99))
def test_a_mismatched_completion_is_another_text_and_if_possible_another_users(
    rows: list[tuple[int, int]], seed: int
) -> None:
    users, texts = np.array([user for user, _ in rows]), np.array([text for _, text in rows], np.uint64)
    if len(set(texts.tolist())) < 2:
        with pytest.raises(DataError, match="expected at least two different completions, got one in all"):
            mismatched(users, texts, [seed])
        return
    other = mismatched(users, texts, [seed])
    for row, drawn in enumerate(other):
        assert texts[drawn] != texts[row]
        if any(user != users[row] and text != texts[row] for user, text in rows):
            assert users[drawn] != users[row]
    assert other.tolist() == mismatched(users, texts, [seed]).tolist()


def test_mismatched_pairs_stay_within_their_part_and_references_are_the_frozen_models(
    base: RunConfig, loaded: tuple[Any, RunInputs]
) -> None:
    backbone, inputs = loaded
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data)
    known = load_preferences(inputs, model, KTO, 3, 200, None)
    for part in ("train", "validation"):
        rows = inputs.all_rows(part)
        assert set(known.other[rows]) <= set(rows)
    assert (known.other[inputs.all_rows("test")] == -1).all()
    for row in (*inputs.all_rows("train")[:5], *inputs.all_rows("validation")[:5]):
        for of, found in ((row, known.reference), (known.other[row], known.reference_other)):
            prompt, completion = inputs.tokens[int(row)].prompt, inputs.tokens[int(of)].completion
            ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
            with torch.no_grad():
                logits = backbone.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = float(logits.gather(1, ids[0, len(prompt) :, None]).sum())
            assert float(found[row]) == pytest.approx(expected, abs=1e-3)


def test_references_are_computed_once_for_one_frozen_model(
    base: RunConfig, loaded: tuple[Any, RunInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, inputs = loaded
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data)
    first = load_preferences(inputs, model, KTO, 4, 500, None)
    calls = []

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(len(args[2]))
        return loglikelihoods(*args, **settings)

    monkeypatch.setattr(preferences, "loglikelihoods", counted)
    again = load_preferences(inputs, model, replace(KTO, beta=0.9), 4, 500, None)
    assert calls == [16]  # rows that are computed again to believe the others
    assert np.array_equal(first.reference, again.reference)
    assert np.array_equal(first.reference_other, again.reference_other)
    load_preferences(inputs, model, KTO, 5, 500, None)  # other pairs
    assert calls[1:] == [64, 64]
    layers = backbone.model.model.layers[0].mlp.up_proj, backbone.model.lm_head  # the second is in no fingerprint
    for part in layers:
        with torch.no_grad():  # another frozen model
            part.weight.mul_(2)
            changed = load_preferences(inputs, model, KTO, 4, 500, None)
            part.weight.div_(2)
        assert calls[-2:] == [64, 64]
        assert not np.allclose(first.reference, changed.reference)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [KTO, EQ5, replace(KTO, likelihood=0.4)])
def test_a_step_is_what_a_loop_over_examples_gives_and_passes_change_nothing(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, objective: ObjectiveConfig
) -> None:
    backbone, inputs = loaded
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data, seed=42)
    model.projector.fit_input(torch.from_numpy(inputs.train_vectors()))
    examples = inputs.examples("train", rows=inputs.all_rows("train"))
    known = load_preferences(inputs, model, objective, base.data.split.seed, 10_000, None)
    step = next(epoch_steps(examples, batch_size=8, budget=10**6, null_prob=0.25, seed=42, epoch=0))
    drawn = list(zip(np.concatenate(step.passes), np.concatenate(step.dropped), strict=True))
    assert any(dropped for _, dropped in drawn)

    def likelihood(row: int, dropped: bool, of: int) -> float:
        batch = examples.batch(np.array([row]), np.array([dropped]), completions=np.array([of]))
        with torch.no_grad():
            return float(model(batch).double().sum())

    z0 = 0.0
    if objective.name == "kto":
        z0 = sum(likelihood(r, d, known.other[r]) - float(known.reference_other[r]) for r, d in drawn) / len(drawn)
    total = 0.0
    for row, dropped in drawn:
        own, yes = likelihood(row, dropped, row), bool(known.engaged[row])
        if objective.name == "kto":
            value = objective.beta * (own - float(known.reference[row]) - max(z0, 0.0)) * (1 if yes else -1)
            total += 1 - 1 / (1 + math.exp(-value))
            total -= objective.likelihood * own / len(inputs.tokens[int(row)].completion) * yes
        else:
            p = math.exp(own / len(inputs.tokens[int(row)].completion))
            total -= math.log(p) if yes else objective.alpha * math.log1p(-p)
    for tokens in (40, 8192):
        config = replace(with_training(base, max_steps=1, tokens_per_pass=tokens), objective=objective)
        _, record = train_arm(config, *loaded, "e2p", tmp_path / str(tokens), None)
        loss = next(entry["loss"] for entry in record["history"] if "loss" in entry)
        assert loss == pytest.approx(total / len(drawn), abs=1e-5)


@pytest.mark.parametrize("objective", [KTO, EQ5])
def test_own_answers_become_likelier_than_those_passed_over(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, objective: ObjectiveConfig
) -> None:
    config = replace(with_training(base, epochs=40, learning_rate=3e-2), objective=objective)
    model, record = train_arm(config, *loaded, "e2p", tmp_path / "run", None)
    inputs = loaded[1]
    rows = inputs.all_rows("test")
    examples = inputs.examples("test", rows=rows)
    gain = loglikelihoods(model, examples, rows, 10_000) - loglikelihoods(
        model, examples, rows, 10_000, use_prefix=False
    )
    yes, no = gain[inputs.labels[rows] == 1], gain[inputs.labels[rows] == 0]
    assert (yes[:, None] > no[None]).mean() > 0.9
    validation = record["validation"]
    assert validation["unit"] == f"{objective.name} loss"
    assert validation["prefix"] < validation["none"]


def test_without_prefix_validation_is_the_references_own(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path
) -> None:
    _, record = train_arm(
        replace(with_training(base, max_steps=1), objective=KTO), *loaded, "e2p", tmp_path / "kto", None
    )
    assert record["validation"]["none"] == pytest.approx(0.5, abs=1e-6)  # no gain, no baseline, mean weight 1
    config = replace(with_training(base, max_steps=1), objective=EQ5)
    _, record = train_arm(config, *loaded, "e2p", tmp_path / "eq5", None)
    inputs, model = loaded[1], E2PModel.from_backbone(loaded[0], 4, base.projector, data=base.data)
    rows = inputs.all_rows("validation")
    frozen = loglikelihoods(model, inputs.examples("validation"), rows, 10_000, use_prefix=False)
    p = np.exp(frozen.astype(np.float64) / inputs.tokens.completion_lengths[rows])
    losses = np.where(inputs.labels[rows] == 1, -np.log(p), -0.5 * np.log1p(-p))
    assert record["validation"]["none"] == pytest.approx(losses.mean(), abs=1e-5)


@pytest.mark.parametrize("positive", [0.01, 0.99])
@pytest.mark.parametrize("objective", [KTO, EQ5])
def test_labels_of_one_kind_almost_alone_train(tmp_path: Path, objective: ObjectiveConfig, positive: float) -> None:
    config = labelled(tiny_run(tmp_path, users=20), each=20, positive=positive)
    config = replace(with_training(config, epochs=3, learning_rate=1e-2), objective=objective)
    loaded = inputs_of(config)
    labels = loaded[1].labels[loaded[1].all_rows("train")]
    assert abs(labels.mean() - positive) < 0.006
    assert 0 < labels.sum() < len(labels)
    model, record = train_arm(config, *loaded, "e2p", tmp_path / "run", None)
    losses = [value for entry in record["history"] for key, value in entry.items() if "loss" in key]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.isfinite(p).all() for p in model.projector.parameters())
    if objective.name == "kto":
        known = load_preferences(loaded[1], model, objective, config.data.split.seed, 8192, None)
        mean = np.where(labels == 1, *known.weights).mean()
        assert mean == pytest.approx(1)
        assert labels.sum() * known.weights[0] == pytest.approx((labels == 0).sum() * known.weights[1])


@pytest.mark.parametrize("objective", [KTO, EQ5])
def test_a_resumed_training_goes_on_as_if_nothing_had_happened(
    base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path, objective: ObjectiveConfig
) -> None:
    assert_resumes(replace(base, objective=objective), loaded, tmp_path)


def test_language_modelling_takes_no_part_in_what_was_passed_over(tmp_path: Path) -> None:
    """The same as a table without those rows."""
    found = []
    for name in ("all", "engaged"):
        config = labelled(tiny_run(tmp_path / name))
        if name == "engaged":
            table = pl.read_parquet(config.data.examples)
            table.filter("label").drop("label").write_parquet(config.data.examples)
        model, record = train_arm(config, *inputs_of(config), "e2p", tmp_path / name / "out", None)
        found.append((model.projector.state_dict(), record["validation"]))
    for key in ("prefix", "none"):
        assert found[0][1][key] == pytest.approx(found[1][1][key], abs=1e-6)


def test_a_trainer_knows_its_objective(base: RunConfig, loaded: tuple[Any, RunInputs], tmp_path: Path) -> None:
    backbone, inputs = loaded
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, data=base.data)
    examples = inputs.examples("train", rows=inputs.all_rows("train"))
    known = load_preferences(inputs, model, KTO, 1, 8192, None)
    trainer = E2PTrainer(model, base.training, examples, examples, tmp_path, criterion=Engagement(KTO, examples, known))
    assert trainer.mean_loss(examples, use_prefix=False) == pytest.approx(0.5, abs=1e-6)


# --- what cannot be trained on ----------------------------------------------------------------------------------------


def test_a_batch_of_one_is_refused_with_the_reason(base: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"at least 2 with objective.name kto, whose baseline z0 is a mean over"):
        replace(with_training(base, batch_size=1), objective=KTO)
    replace(with_training(base, batch_size=1), objective=EQ5)  # has no baseline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            pl.lit(True),
            "the train part: expected examples of both kinds for objective.name kto, got label true in all 48",
        ),
        (pl.lit(False), "the train part: expected engaged examples, got none with label true"),
        (pl.lit(None, pl.Boolean), r"row 0 \(user u00\): label: expected true or false .* got none in 48 of"),
        (
            pl.when(pl.col("user_id") == "u03").then(None).otherwise("label"),
            r"row 12 \(user u03\): label: expected true or false in every example of training and validation",
        ),
    ],
)
def test_labels_that_teach_nothing_are_named_before_there_is_a_run(
    tmp_path: Path, change: pl.Expr, message: str
) -> None:
    config = labelled(tiny_run(tmp_path))
    pl.read_parquet(config.data.examples).with_columns(change.alias("label")).write_parquet(config.data.examples)
    with pytest.raises(DataError, match=message):
        train(replace(config, objective=KTO))
    assert not Path(config.output).exists()


def test_one_completion_for_everybody_is_refused(tmp_path: Path) -> None:
    config = labelled(tiny_run(tmp_path))
    table = pl.read_parquet(config.data.examples).with_columns(completion=pl.lit("jazz jazz"))
    table.write_parquet(config.data.examples)
    with pytest.raises(DataError, match=r"the train part: expected at least two different completions, got one in all"):
        train(replace(config, objective=KTO))
    assert not Path(config.output).exists()
    train(replace(with_training(config, max_steps=1), objective=EQ5))  # has no pairs


def test_batches_that_share_one_completion_are_fine_while_the_table_has_another(tmp_path: Path) -> None:
    """Mismatched pairs are drawn from the whole part, not from the batch."""
    config = labelled(tiny_run(tmp_path))
    first = pl.int_range(pl.len()).over("split") == 0
    text = pl.when(first).then(pl.lit("soul home")).otherwise(pl.lit("jazz jazz"))
    pl.read_parquet(config.data.examples).with_columns(completion=text).write_parquet(config.data.examples)
    config = replace(with_training(config, max_steps=3), objective=KTO)
    loaded = inputs_of(config)
    model, record = train_arm(config, *loaded, "e2p", tmp_path / "out", None)
    known = load_preferences(loaded[1], model, KTO, config.data.split.seed, 8192, None)
    rows = loaded[1].all_rows("train")
    assert set(known.other[rows[1:]]) == {rows[0]}
    assert all(math.isfinite(entry["loss"]) for entry in record["history"] if "loss" in entry)


def test_settings_out_of_range() -> None:
    for change in ({"beta": 0}, {"alpha": -1}, {"name": "kpo"}, {"name": "kto", "contrast": 1.0}):
        with pytest.raises(ConfigError, match="objective"):
            ObjectiveConfig(**change)  # type: ignore[arg-type]
