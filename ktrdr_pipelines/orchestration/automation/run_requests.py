"""Run requests of sensors and schedules: some series, a range of partitions, a mode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import Partition
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.orchestration.runs.tags import (
    BACKFILL_PRIORITY,
    BACKFILL_WORK,
    MAX_RUNTIME_TAG,
    MODE_TAG,
    ORIGIN_TAG,
    PRIORITY_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    RETRY_TAGS,
    TAIL_PRIORITY,
    TIMEFRAME_TAG,
    WORK_TAG,
)

MAX_PARTITIONS = 2_000
"""Partitions × series in one run. Dagster writes an event of about 10 ms for each of them before the run starts."""

MAX_RUNTIME_S = 8 * 3600
"""A run of a sensor that takes longer is ended, so that it does not keep its series from later ticks. 1,000 series with two
requests each take 5.6 hours (60 requests in ten minutes)."""


def request_run(
    series: Sequence[Series],
    first: Partition,
    last: Partition,
    mode: Mode,
    *,
    origin: str,
    run_key: str,
    start: datetime | None = None,
    end: datetime | None = None,
) -> dg.RunRequest:
    """One run that loads ``series`` (of one timeframe) in the partitions from ``first`` to ``last``, and within ``start`` and
    ``end`` if given. In Dagster's queue tails go first, all others are backfills.

    ``run_key`` identifies the reason and the time of the run; a hash of the series is added, so that another selection of
    series is another run.
    """
    names = " ".join(sorted(s.name for s in series))
    is_tail = mode is Mode.TAIL
    tags = {
        MODE_TAG: mode.value,
        ORIGIN_TAG: str(origin),
        TIMEFRAME_TAG: series[0].timeframe.name,
        PRIORITY_TAG: TAIL_PRIORITY if is_tail else BACKFILL_PRIORITY,
        MAX_RUNTIME_TAG: str(MAX_RUNTIME_S),
        **RETRY_TAGS,
    }
    if not is_tail:
        tags[WORK_TAG] = BACKFILL_WORK
    if first != last:
        tags |= {RANGE_START_TAG: first.key, RANGE_END_TAG: last.key}
    return dg.RunRequest(
        run_key=f"{run_key}:{hashlib.sha256(names.encode()).hexdigest()[:12]}",
        asset_selection=[asset_key(s) for s in series],
        partition_key=first.key if first == last else None,
        run_config={"ops": {op_name(series[0]): {"config": _config_for(series, mode, start, end)}}},
        tags=tags,
    )


def _config_for(
    series: Sequence[Series], mode: Mode, start: datetime | None, end: datetime | None
) -> dict[str, str | int]:
    config = LoadRequest(series[0].instrument.symbol, series[0].timeframe, mode, start, end).to_config()
    if len(series) > 1:
        config["symbol"] = ""  # the step makes a request of it for each of its series
    if mode is not Mode.TAIL:
        config["work"] = BACKFILL_WORK
    return config
