"""Decides which runs a tick of the tail sensor or of a schedule requests: series that are due, in one run per timeframe.

One run for all series of a timeframe, because a run costs five seconds and a further series in it 50 ms (docs/dagster_facts.md,
3 and 6). Left out are series in unfinished runs and, for a growing while, series whose last requests brought nothing. Which
bars are due: `due.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.orchestration.automation.due import Due, HeldEnds, Tails
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.settings import Settings

TAIL_INTERVAL_S = 300
"""Seconds between two ticks of the sensor."""

MAX_UNNEEDED = 2_000
"""Partitions of series that do not need them, in one run. Dagster writes an event of about 10 ms for each partition of each
series of a run before it starts, so one series that is years behind must not slow the others down."""

FIRST_WAIT_S, LONGEST_WAIT_S = 300, 1800
"""After a request that brought nothing the same bar is requested again this much later, with the wait doubled each time."""

STANDSTILL_S, STANDSTILL_WAIT_S, STANDSTILL_TRIES = 5 * 86400, 6 * 3600, 20
"""A series without a new bar for so long, after so many requests, is halted or delisted: four requests a day notice when it
trades again. Without newer bars its missing ones are not confirmed absent, so it stays due."""

_JITTER_S = 60  # ticks come a little early or late
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Attempt:
    """``tries`` requests for the bars after ``last_held_s``, the latest at ``asked_at_s``, brought no bar yet."""

    last_held_s: int
    tries: int
    asked_at_s: int

    @property
    def next_at_s(self) -> int:
        """When the next request may be sent."""
        wait_s = min(FIRST_WAIT_S << min(self.tries - 1, 10), LONGEST_WAIT_S)
        if self.tries > STANDSTILL_TRIES and self.asked_at_s - self.last_held_s > STANDSTILL_S:
            wait_s = STANDSTILL_WAIT_S
        return self.asked_at_s + wait_s - _JITTER_S


def note_attempt(before: Attempt | None, due: Due, now: datetime) -> Attempt:
    """The attempt that begins now: one more than ``before`` if no bar has arrived since, else the first."""
    tries = before.tries if before is not None and before.last_held_s == due.last_held_s else 0
    return Attempt(due.last_held_s, tries + 1, int(now.timestamp()))


@dataclass
class TailTick:
    """What one tick decided.

    ``reasons``: one line for each timeframe without a run. ``problems``: series that cannot be read, with the reason.
    ``notices``: corrections of files made by other programs. ``attempts``: requested bars that have not arrived, by series name.
    """

    requests: list[dg.RunRequest] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    attempts: dict[str, Attempt] = field(default_factory=dict)


def decide_tail(
    settings: Settings,
    universe: Sequence[Series],
    held: HeldEnds,
    active: ActiveRuns,
    now: datetime,
    *,
    attempts: dict[str, Attempt] | None = None,
    origin: str = "sensor",
) -> TailTick:
    """The runs that load the missing newest bars of ``universe`` at ``now``: one per timeframe, for all series that are due.

    Left out: a series in an unfinished run, and for a while a series whose last ``attempts`` brought nothing.
    """
    tick = TailTick()
    tails = Tails(settings, held, now)
    by_timeframe: dict[str, list[Series]] = {}
    for series in universe:
        by_timeframe.setdefault(series.timeframe.name, []).append(series)
    for name in sorted(by_timeframe, key=list(TIMEFRAMES).index):
        found = _Found()
        for series in by_timeframe[name]:
            _judge(series, tails, active, now, (attempts or {}).get(series.name), found, tick)
        tick.requests += _request_runs(name, found.due, now, origin)
        if not found.due:
            tick.reasons.append(f"{name}: {found.describe(tails)}")
    tick.notices, held.notices = held.notices, []
    return tick


@dataclass
class _Found:
    """The series of one timeframe, by what is to be done."""

    due: list[Due] = field(default_factory=list)
    complete: list[Series] = field(default_factory=list)
    waiting: list[Attempt] = field(default_factory=list)
    run_ids: set[str] = field(default_factory=set)
    never_loaded: int = 0
    unreadable: int = 0

    def describe(self, tails: Tails) -> str:
        """Why no run is requested."""
        reasons = []
        if self.run_ids:
            reasons.append(f"in an unfinished run ({', '.join(sorted(self.run_ids)[:_SHOWN])})")
        if self.waiting:
            at = format_instant(datetime.fromtimestamp(min(a.next_at_s for a in self.waiting), UTC))
            reasons.append(f"{max(a.tries for a in self.waiting)} requests brought nothing, the next one is at {at}")
        if self.complete:
            reasons.append(_describe_complete(self.complete, tails))
        if self.never_loaded:
            reasons.append(f"{self.never_loaded} series need a first load")
        if self.unreadable:
            reasons.append(f"{self.unreadable} series cannot be read, see the log")
        return "; ".join(reasons)


def _judge(
    series: Series,
    tails: Tails,
    active: ActiveRuns,
    now: datetime,
    before: Attempt | None,
    found: _Found,
    tick: TailTick,
) -> None:
    """Add ``series`` to ``found``, and its attempt, if bars are still missing, to ``tick``."""
    try:
        last_held_s = tails.last_held_s(series)
        due = tails.find_due(series, last_held_s) if last_held_s is not None else None
    except KtrdrError as error:
        found.unreadable += 1
        tick.problems.append(f"{series}: {error}")
        return
    if last_held_s is None:
        found.never_loaded += 1
    elif due is None:
        found.complete.append(series)
    elif run_id := active.find(series):
        found.run_ids.add(run_id)
        if before is not None:
            tick.attempts[series.name] = before
    elif before is not None and before.last_held_s == last_held_s and now.timestamp() < before.next_at_s:
        found.waiting.append(before)
        tick.attempts[series.name] = before
    else:
        found.due.append(due)
        tick.attempts[series.name] = note_attempt(before, due, now)


def _request_runs(name: str, due: Sequence[Due], now: datetime, origin: str) -> Iterator[dg.RunRequest]:
    slot = int(now.timestamp()) // TAIL_INTERVAL_S
    for run in group_due(due):
        close = format_instant(datetime.fromtimestamp(run.newest_close_s, UTC))
        key = f"tail:{name}:{close}:{slot}"
        yield request_run(run.series, run.first, run.last, Mode.TAIL, origin=origin, run_key=key)


def _describe_complete(complete: Iterable[Series], tails: Tails) -> str:
    nexts = [following for s in complete if (following := tails.find_next(s)) is not None]
    if not nexts:
        return "all have expired and are complete"
    at, is_open = min(nexts)
    return f"market {'open' if is_open else 'closed'} and tail complete until {format_instant(at)}"


# -- runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TailRun:
    """One run: ``series`` of one timeframe, the partitions from ``first`` to ``last``."""

    series: tuple[Series, ...]
    first: Partition
    last: Partition
    newest_close_s: int


def group_due(due: Sequence[Due], max_unneeded: int = MAX_UNNEEDED) -> list[TailRun]:
    """The runs for ``due``, all of one timeframe: one, unless some series are so far behind that the run would plan more than
    ``max_unneeded`` partitions of series that do not need them. The most recent first."""
    if not due:
        return []
    span = Window(min(d.first.window.start for d in due), max(d.last.window.end for d in due))
    grid = {p.window.start: i for i, p in enumerate(partitions_in(due[0].series.timeframe, span))}
    runs: list[TailRun] = []
    mine: list[Due] = []
    hi = needed = 0
    for item in sorted(due, key=lambda d: (d.first.window.start, str(d.series)), reverse=True):
        i, j = grid[item.first.window.start], grid[item.last.window.start]
        unneeded = (max(hi, j) - i + 1) * (len(mine) + 1) - (needed + j - i + 1)
        if mine and unneeded > max_unneeded:
            runs.append(_make_run(mine))
            mine, hi, needed = [], 0, 0
        mine.append(item)
        hi, needed = max(hi, j), needed + j - i + 1
    return [*runs, _make_run(mine)]


def _make_run(mine: Sequence[Due]) -> TailRun:
    return TailRun(
        tuple(d.series for d in reversed(mine)),
        min((d.first for d in mine), key=lambda p: p.window.start),
        max((d.last for d in mine), key=lambda p: p.window.start),
        max(d.newest_close_s for d in mine),
    )


# -- the cursor -----------------------------------------------------------------------------------------------------------


def read_cursor(cursor: str | None) -> dict[str, Attempt]:
    """The attempts of the last tick; none if the cursor is not ours."""
    try:
        found = json.loads(cursor or "{}")
        return {str(name): Attempt(*(int(number) for number in values)) for name, values in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def write_cursor(attempts: dict[str, Attempt]) -> str:
    """``attempts`` for the next tick."""
    return json.dumps({name: [a.last_held_s, a.tries, a.asked_at_s] for name, a in sorted(attempts.items())})
