"""Fixed times instead of "as soon as due": one schedule for each timeframe in KTRDR_TAIL_SCHEDULES, in UTC.

A tick decides as the sensor does (`tail.decide_tail`), without the sensor's growing waits after failures: the user chose
the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.cancelled import read_cancelled
from ktrdr_pipelines.orchestration.automation.due import HeldEnds
from ktrdr_pipelines.orchestration.automation.tail import decide_tail
from ktrdr_pipelines.orchestration.runs.queries import find_active_runs
from ktrdr_pipelines.orchestration.runs.tags import Origin
from ktrdr_pipelines.settings import Settings


def make_tail_schedules(
    settings: Settings, universe: Sequence[Series], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> list[dg.ScheduleDefinition]:
    """A schedule ``tail_<timeframe>`` for each timeframe with a cron expression that ``universe`` has series of.

    Raises:
        InputError: Dagster rejects a cron expression.
    """
    check_cron_expressions(settings)
    made = []
    for name, cron in settings.tail_schedules.items():
        mine = [s for s in universe if s.timeframe.name == name]
        if mine:
            made.append(_make_schedule(settings, name, cron, mine, now))
    return made


def check_cron_expressions(settings: Settings) -> None:
    """Dagster's own check of KTRDR_TAIL_SCHEDULES, before anything is started.

    Raises:
        InputError: Dagster rejects one.
    """
    for name, cron in settings.tail_schedules.items():
        try:
            dg.ScheduleDefinition(name=f"tail_{name}", cron_schedule=cron, job_name="tail")
        except dg.DagsterInvalidDefinitionError:
            raise InputError(
                f"KTRDR_TAIL_SCHEDULES: {cron!r} for {name} is not a cron expression",
                doing="reading settings",
                advice="Use five fields: minute, hour, day of month, month, day of week.",
            ) from None


def _make_schedule(
    settings: Settings, name: str, cron: str, mine: Sequence[Series], now: Callable[[], datetime]
) -> dg.ScheduleDefinition:
    held = HeldEnds(settings.data_dir)

    @dg.schedule(
        name=f"tail_{name}",
        cron_schedule=cron,
        target=dg.AssetSelection.assets(*(asset_key(s) for s in mine)),
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Loads new {name} bars of every series that has a file, in one run.",
    )
    def tail(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        at = now()
        tick = decide_tail(
            settings,
            mine,
            held,
            find_active_runs(context.instance),
            at,
            cancelled=read_cancelled(context.instance, at),
            origin=Origin.SCHEDULE,
        )
        for problem in [*tick.problems, *tick.notices]:
            context.log.warning(problem)
        return tick.requests or dg.SkipReason("\n".join(tick.reasons))

    return tail
