"""The questions of loads that are out at IB: asked in threads, answered to the one thread that decides.

`InThreads` keeps several open at once. `OneByOne` asks in the calling thread, one at a time: no thread, no order but the given
one. Threads and not coroutines, because a question waits in more than one way (the wire, the ledger's file lock or database, a
retry), and all of them are blocking calls of libraries. `concurrent.futures` was tried for them: a pool cannot be left while one
of its threads hangs in a database, and Ctrl-C would wait for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ktrdr_pipelines.domain.calls import Call, Waiting
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.loading.actions import Refused

ENDS_WITHIN_S = 1.2
"""How long an interrupted program waits for its questions: they cancel their requests on the wire meanwhile."""
INTERRUPT_EVERY_S = 0.1


@dataclass(frozen=True, eq=False)
class Question:
    """``ask`` is called with ``call``; ``asker`` is whoever gets its result, ``episode`` for which purpose."""

    asker: Any
    episode: int | None
    ask: Callable[[Call], Any]
    call: Call


@dataclass(frozen=True, eq=False)
class Settled:
    """A question with its ``result``: what ``ask`` returned, or `Refused` for its KtrdrError."""

    question: Question
    result: Any


@dataclass(frozen=True, eq=False)
class Waits:
    """A question waits."""

    question: Question
    waiting: Waiting


@dataclass(frozen=True, eq=False)
class Step:
    """What a question does now, which ends within ``seconds``. ``is_sent``: IB has its request, and has to answer it."""

    question: Question
    what: str
    seconds: float
    is_sent: bool = False


Found = Settled | Waits | Step


class InFlight(Protocol):
    """Questions that are out, ``limit`` of them at most."""

    limit: int

    def __len__(self) -> int:
        """How many are out."""

    def submit(self, question: Question) -> None:
        """Ask. There must be fewer than ``limit`` out."""

    def take(self, timeout_s: float | None = None) -> Found | None:
        """The next result or what is known of a question; None when there is none within ``timeout_s``. Something must be out.

        Raises:
            Exception: whatever ``ask`` raised that is no KtrdrError: a bug.
        """

    def close(self, interrupt: Callable[[], None]) -> list[Question]:
        """End what is still out, with ``interrupt``, which may be called several times; returns those questions. Their costs are
        final then, but for a question that hangs in a database."""


class OneByOne:
    """Asks in `take`."""

    limit = 1

    def __init__(self, on_wait: Callable[[Question, Waiting], None]) -> None:
        """``on_wait`` is called while the question waits."""
        self._queue: deque[Question] = deque()
        self._on_wait = on_wait

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, question: Question) -> None:
        self._queue.append(question)

    def take(self, timeout_s: float | None = None) -> Found | None:  # noqa: ARG002 - there is nothing to wait for
        question = self._queue[0]
        call = replace(question.call, on_wait=lambda waiting: self._on_wait(question, waiting))
        try:
            result = question.ask(call)
        except KtrdrError as error:
            result = Refused(error)
        self._queue.popleft()
        return Settled(question, result)

    def close(self, interrupt: Callable[[], None]) -> list[Question]:  # noqa: ARG002 - an exception has ended it already
        open_ones = list(self._queue)
        self._queue.clear()
        return open_ones


class InThreads:
    """Asks in ``limit`` threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._outbox: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Found] = queue.SimpleQueue()
        self._open: dict[Question, None] = {}
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self._open)

    def submit(self, question: Question) -> None:
        if len(self._threads) < min(self.limit, len(self._open) + 1):
            # Daemons: one that hangs in a database does not keep the program from ending.
            thread = threading.Thread(target=self._work, name=f"ktrdr-request-{len(self._threads) + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._open[question] = None
        self._outbox.put(question)

    def _work(self) -> None:
        while (question := self._outbox.get()) is not None:
            self._inbox.put(Settled(question, self._result_of(question)))

    def _result_of(self, question: Question) -> Any:
        call = replace(
            question.call,
            on_wait=lambda waiting: self._inbox.put(Waits(question, waiting)),
            on_step=lambda what, seconds: self._inbox.put(Step(question, what, seconds)),
            on_sent=lambda seconds: self._inbox.put(Step(question, "IB's answer", seconds, is_sent=True)),
        )
        try:
            return question.ask(call)
        except KtrdrError as error:
            return Refused(error)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that takes it
            return error

    def take(self, timeout_s: float | None = None) -> Found | None:
        try:
            found = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, Settled):
            del self._open[found.question]
            if isinstance(found.result, BaseException):
                raise found.result
        return found

    def close(self, interrupt: Callable[[], None]) -> list[Question]:
        open_ones = list(self._open)
        for _ in self._threads:
            self._outbox.put(None)
        until = time.monotonic() + ENDS_WITHIN_S
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < until:
            if open_ones:
                interrupt()  # again and again: a question may have been between two waits
            for thread in self._threads:
                thread.join(INTERRUPT_EVERY_S / len(self._threads))
        self._open.clear()
        return open_ones
