"""E2PModel: a frozen backbone with phi in front of it. Train it, save it, generate with it, score with it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2p.config import BackboneConfig, DataConfig, ProjectorConfig
from e2p.data.batches import Batch, make_batch, token_passes
from e2p.data.templates import EncodedPrompt, Prompt, TextEncoder
from e2p.errors import AdapterError, DataError
from e2p.model import adapter
from e2p.model.backbone import FrozenBackbone
from e2p.model.projector import PrefixProjector, StaticPrefix, Vectors, user_vectors

_TOKENS_PER_PASS = 8192  # padded tokens that are scored together


class Score(NamedTuple):
    """Log-probability of a completion in nats, and the number of tokens it is summed over."""

    logprob: float
    tokens: int


class E2PModel(nn.Module):
    """Frozen backbone plus phi.

    Args:
        backbone: the language model.
        projector: phi, or the static control.
        encoder: how prompts and completions become ids.
        objective: what it was trained for, for the record.
        embedding_versions: versions of the user vectors it was trained with; empty: not named.
        metrics: figures for the record and the model card.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        projector: PrefixProjector | StaticPrefix,
        encoder: TextEncoder,
        *,
        objective: Mapping[str, Any] | None = None,
        embedding_versions: Sequence[str] = (),
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector.to(backbone.device)
        self.encoder = encoder
        self.objective = dict(objective or {"name": "lm"})
        self.embedding_versions = list(embedding_versions)
        self.metrics = dict(metrics or {})

    @classmethod
    def from_backbone(
        cls,
        backbone: str | BackboneConfig | FrozenBackbone,
        embedding_dim: int,
        projector: ProjectorConfig | None = None,
        *,
        data: DataConfig | None = None,
        static: bool = False,
        seed: int = 42,
    ) -> E2PModel:
        """A model with a fresh phi, to be trained.

        Args:
            backbone: path or hub id, its settings, or one that is loaded already.
            embedding_dim: length D of the user vectors.
            projector: phi's settings.
            data: settings of text; paths in it are not looked at.
            static: the static control in phi's place.
            seed: seed of phi's start.
        """
        if isinstance(backbone, str):
            backbone = BackboneConfig(model=backbone)
        if isinstance(backbone, BackboneConfig):
            backbone = FrozenBackbone.load(backbone)
        projector = projector or ProjectorConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            phi = _projector(backbone, embedding_dim, projector, static)
        return cls(backbone, phi, text_encoder(backbone, data or DataConfig(), projector.prefix_tokens))

    def forward(
        self, batch: Batch, use_prefix: bool = True, teacher: Batch | None = None
    ) -> Float[Tensor, "n"] | tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """log p of every completion token of a batch, row after row (see FrozenBackbone.completion_logprobs).

        With ``teacher``, the same completions after other prompts, also the divergence of this from the frozen model's
        distributions there (see FrozenBackbone.distilled_logprobs).
        """
        prefix = self.projector(batch.embeddings, batch.present) if use_prefix else None
        if teacher is not None:
            assert prefix is not None
            return self.backbone.distilled_logprobs(batch, prefix, teacher)
        return self.backbone.completion_logprobs(batch, prefix)

    def prefix(self, embeddings: Vectors | None, rows: int) -> Float[Tensor, "b k h"]:
        """Soft tokens for user vectors.

        Args:
            embeddings: [B, D], or a sequence whose entries may be None; None stands for the null user.
            rows: B.

        Raises:
            DataError: wrong number of rows, wrong dimension, NaN or infinity; the row is named.
        """
        vectors, present = user_vectors(embeddings, rows, self.projector.embedding_dim)
        device = self.backbone.device
        return self.projector(vectors.to(device), present.to(device))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt] | Prompt,
        embeddings: Vectors | None = None,
        *,
        profiles: Sequence[str | None] | None = None,
        use_prefix: bool = True,
        max_new_tokens: int = 128,
        **settings: Any,
    ) -> list[str]:
        """Answer prompts personally.

        Args:
            prompts: texts or lists of {role, content}; a single one is taken as a list of one.
            embeddings: a vector per prompt [B, D]; None, or None in a row: the null user.
            profiles: texts that go into the system turn by the profile template, for comparison.
            use_prefix: False: the plain backbone.
            max_new_tokens: longest answer in tokens.
            settings: for transformers' ``generate`` (``do_sample``, ``temperature``, ``num_beams``, ...).

        Returns:
            The answers, without the leading space that chat templates put before them.
        """
        encoded = self._encode(prompts, profiles)
        if not encoded:
            return []
        if "num_return_sequences" in settings:
            raise DataError("generate: num_return_sequences is not supported; repeat the prompt instead")
        prefix = self.prefix(embeddings, len(encoded)) if use_prefix else None
        at = [self.splice_at(prompt) for prompt in encoded]
        rows = self.backbone.generate(encoded, at, prefix, max_new_tokens=max_new_tokens, **settings)
        decode: Callable[..., str] = self.encoder.tokenizer.decode
        return [decode(row, skip_special_tokens=True).strip() for row in rows]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt] | Prompt,
        completions: Sequence[str],
        embeddings: Vectors | None = None,
        *,
        profiles: Sequence[str | None] | None = None,
        use_prefix: bool = True,
    ) -> list[Score]:
        """Log-probability of each completion, its end token included, given prompt and user; nothing is cut.

        Arguments as in :meth:`generate`. Raises DataError for an empty completion, for one that does not fit in the
        backbone's window behind its prompt, or for unequal numbers of rows.
        """
        many = _as_list(prompts)
        encoded = self._encode(many, profiles)
        if len(completions) != len(encoded):
            raise DataError(f"score: expected {len(encoded)} completions, one per prompt, got {len(completions)}")
        if not encoded:
            return []
        for row, text in enumerate(completions):
            if not text.strip():
                raise DataError(f"score: row {row}: expected a completion with text, got {text!r}")
        labels = [
            self.encoder.completion(p, e, c, cut=False) for p, e, c in zip(many, encoded, completions, strict=True)
        ]
        vectors, present = user_vectors(embeddings, len(encoded), self.projector.embedding_dim)
        k, window = self.projector.config.prefix_tokens, self.backbone.window
        widths = np.array([len(e.ids) + k + len(ids) for e, ids in zip(encoded, labels, strict=True)])
        if window is not None and widths.max() > window:
            row = int(widths.argmax())
            raise DataError(
                f"score: row {row}: expected prompt and completion within the backbone's window of {window} tokens, "
                f"got {widths[row]}; shorten them"
            )
        scores: dict[int, Score] = {}
        for rows in token_passes(widths, _TOKENS_PER_PASS):
            batch = make_batch(
                [np.array(encoded[row].ids, np.int32) for row in rows],
                [np.array(labels[row], np.int32) for row in rows],
                [self.splice_at(encoded[row]) for row in rows],
                vectors.numpy()[rows],
                present.numpy()[rows],
                rows,
            )
            logprobs = self(batch.to(self.backbone.device), use_prefix).double().cpu()
            for row, part in zip(rows, logprobs.split(batch.completion_lengths.tolist()), strict=True):
                scores[int(row)] = Score(float(part.sum()), len(part))
        return [scores[row] for row in range(len(encoded))]

    def splice_at(self, prompt: EncodedPrompt) -> int:
        """Index in the prompt before which the soft tokens stand."""
        places = {"before_bos": 0, "after_bos": prompt.after_bos, "after_system": prompt.after_system}
        return places.get(self.projector.config.position, len(prompt.ids))

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write phi, its input statistics, ``adapter_config.json`` and a model card; the backbone is not copied."""
        record = self._record()
        adapter.write_adapter(
            folder, record, self.projector.state_dict(), self._stats(), adapter.model_card(record), overwrite
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: str | BackboneConfig | FrozenBackbone | None = None,
        *,
        revision: str | None = None,
    ) -> E2PModel:
        """Load an adapter and the backbone that it was trained with.

        Args:
            source: adapter folder, or a hub id.
            backbone: where the backbone lies now, if not where the adapter's record says; a LoRA that was merged in
                for the training is merged in again.
            revision: of an adapter on a hub.

        Raises:
            AdapterError: the adapter is incomplete or corrupt, or the backbone is not the one trained with; the
                message says what differs.
        """
        folder = Path(source) if Path(source).exists() else _download(str(source), revision)
        record, weights, stats = adapter.read_adapter(folder)
        config = adapter.projector_config(folder / adapter.CONFIG, record["projector"])
        if not isinstance(backbone, BackboneConfig | FrozenBackbone):
            trained = {key: record["backbone"][key] for key in ("revision", "lora", "quantization")}
            if backbone is not None:
                trained["revision"] = None
            backbone = BackboneConfig(model=backbone or record["backbone"]["source"], **trained)
        if isinstance(backbone, BackboneConfig):
            backbone = FrozenBackbone.load(backbone)
        differs = adapter.differences(record["backbone"]["fingerprint"], backbone.fingerprint())
        versions = adapter.other_versions(record["versions"])
        if differs:
            raise AdapterError(
                f"{folder}: trained with the backbone '{record['backbone']['source']}', but '{backbone.source}' has "
                f"{'; '.join(differs)}. Load that backbone, or train again{f' ({versions})' if versions else ''}"
            )
        if versions:
            logging.getLogger("e2p").info("%s: %s", folder, versions)
        static = record["kind"] == "static"
        kind = StaticPrefix if static else PrefixProjector
        expected = kind.weight_shapes(record["embedding_dim"], backbone.hidden_size, config)
        _check_shapes(folder / adapter.WEIGHTS, expected, weights)
        phi = _projector(backbone, record["embedding_dim"], config, static)
        _fill(folder / adapter.WEIGHTS, phi.state_dict(), weights)
        model = cls(
            backbone,
            phi,
            text_encoder(backbone, adapter.text_config(folder / adapter.CONFIG, record["text"]), config.prefix_tokens),
            objective=record["objective"],
            embedding_versions=record["embedding_versions"],
            metrics=record["metrics"],
        )
        _fill(folder / adapter.STATS, model._stats(), stats)
        return model

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the adapter to a model hub; returns its address. Private unless said otherwise."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "adapter")
            api.upload_folder(repo_id=repo_id, folder_path=str(Path(folder) / "adapter"))
        return str(address)

    def _record(self) -> dict[str, Any]:
        encoder = self.encoder
        return {
            "kind": "static" if isinstance(self.projector, StaticPrefix) else "projector",
            "backbone": {
                "source": self.backbone.source,
                "revision": self.backbone.revision,
                "lora": self.backbone.lora,
                "quantization": self.backbone.quantization,
                "fingerprint": self.backbone.fingerprint(),
            },
            "embedding_dim": self.projector.embedding_dim,
            "embedding_versions": self.embedding_versions,
            "projector": dataclasses.asdict(self.projector.config),
            "objective": self.objective,
            "text": {
                "chat": "always" if encoder.plain_as_chat else "never",
                "profile_template": encoder.profile_template,
                "max_prompt_tokens": encoder.max_prompt_tokens,
                "max_completion_tokens": encoder.max_completion_tokens,
                "long_prompt": encoder.long_prompt,
            },
            "metrics": self.metrics,
        }

    def _stats(self) -> dict[str, Tensor]:
        if isinstance(self.projector, StaticPrefix):
            return {}
        return {"mean": self.projector.input_mean, "scale": self.projector.input_scale}

    def _encode(self, prompts: Sequence[Prompt] | Prompt, profiles: Sequence[str | None] | None) -> list[EncodedPrompt]:
        many = _as_list(prompts)
        texts = profiles if profiles is not None else [None] * len(many)
        if len(texts) != len(many):
            raise DataError(f"expected {len(many)} profiles, one per prompt, got {len(texts)}")
        return [self.encoder.prompt(prompt, text) for prompt, text in zip(many, texts, strict=True)]


def text_encoder(backbone: FrozenBackbone, data: DataConfig, prefix_tokens: int) -> TextEncoder:
    """The encoder for these settings; the prompt's limit also leaves room in the backbone's window."""
    limit = data.max_prompt_tokens
    if backbone.window is not None:
        limit = min(limit, backbone.window - prefix_tokens - data.max_completion_tokens)
    if limit <= 0:
        raise DataError(
            f"data.max_completion_tokens: {data.max_completion_tokens} leaves no room for a prompt in the backbone's "
            f"window of {backbone.window} tokens; lower it"
        )
    return TextEncoder(
        backbone.tokenizer,
        chat=data.chat,
        profile_template=data.profile_template,
        max_prompt_tokens=limit,
        max_completion_tokens=data.max_completion_tokens,
        long_prompt=data.long_prompt,
    )


def _projector(
    backbone: FrozenBackbone, embedding_dim: int, config: ProjectorConfig, static: bool
) -> PrefixProjector | StaticPrefix:
    kind = StaticPrefix if static else PrefixProjector
    return kind(
        embedding_dim,
        backbone.hidden_size,
        config,
        anchor=backbone.anchor(config.init_text, config.prefix_tokens).cpu(),
        token_norm=backbone.token_norm(),
    )


def _check_shapes(path: Path, own: Mapping[str, Sequence[int]], read: Mapping[str, Tensor]) -> None:
    for name in sorted(set(own) | set(read)):
        expected = list(own[name]) if name in own else "nothing"
        got = list(read[name].shape) if name in read else "nothing"
        if expected != got:
            raise AdapterError(f"{path}: {name}: expected {expected}, got {got}; the file is not this adapter's")


@torch.no_grad()
def _fill(path: Path, own: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Copy read tensors into own ones after comparing names and shapes."""
    _check_shapes(path, {name: tensor.shape for name, tensor in own.items()}, read)
    for name, tensor in own.items():
        tensor.copy_(read[name])


def _as_list(prompts: Sequence[Prompt] | Prompt) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # the hub client has a dozen kinds of errors; the user needs one line
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"{repo_id}: no such folder here, and the hub says: {reason}") from None
