"""For tests of orchestration: series that hold bars up to some instant, run requests executed as asked, dead runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.runs.liveness import executing
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
    from ktrdr_pipelines.orchestration.partition_definitions import define_partitions

    found = instance.get_status_by_partition(
        asset_key(series), list(keys), define_partitions(series.timeframe, settings)
    )
    return {key: status.value if status else None for key, status in (found or {}).items()}


def make_run(instance: dg.DagsterInstance, *, is_ours: bool = True, **more: object) -> dg.DagsterRun:
    """A run of a series (or of a job of another program) as it is before a process executes it."""

    key = asset_key(Series(stock("AAPL"), TIMEFRAMES["1h"])) if is_ours else dg.AssetKey("of_another_program")

    @dg.asset(key=key)
    def nothing() -> None:
        pass

    job = dg.Definitions([nothing]).resolve_implicit_global_asset_job_def()
    return instance.create_run_for_job(job, asset_selection=frozenset([key]), **more)  # type: ignore[arg-type]


def make_dead_run(instance: dg.DagsterInstance, **more: object) -> dg.DagsterRun:
    """A run whose process is gone."""
    run = make_run(instance, **more)  # type: ignore[arg-type]
    with executing(instance, run.run_id):
        pass
    return run
