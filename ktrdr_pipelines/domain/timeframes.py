"""The table of timeframes: IB's bar sizes, partition units and the longest request of each. Pure values.

Sources: bar sizes and current limits from IBKR's "Historical Data Limitations" page; classic limits from the specification's
"Official Historical Data Request Limits". See `TIMEFRAMES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ktrdr_pipelines.errors import InputError


class HistoryLimits(StrEnum):
    """The table of longest requests: the specification's (default), or IBKR's current, much larger one."""

    CLASSIC = "classic"
    CURRENT = "current"


DurationUnit = Literal["S", "D", "W", "M", "Y"]


@dataclass(frozen=True, slots=True)
class Duration:
    """How far back a request reaches, in IB's notation: ``str(Duration(1, "M")) == "1 M"``.

    S counts clock seconds; D, W and M count trading sessions in practice: a request may reach further back than calendar days,
    but never less far if these are rounded up. IB has no unit for hours.
    """

    count: int
    unit: DurationUnit

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"


PartitionUnit = Literal["day", "week", "month", "year"]


@dataclass(frozen=True, slots=True)
class Timeframe:
    """One row of `TIMEFRAMES`.

    ``seconds`` is the bar's nominal length (1mo: 31 days), for intraday bars the exact grid. ``ib_bar_size`` is IB's
    string. ``classic`` and ``current`` are the longest durations of one request under each table of limits.
    """

    name: str
    ib_bar_size: str
    seconds: int
    partition: PartitionUnit
    classic: Duration
    current: Duration

    @property
    def is_intraday(self) -> bool:
        """False for daily and longer bars: IB stamps those with a session date instead of an instant."""
        return self.seconds < 86400

    def longest_request(self, limits: HistoryLimits) -> Duration:
        return self.classic if limits is HistoryLimits.CLASSIC else self.current

    def __str__(self) -> str:
        return self.name


def _rows() -> dict[str, Timeframe]:
    d = Duration
    table = [
        # name, IB bar size, seconds, partition, classic limit, current limit
        ("1s", "1 secs", 1, "day", d(1800, "S"), d(2000, "S")),
        ("5s", "5 secs", 5, "day", d(7200, "S"), d(1, "D")),
        ("10s", "10 secs", 10, "day", d(14400, "S"), d(2, "D")),
        ("15s", "15 secs", 15, "day", d(14400, "S"), d(3, "D")),
        ("30s", "30 secs", 30, "day", d(28800, "S"), d(1, "W")),
        ("1m", "1 min", 60, "day", d(1, "D"), d(1, "M")),
        ("2m", "2 mins", 120, "week", d(1, "D"), d(2, "M")),
        ("3m", "3 mins", 180, "week", d(1, "D"), d(3, "M")),
        ("5m", "5 mins", 300, "week", d(1, "W"), d(6, "M")),
        ("10m", "10 mins", 600, "week", d(1, "W"), d(12, "M")),
        ("15m", "15 mins", 900, "week", d(2, "W"), d(12, "M")),
        ("20m", "20 mins", 1200, "week", d(2, "W"), d(12, "M")),
        ("30m", "30 mins", 1800, "month", d(1, "M"), d(12, "M")),
        ("1h", "1 hour", 3600, "month", d(1, "M"), d(12, "M")),
        ("2h", "2 hours", 7200, "month", d(1, "M"), d(12, "M")),
        ("3h", "3 hours", 10800, "month", d(1, "M"), d(12, "M")),
        ("4h", "4 hours", 14400, "month", d(1, "M"), d(12, "M")),
        ("8h", "8 hours", 28800, "month", d(1, "M"), d(12, "M")),
        ("1d", "1 day", 86400, "year", d(1, "Y"), d(20, "Y")),
        ("1w", "1 week", 7 * 86400, "year", d(2, "Y"), d(20, "Y")),
        ("1mo", "1 month", 31 * 86400, "year", d(1, "Y"), d(20, "Y")),
    ]
    return {row[0]: Timeframe(*row) for row in table}  # type: ignore[arg-type]


TIMEFRAMES: dict[str, Timeframe] = _rows()
"""Every timeframe by name, shortest first. Current limits are well below IBKR's maxima where large answers are slow (1 min:
1 M takes 9 to 24 s, 2 M a minute)."""

_TIMEFRAME_ALIASES = {"1M": "1mo"}


def parse_timeframe(text: str) -> Timeframe:
    """The timeframe with the name ``text``. ``1M`` (one month) is accepted and becomes ``1mo``: on some file systems
    ``X_1m.csv`` and ``X_1M.csv`` are one file.

    Raises:
        InputError: no such timeframe; the message lists those that exist.
    """
    name = _TIMEFRAME_ALIASES.get(text, text)
    try:
        return TIMEFRAMES[name]
    except KeyError:
        raise InputError(
            f"unknown timeframe {text[:40]!r}", advice=f"Use one of {', '.join(TIMEFRAMES)} (1M is read as 1mo)."
        ) from None
