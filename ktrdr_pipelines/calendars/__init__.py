"""The expected bars of a series, and when its market is open. Pure, given the installed calendar data, but for the tables that
`table_cache.py` keeps in the user's cache folder.

`exchanges.py`: the calendar of an instrument. `session_tables.py`: the sessions of a calendar. `ib_schedule.py`: corrections of
them by IB's own schedule. `sessions.py`: both, cached, and questions about open hours. `bar_grid.py`: the bars of the sessions.
`expected.py`: those of a series and window. What to request for missing bars is in `planning/requests.py`.
"""

from __future__ import annotations

from ktrdr_pipelines.calendars.bar_grid import BarGrid, ExpectedBars, period_keys
from ktrdr_pipelines.calendars.exchanges import calendar_of
from ktrdr_pipelines.calendars.expected import (
    ExpectedRange,
    count_expected,
    expected_bars,
    find_unexpected,
    forming_bars,
    match_held,
    next_complete,
)
from ktrdr_pipelines.calendars.ib_schedule import Difference, Session, compare, correct, count_sessions
from ktrdr_pipelines.calendars.session_tables import FIRST_YEAR, LAST_YEAR
from ktrdr_pipelines.calendars.sessions import (
    CalendarKey,
    installed_table,
    is_open,
    session_starts_off,
    session_windows,
    table_of,
    use_corrections,
)

__all__ = [
    "FIRST_YEAR",
    "LAST_YEAR",
    "BarGrid",
    "CalendarKey",
    "Difference",
    "ExpectedBars",
    "ExpectedRange",
    "Session",
    "calendar_of",
    "compare",
    "correct",
    "count_expected",
    "count_sessions",
    "expected_bars",
    "find_unexpected",
    "forming_bars",
    "installed_table",
    "is_open",
    "match_held",
    "next_complete",
    "period_keys",
    "session_starts_off",
    "session_windows",
    "table_of",
    "use_corrections",
]
