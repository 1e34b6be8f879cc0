"""The sessions of an instrument, cached per calendar and hours, and questions about open hours.

The calendar of an instrument is in `exchanges.py`; tables are built in `session_tables.py`, kept on disk by
`table_cache.py`, and corrected by IB's schedule in `ib_schedule.py`; the bars of a session are in `expected.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np

from ktrdr_pipelines.calendars.exchanges import calendar_of
from ktrdr_pipelines.calendars.ib_schedule import Session, correct
from ktrdr_pipelines.calendars.session_tables import FIRST_YEAR, LAST_YEAR, SessionTable
from ktrdr_pipelines.calendars.table_cache import find_table
from ktrdr_pipelines.domain.instruments import Hours, Instrument
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.errors import InputError


@dataclass(frozen=True, slots=True)
class CalendarKey:
    """The key of a cached table: the calendar's name, and regular or all hours."""

    name: str
    hours: Hours

    @classmethod
    def of(cls, instrument: Instrument) -> CalendarKey:
        """The key for ``instrument``. Only stocks have a choice of hours; an index has regular hours, other kinds have all hours.
        Raises InputError, see `calendar_of`."""
        is_regular = instrument.use_rth or instrument.sec_type == "IND"
        return cls(calendar_of(instrument), Hours.REGULAR if is_regular else Hours.EXTENDED)


_installed: dict[CalendarKey, SessionTable] = {}
_corrections: Mapping[CalendarKey, Sequence[Session]] = {}
_tables: dict[CalendarKey, SessionTable] = {}
_lock = threading.Lock()


def use_corrections(corrections: Mapping[CalendarKey, Sequence[Session]]) -> None:
    """From now on, in this process, the sessions of ``corrections`` replace the installed ones of the same date."""
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
        InputError: no calendar is known for it, see `calendar_of`.
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
        _installed[key] = find_table(key.name, extended=key.hours is Hours.EXTENDED)
    return _installed[key]


def session_starts_off(instrument: Instrument, step_s: int) -> tuple[int, ...]:
    """The starts of trading of ``instrument`` that are not multiples of ``step_s``: epoch seconds, oldest first.
    Raises InputError for an unknown calendar."""
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
    """Open to close of each session that overlaps ``window``, oldest first, not cut to it.

    A lunch break is part of its session. Raises InputError for an unknown calendar or years out of range.
    """
    check_years(window)
    table = table_of(instrument)
    lo = int(np.searchsorted(table.closes, window.start_s, side="right"))
    hi = int(np.searchsorted(table.opens, window.end_s, side="left"))
    return [Window.from_epoch(table.opens[i], table.closes[i]) for i in range(lo, hi)]


def is_open(instrument: Instrument, at: datetime) -> bool:
    """True if the market trades at ``at`` (aware): False in breaks and at the instant of the close."""
    at_s = int(require_utc(at).timestamp() // 1)
    table = table_of(instrument)
    i = int(np.searchsorted(table.starts, at_s, side="right")) - 1
    return i >= 0 and at_s < int(table.ends[i])
