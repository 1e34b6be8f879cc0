"""Which runs Dagster's records still need, and the daily job that removes the others.

A run is needed for a time that depends on who started it and how it ended, and longer while a partition shows its failure. What
is removed, and how partition status survives it, is in `orchestration/runs/pruning.py`. Only runs that load series, and those
of this job, are ever removed: jobs of the user are not ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT
from ktrdr_pipelines.orchestration.runs.pruning import prune
from ktrdr_pipelines.orchestration.runs.tags import ORIGIN_TAG, RETENTION_JOB
from ktrdr_pipelines.settings import Settings

RETENTION_CRON = "40 4 * * *"
"""Daily, in UTC: between the sessions of America and Europe."""

USER_ORIGINS = ("cli", "api", "notebook")
_LAUNCHED_BY_DAEMON = ("dagster/sensor_name", "dagster/schedule_name")


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How long after its end a run is kept: by sensors and schedules, one that did not succeed, and one that a user started."""

    automatic: timedelta
    failed: timedelta
    user: timedelta

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The rules in ``settings``."""
        return cls(
            timedelta(days=settings.keep_automatic_runs_days),
            timedelta(days=settings.keep_failed_runs_days),
            timedelta(days=settings.keep_user_runs_days),
        )

    @property
    def shortest(self) -> timedelta:
        """No run is removed earlier than this after its end."""
        return min(self.automatic, self.failed, self.user)

    def find_expiry(self, run: dg.DagsterRun, ended: datetime) -> datetime | None:
        """When the run that ended at ``ended`` expires; None: never, it is not finished or not ours."""
        if not run.is_finished or not is_ours(run):
            return None
        kept = self.automatic if is_automatic(run) else self.user
        if run.status is not dg.DagsterRunStatus.SUCCESS:
            kept = max(kept, self.failed)
        return ended + kept


def is_ours(run: dg.DagsterRun) -> bool:
    """True for a run of series, and of the retention job. A run without a selection of assets may be a job of the user."""
    if run.job_name == RETENTION_JOB:
        return True
    return bool(run.asset_selection) and all(key.path[0] == ASSET_ROOT for key in run.asset_selection or ())


def is_automatic(run: dg.DagsterRun) -> bool:
    """True for a run that no user started. Backfills of the UI are the user's."""
    if any(tag in run.tags for tag in _LAUNCHED_BY_DAEMON):
        return True
    return ORIGIN_TAG in run.tags and run.tags[ORIGIN_TAG] not in USER_ORIGINS


def make_retention_schedule(
    settings: Settings, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dg.ScheduleDefinition:
    """The schedule ``retention`` with its job."""

    @dg.op(name="remove_old_records", description="Removes runs, logs and ticks that nothing needs.")
    def remove_old_records(context: dg.OpExecutionContext) -> None:
        rules = KeepRules.of(settings)
        report = prune(context.instance, rules.find_expiry, now(), earliest=rules.shortest, log=context.log.info)
        context.log.info("\n".join(report.describe()))
        context.add_output_metadata(report.as_dict())

    @dg.job(
        name=RETENTION_JOB,
        description="Removes what nothing needs from Dagster's records; bars, partition status and recent failures stay.",
        executor_def=dg.in_process_executor,
    )
    def retention() -> None:
        remove_old_records()

    return dg.ScheduleDefinition(
        name=RETENTION_JOB,
        job=retention,
        cron_schedule=RETENTION_CRON,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        tags={ORIGIN_TAG: "schedule"},
    )
