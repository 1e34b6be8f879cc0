"""The instruments of the synthetic market: a table. Prices are in `path.py`, hours in `trading_hours.py`.

Names and exchanges are those of real contracts; conIds, dates and prices are invented. Some are difficult on purpose: ``AMBG``
is two companies, ``AAPL`` also trades in pesos, ``THIN`` has few trades, ``GONE`` is delisted.
"""

from __future__ import annotations

from datetime import date

from ktrdr_pipelines.simulator.market import Listing
from ktrdr_pipelines.simulator.trading_hours import BERLIN, CHICAGO, NEW_YORK

_EPOCH = date(1970, 1, 1).toordinal()


def _day(text: str) -> int:
    return date.fromisoformat(text).toordinal() - _EPOCH


_US_VENUES = ("SMART", "NYSE", "NASDAQ", "ARCA", "AMEX", "BATS", "IEX", "ISLAND", "EDGEA", "CHX", "BYX", "PSX", "MEMX")

_STOCKS: list[tuple[str, str, str, str, float, str]] = [
    # symbol, name, primary exchange, first day, typical price, stock type
    ("AAPL", "APPLE INC", "NASDAQ", "1999-01-04", 180.0, "COMMON"),
    ("MSFT", "MICROSOFT CORP", "NASDAQ", "1999-01-04", 330.0, "COMMON"),
    ("SPY", "SS SPDR S&P 500 ETF TRUST-US", "ARCA", "1999-01-04", 450.0, "ETF"),
    ("QQQ", "INVESCO QQQ TRUST SERIES 1", "NASDAQ", "1999-03-10", 380.0, "ETF"),
    ("GOOG", "ALPHABET INC-CL C", "NASDAQ", "2004-08-19", 140.0, "COMMON"),
    ("GOOGL", "ALPHABET INC-CL A", "NASDAQ", "2004-08-19", 139.0, "COMMON"),
    ("AMZN", "AMAZON.COM INC", "NASDAQ", "1999-01-04", 150.0, "COMMON"),
    ("NVDA", "NVIDIA CORP", "NASDAQ", "1999-01-22", 120.0, "COMMON"),
    ("TSLA", "TESLA INC", "NASDAQ", "2010-06-29", 240.0, "COMMON"),
    ("META", "META PLATFORMS INC-CLASS A", "NASDAQ", "2012-05-18", 320.0, "COMMON"),
    ("NFLX", "NETFLIX INC", "NASDAQ", "2002-05-23", 420.0, "COMMON"),
    ("AMD", "ADVANCED MICRO DEVICES", "NASDAQ", "1999-01-04", 110.0, "COMMON"),
    ("INTC", "INTEL CORP", "NASDAQ", "1999-01-04", 40.0, "COMMON"),
    ("IBM", "INTL BUSINESS MACHINES CORP", "NYSE", "1999-01-04", 150.0, "COMMON"),
    ("JPM", "JPMORGAN CHASE & CO", "NYSE", "1999-01-04", 140.0, "COMMON"),
    ("KO", "COCA-COLA CO/THE", "NYSE", "1999-01-04", 60.0, "COMMON"),
    ("XOM", "EXXON MOBIL CORP", "NYSE", "1999-12-01", 105.0, "COMMON"),
    ("BRK B", "BERKSHIRE HATHAWAY INC-CL B", "NYSE", "1999-01-04", 350.0, "COMMON"),
    ("RBLX", "ROBLOX CORP -CLASS A", "NYSE", "2021-03-10", 45.0, "COMMON"),
    ("DIA", "SPDR DJIA TRUST", "ARCA", "1999-01-04", 340.0, "ETF"),
    ("IWM", "ISHARES RUSSELL 2000 ETF", "ARCA", "2000-05-26", 190.0, "ETF"),
]

_PAIRS: list[tuple[str, str, float]] = [
    ("EUR", "USD", 1.1),
    ("GBP", "USD", 1.27),
    ("AUD", "USD", 0.67),
    ("NZD", "USD", 0.61),
    ("USD", "JPY", 140.0),
    ("USD", "CHF", 0.9),
    ("USD", "CAD", 1.35),
    ("EUR", "GBP", 0.86),
    ("EUR", "JPY", 155.0),
    ("EUR", "CHF", 0.97),
]

_EXPIRIES = [(year, month) for year in (2024, 2025, 2026, 2027) for month in (3, 6, 9, 12)]
_MONTH_CODES = {3: "H", 6: "M", 9: "U", 12: "Z"}


def make_stock(
    con_id: int,
    symbol: str,
    name: str,
    primary: str,
    first_day: int,
    *,
    price: float = 100.0,
    currency: str = "USD",
    stock_type: str = "COMMON",
    last_day: int = 10**6,
    activity: float = 1.0,
    exchanges: tuple[str, ...] = _US_VENUES,
    zone: str = NEW_YORK,
) -> Listing:
    """A stock or ETF, in New York hours unless ``zone`` is Frankfurt's."""
    return Listing(
        con_id=con_id,
        symbol=symbol,
        sec_type="STK",
        currency=currency,
        primary_exchange=primary,
        long_name=name,
        exchanges=tuple(dict.fromkeys([*exchanges, primary])),
        zone=zone,
        first_day=first_day,
        last_day=last_day,
        local_symbol=symbol,
        trading_class="NMS" if primary == "NASDAQ" else symbol,
        derivatives=("CFD", "OPT", "IOPT", "WAR", "BAG"),
        industry="Simulated",
        stock_type=stock_type,
        base_price=price,
        activity=activity,
    )


def make_pair(con_id: int, base: str, quote: str, first_day: int, price: float = 1.0) -> Listing:
    """A currency pair on IDEALPRO: half-pip ticks, five decimals, three where the quote is yen."""
    decimals = 3 if quote == "JPY" else 5
    return Listing(
        con_id=con_id,
        symbol=base,
        sec_type="CASH",
        currency=quote,
        primary_exchange="IDEALPRO",
        long_name=f"{base}.{quote} simulated pair",
        exchanges=("IDEALPRO",),
        zone=NEW_YORK,
        first_day=first_day,
        local_symbol=f"{base}.{quote}",
        trading_class=f"{base}.{quote}",
        min_tick=5 * 10.0**-decimals,
        decimals=decimals,
        base_price=price,
    )


def _make_futures() -> list[Listing]:
    futures = []
    for number, (year, month) in enumerate(_EXPIRIES):
        # Third Friday of the month: the last day of trading.
        first = date(year, month, 1)
        friday = first.replace(day=15 + (4 - first.weekday()) % 7)
        last_day = friday.toordinal() - _EPOCH
        futures.append(
            Listing(
                con_id=495500000 + number,
                symbol="ES",
                sec_type="FUT",
                currency="USD",
                primary_exchange="CME",
                long_name="E-mini S&P 500",
                exchanges=("CME",),
                zone=CHICAGO,
                first_day=last_day - 550,
                last_day=last_day,
                local_symbol=f"ES{_MONTH_CODES[month]}{year % 10}",
                trading_class="ES",
                expiry=friday.strftime("%Y%m%d"),
                multiplier="50",
                min_tick=0.25,
                base_price=4500.0,
            )
        )
    return futures


def _make_others() -> list[Listing]:
    """Kinds with one or two examples each: a continuous future, indices, crypto."""
    continuous = Listing(
        con_id=495512551,
        symbol="ES",
        sec_type="CONTFUT",
        currency="USD",
        primary_exchange="CME",
        long_name="E-mini S&P 500",
        exchanges=("CME",),
        zone=CHICAGO,
        first_day=_day("2010-01-04"),
        local_symbol="ES",
        trading_class="ES",
        multiplier="50",
        min_tick=0.25,
        base_price=4500.0,
    )
    index = Listing(
        con_id=416904,
        symbol="SPX",
        sec_type="IND",
        currency="USD",
        primary_exchange="CBOE",
        long_name="S&P 500 Stock Index",
        exchanges=("CBOE",),
        zone=NEW_YORK,
        first_day=_day("1999-01-04"),
        local_symbol="SPX",
        base_price=4500.0,
    )
    coins = [
        Listing(
            con_id=con_id,
            symbol=symbol,
            sec_type="CRYPTO",
            currency="USD",
            primary_exchange="PAXOS",
            long_name=name,
            exchanges=("PAXOS",),
            zone="UTC",
            first_day=_day("2021-09-01"),
            local_symbol=f"{symbol}.USD",
            trading_class=symbol,
            base_price=price,
        )
        for con_id, symbol, name, price in (
            (479624278, "BTC", "Bitcoin cryptocurrency", 60000.0),
            (495759171, "ETH", "Ethereum cryptocurrency", 3000.0),
        )
    ]
    return [continuous, index, *coins]


def list_instruments() -> tuple[Listing, ...]:
    """The whole synthetic universe."""
    stocks = [
        make_stock(265000 + 100 * i, symbol, name, primary, _day(first), price=price, stock_type=kind)
        for i, (symbol, name, primary, first, price, kind) in enumerate(_STOCKS)
    ]
    odd = [
        make_stock(900001, "AMBG", "AMBIGUOUS HOLDINGS INC", "NYSE", _day("2005-03-01"), price=20.0),
        make_stock(900002, "AMBG", "AMBIGUOUS GROWTH FUND", "ARCA", _day("2012-06-01"), price=35.0, stock_type="ETF"),
        make_stock(
            900003,
            "AAPL",
            "APPLE INC",
            "MEXI",
            _day("2008-01-02"),
            price=3200.0,
            currency="MXN",
            exchanges=("SMART", "MEXI"),
        ),
        make_stock(900004, "THIN", "THINLY TRADED CORP", "AMEX", _day("2015-01-02"), price=7.0, activity=0.3),
        make_stock(
            900005, "GONE", "DELISTED CORP", "NYSE", _day("2001-01-02"), price=12.0, last_day=_day("2019-06-28")
        ),
        make_stock(900006, "NEWC", "NEWCOMER INC", "NASDAQ", _day("2025-09-08"), price=30.0),
    ]
    abroad = [
        make_stock(
            14204, "SAP", "SAP SE", "IBIS", _day("1999-01-04"), price=130.0, currency="EUR", zone=BERLIN,
            exchanges=("SMART", "IBIS", "FWB"),
        ),
    ]  # fmt: skip
    pairs = [
        make_pair(12087792 + i, base, quote, _day("2005-03-09"), price) for i, (base, quote, price) in enumerate(_PAIRS)
    ]
    return (*stocks, *odd, *abroad, *pairs, *_make_futures(), *_make_others())
