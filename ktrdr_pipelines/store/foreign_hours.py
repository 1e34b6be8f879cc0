"""Bars of foreign files that no session of the series' calendar has room for.

Bars that IB sent are kept whatever the calendar expects. For a bar of a foreign file the calendar is the only evidence: a file
stamped on the hour where IB stamps 13:30 would hold the first bar of each day twice after a load. Which bars are expected is
in `calendars/expected.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.calendars import (
    FIRST_YEAR,
    LAST_YEAR,
    ExpectedBars,
    calendar_of,
    expected_bars,
    find_unexpected,
)
from ktrdr_pipelines.calendars.exchanges import FOREX
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import InputError

Judge = Callable[[IntArray], BoolArray]
"""True for each of these opens (epoch seconds, in any order) that the series cannot have."""

_ROOM_S = 40 * 86400
"""A month may carry any of its dates: expected bars are computed so far beyond the stamps."""
_BARS_AT_ONCE = 500_000
_FIRST_S, _END_S = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (FIRST_YEAR, LAST_YEAR + 1))


def is_outside(series: Series) -> Judge:
    """True for opens that satisfy no bar of the calendar; false for all where no calendar is known, or beyond its years."""
    return lambda opens_s: _judge(series, opens_s, _find_outside)


def is_overlapping(series: Series) -> Judge:
    """True for those of `is_outside` that share time with an expected bar, which would then be held twice. To leave one out costs
    a request and never a bar: the expected one is missing and is requested."""
    return lambda opens_s: _judge(series, opens_s, _find_overlapping)


def why_outside(series: Series) -> str:
    """The reason reported for such a row."""
    instrument = series.instrument
    if series.timeframe.is_intraday:
        hours = f", {instrument.hours} hours" if instrument.sec_type == "STK" else ""
        return f"outside the trading hours of {instrument.symbol}{hours}"
    return f"outside the trading days of {instrument.symbol}"


def _find_outside(expected: ExpectedBars, opens_s: IntArray, series: Series) -> BoolArray:
    if calendar_of(series.instrument) != FOREX:
        # A load takes 13:00 for the bar that IB stamps 13:30. In a foreign file of stocks it is another cut of the day: the
        # answer for its neighbours brings 13:30 as well. Forex files write 17:00 for 17:15, and nothing else trades then.
        expected = replace(expected, aliases=expected.opens)
    return find_unexpected(expected, opens_s, series.timeframe)


def _find_overlapping(expected: ExpectedBars, opens_s: IntArray, series: Series) -> BoolArray:
    outside = _find_outside(expected, opens_s, series)
    if not series.timeframe.is_intraday:
        return np.zeros(len(opens_s), np.bool_)
    closed_before = np.searchsorted(expected.closes, opens_s, side="right")
    opened_before = np.searchsorted(expected.opens, opens_s + series.timeframe.seconds, side="left")
    return outside & (opened_before > closed_before)


def _judge(series: Series, opens_s: IntArray, find: Callable[[ExpectedBars, IntArray, Series], BoolArray]) -> BoolArray:
    found = np.zeros(len(opens_s), np.bool_)
    try:
        calendar_of(series.instrument)
    except InputError:  # no calendar
        return found
    ordered, places = np.unique(opens_s, return_inverse=True)
    judged = np.zeros(len(ordered), np.bool_)
    for low, high in _parts(ordered, series):
        first_s, end_s = max(_FIRST_S, int(ordered[low]) - _ROOM_S), min(_END_S, int(ordered[high - 1]) + _ROOM_S)
        judged[low:high] = find(expected_bars(series, Window.from_epoch(first_s, end_s)), ordered[low:high], series)
    return np.asarray(judged[places], dtype=np.bool_)


def _parts(ordered: IntArray, series: Series) -> Iterator[tuple[int, int]]:
    """Where to cut ``ordered``, so that the calendar's bars around a part fit into memory; only the years that it covers."""
    at, end = (int(i) for i in np.searchsorted(ordered, [_FIRST_S, _END_S]))
    length_s = max(series.timeframe.seconds * _BARS_AT_ONCE, _ROOM_S)
    while at < end:
        high = min(end, int(np.searchsorted(ordered, ordered[at] + length_s)))
        yield at, high
        at = high
