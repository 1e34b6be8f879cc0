"""What Dagster recorded of one run, whoever started it, in words that need no Dagster to read.

For people's questions. Which runs go on now is `active.py`'s business, the status of partitions `partition_status.py`'s.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT, symbol_from_file
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.orchestration.automation.run_requests import MODE_TAG, RANGE_END_TAG, RANGE_START_TAG
from ktrdr_pipelines.orchestration.runs.dead_runs import reap_dead_runs
from ktrdr_pipelines.orchestration.runs.instance import ORIGIN_TAG, open_instance
from ktrdr_pipelines.settings import Settings

_Status = dg.DagsterRunStatus
_WORDS = {
    _Status.QUEUED: "queued", _Status.NOT_STARTED: "queued", _Status.MANAGED: "queued", _Status.STARTING: "running",
    _Status.STARTED: "running", _Status.SUSPENDED: "running", _Status.CANCELING: "running", _Status.SUCCESS: "success",
    _Status.FAILURE: "failed", _Status.CANCELED: "canceled",
}  # fmt: skip
_Event = dg.DagsterEventType


@dataclass
class RecordedSeries:
    """What a run did for one series."""

    symbol: str
    timeframe: str
    partitions_completed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run. ``status``: queued, running, success, partial (some partitions were completed), failed or canceled; ``origin``:
    the door, ``dagster`` for the UI and Dagster's own commands. ``partitions``: the first and the last that it is about."""

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
    """As in the report of a load: ``window``, ``kind``, ``error``; of what failed outside of a load only ``error``."""

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
    """The run called ``run_id``; None when Dagster knows none, or it is not about series. A run whose process is gone is
    marked as failed first. Where there is no Dagster home yet none is begun.

    Raises:
        StoreError: Dagster's records cannot be used.
    """
    if not is_run_id(run_id) or not (settings.dagster_home / "dagster.yaml").exists():
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
    found = {key: RecordedSeries(symbol_from_file(key.path[1]), key.path[2]) for key in chosen if _is_series(key)}
    if not found:
        return None
    for event in events:
        series = found.get(event.asset_key) if event.asset_key else None
        if series is not None and event.event_type is _Event.ASSET_MATERIALIZATION and event.partition:
            series.partitions_completed.append(event.partition)
    for series in found.values():
        series.partitions_completed = sorted(set(series.partitions_completed))
    status = _WORDS[run.status]
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
    return len(key.path) == 3 and key.path[0] == ASSET_ROOT


def _mode_of(run: dg.DagsterRun) -> str:
    """As its door said it; of runs that a person configured in the UI, as the first of their steps says."""
    if MODE_TAG in run.tags:
        return run.tags[MODE_TAG]
    steps = run.run_config.get("ops")
    configs = (
        [step.get("config") for step in steps.values() if isinstance(step, dict)] if isinstance(steps, dict) else []
    )
    said = [config.get("mode") for config in configs if isinstance(config, dict)]
    return str(next(filter(None, said), Mode.FULL))


def _partitions_of(run: dg.DagsterRun) -> tuple[str, str] | None:
    if RANGE_START_TAG in run.tags and RANGE_END_TAG in run.tags:
        return run.tags[RANGE_START_TAG], run.tags[RANGE_END_TAG]
    one = run.tags.get("dagster/partition")
    return (one, one) if one else None


def _failures_in(events: Sequence[dg.DagsterEvent]) -> list[Mapping[str, Any]]:
    """The windows that failed, from the reports that failed steps left; else what Dagster says of the failure."""
    found: list[Mapping[str, Any]] = []
    for event in events:
        if event.event_type is not _Event.STEP_FAILURE:
            continue
        data = event.step_failure_data
        left = data.user_failure_data.metadata.get("report") if data.user_failure_data else None
        report = left.data if isinstance(left, dg.JsonMetadataValue) else None
        windows = report.get("failures") if isinstance(report, dict) else None
        found += windows or [{"error": data.error.message.strip() if data.error else "the step failed"}]
    if not found:
        found = [{"error": event.message or ""} for event in events if event.event_type is _Event.RUN_FAILURE]
    return found
