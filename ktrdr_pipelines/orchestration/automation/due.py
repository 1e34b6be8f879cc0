"""Which series miss their newest bars: what is complete by the calendar, settled, and not held.

Without gateway, Dagster and clock: the last held bar comes from the store, the newest complete one from the calendar. What is
done about it is decided in `tail.py`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, calendar_of, expected_bars, is_open, next_complete
from ktrdr_pipelines.domain.instruments import Hours, Series
from ktrdr_pipelines.domain.partitions import Partition, partition_at
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.planning.coverage import missing_bars
from ktrdr_pipelines.settings import Settings, first_partition_start
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.sidecar import TAIL_BYTES, peek_unfinished_from
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
    ``last_held_s`` (open) and ``newest_close_s`` are epoch seconds."""

    series: Series
    first: Partition
    last: Partition
    last_held_s: int
    newest_close_s: int


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
        """Open of the bar that a tail load continues from, epoch seconds, as in `modes.Held`: the newest, or the one before the
        start of an unfinished load. None without a CSV or a row in it.

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
        if last_s is not None and (unfinished := self._peek_unfinished(series)) is not None:
            last_s = min(last_s, int(unfinished.timestamp()) - 1)
        self._last[series.name] = (mark, last_s)
        return last_s

    def _peek_unfinished(self, series: Series) -> datetime | None:
        try:
            with self._store.sidecar_path(series).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                return peek_unfinished_from(file.read())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            with suppress(KtrdrError):  # a later read of the whole sidecar raises
                return Store(self._data_dir).read_sidecar(series).unfinished_from
            return None

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
        self._after: dict[tuple[_Key, int], ExpectedBars] = {}
        self._next: dict[_Key, tuple[datetime, bool] | None] = {}

    def last_held_s(self, series: Series) -> int | None:
        """See `HeldEnds.last_held_s`."""
        return self._held.last_held_s(series, self._now)

    def find_due(self, series: Series, last_held_s: int) -> Due | None:
        """The missing newest bars of ``series``; None if it is complete.

        A bar is due if it is complete and settled by the calendar, newer than the last held one, and not confirmed absent.

        Raises:
            KtrdrError: no calendar, or the sidecar cannot be read.
        """
        newest = self._find_newest(series)
        if newest is not None and last_held_s >= newest:
            return None
        after = self._bars_after(series, last_held_s)
        timeframe = series.timeframe
        earliest = first_partition_start(timeframe, self._settings)
        earliest = max(earliest, timeframe.retained_from(self._now) or earliest)
        wanted = after.take(slice(int(np.searchsorted(after.opens, int(earliest.timestamp()))), None))
        if not len(wanted):
            return None
        newest_close_s = int(wanted.closes[-1])
        # Reads no sidecar that is older than the newest bar: that would be most of a tick.
        is_news = self._held.changed_s(series) < newest_close_s
        # An expired contract has no new bars.
        is_news &= series.instrument.sec_type != "FUT"
        empty = [] if is_news else self._held.absent_windows(series, last_held_s)
        missing = missing_bars(wanted, np.array([last_held_s], dtype=np.int64), empty, timeframe)
        if not len(missing):
            return None
        last_held = datetime.fromtimestamp(last_held_s, UTC)
        first = partition_at(timeframe, max(last_held, earliest))
        last = partition_at(timeframe, datetime.fromtimestamp(int(missing.opens[-1]), UTC))
        return Due(series, first, last, last_held_s, int(missing.closes[-1]))

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

    def _bars_after(self, series: Series, last_held_s: int) -> ExpectedBars:
        key = (self._key(series), last_held_s)
        if key not in self._after:
            end = max(self._now + timedelta(days=1), datetime.fromtimestamp(last_held_s + 1, UTC))
            window = Window(datetime.fromtimestamp(last_held_s + 1, UTC), end)
            self._after[key] = expected_bars(series, window, complete_at_s=self._settled_s(series))
        return self._after[key]
