"""The bars of a calendar: as arrays (`ExpectedBars`), and as a grid that is counted instead of listed (`BarGrid`).

A grid covers all years of a calendar at one bar length. It finds the number of a bar by arithmetic on the sessions, so counting
two million bars costs no more than counting ten, and a table of bars is built only for the numbers that a caller wants to see.

The grid of intraday bars: the first bar of a segment (a session, or its part before or after a lunch break) starts with it,
the next ones at multiples of the bar length in local time of the exchange, counted from midnight. So an hourly
series of a US stock has 09:30, then 10:00 to 15:00, and forex has 17:15, then 18:00. IB's alignment of bars above one
hour is not documented; the same rule is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ktrdr_pipelines.calendars.session_tables import SessionTable
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Timeframe

_DAY_S = 86400


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedBars:
    """Bars that should exist, oldest first. All arrays are int64 and equally long; instants are epoch seconds.

    ``opens``: the stamps, strictly increasing (for daily and longer bars a session date at 00:00 UTC; a week or month
    carries the date of its last session). ``closes``: when each bar is complete, never decreasing. ``sessions``: number
    of the trading session within its calendar, for a week or month that of the last one. ``aliases``: another stamp
    that is accepted for the bar (never after the stamp), else the stamp itself. ``begins``: the start of the bar's trading or its
    stamp, whichever is earlier (a daily forex bar begins on the evening before its date). ``sessions_per_week``: 5, or 7.
    """

    opens: IntArray
    closes: IntArray
    sessions: IntArray
    aliases: IntArray
    begins: IntArray
    sessions_per_week: int = 5

    def __len__(self) -> int:
        return len(self.opens)

    @property
    def earliest(self) -> IntArray:
        """The earliest instant of each bar, in epoch seconds: the start of its trading or its earliest accepted stamp. An
        answer that reaches back to it covers the whole bar."""
        # `begins` is never after `opens`, but an alias may lie before both: 17:00 for the forex bar that opens at 17:15.
        return np.minimum(self.begins, self.aliases)

    def earliest_at(self, i: int) -> int:
        """`earliest` of the bar at ``i``, without computing it for the others."""
        return min(int(self.begins[i]), int(self.aliases[i]))

    def complete_at(self, now_s: float) -> ExpectedBars:
        """The bars that are complete at ``now_s`` (epoch seconds): those whose close is not after it. The others are forming or
        have not begun."""
        return self.take(slice(0, int(np.searchsorted(self.closes, now_s, side="right"))))

    def is_complete_at(self, now_s: float) -> BoolArray:
        """`complete_at` as a mask."""
        return np.asarray(self.closes <= now_s, dtype=np.bool_)

    def take(self, which: slice | BoolArray | IntArray) -> ExpectedBars:
        """The bars chosen by a slice (views, no copies), a mask or ascending indices."""
        return ExpectedBars(
            self.opens[which],
            self.closes[which],
            self.sessions[which],
            self.aliases[which],
            self.begins[which],
            self.sessions_per_week,
        )


def period_keys(timeframe: Timeframe, stamps: IntArray) -> IntArray:
    """A key for each stamp (epoch seconds) that is equal for stamps of the same bar.

    Weekly: the week, Monday to Sunday, UTC dates. Monthly: the calendar month. All others: the stamp itself. In observed
    answers IB stamps weeks and months with their last session, and a forming one with the present day; other gateways may use the
    first day.
    """
    stamps = np.asarray(stamps, dtype=np.int64)
    if timeframe.name == "1w":
        return (stamps // _DAY_S + 3) // 7  # 1970-01-01 was a Thursday
    if timeframe.name == "1mo":
        return stamps.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    return stamps


class BarGrid(ABC):
    """Every bar of one calendar, hours and timeframe, numbered from 0, oldest first. Instants are epoch seconds."""

    @abstractmethod
    def count_before(self, instants_s: IntArray) -> IntArray:
        """How many bars have a stamp before each instant; also the number of the first bar at or after it."""

    @abstractmethod
    def count_begun(self, now_s: int) -> int:
        """How many bars have begun at ``now_s``."""

    @abstractmethod
    def count_complete(self, now_s: int) -> int:
        """How many bars are complete at ``now_s``, as `ExpectedBars.complete_at` counts them."""

    @abstractmethod
    def count_to_session(self, session: int) -> int:
        """How many bars belong to the sessions up to the one with this number. A week or month that contains it counts."""

    @abstractmethod
    def find(self, stamps_s: IntArray) -> IntArray:
        """The number of the bar that each stamp satisfies, as `match_held` matches them; -1 where there is none."""

    @abstractmethod
    def pick(self, numbers: IntArray) -> ExpectedBars:
        """The bars with these numbers (ascending)."""

    @abstractmethod
    def list_bars(self, first: int, end: int) -> ExpectedBars:
        """The bars ``first`` to ``end`` (excluded). The arrays may be shared and are read-only."""


class _IntradayGrid(BarGrid):
    """The segments of a table, and how many bars each one has."""

    def __init__(self, table: SessionTable, step: int) -> None:
        self._table, self._step = table, step
        starts, ends, offsets = table.starts, table.ends, table.offsets
        self._second = ((starts + offsets) // step + 1) * step - offsets
        """The first grid point after each start: the open of the second bar, if there is one."""
        self._counts = 1 + np.maximum(0, -((self._second - ends) // step))
        self._bounds = np.cumsum(self._counts)
        self._firsts = self._bounds - self._counts
        # Another stamp is accepted only where the market is closed at the grid point before the start: else it is the stamp of
        # another bar (a two-hour forex bar from 16:00).
        before = self._second - step
        shut = np.concatenate([starts[:1] - _DAY_S, ends[:-1]])
        self._aliases = np.where((before != starts) & (before >= shut), before, starts)

    def count_before(self, instants_s: IntArray) -> IntArray:
        segments = np.searchsorted(self._table.starts, instants_s, side="left") - 1
        if not len(self._counts):
            return np.zeros(len(instants_s), dtype=np.int64)
        at = np.maximum(segments, 0)
        more = np.clip(-((self._second[at] - instants_s) // self._step), 0, self._counts[at] - 1)
        return np.where(segments >= 0, self._firsts[at] + 1 + more, 0)

    def count_begun(self, now_s: int) -> int:
        return int(self.count_before(np.array([now_s + 1]))[0])

    def count_complete(self, now_s: int) -> int:
        segment = int(np.searchsorted(self._table.ends, now_s, side="right"))
        if segment == len(self._counts):
            return int(self._bounds[-1]) if segment else 0
        inside = (now_s - int(self._second[segment])) // self._step + 1
        return int(self._firsts[segment]) + min(max(inside, 0), int(self._counts[segment]) - 1)

    def count_to_session(self, session: int) -> int:
        segments = int(np.searchsorted(self._table.session_ids, session, side="right"))
        return int(self._bounds[segments - 1]) if segments else 0

    def find(self, stamps_s: IntArray) -> IntArray:
        table, step = self._table, self._step
        found = np.full(len(stamps_s), -1, dtype=np.int64)
        if not len(self._counts):
            return found
        segments = np.searchsorted(table.starts, stamps_s, side="right") - 1
        at = np.maximum(segments, 0)
        beyond_start = stamps_s - self._second[at]
        is_grid_point = (beyond_start >= 0) & (beyond_start % step == 0)
        is_start = stamps_s == table.starts[at]
        is_open = (segments >= 0) & (stamps_s < table.ends[at]) & (is_grid_point | is_start)
        found[is_open] = (self._firsts[at] + np.where(is_start, 0, 1 + beyond_start // step))[is_open]
        after = np.minimum(segments + 1, len(self._counts) - 1)
        is_alias = ~is_open & (stamps_s == self._aliases[after])
        found[is_alias] = self._firsts[after[is_alias]]
        return found

    def pick(self, numbers: IntArray) -> ExpectedBars:
        segments = np.searchsorted(self._bounds, numbers, side="right")
        within = numbers - self._firsts[segments]
        starts, ends, second = self._table.starts[segments], self._table.ends[segments], self._second[segments]
        opens = np.where(within > 0, second + (within - 1) * self._step, starts)
        closes = np.minimum(second + within * self._step, ends)
        aliases = np.where(within > 0, opens, self._aliases[segments])
        ids = self._table.session_ids[segments]
        return ExpectedBars(opens, closes, ids, aliases, opens, self._table.sessions_per_week)

    def list_bars(self, first: int, end: int) -> ExpectedBars:
        # As `pick` of consecutive numbers, three times as quick: opens are a running sum, the length of a bar everywhere but at
        # the first two bars of a segment.
        lo, hi = (int(i) for i in np.searchsorted(self._bounds, [first, max(first, end) - 1], side="right"))
        if first >= end:
            empty = np.empty(0, dtype=np.int64)
            return ExpectedBars(empty, empty, empty, empty, empty, self._table.sessions_per_week)
        part = slice(lo, hi + 1)
        starts, ends, second, counts = (
            self._table.starts[part],
            self._table.ends[part],
            self._second[part],
            self._counts[part],
        )
        firsts = self._firsts[part] - self._firsts[lo]
        opens = np.full(int(counts.sum()), self._step, dtype=np.int64)
        many = counts > 1
        opens[firsts[many] + 1] = second[many] - starts[many]
        last_opens = np.where(many, second + (counts - 2) * self._step, starts)
        opens[firsts[0]] = starts[0]
        opens[firsts[1:]] = starts[1:] - last_opens[:-1]
        np.cumsum(opens, out=opens)
        closes = opens + self._step
        closes[firsts] = np.minimum(second, ends)
        closes[firsts + counts - 1] = ends
        sessions = np.repeat(self._table.session_ids[part], counts)
        aliases = opens
        odd = self._aliases[part] != starts
        if odd.any():
            aliases = opens.copy()
            aliases[firsts[odd]] = self._aliases[part][odd]
        _freeze(opens, closes, sessions, aliases)
        bars = ExpectedBars(opens, closes, sessions, aliases, opens, self._table.sessions_per_week)
        return bars.take(slice(first - int(self._firsts[lo]), end - int(self._firsts[lo])))


class _DateGrid(BarGrid):
    """Daily and longer bars, all of them listed: one a session, week or month, complete at the close of its last session."""

    def __init__(self, table: SessionTable, timeframe: Timeframe) -> None:
        ids = np.arange(len(table.dates), dtype=np.int64)
        if timeframe.name == "1d":
            begins = np.minimum(table.dates, table.opens)
            bars = ExpectedBars(table.dates, table.closes, ids, table.dates, begins, table.sessions_per_week)
        else:
            if timeframe.name == "1w":
                days = table.dates // _DAY_S
                period_starts = (days - (days + 3) % 7) * _DAY_S
            else:
                months = table.dates.astype("datetime64[s]").astype("datetime64[M]")
                period_starts = months.astype("datetime64[s]").astype(np.int64)
            lasts = np.flatnonzero(np.append(period_starts[1:] != period_starts[:-1], True))
            firsts = np.concatenate([[0], lasts[:-1] + 1])
            begins = np.minimum(period_starts[firsts], table.opens[firsts])
            opens = table.dates[lasts]
            bars = ExpectedBars(opens, table.closes[lasts], ids[lasts], opens, begins, table.sessions_per_week)
        _freeze(bars.opens, bars.closes, bars.sessions, bars.begins)
        self._bars, self._timeframe = bars, timeframe
        self._keys = period_keys(timeframe, bars.opens)

    def count_before(self, instants_s: IntArray) -> IntArray:
        return np.searchsorted(self._bars.opens, instants_s, side="left").astype(np.int64)

    def count_begun(self, now_s: int) -> int:
        return int(np.searchsorted(self._bars.begins, now_s, side="right"))

    def count_complete(self, now_s: int) -> int:
        return len(self._bars.complete_at(now_s))

    def count_to_session(self, session: int) -> int:
        return min(int(np.searchsorted(self._bars.sessions, session)) + 1, len(self._bars)) if session >= 0 else 0

    def find(self, stamps_s: IntArray) -> IntArray:
        keys = period_keys(self._timeframe, stamps_s)
        at = np.searchsorted(self._keys, keys)
        known = at < len(self._keys)
        known[known] = self._keys[at[known]] == keys[known]
        return np.where(known, at, -1).astype(np.int64)

    def pick(self, numbers: IntArray) -> ExpectedBars:
        return self._bars.take(numbers)

    def list_bars(self, first: int, end: int) -> ExpectedBars:
        return self._bars.take(slice(first, max(first, end)))


def _freeze(*arrays: IntArray) -> None:
    for array in arrays:
        array.flags.writeable = False


@lru_cache(maxsize=64)
def grid_of(table: SessionTable, timeframe_name: str) -> BarGrid:
    """The grid of a table and timeframe, built once: about 2 ms, and 40 bytes a session."""
    timeframe = TIMEFRAMES[timeframe_name]
    return _IntradayGrid(table, timeframe.seconds) if timeframe.is_intraday else _DateGrid(table, timeframe)
