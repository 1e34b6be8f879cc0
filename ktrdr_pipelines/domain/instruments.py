"""Instruments and series: symbol, kind, contract fields, and the names of files and assets. Pure values.

The expected bars of a series are in `calendars/expected.py`; IB's contract objects in `ib/contracts.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import StrEnum

from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError


class Hours(StrEnum):
    """The trading hours of a series. IB's ``useRTH`` is 1 for regular, else 0. Only stocks have a choice."""

    REGULAR = "regular"
    EXTENDED = "extended"


SECURITY_TYPES = ("STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO", "CFD")

DEFAULT_WHAT_TO_SHOW = {"CASH": "MIDPOINT", "CFD": "MIDPOINT", "CRYPTO": "AGGTRADES"}
"""The default what to show of a kind; TRADES for all other kinds."""

DEFAULT_EXCHANGES = {"STK": "SMART", "CASH": "IDEALPRO", "CRYPTO": "PAXOS", "CFD": "SMART"}
"""The default exchange of a kind; futures and indices have none."""

_FUTURE_CODE = re.compile(r"([A-Z0-9]{1,5}?)([FGHJKMNQUVXZ])([0-9]{1,2})")


def is_future_code(symbol: str) -> bool:
    """True for the code of one future: product, month letter and year, ``ESZ4`` or ``CLF25``."""
    return _FUTURE_CODE.fullmatch(symbol) is not None


def future_product(symbol: str) -> str:
    """``ES`` of ``ESZ4``. Raises InputError when ``symbol`` is no such code."""
    found = _FUTURE_CODE.fullmatch(symbol)
    if found is None:
        raise InputError(f"{symbol!r} is not the code of a future", advice="Write it like ESZ4.")
    return found.group(1)


_SYMBOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .&/+'-]{0,31}")
_PLAIN = re.compile(r"[A-Za-z0-9]")
_ESCAPED = re.compile(r"_([0-9A-F]{2})_|_")


ASSET_ROOT = "ohlcv"
"""The first part of every series' asset key."""


def file_symbol(symbol: str) -> str:
    """``symbol`` in file names and asset keys: letters and digits unchanged, a space as ``_``, any other
    character as its two-digit hexadecimal code between underscores. ``BRK B`` -> ``BRK_B``, ``EUR.USD`` -> ``EUR_2E_USD``.

    `symbol_from_file` reverses it.

    Raises:
        InputError: not a symbol, or its file name would be read back as another symbol.
    """
    if not _SYMBOL.fullmatch(symbol) or symbol != symbol.strip() or "  " in symbol:
        raise InputError(
            f"{symbol[:40]!r} is not a symbol",
            advice="Symbols are at most 32 letters, digits, inner spaces and . & / + ' - signs.",
        )
    name = "".join(c if _PLAIN.match(c) else "_" if c == " " else f"_{ord(c):02X}_" for c in symbol)
    if symbol_from_file(name) != symbol:
        raise InputError(
            f"{symbol!r} has no unambiguous file name", advice="Choose another alias in the universe file."
        )
    return name


def symbol_from_file(name: str) -> str:
    """The symbol of a ``name`` made by `file_symbol`."""
    return _ESCAPED.sub(lambda m: chr(int(m.group(1), 16)) if m.group(1) else " ", name)


@dataclass(frozen=True, slots=True)
class Instrument:
    """A contract, as requested from IB and as pinned in the sidecar.

    ``symbol`` is the project's name for it and the stem of its files (``AAPL``, ``EURUSD``, ``ESZ4``); ``ib_symbol`` and
    ``currency`` are IB's (``EUR`` and ``USD``). ``con_id`` is 0 until IB has reported it. ``what_to_show`` has IB's values.
    ``last_trade_date`` (``20241220``) is a future's, as IB reports it, empty until then. ``calendar`` names the exchange
    calendar where ``exchange`` does not determine it (see `calendars/exchanges.py`).
    """

    symbol: str
    sec_type: str
    exchange: str
    currency: str
    ib_symbol: str = ""
    primary_exchange: str = ""
    expiry: str = ""
    what_to_show: str = "TRADES"
    hours: Hours = Hours.REGULAR
    con_id: int = field(default=0, compare=False)
    time_zone: str = field(default="", compare=False)
    calendar: str = ""
    last_trade_date: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        file_symbol(self.symbol)
        if self.sec_type not in SECURITY_TYPES:
            raise InputError(
                f"{self.symbol}: unknown security type {self.sec_type!r}",
                advice=f"Use one of {', '.join(SECURITY_TYPES)}.",
            )
        if not self.ib_symbol:
            object.__setattr__(self, "ib_symbol", self.symbol)

    @property
    def use_rth(self) -> bool:
        """IB's ``useRTH``: regular trading hours only. Stocks have a choice; all other kinds have all hours."""
        return self.sec_type == "STK" and self.hours is Hours.REGULAR

    @property
    def ends_now(self) -> bool:
        """True where IB accepts no end date: it serves continuous futures and adjusted prices only up to now, in one request."""
        return self.sec_type == "CONTFUT" or self.refreshes_whole

    @property
    def trades_until(self) -> date | None:
        """The last date on which a future may still trade; None for other kinds, and where the expiry is not known.

        A date gets a week more, since closed exchanges move it. A contract month gets a quarter more: three-month rate futures
        trade so long after their month, no future longer.
        """
        if self.sec_type != "FUT" or not re.fullmatch(r"[0-9]{6}([0-9]{2})?", self.expiry):
            return None
        year, month, day = int(self.expiry[:4]), int(self.expiry[4:6]), int(self.expiry[6:] or 1)
        try:
            return date(year, month, day) + timedelta(days=7 if self.expiry[6:] else 31 + 100)
        except ValueError:
            return None

    @property
    def refreshes_whole(self) -> bool:
        """True where a dividend or split restates every bar, so that held and new bars may have different price scales."""
        return self.what_to_show == "ADJUSTED_LAST"

    @property
    def has_volume(self) -> bool:
        """False where IB sends -1 as volume (every what to show but trades)."""
        return self.what_to_show in ("TRADES", "ADJUSTED_LAST", "AGGTRADES") and self.sec_type not in (
            "IND",
            "CASH",
            "CFD",
        )


def stock(
    symbol: str,
    *,
    exchange: str = "SMART",
    currency: str = "USD",
    primary_exchange: str = "",
    hours: Hours = Hours.REGULAR,
) -> Instrument:
    """A stock or ETF with TRADES; regular hours by default."""
    return Instrument(symbol, "STK", exchange, currency, primary_exchange=primary_exchange, hours=hours)


def forex(pair: str) -> Instrument:
    """A currency pair written ``EURUSD`` or ``EUR.USD``; IDEALPRO, MIDPOINT, all hours.

    Raises:
        InputError: not two three-letter currencies.
    """
    match = re.fullmatch(r"([A-Z]{3})[./]?([A-Z]{3})", pair.upper())
    if not match:
        raise InputError(f"{pair!r} is not a currency pair", advice="Write it like EURUSD.")
    base, quote = match.groups()
    return Instrument(
        base + quote, "CASH", "IDEALPRO", quote, ib_symbol=base, what_to_show="MIDPOINT", hours=Hours.EXTENDED
    )


@dataclass(frozen=True, slots=True)
class Series:
    """One instrument at one timeframe: one CSV, one asset."""

    instrument: Instrument
    timeframe: Timeframe

    @property
    def name(self) -> str:
        """The stem of its file names: ``AAPL_1h``."""
        return f"{file_symbol(self.instrument.symbol)}_{self.timeframe.name}"

    @property
    def asset_path(self) -> tuple[str, str]:
        """The asset key ``ohlcv/<name>``, such as ``ohlcv/AAPL_1h``. Dagster's graph shows the last part only."""
        return (ASSET_ROOT, self.name)

    def __str__(self) -> str:
        return f"{self.instrument.symbol} {self.timeframe.name}"
