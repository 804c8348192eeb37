"""Every setting of a run, as frozen dataclasses: units, allowed values, checks. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from e2p.config_evaluation import ARMS as ARMS
from e2p.config_evaluation import MODEL_ARMS as MODEL_ARMS
from e2p.config_evaluation import EvaluationConfig as EvaluationConfig
from e2p.config_evaluation import NextItemConfig as NextItemConfig
from e2p.config_evaluation import PlaylistsConfig as PlaylistsConfig
from e2p.config_evaluation import TextsConfig as TextsConfig
from e2p.config_evaluation import require

Position = Literal["before_bos", "after_bos", "after_system", "before_completion"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen language model.

    Args:
        model: folder of a Hugging Face checkpoint, or a hub id.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the frozen weights; ``auto`` takes the checkpoint's own on a GPU and float32 on a CPU.
        attn: attention implementation: ``auto`` is transformers' choice for the model; ``sdpa``, ``eager``,
            ``flash_attention_2`` as far as the model has them.
        device: ``auto`` (GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        lora: folder or hub id of a PEFT adapter that is merged into the weights at load; needs ``e2p[peft]``.
        quantization: load the frozen weights in 4 or 8 bits; needs the package bitsandbytes.
        trust_remote_code: allow code from the checkpoint to run. Off unless you read that code.
    """

    model: str = ""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn: str = "auto"
    device: str = "auto"
    lora: str | None = None
    quantization: Literal["none", "4bit", "8bit"] = "none"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SplitConfig:
    """Seeded split by group: no group stands in two parts.

    Args:
        fractions: shares of the groups in train, validation and test; they sum to 1.
        seed: seed of the permutation of the groups.
    """

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        ok = len(self.fractions) == 3 and min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) < 1e-6
        require(ok, "data.split.fractions", "three shares >= 0 that sum to 1", self.fractions)


@dataclass(frozen=True)
class DataConfig:
    """Where the tables lie and how text becomes tokens.

    Args:
        examples: example table: path, glob or s3://, gs://, hf:// address (Parquet, JSONL, CSV).
        embeddings: embedding table, in the same forms.
        split: how examples are divided, unless the table has a column ``split``.
        max_prompt_tokens: longest prompt, in tokens, soft tokens not counted.
        max_completion_tokens: longest completion, in tokens; longer ones are cut and counted.
        long_prompt: what to do with a longer prompt: stop with its row, or drop the oldest turns (of a plain
            prompt: the oldest tokens) and count it.
        missing_vector: what to do with an example whose user has no vector at or before its time: stop with the
            user, drop the example, or use the learned null user. The last two are counted.
        chat: whether a plain ``prompt`` becomes a user turn of the chat template; ``auto``: if there is a template.
        profile_template: how the text profile goes into the prompt arm's system turn; must contain ``{profile}``.
        train_share: share of the training groups that is trained on, seeded by ``split.seed``; validation and test
            stay as they are. A smaller share's groups are all in a larger one's.
        cache_dir: where tokenised data is kept; default is ``$E2P_CACHE`` or ``~/.cache/e2p``.
    """

    examples: str = ""
    embeddings: str = ""
    split: SplitConfig = field(default_factory=SplitConfig)
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 128
    long_prompt: Literal["error", "truncate"] = "error"
    missing_vector: Literal["error", "drop", "null"] = "error"
    chat: Literal["auto", "always", "never"] = "auto"
    profile_template: str = "About the user: {profile}"
    train_share: float = 1.0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(self.max_prompt_tokens > 0, "data.max_prompt_tokens", "a number > 0", self.max_prompt_tokens)
        require(
            self.max_completion_tokens > 0, "data.max_completion_tokens", "a number > 0", self.max_completion_tokens
        )
        require(0 < self.train_share <= 1, "data.train_share", "a number in (0, 1]", self.train_share)
        require(
            "{profile}" in self.profile_template,
            "data.profile_template",
            "a text that contains {profile}",
            self.profile_template,
        )


@dataclass(frozen=True)
class ProjectorConfig:
    """phi, the one thing that trains (paper, Eq. 2), and where its output stands.

    Args:
        hidden_dim: width of phi's hidden layer.
        prefix_tokens: soft tokens per user, K.
        norm: ``paper`` is Eq. 2 as published; ``matched`` starts at a real token's embedding plus a small user term,
            so that the prefix has the norm of a token embedding.
        input_norm: what is done to the user's vector first: nothing, unit length, or zero mean and unit variance
            by the training users' statistics, which are stored beside the weights.
        null_prob: share of training examples whose vector is replaced by the learned null user.
        position: where the soft tokens stand. ``before_bos`` is the paper's.
        init_text: text whose token embeddings ``matched`` starts from (one token per soft token, repeated).
        user_scale: norm of the user term at the start, as a share of the norm of what all users share
            (``matched`` only).
        form: ``phi`` is Eq. 2; ``static+user`` adds to it soft tokens that all users share and that have a hidden
            layer of their own, so that phi need not learn them.
    """

    hidden_dim: int = 32
    prefix_tokens: int = 1
    norm: Literal["paper", "matched"] = "matched"
    input_norm: Literal["none", "l2", "standardize"] = "standardize"
    null_prob: float = 0.1
    position: Position = "before_completion"
    init_text: str = "user"
    user_scale: float = 0.1
    form: Literal["phi", "static+user"] = "phi"

    def __post_init__(self) -> None:
        require(self.hidden_dim >= 1, "projector.hidden_dim", "a whole number >= 1", self.hidden_dim)
        require(self.prefix_tokens >= 1, "projector.prefix_tokens", "a whole number >= 1", self.prefix_tokens)
        require(0 <= self.null_prob < 1, "projector.null_prob", "a number in [0, 1)", self.null_prob)
        require(self.user_scale > 0, "projector.user_scale", "a number > 0", self.user_scale)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised, and what beyond the paper makes the user matter (docs/method.md, docs/findings.md).

    Args:
        name: ``lm``: the completion's log-likelihood (paper, Eq. 4), of engaged rows alone where the table has labels;
            ``kto``: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, Eq. 7) of yes/no labels against the
            frozen model without prefix; ``engagement``: the weighted cross-entropy that the paper prints (Eq. 5);
            ``hits``: how often ``draws`` independent draws hold the completion, which is what HitRate rewards, of
            engaged rows alone, too; beyond the paper.
        beta: kto: how fast value saturates as a completion gets likelier or less likely than under the frozen model.
        desirable_weight: kto: weight of engaged rows.
        undesirable_weight: kto: weight of rows that are not engaged.
        balance: kto: ``auto`` multiplies both weights so that the two kinds count alike, whatever their shares.
        likelihood: kto, hits: weight of the engaged completions' negative log-likelihood per token beside it, so that
            the model also learns to write them and not only to tell them apart, or where no draw could yet hold them.
            0: kto as published.
        alpha: engagement: weight of rows that are not engaged.
        draws: hits: their number.
        per_token: kto, engagement: a completion's likelihood is its tokens' geometric mean and not their product.
        contrast: lm: weight of the contrastive term: the completion shall be likelier with its own user's vector than
            with a stranger's, drawn anew in every epoch. 0: off; otherwise a step costs about twice the time.
        contrast_margin: how much likelier, in nats per token; what exceeds it is not rewarded.
        distill: lm: weight of the distilling term: Kullback-Leibler divergence of the frozen model that reads the text
            profile from the model with the soft token, at every completion token. 0: off; needs a column ``profile``.
    """

    name: Literal["lm", "kto", "engagement", "hits"] = "lm"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    balance: Literal["auto", "none"] = "auto"
    likelihood: float = 0.0
    alpha: float = 1.0
    draws: int = 30
    per_token: bool = False
    contrast: float = 0.0
    contrast_margin: float = 0.5
    distill: float = 0.0

    def __post_init__(self) -> None:
        names = ("lm", "kto", "engagement", "hits")
        require(self.name in names, "objective.name", "lm, kto, engagement or hits", self.name)
        require(self.draws >= 1, "objective.draws", "a whole number >= 1", self.draws)
        for name in ("beta", "desirable_weight", "undesirable_weight", "contrast_margin"):
            require(getattr(self, name) > 0, f"objective.{name}", "a number > 0", getattr(self, name))
        for name in ("alpha", "likelihood", "contrast", "distill"):
            require(getattr(self, name) >= 0, f"objective.{name}", "a number >= 0", getattr(self, name))
        both = self.contrast > 0 and self.distill > 0
        require(not both, "objective", "one of contrast and distill", (self.contrast, self.distill))
        alone = self.name == "lm" or not (self.contrast or self.distill)
        require(alone, "objective", "contrast and distill with name lm", self.name)

    @property
    def labelled(self) -> bool:
        """Whether it learns from examples that were not engaged with, too."""
        return self.name in ("kto", "engagement")


@dataclass(frozen=True)
class TrainingConfig:
    """The budget. Every trained arm of a run gets the same one.

    Args:
        epochs: passes over the training examples.
        max_steps: stop after this many optimiser steps; 0: epochs decide.
        batch_size: examples per optimiser step, over all processes together.
        tokens_per_pass: padded tokens in one forward pass. A step's batch is cut into as many passes as that takes
            and gradients are accumulated; the result is the same, only the memory differs.
        learning_rate: peak learning rate of AdamW, for phi alone.
        warmup_ratio: share of the steps with a rising learning rate.
        schedule: how the learning rate falls after the warm-up.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are clipped to this norm; 0: not clipped.
        precision: of the backbone's forward pass; ``auto`` is bfloat16 where the hardware has it. phi is float32.
        gradient_checkpointing: recompute the backbone's layers in the backward pass: less memory, more time.
        evals_per_epoch: validations in an epoch; each leaves a checkpoint to resume from.
        patience: stop after this many validations without improvement; 0: never. The best weights are kept always.
        seed: seed of phi's start, of the order of the examples and of the dropped vectors.
        profile_share: lm, hits: share of the examples that are read with their text profile in the prompt, drawn once
            by the seed, so that e2p+prompt does not meet its profile untaught. 0: none; else it needs ``profile``.
    """

    epochs: int = 3
    max_steps: int = 0
    batch_size: int = 64
    tokens_per_pass: int = 8192
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    evals_per_epoch: int = 2
    patience: int = 0
    seed: int = 42
    profile_share: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "training.epochs", "a whole number >= 1", self.epochs)
        require(self.max_steps >= 0, "training.max_steps", "a whole number >= 0", self.max_steps)
        require(self.batch_size >= 1, "training.batch_size", "a whole number >= 1", self.batch_size)
        require(self.tokens_per_pass >= 1, "training.tokens_per_pass", "a whole number >= 1", self.tokens_per_pass)
        require(self.learning_rate > 0, "training.learning_rate", "a number > 0", self.learning_rate)
        require(0 <= self.warmup_ratio < 1, "training.warmup_ratio", "a number in [0, 1)", self.warmup_ratio)
        require(self.weight_decay >= 0, "training.weight_decay", "a number >= 0", self.weight_decay)
        require(self.max_grad_norm >= 0, "training.max_grad_norm", "a number >= 0", self.max_grad_norm)
        require(self.evals_per_epoch >= 1, "training.evals_per_epoch", "a whole number >= 1", self.evals_per_epoch)
        require(self.patience >= 0, "training.patience", "a whole number >= 0", self.patience)
        require(0 <= self.profile_share <= 1, "training.profile_share", "a number in [0, 1]", self.profile_share)


@dataclass(frozen=True)
class RunConfig:
    """One run: backbone, data, phi, objective, budget, judgement, and the folder that all of it goes to."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: str = "runs/run"

    def __post_init__(self) -> None:
        pairs = self.objective.name != "kto" or self.training.batch_size > 1
        expected = "at least 2 with objective.name kto, whose baseline z0 is a mean over a batch's mismatched pairs"
        require(pairs, "training.batch_size", expected, self.training.batch_size)
        # A teacher reads every profile, and what it knows is the student's to find without; kto's reference is kept
        # for the examples as they are.
        alone = self.training.profile_share == 0 or (not self.objective.labelled and not self.objective.distill)
        expected = "0 unless objective.name is lm or hits and objective.distill is 0"
        require(alone, "training.profile_share", expected, self.training.profile_share)
