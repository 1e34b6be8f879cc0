"""Carry out what load machines want: the only place of a load that has a store, a gateway and a clock.

One request is out at a time. Several loads take turns, request by request, over one history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.restatement import refuse_restatement
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import BugError, KtrdrError, StoreError
from ktrdr_pipelines.loading.actions import (
    Action,
    Answered,
    Ask,
    AskHead,
    Begin,
    Begun,
    HeadFound,
    Input,
    Refused,
    Remember,
    Report,
    Stored,
    Write,
)
from ktrdr_pipelines.loading.history_source import History
from ktrdr_pipelines.loading.knowledge import NOTHING_HELD, HeldBars, Knowledge
from ktrdr_pipelines.loading.load_plan import load_span
from ktrdr_pipelines.loading.machine import LoadMachine
from ktrdr_pipelines.loading.report import Event, LoadReport
from ktrdr_pipelines.planning.coverage import widen
from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.sidecar import FileMark, Pinned, Sidecar
from ktrdr_pipelines.store.splice import Comparison
from ktrdr_pipelines.store.store import Store


class Load:
    """One load of one series. Iterate over `run` to drive it; `report` is true at every moment in between."""

    def __init__(
        self,
        series: Series,
        window: Window,
        *,
        store: Store,
        history: Callable[[], History],
        limits: HistoryLimits,
        now: Callable[[], datetime],
        recheck_last: bool = False,
        report: LoadReport | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        """``window`` is what was asked for (its end may lie in the future). ``history`` is called once something has to be
        asked, not before. ``recheck_last``: if anything is asked at all, the last held bar is asked again (tail).
        ``prepared``: the result of `Store.prepare`, from a caller that prepared the files and reported what was corrected."""
        self.series, self.window = series, window
        self.report = report or LoadReport(series, window, merged_file=str(store.csv_path(series)))
        self._store, self._open_history, self._limits, self._now = store, history, limits, now
        self._recheck_last, self._prepared = recheck_last, prepared
        self._history: History | None = None
        self._pinned = series
        self._machine: LoadMachine | None = None
        self._reach: Window | None = None
        self._file: FileMark | None = None
        """The CSV of which is known what it holds."""

    def run(self) -> Iterator[Event]:
        """Drive the load, event by event. A window that fails is an event.

        Raises:
            KtrdrError: what makes the whole load impossible before anything was asked (an unreadable file, no calendar).
        """
        yield from drive([self])

    def open_machine(self) -> LoadMachine | None:
        """Read the files and plan; None when the window is empty. Asks nothing, unless a future was never loaded: IB reports when
        it expires, and years may lie after that.

        Raises:
            KtrdrError: as `run`.
        """
        now = self._now()
        span = load_span(self.series, self.window)
        if span is None:
            return None
        if self._prepared is None:
            self._prepared = self._store.prepare(self.series, now=now)
            self.report.notices += self._prepared.describe()
        # A series that is refreshed whole needs all opens of its file.
        self._reach = None if self.series.instrument.refreshes_whole else widen(widen(span))
        sidecar = self._store.read_sidecar(self.series)
        held, self._file = self._read_held(), sidecar.file
        self.report.cached_before = not held.is_empty
        if held.is_empty and self.series.instrument.sec_type == "FUT":
            sidecar = self._learn_expiry(sidecar)
        self._machine = LoadMachine(
            self.series,
            self.window,
            Knowledge(self.series.timeframe, held, sidecar),
            self._limits,
            now=now,
            report=self.report,
            recheck_last=self._recheck_last,
        )
        return self._machine

    def _read_held(self) -> HeldBars:
        extent = self._store.extent(self.series)
        if extent is None:
            return NOTHING_HELD
        opens = self._store.held_opens(self.series, self._reach)
        return HeldBars(opens, extent.first_open_s, extent.last_open_s)

    def _learn_expiry(self, sidecar: Sidecar) -> Sidecar:
        with suppress(KtrdrError):  # the request for bars meets it again, and reports it
            pinned = self._open_history().pin(self.series.instrument)
            return sidecar.model_copy(update={"instrument": Pinned.of(pinned)})
        return sidecar

    # -- actions ------------------------------------------------------------------------------------------------------

    def step(self, actions: list[Action]) -> Iterator[Event]:
        """Carry out ``actions`` and all that follows from their results."""
        assert self._machine is not None
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Report):
                yield action.event
            elif isinstance(action, Begin):
                queue.extend(self._machine.begun(self._begin(action)))
            elif isinstance(action, Remember):
                # Should that fail, the next load looks at more than it has to, and asks for what is missing anyway.
                with suppress(StoreError):
                    self._store.note_unfinished(
                        self.series, action.unfinished_from, action.unfinished_until, now=self._now()
                    )
            else:
                queue.extend(self._machine.receive(action.episode, self._carry_out(action)))

    def _begin(self, action: Begin) -> Begun | Refused:
        try:
            self._store.check_writable(self.series)
            history = self._history = self._open_history()
            with self._counting(history):
                pinned = history.pin(self.series.instrument)
            self._pinned = Series(pinned, self.series.timeframe)
            self._store.check_identity(self._pinned, history.source)
            found = self._store.note_unfinished(
                self.series, action.unfinished_from, action.unfinished_until, now=self._now()
            )
            # To connect may take a while: another program may have changed the file.
            held = self._read_held() if found.file != self._file else None
            self._file = found.file
        except KtrdrError as error:
            return Refused(error)
        return Begun(pinned, history.clock_lag_s, held)

    def _carry_out(self, action: Ask | AskHead | Write) -> Input:
        try:
            if isinstance(action, Ask):
                return self._ask(action)
            return self._ask_head() if isinstance(action, AskHead) else self._write(action)
        except KtrdrError as error:
            return Refused(error, self._try_held() if isinstance(action, Write) else None)

    def _try_held(self) -> HeldBars | None:
        with suppress(KtrdrError):
            return self._read_held()
        return None

    def _ask(self, action: Ask) -> Answered:
        history = self._connected
        with self._counting(history):
            answer = history.fetch(self._pinned, action.request)
        return Answered(answer, self._now(), history.clock_lag_s)

    def _ask_head(self) -> HeadFound:
        history = self._connected
        with self._counting(history):
            head = history.find_head(self._pinned.instrument)
        return HeadFound(head, self._now())

    def _write(self, action: Write) -> Stored:
        claims = action.claims
        written = self._store.write(
            self._pinned,
            action.bars,
            asked=action.window,
            answered=claims.answered if claims else None,
            proven_empty=claims.absent if claims else (),
            complete_until=claims.complete_until if claims else None,
            history_start=claims.history_start if claims else None,
            sparse=claims.sparse if claims else None,
            compare=self._comparison(action),
            source=self._connected.source,
            now=self._now(),
            whole=action.whole,
            is_known=lambda found: found == self._file,
        )
        first = written.revised_to["timestamp"].iloc[0].to_pydatetime() if written.rows_revised else None
        stored = Stored(written.rows_added, written.rows_revised, first, written.sidecar)
        was_known = written.found == self._file and written.prepared == Prepared()
        self._file = written.sidecar.file
        if was_known and self._store.is_unchanged(written):
            return stored
        # Another program changed the file: what is held is read again.
        sidecar = self._store.read_sidecar(self._pinned)
        return replace(stored, sidecar=sidecar, held=self._read_held())

    def _comparison(self, action: Write) -> Comparison | None:
        """The held bars that show whether the compared answers are on the file's price scale."""
        answers = action.compared
        if not answers:
            return None
        doing = f"loading {self._pinned} {action.window}"

        def check(held: pd.DataFrame) -> None:
            for answer in answers:
                refuse_restatement(self._pinned, held, answer, doing)

        first_s = min(int(np.min(answer.opens_s)) for answer in answers)
        return Comparison(first_s, max(int(np.max(answer.opens_s)) for answer in answers), check)

    @property
    def _connected(self) -> History:
        if self._history is None:
            raise BugError(f"a request of the load of {self.series} before it has begun")
        return self._history

    @contextmanager
    def _counting(self, history: History) -> Iterator[None]:
        """Add what ``history`` does meanwhile to the report of this load: others may use the same history."""
        before = _counts(history)
        try:
            yield
        finally:
            made, retries, paced_s, waited_s = (now - was for now, was in zip(_counts(history), before, strict=True))
            self.report.ib_requests_made += int(made)
            self.report.retries += int(retries)
            self.report.pacing_wait_s += paced_s
            self.report.retry_wait_s += waited_s


def _counts(history: History) -> tuple[int, int, float, float]:
    return history.requests_made, history.retries, history.pacing_wait_s, history.retry_wait_s


def drive(loads: Sequence[Load]) -> Iterator[Event]:
    """Run ``loads``, which take turns request by request. A load that is broken off remembers what is unfinished.

    Raises:
        KtrdrError: as `Load.run`.
    """
    active: deque[tuple[Load, LoadMachine]] = deque()
    try:
        for load in loads:
            machine = load.open_machine()
            if machine is not None:
                active.append((load, machine))
                yield from load.step(machine.start())
        while active:
            load, machine = active[0]
            actions = machine.open_next()
            if actions:
                yield from load.step(actions)
                active.rotate(-1)
            else:
                active.popleft()
                yield from load.step(machine.finish())
    finally:
        for load, machine in active:
            deque(load.step(machine.finish(is_broken_off=True)), maxlen=0)
