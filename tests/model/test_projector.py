"""phi against Eq. 2 in numpy; the start of the matched form; what the input statistics do."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from e2p.config import ProjectorConfig
from e2p.errors import ConfigError, DataError
from e2p.model.projector import PrefixProjector, StaticPrefix
from tiny import equation_2

D, H = 6, 32


def projector(seed: int = 0, anchor: Tensor | None = None, token_norm: float = 1.0, **values: Any) -> PrefixProjector:
    torch.manual_seed(seed)
    return PrefixProjector(D, H, ProjectorConfig(**values), anchor=anchor, token_norm=token_norm)


def test_the_projector_is_equation_2() -> None:
    for norm, k in [("paper", 1), ("paper", 3), ("matched", 2)]:
        phi = projector(norm=norm, prefix_tokens=k, hidden_dim=7, input_norm="none")
        with torch.no_grad():
            for parameter in phi.parameters():
                parameter.normal_()
        c = np.random.default_rng(0).normal(size=(5, D))
        out = phi(torch.tensor(c, dtype=torch.float32))
        assert out.shape == (5, k, H)
        np.testing.assert_allclose(out.detach().numpy(), equation_2(phi, c), rtol=1e-4, atol=1e-5)


def test_w1_has_no_bias_and_w2_has_one() -> None:
    shapes = {name: tuple(value.shape) for name, value in projector(hidden_dim=7, prefix_tokens=2).state_dict().items()}
    assert shapes == {
        "w1.weight": (7, D), "norm.weight": (7,), "norm.bias": (7,),
        "w2.weight": (2 * H, 7), "w2.bias": (2 * H,), "null_vector": (D,),
    }  # fmt: skip


@pytest.mark.parametrize("token_norm", [0.3, 1.0, 40.0])
@pytest.mark.parametrize(("hidden_dim", "share"), [(8, 0.1), (32, 0.1), (128, 0.5), (128, 2.0)])
def test_matched_starts_at_the_norm_of_a_token(token_norm: float, hidden_dim: int, share: float) -> None:
    vectors = torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    norms = []
    for seed in range(8):
        anchor = torch.randn(2, H)
        phi = projector(seed, anchor, token_norm, prefix_tokens=2, hidden_dim=hidden_dim, user_scale=share)
        norms.append(phi(vectors).detach().square().sum(-1).mean().sqrt())
    assert float(torch.stack(norms).mean()) == pytest.approx(token_norm, rel=0.1 if share > 1 else 0.05)


def test_the_user_term_of_matched_has_the_share_that_was_asked_for() -> None:
    vectors = torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    for share in (0.05, 0.3, 2.0):
        terms = []
        for seed in range(8):
            phi = projector(seed, torch.randn(1, H), 2.0, user_scale=share)
            shared = phi.w2.bias.view(1, 1, H)
            terms.append(((phi(vectors) - shared).norm(dim=-1).mean() / shared.norm()).detach())
        assert float(torch.stack(terms).mean()) == pytest.approx(share, rel=0.05)


def test_matched_points_where_its_anchor_does_for_users_the_null_user_and_the_static_control() -> None:
    anchor = torch.randn(2, H)
    phi = projector(anchor=anchor, token_norm=3.0, prefix_tokens=2)
    user = phi(torch.randn(1, D))[0].detach()
    null = phi(torch.zeros(1, D), torch.tensor([False]))[0].detach()
    static = StaticPrefix(D, H, phi.config, anchor=anchor, token_norm=3.0)(torch.zeros(1, D))[0]
    for start in (user, null, static):
        assert torch.nn.functional.cosine_similarity(start, anchor).tolist() == pytest.approx([1.0, 1.0], abs=0.05)
        assert start.norm(dim=-1).tolist() == pytest.approx([3.0, 3.0], rel=0.2)


@pytest.mark.parametrize("input_norm", ["none", "l2", "standardize"])
def test_the_null_user_starts_as_an_ordinary_user_in_the_space_behind_the_input_norm(input_norm: str) -> None:
    norms = [float(projector(seed, input_norm=input_norm).null_vector.detach().norm()) for seed in range(50)]
    expected = 1.0 if input_norm == "l2" else math.sqrt(D)
    assert np.sqrt(np.mean(np.square(norms))) == pytest.approx(expected, rel=0.15)


def test_the_papers_form_starts_tens_of_times_too_long_for_a_real_embedding() -> None:
    """Why ``matched`` is the default: with the usual start the soft token dwarfs tokens of norm 0.3."""
    norms = projector(norm="paper")(torch.randn(100, D)).detach().norm(dim=-1)
    assert float(norms.mean()) > 5 * 0.3


def test_an_anchor_of_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"projector\.init_text"):
        projector(anchor=torch.zeros(1, H))


def test_stays_float32_under_autocast() -> None:
    phi = projector(norm="paper")
    vectors = torch.randn(4, D)
    expected = phi(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = phi(vectors)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(phi(vectors.to(torch.float64)), expected)


def test_input_none_and_l2() -> None:
    vectors = torch.randn(4, D) * 50
    assert torch.equal(projector(input_norm="none").normalise(vectors), vectors)
    unit = projector(input_norm="l2").normalise(vectors)
    np.testing.assert_allclose(unit, vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1)[:, None], rtol=1e-5)
    assert torch.equal(projector(input_norm="l2").normalise(torch.zeros(1, D)), torch.zeros(1, D))
    for kind in ("none", "l2"):
        phi = projector(input_norm=kind)
        phi.fit_input(vectors)
        assert torch.equal(phi.input_mean, torch.zeros(D))
        assert torch.equal(phi.input_scale, torch.ones(D))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30),
    st.floats(-1e6, 1e6, width=32),
    st.floats(2**-10, 1e4, width=32),
)
def test_standardize_gives_mean_zero_and_variance_one(rows: int, mean: float, spread: float) -> None:
    vectors = np.random.default_rng(rows).normal(size=(rows, D)) * spread + mean
    vectors[:, 2] = mean  # a dimension that never changes carries nothing
    data = torch.tensor(vectors, dtype=torch.float32)
    phi = projector(input_norm="standardize")
    phi.fit_input(data)
    out = phi.normalise(data).numpy()
    exact = data.double().numpy()
    deviation = exact.std(0)
    assert np.abs(out[:, 2]).max() == 0
    varied = deviation > 1e-3 * max(abs(mean), 1e-3)
    expected = (exact - exact.mean(0)) / np.where(deviation > 0, deviation, 1)
    np.testing.assert_allclose(out[:, varied], expected[:, varied], atol=2e-3)


def test_statistics_of_no_vectors_change_nothing() -> None:
    phi = projector(input_norm="standardize")
    phi.fit_input(torch.zeros(0, D))
    assert torch.isfinite(phi(torch.randn(2, D))).all()


def test_rows_without_a_vector_get_the_null_user() -> None:
    phi = projector(prefix_tokens=2)
    phi.fit_input(torch.randn(9, D) * 3 + 1)
    vectors = torch.randn(3, D)
    vectors[1] = torch.nan  # what stands in an absent row must not matter
    out = phi(vectors, torch.tensor([True, False, True])).detach()
    # The null vector lies behind the input normalisation: statistics fitted later do not move it.
    np.testing.assert_allclose(
        out[1].numpy(), equation_2(phi, phi.null_vector.detach().numpy()[None])[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(out[[0, 2]], phi(vectors[[0, 2]]).detach())


def test_the_null_vector_trains_on_rows_without_a_vector_alone() -> None:
    phi = projector(hidden_dim=5, input_norm="none").double()
    vectors, weights = torch.randn(3, D).double(), torch.randn(3, 1, H).double()

    def loss(present: list[bool]) -> Tensor:
        return (phi(vectors, torch.tensor(present)) * weights).sum()

    loss([True, False, False]).backward()
    by_hand, step = torch.zeros(D).double(), 1e-6
    with torch.no_grad():
        for at in range(D):
            phi.null_vector[at] += step
            by_hand[at] = loss([True, False, False])
            phi.null_vector[at] -= 2 * step
            by_hand[at] -= loss([True, False, False])
            phi.null_vector[at] += step
    torch.testing.assert_close(phi.null_vector.grad, by_hand / (2 * step), rtol=1e-4, atol=1e-5)
    phi.zero_grad()
    loss([True, True, True]).backward()
    assert not phi.null_vector.grad.any()
    assert phi.w1.weight.grad.any()


def test_another_dimension_is_refused() -> None:
    with pytest.raises(DataError, match="user vectors of 6 numbers, got 5"):
        projector()(torch.zeros(2, 5))


def test_the_static_control_looks_at_no_vector() -> None:
    static = StaticPrefix(D, H, ProjectorConfig(prefix_tokens=3), anchor=torch.randn(3, H))
    out = static(torch.randn(4, D), torch.tensor([True, False, True, False]))
    assert out.shape == (4, 3, H)
    assert all(torch.equal(row, out[0]) for row in out)
    assert torch.equal(static(torch.randn(1, D))[0], out[0])
    assert set(static.state_dict()) == {"w1.weight", "norm.weight", "norm.bias", "w2.weight", "w2.bias"}


def test_the_static_control_is_phi_on_a_constant_vector() -> None:
    torch.manual_seed(1)
    static = StaticPrefix(D, H, ProjectorConfig(input_norm="none"))
    phi = PrefixProjector(D, H, ProjectorConfig(input_norm="none"))
    phi.load_state_dict(static.state_dict(), strict=False)
    assert torch.equal(phi(torch.ones(1, D)), static(torch.randn(1, D)))


def test_shapes_are_declared_and_checked_while_tests_run() -> None:
    for kind in (PrefixProjector, StaticPrefix):
        for name in ("forward", "fit_input"):
            assert "Float[Tensor" in str(inspect.signature(getattr(kind, name)).parameters["vectors"].annotation)
    with pytest.raises(TypeCheckError):
        projector()(torch.zeros(D))
    with pytest.raises(TypeCheckError):
        projector()(torch.zeros(2, D), torch.tensor([True]))


@pytest.mark.parametrize("norm", ["paper", "matched"])
def test_static_plus_user_is_the_sum_of_a_static_token_and_phi(norm: str) -> None:
    phi = projector(norm=norm, prefix_tokens=2, hidden_dim=7, form="static+user", input_norm="none")
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_()
    c = np.random.default_rng(0).normal(size=(5, D))
    assert phi.shared is not None
    static = equation_2(phi.shared, np.ones((1, D)))
    out = phi(torch.tensor(c, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(out, equation_2(phi, c) + static, rtol=1e-4, atol=1e-5)
    nobody = phi(torch.zeros(1, D), torch.tensor([False])).detach().numpy()
    null = phi.null_vector.detach().numpy()[None]
    np.testing.assert_allclose(nobody, equation_2(phi, null) + static, rtol=1e-4, atol=1e-5)
    shapes = {name: list(value.shape) for name, value in phi.state_dict().items()}
    assert shapes == PrefixProjector.weight_shapes(D, H, phi.config)


def test_static_plus_user_starts_at_the_norm_of_a_token_at_its_anchor() -> None:
    anchor, vectors = torch.randn(1, H), torch.randn(300, D)
    phi = projector(1, anchor, 3.0, hidden_dim=64, form="static+user", user_scale=0.3)
    out = phi(vectors).detach()[:, 0]
    assert float(out.square().sum(-1).mean().sqrt()) == pytest.approx(3.0, rel=0.1)
    assert float(torch.cosine_similarity(out, anchor).mean()) > 0.85


def test_static_plus_user_as_a_control_looks_at_no_vector() -> None:
    torch.manual_seed(0)
    control = StaticPrefix(D, H, ProjectorConfig(hidden_dim=7, form="static+user"))
    assert torch.equal(control(torch.zeros(3, D)), control(torch.randn(3, D)))
    shapes = {name: list(value.shape) for name, value in control.state_dict().items()}
    assert shapes == StaticPrefix.weight_shapes(D, H, control.config)
