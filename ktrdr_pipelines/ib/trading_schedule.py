"""Reads IB's schedule of an instrument: the sessions of a SCHEDULE answer as instants in UTC. Pure.

Instants come as ``20240102-09:30:00`` in the zone that the answer names, each with its session date. The request: `client.py`;
the use: `calendars/ib_schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ktrdr_pipelines.calendars import Session
from ktrdr_pipelines.errors import DataError

_ADVICE = "Nothing was changed: the calendar stays as it is."


def read_schedule(zone: str, rows: Iterable[tuple[str, str, str]]) -> list[Session]:
    """Sessions, oldest first, from rows of start, end and session date, all local to ``zone``. Several rows of one date (a lunch
    break) are the parts of one session.

    Raises:
        DataError: a zone or a time that cannot be read, or a session that ends before it starts.
    """
    try:
        local = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise DataError(f"IB's schedule names an unknown time zone, {zone!r}", advice=_ADVICE) from None
    parts: dict[int, list[tuple[int, int]]] = {}
    for start, end, day in rows:
        try:
            opens, closes = (
                int(datetime.strptime(text, "%Y%m%d-%H:%M:%S").replace(tzinfo=local).timestamp())
                for text in (start, end)
            )
            date_s = int(datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC).timestamp())
        except ValueError:
            raise DataError(
                f"IB's schedule has a session that cannot be read: {start} {end} {day}", advice=_ADVICE
            ) from None
        if opens >= closes:
            raise DataError(f"IB's schedule has a session that ends before it starts: {start} {end}", advice=_ADVICE)
        parts.setdefault(date_s, []).append((opens, closes))
    return [Session(date_s, tuple(sorted(set(spans))), zone) for date_s, spans in sorted(parts.items())]
