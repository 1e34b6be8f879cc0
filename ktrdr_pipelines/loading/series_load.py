"""The use case: plan, fetch, verify, write, report. Every door ends here, by way of the assets.

What is missing and how to ask is decided in `planning/requests.py`, how bars are judged in `bars/schema.py`, how they are
kept in `store/`, how IB is asked (pacing, retries, connection) in `ib/history.py`, how one request is settled in
`asking.py`. Here is only the order of things:

1. expected bar opens up to the last complete bar, minus held, minus proven empty: missing; nothing missing, nothing asked
2. the fewest requests for what is missing
3. each answer is cut, checked and written before the next request, so that an interruption loses one request at most
4. an expected bar that an answer lacks is asked for again, in another shape; a hole is proven empty only if no gateway that
   cuts all its answers alike could have hidden it (`evidence.py`), or an answer and the head timestamp agree
5. a failed window does not stop the others; at the end all failures are listed
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.bars.restatement import BARS_TO_SHOW_A_ROLL, RESTATED_KINDS, ScaleChanged, list_anchors
from ktrdr_pipelines.calendars import ExpectedBars, expected_bars, find_unexpected, match_held
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import (
    DataError,
    GatewayUnreachable,
    KtrdrError,
    PermanentError,
    StoreError,
    TransientError,
)
from ktrdr_pipelines.loading.asking import Asker, Loaded
from ktrdr_pipelines.loading.history_source import History
from ktrdr_pipelines.loading.refreshing import WholeAsker
from ktrdr_pipelines.loading.report import Completed, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.planning.coverage import bars_inside, mark_missing, owed_from, owed_until, widen
from ktrdr_pipelines.planning.open_ended import plan_to_now
from ktrdr_pipelines.planning.requests import Request, find_gaps, plan_requests
from ktrdr_pipelines.store.sidecar import Pinned, Sidecar
from ktrdr_pipelines.store.store import Store

SCALE_TRUSTED = timedelta(hours=18)
"""So long after the last write of a file its bars count as being on the scale of IB's answers."""


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
    ) -> None:
        """``window`` is what was asked for (its end may lie in the future). ``history`` is called once something has to be
        asked, not before. ``recheck_last``: if anything is asked at all, the last held bar is asked again (tail)."""
        self.series, self.window = series, window
        self._store, self._limits, self._now = store, limits, now
        self._open_history = history
        self._recheck_last = recheck_last
        self._history: History | None = None
        self._counted = (0, 0, 0.0, 0.0)
        self._reported: set[str] = set()
        self._history_start_is_new = False
        self.report = report or LoadReport(series, window, merged_file=str(store.csv_path(series)))

    def run(self) -> Iterator[Event]:
        """Drive the load, event by event. A window that fails is an event.

        Raises:
            KtrdrError: what makes the whole load impossible before anything was asked (an unreadable file, no calendar).
        """
        partitions = list(partitions_in(self.series.timeframe, self.window))
        if not partitions:
            return
        # Completeness is judged by whole partitions, even if less of them was asked for.
        span = Window(partitions[0].window.start, partitions[-1].window.end)
        self._span = span
        self._now_s = int(self._now().timestamp())
        self._anchor_s: int | None = None
        self._settle_files()
        if self.series.instrument.refreshes_whole:
            self._span = span = self._widen_to_all(span)
        # Bars that are not complete yet tell which bars of an answer are still forming; only complete ones are asked for.
        self._all_expected = expected_bars(self.series, widen(span))
        self._expected = expected_bars(self.series, span, complete_at_s=self._now_s)
        self._is_missing = self._find_missing(span)
        asked = bars_inside(self._expected.take(np.flatnonzero(self._is_missing)), self.window)
        gaps = find_gaps(self._expected, asked)
        unreachable = None
        if not self.series.instrument.ends_now:
            requests = self._plan(asked)
        else:
            requests, unreachable = self._plan_to_now(asked)
        self.report.gaps_analyzed, self.report.requests_planned = len(gaps), len(requests)
        yield Planned(gaps, requests)
        for partition in partitions:
            yield from self._report_if_complete(partition)
        if unreachable is not None:
            yield unreachable
        if requests:
            try:
                yield from self._fetch_all(requests, partitions)
            finally:
                self._finish()
        elif unreachable is not None:
            self._finish()
        else:
            self._settle_unfinished()

    # -- what is missing --------------------------------------------------------------------------------------------

    def _settle_files(self) -> None:
        """Adopt a foreign or edited file before it is counted, and say so."""
        prepared = self._store.prepare(self.series, now=self._now())
        self.report.notices += prepared.describe()
        self.report.cached_before = self._store.extent(self.series) is not None

    def _find_missing(self, span: Window) -> npt.NDArray[np.bool_]:
        """For each expected bar: is it neither held nor known to be empty?"""
        held = self._store.held_opens(self.series, widen(span))
        sidecar, extent = self._store.read_sidecar(self.series), self._store.extent(self.series)
        first_held_s = extent.first_open_s if extent else None
        if extent is None and self.series.instrument.sec_type == "FUT":
            sidecar = self._learn_expiry(sidecar)
        return mark_missing(self._expected, held, sidecar, first_held_s, self.series.timeframe)

    def _learn_expiry(self, sidecar: Sidecar) -> Sidecar:
        """``sidecar`` as it will be once IB has said when a future that was never loaded expires: years may lie after that."""
        with suppress(KtrdrError):  # who asks for the bars meets it again, and tells
            pinned = self._open_history().pin(self.series.instrument)
            return sidecar.model_copy(update={"instrument": Pinned.of(pinned)})
        return sidecar

    def _indexes(self, window: Window) -> slice:
        """Where the expected bars that open in ``window`` stand."""
        lo, hi = np.searchsorted(self._expected.opens, [window.start_s, window.end_s])
        return slice(int(lo), int(hi))

    def _with_last_held(self, asked: ExpectedBars) -> ExpectedBars:
        """``asked`` and the last held bar, when the load continues after it: a bar that was stored a moment too early, or
        revised since, would otherwise stay wrong for ever."""
        extent = self._store.extent(self.series)
        if not self._recheck_last or extent is None or not len(asked) or asked.opens[0] < extent.last_open_s:
            return asked
        wanted = np.isin(self._expected.opens, asked.opens) | (self._expected.opens == extent.last_open_s)
        return self._expected.take(np.flatnonzero(wanted))

    def _plan(self, asked: ExpectedBars) -> list[Request]:
        """The fewest requests for ``asked``, with a held bar in the first of them that shows whether the file is still on the
        scale of IB's answers (`bars/restatement.py`). It may cost a request only where the file was not written for most of
        a day: splits come overnight."""
        now = self._now()

        def plan(bars: ExpectedBars, expected: ExpectedBars) -> list[Request]:
            within = Window(self.window.start, max(self.window.start, min(self.window.end, now)))
            return plan_requests(self.series.timeframe, bars, self._limits, expected=expected, within=within)

        requests = plan(self._with_last_held(asked), self._expected)
        extent = self._store.extent(self.series)
        if self.series.instrument.sec_type not in RESTATED_KINDS or extent is None or not len(asked):
            return requests
        known = self._all_expected.take(self._all_expected.closes <= self._now_s)
        if any(r.window.start_s <= extent.last_open_s < r.window.end_s for r in requests[:1]):
            return requests  # the last held bar is asked for again anyway
        held = self._store.held_opens(self.series, widen(self._span))
        written_at = self._store.read_sidecar(self.series).updated_at
        is_old = written_at is not None and now - written_at > SCALE_TRUSTED
        found = []
        for anchor_s in known.opens[list_anchors(known, asked, held, self.series.timeframe)[:4]].tolist():
            anchored = plan(known.take(np.isin(known.opens, [*asked.opens, anchor_s])), known)
            found.append((len(anchored), anchor_s, anchored))
        if not found or (min(found)[0] > len(requests) and not is_old):
            return requests
        _, self._anchor_s, anchored = min(found, key=lambda each: each[0])
        at = datetime.fromtimestamp(self._anchor_s, UTC)
        return sorted(anchored, key=lambda request: not request.window.contains(at))

    def _widen_to_all(self, span: Window) -> Window:
        """``span`` and everything held: a series that is refreshed whole has no smaller part."""
        extent = self._store.extent(self.series)
        first_s = span.start_s if extent is None else min(span.start_s, extent.first_open_s)
        return Window.from_epoch(first_s, max(span.end_s, self._now_s))

    def _plan_to_now(self, asked: ExpectedBars) -> tuple[list[Request], Failure | None]:
        """One request for ``asked`` up to now, and what it cannot reach. Of a series that is refreshed whole it has to reach the
        first held bar, or nothing is asked for."""
        wanted, extent = self._with_last_held(asked), self._store.extent(self.series)
        if len(asked) and self.series.instrument.refreshes_whole:
            first_s = min(int(asked.opens[0]), extent.first_open_s) if extent else int(asked.opens[0])
            wanted = self._expected.take(self._expected.opens >= first_s)
        if not len(wanted):
            return [], None
        compared = self._with_bars_to_compare(wanted)
        planned = plan_to_now(self.series, compared, self._limits, self._now_s)
        if len(planned.unreachable) and len(compared) > len(wanted):
            planned = plan_to_now(self.series, wanted, self._limits, self._now_s)
        requests = [] if planned.request is None else [planned.request]
        if not len(planned.unreachable):
            return requests, None
        lost = find_gaps(wanted, planned.unreachable)
        window = Window(lost[0].window.start, lost[-1].window.end)
        what = self.series.instrument
        kind = "adjusted prices" if what.refreshes_whole else "a continuous future"
        error = PermanentError(
            f"IB tells {kind} only up to now, in one request, which reaches back to "
            f"{format_instant(window.end)} at most: {len(planned.unreachable)} older bars cannot be had",
            advice="Give a later --start.",
        )
        if extent is not None and what.refreshes_whole and extent.first_open_s < window.end_s:
            requests = []
            error.advice = (
                "Held bars and new ones do not go together, so the file was left as it is. Move it away to begin anew with "
                "what one request brings."
            )
        return requests, self._fail(window, error)

    def _with_bars_to_compare(self, wanted: ExpectedBars) -> ExpectedBars:
        """``wanted`` and the held bars right before it, as many as have to agree that a continuous future was restated."""
        known = self._all_expected.take(self._all_expected.closes <= self._now_s)
        held = match_held(known, self._store.held_opens(self.series, widen(self._span)), self.series.timeframe)
        older = known.opens[held & (known.opens < wanted.opens[0])][-BARS_TO_SHOW_A_ROLL:]
        return known.take(np.isin(known.opens, [*wanted.opens, *older]))

    def _report_touched(self, request: Request, rows: int, partitions: Sequence[Partition]) -> Iterator[Event]:
        """Report the partitions that ``request`` completed, and those complete before whose bars it changed; all that are
        still open when it showed where history starts."""
        first = bisect_right(partitions, request.window.start, key=lambda p: p.window.end)
        last = bisect_left(partitions, request.window.end, key=lambda p: p.window.start)
        if self._history_start_is_new:
            self._history_start_is_new, first = False, 0
        for partition in partitions[first:last]:
            common = partition.window.intersect(request.window)
            if rows and common is not None and len(bars_inside(self._expected, common)):
                self._reported.discard(partition.key)
            if partition.key not in self._reported:
                yield from self._report_if_complete(partition)

    def _report_if_complete(self, partition: Partition) -> Iterator[Event]:
        mine = self._indexes(partition.window)
        if not self._is_missing[mine].any():
            completed = self._describe(partition, self._expected.take(mine))
            self._reported.add(partition.key)
            self.report.completed[partition.key] = completed
            self._count_requests()
            yield completed

    def _describe(self, partition: Partition, expected: ExpectedBars) -> Completed:
        held = self._store.held_opens(self.series, partition.window)
        around = self._store.held_opens(self.series, widen(partition.window))
        return Completed(
            partition=partition,
            rows=len(held),
            first_open=datetime.fromtimestamp(int(held[0]), UTC) if len(held) else None,
            last_open=datetime.fromtimestamp(int(held[-1]), UTC) if len(held) else None,
            is_unfinished=partition.window.end_s > self._now_s,
            proven_empty=int((~match_held(expected, around, self.series.timeframe)).sum()),
            unexpected=int(find_unexpected(expected, held, self.series.timeframe).sum()),
        )

    # -- asking -----------------------------------------------------------------------------------------------------

    def _fetch_all(self, requests: Sequence[Request], partitions: Sequence[Partition]) -> Iterator[Event]:
        everything = Window(requests[0].window.start, requests[-1].window.end)
        try:
            self._store.check_writable(self.series)
            history = self._history = self._open_history()
            self._counted = _counts(history)
            pinned = Series(history.pin(self.series.instrument), self.series.timeframe)
            self._store.check_identity(pinned, history.source)
            self._note_unfinished(requests)
        except KtrdrError as error:
            yield self._fail(everything, error)
            return
        asker = (WholeAsker if self.series.instrument.refreshes_whole else Asker)(
            pinned,
            store=self._store,
            history=history,
            limits=self._limits,
            now=self._now,
            now_s=self._now_s,
            expected=self._expected,
            all_expected=self._all_expected,
            report=self.report,
        )
        waiting = deque(requests)
        skipped: deque[Request] = deque()  # wholly before IB's head timestamp, oldest first
        done = 0
        pending: list[ExpectedBars] = []
        while waiting or skipped:
            # What was skipped needs asking after all when the start of history could not be shown to lie later.
            request = waiting.popleft() if waiting else skipped.pop()
            if not self._lacks(request):
                done += 1
                yield Fetched(request, 0, done, len(requests))
                yield from self._report_touched(request, 0, partitions)
                continue
            try:
                loaded = asker.load(request, may_put_off=bool(waiting))
            except KtrdrError as error:
                self._count_what_arrived(request.window, asker)
                if _concerns_all(error):
                    yield self._fail(Window(request.window.start, everything.end), error)
                    return
                yield self._fail(request.window, error)
                yield from self._report_touched(request, 0, partitions)
                continue
            self._count_requests()
            if loaded.is_put_off:
                skipped.append(request)
            else:
                done += 1
                self.report.segments_fetched += 1
                self._mark_known(request, loaded)
                pending += [loaded.pending] if loaded.pending is not None and len(loaded.pending) else []
                yield Fetched(request, loaded.rows, done, len(requests))
                yield from self._report_touched(request, loaded.rows, partitions)
            if (head := asker.head) is not None and self._store.extent(self.series) is None:
                skipped += [r for r in waiting if r.window.end <= head]
                waiting = deque(r for r in waiting if r.window.end > head)
        for bars in pending:
            yield from self._look_again(bars, asker, partitions)
            still = bars.take(np.isin(bars.opens, self._expected.opens[self._is_missing]))
            self.report.notices += [asker.describe_pending(still)] if len(still) else []
        if (held_back := asker.find_held_back()) is not None:
            yield self._fail(Window(requests[-1].window.start, everything.end), held_back)

    def _look_again(self, pending: ExpectedBars, asker: Asker, partitions: Sequence[Partition]) -> Iterator[Event]:
        """Bars that were the newest when they were asked for and are not any more: those after them can show now whether they
        exist."""
        extent = self._store.extent(self.series)
        if extent is None or extent.last_open_s < pending.opens[-1] or self.series.instrument.ends_now:
            return
        for request in plan_requests(self.series.timeframe, pending, self._limits):
            try:
                loaded = asker.load(request, may_put_off=False)
            except KtrdrError as error:
                self._count_what_arrived(request.window, asker)
                yield self._fail(request.window, error)
                continue
            finally:
                self._count_requests()
            self._mark_known(request, loaded)
            yield from self._report_touched(request, loaded.rows, partitions)

    def _lacks(self, request: Request) -> bool:
        """False if what ``request`` was planned for is known by now (it lies before the start of history)."""
        extent = self._store.extent(self.series)
        is_recheck = extent is not None and request.window.start_s <= extent.last_open_s < request.window.end_s
        is_recheck |= self._anchor_s is not None and request.window.contains(
            datetime.fromtimestamp(self._anchor_s, UTC)
        )
        return is_recheck or bool(self._is_missing[self._indexes(request.window)].any())

    def _fail(self, window: Window, error: KtrdrError) -> Failure:
        doing = f"loading {self.series} {window}"
        if str(self.series) not in error.doing:
            error.doing = f"{doing}: {error.doing}" if error.doing else doing
        failure = Failure(window, error)
        self.report.failures.append(failure)
        return failure

    def _mark_known(self, request: Request, loaded: Loaded) -> None:
        """Everything of a settled request is held or proven now, but for bars that may only be late."""
        self._is_missing[self._indexes(request.window)] = False
        if loaded.pending is not None:
            self._is_missing |= np.isin(self._expected.opens, loaded.pending.opens)
        if loaded.history_start_s is not None:
            self._is_missing &= self._expected.opens >= loaded.history_start_s
            self._history_start_is_new = True

    def _count_what_arrived(self, window: Window, asker: Asker) -> None:
        """After a failure in the middle of a window: what is in the file is not missing any more."""
        mine = self._indexes(window)
        still = asker.find_holes(self._expected.take(mine))
        self._is_missing[mine] &= np.isin(self._expected.opens[mine], still.opens)

    # -- what is left for the next load --------------------------------------------------------------------------------

    def _note_unfinished(self, requests: Sequence[Request]) -> None:
        """Before anything is written: should this load fail or be killed half way, newer bars may be held than some it owes. The
        next tail or backfill would then pass over them."""
        extent, sidecar = self._store.extent(self.series), self._store.read_sidecar(self.series)
        newer = [r.window.start for r in requests if extent is None or r.window.end_s > extent.last_open_s]
        older = [r.window.end for r in requests if extent is not None and r.window.start_s < extent.first_open_s]
        since = min([*newer, *filter(None, [sidecar.unfinished_from])], default=None)
        until = max([*older, *filter(None, [sidecar.unfinished_until])], default=None)
        self._store.note_unfinished(self.series, since, until, now=self._now())

    def _settle_unfinished(self) -> None:
        """What is still owed of what this and earlier loads were asked for. What lies outside of this load stays as it was."""
        sidecar, extent = self._store.read_sidecar(self.series), self._store.extent(self.series)
        since, until = sidecar.unfinished_from, sidecar.unfinished_until
        if since is None and until is None:
            return
        missing = self._expected.take(np.flatnonzero(self._is_missing))
        held = (extent.first_open_s, extent.last_open_s) if extent is not None else None
        since = owed_from(since, self._span, missing, held)
        until = owed_until(until, self._span, missing, held)
        if (since, until) != (sidecar.unfinished_from, sidecar.unfinished_until):
            self._store.note_unfinished(self.series, since, until, now=self._now())

    # -- the end ----------------------------------------------------------------------------------------------------

    def _count_requests(self) -> None:
        if self._history is not None:
            made, retries, paced_s, held_s = (
                now - before for now, before in zip(_counts(self._history), self._counted, strict=True)
            )
            self.report.ib_requests_made, self.report.retries = int(made), int(retries)
            self.report.pacing_wait_s, self.report.retry_wait_s = paced_s, held_s

    def _finish(self) -> None:
        self._count_requests()
        if self.report.unexpected_bars or self.report.empty_sessions:
            self.report.notices.append(
                f"IB and the calendar disagree ({self.report.unexpected_bars} bars that it does not expect, "
                f"{self.report.empty_sessions} of its sessions without a bar); IB's bars are what is kept. "
                f"`ktrdr calendar {self.series.instrument.symbol}` compares the calendar with IB's schedule"
            )
        # Should that fail, the next load looks at more than it has to, and asks for what is missing all the same.
        with suppress(StoreError):
            self._settle_unfinished()
        self.report.missing_bars = int(self._is_missing[self._indexes(self.window)].sum())
        if self.report.failures:
            self.report.status = "partial" if self.report.segments_fetched or self.report.fetched_bars else "failed"


def _counts(history: History) -> tuple[int, int, float, float]:
    return history.requests_made, history.retries, history.pacing_wait_s, history.retry_wait_s


def _concerns_all(error: KtrdrError) -> bool:
    """True if the next window cannot fare better: bad bars or an unanswered request concern one window; a refusal, an
    unreachable gateway or a full disk concern all of them."""
    if isinstance(error, GatewayUnreachable | ScaleChanged):
        return True
    return not isinstance(error, DataError | TransientError)
