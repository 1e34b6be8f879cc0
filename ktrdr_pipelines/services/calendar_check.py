"""Compare the calendar of an instrument with IB's schedule and correct it, for `ktrdr calendar`.

Requests go through `ib/history.py`, paced and counted like every history request; `calendars/ib_schedule.py` compares,
`store/schedule_overrides.py` saves corrections. A calendar that expects too much costs requests, one that expects too little
loses bars: trading time is removed only if two answers agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Protocol

from ktrdr_pipelines.calendars import (
    CalendarKey,
    Difference,
    Session,
    compare,
    correct,
    count_sessions,
    installed_table,
    session_windows,
    table_of,
)
from ktrdr_pipelines.domain.instruments import Instrument, file_symbol
from ktrdr_pipelines.domain.time import Window, format_instant, parse_range
from ktrdr_pipelines.errors import DataError, InputError, TransientError
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.services.membership import name_instrument
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import CorrectedSession, refresh_calendars, save_corrections
from ktrdr_pipelines.store.sidecar import Source

DAYS_BACK = 365
"""How far back to compare by default, and the longest request (IB takes at most 365 D)."""

MOST_DIFFERENT = 0.2
"""If a larger part of the sessions differs, it is another calendar, not a correction; five may always differ."""

_DAY = timedelta(days=1)


class ScheduleSource(Protocol):
    """A source of schedules: `IBHistory`, or a fake."""

    def fetch_schedule(self, instrument: Instrument, *, end: datetime, days: int) -> list[Session]:
        """Sessions up to ``end``, oldest first; about ``days`` of them."""


@dataclass(frozen=True, slots=True)
class CalendarCheck:
    """The result of one comparison. ``span``: from IB's first session date to after its last one. ``unconfirmed`` differences
    would remove trading time and were not repeated by a second answer: they are not applied."""

    instrument: Instrument
    key: CalendarKey
    span: Window
    sessions: int
    differences: Sequence[Difference]
    unconfirmed: Sequence[Difference]
    requests: int = 0
    file: Path | None = None
    """The file of the corrections; None if they were not applied."""
    notices: Sequence[str] = ()
    in_force: frozenset[int] = frozenset()
    """Session dates (epoch seconds) of ``differences`` that an earlier correction contains already."""
    outdated: Sequence[Difference] = ()
    """Earlier corrections that IB's schedule no longer has. Applying removes them."""

    def pending(self) -> list[Difference]:
        """The differences that are not corrected yet."""
        return [d for d in self.differences if d.session.date_s not in self.in_force]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; instants in ISO 8601 UTC."""
        return {
            "symbol": self.instrument.symbol,
            "calendar": self.key.name,
            "hours": str(self.key.hours),
            "start": format_instant(self.span.start),
            "end": format_instant(self.span.end),
            "sessions": self.sessions,
            "requests": self.requests,
            "differences": [
                _as_dict(d, confirmed=confirmed)
                | {"applied": self.file is not None or d.session.date_s in self.in_force}
                for confirmed, found in ((True, self.differences), (False, self.unconfirmed))
                for d in found
            ],
            "outdated": [_as_dict(d, confirmed=True) for d in self.outdated],
            "file": str(self.file) if self.file else None,
            "notices": list(self.notices),
        }


def check_calendar(
    symbol: str,
    *,
    start: str | None = None,
    end: str | None = None,
    apply: bool = False,
    settings: Settings | None = None,
) -> CalendarCheck:
    """Compare the calendar of ``symbol`` with IB's schedule from ``start`` to ``end`` (ISO 8601; default: the last year). With
    ``apply``, use IB's schedule instead of the built-in calendar, for every series of that calendar.

    Raises:
        KtrdrError: invalid input, IB failed, or its schedule is another calendar.
    """
    now = datetime.now(UTC)
    file_symbol(symbol)
    first, last = parse_range(start, end, now=now)
    window = Window(first or now - timedelta(days=DAYS_BACK), min(last or now, now))
    if window.is_empty:
        raise InputError(f"the window {window} is empty", advice="Choose a start before the end, and both in the past.")
    settings = settings or load_settings()
    instrument = name_instrument(symbol, settings)
    if instrument.sec_type == "CONTFUT":
        raise InputError(
            f"IB has no past schedule of continuous futures such as {instrument.symbol}",
            advice=f"Compare a contract of it, such as {_name_contract(instrument, now)}: they share a calendar.",
        )
    refresh_calendars(settings.data_dir)
    with IBHistory(GatewayAddress.of(settings)) as history:
        check = compare_with_ib(history, history.pin(instrument), window, now=now)
        if apply:
            check = replace(check, file=_save(check, settings.data_dir, source=history.source, now=now))
        return replace(check, requests=history.costs.requests)


def compare_with_ib(history: ScheduleSource, instrument: Instrument, window: Window, *, now: datetime) -> CalendarCheck:
    """Request the schedule of ``instrument`` (pinned) in ``window`` and compare; nothing is saved.

    Raises:
        KtrdrError: IB failed, or its schedule is another calendar.
    """
    key = CalendarKey.of(instrument)
    table = installed_table(instrument)
    theirs, notices = fetch_sessions(history, instrument, window)
    dates = [session.date_s for session in theirs]
    span = Window.from_epoch(max(dates[0], window.start_s - window.start_s % 86400), dates[-1] + 86400)
    found = compare(table, theirs, span)
    sessions = count_sessions(table, span)
    _refuse_another_calendar(found, sessions, key, instrument)
    unconfirmed = _find_unconfirmed(history, instrument, found, now)
    confirmed = [d for d in found if d not in unconfirmed]
    correct(table, [d.session for d in confirmed])  # raises if sessions overlap
    still = {d.session.date_s: d for d in compare(table_of(instrument), theirs, span)}
    differing = {d.session.date_s for d in found}
    return CalendarCheck(
        instrument, key, span, sessions, confirmed, unconfirmed, notices=notices,
        in_force=frozenset(differing - set(still)),
        outdated=[d for date_s, d in still.items() if date_s not in differing],
    )  # fmt: skip


def _name_contract(instrument: Instrument, now: datetime) -> str:
    """The next contract of a quarter: ``ESH7`` in December 2026."""
    letter, year = next((("HMUZ"[i], now.year) for i in range(4) if 3 * (i + 1) > now.month), ("H", now.year + 1))
    return f"{instrument.ib_symbol or instrument.symbol}{letter}{year % 10}"


def _save(check: CalendarCheck, data_dir: Path, *, source: Source, now: datetime) -> Path:
    rows = [
        CorrectedSession.of(d.session, symbol=check.instrument.symbol, asked_at=now, source=source)
        for d in check.differences
    ]
    unconfirmed = {_date(d.session) for d in check.unconfirmed}
    return save_corrections(data_dir, check.key, _dates_in(check.span) - unconfirmed, rows)


def fetch_sessions(history: ScheduleSource, instrument: Instrument, window: Window) -> tuple[list[Session], list[str]]:
    """IB's sessions in ``window``, oldest first, and notices. Goes back request by request, from the oldest session received.

    Raises:
        TransientError: no sessions came. DataError: two answers contradict each other. KtrdrError: IB failed.
    """
    found: dict[int, Session] = {}
    until = window.end
    while True:
        days = min(DAYS_BACK, -(-(until - window.start) // _DAY) + 1)
        answer = history.fetch_schedule(instrument, end=until, days=days)
        new = [session for session in answer if session.date_s not in found]
        for session in answer:
            if session.segments and found.setdefault(session.date_s, session) != session:
                raise DataError(
                    f"two answers of IB's schedule contradict each other on {_date(session)}",
                    doing=f"requesting the schedule of {instrument.symbol}",
                    advice="Try again; nothing was changed.",
                )
        sessions = [found[date_s] for date_s in sorted(found)]
        if not sessions:
            raise TransientError(
                "IB sent a schedule without a session",
                doing=f"requesting the schedule of {instrument.symbol} {window}",
                advice="That is no evidence of a closed market; try again.",
            )
        oldest = datetime.fromtimestamp(sessions[0].segments[0][0], UTC)
        reached = sessions[0].date_s <= window.start_s or not session_windows(instrument, Window(window.start, oldest))
        if reached or not new or oldest >= until:
            notices = [] if reached else [f"IB's schedule reaches back to {_date(sessions[0])} only"]
            return sessions, notices
        until = oldest


def _find_unconfirmed(
    history: ScheduleSource, instrument: Instrument, found: Sequence[Difference], now: datetime
) -> list[Difference]:
    """The differences that remove trading time and that a second, differently shaped request does not repeat."""
    doubtful = [d for d in found if d.loses_time]
    unconfirmed: list[Difference] = []
    while doubtful:
        last = datetime.fromtimestamp(doubtful[-1].session.date_s, UTC)
        # Sessions around the doubtful ones: a shorter request than the first, with a later end, of at most a year.
        batch = [d for d in doubtful if d.session.date_s > (last - timedelta(days=DAYS_BACK - 30)).timestamp()]
        first = datetime.fromtimestamp(batch[0].session.date_s, UTC)
        end = min(last + timedelta(days=9, hours=12), now)
        answer = history.fetch_schedule(instrument, end=end, days=(end - first) // _DAY + 10)
        again = {session.date_s: session for session in answer}
        for difference in batch:
            date_s = difference.session.date_s
            is_spanned = bool(again) and min(again) < date_s and (date_s < max(again) or date_s in again)
            repeated = again.get(date_s) or Session(date_s, (), difference.session.zone)
            if not is_spanned or repeated.segments != difference.session.segments:
                unconfirmed.append(difference)
        doubtful = [d for d in doubtful if d not in batch]
    return unconfirmed


def _refuse_another_calendar(
    found: Sequence[Difference], sessions: int, key: CalendarKey, instrument: Instrument
) -> None:
    if len(found) > max(5, sessions * MOST_DIFFERENT):
        raise DataError(
            f"IB's schedule of {instrument.symbol} and the calendar {key.name} differ in {len(found)} of {sessions} sessions",
            rows="\n".join(describe_difference(d) for d in found[:5]),
            doing=f"comparing the calendar of {instrument.symbol}",
            advice="That is another calendar: name the right one with `calendar:` in the universe file.",
        )


def describe_difference(difference: Difference) -> str:
    """``2025-01-09: 09 14:30..21:00 by the calendar, closed by IB``."""
    ours, theirs = _describe_segments(difference.ours), _describe_segments(difference.session.segments)
    return f"{_date(difference.session)}: {ours} by the calendar, {theirs} by IB"


def _describe_segments(segments: Iterable[tuple[int, int]]) -> str:
    parts = [f"{datetime.fromtimestamp(a, UTC):%d %H:%M}..{datetime.fromtimestamp(b, UTC):%H:%M}" for a, b in segments]
    return " and ".join(parts) or "closed"


def _as_dict(difference: Difference, *, confirmed: bool) -> dict[str, object]:
    def spans(segments: Iterable[tuple[int, int]]) -> list[dict[str, str]]:
        return [
            {
                "start": format_instant(datetime.fromtimestamp(a, UTC)),
                "end": format_instant(datetime.fromtimestamp(b, UTC)),
            }
            for a, b in segments
        ]

    return {
        "date": str(_date(difference.session)),
        "kind": difference.kind,
        "calendar": spans(difference.ours),
        "ib": spans(difference.session.segments),
        "confirmed": confirmed,
    }


def _date(session: Session) -> date:
    return datetime.fromtimestamp(session.date_s, UTC).date()


def _dates_in(span: Window) -> set[date]:
    return {(span.start + i * _DAY).date() for i in range(-(-(span.end - span.start) // _DAY))}
