"""What is served under a name, and requests made ready for it: checked, tokenised as training tokenised, never half."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from e2p.data.templates import EncodedPrompt, Prompt, TextEncoder
from e2p.errors import DataError
from e2p.model.adapter import CONFIG
from e2p.model.backbone import FrozenBackbone
from e2p.model.e2p import E2PModel
from e2p.model.projector import StaticPrefix, user_vectors
from e2p.serving.calls import Call, Limits
from e2p.serving.engine import AdapterInfo, Personal, Request, RequestError, Sampling, TokenIds

_MOST_LOGPROBS = 20


@dataclass(frozen=True, eq=False)
class Served:
    """An adapter on the backbone, or the bare backbone.

    Args:
        info: what is said of it.
        backbone: the language model.
        model: the adapter; None: the bare backbone.
        encoder: how prompts become ids; too long ones are found here and not there.
        raw: the same without the chat template.
        limit: tokens of the longest prompt; None: no limit.
    """

    info: AdapterInfo
    backbone: FrozenBackbone
    model: E2PModel | None
    encoder: TextEncoder
    raw: TextEncoder
    limit: int | None

    @classmethod
    def load(cls, name: str, folder: str | Path, backbone: FrozenBackbone) -> Served:
        """An adapter's folder, or a run's.

        Raises:
            AdapterError: it is broken, or of another backbone.
        """
        path = Path(folder)
        path = path / "adapter" if (path / "adapter" / CONFIG).is_file() else path
        model = E2PModel.from_pretrained(path, backbone)
        digest = hashlib.sha256()
        for file in sorted((*path.glob("*.json"), *path.glob("*.safetensors"))):
            digest.update(file.name.encode() + file.read_bytes())
        projector = model.projector
        info = AdapterInfo(
            name=name,
            dimension=projector.embedding_dim,
            versions=tuple(model.embedding_versions),
            has_null=projector.config.null_prob > 0 and not isinstance(projector, StaticPrefix),
            revision=digest.hexdigest()[:12],
            prefix_tokens=projector.config.prefix_tokens,
            position=projector.config.position,
        )
        own, limit = model.encoder, model.encoder.max_prompt_tokens
        encoders = (_encoder(own, own.plain_as_chat, limit), _encoder(own, False, limit))
        return cls(info, backbone, model, *encoders, limit)

    @classmethod
    def bare(cls, name: str, backbone: FrozenBackbone) -> Served:
        """The backbone itself; prompts may be as long as its window leaves room for."""
        info = AdapterInfo(name, 0, (), False, backbone.revision or "", 0, "")
        own, limit = TextEncoder(backbone.tokenizer), None if backbone.window is None else backbone.window - 1
        return cls(info, backbone, None, _encoder(own, own.plain_as_chat, limit), _encoder(own, False, limit), limit)

    def call(self, request: Request, limits: Limits) -> Call:
        """A request, ready for the worker.

        Raises:
            RequestError: it can never be answered.
        """
        _check_sampling(request.sampling, limits)
        prefix = self._prefix(request.personal)
        prompt = self._encode(request.prompt, request.raw)
        at, count = 0, 0
        if prefix is not None and self.model is not None:
            at, count = self.model.splice_at(prompt), self.info.prefix_tokens
        window, sampling = self.backbone.window, request.sampling
        room = min(window if window is not None else limits.cache_tokens, limits.cache_tokens // sampling.n)
        left = max(0, room - count - len(prompt.ids))
        if sampling.shorten and left:
            sampling = replace(sampling, max_tokens=min(left, sampling.max_tokens))
        if sampling.max_tokens > left:
            raise RequestError(
                f"max_tokens: expected at most {left} behind a prompt of {len(prompt.ids)} tokens (room for {room} in "
                f"all), got {sampling.max_tokens}; lower it, or shorten the prompt"
            )
        return Call(prompt, at, count, prefix or _nothing, sampling, not request.raw, self.info.revision)

    def _encode(self, prompt: Prompt | TokenIds, raw: bool) -> EncodedPrompt:
        if raw and not isinstance(prompt, str | TokenIds):
            raise RequestError("prompt: expected a text to be continued as it stands, got messages; leave raw out")
        if not raw and isinstance(prompt, TokenIds):
            raise RequestError("prompt: expected a text or messages, got token ids; set raw")
        try:
            if isinstance(prompt, TokenIds):
                encoded = self._as_given(prompt)
            else:
                encoded = (self.raw if raw else self.encoder).prompt(prompt)
        except DataError as error:
            raise RequestError(f"prompt: {error}") from None
        if self.limit is not None and len(encoded.ids) > self.limit:
            raise RequestError(
                f"prompt: expected at most {self.limit} tokens for '{self.info.name}', got {len(encoded.ids)}; "
                "shorten it"
            )
        return encoded

    def _as_given(self, ids: TokenIds) -> EncodedPrompt:
        rows = self.backbone.model.get_input_embeddings().weight.shape[0]
        if not ids or not 0 <= min(ids) <= max(ids) < rows:
            raise RequestError(f"prompt: expected token ids from 0 to {rows - 1}, got others; use this backbone's")
        after_bos = int(ids[0] == self.backbone.tokenizer.bos_token_id)
        return EncodedPrompt(list(ids), after_bos, after_bos)

    def _prefix(self, personal: Personal) -> Callable[[], Tensor | None] | None:
        """What makes the soft tokens, or None for none."""
        name, mode, strength = self.info.name, personal.mode, personal.strength
        if mode not in ("user", "null", "none"):
            raise RequestError(f"mode: expected user, null or none, got {mode!r}")
        if not math.isfinite(strength):
            raise RequestError(f"strength: expected a finite number, got {strength}; 1 is the user as trained")
        if mode != "user" and personal.vector is not None:
            raise RequestError(f"vector: expected none with mode '{mode}', got one; use mode 'user'")
        if mode != "user" and strength != 1:
            raise RequestError(f"strength: expected 1 with mode '{mode}', got {strength}; use mode 'user'")
        if mode == "none":
            return None
        if self.model is None:
            raise RequestError(f"mode: expected none for the bare backbone '{name}', got '{mode}'; name an adapter")
        if not self.info.has_null and (mode == "null" or strength != 1):
            what = "mode: expected user or none" if mode == "null" else "strength: expected 1"
            got = "null" if mode == "null" else f"{strength}"
            raise RequestError(
                f"{what}, since '{name}' has no null user, got {got}; train it with projector.null_prob above 0"
            )
        if mode == "null":
            return partial(_soft_tokens, self.model, None, 1.0)
        if personal.vector is None:
            raise RequestError(f"vector: expected {self.info.dimension} numbers with mode 'user', got none; give it")
        try:
            vectors, _ = user_vectors([personal.vector], 1, self.info.dimension)
        except DataError as error:
            message = str(error).removeprefix("row 0: ")
            raise RequestError(f"vector: {message}; give one of those that '{name}' was trained with") from None
        return partial(_soft_tokens, self.model, vectors, strength)


class Shelf(dict[str, Served]):
    """What is served, by name; of what was loaded anew, the earlier one too, for requests that were made for it."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Served] = {}

    def renew(self, name: str, served: Served) -> None:
        """Serve another from now on."""
        if served.info.revision != self[name].info.revision:
            self._before[name] = self[name]
        self[name] = served

    def pick(self, request: Request) -> Served:
        """What is to answer. Raises RequestError where there is no such name."""
        found = self.get(request.adapter)
        if found is None:
            raise RequestError(
                f"adapter: expected one of {', '.join(self)}, got '{request.adapter}'; name one that is served"
            )
        before = self._before.get(request.adapter)
        if before is not None and request.revision == before.info.revision != found.info.revision:
            return before
        return found


@torch.no_grad()
def _soft_tokens(model: E2PModel, vectors: Tensor | None, strength: float) -> Tensor:
    """Soft tokens [K, H], float32: p0 + strength (p - p0), of the null user's p0 and the user's p.

    Raises:
        RequestError: they are no numbers, since the vector's are too large for phi.
    """
    if vectors is None or strength == 0:
        return model.prefix(None, 1)[0]
    soft = model.prefix(vectors, 1)[0]
    if strength != 1:
        null = model.prefix(None, 1)[0]
        soft = null + strength * (soft - null)
    if not bool(torch.isfinite(soft).all()):
        raise RequestError(
            "vector: expected numbers of the size that the adapter was trained with, got some so large that its soft "
            "tokens overflow; put another vector, or a strength nearer to 1"
        )
    return soft


def _nothing() -> None:
    return None


def _encoder(own: TextEncoder, chat: bool, limit: int | None) -> TextEncoder:
    """With the same settings; where nothing is cut, it has no limit of its own, whose message speaks of training."""
    return TextEncoder(
        own.tokenizer,
        chat="always" if chat else "never",
        profile_template=own.profile_template,
        max_prompt_tokens=limit if own.long_prompt == "truncate" else None,
        max_completion_tokens=own.max_completion_tokens,
        long_prompt=own.long_prompt,
    )


def _check_sampling(sampling: Sampling, limits: Limits) -> None:
    def require(good: bool, name: str, expected: str, advice: str) -> None:
        if not good:
            raise RequestError(f"{name}: expected {expected}, got {getattr(sampling, name)!r}; {advice}")

    require(sampling.max_tokens >= 1, "max_tokens", "a whole number >= 1", "raise it")
    require(0 <= sampling.temperature < math.inf, "temperature", "a number >= 0", "0 takes the likeliest token")
    require(0 < sampling.top_p <= 1, "top_p", "a number above 0, at most 1", "1 leaves no token out")
    require(1 <= sampling.n <= limits.rows, "n", f"1 to {limits.rows}", "ask several times")
    require(all(sampling.stop), "stop", "texts that are not empty", "leave the empty one out")
    if sampling.logprobs is not None:
        most = _MOST_LOGPROBS
        require(0 <= sampling.logprobs <= most, "logprobs", f"0 to {most}", "ask for fewer")
