"""A frozen Hugging Face causal language model that accepts soft tokens: log-probabilities and generation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2p.config import BackboneConfig, Precision
from e2p.data.batches import Batch
from e2p.data.templates import EncodedPrompt
from e2p.errors import BackboneError
from e2p.model.loading import load_causal_lm
from e2p.model.logprobs import Head, divergence, label_logprobs
from e2p.model.precision import autocast_dtype, prepare_autocast
from e2p.model.splice import Spliced, splice


class FrozenBackbone(nn.Module):
    """Any ``AutoModelForCausalLM`` with its weights frozen, spliced at the input embeddings.

    Args:
        model: the loaded causal LM; it is put in evaluation mode and none of its weights gets a gradient.
        tokenizer: its fast tokenizer.
        source: path or hub id, for records.
        revision: hub revision, for records.
        lora: PEFT adapter that is merged in, for records.
        precision: forward pass in bfloat16 autocast (``auto``: where the hardware has it), or as the weights are.
            With autocast the linear layers of ``model`` are cast for good, so call it under autocast afterwards.

    Raises:
        BackboneError: the model has no output embedding, or its output layer does something that is not known here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: str = "",
        revision: str | None = None,
        lora: str | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source, self.revision, self.lora = source, revision, lora
        self.config = model.config.get_text_config(decoder=True)
        self.base: Any = model.base_model
        self.head = _head(model, self.config)
        takes = inspect.signature(self.base.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        self._checkpointing = False
        self.share_prompts = _has_plain_cache(self.config)
        self.branches: bool | None = None  # whether answers can run side by side; found out when that is first asked
        self._check_head()
        self.autocast_dtype = autocast_dtype(precision, self.device, model.dtype)
        if self.autocast_dtype is not None:
            prepare_autocast(model, self.base, self.autocast_dtype)

    @classmethod
    def load(cls, config: BackboneConfig, precision: Precision = "auto") -> FrozenBackbone:
        """Load model and tokenizer from a folder or a hub.

        Raises:
            BackboneError: one line on what could not be loaded.
            MissingExtraError: LoRA or quantisation is asked for and its package is missing.
        """
        model, tokenizer = load_causal_lm(config)
        # Of a hub's branch, the commit that it pointed to.
        revision = getattr(model.config, "_commit_hash", None) or config.revision
        return cls(model, tokenizer, source=config.model, revision=revision, lora=config.lora, precision=precision)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """A frozen model stays in evaluation mode: no dropout, whatever the trainer asks for."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the token embeddings lie."""
        return self.model.get_input_embeddings().weight.device

    @property
    def hidden_size(self) -> int:
        """Length H of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def window(self) -> int | None:
        """Longest input in tokens, or None where the model does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... h"]:
        """Token embeddings as the model makes them (some families scale them)."""
        return self.model.get_input_embeddings()(ids)

    def token_norm(self) -> float:
        """Mean Euclidean norm of a token embedding, over at most 4,096 tokens spread over the vocabulary."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.linspace(0, rows - 1, min(rows, 4096), device=self.device).long()
        return float(self.embed(ids).float().norm(dim=-1).mean())

    def anchor(self, text: str, count: int) -> Float[Tensor, "k h"]:
        """Embeddings of the first ``count`` tokens of a text, repeated if it has fewer: a start for soft tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] or [self.tokenizer.eos_token_id or 0]
        return self.embed(torch.tensor((ids * count)[:count], device=self.device)).float()

    @property
    def quantization(self) -> Literal["none", "4bit", "8bit"]:
        """How the weights are quantised by bitsandbytes."""
        if getattr(self.model, "is_loaded_in_4bit", False):
            return "4bit"
        return "8bit" if getattr(self.model, "is_loaded_in_8bit", False) else "none"

    @torch.no_grad()
    def fingerprint(self) -> dict[str, Any]:
        """What tells this backbone from another: family, sizes, a few numbers of its embedding table, and a few of the
        last hidden state of eight tokens, to which every layer's weights contribute."""
        weight = self.model.get_input_embeddings().weight
        rows = torch.linspace(0, weight.shape[0] - 1, 8, device=weight.device).long()
        at = torch.arange(len(rows), device=weight.device)[None]
        with self.autocast():
            seen = self.hidden_states(Spliced(self.embed(rows[None]), torch.ones_like(at), at))[0, -1].float()
        places = torch.linspace(0, len(seen) - 1, min(16, len(seen)), device=seen.device).long()
        probe = seen[places] / seen.square().mean().sqrt().clamp(min=1e-12)
        return {
            "model_type": str(self.config.model_type),
            "layers": int(self.config.num_hidden_layers),
            "vocabulary": int(weight.shape[0]),
            "hidden_size": int(weight.shape[1]),
            "embedding_norms": [round(float(norm), 4) for norm in self.embed(rows).float().norm(dim=-1)],
            "hidden_state": [round(float(value), 4) for value in probe],
        }

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass. The prompt is then not shared, since no cache may be kept.

        transformers checkpoints only modules in training mode, so the layers alone are put in it, with their own
        dropout rates at zero; what is inside them stays in evaluation mode.
        """
        if hasattr(self.model, "activation_checkpointing_enable"):  # its name since transformers 5.23
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing") and module.gradient_checkpointing:
                module.training = True
                for name, value in vars(module).items():
                    if "drop" in name and isinstance(value, float):
                        setattr(module, name, 0.0)
        self._checkpointing = True

    def completion_logprobs(self, batch: Batch, prefix: Float[Tensor, "b k h"] | None) -> Float[Tensor, "n"]:
        """log p of every completion token given prompt and soft tokens, row after row, float32.

        n is the sum of ``batch.completion_lengths``; prompt, soft tokens and padding are not in it. Where the soft
        tokens stand right before the completion, the prompt depends on no trained weight: it runs without gradient
        and once for all rows that share it.
        """
        hidden, labels = self.completion_states(batch, prefix)
        with self.autocast():
            return label_logprobs(hidden, labels, self.head)

    def distilled_logprobs(
        self, batch: Batch, prefix: Float[Tensor, "b k h"], teacher: Batch
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """:meth:`completion_logprobs`, and at each of these tokens the Kullback-Leibler divergence of this model on
        ``teacher``, without soft tokens, from this model on ``batch`` with them.

        Args:
            batch: the student's rows.
            prefix: their soft tokens.
            teacher: the same completions after other prompts, row by row.
        """
        with torch.no_grad():
            target, _ = self.completion_states(teacher, None)
        hidden, labels = self.completion_states(batch, prefix)
        with self.autocast():
            return label_logprobs(hidden, labels, self.head), divergence(hidden, target, self.head)

    def completion_states(
        self, batch: Batch, prefix: Float[Tensor, "b k h"] | None
    ) -> tuple[Float[Tensor, "n h"], Int[Tensor, "n"]]:
        """Last hidden states that predict each completion token, row after row, and these tokens."""
        late = prefix is not None and bool((batch.splice == batch.prompt_lengths).all())
        with self.autocast():
            if late and self.share_prompts and not self._checkpointing:
                assert prefix is not None
                hidden = self._after_shared_prompt(batch, prefix)
            else:
                hidden = self._whole_sequence(batch, prefix)
        labelled = _within(batch.completion_lengths, batch.completion.shape[1])
        return hidden[labelled], batch.completion[labelled]

    def _whole_sequence(self, batch: Batch, prefix: Tensor | None) -> Tensor:
        """Hidden states [B, C, H] that predict each completion token, from one pass over everything."""
        # Not the longest prompt plus the longest completion: those may stand in two rows.
        width = int((batch.prompt_lengths + batch.completion_lengths).max()) - 1
        place = torch.arange(width, device=batch.prompt.device).expand(len(batch), width)
        behind = place - batch.prompt_lengths[:, None]
        ids = torch.where(
            behind < 0,
            _take(batch.prompt, place),
            _take(batch.completion, behind),
        )
        # The last token of a completion predicts nothing that is labelled, so it is left out.
        lengths = batch.prompt_lengths + batch.completion_lengths - 1
        hidden = self.hidden_states(splice(self.embed(ids), lengths, prefix, batch.splice))
        k = 0 if prefix is None else prefix.shape[1]
        first = batch.prompt_lengths + (k - 1)
        at = first[:, None] + torch.arange(batch.completion.shape[1], device=first.device)
        at = at.clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))

    def _after_shared_prompt(self, batch: Batch, prefix: Tensor) -> Tensor:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.config)
        lengths = batch.prompt_lengths[batch.unique]
        nowhere = torch.zeros_like(lengths)
        with torch.no_grad():  # padded on the left: a sliding window then sees no gap between prompt and completion
            prompt = splice(self.embed(batch.prompt[batch.unique]), lengths, None, nowhere, pad_left=True)
            self.hidden_states(prompt, cache)
            if len(batch.unique) < len(batch):
                cache.batch_select_indices(batch.shared)
        tail = splice(
            self.embed(batch.completion[:, :-1]),
            batch.completion_lengths - 1,
            prefix,
            torch.zeros_like(batch.splice),
        )
        whole = Spliced(
            tail.embeds,
            torch.cat([prompt.mask[batch.shared], tail.mask], dim=1),
            tail.positions + batch.prompt_lengths[:, None],
        )
        hidden = self.hidden_states(whole, cache)
        return hidden[:, prefix.shape[1] - 1 :]

    def hidden_states(self, inputs: Spliced, cache: Any = None, mask: Any = None) -> Tensor:
        """Last hidden states [B, T, H], as the caller's autocast makes them.

        Args:
            inputs: what is read.
            cache: transformers' cache of what was read before; it grows.
            mask: what attention may look at, in place of the mask of ``inputs``: a tensor [B, 1, T, S] as the attention
                implementation takes it, or one for each type of layer by name.
        """
        extra = {"position_ids": inputs.positions} if self.takes_positions else {}
        output = self.base(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask if mask is None else mask,
            use_cache=cache is not None,
            **{self.cache_name: cache},
            **extra,
        )
        return output.last_hidden_state

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        at: Sequence[int],
        prefix: Float[Tensor, "b k h"] | None,
        **settings: Any,
    ) -> list[list[int]]:
        """Continue prompts; returns the new ids of each row, without the end-of-sequence token and padding.

        Args:
            prompts: encoded prompts, one a row (or one for each returned sequence's group).
            at: index in each prompt that the soft tokens precede.
            prefix: soft tokens, or None.
            settings: passed to ``transformers``' ``generate`` (``max_new_tokens``, ``do_sample``, ``temperature``,
                ``num_beams``, ``repetition_penalty``, ``streamer``, ...).
        """
        ids, lengths, filler = self.padded(prompts)
        width = ids.shape[1]
        where = torch.tensor(list(at), device=self.device)
        inputs = splice(self.embed(ids), lengths, prefix, where, pad_left=True)
        k = 0 if prefix is None else prefix.shape[1]
        # Processors such as the repetition penalty read ids: the prompt's own. Where no token stands, its first one is
        # repeated, since a filler would be penalised in its stead (often the end of sequence).
        known = ids[:, :1].repeat(1, width + k)
        for row, prompt in enumerate(prompts):
            pad, cut = width - len(prompt.ids), int(where[row])
            known[row, pad : pad + cut] = ids[row, :cut]
            known[row, pad + cut + k :] = ids[row, cut : len(prompt.ids)]
        end = settings.pop("eos_token_id", None)
        self.require_room(width + k + int(settings.get("max_new_tokens") or 0), "lower max_new_tokens or shorten")
        ends = self.ends() if end is None else sorted({end} if isinstance(end, int) else set(end))
        with self.autocast():
            out = self.model.generate(
                inputs=known,
                inputs_embeds=inputs.embeds,
                attention_mask=inputs.mask,
                pad_token_id=filler,
                eos_token_id=ends or None,
                **settings,
            )
        return [_until(row, ends) for row in out[:, width + k :].tolist()]

    def padded(self, prompts: Sequence[EncodedPrompt]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"], int]:
        """Ids of prompts, padded on the right, their numbers of tokens, and the filler."""
        lengths = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        filler = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids = torch.full((len(prompts), int(lengths.max())), filler, device=self.device)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids, device=self.device)
        return ids, lengths, filler

    def require_room(self, tokens: int, advice: str = "shorten") -> None:
        """Refuse what is longer than the window.

        Raises:
            BackboneError: prompt and answer have more tokens than the window.
        """
        if self.window is not None and tokens > self.window:
            raise BackboneError(
                f"expected prompt and answer within the backbone's window of {self.window} tokens, got {tokens}; "
                f"{advice} the prompt"
            )

    def ends(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's, and those that the checkpoint names for generation."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return sorted(end for end in ends if end is not None)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head is used apart from the model, so make sure once that it gives the model's own logits."""
        ids = torch.tensor([[0, 1]], device=self.device)
        hidden = self.base(inputs_embeds=self.embed(ids), use_cache=False).last_hidden_state
        ours = self.head(hidden[0])
        theirs = self.model(inputs_embeds=self.embed(ids), use_cache=False).logits[0].float()
        if ours.shape != theirs.shape or not torch.allclose(
            ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())
        ):
            raise BackboneError(
                f"backbone.model: the output layer of '{self.config.model_type}' does something unknown to e2p; "
                "please open an issue with the model's name"
            )


def _within(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _take(ids: Tensor, place: Tensor) -> Tensor:
    """ids[b, place[b, j]], with places outside the row brought to its ends (they are masked later)."""
    return ids.gather(1, place.clamp(0, ids.shape[1] - 1))


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


def _head(model: Any, config: Any) -> Head:
    linear = model.get_output_embeddings()
    if linear is None:
        raise BackboneError("backbone.model: expected a causal language model with an output embedding, got none")
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


def _has_plain_cache(config: Any) -> bool:
    """Whether every layer keeps keys and values that can be repeated for several rows (no recurrent state)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=config).layers
    return all(isinstance(layer, DynamicLayer) for layer in layers)
