"""The expected bars of a series: how many, which stamps, when each is complete, and which of them are held.

Sessions are in `sessions.py`, the grid of bars within them in `bar_grid.py`; requests for missing bars in `planning/requests.py`.
Stamps follow IB (docs/ib_facts.md, 3): a bar is stamped with its start, daily and longer bars with a session date. Where IB and
this module disagree, IB is right: bars that were not expected are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.calendars.bar_grid import BarGrid, ExpectedBars, grid_of, period_keys
from ktrdr_pipelines.calendars.session_tables import LAST_YEAR
from ktrdr_pipelines.calendars.sessions import check_years, table_of
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.domain.timeframes import Timeframe


@dataclass(frozen=True, slots=True)
class ExpectedRange:
    """Consecutive expected bars that are counted and not listed: the numbers ``first`` to ``end`` (excluded) of ``grid``."""

    grid: BarGrid
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def list_bars(self) -> ExpectedBars:
        """The bars as arrays. Two million take about 30 ms, one day about 0.1 ms."""
        return self.grid.list_bars(self.first, self.end)


def count_expected(series: Series, window: Window, *, complete_at_s: int | None = None) -> ExpectedRange:
    """The bars of `expected_bars`, which has the same arguments, without a list of them. About 20 µs whatever the window.

    Raises:
        InputError: no calendar is known for the instrument, or ``window`` is outside the years of `check_years`.
    """
    check_years(window)
    table = table_of(series.instrument)
    grid = grid_of(table, series.timeframe.name)
    first, end = grid.count_before(np.array([window.start_s, window.end_s], dtype=np.int64)).tolist()
    last = _last_session(series.instrument, table.dates)
    if last is not None:
        end = min(end, grid.count_to_session(last))
    if complete_at_s is not None:
        end = min(end, grid.count_complete(complete_at_s))
    return ExpectedRange(grid, first, max(first, end))


def expected_bars(series: Series, window: Window, *, complete_at_s: int | None = None) -> ExpectedBars:
    """The bars of ``series`` whose stamp lies in the half-open ``window``.

    With ``complete_at_s`` (epoch seconds, the caller's now) only bars that close at or before it. A half day has fewer bars, a
    holiday none, an expired future none (`Instrument.trades_until`). The arrays may be shared and are read-only.

    Raises:
        InputError: no calendar is known for the instrument, or ``window`` is outside the years of `check_years`.
    """
    return count_expected(series, window, complete_at_s=complete_at_s).list_bars()


def forming_bars(series: Series, now_s: int) -> ExpectedBars:
    """The bars that have begun and are not complete at ``now_s``; none while the market is closed.

    Raises:
        InputError: no calendar is known for the instrument.
    """
    table = table_of(series.instrument)
    grid = grid_of(table, series.timeframe.name)
    last = _last_session(series.instrument, table.dates)
    end = grid.count_begun(now_s)
    return grid.list_bars(grid.count_complete(now_s), end if last is None else min(end, grid.count_to_session(last)))


def _last_session(instrument: Instrument, dates: IntArray) -> int | None:
    """The number of the last session that may have a bar of ``instrument``; None: no last one. A week or month in which the
    instrument expires is expected."""
    until = instrument.trades_until
    if until is None:
        return None
    midnight = datetime(until.year, until.month, until.day, tzinfo=UTC)
    return int(np.searchsorted(dates, int(midnight.timestamp()), side="right")) - 1


def next_complete(series: Series, after: datetime) -> datetime | None:
    """When the next bar of ``series`` is complete: the earliest close after ``after`` (aware), in UTC. None: it has expired.

    Raises:
        InputError: no calendar is known, or there is no later bar in the years that calendars cover.
    """
    after_s = int(require_utc(after).timestamp() // 1)
    table = table_of(series.instrument)
    until = series.instrument.trades_until
    if until is not None and require_utc(after).date() > until:
        return None
    grid = grid_of(table, series.timeframe.name)
    number = grid.count_complete(after_s)
    next_bar = grid.list_bars(number, number + 1)
    if not len(next_bar):
        check_years(Window(require_utc(after), datetime(LAST_YEAR + 1, 1, 2, tzinfo=UTC)))
    return datetime.fromtimestamp(int(next_bar.closes[0]), UTC)


def match_held(expected: ExpectedBars, held_opens: IntArray, timeframe: Timeframe) -> BoolArray:
    """True for each expected bar that is held, by the stamps ``held_opens`` (sorted epoch seconds).

    A bar is held under its own stamp; a first bar off the grid (17:15) also under the grid point before it (17:00) if the
    market is closed there; a week or month under any stamp within it.
    """
    held = period_keys(timeframe, held_opens)
    keys = period_keys(timeframe, expected.opens)
    found = _is_in(keys, held)
    if expected.aliases is not expected.opens:
        other = np.flatnonzero(~found & (expected.aliases != expected.opens))
        if len(other):
            found[other] = _is_in(expected.aliases[other], held)
    return found


def find_unexpected(expected: ExpectedBars, held_opens: IntArray, timeframe: Timeframe) -> BoolArray:
    """True for each of ``held_opens`` (sorted epoch seconds) that matches no bar of ``expected``. Such bars are kept."""
    held = period_keys(timeframe, held_opens)
    known = _is_in(held, period_keys(timeframe, expected.opens))
    off_grid = expected.aliases[expected.aliases != expected.opens]
    return ~(known | _is_in(held, off_grid))


def _is_in(values: IntArray, ordered: IntArray) -> BoolArray:
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[at] == values, dtype=np.bool_)
