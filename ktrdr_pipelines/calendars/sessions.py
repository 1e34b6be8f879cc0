"""When each session of a calendar trades: tables of session dates and segments, built once per calendar and hours.

Which instrument follows which calendar is in `exchanges.py`; which bars a session promises in `opens.py`. Session times
come from pandas_market_calendars. Its FOREX opens on Saturday and is replaced by our own; a few others are corrected
(`_CORRECTIONS`). exchange_calendars was tried too: its CMES misses the daily break and it has no extended hours.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ktrdr_pipelines.calendars.exchanges import FOREX, ROUND_THE_CLOCK, calendar_of
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.series import Hours, Instrument, Window, require_utc

if TYPE_CHECKING:
    import pandas as pd

IntArray = NDArray[np.int64]

FIRST_YEAR, LAST_YEAR = 1950, 2069
"""The years a table covers, both included. Future holidays follow the rules known at the time of the installed data."""

_DAY_S = 86400


@dataclass(frozen=True, slots=True, eq=False)
class SessionTable:
    """All sessions of one calendar at one choice of hours, `FIRST_YEAR` to `LAST_YEAR`.

    Per session, in order: ``dates`` (the session date at 00:00 UTC), ``opens`` and ``closes``. Per segment (a lunch break
    makes two of one session), in order and never overlapping: ``starts``, ``ends``, ``session_ids`` (index of the session)
    and ``offsets`` (what local time is ahead of UTC). All int64 seconds, instants since 1970-01-01 UTC, ends excluded.
    """

    dates: IntArray
    opens: IntArray
    closes: IntArray
    starts: IntArray
    ends: IntArray
    session_ids: IntArray
    offsets: IntArray
    sessions_per_week: int


_tables: dict[tuple[str, bool], SessionTable] = {}
_lock = threading.Lock()


def hours_of(instrument: Instrument) -> Hours:
    """The hours its series hold. Only stocks have a choice; everything else holds all hours there are."""
    return Hours.REGULAR if instrument.use_rth else Hours.EXTENDED


def table_of(instrument: Instrument) -> SessionTable:
    """The sessions of ``instrument``, cached per calendar and hours (never per symbol).

    Raises:
        InputError: no calendar is known for it, see `calendar_of`.
    """
    key = (calendar_of(instrument), hours_of(instrument) is Hours.EXTENDED)
    table = _tables.get(key)
    if table is None:
        # One builder at a time: the warnings filter below is global to the process.
        with _lock:
            table = _tables.get(key) or _build(*key)
            _tables[key] = table
    return table


def check_years(window: Window) -> None:
    """Raise InputError when ``window`` leaves the years that calendars cover."""
    if window.start.year < FIRST_YEAR or window.end > datetime(LAST_YEAR + 1, 1, 1, tzinfo=UTC):
        raise InputError(
            f"{window} is outside the years {FIRST_YEAR} to {LAST_YEAR} that trading calendars cover",
            advice="Choose a start and an end within them.",
        )


def session_windows(instrument: Instrument, window: Window) -> list[Window]:
    """From open to close of each session that trades at some instant of ``window``, oldest first, not cut to it.

    A lunch break lies inside its session. Raises InputError for an unknown calendar or years out of range.
    """
    check_years(window)
    table = table_of(instrument)
    lo = int(np.searchsorted(table.closes, window.start_s, side="right"))
    hi = int(np.searchsorted(table.opens, window.end_s, side="left"))
    return [Window.from_epoch(table.opens[i], table.closes[i]) for i in range(lo, hi)]


def is_open(instrument: Instrument, at: datetime) -> bool:
    """True if the market trades at ``at`` (aware): false in breaks and at the instant of the close."""
    at_s = int(require_utc(at).timestamp() // 1)
    table = table_of(instrument)
    i = int(np.searchsorted(table.starts, at_s, side="right")) - 1
    return i >= 0 and at_s < int(table.ends[i])


def next_open(instrument: Instrument, at: datetime) -> datetime:
    """The first instant not before ``at`` (aware) at which trading starts, after a night or a break. In UTC.

    Raises:
        InputError: beyond the years that calendars cover.
    """
    return _first_from(table_of(instrument).starts, at)


def next_close(instrument: Instrument, at: datetime) -> datetime:
    """The first instant after ``at`` (aware) at which trading stops, for a break or for the day. In UTC.

    Raises:
        InputError: beyond the years that calendars cover.
    """
    return _first_from(table_of(instrument).ends, at, after=True)


def _first_from(instants: IntArray, at: datetime, *, after: bool = False) -> datetime:
    at = require_utc(at)
    at_s = int(at.timestamp() // 1) if after else int(-(-at.timestamp() // 1))
    i = int(np.searchsorted(instants, at_s, side="right" if after else "left"))
    if i == len(instants):
        check_years(Window(at, max(at, datetime(LAST_YEAR + 1, 1, 2, tzinfo=UTC))))
    return datetime.fromtimestamp(int(instants[i]), UTC)


# --- building tables -------------------------------------------------------------------------------------------------


def _build(calendar: str, extended: bool) -> SessionTable:
    if calendar == FOREX:
        return _build_forex()
    if calendar == ROUND_THE_CLOCK:
        return _build_round_the_clock()
    return _build_exchange(calendar, extended)


def _seconds(times: pd.DatetimeIndex) -> IntArray:
    return np.asarray(times.as_unit("s").asi8, dtype=np.int64)


def _local_offsets(instants_s: IntArray, zone: object) -> IntArray:
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
New York. Seen in hourly quotes of December 2017 and January 2018; IB publishes no rule. Bars that IB does send then are
kept like all unexpected bars."""


def _build_forex() -> SessionTable:
    """Sessions dated Monday to Friday, from 17:15 New York on the day before to 17:00 on the date (`ib_facts.md`, 3)."""
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
    return SessionTable(dates, opens, closes, opens, closes, ids, _local_offsets(opens, zone), 5)


@dataclass(frozen=True, slots=True)
class _Correction:
    """What the calendar data lacks. Times are minutes of the exchange's own day; dates are session dates.

    ``halt``: start and end of a daily halt that was in force before ``halt_until``. ``open_at``: when sessions open from
    ``open_since`` on. ``closed``: dates on which there was no session.
    """

    halt: tuple[int, int] = (0, 0)
    halt_until: str = "1900-01-01"
    open_at: int = 0
    open_since: str = "2200-01-01"
    closed: tuple[str, ...] = ()


_CORRECTIONS = {
    # CME Group ended the halt of index futures from 15:15 to 15:30 with the trade date of 28 June 2021.
    "CME Globex Equity": _Correction(halt=(15 * 60 + 15, 15 * 60 + 30), halt_until="2021-06-28"),
    # Eurex has traded its large index and bond futures from 01:10 since 10 December 2018 (extended trading hours).
    "EUREX": _Correction(open_at=70, open_since="2018-12-10"),
    # HKEX was shut all day for typhoon Saola and for a black rainstorm.
    "XHKG": _Correction(closed=("2023-09-01", "2023-09-08")),
}


def _date_s(day: str) -> int:
    return int(np.datetime64(day, "s").astype(np.int64))


def _build_exchange(calendar: str, extended: bool) -> SessionTable:
    import pandas as pd
    import pandas_market_calendars

    with warnings.catch_warnings():
        # Its use of deprecated pandas names is not ours to mend.
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
        # Days without a break hold NaT, or equal ends, or ends outside the session.
        pauses, resumes = column("break_start"), column("break_end")
        split = (opens < pauses) & (pauses < resumes) & (resumes < closes)
    else:
        pauses = resumes = opens
        split = np.zeros(len(dates), dtype=bool)
    if calendar in _CORRECTIONS:
        correction = _CORRECTIONS[calendar]
        midnight = dates - _local_offsets(closes, source.tz)
        if correction.halt_until > "1900-01-01":
            pauses, resumes = (midnight + minute * 60 for minute in correction.halt)
            split = (dates < _date_s(correction.halt_until)) & (opens < pauses) & (resumes < closes)
        opens = np.where(dates >= _date_s(correction.open_since), midnight + correction.open_at * 60, opens)
        trades = ~np.isin(dates, [_date_s(day) for day in correction.closed])
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
        _local_offsets(starts, source.tz),
        7 if calendar == "24/7" else 5,
    )
