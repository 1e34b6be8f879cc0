"""Execute one series' asset in this process, as a Dagster run like every other: visible in the UI, partitions and all.

This is how the command line and the REST API load. Only the one asset is built, which keeps a command quick however large the
universe.
"""

from __future__ import annotations

import threading
import traceback
import uuid

import dagster as dg
from sqlalchemy.exc import DBAPIError

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.assets import LoadConfig, asset_key, op_name
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.runs.dead_runs import owner_tag, reaping
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint, lend
from ktrdr_pipelines.orchestration.runs.instance import ORIGIN_TAG, explain_database
from ktrdr_pipelines.settings import Settings

_one_run_at_a_time = threading.Lock()
"""Concurrent in-process runs in threads of one process deadlock on SQLite (dagster_facts.md, 8)."""


def execute_load(
    settings: Settings,
    instance: dg.DagsterInstance,
    series: Series,
    window: Window,
    *,
    entry_point: EntryPoint,
    origin: str,
    mode: str,
    run_id: str | None = None,
) -> tuple[LoadReport, str]:
    """Materialize the partitions that ``window`` touches, asking for nothing outside of it. Returns report and run id.

    Failed windows are in the report, nothing is raised for them.

    Raises:
        KeyboardInterrupt: a person stopped it; what was loaded is kept.
        StoreError: Dagster's database refuses.
        RuntimeError: the run failed for a reason that is not in the report: a bug, with its traceback.
    """
    partitions = list(partitions_in(series.timeframe, window))
    first, last = partitions[0], partitions[-1]
    config = LoadConfig(
        start=format_instant(window.start),  # always: a given start is not narrowed by the mode
        end=format_instant(window.end) if window.end < last.window.end else "",
        mode=mode,
    )
    run_id = run_id or str(uuid.uuid4())
    tags = {ORIGIN_TAG: origin, **owner_tag(run_id), "ktrdr/mode": mode, "ktrdr/series": series.name}
    if first == last:
        where: dict[str, object] = {"partition_key": first.key}
    else:
        where = {}
        tags["dagster/asset_partition_range_start"] = first.key
        tags["dagster/asset_partition_range_end"] = last.key
    job = build_definitions(settings, [series]).resolve_implicit_global_asset_job_def()
    try:
        with _one_run_at_a_time, lend(entry_point), reaping(instance):
            result = job.execute_in_process(
                instance=instance,
                run_id=run_id,
                asset_selection=[asset_key(series)],
                raise_on_error=False,
                tags=tags,
                run_config={
                    "ops": {op_name(series): {"config": config.model_dump()}},
                    # People see progress and the report; Dagster's own log is in the UI.
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                },
                **where,  # type: ignore[arg-type]
            )
    except DBAPIError as error:
        raise explain_database(error, settings.dagster_home) from error
    if not result.success and any(_was_interrupted(e) for e in result.all_events):
        raise KeyboardInterrupt
    if not entry_point.reports or (not result.success and not entry_point.reports[-1].failures):
        raise RuntimeError(f"run {result.run_id} failed:\n{_explain(result)}")
    return entry_point.reports[-1], result.run_id


def _was_interrupted(event: dg.DagsterEvent) -> bool:
    """True for the failure that Ctrl-C makes of a step."""
    error = getattr(event.event_specific_data, "error", None)
    while error is not None:
        if error.cls_name in ("DagsterExecutionInterruptedError", "KeyboardInterrupt"):
            return True
        error = error.cause
    return False


def _explain(result: dg.ExecuteInProcessResult) -> str:
    errors = [
        e.event_specific_data.error.to_string()  # type: ignore[union-attr]
        for e in result.all_events
        if e.is_failure and getattr(e.event_specific_data, "error", None)
    ]
    return "\n".join(errors) or "".join(traceback.format_stack(limit=3))
