"""Soft tokens alone, as a part of a chat: kilobytes where a whole prompt as embeddings has megabytes.

The server then makes the prompt's tokens itself, and they must be the ones that training had, with the soft tokens
exactly where they stood. Two forms do that; whether one does is looked at here beforehand, and in every answer, whose
first event names the prompt's ids.

``template``: the prompt's text in two pieces with the soft tokens between them, under a chat template that writes
messages one behind the other. Any position and raw texts too, on servers started with --trust-request-chat-template.

``turn``: the messages, and the beginning of an answer that consists of the soft tokens. For soft tokens right before
the answer, where the backbone's template begins an answer's turn as it begins one that is to be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from e2p.data.templates import Prompt
from e2p.serving.vllm_wire import PLACEHOLDER, packed

_PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def begins_turns_alike(tokenizer: Any) -> bool:
    """Whether an answer stands right behind what asks for one."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    asked = [{"role": "user", "content": "abc"}]
    begun = [*asked, {"role": "assistant", "content": PLACEHOLDER}]
    try:
        wanted = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        found = tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    except Exception:  # jinja2's errors, and whatever a template raises on turns that it refuses
        return False
    return bool(found == wanted + PLACEHOLDER)


def template_messages(tokenizer: Any, ids: Sequence[int], at: int, part: Any) -> list[dict[str, Any]] | None:
    """Messages of the form ``template``, or None where texts do not become the same tokens again."""
    pieces = []
    for piece in (list(ids[:at]), list(ids[at:])):
        text = tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if PLACEHOLDER in text or tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != piece:
            return None
        pieces.append(text)
    contents = (pieces[0], [part], pieces[1])
    return [{"role": "user", "content": content} for content in contents if content]


def turn_messages(prompt: Prompt, part: Any) -> list[dict[str, Any]] | None:
    """Messages of the form ``turn``, or None where a text cannot be sent."""
    texts = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(PLACEHOLDER in message["content"] for message in texts):
        return None
    messages = [{"role": message["role"], "content": message["content"]} for message in texts]
    return [*messages, {"role": "assistant", "content": [part]}]


def chat_bodies(
    tokenizer: Any,
    prompt: Prompt | None,
    ids: Sequence[int],
    at: int,
    soft: Float[Tensor, "k h"],
    fields: dict[str, Any],
    forms: set[str],
) -> Iterator[tuple[str, bytes]]:
    """Bodies for /v1/chat/completions by form, likeliest first.

    Args:
        tokenizer: the backbone's.
        prompt: as it was asked; None where the form ``turn`` cannot be.
        ids: the prompt's tokens, as training had them.
        at: index that the soft tokens precede.
        soft: these.
        fields: what is told beside the messages.
        forms: those that the server may be told.
    """
    part = {"type": "prompt_embeds", "data": packed(soft).decode()}
    if "template" in forms and (messages := template_messages(tokenizer, ids, at, part)) is not None:
        extra = {"chat_template": _PLAIN, "add_generation_prompt": False}
        yield "template", json.dumps({**fields, **extra, "messages": messages}).encode()
    if "turn" in forms and prompt is not None and (messages := turn_messages(prompt, part)) is not None:
        extra = {"add_generation_prompt": False, "continue_final_message": True}
        yield "turn", json.dumps({**fields, **extra, "messages": messages}).encode()


def as_trained(found: Sequence[int] | None, ids: Sequence[int], at: int, count: int) -> bool:
    """Whether a server's prompt is ``ids`` with soft tokens before the one at ``at``, whatever it calls them."""
    if found is None or len(found) != len(ids) + count:
        return False
    return list(found[:at]) == list(ids[:at]) and list(found[at + count :]) == list(ids[at:])
