"""Files and ticks for tests of sensors: series that hold bars up to some instant, and run requests executed as asked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.store import Store


def hold(data_dir: Path, series: Series, start: datetime, now: datetime, *, without: Sequence[int] = ()) -> None:
    """Write every bar that opens from ``start`` on and is complete at ``now``; not those at the indices ``without``."""
    opens = expected_bars(series, Window(start, now + timedelta(days=1)), complete_at_s=int(now.timestamp())).opens
    opens = np.delete(opens, list(without))
    # Of about the height of the simulator's: bars that differ by a ratio throughout look like a split.
    unit = 0.01 if series.instrument.sec_type == "CASH" else 1.5
    price = (105 + np.arange(len(opens)) % 50 / 8) * unit
    bars = bars_from_columns(opens, price, price + unit, price - unit, price, np.ones(len(opens)))
    Store(data_dir).write(series, bars, answered=None, source="simulator", now=now)


def execute(
    settings: Settings, universe: Sequence[Series], instance: dg.DagsterInstance, request: dg.RunRequest
) -> dg.ExecuteInProcessResult:
    """Run what a sensor asked for, as the daemon would."""
    job = build_defs(settings, universe).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=list(request.asset_selection or []),
        partition_key=request.partition_key,
        raise_on_error=False,
        tags={**request.tags, "dagster/sensor_name": "tail_fill"},
        run_config={**request.run_config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )


def partition_range(request: dg.RunRequest) -> tuple[str, str]:
    """First and last partition key that ``request`` asks for."""
    if request.partition_key is not None:
        return (request.partition_key, request.partition_key)
    return (
        request.tags["dagster/asset_partition_range_start"],
        request.tags["dagster/asset_partition_range_end"],
    )


def partition_statuses(
    instance: dg.DagsterInstance, series: Series, settings: Settings, keys: Sequence[str]
) -> dict[str, str | None]:
    """Status of the partitions ``keys`` as the UI shows it."""
    from ktrdr_pipelines.orchestration.assets import asset_key
    from ktrdr_pipelines.orchestration.partition_definitions import define_partitions

    found = instance.get_status_by_partition(
        asset_key(series), list(keys), define_partitions(series.timeframe, settings)
    )
    return {key: status.value if status else None for key, status in (found or {}).items()}
