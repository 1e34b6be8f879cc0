"""Bars and sessions as text for the wire: the one hot loop of the simulator.

Field order per message is in `messages.py`. Bars are formatted with one big format string, about 1.5 microseconds a bar.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import chain
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.simulator.market import DAY_S, Bars
from ktrdr_pipelines.simulator.messages import Fields, build_history_head, build_schedule
from ktrdr_pipelines.simulator.trading_hours import Sessions
from ktrdr_pipelines.simulator.wire import frame, join_fields

_ZONED_SINCE = 165
"""From this version on, written instants name their zone; before it, two spaces and no zone, as old gateways wrote them."""


def write_instant(seconds: int, zone: str, version: int) -> str:
    """An instant as text in the gateway's zone."""
    local = datetime.fromtimestamp(seconds, UTC).astimezone(ZoneInfo(zone))
    return local.strftime("%Y%m%d %H:%M:%S ") + zone if version >= _ZONED_SINCE else local.strftime("%Y%m%d  %H:%M:%S")


def write_head(seconds: int, format_date: str) -> str:
    """A head timestamp: epoch seconds for formatDate 2, else UTC in the dash form."""
    if format_date == "2":
        return str(seconds)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%d-%H:%M:%S")


def _write_stamps(bars: Bars, format_date: str, zone: str, version: int) -> list[Any]:
    if not bars.dated and format_date == "2":
        numbers: list[Any] = bars.stamp.tolist()
        return numbers
    stamps = bars.stamp
    tail = ""
    if not bars.dated:
        index = (
            pd.DatetimeIndex(pd.to_datetime(stamps, unit="s", utc=True)).tz_convert(ZoneInfo(zone)).tz_localize(None)
        )
        stamps = np.asarray(index.as_unit("s").asi8, dtype=np.int64)
        tail = f" {zone}" if version >= _ZONED_SINCE else ""
    gap = " " if tail else "  "
    texts = np.datetime_as_string(stamps.astype("datetime64[s]")).tolist()
    if bars.dated:
        return [f"{text[:4]}{text[5:7]}{text[8:10]}" for text in texts]
    return [f"{text[:4]}{text[5:7]}{text[8:10]}{gap}{text[11:]}{tail}" for text in texts]


def encode_bars(bars: Bars, format_date: str, zone: str, version: int) -> bytes:
    """The bars' fields: date, open, high, low, close, volume, average, (hasGaps before version 124), count."""
    price = "%r" if bars.decimals is None else f"%.{bars.decimals}f"
    gaps = "false\0" if version < 124 else ""
    row = f"%s\0{price}\0{price}\0{price}\0{price}\0%d\0%.3f\0{gaps}%d\0"
    columns = (bars.open, bars.high, bars.low, bars.close, bars.volume, bars.average, bars.count)
    rows = zip(_write_stamps(bars, format_date, zone, version), *(column.tolist() for column in columns), strict=True)
    text = (row * len(bars)) % tuple(chain.from_iterable(rows))
    return text.encode()


def encode_history(
    version: int, req_id: int, bars: Bars, start_s: int, end_s: int, *, format_date: str, zone: str
) -> bytes:
    """A whole history answer as one frame."""
    start, end = write_instant(start_s, zone, version), write_instant(end_s, zone, version)
    head = join_fields(build_history_head(version, req_id, start, end, len(bars)))
    return frame(head + encode_bars(bars, format_date, zone, version))


def write_schedule(req_id: int, sessions: Sessions, *, regular: bool) -> Fields:
    """An answer to SCHEDULE: instants in the exchange's zone (``20240102-09:30:00``), reference dates ``20240102``."""
    opens = _write_local(sessions.opens(regular=regular) + sessions.offset)
    closes = _write_local(sessions.closes(regular=regular) + sessions.offset)
    dates = [text[:8] for text in _write_local(sessions.day * DAY_S)]
    rows = list(zip(opens, closes, dates, strict=True))
    start, end = (rows[0][0], rows[-1][1]) if rows else ("", "")
    return build_schedule(req_id, start, end, sessions.zone, rows)


def _write_local(seconds: IntArray) -> list[str]:
    texts = np.datetime_as_string(seconds.astype("datetime64[s]")).tolist()
    return [f"{text[:4]}{text[5:7]}{text[8:10]}-{text[11:]}" for text in texts]
