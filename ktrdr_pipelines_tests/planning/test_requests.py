"""The plan: gaps, durations, the fewest requests (against exhaustive search), asking again, and reaching back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.calendars import ExpectedBars, expected_bars
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration, HistoryLimits, Timeframe
from ktrdr_pipelines.errors import BugError
from ktrdr_pipelines.planning.coverage import find_gaps, missing_bars
from ktrdr_pipelines.planning.durations import (
    LOOSEST,
    READINGS,
    UNIT_MATRIX,
    Span,
    duration_for,
    is_allowed,
    list_durations,
)
from ktrdr_pipelines.planning.requests import Request, longest_back, plan_requests, refetch_requests

CLASSIC, CURRENT = HistoryLimits.CLASSIC, HistoryLimits.CURRENT
AAPL, EURUSD = stock("AAPL"), forex("EURUSD")
AAPL_ALL_HOURS = stock("AAPL", hours=Hours.EXTENDED)
BITCOIN = Instrument("BTC", "CRYPTO", "PAXOS", "USD")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def epoch(text: str) -> int:
    return int(at(text).timestamp())


def window(start: str, end: str) -> Window:
    return Window(at(start), at(end))


def bars_of(instrument: Instrument, timeframe: str, start: str, end: str) -> ExpectedBars:
    return expected_bars(Series(instrument, TIMEFRAMES[timeframe]), window(start, end))


def missing_after(expected: ExpectedBars, *held: tuple[str, str]) -> ExpectedBars:
    """``expected`` without the bars stamped within the windows ``held``."""
    keep = np.ones(len(expected), dtype=bool)
    for start, end in held:
        keep &= ~((expected.opens >= epoch(start)) & (expected.opens < epoch(end)))
    return expected.take(keep)


# --- how many requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "timeframe", "start", "end", "classic", "current"),
    [
        (AAPL, "1h", "2023-01-01", "2025-01-01", 24, 2),
        (AAPL, "1h", "2021-01-01", "2023-01-01", 24, 2),
        (AAPL_ALL_HOURS, "1h", "2023-01-01", "2025-01-01", 24, 2),
        (AAPL, "1d", "2014-01-01", "2024-01-01", 10, 1),
        (AAPL, "1d", "2015-01-01", "2025-01-01", 10, 1),
        (AAPL, "1m", "2024-03-01", "2024-05-01", 42, 2),
        (EURUSD, "1h", "2024-01-01", "2024-07-01", 6, 1),
        (EURUSD, "1h", "2024-07-01", "2025-01-01", 6, 1),
        (EURUSD, "1m", "2024-03-03", "2024-03-09", 5, 1),
        (AAPL_ALL_HOURS, "1m", "2024-03-04T06:00", "2024-03-09T06:00", 5, 1),
        (AAPL, "1s", "2024-03-05", "2024-03-06", 13, 12),
        (AAPL, "5m", "2024-03-04", "2024-03-09", 1, 1),
        (AAPL, "1w", "2014-01-01", "2024-01-01", 6, 1),
        (BITCOIN, "1m", "2024-03-01", "2024-03-08", 7, 1),
    ],
)
def test_a_full_initialisation_needs_no_more_requests_than_this(
    instrument: Instrument, timeframe: str, start: str, end: str, classic: int, current: int
) -> None:
    """The numbers of requests that the issue promises, with closed time around the bars asked for or not."""
    expected = bars_of(instrument, timeframe, start, end)
    for limits, count in ((CLASSIC, classic), (CURRENT, current)):
        assert len(plan_requests(TIMEFRAMES[timeframe], expected, limits)) == count
        within = window(start, end)
        assert len(plan_requests(TIMEFRAMES[timeframe], expected, limits, expected=expected, within=within)) == count


def test_half_a_year_of_forex_hours_is_six_requests_in_every_half_year() -> None:
    """Also where months of 23 sessions make it tight."""
    for year in range(2010, 2026):
        for start, end in ((f"{year}-01-01", f"{year}-07-01"), (f"{year}-07-01", f"{year + 1}-01-01")):
            assert len(plan_requests(TIMEFRAMES["1h"], bars_of(EURUSD, "1h", start, end), CLASSIC)) <= 6


def test_the_example_of_the_specification_has_three_segments() -> None:
    """RBLX daily, 2023-01-01 to 2025-05-30, of which April 2024 to May 2025 is held but for ten days: three gaps. One year a
    request: the second one spans held bars and takes the inner gap along, so three requests do."""
    expected = bars_of(stock("RBLX"), "1d", "2023-01-01", "2025-05-30")
    missing = missing_after(expected, ("2024-04-01", "2024-12-01"), ("2024-12-10", "2025-05-01"))
    gaps = find_gaps(expected, missing)
    assert [gap.reason for gap in gaps] == ["before the first held bar", "between held bars", "after the last held bar"]
    assert [str(gap.window) for gap in gaps] == [
        "2023-01-03..2024-03-28T20:00:00Z",
        "2024-12-02..2024-12-09T21:00:00Z",
        "2025-05-01..2025-05-29T20:00:00Z",
    ]
    assert sum(gap.opens for gap in gaps) == len(missing)
    requests = plan_requests(TIMEFRAMES["1d"], missing, CLASSIC)
    assert [str(r.duration) for r in requests] == ["1 Y", "1 Y", "1 Y"]
    assert len(plan_requests(TIMEFRAMES["1d"], missing, CURRENT)) == 1


@pytest.mark.parametrize("limits", list(HistoryLimits))
def test_a_tail_after_a_week_away_is_one_request(limits: HistoryLimits) -> None:
    """A week of hours, cut off at the last complete bar in the middle of a session."""
    series = Series(AAPL, TIMEFRAMES["1h"])
    expected = expected_bars(series, window("2024-03-01", "2024-03-12T15:20"), complete_at_s=epoch("2024-03-12T15:20"))
    missing = missing_after(expected, ("2024-03-01", "2024-03-05"))
    (request,) = plan_requests(series.timeframe, missing, limits)
    # From 09:00 New York: a gateway may label the half-hour bar of 09:30 so.
    assert request.window == window("2024-03-05T14:00", "2024-03-12T15:00")
    assert (request.end, str(request.duration)) == (at("2024-03-12T15:00"), "8 D")


def test_a_gap_of_nine_sessions_is_one_request() -> None:
    """Eleven days of the calendar, asked for as such."""
    expected = bars_of(AAPL, "1h", "2024-03-01", "2024-04-01")
    missing = missing_after(expected, ("2024-03-01", "2024-03-11"), ("2024-03-22", "2024-04-01"))
    assert len(np.unique(missing.sessions)) == 9
    (request,) = plan_requests(TIMEFRAMES["1h"], missing, CLASSIC)
    assert str(request.duration) == "11 D"
    assert request.window == window("2024-03-11T13:00", "2024-03-21T20:00")


def test_nothing_missing_is_nothing_asked() -> None:
    """No bars, no gaps, no requests."""
    nothing = bars_of(AAPL, "1h", "2024-03-02", "2024-03-04")
    assert plan_requests(TIMEFRAMES["1h"], nothing, CLASSIC) == []
    assert find_gaps(bars_of(AAPL, "1h", "2024-03-01", "2024-03-04"), nothing) == []


# --- what is missing -------------------------------------------------------------------------------------------------


def test_missing_is_expected_minus_held_minus_proven_empty() -> None:
    """Absent windows are half-open, may overlap and come in any order."""
    expected = bars_of(AAPL, "1h", "2024-03-05", "2024-03-06")
    empty = [window("2024-03-05T19:00", "2024-03-05T20:00"), window("2024-03-05T18:00", "2024-03-05T19:30")]
    missing = missing_bars(expected, expected.opens[:2], empty, TIMEFRAMES["1h"])
    assert missing.opens.tolist() == [epoch(f"2024-03-05T{hour}:00") for hour in (16, 17, 20)]
    assert [(str(g.window), g.opens, g.reason) for g in find_gaps(expected, missing)] == [
        ("2024-03-05T16:00:00Z..2024-03-05T18:00:00Z", 2, "between held bars"),
        ("2024-03-05T20:00:00Z..2024-03-05T21:00:00Z", 1, "after the last held bar"),
    ]


def test_a_weekend_does_not_part_a_gap() -> None:
    """Friday's last and Monday's first bar are consecutive; with nothing held that is the reason of the gap."""
    expected = bars_of(AAPL, "1h", "2024-03-08", "2024-03-12")
    (gap,) = find_gaps(expected, expected)
    assert (gap.opens, gap.reason) == (14, "nothing held")


@given(mask=st.lists(st.booleans(), min_size=21, max_size=21))
def test_gaps_partition_what_is_missing(mask: list[bool]) -> None:
    """Gaps hold every missing bar once, in order, and each is bounded by bars that are not missing."""
    expected = bars_of(AAPL, "1h", "2024-03-07", "2024-03-12")
    missing = expected.take(np.array(mask))
    gaps = find_gaps(expected, missing)
    assert sum(gap.opens for gap in gaps) == len(missing)
    for gap in gaps:
        inside = (expected.opens >= gap.window.start_s) & (expected.opens < gap.window.end_s)
        assert np.isin(expected.opens[inside], missing.opens).all()
        assert inside.sum() == gap.opens
    for earlier, later in pairwise(gaps):
        between = (expected.opens >= earlier.window.end_s) & (expected.opens < later.window.start_s)
        assert between.any()


# --- the fewest requests, against exhaustive search ------------------------------------------------------------------


def reaches(request_end_s: int, duration: Duration, start_s: int) -> bool:
    """The calendar reading, by another hand than the planner's: pandas counts the months."""
    offset = {
        "S": pd.DateOffset(seconds=duration.count),
        "D": pd.DateOffset(hours=24 * duration.count),
        "W": pd.DateOffset(hours=7 * 24 * duration.count),
        "M": pd.DateOffset(months=duration.count),
        "Y": pd.DateOffset(years=duration.count),
    }[duration.unit]
    return bool((pd.Timestamp(request_end_s, unit="s") - offset) <= pd.Timestamp(start_s, unit="s"))


def is_within_limit(timeframe: Timeframe, duration: Duration, limits: HistoryLimits) -> bool:
    """The limits as the facts state them: matrix, largest counts, longest request with a month of 30 days."""
    days = {"S": 1 / 86400, "D": 1, "W": 7, "M": 30, "Y": 365}
    smallest, largest, most = UNIT_MATRIX[duration.unit]
    in_matrix = smallest <= timeframe.seconds <= largest or (timeframe.seconds > 86400 and duration.unit == "Y")
    longest = timeframe.longest_request(limits)
    return (
        in_matrix
        and duration.count <= most
        and duration.count * days[duration.unit] <= longest.count * days[longest.unit] + 1e-9
    )


def can_be_one_request(timeframe: Timeframe, start_s: int, end_s: int, sessions: int, limits: HistoryLimits) -> bool:
    """True if any duration at all covers the span: days and weeks under both readings, the others by the calendar."""
    longest = timeframe.longest_request(limits)
    for unit in ("S", "D", "W", "M", "Y"):
        counts = [longest.count] if unit == longest.unit else []
        nominal_s = {"S": 1, "D": 86400, "W": 604800, "M": 30 * 86400, "Y": 365 * 86400}
        counts.append(longest.count * nominal_s[longest.unit] // nominal_s[unit])
        for count in counts:
            duration = Duration(min(count, UNIT_MATRIX[unit][2]), unit)
            per_unit = {"D": 1, "W": 5}.get(unit)
            if (
                duration.count
                and is_within_limit(timeframe, duration, limits)
                and reaches(end_s, duration, start_s)
                and (per_unit is None or per_unit * duration.count >= sessions)
            ):
                return True
    return False


def fewest_by_search(timeframe: Timeframe, bars: ExpectedBars, limits: HistoryLimits) -> int:
    """Try every way of parting the bars into runs, fewest runs first."""
    n = len(bars)
    for cuts in range(n):
        for where in combinations(range(1, n), cuts):
            runs = list(pairwise([0, *where, n]))
            if all(
                can_be_one_request(
                    timeframe,
                    min(int(bars.begins[i]), int(bars.aliases[i])),
                    int(bars.closes[j - 1]),
                    int(bars.sessions[j - 1] - bars.sessions[i]) + 1,
                    limits,
                )
                for i, j in runs
            ):
                return cuts + 1
    return n


SPREAD = {
    "1s": 1,
    "30s": 3,
    "1m": 6,
    "5m": 25,
    "15m": 45,
    "1h": 120,
    "4h": 150,
    "8h": 150,
    "1d": 2000,
    "1w": 4000,
    "1mo": 3000,
}
"""Days over which the missing bars of a small case are strewn, so that a handful of requests is needed."""


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(list(SPREAD)),
    instrument=st.sampled_from([AAPL, AAPL_ALL_HOURS, EURUSD]),
    limits=st.sampled_from(list(HistoryLimits)),
    offset=st.integers(0, 300),
    picks=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=9),
)
def test_the_plan_is_the_fewest_requests_that_cover_everything(
    name: str, instrument: Instrument, limits: HistoryLimits, offset: int, picks: list[float]
) -> None:
    """Against exhaustive search: never more requests, every missing bar covered, none over its limit, none idle."""
    timeframe = TIMEFRAMES[name]
    start = datetime(2024, 1, 1, tzinfo=UTC) - timedelta(days=offset)
    expected = expected_bars(Series(instrument, timeframe), Window(start - timedelta(days=SPREAD[name]), start))
    assume(len(expected))
    missing = expected.take(np.unique(np.array([int(len(expected) * pick) for pick in picks])))
    requests = plan_requests(timeframe, missing, limits)
    assert len(requests) == fewest_by_search(timeframe, missing, limits)
    check_plan(timeframe, missing, requests, limits)
    whole = Window(start - timedelta(days=SPREAD[name]), start)
    stretched = plan_requests(timeframe, missing, limits, expected=expected, within=whole)
    assert len(stretched) == len(requests)
    check_plan(timeframe, missing, stretched, limits)


def check_plan(timeframe: Timeframe, missing: ExpectedBars, requests: list[Request], limits: HistoryLimits) -> None:
    covered = np.zeros(len(missing), dtype=bool)
    for request in requests:
        inside = (missing.opens >= request.window.start_s) & (missing.opens < request.window.end_s)
        assert inside.any()
        assert (missing.closes[inside] <= request.window.end_s).all()
        assert request.end >= request.window.end
        assert is_within_limit(timeframe, request.duration, limits)
        first = int(np.flatnonzero(inside)[0])
        end_s = int(request.end.timestamp())
        assert reaches(end_s, request.duration, min(int(missing.begins[first]), int(missing.aliases[first])))
        assert reaches(end_s, request.duration, request.window.start_s)
        sessions = int(missing.sessions[inside][-1] - missing.sessions[inside][0]) + 1
        if request.duration.unit in ("D", "W"):
            assert request.duration.count * {"D": 1, "W": 5}[request.duration.unit] >= sessions
        covered |= inside
    assert covered.all()
    for earlier, later in pairwise(requests):
        assert earlier.window.end <= later.window.start


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), name=st.sampled_from(["1m", "5m", "1h", "4h", "1d"]), limits=st.sampled_from(list(HistoryLimits))
)
def test_large_plans_cover_everything_too(data: st.DataObject, name: str, limits: HistoryLimits) -> None:
    """Thousands of missing bars in random blocks: covered, within limits, windows apart."""
    timeframe = TIMEFRAMES[name]
    days = {"1m": 20, "5m": 60, "1h": 700, "4h": 900, "1d": 6000}[name]
    start = datetime(2024, 6, 1, tzinfo=UTC) - timedelta(days=days)
    expected = expected_bars(Series(EURUSD, timeframe), Window(start, start + timedelta(days=days)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(expected)), min_size=2, max_size=8)))
    keep = np.zeros(len(expected), dtype=bool)
    for lo, hi in zip(cuts[::2], cuts[1::2], strict=False):
        keep[lo:hi] = True
    missing = expected.take(keep)
    check_plan(timeframe, missing, plan_requests(timeframe, missing, limits), limits)


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeframe", "start", "end", "sessions", "duration"),
    [
        ("1s", "2024-03-05T14:30", "2024-03-05T15:00", 1, "1800 S"),
        ("1s", "2024-03-05T14:30", "2024-03-05T15:00:01", 1, None),
        ("5s", "2024-03-05T14:30", "2024-03-05T14:30:05", 1, "60 S"),
        ("30s", "2024-03-05T14:30", "2024-03-05T21:00", 1, "23400 S"),
        ("1m", "2024-03-05T14:30", "2024-03-05T21:00", 1, "1 D"),
        ("1m", "2024-03-05T22:15", "2024-03-06T22:00", 1, "1 D"),
        ("1m", "2024-03-05T09:00", "2024-03-06T01:00", 1, "1 D"),
        ("1m", "2024-03-05T20:59", "2024-03-06T14:31", 2, "63120 S"),
        ("1m", "2024-03-05T14:30", "2024-03-06T21:00", 2, None),
        ("5m", "2024-03-04T14:30", "2024-03-08T21:00", 5, "5 D"),
        ("5m", "2024-03-01T14:30", "2024-03-08T21:00", 6, None),
        ("1h", "2024-03-05T14:30", "2024-03-05T15:00", 1, "1 D"),
        ("1h", "2024-07-01T13:30", "2024-07-31T13:30", 22, "30 D"),
        ("1h", "2024-07-01T13:30", "2024-07-31T20:00", 22, "1 M"),
        ("1h", "2024-07-01T13:30", "2024-08-01T20:00", 24, None),
        ("4h", "2024-03-05T14:30", "2024-03-05T21:00", 1, "1 W"),
        ("4h", "2024-02-05T14:30", "2024-03-05T14:30", 21, "1 M"),
        ("8h", "2024-03-05T14:30", "2024-03-05T21:00", 1, "1 M"),
        ("1d", "2024-03-05", "2024-03-05T21:00", 1, "1 Y"),
        ("1d", "2023-03-05", "2024-03-05", 251, "1 Y"),
        ("1d", "2023-03-05", "2024-03-05T00:01", 251, None),
        ("1w", "2023-01-02", "2024-12-27T21:00", 500, "2 Y"),
        ("1mo", "2024-01-01", "2024-12-31T21:00", 252, "1 Y"),
    ],
)
def test_durations_are_rounded_up_and_never_over_the_limit(
    timeframe: str, start: str, end: str, sessions: int, duration: str | None
) -> None:
    """What is written for a span under the classic limits, and None where it needs more than one request."""
    found = duration_for(TIMEFRAMES[timeframe], Span(epoch(start), epoch(end), sessions), CLASSIC)
    assert (None if found is None else str(found)) == duration


def test_counts_of_sessions_are_covered_where_days_are_not_enough() -> None:
    """Where more sessions than days have to be reached (never seen, but a gateway may count so), sessions decide."""
    span = Span(epoch("2024-03-05T14:30"), epoch("2024-03-08T21:00"), 5)
    assert str(duration_for(TIMEFRAMES["1h"], span, CLASSIC)) == "5 D"
    month = Span(epoch("2024-07-01T13:30"), epoch("2024-07-31T20:00"), 23)
    assert duration_for(TIMEFRAMES["1h"], month, CLASSIC, READINGS[0]) is None
    assert str(duration_for(TIMEFRAMES["1h"], month, CLASSIC, LOOSEST)) == "1 M"
    assert str(duration_for(TIMEFRAMES["1h"], replace(month, sessions_per_week=7), CLASSIC, READINGS[1])) == "1 M"


@pytest.mark.parametrize("limits", list(HistoryLimits))
@pytest.mark.parametrize("timeframe", TIMEFRAMES.values(), ids=str)
def test_every_timeframe_can_ask_for_one_bar_and_stays_in_the_matrix(
    timeframe: Timeframe, limits: HistoryLimits
) -> None:
    """No duration of any timeframe would be answered with error 321: unit and count are always ones IB accepts."""
    end_s = epoch("2024-07-05T20:00")
    for length in (timeframe.seconds, 3600, 86400, 5 * 86400, 30 * 86400, 200 * 86400, 800 * 86400):
        for duration in list_durations(timeframe, Span(end_s - length, end_s, 1), limits, READINGS[0]):
            assert is_within_limit(timeframe, duration, limits)
            assert is_allowed(timeframe, duration, limits)
    bars = expected_bars(Series(EURUSD, timeframe), window("2024-03-01", "2024-03-30"))
    assert len(plan_requests(timeframe, bars.take(slice(0, 1)), limits)) == 1


def test_a_days_end_is_its_close_and_not_its_date() -> None:
    """Daily bars are stamped at midnight, but a request that ended there would not hold the day."""
    (request,) = plan_requests(TIMEFRAMES["1d"], bars_of(AAPL, "1d", "2024-03-05", "2024-03-06"), CLASSIC)
    assert (str(request.window), request.end) == ("2024-03-05..2024-03-05T21:00:00Z", at("2024-03-05T21:00"))


def test_windows_hold_every_label_that_counts_as_the_bar() -> None:
    """A week's window begins on its Monday, a daily forex bar's on the evening before, an hour of 17:15 at 17:00."""
    (week,) = plan_requests(TIMEFRAMES["1w"], bars_of(AAPL, "1w", "2024-03-04", "2024-03-10"), CLASSIC)
    assert week.window == window("2024-03-04", "2024-03-08T21:00")
    (day,) = plan_requests(TIMEFRAMES["1d"], bars_of(EURUSD, "1d", "2024-03-04", "2024-03-05"), CLASSIC)
    assert day.window == window("2024-03-03T22:15", "2024-03-04T22:00")
    (hour,) = plan_requests(TIMEFRAMES["1h"], bars_of(EURUSD, "1h", "2024-03-03T22:00", "2024-03-03T23:00"), CLASSIC)
    assert hour.window == window("2024-03-03T22:00", "2024-03-03T23:00")


# --- closed time around the bars -------------------------------------------------------------------------------------


def test_closed_time_is_answered_for_where_it_is_free() -> None:
    """New Year's Day before the first forex session, and an hour after the last one, belong to the requests."""
    start, end = "2024-01-01", "2024-02-01"
    expected = bars_of(EURUSD, "1h", start, "2024-03-01")
    missing = missing_after(expected, ("2024-01-27", "2024-03-01"))
    (request,) = plan_requests(TIMEFRAMES["1h"], missing, CLASSIC, expected=expected, within=window(start, end))
    assert request.window == window("2024-01-01", "2024-01-26T23:00")
    assert request.end == at("2024-01-26T23:00")
    assert str(request.duration) == "26 D"


def test_the_window_of_the_run_bounds_the_stretch() -> None:
    """Nothing before its start is answered for, and nothing is asked beyond its end, which may be now."""
    expected = bars_of(AAPL, "5m", "2024-03-04", "2024-03-09")
    missing = missing_after(expected, ("2024-03-06", "2024-03-09"))
    within = window("2024-03-04T12:00", "2024-03-05T21:10")
    (request,) = plan_requests(TIMEFRAMES["5m"], missing, CLASSIC, expected=expected, within=within)
    assert request.window == within
    last_known = plan_requests(
        TIMEFRAMES["5m"], expected, CLASSIC, expected=expected, within=window("2024-03-04", "2024-03-09")
    )
    assert last_known[-1].end == at("2024-03-08T21:00"), "after the last expected bar another may be forming"


# --- asking again ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["1s", "5s", "30s", "1m", "5m", "1h", "4h", "8h", "1d", "1w"]),
    instrument=st.sampled_from([AAPL, EURUSD]),
    limits=st.sampled_from(list(HistoryLimits)),
    where=st.floats(0, 1, exclude_max=True),
    length=st.integers(1, 2000),
    slack=st.sampled_from([None, 0, 30, 600]),
)
def test_a_refetch_has_another_shape_and_covers_all_missing_bars(
    name: str, instrument: Instrument, limits: HistoryLimits, where: float, length: int, slack: int | None
) -> None:
    """Five attempts in a row: each covers all missing bars within the limits, and repeats no request as long as there is
    time after them for another end (else shapes run out: of some bars only one duration is short enough)."""
    timeframe = TIMEFRAMES[name]
    days = {"1s": 1, "5s": 2, "30s": 5}.get(name, 200)
    start = datetime(2024, 3, 5, tzinfo=UTC)
    expected = expected_bars(Series(instrument, timeframe), Window(start, start + timedelta(days=days)))
    first = int(where * len(expected))
    missing = expected.take(slice(first, first + length))
    until_s = None if slack is None else int(missing.closes[-1]) + slack
    asked = plan_requests(timeframe, missing, limits)
    for attempt in range(1, 6):
        again = refetch_requests(timeframe, missing, limits, previous=asked, attempt=attempt, until_s=until_s)
        check_again(timeframe, missing, again, limits)
        shapes = {(r.end, str(r.duration)) for r in asked}
        if slack in (None, 600) or (slack == 30 and attempt == 1):
            assert not shapes & {(r.end, str(r.duration)) for r in again}
        assert until_s is None or all(r.end.timestamp() <= until_s for r in again)
        asked = asked + again


def check_again(timeframe: Timeframe, missing: ExpectedBars, requests: list[Request], limits: HistoryLimits) -> None:
    covered = np.zeros(len(missing), dtype=bool)
    for request in requests:
        assert is_within_limit(timeframe, request.duration, limits)
        assert reaches(int(request.end.timestamp()), request.duration, request.window.start_s)
        assert request.end >= request.window.end
        covered |= (missing.opens >= request.window.start_s) & (missing.closes <= request.window.end_s)
    assert covered.all()


def test_a_gap_in_a_session_of_minutes_is_refetched_with_another_end_and_duration() -> None:
    """One request, ending a minute after the gap."""
    expected = bars_of(AAPL, "1m", "2024-03-05", "2024-03-06")
    first = plan_requests(TIMEFRAMES["1m"], expected, CLASSIC)
    (again,) = refetch_requests(TIMEFRAMES["1m"], expected.take(slice(100, 107)), CLASSIC, previous=first)
    assert again.window == window("2024-03-05T16:10", "2024-03-05T16:17")
    assert again.end == at("2024-03-05T16:18")
    assert str(again.duration) != str(first[0].duration)


def test_a_gap_as_long_as_the_limit_is_halved() -> None:
    """Half an hour of seconds does not fit in one request with a later end."""
    missing = bars_of(AAPL, "1s", "2024-03-05T14:30", "2024-03-05T15:00")
    first = plan_requests(TIMEFRAMES["1s"], missing, CLASSIC)
    again = refetch_requests(TIMEFRAMES["1s"], missing, CLASSIC, previous=first)
    assert len(again) == 2
    check_again(TIMEFRAMES["1s"], missing, again, CLASSIC)


def test_a_refetch_of_no_bars_is_a_bug() -> None:
    """That is a defect of the caller."""
    with pytest.raises(BugError):
        refetch_requests(TIMEFRAMES["1h"], bars_of(AAPL, "1h", "2024-03-02", "2024-03-03"), CLASSIC, previous=[])


# --- reaching back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", list(HistoryLimits))
@pytest.mark.parametrize("name", ["1s", "1m", "5m", "1h", "8h", "1d", "1w"])
@pytest.mark.parametrize("instrument", [AAPL, EURUSD, BITCOIN], ids=lambda i: i.symbol)
@pytest.mark.parametrize("before", ["2024-03-05T15:00", "2024-03-11T13:30", "2024-01-01T22:15"])
def test_the_longest_window_back_is_one_request_and_no_shorter(
    instrument: Instrument, name: str, limits: HistoryLimits, before: str
) -> None:
    """It is planned as one request, it skips nights and weekends before it, and one bar more would be two requests."""
    series = Series(instrument, TIMEFRAMES[name])
    back = longest_back(series, epoch(before), limits)
    assert back.end == at(before)
    bars = expected_bars(series, back)
    assert len(plan_requests(series.timeframe, bars, limits)) == 1
    longer = expected_bars(series, Window(back.start - timedelta(days=40), back.end))
    one_more = longer.take(slice(len(longer) - len(bars) - 1, None))
    assert name == "1w" or len(plan_requests(series.timeframe, one_more, limits)) == 2


def test_before_the_first_year_there_is_nothing() -> None:
    """An empty window, no error."""
    back = longest_back(Series(AAPL, TIMEFRAMES["1d"]), epoch("1950-01-01"), CLASSIC)
    assert back.is_empty
