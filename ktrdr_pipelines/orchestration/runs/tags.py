"""Tags of runs: our own, and Dagster's that it exports no names for; and the name of our only job that loads nothing."""

from enum import StrEnum

RETENTION_JOB = "retention"

ORIGIN_TAG = "ktrdr/origin"
"""The entry point that launched the run: cli, api, or an `Origin`. Without it: the UI or a command of Dagster's."""


class Origin(StrEnum):
    """Values of `ORIGIN_TAG` for runs that no user started."""

    SENSOR = "sensor"
    SCHEDULE = "schedule"
    RECONCILE = "reconcile"
    GAP_FILL = "gap_fill"


MODE_TAG = "ktrdr/mode"
SERIES_TAG = "ktrdr/series"
TIMEFRAME_TAG = "ktrdr/timeframe"

INTERRUPTED_TAG = "ktrdr/interrupted"
"""On a run that Ctrl-C ended: Dagster records it as failed, the user meant to cancel it."""

WORK_TAG = "ktrdr/work"
BACKFILL_WORK = "backfill"
"""The value of `WORK_TAG` for a run that may take long. `dagster.yaml` limits how many of them run at once."""

PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"

PARENT_TAG = "dagster/parent_run_id"
"""On a run that repeats another one."""
RETRY_NUMBER_TAG = "dagster/retry_number"
"""On a run that Dagster started to retry another one."""

PRIORITY_TAG = "dagster/priority"
TAIL_PRIORITY, BACKFILL_PRIORITY = "10", "-10"
"""Among queued runs: tails first, then what a user started in the UI (no priority), then backfills."""

RETRY_TAGS = {
    "dagster/max_retries": "1",
    "dagster/retry_strategy": "ALL_STEPS",
    "dagster/retry_on_asset_or_op_failure": "false",
}
"""A run whose process was killed, or that Dagster could not start, is tried once more; one that failed with a reason is not
(`run_retries` in dagster.yaml has the same for runs without these tags)."""

NO_RETRY_TAGS = {"dagster/max_retries": "0"}
"""For runs that a command executes in its own process: Dagster cannot start them again."""

MAX_RUNTIME_TAG = "dagster/max_runtime"
