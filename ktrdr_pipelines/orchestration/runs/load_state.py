"""The state of a load that was submitted to Dagster's queue, read from Dagster's records: progress, result, problem.

A load is one run, or two: where the process of the first was killed, Dagster runs it once more (`tags.RETRY_TAGS`), and
the load keeps the first run's id.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import dagster as dg

from ktrdr_pipelines.domain.instruments import file_symbol
from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.orchestration.metadata import PROBLEM, REPORT
from ktrdr_pipelines.orchestration.runs.instance import has_home, open_instance
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
from ktrdr_pipelines.orchestration.runs.progress_tag import NO_PROGRESS, read_progress
from ktrdr_pipelines.orchestration.runs.tags import ORIGIN_TAG, SERIES_TAG
from ktrdr_pipelines.settings import Settings

_Status = dg.DagsterRunStatus
_WAITING = [_Status.QUEUED, _Status.NOT_STARTED]
_UNFINISHED = [*_WAITING, _Status.STARTING, _Status.STARTED]
_WILL_RETRY, _RETRIED_BY = "dagster/will_retry", "dagster/auto_retry_run_id"
_LOST = {
    "kind": "transient",
    "message": "the process that executed this load ended unexpectedly; what was loaded is kept",
    "advice": "Ask again to go on. The run's log in the Dagster UI may have more.",
    "code": None,
}
_CANCELED = {**_LOST, "message": "the load was canceled; what was loaded is kept", "advice": "Ask again to go on."}
_BUG = {
    "kind": "bug",
    "message": "the load ended with an unforeseen error",
    "advice": "Its traceback is in the run's log in the Dagster UI. Please report it.",
    "code": None,
}


@dataclass(frozen=True, slots=True)
class LoadState:
    """A load at one moment. ``run_id`` is its first run; ``run_ids`` are all of them.

    ``status``: queued, running, or as it ended: success, partial, failed. ``result``: the report's plain values, once it is over
    and could begin. ``problem``: why nothing, or not everything, could be loaded.
    """

    run_id: str
    run_ids: Sequence[str]
    request: LoadRequest
    status: str
    accepted_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    loads_before: int | None
    """How many runs are before it in the queue; None when it does not wait."""
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None = None
    problem: Mapping[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "running")


class LoadRecords:
    """Dagster's records of the loads that the entry point ``origin`` submitted; safe for threads.

    Raises (each method):
        StoreError: the Dagster home cannot be used.
    """

    def __init__(self, settings: Settings, origin: str) -> None:
        self._settings, self._origin = settings, origin
        self._mutex = threading.Lock()
        self._opened: dg.DagsterInstance | None = None

    def find(self, run_id: str) -> LoadState | None:
        """The load whose first run is ``run_id``; None where there is none. No Dagster home is created for this."""
        if self._opened is None and not has_home(self._settings):
            return None
        instance = self._open()
        first = instance.get_run_record_by_id(run_id)
        if first is None or first.dagster_run.tags.get(ORIGIN_TAG) != self._origin:
            return None
        request = _request_of(first.dagster_run)
        return _describe(instance, request, _list_attempts(instance, first)) if request is not None else None

    def find_equal(self, request: LoadRequest) -> LoadState | None:
        """The load of ``request`` (in the universe's spelling) that is queued or running, if there is one."""
        tags = {ORIGIN_TAG: self._origin, SERIES_TAG: f"{file_symbol(request.symbol)}_{request.timeframe.name}"}
        for run in self._open().get_runs(dg.RunsFilter(statuses=_UNFINISHED, tags=tags)):
            if _request_of(run) == request:
                # The first run of a retry; but a user may also have executed a load that is over again, in the UI.
                state = self.find(run.root_run_id or run.run_id)
                return state if state is not None and not state.is_over else self.find(run.run_id)
        return None

    def count_waiting(self) -> int:
        """How many loads are queued."""
        return self._open().get_runs_count(dg.RunsFilter(statuses=_WAITING, tags={ORIGIN_TAG: self._origin}))

    def mark_dead_runs(self) -> None:
        """Mark runs whose processes are gone as failed; Dagster then runs such loads once more."""
        reap_dead_runs(self._open())

    def _open(self) -> dg.DagsterInstance:
        with self._mutex:
            if self._opened is None:
                self._opened = open_instance(self._settings)
            return self._opened


def _list_attempts(instance: dg.DagsterInstance, first: dg.RunRecord) -> list[dg.RunRecord]:
    """The runs of one load, oldest first."""
    found = [first]
    while (retry_id := found[-1].dagster_run.tags.get(_RETRIED_BY)) and (
        retry := instance.get_run_record_by_id(retry_id)
    ):
        found.append(retry)
    return found


def _describe(instance: dg.DagsterInstance, request: LoadRequest, attempts: Sequence[dg.RunRecord]) -> LoadState:
    first, last = attempts[0], attempts[-1]
    run = last.dagster_run
    result, problem = _outcome(instance, run) if run.is_finished else (None, None)
    status = _status_of(run, result)
    is_over = status not in ("queued", "running")
    before = _count_before(instance, last) if run.status in _WAITING else None
    progress = dict(_progress_of(run, result))
    if before is not None:
        progress["waiting_for"] = f"Dagster's queue; {before} run{'s' * (before != 1)} before it"
    return LoadState(
        run_id=first.dagster_run.run_id,
        run_ids=[record.dagster_run.run_id for record in attempts],
        request=request,
        status=status,
        accepted_at=first.create_timestamp.astimezone(UTC),
        started_at=_instant(first.start_time),
        ended_at=_instant(last.end_time) if is_over else None,
        loads_before=before,
        progress=progress,
        result=result if is_over else None,
        problem=problem if is_over else None,
    )


def _request_of(run: dg.DagsterRun) -> LoadRequest | None:
    steps = run.run_config.get("ops")
    configs = [step.get("config") for step in steps.values()] if isinstance(steps, dict) else []
    return LoadRequest.from_config(configs[0]) if configs and configs[0].get("symbol") else None


def _status_of(run: dg.DagsterRun, result: Mapping[str, Any] | None) -> str:
    if run.status in _WAITING or (run.status is _Status.FAILURE and run.tags.get(_WILL_RETRY) == "true"):
        return "queued"
    if not run.is_finished:
        return "running"
    if result is not None:
        return str(result["status"])
    return "success" if run.status is _Status.SUCCESS else "failed"


def _outcome(
    instance: dg.DagsterInstance, run: dg.DagsterRun
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The report that the load left, and its problem; a run that left none was lost, canceled, or met a bug."""
    kinds = {dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.STEP_FAILURE}
    events = [entry.dagster_event for entry in instance.all_logs(run.run_id, of_type=kinds) if entry.dagster_event]
    for event in reversed(events):
        if event.event_type is dg.DagsterEventType.ASSET_OBSERVATION:
            metadata = event.asset_observation_data.asset_observation.metadata
            if REPORT in metadata:
                return cast("dict[str, Any]", metadata[REPORT].value), cast(
                    "dict[str, Any]", metadata[PROBLEM].value
                ) or None
    if run.status is _Status.CANCELED:
        return None, _CANCELED
    if run.status is _Status.SUCCESS:
        return None, None
    failed = [event for event in events if event.event_type is dg.DagsterEventType.STEP_FAILURE]
    return None, _BUG if failed and not _was_interrupted(failed[-1]) else _LOST


def _was_interrupted(event: dg.DagsterEvent) -> bool:
    error = event.step_failure_data.error
    return error is not None and "Interrupt" in (error.cls_name or "")


def _progress_of(run: dg.DagsterRun, result: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if result is None:
        return read_progress(run)
    return {
        **NO_PROGRESS,
        "requests_planned": result["requests_planned"],
        "requests_done": result["segments_fetched"] + len(result["failures"]),
        "bars": result["fetched_bars"],
        "windows_failed": len(result["failures"]),
    }


def _count_before(instance: dg.DagsterInstance, record: dg.RunRecord) -> int:
    return instance.get_runs_count(dg.RunsFilter(statuses=_WAITING, created_before=record.create_timestamp))


def _instant(timestamp: float | None) -> datetime | None:
    return datetime.fromtimestamp(timestamp, UTC) if timestamp else None
