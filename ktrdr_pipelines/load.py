"""The use case: plan, fetch, verify, write, report. Every door ends here, by way of the assets.

What is missing and how to ask is decided in `plan.py`, how bars are judged in `bars.py`, how they are kept in `store/`,
how IB is asked (pacing, retries, connection) in `ib/history.py`. Here is only the order of things, one request at a time:

1. expected bar opens up to the last complete bar, minus held, minus proven empty: missing; nothing missing, nothing asked
2. the fewest requests for what is missing
3. each answer is cut, checked and written before the next request, so that an interruption loses one request at most
4. an expected bar that an answer lacks is asked for again, in another shape; only a hole that two sources agree on (two
   answers, or an answer and the head timestamp) is proven empty
5. a failed window does not stop the others; at the end all failures are listed
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.bars import LATEST_SESSION_END_S, NormalisedAnswer, empty_bars, normalise_answer, opens_of
from ktrdr_pipelines.calendars import ExpectedBars, expected_bars, find_unexpected, match_held, period_keys
from ktrdr_pipelines.coverage import STAMP_SLACK_S, mark_missing
from ktrdr_pipelines.errors import DataError, GatewayUnreachable, KtrdrError, TransientError
from ktrdr_pipelines.modes import Held
from ktrdr_pipelines.partitions import Partition, partitions_in
from ktrdr_pipelines.plan import Request, find_gaps, plan_requests, refetch_requests
from ktrdr_pipelines.report import Completed, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.series import HistoryLimits, Instrument, Series, Window, format_instant
from ktrdr_pipelines.store.intake import Prepared
from ktrdr_pipelines.store.series_store import Store
from ktrdr_pipelines.store.sidecar import Evidence, HistoryStart, ProvenEmpty, Source

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MAX_CONFIRMATIONS = 5
"""How often one window is asked again while each answer brings a few bars that the ones before lacked."""

INTRADAY_GRACE_S, DAILY_GRACE_S = 15 * 60, 24 * 3600
"""How long after its close a newest bar may come late (IB: seconds to minutes; daily bars up to settlement, hours)."""

SPARSE_AFTER = 3
"""So many confirmations in a row that brought nothing new make a series sparse."""


class Answer(Protocol):
    """Bars of one request as IB sent them; see `ib.client.RawBars`."""

    @property
    def opens_s(self) -> IntArray: ...
    @property
    def open(self) -> FloatArray: ...
    @property
    def high(self) -> FloatArray: ...
    @property
    def low(self) -> FloatArray: ...
    @property
    def close(self) -> FloatArray: ...
    @property
    def volume(self) -> FloatArray: ...
    @property
    def no_data_text(self) -> str: ...


class History(Protocol):
    """Where bars come from: IB behind pacing and retries (`ib/history.py`), or a fake."""

    @property
    def source(self) -> Source:
        """Whose bars these are; known once `pin` was called."""

    @property
    def requests_made(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def pacing_wait_s(self) -> float: ...

    def pin(self, instrument: Instrument) -> Instrument:
        """The instrument with IB's conId and time zone."""

    def fetch(self, series: Series, request: Request) -> Answer:
        """One answer; raises a KtrdrError when there is none. Never an empty answer for a failure."""

    def find_head(self, instrument: Instrument) -> datetime | None:
        """IB's hint where history starts."""


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
        self._head: datetime | None = None
        self._head_is_asked = False
        self._agreed = 0
        self._was_wordless = True
        self._may_put_off = self._is_put_off = False
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
        self._now_s = int(self._now().timestamp())
        self._settle_files()
        # Bars that are not complete yet tell which bars of an answer are still forming; only complete ones are asked for.
        self._all_expected = expected_bars(self.series, _widen(span))
        self._expected = expected_bars(self.series, span, complete_at_s=self._now_s)
        self._is_missing = self._find_missing(span)
        asked = _inside(self._expected.take(np.flatnonzero(self._is_missing)), self.window)
        gaps = find_gaps(self._expected, asked)
        requests = plan_requests(
            self.series.timeframe,
            self._with_last_held(asked),
            self._limits,
            expected=self._expected,
            within=Window(self.window.start, max(self.window.start, min(self.window.end, self._now()))),
        )
        self.report.gaps_analyzed, self.report.requests_planned = len(gaps), len(requests)
        yield Planned(gaps, requests)
        for partition in partitions:
            yield from self._report_if_complete(partition)
        if requests:
            try:
                yield from self._fetch_all(requests, partitions)
            finally:
                self._finish()

    # -- what is missing --------------------------------------------------------------------------------------------

    def _settle_files(self) -> None:
        """Adopt a foreign or edited file before it is counted, and say so."""
        prepared = self._store.prepare(self.series, now=self._now())
        self.report.notices += describe_prepared(prepared)
        self.report.cached_before = self._store.extent(self.series) is not None

    def _find_missing(self, span: Window) -> npt.NDArray[np.bool_]:
        """For each expected bar: is it neither held nor known to be empty?"""
        held = self._store.held_opens(self.series, _widen(span))
        sidecar, extent = self._store.read_sidecar(self.series), self._store.extent(self.series)
        first_held_s = extent.first_open_s if extent else None
        return mark_missing(self._expected, held, sidecar, first_held_s, self.series.timeframe)

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

    def _report_touched(self, request: Request, rows: int, partitions: Sequence[Partition]) -> Iterator[Event]:
        """Report the partitions that ``request`` completed, and those complete before whose bars it changed; all that are
        still open when it showed where history starts."""
        first = bisect_right(partitions, request.window.start, key=lambda p: p.window.end)
        last = bisect_left(partitions, request.window.end, key=lambda p: p.window.start)
        if self._history_start_is_new:
            self._history_start_is_new, first = False, 0
        for partition in partitions[first:last]:
            common = partition.window.intersect(request.window)
            if rows and common is not None and len(_inside(self._expected, common)):
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
        around = self._store.held_opens(self.series, _widen(partition.window))
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
            self._history = self._open_history()
            self._counted = (self._history.requests_made, self._history.retries, self._history.pacing_wait_s)
            self._series = Series(self._history.pin(self.series.instrument), self.series.timeframe)
        except KtrdrError as error:
            yield self._fail(everything, error)
            return
        waiting = deque(requests)
        skipped: deque[Request] = deque()  # wholly before IB's head timestamp, oldest first
        done = 0
        while waiting or skipped:
            # What was skipped needs asking after all when the start of history could not be shown to lie later.
            request = waiting.popleft() if waiting else skipped.pop()
            self._may_put_off, self._is_put_off = bool(waiting), False
            try:
                rows = self._load_request(request) if self._lacks(request) else 0
            except KtrdrError as error:
                self._count_what_arrived(request.window)
                if _concerns_all(error):
                    yield self._fail(Window(request.window.start, everything.end), error)
                    return
                yield self._fail(request.window, error)
                yield from self._report_touched(request, 0, partitions)
                continue
            self._count_requests()
            if self._is_put_off:
                skipped.append(request)
            else:
                done += 1
                self.report.segments_fetched += 1
                yield Fetched(request, rows, done, len(requests))
                yield from self._report_touched(request, rows, partitions)
            if self._head is not None and self._store.extent(self.series) is None:
                skipped += [r for r in waiting if r.window.end <= self._head]
                waiting = deque(r for r in waiting if r.window.end > self._head)

    def _lacks(self, request: Request) -> bool:
        """False if what ``request`` was planned for is known by now (it lies before the start of history)."""
        extent = self._store.extent(self.series)
        is_recheck = extent is not None and request.window.start_s <= extent.last_open_s < request.window.end_s
        return is_recheck or bool(self._is_missing[self._indexes(request.window)].any())

    def _fail(self, window: Window, error: KtrdrError) -> Failure:
        doing = f"loading {self.series} {window}"
        if str(self.series) not in error.doing:
            error.doing = f"{doing}: {error.doing}" if error.doing else doing
        failure = Failure(window, error)
        self.report.failures.append(failure)
        return failure

    def _load_request(self, request: Request) -> int:
        """Fetch, verify and write one planned request. Returns the number of rows that are new in the file."""
        expected = _inside(self._expected, request.window)
        evidence: list[Evidence] = []
        self._was_wordless = True  # until a bar or IB's own "no data" arrives
        rows = self._fetch_and_write(request, evidence)
        holes = self._holes(expected)
        asked, poor = [request], 0
        while len(holes) and not (self._lie_before_head(holes, request, evidence) or self._are_usual(holes, expected)):
            if poor > MAX_CONFIRMATIONS:
                raise DataError(
                    f"{len(asked)} answers each brought a few other bars and {len(holes)} are still missing",
                    doing=f"loading {self.series} {request.window}",
                    advice="What arrived is in the file; run the load again.",
                )
            again = refetch_requests(
                self.series.timeframe, holes, self._limits, previous=asked, attempt=len(asked), until_s=self._now_s
            )
            for other in again:
                rows += self._fetch_and_write(other, evidence)
            asked += again
            before, holes = holes, self._holes(holes)
            poor += len(before) - len(holes) < len(before) / 10  # a gateway may send little at a time, and get there
            if len(holes) == len(before):
                if self._was_wordless:
                    raise TransientError(
                        f"{len(asked)} answers without a bar, and without a word that there are none",
                        advice="This is no proof of an empty window; run the load again.",
                    )
                break  # a second, differently shaped request agrees
        if len(asked) > 1:
            self._learn_sparseness(agreed=len(holes) > 0)
        if self._is_put_off:
            return rows
        self._prove(request.window, expected, holes, evidence)
        if len(holes):
            self._note_history_start(holes)
        return rows

    def _are_usual(self, holes: ExpectedBars, expected: ExpectedBars) -> bool:
        """True if ``holes`` are what this sparse series is known for: runs no longer than two answers agreed on before, and
        neither end of the window is missing (as it is when half an answer arrives)."""
        sidecar = self._store.read_sidecar(self.series)
        if not sidecar.sparse:
            return False
        known = max((e.opens for e in sidecar.proven_empty if len(e.evidence) > 1), default=0)
        runs = find_gaps(expected, holes)
        at_an_end = expected.opens[0] in holes.opens or expected.opens[-1] in holes.opens
        return not at_an_end and max(run.opens for run in runs) <= known

    def _learn_sparseness(self, *, agreed: bool) -> None:
        """After a window was asked for twice: a series whose second answers keep agreeing is sparse (illiquid minutes without
        trades have no bars); one that brought bars the first answer lacked is a reason to doubt again."""
        self._agreed = self._agreed + 1 if agreed else 0
        is_sparse = self._store.read_sidecar(self.series).sparse
        if self._agreed >= SPARSE_AFTER and not is_sparse and self.series.timeframe.is_intraday:
            self._store.note(self._series, now=self._now(), sparse=True)
        elif not agreed and is_sparse:
            self._store.note(self._series, now=self._now(), sparse=False)

    def _fetch_and_write(self, request: Request, evidence: list[Evidence]) -> int:
        raw = self._history.fetch(self._series, request)
        answer = self._normalise(raw, request)
        self._was_wordless &= not len(raw.opens_s) and not raw.no_data_text
        text = raw.no_data_text or f"{len(raw.opens_s)} bars, {len(answer.bars)} of them in the window"
        evidence.append(Evidence(asked_at=self._now(), duration=str(request.duration), end=request.end, text=text))
        if not len(answer.bars):
            return 0
        written = self._store.write(
            self._series,
            answer.bars,
            answered=None,
            source=self._history.source,
            now=self._now(),
        )
        expected = _inside(self._expected, request.window)
        self.report.fetched_bars += written.rows_added
        self.report.revised_bars += written.rows_revised
        self.report.unexpected_bars += int(
            find_unexpected(expected, opens_of(answer.bars), self.series.timeframe).sum()
        )
        if written.rows_revised:
            first = format_instant(written.revised_to["timestamp"].iloc[0].to_pydatetime())
            self.report.notices.append(f"IB answers {written.rows_revised} held bars differently now, first {first}")
        return written.rows_added

    def _normalise(self, raw: Answer, request: Request) -> NormalisedAnswer:
        # A request that ends inside a bar brings that bar cut off at its end: only what closed by then is whole.
        until_s = min(self._now_s, request.end.timestamp()) if self.series.timeframe.is_intraday else self._now_s
        window = self._period_window(request.window)
        columns = {"timestamp": raw.opens_s, "open": raw.open, "high": raw.high, "low": raw.low, "close": raw.close}
        return normalise_answer(
            {**columns, "volume": raw.volume}, self._series, window, now_s=until_s, closes=self._closes_of
        )

    def _closes_of(self, opens_s: IntArray) -> IntArray:
        """When each bar is complete: by the calendar where it knows the bar, else at the latest that is thinkable."""
        timeframe = self.series.timeframe
        nominal = opens_s + timeframe.seconds + (0 if timeframe.is_intraday else LATEST_SESSION_END_S)
        if not len(self._all_expected):
            return nominal
        # A week or month may be labelled with any of its days.
        known, wanted = (period_keys(timeframe, stamps) for stamps in (self._all_expected.opens, opens_s))
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, self._all_expected.closes[at], nominal)

    def _period_window(self, window: Window) -> Window:
        """``window`` as bars are cut to it: for weeks and months it holds every label that one of its bars may carry."""
        if self.series.timeframe.seconds <= 86400:
            return window
        expected = _inside(self._expected, window)
        if not len(expected):
            return window
        days = np.arange(window.start_s // 86400 - 31, window.end_s // 86400 + 32, dtype=np.int64) * 86400
        keys = period_keys(self.series.timeframe, days)
        inside = days[np.isin(keys, period_keys(self.series.timeframe, expected.opens))]
        return Window.from_epoch(int(inside[0]), int(inside[-1]) + 86400)

    def _holes(self, expected: ExpectedBars) -> ExpectedBars:
        """The bars of ``expected`` that are not in the file."""
        if not len(expected):
            return expected
        held = self._store.held_opens(
            self.series, _widen(Window.from_epoch(int(expected.opens[0]), int(expected.opens[-1]) + 1))
        )
        return expected.take(np.flatnonzero(~match_held(expected, held, self.series.timeframe)))

    def _count_what_arrived(self, window: Window) -> None:
        """After a failure in the middle of a window: what is in the file is not missing any more."""
        mine = self._indexes(window)
        still = self._holes(self._expected.take(mine))
        self._is_missing[mine] &= np.isin(self._expected.opens[mine], still.opens)

    def _prove(self, window: Window, expected: ExpectedBars, holes: ExpectedBars, evidence: Sequence[Evidence]) -> None:
        """Record that IB gave a verified answer for ``window``, and which of its bars are proven not to exist."""
        asked = window
        holes, pending = self._split_pending(holes)
        if len(pending):
            window = Window.from_epoch(window.start_s, max(window.start_s, int(pending.opens[0])))
            self.report.notices.append(
                f"{len(pending)} of the newest bars are not there yet, from {_instant(pending.opens[0])}; "
                "they are asked for again next time"
            )
        # Of a sparse series the answered window says it all; a range for each minute without a trade would swamp the sidecar.
        runs = [] if self._store.read_sidecar(self.series).sparse else find_gaps(expected, holes)
        proven = [
            ProvenEmpty(start=gap.window.start, end=gap.window.end, opens=gap.opens, evidence=tuple(evidence))
            for gap in runs
        ]
        self._store.write(
            self._series,
            empty_bars(),
            answered=window,
            proven_empty=proven,
            source=self._history.source,
            now=self._now(),
            complete_until=datetime.fromtimestamp(int(expected.closes[-1]), UTC) if len(expected) else None,
        )
        self.report.proven_empty += len(holes)
        self._is_missing[self._indexes(asked)] = False
        self._is_missing |= np.isin(self._expected.opens, pending.opens)

    def _split_pending(self, holes: ExpectedBars) -> tuple[ExpectedBars, ExpectedBars]:
        """Holes that two answers can prove, and those that closed a moment ago with nothing newer held: IB may be late, and two
        questions within a second agree about nothing but that."""
        extent = self._store.extent(self.series)
        grace_s = INTRADAY_GRACE_S if self.series.timeframe.is_intraday else DAILY_GRACE_S
        is_pending = holes.closes > self._now_s - grace_s
        if extent is not None:
            is_pending &= holes.opens > extent.last_open_s
        return holes.take(np.flatnonzero(~is_pending)), holes.take(np.flatnonzero(is_pending))

    # -- the start of history ---------------------------------------------------------------------------------------

    def _lie_before_head(self, holes: ExpectedBars, request: Request, evidence: list[Evidence]) -> bool:
        """True if ``holes`` are all older than anything held, and IB's head timestamp says too that they do not exist.

        The head timestamp alone proves nothing (it can be too late), an answer alone neither; together they are two
        sources. It is asked for once, and only when an answer is empty at its old end.
        """
        extent = self._store.extent(self.series)
        if extent is not None and extent.first_open_s <= int(holes.opens[-1]):
            return False
        head_s = self._find_head_s()
        if head_s is None or head_s < int(holes.opens[-1]):
            return False
        if extent is None and self._may_put_off:
            self._is_put_off = True  # until bars are held, which may disprove the head timestamp
            return True
        evidence.append(
            Evidence(asked_at=self._now(), duration="", end=request.end, text=f"head timestamp {_instant(head_s)}")
        )
        return True

    def _find_head_s(self) -> int | None:
        """IB's head timestamp (of daily and longer bars its day), asked for once; None when there is none, or a held bar is older
        and disproves it."""
        if not self._head_is_asked:
            self._head_is_asked = True
            self._head = self._history.find_head(self._series.instrument)
        if self._head is None:
            return None
        head_s = int(self._head.timestamp())
        if not self.series.timeframe.is_intraday:
            head_s -= head_s % 86400
        extent = self._store.extent(self.series)
        return None if extent is not None and extent.first_open_s < head_s else head_s

    def _note_history_start(self, holes: ExpectedBars) -> None:
        """If the proven holes lie right before the first held bar, and not before IB's head timestamp either: that bar is
        where history starts, and nothing older needs to be asked for, now or ever."""
        extent = self._store.extent(self.series)
        head_s = self._find_head_s() if self._head_is_asked else None
        if extent is None or head_s is None or head_s < int(holes.opens[0]):
            return
        before = self._expected.opens[self._expected.opens < extent.first_open_s]
        if not len(before) or int(before[-1]) not in holes.opens:
            return
        start = datetime.fromtimestamp(extent.first_open_s, UTC)
        known_by = f"nothing right before it, and IB's head timestamp is {_instant(head_s)}"
        self._store.note(self._series, now=self._now(), history_start=HistoryStart(open=start, known_by=known_by))
        self._is_missing[: len(before)] = False
        self._history_start_is_new = True

    # -- the end ----------------------------------------------------------------------------------------------------

    def _count_requests(self) -> None:
        if hasattr(self, "_history") and hasattr(self, "_counted"):
            made, retries, waited_s = self._counted
            self.report.ib_requests_made = self._history.requests_made - made
            self.report.retries = self._history.retries - retries
            self.report.pacing_wait_s = self._history.pacing_wait_s - waited_s

    def _finish(self) -> None:
        self._count_requests()
        self.report.missing_bars = int(self._is_missing[self._indexes(self.window)].sum())
        if self.report.failures:
            self.report.status = "partial" if self.report.segments_fetched or self.report.fetched_bars else "failed"


def find_held(store: Store, series: Series) -> Held | None:
    """First and last bar that the store holds of ``series``; None without a CSV or without a row in it."""
    extent = store.extent(series)
    if extent is None:
        return None
    return Held(datetime.fromtimestamp(extent.first_open_s, UTC), datetime.fromtimestamp(extent.last_open_s, UTC))


def _concerns_all(error: KtrdrError) -> bool:
    """True if the next window cannot fare better: bad bars or an unanswered request concern one window; a refusal, an
    unreachable gateway or a full disk concern all of them."""
    if isinstance(error, GatewayUnreachable):
        return True
    return not isinstance(error, DataError | TransientError)


def describe_prepared(prepared: Prepared) -> list[str]:
    """What was put right in the files before the load, as sentences."""
    said = []
    if (adopted := prepared.adopted) is not None:
        kept = f"; the original is {adopted.backup}" if adopted.backup else ""
        said.append(f"adopted a file made elsewhere: {adopted.rows} rows, {len(adopted.dropped)} refused{kept}")
        said += [str(fault) for fault in adopted.dropped[:5]] + list(adopted.notices)
    if prepared.corrupt_sidecar is not None:
        said.append(f"the sidecar was unreadable and was built anew; the old one is {prepared.corrupt_sidecar}")
    if prepared.changed_partitions:
        said.append(f"edited since the last load: {', '.join(prepared.changed_partitions)}")
    if prepared.csv_gone:
        said.append("the CSV is gone; everything counts as never asked")
    return said


def _instant(second: int | np.int64) -> str:
    return format_instant(datetime.fromtimestamp(int(second), UTC))


def _inside(bars: ExpectedBars, window: Window) -> ExpectedBars:
    lo, hi = np.searchsorted(bars.opens, [window.start_s, window.end_s])
    return bars.take(slice(int(lo), int(hi)))


def _widen(window: Window) -> Window:
    """Room for stamps that satisfy an expected bar without being equal to it (a week's label, a bar on the clock grid)."""
    return Window.from_epoch(max(0, window.start_s - STAMP_SLACK_S), window.end_s + STAMP_SLACK_S)
