"""Text to token ids: chat template, profile text, the boundary between prompt and completion, splice positions.

Training, scoring and serving call these functions and no others, so a request is tokenised as the examples were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from e2p.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class EncodedPrompt:
    """Ids of one prompt, ready to be followed by a completion.

    Args:
        ids: token ids, with the beginning-of-sequence token and the generation prompt where the tokenizer has them.
        after_bos: index in ``ids`` behind the beginning-of-sequence token (0 if there is none).
        after_system: index behind the system turn; equals ``after_bos`` without one.
        cut: tokens that were dropped to fit ``max_prompt_tokens``.
    """

    ids: list[int]
    after_bos: int
    after_system: int
    cut: int = 0

    @property
    def full(self) -> int:
        """Tokens before anything was dropped."""
        return len(self.ids) + self.cut


class TextEncoder:
    """A tokenizer together with the settings that turn prompts and completions into ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat: whether a plain prompt becomes a user turn; ``auto``: if the tokenizer has a chat template.
        profile_template: how a profile goes into the system turn; contains ``{profile}``.
        max_prompt_tokens: limit of a prompt; ``None``: no limit.
        max_completion_tokens: longer completions are cut.
        long_prompt: ``error`` raises DataError, ``truncate`` drops the oldest turns or tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: Literal["auto", "always", "never"] = "auto",
        profile_template: str = "About the user: {profile}",
        max_prompt_tokens: int | None = None,
        max_completion_tokens: int = 128,
        long_prompt: Literal["error", "truncate"] = "error",
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat == "always" and not has_template:
            raise ConfigError("data.chat: 'always' needs a tokenizer with a chat template; set it to 'never' or 'auto'")
        self.tokenizer: Any = tokenizer
        self.has_template = has_template
        self.plain_as_chat = has_template and chat != "never"
        self.profile_template = profile_template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_completion_tokens = max_completion_tokens
        self.long_prompt = long_prompt

    def prompt(self, prompt: Prompt, profile: str | None = None) -> EncodedPrompt:
        """Encode a text or a list of messages, with the profile in the system turn if one is given.

        Raises DataError for messages without a chat template, an empty prompt, or one that is too long.
        """
        messages = self._messages(prompt, profile)
        encoded = self._encode(prompt, messages, profile)
        limit = self.max_prompt_tokens
        full = len(encoded.ids)
        if limit is None or full <= limit:
            return encoded
        if self.long_prompt == "error":
            raise DataError(
                f"expected a prompt of at most {limit} tokens, got {full}; set data.long_prompt to truncate, or raise "
                "data.max_prompt_tokens as far as the backbone's window leaves room beside data.max_completion_tokens"
            )
        if messages is None:  # keep what leads the text (BOS, profile) and the newest tokens
            head = encoded.ids[: encoded.after_system]
            keep = limit - len(head)
            if keep <= 0:
                raise DataError(f"the profile alone has {len(head)} tokens, more than data.max_prompt_tokens {limit}")
            return EncodedPrompt([*head, *encoded.ids[full - keep :]], encoded.after_bos, len(head), full - limit)
        first = int(messages[0]["role"] == "system")
        system, turns = messages[:first], messages[first:]
        gone, encoded = self._shortened(prompt, system, turns, profile, limit)
        if len(encoded.ids) <= limit:
            return EncodedPrompt(encoded.ids, encoded.after_bos, encoded.after_system, full - len(encoded.ids))
        turns = turns[gone:]
        last = turns[-1]
        content = self._ids(last["content"], False)
        while len(content) > (over := len(encoded.ids) - limit):
            content = content[over:]
            shorter = {**last, "content": self.tokenizer.decode(content)}
            encoded = self._encode(prompt, [*system, shorter], profile)
            if len(encoded.ids) <= limit:
                return EncodedPrompt(encoded.ids, encoded.after_bos, encoded.after_system, full - len(encoded.ids))
        raise DataError(
            f"what stands around the last turn's text has {len(encoded.ids) - len(content)} tokens, which leaves no "
            f"room in data.max_prompt_tokens {limit}; raise it"
        )

    def _shortened(
        self, prompt: Prompt, system: list[dict[str, str]], turns: list[dict[str, str]], profile: str | None, limit: int
    ) -> tuple[int, EncodedPrompt]:
        """The fewest oldest turns to drop so that the others fit, and these encoded; at most all but the last.

        By halving, since everything is written and tokenised anew for every number that is tried, and anyone may send
        thousands of turns. Raises DataError where the template refuses whatever is left.
        """

        def without(gone: int) -> tuple[int, EncodedPrompt]:
            while True:
                try:
                    return gone, self._encode(prompt, [*system, *turns[gone:]], profile)
                except DataError:  # many templates refuse turns that begin with an answer: drop that one too
                    if gone >= len(turns) - 1:
                        raise
                    gone += 1

        low, high, best = 1, len(turns) - 1, None
        while low <= high:
            middle = (low + high) // 2
            try:
                gone, encoded = without(middle)
            except DataError:
                high = middle - 1
                continue
            if len(encoded.ids) <= limit:
                best, high = (gone, encoded), middle - 1
            else:
                low = gone + 1
        return best or without(len(turns) - 1)

    def completion(self, prompt: Prompt, encoded: EncodedPrompt, text: str, cut: bool = True) -> list[int]:
        """Ids of a completion, ended by the end-of-sequence token, so that prompt + completion is what generation sees.

        The prompt is rendered with its answer and tokenised as one text. Where that begins with exactly the prompt's
        own ids, the rest is the completion; where the tokenizer merges across the boundary, the completion is
        tokenised alone, because generation starts from the prompt's own ids.

        Args:
            prompt: the prompt as it was given to :meth:`prompt`.
            encoded: what came of it.
            text: the completion.
            cut: whether a completion longer than ``max_completion_tokens`` is cut there.
        """
        messages = self._messages(prompt, None)
        if messages is None:
            ids = self._after(prompt if isinstance(prompt, str) else "", text, special=True)
        else:
            # The last turn is enough: what stands before it does not change the completion's tokens.
            rendered = self._render(messages[-1:], generate=True)
            answered = self._render([*messages[-1:], {"role": "assistant", "content": text}], generate=False)
            if answered.startswith(rendered):
                ids = self._after(rendered, answered[len(rendered) :], special=False)
            else:  # a template that writes the answer's turn in another way than its generation prompt
                ids = self._ids(text, False)
        end = self.tokenizer.eos_token_id
        if end is not None:
            ids = [*ids[: ids.index(end)], end] if end in ids else [*ids, end]
        return ids[: self.max_completion_tokens] if cut else ids

    def _after(self, prompt: str, text: str, special: bool) -> list[int]:
        prompt_ids = self._ids(prompt, special)
        together = self._ids(prompt + text, special)
        if together[: len(prompt_ids)] == prompt_ids and len(together) > len(prompt_ids):
            return together[len(prompt_ids) :]
        return self._ids(text, False)

    def _ids(self, text: str, special: bool) -> list[int]:
        # verbose=False: no warning about the model's window, which is checked here.
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _messages(self, prompt: Prompt, profile: str | None) -> list[dict[str, str]] | None:
        """Messages of a chat prompt with the profile merged in, or None for a plain text."""
        if isinstance(prompt, str):
            if not self.plain_as_chat:
                return None
            messages = [{"role": "user", "content": prompt}]
        else:
            if not self.has_template:
                raise DataError("messages need a tokenizer with a chat template; give a column 'prompt' instead")
            if not prompt or not all(isinstance(m.get(k), str) for m in prompt for k in ("role", "content")):
                raise DataError("expected messages with a role and a content of text each; mend them")
            messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
        if not profile:
            return messages
        text = self._profile(profile)
        if messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{messages[0]['content']}\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def _profile(self, profile: str) -> str:
        return self.profile_template.replace("{profile}", profile)  # other braces are text

    def _encode(self, prompt: Prompt, messages: list[dict[str, str]] | None, profile: str | None) -> EncodedPrompt:
        if messages is None:
            lead = f"{self._profile(profile)}\n\n" if profile else ""
            ids = self._ids(lead + str(prompt), True)
            system = len(self._ids(lead, True)) if lead else 0
        else:
            rendered = self._render(messages, generate=True)
            # Once for the tokens and for where they stand.
            encoding = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, places = encoding["input_ids"], encoding["offset_mapping"]
            if messages[0]["role"] == "system":
                system = _before(places, self._system_end(messages, rendered))
            else:
                system = _before(places, len(self._inserted)) if rendered.startswith(self._inserted) else 0
        if not ids:
            raise DataError("expected a prompt with at least one token, got an empty text")
        after_bos = int(ids[0] == self.tokenizer.bos_token_id)
        return EncodedPrompt(ids, after_bos, max(system, after_bos))

    def _system_end(self, messages: list[dict[str, str]], rendered: str) -> int:
        """Where the system turn ends in the rendered text."""
        content = messages[0]["content"].strip()
        start = rendered.find(content)
        if start < 0 or len(messages) < 2:
            return len(rendered) if start >= 0 else 0
        try:  # the system turn alone, where a template renders it as it stands at the head of the prompt
            alone = self._render(messages[:1], generate=False)
        except DataError:
            alone = ""
        if rendered.startswith(alone) and len(alone) >= start + len(content):
            cut = len(alone)
        else:
            # Without the system turn, the same turns render to a suffix: what precedes it is BOS and the system turn.
            rest = self._render(messages[1:], generate=True)
            shared = 0
            while shared < min(len(rest), len(rendered)) and rest[-1 - shared] == rendered[-1 - shared]:
                shared += 1
            cut = max(len(rendered) - shared, start + len(content))
        return cut

    @cached_property
    def _inserted(self) -> str:
        """What the template itself puts before a first user turn, such as a system turn of its own; often nothing.

        Told by a system turn of ours, which takes its place: what follows it is the user turn.
        """
        ours, turn = {"role": "system", "content": "abc"}, {"role": "user", "content": "xyz"}
        try:
            bare = self._render([turn], generate=True)
            alone, both = self._render([ours], generate=False), self._render([ours, turn], generate=True)
        except DataError:  # a template without system turns
            return ""
        follows = both.removeprefix(alone)
        return bare.removesuffix(follows) if follows != both and bare.endswith(follows) else ""

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # jinja2 errors and whatever a template raises on turns that it refuses
            raise DataError(f"the chat template refuses these turns: {' '.join(str(error).split())}") from None


def _before(places: Sequence[tuple[int, int]], cut: int) -> int:
    """Tokens that begin before a place in the text."""
    return sum(begin < cut for begin, _ in places) if cut else 0
