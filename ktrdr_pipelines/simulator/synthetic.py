"""The synthetic market: deterministic bars of every size, all from one price path per instrument (`path.py`).

A bar of any size is the join of its minutes or seconds, so that all sizes agree exactly, volumes included. Requests and refusals
are in `history_service.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.simulator.listings import list_instruments
from ktrdr_pipelines.simulator.market import (
    DAY_S,
    Atoms,
    Bars,
    BarSize,
    Listing,
    find_period,
    label_clock,
    label_dates,
    merge_atoms,
)
from ktrdr_pipelines.simulator.path import PricePath
from ktrdr_pipelines.simulator.pricing import WITH_VOLUME, find_point, make_bars
from ktrdr_pipelines.simulator.trading_hours import (
    BERLIN,
    Sessions,
    crypto_sessions,
    forex_sessions,
    globex_sessions,
    index_sessions,
    us_stock_sessions,
    xetra_sessions,
)

_SESSIONS: dict[str, Callable[[], Sessions]] = {
    "STK": us_stock_sessions,
    "CASH": forex_sessions,
    "FUT": globex_sessions,
    "CONTFUT": globex_sessions,
    "IND": index_sessions,
    "CRYPTO": crypto_sessions,
}
_PER_SESSION = {"STK": 960, "CASH": 1425, "FUT": 1380, "CONTFUT": 1380, "IND": 390, "CRYPTO": 1440}
_VOLATILITY = {"STK": 0.0006, "CASH": 0.00012, "FUT": 0.0003, "CONTFUT": 0.0003, "IND": 0.0003, "CRYPTO": 0.0009}
_CHUNK = 16
"""Sessions computed and cached together: about 1.5 MB a chunk."""
_KEPT_CHUNKS = 48
_PIECE = 16 * _CHUNK
"""Sessions of minutes joined in one step: decades of them would need gigabytes."""


class SyntheticMarket:
    """``seed`` chooses other prices of the same instruments; ``listings`` replaces the instruments."""

    def __init__(self, seed: int = 0, listings: tuple[Listing, ...] | None = None) -> None:
        self.seed = seed
        self.listings = list_instruments() if listings is None else listings
        self._paths: dict[int, PricePath] = {}
        self._chunks: OrderedDict[tuple[int, int], Atoms] = OrderedDict()
        self._days: dict[tuple[int, int, bool], Atoms] = {}

    def sessions(self, listing: Listing) -> Sessions:
        return xetra_sessions() if listing.zone == BERLIN else _SESSIONS[listing.sec_type]()

    def head(self, listing: Listing, what: str, *, regular: bool) -> int | None:
        sessions = self.sessions(listing)
        first = int(np.searchsorted(sessions.day, listing.first_day))
        if what in WITH_VOLUME and listing.activity < 1.0:
            size = BarSize("1 min", 60)
            start = int(sessions.open[first])
            found = self.bars(listing, size, start, start + 10 * DAY_S, what=what, regular=regular)
            return int(found.stamp[0])
        return int(sessions.opens(regular=regular)[first])

    def bars(self, listing: Listing, size: BarSize, start_s: int, end_s: int, *, what: str, regular: bool) -> Bars:
        sessions = self.sessions(listing)
        lo, hi = self._listed_range(listing, sessions, start_s, end_s, regular=regular)
        atoms = (
            self._dated(listing, size, lo, hi, end_s, what, regular=regular)
            if size.is_dated
            else self._clocked(listing, size, lo, hi, start_s, end_s, what, regular=regular)
        )
        return make_bars(listing, sessions, atoms, what, dated=size.is_dated)

    def _listed_range(
        self, listing: Listing, sessions: Sessions, start_s: int, end_s: int, *, regular: bool
    ) -> tuple[int, int]:
        lo, hi = sessions.find_range(start_s, end_s, regular=regular)
        listed = np.searchsorted(sessions.day, [listing.first_day, listing.last_day + 1])
        return max(lo, int(listed[0])), min(hi, int(listed[1]))

    def _path(self, listing: Listing) -> PricePath:
        if listing.con_id not in self._paths:
            self._paths[listing.con_id] = PricePath(
                f"{self.seed}/{listing.con_id}",
                max(100, round(listing.base_price / find_point(listing))),
                volatility=_VOLATILITY[listing.sec_type],
                mean_volume=4000 if listing.activity == 1.0 else 120,
                activity=listing.activity,
            )
        return self._paths[listing.con_id]

    def _minutes(self, listing: Listing, lo: int, hi: int) -> Atoms:
        """Every minute of the sessions ``lo`` to ``hi`` (excluded)."""
        if lo >= hi:
            return self._chunk(listing, 0).take(slice(0, 0))
        parts = []
        for number in range(lo // _CHUNK, (hi - 1) // _CHUNK + 1):
            chunk = self._chunk(listing, number)
            edges = np.searchsorted(chunk.session, [lo, hi])
            parts.append(chunk.take(slice(int(edges[0]), int(edges[1]))))
        return Atoms.join(parts)

    def _chunk(self, listing: Listing, number: int) -> Atoms:
        key = (listing.con_id, number)
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key]
        sessions = self.sessions(listing)
        index = np.arange(number * _CHUNK, min((number + 1) * _CHUNK, len(sessions)))
        per_session = _PER_SESSION[listing.sec_type]
        grid = self._path(listing).minutes(sessions.day[index], per_session)
        stamp = sessions.open[index][:, None] + 60 * np.arange(per_session)
        keep = stamp < sessions.close[index][:, None]
        volume = grid.volume[keep]
        price = (grid.open + grid.high + grid.low + grid.close)[keep]
        atoms = Atoms(
            stamp=stamp[keep],
            session=np.broadcast_to(index[:, None], stamp.shape)[keep].astype(np.int64),
            open=grid.open[keep],
            high=grid.high[keep],
            low=grid.low[keep],
            close=grid.close[keep],
            volume=volume,
            turnover=price * volume,
            count=np.minimum(volume, 1 + volume // 90),
        )
        self._chunks[key] = atoms
        while len(self._chunks) > _KEPT_CHUNKS:
            self._chunks.popitem(last=False)
        return atoms

    def _seconds(self, listing: Listing, minutes: Atoms) -> Atoms:
        """The seconds of the given complete minutes."""
        counters = minutes.stamp // 60
        fine = self._path(listing).seconds(
            counters, minutes.open, minutes.high, minutes.low, minutes.close, minutes.volume
        )
        # Turnover and count of a minute are spread over its seconds so that they add up, like its volume.
        turnover, count = _spread(minutes.turnover), _spread(minutes.count)
        return Atoms(
            stamp=(minutes.stamp[:, None] + np.arange(60)).ravel(),
            session=np.repeat(minutes.session, 60),
            open=fine.open.ravel(),
            high=fine.high.ravel(),
            low=fine.low.ravel(),
            close=fine.close.ravel(),
            volume=fine.volume.ravel(),
            turnover=turnover,
            count=count,
        )

    def _until(self, listing: Listing, minutes: Atoms, end_s: int) -> Atoms:
        """The minutes before ``end_s``; a minute cut by ``end_s`` is rebuilt from its seconds before it."""
        whole = minutes.take(minutes.stamp + 60 <= end_s)
        cut = minutes.take((minutes.stamp < end_s) & (minutes.stamp + 60 > end_s))
        if not len(cut):
            return whole
        seconds = self._seconds(listing, cut)
        part = seconds.take(seconds.stamp < end_s)
        return Atoms.join([whole, merge_atoms(part, np.zeros_like(part.stamp))])

    def _clocked(
        self, listing: Listing, size: BarSize, lo: int, hi: int, start_s: int, end_s: int, what: str, *, regular: bool
    ) -> Atoms:
        if hi - lo > _PIECE:
            pieces = [(at, min(at + _PIECE, hi)) for at in range(lo, hi, _PIECE)]  # no bar spans two sessions
            return Atoms.join(
                [self._clocked(listing, size, *piece, start_s, end_s, what, regular=regular) for piece in pieces]
            )
        sessions = self.sessions(listing)
        atoms = self._minutes(listing, lo, hi)
        floor = start_s if size.seconds >= 60 else start_s - start_s % 60
        atoms = atoms.take((atoms.stamp >= floor) & (atoms.stamp < end_s))
        atoms = self._keep_hours(atoms, sessions, what, regular=regular)
        if size.seconds < 60:
            atoms = self._seconds(listing, atoms)
            atoms = atoms.take(atoms.stamp < end_s)
        else:
            atoms = self._until(listing, atoms, end_s)
        opens = sessions.opens(regular=regular)[atoms.session]
        labels = label_clock(atoms.stamp, opens, sessions.offset[atoms.session], size.seconds)
        # A first bar that opened before the window would be incomplete: it is left out.
        inside = labels >= start_s
        return _stamped(merge_atoms(atoms.take(inside), labels[inside]), labels[inside])

    def _keep_hours(self, atoms: Atoms, sessions: Sessions, what: str, *, regular: bool) -> Atoms:
        if regular:
            opens, closes = sessions.regular_open[atoms.session], sessions.regular_close[atoms.session]
            atoms = atoms.take((atoms.stamp >= opens) & (atoms.stamp < closes))
        return atoms.take(atoms.volume > 0) if what in WITH_VOLUME else atoms

    def _dated(
        self, listing: Listing, size: BarSize, lo: int, hi: int, end_s: int, what: str, *, regular: bool
    ) -> Atoms:
        sessions = self.sessions(listing)
        if lo >= hi:
            return self._minutes(listing, 0, 0)
        if size.unit != "day":
            listed = int(np.searchsorted(sessions.day, listing.first_day))
            lo = max(listed, find_period(sessions, lo, size.unit))
        closes = sessions.closes(regular=regular)
        done = hi if closes[hi - 1] <= end_s else hi - 1
        parts = [self._whole_days(listing, lo, done, what, regular=regular)] if done > lo else []
        if done < hi:
            rest = self._keep_hours(self._minutes(listing, done, hi), sessions, what, regular=regular)
            rest = self._until(listing, rest, end_s)
            parts.append(merge_atoms(rest, rest.session))
        days = Atoms.join(parts)
        merged = merge_atoms(days, label_dates(sessions.day[days.session], size.unit))
        return _stamped(merged, sessions.day[merged.session] * DAY_S, one_each=True)

    def _whole_days(self, listing: Listing, lo: int, hi: int, what: str, *, regular: bool) -> Atoms:
        """One atom for each session ``lo`` to ``hi`` (excluded). Chunks of them are cached: small in memory, slow to compute."""
        parts = []
        quiet_matters = what in WITH_VOLUME and listing.activity < 1.0
        for number in range(lo // _CHUNK, (hi - 1) // _CHUNK + 1):
            key = (listing.con_id, number, regular)
            days = self._days.get(key) if not quiet_matters else None
            if days is None:
                minutes = self._keep_hours(self._chunk(listing, number), self.sessions(listing), what, regular=regular)
                days = merge_atoms(minutes, minutes.session)
                if not quiet_matters:
                    self._days[key] = days
            edges = np.searchsorted(days.session, [lo, hi])
            parts.append(days.take(slice(int(edges[0]), int(edges[1]))))
        return Atoms.join(parts)


def _spread(totals: IntArray) -> IntArray:
    """Each total as 60 integers that add up to it."""
    share, rest = totals[:, None] // 60, totals[:, None] % 60
    return (share + (np.arange(60) < rest)).ravel()


def _stamped(merged: Atoms, labels: IntArray, *, one_each: bool = False) -> Atoms:
    """``merged`` with the labels of its bars instead of the stamps of their first atoms."""
    stamps = labels if one_each else labels[np.r_[True, labels[1:] != labels[:-1]]] if len(labels) else labels
    return Atoms(**{**{name: getattr(merged, name) for name in Atoms.__dataclass_fields__}, "stamp": stamps})
