"""IB's schedule against a calendar: the sessions that differ, and the table corrected by them. Pure.

`ib/history.py` requests the schedule, `store/schedule_overrides.py` saves corrections, `services/calendar_check.py` uses both.
IB's SCHEDULE lists real sessions, with holidays and half days (docs/ib_facts.md, 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ktrdr_pipelines.calendars.session_tables import IntArray, SessionTable, local_offsets
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import DataError

Segments = tuple[tuple[int, int], ...]
"""The trading times of one session: start and end (excluded) of each part, epoch seconds, oldest first. Empty: closed."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as IB or a correction describes it. ``date_s``: its date at 00:00 UTC; ``zone``: the exchange's zone,
    whose local midnight the alignment of bars counts from."""

    date_s: int
    segments: Segments
    zone: str


@dataclass(frozen=True, slots=True)
class Difference:
    """One session date on which the calendar and IB's schedule disagree: ``ours`` and ``session`` (IB's)."""

    ours: Segments
    session: Session

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        """The effect of IB's schedule on the calendar."""
        if not self.ours:
            return "added"
        return "changed" if self.session.segments else "removed"

    @property
    def loses_time(self) -> bool:
        """True if the calendar would expect fewer bars than now: two answers must agree on that."""
        covered = self.session.segments
        return not all(any(start <= a and b <= end for start, end in covered) for a, b in self.ours)


def compare(table: SessionTable, schedule: Iterable[Session], span: Window) -> list[Difference]:
    """The differences between ``schedule`` (IB's) and ``table`` for session dates in ``span``, oldest first."""
    theirs = {session.date_s: session for session in schedule}
    ours = _segments_of(table, span)
    zone = next(iter(theirs.values())).zone if theirs else "UTC"
    dates = sorted(date_s for date_s in {*ours, *theirs} if span.start_s <= date_s < span.end_s)
    pairs = ((ours.get(date_s, ()), theirs.get(date_s) or Session(date_s, (), zone)) for date_s in dates)
    return [Difference(mine, session) for mine, session in pairs if mine != session.segments]


def count_sessions(table: SessionTable, span: Window) -> int:
    """How many session dates of ``table`` lie in ``span``."""
    lo, hi = np.searchsorted(table.dates, [span.start_s, span.end_s])
    return int(hi - lo)


def correct(table: SessionTable, corrections: Sequence[Session]) -> SessionTable:
    """``table`` with its sessions replaced by those of ``corrections`` with the same date.

    Raises:
        DataError: the sessions would overlap.
    """
    if not corrections:
        return table
    by_date: Mapping[int, Session] = {session.date_s: session for session in corrections}
    kept = ~np.isin(table.dates, list(by_date))
    kept_segments = kept[table.session_ids]
    new = [s for s in sorted(by_date.values(), key=lambda s: s.date_s) if s.segments]
    parts = [(s.date_s, start, end, s.zone) for s in new for start, end in s.segments]
    dates = np.concatenate([table.dates[kept], _ints(s.date_s for s in new)])
    opens = np.concatenate([table.opens[kept], _ints(s.segments[0][0] for s in new)])
    closes = np.concatenate([table.closes[kept], _ints(s.segments[-1][1] for s in new)])
    by_open = np.argsort(dates, kind="stable")
    starts = np.concatenate([table.starts[kept_segments], _ints(p[1] for p in parts)])
    ends = np.concatenate([table.ends[kept_segments], _ints(p[2] for p in parts)])
    of_date = np.concatenate([table.dates[table.session_ids][kept_segments], _ints(p[0] for p in parts)])
    offsets = np.concatenate(
        [table.offsets[kept_segments], *(local_offsets(_ints([start]), zone) for _, start, _, zone in parts)]
    )
    by_start = np.argsort(starts, kind="stable")
    dates, opens, closes = dates[by_open], opens[by_open], closes[by_open]
    starts, ends, of_date = starts[by_start], ends[by_start], of_date[by_start]
    if (starts >= ends).any() or (ends[:-1] > starts[1:]).any() or (np.diff(of_date) < 0).any():
        raise DataError(
            "the corrected calendar has sessions that overlap",
            advice="IB's schedule divides its sessions in another way than this calendar; nothing was changed.",
        )
    ids = np.searchsorted(dates, of_date).astype(np.int64)
    return SessionTable(dates, opens, closes, starts, ends, ids, offsets[by_start], table.sessions_per_week)


def _segments_of(table: SessionTable, span: Window) -> dict[int, Segments]:
    lo, hi = np.searchsorted(table.dates, [span.start_s, span.end_s])
    first, last = np.searchsorted(table.session_ids, [lo, hi])
    found: dict[int, list[tuple[int, int]]] = {int(date_s): [] for date_s in table.dates[lo:hi]}
    for i in range(int(first), int(last)):
        found[int(table.dates[table.session_ids[i]])].append((int(table.starts[i]), int(table.ends[i])))
    return {date_s: tuple(parts) for date_s, parts in found.items()}


def _ints(values: Iterable[int]) -> IntArray:
    return np.array(list(values), dtype=np.int64)
