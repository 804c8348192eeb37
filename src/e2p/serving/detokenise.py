"""Tokens to text as they come: never half a character, no stop text, in sum what decoding all at once says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers.decoders import DecodeStream

from e2p.serving.engine import part_of_character

_UNKNOWN = "\ufffd"


def _bytes_of(piece: str) -> bytes | None:
    """Of an entry of a vocabulary that holds bytes: one as <0xF0>, or GPT-2's letters, one for each byte."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(found[1])
    letters = _letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None


@cache
def _letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class Vocabulary:
    """A tokenizer as answers are written with it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self._texts: dict[int, str] = {}
        # Some tokenizers drop the space before a text's first token, so single tokens are decoded behind another.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._start = len(self.decode(self._before, skip_special=False))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens, as :meth:`e2p.model.e2p.E2PModel.generate` decodes it."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, first: bool = False) -> Any:
        """What decodes token by token; the first one comes at the beginning of the text, or within it."""
        return DecodeStream(ids=[] if first else self._before, skip_special_tokens=True)

    def text(self, token: int) -> str:
        """One token as text, its leading space included; ``bytes:\\xf0\\x9f``, as OpenAI's API writes it, where it is
        a part of a character."""
        if token not in self._texts:
            text = self.decode([*self._before, token], skip_special=False)[self._start :]
            raw = _bytes_of(self.tokenizer.convert_ids_to_tokens(token)) if _UNKNOWN in text else None
            self._texts[token] = text if raw is None else part_of_character(raw)
        return self._texts[token]


class AnswerText:
    """The text of one answer as it grows.

    Some decoders change what stood there when more tokens come: of a run of single bytes that is no text after all, or
    a space before a full stop. What has been said then stays, and the rest follows it.

    Args:
        vocabulary: what decodes.
        stop: texts that end the answer; where one begins earliest, the answer is cut.
        strip: leave out white space at both ends, as ``E2PModel.generate`` does.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), strip: bool = True) -> None:
        self.vocabulary, self.stop, self.strip = vocabulary, tuple(stop), strip
        self.stopped = False
        self._longest = max(map(len, self.stop), default=0)
        self._stream = vocabulary.stream(first=True)
        self._ids: list[int] = []
        self._whole = ""  # decoded so far, whole characters only
        self._given = 0  # of it, what has been said, or stripped at the beginning

    def push(self, token: int) -> str:
        """What can be said after one more token; ``stopped`` tells whether a stop text is complete."""
        self._ids.append(token)
        piece = self._step(token)
        if not piece:
            return ""
        self._grow(piece)
        return self._said(len(self._whole) if self.stopped else self._certain())

    def finish(self) -> str:
        """What was held back and belongs to the answer after all."""
        if not self.stopped:
            whole = self.vocabulary.decode(self._ids)  # bytes at the end that no further one makes a character
            if whole.startswith(self._whole):
                self._grow(whole[len(self._whole) :])
        return self._said(len(self._whole))

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self.vocabulary.backend, token) or ""
        except Exception:  # what stood there has changed with this token; what has been said cannot be taken back
            self._stream = self.vocabulary.stream()
            return self._stream.step(self.vocabulary.backend, token) or ""

    def _grow(self, piece: str) -> None:
        # A stop text may have begun in what was there before.
        start = max(0, len(self._whole) - self._longest + 1)
        self._whole += piece
        if self.stop:
            found = [at for at in (self._whole.find(stop, start) for stop in self.stop) if at >= 0]
            if found:
                self._whole, self.stopped = self._whole[: min(found)], True

    def _certain(self) -> int:
        """Up to where no stop text may be beginning."""
        for length in range(min(self._longest - 1, len(self._whole)), 0, -1):
            tail = self._whole[-length:]
            if any(stop.startswith(tail) for stop in self.stop):
                return len(self._whole) - length
        return len(self._whole)

    def _said(self, end: int) -> str:
        if self.strip:
            end = len(self._whole[:end].rstrip())
            if self._given == 0:
                self._given = len(self._whole) - len(self._whole.lstrip()) if end else 0
        text = self._whole[self._given : end]
        self._given = max(self._given, end)
        return text
