"""The window of a request: ends, durations, and the readings of a month."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_pipelines.simulator.market import BAR_SIZES
from ktrdr_pipelines.simulator.refusals import RequestRefusedError
from ktrdr_pipelines.simulator.request_reach import (
    DurationRule,
    check_duration,
    find_start,
    parse_duration,
    parse_end,
)
from ktrdr_pipelines.simulator.trading_hours import forex_sessions, us_stock_sessions


def at(*parts):
    return int(datetime(*parts, tzinfo=UTC).timestamp())


NOW = at(2024, 7, 1, 12)


@pytest.mark.parametrize(("text", "value"), [("1 D", (1, "D")), ("3600 S", (3600, "S")), ("20 Y", (20, "Y"))])
def test_durations_are_read(text, value):
    """An integer, a space, a unit."""
    assert parse_duration(text) == value


@pytest.mark.parametrize(
    "text", ["8 H", "1D", "1 d", "0 D", "-1 D", "1.5 D", "D", "", "1 D ", "1  D", "1 mins", "9999999999 S"]
)
def test_anything_else_is_no_duration(text):
    """Refused with 321, as IB does for hours."""
    with pytest.raises(RequestRefusedError) as caught:
        parse_duration(text)
    assert caught.value.refusal.code == 321


@pytest.mark.parametrize(
    ("size", "duration", "code"),
    [
        ("1 secs", (2000, "S"), None),
        ("1 secs", (2001, "S"), 162),
        ("1 secs", (1, "D"), 162),
        ("5 secs", (1, "D"), None),
        ("5 secs", (1, "W"), 162),
        ("1 min", (86400, "S"), None),
        ("1 min", (86401, "S"), 162),
        ("1 hour", (3600, "S"), 162),
        ("1 min", (1, "Y"), None),
        ("30 secs", (1, "Y"), 162),
        ("1 hour", (365, "D"), None),
        ("1 hour", (366, "D"), 321),
        ("4 hours", (53, "W"), 321),
        ("1 hour", (13, "M"), 321),
        ("1 day", (30, "D"), None),
        ("1 day", (68, "Y"), None),
        ("1 day", (69, "Y"), 162),
        ("1M", (3600, "S"), 162),
    ],
)
def test_limits_follow_the_published_matrix(size, duration, code):
    """Too long a duration, or a unit that is not allowed with the bar size, is refused with IB's code."""
    if code is None:
        check_duration(duration, BAR_SIZES[size])
    else:
        with pytest.raises(RequestRefusedError) as caught:
            check_duration(duration, BAR_SIZES[size])
        assert caught.value.refusal.code == code


@pytest.mark.parametrize(
    ("text", "seconds", "guessed"),
    [
        ("", NOW, False),
        ("20240305-15:00:00", at(2024, 3, 5, 15), False),
        ("20240305 15:00:00 UTC", at(2024, 3, 5, 15), False),
        ("20240305 10:00:00 US/Eastern", at(2024, 3, 5, 15), False),
        ("20240705 10:00:00 America/New_York", NOW, False),
        ("20240305 10:00:00", at(2024, 3, 5, 15), True),
        ("20240305  10:00:00", at(2024, 3, 5, 15), True),
        ("05:00:00 UTC", at(2024, 7, 1, 5), False),
        ("00010101-00:00:00", 0, False),
    ],
)
def test_ends_are_read_in_their_zone(text, seconds, guessed):
    """The dash form is UTC, a zone may be named, without one the gateway uses its own and warns. Later than now is now."""
    assert parse_end(text, NOW, "America/New_York") == (seconds, guessed)


@pytest.mark.parametrize(
    "text", ["tomorrow", "2024-03-05 15:00:00", "20241305-15:00:00", "20240305 25:00:00", "20240305 10:00:00 Mars/Olympus",
             "20240305 10:00:00 ../../etc/passwd", "20240305", "20240305 10:00:00 America"]
)  # fmt: skip
def test_malformed_ends_are_refused(text):
    """With IB's code 10314."""
    with pytest.raises(RequestRefusedError) as caught:
        parse_end(text, NOW, "America/New_York")
    assert caught.value.refusal.code == 10314


@given(st.text(max_size=30))
def test_any_text_as_an_end_is_read_or_refused(text):
    """No text raises another exception."""
    try:
        seconds, _ = parse_end(text, NOW, "America/New_York")
    except RequestRefusedError as refused:
        assert refused.refusal.code == 10314
    else:
        assert 0 <= seconds <= NOW


def count_sessions(duration, end_s, rule=DurationRule.SESSIONS, sessions=None, regular=True):
    sessions = sessions or us_stock_sessions()
    start = find_start(parse_duration(duration), end_s, sessions, regular=regular, rule=rule)
    first, stop = sessions.find_range(start, end_s, regular=regular)
    return stop - first


def test_days_count_sessions():
    """20 D of a stock are 20 sessions over 26 or more calendar days, whatever weekends and holidays lie between."""
    assert count_sessions("20 D", at(2024, 1, 31, 22)) == 20
    assert count_sessions("1 D", at(2024, 1, 1, 12)) == 1


def test_session_in_progress_counts_as_one():
    """1 D that ends in the morning is this morning, from the open."""
    end = at(2024, 3, 5, 15)
    start = find_start((1, "D"), end, us_stock_sessions(), regular=True, rule=DurationRule.SESSIONS)
    assert start == at(2024, 3, 5, 14, 30)


def test_seconds_are_clock_seconds():
    """S counts clock seconds, closed hours included."""
    assert find_start((3600, "S"), NOW, us_stock_sessions(), regular=True, rule=DurationRule.SESSIONS) == NOW - 3600


def test_month_reaches_at_least_to_the_same_date():
    """With the default reading 1 M covers both 22 sessions and the same date a month before."""
    end = at(2023, 8, 31, 22)  # August 2023 had 23 sessions
    assert count_sessions("1 M", end) == 23
    assert count_sessions("1 M", end, DurationRule.STRICT) == 22
    assert count_sessions("1 M", at(2024, 3, 1, 22)) == 22


def test_calendar_reading_is_plain_clock_time():
    """Another gateway may count days by the calendar: two days that end on a Monday evening contain one session."""
    end = at(2024, 3, 4, 22)
    assert count_sessions("2 D", end, DurationRule.CALENDAR) == 1
    assert find_start((2, "D"), end, us_stock_sessions(), regular=True, rule=DurationRule.CALENDAR) == at(
        2024, 3, 2, 22
    )


def test_calendar_month_ends_on_a_day_that_exists():
    """One month before 31 March is the last day of February."""
    start = find_start((1, "M"), at(2024, 3, 31, 12), us_stock_sessions(), regular=True, rule=DurationRule.CALENDAR)
    assert datetime.fromtimestamp(start, UTC).date().isoformat() == "2024-02-29"


def test_forex_day_starts_on_the_evening_before():
    """1 D of a pair on a Monday morning begins on Sunday 17:15 New York."""
    start = find_start((1, "D"), at(2024, 3, 4, 12), forex_sessions(), regular=False, rule=DurationRule.SESSIONS)
    assert start == at(2024, 3, 3, 22, 15)


@given(
    st.integers(1, 999_999_999),
    st.sampled_from("SDWMY"),
    st.integers(0, at(2031, 12, 31)),
    st.sampled_from(list(DurationRule)),
)
def test_start_is_never_after_the_end(count, unit, end_s, rule):
    """Any duration from any end gives a window, however far back it goes."""
    start = find_start((count, unit), end_s, us_stock_sessions(), regular=True, rule=rule)
    assert start <= end_s or not len(us_stock_sessions().day[us_stock_sessions().day * 86400 < end_s])


@given(st.integers(1, 60), st.integers(at(2000, 1, 3), at(2030, 1, 1)))
def test_n_days_contain_exactly_n_sessions(days, end_s):
    """For every end and number of days, as many sessions as asked lie in the window."""
    assert count_sessions(f"{days} D", end_s) == min(
        days, int(np.searchsorted(us_stock_sessions().regular_open, end_s))
    )
