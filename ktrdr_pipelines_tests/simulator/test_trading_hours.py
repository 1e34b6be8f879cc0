"""Trading hours of the simulated markets, against days from the exchanges' published hours."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pytest

from ktrdr_pipelines.simulator.trading_hours import (
    forex_sessions,
    globex_sessions,
    sessions_from_bars,
    us_stock_sessions,
)

US = [
    # date, regular open and close, extended open and close, all UTC; from the exchange's published hours
    ("2024-01-02", "14:30", "21:00", "09:00", "25:00"),
    ("2024-07-02", "13:30", "20:00", "08:00", "24:00"),
    ("2024-07-03", "13:30", "17:00", "08:00", "21:00"),
    ("2024-11-29", "14:30", "18:00", "09:00", "22:00"),
]


def find(sessions, day):
    (index,) = np.flatnonzero(sessions.day == (date.fromisoformat(day) - date(1970, 1, 1)).days)
    return sessions.take(slice(int(index), int(index) + 1))


def clock(seconds, day):
    minutes = (int(seconds) - int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())) // 60
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


@pytest.mark.parametrize(("day", "regular_open", "regular_close", "first", "last"), US)
def test_stock_sessions_are_new_yorks(day, regular_open, regular_close, first, last):
    """Ordinary, summer and short days open and close at the exchange's published times."""
    row = find(us_stock_sessions(), day)
    stamps = (row.regular_open[0], row.regular_close[0], row.open[0], row.close[0])
    assert tuple(clock(s, day) for s in stamps) == (regular_open, regular_close, first, last)


@pytest.mark.parametrize("day", ["2024-07-04", "2024-12-25", "2025-01-09", "2001-09-11", "2012-10-29", "2024-03-02"])
def test_closed_days_have_no_stock_session(day):
    """Holidays, special closures and weekends have no session."""
    assert (date.fromisoformat(day) - date(1970, 1, 1)).days not in us_stock_sessions().day


@pytest.mark.parametrize(
    ("day", "opens", "closes"), [("2024-03-11", "-02:45", "21:00"), ("2024-03-08", "-01:45", "22:00")]
)
def test_forex_day_runs_from_quarter_past_five_to_five(day, opens, closes):
    """17:15 of the evening before to 17:00, New York, on both sides of the clock change of 10 March 2024."""
    row = find(forex_sessions(), day)
    negative = clock(row.open[0], day)
    minutes = -(int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) - int(row.open[0])) // 60
    assert (f"-{-minutes // 60:02d}:{-minutes % 60:02d}", clock(row.close[0], day)) == (opens, closes), negative


@pytest.mark.parametrize("day", ["2017-12-25", "2018-01-01", "2024-03-09"])
def test_forex_has_no_session_on_christmas_new_year_and_saturdays(day):
    """No session ends on those days."""
    assert (date.fromisoformat(day) - date(1970, 1, 1)).days not in forex_sessions().day


def test_sessions_never_overlap():
    """Each session ends before the next begins, and regular hours lie within all hours."""
    for sessions in (us_stock_sessions(), forex_sessions(), globex_sessions()):
        assert (sessions.close[:-1] <= sessions.open[1:]).all()
        assert (sessions.open <= sessions.regular_open).all()
        assert (sessions.regular_close <= sessions.close).all()
        assert (sessions.regular_open < sessions.regular_close).all()


def test_sessions_are_inferred_from_bars():
    """A recorded day trades from its first bar to the end of its last; a pair's day begins at 17:00 New York."""
    stamps = np.array([f"2024-01-0{d}T{h:02d}:00" for d in (3, 4) for h in (10, 20, 22)], dtype="datetime64[s]").astype(
        np.int64
    )
    table, days = sessions_from_bars("America/New_York", stamps, 3600, 7 * 3600)
    assert [str(np.datetime64(int(d), "D")) for d in table.day] == ["2024-01-03", "2024-01-04", "2024-01-05"]
    assert days.tolist() == [table.day[0]] * 2 + [table.day[1]] * 3 + [table.day[2]]
    assert table.open.tolist() == [stamps[0], stamps[2], stamps[5]]
    assert table.close.tolist() == [stamps[1] + 3600, stamps[4] + 3600, stamps[5] + 3600]
