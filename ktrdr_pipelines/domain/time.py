"""Instants and windows: aware datetimes in UTC, half-open intervals, and how users write them. Pure, without a clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime

from ktrdr_pipelines.errors import InputError

Time = str | date | datetime
"""ISO 8601 text, a date (its midnight UTC), or a datetime with a zone (pandas' Timestamp is one)."""


def require_utc(instant: datetime, what: str = "time") -> datetime:
    """``instant`` in UTC. Raises ``ValueError`` for a naive one: a guessed zone shifts a whole file."""
    if instant.tzinfo is None or instant.utcoffset() is None:
        raise ValueError(f"{what} {instant.isoformat()} has no time zone")
    return instant.astimezone(UTC)


def format_instant(instant: datetime) -> str:
    """``2024-01-02T14:30:00Z``: the format of instants in files, messages and REST answers. Midnight is not abbreviated to a date
    (`Window.__str__` does that)."""
    return require_utc(instant).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_instant(given: Time, what: str) -> datetime:
    """The instant that a user gives, in UTC. In text (ISO 8601) a time without a zone is UTC; a bare date is its midnight UTC.

    Raises:
        InputError: not a date, a datetime without a zone, or a year before 1970 or after 2100.
    """
    if isinstance(given, datetime) and given.tzinfo is None:
        raise InputError(f"{what} {given} has no time zone", advice="Give it one, or write it as text: then it is UTC.")
    instant = _read_text(given, what)
    # With a margin first: near the years 1 and 9999 the other zone has no such time.
    if not 1969 <= instant.year <= 2101 or not 1970 <= instant.astimezone(UTC).year <= 2100:
        raise InputError(f"{what} {str(given)[:40]!r} is outside the years 1970 to 2100")
    return instant.astimezone(UTC)


def _read_text(given: str | date, what: str) -> datetime:
    try:
        text = given.isoformat() if isinstance(given, date) else given
        if not text.isprintable():
            raise ValueError("fromisoformat stops reading at a NUL")
        instant = datetime.fromisoformat(text.strip())
    except (ValueError, AttributeError):
        raise InputError(
            f"{what} {str(given)[:40]!r} is not a date", advice="Write 2024-03-05 or 2024-03-05T14:30:00Z."
        ) from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def parse_range(
    start: Time | None, end: Time | None, *, now: datetime | None = None
) -> tuple[datetime | None, datetime | None]:
    """Start (included) and end (not included) as users give them at every entry point; None where they gave nothing.

    Raises:
        InputError: one is no date, start is not before end, or (with ``now``) start is in the future.
    """
    first = parse_instant(start, "start") if start is not None else None
    last = parse_instant(end, "end") if end is not None else None
    if first is not None and last is not None and first >= last:
        raise InputError(
            f"start {format_instant(first)} is not before end {format_instant(last)}", advice="Swap or widen them."
        )
    if first is not None and now is not None:
        refuse_future(first, now)
    return first, last


def refuse_future(start: datetime, now: datetime) -> None:
    """Raises:
    InputError: ``start`` is not before ``now``."""
    if start >= now:
        raise InputError(f"start {format_instant(start)} is in the future", advice="Give an earlier start.")


def _short(instant: datetime) -> str:
    text = format_instant(instant)
    return text[:10] if text.endswith("T00:00:00Z") else text


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A half-open interval of time: ``start`` included, ``end`` not. Both are aware and in UTC.

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
        """Start in whole seconds since 1970-01-01 UTC, rounded up: a bar open before ``start`` is outside."""
        return -int(-self.start.timestamp() // 1)

    @property
    def end_s(self) -> int:
        """End in whole seconds since 1970-01-01 UTC, rounded up: a bar open just before ``end`` is inside."""
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
        """The common part; None if there is none (adjacent windows have none)."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Window(start, end) if start < end else None

    def __str__(self) -> str:
        """``2024-03-11..2024-03-12``; the time of day is written where it is not midnight UTC."""
        return f"{_short(self.start)}..{_short(self.end)}"
