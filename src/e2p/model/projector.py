"""phi: a user's vector becomes the soft tokens. The only weights that train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2p.config import ProjectorConfig
from e2p.errors import ConfigError, DataError

Vectors = np.ndarray | Tensor | Sequence[Any]


class PrefixProjector(nn.Module):
    """phi(c) = LayerNorm(ReLU(W1 c)) W2 + b (paper, Eq. 2), with a learned null user beside it.

    Always float32, whatever the backbone's precision: at the published learning rates a bfloat16 phi would not move.
    The caller casts the output once, where it is spliced.

    Args:
        embedding_dim: length D of a user vector.
        hidden_size: H, the backbone's.
        config: width, number of soft tokens, norm and input normalisation.
        anchor: token embeddings [K, H] that ``norm="matched"`` starts from; without them it starts at zero.
        token_norm: mean Euclidean norm of the backbone's token embeddings, which ``matched`` starts at.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        embedding_dim: int,
        hidden_size: int,
        config: ProjectorConfig,
        *,
        anchor: Float[Tensor, "k h"] | None = None,
        token_norm: float = 1.0,
    ) -> None:
        super().__init__()
        self.config, self.embedding_dim, self.hidden_size = config, embedding_dim, hidden_size
        k = config.prefix_tokens
        self.w1 = nn.Linear(embedding_dim, config.hidden_dim, bias=False)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.w2 = nn.Linear(config.hidden_dim, k * hidden_size)
        # The null user is a vector like any other, of the size that input normalisation gives one. A learned soft token
        # would be simpler, but train slower than all that passes through phi's hidden layer (docs/findings.md).
        self.null_vector = nn.Parameter(torch.randn(embedding_dim))
        self.shared: StaticPrefix | None = None
        if config.form == "static+user":
            alone = replace(config, form="phi")
            self.shared = StaticPrefix(embedding_dim, hidden_size, alone, anchor=anchor, token_norm=token_norm)
        # Statistics of the input are data, not weights: they are saved in a file of their own.
        self.register_buffer("input_mean", torch.zeros(embedding_dim), persistent=False)
        self.register_buffer("input_scale", torch.ones(embedding_dim), persistent=False)
        with torch.no_grad():
            if config.norm == "matched":
                start = torch.zeros(k, hidden_size) if anchor is None else _at_norm(anchor.float(), token_norm)
                # The shared term and the user term are at right angles, nearly, and together have one token's norm.
                shared = 1 / math.sqrt(1 + config.user_scale**2)
                # After the LayerNorm the hidden vector has norm sqrt(width).
                spread = config.user_scale * shared * token_norm / math.sqrt(config.hidden_dim * hidden_size)
                nn.init.normal_(self.w2.weight, std=spread)
                # What all users share stands in one place at the start.
                self.w2.bias.copy_(torch.zeros(k * hidden_size) if self.shared else start.flatten() * shared)
            if config.input_norm == "l2":
                self.null_vector.div_(self.null_vector.norm())

    @staticmethod
    def weight_shapes(embedding_dim: int, hidden_size: int, config: ProjectorConfig) -> dict[str, list[int]]:
        """Names and shapes of the weights, without making them: a broken record may ask for any size."""
        k, width = config.prefix_tokens, config.hidden_dim
        phi = {
            "w1.weight": [width, embedding_dim],
            "norm.weight": [width],
            "norm.bias": [width],
            "w2.weight": [k * hidden_size, width],
            "w2.bias": [k * hidden_size],
        }
        shared = {f"shared.{name}": shape for name, shape in phi.items()} if config.form == "static+user" else {}
        return phi | shared | {"null_vector": [embedding_dim]}

    @torch.no_grad()
    def fit_input(self, vectors: Float[Tensor, "n d"]) -> None:
        """Set mean and scale of ``input_norm="standardize"`` from the training users' vectors; else do nothing."""
        if self.config.input_norm == "standardize" and len(vectors):
            self.input_mean.copy_(vectors.double().mean(0))
            spread = vectors.double().std(0, correction=0)
            # A constant dimension carries nothing; scale 1 keeps it at zero.
            self.input_scale.copy_(torch.where(spread > 1e-8, spread, 1.0))

    def normalise(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Apply the input normalisation: nothing, unit length, or the training statistics."""
        vectors = vectors.float()
        if self.config.input_norm == "l2":
            return nn.functional.normalize(vectors, dim=-1)
        return (vectors - self.input_mean) / self.input_scale

    def forward(
        self, vectors: Float[Tensor, "b d"], present: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b k h"]:
        """Soft tokens in float32. Rows where ``present`` is false get the learned null user's.

        Raises:
            DataError: the vectors' length is not the one trained with.
        """
        if vectors.shape[-1] != self.embedding_dim:
            raise DataError(
                f"expected user vectors of {self.embedding_dim} numbers, got {vectors.shape[-1]}; "
                "use the embedding model that the adapter was trained with"
            )
        with torch.autocast(vectors.device.type, enabled=False):
            inputs = self.normalise(vectors)
            if present is not None:
                inputs = torch.where(present[:, None], inputs, self.null_vector)
            return self._through(inputs)

    def _through(self, inputs: Float[Tensor, "b d"]) -> Float[Tensor, "b k h"]:
        """Eq. 2 on normalised inputs, and what all users share where that is apart."""
        hidden = self.norm(torch.relu(self.w1(inputs)))
        prefix: Tensor = self.w2(hidden).view(-1, self.config.prefix_tokens, self.hidden_size)
        return prefix if self.shared is None else prefix + self.shared(inputs[:1])


class StaticPrefix(PrefixProjector):
    """The control that the paper leaves out: soft tokens that do not depend on the user (one-token prompt tuning).

    phi itself, fed the same constant vector for everybody, without a null user. A bare parameter would be a weaker
    control: phi's hidden layer multiplies the learning rate of what all users share, so phi beats a bare token with
    anybody's vector (docs/findings.md). Prefix tuning reparametrises its tokens by an MLP for the same reason.
    """

    null_vector: None  # type: ignore[assignment]

    def __init__(
        self,
        embedding_dim: int,
        hidden_size: int,
        config: ProjectorConfig,
        *,
        anchor: Float[Tensor, "k h"] | None = None,
        token_norm: float = 1.0,
    ) -> None:
        super().__init__(embedding_dim, hidden_size, config, anchor=anchor, token_norm=token_norm)
        self.register_parameter("null_vector", None)

    @staticmethod
    def weight_shapes(embedding_dim: int, hidden_size: int, config: ProjectorConfig) -> dict[str, list[int]]:
        """As of phi, without the null user."""
        shapes = PrefixProjector.weight_shapes(embedding_dim, hidden_size, config)
        return {name: shape for name, shape in shapes.items() if name != "null_vector"}

    def fit_input(self, vectors: Float[Tensor, "n d"]) -> None:
        """Nothing to fit: the vectors are not looked at."""

    def forward(
        self, vectors: Float[Tensor, "b d"], present: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b k h"]:
        """The same soft tokens for every row."""
        constant = torch.ones(1, self.embedding_dim, device=vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            return self._through(constant).expand(len(vectors), -1, -1)


def _at_norm(rows: Float[Tensor, "k h"], norm: float) -> Float[Tensor, "k h"]:
    lengths = rows.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ConfigError("projector.init_text: expected tokens with a non-zero embedding; choose another text")
    return rows / lengths * norm


def user_vectors(embeddings: Vectors | None, rows: int, dim: int) -> tuple[Float[Tensor, "b d"], Bool[Tensor, "b"]]:
    """User vectors as callers give them -> float32, zeros where there is none, and which rows have one.

    Args:
        embeddings: [B, D], or a sequence whose entries may be None; None stands for no vectors at all.
        rows: B.
        dim: D.

    Raises:
        DataError: wrong number of rows, wrong dimension, NaN or infinity; the row is named.
    """
    out, present = np.zeros((rows, dim), np.float32), np.zeros(rows, bool)
    given = [None] * rows if embeddings is None else list(embeddings)
    if len(given) != rows:
        raise DataError(f"expected {rows} user vectors, one per prompt, got {len(given)}")
    for row, vector in enumerate(given):
        if vector is None:
            continue
        try:
            with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
                numbers = np.asarray(
                    vector.detach().float().cpu() if isinstance(vector, Tensor) else vector, np.float32
                )
        except (TypeError, ValueError):
            raise DataError(f"row {row}: expected a user vector of {dim} numbers, got {vector!r:.60}") from None
        if numbers.shape != (dim,):
            raise DataError(f"row {row}: expected a user vector of {dim} numbers, got shape {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise DataError(f"row {row}: expected finite numbers in the user vector, got NaN or infinity")
        out[row], present[row] = numbers, True
    return torch.from_numpy(out), torch.from_numpy(present)
