"""Every arm by its definition, against the model's own scoring of single rows and the plainest code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from e2p.config import MODEL_ARMS, RunConfig
from e2p.data.tokenised import tokenise
from e2p.errors import DataError
from e2p.evaluation.arms import Arm, build_arms, random_rows, score_arm, without_prompt_arms
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from e2p.training.run import shuffled_rows
from tiny import logits_alone
from tiny_run import inputs_of, tiny_run


class Setting:
    """A tiny run with three untrained models whose soft tokens all differ."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        backbone, self.inputs = inputs_of(config)
        kinds = {"e2p": False, "static": True, "shuffled": False}
        self.models = {
            name: E2PModel.from_backbone(
                backbone, self.inputs.embeddings.dim, config.projector, data=config.data, static=static, seed=seed
            )
            for seed, (name, static) in enumerate(kinds.items())
        }
        with torch.no_grad():
            for model in self.models.values():
                for parameter in model.projector.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.profiled = tokenise(
            config.data.examples, self.models["e2p"].encoder, Path(str(config.data.cache_dir)), with_profile=True
        )
        self.table = pl.read_parquet(config.data.examples)
        self.arms = {arm.name: arm for arm in build_arms(MODEL_ARMS, self.models, self.inputs, self.profiled, 42, 42)}
        self.scores = {name: self.long(arm) for name, arm in self.arms.items()}

    def long(self, arm: Arm) -> dict[str, dict[str, float]]:
        """metric -> example -> value."""
        frame = score_arm(arm, self.inputs, budget=200)
        return {
            str(metric): dict(part.select("example_id", "value").iter_rows())
            for (metric,), part in frame.group_by("metric")
        }

    def by_hand(self, model: E2PModel, vectors: Any, **settings: Any) -> dict[str, float]:
        """Negative log-likelihood per test example, one row at a time by E2PModel.score."""
        found = {}
        for at, row in enumerate(self.inputs.rows("test").tolist()):
            example = self.table.row(row, named=True)
            profile = [example["profile"]] if settings.get("profile") else None
            given = None if vectors is None or vectors[at] is None else [vectors[at]]
            score = model.score(
                [example["prompt"]],
                [example["completion"]],
                given,
                profiles=profile,
                use_prefix=settings.get("use_prefix", True),
            )[0]
            found[example["example_id"]] = -score.logprob
        return found

    def vectors(self, rows: Any) -> list[Any]:
        return [self.inputs.embeddings.vectors[row] for row in rows[self.inputs.rows("test")]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_run(tmp_path_factory.mktemp("arms")))


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == pytest.approx(expected, abs=2e-4)


def test_e2p_scores_with_each_users_own_vector(setting: Setting) -> None:
    close(
        setting.scores["e2p"]["nll"],
        setting.by_hand(setting.models["e2p"], setting.vectors(setting.inputs.vector_rows)),
    )


def test_random_scores_with_the_dealt_vectors(setting: Setting) -> None:
    rows = random_rows(setting.inputs, 42)
    test = setting.inputs.rows("test")
    owners = setting.inputs.embeddings.keys["user_id"].to_numpy()
    users = setting.inputs.keys["user_id"].to_numpy()
    assert (owners[rows[test]] != users[test]).all()
    assert set(owners[rows[test]]) == set(users[test])  # test users among themselves
    outside = np.setdiff1d(np.arange(len(rows)), test)
    assert (rows[outside] == setting.inputs.vector_rows[outside]).all()
    close(setting.scores["random"]["nll"], setting.by_hand(setting.models["e2p"], setting.vectors(rows)))


def test_shuffled_scores_its_own_model_on_its_own_deal(setting: Setting) -> None:
    rows = shuffled_rows(setting.inputs, 42)
    close(setting.scores["shuffled"]["nll"], setting.by_hand(setting.models["shuffled"], setting.vectors(rows)))


def test_static_depends_on_nobody(setting: Setting) -> None:
    expected = setting.by_hand(setting.models["static"], None)
    close(setting.scores["static"]["nll"], expected)
    close(expected, setting.by_hand(setting.models["static"], setting.vectors(setting.inputs.vector_rows)))


def test_null_is_the_null_user_for_everybody(setting: Setting) -> None:
    close(setting.scores["null"]["nll"], setting.by_hand(setting.models["e2p"], None))


def test_none_is_the_bare_model(setting: Setting) -> None:
    """By transformers alone: prompt and completion through the model, the completion's log-probabilities summed."""
    model = setting.models["e2p"]
    for row in setting.inputs.rows("test").tolist():
        tokens = setting.inputs.tokens[row]
        ids = [*tokens.prompt.tolist(), *tokens.completion.tolist()]
        with torch.no_grad():
            logits = model.backbone.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        first = len(tokens.prompt)
        nll = -sum(float(logits[at - 1, ids[at]]) for at in range(first, len(ids)))
        name = setting.table["example_id"][row]
        assert setting.scores["none"]["nll"][name] == pytest.approx(nll, abs=2e-4)
    close(setting.scores["none"]["nll"], setting.by_hand(model, None, use_prefix=False))


def test_the_soft_token_stands_right_before_the_completion(setting: Setting) -> None:
    """The e2p arm by the plainest code: soft token among the embeddings by hand."""
    model = setting.models["e2p"]
    row = int(setting.inputs.rows("test")[0])
    tokens = setting.inputs.tokens[row]
    prefix = model.prefix([setting.inputs.embeddings.vectors[setting.inputs.vector_rows[row]]], 1)[0]
    ids = [*tokens.prompt.tolist(), *tokens.completion.tolist()]
    with torch.no_grad():
        logits = logits_alone(model.backbone.model, ids, prefix, len(tokens.prompt)).log_softmax(-1)
    nll = -sum(float(logits[len(tokens.prompt) + j, token]) for j, token in enumerate(tokens.completion.tolist()))
    assert setting.scores["e2p"]["nll"][setting.table["example_id"][row]] == pytest.approx(nll, abs=2e-4)


def test_prompt_is_the_template_text_in_the_system_turn(setting: Setting) -> None:
    model, tokenizer = setting.models["e2p"], setting.models["e2p"].encoder.tokenizer
    for row in setting.inputs.rows("test").tolist():
        example = setting.table.row(row, named=True)
        text = (
            f"<|bos|><|system|> About the user: {example['profile']}<|eos|>"
            f"<|user|> {example['prompt']}<|eos|><|assistant|>"
        )
        assert tokenizer.decode(setting.profiled[row].prompt) == text
        assert (setting.profiled[row].completion == setting.inputs.tokens[row].completion).all()
    close(setting.scores["prompt"]["nll"], setting.by_hand(model, None, use_prefix=False, profile=True))
    own = setting.vectors(setting.inputs.vector_rows)
    close(setting.scores["e2p+prompt"]["nll"], setting.by_hand(model, own, profile=True))


def test_context_tokens_are_what_the_conditioning_adds(setting: Setting) -> None:
    plain, profiled = setting.inputs.tokens, setting.profiled
    for row in setting.inputs.rows("test").tolist():
        name = setting.table["example_id"][row]
        added = len(profiled[row].prompt) - len(plain[row].prompt)
        assert added > 1
        expected = {"none": 0, "prompt": added, "e2p+prompt": added + 1} | dict.fromkeys(
            ("static", "random", "shuffled", "null", "e2p"), 1
        )
        assert {arm: s["context_tokens"][name] for arm, s in setting.scores.items()} == expected


def test_all_arms_are_judged_on_the_same_completions(setting: Setting) -> None:
    test = setting.inputs.rows("test").tolist()
    names = {setting.table["example_id"][row] for row in test}
    for scores in setting.scores.values():
        assert set(scores) == {"nll", "tokens", "bytes", "context_tokens"}
        assert set(scores["nll"]) == names
        for row in test:
            name = setting.table["example_id"][row]
            assert scores["tokens"][name] == len(setting.inputs.tokens[row].completion)
            assert scores["bytes"][name] == len(setting.table["completion"][row].encode())


def test_the_batch_size_does_not_matter(setting: Setting) -> None:
    for budget in (1, 10**6):
        frame = score_arm(setting.arms["e2p"], setting.inputs, budget).filter(pl.col("metric") == "nll")
        close(dict(frame.select("example_id", "value").iter_rows()), setting.scores["e2p"]["nll"])


def test_arms_come_in_the_asked_order_and_prompts_need_profiles(setting: Setting) -> None:
    arms = build_arms(("null", "none"), setting.models, setting.inputs, None, 1, 1)
    assert [arm.name for arm in arms] == ["null", "none"]
    with pytest.raises(DataError, match="arm prompt: expected examples with profile texts"):
        build_arms(("prompt",), setting.models, setting.inputs, None, 1, 1)
    assert without_prompt_arms(MODEL_ARMS) == tuple(arm for arm in MODEL_ARMS if "prompt" not in arm)


def test_one_test_user_cannot_be_exchanged(setting: Setting) -> None:
    inputs: RunInputs = copy.copy(setting.inputs)
    alone = np.where(inputs.keys["user_id"].to_numpy() == "u16", inputs.split, -1)
    object.__setattr__(inputs, "split", alone.astype(np.int8))
    with pytest.raises(DataError, match="expected at least two users with a vector to exchange them, got 1"):
        random_rows(inputs, 42)
