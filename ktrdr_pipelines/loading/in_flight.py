"""The questions of loads that are out at IB: asked in threads, answered to the one thread that decides.

`InThreads` keeps several open at once. `OneByOne` asks in the calling thread, one at a time: no thread, no order but the given
one. Threads and not coroutines, because a question waits in more than one way (the wire, the ledger's file lock or database, a
retry), and all of them are blocking calls of libraries.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ktrdr_pipelines.domain.calls import Call, Waiting
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.loading.actions import Refused


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


class InFlight(Protocol):
    """Questions that are out, ``limit`` of them at most."""

    limit: int

    def __len__(self) -> int:
        """How many are out."""

    def submit(self, question: Question) -> None:
        """Ask. There must be fewer than ``limit`` out."""

    def take(self, timeout_s: float | None = None) -> Settled | Waits | None:
        """The next result or wait; None when there is none within ``timeout_s``. With nothing out this would wait for ever.

        Raises:
            Exception: whatever ``ask`` raised that is no KtrdrError: a bug.
        """

    def close(self, interrupt: Callable[[], None]) -> list[Question]:
        """End what is still out, with ``interrupt``; returns those questions. Their costs are final then."""


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

    def take(self, timeout_s: float | None = None) -> Settled | Waits | None:  # noqa: ARG002 - there is nothing to wait for
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
        self._threads = ThreadPoolExecutor(limit, thread_name_prefix="ktrdr-request")
        self._inbox: queue.SimpleQueue[Settled | Waits] = queue.SimpleQueue()
        self._open: dict[Question, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def submit(self, question: Question) -> None:
        self._open[question] = None
        self._threads.submit(self._run, question)

    def _run(self, question: Question) -> None:
        call = replace(question.call, on_wait=lambda waiting: self._inbox.put(Waits(question, waiting)))
        result: Any
        try:
            result = question.ask(call)
        except KtrdrError as error:
            result = Refused(error)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that takes it
            result = error
        self._inbox.put(Settled(question, result))

    def take(self, timeout_s: float | None = None) -> Settled | Waits | None:
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
        if open_ones:
            interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        return open_ones


def make_in_flight(limit: int, on_wait: Callable[[Question, Waiting], None]) -> InFlight:
    """Room for ``limit`` questions. ``on_wait`` is for waits while the calling thread itself is busy asking."""
    return InThreads(limit) if limit > 1 else OneByOne(on_wait)
