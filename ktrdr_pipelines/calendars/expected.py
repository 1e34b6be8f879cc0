"""The expected bars of trading sessions: their opens, when each is complete, and which held bars match them.

Stamps follow IB (docs/ib_facts.md, 3): a bar has its start, daily and longer bars a session date. If IB and this module
disagree, IB is right: bars that were not expected are kept.

Intraday alignment: the first bar of a segment (a session, or its part before or after a lunch break) opens with the segment,
the next ones at multiples of the bar length on the exchange's own clock, counted from local midnight. So an hourly series of a
US stock has 09:30, then 10:00 to 15:00, and forex has 17:15, then 18:00. For bars above one hour IB documents no alignment; the
same rule is used.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ktrdr_pipelines.calendars.session_tables import LAST_YEAR, IntArray, SessionTable
from ktrdr_pipelines.calendars.sessions import check_years, table_of
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.domain.timeframes import Timeframe

_DAY_S = 86400


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedBars:
    """Expected bars, oldest first. All arrays are int64 and equally long; instants are epoch seconds.

    ``opens``: the stamps, strictly increasing (for daily and longer bars a session date at 00:00 UTC; a week or month
    has the date of its last session). ``closes``: when each bar is complete, never decreasing. ``sessions``: number
    of the trading session within its calendar, for a week or month that of the last one. ``aliases``: another
    accepted stamp of the bar, else the stamp itself. ``begins``: when trading of the bar begins or its stamp, whichever
    is earlier (a daily forex bar begins on the evening before its date). ``sessions_per_week``: 5, or 7 round the clock.
    """

    opens: IntArray
    closes: IntArray
    sessions: IntArray
    aliases: IntArray
    begins: IntArray
    sessions_per_week: int = 5

    def __len__(self) -> int:
        return len(self.opens)

    def take(self, which: slice | NDArray[np.bool_] | IntArray) -> ExpectedBars:
        """The bars selected by a slice (views, no copies), a mask or ascending indices."""
        return ExpectedBars(
            self.opens[which],
            self.closes[which],
            self.sessions[which],
            self.aliases[which],
            self.begins[which],
            self.sessions_per_week,
        )


def expected_bars(series: Series, window: Window, *, complete_at_s: int | None = None) -> ExpectedBars:
    """The bars of ``series`` whose stamp lies in the half-open ``window``.

    With ``complete_at_s`` (epoch seconds, the caller's now) only those complete by then: closed at or before it. A half
    day has fewer bars, a holiday none, an expired future none (`Instrument.trades_until`). Two million bars take
    about 30 ms, a day of them about 0.1 ms; the arrays may be shared with other callers and are read-only.

    Raises:
        InputError: no calendar for the instrument, or ``window`` is outside the years of `check_years`.
    """
    check_years(window)
    table = table_of(series.instrument)
    if series.timeframe.is_intraday:
        bars = _cut(_make_intraday(table, series.timeframe.seconds, window.start_s, window.end_s), window)
    else:
        bars = _cut(_make_by_date(table, series.timeframe.name), window)
    last = _last_session(series, table)
    if last is not None:
        bars = bars.take(slice(0, int(np.searchsorted(bars.sessions, last, side="right"))))
    if complete_at_s is not None:
        bars = bars.take(slice(0, int(np.searchsorted(bars.closes, complete_at_s, side="right"))))
    return bars


def _last_session(series: Series, table: SessionTable) -> int | None:
    """The last session of ``table`` that a bar of ``series`` may belong to; None without expiry. A week or month has the
    number of its last session, even if the instrument expires within it."""
    until = series.instrument.trades_until
    if until is None:
        return None
    midnight = datetime(until.year, until.month, until.day, tzinfo=UTC)
    last = int(np.searchsorted(table.dates, int(midnight.timestamp()), side="right")) - 1
    if series.timeframe.is_intraday:
        return last
    numbers = _make_by_date(table, series.timeframe.name).sessions
    return int(numbers[min(int(np.searchsorted(numbers, last)), len(numbers) - 1)])


def next_complete(series: Series, after: datetime) -> datetime | None:
    """When the next bar of ``series`` is complete: the earliest close after ``after`` (aware). In UTC. None if it has expired.

    Raises:
        InputError: no calendar, or no later bar in the years that calendars cover.
    """
    after_s = int(require_utc(after).timestamp() // 1)
    table = table_of(series.instrument)
    until = series.instrument.trades_until
    if until is not None and require_utc(after).date() > until:
        return None
    if series.timeframe.is_intraday:
        lo = int(np.searchsorted(table.ends, after_s, side="right"))
        closes = _fill_segments(table, series.timeframe.seconds, lo, lo + 1).closes
    else:
        closes = _make_by_date(table, series.timeframe.name).closes
    i = int(np.searchsorted(closes, after_s, side="right"))
    if i == len(closes):
        check_years(Window(require_utc(after), datetime(LAST_YEAR + 1, 1, 2, tzinfo=UTC)))
    return datetime.fromtimestamp(int(closes[i]), UTC)


def period_keys(timeframe: Timeframe, stamps: IntArray) -> IntArray:
    """Keys that are equal for two stamps (epoch seconds) of the same bar.

    Weekly: the week, Monday to Sunday, UTC dates. Monthly: the calendar month. Everything else: the stamp itself. IB
    stamps weeks and months with their last session, a forming one with the current day; other gateways with the first day.
    """
    stamps = np.asarray(stamps, dtype=np.int64)
    if timeframe.name == "1w":
        return (stamps // _DAY_S + 3) // 7  # 1970-01-01 was a Thursday
    if timeframe.name == "1mo":
        return stamps.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    return stamps


def match_held(expected: ExpectedBars, held_opens: IntArray, timeframe: Timeframe) -> NDArray[np.bool_]:
    """True for each expected bar that is in ``held_opens`` (sorted epoch seconds).

    A bar matches the same stamp; a first bar off the clock grid (17:15) also the grid point before it (17:00) if the market is
    closed there; a week or month any stamp within it.
    """
    held = period_keys(timeframe, held_opens)
    keys = period_keys(timeframe, expected.opens)
    found = _is_in(keys, held)
    if expected.aliases is not expected.opens:
        other = np.flatnonzero(~found & (expected.aliases != expected.opens))
        if len(other):
            found[other] = _is_in(expected.aliases[other], held)
    return found


def find_unexpected(expected: ExpectedBars, held_opens: IntArray, timeframe: Timeframe) -> NDArray[np.bool_]:
    """True for each of ``held_opens`` (sorted epoch seconds) that matches no bar of ``expected``. Such bars are kept."""
    held = period_keys(timeframe, held_opens)
    known = _is_in(held, period_keys(timeframe, expected.opens))
    off_grid = expected.aliases[expected.aliases != expected.opens]
    return ~(known | _is_in(held, off_grid))


def _is_in(values: IntArray, ordered: IntArray) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[at] == values, dtype=np.bool_)


def _cut(bars: ExpectedBars, window: Window) -> ExpectedBars:
    lo, hi = np.searchsorted(bars.opens, [window.start_s, window.end_s], side="left")
    return bars.take(slice(int(lo), int(hi)))


def _freeze(*arrays: IntArray) -> None:
    for array in arrays:
        array.flags.writeable = False


# --- intraday --------------------------------------------------------------------------------------------------------


class _BlockCache:
    """The last large blocks of bars: at most one for each table and bar length, ``limit`` bars in total, oldest dropped."""

    def __init__(self, smallest: int, limit: int) -> None:
        self._smallest, self._limit = smallest, limit
        self._blocks: dict[tuple[SessionTable, int], tuple[int, int, ExpectedBars]] = {}
        self._lock = threading.Lock()

    def find(self, table: SessionTable, step: int, lo: int, hi: int) -> ExpectedBars | None:
        """A block that contains the segments ``lo`` to ``hi`` (excluded), or None."""
        block = self._blocks.get((table, step))
        return block[2] if block and block[0] <= lo and hi <= block[1] else None

    def keep(self, table: SessionTable, step: int, lo: int, hi: int, bars: ExpectedBars) -> None:
        if not self._smallest <= len(bars) <= self._limit:
            return  # quick to build again, or too large
        with self._lock:
            self._blocks.pop((table, step), None)
            self._blocks[table, step] = (lo, hi, bars)
            while sum(len(block[2]) for block in self._blocks.values()) > self._limit:
                del self._blocks[next(iter(self._blocks))]


# 2.5 million bars are 60 MB: twenty years of minutes in regular hours.
_blocks = _BlockCache(smallest=20_000, limit=2_500_000)


def _make_intraday(table: SessionTable, step: int, start_s: int, end_s: int) -> ExpectedBars:
    """Bars of (at least) every segment that shares an instant with [start_s, end_s)."""
    lo = int(np.searchsorted(table.ends, start_s, side="right"))
    hi = max(lo, int(np.searchsorted(table.starts, end_s, side="left")))
    bars = _blocks.find(table, step, lo, hi)
    if bars is None:
        bars = _fill_segments(table, step, lo, hi)
        _blocks.keep(table, step, lo, hi, bars)
    return bars


def _fill_segments(table: SessionTable, step: int, lo: int, hi: int) -> ExpectedBars:
    """Bars of the segments ``lo`` to ``hi`` (excluded), built from the session table without a loop."""
    starts, ends, offsets = table.starts[lo:hi], table.ends[lo:hi], table.offsets[lo:hi]
    ids = table.session_ids[lo:hi]
    if not len(starts):
        empty = np.empty(0, dtype=np.int64)
        return ExpectedBars(empty, empty, empty, empty, empty, table.sessions_per_week)
    first_grid = ((starts + offsets) // step + 1) * step - offsets  # the first grid point after each start
    counts = 1 + np.maximum(0, -((first_grid - ends) // step))
    bounds = np.cumsum(counts)
    firsts = bounds - counts
    # Opens as a running sum: the length of a bar everywhere but at the first two bars of a segment.
    opens = np.full(int(bounds[-1]), step, dtype=np.int64)
    many = counts > 1
    opens[firsts[many] + 1] = first_grid[many] - starts[many]
    last_opens = np.where(many, first_grid + (counts - 2) * step, starts)
    opens[firsts[0]] = starts[0]
    opens[firsts[1:]] = starts[1:] - last_opens[:-1]
    np.cumsum(opens, out=opens)
    closes = opens + step
    closes[firsts] = np.minimum(first_grid, ends)
    closes[bounds - 1] = ends
    sessions = np.repeat(ids, counts)
    aliases = opens
    before = first_grid - step
    shut = np.concatenate([table.ends[lo - 1 : lo] if lo else starts[:1] - _DAY_S, ends[:-1]])
    # Only if the market is closed at the grid point: else it is the stamp of another bar (a two-hour forex bar from 16:00).
    odd = (before != starts) & (before >= shut)
    if odd.any():
        aliases = opens.copy()
        aliases[firsts[odd]] = before[odd]
    _freeze(opens, closes, sessions, aliases)
    return ExpectedBars(opens, closes, sessions, aliases, opens, table.sessions_per_week)


# --- daily and longer ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _make_by_date(table: SessionTable, timeframe_name: str) -> ExpectedBars:
    """Every bar of the table: one for each session, week or month, complete at the close of its last session."""
    ids = np.arange(len(table.dates), dtype=np.int64)
    if timeframe_name == "1d":
        begins = np.minimum(table.dates, table.opens)
        bars = ExpectedBars(table.dates, table.closes, ids, table.dates, begins, table.sessions_per_week)
    else:
        if timeframe_name == "1w":
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
    return bars
