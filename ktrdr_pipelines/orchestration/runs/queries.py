"""Queries of Dagster's records, in words that need no Dagster to read: runs, and the status of partitions.

Nothing here changes a record, except that runs of dead processes are ended first (`liveness.py`). What follows from a
partition's status is decided in `orchestration/automation/reconcile.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT, Series, symbol_from_file
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import Recorded
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.runs.instance import has_home, open_instance
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
from ktrdr_pipelines.orchestration.runs.tags import (
    MODE_TAG,
    ORIGIN_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    RETENTION_JOB,
    Origin,
)
from ktrdr_pipelines.settings import Settings

_Event = dg.DagsterEventType
_Status = dg.DagsterRunStatus
_STATUS_OF_RUN = {
    _Status.QUEUED: "queued", _Status.NOT_STARTED: "queued", _Status.MANAGED: "queued", _Status.STARTING: "running",
    _Status.STARTED: "running", _Status.SUSPENDED: "running", _Status.CANCELING: "running", _Status.SUCCESS: "success",
    _Status.FAILURE: "failed", _Status.CANCELED: "canceled",
}  # fmt: skip
_STATUS_OF_PARTITION = {
    "MATERIALIZED": Recorded.COMPLETE,
    "FAILED": Recorded.FAILED,
    "IN_PROGRESS": Recorded.UNDER_WAY,
}
_UNFINISHED = [_Status.QUEUED, _Status.NOT_STARTED, _Status.STARTING, _Status.STARTED, _Status.CANCELING]


@dataclass(frozen=True)
class ActiveRuns:
    """Runs that have not ended: a run's id by asset; ``of_all`` is the id of one that has no asset selection."""

    by_asset: dict[dg.AssetKey, str]
    of_all: str = ""
    by_origin: Mapping[str, str] = field(default_factory=dict)

    def find_origin(self, origin: Origin) -> str:
        """The id of a run that ``origin`` started; empty when there is none."""
        return self.by_origin.get(origin, "")

    def find(self, series: Series) -> str:
        """The id of a run that loads ``series``; empty when there is none."""
        return self.of_all or self.by_asset.get(asset_key(series), "")


def find_active_runs(instance: dg.DagsterInstance) -> ActiveRuns:
    """The runs that have not ended, after runs of dead processes were ended."""
    reap_dead_runs(instance)
    by_asset: dict[dg.AssetKey, str] = {}
    by_origin: dict[str, str] = {}
    of_all = ""
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        if run.job_name == RETENTION_JOB:
            continue
        by_origin[run.tags.get(ORIGIN_TAG, "")] = run.run_id
        if run.asset_selection is None:
            of_all = run.run_id
        else:
            by_asset |= dict.fromkeys(run.asset_selection, run.run_id)
    return ActiveRuns(by_asset, of_all, by_origin)


class PartitionRecord:
    """The status of partitions as the UI shows it. A context manager.

    Where no Dagster home exists yet it is empty: a query does not create one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = ExitStack()
        self._instance: dg.DagsterInstance | None = None
        self._known: set[dg.AssetKey] = set()

    def __enter__(self) -> Self:
        if has_home(self._settings):
            self._instance = self._open.enter_context(open_instance(self._settings))
            self._known = set(self._instance.get_asset_keys())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, series: Series, keys: Iterable[str]) -> Mapping[str, Recorded]:
        """The status by partition key, of those of ``keys`` that have one."""
        if self._instance is None or asset_key(series) not in self._known:
            return {}
        partitions = define_partitions(series.timeframe, self._settings)
        found = self._instance.get_status_by_partition(asset_key(series), list(keys), partitions)
        return {key: _STATUS_OF_PARTITION[status.value] for key, status in (found or {}).items() if status is not None}


@dataclass
class RecordedSeries:
    """What a run did for one series."""

    symbol: str
    timeframe: str
    partitions_completed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run. ``status``: queued, running, success, partial (failed, some partitions complete), failed or canceled.
    ``origin``: the entry point, ``dagster`` for the UI and Dagster's own commands. ``partitions``: the first and the last."""

    run_id: str
    status: str
    origin: str
    mode: str
    series: Sequence[RecordedSeries]
    partitions: tuple[str, str] | None
    accepted_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    failures: Sequence[Mapping[str, Any]]
    """As in the report of a load: ``window``, ``kind``, ``error``; for a failure outside of a load only ``error``."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        first, last = self.partitions or (None, None)
        return {
            "run_id": self.run_id,
            "status": self.status,
            "origin": self.origin,
            "mode": self.mode,
            "series": [
                {
                    "symbol": each.symbol,
                    "timeframe": each.timeframe,
                    "partitions_completed": each.partitions_completed,
                }
                for each in self.series
            ],
            "partitions": {"first": first, "last": last},
            "accepted_at": format_instant(self.accepted_at),
            "started_at": format_instant(self.started_at) if self.started_at else None,
            "ended_at": format_instant(self.ended_at) if self.ended_at else None,
            "failures": list(self.failures),
        }


def find_run(settings: Settings, run_id: str) -> RecordedRun | None:
    """The run with the id ``run_id``; None when there is none, or it loads no series. A run whose process is gone is ended
    first. Where no Dagster home exists yet, none is created.

    Raises:
        StoreError: Dagster's records cannot be used.
    """
    if not is_run_id(run_id) or not has_home(settings):
        return None
    with open_instance(settings) as instance:
        record = instance.get_run_record_by_id(run_id)
        if record is not None and not record.dagster_run.is_finished and reap_dead_runs(instance):
            record = instance.get_run_record_by_id(run_id)
        return _describe(instance, record) if record is not None else None


def is_run_id(text: str) -> bool:
    """True if ``text`` is written like a run id."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _describe(instance: dg.DagsterInstance, record: dg.RunRecord) -> RecordedRun | None:
    run = record.dagster_run
    logs = instance.all_logs(
        run.run_id,
        of_type={
            _Event.ASSET_MATERIALIZATION_PLANNED,
            _Event.ASSET_MATERIALIZATION,
            _Event.STEP_FAILURE,
            _Event.RUN_FAILURE,
        },
    )
    events = [entry.dagster_event for entry in logs if entry.dagster_event is not None]
    chosen = [*(run.asset_selection or ()), *(event.asset_key for event in events if event.asset_key)]
    found = {key: _name_series(key) for key in chosen if _is_series(key)}
    if not found:
        return None
    for event in events:
        series = found.get(event.asset_key) if event.asset_key else None
        if series is not None and event.event_type is _Event.ASSET_MATERIALIZATION and event.partition:
            series.partitions_completed.append(event.partition)
    for series in found.values():
        series.partitions_completed = sorted(set(series.partitions_completed))
    status = _STATUS_OF_RUN[run.status]
    if status == "failed" and any(series.partitions_completed for series in found.values()):
        status = "partial"
    return RecordedRun(
        run.run_id,
        status,
        run.tags.get(ORIGIN_TAG, "dagster"),
        _mode_of(run),
        sorted(found.values(), key=lambda series: (series.symbol, series.timeframe)),
        _partitions_of(run),
        record.create_timestamp.astimezone(UTC),
        datetime.fromtimestamp(record.start_time, UTC) if record.start_time else None,
        datetime.fromtimestamp(record.end_time, UTC) if record.end_time else None,
        _failures_in(events),
    )


def _is_series(key: dg.AssetKey) -> bool:
    return len(key.path) == 2 and key.path[0] == ASSET_ROOT


def _name_series(key: dg.AssetKey) -> RecordedSeries:
    symbol, _, timeframe = key.path[1].rpartition("_")
    return RecordedSeries(symbol_from_file(symbol), timeframe)


def _mode_of(run: dg.DagsterRun) -> str:
    """From the tag; for a run that was configured in the UI, from the first of its steps that has one."""
    if MODE_TAG in run.tags:
        return run.tags[MODE_TAG]
    steps = run.run_config.get("ops")
    configs = (
        [step.get("config") for step in steps.values() if isinstance(step, dict)] if isinstance(steps, dict) else []
    )
    modes = [config.get("mode") for config in configs if isinstance(config, dict)]
    return str(next(filter(None, modes), Mode.FULL))


def _partitions_of(run: dg.DagsterRun) -> tuple[str, str] | None:
    if RANGE_START_TAG in run.tags and RANGE_END_TAG in run.tags:
        return run.tags[RANGE_START_TAG], run.tags[RANGE_END_TAG]
    one = run.tags.get("dagster/partition")
    return (one, one) if one else None


def _failures_in(events: Sequence[dg.DagsterEvent]) -> list[Mapping[str, Any]]:
    """The windows that failed, from the reports in the failed steps' metadata; without those, Dagster's own message."""
    found: list[Mapping[str, Any]] = []
    for event in events:
        if event.event_type is not _Event.STEP_FAILURE:
            continue
        data = event.step_failure_data
        metadata = data.user_failure_data.metadata.get("report") if data.user_failure_data else None
        report = metadata.data if isinstance(metadata, dg.JsonMetadataValue) else None
        windows = report.get("failures") if isinstance(report, dict) else None
        found += windows or [{"error": data.error.message.strip() if data.error else "the step failed"}]
    if not found:
        found = [{"error": event.message or ""} for event in events if event.event_type is _Event.RUN_FAILURE]
    return found
