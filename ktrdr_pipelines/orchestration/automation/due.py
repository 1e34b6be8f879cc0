"""Which series miss their newest bars: what is complete by the calendar, settled, and not held.

Without gateway, Dagster and clock: the last held bar comes from the store, the newest complete one from the calendar. What is
done about it is decided in `tail.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, calendar_of, expected_bars, is_open, next_complete
from ktrdr_pipelines.domain.instruments import Hours, Series
from ktrdr_pipelines.domain.partitions import Partition, partition_at
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.orchestration.automation.cancelled import Cancelled
from ktrdr_pipelines.orchestration.automation.request_cost import Cost, cost_of, reach_s
from ktrdr_pipelines.orchestration.partition_definitions import first_partition_start
from ktrdr_pipelines.planning.coverage import missing_bars
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.store import Store

SETTLING_S = 10
"""A bar is due this long after its close: IB needs a moment to finish it."""

QUIET_S = 30
"""Another program may still be writing a file that changed so recently; it waits for the next tick."""

_LOCK_TIMEOUT_S = 2.0  # adopting a foreign file takes the lock; a tick does not wait for a writer


def settling_s(timeframe: Timeframe, settings: Settings) -> int:
    """Seconds from the close of a bar until it is due. For daily and longer bars the setting, unless a schedule decides when."""
    if timeframe.is_intraday or timeframe.name in settings.tail_schedules:
        return SETTLING_S
    return max(SETTLING_S, int(settings.settlement_delay_min * 60))


@dataclass(frozen=True, slots=True)
class Due:
    """A series that misses at least its newest bar. ``first``: the partition of its last held bar, which is requested again.
    ``last_held_s`` (open) and ``newest_close_s`` are epoch seconds.

    ``cancelled``: some of the missing bars are in a range whose load a user cancelled. Then only bars that closed since are due,
    and ``first`` is the partition of the first of them; without such bars ``cost`` is zero. ``start``: where the load has to
    begin so that it requests no cancelled bar; None: where a tail begins.
    """

    series: Series
    first: Partition
    last: Partition
    last_held_s: int
    newest_close_s: int
    cost: Cost
    cancelled: bool = False
    start: datetime | None = None


class HeldEnds:
    """The last held bar of each series, and absent bars after it. Reads a file again only if it changed."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._store = Store(data_dir, lock_timeout_s=_LOCK_TIMEOUT_S)
        self._last: dict[str, tuple[object, int | None]] = {}
        self.notices: list[str] = []
        """Corrections of files made by other programs, until the caller takes them."""
        self._empty: dict[str, tuple[object, list[Window]]] = {}

    def last_held_s(self, series: Series, now: datetime) -> int | None:
        """Open of the newest held bar, epoch seconds; None without a CSV or a row in it. Older missing bars are gaps
        (`inner_gaps.py`).

        Also None for another program's file that changed within `QUIET_S` before ``now``: it may still be written.

        Raises:
            KtrdrError: the file cannot be read.
        """
        path, sidecar_path = self._store.csv_path(series), self._store.sidecar_path(series)
        mark = (state_of(path), state_of(sidecar_path))
        known = self._last.get(series.name)
        if known is not None and known[0] == mark:
            return known[1]
        if mark[0] is None:
            return None
        is_quiet = not 0 <= now.timestamp() - mark[0].mtime_ns / 1e9 < QUIET_S
        if not is_quiet and mark[1] is None:
            return None
        extent = self._store.extent(series)
        if state_of(path) != mark[0]:  # reading has adopted it
            self.notices += [f"{series}: {text}" for text in self._store.prepare(series, now=now).describe()]
            mark = (state_of(path), state_of(sidecar_path))
        last_s = extent.last_open_s if extent else None
        self._last[series.name] = (mark, last_s)
        return last_s

    def changed_s(self, series: Series) -> float:
        """When the sidecar was last written, epoch seconds; 0 without one. It has no evidence about bars that closed later."""
        mark = state_of(self._store.sidecar_path(series))
        return mark.mtime_ns / 1e9 if mark else 0.0

    def absent_windows(self, series: Series, after_s: int) -> list[Window]:
        """Windows of confirmed-absent bars that end after ``after_s``.

        Raises:
            KtrdrError: the sidecar cannot be read.
        """
        mark = (state_of(self._store.csv_path(series)), state_of(self._store.sidecar_path(series)), after_s)
        known = self._empty.get(series.name)
        if known is None or known[0] != mark:
            # A new store, because a store caches every sidecar it reads: megabytes each, for thousands of series.
            sidecar = Store(self._data_dir).read_sidecar(series)
            known = (mark, [window for window in sidecar.empty_windows if window.end_s > after_s])
            self._empty[series.name] = known
        return known[1]


_Key = tuple[str, Hours, str, date | None]
"""Calendar, hours, timeframe and, of a future, its end: series with one key expect the same bars."""


class Tails:
    """Decides for many series at one instant; what they share (calendar, timeframe, last held bar) is computed once."""

    def __init__(self, settings: Settings, held: HeldEnds, now: datetime) -> None:
        self._settings, self._held, self._now = settings, held, now
        self._newest: dict[_Key, int | None] = {}
        self._after: dict[tuple[_Key, Window], ExpectedBars] = {}
        self._costs: dict[tuple[_Key, int, int, int], Cost] = {}
        self._next: dict[_Key, tuple[datetime, bool] | None] = {}

    def last_held_s(self, series: Series) -> int | None:
        """See `HeldEnds.last_held_s`."""
        return self._held.last_held_s(series, self._now)

    def find_due(self, series: Series, last_held_s: int, cancelled: Sequence[Cancelled] = ()) -> Due | None:
        """The missing newest bars of ``series``; None if it is complete.

        A bar is due if it is complete and settled by the calendar, newer than the last held one, and not confirmed absent.

        Raises:
            KtrdrError: no calendar, or the sidecar cannot be read.
        """
        newest = self._find_newest(series)
        if newest is not None and last_held_s >= newest:
            return None
        ahead = [each for each in cancelled if each.end_s > last_held_s]
        far = None if ahead else self._judge_far(series, last_held_s)
        due = far or self._judge(series, last_held_s, ahead)
        if due is not None and due.start is None and any(each.end_s > due.first.window.start_s for each in cancelled):
            # A load that was broken off would be continued where it stopped.
            return replace(due, start=datetime.fromtimestamp(last_held_s, UTC))
        return due

    def _judge_far(self, series: Series, last_held_s: int) -> Due | None:
        """A series so far behind that a sensor may not load it, from the first part of what is missing; else None. Twenty years
        of one-second bars take long to count, and would be counted in every tick."""
        reach = reach_s(series.timeframe, self._settings.history_limits, self._settings.auto_requests)
        begin_s = max(last_held_s + 1, int(self._earliest(series.timeframe).timestamp()))
        behind_s = int(self._now.timestamp()) - begin_s
        if behind_s <= reach or series.instrument.ends_now:
            return None
        wanted = self._wanted(series, Window.from_epoch(begin_s, begin_s + reach))
        missing = self._missing(series, last_held_s, wanted)
        cost = self._cost(series, missing)
        if cost.requests <= self._settings.auto_requests:
            return None
        estimate = Cost(cost.requests * behind_s // reach, is_exact=False)
        return self._make_due(series, last_held_s, missing, estimate)

    def _judge(self, series: Series, last_held_s: int, cancelled: Sequence[Cancelled]) -> Due | None:
        span = Window.from_epoch(last_held_s + 1, max(int(self._now.timestamp()) + 86400, last_held_s + 1))
        missing = self._missing(series, last_held_s, self._wanted(series, span))
        hit = [each for each in cancelled if ((missing.opens >= each.start_s) & (missing.opens < each.end_s)).any()]
        if not hit:
            return self._make_due(series, last_held_s, missing, self._cost(series, missing)) if len(missing) else None
        fresh = missing.take(missing.closes > max(each.at_s for each in hit))
        if not len(fresh):
            return self._make_due(series, last_held_s, missing, Cost(0), cancelled=True)
        return self._make_due(series, last_held_s, fresh, self._cost(series, fresh), cancelled=True)

    def _wanted(self, series: Series, span: Window) -> ExpectedBars:
        """The expected bars of ``span`` that partitions and IB's retention reach."""
        earliest = self._earliest(series.timeframe)
        after = self._bars_in(series, span)
        return after.take(slice(int(np.searchsorted(after.opens, int(earliest.timestamp()))), None))

    def _earliest(self, timeframe: Timeframe) -> datetime:
        earliest = first_partition_start(timeframe, self._settings)
        return max(earliest, timeframe.retained_from(self._now) or earliest)

    def _missing(self, series: Series, last_held_s: int, wanted: ExpectedBars) -> ExpectedBars:
        if not len(wanted):
            return wanted
        # Reads no sidecar that is older than the newest bar: that would be most of a tick.
        is_news = self._held.changed_s(series) < int(wanted.closes[-1])
        # An expired contract has no new bars.
        is_news &= series.instrument.sec_type != "FUT"
        empty = [] if is_news else self._held.absent_windows(series, last_held_s)
        return missing_bars(wanted, np.array([last_held_s], dtype=np.int64), empty, series.timeframe)

    def _cost(self, series: Series, missing: ExpectedBars) -> Cost:
        if not len(missing):
            return Cost(0)
        key = (self._key(series), int(missing.opens[0]), int(missing.opens[-1]), len(missing))
        if key not in self._costs:
            settings = self._settings
            self._costs[key] = cost_of(series, missing, settings.history_limits, settings.auto_requests)
        return self._costs[key]

    def _make_due(
        self, series: Series, last_held_s: int, bars: ExpectedBars, cost: Cost, *, cancelled: bool = False
    ) -> Due:
        timeframe = series.timeframe
        begin = max(datetime.fromtimestamp(last_held_s, UTC), self._earliest(timeframe))
        start = datetime.fromtimestamp(int(bars.opens[0]), UTC) if cancelled and cost.requests else None
        last = partition_at(timeframe, datetime.fromtimestamp(int(bars.opens[-1]), UTC))
        first = partition_at(timeframe, start or begin)
        return Due(series, first, last, last_held_s, int(bars.closes[-1]), cost, cancelled, start)

    def find_next(self, series: Series) -> tuple[datetime, bool] | None:
        """When the next bar of ``series`` will be due, and whether its market is open now; None if it has expired."""
        key = self._key(series)
        if key not in self._next:
            settling = timedelta(seconds=settling_s(series.timeframe, self._settings))
            closes = next_complete(series, self._now - settling)
            is_open_now = is_open(series.instrument, self._now)
            self._next[key] = None if closes is None else (closes + settling, is_open_now)
        return self._next[key]

    def _key(self, series: Series) -> _Key:
        instrument = series.instrument
        return (calendar_of(instrument), instrument.hours, series.timeframe.name, instrument.trades_until)

    def _settled_s(self, series: Series) -> int:
        return int(self._now.timestamp()) - settling_s(series.timeframe, self._settings)

    def _find_newest(self, series: Series) -> int | None:
        """Open of the newest bar that may be due; None if there was none for longer than any holiday lasts."""
        key = self._key(series)
        if key not in self._newest:
            days = 12 if series.timeframe.is_intraday else 100
            window = Window(self._now - timedelta(days=days), self._now + timedelta(days=1))
            bars = expected_bars(series, window, complete_at_s=self._settled_s(series))
            self._newest[key] = int(bars.opens[-1]) if len(bars) else None
        return self._newest[key]

    def _bars_in(self, series: Series, span: Window) -> ExpectedBars:
        key = (self._key(series), span)
        if key not in self._after:
            self._after[key] = expected_bars(series, span, complete_at_s=self._settled_s(series))
        return self._after[key]
