"""Tags of runs: our own, and Dagster's that it exports no names for; and the name of our only job that loads nothing."""

RETENTION_JOB = "retention"

ORIGIN_TAG = "ktrdr/origin"
"""The entry point that launched the run: cli, api, sensor, schedule. Without it: the UI or a command of Dagster's."""

MODE_TAG = "ktrdr/mode"
SERIES_TAG = "ktrdr/series"
TIMEFRAME_TAG = "ktrdr/timeframe"

PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
