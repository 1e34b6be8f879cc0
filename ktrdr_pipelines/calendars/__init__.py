"""The bar opens that a series should have, and the hours of its market. Pure given the installed calendar data.

`exchanges.py` finds the calendar of an instrument, `session_tables.py` builds its sessions, `ib_schedule.py` corrects them by
IB's schedule, `sessions.py` caches and queries them, `expected.py` derives the expected bars.
"""

from __future__ import annotations

from ktrdr_pipelines.calendars.exchanges import calendar_of
from ktrdr_pipelines.calendars.expected import (
    ExpectedBars,
    expected_bars,
    find_unexpected,
    match_held,
    next_complete,
    period_keys,
)
from ktrdr_pipelines.calendars.ib_schedule import Difference, Session, compare, correct, count_sessions
from ktrdr_pipelines.calendars.session_tables import FIRST_YEAR, LAST_YEAR
from ktrdr_pipelines.calendars.sessions import (
    CalendarKey,
    installed_table,
    is_open,
    next_close,
    next_open,
    session_starts_off,
    session_windows,
    table_of,
    use_corrections,
)

__all__ = [
    "FIRST_YEAR",
    "LAST_YEAR",
    "CalendarKey",
    "Difference",
    "ExpectedBars",
    "Session",
    "calendar_of",
    "compare",
    "correct",
    "count_sessions",
    "expected_bars",
    "find_unexpected",
    "installed_table",
    "is_open",
    "match_held",
    "next_close",
    "next_complete",
    "next_open",
    "period_keys",
    "session_starts_off",
    "session_windows",
    "table_of",
    "use_corrections",
]
