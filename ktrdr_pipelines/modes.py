"""What the modes tail, backfill and full mean: from a mode and what is held to the window to load.

Pure. Also how people write times on every door: ISO 8601, start included, end not, a bare date is its midnight UTC, no
end means now. Which bars of the window are missing is decided later, in `plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.plan import longest_back
from ktrdr_pipelines.series import HistoryLimits, Series, Window, format_instant


class Mode(StrEnum):
    """``tail``: from the last held bar to now. ``backfill``: older than the first held bar, one longest request back or to
    the given start. ``full``: every gap between start and now. With no CSV each is a full initialisation."""

    TAIL = "tail"
    BACKFILL = "backfill"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Held:
    """First and last bar open that the store holds of a series."""

    first: datetime
    last: datetime


def parse_instant(text: str, what: str) -> datetime:
    """An instant as a person writes it: ISO 8601; a bare date is its midnight UTC, a time without a zone is UTC.

    Raises:
        InputError: not a date, or a year before 1970 or after 2100.
    """
    try:
        instant = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InputError(f"{what} {text!r} is not a date", advice="Write 2024-03-05 or 2024-03-05T14:30:00Z.") from None
    instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    if not 1970 <= instant.year <= 2100:
        raise InputError(f"{what} {text!r} is outside the years 1970 to 2100")
    return instant


def needs_history_start(mode: Mode, held: Held | None, start: datetime | None) -> bool:
    """True if the window begins at the start of history, which then has to be known."""
    return start is None and (held is None or mode is Mode.FULL)


def resolve_window(
    mode: Mode,
    series: Series,
    held: Held | None,
    *,
    now: datetime,
    start: datetime | None = None,
    end: datetime | None = None,
    history_start: datetime | None = None,
    limits: HistoryLimits = HistoryLimits.CLASSIC,
) -> Window:
    """The window that ``mode`` loads; empty when there is nothing of that kind.

    ``history_start`` is needed exactly when `needs_history_start` says so. An ``end`` in the future is read as now.

    Raises:
        InputError: start is not before end (as given, or as the mode reads them).
    """
    if start is not None and end is not None and start >= end:
        raise InputError(
            f"start {format_instant(start)} is not before end {format_instant(end)}", advice="Swap or widen them."
        )
    until = min(end or now, now)
    if start is not None and start >= now:
        raise InputError(f"start {format_instant(start)} is in the future", advice="Give an earlier start.")
    if start is not None:
        begin = start
    elif held is None or mode is Mode.FULL:
        if history_start is None:
            raise ValueError("the start of history is needed and was not given")
        begin = history_start
    elif mode is Mode.TAIL:
        begin = held.last
    else:
        begin = longest_back(series, int(held.first.timestamp()), limits).start
    if held is not None and mode is Mode.BACKFILL:
        until = min(until, held.first)
    return Window(min(begin, until), until)
