"""Decides which runs a tick of the tail sensor or of a schedule requests: series that are due, in one run per timeframe.

One run for all series of a timeframe, because a run costs five seconds and a further series in it 50 ms (docs/dagster_facts.md,
3 and 6). Left out are series in unfinished runs, those that cost more than KTRDR_AUTO_REQUESTS requests, bars whose load a
user cancelled and, for a growing while, series whose last requests brought nothing. Which bars are due: `due.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.orchestration.automation.cancelled import CancelledRanges
from ktrdr_pipelines.orchestration.automation.due import Due, HeldEnds, Tails
from ktrdr_pipelines.orchestration.automation.request_cost import command_for
from ktrdr_pipelines.orchestration.automation.run_requests import MAX_PARTITIONS, request_run
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.orchestration.runs.tags import Origin
from ktrdr_pipelines.settings import Settings

TAIL_INTERVAL_S = 300
"""Seconds between two ticks of the sensor."""

TICK_BUDGET_S = 25.0
"""After this a tick looks at no further series, and the next one begins with them; Dagster's time-out is 60 s."""

MAX_RUNS = 20
"""Runs in one tick: each takes the daemon about a second (docs/dagster_facts.md, 4). The rest is due in the next tick."""

FIRST_WAIT_S, LONGEST_WAIT_S = 300, 1800
"""After a request that brought nothing the same bar is requested again this much later, with the wait doubled each time."""

STANDSTILL_S, STANDSTILL_WAIT_S, STANDSTILL_TRIES = 5 * 86400, 6 * 3600, 20
"""A series without a new bar for so long, after so many requests, is halted or delisted: four requests a day notice when it
trades again. Without newer bars its missing ones are not confirmed absent, so it stays due."""

_JITTER_S = 60  # ticks come a little early or late
_SHOWN = 3


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

    ``reasons``: for each timeframe, why not all of its series are in a run. ``problems``: series that cannot be read, with the
    reason. ``notices``: corrections of files made by other programs. ``attempts``: requested bars that have not arrived, by
    series name. ``continue_at``: the series at which the next tick begins, because the time was up; empty: with the first one.
    """

    requests: list[dg.RunRequest] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    continue_at: str = ""


NOTHING_CANCELLED = CancelledRanges()


@dataclass(frozen=True)
class Tried:
    """What earlier ticks left: see `TailTick`."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    continue_at: str = ""


def decide_tail(
    settings: Settings,
    universe: Sequence[Series],
    held: HeldEnds,
    active: ActiveRuns,
    now: datetime,
    *,
    cancelled: CancelledRanges = NOTHING_CANCELLED,
    tried: Tried | None = None,
    origin: Origin = Origin.SENSOR,
    clock: Callable[[], float] = time.monotonic,
) -> TailTick:
    """The runs that load the missing newest bars of ``universe`` at ``now``: one per timeframe, for all series that are due.

    ``tried`` of earlier ticks delays what brought nothing; a schedule has none.
    """
    tick = TailTick()
    judge = _Judge(Tails(settings, held, now), active, now, settings.auto_requests, cancelled, tried or Tried(), tick)
    until = clock() + TICK_BUDGET_S
    found: dict[str, _Found] = {}
    order = _begin_at(universe, judge.tried.continue_at)
    for n, series in enumerate(order):
        if n and clock() > until:
            tick.continue_at = series.name
            tick.attempts |= {s.name: judge.tried.attempts[s.name] for s in order[n:] if s.name in judge.tried.attempts}
            break
        judge.judge(series, found.setdefault(series.timeframe.name, _Found()))
    for name in sorted(found, key=list(TIMEFRAMES).index):
        requested = _request_runs(name, found[name].due, now, origin, MAX_RUNS - len(tick.requests))
        tick.requests += [request for request, _ in requested]
        for due in (due for _, run in requested for due in run.due):
            tick.attempts[due.series.name] = note_attempt(judge.tried.attempts.get(due.series.name), due, now)
        if reason := found[name].describe(judge.tails, is_requested=bool(found[name].due)):
            tick.reasons.append(f"{name}: {reason}")
    if tick.continue_at:
        tick.reasons.append(f"the time of a tick is up; the next one begins with {tick.continue_at}")
    tick.notices, held.notices = held.notices, []
    return tick


def _begin_at(universe: Sequence[Series], name: str) -> list[Series]:
    """All of ``universe``, sorted, the series ``name`` first and those before it last."""
    series = sorted(universe, key=lambda s: s.name)
    return [*(s for s in series if s.name >= name), *(s for s in series if s.name < name)]


@dataclass
class _Found:
    """The series of one timeframe, by what is to be done."""

    due: list[Due] = field(default_factory=list)
    too_many: list[Due] = field(default_factory=list)
    cancelled: list[Due] = field(default_factory=list)
    complete: list[Series] = field(default_factory=list)
    waiting: list[Attempt] = field(default_factory=list)
    run_ids: set[str] = field(default_factory=set)
    never_loaded: int = 0
    unreadable: int = 0

    def describe(self, tails: Tails, *, is_requested: bool) -> str:
        """Why series are in no run; where a run is requested only what needs the user."""
        reasons = [*self._describe_too_many(), *self._describe_cancelled()]
        if is_requested:
            return "; ".join(reasons)
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

    def _describe_too_many(self) -> list[str]:
        texts = [
            f"{due.series} has no bars after {_at(due.last_held_s)}, which is {due.cost}, more than KTRDR_AUTO_REQUESTS "
            f"allows: load them with `{command_for(due.series, Mode.TAIL)}`"
            for due in self.too_many[:_SHOWN]
        ]
        return [*texts, *_count_rest(self.too_many, "are as far behind")]

    def _describe_cancelled(self) -> list[str]:
        texts = [
            f"the load of {due.series} after {_at(due.last_held_s)} was cancelled: go on with "
            f"`{command_for(due.series, Mode.TAIL)}`"
            for due in self.cancelled[:_SHOWN]
        ]
        return [*texts, *_count_rest(self.cancelled, "were cancelled")]


def _at(epoch_s: int) -> str:
    return format_instant(datetime.fromtimestamp(epoch_s, UTC))


def _count_rest(found: Sequence[Due], what: str) -> list[str]:
    return [f"{len(found) - _SHOWN} more series {what}"] if len(found) > _SHOWN else []


@dataclass
class _Judge:
    """What all series of a tick are judged by."""

    tails: Tails
    active: ActiveRuns
    now: datetime
    most: int
    cancelled: CancelledRanges
    tried: Tried
    tick: TailTick

    def judge(self, series: Series, found: _Found) -> None:
        """Add ``series`` to ``found``."""
        try:
            last_held_s = self.tails.last_held_s(series)
            due = None
            if last_held_s is not None:
                due = self.tails.find_due(series, last_held_s, self.cancelled.find(series.name))
        except KtrdrError as error:
            found.unreadable += 1
            self.tick.problems.append(f"{series}: {error}")
            return
        if last_held_s is None:
            found.never_loaded += 1
        elif due is None:
            found.complete.append(series)
        else:
            self._sort_in(due, found)

    def _sort_in(self, due: Due, found: _Found) -> None:
        """``due`` is requested now, later, or by the user."""
        if due.cancelled:
            found.cancelled.append(due)
        if not due.cost.requests:
            return
        before = self.tried.attempts.get(due.series.name)
        if run_id := self.active.find(due.series):
            found.run_ids.add(run_id)
            self._keep(due, before)
        elif due.cost.requests > self.most:
            found.too_many.append(due)
        elif before is not None and before.last_held_s == due.last_held_s and self.now.timestamp() < before.next_at_s:
            found.waiting.append(before)
            self._keep(due, before)
        else:
            found.due.append(due)

    def _keep(self, due: Due, before: Attempt | None) -> None:
        if before is not None:
            self.tick.attempts[due.series.name] = before


def _request_runs(
    name: str, due: Sequence[Due], now: datetime, origin: Origin, most: int
) -> list[tuple[dg.RunRequest, TailRun]]:
    slot = int(now.timestamp()) // TAIL_INTERVAL_S
    requests = []
    for run in group_due(due)[: max(most, 0)]:
        key = f"tail:{name}:{_at(run.newest_close_s)}:{slot}"
        series = [due.series for due in run.due]
        request = request_run(
            series, run.first, run.last, Mode.TAIL, origin=origin, run_key=key, start=run.due[0].start
        )
        requests.append((request, run))
    return requests


def _describe_complete(complete: Iterable[Series], tails: Tails) -> str:
    nexts = [following for s in complete if (following := tails.find_next(s)) is not None]
    if not nexts:
        return "all have expired and are complete"
    at, is_open = min(nexts)
    return f"market {'open' if is_open else 'closed'} and tail complete until {format_instant(at)}"


# -- runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TailRun:
    """One run: ``due`` series of one timeframe and one start, oldest first, the partitions from ``first`` to ``last``."""

    due: tuple[Due, ...]
    first: Partition
    last: Partition

    @property
    def newest_close_s(self) -> int:
        return max(due.newest_close_s for due in self.due)


def group_due(due: Sequence[Due], most: int = MAX_PARTITIONS) -> list[TailRun]:
    """The runs for ``due``, all of one timeframe: as few as possible with at most ``most`` partitions × series each (a single
    series may have more), and one start. The most recent first."""
    runs = []
    for start in sorted({d.start for d in due}, key=lambda s: (s is not None, s)):
        runs += _group_alike([d for d in due if d.start == start], most)
    return sorted(runs, key=lambda run: run.first.window.start, reverse=True)


def _group_alike(due: Sequence[Due], most: int) -> list[TailRun]:
    span = Window(min(d.first.window.start for d in due), max(d.last.window.end for d in due))
    grid = {p.window.start: i for i, p in enumerate(partitions_in(due[0].series.timeframe, span))}
    groups: list[list[Due]] = []
    newest = 0
    for item in sorted(due, key=lambda d: (d.first.window.start, str(d.series)), reverse=True):
        newest = max(newest, grid[item.last.window.start])
        if not groups or (newest - grid[item.first.window.start] + 1) * (len(groups[-1]) + 1) > most:
            groups.append([])
            newest = grid[item.last.window.start]
        groups[-1].append(item)
    return [_make_run(mine) for mine in groups]


def _make_run(mine: Sequence[Due]) -> TailRun:
    return TailRun(
        tuple(reversed(mine)),
        min((d.first for d in mine), key=lambda p: p.window.start),
        max((d.last for d in mine), key=lambda p: p.window.start),
    )


# -- the cursor -----------------------------------------------------------------------------------------------------------


def read_cursor(cursor: str | None) -> Tried:
    """What the last tick left; nothing if the cursor is not ours."""
    try:
        found = json.loads(cursor or "{}")
        attempts = found["attempts"].items()
        attempts = {str(name): Attempt(*(int(number) for number in values)) for name, values in attempts}
        return Tried(attempts, str(found["continue_at"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Tried()


def write_cursor(tick: TailTick) -> str:
    """What ``tick`` leaves to the next one."""
    attempts = {name: [a.last_held_s, a.tries, a.asked_at_s] for name, a in sorted(tick.attempts.items())}
    return json.dumps({"attempts": attempts, "continue_at": tick.continue_at})
