"""Continuous batching: one thread owns the backbone and continues all rows together, token by token.

Requests come in by a queue, are read between two steps as soon as there is room, first come first served, and leave
when they end or nobody listens. Knows tensors through :mod:`e2p.serving.rows` alone, and no event loop.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from e2p.model.backbone import FrozenBackbone
from e2p.serving.calls import Answer, Call, Limits, RowSettings, choose
from e2p.serving.detokenise import Vocabulary
from e2p.serving.engine import EngineBusyError, EngineError, Event, Finished, RequestError, Started
from e2p.serving.rows import Reading, Rows, can_join, rows_of

T = TypeVar("T")
_LOG = logging.getLogger("e2p")


Told = list[tuple[Call, Event | Exception]]


class Worker:
    """The thread. All methods may be called from another one; what is told comes from this one.

    Args:
        limits: how much is done at once.
        tell: is given what has happened in a step.
    """

    def __init__(self, limits: Limits, tell: Callable[[Told], None]) -> None:
        self.limits, self.tell = limits, tell
        self.joined = True
        self.counts: Counter[str] = Counter()
        self.failures = 0  # requests that failed since an answer came to its end
        self.failed = -math.inf  # when, by the monotonic clock, the last one did
        self._backbone: FrozenBackbone
        self._rows: Rows
        self._vocabulary: Vocabulary
        self._ends: frozenset[int] = frozenset()
        self._answers: list[Answer] = []
        self._settings: RowSettings | None = None
        self._condition = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._started = self._open = self._given_up = False
        self._thread = threading.Thread(target=self._run, name="e2p-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from other threads

    @property
    def running(self) -> int:
        """Answers that are being continued."""
        return len(self._answers)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._open and self._thread.is_alive()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self._rows.lengths, default=0) if self._answers else 0

    def do(self, job: Callable[[], T]) -> Future[T]:
        """Something to be done between two steps, by the thread that owns the model."""
        future: Future[T] = Future()
        with self._condition:
            if self._given_up or not self._thread.is_alive():
                raise EngineError("the engine has stopped")
            self._jobs.append((future, job))
            self._condition.notify()
        return future

    def own(self, backbone: FrozenBackbone) -> None:
        """Take a backbone and be ready; a job for the thread itself."""
        self._backbone, self._vocabulary = backbone, Vocabulary(backbone.tokenizer)
        self._ends = frozenset(backbone.ends())
        self.joined = can_join(backbone)
        if not self.joined:
            _LOG.warning(
                "%s keeps more than keys and values, so every token reads its whole row anew: slow, but right",
                backbone.config.model_type,
            )
        self._rows = rows_of(backbone, self.joined)
        self._started = self._open = True

    def submit(self, call: Call) -> None:
        """A call to be answered.

        Raises:
            EngineBusyError: as many wait as may.
            EngineError: the engine is stopping.
        """
        with self._condition:
            if not self.alive:
                raise EngineError("expected an engine that runs, got one that is stopping or has stopped; ask another")
            if len(self._waiting) >= self.limits.waiting:
                raise EngineBusyError(
                    f"{len(self._waiting)} requests wait already, the most there may; try again later"
                )
            self._waiting.append(call)
            self._condition.notify()

    def cancel(self, call: Call) -> None:
        """Nobody listens to a call any more: its rows are free before the next step."""
        with self._condition:
            call.cancelled = True
            if call in self._waiting:
                self._waiting.remove(call)

    def close(self) -> None:
        """Take no more requests, and end when those that there are have been answered."""
        with self._condition:
            self._open = False
            self._condition.notify()

    def give_up(self) -> None:
        """End after the step that is being made; all that is unanswered fails."""
        with self._condition:
            self._open, self._given_up = False, True
            self._condition.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ the thread

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    while not (self._jobs or self._waiting or self._answers or self._given_up):
                        if self._started and not self._open:
                            return
                        self._condition.wait()
                    if self._given_up:
                        return
                    jobs = list(self._jobs)
                    self._jobs.clear()
                for future, job in jobs:
                    try:
                        future.set_result(job())
                    except Exception as error:  # is the asker's
                        future.set_exception(error)
                self._drop([place for place, answer in enumerate(self._answers) if answer.call.cancelled])
                self._admit()
                if self._answers:
                    self._step()
        except BaseException:
            _LOG.exception("the engine's thread has died")
        finally:
            self._end_all()

    def _end_all(self) -> None:
        with self._condition:
            self._open, self._given_up = False, True
            calls = {id(call): call for call in (*(a.call for a in self._answers), *self._waiting)}
            jobs = list(self._jobs)
            self._answers, self._settings = [], None
            self._waiting.clear()
            self._jobs.clear()
        for future, _ in jobs:
            future.set_exception(EngineError("the engine has stopped"))
        if calls:
            self.tell([(call, EngineError("the engine stopped before the answer's end")) for call in calls.values()])

    def _admit(self) -> None:
        """Read prompts that there is room for. None overtakes another, so none waits for ever."""
        taken: list[Call] = []
        rows = len(self._answers)
        longest = max((answer.call.longest for answer in self._answers), default=0)
        width = 0
        with self._condition:
            while self._waiting:
                call = self._waiting[0]
                more, far = rows + call.sampling.n, max(longest, call.longest)
                wide = max(width, len(call.prompt.ids) + call.prefix_tokens)
                if more > self.limits.rows or more * far > self.limits.cache_tokens:
                    break
                if taken and (len(taken) + 1) * wide > self.limits.prefill_tokens:
                    break
                rows, longest, width = more, far, wide
                taken.append(self._waiting.popleft())
        if taken:
            self._read(taken)

    def _read(self, calls: Sequence[Call]) -> None:
        try:
            readings = [Reading(call.prompt, call.at, call.prefix(), call.sampling.n) for call in calls]
            new = [Answer.of(call, i, self._vocabulary) for call in calls for i in range(call.sampling.n)]
            hidden = self._rows.read(readings)
        except Exception as error:
            if len(calls) == 1:
                if isinstance(error, RequestError):  # its own fault, which only the making of its soft tokens showed
                    self.tell([(calls[0], error)])
                else:
                    self._failed(calls, error)
                return
            hidden = None
        if hidden is None:  # one of them alone may be to blame
            for call in calls:
                self._read([call])
            return
        start = len(self._answers)
        self._answers += new
        self._settings = None
        self.counts["requests"] += len(calls)
        self.counts["prompt_tokens"] += sum(len(call.prompt.ids) for call in calls)
        told: Told = [(call, Started(len(call.prompt.ids), call.prefix_tokens, call.revision)) for call in calls]
        self._continue(start, hidden, told)

    def _step(self) -> None:
        try:
            hidden = self._rows.step([answer.last for answer in self._answers])
        except Exception as error:
            self._fail_from(0, error)
            return
        self.counts["steps"] += 1
        self._continue(0, hidden, [])

    def _continue(self, start: int, hidden: Tensor, told: Told) -> None:
        """Choose a token for each answer from ``start`` on, tell what it means, drop those at their end."""
        answers = self._answers[start:]
        try:
            settings = self._settings or RowSettings.of(answers, hidden.device)
            if start == 0:
                self._settings = settings
            with self._backbone.autocast():
                logits = self._backbone.head(hidden)
            tokens, logprobs, broken = choose(answers, logits, settings, self._vocabulary)
            ended = []
            for place, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
                if place in broken:
                    continue
                for event in answer.grow(token, logprobs.get(place), self._ends):
                    told.append((answer.call, event))
                    if isinstance(event, Finished):
                        ended.append(start + place)
                        self.counts["completion_tokens"] += event.tokens
        except Exception as error:
            self._fail_from(start, error)
            return
        if ended:
            self.failures = 0
        for place in broken:
            call = answers[place].call
            if not call.cancelled:
                call.cancelled = True  # its other rows go before the next step
                told.append((call, EngineError("the backbone's logits are not numbers; its weights may be broken")))
        self._drop([*ended, *(start + place for place in broken)])
        if told:
            self.tell(told)

    def _drop(self, gone: Sequence[int]) -> None:
        if gone:
            self._answers = [self._answers[old] for old in self._rows.drop(gone)]
            self._settings = None

    def _fail_from(self, start: int, error: Exception) -> None:
        """All answers from a place on fail, with all that belongs to their requests."""
        calls = {id(answer.call): answer.call for answer in self._answers[start:]}
        self._drop(range(start, len(self._answers)))
        self._failed(list(calls.values()), error)

    def _failed(self, calls: Sequence[Call], error: Exception) -> None:
        _LOG.error("failed: %d of the requests", len(calls), exc_info=error)
        self.failures, self.failed = self.failures + len(calls), time.monotonic()
        self.counts["failures"] += len(calls)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.tell([(call, EngineError(f"the engine failed on this request: {reason}")) for call in calls])
