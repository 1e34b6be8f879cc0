"""The synthetic market: one path, and all bars made from it."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.simulator.market import BAR_SIZES, Bars, ContractQuery, find_listings, match_symbols
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket

MARKET = SyntheticMarket()
CLOCK_SIZES = [name for name, size in BAR_SIZES.items() if not size.is_dated]


def at(*parts):
    return int(datetime(*parts, tzinfo=UTC).timestamp())


def find(symbol, sec_type="STK", currency="USD", **more):
    (listing,) = find_listings(
        MARKET, ContractQuery(symbol=symbol, sec_type=sec_type, currency=currency, **more), at(2024, 3, 1)
    )
    return listing


AAPL, THIN, RBLX, GONE = (find(symbol) for symbol in ("AAPL", "THIN", "RBLX", "GONE"))
EURUSD = find("EUR", "CASH")
USDJPY = find("USD", "CASH", "JPY")
ES = find("ES", "FUT", expiry="202406")


def get(listing, size, start, end, what=None, regular=False, market=MARKET) -> Bars:
    what = what or ("MIDPOINT" if listing.sec_type == "CASH" else "TRADES")
    bars = market.bars(listing, BAR_SIZES[size], start, end, what=what, regular=regular)
    assert bars is not None
    return bars


def join_by_hand(fine: Bars, labels):
    """The bars that fine bars with these labels make, by the definition of open, high, low, close and volume."""
    rows = {}
    for i, label in enumerate(labels):
        row = rows.setdefault(int(label), [fine.open[i], fine.high[i], fine.low[i], fine.close[i], 0])
        row[1], row[2], row[3] = max(row[1], fine.high[i]), min(row[2], fine.low[i]), fine.close[i]
        row[4] += int(fine.volume[i])
    return {label: tuple(float(x) for x in row) for label, row in rows.items()}


def as_dict(bars: Bars):
    columns = (bars.open, bars.high, bars.low, bars.close, bars.volume.astype(float))
    return {int(s): tuple(float(c[i]) for c in columns) for i, s in enumerate(bars.stamp)}


def label_local(stamps, seconds):
    """The bar each UTC stamp of a stock falls into, by New York's winter clock, not before 09:30."""
    local = stamps - 5 * 3600
    open_ = local // 86400 * 86400 + 9 * 3600 + 1800
    return np.maximum(local // seconds * seconds, open_) + 5 * 3600


@pytest.mark.parametrize("size", [name for name in CLOCK_SIZES if BAR_SIZES[name].seconds > 60])
def test_every_size_is_the_join_of_its_minutes(size):
    """A stock's bars of each size equal what its one-minute bars make, for three winter days."""
    window = (at(2024, 1, 30), at(2024, 2, 2))
    minutes = get(AAPL, "1 min", *window, regular=True)
    made = join_by_hand(minutes, label_local(minutes.stamp, BAR_SIZES[size].seconds))
    assert as_dict(get(AAPL, size, *window, regular=True)) == made


@pytest.mark.parametrize("size", ["5 secs", "10 secs", "15 secs", "30 secs", "1 min"])
def test_small_sizes_are_the_join_of_their_seconds(size):
    """Seconds add up to five seconds, half minutes and minutes exactly."""
    window = (at(2024, 2, 1, 14, 30), at(2024, 2, 1, 15, 0))
    seconds = get(AAPL, "1 secs", *window)
    step = BAR_SIZES[size].seconds
    assert len(seconds) == 1800
    assert as_dict(get(AAPL, size, *window)) == join_by_hand(seconds, seconds.stamp // step * step)


@pytest.mark.parametrize("regular", [True, False])
def test_daily_bars_are_the_join_of_a_sessions_minutes(regular):
    """Regular days contain regular hours, others all hours."""
    window = (at(2024, 1, 29), at(2024, 2, 3, 3))
    minutes = get(AAPL, "1 min", *window, regular=regular)
    days = (minutes.stamp - 5 * 3600) // 86400 * 86400
    assert as_dict(get(AAPL, "1 day", *window, regular=regular)) == join_by_hand(minutes, days)


def test_weeks_and_months_are_the_join_of_days_and_carry_their_last():
    """A week is stamped with its last session, a month likewise."""
    days = get(AAPL, "1 day", at(2023, 12, 30), at(2024, 2, 3), regular=True)
    dates = [date.fromordinal(int(s) // 86400 + 719163) for s in days.stamp]
    fridays = [max(d for d in dates if d.isocalendar()[:2] == x.isocalendar()[:2]) for x in dates]
    ends = [max(d for d in dates if d.month == x.month) for x in dates]
    window = (at(2023, 12, 30), at(2024, 2, 3))
    for size, lasts in (("1W", fridays), ("1M", ends)):
        made = join_by_hand(days, [(last.toordinal() - 719163) * 86400 for last in lasts])
        assert as_dict(get(AAPL, size, *window, regular=True)) == made


@pytest.mark.parametrize("what", ["MIDPOINT", "BID", "ASK", "BID_ASK"])
@pytest.mark.parametrize("listing", [AAPL, EURUSD, USDJPY, ES], ids=lambda x: x.local_symbol)
def test_every_price_kind_joins_like_the_path(listing, what):
    """Hours of each kind are made of minutes of that kind; only trades have a volume."""
    window = (at(2024, 2, 1, 15), at(2024, 2, 1, 21))
    minutes, hours = get(listing, "1 min", *window, what), get(listing, "1 hour", *window, what)
    made = join_by_hand(minutes, minutes.stamp // 3600 * 3600)
    assert {k: v[:4] for k, v in as_dict(hours).items()} == {k: v[:4] for k, v in made.items()}
    assert set(hours.volume.tolist()) == {-1}
    assert set(hours.count.tolist()) == {-1}


@pytest.mark.parametrize("listing", [AAPL, EURUSD, ES], ids=lambda x: x.local_symbol)
def test_bid_is_below_the_midpoint_and_ask_above(listing):
    """The kinds of prices differ at every minute and lie in order."""
    window = (at(2024, 2, 1, 15), at(2024, 2, 1, 21))
    bid, mid, ask = (get(listing, "1 min", *window, what).close for what in ("BID", "MIDPOINT", "ASK"))
    assert (bid < mid).all()
    assert (mid < ask).all()


@pytest.mark.parametrize("listing", [AAPL, THIN, EURUSD, USDJPY, ES], ids=lambda x: x.local_symbol)
@pytest.mark.parametrize("size", ["30 secs", "1 min", "1 hour", "1 day"])
def test_bars_are_clean(listing, size):
    """Stamps rise, high and low bound the bar, prices are positive and on the tick, the average lies within."""
    bars = get(listing, size, at(2024, 3, 7), at(2024, 3, 13))
    assert (np.diff(bars.stamp) > 0).all()
    assert (bars.low > 0).all()
    assert (bars.high >= np.maximum(bars.open, bars.close)).all()
    assert (bars.low <= np.minimum(bars.open, bars.close)).all()
    ticks = bars.close / (10.0**-listing.decimals if listing.sec_type != "FUT" else 0.25)
    assert np.allclose(ticks, np.rint(ticks), atol=1e-6)
    if listing.sec_type != "CASH":
        assert ((bars.average >= bars.low) & (bars.average <= bars.high)).all()


def test_stamps_of_a_stocks_day_are_ibs():
    """Regular hours give 09:30 and then the full hours, seven bars; extended hours sixteen from 04:00 to 19:00."""
    day = (at(2024, 2, 1, 5), at(2024, 2, 2, 5))
    regular = [s - day[0] for s in get(AAPL, "1 hour", *day, regular=True).stamp.tolist()]
    assert [f"{s // 3600:02d}:{s % 3600 // 60:02d}" for s in regular] == [
        "09:30", "10:00", "11:00", "12:00", "13:00", "14:00", "15:00",
    ]  # fmt: skip
    extended = [(s - day[0]) // 3600 for s in get(AAPL, "1 hour", *day).stamp.tolist()]
    assert extended == list(range(4, 20))


def test_stamps_of_a_pairs_day_are_ibs():
    """A forex day begins with a bar at 17:15 New York; the break before it has none."""
    bars = get(EURUSD, "1 hour", at(2024, 2, 1, 20), at(2024, 2, 2, 1))
    assert [datetime.fromtimestamp(s, UTC).strftime("%H:%M") for s in bars.stamp.tolist()] == [
        "20:00", "21:00", "22:15", "23:00", "00:00",
    ]  # fmt: skip
    minutes = get(EURUSD, "1 min", at(2024, 2, 1, 21, 50), at(2024, 2, 1, 22, 30))
    assert len(minutes) == 10 + 15


def test_window_is_half_open():
    """A bar that opens at the start is in, one that opens at the end is not."""
    bars = get(AAPL, "1 hour", at(2024, 2, 1, 15), at(2024, 2, 1, 17), regular=True)
    assert bars.stamp.tolist() == [at(2024, 2, 1, 15), at(2024, 2, 1, 16)]


@pytest.mark.parametrize("size", ["1 min", "5 mins", "1 hour", "8 hours", "1 day", "1W", "1M"])
def test_last_bar_holds_only_what_happened_by_the_end(size):
    """A window that ends inside a bar ends with a bar of the seconds until then, and contains nothing later."""
    end = at(2024, 2, 1, 16, 7, 30)
    start = at(2024, 1, 2)
    bars = get(AAPL, size, start if BAR_SIZES[size].seconds > 60 else end - 3600, end, regular=True)
    seconds = get(AAPL, "1 secs", end - 90, end, regular=True)
    assert bars.close[-1] == seconds.close[-1]
    whole = get(AAPL, size, start if BAR_SIZES[size].seconds > 60 else end - 3600, end + 40 * 86400, regular=True)
    last = as_dict(whole)[int(bars.stamp[-1])] if BAR_SIZES[size].unit not in ("week", "month") else None
    if last is not None:
        assert bars.volume[-1] < last[4]
    assert as_dict(bars) != {}
    assert list(as_dict(bars).items())[:-1] == list(as_dict(whole).items())[: len(bars) - 1]


def test_same_seed_same_bars_in_another_process_order():
    """Bars depend on instrument, time and seed alone, not on what was asked before."""
    window = (at(2024, 2, 1, 14), at(2024, 2, 1, 18))
    fresh = SyntheticMarket()
    get(fresh.listings[3], "1 day", at(2010, 1, 1), at(2011, 1, 1), market=fresh)
    assert as_dict(get(AAPL, "1 min", *window, market=fresh)) == as_dict(get(AAPL, "1 min", *window))
    other = SyntheticMarket(seed=1)
    assert as_dict(get(AAPL, "1 min", *window, market=other)) != as_dict(get(AAPL, "1 min", *window))


def test_prices_are_the_same_on_every_machine():
    """A few bars are pinned, so that a change of the path, or of numpy, is noticed."""
    bars = get(AAPL, "1 min", at(2024, 1, 2, 14, 30), at(2024, 1, 2, 14, 32))
    assert as_dict(bars) == {
        at(2024, 1, 2, 14, 30): (183.41, 183.62, 183.34, 183.49, 4956.0),
        at(2024, 1, 2, 14, 31): (183.49, 183.74, 183.4, 183.54, 7840.0),
    }


def test_nothing_before_listing_and_after_delisting():
    """History begins with the first session of an instrument and ends with its last."""
    assert get(RBLX, "1 day", at(2020, 1, 1), at(2021, 4, 1)).stamp[0] == at(2021, 3, 10)
    assert MARKET.head(RBLX, "TRADES", regular=True) == at(2021, 3, 10, 14, 30)
    assert len(get(RBLX, "1 hour", at(2019, 1, 1), at(2019, 2, 1))) == 0
    assert get(GONE, "1 day", at(2019, 6, 1), at(2024, 1, 1)).stamp[-1] == at(2019, 6, 28)


def test_thinly_traded_stock_has_absent_bars_but_all_quotes():
    """Minutes without a trade have no TRADES bar; their midpoint exists."""
    window = (at(2024, 2, 1, 14, 30), at(2024, 2, 1, 21))
    trades, quotes = get(THIN, "1 min", *window, regular=True), get(THIN, "1 min", *window, "MIDPOINT", regular=True)
    assert len(quotes) == 390
    assert 50 < len(trades) < 200
    hours = get(THIN, "1 hour", *window, regular=True)
    assert as_dict(hours) == join_by_hand(trades, label_local(trades.stamp, 3600))


def test_adjusted_last_differs_from_trades_in_the_past_only():
    """Dividends lower old prices; of the present quarter they are the trades."""
    past, now = (at(2020, 2, 3), at(2020, 2, 8)), (at(2026, 2, 3), at(2026, 2, 8))
    assert (get(AAPL, "1 day", *past, "ADJUSTED_LAST").close < get(AAPL, "1 day", *past).close).all()
    assert (get(AAPL, "1 day", *now, "ADJUSTED_LAST").close == get(AAPL, "1 day", *now).close).all()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1 min", "5 mins", "1 hour", "4 hours", "1 day"]),
    st.sampled_from([AAPL, THIN, EURUSD, ES]),
    st.lists(st.integers(at(2023, 6, 1), at(2024, 2, 1)), min_size=3, max_size=3),
    st.booleans(),
)
def test_adjacent_windows_contain_the_bars_of_the_whole(size, listing, edges, regular):
    """Cutting a window at the stamp of a bar loses none, doubles none and changes none."""
    first, middle, last = sorted(edges)
    first = max(first, last - 20 * 86400)
    middle = max(first, middle)
    whole = get(listing, size, first, last, regular=regular)
    later = get(listing, size, middle, last, regular=regular)
    assert as_dict(later).items() <= as_dict(whole).items()
    if len(later) and not BAR_SIZES[size].is_dated:
        cut = int(later.stamp[0])
        earlier = get(listing, size, first, cut, regular=regular)
        assert {**as_dict(earlier), **as_dict(later)}.keys() == as_dict(whole).keys()


def test_contracts_are_found_by_what_a_client_gives():
    """conId, symbol, currency, primary exchange, local symbol and expiry narrow the search; nothing given finds nothing."""
    now = at(2024, 3, 1)

    def ids(**query):
        return [x.con_id for x in find_listings(MARKET, ContractQuery(**query), now)]

    assert ids(con_id=AAPL.con_id) == [AAPL.con_id]
    assert ids(con_id=AAPL.con_id, exchange="IDEALPRO") == []
    assert ids(symbol="AAPL", sec_type="STK", exchange="SMART") == [AAPL.con_id, 900003]
    assert ids(symbol="AMBG", currency="USD") == [900001, 900002]
    assert ids(symbol="AMBG", primary_exchange="ARCA") == [900002]
    assert ids(local_symbol="EUR.USD", sec_type="CASH") == [EURUSD.con_id]
    assert ids(symbol="ES", sec_type="FUT", exchange="CME", expiry="202406") == [ES.con_id]
    assert ids(symbol="ES", sec_type="FUT", expiry="20240621") == [ES.con_id]
    assert ids(symbol="aapl") == ids(sec_type="STK") == ids() == []


def test_expired_futures_are_found_only_when_included():
    """A future past its last day needs includeExpired."""
    query = {"symbol": "ES", "sec_type": "FUT", "expiry": "202403"}
    later = at(2024, 6, 1)
    assert find_listings(MARKET, ContractQuery(**query), later) == []
    assert len(find_listings(MARKET, ContractQuery(**query, include_expired=True), later)) == 1


def test_symbols_are_matched_by_beginning_or_name():
    """Exact symbols first; names match too; an empty pattern matches nothing."""
    assert [x.symbol for x in match_symbols(MARKET, "goog")] == ["GOOG", "GOOGL"]
    assert "MSFT" in [x.symbol for x in match_symbols(MARKET, "microsoft")]
    assert match_symbols(MARKET, "  ") == []
