"""The trading sessions of an instrument, cached by calendar and hours, and queries about them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np

from ktrdr_pipelines.calendars.exchanges import calendar_of
from ktrdr_pipelines.calendars.ib_schedule import Session, correct
from ktrdr_pipelines.calendars.session_tables import FIRST_YEAR, LAST_YEAR, IntArray, SessionTable, build_table
from ktrdr_pipelines.domain.instruments import Hours, Instrument
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.errors import InputError


@dataclass(frozen=True, slots=True)
class CalendarKey:
    """Identifies a table: the calendar's name, and regular or all hours."""

    name: str
    hours: Hours

    @classmethod
    def of(cls, instrument: Instrument) -> CalendarKey:
        """Stocks have a choice of hours, an index the regular hours of its stocks, all others all hours. Raises InputError, see
        `calendar_of`."""
        is_regular = instrument.use_rth or instrument.sec_type == "IND"
        return cls(calendar_of(instrument), Hours.REGULAR if is_regular else Hours.EXTENDED)


_installed: dict[CalendarKey, SessionTable] = {}
_corrections: Mapping[CalendarKey, Sequence[Session]] = {}
_tables: dict[CalendarKey, SessionTable] = {}
_lock = threading.Lock()


def use_corrections(corrections: Mapping[CalendarKey, Sequence[Session]]) -> None:
    """Replace, in this process, the installed sessions by those of ``corrections`` with the same date."""
    global _corrections
    with _lock:
        changed = {key for key in {*corrections, *_corrections} if corrections.get(key) != _corrections.get(key)}
        _corrections = dict(corrections)
        for key in changed:
            _tables.pop(key, None)


def installed_table(instrument: Instrument) -> SessionTable:
    """The sessions of ``instrument`` without corrections. Raises InputError, see `calendar_of`."""
    key = CalendarKey.of(instrument)
    with _lock:
        return _find_installed(key)


def table_of(instrument: Instrument) -> SessionTable:
    """The sessions of ``instrument``, cached per calendar and hours (never per symbol).

    Raises:
        InputError: no calendar, see `calendar_of`.
    """
    key = CalendarKey.of(instrument)
    table = _tables.get(key)
    if table is None:
        with _lock:
            table = _tables[key] = correct(_find_installed(key), _corrections.get(key, ()))
    return table


def _find_installed(key: CalendarKey) -> SessionTable:
    # One builder at a time: it changes the process's warning filters.
    if key not in _installed:
        _installed[key] = build_table(key.name, extended=key.hours is Hours.EXTENDED)
    return _installed[key]


def session_starts_off(instrument: Instrument, step_s: int) -> tuple[int, ...]:
    """Starts of trading that are not multiples of ``step_s`` seconds since 1970: epoch seconds, oldest first. Raises InputError
    for an unknown calendar."""
    return _starts_off(table_of(instrument), step_s)


@lru_cache(maxsize=256)
def _starts_off(table: SessionTable, step_s: int) -> tuple[int, ...]:
    return tuple(table.starts[table.starts % step_s != 0].tolist())


def check_years(window: Window) -> None:
    """Raise InputError if ``window`` is outside the years that calendars cover."""
    if window.start.year < FIRST_YEAR or window.end > datetime(LAST_YEAR + 1, 1, 1, tzinfo=UTC):
        raise InputError(
            f"{window} is outside the years {FIRST_YEAR} to {LAST_YEAR} that trading calendars cover",
            advice="Choose a start and an end within them.",
        )


def session_windows(instrument: Instrument, window: Window) -> list[Window]:
    """From open to close of each session that trades at some instant of ``window``, oldest first, not cut to it.

    A lunch break is inside its session. Raises InputError for an unknown calendar or years out of range.
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
