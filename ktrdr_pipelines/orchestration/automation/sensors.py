"""The sensors that load: ``tail_fill`` requests runs for new bars, ``gap_fill`` for inner gaps.

`tail.py` and `gap_fill.py` decide what to load. No sensor connects to the gateway: store, calendars
and Dagster's runs are enough. The tails of timeframes with a schedule (`schedules.py`) are not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.orchestration.automation import gap_fill as gaps
from ktrdr_pipelines.orchestration.automation.cancelled import read_cancelled
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
        tick = decide_tail(
            settings,
            mine,
            held,
            find_active_runs(context.instance),
            at,
            cancelled=read_cancelled(context.instance, at),
            tried=read_cursor(context.cursor),
        )
        for problem in [*tick.problems, *tick.notices]:
            context.log.warning(problem)
        reasons = [*tick.reasons, *scheduled]
        if tick.requests and reasons:
            context.log.info("\n".join(reasons))
        return dg.SensorResult(
            run_requests=tick.requests,
            skip_reason=None if tick.requests else "\n".join(reasons) or "the universe is empty",
            cursor=write_cursor(tick),
        )

    return tail_fill


def make_gap_sensor(
    settings: Settings, universe: Sequence[Series], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dg.SensorDefinition:
    """The sensor ``gap_fill``: every ten minutes runs for the newest inner gaps, if its last ones have ended."""
    filler = gaps.GapFiller(settings, universe)

    @dg.sensor(
        name="gap_fill",
        asset_selection=dg.AssetSelection.all(),
        minimum_interval_seconds=gaps.GAP_INTERVAL_S,
        default_status=(dg.DefaultSensorStatus.RUNNING if settings.gap_sensor else dg.DefaultSensorStatus.STOPPED),
        description="Loads gaps inside of what is held (adopted files, failed windows, lost lines), the newest first.",
    )
    def fill(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        at = now()
        tick = filler.run_tick(
            context.instance,
            find_active_runs(context.instance),
            read_cancelled(context.instance, at),
            gaps.GapState.from_cursor(context.cursor),
            at,
            corrections=refresh_calendars(settings.data_dir),
        )
        for problem in [*tick.problems, *tick.notices]:
            context.log.warning(problem)
        if tick.requests and tick.reasons:
            context.log.info("\n".join(tick.reasons))
        return dg.SensorResult(
            run_requests=tick.requests,
            skip_reason=None if tick.requests else "\n".join(tick.reasons),
            cursor=gaps.write_cursor(tick),
        )

    return fill
