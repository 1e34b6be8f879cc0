"""The gaps inside series that are held: adopted files, failed windows, lost lines. What `gap_fill.py` may load by itself.

A gap is a run of expected bars that are missing between the first and the last held bar, or in a partition that Dagster has
recorded as complete. What was never loaded is no gap: a series without a file and a record, bars before the first held one, and
bars after the last one, which are the tail (`due.py`). `planning/coverage.py` decides which bars are missing, as for a load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, expected_bars
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partition_from_key
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import DataError, InputError
from ktrdr_pipelines.orchestration.automation.cancelled import Cancelled
from ktrdr_pipelines.orchestration.automation.request_cost import Cost, cost_of
from ktrdr_pipelines.orchestration.partition_definitions import first_partition_start
from ktrdr_pipelines.planning.coverage import mark_missing
from ktrdr_pipelines.planning.durations import NOMINAL_S
from ktrdr_pipelines.planning.open_ended import plan_to_now
from ktrdr_pipelines.planning.requests import plan_requests
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store


@dataclass(frozen=True, eq=False)
class InnerGaps:
    """The gaps of one series. ``bars`` may be loaded, those of ``segments`` (bounds of slices of them) together: no missing bar
    that may not be loaded lies between. ``too_long``: gaps that cost more than KTRDR_AUTO_REQUESTS requests each.
    ``cancelled``: the number of bars whose load a user cancelled."""

    series: Series
    bars: ExpectedBars
    segments: Sequence[tuple[int, int]]
    too_long: Sequence[tuple[Window, Cost]] = ()
    cancelled: int = 0

    def below(self, open_s: int) -> int:
        """The number of bars that open before ``open_s``."""
        return int(np.searchsorted(self.bars.opens, open_s))

    def plan_newest(self, low: int, high: int, limits: HistoryLimits, most: int) -> list[Window]:
        """The windows of at most ``most`` requests for the newest of the bars from ``low`` to ``high`` (indices, half-open), the
        newest first."""
        found: list[Window] = []
        for begin, end in reversed(self.segments):
            begin, end = max(begin, low), min(end, high)
            if begin < end and len(found) < most:
                found += self._plan_segment(begin, end, limits, most - len(found))
        return found[:most]

    def _plan_segment(self, begin: int, end: int, limits: HistoryLimits, most: int) -> list[Window]:
        timeframe = self.series.timeframe
        if self.series.instrument.ends_now:  # one request, up to now
            return [Window.from_epoch(self.bars.earliest_at(begin), int(self.bars.closes[end - 1]))]
        longest = timeframe.longest_request(limits)
        span_s = most * longest.count * NOMINAL_S[longest.unit]
        while True:  # ever longer parts, counted from the end, until they need enough requests
            since_s = int(self.bars.opens[end - 1]) - span_s
            first = max(begin, int(np.searchsorted(self.bars.opens, since_s)))
            requests = plan_requests(timeframe, self.bars.take(slice(first, end)), limits)
            if first == begin or len(requests) >= most:
                return [request.window for request in reversed(requests)]
            span_s *= 4


def find_inner_gaps(
    series: Series,
    store: Store,
    recorded: Sequence[str],
    settings: Settings,
    now: datetime,
    cancelled: Sequence[Cancelled] = (),
) -> InnerGaps:
    """The gaps of ``series`` in ``store`` (settled). ``recorded``: keys of the partitions that Dagster has as complete.

    A file that is no bar file counts as nothing held, so that its partitions are requested and fail with the reason.

    Raises:
        InputError: no calendar for the instrument. StoreError: the files cannot be read.
    """
    try:
        sidecar, held = store.read_sidecar(series), store.held_opens(series)
    except DataError:
        sidecar, held = Sidecar(), np.empty(0, np.int64)
    windows = _windows_of(series, recorded)
    span = _span_of(series, held, windows, settings, now)
    if span is None:
        return _nothing(series)
    expected = expected_bars(series, span, complete_at_s=int(now.timestamp()))
    first_s = int(held[0]) if len(held) else None
    missing = mark_missing(expected, held, sidecar, first_s, series.timeframe)
    missing &= _is_inside(expected.opens, held, windows)
    stopped = missing & _is_in(expected.opens, [(each.start_s, each.end_s) for each in cancelled])
    return _sort_out(series, expected, missing & ~stopped, stopped, settings, now)


def _windows_of(series: Series, keys: Sequence[str]) -> list[tuple[int, int]]:
    """The windows of partitions, epoch seconds, sorted; keys of another grid are left out."""
    found = []
    for key in keys:
        try:
            window = partition_from_key(series.timeframe, key).window
        except InputError:
            continue
        found.append((window.start_s, window.end_s))
    return sorted(found)


def _span_of(
    series: Series, held: IntArray, windows: Sequence[tuple[int, int]], settings: Settings, now: datetime
) -> Window | None:
    """Where gaps can be: from the first held or recorded bar to the last held one, else to now."""
    starts = [int(held[0])] if len(held) else []
    starts += [windows[0][0]] if windows else []
    if not starts:
        return None
    earliest = first_partition_start(series.timeframe, settings)
    earliest = max(earliest, series.timeframe.retained_from(now) or earliest)
    start_s = max(min(starts), int(earliest.timestamp()))
    end_s = int(held[-1]) if len(held) else int(now.timestamp())
    return Window.from_epoch(start_s, end_s) if start_s < end_s else None


def _is_inside(opens: IntArray, held: IntArray, windows: Sequence[tuple[int, int]]) -> BoolArray:
    inside = _is_in(opens, windows)
    return inside | (opens > held[0]) if len(held) else inside


def _is_in(opens: IntArray, windows: Sequence[tuple[int, int]]) -> BoolArray:
    found = np.zeros(len(opens), np.bool_)
    for start_s, end_s in windows:
        lo, hi = np.searchsorted(opens, [start_s, end_s])
        found[lo:hi] = True
    return found


def _nothing(series: Series) -> InnerGaps:
    none = np.empty(0, np.int64)
    return InnerGaps(series, ExpectedBars(none, none, none, none, none), ())


def _sort_out(
    series: Series, expected: ExpectedBars, missing: BoolArray, stopped: BoolArray, settings: Settings, now: datetime
) -> InnerGaps:
    """Leave out the gaps that are too long, and what IB does not serve."""
    blocked = stopped.copy()
    too_long = []
    for lo, hi in _runs_of(missing):
        bars = expected.take(slice(lo, hi))
        if cost := _cost_if_too_long(series, bars, settings):
            too_long.append((Window.from_epoch(bars.earliest_at(0), int(bars.closes[-1])), cost))
            blocked[lo:hi] = True
    wanted = missing & ~blocked
    if series.instrument.ends_now and wanted.any():
        planned = plan_to_now(series, expected.take(wanted), settings.history_limits, int(now.timestamp()))
        wanted &= ~np.isin(expected.opens, planned.unreachable.opens)
    at = np.flatnonzero(wanted)
    blocks_before = np.cumsum(blocked)[at]
    bounds = [0, *(np.flatnonzero(np.diff(blocks_before)) + 1).tolist(), len(at)]
    segments = tuple(pairwise(bounds)) if len(at) else ()
    return InnerGaps(series, expected.take(at), segments, tuple(too_long), int(stopped.sum()))


def _runs_of(mask: BoolArray) -> Iterator[tuple[int, int]]:
    """First and one after the last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _cost_if_too_long(series: Series, bars: ExpectedBars, settings: Settings) -> Cost | None:
    longest, most = series.timeframe.longest_request(settings.history_limits), settings.auto_requests
    if int(bars.closes[-1]) - bars.earliest_at(0) <= (most - 1) * longest.count * NOMINAL_S[longest.unit]:
        return None  # a longest request has at least its nominal length
    cost = cost_of(series, bars, settings.history_limits, most)
    return cost if cost.requests > most else None
