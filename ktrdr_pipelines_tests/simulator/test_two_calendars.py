"""The loader's calendars and the simulator's sessions are independent implementations; these tests compare them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Hours, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.simulator.market import BAR_SIZES, ContractQuery, find_listings

from .talk import MARKET

SERIES = {
    "stock, regular hours": (stock("AAPL"), ContractQuery(symbol="AAPL", sec_type="STK", currency="USD")),
    "stock, extended hours": (
        stock("AAPL", hours=Hours.EXTENDED),
        ContractQuery(symbol="AAPL", sec_type="STK", currency="USD"),
    ),
    "pair": (forex("EURUSD"), ContractQuery(symbol="EUR", sec_type="CASH", currency="USD")),
}
WINDOWS = {
    "spring clock change": Window(datetime(2024, 3, 4, tzinfo=UTC), datetime(2024, 3, 18, tzinfo=UTC)),
    "half days": Window(datetime(2024, 6, 28, tzinfo=UTC), datetime(2024, 7, 8, tzinfo=UTC)),
    "autumn and holidays": Window(datetime(2023, 10, 27, tzinfo=UTC), datetime(2024, 1, 8, tzinfo=UTC)),
}
LONG = ("autumn and holidays", ("1m", "2m", "3m"))


@pytest.mark.parametrize("timeframe", [name for name, row in TIMEFRAMES.items() if row.seconds >= 60])
@pytest.mark.parametrize("window", list(WINDOWS))
@pytest.mark.parametrize("kind", list(SERIES))
def test_every_expected_bar_exists_and_no_other(kind, window, timeframe):
    """The bars that the loader expects in a window are the bars that the simulated market has."""
    if window == LONG[0] and timeframe in LONG[1]:
        window = "half days"  # the same rule, a tenth of the bars
    instrument, query = SERIES[kind]
    span, row = WINDOWS[window], TIMEFRAMES[timeframe]
    (listing,) = find_listings(MARKET, query, span.end_s)
    size = BAR_SIZES[row.ib_bar_size]
    expected = expected_bars(Series(instrument, row), span).opens.tolist()
    # With a month on either side, so that the edges of the window are not compared.
    around = (span.start_s - 40 * 86400, span.end_s + 40 * 86400) if size.is_dated else (span.start_s, span.end_s)
    what = "MIDPOINT" if listing.sec_type == "CASH" else "TRADES"
    bars = MARKET.bars(listing, size, *around, what=what, regular=instrument.use_rth)
    assert [stamp for stamp in bars.stamp.tolist() if span.start_s <= stamp < span.end_s] == expected
    assert len(expected) > 0 or timeframe == "1mo"  # one window has no end of a month
