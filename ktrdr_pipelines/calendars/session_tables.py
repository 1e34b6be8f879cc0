"""Tables of a calendar's sessions in 120 years, built from the installed calendar data.

Session times come from pandas_market_calendars. Its FOREX opens on Saturday and is replaced by our own; a few others are
patched (`_PATCHES`). exchange_calendars has no extended hours, and its CMES misses the daily break.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ktrdr_pipelines.calendars.exchanges import FOREX, ROUND_THE_CLOCK

if TYPE_CHECKING:
    import pandas as pd

IntArray = NDArray[np.int64]

FIRST_YEAR, LAST_YEAR = 1950, 2069
"""The years of a table, both included. Future holidays follow the rules in the installed data."""

_DAY_S = 86400


@dataclass(frozen=True, slots=True, eq=False)
class SessionTable:
    """All sessions of one calendar at one choice of hours, `FIRST_YEAR` to `LAST_YEAR`.

    Per session, in order: ``dates`` (the session date at 00:00 UTC), ``opens`` and ``closes``. Per segment (a lunch break
    makes two of one session), in order and never overlapping: ``starts``, ``ends``, ``session_ids`` (index of the session)
    and ``offsets`` (of local time ahead of UTC). All int64 seconds, instants since 1970-01-01 UTC, ends excluded.
    """

    dates: IntArray
    opens: IntArray
    closes: IntArray
    starts: IntArray
    ends: IntArray
    session_ids: IntArray
    offsets: IntArray
    sessions_per_week: int


def build_table(calendar: str, *, extended: bool) -> SessionTable:
    """The sessions of ``calendar`` at regular or all hours. Takes up to a second; changes the process's warning filters."""
    if calendar == FOREX:
        return _build_forex()
    if calendar == ROUND_THE_CLOCK:
        return _build_round_the_clock()
    return _build_exchange(calendar, extended)


def _seconds(times: pd.DatetimeIndex) -> IntArray:
    return np.asarray(times.as_unit("s").asi8, dtype=np.int64)


def local_offsets(instants_s: IntArray, zone: object) -> IntArray:
    """The offset of local time in ``zone`` from UTC at each instant, in seconds."""
    import pandas as pd

    local = pd.to_datetime(instants_s, unit="s", utc=True).tz_convert(str(zone)).tz_localize(None)
    return _seconds(local) - instants_s


def _all_days() -> IntArray:
    first, last = np.datetime64(f"{FIRST_YEAR}-01-01", "D"), np.datetime64(f"{LAST_YEAR}-12-31", "D")
    return np.arange(first.astype(np.int64), last.astype(np.int64) + 1, dtype=np.int64) * _DAY_S


def _build_round_the_clock() -> SessionTable:
    days = _all_days()
    ids = np.arange(len(days), dtype=np.int64)
    return SessionTable(days, days, days + _DAY_S, days, days + _DAY_S, ids, np.zeros_like(days), 7)


FOREX_HOLIDAYS = ((12, 25), (1, 1))
"""Session dates (month, day) on which forex does not trade: the session that ends on 25 December and on 1 January at 17:00
New York. Source: hourly quotes of December 2017 and January 2018; IB publishes no rule. Bars that IB sends for them are
kept like all unexpected bars."""


def _build_forex() -> SessionTable:
    """Sessions dated Monday to Friday, from 17:15 New York on the day before to 17:00 on the date (docs/ib_facts.md, 3)."""
    import pandas as pd

    days = _all_days()
    calendar_days = pd.to_datetime(days, unit="s")
    keep = calendar_days.day_of_week < 5
    for month, day in FOREX_HOLIDAYS:
        keep &= ~((calendar_days.month == month) & (calendar_days.day == day))
    dates, naive = days[keep], calendar_days[keep]
    zone = "America/New_York"
    # Neither 17:15 nor 17:00 is ever skipped or repeated by a change of clocks (02:00 on a Sunday).
    opens = _seconds((naive - pd.Timedelta(days=1) + pd.Timedelta(hours=17, minutes=15)).tz_localize(zone))
    closes = _seconds((naive + pd.Timedelta(hours=17)).tz_localize(zone))
    ids = np.arange(len(dates), dtype=np.int64)
    return SessionTable(dates, opens, closes, opens, closes, ids, local_offsets(opens, zone), 5)


@dataclass(frozen=True, slots=True)
class _Patch:
    """A correction of the calendar data. Times are minutes of the exchange's own day; dates are session dates.

    ``halt``: start and end of a daily halt that was in force before ``halt_until``. ``open_at``: when sessions open from
    ``open_since`` on. ``closed``: dates on which there was no session.
    """

    halt: tuple[int, int] = (0, 0)
    halt_until: str = "1900-01-01"
    open_at: int = 0
    open_since: str = "2200-01-01"
    closed: tuple[str, ...] = ()


_PATCHES = {
    # CME Group ended the halt of index futures from 15:15 to 15:30 with the trade date of 28 June 2021.
    "CME Globex Equity": _Patch(halt=(15 * 60 + 15, 15 * 60 + 30), halt_until="2021-06-28"),
    # Eurex has traded its large index and bond futures from 01:10 since 10 December 2018 (extended trading hours).
    "EUREX": _Patch(open_at=70, open_since="2018-12-10"),
    # HKEX was shut all day for typhoon Saola and for a black rainstorm.
    "XHKG": _Patch(closed=("2023-09-01", "2023-09-08")),
}


def _date_s(day: str) -> int:
    return int(np.datetime64(day, "s").astype(np.int64))


def _build_exchange(calendar: str, extended: bool) -> SessionTable:
    import pandas as pd
    import pandas_market_calendars

    with warnings.catch_warnings():
        # It uses deprecated pandas names.
        warnings.simplefilter("ignore")
        source = pandas_market_calendars.get_calendar(calendar)
        schedule = source.schedule(f"{FIRST_YEAR}-01-01", f"{LAST_YEAR}-12-31", market_times="all")

    def column(*names: str) -> IntArray:
        name = next(n for n in names if n in schedule.columns)
        return _seconds(pd.DatetimeIndex(schedule[name]))

    dates = _seconds(pd.DatetimeIndex(schedule.index))
    opens = column("pre", "market_open") if extended else column("market_open")
    closes = column("post", "market_close") if extended else column("market_close")
    if "break_start" in schedule.columns:
        # A day without a break has NaT, equal ends, or ends outside the session.
        pauses, resumes = column("break_start"), column("break_end")
        split = (opens < pauses) & (pauses < resumes) & (resumes < closes)
    else:
        pauses = resumes = opens
        split = np.zeros(len(dates), dtype=bool)
    if calendar in _PATCHES:
        patch = _PATCHES[calendar]
        midnight = dates - local_offsets(closes, source.tz)
        if patch.halt_until > "1900-01-01":
            pauses, resumes = (midnight + minute * 60 for minute in patch.halt)
            split = (dates < _date_s(patch.halt_until)) & (opens < pauses) & (resumes < closes)
        opens = np.where(dates >= _date_s(patch.open_since), midnight + patch.open_at * 60, opens)
        trades = ~np.isin(dates, [_date_s(day) for day in patch.closed])
        dates, opens, closes = dates[trades], opens[trades], closes[trades]
        pauses, resumes, split = pauses[trades], resumes[trades], split[trades]

    ids = np.arange(len(dates), dtype=np.int64)
    starts = np.concatenate([opens, resumes[split]])
    ends = np.concatenate([np.where(split, pauses, closes), closes[split]])
    of_session = np.concatenate([ids, ids[split]])
    order = np.argsort(starts, kind="stable")
    starts, ends, of_session = starts[order], ends[order], of_session[order]
    return SessionTable(
        dates,
        opens,
        closes,
        starts,
        ends,
        of_session,
        local_offsets(starts, source.tz),
        7 if calendar == "24/7" else 5,
    )
