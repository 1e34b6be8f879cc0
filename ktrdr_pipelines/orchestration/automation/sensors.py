"""The sensors: ``tail_fill`` requests runs for new bars, ``reconcile`` keeps partition status equal to the files.

`tail.py` decides what is due, `reconcile.py` what differs. No sensor connects to the gateway: store, calendars and Dagster's
runs are enough. Timeframes with a schedule (`schedules.py`) are not handled here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.orchestration.automation.reconcile import Reconciler
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.automation.tail import Attempt, Due, HeldEnds, Tails, group_due, note_attempt
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns, find_active_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import refresh_calendars

TAIL_INTERVAL_S = 300
RECONCILE_INTERVAL_S = 600
_SHOWN = 5
_AFTER = "after "


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


def make_tail_sensor(
    settings: Settings, universe: Sequence[Series], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dg.SensorDefinition:
    """The sensor ``tail_fill``: every five minutes one run per timeframe, for all series that are due."""
    held = HeldEnds(settings.data_dir)
    mine = [s for s in universe if s.timeframe.name not in settings.tail_schedules]
    scheduled = [
        f"{name}: on a schedule ({cron})"
        for name, cron in settings.tail_schedules.items()
        if any(s.timeframe.name == name for s in universe)
    ]

    @dg.sensor(
        name="tail_fill",
        asset_selection=dg.AssetSelection.all(),
        minimum_interval_seconds=TAIL_INTERVAL_S,
        default_status=(dg.DefaultSensorStatus.RUNNING if settings.tail_sensor else dg.DefaultSensorStatus.STOPPED),
        description="Loads new bars of every series that has a file, as soon as they are complete: one run per timeframe.",
    )
    def tail_fill(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        at = now()
        refresh_calendars(settings.data_dir)
        active = find_active_runs(context.instance)
        tick = decide_tail(settings, mine, held, active, at, attempts=read_cursor(context.cursor))
        for problem in [*tick.problems, *tick.notices]:
            context.log.warning(problem)
        reasons = [*tick.reasons, *scheduled]
        if tick.requests and reasons:
            context.log.info("\n".join(reasons))
        return dg.SensorResult(
            run_requests=tick.requests,
            skip_reason=None if tick.requests else "\n".join(reasons) or "the universe is empty",
            cursor=write_cursor(tick.attempts),
        )

    return tail_fill


def make_reconcile_sensor(
    settings: Settings, universe: Sequence[Series], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dg.SensorDefinition:
    """The sensor ``reconcile``: partitions that files have are reported, bars that files lost are loaded again."""
    reconciler = Reconciler(settings, universe)

    @dg.sensor(
        name="reconcile",
        asset_selection=dg.AssetSelection.all(),
        minimum_interval_seconds=RECONCILE_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Keeps partition status equal to the files: reports partitions that are complete and not recorded, and "
        "loads recorded ones again that lost bars.",
    )
    def reconcile(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        # Never empty: with an empty cursor Dagster keeps the old one, and the next round would not begin.
        tick = reconciler.run_tick(context.instance, (context.cursor or "").removeprefix(_AFTER), now())
        for problem in tick.problems:
            context.log.warning(problem)
        for notice in tick.notices:
            context.log.info(notice)
        return dg.SensorResult(
            run_requests=tick.requests,
            skip_reason=None if tick.requests else tick.describe(),
            cursor=_AFTER + tick.cursor,
        )

    return reconcile
