"""Corrections of calendars on disk, from IB's schedule: one JSON file per calendar and hours.

They are beside the bars, ``data/calendars/NYSE_regular.json``: a folder of simulated bars has a simulator's corrections. A file
holds only the session dates that differ from the installed calendar. When it is deleted, the installed calendar counts again.
The comparison is in `calendars/ib_schedule.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from ktrdr_pipelines.calendars import CalendarKey, Session, use_corrections
from ktrdr_pipelines.domain.instruments import Hours
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.atomic import Disk, explained, replace_file, state_of
from ktrdr_pipelines.store.sidecar import Instant, Source, Span
from ktrdr_pipelines.store.store import Store

_LOCK_TIMEOUT_S = 10.0


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CorrectedSession(_Model):
    """One session date by IB's schedule: when it trades (``segments``, none if not at all), and the evidence."""

    date: date
    segments: tuple[Span, ...]
    time_zone: str
    symbol: str
    asked_at: Instant
    source: Source

    @property
    def session(self) -> Session:
        """As the package `calendars` uses it."""
        midnight = datetime(self.date.year, self.date.month, self.date.day, tzinfo=UTC)
        spans = tuple((span.window.start_s, span.window.end_s) for span in self.segments)
        return Session(int(midnight.timestamp()), spans, self.time_zone)

    @classmethod
    def of(cls, session: Session, *, symbol: str, asked_at: datetime, source: Source) -> CorrectedSession:
        """From IB's answer for ``symbol``."""
        spans = tuple(
            Span(start=datetime.fromtimestamp(start, UTC), end=datetime.fromtimestamp(end, UTC))
            for start, end in session.segments
        )
        return cls(
            date=datetime.fromtimestamp(session.date_s, UTC).date(),
            segments=spans,
            time_zone=session.zone,
            symbol=symbol,
            asked_at=asked_at,
            source=source,
        )


class _CorrectionsFile(_Model):
    version: Literal[1] = 1
    calendar: str
    hours: Hours
    sessions: tuple[CorrectedSession, ...] = ()


_applied: object = None


def refresh_calendars(data_dir: Path) -> object:
    """Use the calendars of this process as corrected in ``data_dir``; the result changes when the corrections do.

    Cheap when nothing has changed: every entry point calls it before it counts bars.

    Raises:
        StoreError: a file of corrections cannot be read.
    """
    global _applied
    folder = data_dir / "calendars"
    with explained(folder, "reading corrections of calendars"):
        paths = sorted(folder.glob("*.json"))
        seen = tuple((str(path), state_of(path)) for path in paths)
    if seen != _applied:
        kept = read_corrections(data_dir)
        use_corrections({key: tuple(s.session for s in sessions) for key, sessions in kept.items()})
        _applied = seen
    return seen


def open_store(data_dir: Path) -> Store:
    """The store of ``data_dir``, with the calendars as corrected there (`refresh_calendars`)."""
    refresh_calendars(data_dir)
    return Store(data_dir)


def save_corrections(
    data_dir: Path, key: CalendarKey, dates: Iterable[date], found: Sequence[CorrectedSession]
) -> Path:
    """Replace the corrections of ``dates`` of one calendar by ``found``; the file. Those of other dates stay.

    Raises:
        StoreError: the disk refuses, or the file there cannot be read.
    """
    path = _path_of(data_dir, key)
    doing = f"keeping corrections of the calendar {key.name}"
    with explained(path, doing):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
                kept = _read(path).sessions if path.exists() else ()
                settled = set(dates)
                sessions = sorted(
                    [*(s for s in kept if s.date not in settled), *found], key=lambda session: session.date
                )
                content = _CorrectionsFile(calendar=key.name, hours=key.hours, sessions=tuple(sessions))
                replace_file(Disk(), path, [_render(content)])
        except Timeout:
            raise StoreError(
                f"another process has been writing {path} for {_LOCK_TIMEOUT_S:g} s", doing=doing, advice="Try again."
            ) from None
    refresh_calendars(data_dir)
    return path


def read_corrections(data_dir: Path) -> dict[CalendarKey, tuple[CorrectedSession, ...]]:
    """Every correction kept in ``data_dir``. Raises StoreError for a file that cannot be read."""
    files = [_read(path) for path in sorted((data_dir / "calendars").glob("*.json"))]
    return {CalendarKey(file.calendar, file.hours): file.sessions for file in files}


def _path_of(data_dir: Path, key: CalendarKey) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in key.name)
    return data_dir / "calendars" / f"{name}_{key.hours}.json"


def _read(path: Path) -> _CorrectionsFile:
    doing = "reading corrections of calendars"
    with explained(path, doing):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return _CorrectionsFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(
            f"{path} holds no corrections ({where}: {first['msg']})",
            doing=doing,
            advice="Delete it: then the installed calendar counts. `ktrdr calendar SYMBOL --apply` requests IB's schedule again.",
        ) from None


def _render(content: _CorrectionsFile) -> bytes:
    return (json.dumps(content.model_dump(mode="json"), indent=1) + "\n").encode()
