"""A market of recorded bars: a folder of ``SYMBOL_TF.csv`` files in the project's own format, served unchanged.

A file answers requests of its own bar size; longer sizes are joined from it, shorter ones have no data. Instruments are
inferred from file names (six letters of two currencies: a pair on IDEALPRO, else a US stock). ``instruments.json`` in the
same folder overrides that, with fields of `Listing`: ``{"BMW": {"currency": "EUR", "primary_exchange": "IBIS", ...}}``.
Sessions, and so durations in days, come from the data itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ktrdr_pipelines.domain.arrays import BoolArray, FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import symbol_from_file
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.listings import make_pair, make_stock
from ktrdr_pipelines.simulator.market import (
    BAR_SIZES,
    COLUMNS,
    DAY_S,
    Bars,
    BarSize,
    Listing,
    find_period,
    label_clock,
    label_dates,
)
from ktrdr_pipelines.simulator.trading_hours import Sessions, forex_sessions, sessions_from_bars, us_stock_sessions

_CURRENCIES = frozenset(
    [
        "USD",
        "EUR",
        "GBP",
        "JPY",
        "CHF",
        "CAD",
        "AUD",
        "NZD",
        "SEK",
        "NOK",
        "DKK",
        "PLN",
        "HUF",
        "CZK",
        "HKD",
        "SGD",
        "CNH",
        "MXN",
        "ZAR",
        "TRY",
        "ILS",
        "KRW",
    ]
)
_HEADER = ["timestamp", "open", "high", "low", "close", "volume"]
_FIRST_CON_ID = 700_000_000
_ROLLOVER_S = {"CASH": 7 * 3600}
"""A pair's day starts at 17:00 New York: seconds to add to local time before its date is computed."""


@dataclass(frozen=True)
class _Recording:
    """One file, read: its bars and, for each, the index of its session in the symbol's `Sessions`."""

    size: BarSize
    bars: Bars
    day: IntArray


class ReplayMarket:
    """The recorded bars in ``directory``. Files are read at their first request.

    Raises:
        InputError: no such folder, no recordings in it, a malformed ``instruments.json``; later, a file that is no recording.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._files = self._find_files()
        given = self._read_instruments()
        self.listings: tuple[Listing, ...] = tuple(
            _make_listing(symbol, _FIRST_CON_ID + i, given.get(symbol, {}))
            for i, symbol in enumerate(sorted(self._files))
        )
        self._symbols = {
            listing.con_id: symbol for listing, symbol in zip(self.listings, sorted(self._files), strict=True)
        }
        self._recordings: dict[int, list[_Recording]] = {}
        self._sessions: dict[int, Sessions] = {}

    def _find_files(self) -> dict[str, dict[str, Path]]:
        if not self._directory.is_dir():
            raise InputError(
                f"{self._directory} is not a folder", advice="Give the folder with the SYMBOL_TF.csv files."
            )
        found: dict[str, dict[str, Path]] = {}
        for path in sorted(self._directory.glob("*.csv")):
            stem, _, timeframe = path.stem.rpartition("_")
            if stem and timeframe in TIMEFRAMES:
                found.setdefault(symbol_from_file(stem), {})[TIMEFRAMES[timeframe].ib_bar_size] = path
        if not found:
            raise InputError(f"no recorded bars in {self._directory}", advice="Files are named like AAPL_1h.csv.")
        return found

    def _read_instruments(self) -> dict[str, dict[str, Any]]:
        path = self._directory / "instruments.json"
        if not path.exists():
            return {}
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if not isinstance(given, dict) or not all(isinstance(entry, dict) for entry in given.values()):
            raise InputError(f"{path} is not a mapping of symbols to fields")
        return given

    def sessions(self, listing: Listing) -> Sessions:
        self._load(listing)
        return self._sessions[listing.con_id]

    def head(self, listing: Listing, _what: str, /, *, regular: bool) -> int | None:
        recordings = [r for r in self._load(listing) if len(r.bars)]
        sessions = self._sessions[listing.con_id]
        opens = sessions.opens(regular=regular)
        firsts = [int(opens[np.searchsorted(sessions.day, r.day[0])]) for r in recordings]
        return min(firsts, default=None)

    def bars(
        self, listing: Listing, size: BarSize, start_s: int, end_s: int, *, what: str, regular: bool
    ) -> Bars | None:
        source = _choose(self._load(listing), size)
        if source is None:
            return None
        sessions = self._sessions[listing.con_id]
        session = np.searchsorted(sessions.day, source.day)
        kept = source.bars
        if regular and not source.size.is_dated:
            inside = (kept.stamp >= sessions.regular_open[session]) & (kept.stamp < sessions.regular_close[session])
            kept, session = kept.take(inside), session[inside]
        lo, hi = sessions.find_range(start_s, end_s, regular=regular)
        if size.unit in ("week", "month") and lo < hi:
            lo = find_period(sessions, lo, size.unit)
        kept, session = _select(kept, session, (session >= lo) & (session < hi))
        if not source.size.is_dated:
            first = start_s if not size.is_dated else 0
            kept, session = _select(kept, session, (kept.stamp >= first) & (kept.stamp < end_s))
        kept = _cut_last(kept, _find_closes(kept, session, source.size, sessions, regular=regular), end_s)
        if size.is_dated:
            joined, last = _join(kept, label_dates(sessions.day[session], size.unit))
            joined = replace(joined, stamp=sessions.day[session[last]] * DAY_S, dated=True)
        elif size.seconds == source.size.seconds:
            joined = kept
        else:
            opens = sessions.opens(regular=regular)[session]
            labels = label_clock(kept.stamp, opens, sessions.offset[session], size.seconds)
            whole = labels >= start_s
            joined, last = _join(kept.take(whole), labels[whole])
            joined = replace(joined, stamp=labels[whole][last])
        return _as_shown(joined, what)

    def _load(self, listing: Listing) -> list[_Recording]:
        if listing.con_id in self._recordings:
            return self._recordings[listing.con_id]
        recordings = []
        tables: list[Sessions] = []
        files = self._files[self._symbols[listing.con_id]]
        for name in sorted(files, key=lambda name: -BAR_SIZES[name].seconds):
            size = BAR_SIZES[name]
            bars = _read_bars(files[name], dated=size.is_dated)
            table = _find_sessions(listing, bars, size)
            recordings.append(_Recording(size, bars, table[1]))
            tables.append(table[0])
        self._sessions[listing.con_id] = _extend(_overlay(tables), _calendar_of(listing))
        self._recordings[listing.con_id] = recordings
        return recordings


def _make_listing(symbol: str, con_id: int, given: dict[str, Any]) -> Listing:
    if len(symbol) == 6 and {symbol[:3], symbol[3:]} <= _CURRENCIES:
        listing = make_pair(con_id, symbol[:3], symbol[3:], 0)
    else:
        listing = make_stock(con_id, symbol, f"{symbol} (recorded)", "NASDAQ", 0)
    unknown = set(given) - {f.name for f in fields(Listing)}
    if unknown:
        raise InputError(f"instruments.json: {symbol} has unknown fields {', '.join(sorted(unknown))}")
    changes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    listing = replace(listing, **changes)
    if "primary_exchange" in given and "exchanges" not in given:
        listing = replace(listing, exchanges=("SMART", listing.primary_exchange))
    return listing


def _read_bars(path: Path, *, dated: bool) -> Bars:
    try:
        frame = pd.read_csv(path, dtype={"timestamp": str})
        if list(frame.columns) != _HEADER:
            raise ValueError(f"header {','.join(map(str, frame.columns))!r}, expected {','.join(_HEADER)!r}")
        stamps = pd.DatetimeIndex(pd.to_datetime(frame["timestamp"], format="%Y-%m-%dT%H:%M:%SZ", utc=True)).as_unit(
            "s"
        )
        open_, high, low, close = (frame[name].to_numpy(dtype=np.float64) for name in _HEADER[1:5])
        volume = np.rint(frame["volume"].to_numpy(dtype=np.float64)).astype(np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot replay {path}: {error}", advice="Files hold bars as the project stores them."
        ) from error
    stamp = np.asarray(stamps.asi8, dtype=np.int64)
    if len(stamp) > 1 and not (np.diff(stamp) > 0).all():
        raise InputError(f"cannot replay {path}: its timestamps do not increase")
    average = np.round((high + low + close) / 3, 6)
    return Bars(stamp, open_, high, low, close, volume, average, 1 + volume // 100, dated=dated, decimals=None)


def _find_sessions(listing: Listing, bars: Bars, size: BarSize) -> tuple[Sessions, IntArray]:
    """The sessions of a file's bars, and each bar's session date as days since 1970-01-01."""
    rollover = _ROLLOVER_S.get(listing.sec_type, 0)
    if not size.is_dated:
        return sessions_from_bars(listing.zone, bars.stamp, size.seconds, rollover)
    # A date has no hours: use the calendar's where it has the day, else New York's regular hours.
    known = _calendar_of(listing)
    day = bars.stamp // DAY_S
    at = np.minimum(np.searchsorted(known.day, day), len(known) - 1)
    hit = known.day[at] == day
    local_midnight = day * DAY_S + 5 * 3600
    opens = np.where(hit, known.regular_open[at], local_midnight + 34200)
    closes = np.where(hit, known.regular_close[at], local_midnight + 57600)
    offset = np.where(hit, known.offset[at], -5 * 3600)
    return Sessions(listing.zone, day, opens, closes, opens, closes, offset), day


def _calendar_of(listing: Listing) -> Sessions:
    return forex_sessions() if listing.sec_type == "CASH" else us_stock_sessions()


def _extend(table: Sessions, known: Sessions) -> Sessions:
    """``table`` with the calendar's sessions before its first day and after its last. Without them a month that ends today would
    be counted back from the end of the recording."""
    if not len(table):
        return known
    before, after = (
        int(np.searchsorted(known.day, table.day[0])),
        int(np.searchsorted(known.day, table.day[-1], "right")),
    )
    names = ("day", "open", "close", "regular_open", "regular_close", "offset")
    parts = [known.take(slice(0, before)), table, known.take(slice(after, None))]
    return Sessions(table.zone, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _overlay(tables: list[Sessions]) -> Sessions:
    """One table from several, longest bars first; for a day in more than one, the row of the shortest bars is used."""
    names = ("day", "open", "close", "regular_open", "regular_close", "offset")
    columns = [np.concatenate([getattr(table, name) for table in reversed(tables)]) for name in names]
    _, first = np.unique(columns[0], return_index=True)
    return Sessions(tables[0].zone, *(column[first] for column in columns))


def _choose(recordings: list[_Recording], size: BarSize) -> _Recording | None:
    """The recording of that size, else the longest one that it can be joined from."""
    for recording in recordings:
        if recording.size.seconds == size.seconds:
            return recording
    for recording in recordings:
        divides = size.is_dated and recording.size.unit in ("clock", "day")
        if recording.size.seconds < size.seconds and (divides or size.seconds % recording.size.seconds == 0):
            return recording
    return None


def _select(bars: Bars, session: IntArray, mask: BoolArray) -> tuple[Bars, IntArray]:
    return bars.take(mask), session[mask]


def _find_closes(bars: Bars, session: IntArray, size: BarSize, sessions: Sessions, *, regular: bool) -> IntArray:
    closes = sessions.closes(regular=regular)[session]
    return closes if size.is_dated else np.minimum(bars.stamp + size.seconds, closes)


def _cut_last(bars: Bars, closes: IntArray, end_s: int) -> Bars:
    """Replace a last bar that is forming at ``end_s`` by one with a smaller range and volume.

    The recording does not have the forming bar; it must only differ from the complete one.
    """
    if not len(bars) or closes[-1] <= end_s:
        return bars
    names = ("high", "low", "close", "volume")
    columns: dict[str, Any] = {name: getattr(bars, name).copy() for name in names}
    begin, end = float(bars.open[-1]), float((bars.open[-1] + bars.close[-1]) / 2)
    columns["close"][-1] = round(end, 6)
    columns["high"][-1], columns["low"][-1] = round(max(begin, end), 6), round(min(begin, end), 6)
    columns["volume"][-1] //= 2
    return replace(bars, **columns)


def _join(bars: Bars, key: IntArray) -> tuple[Bars, IntArray]:
    """One bar for each run of equal ``key``, and the position of the last bar of each run."""
    if not len(bars):
        return bars, np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    last = np.r_[first[1:], len(key)] - 1
    volume = np.add.reduceat(bars.volume, first)
    weight: FloatArray = np.maximum(bars.volume, 1).astype(np.float64)
    columns: dict[str, Any] = {
        "stamp": bars.stamp[first],
        "open": bars.open[first],
        "high": np.maximum.reduceat(bars.high, first),
        "low": np.minimum.reduceat(bars.low, first),
        "close": bars.close[last],
        "volume": volume,
        "average": np.round(np.add.reduceat(bars.average * weight, first) / np.add.reduceat(weight, first), 6),
        "count": np.add.reduceat(bars.count, first),
    }
    return replace(bars, **{name: columns[name] for name in COLUMNS}), last


def _as_shown(bars: Bars, what: str) -> Bars:
    """Recorded prices serve every what to show; only trades have a volume on the wire."""
    if what in ("TRADES", "ADJUSTED_LAST"):
        return bars
    none = np.full(len(bars), -1, dtype=np.int64)
    return replace(bars, volume=none, count=none, average=none.astype(np.float64))
