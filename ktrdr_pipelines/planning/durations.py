"""How far back one request reaches: IB's duration strings, how gateways read them, and what the limits allow.

Pure arithmetic on epoch seconds. Which requests are made is in `requests.py`; the limits of each bar size are in
`domain/timeframes.py`. Source: docs/ib_facts.md, 1 and 2.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from ktrdr_pipelines.domain.timeframes import Duration, DurationUnit, HistoryLimits, Timeframe

_DAY_S = 86400
_HOUR_S = 3600

UNIT_MATRIX: dict[DurationUnit, tuple[int, int, int]] = {
    "S": (1, 60, 86400),
    "D": (5, 3600, 365),
    "W": (10, 4 * 3600, 52),
    "M": (30, 8 * 3600, 12),
    "Y": (60, 86400, 68),
}
"""Shortest and longest bar (seconds) that each unit is accepted with, and its largest count. Outside it the gateway answers
error 321. Source: IBKR's "Historical Data Limitations" page (docs/ib_facts.md, 1)."""

NOMINAL_S: dict[DurationUnit, int] = {"S": 1, "D": _DAY_S, "W": 7 * _DAY_S, "M": 30 * _DAY_S, "Y": 365 * _DAY_S}
"""Length of each unit when durations of different units are compared with a limit."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a request has to cover: ``start_s`` to ``end_s`` (epoch seconds), touching ``sessions`` trading sessions of a
    calendar with ``sessions_per_week`` (5, or 7 round the clock)."""

    start_s: int
    end_s: int
    sessions: int
    sessions_per_week: int = 5


@dataclass(frozen=True, slots=True)
class Reading:
    """How carefully a request is made, since gateways read durations differently.

    ``months_by_sessions``: a month has to cover the span as 22 sessions too (30 round the clock), not only as a month of
    the calendar. ``margin_s``: how far D, W, M and Y have to reach beyond the start when the span touches several sessions:
    days of a local clock can add up to an hour less. ``whole_sessions``: requests are divided between sessions.
    """

    months_by_sessions: bool
    margin_s: int
    whole_sessions: bool


READINGS = (Reading(True, _HOUR_S, True), Reading(True, 0, False), Reading(False, 0, False))
"""The most careful first; the last covers the span as the calendar counts. A careful one is used where it costs no request."""

LOOSEST = READINGS[-1]


def reach_back(end_s: int, duration: Duration) -> int:
    """The start of ``duration`` when it is read as a span of the calendar that ends at ``end_s`` (UTC, epoch seconds)."""
    if duration.unit in ("S", "D", "W"):
        return end_s - duration.count * NOMINAL_S[duration.unit]
    end = datetime.fromtimestamp(end_s, UTC)
    month = end.year * 12 + end.month - 1 - duration.count * (12 if duration.unit == "Y" else 1)
    year, month = month // 12, month % 12 + 1
    day = min(end.day, calendar.monthrange(year, month)[1])
    return int(end.replace(year=year, month=month, day=day).timestamp())


def is_allowed(timeframe: Timeframe, duration: Duration, limits: HistoryLimits) -> bool:
    """True if one request for bars of ``timeframe`` may be that long: unit in the matrix, count in range, nominally not
    above the limit (a month counts as 30 days when it bounds days or weeks)."""
    longest = timeframe.longest_request(limits)
    if duration.unit not in _units_for(timeframe) or not 1 <= duration.count <= UNIT_MATRIX[duration.unit][2]:
        return False
    if duration.unit == longest.unit:
        return duration.count <= longest.count
    return duration.count * NOMINAL_S[duration.unit] <= longest.count * NOMINAL_S[longest.unit]


def list_durations(timeframe: Timeframe, span: Span, limits: HistoryLimits, reading: Reading) -> Iterator[Duration]:
    """The durations, at most one per unit, that cover ``span`` within ``limits``; the preferred first; none if it is too long.

    Rounded up so that the span is covered whether the gateway reads D and W as spans of the calendar or as counts of
    sessions, a week as ``sessions_per_week``; months by ``reading``. S and Y are spans of the calendar in any case. There is
    no unit for hours.
    """
    longest = timeframe.longest_request(limits)
    if span.end_s - span.start_s > 1.1 * longest.count * NOMINAL_S[longest.unit]:
        return  # far too long, and counting up to it would be slow
    for unit in _units_for(timeframe):
        count = _count_needed(unit, span, reading)
        # Whole minutes of seconds where the limit leaves room.
        for n in (-(-count // 60) * 60, count) if unit == "S" else (count,):
            if is_allowed(timeframe, Duration(n, unit), limits):
                yield Duration(n, unit)
                break


def duration_for(
    timeframe: Timeframe, span: Span, limits: HistoryLimits, reading: Reading = LOOSEST
) -> Duration | None:
    """The preferred one of `list_durations`, or None when one request may not be that long."""
    return next(list_durations(timeframe, span, limits, reading), None)


def _units_for(timeframe: Timeframe) -> tuple[DurationUnit, ...]:
    """Units to try, in order: seconds below one minute, else whole days; coarser ones where the matrix demands them."""
    if timeframe.seconds >= _DAY_S:
        return ("Y",)  # weekly and monthly bars are in no row of the matrix; years come nearest
    order: tuple[DurationUnit, ...] = ("S", "D", "W", "M") if timeframe.seconds < 60 else ("D", "W", "M", "S")
    return tuple(u for u in order if UNIT_MATRIX[u][0] <= timeframe.seconds <= UNIT_MATRIX[u][1])


def _count_needed(unit: DurationUnit, span: Span, reading: Reading) -> int:
    """The smallest count of ``unit`` that covers the span."""
    start_s = span.start_s - (reading.margin_s if unit != "S" and span.sessions > 1 else 0)
    at_most = {"M": 31 * _DAY_S, "Y": 366 * _DAY_S}.get(unit, NOMINAL_S[unit])
    count = max(1, -(-(span.end_s - start_s) // at_most))
    per_unit = {"D": 1, "W": span.sessions_per_week}
    if reading.months_by_sessions:
        per_unit["M"] = 22 if span.sessions_per_week == 5 else 30
    if unit in per_unit:
        count = max(count, -(-span.sessions // per_unit[unit]))
    while reach_back(span.end_s, Duration(count, unit)) > start_s:
        count += 1
    return count
