"""One load of one series: its files and its questions, carried out as its machine wants them.

With `driver.py` the only place of a load that has a store, a gateway and a clock. The order among several loads, and how many
questions are out at once, is the driver's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ktrdr_pipelines.bars.restatement import refuse_restatement
from ktrdr_pipelines.domain.calls import Call, Costs, OverlappingWaits
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.domain.work_class import WorkClass
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
from ktrdr_pipelines.loading.in_flight import Question
from ktrdr_pipelines.loading.knowledge import NOTHING_HELD, HeldBars, Knowledge
from ktrdr_pipelines.loading.load_plan import load_span
from ktrdr_pipelines.loading.machine import LoadMachine
from ktrdr_pipelines.loading.report import Event, Failure, LoadReport
from ktrdr_pipelines.planning.coverage import widen
from ktrdr_pipelines.planning.modes import Held
from ktrdr_pipelines.store.locks import SeriesLock
from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.sidecar import FileMark, Pinned, Sidecar
from ktrdr_pipelines.store.splice import Comparison
from ktrdr_pipelines.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

HURRIED_S = 0.1
"""How long the end of an interrupted load waits for another process that writes its file."""


class Load:
    """One load of one series. `driver.drive` drives it; ``report`` is true at every moment in between."""

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
        resolve: Callable[[Held | None, datetime], Window] | None = None,
        work: WorkClass | None = None,
    ) -> None:
        """``window`` is what was asked for (its end may lie in the future). ``history`` is called once something has to be
        asked, not before. ``recheck_last``: if anything is asked at all, the last held bar is asked again (tail). ``resolve``:
        what ``window`` is for the held bars, when that is not known before the files are read. ``work``: the class of its
        requests; None: by the plan."""
        self.series, self.window = series, window
        self.report = report or LoadReport(series, window, merged_file=str(store.csv_path(series)))
        self.lock = SeriesLock(store.data_dir, series)
        self.work = work
        self._store, self._open_history, self._limits, self._now = store, history, limits, now
        self._recheck_last, self._resolve = recheck_last, resolve
        self._history: History | None = None
        self._pinned = series
        self._paced, self._retried = OverlappingWaits(), OverlappingWaits()
        self._machine: LoadMachine | None = None
        self._reach: Window | None = None
        self._file: FileMark | None = None
        """The CSV of which is known what it holds."""

    def open_machine(self) -> LoadMachine | None:
        """Read the files and plan; None when the window is empty. Asks nothing, unless a future was never loaded: IB reports when
        it expires, and years may lie after that.

        Raises:
            KtrdrError: what makes the load impossible before anything was asked (an unreadable file, no calendar, times that
                leave nothing).
        """
        now = self._now()
        if load_span(self.series, self.window) is None:
            return None
        self.report.notices += self._store.prepare(self.series, now=now).describe()
        sidecar = self._store.read_sidecar(self.series)
        if self._resolve is not None:
            self.window = self._resolve(Held.of(self._store.extent(self.series), sidecar), now)
            self.report.window = self.window
        span = load_span(self.series, self.window)
        if span is None:
            return None
        # A series that is refreshed whole needs all opens of its file.
        self._reach = None if self.series.instrument.refreshes_whole else widen(widen(span))
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
        self.work = self.work or self._machine.plan.work
        return self._machine

    def fail(self, error: KtrdrError) -> Failure:
        """The load could not begin."""
        failure = Failure(self.window, error.while_doing(f"loading {self.series} {self.window}"))
        self.report.failures.append(failure)
        self.report.status = "failed"
        return failure

    def close(self) -> None:
        """The load is over, or broken off: its files are as the next one wants them, and another load may begin."""
        with suppress(StoreError):  # the next load merges it
            self._store.merge_journal(self.series)
        self.lock.release()

    def hurry(self) -> None:
        """The program ends: nothing is worth a wait for another process any more."""
        self._store.limit_waits(HURRIED_S)

    @property
    def history(self) -> History | None:
        """Where its bars come from, once it was needed."""
        return self._history

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

    def step(self, actions: list[Action], ask: Callable[[Question], None]) -> Iterator[Event]:
        """Carry out ``actions`` and what follows from their results. Questions are given to ``ask``; their results come back
        through `answered`."""
        assert self._machine is not None
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Report):
                yield action.event
            elif isinstance(action, Write):
                queue.extend(self._machine.receive(action.episode, self._write_or_refuse(action)))
            elif isinstance(action, Remember):
                # Should that fail, the next load looks at more than it has to, and asks for what is missing anyway.
                with suppress(StoreError):
                    self._store.note_unfinished(
                        self.series, action.unfinished_from, action.unfinished_until, now=self._now()
                    )
            else:
                queue.extend(self._pass_on(action, ask))

    def _pass_on(self, action: Begin | Ask | AskHead, ask: Callable[[Question], None]) -> list[Action]:
        assert self._machine is not None
        call = Call(self.work or WorkClass.BACKFILL)
        if isinstance(action, Ask):
            ask(Question(self, action.episode, partial(self._fetch, action), call))
        elif isinstance(action, AskHead):
            ask(Question(self, action.episode, self._find_head, call))
        else:
            try:
                self._store.check_writable(self.series)
                self._history = self._open_history()
            except KtrdrError as error:
                return self._machine.begun(Refused(error))
            ask(Question(self, None, partial(self._pin, action), call))
        return []

    def answered(self, question: Question, result: object) -> list[Action]:
        """The ``result`` of a ``question``: the actions that follow from it."""
        assert self._machine is not None
        self.count(question.call.costs)
        if question.episode is not None:
            assert isinstance(result, Input)
            return self._machine.receive(question.episode, result)
        if isinstance(result, Refused):
            return self._machine.begun(result)
        assert isinstance(result, tuple)
        return self._machine.begun(self._begin(*result))

    def count(self, costs: Costs) -> None:
        """Add ``costs`` to the report."""
        self.report.ib_requests_made += costs.requests
        self.report.retries += costs.retries
        self.report.pacing_wait_s += self._paced.add(costs.paced)
        self.report.retry_wait_s += self._retried.add(costs.retried)

    # -- questions: in other threads than the rest --------------------------------------------------------------------

    def _pin(self, action: Begin, call: Call) -> tuple[Begin, Instrument]:
        return action, self._connected.pin(self.series.instrument, call)

    def _fetch(self, action: Ask, call: Call) -> Answered:
        history = self._connected
        sent_at_s: list[float] = []

        def on_sent(seconds: float) -> None:
            sent_at_s.append(time.monotonic())
            call.on_sent(seconds)

        call_it = replace(call, on_sent=on_sent, raises_time_out=action.may_shrink)
        answer = history.fetch(self._pinned, action.request, call_it)
        seconds = time.monotonic() - sent_at_s[-1] if sent_at_s else None
        return Answered(answer, self._now(), history.clock_lag_s, seconds)

    def _find_head(self, call: Call) -> HeadFound:
        return HeadFound(self._connected.find_head(self._pinned.instrument, call), self._now())

    # -- files --------------------------------------------------------------------------------------------------------

    def _begin(self, action: Begin, pinned: Instrument) -> Begun | Refused:
        try:
            self._pinned = Series(pinned, self.series.timeframe)
            self._store.check_identity(self._pinned, self._connected.source)
            found = self._store.note_unfinished(
                self.series, action.unfinished_from, action.unfinished_until, now=self._now()
            )
            # To connect may take a while: another program may have changed the file.
            held = self._read_held() if found.file != self._file else None
            self._file = found.file
        except KtrdrError as error:
            return Refused(error)
        return Begun(pinned, self._connected.clock_lag_s, held)

    def _write_or_refuse(self, action: Write) -> Stored | Refused:
        try:
            return self._write(action)
        except KtrdrError as error:
            return Refused(error, self._try_held())

    def _try_held(self) -> HeldBars | None:
        with suppress(KtrdrError):
            return self._read_held()
        return None

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
