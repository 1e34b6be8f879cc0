"""Dagster's partition definitions: one per timeframe, shared by all series.

The grid itself (keys, windows) is `ktrdr_pipelines/domain/partitions.py`; a test holds the two together. Shared because assets
with equal definitions can be materialized in one run: 50 ms a series instead of 6 s a run (docs/dagster_facts.md, 6).
"""

from __future__ import annotations

from datetime import UTC, datetime, time

import dagster as dg

from ktrdr_pipelines.domain.partitions import partition_at
from ktrdr_pipelines.domain.timeframes import PartitionUnit, Timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.settings import Settings

# Weekdays only: Friday's window runs to Monday 00:00 UTC, so that no partition is for ever empty.
_CRON: dict[PartitionUnit, str] = {"day": "0 0 * * 1-5", "week": "0 0 * * 0", "month": "0 0 1 * *", "year": "0 0 1 1 *"}
_FORMAT: dict[PartitionUnit, str] = {"day": "%Y-%m-%d", "week": "%Y-%m-%d", "month": "%Y-%m-%d", "year": "%Y"}


def first_partition_start(timeframe: Timeframe, settings: Settings) -> datetime:
    """Start (UTC) of the first partition of ``timeframe`` that begins on or after the configured day."""
    configured = datetime.combine(settings.partition_start(timeframe.name), time(), UTC)
    window = partition_at(timeframe, configured).window
    return window.start if window.start == configured else window.end


def define_partitions(timeframe: Timeframe, settings: Settings) -> dg.TimeWindowPartitionsDefinition:
    """The definition for ``timeframe``. ``end_offset=1``: the unfinished window is a partition too."""
    start = first_partition_start(timeframe, settings)
    if start > datetime.now(UTC):
        raise InputError(
            f"KTRDR_PARTITION_STARTS: {timeframe.name} would start in the future ({start:%Y-%m-%d})",
            advice="Choose a past day.",
        )
    return dg.TimeWindowPartitionsDefinition(
        start=start.replace(tzinfo=None),
        cron_schedule=_CRON[timeframe.partition],
        fmt=_FORMAT[timeframe.partition],
        timezone="UTC",
        end_offset=1,
    )
