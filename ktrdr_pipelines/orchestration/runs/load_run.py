"""One run that loads one series, as every entry point starts it: its partitions, tags and run config."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.orchestration.assets import op_name
from ktrdr_pipelines.orchestration.runs.tags import (
    BACKFILL_WORK,
    MODE_TAG,
    ORIGIN_TAG,
    PARTITION_TAG,
    PRIORITY_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    SERIES_TAG,
    TAIL_PRIORITY,
    WORK_TAG,
)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """``request`` for ``series``, in the partitions that ``window`` (not empty) touches. ``origin`` is the entry point.

    ``oldest`` is where the window begins when neither a start nor a tail's last held bar decides; None: not needed.
    """

    series: Series
    request: LoadRequest
    window: Window
    oldest: datetime | None
    origin: str
    notice: str = ""
    """For the report: what the user should know of the chosen partitions."""

    @property
    def partitions(self) -> tuple[Partition, Partition]:
        """The first and the last partition of the run."""
        found = list(partitions_in(self.series.timeframe, self.window))
        return found[0], found[-1]

    def tags(self) -> dict[str, str]:
        """The run's tags, those that choose its partitions and its place in Dagster's queue included."""
        first, last = self.partitions
        where = {PARTITION_TAG: first.key} if first == last else {RANGE_START_TAG: first.key, RANGE_END_TAG: last.key}
        is_tail = self.request.mode is Mode.TAIL
        queue = {PRIORITY_TAG: TAIL_PRIORITY} if is_tail else {WORK_TAG: BACKFILL_WORK}
        return {
            ORIGIN_TAG: self.origin,
            MODE_TAG: self.request.mode.value,
            SERIES_TAG: self.series.name,
            **where,
            **queue,
        }

    def run_config(self) -> dict[str, object]:
        """The run config: the whole request."""
        oldest = format_instant(self.oldest) if self.oldest else ""
        config = {**self.request.to_config(), "oldest": oldest, "notice": self.notice}
        return {"ops": {op_name(self.series): {"config": config}}}
