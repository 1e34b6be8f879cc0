"""Drive several loads at once: which one asks next, how many questions are out, and an end in good order.

The loads (`series_load.py`) carry out what their machines want; results come back to this one thread, so that the files of a
load are written by one thread. Loads take turns, so that the rule for one contract does not hold up a run of several
(docs/ib_facts.md, 6).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.loading.actions import Action
from ktrdr_pipelines.loading.history_source import History
from ktrdr_pipelines.loading.in_flight import InFlight, InThreads, OneByOne, Question, Settled, Step, Waits
from ktrdr_pipelines.loading.load_plan import FEW_REQUESTS
from ktrdr_pipelines.loading.machine import LoadMachine
from ktrdr_pipelines.loading.report import Ended, Event
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.loading.unanswered import Unanswered

POLL_S = 0.2
"""How often it looks whether another load of a waiting series is over, and what has been silent for long."""

IN_TURN = 6
"""So many loads take turns, even if only one question is out at a time."""

OnWait = Callable[[Load, Waiting], None]


def drive(
    loads: Sequence[Load],
    *,
    open_requests: int | None = None,
    on_wait: OnWait = lambda _load, _waiting: None,
    on_idle: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Load, Event]]:
    """Run ``loads`` with ``open_requests`` questions out at most; each event with its load, `Ended` as the last one of each.

    None: one question at a time, in this thread. Loads that are broken off (the caller stops iterating, or is interrupted) end
    their open requests, keep what is in the files and remember what is unfinished. ``on_wait`` is called when a load waits for
    longer than a moment, for another load of its series too: within two seconds. ``on_idle`` is called before each wait for an
    answer, every two seconds at least.
    """
    yield from _Drive(loads, open_requests, on_wait, on_idle).run()


class _Drive:
    def __init__(
        self, loads: Sequence[Load], open_requests: int | None, on_wait: OnWait, on_idle: Callable[[], None]
    ) -> None:
        self._waiting = deque(loads)
        self._active: deque[tuple[Load, LoadMachine]] = deque()
        self._on_wait, self._on_idle = on_wait, on_idle
        self._reported: set[Load] = set()
        self._few_left = FEW_REQUESTS
        self._histories: dict[int, History] = {}
        """Those that were asked something."""
        self._unanswered: Unanswered[Load] = Unanswered(time.monotonic)
        self._in_flight: InFlight = OneByOne(self._show_wait) if open_requests is None else InThreads(open_requests)

    def run(self) -> Iterator[tuple[Load, Event]]:
        try:
            while self._waiting or self._active:
                yield from self._open_loads()
                yield from self._ask()
                yield from self._end_loads()
                yield from self._take()
        finally:
            self._break_off()

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open_loads(self) -> Iterator[tuple[Load, Event]]:
        """Open as many loads as can have a question out; those whose series another process loads wait behind the others."""
        for _ in range(len(self._waiting)):
            if not self._has_room:
                return
            load = self._waiting.popleft()
            try:
                if holder := load.lock.try_acquire():
                    self._wait_for(load, holder)
                    continue
                machine = load.open_machine()
            except KtrdrError as error:
                yield load, load.fail(error)
                machine = None
            except BaseException:  # interrupted: a notebook keeps the load in its traceback, and the lock with it
                load.close()
                raise
            if machine is None:
                load.close()
                yield load, Ended()
                continue
            self._classify(load, machine)
            self._active.append((load, machine))
            yield from self._step(load, machine.start())

    @property
    def _has_room(self) -> bool:
        """Whether another load may be opened."""
        return len(self._active) < max(self._in_flight.limit, IN_TURN)

    def _wait_for(self, load: Load, holder: str) -> None:
        self._waiting.append(load)
        if load not in self._reported:
            self._reported.add(load)
            self._on_wait(load, Waiting(holder, inf, None))

    def _classify(self, load: Load, machine: LoadMachine) -> None:
        """Many small loads in one run are no small work."""
        if load.work is WorkClass.INTERACTIVE:
            self._few_left -= len(machine.plan.requests)
            if self._few_left < 0:
                load.work = WorkClass.BACKFILL

    # -- asking -------------------------------------------------------------------------------------------------------

    def _ask(self) -> Iterator[tuple[Load, Event]]:
        """Open requests, load by load in turn, while there is room. Answers that wait for an earlier one take room too."""
        limit = self._in_flight.limit
        is_idle = 0
        while is_idle < len(self._active) and len(self._in_flight) < limit and self._count_open() < 2 * limit:
            load, machine = self._active[0]
            self._active.rotate(-1)
            actions = machine.open_next() if machine.open_requests < limit else []
            is_idle = 0 if actions else is_idle + 1
            yield from self._step(load, actions)

    def _count_open(self) -> int:
        return sum(machine.open_requests for _, machine in self._active)

    def _end_loads(self) -> Iterator[tuple[Load, Event]]:
        for load, machine in [each for each in self._active if each[1].is_over]:
            yield from self._step(load, machine.finish())
            self._active.remove((load, machine))
            load.close()
            yield load, Ended()

    def _step(self, load: Load, actions: list[Action]) -> Iterator[tuple[Load, Event]]:
        for event in load.step(actions, self._submit):
            yield load, event

    def _submit(self, question: Question) -> None:
        history = question.asker.history
        self._histories[id(history)] = history
        self._in_flight.submit(question)

    # -- results ------------------------------------------------------------------------------------------------------

    def _take(self) -> Iterator[tuple[Load, Event]]:
        """Wait for the next result, and for the end of other loads of the waiting series."""
        is_blocked = bool(self._waiting) and self._has_room
        self._on_idle()
        if not len(self._in_flight):
            if is_blocked and not self._active:
                time.sleep(POLL_S)
            return
        found = self._in_flight.take(POLL_S)
        if isinstance(found, Waits):
            self._show_wait(found.question, found.waiting)
        elif isinstance(found, Step):
            asker: Load = found.question.asker
            self._unanswered.begin(found.question, asker, found.what, found.seconds, is_sent=found.is_sent)
        elif isinstance(found, Settled):
            load: Load = found.question.asker
            self._unanswered.end(found.question, load)
            if any(load is active for active, _ in self._active):
                yield from self._step(load, load.answered(found.question, found.result))
            else:  # given up when its load failed, and sent before
                load.count(found.question.call.costs)
        for silent, waiting in self._unanswered.silent(_outage_of):
            self._on_wait(silent, waiting)

    def _show_wait(self, question: Question, waiting: Waiting) -> None:
        if self._unanswered.wait(question, question.asker, waiting):
            self._on_wait(question.asker, waiting)

    def _break_off(self) -> None:
        """End what is still out, and remember what the loads owe. After a regular end nothing is left to do."""
        for question in self._in_flight.close(self._interrupt):
            question.asker.count(question.call.costs)
        for history in self._histories.values():
            history.resume()
        for load, machine in self._active:
            load.hurry()
            deque(load.step(machine.finish(is_broken_off=True), lambda _question: None), maxlen=0)
            load.close()

    def _interrupt(self) -> None:
        for history in self._histories.values():
            history.interrupt()


def _outage_of(load: Load) -> str:
    return load.history.outage if load.history is not None else ""
