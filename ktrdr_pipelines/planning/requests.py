"""The fewest requests for missing bars: expected minus held minus absent.

No files, no network, no clock: callers pass what is expected (`calendars`), what is held, and now. How far one request
reaches, and how that is written, is in `durations.py`. What happens with the answers is in `loading/machine.py`.

Why greedy is enough: if one request can cover a run of missing bars, it can cover any part of the run. So taking as many
bars as possible from the oldest one on, again and again, needs the fewest requests (the tests compare it with exhaustive
search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np

from ktrdr_pipelines.calendars import FIRST_YEAR, ExpectedBars, expected_bars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Duration, HistoryLimits, Timeframe
from ktrdr_pipelines.errors import BugError
from ktrdr_pipelines.planning.durations import (
    LOOSEST,
    NOMINAL_S,
    READINGS,
    Reading,
    Span,
    duration_for,
    is_allowed,
    list_durations,
    reach_back,
)


@dataclass(frozen=True, slots=True)
class Request:
    """One historical-data call.

    ``window`` (half-open, UTC) is the time that its answer settles: from the first missing stamp, or the begin of its trading
    when that is earlier, to the end of the last missing bar. ``end`` (UTC) and ``duration`` are IB's ``endDateTime`` and
    ``durationStr``; they reach at least as far as the window, often further: cut the answer.
    """

    window: Window
    end: datetime
    duration: Duration

    def __str__(self) -> str:
        return f"{self.window} as {self.duration} to {self.end.strftime('%Y-%m-%dT%H:%M:%SZ')}"


# --- requests --------------------------------------------------------------------------------------------------------

_STRETCH_AFTER_S = 3600
_STRETCH_BEFORE_S = 4 * 86400


def plan_requests(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    *,
    expected: ExpectedBars | None = None,
    within: Window | None = None,
    most_bars: int | None = None,
) -> list[Request]:
    """The fewest requests that cover every bar of ``missing``, none longer than ``limits`` allow, none for closed time only.

    A request may span held bars between two gaps; windows of requests never overlap. Oldest first.

    With ``expected`` (of which ``missing`` is a part) and ``within`` (the window of the run, not beyond now) each request
    also answers for closed time around its bars as far as that costs no further request: up to an hour after its last
    bar, if that is not the last one expected, and back to the close before its first one, four days at most. Auctions
    after the close, and sessions that the calendar takes for holidays, are caught by that.

    Requests are divided between sessions, and a month is counted as 22 sessions, where that costs no further request
    (`durations.READINGS`). Where a month of the calendar with 23 sessions saves one, it is requested: a gateway that counts
    sessions then leaves out the oldest, whose bars stay missing and are requested again.

    ``most_bars``: so many bars of ``missing`` at most in one request, for a gateway whose long answers are slow.
    """
    fewest = len(_split(timeframe, missing, limits, LOOSEST, most_bars))
    runs = next(r for reading in READINGS if len(r := _split(timeframe, missing, limits, reading, most_bars)) == fewest)
    requests: list[Request] = []
    floor_s = within.start_s if within else 0
    for i, j in runs:
        span = _span_of(missing, i, j)
        before_s, after_s = span.start_s, span.end_s
        if expected is not None and within is not None:
            before_s, after_s = _closed_around(expected, missing, i, j, within)
        request = _widen(timeframe, span, max(before_s, floor_s), after_s, limits)
        floor_s = request.window.end_s
        requests.append(request)
    return requests


def _span_of(bars: ExpectedBars, i: int, j: int) -> Span:
    """What a request for bars ``i`` to ``j``, both included, has to cover."""
    sessions = int(bars.sessions[j] - bars.sessions[i]) + 1
    return Span(bars.earliest_at(i), int(bars.closes[j]), sessions, bars.sessions_per_week)


def _split(
    timeframe: Timeframe, bars: ExpectedBars, limits: HistoryLimits, reading: Reading, most_bars: int | None = None
) -> list[tuple[int, int]]:
    """First and last index of each run of bars that one request covers; every run as long as it can be."""
    runs = []
    i, last = 0, len(bars) - 1
    while i <= last:
        most = last - i if most_bars is None else min(last - i, most_bars - 1)
        j = i + _count_most(partial(_fits_from, timeframe, bars, limits, reading, i), most)
        if reading.whole_sessions and j < last and bars.sessions[j] == bars.sessions[j + 1]:
            first_of_session = int(np.searchsorted(bars.sessions, bars.sessions[j]))
            j = first_of_session - 1 if first_of_session > i else j
        runs.append((i, j))
        i = j + 1
    return runs


def _fits_from(
    timeframe: Timeframe, bars: ExpectedBars, limits: HistoryLimits, reading: Reading, i: int, more: int
) -> bool:
    return duration_for(timeframe, _span_of(bars, i, i + more), limits, reading) is not None


def _fits_until(timeframe: Timeframe, bars: ExpectedBars, limits: HistoryLimits, more: int) -> bool:
    last = len(bars) - 1
    return duration_for(timeframe, _span_of(bars, last - more, last), limits) is not None


def _count_most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, by doubling and bisection; zero has to, and all below a fitting one do."""
    if not fits(0):
        raise BugError("a single bar does not fit in one request", advice="Check the limits in domain/timeframes.py.")
    good, step = 0, 1
    while good + step <= most and fits(good + step):
        good += step
        step *= 2
    bad = min(good + step, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _closed_around(expected: ExpectedBars, missing: ExpectedBars, i: int, j: int, within: Window) -> tuple[int, int]:
    """How far closed time reaches before bar ``i`` and after bar ``j`` of ``missing``, as far as a request may cover it."""
    span = _span_of(missing, i, j)
    first, last = (int(k) for k in np.searchsorted(expected.opens, missing.opens[[i, j]]))
    closed_s = int(expected.closes[first - 1]) if first else 0
    before_s = max(span.start_s - _STRETCH_BEFORE_S, within.start_s, closed_s)
    after_s = span.end_s
    if last + 1 < len(expected):  # else a bar may be forming there
        # At most half the closed time: a request that ends at the next open could be read as counting that session.
        half_way_s = (span.end_s + expected.earliest_at(last + 1)) // 2
        after_s = min(span.end_s + _STRETCH_AFTER_S, within.end_s, half_way_s)
    return min(before_s, span.start_s), max(after_s, span.end_s)


def _widen(timeframe: Timeframe, span: Span, before_s: int, after_s: int, limits: HistoryLimits) -> Request:
    """The request for ``span`` whose window covers as much of ``before_s`` to ``after_s`` as one request can."""
    before_s = min(before_s, span.start_s)
    for reading in READINGS:
        for start_s, end_s in (
            (before_s, after_s),
            (span.start_s, after_s),
            (before_s, span.end_s),
            (span.start_s, span.end_s),
        ):
            wanted = Span(start_s, end_s, span.sessions, span.sessions_per_week)
            duration = duration_for(timeframe, wanted, limits, reading)
            if duration is not None:
                covered_s = min(start_s, max(before_s, reach_back(end_s, duration)))
                return Request(Window.from_epoch(covered_s, end_s), datetime.fromtimestamp(end_s, UTC), duration)
    raise BugError("the bars of a request do not fit in one", advice="Report this: it is a defect of the planner.")


# --- the same bars again, and older bars -----------------------------------------------------------------------------


def refetch_requests(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    *,
    previous: Sequence[Request],
    attempt: int = 1,
    until_s: int | None = None,
) -> list[Request]:
    """Requests for ``missing`` bars in another shape than any of ``previous``: another end and another duration where
    possible, else one of them.

    An identical request is paced (15 s) and may be answered from the same faulty cache. ``attempt`` counts from 1 and
    moves the end on by a minute each; ``until_s`` (now) bounds it. Usually one request. Bars that span as much as the limit
    allows do not fit in one request with another end: they are halved, as often as needed.

    Raises:
        BugError: ``missing`` is empty.
    """
    if not len(missing):
        raise BugError("no missing bars to request again")
    requests: list[Request] = []
    for run in split_runs(timeframe, missing, limits):
        requests += _reshape(timeframe, run, limits, previous, attempt, until_s)
    return requests


def split_runs(timeframe: Timeframe, bars: ExpectedBars, limits: HistoryLimits) -> list[ExpectedBars]:
    """``bars`` in as few parts as possible that one request can cover each."""
    return [bars.take(slice(i, j + 1)) for i, j in _split(timeframe, bars, limits, LOOSEST)]


def _reshape(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    previous: Sequence[Request],
    attempt: int,
    until_s: int | None,
) -> list[Request]:
    """Requests for ``missing`` bars that one request can cover."""
    span = _span_of(missing, 0, len(missing) - 1)
    shapes = {(int(r.end.timestamp()), str(r.duration)) for r in previous}
    ends, durations = {end_s for end_s, _ in shapes}, {duration for _, duration in shapes}
    fresh = [s for s in _shapes_of(timeframe, span, limits, attempt, until_s) if (s[0], str(s[1])) not in shapes]
    if fresh:
        best = next((s for s in fresh if s[0] not in ends and str(s[1]) not in durations), fresh[0])
        window = Window.from_epoch(span.start_s, span.end_s)
        return [Request(window, datetime.fromtimestamp(best[0], UTC), best[1])]
    middle = len(missing) // 2
    if not middle:
        return plan_requests(timeframe, missing, limits)  # one bar, every shape used up: pacing has to wait 15 s
    halves = (missing.take(slice(0, middle)), missing.take(slice(middle, None)))
    return [r for half in halves for r in _reshape(timeframe, half, limits, previous, attempt, until_s)]


def _shapes_of(
    timeframe: Timeframe, span: Span, limits: HistoryLimits, attempt: int, until_s: int | None
) -> Iterator[tuple[int, Duration]]:
    """Ends (epoch seconds) and durations that cover ``span``, the most unlike the plain one first."""
    # Never further than a bar: a gateway that sends few bars an answer would only send later ones. For daily bars a whole
    # day too, because a daily bar may carry the date on which its session began.
    steps = [min(60 * (attempt + n), timeframe.seconds) for n in range(3)]
    for shift_s in ([] if timeframe.is_intraday else [86400]) + [*steps, 1, 0]:
        end_s = span.end_s + shift_s
        if shift_s and until_s is not None and end_s > until_s:
            continue
        wanted = Span(span.start_s, end_s, span.sessions, span.sessions_per_week)
        for base in list_durations(timeframe, wanted, limits, LOOSEST):
            for extra in (attempt, attempt + 1, 0, 1, 2, 3):
                duration = Duration(base.count + extra * (60 if base.unit == "S" else 1), base.unit)
                if is_allowed(timeframe, duration, limits):
                    yield end_s, duration


def longest_back(series: Series, before_s: int, limits: HistoryLimits) -> Window:
    """The window of one longest request before ``before_s`` (epoch seconds): as many bars as it may hold, closed time before
    ``before_s`` skipped. Half-open, ends at ``before_s``; empty when the calendar has nothing earlier.

    Raises:
        InputError: no calendar is known for the instrument, or ``before_s`` is outside the years of calendars.
    """
    before = datetime.fromtimestamp(before_s, UTC)
    first = min(before, datetime(FIRST_YEAR, 1, 1, tzinfo=UTC))
    timeframe, longest = series.timeframe, series.timeframe.longest_request(limits)
    span = timedelta(seconds=int(1.1 * longest.count * NOMINAL_S[longest.unit]) + 2 * timeframe.seconds)
    for widening in (0, 7, 40):  # days; no market was ever closed for longer than the last of these
        start = max(first, before - span - timedelta(days=widening))
        bars = expected_bars(series, Window(start, before))
        if len(bars):
            more = _count_most(partial(_fits_until, timeframe, bars, limits), len(bars) - 1)
            return Window.from_epoch(min(before_s, bars.earliest_at(len(bars) - 1 - more)), before_s)
    return Window(before, before)
