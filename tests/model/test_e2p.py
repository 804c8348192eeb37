"""E2PModel: the null user, what trains, save and load, prompts and vectors as users give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2p.config import DataConfig, Position, ProjectorConfig
from e2p.errors import AdapterError, DataError
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.model.projector import StaticPrefix
from tiny import equation_2, logprobs_alone, make_batch, tiny_backbone

TEXT = DataConfig(max_prompt_tokens=60, max_completion_tokens=16)
POSITIONS: tuple[Position, ...] = ("before_bos", "after_bos", "after_system", "before_completion")
PROMPTS: list[Any] = [
    "make a playlist",
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
    "hi",
]
COMPLETIONS = ["slow jazz", "hello there world", "soul"]
VECTORS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def build(backbone: FrozenBackbone, static: bool = False, **values: Any) -> E2PModel:
    config = ProjectorConfig(**{"hidden_dim": 5, "user_scale": 1.0, **values})
    model = E2PModel.from_backbone(backbone, 4, config, data=TEXT, static=static)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.projector.fit_input(torch.tensor(VECTORS))
    return model


@pytest.fixture(scope="module")
def model(llama: FrozenBackbone) -> E2PModel:
    return build(llama)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_those_of_rows_put_together_by_hand(llama: FrozenBackbone, position: Position, k: int) -> None:
    model = build(llama, position=position, prefix_tokens=k)
    prefix = model.projector(torch.tensor(VECTORS))
    # <|bos|> is one token and each turn ends behind its <|eos|>, whatever the encoder thinks.
    for row, (score, completion) in enumerate(
        zip(model.score(PROMPTS, COMPLETIONS, VECTORS), COMPLETIONS, strict=True)
    ):
        turns = PROMPTS[row] if isinstance(PROMPTS[row], list) else [{"role": "user", "content": PROMPTS[row]}]
        ids = llama.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        system = ids.index(1) + 1 if turns[0]["role"] == "system" else 1
        at = {"before_bos": 0, "after_bos": 1, "after_system": system, "before_completion": len(ids)}[position]
        answer = [*llama.tokenizer(" " + completion, add_special_tokens=False)["input_ids"], 1]
        with torch.no_grad():
            expected = logprobs_alone(llama.model, ids, answer, prefix[row], at)
        assert score.tokens == len(answer)
        assert score.logprob == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_null_user_has_one_meaning(llama: FrozenBackbone, position: Position) -> None:
    model = build(llama, position=position)
    null = [None, None, None]
    scores = model.score(PROMPTS, COMPLETIONS, None)
    assert model.score(PROMPTS, COMPLETIONS, null) == scores
    mixed = model.score(PROMPTS, COMPLETIONS, [VECTORS[0], None, VECTORS[2]])
    own = model.score(PROMPTS, COMPLETIONS, VECTORS)
    assert mixed[1].logprob == pytest.approx(scores[1].logprob, rel=1e-5)
    assert [mixed[0].logprob, mixed[2].logprob] == pytest.approx([own[0].logprob, own[2].logprob], rel=1e-5)
    assert abs(own[1].logprob - scores[1].logprob) > 1e-2
    prompts = [[7, 8, 9]] * 2
    at = [{"before_completion": 3}.get(position, 1)] * 2
    absent = make_batch(prompts, [[5, 6]] * 2, at, torch.tensor(VECTORS[:2]), present=[False, False])
    with torch.no_grad():
        values = model(absent)
        token = torch.tensor(equation_2(model.projector, model.projector.null_vector[None].detach().numpy())[0])
        expected = logprobs_alone(llama.model, prompts[0], [5, 6], token.float(), at[0])
    torch.testing.assert_close(values, expected.repeat(2), rtol=1e-4, atol=1e-4)
    assert model.generate(PROMPTS, max_new_tokens=6, do_sample=False) == model.generate(
        PROMPTS, null, max_new_tokens=6, do_sample=False
    )


def test_without_prefix_it_is_the_plain_backbone(model: E2PModel, llama: FrozenBackbone) -> None:
    ids = llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    answer = [*llama.tokenizer(" soul", add_special_tokens=False)["input_ids"], 1]
    with torch.no_grad():
        logits = llama.model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = sum(float(logits[len(ids) + j - 1, token]) for j, token in enumerate(answer))
    assert model.score("hi", ["soul"], use_prefix=False)[0].logprob == pytest.approx(expected, rel=1e-4)


def test_phi_alone_trains() -> None:
    model = build(tiny_backbone("llama"))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys = ("w1.weight", "norm.weight", "norm.bias", "w2.weight", "w2.bias", "null_vector")
    assert names == {f"projector.{key}" for key in keys}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0)
    batch = make_batch([[7, 8], [9]], [[5, 1], [6, 4, 1]], [2, 1], torch.tensor(VECTORS[:2]), present=[True, False])
    model.train()
    losses = []
    for _ in range(20):
        loss = -model(batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("position", ["after_bos", "before_completion"])
def test_a_loaded_adapter_scores_and_answers_as_the_saved_one(
    llama: FrozenBackbone, tmp_path: Path, static: bool, position: Position
) -> None:
    model = build(llama, static, position=position, prefix_tokens=2)
    model.embedding_versions, model.metrics = ["v7"], {"perplexity": 3.5}
    model.save_pretrained(tmp_path / "adapter")
    loaded = E2PModel.from_pretrained(tmp_path / "adapter", llama)
    assert isinstance(loaded.projector, StaticPrefix) == static
    assert loaded.embedding_versions == ["v7"]
    assert loaded.metrics == {"perplexity": 3.5}
    for name, value in model.projector.state_dict().items():
        assert torch.equal(loaded.projector.state_dict()[name], value), name
    assert loaded.score(PROMPTS, COMPLETIONS, VECTORS) == model.score(PROMPTS, COMPLETIONS, VECTORS)
    answers = [m.generate(PROMPTS, VECTORS, max_new_tokens=8, do_sample=False) for m in (model, loaded)]
    assert answers[0] == answers[1]
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "embedding_stats.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_text_settings_are_loaded_too(llama: FrozenBackbone, tmp_path: Path) -> None:
    data = DataConfig(
        max_prompt_tokens=33,
        max_completion_tokens=9,
        chat="never",
        profile_template="P {profile}",
        long_prompt="truncate",
    )
    E2PModel.from_backbone(llama, 4, data=data).save_pretrained(tmp_path / "adapter")
    encoder = E2PModel.from_pretrained(tmp_path / "adapter", llama).encoder
    assert (encoder.max_prompt_tokens, encoder.max_completion_tokens, encoder.plain_as_chat) == (33, 9, False)
    assert (encoder.profile_template, encoder.long_prompt) == ("P {profile}", "truncate")


def test_the_backbone_is_loaded_from_where_the_record_says(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    backbone.source = str(tmp_path / "backbone")
    backbone.model.save_pretrained(backbone.source)
    backbone.tokenizer.save_pretrained(backbone.source)
    model = build(backbone)
    model.save_pretrained(tmp_path / "adapter")
    loaded = E2PModel.from_pretrained(tmp_path / "adapter")
    ours, theirs = model.score(PROMPTS, COMPLETIONS, VECTORS), loaded.score(PROMPTS, COMPLETIONS, VECTORS)
    # The loaded one may run in bfloat16 where the hardware has it.
    assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in theirs], rel=0.05)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt2", {}, "model_type llama there, gpt2 here"),
        ("llama", {"num_hidden_layers": 3}, "layers 2 there, 3 here"),
        ("llama", {"hidden_size": 40}, "hidden_size 32 there, 40 here"),
        ("llama", {"vocab_size": 310}, "vocabulary 300 there, 310 here"),
        ("llama", {"seed": 1}, "embedding tables differ"),
    ],
)
def test_another_backbone_is_refused_with_what_differs(
    model: E2PModel, tmp_path: Path, family: str, changes: dict[str, Any], named: str
) -> None:
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=named) as caught:
        E2PModel.from_pretrained(tmp_path / "adapter", tiny_backbone(family, **changes))
    assert "\n" not in str(caught.value)


def test_the_same_backbone_in_half_precision_is_welcome(model: E2PModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    half = tiny_backbone("llama")
    half.model.bfloat16()
    loaded = E2PModel.from_pretrained(tmp_path / "adapter", half)
    assert loaded.projector.w1.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert np.isfinite([s.logprob for s in loaded.score(PROMPTS, COMPLETIONS, VECTORS)]).all()


def test_a_fresh_phi_depends_on_its_seed_alone(llama: FrozenBackbone) -> None:
    def fresh(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, (1,))))
        return E2PModel.from_backbone(llama, 4, data=TEXT, seed=seed).projector.w1.weight  # type: ignore[union-attr]

    assert torch.equal(fresh(1), fresh(1))
    assert not torch.equal(fresh(1), fresh(2))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    E2PModel.from_backbone(llama, 4, data=TEXT)
    assert torch.equal(torch.rand(1), expected), "the caller's generator is not touched"


def test_vectors_may_come_in_any_form(model: E2PModel) -> None:
    expected = model.score(PROMPTS, COMPLETIONS, VECTORS)
    for form in (
        VECTORS.tolist(),
        torch.tensor(VECTORS),
        VECTORS.astype(np.float64),
        [VECTORS[0], torch.tensor(VECTORS[1]), VECTORS[2].tolist()],
    ):
        assert model.score(PROMPTS, COMPLETIONS, form) == expected
    rounded = torch.tensor(VECTORS).bfloat16()
    assert model.score(PROMPTS, COMPLETIONS, rounded) == model.score(PROMPTS, COMPLETIONS, rounded.float())


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (VECTORS[:2], "expected 3 user vectors"),
        (VECTORS[:, :3], "row 0: expected a user vector of 4 numbers"),
        ([None, VECTORS[0], [1.0, 2.0]], "row 2: expected a user vector of 4 numbers"),
        ([None, [float("nan")] * 4, None], "row 1: expected finite"),
        ([[1e300] * 4, None, None], "row 0: expected finite"),
        ([["a", "b", "c", "d"], None, None], "row 0: expected a user vector"),
        ([[[1.0], [2.0, 3.0]], None, None], "row 0: expected a user vector"),
        ([VECTORS[0], 3.0, None], "row 1: expected a user vector"),
    ],
)
def test_unusable_vectors_are_named(model: E2PModel, vectors: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.score(PROMPTS, COMPLETIONS, vectors)
    with pytest.raises(DataError, match=message):
        model.generate(PROMPTS, vectors, max_new_tokens=2)


def test_prompts_may_be_one_or_many_or_none(model: E2PModel) -> None:
    def answer(prompts: Any) -> list[str]:
        return model.generate(prompts, max_new_tokens=4, do_sample=False)

    assert answer("hi") == answer(["hi"])
    turns = [{"role": "user", "content": "hi"}]
    assert answer(turns) == answer([turns]) == answer("hi")
    assert answer([]) == []
    assert model.score([], []) == []
    assert model.score("hi", ["soul"]) == model.score(["hi"], ["soul"])


def test_unequal_numbers_of_rows_are_refused(model: E2PModel) -> None:
    with pytest.raises(DataError, match="expected 3 completions"):
        model.score(PROMPTS, ["one"])
    with pytest.raises(DataError, match="expected 3 profiles"):
        model.generate(PROMPTS, profiles=["x"])
    with pytest.raises(DataError, match="row 1: expected a completion with text"):
        model.score(PROMPTS, ["a", "  ", "b"])
    with pytest.raises(DataError, match="num_return_sequences"):
        model.generate(PROMPTS, num_return_sequences=2)


def test_a_profile_changes_the_row_that_has_one(model: E2PModel) -> None:
    plain = model.score(PROMPTS, COMPLETIONS, VECTORS)
    told = model.score(PROMPTS, COMPLETIONS, VECTORS, profiles=["likes jazz", None, None])
    assert abs(told[0].logprob - plain[0].logprob) > 1e-3
    assert [s.logprob for s in told[1:]] == pytest.approx([s.logprob for s in plain[1:]], rel=1e-5)


def test_a_window_without_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.max_completion_tokens: 128 leaves no room"):
        E2PModel.from_backbone(tiny_backbone("llama", max_position_embeddings=100), 4)
    model = E2PModel.from_backbone(tiny_backbone("llama", max_position_embeddings=140), 4)
    assert model.encoder.max_prompt_tokens == 140 - 1 - 128


def test_score_cuts_nothing_and_takes_many_rows_in_passes(
    llama: FrozenBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(llama)
    long = "the user likes slow jazz and old soul music "  # three times the limit of a training's completion
    texts = [long * 3, long * 3 + "hello", *COMPLETIONS]
    prompts, vectors = ["make a playlist"] * 5, [*VECTORS, None, VECTORS[0]]
    alone = [model.score(p, [c], [v])[0] for p, c, v in zip(prompts, texts, vectors, strict=True)]
    limit = model.encoder.max_completion_tokens
    assert [score.tokens > limit for score in alone] == [True, True, False, False, False]
    assert alone[1].logprob < alone[0].logprob - 1
    passes = []
    forward = E2PModel.forward
    monkeypatch.setattr("e2p.model.e2p._TOKENS_PER_PASS", 90)
    monkeypatch.setattr(E2PModel, "forward", lambda self, b, *rest: passes.append(len(b)) or forward(self, b, *rest))
    together = model.score(prompts, texts, vectors)
    assert len(passes) > 2
    assert sum(passes) == 5
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone], rel=1e-4)
    with pytest.raises(DataError, match=r"score: row 1: .*window of 192 tokens, got \d+; shorten"):
        model.score(prompts[:2], ["soul", long * 30])
