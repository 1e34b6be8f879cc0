"""When a simulated instrument trades: one row per session with its extended and regular hours, as epoch seconds.

Deliberately independent of `ktrdr_pipelines.calendars`, so that the loader and the gateway it is tried on cannot be wrong
together: US stocks from pandas_market_calendars, forex and Globex futures from the rules in `docs/ib_facts.md` (section 3).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pandas as pd

Int = npt.NDArray[np.int64]

NEW_YORK = "America/New_York"
CHICAGO = "America/Chicago"
BERLIN = "Europe/Berlin"
FIRST_DAY = date(1999, 1, 4)
LAST_DAY = date(2031, 12, 31)


@dataclass(frozen=True, eq=False)
class Sessions:
    """Sessions in order of time. ``day`` is the session's date as days since 1970-01-01; the others are epoch seconds.

    ``open``..``close`` are all trading hours (half-open), ``regular_open``..``regular_close`` lie within them. ``offset`` is
    the zone's distance from UTC in seconds at the open: local clock = UTC + offset.
    """

    zone: str
    day: Int
    open: Int
    close: Int
    regular_open: Int
    regular_close: Int
    offset: Int

    def __len__(self) -> int:
        return len(self.day)

    def opens(self, *, regular: bool) -> Int:
        return self.regular_open if regular else self.open

    def closes(self, *, regular: bool) -> Int:
        return self.regular_close if regular else self.close

    def take(self, rows: slice | npt.NDArray[np.bool_]) -> Sessions:
        """The sessions of a slice or mask."""
        columns = (self.day, self.open, self.close, self.regular_open, self.regular_close, self.offset)
        return Sessions(self.zone, *(column[rows] for column in columns))

    def find_range(self, start_s: int, end_s: int, *, regular: bool) -> tuple[int, int]:
        """First and one past the last session that trades at some instant of ``[start_s, end_s)``."""
        first = int(np.searchsorted(self.closes(regular=regular), start_s, side="right"))
        stop = int(np.searchsorted(self.opens(regular=regular), end_s, side="left"))
        return first, max(first, stop)


def _to_epoch(local: pd.DatetimeIndex, zone: str) -> Int:
    stamps = local.tz_localize(ZoneInfo(zone)).as_unit("s")
    return np.asarray(stamps.asi8, dtype=np.int64)


def _days(index: pd.DatetimeIndex) -> Int:
    return np.asarray(index.tz_localize(None).as_unit("s").asi8 // 86400, dtype=np.int64)


def _offsets(naive: pd.DatetimeIndex, epoch: Int) -> Int:
    return np.asarray(naive.as_unit("s").asi8, dtype=np.int64) - epoch


@lru_cache(maxsize=1)
def us_stock_sessions() -> Sessions:
    """NYSE and Nasdaq: regular hours with early closes; extended hours 04:00 to 20:00 New York, to 17:00 on short days.

    Takes 0.2 s the first time. It touches the process's warning filters: a gateway in a thread has it made beforehand.
    """
    import pandas_market_calendars as mcal

    with warnings.catch_warnings():
        # The library uses names that pandas has deprecated; that is not ours to mend.
        warnings.simplefilter("ignore")
        schedule = mcal.get_calendar("NYSE").schedule(
            start_date=FIRST_DAY.isoformat(), end_date=LAST_DAY.isoformat(), start="pre", end="post"
        )
    columns = {}
    for name in ("pre", "market_open", "market_close", "post"):
        columns[name] = np.asarray(pd.DatetimeIndex(schedule[name]).as_unit("s").asi8, dtype=np.int64)
    local = pd.DatetimeIndex(schedule["pre"]).tz_convert(ZoneInfo(NEW_YORK)).tz_localize(None)
    return Sessions(
        zone=NEW_YORK,
        day=_days(pd.DatetimeIndex(schedule.index)),
        open=columns["pre"],
        close=columns["post"],
        regular_open=columns["market_open"],
        regular_close=columns["market_close"],
        offset=_offsets(local, columns["pre"]),
    )


def _weekday_sessions(
    zone: str, open_at: timedelta, close_at: timedelta, regular: tuple[timedelta, timedelta]
) -> Sessions:
    """A session for every Monday to Friday, each opening on the evening before. Times are wall clock from the session's
    own midnight, so that each is right on both sides of a clock change."""
    days = pd.bdate_range(FIRST_DAY, LAST_DAY).as_unit("s")
    opens = days + open_at
    epoch_open = _to_epoch(opens, zone)
    return Sessions(
        zone=zone,
        day=_days(days),
        open=epoch_open,
        close=_to_epoch(days + close_at, zone),
        regular_open=_to_epoch(days + regular[0], zone),
        regular_close=_to_epoch(days + regular[1], zone),
        offset=_offsets(opens, epoch_open),
    )


@lru_cache(maxsize=1)
def forex_sessions() -> Sessions:
    """IDEALPRO: Sunday 17:15 to Friday 17:00 New York with a break from 17:00 to 17:15; regular hours are all hours.

    The days that end on 25 December and 1 January do not trade, as recorded quotes show (`backtesting`'s EURUSD has none).
    """
    opens, closes = timedelta(hours=-7, minutes=15), timedelta(hours=17)
    sessions = _weekday_sessions(NEW_YORK, opens, closes, (opens, closes))
    dates = pd.DatetimeIndex(pd.to_datetime(sessions.day * 86400, unit="s"))
    closed = ((dates.month == 12) & (dates.day == 25)) | ((dates.month == 1) & (dates.day == 1))
    return sessions.take(~np.asarray(closed))


@lru_cache(maxsize=1)
def index_sessions() -> Sessions:
    """An index of US stocks: calculated in their regular hours only."""
    stocks = us_stock_sessions()
    local = pd.DatetimeIndex(pd.to_datetime(stocks.regular_open, unit="s", utc=True))
    naive = local.tz_convert(ZoneInfo(NEW_YORK)).tz_localize(None)
    opens, closes = stocks.regular_open, stocks.regular_close
    return Sessions(NEW_YORK, stocks.day, opens, closes, opens, closes, _offsets(naive, opens))


@lru_cache(maxsize=1)
def xetra_sessions() -> Sessions:
    """Xetra: 09:00 to 17:30 Frankfurt, closed on Good Friday, Easter Monday, 1 May, 24 to 26 and 31 December, 1 January."""
    opens, closes = timedelta(hours=9), timedelta(hours=17, minutes=30)
    sessions = _weekday_sessions(BERLIN, opens, closes, (opens, closes))
    dates = pd.DatetimeIndex(pd.to_datetime(sessions.day * 86400, unit="s"))
    fixed = {(1, 1), (5, 1), (12, 24), (12, 25), (12, 26), (12, 31)}
    closed = np.array([(d.month, d.day) in fixed for d in dates])
    easters = pd.date_range(FIRST_DAY, LAST_DAY, freq=pd.offsets.Easter())
    for shift in (-2, 1):
        closed |= np.asarray(dates.isin(easters + pd.Timedelta(days=shift)))
    return sessions.take(~closed)


@lru_cache(maxsize=1)
def crypto_sessions() -> Sessions:
    """Every day from midnight to midnight UTC."""
    day = np.arange(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1, dtype=np.int64) - date(1970, 1, 1).toordinal()
    opens, closes = day * 86400, (day + 1) * 86400
    return Sessions("UTC", day, opens, closes, opens, closes, np.zeros_like(day))


@lru_cache(maxsize=1)
def globex_sessions() -> Sessions:
    """CME equity index futures: 17:00 to 16:00 Chicago, regular 08:30 to 15:15. Holidays are not simulated."""
    opens, closes = timedelta(hours=-7), timedelta(hours=16)
    return _weekday_sessions(CHICAGO, opens, closes, (timedelta(hours=8, minutes=30), timedelta(hours=15, minutes=15)))


def sessions_from_bars(zone: str, stamps: Int, bar_s: int, rollover_s: int = 0) -> tuple[Sessions, Int]:
    """Sessions inferred from recorded intraday bars, and each bar's session date (days since 1970-01-01).

    A session is a local calendar day that has a bar, from its first bar to the end of its last; ``rollover_s`` makes days
    begin so long before midnight. Regular hours are those of US stocks where that calendar knows the day and they overlap,
    else all hours. ``stamps`` are epoch seconds of bar opens, strictly increasing.
    """
    local = pd.DatetimeIndex(pd.to_datetime(stamps, unit="s", utc=True)).tz_convert(ZoneInfo(zone)).tz_localize(None)
    offset = _offsets(local, stamps)
    day = (stamps + offset + rollover_s) // 86400
    starts = np.flatnonzero(np.r_[True, day[1:] != day[:-1]][: len(day)])
    ends = np.r_[starts[1:], len(day)][: len(starts)] - 1
    opens, closes = stamps[starts], stamps[ends] + bar_s
    closes = np.minimum(closes, np.r_[opens[1:], closes[-1:]])
    regular_open, regular_close = opens, closes
    if not rollover_s and zone == NEW_YORK:
        known = us_stock_sessions()
        at = np.minimum(np.searchsorted(known.day, day[starts]), len(known) - 1)
        first, stop = np.maximum(known.regular_open[at], opens), np.minimum(known.regular_close[at], closes)
        hit = (known.day[at] == day[starts]) & (first < stop)
        regular_open, regular_close = np.where(hit, first, opens), np.where(hit, stop, closes)
    return Sessions(zone, day[starts], opens, closes, regular_open, regular_close, offset[starts]), day
