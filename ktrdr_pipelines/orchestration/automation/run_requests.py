"""Run requests of sensors and schedules: some series, a range of partitions, a mode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import Partition
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.orchestration.runs.tags import MODE_TAG, ORIGIN_TAG, RANGE_END_TAG, RANGE_START_TAG, TIMEFRAME_TAG


def request_run(
    series: Sequence[Series], first: Partition, last: Partition, mode: Mode, *, origin: str, run_key: str
) -> dg.RunRequest:
    """One run that loads ``series`` (of one timeframe) in the partitions from ``first`` to ``last``.

    ``run_key`` identifies the reason and the time of the run; a hash of the series is added, so that another selection of
    series is another run.
    """
    names = " ".join(sorted(s.name for s in series))
    tags = {MODE_TAG: mode.value, ORIGIN_TAG: origin, TIMEFRAME_TAG: series[0].timeframe.name}
    if first != last:
        tags |= {RANGE_START_TAG: first.key, RANGE_END_TAG: last.key}
    config = LoadRequest(series[0].instrument.symbol, series[0].timeframe, mode).to_config()
    if len(series) > 1:
        config["symbol"] = ""  # the step makes a request of it for each of its series
    return dg.RunRequest(
        run_key=f"{run_key}:{hashlib.sha256(names.encode()).hexdigest()[:12]}",
        asset_selection=[asset_key(s) for s in series],
        partition_key=first.key if first == last else None,
        run_config={"ops": {op_name(series[0]): {"config": config}}},
        tags=tags,
    )
