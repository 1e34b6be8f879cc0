"""Requests for series that IB serves only up to now: continuous futures and adjusted prices take no end date.

A single request has to reach from now back to the oldest wanted bar: no later request can bring anything older. Where the
configured limits do not reach that far, IBKR's current ones are used, since no other request could bring those bars. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ktrdr_pipelines.calendars import ExpectedBars, expected_bars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Duration, HistoryLimits
from ktrdr_pipelines.planning.durations import LOOSEST, Span, duration_for, is_allowed, list_durations
from ktrdr_pipelines.planning.requests import Request, longest_back


@dataclass(frozen=True, slots=True)
class PlannedToNow:
    """``request`` covers the wanted bars except the ``unreachable`` ones, which are older than one request can reach. None when
    all are unreachable."""

    request: Request | None
    unreachable: ExpectedBars


def plan_to_now(series: Series, wanted: ExpectedBars, limits: HistoryLimits, now_s: int) -> PlannedToNow:
    """The one request for ``wanted`` bars (not empty), up to ``now_s`` (epoch seconds)."""
    reachable = wanted
    if _find_durations(series, wanted, limits, now_s) == []:
        reach = reach_from_now(series, HistoryLimits.CURRENT, now_s)
        reachable = wanted.take(wanted.opens >= reach.start_s)
    unreachable = wanted.take(slice(0, len(wanted) - len(reachable)))
    if not len(reachable):
        return PlannedToNow(None, unreachable)
    durations = _find_durations(series, reachable, limits, now_s)
    window = Window.from_epoch(reachable.earliest_at(0), int(reachable.closes[-1]))
    return PlannedToNow(Request(window, datetime.fromtimestamp(now_s, UTC), durations[0]), unreachable)


def reach_from_now(series: Series, limits: HistoryLimits, now_s: int) -> Window:
    """The window that the longest request up to ``now_s`` covers under ``limits``; ends at ``now_s``."""
    bars = expected_bars(series, longest_back(series, now_s, limits))
    lo, hi = 0, len(bars)
    while lo < hi:  # a request that reaches one bar reaches all younger ones
        middle = (lo + hi) // 2
        if duration_for(series.timeframe, _span_to_now(series, bars.take(slice(middle, None)), now_s), limits) is None:
            lo = middle + 1
        else:
            hi = middle
    return Window.from_epoch(min(now_s, int(bars.opens[lo])) if lo < len(bars) else now_s, now_s)


def reshape_to_now(
    series: Series, wanted: ExpectedBars, limits: HistoryLimits, now_s: int, *, previous: Sequence[Request]
) -> Request:
    """A request for ``wanted`` bars with another duration than any of ``previous`` where there is one; else the first of
    ``previous`` again, for which pacing waits."""
    window = Window.from_epoch(wanted.earliest_at(0), int(wanted.closes[-1]))
    used = {str(request.duration) for request in previous}
    bases = _find_durations(series, wanted, limits, now_s) or [previous[0].duration]
    more = [Duration(base.count + extra, base.unit) for base in bases for extra in (0, 1, 2, 3, 5, 8)]
    allowed = [d for d in more if is_allowed(series.timeframe, d, HistoryLimits.CURRENT) and str(d) not in used]
    return Request(window, datetime.fromtimestamp(now_s, UTC), allowed[0] if allowed else previous[0].duration)


def _find_durations(series: Series, wanted: ExpectedBars, limits: HistoryLimits, now_s: int) -> list[Duration]:
    """The durations that reach from now back to the first of ``wanted``, under ``limits`` or else IBKR's current ones."""
    span = _span_to_now(series, wanted, now_s)
    for each in (limits, HistoryLimits.CURRENT):
        if duration_for(series.timeframe, span, each) is not None:
            return list(list_durations(series.timeframe, span, each, LOOSEST))
    return []


def _span_to_now(series: Series, wanted: ExpectedBars, now_s: int) -> Span:
    until = expected_bars(series, Window.from_epoch(int(wanted.opens[0]), max(now_s, int(wanted.opens[0]) + 1)))
    sessions = int(until.sessions[-1] - until.sessions[0]) + 1 if len(until) else 1
    return Span(wanted.earliest_at(0), max(now_s, int(wanted.closes[-1])), sessions, wanted.sessions_per_week)
