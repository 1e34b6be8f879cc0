"""The tail tick, the sensor that makes it every five minutes, and the sensor that reconciles Dagster's record with the files.

What is due is `tail.py`'s decision, what has drifted `reconcile.py`'s. No sensor talks to the gateway: the store, the
calendars and Dagster's own runs tell all that is needed. Timeframes with a schedule (`schedules.py`) are left alone here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
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
from ktrdr_pipelines.orchestration.runs.active import ActiveRuns, find_active_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import refresh_calendars

TAIL_INTERVAL_S = 300
RECONCILE_INTERVAL_S = 600
_SHOWN = 5
_AFTER = "after "


@dataclass
class TailTick:
    """What one tick decided.

    ``reasons``: for each timeframe that is not asked for, why, one line each. ``problems``: series that cannot be judged,
    with the reason. ``notices``: what was put right in files made elsewhere. ``attempts``: what was asked for and has not
    arrived, by series name.
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
    """Which runs bring the tails of ``universe`` up to date at ``now``: one per timeframe for all series that are due.

    A series in a run that is still going is left out, and one whose last ``attempts`` brought nothing for a while.
    """
    tick = TailTick()
    tails = Tails(settings, held, now)
    by_timeframe: dict[str, list[Series]] = {}
    for series in universe:
        by_timeframe.setdefault(series.timeframe.name, []).append(series)
    for name in sorted(by_timeframe, key=list(TIMEFRAMES).index):
        _decide_timeframe(name, by_timeframe[name], tails, active, now, attempts or {}, origin, tick)
    tick.notices, held.notices = held.notices, []
    return tick


def _decide_timeframe(
    name: str,
    universe: Sequence[Series],
    tails: Tails,
    active: ActiveRuns,
    now: datetime,
    attempts: dict[str, Attempt],
    origin: str,
    tick: TailTick,
) -> None:
    due: list[Due] = []
    complete: list[Series] = []
    going: set[str] = set()
    waiting: list[Attempt] = []
    unheld = unreadable = 0
    for series in universe:
        try:
            last_held_s = tails.last_held_s(series)
            found = tails.find_due(series, last_held_s) if last_held_s is not None else None
        except KtrdrError as error:
            unreadable += 1
            tick.problems.append(f"{series}: {error}")
            continue
        before = attempts.get(series.name)
        if last_held_s is None:
            unheld += 1
        elif found is None:
            complete.append(series)
        elif run_id := active.find(series):
            going.add(run_id)
            if before is not None:
                tick.attempts[series.name] = before
        elif before is not None and before.last_held_s == last_held_s and now.timestamp() < before.next_at_s:
            waiting.append(before)
            tick.attempts[series.name] = before
        else:
            due.append(found)
            tick.attempts[series.name] = note_attempt(before, found, now)
    slot = int(now.timestamp()) // TAIL_INTERVAL_S
    for run in group_due(due):
        close = format_instant(datetime.fromtimestamp(run.newest_close_s, UTC))
        key = f"tail:{name}:{close}:{slot}"
        tick.requests.append(request_run(run.series, run.first, run.last, Mode.TAIL, origin=origin, run_key=key))
    if due:
        return
    said = []
    if going:
        said.append(f"a run of this timeframe is still going ({', '.join(sorted(going)[:_SHOWN])}), no overlap")
    if waiting:
        at = format_instant(datetime.fromtimestamp(min(a.next_at_s for a in waiting), UTC))
        said.append(f"{max(a.tries for a in waiting)} tries brought nothing, the next one is at {at}")
    if complete:
        said.append(_describe_complete(complete, tails))
    if unheld:
        said.append(f"nothing held yet of {unheld} series, which a first load has to bring")
    if unreadable:
        said.append(f"{unreadable} series cannot be judged, see the log")
    tick.reasons.append(f"{name}: {'; '.join(said)}")


def _describe_complete(complete: Iterable[Series], tails: Tails) -> str:
    nexts = [following for s in complete if (following := tails.find_next(s)) is not None]
    if not nexts:
        return "all have expired and are complete"
    at, is_open = min(nexts)
    return f"market {'open' if is_open else 'closed'} and tail complete until {format_instant(at)}"


def read_cursor(cursor: str | None) -> dict[str, Attempt]:
    """The attempts that the last tick left; none from a cursor that is not ours."""
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
    """The sensor ``tail_fill``: every five minutes one run per timeframe for all series that are due."""
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
        description="Asks for new bars of every series that has a file, as soon as they are complete: one run per timeframe.",
    )
    def tail_fill(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        at = now()
        refresh_calendars(settings.data_dir)
        active = find_active_runs(context.instance, at)
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
    """The sensor ``reconcile``: what the files hold is reported, what they lost is asked for again."""
    reconciler = Reconciler(settings, universe)

    @dg.sensor(
        name="reconcile",
        asset_selection=dg.AssetSelection.all(),
        minimum_interval_seconds=RECONCILE_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Keeps partition status true to the files: reports partitions that are complete and unrecorded, and "
        "asks again for recorded ones that lost bars.",
    )
    def reconcile(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        # Never empty: Dagster keeps the old cursor then, and the round would not begin anew.
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
