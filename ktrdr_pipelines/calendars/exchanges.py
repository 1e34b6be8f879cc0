"""The trading calendar of an instrument: tables from IB's exchange codes to calendar names, and the lookup.

No session times here, see `sessions.py`. Names are those of pandas_market_calendars (a name like XPAR is the market's
ISO 10383 code), plus two of our own: `FOREX` and `24/7`. Exchange codes are IB's, as in its exchange listings.
"""

from __future__ import annotations

from functools import lru_cache

from ktrdr_pipelines.domain.instruments import Instrument
from ktrdr_pipelines.errors import InputError

FOREX = "FOREX"
"""IB's own forex week (docs/ib_facts.md, 3), not the calendar of that name in pandas_market_calendars."""

ROUND_THE_CLOCK = "24/7"
"""Every day, midnight to midnight UTC."""

# Of two calendars of one market in pandas_market_calendars the more complete one: XHKG (not HKEX) has half days, XTAE (not
# TASE) the move to Monday to Friday in 2026, ASX (not XASX) the closing auction.
BY_EXCHANGE: dict[str, str] = {
    # United States: one timetable, whatever the venue.
    **dict.fromkeys(
        ["NASDAQ", "ISLAND", "NYSE", "ARCA", "AMEX", "BATS", "BYX", "BEX", "IEX", "EDGEA", "DRCTEDGE", "CHX", "PSX", "MEMX",
         "PEARL", "LTSE", "NYSENAT", "PINK", "CBOE"],
        "NYSE",
    ),
    # Canada, Mexico, Brazil
    "TSE": "TSX", "AEQLIT": "TSX", "VENTURE": "TSXV", "MEXI": "XMEX", "B3": "BVMF",
    # Europe
    "LSE": "LSE", "LSEETF": "LSE", "LSEIOB1": "LSE",
    "IBIS": "XETR", "IBIS2": "XETR", "XETRA": "XETR", "FWB": "XFRA", "FWB2": "XFRA", "SWB": "XSTU", "SWB2": "XSTU",
    "SBF": "XPAR", "AEB": "XAMS", "ENEXT.BE": "XBRU", "BVL": "XLIS", "BVME": "XMIL", "BVME.ETF": "XMIL", "BM": "XMAD",
    "EBS": "XSWX", "VIRTX": "XSWX", "VSE": "XWBO", "SFB": "XSTO", "CPH": "XCSE", "HEX": "XHEL", "OSE": "XOSL",
    "OMXNO": "XOSL", "WSE": "XWAR", "BUX": "XBUD", "PRA": "XPRA", "ISED": "XDUB",
    # Asia, Pacific, Africa, Middle East
    "TSEJ": "JPX", "CHIXJ": "JPX", "SEHK": "XHKG", "SEHKNTL": "SSE", "SEHKSZSE": "SSE", "ASX": "ASX", "SGX": "XSES",
    "KSE": "XKRX", "KOSDAQ": "XKRX", "NSE": "NSE", "BSE": "XBOM", "TWSE": "XTAI", "BURSAMY": "XKLS", "IDX": "XIDX",
    "JSE": "XJSE", "TASE": "XTAE",
    # Crypto
    "PAXOS": ROUND_THE_CLOCK, "ZEROHASH": ROUND_THE_CLOCK,
    # Forex
    "IDEALPRO": FOREX, "IDEAL": FOREX,
}  # fmt: skip
"""Calendar of stocks, ETFs, indices and pairs by exchange code. SMART and unknown codes go by currency."""

BY_CURRENCY: dict[str, str] = {
    "USD": "NYSE", "CAD": "TSX", "GBP": "LSE", "CHF": "XSWX", "SEK": "XSTO", "DKK": "XCSE", "NOK": "XOSL", "PLN": "XWAR",
    "HUF": "XBUD", "CZK": "XPRA", "JPY": "JPX", "HKD": "XHKG", "CNH": "SSE", "AUD": "ASX", "SGD": "XSES", "KRW": "XKRX",
    "INR": "NSE", "TWD": "XTAI", "MXN": "XMEX", "ZAR": "XJSE", "ILS": "XTAE",
}  # fmt: skip
"""Calendar of a stock routed by SMART whose primary exchange is not known. EUR is missing on purpose: its exchanges have
different holidays, and the wrong ones would lose bars."""

FUTURES_BY_EXCHANGE: dict[str, str] = {
    "CME": "CME Globex Equity", "GLOBEX": "CME Globex Equity", "CBOT": "CME Globex Equity", "ECBOT": "CME Globex Equity",
    "NYMEX": "CMEGlobex_EnergyAndMetals", "COMEX": "CMEGlobex_EnergyAndMetals", "CFE": "CME Globex Equity",
    "EUREX": "EUREX", "DTB": "EUREX", "ICEUS": "ICEUS", "NYBOT": "ICEUS",
}  # fmt: skip
"""Calendar of a future by exchange, for products that `FUTURES_BY_PRODUCT` does not name. The calendar CFE has only
the day hours; VIX futures trade the hours of CME's index futures, except on a few holidays."""

FUTURES_BY_PRODUCT: dict[str, str] = {
    **dict.fromkeys(["EUR", "GBP", "JPY", "AUD", "CAD", "CHF", "NZD", "MXP", "M6E", "M6B", "M6A", "MJY", "MCD", "E7"],
                    "CMEGlobex_FX"),
    **dict.fromkeys(["ZN", "ZB", "ZF", "ZT", "UB", "TN", "Z3N", "TWE", "GE", "SR3", "SR1", "ZQ"],
                    "CME Globex Interest Rate Products"),
    **dict.fromkeys(["ZC", "ZS", "ZW", "ZL", "ZM", "ZO", "KE", "ZR", "YC", "YK", "YW", "XC", "XK", "XW"],
                    "CMEGlobex_Grains"),
    **dict.fromkeys(["LE", "HE", "GF"], "CMEGlobex_Livestock"),
    **dict.fromkeys(["BRR", "MBT", "ETHUSDRR", "MET", "BTC", "ETH"], "CME Globex Crypto"),
}  # fmt: skip
"""Calendar by IB's product symbol, for the exchanges of the CME group."""

_CME_GROUP = frozenset({"CME", "GLOBEX", "CBOT", "ECBOT", "NYMEX", "COMEX"})
_CURRENCIES = frozenset({*BY_CURRENCY, "EUR", "NZD", "TRY", "RUB", "CNY"})


@lru_cache(maxsize=1)
def list_calendars() -> frozenset[str]:
    """Every valid name for `calendar:` in the universe file."""
    # Imported here: it takes 0.4 s, and most commands need one known calendar or none.
    import pandas_market_calendars

    return frozenset({*pandas_market_calendars.get_calendar_names(), FOREX, ROUND_THE_CLOCK})


@lru_cache(maxsize=4096)
def calendar_of(instrument: Instrument) -> str:
    """The name of the calendar that ``instrument`` follows.

    ``instrument.calendar`` comes first. Then forex pairs and crypto by their kind, futures by product and exchange, everything
    else by primary exchange, exchange, and for SMART by currency.

    Raises:
        InputError: the tables have no calendar for it, or ``instrument.calendar`` is not a calendar. There is no guess: a wrong
            calendar would lose the bars of its holidays.
    """
    if instrument.calendar:
        if instrument.calendar not in list_calendars():
            raise InputError(
                f"{instrument.symbol}: unknown calendar {instrument.calendar!r}",
                advice="Write `calendar:` in the universe file with FOREX, 24/7 or a name of pandas_market_calendars, "
                "such as NYSE, LSE, XETR, JPX, XHKG.",
            )
        return instrument.calendar
    name = _FINDERS.get(instrument.sec_type, _find_by_exchange)(instrument)
    if name is None:
        where = instrument.primary_exchange or instrument.exchange
        raise InputError(
            f"{instrument.symbol}: no trading calendar for {instrument.sec_type} on {where} in {instrument.currency}",
            advice="Name its primary exchange, or write `calendar:` in the universe file, for instance NYSE, LSE, XETR, "
            "XPAR, 24/7.",
        )
    return name


def _find_by_exchange(instrument: Instrument) -> str | None:
    for code in (instrument.primary_exchange, instrument.exchange):
        # IB appends the venue's segment to some codes: NASDAQ.NMS, ARCA.A.
        found = BY_EXCHANGE.get(code) or BY_EXCHANGE.get(code.partition(".")[0])
        if found:
            return found
    return None if instrument.primary_exchange else BY_CURRENCY.get(instrument.currency)


def _find_future(instrument: Instrument) -> str | None:
    if instrument.exchange in _CME_GROUP and instrument.ib_symbol in FUTURES_BY_PRODUCT:
        return FUTURES_BY_PRODUCT[instrument.ib_symbol]
    return FUTURES_BY_EXCHANGE.get(instrument.exchange)


def _find_cfd(instrument: Instrument) -> str | None:
    return FOREX if instrument.ib_symbol in _CURRENCIES else _find_by_exchange(instrument)


_FINDERS = {
    "CASH": lambda _: FOREX,
    "CRYPTO": lambda _: ROUND_THE_CLOCK,
    "FUT": _find_future,
    "CONTFUT": _find_future,
    "CFD": _find_cfd,
}
