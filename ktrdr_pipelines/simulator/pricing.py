"""From points of the price path to the prices of each what to show. Pure arithmetic; the path is in `path.py`.

Each kind is the path moved by a fixed distance, so that joined bars have joined prices in every kind. All distances differ, so
that a test notices one kind in place of another; bid < midpoint < ask always. BID_ASK opens with the bid, closes with the ask,
and reaches from the lowest bid to the highest ask (IBKR's documentation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktrdr_pipelines.domain.arrays import FloatArray, IntArray
from ktrdr_pipelines.simulator.market import Atoms, Bars, Listing, label_dates
from ktrdr_pipelines.simulator.trading_hours import Sessions

WITH_VOLUME = ("TRADES", "ADJUSTED_LAST", "AGGTRADES")

_DIVIDEND = 0.9975
_DIVIDENDS_UNTIL = 2026
"""ADJUSTED_LAST: four dividends a year before this year; prices before each are a little lower. A bar has the factor of its last
session: only a weekly bar across a quarter's end is not exactly the join of its days."""


@dataclass(frozen=True)
class Quote:
    """How one kind of price is written: ``units`` of the last decimal to one point, and how far each price of a bar lies from
    the path, in units."""

    decimals: int
    units: int
    open: int = 0
    high: int = 0
    low: int = 0
    close: int = 0


def _level(decimals: int, units: int, shift: int) -> Quote:
    return Quote(decimals, units, shift, shift, shift, shift)


def find_point(listing: Listing) -> float:
    """The size of one point of the path in the instrument's currency."""
    return listing.min_tick if listing.sec_type in ("FUT", "CONTFUT") else 10.0**-listing.decimals


def find_quote(listing: Listing, what: str) -> Quote:
    """The quote of ``what`` for ``listing``. A stock's midpoint is half a tick above its trades."""
    digits = listing.decimals
    tick = round(find_point(listing) * 10**digits)
    below, above = (-2 * tick, 2 * tick) if listing.sec_type == "CASH" else (-tick, 2 * tick)
    quotes = {
        "TRADES": _level(digits, tick, 0),
        "ADJUSTED_LAST": _level(digits, tick, 0),
        "AGGTRADES": _level(digits, tick, 0),
        "MIDPOINT": _level(digits, tick, 0) if listing.sec_type == "CASH" else _level(digits + 1, tick * 10, tick * 5),
        "BID": _level(digits, tick, below),
        "ASK": _level(digits, tick, above),
        "BID_ASK": Quote(digits, tick, below, above, below, above),
    }
    return quotes[what]


def _adjust(sessions: Sessions, atoms: Atoms) -> FloatArray:
    quarters = label_dates(sessions.day[atoms.session], "month") // 3
    factor: FloatArray = _DIVIDEND ** np.maximum(0, (_DIVIDENDS_UNTIL - 1970) * 4 - quarters)
    return factor


def make_bars(listing: Listing, sessions: Sessions, atoms: Atoms, what: str, *, dated: bool) -> Bars:
    """The bars of one what to show. Volume, average and count are -1 except for trades."""
    quote = find_quote(listing, what)
    scale = 10**quote.decimals
    factor: FloatArray | float = _adjust(sessions, atoms) * listing.adjustment if what == "ADJUSTED_LAST" else 1.0
    factor = factor / listing.split

    def write(points: IntArray, shift: int) -> FloatArray:
        prices: FloatArray = np.rint((points * quote.units + shift) * factor) / scale
        return prices

    columns = {name: write(getattr(atoms, name), getattr(quote, name)) for name in ("open", "high", "low", "close")}
    volume, count, average = (np.full(len(atoms), -1, dtype=np.int64) for _ in range(3))
    mean = average.astype(np.float64)
    if what in WITH_VOLUME:
        volume, count = atoms.volume * listing.split, atoms.count
        # Turnover holds the sum of four prices times volume.
        mean = atoms.turnover / np.maximum(volume, 1) / 4 * quote.units * factor / scale
        mean = np.round(np.clip(mean, columns["low"], columns["high"]), 3)
    if listing.sec_type == "IND":  # an index has no trades of its own
        volume, mean = np.zeros_like(volume), np.zeros_like(mean)
    return Bars(
        stamp=atoms.stamp,
        **columns,
        volume=volume,
        average=mean,
        count=count,
        dated=dated,
        decimals=quote.decimals,
    )
