"""The nouns: Window, Duration, Timeframe (the table of sizes and limits), Instrument, Series.

Pure values, no I/O, no clock. Which opens a series should have is in `calendars.py`; which partitions it has in
`partitions.py`; what IB's contract objects look like in `ib/contracts.py`.

Sources of the table: bar sizes and current limits from IBKR's "Historical Data Limitations" page; classic limits from
the specification's "Official Historical Data Request Limits". See `TIMEFRAMES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Literal

from ktrdr_pipelines.errors import InputError


class HistoryLimits(StrEnum):
    """Which table bounds one request: the specification's (default) or IBKR's present, far larger one."""

    CLASSIC = "classic"
    CURRENT = "current"


def require_utc(instant: datetime, what: str = "time") -> datetime:
    """Return ``instant`` in UTC. Raises ``ValueError`` for a naive one: a guessed zone shifts a whole file."""
    if instant.tzinfo is None or instant.utcoffset() is None:
        raise ValueError(f"{what} {instant.isoformat()} has no time zone")
    return instant.astimezone(UTC)


def format_instant(instant: datetime) -> str:
    """``2024-01-02T14:30:00Z``: how instants are written in files, messages and answers; bare date at midnight is not
    abbreviated here (see ``Window.__str__``)."""
    return require_utc(instant).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_instant(text: str, what: str) -> datetime:
    """An instant as a person writes it: ISO 8601; a bare date is its midnight UTC, a time without a zone is UTC.

    Raises:
        InputError: not a date, or a year before 1970 or after 2100.
    """
    try:
        if not text.isprintable():
            raise ValueError("fromisoformat stops reading at a NUL")
        instant = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InputError(
            f"{what} {text[:40]!r} is not a date", advice="Write 2024-03-05 or 2024-03-05T14:30:00Z."
        ) from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    # With a margin first: near the years 1 and 9999 the other zone has no such time.
    if not 1969 <= instant.year <= 2101 or not 1970 <= instant.astimezone(UTC).year <= 2100:
        raise InputError(f"{what} {text[:40]!r} is outside the years 1970 to 2100")
    return instant.astimezone(UTC)


def parse_range(
    start: str | None, end: str | None, *, now: datetime | None = None
) -> tuple[datetime | None, datetime | None]:
    """Start (included) and end (not included) as people write them on every door; None where they wrote nothing.

    Raises:
        InputError: one is no date, start is not before end, or (with ``now``) start lies in the future.
    """
    first = parse_instant(start, "start") if start is not None else None
    last = parse_instant(end, "end") if end is not None else None
    if first is not None and last is not None and first >= last:
        raise InputError(
            f"start {format_instant(first)} is not before end {format_instant(last)}", advice="Swap or widen them."
        )
    if first is not None and now is not None and first >= now:
        raise InputError(f"start {format_instant(first)} is in the future", advice="Give an earlier start.")
    return first, last


def _short(instant: datetime) -> str:
    text = format_instant(instant)
    return text[:10] if text.endswith("T00:00:00Z") else text


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A half-open interval of time: ``start`` included, ``end`` not. Both are aware and kept in UTC.

    Raises:
        ValueError: one end is naive, or ``end`` is before ``start``. An empty window (equal ends) is allowed.
    """

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", require_utc(self.start, "window start"))
        object.__setattr__(self, "end", require_utc(self.end, "window end"))
        if self.end < self.start:
            raise ValueError(f"window ends before it starts: {self.start.isoformat()} .. {self.end.isoformat()}")

    @classmethod
    def from_epoch(cls, start_s: int, end_s: int) -> Window:
        """From whole seconds since 1970-01-01 UTC."""
        return cls(datetime.fromtimestamp(int(start_s), UTC), datetime.fromtimestamp(int(end_s), UTC))

    @property
    def start_s(self) -> int:
        """Start in whole seconds since 1970-01-01 UTC, rounded up: no bar open before ``start`` slips in."""
        return -int(-self.start.timestamp() // 1)

    @property
    def end_s(self) -> int:
        """End in whole seconds since 1970-01-01 UTC, rounded up: a bar open just before ``end`` stays in."""
        return -int(-self.end.timestamp() // 1)

    @property
    def is_empty(self) -> bool:
        return self.start == self.end

    def contains(self, instant: datetime) -> bool:
        return self.start <= instant < self.end

    def covers(self, other: Window) -> bool:
        """True if every instant of ``other`` is in this window."""
        return self.start <= other.start and other.end <= self.end

    def intersect(self, other: Window) -> Window | None:
        """The common part, or None when there is none (touching windows share nothing)."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Window(start, end) if start < end else None

    def __str__(self) -> str:
        """``2024-03-11..2024-03-12``; the time of day is written where it is not midnight UTC."""
        return f"{_short(self.start)}..{_short(self.end)}"


DurationUnit = Literal["S", "D", "W", "M", "Y"]


@dataclass(frozen=True, slots=True)
class Duration:
    """How far back a request reaches, in IB's own notation: ``str(Duration(1, "M")) == "1 M"``.

    S counts clock seconds; D, W and M count trading sessions in practice (a request may reach further back than the
    calendar says, never less far when counted in calendar days and rounded up). Hour is not a unit of IB's.
    """

    count: int
    unit: DurationUnit

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"


PartitionUnit = Literal["day", "week", "month", "year"]


@dataclass(frozen=True, slots=True)
class Timeframe:
    """One row of `TIMEFRAMES`.

    ``seconds`` is the bar's nominal length (1mo: 31 days), for intraday bars the exact grid. ``ib_bar_size`` is IB's own
    wording. ``classic`` and ``current`` are the longest durations of one request under each table of limits.
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
"""Every timeframe by name, shortest first. Current limits stay well below IBKR's maxima where large answers were seen to
be slow (1 min: 1 M takes 9 to 24 s, 2 M a minute)."""

_TIMEFRAME_ALIASES = {"1M": "1mo"}


def parse_timeframe(text: str) -> Timeframe:
    """The timeframe called ``text``. ``1M`` (one month) is accepted and becomes ``1mo``: on some file systems
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


class Hours(StrEnum):
    """Which hours a series holds. IB's ``useRTH`` is 1 for regular, else 0. Only stocks have a choice."""

    REGULAR = "regular"
    EXTENDED = "extended"


SECURITY_TYPES = ("STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO", "CFD")

DEFAULT_WHAT_TO_SHOW = {"CASH": "MIDPOINT", "CFD": "MIDPOINT", "CRYPTO": "AGGTRADES"}
"""What to show of a kind where nothing is said; of all others TRADES."""

DEFAULT_EXCHANGES = {"STK": "SMART", "CASH": "IDEALPRO", "CRYPTO": "PAXOS", "CFD": "SMART"}
"""Where a kind is asked for when nothing is said; futures and indices need an exchange."""

_FUTURE_CODE = re.compile(r"([A-Z0-9]{1,5}?)([FGHJKMNQUVXZ])([0-9]{1,2})")


def is_future_code(symbol: str) -> bool:
    """True for a future's own name: product, month letter and year, ``ESZ4`` or ``CLF25``."""
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
    """``symbol`` as it stands in file names and asset keys: letters and digits as they are, a space as ``_``, any other
    character as its two-digit hexadecimal code between underscores. ``BRK B`` -> ``BRK_B``, ``EUR.USD`` -> ``EUR_2E_USD``.

    `symbol_from_file` reverses it; ``file_symbol`` raises InputError for what is not a symbol. (``_2E_`` cannot be mistaken:
    symbols hold no double spaces around a lone pair of hexadecimal digits, which is checked here.)
    """
    if not _SYMBOL.fullmatch(symbol) or symbol != symbol.strip() or "  " in symbol:
        raise InputError(
            f"{symbol[:40]!r} is not a symbol",
            advice="Symbols are at most 32 letters, digits, inner spaces and . & / + ' - signs.",
        )
    name = "".join(c if _PLAIN.match(c) else "_" if c == " " else f"_{ord(c):02X}_" for c in symbol)
    if symbol_from_file(name) != symbol:
        raise InputError(
            f"{symbol!r} cannot be written as a file name", advice="Choose another alias in the universe file."
        )
    return name


def symbol_from_file(name: str) -> str:
    """The symbol that `file_symbol` wrote as ``name``."""
    return _ESCAPED.sub(lambda m: chr(int(m.group(1), 16)) if m.group(1) else " ", name)


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is traded, as asked of IB and as pinned in the sidecar.

    ``symbol`` is the project's name for it and the stem of its files (``AAPL``, ``EURUSD``, ``ESZ4``); ``ib_symbol`` and
    ``currency`` are IB's (``EUR`` and ``USD``). ``con_id`` is 0 until IB has told it. ``what_to_show`` uses IB's words.
    ``last_trade_date`` (``20241220``) is what IB said of a future, empty until then. ``calendar`` names the exchange calendar
    where ``exchange`` does not tell it (see `calendars.py`).
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
        """IB's ``useRTH``: regular trading hours only. Stocks have a choice; of everything else all hours are held."""
        return self.sec_type == "STK" and self.hours is Hours.REGULAR

    @property
    def ends_now(self) -> bool:
        """True where IB takes no end date: continuous futures and adjusted prices are told up to now, in one request."""
        return self.sec_type == "CONTFUT" or self.refreshes_whole

    @property
    def trades_until(self) -> date | None:
        """The last date on which a future may still trade; None for what has no expiry, or where nobody said which.

        A contract month is no date: a three-month rate future trades for a quarter beyond its own, none for longer. A week is
        added to a date, since closed exchanges move it.
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
        """True where a dividend or split restates every bar, so that held bars and new ones never go together."""
        return self.what_to_show == "ADJUSTED_LAST"

    @property
    def has_volume(self) -> bool:
        """False where IB sends -1 for the volume (anything but trades)."""
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
    """A stock or ETF, TRADES, regular hours unless ``hours`` says otherwise."""
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
        """Stem of its files: ``AAPL_1h``."""
        return f"{file_symbol(self.instrument.symbol)}_{self.timeframe.name}"

    @property
    def asset_path(self) -> tuple[str, str, str]:
        """Asset key ``ohlcv/<symbol>/<timeframe>``."""
        return (ASSET_ROOT, file_symbol(self.instrument.symbol), self.timeframe.name)

    def __str__(self) -> str:
        return f"{self.instrument.symbol} {self.timeframe.name}"
