"""What every simulated market is made of: listings, bar sizes, bars as arrays, and the cutting of bars into longer ones.

No prices are invented here (`synthetic.py`, `replay.py`) and nothing of the wire is known. Stamps follow `docs/ib_facts.md`,
section 3: a bar carries the time it opens; daily and longer bars a session date, weeks and months the date of their last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.simulator.trading_hours import Int, Sessions

Float = npt.NDArray[np.float64]

DAY_S = 86400


@dataclass(frozen=True)
class BarSize:
    """One of IB's bar sizes. ``seconds`` is nominal for a month. ``unit`` tells how bars are cut: by the clock, or by date."""

    name: str
    seconds: int
    unit: str = "clock"

    @property
    def is_dated(self) -> bool:
        """True for daily and longer bars, which carry a date instead of an instant."""
        return self.unit != "clock"


def _make_sizes() -> dict[str, BarSize]:
    clock = [
        *((f"{n} secs", n) for n in (1, 5, 10, 15, 30)),
        ("1 min", 60),
        *((f"{n} mins", n * 60) for n in (2, 3, 5, 10, 15, 20, 30)),
        ("1 hour", 3600),
        *((f"{n} hours", n * 3600) for n in (2, 3, 4, 8)),
    ]
    sizes = {name: BarSize(name, seconds) for name, seconds in clock}
    day, week, month = (
        BarSize("1 day", DAY_S, "day"),
        BarSize("1W", 7 * DAY_S, "week"),
        BarSize("1M", 31 * DAY_S, "month"),
    )
    return sizes | {"1 day": day, "1W": week, "1M": month, "1 week": week, "1 month": month}


BAR_SIZES = _make_sizes()
"""By every spelling the gateway takes. IB's own list ends in ``1W, 1M``; ``1 week`` and ``1 month`` work too (threads)."""


@dataclass(frozen=True)
class Listing:
    """One contract as the market lists it. ``first_day`` and ``last_day`` bound its history (days since 1970-01-01)."""

    con_id: int
    symbol: str
    sec_type: str
    currency: str
    primary_exchange: str
    long_name: str
    exchanges: tuple[str, ...]
    zone: str
    first_day: int
    last_day: int = 10**6
    local_symbol: str = ""
    trading_class: str = ""
    expiry: str = ""
    multiplier: str = ""
    min_tick: float = 0.01
    decimals: int = 2
    derivatives: tuple[str, ...] = ()
    industry: str = ""
    stock_type: str = ""
    base_price: float = 100.0
    activity: float = 1.0
    """Share of minutes in which something trades; the others have no TRADES bar at all."""
    split: int = 1
    """A split that has happened since: every price is divided by it and volumes are multiplied, as IB restates its history."""
    adjustment: float = 1.0
    """A further factor of ADJUSTED_LAST: a dividend that was paid since restates all of it."""

    @property
    def default_exchange(self) -> str:
        return "SMART" if "SMART" in self.exchanges else self.primary_exchange


@dataclass(frozen=True, eq=False)
class Bars:
    """Bars in order of time. ``stamp`` is the open in epoch seconds, for dated bars midnight UTC of the date.

    Prices are floats that print exactly with ``decimals`` places (None: shortest form). ``volume`` and ``count`` are -1 where
    IB has none. ``average`` is the volume-weighted price, -1 likewise.
    """

    stamp: Int
    open: Float
    high: Float
    low: Float
    close: Float
    volume: Int
    average: Float
    count: Int
    dated: bool = False
    decimals: int | None = 2

    def __len__(self) -> int:
        return len(self.stamp)

    def take(self, index: npt.NDArray[np.bool_] | Int | slice) -> Bars:
        """The bars selected by a mask, positions or a slice."""
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})


COLUMNS = ("stamp", "open", "high", "low", "close", "volume", "average", "count")

_NO_INT, _NO_FLOAT = np.empty(0, np.int64), np.empty(0, np.float64)
NO_BARS = Bars(_NO_INT, _NO_FLOAT, _NO_FLOAT, _NO_FLOAT, _NO_FLOAT, _NO_INT, _NO_FLOAT, _NO_INT)


@dataclass(frozen=True, eq=False)
class Atoms:
    """The finest bars of a request in whole points, before they are joined. ``stamp`` in epoch seconds, ``session`` the
    index into the listing's `Sessions`. ``turnover`` is the sum of price times volume."""

    stamp: Int
    session: Int
    open: Int
    high: Int
    low: Int
    close: Int
    volume: Int
    turnover: Int
    count: Int

    def __len__(self) -> int:
        return len(self.stamp)

    def take(self, index: npt.NDArray[np.bool_] | Int | slice) -> Atoms:
        return Atoms(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    @staticmethod
    def join(parts: list[Atoms]) -> Atoms:
        """The parts one after another."""
        names = Atoms.__dataclass_fields__
        return Atoms(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def merge_atoms(atoms: Atoms, key: Int) -> Atoms:
    """One atom for each run of equal ``key``, stamped like the first of the run."""
    if not len(atoms):
        return atoms
    first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    last = np.r_[first[1:], len(key)] - 1
    return Atoms(
        stamp=atoms.stamp[first],
        session=atoms.session[last],
        open=atoms.open[first],
        high=np.maximum.reduceat(atoms.high, first),
        low=np.minimum.reduceat(atoms.low, first),
        close=atoms.close[last],
        volume=np.add.reduceat(atoms.volume, first),
        turnover=np.add.reduceat(atoms.turnover, first),
        count=np.add.reduceat(atoms.count, first),
    )


def label_clock(stamps: Int, opens: Int, offsets: Int, seconds: int) -> Int:
    """The open of the bar that holds each stamp: the clock grid of the exchange's zone, counted from local midnight, but
    not before the session's open (a stock's first hourly bar is 09:30). ``opens`` and ``offsets`` belong to each stamp."""
    local = stamps + offsets
    labels: Int = np.maximum(local // seconds * seconds - offsets, opens)
    return labels


def label_dates(days: Int, unit: str) -> Int:
    """A key that is equal for days of one day, week (Monday to Sunday) or month. ``days`` counts from 1970-01-01."""
    if unit == "week":
        return (days + 3) // 7
    if unit == "month":
        return days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    return days


def find_period(sessions: Sessions, first: int, unit: str) -> int:
    """The index of the first session in the same week or month as session ``first``."""
    keys = label_dates(sessions.day[max(0, first - 40) : first + 1], unit)
    return first - int((keys == keys[-1]).sum()) + 1 if len(keys) else first


@dataclass(frozen=True)
class ContractQuery:
    """A contract as a client describes it; empty fields match anything."""

    con_id: int = 0
    symbol: str = ""
    sec_type: str = ""
    expiry: str = ""
    strike: str = ""
    right: str = ""
    multiplier: str = ""
    exchange: str = ""
    primary_exchange: str = ""
    currency: str = ""
    local_symbol: str = ""
    trading_class: str = ""
    include_expired: bool = False
    sec_id_type: str = field(default="", compare=False)
    sec_id: str = field(default="", compare=False)
    issuer_id: str = field(default="", compare=False)


class Market(Protocol):
    """What a gateway needs of a market."""

    listings: tuple[Listing, ...]

    def sessions(self, listing: Listing) -> Sessions:
        """When ``listing`` trades, including days before it was listed."""
        ...

    def bars(
        self, listing: Listing, size: BarSize, start_s: int, end_s: int, *, what: str, regular: bool
    ) -> Bars | None:
        """The bars that open in ``[start_s, end_s)``, the last cut off at ``end_s`` where it is not complete by then.

        Dated bars: those with a session that begins in the window; a first week or month is given whole. None: this market
        holds no bars of that size for it.
        """
        ...

    def head(self, listing: Listing, what: str, /, *, regular: bool) -> int | None:
        """Epoch seconds of the first bar there is, or None."""
        ...


_EXPIRY_FREE = ("STK", "CASH", "IND", "CRYPTO", "CONTFUT")
_EXPIRED_KEPT_DAYS = 731
"""Futures are known for two years after their expiry (`docs/ib_facts.md`, 5)."""


def find_listings(market: Market, query: ContractQuery, now_s: float) -> list[Listing]:
    """Every listing that fits ``query``. A known conId decides alone, apart from an exchange that does not list it.

    Futures that have expired by ``now_s`` (epoch seconds) only where the query includes expired ones, and for two years.
    """
    today = int(now_s // DAY_S)
    found = [listing for listing in market.listings if _fits(listing, query)]
    oldest = today - _EXPIRED_KEPT_DAYS if query.include_expired else today
    return [x for x in found if x.sec_type != "FUT" or x.last_day >= oldest]


def _fits(listing: Listing, query: ContractQuery) -> bool:
    if query.exchange and query.exchange not in listing.exchanges:
        return False
    if query.con_id:
        return listing.con_id == query.con_id
    primary = query.primary_exchange
    tests = (
        (query.symbol, query.symbol == listing.symbol),
        (query.sec_type, query.sec_type == listing.sec_type),
        (query.currency, query.currency == listing.currency),
        (query.local_symbol, query.local_symbol == listing.local_symbol),
        (query.trading_class, query.trading_class == listing.trading_class),
        (query.multiplier, query.multiplier == listing.multiplier),
        (primary, primary == listing.primary_exchange or listing.sec_type != "STK"),
        (query.expiry and listing.sec_type not in _EXPIRY_FREE, listing.expiry.startswith(query.expiry)),
    )
    return bool(query.symbol or query.local_symbol) and all(ok for given, ok in tests if given)


def match_symbols(market: Market, pattern: str, limit: int = 16) -> list[Listing]:
    """Listings whose symbol begins with ``pattern`` or whose name holds it, exact symbols first, at most ``limit``."""
    wanted = pattern.strip().upper()
    if not wanted:
        return []

    def rank(listing: Listing) -> tuple[int, str]:
        return (0 if listing.symbol == wanted else 1 if listing.symbol.startswith(wanted) else 2, listing.symbol)

    found = [x for x in market.listings if x.symbol.startswith(wanted) or wanted in x.long_name.upper()]
    return sorted(found, key=rank)[:limit]
