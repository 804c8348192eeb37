"""The playground's page: the same prompt for two or three users, by the routes that everyone else asks too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

import gradio as gr

from e2p.evaluation.look import PALETTE
from e2p.serving.engine import AdapterInfo
from e2p.serving.http.auth import Key, authenticate
from e2p.serving.http.errors import ApiError
from e2p.serving.http.inside import events
from e2p.serving.http.service import Service
from e2p.serving.known_people import KnownPeople, draw_map

SCOPES = ("generate", "users:read")  # what a key needs that opens the page
NOBODY = ("nobody", "")
COLUMNS = tuple(zip("ABC", (PALETTE[0], PALETTE[2], PALETTE[3]), strict=True))
_SUGGESTED, _LOOKED_AT = 200, 100_000
_PAUSE = 0.05  # seconds between two pictures of the answers
_FIRST_PROMPT = "What shall I listen to?"
_ARMS = {
    "e2p": "this user's own soft token",
    "null": "the null user: a soft token that stands for nobody",
    "none": "the bare model, without a soft token",
}
_REASONS = {
    "no_user": "no user was picked",
    "unknown_user": "the store has no vector of this user",
    "old_vector": "the vector is too old",
    "other_version": "the vector is of another version",
    "other_dimension": "the vector has another dimension",
    "store_unavailable": "the store cannot be read",
    "bare_model": "this model takes no users",
    "no_null_user": "the adapter has no null user",
}


@dataclass(eq=False)
class Page:
    """What the page's elements do.

    Args:
        app: the whole application, which is asked for answers.
        service: its parts.
        known: by adapter, what its run tells of users.
    """

    app: Any
    service: Service
    known: Mapping[str, KnownPeople]

    def visitor(self, key: str | None) -> Key:
        """Whose key it is. Raises ApiError where it does not open the page."""
        generates, reads = (authenticate(self.service.keys, _bearer(key), scope) for scope in SCOPES)
        assert generates is reads
        return reads

    def adapter(self, name: str) -> AdapterInfo:
        """The adapter, or the first one while none is picked. Raises ApiError."""
        return self.service.adapter(name) if name else self.adapters()[0]

    def adapters(self) -> list[AdapterInfo]:
        """Those that take users first."""
        return sorted(self.service.engine.adapters(), key=lambda info: not info.dimension)

    async def users(self, visitor: Key, known: KnownPeople) -> list[str]:
        """Some users to pick: those of the map that the store has, else the store's first. Raises ApiError."""
        store = self.service.store
        if store is None:
            return []
        wanted = [user for user in known.places if user.startswith(visitor.user_prefix)][:_SUGGESTED]

        def look() -> list[str]:
            found = [user for user, vector in zip(wanted, store.get_many(wanted), strict=True) if vector is not None]
            if found:
                return found
            first = (vector.user_id for vector in islice(store.iterate(), _LOOKED_AT))
            return list(islice((user for user in first if user.startswith(visitor.user_prefix)), _SUGGESTED))

        return await self.service.vectors.call(look)

    # ---------------------------------------------------------------- what elements are told

    async def open(self, key: str | None) -> tuple[Any, ...]:
        """Fill the page: note, gate, body, adapter, users of the columns, prompt, examples, strength."""
        untouched = [gr.skip()] * (2 + len(COLUMNS) + 3)
        try:
            visitor, info = self.visitor(key), self.adapter("")
            known = self.known.get(info.name, KnownPeople())
            users = await self.users(visitor, known)
        except ApiError as error:
            return (gr.update(value=_fault(error), visible=True), gr.skip(), *untouched)
        picked = (*known.far_apart(users), "", "", "")
        choices = [NOBODY, *((user, user) for user in users)]
        note = "" if users else "No user has a vector here yet: put some into the store (--store), or ask for nobody."
        # A key that is bound to some users does not see what others asked.
        prompts = () if visitor.user_prefix else known.prompts
        prompt = prompts[0] if prompts else _FIRST_PROMPT
        return (
            gr.update(value=_line(note), visible=bool(note)),
            gr.update(visible=False),
            gr.update(visible=True),
            gr.update(choices=[each.name for each in self.adapters()], value=info.name),
            *(gr.update(choices=choices, value=user) for user in picked[: len(COLUMNS)]),
            gr.update(value=prompt),
            gr.update(samples=[[each] for each in prompts], visible=len(prompts) > 1),
            self.strength(info),
        )

    def strength(self, info: AdapterInfo) -> Any:
        """The slider of an adapter."""
        if info.has_null:
            return gr.update(interactive=True)
        return gr.update(value=1, interactive=False)

    def turn(self, key: str | None, name: str) -> Any:
        """Another adapter was picked."""
        try:
            self.visitor(key)
            return self.strength(self.adapter(name))
        except ApiError:
            return gr.skip()

    def look(self, key: str | None, name: str, third: bool, *users: str) -> tuple[str, ...]:
        """Users were picked: the map, and what is known of each."""
        try:
            visitor, info = self.visitor(key), self.adapter(name)
        except ApiError:
            return ("",) * (1 + len(COLUMNS))
        known = self.known.get(info.name, KnownPeople())
        # A key that is bound to some users does not see where the others lie.
        places = {user: place for user, place in known.places.items() if user.startswith(visitor.user_prefix)}
        shown = [(user or "", *column) for user, column in zip(users, COLUMNS, strict=True)][: 2 + third]
        texts = []
        for user in users:
            allowed = bool(user) and user.startswith(visitor.user_prefix)
            texts.append(_about(user, known) if allowed else _line("no user: what everybody gets" if not user else ""))
        off = [user for user, _, _ in shown if user and user.startswith(visitor.user_prefix) and user not in places]
        return (_map(draw_map(places, shown), off), *texts)

    async def answers(
        self, key: str | None, name: str, third: bool, *rest: Any
    ) -> AsyncGenerator[tuple[str, ...], None]:
        """All columns' answers at once. ``rest``: a user for each column, and then what :meth:`answer` takes."""
        users, common = rest[: len(COLUMNS)], rest[len(COLUMNS) :]
        cards, news = [""] * len(COLUMNS), asyncio.Event()

        async def follow(index: int) -> None:
            async for card in self.answer(key, name, users[index], *common):
                cards[index] = card
                news.set()

        tasks = [asyncio.create_task(follow(index)) for index in range(2 + third)]
        for task in tasks:
            task.add_done_callback(lambda _: news.set())
        try:
            while not all(task.done() for task in tasks):
                await news.wait()
                news.clear()
                yield tuple(cards)
                await asyncio.sleep(_PAUSE)
            yield tuple(cards)
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(
        self,
        key: str | None,
        name: str,
        user: str | None,
        prompt: str,
        strength: float,
        heat: float,
        longest: float,
        seed: Any,
    ) -> AsyncGenerator[str, None]:
        """A column's answer as it comes, and beneath it what gave it."""
        text, told = "", dict[str, Any]()
        try:
            self.visitor(key)
            if not (prompt or "").strip():
                raise ApiError(400, "no_prompt", "type a prompt, then press Ask")
            body: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": prompt}], "stream": True}
            body |= {"temperature": heat, "max_tokens": int(longest), "stream_options": {"include_usage": True}}
            body |= {"seed": int(seed)} if seed is not None else {}
            if user:
                body |= {"user": user} | ({"e2p": {"strength": strength}} if strength != 1 else {})
            yield _card("", "…")
            usage: dict[str, Any] = {}
            async for event in events(self.app, "/v1/chat/completions", body, _bearer(key)):
                told, usage = event.get("e2p") or told, event.get("usage") or usage
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                yield _card(text, "…")
            yield _card(text, _served(told, usage))
        except ApiError as error:
            yield _card(text, "", error)
        except (TypeError, ValueError, OverflowError):  # a request that no page of ours makes
            yield _card(text, "", ApiError(400, "invalid_value", "settings: expected numbers within their ranges"))


def _bearer(key: str | None) -> str | None:
    """The header that a client with this key sends."""
    return f"Bearer {key.strip()}" if key and key.strip() else None


# ---------------------------------------------------------------- words


def _fault(error: ApiError) -> str:
    return f'<p class="e2p-error">{escape(" ".join(error.message.split()))}</p>'


def _line(text: str) -> str:
    return f'<p class="e2p-line">{escape(text)}</p>' if text else ""


def _about(user: str, known: KnownPeople) -> str:
    profile = known.profiles.get(user)
    if profile is None:
        return _line("nothing is known here but the vector")
    short = profile if len(profile) <= 130 else profile[:130].rsplit(" ", 1)[0] + " …"
    return f'<p class="e2p-line" title="{escape(profile)}">The model does not see this: “{escape(short)}”</p>'


def _card(text: str, foot: str, error: ApiError | None = None) -> str:
    inner = f'<div class="e2p-answer">{escape(text)}</div>' if text or error is None else ""
    return inner + (_fault(error) if error else f'<p class="e2p-foot">{foot}</p>')


def _served(told: Mapping[str, Any], usage: Mapping[str, Any]) -> str:
    arm, vector = str(told.get("arm")), told.get("vector")
    parts = [f"<b>{escape(_ARMS.get(arm, arm))}</b>"]
    reasons = [reason for reason in str(told.get("reason") or "").split(",") if reason]
    parts += [escape(_REASONS.get(reason, reason)) for reason in reasons]
    if told.get("strength") not in (None, 1):
        parts.append(f"strength {told['strength']:g}")
    if vector:
        version = f"version {vector['version']}" if vector["version"] else "vector without a version"
        parts.append(escape(f"{version}, {_age(vector['age_seconds'])}"))
    parts.append(f"{usage.get('completion_tokens', 0)} tokens")
    return " · ".join(parts)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "of unknown age"
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count:,} {name}{'s' * (count > 1)} old"
    return "just put"


def _map(svg: str, off: list[str]) -> str:
    if not svg:
        return _line("No map: the run's folder has no space.parquet, which judging a run writes.")
    said = f" Not on the map: {', '.join(off)}." if off else ""
    return f"{svg}{_line('Every dot is a user of the run (t-SNE): near each other, alike.' + said)}"
