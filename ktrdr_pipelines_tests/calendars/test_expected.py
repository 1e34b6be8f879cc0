"""Calendars: expected bars compared with answer files written by hand (`answers/README.md`), matching, and open hours."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.calendars import (
    calendar_of,
    count_expected,
    expected_bars,
    find_unexpected,
    forming_bars,
    is_open,
    match_held,
    next_complete,
    period_keys,
    session_windows,
)
from ktrdr_pipelines.calendars.exchanges import (
    BY_CURRENCY,
    BY_EXCHANGE,
    FUTURES_BY_EXCHANGE,
    FUTURES_BY_PRODUCT,
    list_calendars,
)
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError

ANSWERS = Path(__file__).parent / "answers"


def read_answers(*names: str) -> list[Any]:
    return [
        pytest.param(case, id=case.get("name")) for name in names for case in json.loads((ANSWERS / name).read_text())
    ]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def seconds(*texts: str) -> np.ndarray:
    return np.array([int(at(text).timestamp()) for text in texts], dtype=np.int64)


def window(start: str, end: str) -> Window:
    return Window(at(start), at(end))


def series_on(calendar: str, timeframe: str, hours: str = "regular") -> Series:
    return Series(Instrument("X", "STK", "SMART", "USD", hours=Hours(hours), calendar=calendar), TIMEFRAMES[timeframe])


AAPL = stock("AAPL")
EURUSD = forex("EURUSD")


@pytest.mark.parametrize(
    "case",
    read_answers(
        "us_stocks.json", "europe.json", "asia.json", "forex.json", "futures.json", "crypto.json", "long_bars.json"
    ),
)
def test_expected_bars_are_those_the_exchange_publishes(case: dict[str, Any]) -> None:
    """Every session of the answer files has exactly its opens, and its last bar is complete when the session ends."""
    bars = expected_bars(series_on(case["calendar"], case["timeframe"], case["hours"]), window(*case["window"]))
    if "opens" in case:
        assert bars.opens.tolist() == seconds(*case["opens"]).tolist()
    else:
        assert len(bars) == case["count"]
        assert bars.opens[[0, -1]].tolist() == seconds(case["first"], case["last"]).tolist()
    if len(bars):
        assert bars.closes[-1] == seconds(case["closes_last"])[0]


@pytest.mark.parametrize("case", read_answers("trading_days.json"))
def test_a_year_has_its_published_number_of_sessions(case: dict[str, Any]) -> None:
    """Holidays and special closures of a whole year add up to the number of trading days that the exchange publishes."""
    year = case["year"]
    bars = expected_bars(series_on(case["calendar"], "1d"), window(f"{year}-01-01T00:00Z", f"{year + 1}-01-01T00:00Z"))
    assert len(bars) == case["days"]


@pytest.mark.parametrize(
    ("file", "series", "unexpected"),
    [
        ("GOOG.csv", Series(stock("GOOG"), TIMEFRAMES["1d"]), 0),
        # On 6 and 20 October 2017 the source has a last bar that starts at Friday's close.
        ("EURUSD.csv", Series(EURUSD, TIMEFRAMES["1h"]), 2),
    ],
)
def test_real_bars_are_where_the_calendar_expects_them(file: str, series: Series, unexpected: int) -> None:
    """Bars recorded by others: nine years of days, and ten months of forex hours, contain every expected bar."""
    package = find_spec("backtesting")
    assert package is not None
    assert package.origin is not None
    lines = (Path(package.origin).parent / "test" / file).read_text().splitlines()[1:]
    stamps = np.array([int(at(f"{line.split(',')[0]}+00:00").timestamp()) for line in lines], dtype=np.int64)
    bars = expected_bars(series, Window.from_epoch(int(stamps[0]), int(stamps[-1]) + 1))
    assert match_held(bars, stamps, series.timeframe).all()
    assert find_unexpected(bars, stamps, series.timeframe).sum() == unexpected


def test_only_complete_bars_are_expected() -> None:
    """With ``complete_at_s`` a bar is expected from its close on, not a second earlier."""
    series, day = Series(AAPL, TIMEFRAMES["1h"]), window("2024-03-05T00:00Z", "2024-03-06T00:00Z")
    assert len(expected_bars(series, day, complete_at_s=int(seconds("2024-03-05T15:59:59Z")[0]))) == 1
    assert len(expected_bars(series, day, complete_at_s=int(seconds("2024-03-05T16:00Z")[0]))) == 2
    daily = Series(AAPL, TIMEFRAMES["1d"])
    assert len(expected_bars(daily, day, complete_at_s=int(seconds("2024-03-05T20:59Z")[0]))) == 0
    assert len(expected_bars(daily, day, complete_at_s=int(seconds("2024-03-05T21:00Z")[0]))) == 1


def test_bars_tile_their_sessions() -> None:
    """In every timeframe below a day the bars of a session touch, begin with it and end with it; none is longer than its name."""
    for instrument in (AAPL, EURUSD, stock("7203", exchange="TSEJ", currency="JPY")):
        for timeframe in (t for t in TIMEFRAMES.values() if t.is_intraday and t.seconds >= 60):
            bars = expected_bars(Series(instrument, timeframe), window("2024-02-20T00:00Z", "2024-04-10T00:00Z"))
            lengths = bars.closes - bars.opens
            assert (lengths > 0).all()
            assert lengths.max() <= timeframe.seconds
            same_session = bars.sessions[1:] == bars.sessions[:-1]
            pauses = (bars.opens[1:] - bars.closes[:-1])[same_session]
            lunch = 3600 if instrument.exchange == "TSEJ" else 0
            assert set(pauses.tolist()) <= {0, lunch}


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(1_600_000_000, 1_720_000_000),
    length=st.integers(0, 20 * 86400),
    cut=st.floats(0, 1),
    timeframe=st.sampled_from(["5m", "1h", "4h", "1d", "1w", "1mo"]),
    instrument=st.sampled_from(
        [AAPL, EURUSD, stock("AAPL", hours=Hours.EXTENDED), Instrument("BTC", "CRYPTO", "PAXOS", "USD")]
    ),
)
def test_windows_cut_anywhere_add_up(
    start: int, length: int, cut: float, timeframe: str, instrument: Instrument
) -> None:
    """Two adjacent windows have together the bars of both: none twice, none lost between them."""
    series = Series(instrument, TIMEFRAMES[timeframe])
    middle = start + int(length * cut)
    whole = expected_bars(series, Window.from_epoch(start, start + length))
    left = expected_bars(series, Window.from_epoch(start, middle))
    right = expected_bars(series, Window.from_epoch(middle, start + length))
    for name in ("opens", "closes", "sessions", "aliases", "begins"):
        joined = np.concatenate([getattr(left, name), getattr(right, name)])
        assert joined.tolist() == getattr(whole, name).tolist()
    assert (np.diff(whole.opens) > 0).all()
    assert (np.diff(whole.closes) >= 0).all()


@pytest.mark.parametrize(
    ("instrument", "timeframe", "earliest"),
    [
        (AAPL, "1h", "2024-03-05T15:00Z"),  # the stamp
        (EURUSD, "1h", "2024-03-04T22:00Z"),  # the other stamp of the bar that opens at 17:15 New York
        (EURUSD, "1d", "2024-03-04T22:15Z"),  # the session begins on the evening before its date
        (AAPL, "1w", "2024-03-04T00:00Z"),  # the week's Monday
    ],
)
def test_the_earliest_instant_of_a_bar_is_before_all_its_stamps(
    instrument: Instrument, timeframe: str, earliest: str
) -> None:
    """`earliest` is the minimum of begin, stamp and accepted stamp, whichever of them is the smallest."""
    year = expected_bars(Series(instrument, TIMEFRAMES[timeframe]), window("2024-01-01T00:00Z", "2025-01-01T00:00Z"))
    assert seconds(earliest)[0] in year.earliest
    smallest = np.minimum(np.minimum(year.begins, year.aliases), year.opens)
    assert year.earliest.tolist() == smallest.tolist()


def test_cached_arrays_cannot_be_changed_by_a_caller() -> None:
    """Bars are shared between callers, so writing to them is refused."""
    bars = expected_bars(Series(AAPL, TIMEFRAMES["1m"]), window("2023-01-01T00:00Z", "2024-01-01T00:00Z"))
    with pytest.raises(ValueError, match="read-only"):
        bars.opens[0] = 0


# --- matching --------------------------------------------------------------------------------------------------------


def test_the_forex_bar_of_17_15_may_be_stamped_17_00() -> None:
    """A stamp at the grid point before the first bar matches that bar where the market is closed at the grid point."""
    bars = expected_bars(Series(EURUSD, TIMEFRAMES["1h"]), window("2024-03-05T21:00Z", "2024-03-06T00:00Z"))
    assert bars.opens.tolist() == seconds("2024-03-05T21:00Z", "2024-03-05T22:15Z", "2024-03-05T23:00Z").tolist()
    held = seconds("2024-03-05T22:00Z")
    assert match_held(bars, held, TIMEFRAMES["1h"]).tolist() == [False, True, False]
    assert find_unexpected(bars, held, TIMEFRAMES["1h"]).tolist() == [False]


def test_another_bar_never_matches_the_one_of_17_15() -> None:
    """A four-hour forex bar of 16:00 New York is another bar: with it held, the one of 17:15 is still missing."""
    bars = expected_bars(Series(EURUSD, TIMEFRAMES["4h"]), window("2024-03-05T20:00Z", "2024-03-06T02:00Z"))
    assert bars.opens.tolist() == seconds("2024-03-05T21:00Z", "2024-03-05T22:15Z", "2024-03-06T01:00Z").tolist()
    assert match_held(bars, seconds("2024-03-05T21:00Z"), TIMEFRAMES["4h"]).tolist() == [True, False, False]


@pytest.mark.parametrize("label", ["2024-01-08T00:00Z", "2024-01-12T00:00Z", "2024-01-14T00:00Z"])
def test_any_stamp_within_the_week_matches_it(label: str) -> None:
    """Weekly bars are matched by calendar week, whichever of its days is the stamp; the next week is another bar."""
    bars = expected_bars(Series(AAPL, TIMEFRAMES["1w"]), window("2024-01-01T00:00Z", "2024-01-22T00:00Z"))
    assert match_held(bars, seconds(label), TIMEFRAMES["1w"]).tolist() == [False, True, False]
    assert not find_unexpected(bars, seconds(label), TIMEFRAMES["1w"]).any()


@pytest.mark.parametrize("label", ["2024-02-01T00:00Z", "2024-02-29T00:00Z"])
def test_any_stamp_within_the_month_matches_it(label: str) -> None:
    """Monthly bars are matched by calendar month, leap day included."""
    bars = expected_bars(Series(AAPL, TIMEFRAMES["1mo"]), window("2024-01-01T00:00Z", "2024-04-01T00:00Z"))
    assert match_held(bars, seconds(label), TIMEFRAMES["1mo"]).tolist() == [False, True, False]


def test_period_keys_follow_the_iso_week_and_the_month() -> None:
    """Keys change at Monday 00:00 and at the first of a month, before 1970 too; other timeframes keep the stamp."""
    days = [datetime(1969, 12, 20, tzinfo=UTC) + timedelta(days=n) for n in range(800)]
    stamps = np.array([int(day.timestamp()) for day in days], dtype=np.int64)
    for name, expected in (("1w", [d.isocalendar()[:2] for d in days]), ("1mo", [(d.year, d.month) for d in days])):
        keys = period_keys(TIMEFRAMES[name], stamps)
        assert ((keys[1:] != keys[:-1]) == [a != b for a, b in zip(expected[1:], expected[:-1], strict=True)]).all()
    assert period_keys(TIMEFRAMES["1d"], stamps) is stamps


def test_unexpected_bars_are_those_that_match_no_expected_bar() -> None:
    """A bar outside the session is unexpected, a bar of the session is not."""
    bars = expected_bars(Series(AAPL, TIMEFRAMES["1h"]), window("2024-03-05T00:00Z", "2024-03-06T00:00Z"))
    held = seconds("2024-03-05T14:30Z", "2024-03-05T21:00Z")
    assert find_unexpected(bars, held, TIMEFRAMES["1h"]).tolist() == [False, True]
    assert match_held(bars, np.empty(0, np.int64), TIMEFRAMES["1h"]).tolist() == [False] * 7
    assert match_held(bars, bars.opens, TIMEFRAMES["1h"]).all()


# --- which calendar --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "calendar"),
    [
        (stock("AAPL"), "NYSE"),
        (stock("AAPL", primary_exchange="NASDAQ"), "NYSE"),
        (stock("MSFT", exchange="NASDAQ.NMS"), "NYSE"),
        (stock("VOD", currency="GBP", primary_exchange="LSE"), "LSE"),
        (stock("SAP", currency="EUR", primary_exchange="IBIS"), "XETR"),
        (stock("AIR", exchange="SBF", currency="EUR"), "XPAR"),
        (stock("7203", currency="JPY"), "JPX"),
        (stock("700", exchange="SEHK", currency="HKD"), "XHKG"),
        (stock("RY", exchange="TSE", currency="CAD"), "TSX"),
        (stock("BHP", exchange="ASX", currency="AUD"), "ASX"),
        (forex("EURUSD"), "FOREX"),
        (Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES"), "CME Globex Equity"),
        (Instrument("6EZ4", "FUT", "CME", "USD", ib_symbol="EUR"), "CMEGlobex_FX"),
        (Instrument("CL", "CONTFUT", "NYMEX", "USD"), "CMEGlobex_EnergyAndMetals"),
        (Instrument("ZC", "FUT", "CBOT", "USD"), "CMEGlobex_Grains"),
        (Instrument("BTC", "CRYPTO", "PAXOS", "USD"), "24/7"),
        (Instrument("EURUSD", "CFD", "SMART", "USD", ib_symbol="EUR"), "FOREX"),
        (Instrument("SPX", "IND", "CBOE", "USD"), "NYSE"),
        (Instrument("ODD", "STK", "SMART", "EUR", calendar="XWBO"), "XWBO"),
    ],
)
def test_the_calendar_follows_from_kind_exchange_and_currency(instrument: Instrument, calendar: str) -> None:
    """Instruments of every kind have their calendar; the universe file's `calendar:` has precedence."""
    assert calendar_of(instrument) == calendar


@pytest.mark.parametrize(
    "instrument",
    [
        stock("SAP", currency="EUR"),
        stock("X", primary_exchange="NOWHERE"),
        Instrument("X", "FUT", "NOWHERE", "USD"),
        Instrument("X", "STK", "SMART", "USD", calendar="NYZE"),
    ],
)
def test_a_calendar_is_never_guessed(instrument: Instrument) -> None:
    """Without a row in the tables the error names the setting of the universe file."""
    with pytest.raises(InputError) as caught:
        calendar_of(instrument)
    assert instrument.symbol in caught.value.observed
    assert "calendar:" in caught.value.advice


def test_every_name_in_the_tables_is_a_calendar() -> None:
    """No row of the exchange tables names a calendar that is not installed."""
    names = {*BY_EXCHANGE.values(), *BY_CURRENCY.values(), *FUTURES_BY_EXCHANGE.values(), *FUTURES_BY_PRODUCT.values()}
    assert names <= list_calendars()


@pytest.mark.slow
@pytest.mark.parametrize(
    "calendar", sorted({*BY_EXCHANGE.values(), *FUTURES_BY_EXCHANGE.values(), *FUTURES_BY_PRODUCT.values()})
)
def test_every_calendar_gives_a_sound_year(calendar: str) -> None:
    """Each calendar of the tables has 230 to 366 sessions a year, past and coming, in order and without overlap."""
    for year in (2005, 2024, 2027):
        bars = expected_bars(series_on(calendar, "30m"), window(f"{year}-01-01T00:00Z", f"{year + 1}-01-01T00:00Z"))
        assert 230 <= len(np.unique(bars.sessions)) <= 367
        assert (bars.opens[1:] >= bars.closes[:-1]).all()


@pytest.mark.parametrize(
    ("start", "end"), [("1949-12-31T00:00Z", "2024-01-01T00:00Z"), ("2024-01-01T00:00Z", "2070-01-01T00:01Z")]
)
def test_absurd_years_are_refused(start: str, end: str) -> None:
    """Years that no calendar covers are invalid input; the error names the first and last year."""
    with pytest.raises(InputError, match=r"1950.*2069"):
        expected_bars(Series(AAPL, TIMEFRAMES["1d"]), window(start, end))


# --- open hours ------------------------------------------------------------------------------------------------------


def test_open_hours_are_half_open() -> None:
    """The market is open at the instant of its open, closed at the instant of its close, and closed at lunch."""
    assert not is_open(AAPL, at("2024-03-05T14:29:59Z"))
    assert is_open(AAPL, at("2024-03-05T14:30Z"))
    assert not is_open(AAPL, at("2024-03-05T21:00Z"))
    hong_kong = stock("700", exchange="SEHK", currency="HKD")
    assert not is_open(hong_kong, at("2024-06-04T04:30Z"))
    assert is_open(hong_kong, at("2024-06-04T05:00Z"))
    assert not is_open(EURUSD, at("2024-03-05T22:10Z"))


@pytest.mark.parametrize(
    ("timeframe", "after", "complete"),
    [
        ("1h", "2024-03-05T14:31:00Z", "2024-03-05T15:00Z"),
        ("1h", "2024-03-05T15:00:00Z", "2024-03-05T16:00Z"),
        ("1h", "2024-03-05T14:59:59.5Z", "2024-03-05T15:00Z"),
        ("1h", "2024-11-28T15:00:00Z", "2024-11-29T15:00Z"),
        ("1m", "2024-03-08T21:00:00Z", "2024-03-11T13:31Z"),
        ("1d", "2024-03-05T12:00:00Z", "2024-03-05T21:00Z"),
        ("1w", "2024-03-05T12:00:00Z", "2024-03-08T21:00Z"),
        ("1mo", "2024-03-05T12:00:00Z", "2024-03-28T20:00Z"),
    ],
)
def test_the_next_bar_is_complete_at_the_next_close(timeframe: str, after: str, complete: str) -> None:
    """The first close after the instant, over nights, weekends and holidays."""
    assert next_complete(Series(AAPL, TIMEFRAMES[timeframe]), at(after)) == at(complete)


@pytest.mark.parametrize(
    ("timeframe", "expiry", "last"),
    [
        ("1d", "20241220", "2024-12-27T00:00Z"),  # a week is added: closed exchanges move the date
        ("1h", "20241220", "2024-12-27T21:00Z"),
        ("1w", "20241218", "2024-12-27T00:00Z"),  # the week is expected in which it may trade last
        ("1mo", "20241220", "2024-12-31T00:00Z"),
        ("1d", "202412", "2025-04-11T00:00Z"),  # a rate future trades for a quarter beyond its month
    ],
)
def test_nothing_is_expected_of_a_future_that_has_expired(timeframe: str, expiry: str, last: str) -> None:
    """Bars end with the last date on which the future may trade."""
    series = Series(Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES", expiry=expiry), TIMEFRAMES[timeframe])
    whole = expected_bars(series, window("2024-11-01", "2026-11-01"))
    assert whole.opens[-1] == at(last).timestamp()
    endless = Series(replace(series.instrument, expiry=""), series.timeframe)
    before = expected_bars(endless, window("2024-11-01", "2026-11-01")).opens
    assert np.array_equal(whole.opens, before[before <= at(last).timestamp()])
    assert not len(expected_bars(series, window("2025-06-01", "2025-09-01")))
    assert next_complete(series, at("2024-12-02T15:00Z")) == next_complete(endless, at("2024-12-02T15:00Z"))
    assert next_complete(series, at("2025-06-02T15:00Z")) is None


@pytest.mark.parametrize("expiry", ["", "20241341", "December", "2024"])
def test_an_expiry_that_is_no_date_sets_no_end(expiry: str) -> None:
    """Neither a malformed expiry nor one of a stock."""
    assert Instrument("ESZ4", "FUT", "CME", "USD", expiry=expiry).trades_until is None
    assert Instrument("AAPL", "STK", "SMART", "USD", expiry="202412").trades_until is None


def test_session_windows_are_whole_sessions() -> None:
    """Each session that overlaps the window is returned uncut, with its lunch break; adjacent sessions are not."""
    assert session_windows(AAPL, window("2024-03-05T20:00Z", "2024-03-06T14:30Z")) == [
        window("2024-03-05T14:30Z", "2024-03-05T21:00Z")
    ]
    hong_kong = stock("700", exchange="SEHK", currency="HKD")
    assert session_windows(hong_kong, window("2024-06-04T04:10Z", "2024-06-04T04:20Z")) == [
        window("2024-06-04T01:30Z", "2024-06-04T08:00Z")
    ]


# --- counting without a list -----------------------------------------------------------------------------------------

KINDS = [
    AAPL,
    EURUSD,
    stock("AAPL", hours=Hours.EXTENDED),
    stock("700", exchange="SEHK", currency="HKD"),
    Instrument("BTC", "CRYPTO", "PAXOS", "USD"),
    Instrument("ESH4", "FUT", "CME", "USD", ib_symbol="ES", expiry="202403"),
]


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    start=st.integers(1_700_000_000, 1_712_000_000),
    length=st.integers(0, 30 * 86400),
    timeframe=st.sampled_from(["1m", "5m", "1h", "2h", "4h", "8h", "1d", "1w", "1mo"]),
    instrument=st.sampled_from(KINDS),
)
def test_counted_bars_are_the_listed_ones(
    data: st.DataObject, start: int, length: int, timeframe: str, instrument: Instrument
) -> None:
    """Numbers, bars by number, bars by stamp, and counts at an instant agree with the arrays of the listed bars."""
    series, span = Series(instrument, TIMEFRAMES[timeframe]), Window.from_epoch(start, start + length)
    counted, bars = count_expected(series, span), expected_bars(series, span)
    assert len(counted) == len(bars)
    numbers = np.arange(counted.first, counted.end)
    picked = counted.grid.pick(numbers)
    for name in ("opens", "closes", "sessions", "aliases", "begins"):
        assert getattr(picked, name).tolist() == getattr(bars, name).tolist()
    now = data.draw(st.integers(start - 86400, start + length + 86400))
    assert len(count_expected(series, span, complete_at_s=now)) == len(bars.complete_at(now))
    assert bars.is_complete_at(now).sum() == len(bars.complete_at(now))
    around = expected_bars(series, Window.from_epoch(now - 40 * 86400, now + 40 * 86400))
    is_forming = (around.begins <= now) & (around.closes > now)
    assert forming_bars(series, now).opens.tolist() == around.opens[is_forming].tolist()
    # Stamps near and at the bars, as a gateway might label them.
    stamps = np.array(data.draw(st.lists(st.integers(start, start + length), max_size=20)), dtype=np.int64)
    stamps = np.concatenate([stamps, stamps // 900 * 900, stamps // 86400 * 86400])
    if len(bars):
        chosen = np.array(data.draw(st.lists(st.integers(0, len(bars) - 1), max_size=20)), dtype=np.int64)
        stamps = np.concatenate([stamps, bars.opens[chosen], bars.aliases[chosen], bars.opens[chosen] + 60])
    stamps = np.unique(stamps)
    found = counted.grid.find(stamps)
    inside = np.unique(found[(found >= counted.first) & (found < counted.end)])
    assert numbers[match_held(bars, stamps, series.timeframe)].tolist() == inside.tolist()
    wide = expected_bars(series, Window.from_epoch(start - 90 * 86400, start + length + 90 * 86400))
    if instrument.trades_until is None:
        assert (found < 0).tolist() == find_unexpected(wide, stamps, series.timeframe).tolist()


def test_counting_costs_the_same_for_a_day_and_twenty_years() -> None:
    """No array is as long as the bars counted: numpy allocates the same for both."""
    series = Series(AAPL, TIMEFRAMES["1m"])
    spans = window("2024-03-05T00:00Z", "2024-03-06T00:00Z"), window("2005-01-01T00:00Z", "2025-01-01T00:00Z")
    counted = [count_expected(series, span) for span in spans]
    assert [len(each) for each in counted] == [390, len(expected_bars(series, spans[1]))]
    peaks = []
    for span in spans:
        tracemalloc.start()
        count_expected(series, span)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000
