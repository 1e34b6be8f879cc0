"""Which bar opens a series should have, and when its market is open. Pure given the installed calendar data.

`exchanges.py` says which calendar an instrument follows, `sessions.py` when each session trades, `opens.py` which bars
that promises. What the store holds and what to ask IB for is in `plan.py`. Words: design, section 2.
"""

from __future__ import annotations

from ktrdr_pipelines.calendars.exchanges import calendar_of
from ktrdr_pipelines.calendars.opens import (
    ExpectedBars,
    expected_bars,
    find_unexpected,
    match_held,
    next_complete,
    period_keys,
)
from ktrdr_pipelines.calendars.sessions import (
    FIRST_YEAR,
    LAST_YEAR,
    is_open,
    next_close,
    next_open,
    session_windows,
)

__all__ = [
    "FIRST_YEAR",
    "LAST_YEAR",
    "ExpectedBars",
    "calendar_of",
    "expected_bars",
    "find_unexpected",
    "is_open",
    "match_held",
    "next_close",
    "next_complete",
    "next_open",
    "period_keys",
    "session_windows",
]
