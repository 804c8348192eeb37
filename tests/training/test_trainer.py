"""The training loop: what trains, what is saved, exact resumption, passes, processes, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from e2p.config import RunConfig
from e2p.errors import ConfigError, RunError
from e2p.model.e2p import E2PModel
from e2p.training.run import newest_checkpoint
from e2p.training.trainer import E2PTrainer, trainable
from tiny_run import inputs_of, tiny_run, with_training

PHI = {"w1.weight", "norm.weight", "norm.bias", "w2.weight", "w2.bias", "null_vector"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_run(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loaded(base: RunConfig) -> tuple[Any, Any]:
    return inputs_of(base)


@pytest.fixture
def build(base: RunConfig, loaded: tuple[Any, Any], tmp_path: Path) -> Callable[..., E2PTrainer]:
    """A trainer on the shared backbone and inputs with another budget."""

    def make(folder: str = "checkpoints", static: bool = False, **training: Any) -> E2PTrainer:
        backbone, inputs = loaded
        budget = replace(base.training, **training)
        if budget.gradient_checkpointing:  # changes the backbone: a fresh one
            backbone, _ = inputs_of(base)
        model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, base.projector, static=static)
        return E2PTrainer(model, budget, inputs.examples("train"), inputs.examples("validation"), tmp_path / folder)

    return make


def losses(trainer: E2PTrainer, key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def weights(trainer: E2PTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainable(trainer.model).items()}


def assert_same(one: E2PTrainer, other: E2PTrainer, tolerance: float = 1e-5) -> None:
    """Same losses step by step, same validation losses, same weights."""
    for key in ("loss", "eval_loss"):
        assert losses(one, key) == pytest.approx(losses(other, key), abs=tolerance)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], atol=tolerance, rtol=0)


def test_phi_alone_trains(build: Callable[..., E2PTrainer]) -> None:
    trainer = build(weight_decay=0.1, max_steps=2)
    frozen = {name: p.clone() for name, p in trainer.model.backbone.named_parameters()}
    start = weights(trainer)
    assert set(start) == PHI
    trainer.train()
    optimiser = trainer.optimizer
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(trainer.model).values()}
    decayed = {tuple(p.shape) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    assert all(len(shape) > 1 for shape in decayed)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.backbone.named_parameters())
    assert not any(p.requires_grad for p in trainer.model.backbone.parameters())
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved == PHI


def test_a_checkpoint_holds_phi_and_nothing_else(build: Callable[..., E2PTrainer], tmp_path: Path) -> None:
    trainer = build(max_steps=2)
    trainer.train()
    newest = Path(str(newest_checkpoint(tmp_path / "checkpoints")))
    assert set(load_file(newest / "phi.safetensors")) == PHI
    assert {path.name for path in newest.iterdir()} == {
        "phi.safetensors",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }


def test_what_is_cut_short_or_not_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-11", "checkpoint-12", "checkpoint-old", "runs"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-old"):
        (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"epoch"', encoding="utf-8")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_broken_checkpoint_is_one_clear_error(build: Callable[..., E2PTrainer], tmp_path: Path) -> None:
    build(max_steps=2).train()
    newest = Path(str(newest_checkpoint(tmp_path / "checkpoints")))
    (newest / "phi.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(RunError, match=r"phi\.safetensors: expected a checkpoint of this run"):
        build(max_steps=4).train(resume_from_checkpoint=str(newest))


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


@pytest.mark.parametrize("kill_after", [4, 5, 7])
def test_resuming_changes_nothing(build: Callable[..., E2PTrainer], tmp_path: Path, kill_after: int) -> None:
    """Three steps an epoch, a checkpoint every second step or so; the null user is dropped in as before."""
    whole = build("whole", epochs=4, evals_per_epoch=1, patience=9)
    whole.train()
    cut = build("cut", epochs=4, evals_per_epoch=1, patience=9)
    original, done = cut.training_step, 0

    def step(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal done
        if done == kill_after:
            raise Killed
        done += 1
        return original(*arguments, **keywords)

    cut.training_step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        cut.train()
    torch.manual_seed(99)  # what another process would have
    resumed = build("cut", epochs=4, evals_per_epoch=1, patience=9)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "cut"))
    assert_same(whole, resumed, 0)


def test_a_finished_run_is_resumed_without_a_further_step(build: Callable[..., E2PTrainer], tmp_path: Path) -> None:
    whole = build(max_steps=4)
    whole.train()
    again = build(max_steps=4)
    again.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "checkpoints"))
    assert again.state.global_step == 4
    assert_same(whole, again, 0)


@pytest.mark.parametrize("static", [False, True])
def test_passes_do_not_change_the_result(build: Callable[..., E2PTrainer], static: bool) -> None:
    tiny, huge = (build(str(size), static, tokens_per_pass=size, max_steps=5) for size in (1, 100_000))
    tiny.train()
    huge.train()
    assert_same(tiny, huge)


def test_gradient_checkpointing_does_not_change_the_result(build: Callable[..., E2PTrainer]) -> None:
    plain, checkpointed = build("a", max_steps=4), build("b", max_steps=4, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.model.backbone.model.modules())
    assert_same(plain, checkpointed)


def test_max_steps_ends_the_training_and_validates_at_the_end(build: Callable[..., E2PTrainer]) -> None:
    trainer = build(epochs=50, max_steps=5, evals_per_epoch=1)
    trainer.train()
    assert trainer.state.global_step == 5
    assert sorted(losses(trainer, "eval_loss")) == [3, 5]


def test_the_best_weights_are_kept_and_patience_stops(
    build: Callable[..., E2PTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Validation losses as given: best at the second, then worse until patience ends."""
    given = iter([3.0, 1.0, 2.0, 2.5, 2.6, 0.1])
    seen: list[dict[str, torch.Tensor]] = []

    def mean_loss(self: E2PTrainer, examples: Any, use_prefix: bool = True) -> float:
        seen.append(weights(self))
        return next(given)

    monkeypatch.setattr(E2PTrainer, "mean_loss", mean_loss)
    trainer = build(epochs=9, evals_per_epoch=1, patience=3)
    trainer.train()
    assert losses(trainer, "eval_loss") == {3: 3.0, 6: 1.0, 9: 2.0, 12: 2.5, 15: 2.6}
    assert trainer.state.best_global_step == 6
    for name, value in weights(trainer).items():
        assert torch.equal(value, seen[1][name])
        assert not torch.equal(value, seen[4][name])
    resumed = build(epochs=9, evals_per_epoch=1, patience=3)  # it had stopped: nothing is left to do
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "checkpoints"))
    assert all(torch.equal(value, seen[1][name]) for name, value in weights(resumed).items())


def test_patience_goes_on_counting_after_a_resumption(
    build: Callable[..., E2PTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])

    def mean_loss(self: E2PTrainer, examples: Any, use_prefix: bool = True) -> float:
        return next(given)

    monkeypatch.setattr(E2PTrainer, "mean_loss", mean_loss)
    first = build(epochs=9, evals_per_epoch=1, patience=3)
    original = first.training_step

    def step(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if first.state.global_step == 9:
            raise Killed
        return original(*arguments, **keywords)

    first.training_step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.train()
    second = build(epochs=9, evals_per_epoch=1, patience=3)
    second.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "checkpoints"))
    assert second.state.global_step == 12  # one good, three bad


def test_tensorboard_files_are_written(build: Callable[..., E2PTrainer], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    build(max_steps=2).train()
    files = list((tmp_path / "checkpoints").rglob("events.out.tfevents.*"))
    assert files
    assert files[0].stat().st_size > 0


def test_bfloat16_trains_and_phi_stays_float32(base: RunConfig, tmp_path: Path) -> None:
    config = with_training(base, precision="bfloat16", max_steps=6, learning_rate=1e-4)
    backbone, inputs = inputs_of(config)
    assert backbone.autocast_dtype == torch.bfloat16
    model = E2PModel.from_backbone(backbone, inputs.embeddings.dim, config.projector)
    trainer = E2PTrainer(
        model, config.training, inputs.examples("train"), inputs.examples("validation"), tmp_path / "c"
    )
    start = weights(trainer)
    trainer.train()
    assert all(value.dtype == torch.float32 for value in weights(trainer).values())
    states = [s for state in trainer.optimizer.state.values() for s in state.values() if torch.is_tensor(s)]
    assert {s.dtype for s in states} == {torch.float32}
    moved = weights(trainer)["w1.weight"] - start["w1.weight"]
    assert float(moved.abs().max()) > 1e-5
    assert all(torch.isfinite(torch.tensor(list(losses(trainer).values()))))


def test_a_logged_loss_is_the_mean_over_the_steps_tokens(
    build: Callable[..., E2PTrainer], loaded: tuple[Any, Any]
) -> None:
    """The first step's loss by hand: every example alone, null users as drawn."""
    from e2p.data.batches import epoch_steps

    _, inputs = loaded
    trainer = build(max_steps=1, tokens_per_pass=30)
    examples = inputs.examples("train")
    null_prob = trainer.model.projector.config.null_prob
    step = next(epoch_steps(examples, batch_size=8, budget=10**6, null_prob=null_prob, seed=42, epoch=0))
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for rows, drop in zip(step.passes, step.dropped, strict=True):
            for at in range(len(rows)):
                logprobs = trainer.model(examples.batch(rows[at : at + 1], drop[at : at + 1]))
                nats, tokens = nats - float(logprobs.sum()), tokens + len(logprobs)
    trainer.train()
    assert tokens == step.label_tokens
    assert losses(trainer)[1] == pytest.approx(nats / tokens, abs=1e-5)


def test_a_batch_smaller_than_the_processes_is_refused(
    build: Callable[..., E2PTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from e2p.training.trainer import _Plans

    trainer = build()
    with pytest.raises(ConfigError, match=r"training\.batch_size: expected at least 3, the processes, got 2"):
        _Plans(trainer.train_examples, replace(trainer.budget, batch_size=2), 0.0, 0, 3)


def test_several_gpus_are_not_used_by_one_process(build: Callable[..., E2PTrainer]) -> None:
    """nn.DataParallel would count every example several times."""
    assert build().args.n_gpu <= 1


def test_the_state_of_a_checkpoint_is_json(build: Callable[..., E2PTrainer], tmp_path: Path) -> None:
    build(max_steps=2).train()
    state = json.loads(Path(str(newest_checkpoint(tmp_path / "checkpoints")), "trainer_state.json").read_text())
    assert state["global_step"] == 2
