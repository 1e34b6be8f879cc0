"""The sensor ``tail_fill`` requests runs for new bars.

`tail.py` decides what to load. No sensor connects to the gateway: store, calendars and Dagster's
runs are enough. Timeframes with a schedule (`schedules.py`) are not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.orchestration.automation.due import HeldEnds
from ktrdr_pipelines.orchestration.automation.tail import TAIL_INTERVAL_S, decide_tail, read_cursor, write_cursor
from ktrdr_pipelines.orchestration.runs.queries import find_active_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import refresh_calendars


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
